"""The unions of neighbouring queries' choices against Python sets."""

import pytest
import torch

from nsa.config import SparsityConfig
from nsa.kernels.tiles import KernelPlan
from nsa.kernels.unions import unite_choices
from nsa.testing import cumulative
from scripts.bench.attention.neighbours import union_sizes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize(("queries", "n"), [(1, 3), (4, 3), (5, 5), (32, 3)])
def test_unions(queries, n):
    config = SparsityConfig(compress_block_size=8, compress_stride=4, select_block_size=8, num_selected_blocks=n, compressor="mean")
    lengths, query_lengths, num_kv_heads = [70, 0, 9, 33], [13, 0, 9, 33], 2
    generator = torch.Generator().manual_seed(queries)
    selection = torch.randint(-1, 12, (sum(query_lengths), num_kv_heads, n), generator=generator, dtype=torch.int32)
    selection[20:26] = -1
    plan = KernelPlan(cumulative(query_lengths), cumulative(lengths), config=config, device=torch.device(DEVICE))
    unions = unite_choices(selection.to(DEVICE), queries, plan, config)
    assert unions.blocks.shape[1] <= max(4, -(-min(queries * n, 9) // 4) * 4)
    blocks, bits, counts = (x.cpu() for x in (unions.blocks, unions.bits, unions.counts))
    starts = cumulative(query_lengths).tolist()
    for tile, (sequence, start) in enumerate(unions.tiles.tolist()):
        last_block = (lengths[sequence] - 1) // 8
        rows = range(starts[sequence] + start, min(starts[sequence] + start + queries, starts[sequence + 1]))
        for head in range(num_kv_heads):
            want: dict[int, int] = {}
            for bit, row in enumerate(rows):
                for block in {b for b in selection[row, head].tolist() if 0 <= b <= last_block}:
                    want[block] = want.get(block, 0) | 1 << bit
            item = tile * num_kv_heads + head
            count = int(counts[item])
            got = {int(block): int(bit) & 0xFFFFFFFF for block, bit in zip(blocks[item, :count], bits[item, :count], strict=True)}
            assert list(got) == sorted(got) and got == (want or {0: 0})
    assert int(unions.total) == int(counts.sum())


def test_sizes_of_unions_in_the_bench():
    selection = torch.randint(-1, 9, (11, 2, 3, 4), generator=torch.Generator().manual_seed(0))
    sizes = union_sizes(selection, 4)
    for tile, layer, head in [(0, 0, 0), (1, 1, 2), (1, 0, 1)]:
        assert sizes[tile, layer, head] == len(set(selection[4 * tile : 4 * tile + 4, layer, head].flatten().tolist()) - {-1})
    assert sizes.shape == (2, 2, 3)
