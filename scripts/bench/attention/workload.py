"""What the kernel bench runs on: head layouts, random and realistic tensors, and the work that a call has to do at least."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nsa.attention import BranchKV, CompressorWeights, LayerCache, Phi
from nsa.blocks import num_compressed
from nsa.config import SparsityConfig

LAYOUTS = {"a": (64, 4, 128), "b": (32, 8, 128), "smollm2": (9, 3, 64)}
"""Query heads, KV heads, head dim."""
CONFIG = SparsityConfig()
DTYPE = torch.bfloat16


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Inputs of one layout and length: `q` `[T, Hq, D]` and so on, requiring gradients, and the output's gradient.

    Example: `make_problem("a", 65536, realistic=True)`
    """

    layout: str
    length: int
    q: Tensor
    kv: BranchKV
    gates: Tensor
    phi: Phi
    d_out: Tensor
    realistic: bool

    @property
    def leaves(self) -> list[Tensor]:
        tensors = [self.q, self.gates, *self.kv.cmp, *self.kv.slc, *self.kv.win]
        return tensors + [t for w in (self.phi.k, self.phi.v) for t in (w.position, w.up, w.down)]

    @property
    def keys(self) -> str:
        """How rows of the bench name the inputs: trained models' neighbours are alike, random ones are the worst case of locality."""
        return "neighbours alike" if self.realistic else "random"


def drifting_keys(length: int, heads: int, dim: int, generator: torch.Generator) -> Tensor:
    """Keys as trained models have them: neighbours alike, a common part, outliers; unit variance."""
    steps = torch.randn(length // 16 + 2, heads, dim, generator=generator, device="cuda")
    slow = steps.repeat_interleave(16, dim=0)[:length]
    return (0.7 * slow + 0.5 * torch.randn(length, heads, dim, generator=generator, device="cuda") + 0.5 * steps[:1]).to(DTYPE)


def drifting_queries(length: int, heads: int, dim: int, generator: torch.Generator) -> Tensor:
    """Queries whose neighbours choose alike: x_t = .998 x_(t-1) + noise, and a little noise on top; unit variance.

    With `drifting_keys` and 8,192 tokens 2, 4, 8, 16 and 32 neighbours choose 18.6, 21.1, 23.6, 26.2 and 29.4 different blocks.
    SmolLM2-135M-Instruct, converted with the paper's settings, chooses 18.3, 20.8, 23.7, 27.0 and 30.5 in the second half of
    8,192 tokens of mathematical text (mean of layers and heads; neighbours.py); independent queries would choose 27, 47, 73, 100 and 116.
    """
    keep, size = 0.998, 512
    noise = torch.randn(length, heads, dim, generator=generator, device="cuda") * (1 - keep**2) ** 0.5
    powers = keep ** torch.arange(size + 1, device="cuda", dtype=torch.float32)[:, None, None]
    last, parts = torch.randn(heads, dim, generator=generator, device="cuda"), []
    for chunk in noise.split(size):
        rows = len(chunk)
        parts.append(powers[1 : rows + 1] * (last + (chunk / powers[1 : rows + 1]).cumsum(0)))
        last = parts[-1][-1]
    return (0.98 * torch.cat(parts) + 0.2 * torch.randn(length, heads, dim, generator=generator, device="cuda")).to(DTYPE)


def make_problem(layout: str, length: int, *, realistic: bool, seed: int = 0) -> Problem:
    """Queries, keys, values and gates of a layout, bf16 on the GPU. Blocks chosen on inputs that are not realistic are random ones."""
    num_heads, heads, dim = LAYOUTS[layout]
    generator = torch.Generator("cuda").manual_seed(seed)

    def draw(*shape: int, std: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator, device="cuda") * std).to(DTYPE).requires_grad_()

    def pair() -> tuple[Tensor, Tensor]:
        key = drifting_keys(length, heads, dim, generator).requires_grad_() if realistic else draw(length, heads, dim)
        return key, draw(length, heads, dim)

    def compressor() -> CompressorWeights:
        flat = CONFIG.compress_block_size * dim
        return CompressorWeights(draw(CONFIG.compress_block_size, dim, std=0.1), draw(2 * dim, flat, std=flat**-0.5), draw(dim, 2 * dim, std=0.02))

    return Problem(
        layout=layout,
        length=length,
        q=drifting_queries(length, num_heads, dim, generator).requires_grad_() if realistic else draw(length, num_heads, dim),
        kv=BranchKV(pair(), pair(), pair()),
        gates=torch.rand(length, num_heads, 3, generator=generator, device="cuda").to(DTYPE).requires_grad_(),
        phi=Phi(compressor(), compressor()),
        d_out=torch.randn(length, num_heads, dim, generator=generator, device="cuda").to(DTYPE),
        realistic=realistic,
    )


def rotation(layout: str, length: int) -> int:
    """How many sets of inputs calls go round, so that none finds its own in the L2 cache: 1 to 8, together twice its 50 MB or more."""
    num_heads, heads, dim = LAYOUTS[layout]
    return max(1, min(8, -(-100_000_000 // (2 * length * dim * (num_heads + 6 * heads)))))


def make_problems(layout: str, length: int, *, realistic: bool) -> list[Problem]:
    """As many problems as `rotation` says, each with numbers of its own."""
    return [make_problem(layout, length, realistic=realistic, seed=seed) for seed in range(rotation(layout, length))]


def random_selection(length: int, heads: int, seed: int = 0) -> Tensor:
    """int32 `[T, heads, n]`: the forced blocks and random others, ascending."""
    generator = torch.Generator("cuda").manual_seed(seed)
    n, size = CONFIG.num_selected_blocks, CONFIG.select_block_size
    blocks = torch.arange(-(-length // size), device="cuda")
    parts = []
    for first in range(0, length, 8192):
        current = (torch.arange(first, min(first + 8192, length), device="cuda") // size)[:, None]
        scores = torch.rand(len(current), heads, len(blocks), generator=generator, device="cuda")
        forced = (blocks < CONFIG.num_init_blocks) | (blocks > current - CONFIG.num_local_blocks)
        scores = scores.masked_fill(forced[:, None], 2.0).masked_fill((blocks > current)[:, None], -1.0)
        top = scores.topk(min(n, len(blocks)), dim=-1)
        chosen = top.indices.masked_fill(top.values < 0, length).sort(dim=-1).values
        parts.append(torch.nn.functional.pad(chosen.masked_fill(chosen == length, -1), (0, n - chosen.shape[-1]), value=-1).int())
    return torch.cat(parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeStep:
    """Arguments of one `nsa_decode` call: the newest token of `batch` sequences of `length` tokens on shuffled pages."""

    q: Tensor
    cache: LayerCache
    table: Tensor
    lengths: Tensor
    gates: Tensor


def make_step(layout: str, length: int, batch: int) -> DecodeStep:
    """Random pages, queries and gates of a layout, bf16 on the GPU."""
    num_heads, heads, dim = LAYOUTS[layout]
    page, per_page = CONFIG.select_block_size, CONFIG.select_block_size // CONFIG.compress_stride
    pages = length // page
    raw = torch.randn(batch * pages + 1, 2, page, 3 * heads, dim, device="cuda", dtype=DTYPE)
    cmp = torch.randn(batch * pages + 1, per_page, heads, 2 * dim, device="cuda", dtype=DTYPE)
    return DecodeStep(
        q=torch.randn(batch, 1, num_heads, dim, device="cuda", dtype=DTYPE),
        cache=LayerCache(raw=raw, cmp=cmp, key_dim=dim, value_dim=dim, num_sets=3),
        table=(torch.randperm(batch * pages, device="cuda").view(batch, pages) + 1).int(),
        lengths=torch.full((batch,), length, dtype=torch.int32, device="cuda"),
        gates=torch.rand(batch, 1, num_heads, 3, device="cuda", dtype=DTYPE),
    )


def visible_pairs(length: int) -> dict[str, float]:
    """Pairs (query, key) that each branch of one head computes, the causal triangle as `dense`."""
    n, size, w = CONFIG.num_selected_blocks, CONFIG.select_block_size, CONFIG.window_size
    return {
        "cmp": sum(num_compressed(t + 1, CONFIG) for t in range(0, length, 64)) * 64.0,
        "slc": sum(min(t + 1, n * size) for t in range(0, length, 64)) * 64.0,
        "win": sum(min(t + 1, w) for t in range(0, length, 64)) * 64.0,
        "dense": length * (length + 1) / 2,
    }


def whole_work(layout: str, length: int, *, backward: bool) -> tuple[float, float]:
    """FLOPs and bytes of the whole attention (Eq. 3-12), forward or backward."""
    num_heads, heads, dim = LAYOUTS[layout]
    pairs = visible_pairs(length)
    attended = pairs["cmp"] + pairs["slc"] + pairs["win"]
    flops = num_heads * dim * (10.0 * attended if backward else 4.0 * attended + 2.0 * pairs["cmp"])
    tokens = length * dim * 2.0
    bytes_ = tokens * ((3 * num_heads + 12 * heads) if backward else (2 * num_heads + 6 * heads))
    return flops, bytes_
