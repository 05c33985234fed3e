"""The work of a program: its place in the grid, and the keys that it visits."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from flashpte.kernels.combine import active_splits, share_of
from flashpte.kernels.primitives import tile_runs

# The base of tiles that are not consecutive. No consecutive run has this base, even if it begins before key 0.
SCATTERED = gl.constexpr(-(1 << 31))

# Up to this many columns of a query row, every thread of a consumer gives a slot back. Above, one thread does for all.
# See _give_back.
EACH_UP_TO = gl.constexpr(256)

# This many tiles of keys and of values are copied without tensor maps, while the maps are made. Every tile choice has
# room for them.
FIRST_TILES = gl.constexpr(2)


@gluon.jit
def place(kv_len, heads, row_tiles, WIDTH: gl.constexpr, KV_GROUP: gl.constexpr, V_SLICES: gl.constexpr):
    """Row tile, head, batch entry and slice of V of a program.

    The grid is ``(row tiles x V_SLICES x heads x B, 1, splits)``. (Only the first dimension may be above 65,535.)
    Programs start in the order of their index. Under a causal mask, the last rows see the most keys. They start first
    in all heads, so that no long program is left over at the end. This is limited to as many heads at a time as have
    their keys and values (together ``WIDTH`` elements of 16 bits per key) within 16 MiB of L2.
    """
    KEYS: gl.constexpr = (16 << 20) // (WIDTH * 2)
    columns = row_tiles * V_SLICES
    index = gl.program_id(0)
    b = index // (heads * columns)
    index -= b * (heads * columns)
    together = gl.minimum(gl.maximum(KEYS // gl.maximum(kv_len, 1), 1) * KV_GROUP, heads)
    first_head = index // (columns * together) * together
    index -= first_head * columns
    together = gl.minimum(together, heads - first_head)
    row_tile = row_tiles - 1 - index // (together * V_SLICES)
    head = first_head + index // V_SLICES % together
    return row_tile, head.to(gl.int64), b.to(gl.int64), index % V_SLICES


@gluon.jit
def keys_of_tile(
    counts,  # pointer to the counts of the map's row
    first_row,
    kv_len,
    short_splits,
    BLOCK_M: gl.constexpr,
    PACK: gl.constexpr,
    BLOCK_N: gl.constexpr,
    MAP_BLOCK_N: gl.constexpr,
    CAUSAL: gl.constexpr,
    MASK: gl.constexpr,
    SINGLE_SPLIT: gl.constexpr,
    LONG_KEYS: gl.constexpr,
):
    """The key tiles that this program visits for a tile of rows: its split's share, full tiles first.

    Returns:
        ``first_step``, the first tile among those of all splits; ``n_full`` and ``n_listed``, how many of the split's
        tiles are full and how many there are; the ``base`` of the full and of the partial tiles, for :func:`start_of`;
        and ``active``, the number of active splits. An inactive split has nothing to visit.
    """
    full_start = 0
    partial_start = 0
    if MASK != 0:
        all_full = gl.load(counts) * (MAP_BLOCK_N // BLOCK_N)
        n_listed = all_full + gl.load(counts + 1) * (MAP_BLOCK_N // BLOCK_N)
        full_start, partial_start = tile_runs(counts, MAP_BLOCK_N)
    else:
        end = kv_len
        all_full = kv_len // BLOCK_N
        if CAUSAL:
            end = gl.minimum(kv_len, (first_row + BLOCK_M - 1) // PACK + 1)
            all_full = gl.minimum(kv_len, first_row // PACK) // BLOCK_N
        n_listed = gl.maximum(gl.cdiv(end, BLOCK_N), 1)
    first_step = 0
    n_full = all_full
    active = 1
    if not SINGLE_SPLIT:
        split = gl.program_id(2)
        active = active_splits(n_listed, gl.num_programs(2), short_splits, BLOCK_N, LONG_KEYS)
        first_step = share_of(split, active, n_listed, n_listed, 1)
        n_listed = share_of(split + 1, active, n_listed, n_listed, 1) - first_step
        n_full = gl.minimum(gl.maximum(all_full - first_step, 0), n_listed)
    full_base = gl.where(full_start < 0, SCATTERED, full_start + first_step * BLOCK_N)
    partial_base = gl.where(partial_start < 0, SCATTERED, partial_start + (first_step - all_full) * BLOCK_N)
    return first_step, n_full, n_listed, full_base, partial_base, active


@gluon.jit
def start_of(visited, step, n_listed, MAPPED: gl.constexpr, MAP_BLOCK_N: gl.constexpr, BLOCK_N: gl.constexpr):
    """First key of the ``step``-th of ``n_listed`` visited tiles. From ``n_listed`` on, the result is not meaningful.

    ``visited`` is ``(tiles, first_step, base)``. The visited tiles start at ``first_step`` in the map's row, which
    ``tiles`` lists. If they are consecutive, ``base`` is what the first key of step 0 is or would be, and the list is
    not read, because loading keys would wait for it. Otherwise ``base`` is ``SCATTERED``.
    """
    tiles, first_step, base = visited
    at = first_step + step
    if MAPPED:
        SUB: gl.constexpr = MAP_BLOCK_N // BLOCK_N
        listed = gl.load(tiles + at // SUB, mask=(step < n_listed) & (base == SCATTERED), other=0)
        start = gl.where(base == SCATTERED, listed * MAP_BLOCK_N + at % SUB * BLOCK_N, base + step * BLOCK_N)
    else:
        # The minimum does not change the result. Without it, LLVM would keep and advance a pointer for every copy.
        start = gl.minimum(at, first_step + n_listed) * BLOCK_N
    return start
