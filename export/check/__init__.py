"""``run-model --check``: compares a program with the eager Hugging Face model that it was exported from."""
