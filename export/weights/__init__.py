"""Weights for models on the meta device: read from a Hugging Face folder, or drawn at random."""
