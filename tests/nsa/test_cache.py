"""The paged cache: what is written where, decode against packed attention, forks, and running out of pages."""

from dataclasses import dataclass, field, replace

import pytest
import torch

from nsa.attention import LayerCache, nsa_attention, nsa_decode
from nsa.cache import NSACache, plan_write, read_tokens, write_layer
from nsa.config import NSAConfig
from nsa.reference import compress
from nsa.testing import AttentionInputs, assert_same_selection, clear_choices, cumulative, make_inputs, tiny_config


def cache_config(inputs: AttentionInputs, **changes) -> NSAConfig:
    """A one-layer model config that fits the inputs."""
    sparsity = {name: getattr(inputs.config, name) for name in inputs.config.__dataclass_fields__}
    num_kv_heads, value_dim = inputs.kv.slc[1].shape[1:]
    shared = inputs.kv.cmp[0] is inputs.kv.slc[0]
    return tiny_config(
        num_hidden_layers=1, num_attention_heads=inputs.q.shape[1], num_key_value_heads=num_kv_heads, head_dim=inputs.q.shape[2],
        value_head_dim=value_dim, kv="shared" if shared else "separate", **(sparsity | changes),
    )  # fmt: skip


@dataclass
class Player:
    """Feeds sequences of `inputs` into a one-layer cache, some tokens at a time. Fresh pages hold `garbage`."""

    inputs: AttentionInputs
    num_pages: int = 40
    dynamic: bool = True
    garbage: float = 1000.0
    cache: NSACache = field(init=False)
    ids: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.inputs = self.inputs.to(requires_grad=False)
        self.cache = NSACache(cache_config(self.inputs), num_pages=self.num_pages, dtype=self.inputs.q.dtype)
        self.layer.raw.fill_(self.garbage)
        self.layer.cmp.fill_(self.garbage)
        self.ids = [self.cache.add_sequence() for _ in self.inputs.cu_seqlens[1:]]

    @property
    def layer(self) -> LayerCache:
        return self.cache.layers[0]

    def rows(self, sequence: int, start: int, count: int) -> torch.Tensor:
        return int(self.inputs.cu_seqlens[sequence]) + torch.arange(start, start + count)

    def write(self, sequences: list[int], counts: list[int]) -> torch.Tensor:
        """Append the next tokens of sequences (indices into `inputs`); returns their rows in `inputs`."""
        starts = [self.cache.length(self.ids[s]) for s in sequences]
        self.cache.reserve([self.ids[s] for s in sequences], counts)
        rows = torch.cat([self.rows(s, start, count) for s, start, count in zip(sequences, starts, counts, strict=True)])
        plan = plan_write(
            self.cache.block_table([self.ids[s] for s in sequences]),
            torch.repeat_interleave(torch.arange(len(sequences)), torch.tensor(counts)),
            torch.cat([torch.arange(start, start + count) for start, count in zip(starts, counts, strict=True)]),
            page_size=self.cache.page_size,
            config=self.inputs.config,
            dynamic=self.dynamic,
        )
        kv = self.inputs.kv
        sets = [kv.slc] if kv.cmp[0] is kv.slc[0] else [kv.cmp, kv.slc, kv.win]
        write_layer(self.layer, [k[rows] for k, _ in sets], [v[rows] for _, v in sets], plan, self.inputs.phi)
        return rows

    def decode(self, sequences: list[int], rows: torch.Tensor, num_new: int = 1, columns: int | None = None, **options):
        """Attention of the last `num_new` tokens of each sequence, which are `rows` of `inputs`."""
        ids = [self.ids[s] for s in sequences]
        shape = (len(sequences), num_new)
        lengths = torch.tensor([self.cache.length(i) for i in ids], dtype=torch.int32)
        out, chosen = nsa_decode(
            self.inputs.q[rows].unflatten(0, shape), self.layer, self.cache.block_table(ids, columns), lengths,
            self.inputs.gates[rows].unflatten(0, shape), phi=self.inputs.phi, config=self.inputs.config, return_selection=True, **options,
        )  # fmt: skip
        return out.flatten(0, 1), chosen.flatten(0, 1)


def prefill(inputs: AttentionInputs, **options):
    return nsa_attention(inputs.q, inputs.kv, inputs.gates, **inputs.options, return_selection=True, **options)


def assert_rows_agree(inputs: AttentionInputs, found: dict[int, tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Decoded rows equal the packed batch's: selections where clear, outputs ≤ 1e-5 where selections are equal."""
    out, chosen = prefill(inputs)
    clear = clear_choices(inputs)
    assert clear.double().mean() > 0.98
    rows = torch.tensor(sorted(found))
    decoded, selected = (torch.stack([found[int(row)][i] for row in rows]) for i in (0, 1))
    assert_same_selection(selected, chosen[rows], clear[rows])
    trusted = clear[rows].all(dim=-1)
    assert (decoded - out[rows])[trusted].abs().max() <= 1e-5


@pytest.mark.parametrize("compressor", ["mlp", "mean"])
@pytest.mark.parametrize("kv", ["separate", "shared"])
@pytest.mark.parametrize("dynamic", [True, False])
def test_token_by_token_decode_equals_prefill(kv, compressor, dynamic):
    inputs = make_inputs(tiny_config(compressor=compressor).sparsity, lengths=[150], group_size=3, key_dim=8, value_dim=12, kv=kv)
    player = Player(inputs, dynamic=dynamic)
    found = {}
    for t in range(150):
        rows = player.write([0], [1])
        out, chosen = player.decode([0], rows)
        found[t] = (out[0], chosen[0])
    assert_rows_agree(inputs, found)


@pytest.mark.parametrize("group_size", [1, 2, 7])
def test_sequences_of_many_lengths_decode_together_as_in_the_packed_batch(group_size):
    lengths = [3, 131, 64, 65, 8, 90]
    inputs = make_inputs(tiny_config().sparsity, lengths=lengths, group_size=group_size, key_dim=12, value_dim=8)
    player = Player(inputs)
    player.write(list(range(6)), [max(0, length - 20) for length in lengths])
    found = {}
    for step in range(20):
        live = [s for s in range(6) if player.cache.length(player.ids[s]) < lengths[s]]
        rows = player.write(live, [1] * len(live))
        out, chosen = player.decode(live, rows, columns=5 if step % 2 else None)
        found |= {int(row): (out[i], chosen[i]) for i, row in enumerate(rows)}
    assert len(found) == 3 + 8 + 20 * 4
    assert_rows_agree(inputs, found)


def test_several_new_tokens_decode_at_once():
    inputs = make_inputs(tiny_config().sparsity, lengths=[100, 37])
    player = Player(inputs)
    player.write([0, 1], [97, 34])
    rows = player.write([0, 1], [3, 3])
    out, chosen = player.decode([0, 1], rows, num_new=3)
    assert_rows_agree(inputs, {int(row): (out[i], chosen[i]) for i, row in enumerate(rows)})


@pytest.mark.parametrize(("l", "d", "size", "n", "window"), [(4, 4, 4, 6, 10), (8, 2, 24, 3, 100), (32, 16, 64, 4, 70), (12, 6, 18, 5, 1)])
def test_decode_for_other_block_sizes(l, d, size, n, window):
    sparsity = tiny_config(compress_block_size=l, compress_stride=d, select_block_size=size, num_selected_blocks=n, window_size=window).sparsity
    inputs = make_inputs(sparsity, lengths=[340], num_kv_heads=1)
    player = Player(inputs)
    player.write([0], [200])
    found = {}
    for t in range(200, 340):
        rows = player.write([0], [1])
        out, chosen = player.decode([0], rows)
        found[t] = (out[0], chosen[0])
    assert_rows_agree(inputs, found)


def test_decode_is_dense_attention_up_to_n_times_block_size():
    inputs = make_inputs(tiny_config().sparsity, lengths=[32])
    inputs = replace(inputs, gates=torch.tensor([0.0, 1.0, 0.0]).expand_as(inputs.gates))
    player = Player(inputs)
    q, k, v = (x.transpose(0, 1)[None] for x in (inputs.q, *inputs.kv.slc))
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)
    for t in range(32):
        out, _ = player.decode([0], player.write([0], [1]))
        assert (out[0] - dense[t]).abs().max() <= 1e-5


def test_decode_replays_a_given_selection_and_chooses_rows_of_minus_2():
    inputs = make_inputs(tiny_config().sparsity, lengths=[90, 70])
    given = prefill(inputs)[1].clone()
    given[80:] = torch.tensor([1, 4, 7, -1])
    given[89, 1] = -2
    out, chosen = prefill(inputs, selection=given)
    player = Player(inputs)
    player.write([0, 1], [89, 69])
    rows = player.write([0, 1], [1, 1])
    decoded, used = player.decode([0, 1], rows, selection=given[rows][:, None])
    assert torch.equal(used, chosen[rows])
    assert (decoded - out[rows]).abs().max() <= 1e-5


def test_a_padded_row_disturbs_nobody():
    inputs = make_inputs(tiny_config().sparsity, lengths=[90])
    player = Player(inputs)
    rows = player.write([0], [90])[-1:]
    alone, _ = player.decode([0], rows)
    table = torch.cat([torch.zeros(1, 2, dtype=torch.int32), player.cache.block_table(player.ids)])
    q, gates = (x[rows].expand(2, *x.shape[1:])[:, None] for x in (player.inputs.q, player.inputs.gates))
    out = nsa_decode(q, player.layer, table, torch.tensor([0, 90], dtype=torch.int32), gates, phi=inputs.phi, config=inputs.config)
    torch.testing.assert_close(out[1], alone)


def test_writing_in_chunks_or_at_once_gives_the_same_pages():
    inputs = make_inputs(tiny_config().sparsity, lengths=[150, 20])
    once, chunks = Player(inputs), Player(inputs, dynamic=False)
    once.write([0, 1], [150, 20])
    for counts in ([1, 0], [6, 7], [63, 2], [0, 1], [80, 10]):
        chunks.write([0, 1], counts)
    for player in (once, chunks):
        for sequence, length in ((0, 150), (1, 20)):
            pages = torch.tensor(player.cache.pages(player.ids[sequence]))
            slots = (pages[:, None] * player.cache.page_size + torch.arange(player.cache.page_size)).flatten()[:length]
            keys, values = read_tokens(player.layer, slots)
            rows = player.rows(sequence, 0, length)
            for branch, k, v in zip(("cmp", "slc", "win"), keys, values, strict=True):
                assert torch.equal(k, getattr(player.inputs.kv, branch)[0][rows])
                assert torch.equal(v, getattr(player.inputs.kv, branch)[1][rows])
            pooled = player.layer.cmp[pages].flatten(0, 1)
            l, d = inputs.config.compress_block_size, inputs.config.compress_stride
            expected = torch.cat([compress(player.inputs.kv.cmp[i][rows], w, inputs.config) for i, w in enumerate((inputs.phi.k, inputs.phi.v))], -1)
            last_tokens = torch.arange(expected.shape[0]) * d + l - 1
            torch.testing.assert_close(pooled[last_tokens // d], expected)


def test_the_layout_is_the_documented_one():
    config = tiny_config(num_hidden_layers=3, value_head_dim=12, select_block_size=24, compress_block_size=8)
    cache = NSACache(config, num_pages=5)
    assert cache.page_size == 72
    assert len(cache.layers) == 3
    assert cache.layers[0].raw.shape == (6, 2, 72, 3 * 2, 12)
    assert cache.layers[0].cmp.shape == (6, 72 // 4, 2, 8 + 12)
    assert NSACache(tiny_config(kv="shared"), num_pages=1).layers[0].raw.shape == (2, 2, 64, 2, 8)


@pytest.mark.parametrize("prefix", [64, 100, 5])
def test_a_forked_sequence_goes_its_own_way(prefix):
    """Rows of `inputs`: sequence 1 has the first `prefix` tokens of sequence 0, then its own."""
    inputs = make_inputs(tiny_config().sparsity, lengths=[prefix + 40, prefix + 40]).to(requires_grad=False)
    length = prefix + 40
    for name, x in inputs.leaves.items():
        if not name.startswith("phi"):
            x[length : length + prefix] = x[:prefix]
    player = Player(inputs)
    player.write([0], [prefix])
    free = player.cache.num_free_pages
    player.cache.release(player.ids[1])
    player.ids[1] = player.cache.fork(player.ids[0])[0]
    assert free - player.cache.num_free_pages == (1 if prefix % 64 else 0)
    found = {}
    for _ in range(40):
        rows = player.write([1, 0], [1, 1])
        out, chosen = player.decode([1, 0], rows)
        found |= {int(row): (out[i], chosen[i]) for i, row in enumerate(rows)}
    assert_rows_agree(inputs, found)
    player.cache.release(player.ids[0])
    out, _ = player.decode([1], rows[:1])
    torch.testing.assert_close(out[0], found[int(rows[0])][0])
    player.cache.release(player.ids[1])
    assert player.cache.num_free_pages == player.num_pages


def test_released_pages_are_used_again_without_a_trace():
    inputs = make_inputs(tiny_config().sparsity, lengths=[180, 190])
    player = Player(inputs, num_pages=3)
    player.write([0], [180])
    player.cache.release(player.ids[0])
    player.write([1], [150])
    found = {}
    for _ in range(40):
        rows = player.write([1], [1])
        out, chosen = player.decode([1], rows)
        found[int(rows[0])] = (out[0], chosen[0])
    assert_rows_agree(inputs, found)


def test_nan_left_in_pages_by_others_stays_there():
    inputs = make_inputs(tiny_config().sparsity, lengths=[100, 12])
    player = Player(inputs, garbage=torch.nan)
    player.write([0, 1], [97, 9])
    rows = player.write([0, 1], [3, 3])
    out, chosen = player.decode([0, 1], rows, num_new=3)
    assert out.isfinite().all()
    assert_rows_agree(inputs, {int(row): (out[i], chosen[i]) for i, row in enumerate(rows)})


def test_without_free_pages_nothing_is_reserved():
    cache = NSACache(tiny_config(), num_pages=3)
    first, second = cache.add_sequence(), cache.add_sequence()
    cache.reserve([first], 65)
    with pytest.raises(MemoryError, match="1 free pages of 64 tokens, 2 are needed"):
        cache.reserve([first, second], [64, 10])
    assert (cache.length(first), cache.length(second), cache.num_free_pages) == (65, 0, 1)
    cache.reserve([second], 10)
    with pytest.raises(MemoryError, match="0 free pages"):
        cache.fork(first)
    assert cache.num_sequences == 2
    cache.release(second)
    assert cache.num_free_pages == 1
    with pytest.raises(ValueError, match="num_pages"):
        NSACache(tiny_config(), num_pages=0)


def test_block_tables_name_pages_in_order_and_pad_with_the_scratch_page():
    cache = NSACache(tiny_config(), num_pages=8)
    ids = [cache.add_sequence() for _ in range(3)]
    cache.reserve(ids, [130, 1, 0])
    cache.reserve(ids[:1], 62)
    table = cache.block_table(ids)
    assert table.dtype == torch.int32
    assert table.shape == (3, 3)
    assert table[1, 1:].tolist() == [0, 0]
    assert table[2].tolist() == [0, 0, 0]
    used = [page for page in table.flatten().tolist() if page]
    assert len(set(used)) == len(used) == 4
    assert cache.block_table(ids, 5).shape == (3, 5)


def test_decode_shapes_are_checked():
    inputs = make_inputs(tiny_config().sparsity, lengths=[9])
    player = Player(inputs)
    player.write([0], [9])
    q, gates = player.inputs.q[:1, None], player.inputs.gates[:1, None]
    table, lengths = player.cache.block_table(player.ids), torch.tensor([9])
    with pytest.raises(ValueError, match="gates"):
        nsa_decode(q, player.layer, table, lengths, gates[..., :2], phi=inputs.phi, config=inputs.config)
    with pytest.raises(ValueError, match="seq_lens"):
        nsa_decode(q, player.layer, table, cumulative([9]), gates, phi=inputs.phi, config=inputs.config)
