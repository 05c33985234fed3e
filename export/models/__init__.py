"""Models that can be exported: the registry of targets, the modules, and the methods of the exported programs."""

from flashpte.export.models.registry import TargetSpec, get_target, list_targets

__all__ = ["TargetSpec", "get_target", "list_targets"]
