"""vLLM with our plugin against the Hugging Face model: tokens, log-probabilities, block choices, cached pages.

Run by `make test-vllm` in an environment of its own. Few engines, each for several tests: one start costs seconds.
"""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from nsa import NSAConfig, NSAForCausalLM
from nsa.attention import RECOMPUTE
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
    """A random model whose compressor and gates do something, saved. Everything keeps the size of what goes in, so that 16 bits
    are enough: a φ that makes keys tenfold larger turns every rounding into another softmax."""
    torch.manual_seed(0)
    model = NSAForCausalLM(NSAConfig(**{**SHAPE, **SETTINGS, **changes})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "phi" in name:
                parameter.normal_(0.0, 0.2 if "position" in name else parameter.shape[1] ** -0.5)
            if "branch" in name:
                parameter.normal_(0.0, 0.3)
            if "norm" in name or name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(path)
    return model


@contextmanager
def serving(path: Path, model: NSAForCausalLM, **options: Any) -> Iterator[Served]:
    """The checkpoint in a vLLM engine of this process that records block choices; 70 pages, so that a few long requests do not fit."""
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_NO_USAGE_STATS="1", VLLM_LOGGING_LEVEL="ERROR", VLLM_CPU_KVCACHE_SPACE="1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    from vllm import LLM

    defaults = {
        "dtype": "float32", "skip_tokenizer_init": True, "max_num_seqs": 16, "logprobs_mode": "processed_logprobs", "enforce_eager": True,
        "max_model_len": 3200, "num_gpu_blocks_override": 70, "async_scheduling": False, "disable_log_stats": True,
        "additional_config": {"nsa_record_selection": True},
    }  # fmt: skip
    served = Served(LLM(str(path), **{**defaults, **options}), model)
    yield served
    served.core.shutdown()
    served.llm = None
    gc.collect()


@pytest.fixture(scope="module")
def separate(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The paper's settings with d_qk ≠ d_v; prefill in chunks of 100 tokens."""
    path = tmp_path_factory.mktemp("separate")
    with serving(path, checkpoint(path, value_head_dim=24), max_num_batched_tokens=100) as served:
        yield served


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Every switch the other way: shared K/V, mean pooling, pages of 72 tokens (l' = 24, d = 4), biases, tied head, norms on q and k, blend gates."""
    path = tmp_path_factory.mktemp("shared")
    changes = {
        "kv": "shared", "compressor": "mean", "compress_block_size": 8, "compress_stride": 4, "select_block_size": 24, "num_selected_blocks": 5,
        "attention_bias": True, "attention_output_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "qk_norm": True, "gate": "blend",
    }  # fmt: skip
    with serving(path, checkpoint(path, **changes), max_num_batched_tokens=77) as served:
        yield served


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


def expect(
    model: NSAForCausalLM, prompt: Sequence[int], completion: Sequence[int], replay: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities `[L, V]` of the completion's places and selection `[T − 1, layers, Hkv, n]`, by the packed forward.

    With `replay` `[T − 1, layers, Hkv, n]` it attends to those blocks instead of choosing."""
    tokens = torch.tensor([*prompt, *completion])
    if replay is not None:
        replay = torch.cat([replay, torch.full_like(replay[:1], RECOMPUTE)])
    with torch.no_grad():
        ends, positions = torch.tensor([0, len(tokens)]), torch.arange(len(tokens))
        out = model.model.forward_packed(tokens, positions, ends, selection=replay, return_selection=True)
        logits = torch.nn.functional.linear(out.hidden_TE.to(model.lm_head.weight.dtype), model.lm_head.weight).float()
    assert out.selection is not None
    return torch.log_softmax(logits, dim=-1)[len(prompt) - 1 : -1].cpu(), out.selection[:-1].cpu()


def assert_exact(model: NSAForCausalLM, prompts: Sequence[Sequence[int]], results: Sequence[Finished], *, bound: float = 1e-4) -> None:
    """Greedy tokens equal, log-probabilities within `bound`, and all but one per mille of block choices equal (near ties)."""
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
    assert num_other <= 1e-3 * num_rows, f"{num_other} of {num_rows} block choices differ"


def random_prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, SHAPE["vocab_size"], (length,), generator=generator).tolist() for length in lengths]


def test_prompts_of_1_to_3000_tokens_in_chunks_that_are_no_multiple_of_a_page(separate: Served) -> None:
    prompts = random_prompts(1, 2, 31, 32, 33, 63, 64, 65, 127, 130, 257, 600, 1311, 3000)
    results = run(separate, prompts, num_tokens=20, record=True)
    assert_exact(separate.model, prompts, results)
    assert len({tuple(result.token_ids) for result in results}) > 10, "the model says the same thing to every prompt"


def test_shared_keys_mean_pooling_and_other_pages(shared: Served) -> None:
    prompts = random_prompts(1, 7, 8, 24, 71, 72, 73, 150, 500, 1200, seed=1)
    assert shared.core.vllm_config.cache_config.block_size == 72
    results = run(shared, prompts, num_tokens=20, record=True)
    assert_exact(shared.model, prompts, results)


def test_a_group_reads_the_pages_of_its_common_prompt(separate: Served) -> None:
    (prompt,) = random_prompts(470, seed=2)
    prompts = [[*prompt, token] for token in range(4)]
    assert separate.llm.reset_prefix_cache()
    first = run(separate, prompts[:1], num_tokens=30, record=True)
    results = run(separate, prompts[1:], num_tokens=30, record=True)
    assert [result.num_cached for result in results] == [448] * 3
    assert_exact(separate.model, prompts, [*first, *results])


def test_requests_of_one_step_read_each_others_new_pages(separate: Served) -> None:
    (prompt,) = random_prompts(66, seed=10)
    prompts = [[*prompt, token] for token in range(4)]
    assert separate.llm.reset_prefix_cache()
    results = run(separate, prompts, num_tokens=10, record=True)
    assert [result.num_cached for result in results] == [0, 64, 64, 64]
    assert_exact(separate.model, prompts, results)


def test_a_few_new_tokens_after_a_long_cached_prompt(separate: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are attended to by decode calls, one by one and sixteen at a time, beside a long chunk: of several lengths, over page borders too."""
    from nsa.serving.backend import NSAMetadataBuilder

    (prompt,) = random_prompts(1990, seed=11)
    ends = random_prompts(1, 3, 9, 20, 45, seed=12)
    assert separate.llm.reset_prefix_cache()
    run(separate, [prompt], num_tokens=1)
    ways: list[list[str]] = []
    build = NSAMetadataBuilder.build

    def watched(self: Any, *arguments: Any, **named: Any) -> Any:
        step = build(self, *arguments, **named)
        ways.append([f"{type(part).__name__} {len(part.block_table)}" for part in step.parts])
        return step

    monkeypatch.setattr(NSAMetadataBuilder, "build", watched)
    monkeypatch.setattr("nsa.serving.backend.DECODE_TOKENS", 7)
    monkeypatch.setattr("nsa.serving.backend.LONG_CONTEXT", 32)
    prompts = [*([*prompt, *end] for end in ends), *random_prompts(150, seed=13)]
    results = run(separate, prompts, num_tokens=12, record=True)
    assert [result.num_cached for result in results] == [1984] * 4 + [1984, 0]
    assert any(step.count("DecodePart 7") >= 2 and "DecodePart 1" in step for step in ways), ways
    assert any(len({way.split()[0] for way in step}) == 2 for step in ways), ways
    assert_exact(separate.model, prompts, results)


def test_preempted_requests_are_computed_again(separate: Served) -> None:
    prompts = random_prompts(*[560] * 7, seed=3)
    scheduler = separate.core.scheduler
    preempt, count = scheduler._preempt_request, 0

    def counted(*arguments: Any, **named: Any) -> Any:
        nonlocal count
        count += 1
        return preempt(*arguments, **named)

    scheduler._preempt_request = counted
    try:
        results = run(separate, prompts, num_tokens=130, record=True)
    finally:
        scheduler._preempt_request = preempt
    assert count > 0
    assert_exact(separate.model, prompts, results)


def test_logprobs_are_those_of_the_sampling_distribution(separate: Served) -> None:
    prompts = random_prompts(40, 333, seed=4)
    results = run(separate, prompts, num_tokens=30, temperature=0.7)
    for prompt, result in zip(prompts, results, strict=True):
        raw = expect(separate.model, prompt, result.token_ids)[0]
        logprobs = torch.log_softmax(raw / 0.7, dim=-1)[torch.arange(30), torch.tensor(result.token_ids)]
        assert (logprobs - torch.tensor(result.logprobs)).abs().max() <= 1e-4


def test_the_second_cache_is_a_dth_of_the_first(separate: Served, shared: Served) -> None:
    for served, recorded in ((separate, 4), (shared, 5)):
        config = served.model.config
        layer = served.vllm_model.model.layers[0].self_attn.attention
        raw, compressed, selected = layer.cache().raw, layer.compressed.pages(), layer.selected.pages()
        assert compressed.nbytes <= (1 / config.compress_stride + 0.003) * raw.nbytes
        assert raw.shape == (70, 2, config.page_size, (3 if config.kv == "separate" else 1) * 2, max(config.head_dim, config.value_head_dim))
        assert compressed.shape == (70, config.page_size // config.compress_stride, 2, config.head_dim + config.value_head_dim)
        assert selected.shape == (70, config.page_size, 2, recorded) and selected.dtype == torch.int16


def test_weights_written_in_place_count_at_once(shared: Served) -> None:
    prompts = random_prompts(5, 100, seed=6)
    live = {parameter.name: parameter for parameter in shared.vllm_model.hf_parameters()}
    names = {name for name, _ in shared.model.named_parameters()}
    assert set(live) == names
    before = {name: parameter.detach().clone() for name, parameter in shared.model.named_parameters()}
    try:
        with torch.inference_mode():
            for name, parameter in shared.model.named_parameters():
                parameter.data.add_(torch.randn_like(parameter) * 0.05)
                live[name].view.copy_(parameter)
        assert shared.llm.reset_prefix_cache()
        assert_exact(shared.model, prompts, run(shared, prompts, num_tokens=20))
    finally:
        for name, parameter in shared.model.named_parameters():
            parameter.data.copy_(before[name])
    shared.vllm_model.load_weights(before.items())
    assert shared.llm.reset_prefix_cache()
    assert_exact(shared.model, prompts, run(shared, prompts, num_tokens=20))


def test_a_tensor_that_the_model_does_not_have_is_refused(shared: Served) -> None:
    with pytest.raises(ValueError, match=r"'model\.layers\.0\.self_attn\.win_k_proj\.weight'.*does not have"):
        shared.vllm_model.load_weights([("model.layers.0.self_attn.win_k_proj.weight", torch.zeros(32, 64))])


def assert_close(model: NSAForCausalLM, prompts: Sequence[Sequence[int]], results: Sequence[Finished]) -> None:
    """The bound in 16 bits, where logits alone are rounded by up to .016 (2⁻⁸ of 4) here and there: log-probabilities within
    .06 given the same blocks, no other token ahead of the greedy one by more than .1, 99 % of the blocks equal. Without recorded
    blocks a near tie may have fallen the other way, and .3 is allowed."""
    report, worst, lead, same = [], 0.0, 0.0, []
    for prompt, result in zip(prompts, results, strict=True):
        logprobs, chosen = expect(model, prompt, result.token_ids, result.selection)
        given = logprobs.gather(1, torch.tensor(result.token_ids)[:, None])[:, 0]
        off, ahead = (given - torch.tensor(result.logprobs)).abs(), logprobs.max(dim=-1).values - given
        worst, lead = max(worst, float(off.max())), max(lead, float(ahead.max()))
        report.append(f"prompt {len(prompt)} ({result.num_cached} cached): worst {off.max():.3f} at {int(off.argmax())}, lead {ahead.max():.3f}")
        if result.selection is not None:
            chosen = expect(model, prompt, result.token_ids)[1]
            same.append(same_blocks(result.selection, chosen).float().mean(dim=(1, 2)))
            wrong = (same[-1] < 1).nonzero().flatten().tolist()
            report[-1] += f", other blocks at {len(wrong)} of {len(same[-1])} tokens {wrong[:6]}"
    equal = float(torch.cat(same).mean()) if same else 1.0
    print("\n".join(["", *report, f"worst {worst:.4f}, lead {lead:.4f}, equal blocks {equal:.5f}"]))
    assert worst <= (0.06 if same else 0.3) and lead <= (0.1 if same else 0.3) and equal >= 0.99, "\n".join(report)


def test_the_kernels_take_every_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU in Triton's interpreter, so with small blocks and few tokens: whole and cached prefills, few tokens after many one by
    one and sixteen at a time, decodes."""
    from nsa.serving.backend import NSAMetadataBuilder

    ways: set[tuple[str, int | bool]] = set()
    build = NSAMetadataBuilder.build

    def watched(self: Any, *arguments: Any, **named: Any) -> Any:
        step = build(self, *arguments, **named)
        for part in step.parts:
            decoded = hasattr(part, "seq_lens")
            ways.add(("decode", isinstance(part.rows, slice)) if decoded else ("prefill", part.whole))
        return step

    monkeypatch.setattr(NSAMetadataBuilder, "build", watched)
    monkeypatch.setattr("nsa.serving.backend.LONG_CONTEXT", 4)
    sizes = {"compress_block_size": 8, "compress_stride": 4, "select_block_size": 8, "window_size": 16, "num_hidden_layers": 1}
    model = checkpoint(tmp_path, **sizes, value_head_dim=24)
    prompts = random_prompts(1, 64, seed=14)
    prompts += [[*prompts[1], *end] for end in random_prompts(3, 17, 40, seed=15)]
    options = {"max_model_len": 128, "max_num_batched_tokens": 96, "hf_overrides": {"attention_backend": "triton"}}
    with serving(tmp_path, model, **options) as served:
        results = run(served, prompts[:2], num_tokens=2, record=True) + run(served, prompts[2:], num_tokens=2, record=True)
    assert [result.num_cached for result in results] == [0, 0, 64, 64, 64]
    assert ways == {("decode", True), ("decode", False), ("prefill", True), ("prefill", False)}
    assert_exact(model, prompts, results)


def test_bfloat16_and_pages_of_two_blocks(tmp_path: Path) -> None:
    model = checkpoint(tmp_path).to(torch.bfloat16)
    prompts = random_prompts(3, 100, 700, 1500, seed=7)
    with serving(tmp_path, model, dtype="bfloat16", max_num_batched_tokens=100, block_size=128) as served:
        assert served.vllm_model.model.layers[0].self_attn.attention.cache().page_size == 128
        assert_close(model, prompts, run(served, prompts, num_tokens=40, record=True))


def test_another_block_size_or_cache_type_is_refused(tmp_path: Path) -> None:
    checkpoint(tmp_path)
    for options, message in (
        ({"block_size": 96}, "block_size must be a multiple of select_block_size=64"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype must be 'auto'"),
        ({"tensor_parallel_size": 4}, "tensor_parallel_size must divide num_key_value_heads=2"),
    ):
        with pytest.raises(ValueError, match=message), serving(tmp_path, None, **options):  # type: ignore[arg-type]
            pass


def test_two_ranks_on_the_cpu(tmp_path: Path) -> None:
    """Heads, gates and both caches split; an odd vocabulary, so that the ranks' parts of it differ."""
    model = checkpoint(tmp_path, gate="blend", attention_bias=True, attention_output_bias=True, vocab_size=97)
    prompts = random_prompts(1, 65, 250, 900, seed=9)
    options = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp", "additional_config": {}}
    with serving(tmp_path, model, **options) as served:
        assert_exact(model, prompts, run(served, prompts, num_tokens=30))


def test_registering_twice_and_an_untested_version(monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm
    from vllm.config import CompilationConfig

    from nsa.serving import versions
    from nsa.serving.plugin import register

    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    log = logging.getLogger("vllm.nsa")
    log.addHandler(handler)
    monkeypatch.setattr(log, "disabled", False)
    monkeypatch.setattr(log, "level", logging.WARNING)
    try:
        for version in (f"{versions.TESTED[0]}+cpu", "0.99.0"):
            monkeypatch.setattr(vllm, "__version__", version)
            versions.warn_if_untested.cache_clear()
            register()
            register()
    finally:
        log.removeHandler(handler)
        versions.warn_if_untested.cache_clear()
    assert lines == [f"NSA's plugin is tested with vLLM {', '.join(versions.TESTED)}; this is 0.99.0"]
    assert CompilationConfig._attention_ops.count("vllm::nsa_sparse_attention") == 1


GRAPHS = {
    "enforce_eager": False, "compilation_config": {"cudagraph_capture_sizes": [1, 2, 4, 8]}, "gpu_memory_utilization": 0.1,
    "kv_cache_memory_bytes": 2**28,
}  # fmt: skip
"""With the cache's size given, vLLM does not measure the GPU's memory, which other processes may be using."""
GPU_SHAPE = {"hidden_size": 128, "head_dim": 64, "initializer_range": 0.08}


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("runner", "dtype", "record"), [("1", "float32", True), ("1", "bfloat16", True), ("0", "bfloat16", True), ("1", "bfloat16", False)]
)
def test_cuda_graphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runner: str, dtype: str, record: bool) -> None:
    """Both model runners (V2: 1), block choices kept in the graph; without recording, scheduling is asynchronous. After a cached prompt
    new tokens are prefilled (of `group`) and go through decode calls (of `late`)."""
    monkeypatch.setattr("nsa.serving.backend.LONG_CONTEXT", 32)
    monkeypatch.setattr("vllm.compilation.monitor.cudagraph_capturing_enabled", True)  # V1 forbids it to all later engines of a process
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", runner)
    monkeypatch.setenv("VLLM_USE_FLASHINFER_SAMPLER", "0")
    model = checkpoint(tmp_path, **GPU_SHAPE).to("cuda", getattr(torch, dtype))
    options = {**GRAPHS, "dtype": dtype, "max_num_batched_tokens": 200}
    if not record:
        options |= {"additional_config": {}, "async_scheduling": None}
    prompts = random_prompts(1, 64, 65, 700, 1500, seed=8)
    group = [[*prompts[3][:470], token] for token in range(6)]
    late = [[*prompts[4], token] for token in range(2)]
    with serving(tmp_path, model, **options) as served:
        results = [result for part in (prompts, group, late) for result in run(served, part, num_tokens=20, record=record)]
    check = assert_exact if dtype == "float32" else assert_close
    check(model, [*prompts, *group, *late], results)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
def test_two_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_FLASHINFER_SAMPLER", "0")
    model = checkpoint(tmp_path, **GPU_SHAPE, gate="blend").to("cuda")
    prompts = random_prompts(1, 65, 250, 1500, seed=9)
    with serving(tmp_path, model, **GRAPHS, tensor_parallel_size=2, additional_config={}, async_scheduling=None) as served:
        assert_exact(model, prompts, run(served, prompts, num_tokens=40), bound=1e-3)
