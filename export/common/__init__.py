"""Errors, options and signals that every room may use. Nothing here imports torch."""
