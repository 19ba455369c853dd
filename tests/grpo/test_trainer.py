"""The loop with real parts in one process: what it writes, checks and warns of, and how it ends on bad input."""

import errno
import importlib.util
import json
import math
from dataclasses import replace

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo.checkpoint import CheckpointError, RunLock
from grpo.data_types import Completion, Group, Prompt, Score, ScoredGroup
from grpo.errors import RunFailed
from grpo.log import RunLogger, read_lines
from grpo.rollout_metrics import rollout_metrics, sample_rows, short_names
from grpo.runtime import LearnerPart, RolloutPart
from grpo.trainer import train

TRL_NAMES = (
    "reward", "reward_std", "frac_reward_zero_std", "rewards/even_digits/mean", "rewards/even_digits/std", "completions/mean_length",
    "completions/min_length", "completions/max_length", "completions/clipped_ratio", "completions/mean_terminated_length", "entropy",
    "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean", "sampling/importance_sampling_ratio/mean", "mismatch/mean",
    "mismatch/max", "num_tokens", "step_time", "tokens_per_second", "time/rollout", "time/reward", "time/update", "time/sync",
)  # fmt: skip


def test_a_run_writes_metrics_samples_evaluations_and_a_loadable_checkpoint(tiny_config_of, tmp_path):
    run_dir = train(
        tiny_config_of(
            f"data.eval={tmp_path / 'eval.jsonl'}", "train.eval_before=true", "train.eval_after=true", "train.steps=3",
            "train.eval_every=2", "train.save_every=1", "algorithm.kl_coefficient=0.1",
        )
    )  # fmt: skip
    lines = read_lines(run_dir / "metrics.jsonl")
    steps = [line for line in lines if "reward" in line]
    assert [line["step"] for line in steps] == [1, 2, 3]
    assert not [name for name in TRL_NAMES if any(line.get(name) is None for line in steps)]
    assert steps[0]["kl"] == 0
    assert steps[0]["check/first_ratio_deviation"] == 0
    assert [line["step"] for line in lines if "eval/pass@1" in line] == [0, 2, 3]
    assert [row["step"] for row in read_lines(run_dir / "samples.jsonl")] == [1] * 4 + [2] * 4 + [3] * 4
    assert sorted(path.name for path in (run_dir / "evals").glob("*.json")) == ["step-000000.json", "step-000002.json", "step-000003.json"]
    final = run_dir / "checkpoints" / "final"
    assert final.resolve().name == "step-000003"
    assert AutoModelForCausalLM.from_pretrained(final).config.model_type == "nsa_grpo"
    assert AutoTokenizer.from_pretrained(final).encode("What is") == [7, 8]
    assert (final / "nsa_grpo_prompt.json").is_file()
    assert (run_dir / "config.yaml").is_file()
    assert not (run_dir / ".lock").exists()


def test_a_folder_with_a_run_in_it_or_in_use_is_refused(tiny_config_of):
    config = tiny_config_of("train.steps=1")
    run_dir = train(config)
    with pytest.raises(ValueError, match="already holds a run: continue it with `nsa-grpo resume"):
        train(config)
    lock = RunLock(run_dir)
    with pytest.raises(CheckpointError, match="is in use by process"):
        train(config, resume_from=run_dir)
    lock.release()


def test_users_mistakes_are_value_errors_before_anything_is_loaded(tiny_config_of, tmp_path, monkeypatch):
    monkeypatch.setattr("grpo.trainer.start_runtime", lambda *_: pytest.fail("a part was built"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest, real=importlib.util.find_spec: None if name == "vllm" else real(name, *rest))
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "torn.jsonl").write_text(json.dumps({"question": "What is 1 + 1 ="}) + "\n")
    for overrides, message in (
        (f"data.train={tmp_path}/missing.jsonl", "no file"),
        (f"data.train={tmp_path}/empty.jsonl", "empty"),
        (f"data.train={tmp_path}/torn.jsonl", "no answer column"),
        (f"model.path={tmp_path}", "has no config.json"),
        ("rollout.max_tokens=512", "nothing is left for the prompt"),
        ("data.max_prompt_tokens=2", "prompts are longer than 2 tokens"),
        ("rollout.engine=vllm", "vLLM is not installed here: pip install"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
            train(tiny_config_of(overrides))
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_dynamic_sampling_goes_on_until_enough_groups_are_live_and_stops_at_the_cap(tiny_config_of, tmp_path, capsys):
    (tmp_path / "rare.py").write_text(
        "def rare(prompt, completion, answer, **meta):\n    return float(len(completion) % 5 == 0) if prompt.split()[2] in '012' else 0.0\n"
    )
    common = (f"rewards.functions=[{{name: '{tmp_path}/rare.py:rare'}}]", "train.steps=1", "rollout.dynamic_sampling=true")
    capped = train(tiny_config_of(*common, "rollout.max_sampling_rounds=2", f"log.run_dir={tmp_path}/capped"))
    (line,) = read_lines(capped / "metrics.jsonl")
    assert line["sampling/rounds"] == 2
    assert line["sampling/groups"] == 8
    assert 0 < line["frac_reward_zero_std"] < 1
    assert "groups have reward variance after 2 sampling rounds" in capsys.readouterr().out
    patient = train(tiny_config_of(*common, "rollout.max_sampling_rounds=30", f"log.run_dir={tmp_path}/patient"))
    (line,) = read_lines(patient / "metrics.jsonl")
    assert 2 < line["sampling/rounds"] < 30
    assert line["learner/sequences"] == 16


def test_the_two_signs_of_a_run_that_cannot_learn_are_said_once(tiny_config_of, tmp_path, capsys):
    (tmp_path / "zero.py").write_text("def zero(prompt, completion, answer, **meta):\n    return 0.0\n")
    train(tiny_config_of(f"rewards.functions=[{{name: '{tmp_path}/zero.py:zero'}}]", "train.steps=2", "rollout.max_tokens=4"))
    shown = capsys.readouterr().out
    assert shown.count("were cut off at rollout.max_tokens=4") == 1
    assert shown.count("no group has reward variance (mean reward 0)") == 1


@pytest.mark.parametrize(
    ("body", "counter"),
    [("raise KeyError('column')", "rewards/failures"), ("while True: pass", "rewards/timeouts"), ("return float('nan')", "rewards/failures")],
)
def test_a_reward_that_raises_hangs_or_returns_nan_costs_its_samples_and_is_said(tiny_config_of, tmp_path, capsys, body, counter):
    (tmp_path / "bad.py").write_text(f"def bad(prompt, completion, answer, **meta):\n    if len(completion) % 2:\n        {body}\n    return 1.0\n")
    run_dir = train(
        tiny_config_of(
            f"rewards.functions=[{{name: '{tmp_path}/bad.py:bad'}}]", "rewards.deadline_s=0.3", "rewards.workers=4", "train.steps=1",
            "rollout.prompts_per_step=2", "rollout.group_size=4",
        )
    )  # fmt: skip
    (line,) = read_lines(run_dir / "metrics.jsonl")
    assert line[counter] > 0
    assert line["reward"] == pytest.approx(1 - line[counter] / 8)
    assert "warning: reward" in capsys.readouterr().out


def test_a_full_disk_while_saving_or_logging_is_one_line_that_names_the_last_checkpoint(tiny_config_of, tmp_path, monkeypatch):
    save, log = LearnerPart.save, RunLogger.log

    def full(self, folder):
        save(self, folder)
        if self.policy_version == 2:
            raise OSError(errno.ENOSPC, "No space left on device", str(folder / "optimizer.pt"))

    with monkeypatch.context() as patch:
        patch.setattr(LearnerPart, "save", full)
        with pytest.raises(RunFailed, match=r"checkpoint of step 2 .*No space left on device.*step-000001") as caught:
            train(tiny_config_of("train.save_every=1"))
    assert "\n" not in str(caught.value)

    def full_log(self, step, metrics):
        if step == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        log(self, step, metrics)

    monkeypatch.setattr(RunLogger, "log", full_log)
    with pytest.raises(RunFailed, match=r"No space left on device.*step-000001"):
        train(tiny_config_of("train.save_every=1", f"log.run_dir={tmp_path}/second"))


def test_stale_weights_in_the_sampler_stop_the_run(tiny_config_of, monkeypatch):
    monkeypatch.setattr(RolloutPart, "load_weights", lambda self, version, named: setattr(self._engine, "_version", version))
    with pytest.raises(RunFailed, match="weight version 1 did not arrive"):
        train(tiny_config_of())


def test_a_mismatch_above_the_bound_stops_the_run_before_an_update(tiny_config_of):
    with pytest.raises(RunFailed, match="sampler and learner disagree") as caught:
        train(tiny_config_of("algorithm.mismatch_bound=1e-12"))
    assert "\n" not in str(caught.value)


def test_a_lost_group_never_trains(tiny_config_of, monkeypatch):
    generate = RolloutPart.generate
    monkeypatch.setattr(RolloutPart, "generate", lambda self, prompts, sampling: generate(self, prompts[1:], sampling))
    monkeypatch.setattr(LearnerPart, "step", lambda *_: pytest.fail("an incomplete step was trained on"))
    with pytest.raises(RunFailed, match="the rollout gave 3 of 4 groups"):
        train(tiny_config_of())


def scored(values, lengths=(2, 4), finish=("stop", "length")) -> ScoredGroup:
    completions = tuple(
        Completion(token_ids=(5,) * n, logprobs=(0.0,) * n, text="t" * n, finish_reason=end, policy_version=0) for n, end in zip(lengths, finish)
    )
    prompt = Prompt(prompt_id="p", token_ids=(1, 2, 3), question="q", answer="4", text="q")
    scores = tuple(Score(value=value, parts={"a": value, "x/f.py:b": 1.0}) for value in values)
    return ScoredGroup(group=Group(prompt=prompt, completions=completions), scores=scores, advantages=(0.5, -0.5))


def test_rollout_metrics_of_worked_groups():
    metrics = rollout_metrics([scored((1.0, 0.0)), scored((1.0, 1.0)), scored((None, 0.5))])
    assert metrics["reward"] == pytest.approx(0.7)
    assert metrics["reward_std"] == pytest.approx(math.sqrt(0.5) / 3)
    assert metrics["frac_reward_zero_std"] == pytest.approx(2 / 3)
    assert metrics["rewards/b/mean"] == 1
    assert metrics["completions/clipped_ratio"] == 0.5
    assert metrics["completions/mean_length"] == 3
    assert metrics["completions/mean_terminated_length"] == 2
    assert math.isnan(rollout_metrics([replace(scored((None, None)))])["reward"])
    with pytest.raises(ValueError, match="at least one group"):
        rollout_metrics([])


def test_short_names_stay_different():
    assert short_names(["accuracy", "a.py:f", "b.py:f", "m:g"]) == {"accuracy": "accuracy", "a.py:f": "a.py:f", "b.py:f": "b.py:f", "m:g": "g"}


def test_sample_rows_turn_through_the_group():
    groups = [scored((1.0, 0.0)), scored((1.0, 0.0))]
    assert [row["num_tokens"] for row in sample_rows(groups, 5, 0)] == [2, 4]
    assert [row["num_tokens"] for row in sample_rows(groups, 1, 1)] == [4]


def test_groups_reach_the_learner_in_the_prompts_order(tiny_config_of, monkeypatch):
    generate, step = RolloutPart.generate, LearnerPart.step
    orders = []

    def reversed_groups(self, prompts, sampling):
        orders.append([prompt.prompt_id for prompt in prompts])
        return reversed(list(generate(self, prompts, sampling)))

    def noting(self, groups):
        orders.append([group.group.prompt.prompt_id for group in groups])
        return step(self, groups)

    monkeypatch.setattr(RolloutPart, "generate", reversed_groups)
    monkeypatch.setattr(LearnerPart, "step", noting)
    train(tiny_config_of("train.steps=1"))
    assert orders[0] == orders[1]
