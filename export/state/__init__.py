"""What the layers of a model remember between calls."""
