"""The `Engine` protocol on vLLM: groups out of single requests, weights in by name, and a word for everything that can fail.

    prompts → one request per sample (own seed; vLLM's prefix cache computes a group's prompt once) → step × K
            → new tokens: EOS, length, stop strings as in the built-in engine → group complete → Group

Knows vLLM through `Driver` alone (vllm_driver.py is the real one), so this file can be tested without it. A fault leaves
the engine refusing to work, with the first line saying what happened; loading all weights heals a load that broke off.
Leaves out where the engine runs and who sends the weights (grpo.runtime, grpo.actors).
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from transformers import PreTrainedTokenizerBase

from grpo.data_types import Completion, Group, Prompt
from grpo.errors import EngineFailed, RunFailed
from grpo.memory_plan import size
from grpo.rollout.engine import Sampling
from grpo.rollout.requests import check_prompts, check_sequence
from grpo.rollout.stops import StopStrings, TokenPieces, decode
from grpo.rollout.watchdog import Watchdog
from grpo.rollout.weights import WeightError
from grpo.seeding import fold
from grpo.weight_sync import PIECE_BYTES
from nsa.config import NSAConfig

if TYPE_CHECKING:
    from grpo.rollout.vllm_driver import Progress
    from grpo.transfer import GroupAddress, TensorInfo

_T = TypeVar("_T")
_TEMPERATURES = (0.01, 2.0)
"""What vLLM samples at, besides 0; it would change a lower value on its own."""
_RECOMPUTE = -2


class Driver(Protocol):
    """What the engine asks of vLLM; see `VllmDriver`."""

    def submit(self, request_id: str, token_ids: Sequence[int], sampling: Sampling, *, seed: int, eos_ids: Sequence[int]) -> None: ...
    def submit_score(self, request_id: str, token_ids: Sequence[int]) -> None: ...
    def step(self) -> list[Progress]: ...
    def forget(self, request_ids: Sequence[str], *, abort: bool) -> None: ...
    def read_selection(self, request_id: str, num_tokens: int) -> torch.Tensor: ...
    def call(self, method: str, *arguments: Any) -> list[Any]: ...
    def reset_prefix_cache(self) -> bool: ...
    def sleep(self) -> None: ...
    def wake(self, what: str) -> None: ...
    def cache_tokens(self) -> int: ...
    def close(self) -> None: ...


@dataclass(slots=True, eq=False)
class _GroupState:
    """A group on its way."""

    prompt: Prompt
    completions: dict[int, Completion] = field(default_factory=dict)
    prompt_selection: torch.Tensor | None = None


@dataclass(slots=True, eq=False)
class _Sample:
    """One running request."""

    group: _GroupState
    index: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class VllmEngine:
    """See `Engine`.

    Args:
        driver: a running vLLM with the weights of version 0.
        tokenizer: turns completions into text.
        config: the model's.
        eos_ids: tokens that end a sample.
        context: longest sequence (vLLM's, at most the model's).
        max_sequences: samples decoded at the same time.
        sleeps: `sleep` gives the GPU's memory back (else it only forgets cached prompts).
        records_selection: vLLM was started with the buffers for it.
        in_process: vLLM's worker lives here, so tensors need not be serialised.
        stall_deadline_s: longest time without a new token, and longest single call into vLLM.
    """

    def __init__(
        self, driver: Driver, tokenizer: PreTrainedTokenizerBase, config: NSAConfig, *, eos_ids: Sequence[int], context: int, max_sequences: int,
        sleeps: bool = False, records_selection: bool = False, in_process: bool = True, stall_deadline_s: float = 300.0,
    ) -> None:  # fmt: skip
        self.config, self.tokenizer = config, tokenizer
        self._driver, self._eos_ids, self._context, self._max_sequences = driver, frozenset(eos_ids), context, max_sequences
        self._sleeps, self._records, self._in_process, self._stall_deadline_s = sleeps, records_selection, in_process, stall_deadline_s
        self.watchdog = Watchdog(stall_deadline_s, "rollout.stall_deadline_s")
        self._pieces: TokenPieces | None = None
        self._version = self._requests = self._tokens_made = self._cached_tokens = 0
        self._running: dict[str, _Sample] = {}
        self._weights_asleep = self._cache_asleep = self._generating = self._half_loaded = self._closed = False
        self._cache_bytes = 0
        self._progress_at = 0.0
        self._fault: str | None = None

    # Sampling

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[Group]:
        """See `Engine.generate`. Everything is checked before the first token.

        Raises:
            ValueError: unusable prompts or settings.
            EngineFailed: vLLM failed or stalled; or a request is in progress, or the engine is asleep, closed or half loaded.
        """
        self._check_ready()
        check_prompts(prompts, max_tokens=sampling.max_tokens, context=self._context, vocabulary=self.config.vocab_size)
        low, high = _TEMPERATURES
        if sampling.temperature != 0 and not low <= sampling.temperature <= high:
            raise ValueError(f"vLLM samples at temperatures from {low} to {high} and at 0, got {sampling.temperature}")
        if sampling.record_selection and not self._records:
            raise ValueError("block choices are not recorded by this engine: with vLLM that is decided at the start (algorithm.selection: replay)")
        if self._pieces is None and sampling.stop:
            self._pieces = TokenPieces(self.tokenizer, self.config.vocab_size)
        return self._groups(prompts, sampling, StopStrings(sampling.stop, self._pieces))

    def _groups(self, prompts: Sequence[Prompt], sampling: Sampling, stops: StopStrings) -> Iterator[Group]:
        self._check_ready()
        waiting = deque((group, index) for group in map(_GroupState, prompts) for index in range(sampling.group_size))
        at_once = self._max_sequences + sampling.group_size  # vLLM always has the next one at hand
        self._generating = True
        self._progress_at = time.monotonic()
        try:
            while waiting or self._running:
                while waiting and len(self._running) < at_once:
                    self._submit(*waiting.popleft(), sampling)
                complete = [group for report in self._step("generate") if (group := self._take(report, sampling, stops))]
                for group in complete:
                    yield group
                    self._check_alive()
                    self._progress_at = time.monotonic()
        finally:
            self._generating = False
            self._abandon()

    def _step(self, what: str) -> list[Progress]:
        """One step of vLLM; a row of steps without any report is a stall."""
        reports = self._guarded(what, self._driver.step)
        if reports:
            self._progress_at = time.monotonic()
        elif time.monotonic() - self._progress_at > self._stall_deadline_s:
            raise self._failure(f"vLLM stalls: {what} gave nothing for {self._stall_deadline_s:g} s (rollout.stall_deadline_s)")
        return reports

    def _submit(self, group: _GroupState, index: int, sampling: Sampling) -> None:
        request_id = f"{self._requests}"
        self._requests += 1
        self._running[request_id] = _Sample(group, index)
        seed = fold(sampling.seed, group.prompt.prompt_id, index)
        self._guarded("submit", lambda: self._driver.submit(request_id, group.prompt.token_ids, sampling, seed=seed, eos_ids=sorted(self._eos_ids)))

    def _take(self, report: Progress, sampling: Sampling, stops: StopStrings) -> Group | None:
        """Add what is new of one sample. Returns its group where that completes it."""
        sample = self._running.get(report.request_id)
        if sample is None:  # ended by a stop string, and vLLM had a step under way
            return None
        looked = len(sample.token_ids)
        sample.token_ids += report.token_ids
        sample.logprobs += report.logprobs
        if len(sample.logprobs) != len(sample.token_ids):
            raise self._failure(f"vLLM gave {len(sample.logprobs)} log-probabilities for {len(sample.token_ids)} tokens")
        end = stops.first_end(sample.token_ids, looked)
        if end is None and report.finish is None:
            return None
        if report.finish not in (None, "stop", "length"):
            raise self._failure(f"vLLM ended a sample with {report.finish!r}")
        length = len(sample.token_ids) if end is None else end
        completion = self._completion(report.request_id, sample, length, sampling, stopped=end is not None)
        self._driver.forget([report.request_id], abort=report.finish is None)
        del self._running[report.request_id]
        self._tokens_made += length
        self._cached_tokens += report.cached_tokens
        group = sample.group
        group.completions[sample.index] = completion
        if len(group.completions) < sampling.group_size:
            return None
        completions = tuple(group.completions[index] for index in range(sampling.group_size))
        return Group(prompt=group.prompt, completions=completions, prompt_selection=group.prompt_selection)

    def _completion(self, request_id: str, sample: _Sample, length: int, sampling: Sampling, *, stopped: bool) -> Completion:
        token_ids, logprobs = tuple(sample.token_ids[:length]), tuple(sample.logprobs[:length])
        prompt = sample.group.prompt
        if not all(map(math.isfinite, logprobs)):
            raise self._failure(f"the policy gave log-probabilities that are not finite for prompt {prompt.prompt_id!r}: look at its weights")
        selection = None
        if sampling.record_selection:
            rows = self._guarded("read_selection", lambda: self._driver.read_selection(request_id, len(prompt.token_ids) + length))
            sample.group.prompt_selection = rows[: len(prompt.token_ids)].clone()
            selection = rows[len(prompt.token_ids) :].clone()
            selection[-1] = _RECOMPUTE  # whether the last token was fed depends on the batch
        return Completion(
            token_ids=token_ids,
            logprobs=logprobs,
            text=decode(self.tokenizer, token_ids),
            finish_reason="stop" if stopped or token_ids[-1] in self._eos_ids else "length",
            policy_version=self._version,
            selection=selection,
        )

    def _abandon(self) -> None:
        """Drop every request that still runs."""
        running, self._running = list(self._running), {}
        if running and self._fault is None and not self._closed:
            self._guarded("abort", lambda: self._driver.forget(running, abort=True))

    def score(self, sequences: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """See `Engine.score`; the engine must be awake, and a sequence one token shorter than the context.

        Raises:
            ValueError: a sequence that is too long, or ids outside the vocabulary.
            EngineFailed: as `generate`.
        """
        self._check_ready()
        for number, sequence in enumerate(sequences):
            check_sequence(sequence, f"sequence {number}", context=self._context - 1, vocabulary=self.config.vocab_size)
        results = [torch.zeros(len(sequence)) for sequence in sequences]
        pending = {f"score-{number}": number for number, sequence in enumerate(sequences) if len(sequence) > 1}
        self._progress_at = time.monotonic()
        try:
            for request_id, number in pending.items():
                self._guarded("submit", lambda i=request_id, n=number: self._driver.submit_score(i, sequences[n]))
            while pending:
                for report in self._step("score"):
                    number = pending[report.request_id]
                    if report.prompt_logprobs:
                        results[number] = torch.tensor(list(report.prompt_logprobs), dtype=torch.float32)
                    if report.finish is not None:
                        del pending[report.request_id]
                        self._driver.forget([report.request_id], abort=False)
        finally:
            if pending and self._fault is None:
                self._driver.forget(list(pending), abort=True)
        return results

    # Weights

    def load_weights(self, version: int, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """See `Engine.load_weights`; forgets cached prompts. An engine that sleeps takes back the weights' memory for it.

        Raises:
            ValueError: unknown or missing names, other shapes. The engine then refuses to work until a load succeeds.
            EngineFailed: a request is in progress, or vLLM failed.
        """
        with self._loading(version):
            for parcel in self._parcels(named_tensors):
                self._load("nsa_load", parcel)

    def join_group(self, address: GroupAddress) -> None:
        """Have every rank join the group that weights are broadcast in: this engine's ranks are 1, 2, …"""
        self._call("join_group", "nsa_join", address)

    def receive_weights(self, version: int, infos: Sequence[TensorInfo]) -> None:
        """As `load_weights`, with what the group's rank 0 sends at the same time."""
        with self._loading(version):
            self._load("nsa_receive", infos)

    @contextlib.contextmanager
    def _loading(self, version: int) -> Iterator[None]:
        """Around everything that brings weights in; an error inside leaves the engine half loaded."""
        self._check_idle("load_weights")
        self._check_fault()
        if self._weights_asleep:
            self._guarded("wake", lambda: self._driver.wake("weights"))
            self._weights_asleep = False
        self._half_loaded = True
        self._load("nsa_begin_load")
        yield
        self._load("nsa_end_load")
        self._forget_prompts()
        self._half_loaded = False
        self._version = version

    def _load(self, method: str, *arguments: Any) -> None:
        for fault in self._call("load_weights", method, *arguments):
            if fault is not None:
                raise WeightError(fault)

    def _parcels(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[list[tuple[str, torch.Tensor]]]:
        """Tensors one by one where the worker is here; else on the CPU, a few MiB at a time."""
        if self._in_process:
            for named in named_tensors:
                yield [named]
            return
        parcel: list[tuple[str, torch.Tensor]] = []
        room = PIECE_BYTES
        for name, tensor in named_tensors:
            tensor = tensor.detach().cpu()
            if parcel and tensor.nbytes > room:
                yield parcel
                parcel, room = [], PIECE_BYTES
            parcel.append((name, tensor))
            room -= tensor.nbytes
        if parcel:
            yield parcel

    def _forget_prompts(self) -> None:
        if not self._guarded("reset_prefix_cache", self._driver.reset_prefix_cache):
            raise self._failure("vLLM kept prompts that were computed with the old weights (reset_prefix_cache refused)")

    def checksum(self) -> int:
        """`weight_sync.checksum` of the weights in use, over the memory that vLLM reads."""
        self._check_alive()
        sums = set(self._call("checksum", "nsa_checksum"))
        if len(sums) != 1:
            raise self._failure(f"the tensor-parallel ranks hold different weights: checksums {', '.join(f'{one:#x}' for one in sorted(sums))}")
        return sums.pop()

    # Life cycle

    def records_selection(self) -> bool:
        """Whether a request may ask for block choices: where vLLM was started with the buffers for it."""
        return self._records

    def on_hang(self, rescue: Callable[[], None]) -> None:
        """What the watchdog does before it ends this process, when a call into vLLM passes its deadline."""
        self.watchdog.last_action = rescue

    def sleep(self) -> None:
        """Forget cached prompts, and where the GPU is shared give back weights' and cache's memory: `load_weights` fills the
        weights anew. Does nothing on an engine that sleeps."""
        self._check_idle("sleep")
        self._check_alive()
        if self._cache_asleep:
            return
        self._forget_prompts()
        if self._sleeps:
            before = self._free_memory()
            self._guarded("sleep", self._driver.sleep)
            self._cache_bytes = max(0, self._free_memory() - before - max(self._call("memory", "nsa_weight_bytes")))
            self._weights_asleep = True
        self._cache_asleep = True

    def wake(self) -> None:
        """Take the cache's memory back.

        Raises:
            EngineFailed: there is no memory for it (nothing is touched then: it can be tried again), or vLLM failed.
        """
        self._check_idle("wake")
        self._check_fault()
        if self._weights_asleep:
            raise EngineFailed("wake: vLLM gave its weights away when it went to sleep; call load_weights first")
        if self._cache_asleep and self._sleeps:
            self._check_room()
            self._guarded("wake", lambda: self._driver.wake("kv_cache"))
            self._call("wake", "nsa_zero_cache")
        self._cache_asleep = False

    def _check_room(self) -> None:
        """Refuse to wake up into a full GPU: once mapping memory has failed half way, vLLM cannot be used any more."""
        if self._cache_bytes > self._free_memory() and torch.cuda.is_available():
            torch.cuda.empty_cache()
        free = self._free_memory()
        if self._cache_bytes > free:
            raise EngineFailed(
                f"out of memory at wake-up: vLLM's cache needs {size(self._cache_bytes)} and {size(free)} of the GPU are free; lower "
                "rollout.gpu_share or rollout.max_cache_tokens, or optimizer.micro_batch_tokens where the learner is on the same GPU"
            )

    def _free_memory(self) -> int:
        """The least free memory of the ranks' GPUs."""
        return min(self._call("memory", "nsa_free_memory"))

    def health(self) -> dict[str, float]:
        """Version, cache size, running samples and totals. Raises EngineFailed where the engine can no longer work."""
        self._check_alive()
        return {
            "version": float(self._version),
            "cache_tokens": float(self._driver.cache_tokens()),
            "max_sequences": float(self._max_sequences),
            "running_sequences": float(len(self._running)),
            "tokens_made": float(self._tokens_made),
            "prompt_tokens_cached": float(self._cached_tokens),
            "asleep": float(self._cache_asleep),
        }

    def close(self) -> None:
        """Stop vLLM; a request in progress ends with an error when it is asked for its next group."""
        if not self._closed:
            self._closed = True
            self._driver.close()

    # Faults

    def _call(self, what: str, method: str, *arguments: Any) -> list[Any]:
        return self._guarded(what, lambda: self._driver.call(method, *arguments))

    def _guarded(self, what: str, work: Callable[[], _T]) -> _T:
        """Run a call into vLLM under the watchdog; whatever it raises ends the engine, as vLLM's state is unknown then."""
        try:
            with self.watchdog.watch(what):
                return work()
        except RunFailed as error:  # the watchdog's, or of weights on their way
            raise self._failure(str(error)) from error
        except Exception as error:
            if "out of memory" in str(error).lower():
                advice = "lower rollout.gpu_share, rollout.max_sequences or optimizer.micro_batch_tokens"
                raise self._failure(f"vLLM ran out of memory in {what}; {advice}") from error
            raise self._failure(f"vLLM failed in {what} with {type(error).__name__}: {' '.join(str(error).split())[:300]}") from error

    def _failure(self, message: str) -> EngineFailed:
        self._fault = message
        return EngineFailed(message)

    def _check_fault(self) -> None:
        if self._fault is not None:
            raise EngineFailed(f"the engine cannot work any more: {self._fault}")

    def _check_alive(self) -> None:
        if self._closed:
            raise EngineFailed("the engine is closed")
        self._check_fault()
        if self._half_loaded:
            raise EngineFailed("the engine cannot work: its weights were loaded in part; call load_weights with all of them")

    def _check_idle(self, action: str) -> None:
        if self._closed:
            raise EngineFailed("the engine is closed")
        if self._generating:
            raise EngineFailed(f"{action} while a request is in progress: finish or close its iterator first")

    def _check_ready(self) -> None:
        self._check_alive()
        self._check_idle("generate")
        if self._cache_asleep:
            raise EngineFailed("the engine is asleep: call wake() first")
