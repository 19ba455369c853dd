"""The reward actor scores many groups at a time: one that hangs holds up nobody."""

import time
from pathlib import Path

import pytest
import ray

from grpo.actors import ActorHandle, RayScorer, RewardActor
from grpo.config import RunConfig, build_config
from grpo.data_types import Completion, Group, Prompt

pytestmark = pytest.mark.ray

REWARD = """
import time

def slow(completion):
    if "hang" in completion:
        time.sleep(1000)
    return 1.0
"""


def group(number: int, *texts: str) -> Group:
    prompt = Prompt(prompt_id=str(number), token_ids=(1,), question="q", answer="4", text="q")
    completions = tuple(Completion(token_ids=(1,), logprobs=(0.0,), text=text, finish_reason="stop", policy_version=0) for text in texts)
    return Group(prompt=prompt, completions=completions)


def test_a_hanging_group_does_not_keep_the_others_waiting(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(REWARD)
    rewards = {"functions": [{"name": f"{tmp_path / 'mine.py'}:slow"}], "deadline_s": 6.0, "workers": 2}
    config = build_config(RunConfig, {"name": "r", "model": {"path": "none"}, "data": {"train": "none"}, "rewards": rewards})
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error", object_store_memory=80 * 2**20)
    try:
        actor = RewardActor.options(num_cpus=0).remote()  # type: ignore[attr-defined]
        handle = ActorHandle("reward", actor, deadline_s=90, deadline_key="test")
        handle.result(actor.identify.remote(None, str(tmp_path)), "identify")
        handle.result(actor.open.remote(config, tmp_path), "open")
        scorer = RayScorer(handle)
        done: dict[str, float] = {}
        start = time.monotonic()

        def groups():
            yield group(0, "hang", "fine")
            for number in range(1, 12):
                yield group(number, "fine", "fine")
                time.sleep(0.2)

        for scored, scores in scorer.score(groups()):
            done[scored.prompt.prompt_id] = time.monotonic() - start
            assert [score.value for score in scores] == [0.0 if scored.prompt.prompt_id == "0" else 1.0, 1.0]
        assert len(done) == 12
        assert sum(done[str(number)] < 5.5 for number in range(1, 11)) >= 8  # before the first deadline was over
        assert done["0"] >= 6.0
        assert scorer.metrics()["rewards/timeouts"] == 1.0
    finally:
        ray.shutdown()
