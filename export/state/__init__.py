"""The state that a model's layers keep between calls."""
