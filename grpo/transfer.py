"""Weights from GPU to GPU between processes: shared memory of one GPU, or a broadcast between several.

    same GPU         the learner hands out CUDA IPC handles of its own parameters, once; the sampler copies from them
    other GPUs       learner is rank 0 of a group, the sampler's ranks follow; parcels of tensors are broadcast (NCCL)
    else             bytes through the object store (grpo.weight_sync.pack)

Nothing here holds a second copy of the model: shared tensors are the learner's own, a broadcast holds one parcel at a
time. A peer that is gone shows as a missed deadline, not as a hang. Knows nothing of Ray, engines or versions.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from grpo.errors import RunFailed

PARCEL_BYTES = 64 * 2**20
_POLL_S = 0.0002

Transport = Literal["shared", "broadcast", "bytes"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a part's tensors are: host, and the ids of its GPUs (none: main memory)."""

    host: str
    gpus: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupAddress:
    """Where a weight group meets. Rank 0 sends, ranks 1 … size − 1 receive."""

    host: str
    port: int
    size: int
    backend: Literal["nccl", "gloo"]
    deadline_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """What a tensor that is to come looks like; `dtype` without "torch."."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * getattr(torch, self.dtype).itemsize


def own_place(device: torch.device, num_gpus: int = 1) -> Place:
    """The place of this process."""
    gpus = range(num_gpus) if device.type == "cuda" else ()
    return Place(host=socket.gethostname(), gpus=tuple(str(torch.cuda.get_device_properties(index).uuid) for index in gpus))


def choose_transport(learner: Place, sampler: Place) -> Transport:
    """The fastest way that works between two places."""
    if not learner.gpus or not sampler.gpus:
        return "bytes"
    if learner == sampler:
        return "shared"
    return "bytes" if set(learner.gpus) & set(sampler.gpus) else "broadcast"  # NCCL wants a GPU for each rank


# ------------------------------------------------------------------ one GPU


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedTensor:
    """A CUDA tensor of another process, as torch.multiprocessing describes it."""

    name: str
    arguments: tuple[Any, ...]


def share(named_tensors: Iterable[tuple[str, torch.Tensor]]) -> list[SharedTensor]:
    """Handles of CUDA tensors that stay where they are (the parameters of a model in training)."""
    from torch.multiprocessing.reductions import reduce_tensor

    return [SharedTensor(name=name, arguments=reduce_tensor(tensor.detach())[1]) for name, tensor in named_tensors]


def open_shared(shared: Sequence[SharedTensor], device: torch.device) -> list[tuple[str, torch.Tensor]]:
    """The tensors behind the handles, without a copy; to be read only."""
    from torch.multiprocessing.reductions import rebuild_cuda_tensor

    index = device.index or 0
    opened = []
    for one in shared:
        arguments = list(one.arguments)
        arguments[6] = index  # the sender's number of the GPU
        opened.append((one.name, rebuild_cuda_tensor(*arguments)))
    return opened


# ------------------------------------------------------------------ several GPUs


def open_store(host: str, size: int, deadline_s: float, backend: Literal["nccl", "gloo"]) -> tuple[TCPStore, GroupAddress]:
    """Rank 0's part before anybody can join: the store that all meet at."""
    store = TCPStore(host, 0, size, is_master=True, timeout=timedelta(seconds=deadline_s), wait_for_workers=False)
    return store, GroupAddress(host=host, port=store.port, size=size, backend=backend, deadline_s=deadline_s)


class WeightGroup:
    """One broadcast group. All ranks construct it at the same time.

    Args:
        rank: 0 for the sender.
        device: where this rank's parcels are; CUDA for nccl.
        store: rank 0's, from `open_store`.

    Raises:
        RunFailed: the others did not come within the deadline.
    """

    def __init__(self, address: GroupAddress, rank: int, device: torch.device, store: TCPStore | None = None) -> None:
        self._address, self._device = address, device
        timeout = timedelta(seconds=address.deadline_s)
        try:
            self._store = store or TCPStore(address.host, address.port, address.size, timeout=timeout, wait_for_workers=False)
            prefixed = PrefixStore("weights", self._store)
            if address.backend == "nccl":
                options = dist.ProcessGroupNCCL.Options()
                options._timeout = timeout
                self._group: Any = dist.ProcessGroupNCCL(prefixed, rank, address.size, options)
            else:
                self._group = dist.ProcessGroupGloo(prefixed, rank, address.size, timeout)
        except (RuntimeError, dist.DistError) as error:
            raise RunFailed(f"the group that sends weights did not come together: {' '.join(str(error).split())[:200]}") from error

    def send(self, named_tensors: Iterable[tuple[str, torch.Tensor]], infos: Sequence[TensorInfo]) -> None:
        """Broadcast tensors in the order of `infos`, cast to their dtypes."""
        tensors = iter(named_tensors)
        for parcel in parcels(infos):
            buffer = torch.empty(sum(info.nbytes for info in parcel), dtype=torch.uint8, device=self._device)
            for info, part in _cut(buffer, parcel):
                name, tensor = next(tensors)
                if name != info.name:
                    raise RunFailed(f"weights were to be sent in another order: {name} came where {info.name} was due")
                part.copy_(tensor)
            self._broadcast(buffer)

    def receive(self, infos: Sequence[TensorInfo]) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors as they come; each is valid until the next parcel is asked for."""
        for parcel in parcels(infos):
            buffer = torch.empty(sum(info.nbytes for info in parcel), dtype=torch.uint8, device=self._device)
            self._broadcast(buffer)
            for info, part in _cut(buffer, parcel):
                yield info.name, part

    def _broadcast(self, buffer: torch.Tensor) -> None:
        end = time.monotonic() + self._address.deadline_s
        try:
            work = self._group.broadcast(buffer, 0)
            while not work.is_completed():
                if time.monotonic() > end:
                    raise RunFailed(f"weights on their way stood still for {self._address.deadline_s:g} s: the other side is gone or stuck")
                time.sleep(_POLL_S)
            work.wait()
        except (RuntimeError, dist.DistError) as error:
            self.close()
            if isinstance(error, RunFailed):
                raise
            raise RunFailed(f"weights could not be sent on: {' '.join(str(error).split())[:200]}") from error

    def close(self) -> None:
        """Give up what is under way."""
        abort = getattr(self._group, "abort", None)
        if abort is not None and self._address.backend == "nccl":
            abort()


def describe(named_tensors: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype) -> list[TensorInfo]:
    """What `send` will send of these tensors in the sampler's dtype."""
    word = str(dtype).removeprefix("torch.")
    return [TensorInfo(name=name, dtype=word, shape=tuple(tensor.shape)) for name, tensor in named_tensors]


def parcels(infos: Sequence[TensorInfo], limit: int = PARCEL_BYTES) -> Iterator[list[TensorInfo]]:
    """Cut in order into parcels of at most `limit` bytes; a larger tensor goes alone."""
    parcel: list[TensorInfo] = []
    room = limit
    for info in infos:
        if parcel and info.nbytes > room:
            yield parcel
            parcel, room = [], limit
        parcel.append(info)
        room -= info.nbytes
    if parcel:
        yield parcel


def _cut(buffer: torch.Tensor, parcel: Sequence[TensorInfo]) -> Iterator[tuple[TensorInfo, torch.Tensor]]:
    start = 0
    for info in parcel:
        yield info, buffer[start : start + info.nbytes].view(getattr(torch, info.dtype)).view(info.shape)
        start += info.nbytes
