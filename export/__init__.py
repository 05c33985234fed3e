"""Exporting models: targets, weights, lowering to ``.pte`` and ``.pt2``, and the ``export-model`` command."""
