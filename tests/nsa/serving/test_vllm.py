"""vLLM with our plugin against the Hugging Face model: tokens, log-probabilities, block choices, cached pages.

Run by `make test-vllm` in an environment of its own. Few engines, each for several tests: one start costs seconds.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from nsa import NSAConfig, NSAForCausalLM
from nsa.testing import same_blocks

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]

SHAPE = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
SETTINGS = {"max_position_embeddings": 4096, "initializer_range": 0.15, "num_selected_blocks": 4, "window_size": 64, "num_hidden_layers": 2}


@dataclass
class Served:
    """A checkpoint, as vLLM runs it and as Hugging Face does."""

    llm: Any
    model: NSAForCausalLM

    @property
    def core(self) -> Any:
        return self.llm.llm_engine.engine_core.engine_core

    @property
    def vllm_model(self) -> Any:
        return self.core.model_executor.driver_worker.worker.get_model()

    def read_selection(self, request_id: str, num_tokens: int) -> torch.Tensor:
        return self.vllm_model.read_selection(self.core.model_executor.driver_worker.worker.model_runner, request_id, num_tokens)


def checkpoint(path: Path, **changes: Any) -> NSAForCausalLM:
    """A random model whose compressor and gates do something, saved."""
    torch.manual_seed(0)
    model = NSAForCausalLM(NSAConfig(**{**SHAPE, **SETTINGS, **changes})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "phi" in name or "branch" in name:
                parameter.normal_(0.0, 0.3)
            if "norm" in name or name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(path)
    return model


def serve(path: Path, **options: Any) -> Any:
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_NO_USAGE_STATS="1", VLLM_LOGGING_LEVEL="ERROR", VLLM_CPU_KVCACHE_SPACE="1")
    from vllm import LLM

    defaults = {"dtype": "float32", "skip_tokenizer_init": True, "max_num_seqs": 16, "logprobs_mode": "processed_logprobs", "enforce_eager": True}
    return LLM(str(path), **{**defaults, **options})


def stop(served: Served) -> None:
    served.core.shutdown()
    served.llm = None
    gc.collect()


@pytest.fixture(scope="module")
def separate(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The paper's settings with d_qk ≠ d_v; prefill chunks of 100 tokens; 70 pages, so that a few long requests do not fit."""
    path = tmp_path_factory.mktemp("separate")
    model = checkpoint(path, value_head_dim=24)
    options = {"max_model_len": 3200, "max_num_batched_tokens": 100, "num_gpu_blocks_override": 70}
    served = Served(serve(path, additional_config={"nsa_record_selection": True}, **options), model)
    yield served
    stop(served)


@dataclass
class Finished:
    token_ids: list[int]
    logprobs: list[float]
    selection: torch.Tensor | None
    num_cached: int


def run(served: Served, prompts: Sequence[Sequence[int]], *, num_tokens: int, record: bool = False, **sampling: Any) -> list[Finished]:
    """Sample from prompts, stepping the engine ourselves."""
    from vllm import SamplingParams

    parameters = SamplingParams(**{"temperature": 0.0, "max_tokens": num_tokens, "logprobs": 0, "detokenize": False, "ignore_eos": True, **sampling})
    engine = served.llm.llm_engine
    internal = {str(i): engine.add_request(str(i), {"prompt_token_ids": list(prompt)}, parameters) for i, prompt in enumerate(prompts)}
    finished: dict[str, Finished] = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                (sample,) = output.outputs
                ids = list(sample.token_ids)
                logprobs = [entry[token].logprob for token, entry in zip(ids, sample.logprobs, strict=True)]
                length = len(output.prompt_token_ids) + len(ids) - 1
                chosen = served.read_selection(internal[output.request_id], length) if record else None
                finished[output.request_id] = Finished(ids, logprobs, chosen, output.num_cached_tokens or 0)
    return [finished[str(i)] for i in range(len(prompts))]


def expect(model: NSAForCausalLM, prompt: Sequence[int], completion: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities `[L, V]` of the completion's places and selection `[T − 1, layers, Hkv, n]`, by the packed forward."""
    tokens = torch.tensor([*prompt, *completion])
    with torch.no_grad():
        out = model.model.forward_packed(tokens, torch.arange(len(tokens)), torch.tensor([0, len(tokens)]), return_selection=True)
        logits = torch.nn.functional.linear(out.hidden_TE.to(model.lm_head.weight.dtype), model.lm_head.weight).float()
    assert out.selection is not None
    return torch.log_softmax(logits, dim=-1)[len(prompt) - 1 : -1], out.selection[:-1]


def assert_exact(model: NSAForCausalLM, prompts: Sequence[Sequence[int]], results: Sequence[Finished], *, bound: float = 1e-4) -> None:
    """Greedy tokens equal, log-probabilities within `bound`, and all but a few per mille of block choices equal."""
    num_rows = num_other = 0
    for prompt, result in zip(prompts, results, strict=True):
        logprobs, selection = expect(model, prompt, result.token_ids)
        assert logprobs.argmax(dim=-1).tolist() == result.token_ids, f"prompt of {len(prompt)} tokens"
        given = logprobs[torch.arange(len(result.token_ids)), torch.tensor(result.token_ids)]
        assert (given - torch.tensor(result.logprobs)).abs().max() <= bound, f"prompt of {len(prompt)} tokens"
        if result.selection is not None:
            assert result.selection.shape == selection.shape and result.selection.dtype == torch.int16
            same = same_blocks(result.selection, selection)
            num_rows, num_other = num_rows + same.numel(), num_other + int((~same).sum())
    assert num_other <= 2e-4 * num_rows, f"{num_other} of {num_rows} block choices differ"


def random_prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, SHAPE["vocab_size"], (length,), generator=generator).tolist() for length in lengths]


def test_prompts_of_1_to_3000_tokens_in_chunks_that_are_no_multiple_of_a_page(separate: Served) -> None:
    prompts = random_prompts(1, 2, 31, 32, 33, 63, 64, 65, 127, 130, 257, 600, 1311, 3000)
    results = run(separate, prompts, num_tokens=20, record=True)
    assert_exact(separate.model, prompts, results)
    assert len({tuple(result.token_ids) for result in results}) > 10, "the model says the same thing to every prompt"
