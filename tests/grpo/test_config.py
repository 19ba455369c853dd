"""Configuration files: faults name the key, overrides work, and configs/README.md explains every key."""

import re
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel

from grpo.config import ConfigError, RunConfig, SftConfig, apply_overrides, build_config, load_config

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
MINIMAL = "model: {path: m}\ndata: {train: d.jsonl}\n"


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def keys_of(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Dotted names of all leaves; lists of sections as name[]."""
    keys = []
    for name, info in model.model_fields.items():
        inner = [arg for arg in (info.annotation, *get_args(info.annotation)) if isinstance(arg, type) and issubclass(arg, BaseModel)]
        if not inner:
            keys.append(prefix + name)
        elif inner[0] is info.annotation:
            keys += keys_of(inner[0], f"{prefix}{name}.")
        else:
            keys += [prefix + name, *keys_of(inner[0], f"{prefix}{name}[].")]
    return keys


def test_minimal_file_takes_its_name_from_the_file(tmp_path: Path) -> None:
    config = load_config(RunConfig, write(tmp_path / "tiny.yaml", MINIMAL))
    assert (config.name, config.rollout.group_size, config.model.path) == ("tiny", 8, "m")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MINIMAL + "rollout: {group_sise: 4}", r"unknown key rollout\.group_sise; did you mean rollout\.group_size\?"),
        (MINIMAL + "rolout: {group_size: 4}", r"unknown key rolout; did you mean rollout\?"),
        (MINIMAL + "group_size: 4", r"unknown key group_size; did you mean rollout\.group_size\?"),
        (MINIMAL + "rollout: {zzz: 4}", r"unknown key rollout\.zzz; known: .*rollout\.group_size"),
        (MINIMAL + "zzz: {group_size: 4}", r"unknown key zzz; known: .*rollout, .*algorithm"),
        (MINIMAL + "rollout:\n  group_size: 4\n  group_size: 8\n", "line 5: key 'group_size' is given twice"),
        (MINIMAL + "model: {path: other}", "key 'model' is given twice"),
        ("data: {train: d}", "model is required"),
        (MINIMAL + "rollout: {group_size: 1}", r"rollout\.group_size: .*greater than or equal to 2 \(given 1\)"),
        (MINIMAL + "rollout: {top_p: 0.9}", "training needs the full distribution"),
        (MINIMAL + "algorithm: {kl_coefficient: 0.1, kl_estimator: k1}", "k1 in the loss has no gradient in expectation"),
        (MINIMAL + "optimizer: {learning_rate: .nan}", r"optimizer\.learning_rate"),
        (MINIMAL + "rewards: {functions: []}", "name at least one reward"),
        (MINIMAL + "evaluation: {k: [16]}", "needs as many samples"),
        ("- a\n- b\n", "must hold a mapping"),
        ("a: [1\n", "not valid YAML"),
        ("", "must hold a mapping"),
    ],
)
def test_faults_are_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(RunConfig, write(tmp_path / "c.yaml", text))


def test_every_fault_has_a_line_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(RunConfig, write(tmp_path / "c.yaml", MINIMAL + "train: {steps: 0, sed: 1}"))
    assert len(str(caught.value).split("\n")) == 2


def test_missing_file() -> None:
    with pytest.raises(ConfigError, match=r"no config file at nowhere\.yaml"):
        load_config(RunConfig, "nowhere.yaml")


def test_overrides_are_yaml_and_reach_nested_keys(tmp_path: Path) -> None:
    overrides = ["optimizer.learning_rate=1e-4", "evaluation.k=[1, 4]", "data.eval=null", "rollout.stop=[]", "name=other", "prompt.system=a=b"]
    config = load_config(RunConfig, write(tmp_path / "c.yaml", MINIMAL), overrides)
    assert (config.optimizer.learning_rate, config.evaluation.k, config.data.eval) == (1e-4, (1, 4), None)
    assert (config.rollout.stop, config.name, config.prompt.system) == ((), "other", "a=b")


@pytest.mark.parametrize("override", ["train.steps", "=3", "model.path.deeper=1", "train.steps=[1"])
def test_bad_overrides(tmp_path: Path, override: str) -> None:
    with pytest.raises(ConfigError):
        load_config(RunConfig, write(tmp_path / "c.yaml", MINIMAL), [override])


def test_overrides_leave_the_given_tree_alone() -> None:
    tree: dict[str, Any] = {"train": {"steps": 1}}
    assert apply_overrides(tree, ["train.steps=2"]) == {"train": {"steps": 2}}
    assert tree == {"train": {"steps": 1}}


@pytest.mark.parametrize("schema", [RunConfig, SftConfig])
def test_resolved_configuration_reads_back_equal(schema: type[RunConfig] | type[SftConfig], tmp_path: Path) -> None:
    config = build_config(schema, {"model": {"path": "m"}, "data": {"train": "d"}})
    saved = write(tmp_path / "c.yaml", yaml.safe_dump(config.model_dump(mode="json")))
    assert load_config(schema, saved) == config


def test_readme_explains_every_key_once() -> None:
    train, sft = (CONFIGS / "README.md").read_text(encoding="utf-8").split("## `nsa-grpo sft`")
    rows = re.findall(r"^\| `([^`]+)` \|", train.split("## `nsa-grpo train`")[1], flags=re.MULTILINE)
    assert sorted(rows) == sorted(keys_of(RunConfig))
    shared = tuple(f"{name}." for name in ("model", "prompt", "optimizer", "log"))
    expected = [key for key in keys_of(SftConfig) if not key.startswith(shared) and key != "name"]
    assert sorted(re.findall(r"^\| `([^`]+)` \|", sft, flags=re.MULTILINE)) == sorted(expected)


def test_readme_lists_every_file() -> None:
    text = (CONFIGS / "README.md").read_text(encoding="utf-8")
    assert [path.name for path in sorted(CONFIGS.glob("*.yaml")) if f"`{path.name}`" not in text] == []


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_files_are_valid_and_short(path: Path) -> None:
    load_config(SftConfig if "sft" in path.stem else RunConfig, path)
    assert len(path.read_text(encoding="utf-8").split("\n")) <= 61
