"""What tests and benches of the attention share: seeded inputs, an error measure, and how selections are compared.

Nothing here runs in training or serving. Selections are compared as sets, and only where the score gap between the
last block taken and the best one left out is larger than rounding: nearer than that, either choice is right.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from nsa.attention import BranchKV, CompressorWeights, Phi
from nsa.config import NSAConfig, SparsityConfig
from nsa.reference import compress

ROUNDING_FP32 = 1e-5
"""Bound on how far two fp32 computations of one block score differ, relative to the row's highest score."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionInputs:
    """Arguments of one `nsa_attention` call: `nsa_attention(x.q, x.kv, x.gates, **x.options)`.

    `cu_seqlens_k` is None where the sequences have as many queries as keys.
    """

    q: Tensor
    kv: BranchKV
    gates: Tensor
    phi: Phi | None
    config: SparsityConfig
    cu_seqlens: Tensor
    cu_seqlens_k: Tensor | None

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments."""
        return {"phi": self.phi, "config": self.config, "cu_seqlens": self.cu_seqlens, "cu_seqlens_k": self.cu_seqlens_k}

    @property
    def leaves(self) -> dict[str, Tensor]:
        """Every tensor that receives a gradient, by name; tensors that branches share appear once."""
        named = {"q": self.q, "gates": self.gates}
        for branch in ("cmp", "slc", "win"):
            for name, tensor in zip("kv", getattr(self.kv, branch), strict=True):
                if not any(tensor is other for other in named.values()):
                    named[f"{branch}_{name}"] = tensor
        if self.phi is not None:
            for name in ("k", "v"):
                weights = getattr(self.phi, name)
                named |= {f"phi_{name}_position": weights.position, f"phi_{name}_up": weights.up, f"phi_{name}_down": weights.down}
        return named

    def with_leaves(self, leaves: dict[str, Tensor]) -> AttentionInputs:
        """The same call with the tensors of `leaves` (named as there) in place of the old ones."""
        old = self.leaves

        def new(tensor: Tensor) -> Tensor:
            return next(leaves[name] for name, candidate in old.items() if candidate is tensor)

        kv = BranchKV(**{branch: tuple(new(x) for x in getattr(self.kv, branch)) for branch in ("cmp", "slc", "win")})  # type: ignore[arg-type]
        phi = None
        if self.phi is not None:
            weights = {
                name: CompressorWeights(position=new(w.position), up=new(w.up), down=new(w.down))
                for name, w in (("k", self.phi.k), ("v", self.phi.v))
            }
            phi = Phi(**weights)
        return replace(self, q=leaves["q"], gates=leaves["gates"], kv=kv, phi=phi)

    def to(self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None, requires_grad: bool = True) -> AttentionInputs:
        """A copy with fresh leaves in another dtype or on another device."""
        leaves = {name: x.detach().to(device=device, dtype=dtype, copy=True).requires_grad_(requires_grad) for name, x in self.leaves.items()}
        ends_k = None if self.cu_seqlens_k is None else self.cu_seqlens_k.to(device)
        return replace(self.with_leaves(leaves), cu_seqlens=self.cu_seqlens.to(device), cu_seqlens_k=ends_k)


def make_inputs(
    config: SparsityConfig,
    *,
    lengths: Sequence[int],
    num_kv_heads: int = 2,
    group_size: int = 2,
    key_dim: int = 16,
    value_dim: int = 8,
    kv: Literal["separate", "shared"] = "separate",
    query_lengths: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> AttentionInputs:
    """Random inputs with unit-variance queries, keys and values, gates in (0, 1), and a φ whose MLP part matters.

    Args:
        config: the sparsity settings; `config.compressor` decides whether there is a φ.
        lengths: keys of each packed sequence.
        num_kv_heads: Hkv.
        group_size: query heads per key/value head.
        key_dim: Dk.
        value_dim: Dv.
        kv: K/V sets of their own per branch, or one set for all three.
        query_lengths: queries of each sequence (its last tokens); None: as many as keys.
        dtype: of every tensor; drawn in fp64 first, so that two dtypes of one seed agree up to rounding.
        device: of every tensor.
        seed: of the draws.

    Returns:
        The inputs; every tensor in `.leaves` requires a gradient.
    """
    generator = torch.Generator().manual_seed(seed)
    query_lengths = lengths if query_lengths is None else query_lengths
    num_queries, num_keys, num_heads = sum(query_lengths), sum(lengths), num_kv_heads * group_size

    def draw(*shape: int, std: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * std).to(device, dtype).requires_grad_()

    def pair() -> tuple[Tensor, Tensor]:
        return draw(num_keys, num_kv_heads, key_dim), draw(num_keys, num_kv_heads, value_dim)

    def compressor(dim: int) -> CompressorWeights:
        flat = config.compress_block_size * dim
        return CompressorWeights(
            position=draw(config.compress_block_size, dim, std=0.5), up=draw(2 * dim, flat, std=flat**-0.5), down=draw(dim, 2 * dim, std=dim**-0.5)
        )

    q = draw(num_queries, num_heads, key_dim)
    cmp = pair()
    slc, win = (cmp, cmp) if kv == "shared" else (pair(), pair())
    gates = torch.rand(num_queries, num_heads, 3, generator=generator, dtype=torch.float64).to(device, dtype).requires_grad_()
    phi = Phi(k=compressor(key_dim), v=compressor(value_dim)) if config.compressor == "mlp" else None
    ends_k = None if list(query_lengths) == list(lengths) else cumulative(lengths, device)
    return AttentionInputs(
        q=q,
        kv=BranchKV(cmp=cmp, slc=slc, win=win),
        gates=gates,
        phi=phi,
        config=config,
        cu_seqlens=cumulative(query_lengths, device),
        cu_seqlens_k=ends_k,
    )


def tiny_config(**changes: Any) -> NSAConfig:
    """A two-layer model of some 20,000 parameters with small blocks (l 8, d 4, l' 8, n 4, w 6), changed as asked."""
    settings: dict[str, Any] = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
        "compress_block_size": 8,
        "compress_stride": 4,
        "select_block_size": 8,
        "num_selected_blocks": 4,
        "window_size": 6,
    }
    return NSAConfig(**(settings | changes))


def cumulative(lengths: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """Lengths of N sequences → int32 `[N + 1]`, starting at 0."""
    return torch.tensor([0, *lengths], dtype=torch.int32, device=device).cumsum(0, dtype=torch.int32)


def random_selection(
    lengths: Sequence[int], query_lengths: Sequence[int], num_kv_heads: int, config: SparsityConfig, generator: torch.Generator
) -> Tensor:  # fmt: skip
    """int32 `[T, Hkv, n]` of visible blocks, the query's own among them: for the last query_lengths[i] tokens of sequences of lengths[i]."""
    n = config.num_selected_blocks
    rows: list[list[int]] = []
    for length, num_queries in zip(lengths, query_lengths, strict=True):
        for t in range(length - num_queries, length):
            current = t // config.select_block_size
            for _ in range(num_kv_heads):
                blocks = sorted([*torch.randperm(current, generator=generator)[: n - 1].tolist(), current])
                rows.append(blocks + [-1] * (n - len(blocks)))
    return torch.tensor(rows, dtype=torch.int32).view(sum(query_lengths), num_kv_heads, n)


def query_positions(inputs: AttentionInputs) -> Tensor:
    """int64 `[T]`: each query's position in its own sequence."""
    ends = inputs.cu_seqlens.tolist()
    ends_k = ends if inputs.cu_seqlens_k is None else inputs.cu_seqlens_k.tolist()
    positions = [torch.arange(k1 - k0 - (q1 - q0), k1 - k0) for q0, q1, k0, k1 in zip(ends[:-1], ends[1:], ends_k[:-1], ends_k[1:], strict=True)]
    return torch.cat(positions) if positions else torch.zeros(0, dtype=torch.int64)


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    """RMS of the difference over RMS of `expected`, in fp64; 0 where both are zero, NaN stays NaN."""
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    if actual.shape != expected.shape:
        raise ValueError(f"shapes differ: {tuple(actual.shape)} and {tuple(expected.shape)}")
    error = (actual - expected).square().mean().sqrt().item() if actual.numel() else 0.0
    size = expected.square().mean().sqrt().item() if expected.numel() else 0.0
    return error / size if size else error


def exact_block_scores(inputs: AttentionInputs, *, scale: float | None = None) -> Tensor:
    """Block scores (Eq. 8-10) in fp64 where the inputs lie: `nsa.reference.reference_block_scores` a sequence at a time.

    Returns:
        `[T, Hkv, J]`, J counting the blocks of the longest sequence; -inf where a block begins after the query.
    """
    exact, config = inputs.to(dtype=torch.float64, requires_grad=False), inputs.config
    l, d, size = config.compress_block_size, config.compress_stride, config.select_block_size
    factor = inputs.q.shape[2] ** -0.5 if scale is None else scale
    num_kv_heads, ends = inputs.kv.slc[0].shape[1], exact.cu_seqlens.tolist()
    ends_k = ends if exact.cu_seqlens_k is None else exact.cu_seqlens_k.tolist()
    longest = max((b - a for a, b in itertools.pairwise(ends_k)), default=0)
    block = torch.arange(-(-longest // size), device=exact.q.device)
    parts = [exact.q.new_zeros(0, num_kv_heads, len(block))]
    for (q0, q1), (k0, k1) in zip(itertools.pairwise(ends), itertools.pairwise(ends_k), strict=True):
        cmp_k = compress(exact.kv.cmp[0][k0:k1], exact.phi.k if exact.phi else None, config)
        position = torch.arange(k1 - k0 - (q1 - q0), k1 - k0, device=exact.q.device)
        start = torch.arange(cmp_k.shape[0], device=exact.q.device) * d
        logits = torch.einsum("thgd,mhd->thgm", exact.q[q0:q1].unflatten(1, (num_kv_heads, -1)), cmp_k) * factor
        logits = logits.masked_fill((start + l - 1 > position[:, None])[:, None, None], -torch.inf)
        mass = torch.softmax(logits, dim=-1).nan_to_num().sum(dim=2)
        common = torch.minimum(start[:, None] + l, (block + 1) * size) - torch.maximum(start[:, None], block * size)
        scores = mass @ (common.clamp(min=0) // d).double()
        parts.append(scores.masked_fill((block * size > position[:, None])[:, None], -torch.inf))
    return torch.cat(parts)


def free_blocks(scores: Tensor, positions: Tensor, config: SparsityConfig) -> tuple[Tensor, Tensor]:
    """Scores `[T, Hkv, J]` with -inf in the place of forced and invisible blocks, and how many of the others are taken, int64 `[T]`."""
    visible = (positions.to(scores.device) // config.select_block_size + 1)[:, None]
    block = torch.arange(scores.shape[2], device=scores.device)
    free = (block >= config.num_init_blocks) & (block < visible - config.num_local_blocks)
    take = config.num_selected_blocks - (visible[:, 0] - free.sum(dim=1))
    return scores.masked_fill(~free[:, None], -torch.inf), take.minimum(free.sum(dim=1))


def chosen_blocks(scores: Tensor, positions: Tensor, config: SparsityConfig) -> Tensor:
    """The blocks that exact scores `[T, Hkv, J]` ask for: int64 `[T, Hkv, n]`, ascending, -1 where there are fewer; ties to the lower block."""
    num, last = config.num_selected_blocks, (positions.to(scores.device) // config.select_block_size)[:, None, None]
    block = torch.arange(scores.shape[2], device=scores.device).expand(scores.shape)
    forced = (block < config.num_init_blocks) | (block > last - config.num_local_blocks)
    ranked = scores.masked_fill(forced, torch.inf).masked_fill(block > last, -torch.inf)
    order = ranked.sort(dim=-1, descending=True, stable=True).indices[..., :num]
    chosen = order.masked_fill(order > last, torch.iinfo(torch.int64).max).sort(dim=-1).values
    return torch.nn.functional.pad(chosen.masked_fill(chosen == torch.iinfo(torch.int64).max, -1), (0, num - chosen.shape[-1]), value=-1)


def selection_gap(scores: Tensor, positions: Tensor, config: SparsityConfig) -> Tensor:
    """How clear-cut each query's choice is, relative to its highest score.

    Args:
        scores: `[T, Hkv, J]` from `exact_block_scores` or `reference_block_scores`.
        positions: `[T]` of the queries in their sequences.
        config: n, l' and the forced blocks.

    Returns:
        `[T, Hkv]`: score of the last block taken for its score minus that of the best block left out, over the row's
        highest score; inf where there was nothing to choose.
    """
    free, take = free_blocks(scores, positions, config)
    ranked = torch.nn.functional.pad(free, (0, 2), value=-torch.inf).sort(dim=-1, descending=True).values
    rank = take.clamp(min=1)[:, None, None].expand(*scores.shape[:2], 1)
    last_taken, first_left = ranked.gather(2, rank - 1)[..., 0], ranked.gather(2, rank)[..., 0]
    nothing = (take <= 0)[:, None] | first_left.isneginf()
    return torch.where(nothing, torch.inf, (last_taken - first_left) / ranked[..., 0].clamp(min=1e-300))


def clear_choices(inputs: AttentionInputs, *, bound: float = ROUNDING_FP32, scale: float | None = None) -> Tensor:
    """bool `[T, Hkv]`, on the CPU: where the gap between taken and left-out blocks exceeds `bound`, judged by exact scores."""
    return (selection_gap(exact_block_scores(inputs, scale=scale), query_positions(inputs), inputs.config) > bound).cpu()


def same_blocks(actual: Tensor, expected: Tensor) -> Tensor:
    """bool `[…]`: rows of two selections `[…, n]` that name the same set of blocks (-1 names none)."""
    return (actual.cpu().long().sort(dim=-1).values == expected.cpu().long().sort(dim=-1).values).all(dim=-1)


def assert_same_selection(actual: Tensor, expected: Tensor, clear: Tensor | None = None) -> None:
    """Fail unless two selections `[…, n]` agree as sets wherever `clear` `[…]` holds (None: everywhere)."""
    wrong = ~same_blocks(actual, expected)
    if clear is not None:
        wrong &= clear
    if wrong.any():
        where = wrong.nonzero()[0].tolist()
        got, want = actual[tuple(where)].tolist(), expected[tuple(where)].tolist()
        raise AssertionError(f"{int(wrong.sum())} of {wrong.numel()} rows differ, first at {where}: got {got}, expected {want}")
