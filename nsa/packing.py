"""How packed sequences are laid out for the torch backend: groups of similar length, padded on the right to the longest.

Padding on the right leaves every block boundary where it is, and padded rows are never visible to a real query. The
plan is made once per forward pass and shared by all layers. Moving to and fro is a gather in both directions, also in
the backward pass (each token has one place), so it is deterministic and needs no atomics.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class PaddedGroup:
    """Sequences that are computed together.

    `query_rows` `[N·Sq]` and `key_rows` `[N·Sk]` say which packed row stands at each padded place (row 0 where there is
    none, `*_valid` false). `offsets` `[N]` is each sequence's number of keys before its first query."""

    num_sequences: int
    query_length: int
    key_length: int
    query_rows: torch.Tensor
    query_valid: torch.Tensor
    key_rows: torch.Tensor
    key_valid: torch.Tensor
    offsets: torch.Tensor
    whole: bool
    """Every sequence's queries are all of its tokens."""
    uniform: bool
    """All sequences have exactly the padded lengths and lie one after the other: packed and padded are the same rows."""


@dataclass(frozen=True, slots=True)
class Packing:
    """The plan for one packed batch. `query_places`/`key_places` `[T]` are the inverse of the groups' rows: the place of
    each packed token in the concatenation of all groups' padded rows; key_places is `[T, M]`, −1 for none, where rows are
    keys of several sequences."""

    groups: tuple[PaddedGroup, ...]
    num_queries: int
    num_keys: int
    query_places: torch.Tensor
    key_places: torch.Tensor
    max_key_length: int


def _rows(starts: torch.Tensor, lengths: torch.Tensor, padded: int) -> tuple[torch.Tensor, torch.Tensor]:
    place = torch.arange(padded)
    valid = place < lengths[:, None]
    return torch.where(valid, starts[:, None] + place, 0).flatten(), valid.flatten()


def checked_ends(cu_seqlens: torch.Tensor, cu_seqlens_k: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Cumulative lengths of queries and keys, int64 `[N+1]` on the CPU; keys as queries where None.

    Raises:
        ValueError: not a non-decreasing sequence from 0, or a sequence with fewer keys than queries.
    """
    query_ends = cu_seqlens.detach().to("cpu", torch.int64)
    key_ends = query_ends if cu_seqlens_k is None else cu_seqlens_k.detach().to("cpu", torch.int64)
    for name, ends in (("cu_seqlens", query_ends), ("cu_seqlens_k", key_ends)):
        if ends.ndim != 1 or len(ends) < 2 or int(ends[0]) != 0 or bool((ends.diff() < 0).any()):
            raise ValueError(f"{name} must be [0, end of sequence 0, …], non-decreasing, got {ends.tolist()[:8]}")
    query_lengths, key_lengths = query_ends.diff(), key_ends.diff()
    if len(query_lengths) != len(key_lengths) or bool((key_lengths < query_lengths).any()):
        raise ValueError("each sequence needs at least as many keys as queries (the queries are its last tokens)")
    if bool(((query_lengths == 0) & (key_lengths > 0)).any()):
        raise ValueError("a sequence with keys needs at least one query")
    return query_ends, key_ends


def plan_packing(
    cu_seqlens: torch.Tensor,
    cu_seqlens_k: torch.Tensor | None,
    *,
    device: torch.device,
    num_heads: int,
    key_index: torch.Tensor | None = None,
    budget: int = 2**26,
) -> Packing:
    """Plan the padded groups of a packed batch.

    Args:
        cu_seqlens: int `[N+1]`, cumulative query lengths from 0. cu_seqlens_k: the same for keys; None = equal.
        key_index: which packed row each key is, where keys are not packed rows themselves but share them
            (`SharedPrefix.key_rows`).
        num_heads: query heads, for the memory estimate.
        budget: most score elements (sequences·heads·queries·keys) of a group with more than one sequence.
    Raises:
        ValueError: not a non-decreasing sequence from 0, or a sequence with fewer keys than queries.
    """
    query_ends, key_ends = checked_ends(cu_seqlens, cu_seqlens_k)
    query_lengths, key_lengths = query_ends.diff(), key_ends.diff()
    members = _similar(query_lengths.tolist(), key_lengths.tolist(), num_heads, budget)
    groups, query_places, key_places = [], torch.zeros(int(query_ends[-1]), dtype=torch.int64), torch.zeros(int(key_ends[-1]), dtype=torch.int64)
    query_base = key_base = 0
    for member in members:
        ids = torch.tensor(sorted(member))
        lengths, keys = query_lengths[ids], key_lengths[ids]
        longest_query, longest_key = int(lengths.max()), int(keys.max())
        query_rows, query_valid = _rows(query_ends[ids], lengths, longest_query)
        key_rows, key_valid = _rows(key_ends[ids], keys, longest_key)
        query_places[query_rows[query_valid]] = query_base + query_valid.nonzero().flatten()
        key_places[key_rows[key_valid]] = key_base + key_valid.nonzero().flatten()
        query_base, key_base = query_base + len(query_rows), key_base + len(key_rows)
        uniform = len(members) == 1 and key_index is None and bool(query_valid.all()) and bool(key_valid.all())
        groups.append(
            PaddedGroup(
                num_sequences=len(member),
                query_length=longest_query,
                key_length=longest_key,
                query_rows=query_rows.to(device),
                query_valid=query_valid.to(device),
                key_rows=(key_rows if key_index is None else key_index[key_rows]).to(device),
                key_valid=key_valid.to(device),
                offsets=(keys - lengths).to(device),
                whole=bool((keys == lengths).all()),
                uniform=uniform,
            )
        )
    return Packing(
        groups=tuple(groups),
        num_queries=int(query_ends[-1]),
        num_keys=int(key_ends[-1]) if key_index is None else int(query_ends[-1]),
        query_places=query_places.to(device),
        key_places=(key_places if key_index is None else all_places(key_index, key_places)).to(device),
        max_key_length=int(key_lengths.max()),
    )


def _similar(query_lengths: list[int], key_lengths: list[int], num_heads: int, budget: int) -> list[list[int]]:
    """Sequences that may be padded to one length: longest first, apart where one would more than double, or above `budget`."""
    order = sorted(
        (i for i, length in enumerate(query_lengths) if length > 0),
        key=lambda i: (query_lengths[i] == key_lengths[i], key_lengths[i], query_lengths[i]),
        reverse=True,
    )
    members: list[list[int]] = []
    least = most = 0
    for index in order:
        queries, keys = query_lengths[index], key_lengths[index]
        if members:
            first = members[-1][0]
            longest = key_lengths[first]
            same_kind = (queries == keys) == (query_lengths[first] == longest)
            fits = (len(members[-1]) + 1) * num_heads * max(most, queries) * max(longest, keys) <= budget
            if same_kind and fits and 2 * keys >= longest and max(most, queries) <= 2 * min(least, queries) + 32:
                members[-1].append(index)
                least, most = min(least, queries), max(most, queries)
                continue
        members.append([index])
        least = most = queries
    return members


def all_places(key_index: torch.Tensor, key_places: torch.Tensor) -> torch.Tensor:
    """`[T, M]`: every place of each packed row among the padded keys, −1 where it has fewer than M."""
    counts = torch.bincount(key_index)
    order = key_index.argsort(stable=True)
    starts = counts.cumsum(0) - counts
    rows = key_index[order]
    table = torch.full((len(counts), int(counts.max())), -1, dtype=torch.int64)
    table[rows, torch.arange(len(rows)) - starts[rows]] = key_places[order]
    return table


@dataclass(frozen=True, slots=True)
class SharedPrefix:
    """A packed batch in which sequences with the same first tokens (a prompt and its samples) compute those once.

    rows_U: the packed row that each computed row stands for. places_T: the computed row of each packed row.
    query_ends, key_ends: cumulative lengths of the computed sequences: a prefix once, then its continuations, whose
    keys are the prefix's and their own, listed in key_rows as computed rows. All on the CPU."""

    rows_U: torch.Tensor
    places_T: torch.Tensor
    query_ends: torch.Tensor
    key_ends: torch.Tensor
    key_rows: torch.Tensor


def plan_shared_prefix(cu_seqlens: torch.Tensor, prefix_lengths: list[int], families: list[int]) -> SharedPrefix | None:
    """Plan a batch whose sequences of one family begin with the same `prefix_lengths` tokens; None where no two do.

    Args:
        cu_seqlens: int `[N+1]`. prefix_lengths, families: one per sequence; a family's prefixes are equal.
    Raises:
        ValueError: a prefix that is not shorter than its sequence, or of two lengths in one family.
    """
    starts, ends = cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist()
    by_family: dict[int, list[int]] = {}
    for index, family in enumerate(families):
        by_family.setdefault(family, []).append(index)
    if len(by_family) == len(families):
        return None
    rows: list[torch.Tensor] = []
    keys: list[torch.Tensor] = []
    places = torch.zeros(ends[-1], dtype=torch.int64)
    count = 0

    def compute(first: int, last: int, before: torch.Tensor | None) -> torch.Tensor:
        nonlocal count
        own = torch.arange(count, count + last - first)
        count += last - first
        rows.append(torch.arange(first, last))
        keys.append(own if before is None else torch.cat([before, own]))
        places[first:last] = own
        return own

    for members in by_family.values():
        prefix = prefix_lengths[members[0]]
        if any(prefix_lengths[i] != prefix or not 0 <= prefix < ends[i] - starts[i] for i in members):
            raise ValueError(f"sequences that share a prefix need one of equal length, shorter than each; got {[prefix_lengths[i] for i in members]}")
        if len(members) == 1 or prefix == 0:
            for i in members:
                compute(starts[i], ends[i], None)
            continue
        shared = compute(starts[members[0]], starts[members[0]] + prefix, None)
        for i in members:
            places[starts[i] : starts[i] + prefix] = shared
            compute(starts[i] + prefix, ends[i], shared)

    def cumulative(parts: list[torch.Tensor]) -> torch.Tensor:
        return torch.tensor([0, *(len(part) for part in parts)]).cumsum(0)

    return SharedPrefix(torch.cat(rows), places, cumulative(rows), cumulative(keys), torch.cat(keys))


def padded_waste(packing: Packing) -> float:
    """Share of padded rows if a single group were computed in its padded layout throughout; 1.0 where there are more
    groups or no padding is needed."""
    if len(packing.groups) != 1 or packing.groups[0].uniform:
        return 1.0
    return 1.0 - packing.num_queries / len(packing.groups[0].query_rows)


def uniform_packing(packing: Packing) -> Packing:
    """The single group's padded layout as a packing of its own: every sequence as long as the longest."""
    group = packing.groups[0]
    ends = torch.arange(group.num_sequences + 1) * group.query_length
    return plan_packing(ends, None, device=group.query_rows.device, num_heads=1, budget=2**62)


class _Gather(torch.autograd.Function):
    """rows[index], zero where not valid; the backward pass gathers by the inverse index instead of scattering."""

    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, index: torch.Tensor, valid: torch.Tensor | None, inverse: torch.Tensor, inverse_valid: torch.Tensor | None
    ):
        ctx.save_for_backward(inverse, inverse_valid)
        gathered = rows.index_select(0, index)
        return gathered if valid is None else gathered.masked_fill_(~valid.view(-1, *[1] * (rows.ndim - 1)), 0)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor):
        inverse, inverse_valid = ctx.saved_tensors
        shape = [1] * (gradients[0].ndim - 1)
        if inverse.ndim == 2:  # rows with several places: their gradients are added up in a fixed order
            back = gradients[0].new_zeros(inverse.shape[0], *gradients[0].shape[1:])
            for places in inverse.unbind(1):
                used = (places >= 0).nonzero().flatten()
                back[used] = back[used] + gradients[0].index_select(0, places[used])
            return back, None, None, None, None
        back = gradients[0].index_select(0, inverse)
        if inverse_valid is not None:
            back = back.masked_fill_(~inverse_valid.view(-1, *shape), 0)
        return back, None, None, None, None


def gather_rows(rows: torch.Tensor, index: torch.Tensor, places: torch.Tensor | None) -> torch.Tensor:
    """`rows[index]` whose gradient is added up in a fixed order by `places` `[rows, M]` (`all_places`)."""
    assert places is not None
    gathered = _Gather.apply(rows, index, None, places, None)
    assert isinstance(gathered, torch.Tensor)
    return gathered


def pad_all(rows: torch.Tensor, packing: Packing, *, keys: bool) -> list[torch.Tensor]:
    """Packed `[T, …]` → one `[N, S, …]` per group, zeros where there is no token."""
    if packing.groups[0].uniform:
        group = packing.groups[0]
        return [rows.unflatten(0, (group.num_sequences, group.key_length if keys else group.query_length))]
    index = torch.cat([group.key_rows if keys else group.query_rows for group in packing.groups])
    valid = torch.cat([group.key_valid if keys else group.query_valid for group in packing.groups])
    padded = _Gather.apply(rows, index, valid, packing.key_places if keys else packing.query_places, None)
    assert isinstance(padded, torch.Tensor)
    sizes = [(group.num_sequences, group.key_length if keys else group.query_length) for group in packing.groups]
    parts = padded.split([count * length for count, length in sizes])
    return [part.unflatten(0, size) for part, size in zip(parts, sizes, strict=True)]


def unpad_all(parts: list[torch.Tensor], packing: Packing) -> torch.Tensor:
    """One `[N, Sq, …]` per group → packed `[T, …]`."""
    if packing.groups[0].uniform:
        return parts[0].flatten(0, 1)
    padded = torch.cat([part.flatten(0, 1) for part in parts])
    index = torch.cat([group.query_rows for group in packing.groups])
    valid = torch.cat([group.query_valid for group in packing.groups])
    rows = _Gather.apply(padded, packing.query_places, None, index, valid)
    assert isinstance(rows, torch.Tensor)
    return rows
