"""φ on packed sequences against the oracle, with every gradient."""

import pytest
import torch

from nsa.attention import CompressorWeights
from nsa.config import SparsityConfig
from nsa.kernels.compress import compress
from nsa.kernels.tiles import KernelPlan
from nsa.reference import compress as oracle
from nsa.testing import relative_rms

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make_config(block, stride, compressor):
    return SparsityConfig(
        compress_block_size=block, compress_stride=stride, select_block_size=2 * block, num_selected_blocks=4, window_size=6, compressor=compressor
    )  # fmt: skip


def make_plan(lengths, config):
    ends = torch.tensor([0, *lengths]).cumsum(0)
    return KernelPlan(ends, ends, config=config, device=torch.device(DEVICE))


def draw(lengths, heads, dim, hidden, config, dtype):
    """x and the weights in fp64 (values that `dtype` holds exactly), and the output's gradient."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, std=1.0):
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * std).to(dtype).double()

    flat = config.compress_block_size * dim
    weights = [normal(config.compress_block_size, dim, std=0.5), normal(hidden, flat, std=flat**-0.5), normal(dim, hidden, std=hidden**-0.5)]
    return (
        normal(sum(lengths), heads, dim),
        weights if config.compressor == "mlp" else [],
        normal(make_plan(lengths, config).num_compressed, heads, dim),
    )


def check(lengths, heads, dim, hidden, config, dtype, bound, *, deterministic=False):
    x, weights, d_out = draw(lengths, heads, dim, hidden, config, dtype)
    exact = [tensor.clone().requires_grad_() for tensor in (x, *weights)]
    want = torch.cat([oracle(part, CompressorWeights(*exact[1:]) if weights else None, config) for part in exact[0].split(lengths)])
    leaves = [tensor.to(DEVICE, dtype).requires_grad_() for tensor in (x, *weights)]
    phi = CompressorWeights(*leaves[1:]) if weights else None
    got = compress(leaves[0], phi, make_plan(lengths, config), config, deterministic=deterministic)
    assert got.dtype == dtype
    assert relative_rms(got, want) <= bound
    grads = torch.autograd.grad(got, leaves, d_out.to(DEVICE, dtype))
    for actual, expected in zip(grads, torch.autograd.grad(want, exact, d_out), strict=True):
        assert relative_rms(actual, expected) <= bound


@pytest.mark.parametrize("compressor", ["mean", "mlp"])
@pytest.mark.parametrize(("block", "stride"), [(8, 4), (4, 4), (12, 3), (4, 1)])
@pytest.mark.parametrize("lengths", [[63], [3, 47, 1, 7, 8, 30], [14, 15, 13, 2]])
def test_matches_the_oracle(lengths, block, stride, compressor):
    check(lengths, 2, 16, 24, make_config(block, stride, compressor), torch.float32, 1e-5)


@pytest.mark.parametrize("dim", [8, 24, 96])
def test_odd_head_dims(dim):
    check([40, 21], 3, dim, 200, make_config(8, 4, "mlp"), torch.float32, 1e-5)


@pytest.mark.parametrize("compressor", ["mean", "mlp"])
def test_half_precision(compressor):
    check([63, 40], 2, 32, 32, make_config(8, 4, compressor), torch.float16, 3e-3)


@pytest.mark.parametrize("compressor", ["mean", "mlp"])
def test_sequences_too_short_for_a_block(compressor):
    config = make_config(8, 4, compressor)
    x, weights, _ = draw([5, 7], 2, 16, 24, config, torch.float32)
    leaves = [tensor.to(DEVICE, torch.float32).requires_grad_() for tensor in (x, *weights)]
    out = compress(leaves[0], CompressorWeights(*leaves[1:]) if weights else None, make_plan([5, 7], config), config)
    assert out.shape == (0, 2, 16)
    assert all((grad == 0).all() for grad in torch.autograd.grad(out.sum(), leaves))


@pytest.mark.parametrize("compressor", ["mean", "mlp"])
def test_tokens_outside_complete_blocks_do_not_matter(compressor):
    """NaN in the tokens after the last complete block and in a sequence without one; strided input."""
    config = make_config(8, 4, compressor)
    lengths = [7, 30, 3, 17]
    x, weights, d_out = draw(lengths, 2, 16, 24, config, torch.float32)
    unused = [*range(7), *range(7 + 28, 7 + 30), *range(37, 40), 56]
    results = []
    for filler in (0.0, torch.nan):
        tokens = x.float().to(DEVICE).transpose(0, 1).contiguous().transpose(0, 1)
        tokens[unused] = filler
        leaves = [tokens.requires_grad_(), *(tensor.to(DEVICE, torch.float32).requires_grad_() for tensor in weights)]
        out = compress(leaves[0], CompressorWeights(*leaves[1:]) if weights else None, make_plan(lengths, config), config)
        results.append([out, *torch.autograd.grad(out, leaves, d_out.float().to(DEVICE))])
    for clean, poisoned in zip(*results, strict=True):
        assert torch.equal(clean, poisoned)
    assert (results[0][1][unused] == 0).all()


def check_bits(lengths, neighbours, heads, dim, hidden, config, dtype):
    """Deterministic φ of `lengths` alone and between `neighbours`: equal bits, also of x's gradient; all gradients equal in a second run."""
    before, after = neighbours
    packed = [*before, *lengths, *after]
    x, weights, d_out = draw(packed, heads, dim, hidden, config, dtype)
    weights = [tensor.to(DEVICE, dtype) for tensor in weights]
    first, last = make_plan(before, config), make_plan([*before, *lengths], config)

    def run(lengths, x, d_out):
        leaves = [tensor.to(DEVICE, dtype).requires_grad_() for tensor in (x, *weights)]
        out = compress(leaves[0], CompressorWeights(*leaves[1:]) if weights else None, make_plan(lengths, config), config, deterministic=True)
        return [out, *torch.autograd.grad(out, leaves, d_out.to(DEVICE, dtype))]

    whole = run(packed, x, d_out)
    tokens, rows = slice(first.num_keys, last.num_keys), slice(first.num_compressed, last.num_compressed)
    alone = run(lengths, x[tokens], d_out[rows])
    assert torch.equal(alone[0], whole[0][rows])
    assert torch.equal(alone[1], whole[1][tokens])
    for once, again in zip(whole, run(packed, x, d_out), strict=True):
        assert torch.equal(once, again)


@pytest.mark.parametrize("compressor", ["mean", "mlp"])
def test_deterministic_bits_do_not_depend_on_neighbours(compressor):
    check_bits([63], ([11, 3, 40], [50]), 2, 16, 24, make_config(8, 4, compressor), torch.float32)
    check_bits([9], ([130], []), 3, 24, 40, make_config(8, 4, compressor), torch.float16)


@pytest.mark.parametrize(("dim", "hidden", "dtype", "bound"), [(24, 40, torch.float32, 1e-5), (16, 200, torch.float16, 3e-3)])
def test_deterministic_matches_the_oracle(dim, hidden, dtype, bound):
    check([63, 3, 40], 2, dim, hidden, make_config(12, 4, "mlp"), dtype, bound, deterministic=True)


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [[5000], [33], [70]])
def test_deterministic_bits_on_the_gpu(lengths):
    check_bits(lengths, ([31, 4000, 700], [900]), 4, 128, 256, SparsityConfig(compressor="mlp"), torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_deterministic_on_the_gpu(dtype):
    bound = 1e-2 if dtype == torch.bfloat16 else 1e-5
    check([5000, 31, 32, 700], 4, 128, 256, SparsityConfig(compressor="mlp"), dtype, bound, deterministic=True)


@pytest.mark.gpu
@pytest.mark.parametrize("compressor", ["mean", "mlp"])
def test_bf16_on_the_gpu(compressor):
    config = SparsityConfig(compressor=compressor)
    check([5000, 31, 32, 700], 4, 128, 128, config, torch.bfloat16, 1e-2)
