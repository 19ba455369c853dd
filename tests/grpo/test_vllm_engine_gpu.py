"""On GPUs: vLLM asleep gives its memory back, wakes up with new weights, and notices a full GPU before it touches anything; weights
reach an engine on another GPU by broadcast."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from grpo.data_types import Prompt
from grpo.errors import EngineFailed
from grpo.rollout.engine import Sampling
from grpo.rollout.torch_engine import TorchEngine
from grpo.rollout.vllm_settings import VllmSettings
from grpo.transfer import WeightGroup, describe, open_store
from nsa import NSAConfig, NSAForCausalLM

pytestmark = [pytest.mark.gpu, pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]
start_vllm = pytest.importorskip("grpo.rollout.vllm_start", reason="needs vLLM").start_vllm

VOCABULARY = 211
CACHE_BYTES = 2**28
BOUND = 1e-4


def prompts() -> list[Prompt]:
    source = torch.Generator().manual_seed(2)
    ids = [tuple(torch.randint(4, VOCABULARY, (length,), generator=source).tolist()) for length in (1, 40, 130, 300)]
    return [Prompt(prompt_id=str(i), token_ids=x, question="", answer="", text="") for i, x in enumerate(ids)]


def agrees(engine, reference: TorchEngine, seed: int) -> None:
    """Same bits, and log-probabilities that follow from them."""
    assert engine.checksum() == reference.checksum()
    for group in engine.generate(prompts(), Sampling(max_tokens=40, group_size=4, seed=seed)):
        for one in group.completions:
            scored = reference.score([group.prompt.token_ids + one.token_ids])[0][len(group.prompt.token_ids) :]
            assert (scored - torch.tensor(one.logprobs)).abs().median() < BOUND  # a near-tie of block scores may move single tokens


def checkpoint(path: Path) -> tuple[NSAForCausalLM, TorchEngine]:
    """A random model, saved, and the built-in engine with it on the first GPU."""
    torch.manual_seed(0)
    config = NSAConfig(
        vocab_size=VOCABULARY, hidden_size=96, intermediate_size=128, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2,
        compress_block_size=8, compress_stride=4, select_block_size=8, num_selected_blocks=4, window_size=16, eos_token_id=3,
        max_position_embeddings=512,
    )  # fmt: skip
    model = NSAForCausalLM(config)
    model.save_pretrained(path)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCABULARY)}, unk_token="t0")))
    tokenizer.save_pretrained(path)
    return model, TorchEngine(model, tokenizer, max_sequences=8, device="cuda")


def settings(path: Path, **changes: Any) -> VllmSettings:
    values: dict[str, Any] = {
        "model_path": str(path), "device": "cuda", "dtype": "float32", "max_sequences": 16, "context": 512, "cache_bytes": CACHE_BYTES,
        "gpu_share": 0.2, "tensor_parallel": 1, "sleeps": True, "cuda_graphs": True, "records_selection": False, "attention_backend": "auto",
        "stall_deadline_s": 300,
    }  # fmt: skip
    return VllmSettings(**(values | changes))


def test_sleep_sync_and_wake_on_the_learners_gpu(tmp_path: Path) -> None:
    model, reference = checkpoint(tmp_path)
    engine = start_vllm(settings(tmp_path))
    try:
        agrees(engine, reference, 0)
        for turn in (1, 2):
            free = torch.cuda.mem_get_info()[0]
            engine.sleep()
            assert torch.cuda.mem_get_info()[0] - free > 0.8 * CACHE_BYTES
            new = [(name, parameter.detach() * 1.05) for name, parameter in model.named_parameters()]
            engine.load_weights(turn, iter(new))
            reference.load_weights(turn, iter(new))
            engine.wake()
            agrees(engine, reference, turn)
        engine.sleep()
        engine.load_weights(3, model.named_parameters())
        torch.cuda.empty_cache()
        hog = torch.empty(torch.cuda.mem_get_info()[0] - CACHE_BYTES // 2, dtype=torch.uint8, device="cuda")
        with pytest.raises(EngineFailed, match=r"^out of memory at wake-up"):
            engine.wake()
        del hog
        engine.wake()
        agrees(engine, reference, 3)
    finally:
        engine.close()
        reference.close()


FAR_ENGINE = """
import sys
from multiprocessing.connection import Client
from grpo.rollout.vllm_start import start_vllm

link = Client(sys.argv[1], "AF_UNIX")
engine = start_vllm(link.recv())
link.send(None)
while (call := link.recv()) is not None:
    result = getattr(engine, call[0])(*call[1:])
    link.send(list(result) if call[0] == "generate" else result)
engine.close()
"""
"""The program of a process with an engine, which does what comes over the link."""


class FarEngine:
    """An engine in another process, as far as `agrees` needs it."""

    def __init__(self, link: Connection) -> None:
        self.link = link

    def ask(self, *call: Any) -> None:
        self.link.send(call)

    def answer(self) -> Any:
        assert self.link.poll(200), "the far engine does not answer"
        return self.link.recv()

    def checksum(self) -> int:
        self.ask("checksum")
        return self.answer()

    def generate(self, *arguments: Any) -> Any:
        self.ask("generate", *arguments)
        return self.answer()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
def test_weights_reach_an_engine_on_another_gpu_by_broadcast(tmp_path: Path) -> None:
    """As the Ray actors do it: each process sees one GPU, the learner is rank 0 of an NCCL group."""
    with Listener(str(tmp_path / "link"), "AF_UNIX") as listener:
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "1"}
        process = subprocess.Popen([sys.executable, "-c", FAR_ENGINE, listener.address], env=environment)
        try:
            model, reference = checkpoint(tmp_path)
            far = FarEngine(listener.accept())
            far.link.send(settings(tmp_path, sleeps=False))
            far.answer()
            agrees(far, reference, 0)
            store, address = open_store("127.0.0.1", 2, 60, "nccl")
            far.ask("join_group", address)
            sender = WeightGroup(address, 0, torch.device("cuda", 0), store)
            far.answer()
            for version in (1, 2):
                new = [(name, parameter.detach() * 1.05) for name, parameter in model.named_parameters()]
                infos = describe(new, torch.float32)
                began = time.perf_counter()
                far.ask("receive_weights", version, infos)
                sender.send(new, infos)
                far.answer()
                print(f"broadcast {version}: {time.perf_counter() - began:.3f} s")
                reference.load_weights(version, iter(new))
                agrees(far, reference, version)
            far.link.send(None)
            assert process.wait(60) == 0
        finally:
            process.kill()
            process.wait()
