"""The paged cache of a whole model: raw and compressed pages of every layer, and which sequence owns which page.

A compressed token is written when its last raw token is, into that token's page, so a page depends only on the tokens
up to its end: pages can be shared between sequences with the same prefix (`fork`) and freed without looking elsewhere.
Layout: see `nsa.attention.LayerCache`. Page 0 is scratch: padded rows write there and nobody reads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from nsa.attention import LayerCache, Phi
from nsa.config import NSAConfig, SparsityConfig
from nsa.torch_backend import compress_blocks


@dataclass(frozen=True, slots=True)
class CacheWrite:
    """Where a forward pass writes, the same for all layers: raw slot (page·page_size + offset) of each new token `[T]`;
    for each compressed token that becomes complete its slot (page·page_size/d + offset) `[M]` and the raw slots of the
    tokens it pools `[M, l]`."""

    raw_slots: torch.Tensor
    cmp_slots: torch.Tensor
    cmp_sources: torch.Tensor


def plan_write(
    block_table: torch.Tensor, sequence_T: torch.Tensor, positions_T: torch.Tensor, *, page_size: int, config: SparsityConfig, dynamic: bool
) -> CacheWrite:
    """Plan the writes of new tokens.

    Args:
        block_table: int `[N, P]`; sequence_T: which row each token belongs to; positions_T: its position, −1 = padded
            row (it writes to the scratch page).
        dynamic: keep only the compressed tokens that become complete (needs a host synchronisation); otherwise every
            token plans one, to the scratch page where none becomes complete (for CUDA graphs).
    """
    l, d = config.compress_block_size, config.compress_stride
    table = block_table.long()
    padded = positions_T < 0
    position = positions_T.clamp(min=0)
    pages = table[sequence_T, position // page_size].masked_fill(padded, 0)
    raw_slots = pages * page_size + position % page_size
    complete = (position >= l - 1) & ((position - (l - 1)) % d == 0) & ~padded
    per_page = page_size // d
    cmp_slots = torch.where(complete, pages * per_page + (position % page_size) // d, 0)
    if dynamic:
        kept = complete.nonzero().flatten()
        cmp_slots, sequence_T, position = cmp_slots[kept], sequence_T[kept], position[kept]
    sources = (position[:, None] - (l - 1) + torch.arange(l, device=position.device)).clamp(min=0)
    cmp_sources = table[sequence_T[:, None], sources // page_size] * page_size + sources % page_size
    return CacheWrite(raw_slots, cmp_slots, cmp_sources)


@torch.no_grad()
def write_layer(layer: LayerCache, key_sets: Sequence[torch.Tensor], value_sets: Sequence[torch.Tensor], write: CacheWrite, phi: Phi | None) -> None:
    """Write new tokens' K and V (`[T, Hkv, …]`, one per set, keys after RoPE) and the compressed tokens they complete."""
    heads, page_size = layer.num_kv_heads, layer.page_size
    raw = layer.raw.view(-1, 2, page_size, *layer.raw.shape[3:])
    page, offset = write.raw_slots // page_size, write.raw_slots % page_size
    for kind, sets, dim in ((0, key_sets, layer.key_dim), (1, value_sets, layer.value_dim)):
        for index, tokens in enumerate(sets):
            raw[page, kind, offset, index * heads : (index + 1) * heads, :dim] = tokens.to(raw.dtype)
    if not len(write.cmp_slots):
        return
    first = layer.set_index("cmp") * heads
    page, offset = write.cmp_sources // page_size, write.cmp_sources % page_size
    key_blocks = raw[page, 0, offset, first : first + heads, : layer.key_dim].transpose(1, 2)
    value_blocks = raw[page, 1, offset, first : first + heads, : layer.value_dim].transpose(1, 2)
    pooled = torch.cat([compress_blocks(key_blocks, phi.k if phi else None), compress_blocks(value_blocks, phi.v if phi else None)], dim=-1)
    layer.cmp.view(-1, *layer.cmp.shape[2:])[write.cmp_slots] = pooled.to(layer.cmp.dtype)


def read_tokens(layer: LayerCache, slots: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """K and V sets, each `[T, Hkv, …]`, of raw slots `[T]`."""
    heads, page_size = layer.num_kv_heads, layer.page_size
    page, offset = slots // page_size, slots % page_size
    keys, values = layer.raw[page, 0, offset], layer.raw[page, 1, offset]
    ranges = [slice(i * heads, (i + 1) * heads) for i in range(layer.num_sets)]
    return [keys[:, r, : layer.key_dim] for r in ranges], [values[:, r, : layer.value_dim] for r in ranges]


class NSACache:
    """Pages for all layers, with reference counts.

    Args:
        num_pages: pages besides the scratch page; each holds `config.page_size` tokens of every layer.
    Raises:
        ValueError: fewer than one page. `reserve` raises MemoryError when no page is free (nothing changes then).
    """

    def __init__(self, config: NSAConfig, *, num_pages: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        if num_pages < 1:
            raise ValueError(f"num_pages must be >= 1, got {num_pages}")
        assert config.num_key_value_heads and config.head_dim and config.value_head_dim
        self.page_size = config.page_size
        self.num_pages = num_pages
        num_sets = 3 if config.kv == "separate" else 1
        dim = max(config.head_dim, config.value_head_dim)
        heads, sparsity = config.num_key_value_heads, config.sparsity
        raw_shape = (num_pages + 1, 2, self.page_size, num_sets * heads, dim)
        cmp_shape = (num_pages + 1, self.page_size // sparsity.compress_stride, heads, config.head_dim + config.value_head_dim)
        self.layers = [
            LayerCache(
                raw=torch.zeros(raw_shape, device=device, dtype=dtype),
                cmp=torch.zeros(cmp_shape, device=device, dtype=dtype),
                key_dim=config.head_dim,
                value_dim=config.value_head_dim,
                num_sets=num_sets,
            )
            for _ in range(config.num_hidden_layers)
        ]
        self._free = list(range(num_pages, 0, -1))
        self._references = [0] * (num_pages + 1)
        self._pages: dict[int, list[int]] = {}
        self._lengths: dict[int, int] = {}
        self._next_id = 0

    @property
    def num_free_pages(self) -> int:
        return len(self._free)

    @property
    def num_sequences(self) -> int:
        return len(self._pages)

    def grow(self, num_pages: int) -> None:
        """Add pages (every layer's tensors are copied to larger ones)."""
        for index, layer in enumerate(self.layers):
            raw = torch.cat([layer.raw, layer.raw.new_zeros(num_pages, *layer.raw.shape[1:])])
            cmp = torch.cat([layer.cmp, layer.cmp.new_zeros(num_pages, *layer.cmp.shape[1:])])
            self.layers[index] = replace(layer, raw=raw, cmp=cmp)
        self._free = [*range(self.num_pages + num_pages, self.num_pages, -1), *self._free]
        self._references += [0] * num_pages
        self.num_pages += num_pages

    def pages_for(self, num_tokens: int) -> int:
        """Pages that hold `num_tokens` tokens."""
        return -(-num_tokens // self.page_size)

    def length(self, sequence: int) -> int:
        """Tokens reserved for a sequence so far."""
        return self._lengths[sequence]

    def pages(self, sequence: int) -> tuple[int, ...]:
        """The pages of a sequence, in order."""
        return tuple(self._pages[sequence])

    def add_sequence(self) -> int:
        """A new, empty sequence; returns its number."""
        self._next_id += 1
        self._pages[self._next_id], self._lengths[self._next_id] = [], 0
        return self._next_id

    def reserve(self, sequences: Sequence[int], num_tokens: int | Sequence[int]) -> None:
        """Make room for `num_tokens` further tokens of each sequence and count them in.

        Raises:
            MemoryError: not enough free pages; nothing was reserved.
        """
        counts = [num_tokens] * len(sequences) if isinstance(num_tokens, int) else list(num_tokens)
        needs = [self.pages_for(self._lengths[s] + n) - len(self._pages[s]) for s, n in zip(sequences, counts, strict=True)]
        if sum(needs) > len(self._free):
            raise MemoryError(f"the cache has {len(self._free)} free pages of {self.page_size} tokens, {sum(needs)} are needed")
        for sequence, count, need in zip(sequences, counts, needs, strict=True):
            for _ in range(need):
                page = self._free.pop()
                self._references[page] = 1
                self._pages[sequence].append(page)
            self._lengths[sequence] += count

    def fork(self, sequence: int, count: int = 1) -> list[int]:
        """`count` new sequences with the same tokens: full pages are shared, the last, unfinished one is copied.

        Raises:
            MemoryError: not enough free pages for the copies; nothing was forked.
        """
        pages, length = self._pages[sequence], self._lengths[sequence]
        shared = length // self.page_size
        unfinished = len(pages) > shared
        if unfinished and len(self._free) < count:
            raise MemoryError(f"the cache has {len(self._free)} free pages, {count} are needed to copy the last page of a forked sequence")
        children = []
        for _ in range(count):
            child = self.add_sequence()
            self._pages[child] = pages[:shared]
            self._lengths[child] = length
            for page in pages[:shared]:
                self._references[page] += 1
            if unfinished:
                copy = self._free.pop()
                self._references[copy] = 1
                self._pages[child].append(copy)
            children.append(child)
        if unfinished and children:
            copies = torch.tensor([self._pages[child][-1] for child in children], device=self.layers[0].raw.device)
            for layer in self.layers:
                layer.raw[copies] = layer.raw[pages[shared]].clone()
                layer.cmp[copies] = layer.cmp[pages[shared]].clone()
        return children

    def release(self, sequence: int) -> None:
        """Forget a sequence; its pages become free where nobody else holds them."""
        for page in self._pages.pop(sequence):
            self._references[page] -= 1
            if self._references[page] == 0:
                self._free.append(page)
        del self._lengths[sequence]

    def block_table(self, sequences: Sequence[int], num_columns: int | None = None) -> torch.Tensor:
        """int32 `[N, P]` on the CPU, 0 (the scratch page) where a sequence has fewer pages."""
        columns = num_columns or max((len(self._pages[s]) for s in sequences), default=1) or 1
        table = torch.zeros(len(sequences), columns, dtype=torch.int32)
        for row, sequence in enumerate(sequences):
            pages = self._pages[sequence]
            table[row, : len(pages)] = torch.tensor(pages, dtype=torch.int32)
        return table
