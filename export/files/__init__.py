"""The file format: what a ``.pte``, a ``.ptd`` and a manifest look like, and the folder that holds them."""
