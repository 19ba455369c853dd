"""The decoder's layers: RMSNorm, rotary positions, SwiGLU, φ, branch gates and the NSA attention block.

The residual stream is kept in fp32 whatever the weights' dtype, and every projection casts its input to the weights'
dtype: an fp32 master model under autocast and a bf16 copy of it then compute the same numbers, which keeps sampler and
learner together. Leaves out attention itself (attention.py) and cache bookkeeping (cache.py).

Shapes: T packed tokens, E hidden size, Hq/Hkv heads, Dk/Dv head dims.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from nsa.attention import BranchKV, CompressorWeights, KeyValue, LayerCache, Phi, nsa_attention, nsa_decode
from nsa.cache import CacheWrite, read_tokens, write_layer
from nsa.config import NSAConfig
from nsa.packing import Packing

if TYPE_CHECKING:
    from nsa.kernels.tiles import KernelPlan

ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True, slots=True)
class StepContext:
    """What every layer of one forward pass shares. Where there is a cache, `write` says where new tokens go; without it (with `decode`, on
    the kernels) they are the last ones of `block_table`'s sequences. With `decode` all queries are these sequences' last `T/B` tokens;
    otherwise `key_slots` (chunked prefill) names the raw slots of all keys, or is None where the new tokens are the whole sequences."""

    cos: torch.Tensor
    sin: torch.Tensor
    packing: Packing | KernelPlan | None = None
    write: CacheWrite | None = None
    decode: bool = False
    block_table: torch.Tensor | None = None
    seq_lens: torch.Tensor | None = None
    key_slots: torch.Tensor | None = None
    return_selection: bool = False


def linear(x: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
    """`layer(x)` in the dtype of its weights (autocast then does as it likes)."""
    return layer(x.to(layer.weight.dtype))


class RMSNorm(nn.Module):
    """x / rms(x) · weight, computed and returned in fp32 (or fp64)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        return functional.rms_norm(x.to(dtype), (x.shape[-1],), self.weight.to(dtype), self.eps)


class RotaryEmbedding(nn.Module):
    """cos and sin tables of the positions asked for: default, linear, Llama-3 and YaRN scaling.

    Raises:
        ValueError: another rope type, or a partial rotation.
    """

    inv_freq: torch.Tensor

    def __init__(self, config: NSAConfig) -> None:
        super().__init__()
        parameters = config.rope_parameters
        kind = parameters.get("rope_type", "default")
        if kind not in ROPE_TYPES or parameters.get("partial_rotary_factor", 1.0) != 1.0:
            raise ValueError(f"rope_type must be one of {', '.join(ROPE_TYPES)} over the whole head, got {parameters}")
        self.config, self.kind = config, kind
        inv_freq, self.scaling = self.frequencies()
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    def frequencies(self) -> tuple[torch.Tensor, float]:
        """Inverse frequencies `[Dk/2]` (fp32) and the factor on cos and sin."""
        if self.kind != "default":
            with torch.device("cpu"):  # from_pretrained builds the model under the meta device, which holds no numbers
                inv_freq, scaling = ROPE_INIT_FUNCTIONS[self.kind](self.config, torch.device("cpu"))
            return inv_freq.float(), float(scaling)
        assert self.config.head_dim
        exponent = torch.arange(0, self.config.head_dim, 2, dtype=torch.int64).float() / self.config.head_dim
        return 1.0 / self.config.rope_parameters["rope_theta"] ** exponent, 1.0

    def _apply(self, fn: Any, recurse: bool = True) -> RotaryEmbedding:
        """Move with the model, but stay fp32 whatever dtype it is cast to."""
        kept = self.inv_freq
        super()._apply(fn, recurse)
        if not kept.is_meta:
            self.inv_freq = kept.to(self.inv_freq.device)
        return self

    def forward(self, positions_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos, sin `[T, 1, Dk]`, fp32."""
        angles = positions_T[:, None].float() * self.inv_freq.float()
        angles = torch.cat([angles, angles], dim=-1)[:, None]
        return angles.cos() * self.scaling, angles.sin() * self.scaling


class _Rotate(torch.autograd.Function):
    """The rotation, and its inverse as the gradient: two half-width passes each instead of a chain of full ones."""

    @staticmethod
    def turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        half = x.shape[-1] // 2
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        first, second, cos, sin = wide[..., :half], wide[..., half:], cos[..., :half], sin[..., :half]
        return torch.cat([(first * cos).addcmul_(second, sin, value=-1), (second * cos).addcmul_(first, sin)], dim=-1).to(x.dtype)

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _Rotate.turn(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _Rotate.turn(gradients[0], cos, -sin), None, None


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE in fp32 (or fp64), halves convention: `[T, H, D]` → the same shape and dtype. cos, sin: `[T, 1, D]`."""
    turned = _Rotate.apply(x, cos, sin)
    assert isinstance(turned, torch.Tensor)
    return turned


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: NSAConfig) -> None:
        super().__init__()
        sizes = (config.hidden_size, config.intermediate_size)
        self.gate_proj = nn.Linear(*sizes, bias=config.mlp_bias)
        self.up_proj = nn.Linear(*sizes, bias=config.mlp_bias)
        self.down_proj = nn.Linear(*sizes[::-1], bias=config.mlp_bias)
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(self.activation(linear(x, self.gate_proj)) * linear(x, self.up_proj), self.down_proj)


class Compressor(nn.Module):
    """φ of keys or values: the block's mean plus a two-layer MLP over the block with intra-block positions.

    The last projection starts at zero, so φ starts as mean pooling."""

    def __init__(self, config: NSAConfig, dim: int) -> None:
        super().__init__()
        assert config.compressor_hidden_size
        self.position = nn.Parameter(torch.zeros(config.compress_block_size, dim))
        self.up = nn.Linear(config.compress_block_size * dim, config.compressor_hidden_size, bias=False)
        self.down = nn.Linear(config.compressor_hidden_size, dim, bias=False)

    def tensors(self) -> CompressorWeights:
        return CompressorWeights(self.position, self.up.weight, self.down.weight)


class BranchGates(nn.Module):
    """Holds no parameters of its own: turns gate logits into gates `[T, Hq, 3]` in [0, 1] (compression, selection, window).

    sigmoid: σ(Wx + b), the paper's. blend: g0 + a·(σ(Wx + b) − g0) with g0 = (0, 1, 0) and a learnt per head and branch,
    0 at first and clamped to [0, 1] straight through (its gradient never dies at the border). fixed: constants."""

    def __init__(self, config: NSAConfig) -> None:
        super().__init__()
        self.form, self.num_heads = config.gate, config.num_attention_heads
        constants = config.fixed_gates if config.gate == "fixed" else (0.0, 1.0, 0.0)
        self.constants: tuple[float, ...] = tuple(constants or ())

    def forward(self, logits: torch.Tensor | None, mix: torch.Tensor | None, count: int, device: torch.device) -> torch.Tensor:
        start = torch.zeros(3, device=device)
        for index, constant in enumerate(self.constants):  # fills on the device: a copy from the host would break CUDA graphs
            start[index].fill_(constant)
        if logits is None:
            return start.expand(count, self.num_heads, 3)
        learnt = torch.sigmoid(logits.to(torch.promote_types(logits.dtype, torch.float32))).unflatten(-1, (self.num_heads, 3))
        if mix is None:
            return learnt
        start, mix = start.to(learnt.dtype), mix.to(learnt.dtype)
        clamped = mix + (mix.clamp(0.0, 1.0) - mix).detach()
        return start + clamped * (learnt - start)


class NSAAttention(nn.Module):
    """Native sparse attention: one set of queries, three branches with K/V of their own (or shared), gated sum."""

    def __init__(self, config: NSAConfig, layer_index: int) -> None:
        super().__init__()
        assert config.num_key_value_heads and config.head_dim and config.value_head_dim
        self.config, self.layer_index = config, layer_index
        self.key_dim, self.value_dim = config.head_dim, config.value_head_dim
        self.sparsity = config.sparsity
        hidden, bias = config.hidden_size, config.attention_bias
        key_size, value_size = config.num_key_value_heads * config.head_dim, config.num_key_value_heads * config.value_head_dim
        self.q_proj = nn.Linear(hidden, config.num_attention_heads * config.head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden, key_size, bias=bias)
        self.v_proj = nn.Linear(hidden, value_size, bias=bias)
        if config.kv == "separate":
            self.cmp_k_proj = nn.Linear(hidden, key_size, bias=bias)
            self.cmp_v_proj = nn.Linear(hidden, value_size, bias=bias)
            self.win_k_proj = nn.Linear(hidden, key_size, bias=bias)
            self.win_v_proj = nn.Linear(hidden, value_size, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * config.value_head_dim, hidden, bias=config.attention_output_bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        if config.compressor == "mlp":
            self.phi_k = Compressor(config, config.head_dim)
            self.phi_v = Compressor(config, config.value_head_dim)
        if config.gate != "fixed":
            self.branch_gate = nn.Linear(hidden, 3 * config.num_attention_heads)
        if config.gate == "blend":
            self.branch_mix = nn.Parameter(torch.zeros(config.num_attention_heads, 3))
        self.gates = BranchGates(config)

    def phi(self) -> Phi | None:
        """The compressor's tensors, None for the mean."""
        return Phi(self.phi_k.tensors(), self.phi_v.tensors()) if self.sparsity.compressor == "mlp" else None

    def _keys(self, x: torch.Tensor, projection: nn.Linear, step: StepContext) -> torch.Tensor:
        keys = linear(x, projection).unflatten(-1, (-1, self.key_dim))
        if self.config.qk_norm:
            keys = self.k_norm(keys).to(keys.dtype)
        return rotate(keys, step.cos, step.sin)

    def key_values(self, x: torch.Tensor, step: StepContext) -> list[KeyValue]:
        """K (after RoPE) and V of each set: one where shared, else cmp, slc, win."""
        pairs = [(self.k_proj, self.v_proj)]
        if self.config.kv == "separate":
            pairs = [(self.cmp_k_proj, self.cmp_v_proj), *pairs, (self.win_k_proj, self.win_v_proj)]
        return [(self._keys(x, k, step), linear(x, v).unflatten(-1, (-1, self.value_dim))) for k, v in pairs]

    def _write(self, cache: LayerCache, sets: list[KeyValue], step: StepContext, phi: Phi | None) -> None:
        """New tokens' K and V to the cache, and the compressed tokens that they complete."""
        keys, values = [k for k, _ in sets], [v for _, v in sets]
        if step.write is not None:
            write_layer(cache, keys, values, step.write, phi)
            return
        from nsa.kernels.page_write import write_pages

        assert step.decode and step.block_table is not None and step.seq_lens is not None
        write_pages(
            cache, torch.cat(keys, dim=1), torch.cat(values, dim=1), step.block_table, step.seq_lens,
            rows=None, complete=None, phi=phi, config=self.sparsity,
        )  # fmt: skip

    def forward(
        self, x: torch.Tensor, step: StepContext, cache: LayerCache | None, selection: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x `[T, E]` (normed) → `[T, E]` and, if asked for, the selection `[T, Hkv, n]`."""
        queries = linear(x, self.q_proj).unflatten(-1, (-1, self.key_dim))
        if self.config.qk_norm:
            queries = self.q_norm(queries).to(queries.dtype)
        queries = rotate(queries, step.cos, step.sin)
        sets = self.key_values(x, step)
        logits = linear(x, self.branch_gate) if self.config.gate != "fixed" else None
        gates = self.gates(logits, self.branch_mix if self.config.gate == "blend" else None, x.shape[0], x.device)
        phi = self.phi()
        if cache is not None:
            self._write(cache, sets, step, phi)
        common = {"phi": phi, "config": self.sparsity, "return_selection": step.return_selection, "backend": self.config.attention_backend}
        if step.decode:
            assert cache is not None and step.block_table is not None and step.seq_lens is not None
            shape = (step.seq_lens.shape[0], -1)
            given = None if selection is None else selection.unflatten(0, shape)
            result = nsa_decode(
                queries.unflatten(0, shape), cache, step.block_table, step.seq_lens, gates.unflatten(0, shape), selection=given, **common
            )
            out, chosen = result if isinstance(result, tuple) else (result, None)
            out, chosen = out.flatten(0, 1), None if chosen is None else chosen.flatten(0, 1)
        else:
            if cache is not None and step.key_slots is not None:
                keys, values = read_tokens(cache, step.key_slots)
                sets = [(k.to(queries.dtype), v.to(queries.dtype)) for k, v in zip(keys, values, strict=True)]
            kv = BranchKV(*sets) if len(sets) == 3 else BranchKV(sets[0], sets[0], sets[0])
            result = nsa_attention(queries, kv, gates, cu_seqlens=step.packing, selection=selection, **common)
            out, chosen = result if isinstance(result, tuple) else (result, None)
        return linear(out.flatten(1), self.o_proj), chosen


class DecoderLayer(nn.Module):
    """Pre-norm attention and MLP around an fp32 residual stream."""

    def __init__(self, config: NSAConfig, layer_index: int) -> None:
        super().__init__()
        self.self_attn = NSAAttention(config, layer_index)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, hidden: torch.Tensor, step: StepContext, cache: LayerCache | None, selection: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        attended, chosen = self.self_attn(self.input_layernorm(hidden), step, cache, selection)
        hidden = hidden + attended
        return hidden + self.mlp(self.post_attention_layernorm(hidden)), chosen
