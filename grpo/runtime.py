"""The parts of a run (rollout, reward, learner) and the runtime that holds them: one process here, Ray in grpo.actors.

    runtime.engine    an Engine, and the checksum of its weights
    runtime.scorer    groups in, (group, scores) out
    runtime.learner   step, weights, save, load

The trainer sees these three handles and never where they run. `LocalRuntime` is for debugging and for machines without
room for processes: the same classes, called directly. Leaves out the order of things (grpo.trainer).
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch

from grpo.actor_host import FAILED_REWARDS
from grpo.config import RunConfig
from grpo.data_types import Group, Prompt, Score, ScoredGroup, StepStats
from grpo.errors import RunFailed
from grpo.placement import sleeps
from grpo.rollout.engine import Engine, Sampling
from grpo.scoring import Scorer
from grpo.seeding import fold, seed_everything
from grpo.transfer import GroupAddress, Place, SharedTensor, TensorInfo, WeightGroup, describe, open_shared, open_store, own_place, share
from grpo.weight_sync import checksum

if TYPE_CHECKING:
    from grpo.rollout.torch_engine import TorchEngine
    from grpo.rollout.vllm_engine import VllmEngine

OPTIMIZER_FILE = "optimizer.pt"


class EngineHandle(Engine, Protocol):
    """An engine that can say which weights it holds and whether it records block choices."""

    def checksum(self) -> int:
        """`weight_sync.checksum` of the weights in use."""
        ...

    def records_selection(self) -> bool:
        """Whether a request may ask for block choices (`Sampling.record_selection`)."""
        ...


class ScorerHandle(Protocol):
    def score(self, groups: Iterable[Group]) -> Iterator[tuple[Group, tuple[Score, ...]]]:
        """Every group with one Score per completion; scoring goes on while the next group is drawn from `groups`."""
        ...

    def metrics(self) -> dict[str, float]:
        """Counts since the last call (timeouts, failures, samples left out)."""
        ...


class LearnerHandle(Protocol):
    @property
    def policy_version(self) -> int: ...

    def step(self, scored_groups: Sequence[ScoredGroup]) -> StepStats: ...

    def weights(self) -> Iterable[tuple[str, torch.Tensor]]: ...

    def checksum(self) -> int:
        """`weight_sync.checksum` of the weights in the sampler's dtype."""
        ...

    def score(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Log-probabilities `[L]` of one sequence's tokens, as the policy is now; entry 0 is 0."""
        ...

    def save(self, folder: Path) -> None:
        """Model files, tokenizer left out, and optimizer.pt."""
        ...

    def load(self, folder: Path) -> None:
        """Continue from what `save` wrote."""
        ...


class Runtime(Protocol):
    """Three handles; `close` stops everything that was started for them and may be called twice."""

    @property
    def engine(self) -> EngineHandle: ...

    @property
    def scorer(self) -> ScorerHandle: ...

    @property
    def learner(self) -> LearnerHandle: ...

    def on_hang(self, rescue: Callable[[], None]) -> None:
        """What to do before this very process has to end because a call does not come back."""
        ...

    def close(self) -> None: ...


def start_runtime(config: RunConfig, run_dir: Path) -> Runtime:
    """The runtime that `config.runtime.kind` names, with its parts built."""
    if config.runtime.kind == "local":
        return LocalRuntime(config, run_dir)
    from grpo.actors import RayRuntime

    return RayRuntime(config, run_dir)


def use_threads(config: RunConfig) -> None:
    """`runtime.threads`, else all cores: Ray gives a process one OpenMP thread."""
    torch.set_num_threads(config.runtime.threads or len(os.sched_getaffinity(0)))


def build_engine(config: RunConfig) -> TorchEngine | VllmEngine:
    """The sampler of a run, with the weights of `config.model.path` as version 0.

    Raises:
        ValueError: no GPU where one is asked for; vLLM is asked for and missing or built for another device.
    """
    from grpo.learner import resolve_device

    device = resolve_device(config.model.device)
    if config.rollout.engine == "vllm":
        return _build_vllm(config, device)
    from transformers import AutoTokenizer

    from grpo.learner import load_policy
    from grpo.rollout.torch_engine import TorchEngine

    model: Any = load_policy(config)
    if config.model.attention_backend != "auto":
        model.config.attention_backend = config.model.attention_backend
    return TorchEngine(
        model,
        AutoTokenizer.from_pretrained(config.model.path),
        max_sequences=config.rollout.max_sequences,
        max_cache_tokens=config.rollout.max_cache_tokens,
        device=device,
        dtype=getattr(torch, config.model.dtype),
        cuda_graphs=config.rollout.cuda_graphs,
    )


def _build_vllm(config: RunConfig, device: torch.device) -> VllmEngine:
    from grpo.rollout.vllm_settings import vllm_settings

    gpu_bytes = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    settings = vllm_settings(config, device.type, gpu_bytes)
    from grpo.rollout.vllm_start import start_vllm

    return start_vllm(settings)


class RolloutPart:
    """The engine of a run, and its end of the ways that weights come."""

    def __init__(self, config: RunConfig) -> None:
        from grpo.learner import resolve_device

        self._engine = build_engine(config)
        self._device, self._num_gpus = resolve_device(config.model.device), config.rollout.tensor_parallel
        self._shared: list[tuple[str, torch.Tensor]] = []

    def on_hang(self, rescue: Callable[[], None]) -> None:
        self._engine.on_hang(rescue)

    def place(self) -> Place:
        return own_place(self._device, self._num_gpus)

    def open_shared(self, shared: Sequence[SharedTensor]) -> None:
        """Keep the learner's parameters open; they stay where they are while it trains."""
        self._shared = open_shared(shared, self._device)

    def load_shared(self, version: int) -> None:
        """Copy what the learner shares, which stands still meanwhile."""
        self._engine.load_weights(version, iter(self._shared))
        torch.cuda.synchronize()

    def join_group(self, address: GroupAddress) -> None:
        self._engine.join_group(address)

    def load_broadcast(self, version: int, infos: Sequence[TensorInfo]) -> None:
        """Receive what the learner sends at the same time."""
        self._engine.receive_weights(version, infos)

    def records_selection(self) -> bool:
        return self._engine.records_selection()

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[Group]:
        return self._engine.generate(prompts, sampling)

    def score(self, sequences: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        return self._engine.score(sequences)

    def load_weights(self, version: int, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        self._engine.load_weights(version, named_tensors)

    def checksum(self) -> int:
        return self._engine.checksum()

    def sleep(self) -> None:
        self._engine.sleep()

    def wake(self) -> None:
        self._engine.wake()

    def health(self) -> dict[str, float]:
        return self._engine.health()

    def close(self) -> None:
        self._engine.close()


class LearnerPart:
    """A learner and its files."""

    def __init__(self, config: RunConfig) -> None:
        from grpo.learner import Learner

        seed_everything(fold(config.train.seed, "learner"))
        self._learner = Learner(config)
        self._sampler_dtype = getattr(torch, config.model.dtype)
        self._shared_pointers: list[int] = []
        self._store: Any = None
        self._group: WeightGroup | None = None
        self._gives_memory_back = sleeps(config) and torch.cuda.is_available()

    @property
    def policy_version(self) -> int:
        return self._learner.policy_version

    def version(self) -> int:
        return self._learner.policy_version

    def step(self, scored_groups: Sequence[ScoredGroup]) -> StepStats:
        from grpo.truths import LearnerError

        try:
            return self._learner.step(scored_groups)
        except LearnerError as error:
            raise RunFailed(str(error)) from error
        finally:
            if self._gives_memory_back:
                torch.cuda.empty_cache()

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        return self._learner.weights()

    def sampler_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The weights in the sampler's dtype."""
        return ((name, tensor.to(self._sampler_dtype)) for name, tensor in self._learner.weights())

    def place(self) -> Place:
        return own_place(self._learner.device)

    def share(self) -> list[SharedTensor] | None:
        """Handles of the parameters for a process on the same GPU; None where those that were given out last still hold."""
        torch.cuda.synchronize()
        pointers = [tensor.data_ptr() for _, tensor in self._learner.weights()]
        if pointers == self._shared_pointers:
            return None
        self._shared_pointers = pointers
        return share(self._learner.weights())

    def open_group(self, size: int, backend: Literal["nccl", "gloo"], deadline_s: float, one_host: bool) -> GroupAddress:
        """Where the sampler's ranks find the group; `join_group` has to follow, at the same time as theirs."""
        host = "127.0.0.1" if one_host else socket.gethostbyname(socket.gethostname())
        self._store, address = open_store(host, size, deadline_s, backend)
        return address

    def join_group(self, address: GroupAddress) -> None:
        self._group = WeightGroup(address, 0, self._learner.device, self._store)

    def describe(self) -> list[TensorInfo]:
        """What `send` sends."""
        return describe(self._learner.weights(), self._sampler_dtype)

    def send(self, infos: Sequence[TensorInfo]) -> None:
        """Broadcast the weights to the sampler's ranks, which receive them at the same time."""
        assert self._group is not None
        self._group.send(self._learner.weights(), infos)

    def checksum(self) -> int:
        return checksum(self.sampler_weights())

    def score(self, token_ids: Sequence[int]) -> torch.Tensor:
        return self._learner.score(token_ids)

    def save(self, folder: Path) -> None:
        self._learner.save_model(folder)
        torch.save(self._learner.state_dict(), folder / OPTIMIZER_FILE)

    def load(self, folder: Path) -> None:
        self._learner.load_state_dict(torch.load(folder / OPTIMIZER_FILE, weights_only=True, map_location="cpu"), folder)


class LocalRuntime:
    """All parts in this process."""

    def __init__(self, config: RunConfig, run_dir: Path) -> None:
        if config.runtime.threads is not None:
            torch.set_num_threads(config.runtime.threads)
        self.scorer = Scorer(config.rewards, prefilled=config.prompt.prefill_think, save_dir=run_dir / FAILED_REWARDS)
        try:
            self.engine = RolloutPart(config)
            self.learner = LearnerPart(config)
        except BaseException:
            self.scorer.close()
            raise

    def on_hang(self, rescue: Callable[[], None]) -> None:
        self.engine.on_hang(rescue)

    def close(self) -> None:
        self.scorer.close()
        self.engine.close()
