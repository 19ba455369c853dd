"""The vLLM engine over two tensor-parallel ranks in processes of their own: weights in parcels and by broadcast, checksums over shards."""

from __future__ import annotations

import threading

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo.data_types import Prompt
from grpo.rollout.engine import Sampling
from grpo.rollout.torch_engine import TorchEngine
from grpo.rollout.vllm_settings import VllmSettings
from grpo.rollout.weights import WeightError
from grpo.transfer import WeightGroup, describe, open_store

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
start_vllm = pytest.importorskip("grpo.rollout.vllm_start", reason="needs vLLM").start_vllm

BOUND = 1e-4


def agrees(engine, torch_engine, seed: int) -> None:
    """Same weights bit for bit, and the log-probabilities that follow from them."""
    assert engine.checksum() == torch_engine.checksum()
    prompts = [Prompt(prompt_id=f"p{n}", token_ids=tuple(7 + i % 20 for i in range(n)), question="", answer="", text="") for n in (3, 70)]
    for group in engine.generate(prompts, Sampling(max_tokens=20, group_size=2, seed=seed)):
        for one in group.completions:
            scored = torch_engine.score([group.prompt.token_ids + one.token_ids])[0][len(group.prompt.token_ids) :]
            assert torch.allclose(scored, torch.tensor(one.logprobs), atol=BOUND)


def test_two_ranks_take_weights_in_parcels_and_by_broadcast(tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    torch_engine = TorchEngine(model, AutoTokenizer.from_pretrained(tiny_model), max_sequences=8)
    engine = start_vllm(
        VllmSettings(
            model_path=str(tiny_model), device="cpu", dtype="float32", max_sequences=8, context=256, cache_bytes=2**25, gpu_share=0.9,
            tensor_parallel=2, sleeps=False, cuda_graphs=False, records_selection=False, attention_backend="auto", stall_deadline_s=120,
        )
    )  # fmt: skip
    try:
        agrees(engine, torch_engine, 0)
        new = [(name, parameter.detach() * 1.2) for name, parameter in model.named_parameters()]
        engine.load_weights(1, iter(new))
        torch_engine.load_weights(1, iter(new))
        agrees(engine, torch_engine, 1)
        with pytest.raises(WeightError, match="no tensor came for 1 of the model's parameters"):
            engine.load_weights(2, iter(new[:-1]))
        store, address = open_store("127.0.0.1", 3, 30, "gloo")
        receivers = threading.Thread(target=lambda: engine.join_group(address))
        receivers.start()
        sender = WeightGroup(address, 0, torch.device("cpu"), store)
        receivers.join()
        newer, infos = [(name, tensor * 0.9) for name, tensor in new], describe(new, torch.float32)
        receivers = threading.Thread(target=lambda: engine.receive_weights(3, infos))
        receivers.start()
        sender.send(newer, infos)
        receivers.join()
        torch_engine.load_weights(3, iter(newer))
        agrees(engine, torch_engine, 2)
    finally:
        engine.close()
        torch_engine.close()
