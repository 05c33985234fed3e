"""``run-model --check``: a program against the eager Hugging Face model that it was exported from."""
