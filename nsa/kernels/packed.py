"""`nsa_attention` on the Triton kernels: one operator forward, one backward.

    k, v of the compression branch ─ compress (φ) ─▶ kc, vc ─┐
    q ─────────── compression attention ─ lse ─▶ block choice ┴─▶ selected attention ─▶ window ─▶ out

Each branch adds gate · its output to `out`; branch outputs are kept only where a backward pass follows (the gates'
gradients need them). Eager calls go through an autograd function; while `torch.compile` traces, through custom operators with fake
implementations, so that it need not look inside. (A custom operator costs the host several times as much as an autograd function.)
Leaves out how rows are tiled (tiles.py) and every kernel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nsa.attention import RECOMPUTE, BranchKV, KeyValue, Phi, replayed
from nsa.blocks import selection_dtype
from nsa.config import SparsityConfig
from nsa.kernels.banded import Band, BandTensors, banded_forward, both_dq, key_gradients
from nsa.kernels.compress import compress
from nsa.kernels.gating import gate_backward
from nsa.kernels.launch import rehearse_once
from nsa.kernels.scoring import choose_blocks
from nsa.kernels.selected import selected_backward, selected_forward
from nsa.kernels.tiles import KernelPlan, plan_of
from nsa.packing import gather_rows

SETTINGS = (
    "compress_block_size", "compress_stride", "select_block_size", "num_selected_blocks", "window_size", "num_init_blocks", "num_local_blocks",
)  # fmt: skip
KEPT = 7
"""Tensors that the forward operator returns for the backward one: selection, three branch outputs, three log-sum-exps."""


def _plan_of(query_ends: Tensor, key_ends: Tensor, settings: list[int], device: torch.device) -> KernelPlan:
    """The plan an operator's plain arguments stand for; one batch asks for it once a layer."""
    return plan_of(query_ends, key_ends, SparsityConfig(**dict(zip(SETTINGS, settings, strict=True))), device)


def attention_forward(
    q: Tensor, kc: Tensor, vc: Tensor, k_slc: Tensor, v_slc: Tensor, k_win: Tensor, v_win: Tensor, gates: Tensor, selection: Tensor | None,
    plan: KernelPlan, scale: float, keep: bool, deterministic: bool,
) -> list[Tensor]:  # fmt: skip
    """Output `[T, Hq, Dv]` and the KEPT tensors (branch outputs empty unless `keep`). kc, vc: compressed tokens `[C, Hkv, …]`."""
    tensors = (q, kc, vc, k_slc, v_slc, k_win, v_win, gates)

    def rehearsal() -> None:
        out, *kept = run_branches(*tensors, selection, plan, scale, keep, deterministic)
        if keep:
            attention_backward(out, *tensors, kept, plan, scale, deterministic)

    lengths = (plan.num_queries.bit_length(), plan.max_key_length.bit_length(), plan.num_sequences > 1)
    layout = tuple((x.dtype, *x.shape[1:]) for x in (q, k_slc, v_slc, gates))
    rehearse_once((layout, lengths, plan.config, selection is None, keep, deterministic), q.device, rehearsal)
    return run_branches(*tensors, selection, plan, scale, keep, deterministic)


def run_branches(
    q: Tensor, kc: Tensor, vc: Tensor, k_slc: Tensor, v_slc: Tensor, k_win: Tensor, v_win: Tensor, gates: Tensor, selection: Tensor | None,
    plan: KernelPlan, scale: float, keep: bool, deterministic: bool,
) -> list[Tensor]:  # fmt: skip
    """`attention_forward` without the rehearsal."""
    config = plan.config
    out = q.new_empty(*q.shape[:2], v_slc.shape[2])
    gate = gates.unbind(-1)
    common: dict[str, Any] = {"scale": scale, "out": out, "keep": keep}
    out_cmp, lse_cmp = banded_forward(q, kc, vc, Band("compression", plan, config), gate=gate[0], accumulate=False, **common)
    if selection is None:
        chosen = choose_blocks(q, kc, lse_cmp, plan, config, scale=scale)
    elif bool((selection[..., 0] == RECOMPUTE).any()):
        chosen = replayed(choose_blocks(q, kc, lse_cmp, plan, config, scale=scale), selection)
    else:
        chosen = selection.to(torch.int32, copy=True)
    out_slc, lse_slc = selected_forward(
        q, k_slc, v_slc, chosen, plan, config, gate=gate[1], accumulate=True, deterministic=deterministic, **common
    )  # fmt: skip
    out_win, lse_win = banded_forward(q, k_win, v_win, Band("window", plan, config), gate=gate[2], accumulate=True, **common)
    branches = [q.new_empty(0) if x is None else x for x in (out_cmp, out_slc, out_win)]
    return [out, chosen, *branches, lse_cmp, lse_slc, lse_win]


@torch.library.custom_op("nsa_grpo::sparse_attention", mutates_args=())
def sparse_attention(
    q: Tensor, kc: Tensor, vc: Tensor, k_slc: Tensor, v_slc: Tensor, k_win: Tensor, v_win: Tensor, gates: Tensor, selection: Tensor | None,
    query_ends: Tensor, key_ends: Tensor, settings: list[int], scale: float, keep: bool, deterministic: bool,
) -> list[Tensor]:  # fmt: skip
    """`attention_forward`; query_ends, key_ends: int `[N+1]`, on the CPU. settings: SETTINGS of the configuration."""
    plan = _plan_of(query_ends, key_ends, settings, q.device)
    return attention_forward(q, kc, vc, k_slc, v_slc, k_win, v_win, gates, selection, plan, scale, keep, deterministic)


@sparse_attention.register_fake
def _(
    q: Tensor, kc: Tensor, vc: Tensor, k_slc: Tensor, v_slc: Tensor, k_win: Tensor, v_win: Tensor, gates: Tensor, selection: Tensor | None,
    query_ends: Tensor, key_ends: Tensor, settings: list[int], scale: float, keep: bool, deterministic: bool,
) -> list[Tensor]:  # fmt: skip
    num_queries, num_heads = q.shape[:2]
    out = q.new_empty(num_queries, num_heads, v_slc.shape[2])
    chosen = q.new_empty(num_queries, k_slc.shape[1], settings[SETTINGS.index("num_selected_blocks")], dtype=torch.int32)
    branches = [torch.empty_like(out) if keep else q.new_empty(0) for _ in range(3)]
    return [out, chosen, *branches, *(q.new_empty(num_queries, num_heads, dtype=torch.float32) for _ in range(3))]


def attention_backward(
    d_out: Tensor, q: Tensor, kc: Tensor, vc: Tensor, k_slc: Tensor, v_slc: Tensor, k_win: Tensor, v_win: Tensor, gates: Tensor, kept: list[Tensor],
    plan: KernelPlan, scale: float, deterministic: bool,
) -> list[Tensor]:  # fmt: skip
    """Gradients of q, kc, vc, k_slc, v_slc, k_win, v_win and gates.

    dq is added up over the branches in q's dtype: in bf16 its two more roundings are an error of about .1 %, a quarter of
    what the products' operands bring, and an fp32 sum would take as much memory as two branch outputs."""
    config = plan.config
    chosen, out_cmp, out_slc, out_win, lse_cmp, lse_slc, lse_win = kept
    d_gates, delta = gate_backward(d_out, gates, (out_cmp, out_slc, out_win))
    gate, deltas = gates.unbind(-1), delta.unbind(-1)
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    compression = BandTensors(Band("compression", plan, config), kc, vc, gate[0])
    window = BandTensors(Band("window", plan, config), k_win, v_win, gate[2])
    stats_cmp, stats_win = both_dq(d_out, q, compression, window, (lse_cmp, lse_win), (deltas[0], deltas[2]), scale=scale, dq=dq)
    dkc, dvc = key_gradients(d_out, q, kc, vc, compression.band, stats_cmp, scale=scale)
    del stats_cmp
    dk_slc, dv_slc = selected_backward(
        d_out, q, k_slc, v_slc, chosen, lse_slc, deltas[1], gate[1], plan, config, scale=scale, dq=dq, dq_before=dq, deterministic=deterministic
    )  # fmt: skip
    dk_win, dv_win = key_gradients(d_out, q, k_win, v_win, window.band, stats_win, scale=scale)
    return [dq, dkc, dvc, dk_slc, dv_slc, dk_win, dv_win, d_gates]


@torch.library.custom_op("nsa_grpo::sparse_attention_backward", mutates_args=())
def sparse_attention_backward(
    d_out: Tensor, q: Tensor, kc: Tensor, vc: Tensor, k_slc: Tensor, v_slc: Tensor, k_win: Tensor, v_win: Tensor, gates: Tensor, kept: list[Tensor],
    query_ends: Tensor, key_ends: Tensor, settings: list[int], scale: float, deterministic: bool,
) -> list[Tensor]:  # fmt: skip
    """`attention_backward`."""
    plan = _plan_of(query_ends, key_ends, settings, q.device)
    return attention_backward(d_out, q, kc, vc, k_slc, v_slc, k_win, v_win, gates, kept, plan, scale, deterministic)


@sparse_attention_backward.register_fake
def _(
    d_out: Tensor, q: Tensor, kc: Tensor, vc: Tensor, k_slc: Tensor, v_slc: Tensor, k_win: Tensor, v_win: Tensor, gates: Tensor, kept: list[Tensor],
    query_ends: Tensor, key_ends: Tensor, settings: list[int], scale: float, deterministic: bool,
) -> list[Tensor]:  # fmt: skip
    return [x.new_empty(x.shape) for x in (q, kc, vc, k_slc, v_slc, k_win, v_win, gates)]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    *tensors, _, query_ends, key_ends, settings, scale, keep, deterministic = inputs
    if not keep:
        raise RuntimeError("sparse_attention was called with keep=False on tensors that need a gradient")
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.rest = query_ends, key_ends, settings, scale, deterministic
    ctx.set_materialize_grads(False)  # zeros for the kept tensors would be three outputs' memory
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, gradients: list[Tensor | None]) -> tuple[Any, ...]:
    d_out = gradients[0]
    if d_out is None:
        return (None,) * 15
    saved = ctx.saved_tensors
    tensors, kept = saved[:-KEPT], list(saved[-KEPT:])
    return (*sparse_attention_backward(d_out.contiguous(), *tensors, kept, *ctx.rest), *[None] * 7)


sparse_attention.register_autograd(_backward, setup_context=_setup)


class SparseAttention(torch.autograd.Function):
    """`attention_forward`'s output and selection, of the tensors q to gates."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        *tensors, selection, plan, scale, deterministic = inputs
        out, *kept = attention_forward(*tensors, selection, plan, scale, True, deterministic)
        ctx.save_for_backward(*tensors, *kept)
        ctx.rest = plan, scale, deterministic
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(kept[0])
        return out, kept[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        d_out = gradients[0]
        if d_out is None:
            return (None,) * 12
        saved = ctx.saved_tensors
        return (*attention_backward(d_out.contiguous(), *saved[:-KEPT], list(saved[-KEPT:]), *ctx.rest), *[None] * 4)


def packed_attention(
    q: Tensor, kv: BranchKV, gates: Tensor, *, phi: Phi | None, plan: KernelPlan, selection: Tensor | None, return_selection: bool, scale: float,
    deterministic: bool, compressed: KeyValue | None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """`nsa_attention` on the kernels; see there. `plan` holds the configuration."""
    config = plan.config
    if compressed is not None and compressed[0].shape[0] != plan.num_compressed:
        raise ValueError(f"the sequences have {plan.num_compressed} compressed tokens, got {compressed[0].shape[0]}")
    if plan.num_queries != q.shape[0] or plan.num_key_rows != kv.slc[0].shape[0]:
        raise ValueError(f"cu_seqlens counts {plan.num_queries} queries and {plan.num_key_rows} keys, got {q.shape[0]} and {kv.slc[0].shape[0]}")
    tensors: dict[int, Tensor] = {}
    for pair in (kv.cmp, kv.slc, kv.win):
        for tensor in pair:
            if id(tensor) not in tensors:
                cast = tensor.to(q.dtype)
                tensors[id(tensor)] = cast if plan.key_rows is None else gather_rows(cast, plan.key_rows, plan.key_places)
    (k_cmp, v_cmp), (k_slc, v_slc), (k_win, v_win) = ((tensors[id(k)], tensors[id(v)]) for k, v in (kv.cmp, kv.slc, kv.win))
    dtype = selection_dtype(plan.max_key_length, config)
    if plan.num_queries == 0:
        out = q.new_zeros(0, q.shape[1], v_slc.shape[2])
        return (out, torch.zeros(0, k_slc.shape[1], config.num_selected_blocks, dtype=dtype, device=q.device)) if return_selection else out
    with torch.autocast(q.device.type, enabled=False):
        if compressed is None:
            pairs = ((k_cmp, phi.k if phi else None), (v_cmp, phi.v if phi else None))
            kc, vc = (compress(x, weights, plan, config, deterministic=deterministic) for x, weights in pairs)
        else:
            kc, vc = (x.to(q.dtype) for x in compressed)
        inputs = (q, kc, vc, k_slc, v_slc, k_win, v_win, gates)
        keep = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
        if torch.compiler.is_compiling():
            settings = [getattr(config, name) for name in SETTINGS]
            out, chosen, *_ = sparse_attention(*inputs, selection, plan.host_query_ends, plan.host_key_ends, settings, scale, keep, deterministic)
        elif keep:
            out, chosen = SparseAttention.apply(*inputs, selection, plan, scale, deterministic)
        else:
            out, chosen, *_ = attention_forward(*inputs, selection, plan, scale, keep, deterministic)
    return (out, chosen.to(dtype)) if return_selection else out
