"""The file formats of ``.pte``, ``.ptd`` and manifest, and the folder that holds them."""
