"""Which rows of a packed batch each program of a kernel works on.

A `KernelPlan` is made once per batch from the sequences' lengths on the host and shared by all layers; its tables go to
the device once. `plan_of` remembers those of the last batches, for callers that do not share one. Query, key and
compressed tiles never cross a sequence border. Leaves out what is computed in a tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from nsa.blocks import num_compressed
from nsa.config import SparsityConfig
from nsa.packing import all_places, checked_ends


@dataclass(frozen=True, slots=True)
class Tile:
    """Shape of a program of the selected branch: keys of a step, rows (queries × heads), and how it is scheduled."""

    keys: int
    rows: int
    num_warps: int
    num_stages: int


def on_device(table: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A host tensor on a device. A copy from ordinary memory would wait for all that the GPU still has to do.

    Raises:
        ValueError: a CUDA graph is being captured, which would copy again from memory that is no longer the table's.
    """
    if device.type != "cuda":
        return table.to(device)
    refuse_capture(device)
    return table.pin_memory().to(device, non_blocking=True)


def refuse_capture(device: torch.device) -> None:
    """Raises where a CUDA graph is being captured."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise ValueError(
            "a CUDA graph needs a plan that was used before and lives as long as the graph: make it with plan_batch, run a call with it as "
            "cu_seqlens, then capture one"
        )


class KernelPlan:
    """The rows of N packed sequences, for the kernels.

    Args:
        query_ends: int `[N+1]`, cumulative numbers of queries. key_ends: the same for keys (None: equal); a sequence's
            queries are the last of its keys.
        config: the sparsity settings (they say how many compressed tokens a sequence has).
        device: where the tables go.
        key_index: which row of the tensors at hand each key is, where sequences share rows (`SharedPrefix.key_rows`).

    Attributes (int32 on `device`): `query_ends`, `key_ends`, `compressed_ends` `[N+1]`; with `key_index` also
    `key_rows` `[Tk]` and `key_places` `[rows, M]` for `nsa.packing.gather_rows`. On the host: `host_query_ends`,
    `host_key_ends`, `num_queries`, `num_keys`, `num_key_rows`, `num_compressed`, `max_key_length`, `num_sequences`.

    Raises:
        ValueError: not non-decreasing sequences from 0, or a sequence with fewer keys than queries.
    """

    def __init__(
        self,
        query_ends: torch.Tensor,
        key_ends: torch.Tensor | None,
        *,
        config: SparsityConfig,
        device: torch.device,
        key_index: torch.Tensor | None = None,
    ) -> None:
        self.config = config
        self.host_query_ends, self.host_key_ends = checked_ends(query_ends, key_ends)
        self._query_lengths, self._key_lengths = (np.diff(ends.numpy()) for ends in (self.host_query_ends, self.host_key_ends))
        key_lengths = self._key_lengths.tolist()
        self._compressed_lengths = np.array([num_compressed(length, config) for length in key_lengths])
        compressed = torch.tensor([0, *self._compressed_lengths.cumsum().tolist()])
        self.device, self.num_sequences = device, len(key_lengths)
        self.num_queries, self.num_keys, self.num_compressed = int(self.host_query_ends[-1]), int(self.host_key_ends[-1]), int(compressed[-1])
        self.max_key_length = max(key_lengths)
        ends = torch.stack([self.host_query_ends, self.host_key_ends, compressed]).to(torch.int32)
        # Rows begin at 16 bytes whatever the number of sequences: Triton compiles a kernel anew for a pointer that is not aligned.
        ends = on_device(torch.nn.functional.pad(ends, (0, -ends.shape[1] % 4)), device)
        self.query_ends, self.key_ends, self.compressed_ends = ends[:, : self.num_sequences + 1]
        self.num_key_rows = self.num_keys if key_index is None else self.num_queries
        self.key_rows = None if key_index is None else key_index.to(device)
        self.key_places = None if key_index is None else all_places(key_index, torch.arange(len(key_index))).to(device)
        self._tables: dict[tuple[str, int], torch.Tensor] = {}

    def query_tiles(self, size: int) -> torch.Tensor:
        """int32 `[tiles, 2]`: (sequence, first query of the tile counted in its sequence), those that see most keys first."""
        return self._table("query", size, self._query_lengths, self._key_lengths - self._query_lengths, last_first=True)

    def key_tiles(self, size: int) -> torch.Tensor:
        """int32 `[tiles, 2]`: (sequence, first key of the tile counted in its sequence), those seen by most queries first."""
        return self._table("key", size, self._key_lengths, self._key_lengths, last_first=False)

    def compressed_tiles(self, size: int) -> torch.Tensor:
        """int32 `[tiles, 2]`: (sequence, first compressed token of the tile counted in its sequence), as `key_tiles`."""
        return self._table("compressed", size, self._compressed_lengths, self._compressed_lengths, last_first=False)

    def _table(self, kind: str, size: int, lengths: np.ndarray, weights: np.ndarray, *, last_first: bool) -> torch.Tensor:
        key = (kind, size)
        if key not in self._tables:
            counts = -(-lengths // size)
            sequences = np.repeat(np.arange(len(lengths)), counts)
            starts = (np.arange(len(sequences)) - np.repeat(counts.cumsum() - counts, counts)) * size
            seen = np.repeat(weights, counts)
            order = np.argsort(-(seen + starts) if last_first else starts - seen, kind="stable")
            table = np.stack([sequences[order], starts[order]], axis=1).astype(np.int32)
            self._tables[key] = on_device(torch.from_numpy(table), self.device)
        return self._tables[key]


def plan_of(query_ends: torch.Tensor, key_ends: torch.Tensor, config: SparsityConfig, device: torch.device) -> KernelPlan:
    """The plan of these cumulative lengths (int `[N+1]`, on the CPU), the one made before where they come again on the same stream.

    Raises:
        ValueError: a CUDA graph is being captured, which might outlive what is remembered.
    """
    refuse_capture(device)
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    return _remembered_plan(tuple(query_ends.tolist()), tuple(key_ends.tolist()), config, device, stream)


@lru_cache(maxsize=64)
def _remembered_plan(query_ends: tuple[int, ...], key_ends: tuple[int, ...], config: SparsityConfig, device: torch.device, stream: int) -> KernelPlan:
    return KernelPlan(torch.tensor(query_ends), torch.tensor(key_ends), config=config, device=device)
