"""What vLLM is started with: memory, sleep and GPUs as they follow from a configuration, and refusals before anything starts."""

from __future__ import annotations

import importlib.metadata
import importlib.util

import pytest
import torch

from grpo.config import ConfigError
from grpo.memory_plan import cache_bytes_per_token, plan_memory, read_model_config
from grpo.placement import gpu_shares, sleeps
from grpo.rollout import vllm_settings as module
from grpo.rollout.vllm_settings import check_installed, vllm_settings

GPU_BYTES = 10**9


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.setattr(module, "check_installed", lambda: None)


@pytest.fixture
def on_gpu(monkeypatch):
    """As if there were a GPU."""
    monkeypatch.setattr("grpo.learner.resolve_device", lambda name: torch.device("cpu" if name == "cpu" else "cuda"))


def test_on_the_cpu_the_cache_has_a_size_and_nothing_sleeps(installed, tiny_config_of, tiny_model):
    config = tiny_config_of("rollout.engine=vllm")
    settings = vllm_settings(config, "cpu", None)
    model = read_model_config(str(tiny_model))
    per_token = cache_bytes_per_token(model, "float32")
    assert settings.context == model.max_position_embeddings
    assert settings.cache_bytes is not None
    assert settings.context * per_token < settings.cache_bytes <= 2**30
    assert (settings.sleeps, settings.records_selection, settings.tensor_parallel) == (False, False, 1)
    limited = vllm_settings(tiny_config_of("rollout.engine=vllm", "rollout.max_cache_tokens=100", "algorithm.selection=replay"), "cpu", None)
    assert limited.context == 100
    assert limited.records_selection
    assert limited.cache_bytes is not None
    assert limited.cache_bytes > 100 * per_token  # the record of choices takes its part
    with pytest.raises(ValueError, match=r"rollout.tensor_parallel is 2, which needs as many GPUs; model.device is cpu"):
        vllm_settings(tiny_config_of("rollout.engine=vllm", "rollout.tensor_parallel=2"), "cpu", None)


def test_on_a_shared_gpu_vllm_sleeps_and_leaves_the_learner_its_part(installed, on_gpu, tiny_config_of, tiny_model):
    cuda = ("rollout.engine=vllm", "model.device=cuda")
    for kind in ("local", "ray"):
        config = tiny_config_of(*cuda, f"runtime.kind={kind}")
        assert sleeps(config)
        settings = vllm_settings(config, "cuda", GPU_BYTES)
        plan = plan_memory(config, read_model_config(str(tiny_model)), prompt_tokens=512)
        assert settings.cache_bytes is None
        assert settings.gpu_share == pytest.approx(0.9 - (plan.learner_weights + plan.optimizer) / GPU_BYTES)
        awake = vllm_settings(tiny_config_of(*cuda, f"runtime.kind={kind}", "rollout.sleep=false"), "cuda", GPU_BYTES)
        assert awake.gpu_share < settings.gpu_share
    apart = tiny_config_of(*cuda, "runtime.kind=ray", "runtime.rollout_gpus=1", "runtime.learner_gpus=1")
    assert not sleeps(apart)
    assert vllm_settings(apart, "cuda", GPU_BYTES).gpu_share == 0.9
    assert vllm_settings(tiny_config_of(*cuda, "rollout.gpu_share=0.3"), "cuda", GPU_BYTES).gpu_share == 0.3
    assert not sleeps(tiny_config_of("model.device=cuda"))  # the built-in engine would lose its graphs
    assert sleeps(tiny_config_of("model.device=cuda", "rollout.sleep=true"))


def test_a_sleeping_sampler_counts_once(on_gpu, tiny_config_of, tiny_model):
    model = read_model_config(str(tiny_model))
    awake = plan_memory(tiny_config_of(), model, prompt_tokens=10)
    asleep = plan_memory(tiny_config_of("rollout.sleep=true"), model, prompt_tokens=10)
    assert awake.total - asleep.total == min(awake.sampler_weights + awake.cache, awake.logits + awake.activations)


def test_gpus_follow_from_tensor_parallelism(on_gpu, tiny_config_of):
    cuda = ("rollout.engine=vllm", "model.device=cuda", "runtime.kind=ray")
    assert gpu_shares(tiny_config_of(*cuda)) == (0.5, 0.5)
    assert gpu_shares(tiny_config_of(*cuda, "rollout.tensor_parallel=2")) == (2.0, 1.0)
    with pytest.raises(ValueError, match=r"rollout.tensor_parallel is 2, so runtime.rollout_gpus must be 2 too, got 1"):
        gpu_shares(tiny_config_of(*cuda, "rollout.tensor_parallel=2", "runtime.rollout_gpus=1"))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["rollout.gpu_share=0.5"], "gpu_share is for vLLM alone: set rollout.engine to vllm, or leave it out"),
        (["rollout.tensor_parallel=2"], "tensor_parallel is for vLLM alone"),
        (["rollout.engine=vllm", "rollout.temperature=3"], "vLLM samples at temperatures from 0.01 to 2, got temperature=3.0"),
        (["rollout.engine=vllm", "rollout.gpu_share=1.5"], "less than or equal to 1"),
        (["rollout.engine=vlm"], "'torch' or 'vllm'"),
    ],
)
def test_keys_that_cannot_work_are_refused(tiny_config_of, overrides, words):
    with pytest.raises(ConfigError, match=words):
        tiny_config_of(*overrides)


def test_a_missing_vllm_or_plugin_is_one_line(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"^rollout.engine is vllm, but vLLM is not installed here: pip install '\.\[vllm\]'"):
        check_installed()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [])
    with pytest.raises(ValueError, match="does not find the plugin for NSA models"):
        check_installed()
