"""The loop with real parts in one process: what it writes, checks, warns of, and how it ends."""

import json

from grpo.log import read_lines
from grpo.trainer import train


def test_a_run_writes_metrics_samples_evaluations_and_a_loadable_checkpoint(tiny_config_of, tmp_path):
    config = tiny_config_of(f"data.eval={tmp_path / 'eval.jsonl'}", "train.eval_before=true", "train.eval_after=true", "train.steps=2", "train.save_every=1")
    run_dir = train(config)
    assert run_dir == tmp_path / "run"
    lines = read_lines(run_dir / "metrics.jsonl")
    print(json.dumps(lines, indent=1))
    assert 0
