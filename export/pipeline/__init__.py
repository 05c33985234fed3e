"""Turns a target and options into a lowered model: plan, programs, replaced attention, files."""

from flashpte.export.pipeline.plan import ExportPlan, plan_export
from flashpte.export.pipeline.programs import (
    ExportResult,
    export_model,
    export_programs,
    load_weights,
    preview_routing,
    replace_attention,
)

__all__ = [
    "ExportPlan",
    "ExportResult",
    "export_model",
    "export_programs",
    "load_weights",
    "plan_export",
    "preview_routing",
    "replace_attention",
]
