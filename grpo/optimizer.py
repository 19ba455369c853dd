"""AdamW over the policy's fp32 parameters: groups, learning-rate schedule, gradient norms by kind of parameter.

The learning rate is a pure function of the step, so there is no scheduler state to save. Leaves out loss scaling for
fp16, which the learner holds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from grpo.config import OptimizerSection

_KINDS = {
    "q_proj": "q",
    "k_proj": "k",
    "v_proj": "v",
    "o_proj": "o",
    "cmp_k_proj": "cmp_k",
    "cmp_v_proj": "cmp_v",
    "win_k_proj": "win_k",
    "win_v_proj": "win_v",
    "phi_k": "phi",
    "phi_v": "phi",
    "branch_gate": "gate",
    "branch_mix": "gate",
    "mlp": "mlp",
    "embed_tokens": "embed",
    "lm_head": "embed",
}


def parameter_kind(name: str) -> str:
    """`q, k, v, o, cmp_k, …, phi, gate, mlp, norm, embed` of a parameter's name; `other` where none fits."""
    parts = name.split(".")
    if any("norm" in part for part in parts):
        return "norm"
    return next((_KINDS[part] for part in parts if part in _KINDS), "other")


def make_optimizer(named_parameters: Iterable[tuple[str, torch.nn.Parameter]], section: OptimizerSection) -> torch.optim.AdamW:
    """AdamW with three groups: matrices (with weight decay), vectors and φ's positions (without), gates (without, own rate)."""
    groups: dict[str, list[torch.nn.Parameter]] = {"decay": [], "plain": [], "gate": []}
    for name, parameter in named_parameters:
        kind = parameter_kind(name)
        decays = parameter.ndim >= 2 and kind != "norm" and not name.endswith("position")
        groups["gate" if kind == "gate" else "decay" if decays else "plain"].append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "weight_decay": section.weight_decay if group == "decay" else 0.0,
                "lr_scale": section.gate_learning_rate_scale if group == "gate" else 1.0,
            }
            for group, parameters in groups.items()
            if parameters
        ],
        lr=section.learning_rate,
        betas=section.betas,
        eps=section.eps,
        fused=True,
    )


def learning_rate(step: int, total_steps: int, section: OptimizerSection) -> float:
    """The rate of step `step` (from 0): linear warm-up over `warmup_steps`, then the schedule down to `final_fraction` at the last step.

    The first step's rate is learning_rate / warmup_steps, never 0. Steps beyond `total_steps` keep the last rate.
    """
    if step < section.warmup_steps:
        return section.learning_rate * (step + 1) / section.warmup_steps
    if section.schedule == "constant":
        return section.learning_rate
    span = max(1, total_steps - 1 - section.warmup_steps)
    progress = min(1.0, (step - section.warmup_steps) / span)
    remaining = 1 - progress if section.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return section.learning_rate * (section.final_fraction + (1 - section.final_fraction) * remaining)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group `rate` times its own scale."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]


def gradient_norms(named_parameters: Iterable[tuple[str, torch.nn.Parameter]]) -> dict[str, torch.Tensor]:
    """L2 norm of the gradient of each kind of parameter, scalars on the parameters' device; 0 where none has a gradient."""
    grads: dict[str, list[torch.Tensor]] = {}
    for name, parameter in named_parameters:
        of_kind = grads.setdefault(parameter_kind(name), [])
        if parameter.grad is not None:
            of_kind.append(parameter.grad)
    return {kind: torch.nn.utils.get_total_norm(of_kind) for kind, of_kind in grads.items()}
