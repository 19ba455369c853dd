"""The same run through Ray actors, and what a user sees when one of them fails."""

import pytest

from grpo.log import read_lines
from grpo.trainer import train

pytestmark = pytest.mark.ray

SAME = ("reward", "loss", "entropy", "grad_norm", "completions/mean_length", "num_tokens")


def test_a_run_through_ray_equals_the_local_run(tiny_config_of, tmp_path):
    local = train(tiny_config_of("train.steps=2", f"log.run_dir={tmp_path}/local"))
    remote = train(tiny_config_of("train.steps=2", f"log.run_dir={tmp_path}/ray", "runtime.kind=ray"))
    for ours, theirs in zip(read_lines(local / "metrics.jsonl"), read_lines(remote / "metrics.jsonl"), strict=True):
        assert {name: ours[name] for name in SAME} == {name: theirs[name] for name in SAME}
