"""Parameter groups, the learning-rate schedule, and gradient norms by kind."""

import pytest
import torch

from grpo.config import OptimizerSection
from grpo.optimizer import gradient_norms, learning_rate, make_optimizer, parameter_kind, set_learning_rate

NAMES = {
    "model.embed_tokens.weight": ("embed", (5, 4)),
    "model.layers.0.self_attn.q_proj.weight": ("q", (4, 4)),
    "model.layers.0.self_attn.q_proj.bias": ("q", (4,)),
    "model.layers.0.self_attn.cmp_k_proj.weight": ("cmp_k", (4, 4)),
    "model.layers.0.self_attn.win_v_proj.weight": ("win_v", (4, 4)),
    "model.layers.0.self_attn.o_proj.weight": ("o", (4, 4)),
    "model.layers.0.self_attn.phi_k.position": ("phi", (2, 4)),
    "model.layers.0.self_attn.phi_v.up.weight": ("phi", (4, 8)),
    "model.layers.0.self_attn.branch_gate.weight": ("gate", (6, 4)),
    "model.layers.0.self_attn.branch_mix": ("gate", (2, 3)),
    "model.layers.0.self_attn.k_norm.weight": ("norm", (4,)),
    "model.layers.0.mlp.gate_proj.weight": ("mlp", (4, 4)),
    "model.layers.0.input_layernorm.weight": ("norm", (4,)),
    "lm_head.weight": ("embed", (5, 4)),
    "something.else": ("other", (3,)),
}


def parameters():
    return [(name, torch.nn.Parameter(torch.ones(shape))) for name, (_, shape) in NAMES.items()]


def test_kind_of_every_parameter():
    assert {name: parameter_kind(name) for name in NAMES} == {name: kind for name, (kind, _) in NAMES.items()}


def test_only_matrices_decay_and_gates_have_their_own_rate():
    named = parameters()
    optimizer = make_optimizer(named, OptimizerSection(weight_decay=0.1, gate_learning_rate_scale=5.0))
    set_learning_rate(optimizer, 2e-3)
    by_id = {id(p): (group["weight_decay"], group["lr"]) for group in optimizer.param_groups for p in group["params"]}
    assert len(by_id) == len(named)
    for name, parameter in named:
        gate = "branch" in name
        decays = parameter.ndim == 2 and not gate and not name.endswith("position")
        assert by_id[id(parameter)] == pytest.approx((0.1 if decays else 0.0, 1e-2 if gate else 2e-3)), name


def test_schedules():
    base = {"learning_rate": 1.0, "warmup_steps": 2, "final_fraction": 0.1}
    rates = {
        kind: [learning_rate(step, 7, OptimizerSection(schedule=kind, **base)) for step in range(9)] for kind in ("constant", "linear", "cosine")
    }
    assert rates["constant"] == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 1, 1])
    assert rates["linear"] == pytest.approx([0.5, 1, 1, 0.775, 0.55, 0.325, 0.1, 0.1, 0.1])
    assert rates["cosine"] == pytest.approx([0.5, 1, 1, 0.86820, 0.55, 0.23180, 0.1, 0.1, 0.1], abs=1e-5)
    assert learning_rate(0, 1, OptimizerSection(learning_rate=1.0, schedule="linear")) == 1.0


def test_gradient_norms_by_kind():
    named = parameters()
    for name, parameter in named:
        if "q_proj" in name:
            parameter.grad = torch.full_like(parameter, 2.0)
    norms = gradient_norms(named)
    assert norms["q"].item() == pytest.approx((20 * 4) ** 0.5)
    assert norms["gate"].item() == 0
    assert set(norms) == {kind for kind, _ in NAMES.values()}
