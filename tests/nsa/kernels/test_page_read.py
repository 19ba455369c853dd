"""Reading sequences out of the paged cache by a kernel, and attention that takes compressed tokens from there."""

import pytest
import torch

from nsa.attention import BranchKV, CompressorWeights, LayerCache, Phi, nsa_attention, nsa_decode, plan_batch
from nsa.cache import plan_write, read_tokens, write_layer
from nsa.config import SparsityConfig
from nsa.kernels.page_read import read_pages
from nsa.kernels.tiles import KernelPlan

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SMALL = SparsityConfig(compress_block_size=8, compress_stride=4, select_block_size=24, num_selected_blocks=3, window_size=16)
LARGE = SparsityConfig(num_selected_blocks=4)
LENGTHS = [1, 63, 200, 7, 72, 130]


def filled_cache(config: SparsityConfig, page: int, sets: int, key_dim: int, value_dim: int) -> tuple[LayerCache, torch.Tensor, Phi]:
    """Two KV heads' pages with LENGTHS tokens of as many sequences in them, what nothing was written to being NaN; block table; φ."""
    torch.manual_seed(0)

    def weights(dim: int) -> CompressorWeights:
        block = config.compress_block_size
        return CompressorWeights(*(torch.randn(shape, device=DEVICE) * 0.2 for shape in ((block, dim), (20, block * dim), (dim, 20))))

    phi = Phi(weights(key_dim), weights(value_dim))
    columns = -(-max(LENGTHS) // page)
    pages = len(LENGTHS) * columns + 1
    raw = torch.full((pages, 2, page, sets * 2, max(key_dim, value_dim)), torch.nan, device=DEVICE)
    cmp = torch.full((pages, page // config.compress_stride, 2, key_dim + value_dim), torch.nan, device=DEVICE)
    cache = LayerCache(raw, cmp, key_dim, value_dim, sets)
    table = (torch.randperm(pages - 1, device=DEVICE) + 1).int().view(len(LENGTHS), columns)
    counts = torch.tensor(LENGTHS)
    rows = torch.arange(len(LENGTHS)).repeat_interleave(counts).to(DEVICE)
    positions = torch.cat([torch.arange(length) for length in LENGTHS]).to(DEVICE)
    plan = plan_write(table, rows, positions, page_size=page, config=config, dynamic=True)
    keys, values = (torch.randn(len(rows), 2 * sets, dim, device=DEVICE) for dim in (key_dim, value_dim))
    write_layer(cache, keys.split(2, dim=1), values.split(2, dim=1), plan, phi)
    return cache, table, phi


@pytest.mark.parametrize(
    ("config", "page", "sets", "key_dim", "value_dim"), [(LARGE, 64, 1, 16, 16), (SMALL, 72, 3, 40, 16), (LARGE, 128, 3, 16, 24)]
)
def test_the_cached_sequences_come_back(config: SparsityConfig, page: int, sets: int, key_dim: int, value_dim: int) -> None:
    cache, table, phi = filled_cache(config, page, sets, key_dim, value_dim)
    key_ends = torch.tensor([0, *LENGTHS]).cumsum(0)
    query_ends = torch.tensor([0, *(min(length, 5) for length in LENGTHS)]).cumsum(0)
    plan = plan_batch(query_ends, key_ends, config=config, num_heads=4, device=DEVICE, backend="triton")
    assert isinstance(plan, KernelPlan)
    (keys, values), compressed = read_pages(cache, table, plan, raw=True, config=config)
    position = torch.cat([torch.arange(length) for length in LENGTHS]).to(DEVICE)
    sequence = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS)).to(DEVICE)
    key_sets, value_sets = read_tokens(cache, table[sequence, position // page].long() * page + position % page)
    torch.testing.assert_close(keys, torch.cat(key_sets, dim=1), rtol=0, atol=0)
    torch.testing.assert_close(values, torch.cat(value_sets, dim=1), rtol=0, atol=0)
    (no_keys, no_values), same = read_pages(cache, table, plan, raw=False, config=config)
    assert no_keys.shape[0] == no_values.shape[0] == 0
    torch.testing.assert_close(same, compressed, rtol=0, atol=0)
    q = torch.randn(int(query_ends[-1]), 4, key_dim, device=DEVICE)
    gates = torch.rand(*q.shape[:2], 3, device=DEVICE)
    sets_kv = list(zip(keys.split(2, dim=1), values.split(2, dim=1), strict=True))
    kv = BranchKV(*sets_kv) if sets == 3 else BranchKV(sets_kv[0], sets_kv[0], sets_kv[0])
    expected = nsa_attention(q, kv, gates, phi=phi, config=config, cu_seqlens=plan)
    out = nsa_attention(q, kv, gates, phi=phi, config=config, cu_seqlens=plan, compressed=compressed)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


def test_compressed_tokens_are_for_the_kernels_and_all_of_them() -> None:
    q, kv = torch.zeros(40, 2, 16, device=DEVICE), (torch.zeros(40, 1, 16, device=DEVICE),) * 2
    config = SparsityConfig(compress_block_size=8, compress_stride=4, select_block_size=8, num_selected_blocks=3, compressor="mean")
    for backend, message in (("torch", "compressed tokens are for backend 'triton'"), ("triton", "have 9 compressed tokens, got 8")):
        with pytest.raises(ValueError, match=message):
            nsa_attention(q, BranchKV(kv, kv, kv), q[..., :3], phi=None, config=config, compressed=(kv[0][:8], kv[1][:8]), backend=backend)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_decode_writes_where_it_is_told_to(backend: str) -> None:
    cache, table, phi = filled_cache(LARGE, 64, 1, 16, 24)
    q, lengths = torch.randn(len(LENGTHS), 1, 4, 16, device=DEVICE), torch.tensor(LENGTHS, device=DEVICE, dtype=torch.int32)
    gates, wide = torch.rand(*q.shape[:3], 3, device=DEVICE), torch.full((len(LENGTHS) + 2, 4, 24), torch.nan, device=DEVICE)
    out = wide[1:-1].unflatten(0, (-1, 1))
    given = nsa_decode(q, cache, table, lengths, gates, phi=phi, config=LARGE, out=out, backend=backend)
    assert given.data_ptr() == out.data_ptr() and wide[[0, -1]].isnan().all()
    torch.testing.assert_close(out, nsa_decode(q, cache, table, lengths, gates, phi=phi, config=LARGE, backend=backend), rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"out must be \(6, 1, 4, 24\), contiguous"):
        nsa_decode(q, cache, table, lengths, gates, phi=phi, config=LARGE, out=out[..., :16], backend=backend)
