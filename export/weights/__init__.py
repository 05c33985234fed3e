"""Fills models on the meta device with weights, read from a Hugging Face folder or drawn at random."""
