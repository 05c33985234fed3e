"""Our operators, exactly as the pass emits them.

For a mask that the pass has proven it emits bounds of positions (``flashpte``), for any other the mask and its tile map
(``flashpte, mask as tensor``). The map is made once for all layers that share the mask and is timed on its own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

import flashpte.kernels as kernels
from flashpte.kernels import tuning
from harness.cases import Case
from harness.inputs import Inputs
from harness.programs import calls_of_program, compile_program, not_in_a_program, path_of
from harness.runner import Runner, Variant

DIM_ORDER = [0, 2, 1, 3]
POSITIONS, TENSOR, CAUSAL, AOTI = "flashpte", "flashpte, mask as tensor", "flashpte is_causal", "flashpte aoti"

Map = tuple[torch.Tensor, torch.Tensor]


def operator(case: Case) -> Callable[..., torch.Tensor]:
    """The operator that the pass picks for a number of rows."""
    if case.prefills:
        return kernels.sdpa_prefill
    return kernels.sdpa_decode if case.rows == 1 else kernels.sdpa_verify


def map_makers(inputs: Inputs) -> dict[str, Callable[[], Map]]:
    """How the tile map of a case is made, by runner."""
    case, ops = inputs.case, torch.ops.flashpte
    if case.prefills:
        tile = tuning.tiled_map_block(case.shape.head_dim, case.shape.head_dim)
        return {
            POSITIONS: lambda: ops.interval_map(inputs.bounds, None, case.length, *tile),
            TENSOR: lambda: ops.tile_map(inputs.mask, case.rows, case.length, *tile, 1),
        }
    tile, group = (16, tuning.SPLIT_K_MAP_BLOCK_N), case.shape.group
    return {
        POSITIONS: lambda: ops.interval_map(inputs.bounds, None, case.length, *tile, 1),
        TENSOR: lambda: ops.tile_map(inputs.mask, case.rows, case.length, *tile, group, 1),
    }


def by_positions(inputs: Inputs) -> dict[str, Variant]:
    """As emitted for a proven mask."""
    op, (tiles, counts), bounds = operator(inputs.case), map_makers(inputs)[POSITIONS](), inputs.bounds
    given = (None, tiles, counts, False, inputs.case.shape.scale, DIM_ORDER, bounds)
    return {"": Variant([lambda s=s: op(*s, *given) for s in inputs.sets])}


def by_tensor(inputs: Inputs) -> dict[str, Variant]:
    """As emitted for any other mask."""
    op, (tiles, counts), mask = operator(inputs.case), map_makers(inputs)[TENSOR](), inputs.mask
    given = (mask, tiles, counts, False, inputs.case.shape.scale, DIM_ORDER)
    return {"": Variant([lambda s=s: op(*s, *given) for s in inputs.sets])}


def by_flag(inputs: Inputs) -> dict[str, Variant]:
    """As emitted for ``is_causal``."""
    given = (None, None, None, True, inputs.case.shape.scale, DIM_ORDER)
    return {"": Variant([lambda s=s: kernels.sdpa_prefill(*s, *given) for s in inputs.sets])}


def make_program(case: Case) -> None:
    """Lowers a program of the operator, for :func:`compiled`; needs no GPU."""
    inputs, op, scale = Inputs.make(case, 1, "cpu"), operator(case), case.shape.scale

    def attend(q, k, v, tiles, counts, bounds):
        return op(q, k, v, None, tiles, counts, False, scale, DIM_ORDER, bounds)

    compile_program(attend, case, (*map_makers(inputs)[POSITIONS](), inputs.bounds))


def compiled(inputs: Inputs) -> dict[str, Variant]:
    """The operator in a program that our lowering made."""
    if not path_of(inputs.case).exists():
        make_program(inputs.case)
    return {"": calls_of_program(inputs, (*map_makers(inputs)[POSITIONS](), inputs.bounds))}


def _few_with_tensor(case: Case) -> str | None:
    return None if case.prefills or case.length in (4096, 131072) else "shown at 4,096 and 131,072 keys"


def _causal_alone(case: Case) -> str | None:
    return None if case.rows == case.length and case.window is None else "needs a square causal mask"


def _not_swept(case: Case) -> str | None:
    return "not in this suite" if case.suite == "other" else None


def _unless_swept(refuses: Callable[[Case], str | None]) -> Callable[[Case], str | None]:
    return lambda case: _not_swept(case) or refuses(case)


def _by_program(case: Case) -> object:
    """Programs are compiled one by one, where they were not made beforehand."""
    return None if path_of(case).exists() else case.key


def _by_rows(case: Case) -> object:
    return case.suite, case.shape_name, case.rows if case.suite == "verify" else None


RUNNERS = (
    Runner(POSITIONS, lambda case: None, by_positions, ours=True, group=_by_rows),
    Runner(TENSOR, _unless_swept(_few_with_tensor), by_tensor, ours=True, group=_by_rows),
    Runner(CAUSAL, _unless_swept(_causal_alone), by_flag, ours=True),
    Runner(AOTI, _unless_swept(not_in_a_program), compiled, ours=True, group=_by_program, plain_only=True),
)
