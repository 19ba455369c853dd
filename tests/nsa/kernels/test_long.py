"""Positions up to a million, addresses beyond 2³¹ elements, and the memory that the kernels may take."""

from collections.abc import Iterator

import pytest
import torch

from nsa.attention import BranchKV, nsa_attention, nsa_decode
from nsa.attention import LayerCache as Cache
from nsa.config import SparsityConfig
from nsa.testing import AttentionInputs, cumulative, make_inputs, relative_rms

pytestmark = pytest.mark.gpu
PAPER = SparsityConfig()
MILLION = 2**20


@pytest.fixture(autouse=True)
def memory_for_the_others() -> Iterator[None]:
    """Test processes share the GPU: what a test took goes back when it ends."""
    yield
    torch.cuda.empty_cache()


def run(inputs: AttentionInputs, d_out: torch.Tensor, backend: str, **options) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Output, selection and gradients by name."""
    out, selection = nsa_attention(inputs.q, inputs.kv, inputs.gates, **inputs.options, return_selection=True, backend=backend, **options)
    out.backward(d_out.to(out.dtype))
    return out.detach(), selection, {name: leaf.grad for name, leaf in inputs.leaves.items() if leaf.grad is not None}


def test_the_last_queries_of_a_million_tokens() -> None:
    """Chunked prefill: 24 queries after 1,048,576 - 24 tokens, forward and backward in fp32 against fp64.

    φ's gradients are sums over 65,536 blocks most of whose parts cancel: plain PyTorch in fp32 has errors of 1.6e-5 there."""
    inputs = make_inputs(
        PAPER, lengths=[MILLION], query_lengths=[24], num_kv_heads=1, group_size=2, key_dim=32, value_dim=32, kv="shared", device="cuda"
    )
    d_out = torch.randn(24, 2, 32, device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    out, selection, gradients = run(inputs, d_out, "triton")
    expected, _, wanted = run(inputs.to(dtype=torch.float64), d_out, "torch", selection=selection)
    _, _, plain = run(inputs.to(), d_out, "torch", selection=selection)
    assert int(selection.max()) == (MILLION - 1) // PAPER.select_block_size
    assert relative_rms(out, expected) <= 1e-5
    for name, gradient in wanted.items():
        assert relative_rms(gradients[name], gradient) <= max(1e-5, 3 * relative_rms(plain[name], gradient)), name


def test_a_million_queries_at_once() -> None:
    """q and the output have 2³¹ elements; their last rows equal the torch backend's on these queries alone."""
    generator = torch.Generator("cuda").manual_seed(0)
    dim, group, last = 128, 16, 16

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", generator=generator, dtype=torch.bfloat16)

    pair = draw(MILLION, 1, dim), draw(MILLION, 1, dim)
    config = SparsityConfig(compressor="mean")
    q, gates, kv = draw(MILLION, group, dim), torch.rand(MILLION, group, 3, device="cuda", generator=generator).bfloat16(), BranchKV(pair, pair, pair)
    with torch.no_grad():
        out, selection = nsa_attention(q, kv, gates, phi=None, config=config, return_selection=True, backend="triton")
        q, gates, selection = q[-last:].clone(), gates[-last:].clone(), selection[-last:]
        shared = (pair[0].double(), pair[1].double())
        options = {"phi": None, "config": config, "cu_seqlens": cumulative([last]), "cu_seqlens_k": cumulative([MILLION]), "selection": selection}
        exact = nsa_attention(q.double(), BranchKV(shared, shared, shared), gates.double(), **options, backend="torch")
        plain = nsa_attention(q, kv, gates, **options, backend="torch")
    assert isinstance(exact, torch.Tensor) and isinstance(plain, torch.Tensor)
    assert relative_rms(out[-last:], exact) <= max(5e-3, 2 * relative_rms(plain, exact))
    assert out.isfinite().all()


def test_rows_that_lie_more_than_two_billion_elements_apart() -> None:
    """Every tensor is a view whose rows are 2²⁰ elements apart, 2,300 of them: results are those of contiguous tensors, bit for bit."""
    small = make_inputs(PAPER, lengths=[2300], num_kv_heads=1, group_size=4, key_dim=64, value_dim=64, dtype=torch.bfloat16, device="cuda")
    d_out = torch.randn(2300, 4, 64, device="cuda", generator=torch.Generator("cuda").manual_seed(1)).bfloat16()
    wide = torch.full((2300, MILLION), torch.nan, device="cuda", dtype=torch.bfloat16)
    column, leaves = 0, {}
    for name, leaf in small.leaves.items():
        if leaf.ndim == 3:
            view = wide[:, column : column + leaf[0].numel()].unflatten(1, leaf.shape[1:])
            leaves[name] = view.copy_(leaf.detach()).detach().requires_grad_()
            column += 1024
        else:
            leaves[name] = leaf.detach().clone().requires_grad_()
    out, selection, gradients = run(small, d_out, "triton")
    far, chosen, found = run(small.with_leaves(leaves), d_out, "triton")
    assert torch.equal(far, out) and torch.equal(chosen, selection)
    for name, gradient in gradients.items():
        assert torch.equal(found[name], gradient), name


def test_decode_over_a_cache_of_more_than_two_billion_elements() -> None:
    """The last pages of 9 GB hold the sequence; moved to a small cache, they give the same bits."""
    pages, length, dim = 90_000, 1000, 64
    raw = torch.empty(pages, 2, 64, 6, dim, device="cuda", dtype=torch.bfloat16)
    cmp = torch.empty(pages, 4, 2, 2 * dim, device="cuda", dtype=torch.bfloat16)
    raw[-16:], cmp[-16:] = torch.randn(16, *raw.shape[1:], device="cuda"), torch.randn(16, *cmp.shape[1:], device="cuda")
    q, gates = torch.randn(1, 1, 8, dim, device="cuda").bfloat16(), torch.rand(1, 1, 8, 3, device="cuda").bfloat16()
    lengths = torch.tensor([length], dtype=torch.int32, device="cuda")
    outs = []
    for first, some in ((pages - 16, Cache(raw, cmp, dim, dim, 3)), (0, Cache(raw[-16:].clone(), cmp[-16:].clone(), dim, dim, 3))):
        table = torch.arange(first, first + 16, device="cuda", dtype=torch.int32)[None]
        outs.append(nsa_decode(q, some, table, lengths, gates, phi=None, config=PAPER, return_selection=True, backend="triton"))
    assert raw[-16:].storage_offset() > 2**31
    assert torch.equal(outs[0][0], outs[1][0]) and torch.equal(outs[0][1], outs[1][1])


def peak_bytes(length: int, heads: tuple[int, int], *, training: bool) -> int:
    """Bytes that a call takes beyond its inputs and its output; in training with what is saved and every gradient, less the inputs'."""
    num_heads, num_kv_heads = heads
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", generator=generator, dtype=torch.bfloat16).requires_grad_()

    pairs = [(draw(length, num_kv_heads, 128), draw(length, num_kv_heads, 128)) for _ in range(3)]
    q, gates = draw(length, num_heads, 128), torch.rand(length, num_heads, 3, device="cuda").bfloat16().requires_grad_()
    template = make_inputs(PAPER, lengths=[1], num_kv_heads=1, group_size=1, key_dim=128, value_dim=128, dtype=torch.bfloat16, device="cuda")
    d_out = torch.ones(length, num_heads, 128, device="cuda", dtype=torch.bfloat16)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with torch.set_grad_enabled(training):
        out = nsa_attention(q, BranchKV(*pairs), gates, phi=template.phi, config=PAPER, backend="triton")
        assert isinstance(out, torch.Tensor)
        if training:
            out.backward(d_out)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before - out.numel() * out.element_size()


@pytest.mark.parametrize(("training", "bound"), [(False, 1.3e9), (True, 6e9)])
def test_memory_at_64k_stays_within_its_bound_and_grows_linearly(training: bool, bound: float) -> None:
    """Layout a, 64 query and 4 KV heads of 128: one output is 1.07 GB."""
    peak_bytes(4096, (64, 4), training=training)
    half, whole = (peak_bytes(length, (64, 4), training=training) for length in (32768, 65536))
    assert whole <= bound, f"{whole / 1e9:.2f} GB"
    assert whole <= 2.1 * half + 1e8, f"{half / 1e9:.2f} GB at 32k, {whole / 1e9:.2f} GB at 64k"
