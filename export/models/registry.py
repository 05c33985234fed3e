"""The targets of ``export-model --target NAME`` as data, and how to find one by name.

This module imports neither torch nor transformers, so listing targets and refusing a misspelled name is instant.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

from flashpte.export.common.errors import ExportError, UsageError
from flashpte.export.common.options import RUNNER_TEXT

if TYPE_CHECKING:
    from torch import nn

    from flashpte.export.state.layer_state import LayerState

ENTRY_POINT_GROUP = "flashpte.targets"
"""Entry points of installed packages with targets: ``name = "package.module:TARGET"``, a :class:`TargetSpec`."""


def default_taps(layers: int) -> tuple[int, ...]:
    """Hidden states that an EAGLE-3 draft reads when its config names none: one low, one middle, one high.

    Published drafts were trained with ``(2, n // 2, n - 3)``, which vLLM and SGLang also assume. A model with fewer
    than 7 layers is tapped at the outputs of its first, middle and last layer.

    Args:
        layers: n, number of decoder layers of the target, at least 1.

    Returns:
        The taps, ascending, numbered as in :class:`TargetSpec`: 0 is the embedding, k the output of layer k - 1.
    """
    if layers >= 7:
        return (2, layers // 2, layers - 3)
    return tuple(sorted({1, (layers + 1) // 2, layers}))


@dataclasses.dataclass(frozen=True)
class TargetSpec:
    """A model family that can be exported.

    Its vocabulary, hidden size and sliding window are read from the built model
    (:class:`flashpte.export.models.build.ModelFacts`), because config fields differ between releases of transformers.

    Attributes:
        name: value of ``--target``.
        description: one line for ``--list-targets``.
        model_types: values of ``model_type`` in a ``config.json`` that this target accepts; ``None`` for all that its
            ``build`` accepts.
        tested: values of ``model_type`` that tests compare with transformers, for ``--list-targets``.
        build: takes the fields of a ``config.json`` and makes the causal language model that they describe, with
            parameters on the meta device and the attention implementation
            :data:`flashpte.export.models.attention_interface.ATTENTION_NAME`; see
            :func:`flashpte.export.models.build.build_causal_lm`.
        config: fields of the full-size model; ``None`` if an export needs a checkpoint or ``--config``.
        small_config: fields of the ``--small`` model: the same architecture, exported in a few minutes.
        max_seq_len: default of ``--max-seq-len``; a model with fewer positions lowers it.
        small_max_seq_len: the same for ``--small``.
        taps: maps the number of decoder layers to the hidden states that a draft reads when its own config names none;
            0 is the embedding, k the output of layer k - 1.
        min_forward: fewest tokens of one forward; more than 1 rules out ``decode``.
        max_forward: most tokens of one forward; ``None`` for no limit from the target. The sliding window is always a
            limit too, because the ring of keys is twice the window.
        weight_formats: formats of weights that do not have the export's dtype: pairs of a regular expression for the
            whole name (``model.layers.0.mlp.up_proj.weight``) and the name of a format; the first match counts.
        layer_state: returns the state of a decoder layer; ``None`` for layers with Hugging Face attention.
        executorch_runner: the runner of ExecuTorch that ``--runner executorch`` stands for, see
            :mod:`flashpte.export.models.executorch_runners`.
    """

    name: str
    description: str
    model_types: tuple[str, ...] | None
    build: Callable[[Mapping[str, Any]], nn.Module]
    tested: tuple[str, ...] = ()
    config: Mapping[str, Any] | None = None
    small_config: Mapping[str, Any] | None = None
    max_seq_len: int = 4096
    small_max_seq_len: int = 256
    taps: Callable[[int], tuple[int, ...]] = default_taps
    min_forward: int = 1
    max_forward: int | None = None
    weight_formats: tuple[tuple[str, str], ...] = ()
    layer_state: Callable[[nn.Module], LayerState] | None = None
    executorch_runner: str = RUNNER_TEXT


def _builtin_targets() -> dict[str, TargetSpec]:
    from flashpte.export.models import gemma4, hugging_face

    return {spec.name: spec for spec in (gemma4.TARGET, hugging_face.TARGET)}


def _installed_targets() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=ENTRY_POINT_GROUP)}


def _load(entry: EntryPoint) -> TargetSpec:
    spec = entry.load()
    if not isinstance(spec, TargetSpec):
        raise ExportError(
            f"entry point {entry.name} = {entry.value} of group {ENTRY_POINT_GROUP} is a {type(spec).__name__}, "
            "not a TargetSpec"
        )
    return spec


def list_targets() -> tuple[TargetSpec, ...]:
    """Every target, built in or installed, sorted by name; a built-in one hides an installed one of the same name."""
    builtin = _builtin_targets()
    installed = {name: _load(entry) for name, entry in _installed_targets().items() if name not in builtin}
    return tuple(sorted([*builtin.values(), *installed.values()], key=lambda spec: spec.name))


def get_target(name: str) -> TargetSpec:
    """Finds a target by name.

    Raises:
        UsageError: there is no such target; the text suggests a close name.
        ExportError: an installed package's entry point of that name is not a :class:`TargetSpec`.
    """
    builtin = _builtin_targets()
    if name in builtin:
        return builtin[name]
    installed = _installed_targets()
    if name in installed:
        return _load(installed[name])
    names = sorted({*builtin, *installed})
    raise UsageError(f"unknown target {name!r}; {suggest(name, names)}")


def targets_for(model_type: str) -> tuple[str, ...]:
    """Names of the built-in targets for a ``model_type``: those that name it, or else those that name none."""
    specs = _builtin_targets().values()
    named = tuple(spec.name for spec in specs if spec.model_types is not None and model_type in spec.model_types)
    return named or tuple(spec.name for spec in specs if spec.model_types is None)


def suggest(name: str, known: list[str]) -> str:
    """``did you mean ...?`` if a known name is close, or else the list of known names."""
    close = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
