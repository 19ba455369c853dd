"""Start vLLM and put our engine on top: the one place where both meet."""

from __future__ import annotations

import torch
from transformers import AutoTokenizer, GenerationConfig

from grpo.memory_plan import read_model_config
from grpo.rollout.requests import eos_token_ids
from grpo.rollout.vllm_driver import VllmDriver
from grpo.rollout.vllm_engine import VllmEngine
from grpo.rollout.vllm_settings import VllmSettings


def start_vllm(settings: VllmSettings) -> VllmEngine:
    """A running engine with the checkpoint's weights as version 0.

    Raises:
        ValueError: vLLM is built for another device, or refuses the settings (too little memory for its cache, for instance).
    """
    config = read_model_config(settings.model_path)
    try:
        generation = GenerationConfig.from_pretrained(settings.model_path)
    except OSError:  # a checkpoint without generation_config.json
        generation = None
    tokenizer = AutoTokenizer.from_pretrained(settings.model_path)
    before = torch.get_num_threads()
    driver = VllmDriver(settings)
    torch.set_num_threads(before)
    return VllmEngine(
        driver,
        tokenizer,
        config,
        eos_ids=eos_token_ids((generation, config), config.vocab_size),
        context=settings.context,
        max_sequences=settings.max_sequences,
        sleeps=settings.sleeps and settings.device == "cuda",
        records_selection=settings.records_selection,
        in_process=settings.tensor_parallel == 1,
        stall_deadline_s=settings.stall_deadline_s,
    )
