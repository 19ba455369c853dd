"""The cheap launch calls the compiled kernel that Triton itself would have called."""

import itertools
import types

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.jit import JITFunction

from nsa.kernels import launch as module
from nsa.kernels.launch import ceil_div, launch, power_of_two

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def scale_kernel(X, Out, size, factor, stride, OFFSET: tl.constexpr, BLOCK: tl.constexpr = 16):
    """Out = X · factor + OFFSET, of `size` entries that lie `stride` apart in X."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + at.to(tl.int64) * stride, mask=at < size, other=0.0)
    tl.store(Out + at, x * factor + OFFSET, mask=at < size)


def test_sizes():
    assert [power_of_two(size) for size in (1, 2, 3, 16, 17, 1000)] == [1, 2, 4, 16, 32, 1024]
    assert [ceil_div(count, 4) for count in (0, 1, 4, 5)] == [0, 1, 1, 2]


@pytest.mark.parametrize("rounds", [1, pytest.param(3, marks=pytest.mark.gpu)])
def test_results_do_not_depend_on_what_was_launched_before(rounds):
    """Strides, sizes, alignments and dtypes that Triton compiles apart, in turns."""
    x = torch.arange(4096.0, device=DEVICE)
    cases = list(itertools.product((1, 16, 3), (1, 16, 37), (0, 1), (torch.float32, torch.int32)))
    for stride, size, first, dtype in cases * rounds:
        source = x.to(dtype)[first:]
        out = torch.full((size,), -1.0, device=DEVICE)
        launch(scale_kernel, (ceil_div(size, 16),), source, out, size, 2.0, stride, OFFSET=3)
        assert torch.equal(out, source[: size * stride : stride] * 2.0 + 3)


class Compiled:
    """Stands for a compiled kernel: records how it is launched."""

    def __init__(self, launches):
        self.launches = launches

    def __getitem__(self, grid):
        return lambda *arguments: self.launches.append((grid, arguments))


def view(base, box, swizzle):
    """As Gluon's view of a tensor for the copy engine."""
    layout = types.SimpleNamespace(swizzle_byte_width=swizzle, element_bitwidth=16, transposed=False)
    return types.SimpleNamespace(base=base, shape=list(base.shape), block_shape=box, layout=layout)


class Function(JITFunction):
    """A kernel that compiles to `Compiled` and counts how often it was asked to find it."""

    searches = 0

    def run(self, *args, grid, warmup, **kwargs):
        self.searches += 1
        self.launches = []
        return Compiled(self.launches)


@pytest.fixture
def function(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(module, "REMEMBERS", True)
    monkeypatch.setattr(module, "compiled_kernels", {})
    return Function(scale_kernel.fn)


def test_the_second_launch_goes_straight_to_the_compiled_kernel(function):
    x, out = torch.zeros(64), torch.zeros(64)
    for _ in range(3):
        launch(function, (4, 2), x, out, 33, 1.5, 7, OFFSET=3, num_warps=1)
    assert function.searches == 1
    assert function.launches == [((4, 2, 1), (x, out, 33, 1.5, 7, 3, 16))] * 2
    launch(function, (4,), x, out, 35, 0.5, 9, OFFSET=3, num_warps=1)
    assert function.searches == 1


def test_what_triton_compiles_apart_is_looked_up_apart(function):
    x, out = torch.zeros(64), torch.zeros(64)
    calls = [
        (x, out, 33, 1.5, 7),
        (x, out, 32, 1.5, 7),
        (x, out, 33, 1.5, 1),
        (x, out, 2**31 + 1, 1.5, 7),
        (x, out, 2**31, 1.5, 7),
        (x[1:], out, 33, 1.5, 7),
        (x.int(), out, 33, 1.5, 7),
        (x, out, 33, 2, 7),
        (x, out, 33, 1.5, (7, 8)),
        (x, out, 33, 1.5, (7, 16)),
        (x, out, 33, 1.5, (7, (8,))),
        (x, out, 33, 1.5, (7, x)),
        (x, out, 33, 1.5, view(x, [64, 128], 128)),
        (x, out, 33, 1.5, view(x, [64, 64], 128)),
        (x, out, 33, 1.5, view(x, [64, 64], 64)),
        (x, out, 33, 1.5, view(x.half(), [64, 64], 64)),
    ]
    for arguments in calls * 2:
        launch(function, (4,), *arguments, OFFSET=3)
    launch(function, (4,), *calls[0], OFFSET=4)
    launch(function, (4,), *calls[0], OFFSET=3, num_warps=2)
    launch(function, (4,), *calls[0], OFFSET=3, BLOCK=32)
    assert function.searches == len(calls) + 3


def test_other_arguments_and_unknown_versions_are_left_to_triton(function, monkeypatch):
    x, out = torch.zeros(64), torch.zeros(64)
    for _ in range(2):
        launch(function, (4,), x, out, 33, 1.5, (7, [8]), OFFSET=3)
    assert function.searches == 2
    monkeypatch.setattr(module, "REMEMBERS", False)
    for _ in range(2):
        launch(function, (4,), x, out, 33, 1.5, 7, OFFSET=3)
    assert function.searches == 4


@pytest.fixture
def loaded(monkeypatch):
    """Kernels that a rehearsal brought to the device."""
    found = []
    monkeypatch.setattr(module, "rehearsed", set())
    monkeypatch.setattr(module, "load", lambda kernel, device: found.append(kernel))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return found


def test_a_rehearsal_asks_for_every_kernel_once_and_launches_none(function, loaded):
    x, out = torch.zeros(64), torch.zeros(64)

    def work():
        for _ in range(2):
            launch(function, (4,), x, out, 33, 1.5, 7, OFFSET=3)

    for kind in ("one", "one", "two"):
        module.rehearse_once(kind, torch.device("cuda"), work)
    assert function.searches == len(loaded) == 4 and not function.launches
    module.rehearse_once("three", torch.device("cpu"), work)
    assert function.searches == 4
    work()
    assert len(function.launches) == 1, "after a rehearsal kernels are launched again (the first by Triton itself)"


def test_a_rehearsal_leaves_faults_of_the_host_code_to_the_caller(function, loaded):
    def work():
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        module.rehearse_once("one", torch.device("cuda"), work)
    assert module.rehearsal.get() is None
