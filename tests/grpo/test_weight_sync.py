"""Weights on their way: pieces, checksum, version."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo.weight_sync import WeightSyncError, check_probe, checksum, pack, sync, unpack


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "embed": torch.randn(33, 7, generator=generator),
        "half": torch.randn(5, 3, generator=generator).bfloat16(),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "strided": torch.randn(6, 4, generator=generator).t(),
        "count": torch.arange(9),
    }


@settings(deadline=None)
@given(st.integers(min_value=1, max_value=1500))
def test_any_piece_size_gives_the_same_tensors_back(piece_bytes):
    parcels = list(pack(tensors().items(), piece_bytes))
    assert all(sum(piece.data.size for piece in parcel) <= piece_bytes for parcel in parcels)
    back = {name: tensor.clone() for name, tensor in unpack(parcels)}
    assert list(back) == list(tensors())
    for name, tensor in tensors().items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name], tensor)


def test_a_lost_parcel_is_noticed():
    parcels = list(pack(tensors().items(), 100))
    with pytest.raises(WeightSyncError, match="where"):
        list(unpack(parcels[:2] + parcels[3:]))
    with pytest.raises(WeightSyncError, match="middle of a tensor"):
        list(unpack(parcels[:2]))


def test_checksum_sees_a_changed_bit_a_swap_and_a_name_but_not_the_order():
    first = checksum(tensors().items())
    assert first == checksum(reversed(tensors().items()))
    changed = tensors()
    changed["embed"][32, 6] += 1e-6
    assert checksum(changed.items()) != first
    swapped = tensors()
    swapped["count"][[2, 3]] = swapped["count"][[3, 2]]
    assert checksum(swapped.items()) != first
    renamed = {("other" if name == "half" else name): tensor for name, tensor in tensors().items()}
    assert checksum(renamed.items()) != first


class Learner:
    policy_version = 3

    def __init__(self) -> None:
        self.tensors = tensors()

    def weights(self):
        return self.tensors.items()

    def checksum(self) -> int:
        return checksum(self.weights())

    def score(self, token_ids):
        return torch.tensor([0.0, *(-token_id / 10 for token_id in token_ids[1:])])


class Sampler:
    def __init__(self, reported: int | None = None, stale: str | None = None) -> None:
        self.reported, self.stale, self.off, self.loads = reported, stale, 0.0, 0
        self.tensors: dict[str, torch.Tensor] = {}

    def load_weights(self, version, named_tensors):
        self.version = version
        self.loads += 1
        self.tensors = {name: tensor + 1 if name == self.stale else tensor for name, tensor in named_tensors}

    def health(self):
        return {"version": float(self.version if self.reported is None else self.reported)}

    def checksum(self):
        return checksum(self.tensors.items())

    def score(self, sequences):
        return [Learner().score(token_ids) + self.off for token_ids in sequences]


def test_sync_moves_weights_and_version():
    sampler = Sampler()
    assert sync(Learner(), sampler) == 3
    assert torch.equal(sampler.tensors["embed"], tensors()["embed"])


def test_a_sampler_that_keeps_its_old_weights_or_version_stops_the_run():
    with pytest.raises(WeightSyncError, match="reports weight version 2 after version 3"):
        sync(Learner(), Sampler(reported=2))
    with pytest.raises(WeightSyncError, match="did not arrive"):
        sync(Learner(), Sampler(stale="half"))


def test_weights_that_did_not_arrive_are_sent_once_more(caplog):
    class Forgetful(Sampler):
        def checksum(self):
            return super().checksum() + (self.loads == 1)

    sampler = Forgetful()
    assert sync(Learner(), sampler) == 3
    assert sampler.loads == 2
    assert "did not arrive" in caplog.text


def test_a_sampler_with_the_right_bits_that_computes_something_else_stops_the_run():
    sampler = Sampler()
    assert check_probe(Learner(), sampler, (1, 2, 3), 0.1) == {"probe/mean": 0.0, "probe/max": 0.0}
    sampler.off = 0.2
    assert check_probe(Learner(), sampler, (1, 2, 3), None)["probe/mean"] == pytest.approx(0.2)
    for off in (0.2, float("nan")):
        sampler.off = off
        with pytest.raises(WeightSyncError, match="computes something else than the learner"):
            check_probe(Learner(), sampler, (1, 2, 3), 0.1)
