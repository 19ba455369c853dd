"""A run small enough for tests: a random two-layer NSA model, a word-level tokenizer, sums of two digits."""

import json
from pathlib import Path

import pytest
import torch

from grpo.config import RunConfig, apply_overrides, build_config

REWARD = '''"""A reward with variance on random text: the share of even digits."""


def even_digits(prompt, completion, answer, **meta):
    digits = [int(one) for one in completion if one.isdigit()]
    return sum(one % 2 == 0 for one in digits) / max(1, len(digits))
'''


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder with a random NSA model and its tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from nsa.model import NSAForCausalLM
    from nsa.testing import tiny_config

    words = ["<pad>", "<eos>", "<unk>", "<think>", "</think>", "<answer>", "</answer>", "What", "is", "+", "=", *map(str, range(19))]
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    folder = tmp_path_factory.mktemp("tiny") / "model"
    torch.manual_seed(0)
    NSAForCausalLM(tiny_config(vocab_size=len(words), eos_token_id=1, pad_token_id=0)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_config_of(tiny_model: Path, tmp_path: Path):
    """A function: overrides → RunConfig of a local run of 4 steps in tmp_path/run."""
    rows = [{"question": f"What is {a} + {b} =", "answer": str(a + b)} for a in range(9) for b in range(9)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:60]))
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[60:68]))
    (tmp_path / "reward.py").write_text(REWARD)
    tree = {
        "model": {"path": str(tiny_model), "device": "cpu"},
        "data": {"train": str(tmp_path / "train.jsonl")},
        "prompt": {"template": "none"},
        "rollout": {"prompts_per_step": 4, "group_size": 4, "max_tokens": 12, "max_sequences": 16},
        "rewards": {"functions": [{"name": f"{tmp_path / 'reward.py'}:even_digits"}], "workers": 1},
        "optimizer": {"learning_rate": 1e-3, "micro_batch_tokens": 128},
        "train": {"steps": 4, "eval_before": False, "eval_after": False},
        "evaluation": {"samples": 2, "k": [1, 2]},
        "runtime": {"kind": "local", "threads": 1, "start_deadline_s": 60, "rollout_deadline_s": 60, "learner_deadline_s": 60},
        "log": {"run_dir": str(tmp_path / "run"), "progress": False},
    }
    return lambda *overrides: build_config(RunConfig, apply_overrides(tree, overrides))
