"""The command line: help, exit codes, one clear line per user error, and the verbs whose bodies are small."""

import errno
import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from grpo import cli
from grpo.config import RunConfig
from grpo.doctor import available_cores, available_memory, machine_facts
from grpo.errors import RunFailed
from grpo.memory_plan import cache_bytes_per_token, count_parameters, plan_memory, read_model_config, size

ROOT = Path(__file__).resolve().parents[2]
VERBS = ("train", "eval", "sft", "convert", "sample", "rewards", "config", "doctor", "resume", "report", "quickstart")


def run(*arguments: str) -> int:
    return cli.main(list(arguments))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "What is 2 + 3 =", "answer": "5"}\n{"question": "What is 4 + 4 =", "answer": "8"}\n', encoding="utf-8")
    return path


@pytest.fixture
def config_file(tiny_config_of: Any, tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_config_of().model_dump(mode="json")), encoding="utf-8")
    return path


def test_help_takes_less_than_a_second_and_imports_nothing_heavy() -> None:
    code = """
import sys
from grpo.cli import main
try:
    main(["--help"])
except SystemExit:
    print([name for name in ("torch", "pydantic", "rich", "ray") if name in sys.modules])
"""
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 1
    assert done.stdout.strip().endswith("[]")
    assert all(verb in done.stdout for verb in VERBS)


@pytest.mark.parametrize("verb", [*VERBS, "rewards check", "config show", "config schema", "config check"])
def test_every_verb_has_help_with_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.parse_arguments([*verb.split(), "--help"])
    assert stop.value.code == 0
    assert f"nsa-grpo {verb.split()[0]}" in capsys.readouterr().out.split("examples:")[1]


def test_overrides_may_stand_anywhere() -> None:
    args = cli.parse_arguments(["eval", "a", "evaluation.k=[1,2]", "b", "--data", "x=1.jsonl", "prompt.template=chat"])
    assert (args.checkpoints, args.data, args.overrides) == (["a", "b"], ["x=1.jsonl"], ["evaluation.k=[1,2]", "prompt.template=chat"])
    assert cli.parse_arguments(["sample", "c", "--prompt", "x=3"]).prompt == "x=3"
    assert cli.parse_arguments(["config", "show", "c.yaml", "--sft", "epochs=2"]).overrides == ["epochs=2"]
    assert cli.parse_arguments(["quickstart", "--out", "x", "train.steps=2"]).arguments == ["--out", "x", "train.steps=2"]


@pytest.mark.parametrize("arguments", [[], ["trian"], ["train"], ["report", "run", "a=b"], ["sample", "c"], ["rewards", "check", "d", "--rows", "0"]])
def test_wrong_usage_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.parse_arguments(arguments)
    assert stop.value.code == 2
    assert "error:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (ValueError("bad\nworse"), 2, "error: bad\nerror: worse\n"),
        (FileNotFoundError("no file x"), 2, "error: no file x\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (RunFailed("the learner died", "its traceback"), 1, "error: the learner died\nits traceback\n"),
    ],
)
def test_exit_codes(error: BaseException, code: int, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(cli, "check_packages", fail)
    assert run("doctor") == code
    assert capsys.readouterr().err == text


def test_faults_of_ours_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "check_packages", fail)
    with pytest.raises(ZeroDivisionError):
        run("doctor")
    monkeypatch.setattr(cli, "check_packages", lambda: int("x"))
    with pytest.raises(ValueError, match="invalid literal"):
        run("--traceback", "doctor")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "nowhere.yaml"], "error: no config file at nowhere.yaml"),
        (["sft", "nowhere.yaml"], "error: no config file at nowhere.yaml"),
        (["config", "show", "nowhere.yaml"], "error: no config file at nowhere.yaml"),
        (["resume", "nowhere"], "error: nowhere is not a run folder: it has no config.yaml"),
        (["report", "nowhere"], "error: no run folder nowhere"),
        (["rewards", "check", "nowhere.jsonl"], "error: no file nowhere.jsonl"),
        (["sample", "nowhere", "--prompt", "x"], "error: model.path: no checkpoint at nowhere"),
        (["doctor", "train.steps=3"], "error: overrides need a CONFIG"),
        (["convert", "a", "b", "windw_size=3"], "error: "),
    ],
)
def test_user_errors_give_one_clear_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(message)
    assert error.count("\n") == 1


def test_typo_in_a_config_gives_a_suggestion(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", str(config_file), "rollout.group_sise=4") == 2
    assert "did you mean rollout.group_size?" in capsys.readouterr().err


def test_package_that_shadows_ours_is_named(tmp_path: Path) -> None:
    (tmp_path / "rewards.py").write_text("", encoding="utf-8")
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]; from grpo.cli import main; sys.exit(main(['config', 'schema']))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"but Python finds {tmp_path / 'rewards.py'}" in done.stderr


def test_config_show_prints_what_reads_back(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("config", "show", str(config_file), "train.steps=7") == 0
    assert yaml.safe_load(capsys.readouterr().out)["train"]["steps"] == 7


def test_config_schema_is_json_with_descriptions(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("config", "schema") == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema["$defs"]["RolloutSection"]["properties"]["group_size"]["description"].startswith("Samples per prompt")
    assert run("config", "schema", "--sft") == 0
    assert "batch_tokens" in json.loads(capsys.readouterr().out)["properties"]


def test_config_check_goes_through_data_rewards_model_prompts_device_and_memory(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("config", "check", str(config_file)) == 0
    lines = capsys.readouterr().out.strip().split("\n")
    assert [line.split(":")[0] for line in lines] == [f"ok     {name}" for name in ("data", "rewards", "model", "prompts", "device", "memory")]


def test_config_check_lists_every_fault(config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "raises.py").write_text("def reward(prompt, completion, answer, **meta):\n    raise RuntimeError('boom')\n", encoding="utf-8")
    functions = f"rewards.functions=[{{name: '{tmp_path / 'raises.py'}:reward'}}]"
    assert run("config", "check", str(config_file), functions, "model.path=nowhere", "data.eval=gone.jsonl") == 1
    out = capsys.readouterr().out
    assert "error  data: no file gone.jsonl" in out
    assert "boom" in out
    assert "error  model: model.path: no checkpoint at nowhere" in out
    assert out.strip().endswith("failed: data, rewards, model")


def test_config_check_names_a_prompt_longer_than_the_context(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("config", "check", str(config_file), "data.max_prompt_tokens=2") == 1
    assert "prompts are longer than 2 tokens" in capsys.readouterr().out


def test_gold_answers_are_scored_as_answers(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("rewards", "check", str(data)) == 0
    assert "2 of 2 golds accepted (100.00%)" in capsys.readouterr().out


def test_gold_that_is_no_answer_fails_the_check(data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("rewards.math_equal.equivalent", lambda gold, prediction: gold != "8")
    assert run("rewards", "check", str(data)) == 1
    out = capsys.readouterr().out
    assert "problem 2: '8'" in out
    assert "1 of 2 golds accepted (50.00%)" in out


def test_two_checkers_are_shown_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"question": "a", "answer": "1/2", "solution": r"so \boxed{0.5}"}, {"question": "b", "answer": "3", "solution": r"so \boxed{4}"}]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "mine.py").write_text("def text(completion, answer): return float(f' {answer} ' in completion)\n")
    second = f"{tmp_path / 'mine.py'}:text"
    assert run("rewards", "check", str(tmp_path / "data.jsonl"), "--against", second, "--completions", "solution") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "disagree: 1 of 4" in out
    assert "2 of 2 golds accepted, 2 of 4 in all" in out
    assert "solution: 1 of 2 accepted (50.00%)" in out
    assert run("rewards", "check", str(tmp_path / "data.jsonl"), "--completions", "text") == 2


def test_reward_of_the_users_is_called_on_sample_rows(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.py").write_text(
        "def exact(prompts, completions, answer, **columns):\n    return [float(a in c) for a, c in zip(answer, completions)]\n", encoding="utf-8"
    )
    assert run("rewards", "check", str(data), "--reward", f"{tmp_path / 'mine.py'}:exact", "--rows", "1") == 0
    out = capsys.readouterr().out
    assert "5 </answer>" in out
    assert run("rewards", "check", str(data), "--reward", f"{tmp_path / 'mine.py'}:gone") == 2


def test_sample_shows_completions(tiny_model: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["prompt.template=none", "rollout.max_tokens=5", "evaluation.samples=2", "model.device=cpu"]
    assert run("sample", str(tiny_model), "--prompt", "What is 3 + 4 =", *overrides) == 0
    out = capsys.readouterr().out
    assert "What is 3 + 4 =" in out
    assert "sample 1: 5 tokens, length" in out
    assert run("sample", str(tiny_model), "--data", str(data), "--rows", "1", *overrides) == 0
    assert "gold answer: 5" in capsys.readouterr().out


def test_doctor_tells_the_machine_and_what_a_config_needs(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("doctor", str(config_file)) == 0
    out = capsys.readouterr().out
    assert "transformers" in out
    assert "optimizer and gradients" in out
    assert out.strip().endswith("fits")


def test_machine_facts_are_plausible() -> None:
    assert available_cores() >= 1
    assert available_memory() > 2**26
    assert {"python", "torch", "ray", "vllm", "cores", "wandb"} <= {name for name, _, _ in machine_facts()}


def test_memory_plan_counts_the_real_model_and_cache(tiny_model: Path, tiny_config_of: Any) -> None:
    from nsa.cache import NSACache
    from nsa.model import NSAForCausalLM

    config: RunConfig = tiny_config_of()
    model_config = read_model_config(str(tiny_model))
    model = NSAForCausalLM.from_pretrained(tiny_model)
    assert count_parameters(model_config) == sum(parameter.numel() for parameter in model.parameters())
    cache = NSACache(model_config, num_pages=9)
    held = sum(tensor[1:].numel() * 4 for layer in cache.layers for tensor in (layer.raw, layer.cmp))
    assert cache_bytes_per_token(model_config, "float32") * 9 * model_config.page_size == held
    plan = plan_memory(config, model_config, prompt_tokens=10)
    assert plan.cache_tokens % (16 * model_config.page_size) == 0
    assert plan.reference == 0
    assert plan.total > plan.optimizer == 12 * plan.num_parameters


def test_other_architectures_are_sent_to_convert(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}), encoding="utf-8")
    with pytest.raises(ValueError, match="is a llama model, not nsa_grpo; make an NSA model of it with `nsa-grpo convert"):
        read_model_config(str(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        read_model_config(str(tmp_path / "empty"))


def test_sizes_read_well() -> None:
    assert [size(count) for count in (0, 1023, 1536, 5 * 2**30, 2**42)] == ["0 B", "1023 B", "1.5 KiB", "5.0 GiB", "4.0 TiB"]


def test_a_full_disk_is_one_line(monkeypatch, capsys):
    def full():
        raise OSError(errno.ENOSPC, "No space left on device", "runs/a/metrics.jsonl")

    monkeypatch.setattr(cli, "check_packages", full)
    assert cli.main(["doctor"]) == 1
    assert capsys.readouterr().err == "error: No space left on device: runs/a/metrics.jsonl; what is complete is kept\n"
