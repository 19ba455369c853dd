"""Attention in which each query sees one contiguous range of keys: the compression branch and the sliding window.

Key i of a band ends at token i·stride + offset of its sequence and is visible from there on, for `window` tokens (0: for
ever): compressed token i has stride d and offset l − 1, a raw key stride 1, offset 0 and window w. One set of kernels in
the manner of FlashAttention serves both: for Hopper GPUs in Gluon (banded_hopper.py, banded_hopper_dq.py,
banded_hopper_dkdv.py: head dims 64 and 128, half precision; dq of both bands in one kernel), for everything else in
Triton (banded_kernels.py). A tile's rows are queries × the heads of one KV head (row r is query r // G, head r % G), so K and V
are read once for a whole group; only tiles on the border of the range are masked.

Backward: dq by query tiles; dk and dv by key tiles that stay in place while the queries that see them pass by. A long
sequence's queries are cut into chunks (their number depends on its length alone) whose partial sums are added in order.
Every sum has one order that no other sequence changes: results are deterministic and batch-invariant.

Leaves out autograd (packed.py), the pooling that makes compressed tokens (compress.py) and the gates' gradients (gating.py).
"""

from __future__ import annotations

import itertools
import logging
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal
from weakref import WeakKeyDictionary

import numpy as np
import torch
import triton

from nsa.blocks import num_compressed
from nsa.config import SparsityConfig
from nsa.kernels.banded_kernels import MAX_CHUNKS, add_chunks_kernel, dkdv_kernel, dq_kernel, forward_kernel
from nsa.kernels.launch import LOG2_E, ceil_div, dot_precision, launch, padded
from nsa.kernels.tiles import KernelPlan, on_device

Kernel = Literal["forward", "dq", "dkdv"]
Kind = Literal["compression", "window"]

log = logging.getLogger(__name__)

ON_HOPPER = frozenset(itertools.product(("forward", "dq", "dkdv"), ("compression", "window")))
"""Kernels and bands for which a Hopper GPU takes its own kernels."""
MIN_CHUNK = 640
"""Queries of a sequence that are never split: 8,192 tokens are 13 chunks then, whose programs fill an H100 once and leave few idle."""
unit_tables: WeakKeyDictionary[KernelPlan, dict[tuple[Kind, int, int], torch.Tensor]] = WeakKeyDictionary()
"""`key_units` of plans in use: every layer asks for the same."""


@dataclass(frozen=True, slots=True)
class Band:
    """Which keys a query sees: compressed tokens complete at its position, or the last w raw keys."""

    kind: Kind
    plan: KernelPlan
    config: SparsityConfig

    @property
    def key_ends(self) -> torch.Tensor:
        """int32 `[N+1]`: where each sequence's keys of this band begin and end."""
        return self.plan.compressed_ends if self.kind == "compression" else self.plan.key_ends

    @property
    def ends(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """int32 `[N+1]` each: where sequences' queries, tokens and keys of this band end."""
        return self.plan.query_ends, self.plan.key_ends, self.key_ends

    @property
    def geometry(self) -> dict[str, int]:
        """The kernels' stride, offset and window (0: unlimited)."""
        if self.kind == "compression":
            return {"STRIDE": self.config.compress_stride, "OFFSET": self.config.compress_block_size - 1, "WINDOW": 0}
        return {"STRIDE": 1, "OFFSET": 0, "WINDOW": self.config.window_size}

    def key_tiles(self, size: int) -> torch.Tensor:
        """int32 `[tiles, 2]`: (sequence, first key) of tiles of `size` keys."""
        return self.plan.compressed_tiles(size) if self.kind == "compression" else self.plan.key_tiles(size)


@dataclass(frozen=True, slots=True)
class BandTensors:
    """A band with its k `[K, Hkv, Dk]`, v `[K, Hkv, Dv]` and gate `[T, Hq]`."""

    band: Band
    k: torch.Tensor
    v: torch.Tensor
    gate: torch.Tensor


@dataclass(frozen=True, slots=True)
class Blocks:
    """Tile sizes and launch settings of a Triton kernel: rows (queries × heads), keys, warps, pipeline stages, register limit."""

    rows: int
    keys: int
    warps: int
    stages: int
    registers: int | None = None


def choose_blocks(kernel: Kernel, kind: Kind, width: int, dtype: torch.dtype) -> Blocks:
    """The Triton kernels' settings for head dims up to `width` (a power of two) and a dtype (at 128 as swept on an H100).

    Shorter pipelines of dk and dv leave no spills in the loops (`cuobjdump`, Triton 3.6)."""
    if dtype == torch.float32:
        return Blocks(32, 32, 4, 2 if width <= 64 else 1)
    if kernel == "forward":
        return Blocks(64, 64, 4, 3) if width <= 64 else Blocks(128, 64, 8, 2, 128 if width == 128 else None)
    if kernel == "dq":
        return Blocks(64, 64, 8, 1) if width > 128 else Blocks(64, 64, 4, 2) if width == 128 and kind == "window" else Blocks(128, 64, 8, 3)
    if width > 128:
        return Blocks(32, 64, 8, 2)
    return Blocks(64, 128, 8, 3 if width == 128 and kind == "window" else 2)


@lru_cache(maxsize=8)
def runs_hopper_kernels(device: torch.device) -> bool:
    """Whether a device is a Hopper GPU and the Triton here the one that banded_hopper.py is written for."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        return False
    if not triton.__version__.startswith("3.6."):
        log.warning("Triton %s: compression and window attention run without their Hopper kernels, which need Triton 3.6", triton.__version__)
        return False
    return True


def takes_hopper(kernel: Kernel, band: Band, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether a kernel's Hopper version computes this; its module is imported only where it can run."""
    if not q.shape[0] or (kernel, band.kind) not in ON_HOPPER or not runs_hopper_kernels(q.device):
        return False
    from nsa.kernels import banded_hopper

    return banded_hopper.takes(q, k, v)


def rows_contiguous(x: torch.Tensor) -> torch.Tensor:
    """x with a contiguous last dimension: itself, or a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def tile_settings(kernel: Kernel, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, band: Band) -> tuple[dict[str, int], dict[str, int | str]]:
    """Launch settings (num_warps, num_stages, maxnreg) and the constants that describe a Triton kernel's tiles."""
    key_dim, value_dim, group = k.shape[2], v.shape[2], q.shape[1] // k.shape[1]
    width_k, width_v = padded(key_dim), padded(value_dim)
    blocks = choose_blocks(kernel, band.kind, max(width_k, width_v), q.dtype)
    rows = max(blocks.rows, triton.next_power_of_2(group))
    queries = rows // group
    constants: dict[str, int | str] = {"DK": key_dim, "DV": value_dim, "WIDTH_K": width_k, "WIDTH_V": width_v, "GROUP": group, **band.geometry}
    constants |= {"ROWS": rows, "QUERIES": queries, "KEYS": blocks.keys}
    if kernel != "dkdv":
        rest = band.config.window_size % blocks.keys + queries - 1
        narrow = band.kind == "window" and rest <= blocks.keys // 2
        constants["BORDER"] = padded(rest) if narrow else blocks.keys
    constants["PRECISION"] = dot_precision()
    options = {"num_warps": blocks.warps, "num_stages": blocks.stages}
    return options if blocks.registers is None else options | {"maxnreg": blocks.registers}, constants


def banded_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, band: Band,
    *, scale: float, gate: torch.Tensor, out: torch.Tensor, accumulate: bool, keep: bool,
) -> tuple[torch.Tensor | None, torch.Tensor]:  # fmt: skip
    """Attention over a band; `gate · o` is written to `out`, or added to it.

    Args:
        q: `[T, Hq, Dk]`; k, v: `[K, Hkv, Dk]` and `[K, Hkv, Dv]`, the band's keys, all of one dtype. Any strides.
        scale: factor on q·k, > 0.
        gate: `[T, Hq]`, any strides and dtype.
        out: `[T, Hq, Dv]`, last dimension contiguous.
        accumulate: add to `out` instead of overwriting it. keep: also return o without the gate.
    Returns:
        o `[T, Hq, Dv]` in q's dtype or None, and fp32 `[T, Hq]` natural log of Σ exp(scale·q·k), −inf where a query sees
        no key (its o is 0).
    """
    q, k, v = rows_contiguous(q), rows_contiguous(k), rows_contiguous(v)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    branch = torch.empty(*q.shape[:2], v.shape[2], dtype=q.dtype, device=q.device) if keep else None
    if takes_hopper("forward", band, q, k, v):
        from nsa.kernels import banded_hopper

        tables = (band.plan.query_tiles(banded_hopper.ROWS // (q.shape[1] // k.shape[1])), *band.ends)
        banded_hopper.forward(q, k, v, gate, out, branch, lse, tables, band.geometry, scale=scale * LOG2_E, accumulate=accumulate)
        return branch, lse
    options, constants = tile_settings("forward", q, k, v, band)
    tiles = band.plan.query_tiles(int(constants["QUERIES"]))
    if tiles.shape[0]:
        kept = out if branch is None else branch
        launch(
            forward_kernel, (tiles.shape[0], k.shape[1]),
            q, k, v, gate, out, kept, lse, tiles, *band.ends,
            *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *gate.stride(), *out.stride()[:2], *kept.stride()[:2], lse.stride(0), scale * LOG2_E,
            ACCUMULATE=accumulate, KEEP=keep, **constants, **options,
        )  # fmt: skip
    return branch, lse


def banded_backward(
    d_out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lse: torch.Tensor, delta: torch.Tensor, gate: torch.Tensor, band: Band,
    *, scale: float, dq: torch.Tensor, dq_before: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Gradients of `banded_forward`; the branch's own output gradient is gate · d_out.

    Args:
        d_out: `[T, Hq, Dv]`, gradient of the gated sum of the branches, in q's dtype. lse: as returned by the forward.
        delta: fp32 `[T, Hq]`, gate · <d_out, o>. gate: `[T, Hq]`. scale: as in the forward.
        dq: `[T, Hq, Dk]` in any dtype, last dimension contiguous: becomes this branch's part, plus `dq_before` (fp32, the
            same shape, last dimension contiguous; may be `dq` itself) where given.
    Returns:
        dk, dv in k's dtype and shapes; zero where no query sees a key.
    """
    d_out, q, k, v = rows_contiguous(d_out), rows_contiguous(q), rows_contiguous(k), rows_contiguous(v)
    stats = row_statistics(q, k)
    write_dq(d_out, q, k, v, lse, delta, gate, band, stats, scale=scale, dq=dq, before=dq_before)
    return key_gradients(d_out, q, k, v, band, stats, scale=scale)


def both_take_hopper(kernel: Kernel, q: torch.Tensor, parts: list[BandTensors]) -> bool:
    """Whether one Hopper kernel serves both bands: each alone would be taken, and their head dims are the same."""
    return len({part.k.shape[2] for part in parts}) == 1 and all(takes_hopper(kernel, part.band, q, part.k, part.v) for part in parts)


def both_dq(
    d_out: torch.Tensor, q: torch.Tensor, compression: BandTensors, window: BandTensors, lses: tuple[torch.Tensor, torch.Tensor],
    deltas: tuple[torch.Tensor, torch.Tensor], *, scale: float, dq: torch.Tensor,
) -> list[torch.Tensor]:  # fmt: skip
    """The sum of both bands' parts of dq; on Hopper GPUs in one kernel: q and dO are read once, dq does not travel between the bands.

    Args:
        d_out, q, scale: as in `banded_backward`. lses, deltas: those of the bands. dq: as there, becomes the sum.
    Returns:
        each band's statistics of the rows, which `key_gradients` needs.
    """
    d_out, q = rows_contiguous(d_out), rows_contiguous(q)
    parts = [BandTensors(part.band, rows_contiguous(part.k), rows_contiguous(part.v), part.gate) for part in (compression, window)]
    stats = [row_statistics(q, part.k) for part in parts]
    rows = list(zip(parts, lses, deltas, stats, strict=True))
    if both_take_hopper("dq", q, parts):
        hopper_dq(d_out, q, rows, scale=scale, dq=dq, before=None)
    else:
        for part, lse, delta, own_stats in rows:
            before = None if part is parts[0] else dq
            write_dq(d_out, q, part.k, part.v, lse, delta, part.gate, part.band, own_stats, scale=scale, dq=dq, before=before)
    return stats


def row_statistics(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Room for the rows' statistics: fp32 `[Hkv, 2, T · G or more]`, see `dq_kernel`."""
    num_heads, group = k.shape[1], q.shape[1] // k.shape[1]
    return torch.empty(num_heads, 2, -(-q.shape[0] * group // 16) * 16, dtype=torch.float32, device=q.device)


def key_gradients(
    d_out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, band: Band, stats: torch.Tensor, *, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """dk and dv of `banded_backward` from the statistics that came with dq."""
    d_out, q, k, v = rows_contiguous(d_out), rows_contiguous(q), rows_contiguous(k), rows_contiguous(v)
    num_heads = k.shape[1]
    d_key, d_value = torch.empty(k.shape, dtype=k.dtype, device=k.device), torch.empty(v.shape, dtype=v.dtype, device=v.device)
    if not k.shape[0]:
        return d_key, d_value
    num_chunks = min(MAX_CHUNKS.value, triton.cdiv(band.plan.max_key_length, MIN_CHUNK)) if band.kind == "compression" else 1
    parts = (d_key[None], d_value[None])
    if num_chunks > 1:
        parts = tuple(torch.empty(num_chunks, *x.shape, dtype=torch.float32, device=x.device) for x in (k, v))
    size = write_parts(d_out, q, k, v, band, stats, parts, scale=scale)
    if num_chunks > 1:
        tiles = band.key_tiles(size)
        for part, total in zip(parts, (d_key, d_value), strict=True):
            launch(
                add_chunks_kernel, (tiles.shape[0], num_heads),
                part, total, tiles, *band.ends, part.stride(1), part.stride(2), part.stride(0), *total.stride()[:2], num_chunks,
                DIM=total.shape[2], WIDTH=padded(total.shape[2]), **band.geometry, QUERIES=1, KEYS=size, SPLIT=MIN_CHUNK, num_warps=8,
            )  # fmt: skip
    return d_key, d_value


def chunk_size(num_queries: int) -> int:
    """Queries of a chunk of a sequence (`banded_kernels.chunk_size` says the same)."""
    size = ceil_div(ceil_div(num_queries, MAX_CHUNKS.value), 64) * 64
    return max(size + 64 if size % 1024 == 0 and size < 4096 else size, MIN_CHUNK)


def key_units(band: Band, size: int, split: int) -> torch.Tensor:
    """Work on dk and dv: int32 `[units, 3]` of (sequence, first key of a tile of `size`, chunk of its queries), the longest first.

    Where queries are split, only chunks that see the tile; otherwise each tile once, whether any query sees it or not."""
    tables, key = unit_tables.setdefault(band.plan, {}), (band.kind, size, split)
    if key not in tables:
        step, offset, window = band.geometry.values()
        num_queries, num_tokens = (ends.diff().numpy() for ends in (band.plan.host_query_ends, band.plan.host_key_ends))
        num_keys = np.array([num_compressed(length, band.config) for length in num_tokens.tolist()]) if band.kind == "compression" else num_tokens
        chunk = np.array([chunk_size(length) if split else max(length, 1) for length in num_queries.tolist()])
        tiles = -(-num_keys // size)
        counts = tiles * (-(-num_queries // chunk) if split else 1)
        of = np.repeat(np.arange(len(counts)), counts)
        number, tile = np.divmod(np.arange(len(of)) - np.repeat(counts.cumsum() - counts, counts), tiles[of])
        start, ahead = tile * size, (num_tokens - num_queries)[of]
        first = np.maximum(start * step + offset - ahead, number * chunk[of])
        end = np.minimum(num_queries[of], (number + 1) * chunk[of])
        if window:
            end = np.minimum(end, np.minimum(start + size, num_keys[of]) - 1 + window - ahead)
        order = np.argsort(first - end, kind="stable")
        order = order[(first < end)[order]] if split else order
        units = np.stack([of, start, number], axis=1)[order].astype(np.int32)
        tables[key] = on_device(torch.from_numpy(units), band.plan.device)
    return tables[key]


def hopper_dq(
    d_out: torch.Tensor, q: torch.Tensor, rows: list[tuple[BandTensors, torch.Tensor, torch.Tensor, torch.Tensor]],
    *, scale: float, dq: torch.Tensor, before: torch.Tensor | None,
) -> None:  # fmt: skip
    """`write_dq` of one band, or of the sum of the compression band and the window; rows: each one's tensors, lse, delta and stats."""
    from nsa.kernels import banded_hopper, banded_hopper_dq

    first = rows[0][0]
    bands = [(part.k, part.v, part.band.key_ends, part.gate, lse, delta, stats) for part, lse, delta, stats in rows]
    tables = (first.band.plan.query_tiles(banded_hopper.ROWS // (q.shape[1] // first.k.shape[1])), *first.band.ends[:2])
    second = rows[1][0].band.config.window_size if len(rows) > 1 else 0
    banded_hopper_dq.dq(d_out, q, bands, dq, before, tables, first.band.geometry, second, scale=scale)


def write_dq(
    d_out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lse: torch.Tensor, delta: torch.Tensor, gate: torch.Tensor, band: Band,
    stats: torch.Tensor, *, scale: float, dq: torch.Tensor, before: torch.Tensor | None,
) -> None:  # fmt: skip
    """dq of `banded_backward`, and the rows' statistics for dk and dv."""
    num_heads = k.shape[1]
    if takes_hopper("dq", band, q, k, v):
        hopper_dq(d_out, q, [(BandTensors(band, k, v, gate), lse, delta, stats)], scale=scale, dq=dq, before=before)
        return
    options, constants = tile_settings("dq", q, k, v, band)
    tiles = band.plan.query_tiles(int(constants["QUERIES"]))
    added = dq if before is None else before
    if tiles.shape[0]:
        launch(
            dq_kernel, (tiles.shape[0], num_heads),
            q, k, v, d_out, gate, lse, delta, dq, added, stats, tiles, *band.ends,
            *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *d_out.stride()[:2], *gate.stride(), *lse.stride(), *delta.stride(),
            *dq.stride()[:2], *added.stride()[:2], *stats.stride()[:2], scale * LOG2_E, scale,
            ACCUMULATE=before is not None, **constants, **options,
        )  # fmt: skip


def write_parts(
    d_out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, band: Band, stats: torch.Tensor, parts: tuple[torch.Tensor, ...],
    *, scale: float,
) -> int:  # fmt: skip
    """dk and dv from each chunk of the queries into parts `[chunks, K, Hkv, D]`; returns the size of a key tile."""
    num_heads, num_chunks = k.shape[1], parts[0].shape[0]
    split = MIN_CHUNK if num_chunks > 1 else 0
    if takes_hopper("dkdv", band, q, k, v):
        from nsa.kernels import banded_hopper_dkdv

        if banded_hopper_dkdv.takes_rows(q, d_out, q.shape[1] // num_heads):
            size = banded_hopper_dkdv.KEYS
            tables = (key_units(band, size, split), *band.ends)
            banded_hopper_dkdv.dkdv(d_out, q, k, v, stats, parts, tables, band.geometry, scale=scale, split=split)
            return size
    options, constants = tile_settings("dkdv", q, k, v, band)
    size = int(constants["KEYS"])
    tiles = band.key_tiles(size)
    launch(
        dkdv_kernel, (tiles.shape[0], num_heads, num_chunks),
        q, k, v, d_out, stats, *parts, tiles, *band.ends,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *d_out.stride()[:2], *stats.stride()[:2],
        *(step for part in parts for step in (part.stride(1), part.stride(2), part.stride(0))), scale * LOG2_E, scale,
        SPLIT=split, **constants, **options,
    )  # fmt: skip
    return size
