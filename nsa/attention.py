"""The two public attention functions and their backend choice.

`nsa_attention` works on packed sequences (training, prefill, chunked prefill), `nsa_decode` on a paged cache. Backends:
`reference` (the oracle, for tests), `torch` (vectorised, any device), `triton` (the kernels, on CUDA; on the CPU they run
in Triton's interpreter where TRITON_INTERPRET=1 is set, for tests). `auto` is `triton` on a CUDA GPU that has bf16
tensor cores (compute capability 8.0) where Triton is installed, and `torch` elsewhere.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

import torch

from nsa.config import SparsityConfig
from nsa.packing import Packing, checked_ends, plan_packing

if TYPE_CHECKING:
    from nsa.kernels.tiles import KernelPlan

Backend = Literal["auto", "reference", "torch", "triton"]
KeyValue = tuple[torch.Tensor, torch.Tensor]
HAS_TRITON = importlib.util.find_spec("triton") is not None
RECOMPUTE = -2
"""First entry of a selection row that is to be computed anew."""


def replayed(chosen: torch.Tensor, given: torch.Tensor | None) -> torch.Tensor:
    """Given block choices `[…, n]` in the place of chosen ones, except for rows that begin with RECOMPUTE; in `chosen`'s dtype."""
    if given is None:
        return chosen
    given = given.to(chosen.dtype)
    return torch.where(given[..., :1] == RECOMPUTE, chosen, given)


@dataclass(frozen=True, slots=True)
class BranchKV:
    """Keys `[T, Hkv, Dk]` and values `[T, Hkv, Dv]` of each branch; the same tensors three times where K/V are shared."""

    cmp: KeyValue
    slc: KeyValue
    win: KeyValue


@dataclass(frozen=True, slots=True)
class CompressorWeights:
    """φ of one of K and V: `mean(block) + down @ silu(up @ flatten(block + position))`.

    position `[l, D]`, up `[hidden, l·D]` (token-major), down `[D, hidden]`; shared by the KV heads of a layer."""

    position: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor


@dataclass(frozen=True, slots=True)
class Phi:
    """The compressor's tensors for keys and values; None stands in its place where the compressor is the mean."""

    k: CompressorWeights
    v: CompressorWeights


@dataclass(frozen=True, slots=True)
class LayerCache:
    """One layer's pages. raw `[pages, 2, page, sets·Hkv, D]` (K at 0, V at 1; with separate K/V the sets stand side by
    side in the order cmp, slc, win; D = max(Dk, Dv), the rest unused), cmp `[pages, page/d, Hkv, Dk+Dv]`.
    Compressed token i lies in the page of its last raw token, slot (t mod page)//d. Page 0 is scratch."""

    raw: torch.Tensor
    cmp: torch.Tensor
    key_dim: int
    value_dim: int
    num_sets: int

    @property
    def page_size(self) -> int:
        return self.raw.shape[2]

    @property
    def num_kv_heads(self) -> int:
        return self.cmp.shape[2]

    def set_index(self, branch: Literal["cmp", "slc", "win"]) -> int:
        """Which of the side-by-side sets a branch reads."""
        return ("cmp", "slc", "win").index(branch) if self.num_sets == 3 else 0


KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""What q may be on the triton backend."""


def _check_dtype(name: str, dtype: torch.dtype) -> None:
    if name == "triton" and dtype not in KERNEL_DTYPES:
        raise ValueError(f"backend 'triton' takes {', '.join(str(x).removeprefix('torch.') for x in KERNEL_DTYPES)}, got q in {dtype}; use 'torch'")


def _check(q: torch.Tensor, kv: BranchKV, gates: torch.Tensor, phi: Phi | None, config: SparsityConfig) -> None:
    if q.ndim != 3:
        raise ValueError(f"q must be [T, Hq, Dk], got {tuple(q.shape)}")
    num_heads, key_dim = q.shape[1:]
    key, value = kv.slc
    if key.ndim != 3 or value.ndim != 3 or key.shape[2] != key_dim or num_heads % key.shape[1]:
        raise ValueError(f"k must be [T, Hkv, {key_dim}] with Hkv dividing {num_heads}, v [T, Hkv, Dv]; got {tuple(key.shape)}, {tuple(value.shape)}")
    for name in ("cmp", "win"):
        other_key, other_value = getattr(kv, name)
        if other_key.shape != key.shape or other_value.shape != value.shape:
            raise ValueError(f"the branches' k and v must agree in shape, got {name} {tuple(other_key.shape)}, {tuple(other_value.shape)}")
    if gates.shape != (*q.shape[:2], 3):
        raise ValueError(f"gates must be {(*q.shape[:2], 3)}, got {tuple(gates.shape)}")
    if (phi is None) != (config.compressor == "mean"):
        raise ValueError(f"compressor={config.compressor!r} {'takes no' if config.compressor == 'mean' else 'needs'} phi")


@lru_cache
def _kernels_run(device: torch.device) -> bool:
    """Whether `auto` takes the kernels on a device."""
    return device.type == "cuda" and HAS_TRITON and torch.cuda.get_device_capability(device) >= (8, 0)


def resolve_backend(backend: str, device: torch.device) -> str:
    """The backend a request stands for on a device.

    Raises:
        ValueError: an unknown name, or one that is not available.
    """
    if backend not in ("auto", "reference", "torch", "triton"):
        raise ValueError(f"backend must be one of auto, reference, torch, triton; got {backend!r}")
    if backend == "auto":
        return "triton" if _kernels_run(device) else "torch"
    if backend != "triton":
        return backend
    missing = None
    if not HAS_TRITON:
        missing = "the package triton is not installed"
    elif device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        missing = f"the kernels need a CUDA GPU, got tensors on {device.type} (TRITON_INTERPRET=1 runs them in Triton's interpreter)"
    if missing:
        raise ValueError(f"backend 'triton' cannot be used here: {missing}; use 'auto' or 'torch'")
    return "triton"


def plan_batch(
    cu_seqlens: torch.Tensor,
    cu_seqlens_k: torch.Tensor | None,
    *,
    config: SparsityConfig,
    num_heads: int,
    device: torch.device,
    backend: str = "auto",
    key_index: torch.Tensor | None = None,
) -> Packing | KernelPlan:
    """What a backend needs to know of a packed batch, made once on the host and given to every layer as `cu_seqlens`.

    Args:
        cu_seqlens: int `[N+1]`, cumulative query lengths from 0. cu_seqlens_k: the same for keys; None = equal.
        num_heads: query heads. key_index: which packed row each key is, where sequences share rows
            (`SharedPrefix.key_rows`).
    Raises:
        ValueError: lengths that do not fit together, an unknown or unavailable backend, a CUDA graph that is being captured.
    """
    if resolve_backend(backend, device) != "triton":
        return plan_packing(cu_seqlens, cu_seqlens_k, device=device, num_heads=num_heads, key_index=key_index)
    from nsa.kernels.tiles import KernelPlan, plan_of, refuse_capture

    refuse_capture(device)
    if key_index is not None:
        return KernelPlan(cu_seqlens, cu_seqlens_k, config=config, device=device, key_index=key_index)
    return plan_of(*checked_ends(cu_seqlens, cu_seqlens_k), config, device)


def nsa_attention(
    q: torch.Tensor,
    kv: BranchKV,
    gates: torch.Tensor,
    *,
    phi: Phi | None,
    config: SparsityConfig,
    cu_seqlens: torch.Tensor | Packing | KernelPlan | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    selection: torch.Tensor | None = None,
    return_selection: bool = False,
    scale: float | None = None,
    deterministic: bool = False,
    compressed: KeyValue | None = None,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Native sparse attention over packed sequences (NSA Eq. 3-12).

    Args:
        q: `[T, Hq, Dk]`, after RoPE.
        kv: the branches' keys and values, `[Tk, Hkv, Dk]` and `[Tk, Hkv, Dv]`, keys after RoPE.
        gates: `[T, Hq, 3]` in [0, 1], in the order compression, selection, window.
        phi: the compressor's tensors; None for the mean.
        cu_seqlens: int `[N+1]`, where sequences begin and end; None = one sequence. (The plan made by `plan_batch`
            may be given instead, so that layers share it; it then decides the backend.)
        cu_seqlens_k: the same for keys where they are more than the queries, which then are each sequence's last tokens.
        selection: `[T, Hkv, n]` block numbers to use instead of choosing (−1 = none; a row that begins with −2 is
            chosen anew). Gradients never flow through the choice.
        scale: factor on q·k; default Dk^−½.
        deterministic: outputs, selections and gradients of a sequence are bit-equal whatever else is in the batch (φ's
            own gradients sum over the batch and are bit-equal from run to run, as everything is without it too). A promise of
            the triton backend; the others take the flag and make none. What it costs: scripts/bench/RESULTS.md.
        compressed: what φ makes of `kv.cmp`, `[C, Hkv, …]` each, every sequence's complete blocks one after the other, where a
            cache holds it (prefill; triton backend only). `kv.cmp` is then not read.
    Returns:
        `[T, Hq, Dv]` in q's dtype; with `return_selection` also the selection, int16 (int32 above 32,767 blocks).
    Raises:
        ValueError: shapes that do not fit together, an unknown or unavailable backend, a dtype it does not take.
    """
    _check(q, kv, gates, phi, config)
    if selection is not None and selection.shape != (q.shape[0], kv.slc[0].shape[1], config.num_selected_blocks):
        raise ValueError(f"selection must be {(q.shape[0], kv.slc[0].shape[1], config.num_selected_blocks)}, got {tuple(selection.shape)}")
    ends = cu_seqlens if isinstance(cu_seqlens, torch.Tensor) else None
    plan = None if isinstance(cu_seqlens, torch.Tensor) else cu_seqlens
    name = resolve_backend(backend, q.device) if plan is None or backend == "reference" else "torch" if isinstance(plan, Packing) else "triton"
    _check_dtype(name, q.dtype)
    if compressed is not None and name != "triton":
        raise ValueError(f"backend {name!r} compresses by itself: compressed tokens are for backend 'triton'")
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    if name == "reference":
        from nsa.reference import reference_attention

        if plan is not None:
            raise ValueError("the reference backend takes cu_seqlens, not a plan")
        return reference_attention(
            q,
            kv,
            gates,
            phi=phi,
            config=config,
            cu_seqlens=ends,
            cu_seqlens_k=cu_seqlens_k,
            selection=selection,
            return_selection=return_selection,
            scale=factor,
        )
    if plan is None:
        key_ends = torch.tensor([0, kv.slc[0].shape[0]]) if ends is None and cu_seqlens_k is None else cu_seqlens_k
        ends = torch.tensor([0, q.shape[0]]) if ends is None else ends
        plan = plan_batch(ends, key_ends, config=config, num_heads=q.shape[1], device=q.device, backend=name)
    if isinstance(plan, Packing):
        from nsa.torch_backend import packed_attention

        return packed_attention(
            q, kv, gates, phi=phi, config=config, packing=plan, selection=selection, return_selection=return_selection, scale=factor
        )
    from nsa.kernels import packed

    return packed.packed_attention(
        q, kv, gates, phi=phi, plan=plan, selection=selection, return_selection=return_selection, scale=factor, deterministic=deterministic,
        compressed=compressed,
    )  # fmt: skip


def nsa_decode(
    q: torch.Tensor,
    cache: LayerCache,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    gates: torch.Tensor,
    *,
    phi: Phi | None,
    config: SparsityConfig,
    selection: torch.Tensor | None = None,
    return_selection: bool = False,
    scale: float | None = None,
    out: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Native sparse attention of the last token(s) of sequences whose K/V (these tokens' included) lie in a paged cache.

    Reads s/d compressed tokens, n·l' selected and w window tokens a query. No host synchronisation: it can be captured
    in a CUDA graph.

    Args:
        q: `[B, m, Hq, Dk]`, the last m tokens of each sequence (m small), after RoPE.
        cache: this layer's pages, raw and compressed tokens up to the last already written.
        block_table: int `[B, P]`, the pages of each sequence in order.
        seq_lens: int `[B]`, tokens of each sequence, the queries counted in; 0 marks a padded row (output unspecified).
        gates: `[B, m, Hq, 3]`.
        phi: unused by the torch backend (compressed tokens are cached); part of the signature for kernels that fuse φ.
        selection: `[B, m, Hkv, n]` as in `nsa_attention`.
        out: contiguous `[B, m, Hq, Dv]` in q's dtype, to be written to and returned.
    Returns:
        `[B, m, Hq, Dv]`; with `return_selection` also the selection `[B, m, Hkv, n]`.
    Raises:
        ValueError: shapes that do not fit together.
    """
    if q.ndim != 4 or gates.shape != (*q.shape[:3], 3):
        raise ValueError(f"q must be [B, m, Hq, Dk] and gates [B, m, Hq, 3], got {tuple(q.shape)} and {tuple(gates.shape)}")
    if block_table.shape[0] != q.shape[0] or seq_lens.shape != q.shape[:1]:
        raise ValueError(f"block_table must be [B, P] and seq_lens [B] with B={q.shape[0]}, got {tuple(block_table.shape)}, {tuple(seq_lens.shape)}")
    shape = (*q.shape[:3], cache.value_dim)
    if out is not None and (out.shape != shape or out.dtype != q.dtype or not out.is_contiguous()):
        raise ValueError(f"out must be {shape}, contiguous, {q.dtype}; got {tuple(out.shape)}, strides {out.stride()}, {out.dtype}")
    name = resolve_backend(backend, q.device)
    _check_dtype(name, q.dtype)
    if name == "reference":
        raise ValueError("nsa_decode has no reference backend: compare it with nsa_attention")
    if name == "triton":
        from nsa.kernels.decode import paged_decode
    else:
        from nsa.torch_backend import paged_decode

    factor = q.shape[-1] ** -0.5 if scale is None else scale
    return paged_decode(
        q, cache, block_table, seq_lens, gates, config=config, selection=selection, return_selection=return_selection, scale=factor, out=out
    )
