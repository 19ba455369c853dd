"""The vLLM engine over a stand-in for vLLM: requests, stops, weights, sleep, and every way in which vLLM can fail."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from grpo.data_types import Prompt
from grpo.errors import EngineFailed, RunFailed
from grpo.log import read_lines
from grpo.memory_plan import read_model_config
from grpo.rollout import vllm_engine, watchdog
from grpo.rollout.engine import Sampling
from grpo.rollout.vllm_engine import VllmEngine
from grpo.rollout.weights import WeightError
from grpo.runtime import RolloutPart
from grpo.seeding import fold
from grpo.trainer import train


@dataclass
class Report:
    request_id: str
    token_ids: list[int]
    logprobs: list[float]
    finish: str | None
    prompt_logprobs: tuple[float, ...] = ()
    cached_tokens: int = 0


@dataclass
class FakeDriver:
    """Draws tokens 11, 12, 13, … of each request, three a step, until its length (its seed's last digit + 1)."""

    running: dict[str, list[int]] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    most_running: int = 0
    logprob: float = -1.0
    at_step: Any = None
    resets: bool = True
    free: int = 100
    mapped: dict[str, int] = field(default_factory=lambda: {"weights": 30, "kv_cache": 50})
    faults: list[str | None] = field(default_factory=lambda: [None])
    sums: list[int] = field(default_factory=lambda: [5, 5])
    loaded: list[list[str]] = field(default_factory=list)
    by_length: bool = True

    def submit(self, request_id, token_ids, sampling, *, seed, eos_ids):
        self.running[request_id] = [sampling.max_tokens if not self.by_length else min(sampling.max_tokens, seed % 10 + 1), 0]
        self.seeds.append(seed)
        self.most_running = max(self.most_running, len(self.running))

    def submit_score(self, request_id, token_ids):
        self.running[request_id] = [0, 0]

    def step(self):
        if self.at_step is not None:
            return self.at_step()
        reports = []
        for request_id, (length, made) in list(self.running.items()):
            count = min(3, length - made)
            tokens = [11 + made + index for index in range(count)]
            finish = "length" if made + count >= length else None
            scores = (0.0, -0.5, -0.25) if request_id.startswith("score") else ()
            reports.append(Report(request_id, tokens, [self.logprob] * count, finish, scores))
            self.running[request_id][1] += count
            if finish:
                del self.running[request_id]
        return reports

    def forget(self, request_ids, *, abort):
        if abort:
            self.calls.append("abort")
            for request_id in request_ids:
                del self.running[request_id]

    def read_selection(self, request_id, num_tokens):
        return torch.arange(num_tokens).reshape(-1, 1, 1, 1).expand(-1, 2, 1, 3)

    def call(self, method, *arguments):
        if method == "nsa_free_memory":
            return [self.free]
        if method == "nsa_weight_bytes":
            return [self.mapped["weights"]]
        if method == "nsa_checksum":
            return self.sums
        if method == "nsa_load":
            self.loaded.append([name for name, _ in arguments[0]])
        self.calls.append(method)
        return self.faults if method != "nsa_begin_load" else [None]

    def reset_prefix_cache(self):
        self.calls.append("reset")
        return self.resets

    def sleep(self):
        self.calls.append("sleep")
        self.free += sum(self.mapped.values())

    def wake(self, what):
        self.calls.append(f"wake {what}")
        self.free -= self.mapped[what]

    def cache_tokens(self):
        return 128

    def close(self):
        self.calls.append("close")


@pytest.fixture
def driver() -> FakeDriver:
    return FakeDriver()


@pytest.fixture
def make(tiny_model, driver):
    def engine(**changes) -> VllmEngine:
        settings = {"eos_ids": [1], "context": 300, "max_sequences": 4, "sleeps": True, "records_selection": True, "stall_deadline_s": 5.0}
        return VllmEngine(driver, AutoTokenizer.from_pretrained(tiny_model), read_model_config(str(tiny_model)), **(settings | changes))

    return engine


PROMPTS = [Prompt(prompt_id=f"p{index}", token_ids=(7, 8, 9), question="", answer="", text="") for index in range(6)]


def test_groups_come_when_complete_with_seeds_of_their_own_and_not_too_many_at_once(make, driver):
    engine = make()
    groups = list(engine.generate(PROMPTS, Sampling(group_size=3, max_tokens=8, seed=9)))
    assert sorted(group.prompt.prompt_id for group in groups) == [f"p{index}" for index in range(6)]
    assert driver.seeds == [fold(9, f"p{prompt}", sample) for prompt in range(6) for sample in range(3)]
    assert driver.most_running == 4 + 3
    for group in groups:
        for index, one in enumerate(group.completions):
            length = min(8, fold(9, group.prompt.prompt_id, index) % 10 + 1)
            assert one.token_ids == tuple(range(11, 11 + length))
            assert one.logprobs == (-1.0,) * length
            assert one.finish_reason == "length"
    assert engine.health()["tokens_made"] == sum(len(one.token_ids) for group in groups for one in group.completions)
    assert "abort" not in driver.calls


def test_a_stop_string_found_late_cuts_tokens_and_ends_the_request(make, driver):
    driver.by_length = False
    engine = make()
    text = engine.tokenizer.decode([11])
    (group,) = engine.generate(PROMPTS[:1], Sampling(max_tokens=9, stop=(engine.tokenizer.decode([12]),), record_selection=True))
    (one,) = group.completions
    assert one.token_ids == (11, 12)
    assert one.logprobs == (-1.0, -1.0)
    assert one.finish_reason == "stop"
    assert one.text.startswith(text)
    assert group.prompt_selection is not None
    assert group.prompt_selection[:, 0, 0, 0].tolist() == [0, 1, 2]
    assert one.selection is not None
    assert one.selection[:, 0, 0, 0].tolist() == [3, -2]
    assert driver.calls == ["abort"]
    assert not driver.running


def test_users_mistakes_are_said_before_the_first_token(make, driver):
    engine = make(records_selection=False)
    for sampling, prompts, words in (
        (Sampling(max_tokens=298), PROMPTS, "more than the model's context of 300"),
        (Sampling(temperature=0.001), PROMPTS, "temperatures from 0.01 to 2.0 and at 0, got 0.001"),
        (Sampling(record_selection=True), PROMPTS, "block choices are not recorded"),
        (Sampling(), [Prompt(prompt_id="x", token_ids=(), question="", answer="", text="")], "prompt 'x' has no tokens"),
    ):
        with pytest.raises(ValueError, match=words):
            engine.generate(prompts, sampling)
    assert not driver.seeds


def test_an_abandoned_request_is_aborted_and_blocks_nothing(make, driver):
    engine = make()
    groups = engine.generate(PROMPTS, Sampling(max_tokens=9, group_size=2))
    next(groups)
    for action in (engine.sleep, lambda: engine.load_weights(1, []), lambda: next(engine.generate(PROMPTS, Sampling()))):
        with pytest.raises(EngineFailed, match="while a request is in progress"):
            action()
    assert driver.running
    groups.close()
    assert not driver.running
    assert driver.calls == ["abort"]
    engine.sleep()


def test_scores_are_those_of_the_prompt(make):
    assert [values.tolist() for values in make().score([(7, 8, 9), (7,), (8, 8, 8)])] == [[0.0, -0.5, -0.25], [0.0], [0.0, -0.5, -0.25]]


def raising(error: Exception):
    def step():
        raise error

    return step


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (raising(RuntimeError("CUDA error: an illegal memory access")), r"^vLLM failed in generate with RuntimeError: CUDA error: an illegal"),
        (raising(torch.cuda.OutOfMemoryError("CUDA out of memory. Tried")), r"^vLLM ran out of memory in generate; lower rollout.gpu_share"),
        (lambda: [], r"^vLLM stalls: generate gave nothing for 0.2 s \(rollout.stall_deadline_s\)"),
        (lambda: [Report("0", [11], [], None)], r"^vLLM gave 0 log-probabilities for 1 tokens"),
        (lambda: [Report("0", [11], [float("nan")], "stop")], r"^the policy gave log-probabilities that are not finite for prompt 'p0'"),
        (lambda: [Report("0", [], [], "abort")], r"^vLLM ended a sample with 'abort'"),
    ],
)
def test_what_fails_in_vllm_is_said_in_the_first_line_and_the_engine_refuses_to_go_on(make, driver, step, words):
    engine = make(stall_deadline_s=0.2)
    driver.at_step = step
    with pytest.raises(EngineFailed, match=words) as caught:
        list(engine.generate(PROMPTS[:1], Sampling()))
    assert "\n" not in str(caught.value)
    driver.at_step = None
    for action in (engine.health, lambda: engine.generate(PROMPTS, Sampling()), lambda: engine.load_weights(1, [])):
        with pytest.raises(EngineFailed, match="cannot work any more: "):
            action()


def test_a_call_that_does_not_come_back_is_interrupted_within_the_deadline(make, driver, capfd):
    engine = make(stall_deadline_s=0.3)
    driver.at_step = lambda: time.sleep(30)
    began = time.monotonic()
    with pytest.raises(EngineFailed, match=r"^vLLM hangs: generate did not come back for 0.3 s \(rollout.stall_deadline_s\)"):
        list(engine.generate(PROMPTS[:1], Sampling()))
    assert time.monotonic() - began < 5
    errors = capfd.readouterr().err
    assert errors.startswith("error: vLLM hangs: generate")
    assert "test_vllm_faults.py" in errors


def test_a_call_that_cannot_be_interrupted_ends_the_process(monkeypatch, capfd):
    ended: list[int] = []
    saved: list[bool] = []
    monkeypatch.setattr(watchdog.os, "_exit", lambda code: ended.append(code) or time.sleep(60))
    monkeypatch.setattr(watchdog.os, "kill", lambda *_: None)  # as if Python never ran again in the main thread
    monkeypatch.setattr(watchdog, "LAST_ACTION_S", 0.2)
    dog = watchdog.Watchdog(0.1, "rollout.stall_deadline_s", grace_s=0.2)
    dog.last_action = lambda: saved.append(True) or time.sleep(60)
    with dog.watch("wake"):
        end = time.monotonic() + 5
        while not ended and time.monotonic() < end:
            time.sleep(0.05)
    assert ended == [1]
    assert saved == [True]
    assert "error: vLLM hangs in wake and cannot be interrupted; this process ends" in capfd.readouterr().err


# ------------------------------------------------------------------ weights, sleep


def test_loading_starts_ends_and_forgets_prompts_and_a_broken_load_is_healed_by_a_whole_one(make, driver):
    engine = make()
    engine.load_weights(4, iter([("a", torch.zeros(2)), ("b", torch.zeros(3))]))
    assert driver.calls == ["nsa_begin_load", "nsa_load", "nsa_load", "nsa_end_load", "reset"]
    assert engine.health()["version"] == 4

    def torn():
        yield "a", torch.zeros(2)
        raise ConnectionError("the learner died")

    with pytest.raises(ConnectionError):
        engine.load_weights(5, torn())
    with pytest.raises(EngineFailed, match="loaded in part; call load_weights with all of them"):
        engine.generate(PROMPTS, Sampling())
    driver.faults = ["no tensor came for 1 of the model's parameters: b"]
    with pytest.raises(WeightError, match="no tensor came for 1"):
        engine.load_weights(5, iter([("a", torch.zeros(2))]))
    with pytest.raises(EngineFailed, match="loaded in part"):
        engine.health()
    driver.faults = [None, None]
    engine.load_weights(6, iter([("a", torch.zeros(2))]))
    assert engine.health()["version"] == 6


def test_ranks_elsewhere_get_parcels_of_bounded_size(make, driver, monkeypatch):
    monkeypatch.setattr(vllm_engine, "PIECE_BYTES", 100)
    make(in_process=False).load_weights(1, ((name, torch.zeros(size)) for name, size in (("a", 10), ("b", 15), ("c", 40), ("d", 1))))
    assert driver.loaded == [["a", "b"], ["c"], ["d"]]


def test_prompts_that_vllm_keeps_after_a_sync_stop_the_run(make, driver):
    driver.resets = False
    with pytest.raises(EngineFailed, match="kept prompts that were computed with the old weights"):
        make().load_weights(1, [])


def test_ranks_with_different_weights_are_noticed(make, driver):
    engine = make()
    assert engine.checksum() == 5
    driver.sums = [5, 6]
    with pytest.raises(EngineFailed, match="ranks hold different weights: checksums 0x5, 0x6"):
        engine.checksum()


def test_sleep_gives_everything_back_and_weights_come_before_the_cache(make, driver):
    engine = make()
    engine.sleep()
    engine.sleep()
    assert driver.calls == ["reset", "sleep"]
    assert driver.free == 180
    for action in (lambda: engine.generate(PROMPTS, Sampling()), lambda: engine.score([(7, 8)])):
        with pytest.raises(EngineFailed, match="asleep"):
            action()
    with pytest.raises(EngineFailed, match="gave its weights away when it went to sleep; call load_weights first"):
        engine.wake()
    engine.load_weights(2, [])
    assert driver.free == 150
    engine.wake()
    engine.wake()
    assert driver.free == 100
    assert driver.calls[2:] == ["wake weights", "nsa_begin_load", "nsa_end_load", "reset", "wake kv_cache", "nsa_zero_cache"]
    assert len(list(engine.generate(PROMPTS, Sampling(max_tokens=2)))) == 6


def test_a_full_gpu_at_wake_up_is_noticed_before_anything_is_mapped_and_can_be_tried_again(make, driver):
    engine = make()
    engine.sleep()
    engine.load_weights(2, [])
    driver.free = 49
    with pytest.raises(
        EngineFailed, match=r"^out of memory at wake-up: vLLM's cache needs 50 B and 49 B of the GPU are free; lower rollout.gpu_share"
    ):
        engine.wake()
    assert "wake kv_cache" not in driver.calls
    driver.free = 50
    engine.wake()
    assert driver.free == 0


def test_an_engine_that_need_not_sleep_only_forgets_prompts(make, driver):
    engine = make(sleeps=False)
    engine.sleep()
    engine.wake()
    assert driver.calls == ["reset"]
    engine.close()
    engine.close()
    assert driver.calls == ["reset", "close"]
    with pytest.raises(EngineFailed, match="closed"):
        engine.health()


# ------------------------------------------------------------------ the run


def test_the_trainer_puts_the_sampler_to_sleep_while_the_learner_works(tiny_config_of, monkeypatch):
    calls: list[str] = []
    for name in ("generate", "sleep", "load_weights", "wake", "score"):
        original = getattr(RolloutPart, name)
        monkeypatch.setattr(RolloutPart, name, lambda self, *args, n=name, f=original: (calls.append(n), f(self, *args))[1])
    run_dir = train(tiny_config_of("rollout.sleep=true", "train.steps=2"))
    assert calls == ["load_weights", "wake", "score", *["generate", "sleep", "load_weights", "wake", "score"] * 2]
    lines = [line for line in read_lines(run_dir / "metrics.jsonl") if "reward" in line]
    assert all(0 <= line["probe/mean"] <= line["probe/max"] < 1e-4 for line in lines)
    assert all(line["time/sleep"] > 0 for line in lines)


def test_a_sampler_that_cannot_wake_up_ends_the_run_with_the_step_saved(tiny_config_of, monkeypatch, tmp_path):
    wakes = itertools.count()

    def wake(self):
        if next(wakes) == 2:
            raise EngineFailed("out of memory at wake-up: vLLM's cache needs 50 GiB and 1 GiB of the GPU are free")

    monkeypatch.setattr(RolloutPart, "wake", wake)
    monkeypatch.setattr(RolloutPart, "sleep", lambda self: None)
    with pytest.raises(RunFailed, match=r"^out of memory at wake-up"):
        train(tiny_config_of("rollout.sleep=true", "train.steps=5"))
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*")] == ["step-000002"]
