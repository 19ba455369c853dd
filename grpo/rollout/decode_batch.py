"""The running rows on the device: one decode step over all of them, with every piece of bookkeeping in tensors.

Rows 0 … num_rows−1 are running samples. A step feeds each row's last token, draws the next, writes it to the row's output
slot, and marks rows that drew an EOS or are full as done; nothing comes back to the host until `read_flags`. A done row
stays in the batch until the host compacts it away: it is frozen (it feeds the same token at the same place again, which
rewrites what is there) and its outputs go to a scratch column. Rows move when others leave; output slots do not.

On CUDA a step is captured as a graph per (rows bucket, page-count bucket): all state lives in buffers that never move. The
first step of a bucket runs eagerly (warm-up and a real step in one), the second captures and replays. Rows beyond
num_rows are padding: done, sequence length 0, on the cache's scratch page.

Shape suffixes: B rows of a step, S buffer rows, N new rows, M max_tokens, P pages of a row.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from grpo.logprobs import head_logits
from grpo.rollout.engine import Sampling
from grpo.rollout.sampling import hashed_uniforms, sample_tokens
from nsa.attention import RECOMPUTE
from nsa.cache import NSACache
from nsa.model import NSAForCausalLM


def bucket(value: int) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, 16, …: at most a third of padding, few graphs."""
    power = 1
    while power < value:
        power *= 2
    return power * 3 // 4 if power >= 4 and power * 3 // 4 >= value else power


def last_logits(model: NSAForCausalLM, hidden_BE: Tensor) -> Tensor:
    """fp32 logits `[B, V]` of hidden states, rounded as the learner rounds them (grpo.logprobs)."""
    weight_VE = model.lm_head.weight
    return head_logits(hidden_BE.to(weight_VE.dtype), weight_VE)


class DecodeBatch:
    """State and steps of up to `max_sequences` running samples.

    Args:
        max_tokens, num_columns: room per row for drawn tokens and for pages.
        selection_shape: (layers, Hkv, n); the buffer is made when a request first records selections.
        eos_ids: tokens that end a sample.
        graphs: pad to buckets, and capture steps where the device is CUDA.
    """

    def __init__(
        self, model: NSAForCausalLM, cache: NSACache, *, max_sequences: int, max_tokens: int, num_columns: int,
        selection_shape: tuple[int, int, int], selection_dtype: torch.dtype, eos_ids: tuple[int, ...], graphs: bool,
    ) -> None:  # fmt: skip
        self.model, self.cache = model, cache
        self.max_sequences, self.max_tokens, self.num_columns, self.num_rows = max_sequences, max_tokens, num_columns, 0
        self.records = False
        self.device = model.lm_head.weight.device
        self._dynamic = self.device.type == "cpu"  # there a host synchronisation costs nothing and saves work
        self._pads = graphs
        self._graphs = CudaGraphs() if graphs and self.device.type == "cuda" else None
        rows, vocabulary = max_sequences, model.config.vocab_size

        def row_tensor(dtype: torch.dtype, value: float) -> Tensor:
            return torch.full((rows,), value, dtype=dtype, device=self.device)

        self._padding = {"token": 0, "length": -1, "count": 0, "slot": rows, "key": 0, "done": True, "flagged": False}
        self._state = {name: row_tensor(torch.bool if isinstance(value, bool) else torch.int64, value) for name, value in self._padding.items()}
        self._table = torch.zeros(rows, num_columns, dtype=torch.int32, device=self.device)
        self._temperature, self._top_p = row_tensor(torch.float32, 1.0), row_tensor(torch.float32, 1.0)
        self._top_k, self._limit = row_tensor(torch.int64, 0), row_tensor(torch.int64, max_tokens)
        self._is_eos = torch.zeros(vocabulary, dtype=torch.bool, device=self.device)
        self._is_eos[list(eos_ids)] = True
        self._is_candidate = torch.zeros(vocabulary, dtype=torch.bool, device=self.device)
        # The last slot and the last column are scratch: padding and done rows write there.
        self._tokens = torch.zeros(rows + 1, max_tokens + 1, dtype=torch.int64, device=self.device)
        self._logprobs = torch.zeros(rows + 1, max_tokens + 1, dtype=torch.float32, device=self.device)
        self._selections: Tensor | None = None
        self._selection_shape, self._selection_dtype = selection_shape, selection_dtype
        self._truncates = False
        self._free_slots: list[int] = []
        self.reset()

    def has_room(self, sampling: Sampling, num_columns: int) -> bool:
        """Whether a request with rows of `num_columns` pages can use this batch."""
        return self.max_tokens >= sampling.max_tokens and self.num_columns >= num_columns

    def configure(self, sampling: Sampling, candidate_ids_V: Tensor) -> None:
        """Settings of the coming request; `candidate_ids_V` bool: tokens after which the host looks for stop strings."""
        self.reset()
        self._temperature.fill_(sampling.temperature)
        self._top_p.fill_(sampling.top_p)
        self._top_k.fill_(sampling.top_k)
        self._limit.fill_(sampling.max_tokens)
        self._is_candidate.copy_(candidate_ids_V)
        self._truncates = sampling.top_p < 1 or sampling.top_k > 0
        self.records = sampling.record_selection
        if self.records and self._selections is None:
            shape = (self.max_sequences + 1, self.max_tokens + 1, *self._selection_shape)
            self._selections = torch.zeros(shape, dtype=self._selection_dtype, device=self.device)

    def reset(self) -> None:
        """Forget all rows."""
        self.num_rows = 0
        self._free_slots = list(range(self.max_sequences))
        for name, value in self._padding.items():
            self._state[name].fill_(value)
        self._table.zero_()

    def add(self, lengths: list[int], keys: list[int], block_table_NP: Tensor, logits_NV: Tensor) -> list[int]:
        """New rows whose prompts are in the cache: draw their first tokens. Returns their output slots.

        lengths: prompt tokens; keys: 63-bit; logits_NV: fp32, of the prompts' last tokens."""
        count = len(lengths)
        new = slice(self.num_rows, self.num_rows + count)
        slots = [self._free_slots.pop() for _ in range(count)]
        host = torch.tensor([lengths, slots, keys], dtype=torch.int64).to(self.device)
        for name, values in zip(("length", "slot", "key"), host, strict=True):
            self._state[name][new] = values
        for name in ("token", "count", "done", "flagged"):
            self._state[name][new] = 0
        self._table[new] = 0
        self._table[new, : block_table_NP.shape[1]] = block_table_NP.to(self.device)
        self.num_rows += count
        self._draw(new, logits_NV)
        return slots

    def step(self, num_columns: int) -> None:
        """Feed each row's last token and draw the next; `num_columns` pages hold every running row."""
        rows, columns = self.num_rows, num_columns
        if not self._pads:
            self._step(rows, columns)
            return
        rows, columns = min(bucket(rows), self.max_sequences), min(bucket(columns), self.num_columns)
        if self._graphs is None:
            self._step(rows, columns)
        else:
            self._graphs.run((rows, columns, self._truncates, self.records), lambda: self._step(rows, columns))

    def _step(self, rows: int, columns: int) -> None:
        part = slice(0, rows)
        state = {name: tensor[part] for name, tensor in self._state.items()}
        out = self.model.model.decode_step(
            state["token"], self._table[part, :columns], state["length"] + 1, self.cache.layers, dynamic=self._dynamic, return_selection=self.records
        )
        if self.records:
            assert self._selections is not None
            assert out.selection is not None
            column = torch.where(state["done"], self.max_tokens, state["count"] - 1)
            self._selections.index_put_((state["slot"], column), out.selection.to(self._selections.dtype))
        state["length"].add_(~state["done"])
        self._draw(part, last_logits(self.model, out.hidden_TE))

    def _draw(self, rows: slice, logits_BV: Tensor) -> None:
        state = {name: tensor[rows] for name, tensor in self._state.items()}
        truncation = (self._top_p[rows], self._top_k[rows]) if self._truncates else (None, None)
        uniforms_B = hashed_uniforms(state["key"], state["count"])
        ids_B, logprobs_B = sample_tokens(logits_BV, uniforms_B, self._temperature[rows], *truncation)
        active_B = ~state["done"]
        place = (state["slot"], torch.where(active_B, state["count"], self.max_tokens))
        self._tokens.index_put_(place, ids_B)
        self._logprobs.index_put_(place, logprobs_B)
        state["token"].copy_(torch.where(active_B, ids_B, state["token"]))
        state["count"].add_(active_B)
        state["flagged"].logical_or_(active_B & self._is_candidate[ids_B])
        state["done"].logical_or_(self._is_eos[ids_B] | (state["count"] >= self._limit[rows]))

    def read_flags(self) -> tuple[list[int], list[bool], list[bool]]:
        """Tokens drawn, done, and drew a candidate since the last call, per row. Waits for the device."""
        rows = slice(0, self.num_rows)
        counts, done, flagged = torch.stack([self._state[name][rows].long() for name in ("count", "done", "flagged")]).tolist()
        self._state["flagged"][rows] = False
        return counts, [bool(x) for x in done], [bool(x) for x in flagged]

    def read_tokens(self, slots: list[int], length: int) -> list[list[int]]:
        """The first `length` drawn tokens of each slot (beyond a row's count: anything)."""
        return self._tokens[self._index(slots), :length].tolist()

    def read_outputs(self, slots: list[int], length: int) -> tuple[list[list[int]], list[list[float]]]:
        """The first `length` tokens of each slot and their log-probabilities."""
        index = self._index(slots)
        return self._tokens[index, :length].tolist(), self._logprobs[index, :length].tolist()

    def read_selection(self, slot: int, length: int) -> Tensor | None:
        """`[length, layers, Hkv, n]`; the last token counts as not fed, whether it has been or not."""
        if not self.records:
            return None
        assert self._selections is not None
        selection = self._selections[slot, :length]
        selection[-1] = RECOMPUTE
        return selection

    def keep(self, rows: list[int], freed_slots: list[int]) -> None:
        """Leave only these rows, in this order; `freed_slots` are those of the rows that leave."""
        index = self._index(rows)
        kept, left = slice(0, len(rows)), slice(len(rows), self.num_rows)
        for name, tensor in self._state.items():
            tensor[kept] = tensor[index]
            tensor[left] = self._padding[name]
        self._table[kept] = self._table[index]
        self._table[left] = 0
        self.num_rows = len(rows)
        self._free_slots += freed_slots

    def _index(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64).to(self.device)


GraphKey = tuple[int, int, bool, bool]
"""Rows, page columns, whether draws are truncated, whether selections are recorded."""


class CudaGraphs:
    """Captured steps by key, in one memory pool."""

    def __init__(self) -> None:
        self._warm: set[GraphKey] = set()
        self._graphs: dict[GraphKey, torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def run(self, key: GraphKey, step: Callable[[], None]) -> None:
        """Run a step: eagerly the first time, from a graph afterwards. Capturing executes nothing."""
        if key not in self._warm:
            step()
            self._warm.add(key)
            return
        if key not in self._graphs:
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                step()
            self._graphs[key] = graph
        self._graphs[key].replay()
