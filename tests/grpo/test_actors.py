"""Ray actors: the same numbers as in one process, and what a user sees when one fails, dies, stalls or is interrupted."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray
import torch

from grpo import processes
from grpo.actors import RayRuntime
from grpo.data_types import Prompt
from grpo.errors import ActorFailed, RunFailed
from grpo.log import read_lines
from grpo.rollout.engine import Sampling
from grpo.trainer import train
from grpo.weight_sync import check_probe, sync

pytestmark = pytest.mark.ray

SAME = ("reward", "loss", "entropy", "grad_norm", "completions/mean_length", "num_tokens")
DRIVER = """
import signal
import sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job inherits an ignored Ctrl-C
from grpo.config import RunConfig, build_config
from grpo.errors import RunFailed
from grpo.trainer import train
import json
try:
    train(build_config(RunConfig, json.load(open(sys.argv[1]))))
except RunFailed as error:
    print(f"error: {error}", file=sys.stderr)
    print(error.details, file=sys.stderr)
    sys.exit(1)
except KeyboardInterrupt:
    sys.exit(130)
"""


def prompt(*token_ids: int) -> Prompt:
    return Prompt(prompt_id="p", token_ids=token_ids, question="What is 1 + 1 =", answer="2", text="What is 1 + 1 =")


def start(config, folder: Path, **environment: str) -> subprocess.Popen:
    """A training run in a process group of its own, as a shell starts it."""
    (folder / "config.json").write_text(config.model_dump_json())
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(folder / "config.json")],
        env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def wait_for_step(run_dir: Path, step: int, process: subprocess.Popen, deadline_s: float = 120) -> None:
    end = time.monotonic() + deadline_s
    while not any(line["step"] >= step for line in read_lines(run_dir / "metrics.jsonl")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "no step within the deadline"
        time.sleep(0.1)


@pytest.fixture
def runtime(tiny_config_of, tmp_path):
    os.environ.pop("RAY_ADDRESS", None)
    runtime = RayRuntime(tiny_config_of("runtime.kind=ray", "runtime.threads=2"), tmp_path)
    yield runtime
    runtime.close()


def test_faults_name_their_owner_and_nothing_is_left_behind(runtime, tiny_config_of, tmp_path):
    """One start of Ray for all of it: weights, faults as values, a stall, a whole run that joins it, a dead actor."""
    engine, learner = runtime.engine, runtime.learner
    rollout_pid, reward_pid, learner_pid = (handle.identity.pid for handle in (engine._handle, runtime.scorer._handle, learner._handle))

    assert sync(learner, engine) == 0
    assert engine.checksum() == learner.checksum()
    engine._form_group(learner._handle, 2, "gloo", one_host=True)  # what two GPUs do with NCCL
    engine._transport = "broadcast"
    assert sync(learner, engine) == 0
    assert check_probe(learner, engine, (7, 8, 9, 10), 1e-5)["probe/max"] < 1e-5
    names = {name: tensor.shape for name, tensor in learner.weights()}
    assert "model.embed_tokens.weight" in names
    assert [scores.shape for scores in engine.score([[7, 8, 9], [7]])] == [torch.Size([3]), torch.Size([1])]

    (group,) = engine.generate([prompt(7, 8, 9)], Sampling(max_tokens=3, group_size=2))
    assert [len(scores) for _, scores in runtime.scorer.score([group, group])] == [2, 2]
    assert "libtorch" not in Path(f"/proc/{reward_pid}/maps").read_text()

    with pytest.raises(ActorFailed, match=r"^the rollout failed: ValueError: .*prompt 'p'") as caught:
        list(engine.generate([prompt(999)], Sampling()))
    assert "\n" not in str(caught.value)
    assert "in the rollout actor:\nTraceback" in caught.value.details
    assert caught.value.owner == "rollout"

    engine._handle.deadline_s = 0.05
    with pytest.raises(ActorFailed, match=r"the rollout gave nothing for 0.05 s in `generate` \(runtime.rollout_deadline_s\)") as caught:
        list(engine.generate([prompt(7)], Sampling(max_tokens=400, group_size=16)))
    assert "torch_engine.py" in caught.value.details
    engine._handle.deadline_s = 60

    joined = start(tiny_config_of("runtime.kind=ray", "train.steps=2"), tmp_path, RAY_ADDRESS=ray.get_runtime_context().gcs_address)
    local = train(tiny_config_of("train.steps=2", f"log.run_dir={tmp_path}/local"))
    output, errors = joined.communicate(timeout=120)
    assert joined.returncode == 0, errors
    assert "finished after 2 steps" in output
    assert engine.health()["version"] == 0
    for ours, theirs in zip(read_lines(local / "metrics.jsonl"), read_lines(tmp_path / "run" / "metrics.jsonl"), strict=True):
        assert {name: ours[name] for name in SAME} == {name: theirs[name] for name in SAME}

    family = processes.family([rollout_pid, reward_pid, learner_pid, *runtime._roots])
    learner._handle.sample_memory()
    os.kill(learner_pid, signal.SIGKILL)
    with pytest.raises(ActorFailed, match=rf"^the learner died \(process {learner_pid}, last RSS \d+ MB\): .+") as caught:
        learner.checksum()
    assert "\n" not in str(caught.value)
    home = runtime._home
    runtime.close()
    runtime.close()
    assert not [pid for pid, ticks in family.items() if processes.start_ticks(pid) == ticks]
    assert not ray.is_initialized()
    assert home is not None
    assert not home.exists()


def test_ctrl_c_and_a_killed_actor_end_the_run_cleanly(tiny_config_of, tmp_path):
    config = tiny_config_of("runtime.kind=ray", "train.steps=100000")
    run_dir = tmp_path / "run"
    process = start(config, tmp_path)
    wait_for_step(run_dir, 2, process)
    family = processes.family([process.pid])
    assert len(family) > 6
    os.killpg(process.pid, signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert not [pid for pid, ticks in family.items() if processes.start_ticks(pid) == ticks]
    assert not (run_dir / ".lock").exists()
    json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])

    process = start(tiny_config_of("runtime.kind=ray", "train.steps=100000", f"log.run_dir={tmp_path}/second"), tmp_path)
    wait_for_step(tmp_path / "second", 1, process)
    family = processes.family([process.pid])
    (victim,) = [pid for pid in family if b"RolloutActor" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(victim, signal.SIGKILL)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors.startswith("error: the rollout died (process ")
    assert "nsa-grpo resume" in output
    assert list((tmp_path / "second" / "checkpoints").glob("step-*"))
    assert not [pid for pid, ticks in family.items() if processes.start_ticks(pid) == ticks]


def test_start_up_faults_are_one_line(tiny_config_of, tmp_path):
    for overrides, error, message in (
        (("runtime.address=127.0.0.1:1",), RunFailed, "no Ray cluster answers at 127.0.0.1:1"),
        (("model.device=cuda",), ValueError, "torch sees no CUDA GPU"),
    ):
        if torch.cuda.is_available() and error is ValueError:
            continue
        with pytest.raises(error, match=message) as caught:
            RayRuntime(tiny_config_of("runtime.kind=ray", *overrides), tmp_path)
        assert "\n" not in str(caught.value)
