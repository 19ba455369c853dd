"""Rollout, reward and learner as Ray actors, behind the same three handles that the local runtime has.

    trainer ── RayEngine ──▶ RolloutActor ── groups, streamed one by one ──▶ trainer
            ── RayScorer ──▶ RewardActor      (text and token ids only)
            ── RayLearner ─▶ LearnerActor ── weights, in pieces, straight ──▶ RolloutActor

Actors hold the classes of grpo.runtime and add three things: faults and log records travel as values in a `Reply`, every
wait of the trainer has a deadline and a named owner, and whatever was started is gone when `close` returns. An
instance of our own has no dashboard, its own folder, and does not see other Ray instances; with runtime.address or
RAY_ADDRESS the actors join that cluster instead (which must see the same paths). Leaves out restarting dead actors.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 makes a run crawl wherever anything else runs

import ray
import ray.exceptions

from grpo import processes
from grpo.actor_host import FAILED_REWARDS, Host, Identity, Reply
from grpo.config import RunConfig
from grpo.data_types import Group, Prompt, Score, ScoredGroup, StepStats
from grpo.errors import ActorFailed, RunFailed
from grpo.placement import cluster_address, gpu_shares, knock, shares_gpu
from grpo.rollout.engine import Sampling

if TYPE_CHECKING:  # the reward actor imports this module and does without torch
    import torch

    from grpo.transfer import TensorInfo, Transport

OBJECT_STORE_BYTES = {"recompute": 256 * 2**20, "replay": 2 * 2**30}
"""Shared memory of an instance of our own: groups, scores, a few pieces of the weights at a time, recorded selections."""
_CLOSE_DEADLINE_S = 5.0

logger = logging.getLogger(__name__)


@ray.remote
class RolloutActor(Host):
    """The engine in a process of its own."""

    def _build(self, config: RunConfig, run_dir: Path) -> Any:
        from grpo.runtime import RolloutPart, use_threads

        use_threads(config)
        return RolloutPart(config)

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[Reply]:
        yield from self._stream(lambda: self._part.generate(prompts, sampling))

    def load_from(self, version: int, learner: Any) -> Reply:
        """Pull the weights from the learner actor, a few pieces at a time."""
        from grpo.weight_sync import unpack

        def parcels() -> Iterator[Any]:
            for reference in learner.stream_weights.options(num_returns="streaming", _generator_backpressure_num_objects=2).remote():
                reply: Any = ray.get(reference)
                if reply.failure is not None:
                    raise RuntimeError(f"the learner could not send its weights: {reply.failure.summary}\n{reply.failure.trace}")
                yield reply.value

        return self._reply(lambda: self._part.load_weights(version, unpack(parcels())))


@ray.remote(max_concurrency=64)  # type: ignore[call-overload] (ray types the form without arguments only)
class RewardActor(Host):
    """The scorer and its killable workers in a process without torch.

    Many groups at a time: one whose function hangs must not keep the others waiting while workers stand idle."""

    def _build(self, config: RunConfig, run_dir: Path) -> Any:
        from grpo.scoring import Scorer

        return Scorer(config.rewards, prefilled=config.prompt.prefill_think, save_dir=run_dir / FAILED_REWARDS)

    def score(self, group: Group) -> Reply:
        return self._reply(lambda: next(iter(self._part.score([group])))[1])


@ray.remote
class LearnerActor(Host):
    """The learner in a process of its own."""

    def _build(self, config: RunConfig, run_dir: Path) -> Any:
        from grpo.runtime import LearnerPart, use_threads

        use_threads(config)
        return LearnerPart(config)

    def stream_weights(self) -> Iterator[Reply]:
        from grpo.weight_sync import pack

        yield from self._stream(lambda: pack(self._part.sampler_weights()))


class ActorHandle:
    """One actor as the trainer sees it: every call waits with a deadline, every fault names the owner."""

    def __init__(self, owner: str, actor: Any, *, deadline_s: float, deadline_key: str) -> None:
        self.owner = owner
        self.actor = actor
        self.deadline_s = deadline_s
        self.deadline_key = deadline_key
        self.identity: Identity | None = None
        self.stack_file: Path | None = None
        self._last_rss_mb: float | None = None

    def call(self, method: str, *arguments: Any) -> Any:
        return self.result(self.actor.call.remote(method, *arguments), method)

    def result(self, reference: Any, what: str, deadline_s: float | None = None, key: str | None = None) -> Any:
        """The value of a Reply, or the actor's fault.

        Raises:
            ActorFailed: it raised, its process died, or nothing came within the deadline.
        """
        self.wait(reference, what, deadline_s, key)
        try:
            reply = ray.get(reference)
        except ray.exceptions.RayError as error:
            raise self._died(error) from None
        return self.unwrap(reply) if isinstance(reply, Reply) else reply

    def unwrap(self, reply: Reply) -> Any:
        for name, level, message in reply.records:
            logging.getLogger(name).log(level, message)
        if reply.failure is not None:
            raise ActorFailed(self.owner, f"failed: {reply.failure.summary}", f"in the {self.owner} actor:\n{reply.failure.trace}")
        return reply.value

    def wait(self, reference: Any, what: str, deadline_s: float | None = None, key: str | None = None) -> None:
        """Until `reference` (an object, or a stream's next one) is there. Samples the actor's memory meanwhile."""
        deadline_s = self.deadline_s if deadline_s is None else deadline_s
        end = time.monotonic() + deadline_s
        while not ray.wait([reference], timeout=max(0.0, min(1.0, end - time.monotonic())))[0]:
            self.sample_memory()
            if time.monotonic() >= end:
                stacks = self.stacks()
                raise ActorFailed(self.owner, f"gave nothing for {deadline_s:g} s in `{what}` ({key or self.deadline_key})", stacks)

    def sample_memory(self) -> None:
        if self.identity is not None and self.identity.host == socket.gethostname():
            self._last_rss_mb = processes.rss_mb(self.identity.pid) or self._last_rss_mb

    def stacks(self) -> str:
        """Python stacks of all the actor's threads; "" where it runs on another host or does not answer the signal."""
        if self.identity is None or self.stack_file is None or self.identity.host != socket.gethostname():
            return ""
        try:
            os.kill(self.identity.pid, signal.SIGUSR1)
        except ProcessLookupError:
            return ""
        time.sleep(0.5)
        return f"where the {self.owner} actor stands:\n{self.stack_file.read_text(errors='replace').rstrip()}"

    def _died(self, error: ray.exceptions.RayError) -> ActorFailed:
        if isinstance(error, ray.exceptions.RayTaskError):  # a fault outside the methods' own handling, in Ray's (un)packing for instance
            return ActorFailed(self.owner, f"failed: {' '.join(str(error.cause).split())[:300]}", str(error))
        where = f"process {self.identity.pid}" if self.identity else "while it started"
        memory = f", last RSS {self._last_rss_mb:.0f} MB" if self._last_rss_mb else ""
        log = processes.log_tail(self.stack_file.parent, self.identity.pid) if self.stack_file and self.identity else ""
        return ActorFailed(self.owner, f"died ({where}{memory}): {_exit_cause(error)}", log)


def _exit_cause(error: BaseException) -> str:
    """The telling part of Ray's text about a lost actor, in one line."""
    text = " ".join(str(error).split())
    for mark in ("Worker exit detail:", "The actor is dead because"):
        _, found, rest = text.partition(mark)
        if found:
            text = rest.strip()
            break
    return text.partition(" If the process was killed by the kernel OOM killer")[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class _RemoteWeights:
    """The learner's weights, not moved yet: RayEngine has the rollout actor fetch them; iterating brings them here."""

    learner: ActorHandle

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        from grpo.weight_sync import unpack

        return unpack(_streamed(self.learner, self.learner.actor.stream_weights, "weights"))


def _streamed(handle: ActorHandle, method: Any, what: str, *arguments: Any) -> Generator[Any, None, None]:
    """Values of a streaming method as they are made, each within the deadline."""
    stream = method.options(num_returns="streaming").remote(*arguments)
    while True:
        handle.wait(stream, what)
        try:
            reference = next(stream)
        except StopIteration:
            return
        yield handle.result(reference, what)


class RayEngine:
    """The Engine protocol over the rollout actor. Faults of arguments come with the first group, not with the call.

    Weights go from actor to actor, the fastest way that their places allow (grpo.transfer); it is chosen at the first load.
    """

    def __init__(self, handle: ActorHandle, group_deadline_s: float) -> None:
        self._handle = handle
        self._group_deadline_s = group_deadline_s
        self._transport: Transport | None = None
        self._infos: list[TensorInfo] = []

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[Group]:
        return _streamed(self._handle, self._handle.actor.generate, "generate", prompts, sampling)

    def score(self, sequences: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        return self._handle.call("score", sequences)

    def load_weights(self, version: int, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        if not isinstance(named_tensors, _RemoteWeights):
            raise ValueError("RayEngine.load_weights takes what RayLearner.weights() returned: weights go from actor to actor")
        learner = named_tensors.learner
        if self._transport is None:
            self._transport = self._prepare(learner)
        if self._transport == "shared":
            shared = learner.call("share")
            if shared is not None:
                self._handle.call("open_shared", shared)
            self._handle.call("load_shared", version)
        elif self._transport == "broadcast":
            self._both(learner, ("send", self._infos), ("load_broadcast", version, self._infos))
        else:
            self._handle.result(self._handle.actor.load_from.remote(version, learner.actor), "load_weights")

    def _prepare(self, learner: ActorHandle) -> Transport:
        from grpo.transfer import choose_transport

        here, there = self._handle.call("place"), learner.call("place")
        transport = choose_transport(there, here)
        if transport == "shared":
            try:
                self._handle.call("open_shared", learner.call("share"))
            except ActorFailed as error:
                logger.warning("weights go through main memory, as the GPU's cannot be shared between the actors: %s", error)
                return "bytes"
        elif transport == "broadcast":
            self._form_group(learner, 1 + len(here.gpus), "nccl", one_host=here.host == there.host)
        return transport

    def _form_group(self, learner: ActorHandle, size: int, backend: str, *, one_host: bool) -> None:
        address = learner.call("open_group", size, backend, self._group_deadline_s, one_host)
        self._both(learner, ("join_group", address), ("join_group", address))
        self._infos = learner.call("describe")

    def _both(self, learner: ActorHandle, theirs: tuple[Any, ...], ours: tuple[Any, ...]) -> None:
        """Two calls that need each other; the sampler's fault is told first."""
        references = learner.actor.call.remote(*theirs), self._handle.actor.call.remote(*ours)
        self._handle.result(references[1], ours[0])
        learner.result(references[0], theirs[0])

    def checksum(self) -> int:
        return self._handle.call("checksum")

    def records_selection(self) -> bool:
        return self._handle.call("records_selection")

    def sleep(self) -> None:
        self._handle.call("sleep")

    def wake(self) -> None:
        self._handle.call("wake")

    def health(self) -> dict[str, float]:
        return self._handle.call("health")

    def close(self) -> None:
        self._handle.call("close")


class RayScorer:
    """Scoring in the reward actor while the next groups are sampled."""

    def __init__(self, handle: ActorHandle) -> None:
        self._handle = handle

    def score(self, groups: Iterable[Group]) -> Iterator[tuple[Group, tuple[Score, ...]]]:
        """Hand each group over when it comes, and yield those that are scored by then; then wait for the rest."""
        pending: dict[Any, Group] = {}
        for group in groups:
            pending[self._handle.actor.score.remote(_text_only(group))] = group
            for reference in ray.wait(list(pending), num_returns=len(pending), timeout=0)[0]:
                yield pending.pop(reference), self._handle.result(reference, "score")
        for reference, group in pending.items():
            yield group, self._handle.result(reference, "score")

    def metrics(self) -> dict[str, float]:
        return self._handle.call("metrics")


def _text_only(group: Group) -> Group:
    """What rewards need of a group: no tensors, no log-probs."""
    return replace(group, prompt_selection=None, completions=tuple(replace(one, selection=None, logprobs=()) for one in group.completions))


class RayLearner:
    """The learner actor; files are written by its process."""

    def __init__(self, handle: ActorHandle) -> None:
        self._handle = handle
        self._version = 0

    @property
    def policy_version(self) -> int:
        return self._version

    def step(self, scored_groups: Sequence[ScoredGroup]) -> StepStats:
        stats = self._handle.call("step", scored_groups)
        self._version = stats.policy_version
        return stats

    def weights(self) -> Iterable[tuple[str, torch.Tensor]]:
        return _RemoteWeights(learner=self._handle)

    def checksum(self) -> int:
        return self._handle.call("checksum")

    def score(self, token_ids: Sequence[int]) -> torch.Tensor:
        return self._handle.call("score", token_ids)

    def save(self, folder: Path) -> None:
        self._handle.call("save", folder)

    def load(self, folder: Path) -> None:
        self._handle.call("load", folder)
        self._version = self._handle.call("version")


class RayRuntime:
    """Starts or joins Ray, starts the three actors side by side, and stops all of it in `close`.

    Raises:
        RunFailed: Ray did not start, or an actor could not be placed or built within runtime.start_deadline_s.
        ValueError: a GPU is asked for and there is none.
    """

    def __init__(self, config: RunConfig, run_dir: Path) -> None:
        rollout_gpus, learner_gpus = gpu_shares(config)
        self._home: Path | None = None
        self._handles: list[ActorHandle] = []
        before = processes.family([os.getpid()])
        self._roots: list[int] = []
        self._home = _connect(config, rollout_gpus + learner_gpus)
        try:
            self._roots = [pid for pid in processes.family([os.getpid()]) if pid not in before] if self._home else []
            section = config.runtime
            rollout = self._start("rollout", RolloutActor, rollout_gpus, section.rollout_deadline_s, "runtime.rollout_deadline_s")
            reward = self._start("reward", RewardActor, 0.0, section.rollout_deadline_s, "runtime.rollout_deadline_s")
            learner = self._start("learner", LearnerActor, learner_gpus, section.learner_deadline_s, "runtime.learner_deadline_s")
            self._build(config, run_dir)
        except BaseException:
            self.close()
            raise
        self.engine = RayEngine(rollout, config.rollout.stall_deadline_s)
        self.scorer = RayScorer(reward)
        self.learner = RayLearner(learner)

    def _start(self, owner: str, actor_class: Any, gpus: float, deadline_s: float, key: str) -> ActorHandle:
        # num_cpus=0: placement must not fail on a small machine; the actors take turns anyway.
        actor = actor_class.options(num_cpus=0, num_gpus=gpus, max_restarts=0).remote()
        handle = ActorHandle(owner, actor, deadline_s=deadline_s, deadline_key=key)
        handle.stack_file = self._home / f"stacks-{owner}.txt" if self._home else None
        self._handles.append(handle)
        return handle

    def _build(self, config: RunConfig, run_dir: Path) -> None:
        deadline, key = config.runtime.start_deadline_s, "runtime.start_deadline_s"
        identities = [handle.actor.identify.remote(str(handle.stack_file) if handle.stack_file else None, os.getcwd()) for handle in self._handles]
        for handle, reference in zip(self._handles, identities):
            handle.identity = handle.result(reference, "placing its process", deadline, key)
        opened: dict[str, Any] = {}
        for turn in _turns(config):
            for handle in self._handles:
                if handle.owner in turn:
                    opened[handle.owner] = handle.actor.open.remote(config, run_dir.absolute())
            for handle in sorted(self._handles, key=lambda one: one.owner != "reward"):  # the cheap user mistakes first
                if handle.owner in turn:
                    handle.result(opened[handle.owner], "start-up", deadline, key)

    def on_hang(self, rescue: Callable[[], None]) -> None:
        """Nothing: what may hang is in other processes, and the trainer's own deadlines tell it."""

    def close(self) -> None:
        """Stop the reward workers, the actors and our own Ray instance; wait until their processes are gone."""
        if not ray.is_initialized():
            return
        with processes.uninterrupted():
            here = [handle.identity.pid for handle in self._handles if handle.identity and handle.identity.host == socket.gethostname()]
            noted = processes.family([*self._roots, *here])
            for handle in self._handles:
                if handle.owner == "reward":
                    ray.wait([handle.actor.call.remote("close")], timeout=_CLOSE_DEADLINE_S)
                ray.kill(handle.actor)
            ray.shutdown()
            processes.end_processes(noted, patience_s=_CLOSE_DEADLINE_S)
            if self._home is not None:
                shutil.rmtree(self._home, ignore_errors=True)


def _turns(config: RunConfig) -> list[set[str]]:
    """Which actors are built side by side. vLLM measures its GPU when it starts: a learner there comes afterwards."""
    if config.rollout.engine == "vllm" and shares_gpu(config):
        return [{"rollout", "reward"}, {"learner"}]
    return [{"rollout", "reward", "learner"}]


def _connect(config: RunConfig, num_gpus: float) -> Path | None:
    """Join the cluster, or start an instance of our own and return its folder."""
    if ray.is_initialized():
        raise ValueError("this process is already connected to Ray: call ray.shutdown() first, or set runtime.kind to local")
    # A dead worker's message comes from us, with its cause; Ray would print its own text before it.
    ray._private.worker._worker_logs_enabled = False  # type: ignore[attr-defined]
    options: dict[str, Any] = {"namespace": f"nsa-grpo-{os.getpid()}-{time.time_ns()}", "log_to_driver": False, "logging_level": "error"}
    address = cluster_address(config)
    if address is not None:
        try:
            knock(address)
            ray.init(address=address, **options)
        except (OSError, ValueError, RuntimeError) as error:
            raise RunFailed(f"no Ray cluster answers at {address} (runtime.address or RAY_ADDRESS): {' '.join(str(error).split())[:300]}") from error
        return None
    parent = tempfile.gettempdir()
    home = Path(tempfile.mkdtemp(prefix="nsa-ray-", dir=parent if len(parent) <= 30 else "/tmp"))  # noqa: S108 (Ray's socket paths must be short)
    try:
        ray.init(
            address="local",
            include_dashboard=False,
            num_cpus=os.cpu_count(),
            object_store_memory=OBJECT_STORE_BYTES[config.algorithm.selection],
            _temp_dir=str(home),
            _system_config={"prestart_worker_first_driver": False, "enable_worker_prestart": False},
            **options,
        )
        found = ray.cluster_resources().get("GPU", 0.0)
        if num_gpus > found:
            raise ValueError(f"rollout and learner need {num_gpus:g} GPUs together (runtime.rollout_gpus, learner_gpus), Ray finds {found:g}")
    except BaseException as error:
        ray.shutdown()
        shutil.rmtree(home, ignore_errors=True)
        if isinstance(error, ConnectionError | RuntimeError | TimeoutError):
            raise RunFailed(f"a local Ray instance did not start: {' '.join(str(error).split())[:300]}; runtime.kind=local does without") from error
        raise
    return home
