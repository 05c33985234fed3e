"""One operator for few and many rows of x: M chooses the kernel, at run time if it is dynamic.

On Hopper, kernels in Gluon take what they serve; the plain kernels take the rest, and everything on other archs.

As in :mod:`flashpte.kernels.dispatch`, a lowered program then contains both kernels, and the one that M does not select
gets an empty grid.
"""

from __future__ import annotations

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from flashpte.kernels import tuning
from flashpte.kernels.launch import static_int
from flashpte.kernels.linear import few_rows_hopper, many_rows_hopper
from flashpte.kernels.linear.call import Destination, LinearCall
from flashpte.kernels.linear.contract import check_linear
from flashpte.kernels.linear.plain import launch_few_rows, launch_many_rows
from flashpte.kernels.linear.tuning import MAX_FEW_ROWS, choose_few_rows_hopper, choose_many_rows_hopper


def _launch_few(call: LinearCall, into: Destination) -> None:
    config = choose_few_rows_hopper(call.shape(), tuning.current_arch(call.x.device))
    if config is not None and few_rows_hopper.serves(call, config):
        few_rows_hopper.launch_few_rows_hopper(call, config, into)
    else:
        launch_few_rows(call, into=into)


def _launch_many(call: LinearCall, into: Destination) -> None:
    config = choose_many_rows_hopper(call.shape(), tuning.current_arch(call.x.device))
    if config is not None and many_rows_hopper.serves(call):
        many_rows_hopper.launch_many_rows_hopper(call, config, into)
    else:
        launch_many_rows(call, into=into)


def launch_linear(call: LinearCall) -> torch.Tensor:
    """Launches the few-rows kernel for at most :data:`MAX_FEW_ROWS` rows of x, and the many-rows kernel for more.

    A symbolic M whose known range is on one side gets one kernel.

    Returns:
        ``[..., N]`` in the dtype of x, contiguous.

    Raises:
        ValueError: the call does not fit.
    """
    check_linear(call)
    rows, out = call.rows, call.empty_output()
    if statically_known_true(rows == 0):
        return out
    # 0 for few rows, 1 for many; an expression if M may be either.
    many: int | torch.SymInt = torch.sym_min(1, rows // (MAX_FEW_ROWS + 1))
    if statically_known_true(rows <= MAX_FEW_ROWS):
        many = 0
    elif statically_known_true(rows > MAX_FEW_ROWS):
        many = 1
    if static_int(many) != 1:
        _launch_few(call, Destination(out, 1 - many))
    if static_int(many) != 0:
        _launch_many(call, Destination(out, many))
    return out
