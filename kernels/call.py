"""The arguments of launchers: an attention call, the tile map that comes with it, and one kernel launch for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from flashpte.kernels import tuning
from flashpte.kernels.launch import broadcast_stride, cdiv, empty_output, exponent_scale, static_int, with_unit_stride
from flashpte.kernels.primitives import LOG2E

if TYPE_CHECKING:
    from flashpte.kernels.intervals import Intervals


@dataclasses.dataclass(frozen=True)
class AttentionCall:
    """One call of attention.

    Attributes:
        query, key, value: ``[B, H_q, L_q, D]``, ``[B, H_kv, L_kv, D]``, ``[B, H_kv, L_kv, D_v]``.
        scale: factor of the scores.
        is_causal: top-left aligned.
        dim_order: memory order of the result's dimensions, outermost first.
        mask: ``[Bm, Hm, Lm, Nm]``, size 1 where it broadcasts; bool or float.
        intervals: the mask as intervals, instead of ``mask``.
        softcap: limit of the scores, in their natural units; 0 for none.
        sinks: ``[H_q]``, a score of each query head that takes part in the softmax and has no value.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scale: float
    is_causal: bool = False
    dim_order: Sequence[int] = (0, 2, 1, 3)
    mask: torch.Tensor | None = None
    intervals: Intervals | None = None
    softcap: float = 0.0
    sinks: torch.Tensor | None = None

    # Sizes; some may be symbolic.
    batch = property(lambda self: self.query.shape[0])
    heads_q = property(lambda self: self.query.shape[1])
    heads_kv = property(lambda self: self.key.shape[1])
    group = property(lambda self: self.heads_q // self.heads_kv, doc="Query heads per key/value head.")
    q_len = property(lambda self: self.query.shape[2])
    kv_len = property(lambda self: self.key.shape[2])
    head_dim = property(lambda self: self.query.shape[3])
    v_head_dim = property(lambda self: self.value.shape[3])

    @property
    def exp2_scale(self) -> float:
        """The kernels' ``EXP2_SCALE``."""
        return exponent_scale(self.query.dtype, self.mask)

    @property
    def constants(self) -> dict[str, int]:
        """Constants of every attention kernel."""
        return {"GROUP": self.group, "HEAD_DIM": self.head_dim, "V_HEAD_DIM": self.v_head_dim}

    @property
    def tile_constants(self) -> dict[str, int | float]:
        """Constants of the Triton kernels: columns of their tiles, whether scores are summed in float64, the softcap.

        ``SOFTCAP`` is in the units of the scores (see :mod:`flashpte.kernels.primitives`); 0 for none.
        """
        block_d, rest = tuning.tile_columns(self.head_dim)
        block_dv = tuning.padded_head_dim(self.v_head_dim)
        exact = self.query.dtype == torch.float32
        softcap = self.softcap * (LOG2E / self.exp2_scale)
        tiles = {"BLOCK_D": block_d, "BLOCK_REST": rest, "BLOCK_DV": block_dv}
        return {**tiles, "EXACT": exact, "SOFTCAP": softcap}

    @property
    def strides(self) -> list[int]:
        """Strides of query, key and value per batch entry, head and row, in elements."""
        return [broadcast_stride(tensor, d) for tensor in (self.query, self.key, self.value) for d in range(3)]

    def shape(self) -> tuning.AttentionShape:
        """The shape that tile choices depend on."""
        return tuning.AttentionShape(
            batch=static_int(self.batch),
            heads_q=self.heads_q,
            heads_kv=self.heads_kv,
            q_len=static_int(self.q_len),
            kv_len=static_int(self.kv_len),
            head_dim=self.head_dim,
            v_head_dim=self.v_head_dim,
            dtype=self.query.dtype,
            mask_itemsize=0 if self.mask is None else self.mask.dtype.itemsize,
        )

    def with_unit_strides(self) -> AttentionCall:
        """The same call. Copies query, key, value or sinks if the last dimension is not contiguous."""
        query, key, value = map(with_unit_stride, (self.query, self.key, self.value))
        sinks = None if self.sinks is None else with_unit_stride(self.sinks)
        return dataclasses.replace(self, query=query, key=key, value=value, sinks=sinks)

    def empty_output(self) -> torch.Tensor:
        """Uninitialized memory for the result."""
        return empty_output(self.query, self.v_head_dim, self.dim_order)


class GivenMap(NamedTuple):
    """The tile map that a call comes with. Both tensors are ``None`` if there is none.

    Attributes:
        tiles, counts: the results of ``flashpte::tile_map``.
        block_n: keys per tile of a map for the split-K kernel; ``None`` for a map for the tiled kernel.
    """

    tiles: torch.Tensor | None
    counts: torch.Tensor | None
    block_n: int | None


NO_MAP = GivenMap(None, None, None)
NO_SPLIT_K_MAP = GivenMap(None, None, tuning.SPLIT_K_MAP_BLOCK_N)


@dataclasses.dataclass(frozen=True)
class MapTiling:
    """How a map divides a mask into tiles; see ``flashpte::tile_map``."""

    block_m: int
    block_n: int
    head_group: int = 1
    row_tiles: int | None = None

    def rows(self, q_len: int) -> int:
        """The number of rows of tiles."""
        return cdiv(q_len, self.block_m) if self.row_tiles is None else self.row_tiles


@dataclasses.dataclass(frozen=True)
class Partials:
    """Memory for the partial results of splits: ``acc [rows, width]`` and ``stats [rows, numbers]``.

    There is one row for each row of each split. A single split stores no partial results, and then both tensors are the
    result.
    """

    acc: torch.Tensor
    stats: torch.Tensor
    width: int
    numbers: int

    @classmethod
    def make(cls, out: torch.Tensor, config: tuning.Config, rows: int | torch.SymInt | None) -> Partials:
        """Allocates for ``config``'s kernel and the result ``out [B, H_q, L_q, D_v]``. One split has ``None`` rows."""
        width, numbers, dtype = out.shape[3], 2, torch.float32
        if isinstance(config, tuning.HopperConfig):
            units = cdiv(width, config.columns) * (2 if config.share_rows else 1)
            width, numbers, dtype = units * config.stored_columns, 2 + units, torch.float16
        if rows is None:
            return cls(out, out, width, numbers)
        stats = out.new_empty((rows, numbers), dtype=torch.float32)
        return cls(out.new_empty((rows, width), dtype=dtype), stats, width, numbers)


@dataclasses.dataclass(frozen=True)
class Launch:
    """One launch of an attention kernel, and of the kernel that combines its splits.

    Attributes:
        config: the kernel's tiles.
        out: the result ``[B, H_q, L_q, D_v]``, which is written.
        partials: written if there are several splits.
        num_splits: the number of splits of the keys; may be symbolic.
        enabled: 0 or 1, may be symbolic. With 0, no program is launched at run time.
    """

    config: tuning.Config
    out: torch.Tensor
    partials: Partials
    num_splits: int | torch.SymInt = 1
    enabled: int | torch.SymInt = 1


class Destination(NamedTuple):
    """Where a launcher writes its result.

    Attributes:
        out: ``[B, H_q, L_q, D_v]``.
        enabled: as in :class:`Launch`.
    """

    out: torch.Tensor
    enabled: int | torch.SymInt
