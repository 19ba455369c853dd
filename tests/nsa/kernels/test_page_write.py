"""Writing to the paged cache by kernels, against nsa.cache."""

import pytest
import torch

from nsa.attention import CompressorWeights, LayerCache, Phi
from nsa.cache import plan_write, write_layer
from nsa.config import SparsityConfig
from nsa.kernels.page_write import write_pages

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = SparsityConfig(compress_block_size=8, compress_stride=4, select_block_size=24, num_selected_blocks=3)
LARGE = SparsityConfig(num_selected_blocks=4)


def make_phi(config: SparsityConfig, key_dim: int, value_dim: int, dtype: torch.dtype) -> Phi:
    def weights(dim: int) -> CompressorWeights:
        block = config.compress_block_size
        shapes = ((block, dim), (20, block * dim), (dim, 20))
        return CompressorWeights(*(torch.randn(shape, device=DEVICE, dtype=dtype) * 0.2 for shape in shapes))

    return Phi(weights(key_dim), weights(value_dim))


def make_cache(config: SparsityConfig, page: int, sets: int, key_dim: int, value_dim: int, dtype: torch.dtype) -> LayerCache:
    """Random pages, two KV heads."""
    raw = torch.randn(20, 2, page, sets * 2, max(key_dim, value_dim), device=DEVICE, dtype=dtype)
    cmp = torch.randn(20, page // config.compress_stride, 2, key_dim + value_dim, device=DEVICE, dtype=dtype)
    return LayerCache(raw, cmp, key_dim, value_dim, sets)


@pytest.mark.parametrize(
    ("config", "page", "sets", "mlp", "key_dim", "value_dim"),
    [(LARGE, 64, 3, True, 16, 24), (SMALL, 72, 1, False, 24, 24), (SMALL, 72, 3, True, 40, 16)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_pages_as_the_plain_way(
    config: SparsityConfig, page: int, sets: int, mlp: bool, key_dim: int, value_dim: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr("nsa.kernels.page_write.POOLING_PROGRAMS", 1)
    if dtype == torch.bfloat16 and DEVICE == "cpu":
        pytest.skip("the interpreter has no bfloat16")
    phi = make_phi(config, key_dim, value_dim, dtype) if mlp else None
    table = (torch.randperm(19, device=DEVICE)[:18] + 1).int().view(6, 3)
    block = config.compress_block_size
    lengths = torch.tensor([block, block + config.compress_stride, 1, 0, 2 * page, block - 1], device=DEVICE, dtype=torch.int32)
    rows = torch.tensor([0] * 50 + [1] + [4] * (page + 9), device=DEVICE)
    positions = torch.cat([torch.arange(50), torch.tensor([block - 1]), torch.arange(page + 9) + page - 5]).to(DEVICE)
    for decode in (True, False):
        own, other = make_cache(config, page, sets, key_dim, value_dim, dtype), None
        other = LayerCache(own.raw.clone(), own.cmp.clone(), key_dim, value_dim, sets)
        count = 6 if decode else len(rows)
        keys = torch.randn(count, 2 * sets, key_dim + 3, device=DEVICE, dtype=dtype)[..., :key_dim]
        values = torch.randn(count, 2 * sets, value_dim, device=DEVICE, dtype=dtype)
        where, at = (torch.arange(6, device=DEVICE), lengths.long() - 1) if decode else (rows, positions)
        plan = plan_write(table, where, at, page_size=page, config=config, dynamic=True)
        write_layer(other, keys.split(2, dim=1), values.split(2, dim=1), plan, phi)
        complete = ((positions >= block - 1) & ((positions - (block - 1)) % config.compress_stride == 0)).nonzero().flatten()
        given = (lengths, None, None) if decode else (positions, rows, complete)
        write_pages(own, keys, values, table, given[0], rows=given[1], complete=given[2], phi=phi, config=config)
        bound = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(own.raw[1:], other.raw[1:], rtol=0, atol=0)
        torch.testing.assert_close(own.cmp[1:], other.cmp[1:], rtol=bound, atol=bound)
