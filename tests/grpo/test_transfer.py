"""Weights between processes: which way is taken, what a broadcast brings, and what a lost peer looks like."""

import pickle
import subprocess
import sys
import threading
import time

import pytest
import torch

from grpo.errors import RunFailed
from grpo.transfer import Place, TensorInfo, WeightGroup, choose_transport, describe, open_store, parcels, share
from grpo.weight_sync import checksum

CPU = torch.device("cpu")
READER = """
import pickle, sys, torch
from grpo.transfer import open_shared
from grpo.weight_sync import checksum
opened = open_shared(pickle.load(sys.stdin.buffer), torch.device("cuda", 0))
for _ in range(2):
    print(checksum(opened), flush=True)
    sys.stdin.buffer.readline()
"""


def test_the_way_follows_from_the_places():
    def place(host: str, *gpus: str) -> Place:
        return Place(host=host, gpus=gpus)

    assert choose_transport(place("a", "x"), place("a", "x")) == "shared"
    assert choose_transport(place("a", "x"), place("a", "y")) == "broadcast"
    assert choose_transport(place("a", "x"), place("b", "y", "z")) == "broadcast"
    assert choose_transport(place("a", "x"), place("a", "x", "y")) == "bytes"  # NCCL wants a GPU for each rank
    assert choose_transport(place("a"), place("a")) == "bytes"
    assert choose_transport(place("a", "x"), place("a")) == "bytes"


def test_parcels_keep_the_order_and_a_large_tensor_goes_alone():
    infos = [TensorInfo(name=str(size), dtype="float32", shape=(size,)) for size in (90, 3, 4, 100, 1, 0, 5)]
    cut = [[info.name for info in parcel] for parcel in parcels(infos, 32)]
    assert cut == [["90"], ["3", "4"], ["100"], ["1", "0", "5"]]


def tensors() -> list[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [("a", torch.randn(70, 3, generator=generator)), ("b", torch.zeros(0, 4)), ("c", torch.randn(4, 6, generator=generator).t())]


def join_both(deadline_s: float) -> tuple[WeightGroup, WeightGroup]:
    store, address = open_store("127.0.0.1", 2, deadline_s, "gloo")
    joined: list[WeightGroup] = []
    thread = threading.Thread(target=lambda: joined.append(WeightGroup(address, 1, CPU)))
    thread.start()
    sender = WeightGroup(address, 0, CPU, store)
    thread.join()
    return sender, joined[0]


def test_a_broadcast_brings_every_tensor_in_the_samplers_dtype():
    sender, receiver = join_both(10)
    infos = describe(tensors(), torch.bfloat16)
    for _ in range(2):
        got: dict[str, torch.Tensor] = {}
        thread = threading.Thread(target=lambda into=got: into.update((name, part.clone()) for name, part in receiver.receive(infos)))
        thread.start()
        sender.send(tensors(), infos)
        thread.join()
        assert list(got) == ["a", "b", "c"]
        assert all(torch.equal(got[name], tensor.bfloat16()) for name, tensor in tensors())


def test_a_peer_that_does_not_come_or_stands_still_is_noticed_within_the_deadline():
    store, address = open_store("127.0.0.1", 2, 0.5, "gloo")
    began = time.monotonic()
    with pytest.raises(RunFailed, match="did not come together"):
        WeightGroup(address, 0, CPU, store)
    sender, _silent = join_both(0.5)
    with pytest.raises(RunFailed, match=r"stood still for 0\.5 s|could not be sent on"):
        sender.send(tensors(), describe(tensors(), torch.float32))
    assert time.monotonic() - began < 10


def test_a_broadcast_that_never_ends_by_itself_ends_at_the_deadline():
    class Stuck:
        def broadcast(self, buffer, root):
            return self

        def is_completed(self):
            return False

    sender, _receiver = join_both(0.3)
    sender._group = Stuck()
    with pytest.raises(RunFailed, match=r"stood still for 0\.3 s: the other side is gone or stuck"):
        sender.send(tensors(), describe(tensors(), torch.float32))


def test_tensors_in_another_order_than_described_are_refused():
    sender, _receiver = join_both(5)
    with pytest.raises(RunFailed, match="c came where a was due"):
        sender.send(reversed(tensors()), describe(tensors(), torch.float32))


@pytest.mark.gpu
def test_another_process_reads_the_parameters_where_they_are():
    tensors = [(str(size), torch.randn(size, device="cuda")) for size in (3, 4096, 100_000)]
    reader = subprocess.Popen([sys.executable, "-c", READER], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert reader.stdin is not None
    assert reader.stdout is not None
    pickle.dump(share(tensors), reader.stdin)
    reader.stdin.flush()
    for _ in range(2):
        assert int(reader.stdout.readline()) == checksum(tensors)
        for _, tensor in tensors:
            tensor.add_(1)
        torch.cuda.synchronize()
        reader.stdin.write(b"again\n")
        reader.stdin.flush()
    reader.stdin.close()
    assert reader.wait(timeout=60) == 0
