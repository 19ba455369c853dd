"""Policy weights on their way from the learner to the sampler: pieces, checksum, and the check that they arrived.

    learner.weights() ──pack──▶ pieces (≤ 32 MiB, plain bytes) ──unpack──▶ engine.load_weights(version, …)

In one process nothing is packed. Between processes (grpo.actors) the tensors travel as byte pieces of bounded size, so
that neither a large embedding nor the whole model has to fit the object store. `sync` is the one place that moves a
version, and checks version and bits afterwards; `check_probe` then compares what both make of one sequence, and at every
step the learner compares all that was sampled (`mismatch/*`). Leaves out how a sampler stores its weights.
"""

from __future__ import annotations

import logging
import warnings
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy
import torch

from grpo.errors import RunFailed

logger = logging.getLogger(__name__)

PIECE_BYTES = 32 * 2**20
_CHECKSUM_CHUNK = 2**20


class WeightSyncError(RunFailed):
    """The sampler does not hold the learner's weights."""


class WeightSource(Protocol):
    """What `sync` needs of a learner."""

    @property
    def policy_version(self) -> int: ...

    def weights(self) -> Iterable[tuple[str, torch.Tensor]]: ...

    def checksum(self) -> int: ...

    def score(self, token_ids: Sequence[int]) -> torch.Tensor: ...


class WeightSink(Protocol):
    """What `sync` needs of a sampler."""

    def load_weights(self, version: int, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None: ...

    def health(self) -> dict[str, float]: ...

    def checksum(self) -> int: ...

    def score(self, sequences: Sequence[Sequence[int]]) -> list[torch.Tensor]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Some bytes of one tensor: `data` (uint8) starts at byte `start` of `size`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int
    data: numpy.ndarray


def pack(named_tensors: Iterable[tuple[str, torch.Tensor]], piece_bytes: int = PIECE_BYTES) -> Iterator[list[Piece]]:
    """Cut tensors (any dtype and device) into parcels of at most `piece_bytes`; large tensors span several parcels."""
    parcel: list[Piece] = []
    room = piece_bytes
    for name, tensor in named_tensors:
        data = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy()
        start = 0
        while start < data.size or data.size == 0:
            taken = data[start : start + room]
            parcel.append(
                Piece(name=name, dtype=str(tensor.dtype).removeprefix("torch."), shape=tuple(tensor.shape), start=start, size=data.size, data=taken)
            )
            start += taken.size
            room -= taken.size
            if room == 0:
                yield parcel
                parcel, room = [], piece_bytes
            if data.size == 0:
                break
    if parcel:
        yield parcel


def unpack(parcels: Iterable[Sequence[Piece]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Undo `pack`. A tensor that came in one piece shares the piece's memory: copy it, do not write to it.

    Raises:
        WeightSyncError: bytes are missing or out of order.
    """
    partial: torch.Tensor | None = None
    expected = 0
    for parcel in parcels:
        for piece in parcel:
            if piece.start != expected:
                raise WeightSyncError(f"weights of {piece.name}: byte {piece.start} came where {expected} was due")
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
                part = torch.from_numpy(piece.data)
            if piece.data.size == piece.size:
                flat = part
            else:
                if partial is None:
                    partial = torch.empty(piece.size, dtype=torch.uint8)
                partial[piece.start : piece.start + piece.data.size] = part
                expected = piece.start + piece.data.size
                if expected < piece.size:
                    continue
                flat, partial = partial, None
            expected = 0
            if piece.size == 0:  # NumPy's empty arrays have strides that torch cannot view
                flat = torch.empty(0, dtype=torch.uint8)
            yield piece.name, flat.view(getattr(torch, piece.dtype)).reshape(piece.shape)
    if expected:
        raise WeightSyncError("the weights ended in the middle of a tensor")


def checksum(named_tensors: Iterable[tuple[str, torch.Tensor]]) -> int:
    """A 64-bit sum over names, dtypes and bits, whatever the order of the tensors and the device they lie on.

    Computed where the tensors are: Σ over elements of bits · (position mod 65,521 + 1), modulo 2^64.
    """
    sums: dict[torch.device, torch.Tensor] = {}  # int64 arithmetic wraps, so the host is asked once per device
    for name, tensor in named_tensors:
        flat = tensor.detach().reshape(-1)
        bits = flat.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])
        value = torch.tensor(zlib.crc32(f"{name} {tensor.dtype}".encode()), dtype=torch.int64, device=flat.device)
        for part in bits.split(_CHECKSUM_CHUNK):
            factors = torch.arange(1, part.numel() + 1, device=part.device, dtype=torch.int64) % 65_521 + 1
            value = value * 31 + (part.to(torch.int64) * factors).sum()
        sums[flat.device] = sums.get(flat.device, torch.zeros_like(value)) + value
    total = sum(int(value) for value in sums.values())
    return total % 2**64


def sync(learner: WeightSource, engine: WeightSink) -> int:
    """Hand the learner's weights to the sampler and check that they arrived: version and checksum. Where they did not, they
    are sent once more.

    Raises:
        WeightSyncError: the sampler reports another version, or holds other bits than the learner, twice.
    """
    try:
        return _sync_once(learner, engine)
    except WeightSyncError as error:
        logger.warning("%s; sending them once more", error)
        return _sync_once(learner, engine)


def _sync_once(learner: WeightSource, engine: WeightSink) -> int:
    version = learner.policy_version
    engine.load_weights(version, learner.weights())
    reported = engine.health().get("version")
    if reported is not None and int(reported) != version:
        raise WeightSyncError(f"the sampler reports weight version {int(reported)} after version {version} was loaded")
    held, sent = engine.checksum(), learner.checksum()
    if held != sent:
        raise WeightSyncError(f"weight version {version} did not arrive: the sampler's checksum is {held:#x}, the learner's {sent:#x}")
    return version


def check_probe(learner: WeightSource, engine: WeightSink, token_ids: Sequence[int], bound: float | None) -> dict[str, float]:
    """Compare sampler and learner on one sequence: equal bits do not show that a sampler computes with them (a cached prompt,
    a captured graph, a tensor made from the weights may be old).

    Returns:
        `probe/mean` and `probe/max`: |Δ log p| over its tokens.

    Raises:
        WeightSyncError: the mean is above `bound` (None: never) or not a number.
    """
    (found,) = engine.score([token_ids])
    difference = (found - learner.score(token_ids))[1:].abs()
    mean, largest = difference.mean().item(), difference.max().item()
    if bound is not None and not mean <= bound:
        raise WeightSyncError(
            f"after a sync the sampler computes something else than the learner: mean |Δ log p| of a probe of {len(token_ids)} tokens is {mean:.4g} "
            f"nats (largest {largest:.4g}), above algorithm.mismatch_bound={bound:g}"
        )
    return {"probe/mean": mean, "probe/max": largest}
