"""One GRPO run, top to bottom. The only module that knows the order of things.

    nsa-grpo train configs/gsm8k_smollm2_1gpu.yaml train.steps=20

    PromptStream ─prompts▶ engine.generate ─groups▶ scorer.score ─scores▶ score_group ─▶ learner.step
         ▲                 (rollout)                (reward; while the  (advantages)    (learner)
         │ until enough        ▲                     next are sampled)                     │
         │ groups are live     └───────────── weights, with their version ◀── sync ────────┘
         └ dynamic sampling
    every step: metrics.jsonl, samples.jsonl      every N: evaluate (same engine), checkpoint

Nothing flows back but weights. Rollout, reward and learner are handles of a runtime (Ray actors, or this process), so
what stands here is the same for both. Where vLLM shares the learner's GPU, it sleeps during the update. Groups reach the
learner in the prompts' order, whatever order they were finished in: a run is a function of its configuration. Leaves out
every formula, and where things run.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils.logging import disable_progress_bar

from grpo.advantages import score_group
from grpo.checkpoint import CheckpointError, CheckpointStore, RunLock
from grpo.config import RunConfig
from grpo.data import PromptStream
from grpo.data_types import EvalReport, Group, Prompt, ScoredGroup
from grpo.errors import RunFailed
from grpo.evaluate import evaluate
from grpo.log import RunLogger, prepare_run_dir, resolve_run_dir
from grpo.memory_plan import read_model_config
from grpo.placement import cluster_address, sleeps
from grpo.problems import Problems, load_problems
from grpo.prompt_settings import save_prompt_settings
from grpo.rollout.engine import Sampling
from grpo.rollout.vllm_settings import check_installed
from grpo.rollout_metrics import num_rollout_tokens, rollout_metrics, sample_rows
from grpo.run_scope import Timed, log_lines_to, sigterm_as_exit
from grpo.runtime import Runtime, start_runtime
from grpo.seeding import fold
from grpo.weight_sync import WeightSyncError, check_probe, sync

CHECKPOINTS = "checkpoints"
STATE_FILE = "trainer_state.json"
AGREEMENT_EVERY = 10
"""Steps between measurements of selection/agreement, for which the sampler records its choices (step 1 is measured)."""
PROBE_TOKENS = 256
"""Length of the sequence that sampler and learner are compared on after every sync: the first prompts, one after another."""


def train(config: RunConfig, *, resume_from: Path | None = None) -> Path:
    """Run GRPO as configured; returns the run's folder.

    Args:
        resume_from: a run folder to go on with, from its newest complete checkpoint.

    Layout of the folder: config.yaml, provenance.json, metrics.jsonl, samples.jsonl, evals/step-*.{json,jsonl},
    checkpoints/step-*; checkpoints/final and checkpoints/best are links to the last and the best of those.

    Raises:
        ValueError, FileNotFoundError: a user's mistake (config, data, model, a folder that already holds a run, no vLLM).
        RunFailed: a part of the run failed, a disk is full, another process uses the folder.
    """
    disable_progress_bar()  # of loading and saving shards
    if config.rollout.engine == "vllm" and cluster_address(config) is None:  # another machine may have what this one lacks
        check_installed()
    problems = load_problems(config)
    run_dir = resolve_run_dir(config.log, config.name) if resume_from is None else Path(resume_from)
    with ExitStack() as stack:
        stack.callback(RunLock(run_dir).release)
        if resume_from is None:
            prepare_run_dir(config, config.log.model_copy(update={"run_dir": str(run_dir)}), config.name)
        store = CheckpointStore(run_dir / CHECKPOINTS, keep_last=config.train.keep_last, keep_best=config.train.keep_best)
        start, faults = _newest(store) if resume_from is not None else (None, [])
        step = int(start.name.removeprefix("step-")) if start else (-1 if resume_from is not None else None)
        log = stack.enter_context(
            RunLogger(run_dir, config.log, name=config.name, total_steps=config.train.steps, config=config.model_dump(mode="json"), resume_step=step)
        )
        stack.enter_context(sigterm_as_exit())
        stack.enter_context(log_lines_to(log))
        for fault in faults:
            log.message(f"warning: {fault}")
        runtime = start_runtime(config, run_dir)
        stack.callback(runtime.close)
        trainer = Trainer(config, problems, runtime, store, log)
        if start is not None:
            trainer.load(start)
        trainer.run()
    return run_dir


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """What one step sampled: every group, those that go to the learner, the rounds it took and the seconds."""

    sampled: tuple[ScoredGroup, ...]
    chosen: tuple[ScoredGroup, ...]
    rounds: int
    rollout_s: float
    reward_s: float
    """Seconds of waiting for scores that did not overlap with sampling."""


class Trainer:
    """The loop and what it counts. `step` is the number of finished steps."""

    def __init__(self, config: RunConfig, problems: Problems, runtime: Runtime, store: CheckpointStore, log: RunLogger) -> None:
        self.config = config
        self.step = 0
        self._problems = problems
        self._runtime = runtime
        self._store = store
        self._log = log
        self._stream = PromptStream(problems.train, config.train.seed, config.data.shuffle)
        self._num_tokens = 0
        self._saved_step: int | None = None
        self._resumed = False
        self._state: dict[str, Any] = {}
        self._consistent = True
        self._warned: set[str] = set()
        self._sleeps = sleeps(config)
        self._probe = _probe(config, problems)

    # ------------------------------------------------------------------ the run

    def run(self) -> None:
        """All remaining steps, with evaluations and checkpoints."""
        section = self.config.train
        if problem := self._problems.note:
            self._log.message(problem)
        self._runtime.on_hang(self._rescue)
        try:
            self._sync()
            if section.eval_before and not self._resumed:
                self._evaluate()
            while self.step < section.steps:
                metrics = self._train_step()
                last = self.step == section.steps
                due = section.eval_every is not None and self.step % section.eval_every == 0
                report = self._evaluate() if due or (last and section.eval_after) else None
                self._save_if_due(report, metrics["reward"], last=last)
            self._finish()
        except OSError as error:
            raise RunFailed(f"step {self.step + 1}: {error.strerror or error} ({error.filename}); {self._what_is_safe()}") from error
        except BaseException:
            self._rescue()
            raise

    def _train_step(self) -> dict[str, float]:
        """Sample, score, update, sync, log."""
        began = time.perf_counter()
        number = self.step + 1
        rollout = self._rollout(number)
        sampled = time.perf_counter()
        if self._sleeps:
            self._runtime.engine.sleep()
        asleep = time.perf_counter()
        self._consistent = False
        stats = self._runtime.learner.step(rollout.chosen)
        updated = time.perf_counter()
        self.step = number
        self._num_tokens += sum(num_rollout_tokens(rollout.sampled))
        self._remember()
        checks = self._sync()
        ended = time.perf_counter()
        completion_tokens = num_rollout_tokens(rollout.sampled)[1]
        metrics = {
            **stats.metrics,
            **rollout_metrics(rollout.sampled),
            **self._runtime.scorer.metrics(),
            **checks,
            "sampling/rounds": float(rollout.rounds),
            "sampling/groups": float(len(rollout.sampled)),
            "groups/dead_fraction": sum(not any(group.advantages) for group in rollout.sampled) / len(rollout.sampled),
            "num_tokens": float(self._num_tokens),
            "epoch": self._stream.epoch,
            "step_time": ended - began,
            "tokens_per_second": completion_tokens / (ended - began),
            "rollout/tokens_per_second": completion_tokens / max(rollout.rollout_s, 1e-9),
            "time/rollout": rollout.rollout_s,
            "time/reward": rollout.reward_s,
            "time/sleep": asleep - sampled,
            "time/update": updated - asleep,
            "time/sync": ended - updated,
        }
        self._log.log(number, metrics)
        self._log.samples(number, sample_rows(rollout.sampled, self.config.log.samples_per_step, number))
        self._warn(metrics)
        return metrics

    def _sync(self) -> dict[str, float]:
        """Send the weights, wake the sampler where it sleeps, and see that both compute the same."""
        learner, engine = self._runtime.learner, self._runtime.engine
        sync(learner, engine)
        if self._sleeps:
            engine.wake()
        return check_probe(learner, engine, self._probe, self.config.algorithm.mismatch_bound)

    # ------------------------------------------------------------------ rollout

    def _rollout(self, number: int) -> Rollout:
        """Groups for step `number`; with dynamic sampling in rounds, until enough of them have reward variance."""
        section = self.config.rollout
        sampled: list[ScoredGroup] = []
        live: list[ScoredGroup] = []
        rollout_s = reward_s = 0.0
        rounds = 0
        while rounds < (section.max_sampling_rounds if section.dynamic_sampling else 1) and len(live) < section.prompts_per_step:
            groups, generating, waiting = self._sample(self._stream.next(section.prompts_per_step), number, rounds)
            sampled += groups
            live += [group for group in groups if any(group.advantages)]
            rollout_s, reward_s, rounds = rollout_s + generating, reward_s + waiting, rounds + 1
        if section.dynamic_sampling and len(live) < section.prompts_per_step:
            self._log.message(
                f"step {number}: {len(live)} of {section.prompts_per_step} groups have reward variance after {rounds} sampling rounds "
                "(rollout.max_sampling_rounds); going on with those"
            )
        chosen = live[: section.prompts_per_step] if section.dynamic_sampling else sampled
        return Rollout(sampled=tuple(sampled), chosen=tuple(chosen), rounds=rounds, rollout_s=rollout_s, reward_s=reward_s)

    def _sample(self, prompts: Sequence[Prompt], number: int, sampling_round: int) -> tuple[list[ScoredGroup], float, float]:
        """(scored groups in the prompts' order, seconds of sampling, seconds of waiting for scores)."""
        section, algorithm = self.config.rollout, self.config.algorithm
        sampling = Sampling(
            temperature=section.temperature,
            max_tokens=section.max_tokens,
            stop=section.stop,
            seed=fold(self.config.train.seed, "rollout", number, sampling_round),
            group_size=section.group_size,
            record_selection=algorithm.selection == "replay" or (number % AGREEMENT_EVERY == 1 and self._runtime.engine.records_selection()),
        )
        began = time.perf_counter()
        groups = Timed(self._runtime.engine.generate(prompts, sampling))
        scored: dict[str, ScoredGroup] = {}
        for group, scores in self._runtime.scorer.score(groups):
            self._check_version(group)
            scored[group.prompt.prompt_id] = score_group(
                group,
                scores,
                kind=algorithm.advantage,
                max_tokens=section.max_tokens,
                overlong_penalty_tokens=algorithm.overlong_penalty_tokens,
            )
        if missing := [prompt.prompt_id for prompt in prompts if prompt.prompt_id not in scored]:
            raise RunFailed(f"step {number}: the rollout gave {len(scored)} of {len(prompts)} groups; missing is prompt {missing[0]!r}")
        return [scored[prompt.prompt_id] for prompt in prompts], groups.seconds, time.perf_counter() - began - groups.seconds

    def _check_version(self, group: Group) -> None:
        expected = self._runtime.learner.policy_version
        if stale := [one.policy_version for one in group.completions if one.policy_version != expected]:
            raise WeightSyncError(f"a completion was sampled with weight version {stale[0]}, the learner is at {expected}")

    # ------------------------------------------------------------------ evaluation, warnings

    def _evaluate(self) -> EvalReport | None:
        """Evaluate the current policy, log it as eval/*; None where there is no evaluation data."""
        if not self._problems.evaluation:
            return None
        began = time.perf_counter()
        name = f"step-{self.step:06d}"
        report = evaluate(
            self._runtime.engine,
            self._runtime.scorer,
            self._problems.evaluation,
            section=self.config.evaluation,
            max_tokens=self.config.rollout.max_tokens,
            stop=self.config.rollout.stop,
            prefilled=self.config.prompt.prefill_think,
            dataset=self.config.data.eval or "",
            checkpoint=name,
            step=self.step,
            jsonl_path=self._log.run_dir / "evals" / f"{name}.jsonl",
            reward=self._correctness(),
        )
        values = {f"eval/{key}": metric.value for key, metric in report.metrics.items()}
        bounds = {f"eval/{key}/{end}": getattr(metric, end) for key, metric in report.metrics.items() for end in ("low", "high")}
        extras = {f"eval/{key}": value for key, value in report.extras.items() if key != "step"}
        self._log.log(self.step, values | bounds | extras | {"time/eval": time.perf_counter() - began})
        return report

    def _correctness(self) -> str:
        """The reward that counts as correctness: accuracy where it is used, else the first function."""
        names = [spec.name for spec in self.config.rewards.functions]
        return "accuracy" if "accuracy" in names else names[0]

    def _warn(self, metrics: dict[str, float]) -> None:
        """The two signs of a run that cannot learn, one line each, once."""
        length = self.config.rollout.max_tokens
        signs = {
            "clipped": (
                metrics["completions/clipped_ratio"] > 0.5,
                f"{metrics['completions/clipped_ratio']:.0%} of the completions were cut off at rollout.max_tokens={length}: "
                "raise it, or check that the model ends its answers",
            ),
            "flat": (
                metrics["groups/dead_fraction"] == 1,
                f"no group has reward variance (mean reward {metrics['reward']:.3g}), so nothing is learnt: the problems are all too hard or "
                "too easy, or the reward does not fit the answers (`nsa-grpo rewards check`)",
            ),
        }
        for key, (present, text) in signs.items():
            if present and key not in self._warned:
                self._warned.add(key)
                self._log.message(f"warning: step {self.step}: {text}")

    # ------------------------------------------------------------------ checkpoints

    def _remember(self) -> None:
        """What a checkpoint of the finished step says of the trainer; taken now, as a failing next step moves the stream on."""
        self._state = {"step": self.step, "num_tokens": self._num_tokens, "stream": self._stream.state(), "warned": sorted(self._warned)}
        self._consistent = True

    def _save_if_due(self, report: EvalReport | None, reward: float, *, last: bool) -> None:
        section = self.config.train
        metric = report.metrics[f"pass@{min(self.config.evaluation.k)}"].value if report else None
        if not self._problems.evaluation:
            metric = reward if math.isfinite(reward) else None
        best = self._store.best_metric()
        improved = section.keep_best and report is not None and metric is not None and (best is None or metric > best)
        if last or improved or (section.save_every is not None and self.step % section.save_every == 0):
            self._save(metric)

    def _save(self, metric: float | None) -> Path:
        def write(folder: Path) -> None:
            self._runtime.learner.save(folder)
            self._problems.tokenizer.save_pretrained(folder)
            save_prompt_settings(folder, self.config.prompt)
            (folder / STATE_FILE).write_text(json.dumps(self._state, indent=1), encoding="utf-8")

        path = self._store.save(self.step, write, metric)
        self._saved_step = self.step
        return path

    def load(self, checkpoint: Path) -> None:
        """Continue where a checkpoint was written."""
        state = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
        self._runtime.learner.load(checkpoint)
        self._stream.load_state(state["stream"])
        self.step, self._num_tokens, self._warned = state["step"], state["num_tokens"], set(state["warned"])
        self._saved_step, self._resumed = self.step, True
        self._remember()
        self._log.message(f"going on after step {self.step} from {checkpoint}")

    def _finish(self) -> None:
        final = self._store.latest()
        if final is not None:
            self._store.link("final", final)
            self._log.message(f"finished after {self.step} steps; the policy is {self._store.folder / 'final'} → {final.name}")

    def _rescue(self) -> None:
        """Save what was learnt since the last checkpoint, if the learner is between two steps and still answers."""
        if not self._consistent or not self._state or self._saved_step == self.step:
            return
        try:
            path = self._save(None)
        except (RunFailed, OSError) as error:
            self._log.message(f"step {self.step} could not be saved either: {error}")
        else:
            self._log.message(f"saved {path}; `nsa-grpo resume {self._log.run_dir}` goes on from there")

    def _what_is_safe(self) -> str:
        latest = self._store.latest()
        return f"the last complete checkpoint is {latest}" if latest else "there is no complete checkpoint"


def _probe(config: RunConfig, problems: Problems) -> tuple[int, ...]:
    """The first prompts' tokens, one prompt after another, as many as sampler and learner can take in one sequence."""
    room = min(read_model_config(config.model.path).max_position_embeddings, config.rollout.max_cache_tokens or PROBE_TOKENS) - 1
    tokens = itertools.cycle(itertools.chain.from_iterable(prompt.token_ids for prompt in problems.train[:PROBE_TOKENS]))
    return tuple(itertools.islice(tokens, max(2, min(PROBE_TOKENS, room))))


def _newest(store: CheckpointStore) -> tuple[Path | None, list[str]]:
    """The checkpoint to resume from (None: the run starts over), and a line for each damaged one.

    Raises:
        CheckpointError: there are checkpoints, but none is complete.
    """
    good, faults = store.complete()
    if faults and not good:
        raise CheckpointError(f"{store.folder} holds no complete checkpoint: {'; '.join(faults)}")
    return good[-1].path if good else None, faults
