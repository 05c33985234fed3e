"""Exports models to ``.pte`` and ``.pt2``, and runs them: the ``export-model`` and ``run-model`` commands."""
