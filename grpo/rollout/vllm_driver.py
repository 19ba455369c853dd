# pyright: reportMissingImports=false
"""vLLM itself, behind the few calls that our engine makes. With vllm_worker.py the only module of grpo that imports vllm.

`LLMEngine` runs in this process (its workers too, unless tensor parallelism needs several), and we step it ourselves: a
group can then be handed on when it is finished, and nothing is serialised between us and the scheduler. Requests are
token ids in, token ids and log-probabilities out; text and stop strings are ours. Leaves out groups, versions, faults.
"""

from __future__ import annotations

import os

os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # the learner's threads live in this process too
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine.llm_engine import LLMEngine

from grpo.rollout.engine import Sampling
from grpo.rollout.vllm_settings import VllmSettings

STEPS_PER_LOOK = 8
"""vLLM reports a running request's new tokens every so many steps: building a report costs the host more than a token does."""
_DRAIN_STEPS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """What came of one request since the last report. `finish` is vLLM's word for its end, None while it runs."""

    request_id: str
    token_ids: Sequence[int]
    logprobs: Sequence[float]
    finish: str | None
    prompt_logprobs: Sequence[float] = ()
    """Of a scored prompt's tokens given those before; entry 0 is 0."""
    cached_tokens: int = 0
    """Of its prompt, found in the cache and not computed."""


class VllmDriver:
    """A running vLLM engine.

    Raises:
        ValueError: vLLM's build is for another device, or it refuses the settings.
    """

    def __init__(self, settings: VllmSettings) -> None:
        if current_platform.device_type != settings.device:
            raise ValueError(f"the vLLM that is installed runs on {current_platform.device_type!r}, model.device is {settings.device!r}")
        self._recording = settings.records_selection
        set_num_threads = torch.set_num_threads  # vLLM's CPU worker replaces it
        try:
            self._engine = LLMEngine.from_engine_args(EngineArgs(**_engine_arguments(settings)), usage_context=UsageContext.LLM_CLASS)
        finally:
            torch.set_num_threads = set_num_threads
        self._internal_ids: dict[str, str] = {}

    # Requests

    def submit(self, request_id: str, token_ids: Sequence[int], sampling: Sampling, *, seed: int, eos_ids: Sequence[int]) -> None:
        """Start a sample with its own seed (63 bits)."""
        parameters = SamplingParams(
            temperature=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k, max_tokens=sampling.max_tokens, seed=seed,
            ignore_eos=True, stop_token_ids=list(eos_ids), logprobs=0, flat_logprobs=True, detokenize=False,
            output_kind=RequestOutputKind.DELTA, skip_clone=True,
        )  # fmt: skip
        self._add(request_id, token_ids, parameters)

    def submit_score(self, request_id: str, token_ids: Sequence[int]) -> None:
        """Ask for the log-probabilities of a prompt's own tokens, computed anew (no cached prefix is read)."""
        parameters = SamplingParams(
            temperature=0.0, max_tokens=1, ignore_eos=True, prompt_logprobs=0, flat_logprobs=True, detokenize=False,
            output_kind=RequestOutputKind.DELTA, skip_clone=True,
        )  # fmt: skip
        self._add(request_id, token_ids, parameters)

    def _add(self, request_id: str, token_ids: Sequence[int], parameters: SamplingParams) -> None:
        prompt: Any = {"type": "token", "prompt_token_ids": list(token_ids)}
        self._internal_ids[request_id] = self._engine.add_request(request_id, prompt, parameters)

    def step(self) -> list[Progress]:
        """Run the model once over what is scheduled. [] while nothing is due for a report."""
        reports = []
        for output in self._engine.step():
            (completion,) = output.outputs
            reports.append(
                Progress(
                    request_id=output.request_id,
                    token_ids=completion.token_ids,
                    logprobs=_values(completion.logprobs),
                    finish=completion.finish_reason,
                    prompt_logprobs=_values(output.prompt_logprobs),
                    cached_tokens=output.num_cached_tokens or 0,
                )
            )
        return reports

    def forget(self, request_ids: Sequence[str], *, abort: bool) -> None:
        """Drop what is kept of these requests; `abort` those that still run."""
        if abort:
            self._engine.abort_request(list(request_ids))
        for request_id in request_ids:
            self._internal_ids.pop(request_id, None)

    def read_selection(self, request_id: str, num_tokens: int) -> torch.Tensor:
        """Block choices `[num_tokens, layers, Hkv, n]` (CPU) of a request, right after the step that finished it."""
        parts = self.call("nsa_read_selection", self._internal_ids[request_id], num_tokens)
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)  # ranks hold KV heads

    # Weights, memory

    def call(self, method: str, *arguments: Any) -> list[Any]:
        """A method of `WeightAccess` on every rank; their results."""
        return self._engine.collective_rpc(method, args=arguments)

    def reset_prefix_cache(self) -> bool:
        """Forget all cached prompts; False where a request still holds pages."""
        self._drain()
        return self._engine.reset_prefix_cache()

    def sleep(self) -> None:
        """Give back weights' and cache's memory; both are lost."""
        self._drain()
        self._engine.sleep(level=2)

    def wake(self, what: str) -> None:
        """Take back the memory of `weights` or `kv_cache`."""
        self._engine.wake_up([what])

    def cache_tokens(self) -> int:
        """Tokens that the cache holds."""
        cache = self._engine.vllm_config.cache_config
        return (cache.num_gpu_blocks or 0) * cache.block_size

    def close(self) -> None:
        self._engine.engine_core.shutdown()

    def _drain(self) -> None:
        """With asynchronous scheduling a step of aborted requests may still be under way."""
        core: Any = self._engine.engine_core
        for _ in range(_DRAIN_STEPS):
            if not getattr(core.engine_core, "batch_queue", None):
                return
            self._engine.step()


def _engine_arguments(settings: VllmSettings) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "model": settings.model_path,
        "dtype": settings.dtype,
        "max_model_len": settings.context,
        "max_num_seqs": settings.max_sequences,
        "gpu_memory_utilization": settings.gpu_share,
        "kv_cache_memory_bytes": settings.cache_bytes,
        "tensor_parallel_size": settings.tensor_parallel,
        "distributed_executor_backend": "uni" if settings.tensor_parallel == 1 else "mp",  # never Ray's, though an actor may hold us
        "enable_prefix_caching": True,
        "enforce_eager": not settings.cuda_graphs or settings.device == "cpu",  # compiling takes longer there than a run of tests
        "logprobs_mode": "processed_logprobs",
        "generation_config": "vllm",  # sampling settings come from the request alone
        "stream_interval": STEPS_PER_LOOK,
        "skip_tokenizer_init": True,
        "enable_sleep_mode": settings.sleeps and settings.device == "cuda",
        "worker_extension_cls": "grpo.rollout.vllm_worker.WeightAccess",
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        "additional_config": {"nsa_record_selection": settings.records_selection},
    }
    if settings.records_selection:
        arguments["async_scheduling"] = False  # a finished request's pages must be whole until they are read
    if settings.attention_backend != "auto":
        arguments["hf_overrides"] = {"attention_backend": settings.attention_backend}
    return arguments


def _values(logprobs: Any) -> list[float]:
    """The first value of every position of a FlatLogprobs (the token's own); 0 where a position has none."""
    if not logprobs:
        return []
    return [logprobs.logprobs[start] if start < end else 0.0 for start, end in zip(logprobs.start_indices, logprobs.end_indices, strict=True)]
