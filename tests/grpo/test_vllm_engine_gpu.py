"""On a GPU: vLLM asleep gives its memory back, wakes up with new weights, and notices a full GPU before it touches anything."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from grpo.data_types import Prompt
from grpo.errors import EngineFailed
from grpo.rollout.engine import Sampling
from grpo.rollout.torch_engine import TorchEngine
from grpo.rollout.vllm_settings import VllmSettings
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


def test_sleep_sync_and_wake_on_the_learners_gpu(tmp_path):
    torch.manual_seed(0)
    config = NSAConfig(
        vocab_size=VOCABULARY, hidden_size=96, intermediate_size=128, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2,
        compress_block_size=8, compress_stride=4, select_block_size=8, num_selected_blocks=4, window_size=16, eos_token_id=3,
        max_position_embeddings=512,
    )  # fmt: skip
    model = NSAForCausalLM(config)
    model.save_pretrained(tmp_path)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCABULARY)}, unk_token="t0")))
    tokenizer.save_pretrained(tmp_path)
    reference = TorchEngine(model, tokenizer, max_sequences=8, device="cuda")
    engine = start_vllm(
        VllmSettings(
            model_path=str(tmp_path), device="cuda", dtype="float32", max_sequences=16, context=512, cache_bytes=CACHE_BYTES, gpu_share=0.2,
            tensor_parallel=1, sleeps=True, cuda_graphs=True, records_selection=False, attention_backend="auto", stall_deadline_s=300,
        )
    )  # fmt: skip
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
