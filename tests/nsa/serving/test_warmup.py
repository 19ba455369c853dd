"""The calls that compile the prefill kernels before the first request."""

import pytest
import torch

from nsa.attention import CompressorWeights, Phi
from nsa.config import SparsityConfig
from nsa.serving.warmup import prefill_lengths, warm_up

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize(("num_tokens", "max_length"), [(8192, 65536), (8192, 100), (1, 1), (2048, 3000), (16, 4096)])
def test_lengths_fit_a_step_and_a_sequence(num_tokens: int, max_length: int) -> None:
    calls = prefill_lengths(num_tokens, max_length)
    assert all(1 <= queries <= keys <= max_length and queries <= num_tokens for _, queries, keys in calls)
    assert {count > 1 for count, _, _ in calls} == {True, False}
    if 2 * num_tokens <= max_length:
        assert any(queries == num_tokens < keys for _, queries, keys in calls) and any(queries == num_tokens == keys for _, queries, keys in calls)


def test_every_call_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nsa.serving.warmup.DECODES", ((1, 1), (2, 1), (1, 2)))
    config = SparsityConfig(compress_block_size=4, compress_stride=2, select_block_size=8, num_selected_blocks=4, window_size=8)
    weights = CompressorWeights(*(torch.randn(shape, device=DEVICE) for shape in ((4, 16), (16, 4 * 16), (16, 16))))
    warm_up(
        config, Phi(weights, weights), num_heads=2, num_kv_heads=1, num_sets=3, key_dim=16, value_dim=16, page_size=8,
        dtype=torch.float32, device=torch.device(DEVICE), num_tokens=6, max_length=20, record=True,
    )  # fmt: skip
