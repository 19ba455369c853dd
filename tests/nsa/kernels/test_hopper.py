"""The Hopper kernels of banded attention and of block scores: on a GPU beside the Triton ones, elsewhere by a stand-in for Gluon.

The stand-in runs the kernels' own source on PyTorch tensors, a thread for each warp group. It is stricter than the GPU where
that finds mistakes: a bulk copy lands at once (a place given up too late is overwritten), an asynchronous product reads its
operands only when it is waited for (a place given up too early is overwritten), shared memory starts as NaN, and a wait
that nothing ends is an error. It knows nothing of registers, layouts and fences.
"""

import contextlib
import itertools
import random
import threading
import time
import types
from dataclasses import dataclass, field

import pytest
import torch

from nsa.config import SparsityConfig
from nsa.kernels import banded, scoring
from nsa.kernels.banded import Band, BandTensors, banded_backward, banded_forward, both_backward, both_forward
from nsa.kernels.scoring import choose_blocks
from nsa.kernels.tiles import KernelPlan
from nsa.testing import relative_rms

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CONFIG = SparsityConfig(compressor="mean")
NARROW = SparsityConfig(compress_block_size=8, compress_stride=4, select_block_size=8, num_selected_blocks=4, window_size=50, compressor="mean")


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


@dataclass
class Machine:
    """What `gl`, `tma`, `mbarrier`, … stand for while one program runs."""

    program: tuple[int, ...]
    grid: tuple[int, ...]
    changed: threading.Condition = field(default_factory=threading.Condition)
    local: threading.local = field(default_factory=threading.local)

    def names(self):
        anything = lambda *_, **__: None  # noqa: E731
        number = lambda x: x if isinstance(x, torch.Tensor) else torch.tensor(x)  # noqa: E731
        gl = types.SimpleNamespace(
            float32=torch.float32, int32=torch.int32, int64=torch.int64, static_range=range, cdiv=lambda a, b: (a + b - 1) // b,
            program_id=lambda axis: torch.tensor(self.program[axis]), num_programs=lambda axis: self.grid[axis],
            minimum=lambda a, b: torch.minimum(number(a), number(b)), maximum=lambda a, b: torch.maximum(number(a), number(b)),
            where=lambda condition, a, b: torch.where(number(condition), a, b), exp2=torch.exp2, log2=torch.log2, zeros_like=torch.zeros_like,
            max=lambda x, axis: x.amax(axis), gather=lambda x, index, axis: x.gather(axis, index.long()),
            sum=lambda x, axis: x.sum(axis), convert_layout=lambda x, _: x,
            zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype), arange=lambda a, b, layout: torch.arange(a, b),
            full=lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype), thread_barrier=anything,
            load=self.load, store=self.store, allocate_shared_memory=self.allocate, warp_specialize=self.warp_specialize,
            NVMMADistributedLayout=anything, DotOperandLayout=anything, BlockedLayout=anything, SliceLayout=anything, SwizzledSharedLayout=anything,
            NVMMASharedLayout=types.SimpleNamespace(get_default_for=anything),
        )  # fmt: skip
        mbarrier = types.SimpleNamespace(
            MBarrierLayout=lambda: "barriers", init=self.init, wait=lambda barrier, parity: barrier.wait(parity),
            arrive=self.arrive, expect=lambda barrier, num_bytes: barrier.update(1, num_bytes),
        )  # fmt: skip
        copies = types.SimpleNamespace(async_copy_global_to_shared=self.copy_now, commit_group=anything, wait_group=anything)
        return {
            "gl": gl, "mbarrier": mbarrier, "async_copy": copies, "tma": types.SimpleNamespace(async_copy_global_to_shared=self.bulk_copy),
            "fence_async_shared": anything, "warpgroup_mma": self.multiply, "warpgroup_mma_wait": self.wait_for_products,
            "MAX_CHUNKS": banded.MAX_CHUNKS.value, "range": lambda *ends: (torch.tensor(i) for i in range(*map(int, ends))),
        }  # fmt: skip

    def load(self, pointer, mask=None, other=None):
        if mask is None:
            return pointer.storage[pointer.offsets]
        mask = mask.expand(pointer.offsets.shape)
        return torch.where(mask, pointer.storage[torch.where(mask, pointer.offsets, 0)], torch.tensor(other, dtype=pointer.storage.dtype))

    def store(self, pointer, value, mask):
        mask = mask.expand(pointer.offsets.shape)
        pointer.storage[pointer.offsets[mask]] = value[mask]

    def allocate(self, dtype, shape, layout):
        return Shared([Barrier(self.changed) for _ in range(shape[0])] if layout == "barriers" else torch.full(shape, torch.nan, dtype=dtype))

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


@dataclass(frozen=True)
class StandIn:
    """One of some kernels, run by the stand-in; `sources` holds all their functions."""

    name: str
    sources: dict[str, types.FunctionType]

    def __getitem__(self, grid):
        sizes = (*grid, 1, 1)[:3]

        def launch(*arguments, num_warps, **constants):
            for program in itertools.product(*(range(size) for size in sizes)):
                space = {"__builtins__": __builtins__, **Machine(program, sizes).names()}
                for name, source in self.sources.items():
                    space[name] = types.FunctionType(source.__code__, space, name, source.__defaults__)
                space[self.name](*map(argument, arguments), **constants)

        return launch


@contextlib.contextmanager
def hopper(monkeypatch):
    """The Hopper kernels; by the stand-in, on two processors, where there is no GPU."""
    if DEVICE == "cuda":
        if not banded.runs_hopper_kernels(torch.device(DEVICE, 0)):
            pytest.skip("no Hopper GPU with Triton 3.6")
        yield
        return
    names = ("banded_hopper", "banded_hopper_dq", "banded_hopper_dkdv", "scoring_hopper")
    modules = {name: pytest.importorskip(f"nsa.kernels.{name}") for name in names}
    kernels = {name: value for module in modules.values() for name, value in vars(module).items() if type(value).__name__ == "GluonJITFunction"}
    sources = {name: kernel.fn for name, kernel in kernels.items()}
    with monkeypatch.context() as patch:
        for module in (banded, scoring):
            patch.setattr(module, "runs_hopper_kernels", lambda device: True)
        for module, name in zip(modules.values(), ("forward_kernel", "dq_kernel", "dkdv_kernel", "score_kernel"), strict=True):
            patch.setattr(module, "num_processors", lambda device: 2, raising=False)
            patch.setattr(module, name, StandIn(name, sources))
        yield


def compare_both_ways(monkeypatch, kind, config, query_lengths, key_lengths, heads, group, dim, dtype=torch.float16):
    """Triton and Hopper kernels give the same on the same inputs; the second sequence is NaN and not looked at."""
    ends = [torch.tensor([0, *lengths]).cumsum(0) for lengths in (query_lengths, key_lengths)]
    band = Band(kind, KernelPlan(ends[0], ends[1], config=config, device=torch.device(DEVICE)), config)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)

    rows, count = sum(query_lengths), int(band.key_ends[-1])
    q, d_out, k, v = normal(rows, heads * group, dim), normal(rows, heads * group, dim), normal(count, heads, dim), normal(count, heads, dim)
    gates = normal(rows, heads * group, 3).sigmoid()
    gates[::5] = 0.0
    places = {}
    for size, sequence_ends, tensors in ((rows, ends[0], (q, d_out, gates)), (count, band.key_ends, (k, v))):
        second = slice(int(sequence_ends[1]), int(sequence_ends[2]))
        for x in tensors:
            x[second] = torch.nan
        places |= {id(x): torch.tensor([i for i in range(size) if not second.start <= i < second.stop], device=DEVICE) for x in tensors}

    def results():
        out = torch.ones_like(q)
        branch, lse = banded_forward(q, k, v, band, scale=0.2, gate=gates[..., 1], out=out, accumulate=kind == "window", keep=True)
        assert branch is not None
        delta = gates[..., 1].float() * (d_out.float() * branch.float()).sum(-1)
        before = torch.ones(q.shape, device=DEVICE) if kind == "window" else None
        dq = torch.full_like(q, torch.nan)
        dk, dv = banded_backward(d_out, q, k, v, lse, delta, gates[..., 1], band, scale=0.2, dq=dq, dq_before=before)
        return [x[places[id(q)]] for x in (out, branch, lse, dq)] + [x[places[id(k)]] for x in (dk, dv)]

    agree(monkeypatch, results, dtype)


def agree(monkeypatch, results, dtype):
    """`results()` is the same on the Triton and on the Hopper kernels."""
    with monkeypatch.context() as patch:
        for module in (banded, scoring):
            patch.setattr(module, "runs_hopper_kernels", lambda device: False)
        plain = results()
    with hopper(monkeypatch):
        special = results()
    for want, got in zip(plain, special, strict=True):
        assert torch.equal(want.isinf(), got.isinf()) and not got.isnan().any()
        assert relative_rms(got.nan_to_num(neginf=0.0), want.nan_to_num(neginf=0.0).double()) <= (2e-3 if dtype == torch.float16 else 1e-2)


def compare_both_bands(monkeypatch, config, query_lengths, key_lengths, heads, group, dim, dtype=torch.float16):
    """One Hopper kernel for both bands gives what the Triton kernels of each give one after the other; poisoned results."""
    ends = [torch.tensor([0, *lengths]).cumsum(0) for lengths in (query_lengths, key_lengths)]
    plan = KernelPlan(ends[0], ends[1], config=config, device=torch.device(DEVICE))
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)

    rows = sum(query_lengths)
    q, d_out, gates = normal(rows, heads * group, dim), normal(rows, heads * group, dim), normal(rows, heads * group, 3).sigmoid()
    gates[::5] = 0.0
    parts = [
        BandTensors(Band(kind, plan, config), normal(count, heads, dim), normal(count, heads, dim), gates[..., place])
        for kind, count, place in (("compression", plan.num_compressed, 0), ("window", plan.num_keys, 2))
    ]
    calls = []
    forward, dq = banded.hopper_forward, banded.hopper_dq
    monkeypatch.setattr(banded, "hopper_forward", lambda q, parts, **rest: calls.append(len(parts)) or forward(q, parts, **rest))
    monkeypatch.setattr(banded, "hopper_dq", lambda d_out, q, parts, **rest: calls.append(len(parts)) or dq(d_out, q, parts, **rest))

    def results():
        out, d_q = torch.full_like(q, torch.nan), torch.full_like(q, torch.nan)
        (branch, lse), (window, window_lse) = both_forward(q, *parts, scale=0.2, out=out, keep=True)
        assert branch is not None and window is not None
        deltas = [part.gate.float() * (d_out.float() * o.float()).sum(-1) for part, o in zip(parts, (branch, window), strict=True)]
        gradients = both_backward(d_out, q, *parts, (lse, window_lse), (deltas[0], deltas[1]), scale=0.2, dq=d_q)
        without = torch.full_like(q, torch.nan)
        both_forward(q, *parts, scale=0.2, out=without, keep=False)
        assert torch.equal(without, out)
        return [out, branch, lse, window, window_lse, d_q, *gradients]

    agree(monkeypatch, results, dtype)
    assert calls == [2, 2, 2]


@pytest.mark.parametrize(
    ("lengths", "heads", "group", "dim"), [([70, 7, 1, 66], 2, 1, 64), ([50, 1, 20], 1, 3, 64), ([13, 7, 5], 1, 16, 64), ([140, 5, 9], 1, 2, 128)]
)
def test_both_bands_in_one_kernel(monkeypatch, lengths, heads, group, dim):
    compare_both_bands(monkeypatch, NARROW, lengths, lengths, heads, group, dim)


def test_both_bands_of_the_last_queries_of_longer_keys(monkeypatch):
    compare_both_bands(monkeypatch, NARROW, [90, 3, 2], [140, 9, 66], 1, 1, 64)


@pytest.mark.gpu
@pytest.mark.parametrize(("group", "dim"), [(1, 128), (3, 128), (16, 128), (4, 64)])
def test_both_bands_in_one_kernel_on_the_gpu(monkeypatch, group, dim):
    compare_both_bands(monkeypatch, CONFIG, [2000, 77, 1, 300], [2100, 80, 1, 1333], 2, group, dim, dtype=torch.bfloat16)


@pytest.mark.parametrize("kind", ["compression", "window"])
@pytest.mark.parametrize(
    ("lengths", "heads", "group", "dim"), [([70, 7, 1, 66], 2, 1, 64), ([50, 1, 20], 1, 3, 64), ([13, 7, 5], 1, 16, 64), ([70, 5, 9], 1, 2, 128)]
)
def test_agree_with_the_triton_kernels(monkeypatch, kind, lengths, heads, group, dim):
    compare_both_ways(monkeypatch, kind, NARROW, lengths, lengths, heads, group, dim)


@pytest.mark.parametrize(("kind", "length"), [("compression", 700), ("window", 420)])
def test_many_tiles_go_round_the_rings(monkeypatch, kind, length):
    config = SparsityConfig(
        compress_block_size=4, compress_stride=2, select_block_size=8, num_selected_blocks=4, window_size=330, compressor="mean"
    )  # fmt: skip
    compare_both_ways(monkeypatch, kind, config, [length, 1], [length, 1], 1, 1, 64)


@pytest.mark.parametrize("kind", ["compression", "window"])
def test_last_queries_of_longer_keys_in_chunks(monkeypatch, kind):
    monkeypatch.setattr(banded, "MIN_CHUNK", 32)
    compare_both_ways(monkeypatch, kind, NARROW, [90, 3, 2], [140, 9, 66], 1, 1, 64)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["compression", "window"])
@pytest.mark.parametrize(("group", "dim"), [(1, 128), (3, 128), (16, 128), (4, 64)])
def test_agree_with_the_triton_kernels_on_the_gpu(monkeypatch, kind, group, dim):
    compare_both_ways(monkeypatch, kind, CONFIG, [2000, 77, 1, 300], [2100, 80, 1, 1333], 2, group, dim, dtype=torch.bfloat16)


def compare_choices(monkeypatch, config, query_lengths, key_lengths, heads, group, dim, dtype=torch.float16):
    """The same blocks are chosen by the scores of both; the second sequence is NaN."""
    ends = [torch.tensor([0, *lengths]).cumsum(0) for lengths in (query_lengths, key_lengths)]
    plan = KernelPlan(ends[0], ends[1], config=config, device=torch.device(DEVICE))
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(plan.num_queries, heads * group, dim, generator=generator).to(dtype).to(DEVICE)
    kc = torch.randn(plan.num_compressed, heads, dim, generator=generator).to(dtype).to(DEVICE)
    lse = torch.rand(plan.num_queries, heads * group, generator=generator).to(DEVICE) + 3.0
    kc[int(plan.compressed_ends[1]) : int(plan.compressed_ends[2])] = torch.nan
    q[int(ends[0][1]) : int(ends[0][2])] = torch.nan
    rows = torch.tensor([i for i in range(plan.num_queries) if not ends[0][1] <= i < ends[0][2]], device=DEVICE)
    kernels = []
    found = scoring.hopper_kernels
    monkeypatch.setattr(scoring, "hopper_kernels", lambda *arguments: kernels.append(found(*arguments)) or kernels[-1])
    chosen = []
    with monkeypatch.context() as patch:
        patch.setattr(scoring, "runs_hopper_kernels", lambda device: False)
        chosen.append(choose_blocks(q, kc, lse, plan, config, scale=0.1)[rows])
    with hopper(monkeypatch):
        chosen.append(choose_blocks(q, kc, lse, plan, config, scale=0.1)[rows])
    assert kernels[0] is None and kernels[1] is not None
    assert (chosen[0] != chosen[1]).float().mean() <= (0.0 if DEVICE == "cpu" else 1e-3)  # sums in another order: a near tie may fall otherwise


FINE = SparsityConfig(compress_block_size=4, compress_stride=2, select_block_size=4, num_selected_blocks=5, compressor="mean")


@pytest.mark.parametrize(
    ("config", "query_lengths", "lengths", "heads", "group", "dim"),
    [
        (FINE, [40, 2, 3], [270, 9, 30], 1, 4, 64),
        (FINE, [5, 1], [530, 30], 1, 3, 64),
        (NARROW, [70, 9, 50], [70, 9, 50], 1, 16, 64),
        (NARROW, [9, 7, 8], [70, 44, 50], 2, 6, 128),
    ],
)
def test_scores_choose_the_same_blocks(monkeypatch, config, query_lengths, lengths, heads, group, dim):
    compare_choices(monkeypatch, config, query_lengths, lengths, heads, group, dim)


@pytest.mark.gpu
@pytest.mark.parametrize(("group", "dim"), [(16, 128), (4, 128), (3, 64), (7, 128)])
def test_scores_choose_the_same_blocks_on_the_gpu(monkeypatch, group, dim):
    compare_choices(monkeypatch, CONFIG, [3000, 77, 1, 300], [5100, 80, 1, 1333], 2, group, dim, dtype=torch.bfloat16)
