"""A stand-in for Gluon: runs the Hopper kernels' own source on PyTorch tensors, without a GPU.

It is stricter than the GPU where that finds mistakes: an asynchronous product reads its operands only when it is waited for (a place
given up too early is overwritten), shared memory starts as NaN, and a wait that nothing ends is an error. It knows nothing of registers,
layouts and fences.

    WarpGroups  kernels that start warp groups, a thread for each; a bulk copy lands at once (a place given up too late is overwritten)
    OneGroup    kernels of one group that copy asynchronously: a copy lands when it is waited for, or at once (`early`)
"""

from __future__ import annotations

import itertools
import random
import threading
import time
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch


def nothing(*_: Any, **__: Any) -> None:
    """Layouts, fences and barriers within a group."""


def number(x: Any) -> torch.Tensor:
    return x if isinstance(x, torch.Tensor) else torch.tensor(x)


@dataclass(frozen=True)
class Pointer:
    """Addresses in a tensor's storage."""

    storage: torch.Tensor
    offsets: torch.Tensor

    @property
    def dtype(self):
        return types.SimpleNamespace(element_ty=self.storage.dtype)

    def __add__(self, step):
        return Pointer(self.storage, self.offsets + step)

    def __getitem__(self, key):
        return Pointer(self.storage, self.offsets[key])


@dataclass
class Barrier:
    """An mbarrier: phases end when all have arrived and all announced bytes are there."""

    changed: threading.Condition
    count: int = 0
    arrived: int = 0
    awaited: int = 0
    phase: int = 0

    def update(self, arrived, num_bytes):
        with self.changed:
            self.arrived += arrived
            self.awaited += num_bytes
            assert self.arrived <= self.count
            if self.arrived == self.count and self.awaited == 0:
                self.arrived, self.phase = 0, self.phase + 1
                self.changed.notify_all()

    def wait(self, parity):
        with self.changed:
            assert self.changed.wait_for(lambda: (self.phase + 1) % 2 == int(parity), timeout=20), "nothing ends this wait"


@dataclass(frozen=True)
class Shared:
    """A piece of shared memory: a tensor, or a list of barriers."""

    data: torch.Tensor | list[Barrier]

    @property
    def dtype(self):
        return self.data.dtype

    @property
    def shape(self):
        return list(self.data.shape) if isinstance(self.data, torch.Tensor) else [len(self.data)]

    @property
    def type(self):
        return types.SimpleNamespace(shape=self.shape)

    def index(self, place):
        return Shared(self.data[int(place)]) if isinstance(self.data, torch.Tensor) else self.data[int(place)]

    def slice(self, start, length):
        return Shared(self.data[start : start + length])

    def permute(self, order):
        return Shared(self.data.permute(*order))

    def load(self, _):
        return self.data.clone()

    def store(self, value):
        self.data.copy_(value)

    def _reinterpret(self, _, shape, __):
        return Shared(self.data.view(shape))


@dataclass
class Product:
    """A product on its way; computed when it is waited for."""

    a: object
    b: Shared
    acc: object
    value: torch.Tensor | None = None

    def finish(self):
        if self.value is None:
            a = self.a.data if isinstance(self.a, Shared) else self.a
            acc = 0.0 if self.acc is None else self.acc.value if isinstance(self.acc, Product) else self.acc
            self.value = acc + a.float() @ self.b.data.float()


class Machine:
    """What the names of Gluon that all kernels use stand for while one program runs."""

    program: tuple[int, ...]
    grid: tuple[int, ...]

    def names(self) -> dict[str, Any]:
        gl = types.SimpleNamespace(
            float32=torch.float32, int32=torch.int32, int64=torch.int64, static_range=range, cdiv=lambda a, b: (a + b - 1) // b,
            program_id=lambda axis: torch.tensor(self.program[axis]), num_programs=lambda axis: self.grid[axis], num_warps=lambda: 4,
            minimum=lambda a, b: torch.minimum(number(a), number(b)), maximum=lambda a, b: torch.maximum(number(a), number(b)),
            where=lambda condition, a, b: torch.where(number(condition), number(a), number(b)),
            exp2=torch.exp2, log2=torch.log2, ceil=torch.ceil, floor=torch.floor, zeros_like=torch.zeros_like,
            max=lambda x, axis: x.amax(axis), min=lambda x, axis: x.amin(axis), sum=lambda x, axis: x.sum(axis, dtype=x.dtype),
            gather=lambda x, index, axis: x.gather(axis, index.long()), convert_layout=lambda x, _: x,
            zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype), arange=lambda a, b, layout: torch.arange(a, b),
            full=lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype), thread_barrier=nothing,
            load=self.load, store=self.store, allocate_shared_memory=self.allocate,
            NVMMADistributedLayout=nothing, DotOperandLayout=nothing, BlockedLayout=nothing, SliceLayout=nothing, SwizzledSharedLayout=nothing,
            NVMMASharedLayout=types.SimpleNamespace(get_default_for=nothing),
        )  # fmt: skip
        return {
            "gl": gl, "fence_async_shared": nothing, "warpgroup_mma": self.multiply, "warpgroup_mma_wait": self.wait_for_products,
            "range": lambda *ends: (torch.tensor(i) for i in range(*map(int, ends))),
        }  # fmt: skip

    def load(self, pointer, mask=None, other=None):
        if mask is None:
            return pointer.storage[pointer.offsets]
        mask = torch.as_tensor(mask).expand(pointer.offsets.shape)
        return torch.where(mask, pointer.storage[torch.where(mask, pointer.offsets, 0)], torch.tensor(other, dtype=pointer.storage.dtype))

    def store(self, pointer, value, mask):
        mask = mask.expand(pointer.offsets.shape)
        pointer.storage[pointer.offsets[mask]] = value.expand(mask.shape)[mask].to(pointer.storage.dtype)

    def allocate(self, dtype, shape, layout):
        return Shared(torch.full(shape, torch.nan, dtype=dtype))

    def multiply(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError

    def wait_for_products(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError


@dataclass
class WarpGroups(Machine):
    """Kernels that start warp groups."""

    program: tuple[int, ...]
    grid: tuple[int, ...]
    changed: threading.Condition = field(default_factory=threading.Condition)
    local: threading.local = field(default_factory=threading.local)

    def names(self):
        names = super().names()
        names["gl"].warp_specialize = self.warp_specialize
        mbarrier = types.SimpleNamespace(
            MBarrierLayout=lambda: "barriers", init=self.init, wait=lambda barrier, parity: barrier.wait(parity),
            arrive=self.arrive, expect=lambda barrier, num_bytes: barrier.update(1, num_bytes),
        )  # fmt: skip
        copies = types.SimpleNamespace(async_copy_global_to_shared=self.copy_now, commit_group=nothing, wait_group=nothing)
        return names | {"mbarrier": mbarrier, "async_copy": copies, "tma": types.SimpleNamespace(async_copy_global_to_shared=self.bulk_copy)}

    def allocate(self, dtype, shape, layout):
        return Shared([Barrier(self.changed) for _ in range(shape[0])]) if layout == "barriers" else super().allocate(dtype, shape, layout)

    def init(self, barrier, count):
        barrier.count = count

    def arrive(self, barrier, count):
        """Then the other warp group runs ahead for a while, or this one does."""
        barrier.update(count, 0)
        time.sleep(0.03 * (random.random() < 0.15))

    def copy_now(self, target, pointer):
        target.store(self.load(pointer))

    def bulk_copy(self, desc, place, barrier, target):
        inside = [(int(at) + torch.arange(size)) for at, size in zip(place, desc.block_type.shape, strict=True)]
        mask, offsets = torch.tensor(True), torch.tensor(0)
        for at, size, stride in zip(inside, desc.size, desc.strides, strict=True):
            mask, offsets = mask[..., None] & (at >= 0) & (at < size), offsets[..., None] + at * stride
        target.store(self.load(Pointer(desc.storage, offsets + desc.first), mask, 0.0))
        barrier.update(0, -desc.block_type.nbytes)

    def multiply(self, a, b, acc, use_acc=True, is_async=False):
        product = Product(a, b, acc if use_acc else None)
        self.local.queue = [*getattr(self.local, "queue", []), product]
        if is_async:
            return product
        self.wait_for_products(0, [product])
        return product.value

    def wait_for_products(self, left, deps):
        queue = self.local.queue
        done, self.local.queue = queue[: len(queue) - left], queue[len(queue) - left :]
        for product in done:
            product.finish()
        return deps[0].value if len(deps) == 1 else tuple(product.value for product in deps)

    def warp_specialize(self, partitions, *_):
        errors = []

        def run(function, arguments):
            try:
                function(*arguments)
                assert not getattr(self.local, "queue", []), "a product nobody waited for"
            except Exception as error:
                errors.append(error)

        threads = [threading.Thread(target=run, args=partition) for partition in partitions]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]


class OneGroup(Machine):
    """Kernels of one group."""

    def __init__(self, program: tuple[int, ...], grid: tuple[int, ...], *, early: bool) -> None:
        self.program, self.grid, self.early, self.copies, self.groups, self.products = program, grid, early, [], [], []

    def names(self):
        copies = types.SimpleNamespace(async_copy_global_to_shared=self.copy, commit_group=self.commit, wait_group=self.wait_for_copies)
        return super().names() | {"async_copy": copies, "gdc_wait": nothing, "gdc_launch_dependents": nothing}

    def copy(self, target, pointer, mask):
        self.copies.append((target, self.load(pointer, mask, 0.0)))
        if self.early:
            target.store(self.copies[-1][1])

    def commit(self):
        self.groups.append(self.copies)
        self.copies = []

    def wait_for_copies(self, left):
        while len(self.groups) > left:
            for target, value in self.groups.pop(0):
                if not self.early:
                    target.store(value)

    def multiply(self, a, b, acc, use_acc, is_async):
        assert is_async and not use_acc
        self.products.append((a, b))
        return self.products[-1]

    def wait_for_products(self, left, deps):
        assert left == 0 and deps == self.products
        (a, b), self.products = self.products[0], []
        return a.data.float() @ b.data.float()


def argument(x):
    """A launch argument as the stand-in's kernels take it."""
    if isinstance(x, tuple):
        return tuple(argument(item) for item in x)
    if isinstance(x, torch.Tensor):
        return Pointer(torch.as_strided(x, (x.untyped_storage().nbytes() // x.element_size(),), (1,), 0), torch.tensor(x.storage_offset()))
    if hasattr(x, "block_shape"):
        pointer, box = argument(x.base), x.block_shape
        block = types.SimpleNamespace(shape=box, nbytes=torch.Size(box).numel() * x.base.element_size())
        return types.SimpleNamespace(
            storage=pointer.storage, first=pointer.offsets, size=x.shape, strides=x.strides, block_type=block, dtype=x.base.dtype, layout=None
        )
    return x


def gluon_functions(modules: Iterable[types.ModuleType]) -> dict[str, types.FunctionType]:
    """The source of every Gluon function that modules hold, by its name there; of two of a name the first module's."""
    found: dict[str, types.FunctionType] = {}
    for module in modules:
        for name, value in vars(module).items():
            if type(value).__name__ == "GluonJITFunction":
                found.setdefault(name, value.fn)
    return found


def run_kernel(
    name: str, sources: dict[str, types.FunctionType], grid: tuple[int, ...], machine: Callable[..., Machine], constants: dict[str, Any],
    arguments: tuple[Any, ...], settings: dict[str, Any],
) -> None:  # fmt: skip
    """Every program of a launch of kernel `name`, one after the other.

    Args:
        sources: all functions it calls. machine: makes a `Machine` of a program and the grid. constants: globals of the kernel's module that
            are `gl.constexpr`, and other names to replace.
    """
    sizes = (*grid, 1, 1)[:3]
    for program in itertools.product(*(range(size) for size in sizes)):
        space = {"__builtins__": __builtins__, **machine(program, sizes).names()}
        for function, source in sources.items():
            space.setdefault(function, types.FunctionType(source.__code__, space, function, source.__defaults__))
        space |= constants
        space[name](*map(argument, arguments), **settings)


@dataclass(frozen=True)
class StandIn:
    """A kernel that starts warp groups, to be launched as Triton's are."""

    name: str
    sources: dict[str, types.FunctionType]
    constants: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, grid):
        def launch(*arguments, num_warps, **settings):
            run_kernel(self.name, self.sources, grid, WarpGroups, self.constants, arguments, settings)

        return launch
