"""The learner on a tiny NSA model: truths of the first step, invariances, KL, replay, state and weights."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from grpo.advantages import score_group
from grpo.config import RunConfig
from grpo.data_types import Completion, Group, Prompt, Score, ScoredGroup
from grpo.learner import Learner, resolve_device
from grpo.loss import kl_estimate
from grpo.truths import LearnerError
from nsa import NSAConfig, NSAForCausalLM

LOSSES = ("grpo", "token_mean", "dr_grpo", "gspo")
MAX_TOKENS = 24


def tiny_model(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    config = NSAConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        compress_block_size=4,
        compress_stride=2,
        select_block_size=4,
        num_selected_blocks=3,
        num_local_blocks=1,
        window_size=4,
        initializer_range=0.3,
        tie_word_embeddings=True,
    )
    model = NSAForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "phi" in name:
                parameter.normal_(std=0.3)  # so that φ's MLP takes part
    return model.to(dtype)


def make_config(*, model=None, rollout=None, algorithm=None, optimizer=None, train=None):
    return RunConfig.model_validate(
        {
            "model": {"path": "nowhere", "device": "cpu"} | (model or {}),
            "data": {"train": "nothing.jsonl"},
            "rollout": {"max_tokens": MAX_TOKENS} | (rollout or {}),
            "algorithm": {"mismatch_bound": 1e-4} | (algorithm or {}),
            "optimizer": {"learning_rate": 1e-2, "micro_batch_tokens": 100} | (optimizer or {}),
            "train": {"steps": 10} | (train or {}),
        }
    )


@torch.no_grad()
def policy_logprobs(model, prompt, completion, temperature=1.0):
    """The naive log-probs of a completion's tokens, and the block choices of all its tokens."""
    ids = torch.tensor(prompt + completion)
    packed = model.model.forward_packed(ids, torch.arange(len(ids)), torch.tensor([0, len(ids)]), return_selection=True)
    logprobs = (packed.hidden_TE @ model.lm_head.weight.t() / temperature).log_softmax(-1)
    rows = torch.arange(len(prompt), len(ids))
    return logprobs[rows - 1, ids[rows]].tolist(), packed.selection


def make_groups(model, *, seed=1, num_groups=3, group_size=4, temperature=1.0, record=False, shift=0.0, dead=()):
    """Random completions with the model's own log-probs (plus `shift`) and rewards that vary unless the group is in `dead`."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(low, high):
        return torch.randint(1, 32, (int(torch.randint(low, high, (1,), generator=generator)),), generator=generator).tolist()

    groups = []
    for index in range(num_groups):
        prompt = tokens(5, 9)
        completions, prompt_selection = [], None
        for _ in range(group_size):
            completion = tokens(1, MAX_TOKENS)
            logprobs, selection = policy_logprobs(model, prompt, completion, temperature)
            prompt_selection = selection[: len(prompt)]
            completions.append(
                Completion(
                    token_ids=tuple(completion),
                    logprobs=tuple(logprob + shift for logprob in logprobs),
                    text="",
                    finish_reason="stop",
                    policy_version=0,
                    selection=selection[len(prompt) :].clone() if record else None,
                )
            )
        group = Group(
            prompt=Prompt(prompt_id=str(index), token_ids=tuple(prompt), question="", answer="", text=""),
            completions=tuple(completions),
            prompt_selection=prompt_selection if record else None,
        )
        scores = [Score(value=0.5 if index in dead else float(i % 3), parts={}) for i in range(group_size)]
        groups.append(score_group(group, scores, kind="mean", max_tokens=MAX_TOKENS))
    return groups


def snapshot(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_first_step_has_ratio_one_kl_zero_no_mismatch_and_gradients_everywhere():
    model = tiny_model()
    before = snapshot(model)
    learner = Learner(make_config(algorithm={"kl_coefficient": 0.1}), model=model)
    stats = learner.step(make_groups(model, dead={1}))
    metrics = stats.metrics
    assert stats.policy_version == learner.policy_version == 1
    assert metrics["check/first_ratio_deviation"] == metrics["check/first_kl_difference"] == metrics["kl"] == 0
    assert metrics["ratio/mean"] == metrics["ratio/max"] == 1
    assert metrics["clip_ratio/region_mean"] == 0
    assert metrics["mismatch/max"] < 1e-5
    assert metrics["frac_reward_zero_std"] == metrics["groups/dead_fraction"] == pytest.approx(1 / 3)
    assert metrics["learner/sequences"] == 8
    assert metrics["entropy"] > 0.5
    assert metrics["learning_rate"] == pytest.approx(1e-2)
    kinds = ("q", "k", "v", "cmp_k", "cmp_v", "win_k", "win_v", "o", "phi", "gate", "mlp", "norm", "embed")
    assert all(metrics[f"grad_norm/{kind}"] > 0 for kind in kinds)
    assert metrics["grad_norm"] == pytest.approx(sum(metrics[f"grad_norm/{kind}"] ** 2 for kind in kinds) ** 0.5)
    assert all(not torch.equal(before[name], tensor) for name, tensor in learner.weights())


def test_sampler_temperature_is_the_learners():
    model = tiny_model()
    learner = Learner(make_config(rollout={"temperature": 0.6}), model=model)
    assert learner.step(make_groups(model, temperature=0.6)).metrics["mismatch/max"] < 1e-5


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_gradient_does_not_depend_on_the_micro_batch_budget(loss, estimator):
    groups = make_groups(tiny_model(dtype=torch.float64), shift=0.3)
    gradients, losses = [], []
    for budget in (1, 60, 10_000):
        model = tiny_model(dtype=torch.float64)
        config = make_config(
            algorithm={"loss": loss, "kl_coefficient": 0.1, "kl_estimator": estimator, "mismatch_bound": None},
            optimizer={"micro_batch_tokens": budget, "max_grad_norm": 1e9, "logprob_chunk_tokens": 7},
        )
        learner = Learner(config, model=model)
        learner._reference.load_state_dict(tiny_model(seed=5, dtype=torch.float64).state_dict())
        learner._reference_is_policy = False
        metrics = learner.step(groups).metrics
        assert metrics["kl"] > 1e-3
        losses.append(metrics["loss"])
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)
    for gradient in gradients[1:]:
        assert (gradient - gradients[0]).norm() <= 1e-6 * gradients[0].norm()


def test_the_second_mini_batch_is_measured_against_the_policy_before_the_first():
    model = tiny_model()
    groups = make_groups(model)
    metrics = Learner(make_config(algorithm={"mini_batches": 2, "mismatch_bound": None}), model=model).step(groups).metrics
    assert metrics["learner/updates"] == 2
    assert metrics["check/first_ratio_deviation"] == 0
    assert metrics["ratio/max"] > 1, "the second mini-batch's old log-probs are those from before the first update"
    assert metrics["mismatch/mean"] < 1e-6, "the sampler agrees with the policy from before the step in both"


def test_further_epochs_and_mini_batches_start_from_ratio_one_and_then_leave_it():
    model = tiny_model()
    learner = Learner(make_config(algorithm={"inner_epochs": 2, "mini_batches": 2, "kl_coefficient": 0.1}), model=model)
    metrics = learner.step(make_groups(model, num_groups=4)).metrics
    assert metrics["learner/updates"] == 4
    assert metrics["check/first_ratio_deviation"] == metrics["check/first_kl_difference"] == 0
    assert metrics["ratio/max"] > 1
    assert metrics["kl"] > 0
    assert metrics["mismatch/max"] < 1e-5  # of the old log-probs, whatever the updates did
    assert learner.policy_version == 1


def test_old_logprobs_computed_first_give_the_same_update_as_by_construction():
    updated = []
    for algorithm in ({}, {"kl_coefficient": 1e-30, "kl_place": "reward"}):
        model = tiny_model()
        learner = Learner(make_config(algorithm=algorithm), model=model)
        learner.step(make_groups(model))
        updated.append(snapshot(model))
    assert all(torch.equal(updated[0][name], updated[1][name]) for name in updated[0])


def test_kl_in_the_reward_equals_advantages_of_rewards_less_the_sequences_kl():
    beta, other = 0.05, tiny_model(seed=5)
    model = tiny_model()
    groups = make_groups(model, dead={0})
    learner = Learner(make_config(algorithm={"kl_coefficient": beta, "kl_place": "reward", "kl_estimator": "k1", "advantage": "std"}), model=model)
    learner._reference.load_state_dict(other.state_dict())
    learner._reference_is_policy = False
    metrics = learner.step(groups).metrics
    shaped = []
    plain_model = tiny_model()
    for scored in groups:
        scores = []
        for completion, score in zip(scored.group.completions, scored.scores):
            prompt, tokens = list(scored.group.prompt.token_ids), list(completion.token_ids)
            ours, theirs = (torch.tensor(policy_logprobs(m, prompt, tokens)[0]) for m in (plain_model, other))
            scores.append(replace(score, value=score.value - beta * kl_estimate(ours, theirs, "k1").sum().item()))
        shaped.append(score_group(scored.group, scores, kind="std", max_tokens=MAX_TOKENS))
    expected = Learner(make_config(), model=plain_model).step(shaped[1:]).metrics  # the dead group stays out
    assert metrics["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    assert metrics["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)


def test_reference_is_refreshed_on_time_and_checked_again():
    model = tiny_model()
    learner = Learner(make_config(algorithm={"kl_coefficient": 0.1, "reference_refresh_steps": 2, "mismatch_bound": None}), model=model)
    groups = make_groups(model)
    kl = [learner.step(groups).metrics for _ in range(4)]
    assert [metrics["kl"] == 0 for metrics in kl] == [True, False, True, False]
    assert ["check/first_kl_difference" in metrics for metrics in kl] == [True, False, True, False]


def test_weights_changed_behind_the_learners_back_are_noticed():
    model = tiny_model()
    learner = Learner(make_config(algorithm={"kl_coefficient": 0.1, "mismatch_bound": None}), model=model)
    with torch.no_grad():
        model.model.norm.weight.mul_(1.1)
    with pytest.raises(LearnerError, match="KL must be exactly 0"):
        learner.step(make_groups(model))


def test_a_model_that_is_not_deterministic_is_noticed(monkeypatch):
    model = tiny_model()
    groups = make_groups(model)
    forward = model.model.forward_packed

    def noisy(*args, **kwargs):
        packed = forward(*args, **kwargs)
        return replace(packed, hidden_TE=packed.hidden_TE + 1e-3 * torch.randn_like(packed.hidden_TE))

    monkeypatch.setattr(model.model, "forward_packed", noisy)
    with pytest.raises(LearnerError, match="ratio must be exactly 1"):
        Learner(make_config(algorithm={"inner_epochs": 2, "mismatch_bound": None}), model=model).step(groups)


@pytest.mark.parametrize("shift", [0.5, float("nan")])
def test_mismatch_above_the_bound_stops_before_the_update(shift):
    model = tiny_model()
    before = snapshot(model)
    learner = Learner(make_config(algorithm={"mismatch_bound": 0.1}), model=model)
    with pytest.raises(LearnerError, match=r"mean \|Δ log p\| is (0.5|nan) nats .* algorithm.mismatch_bound=0.1"):
        learner.step(make_groups(model, shift=shift))
    assert all(torch.equal(before[name], tensor) for name, tensor in learner.weights())
    assert learner.policy_version == 0


def test_a_gradient_that_is_not_finite_leaves_the_weights_alone():
    model = tiny_model()
    before = snapshot(model)
    groups = [replace(scored, advantages=tuple(a * 1e38 for a in scored.advantages)) for scored in make_groups(model)]
    learner = Learner(make_config(algorithm={"loss": "token_mean"}, optimizer={"learning_rate": 1.0}), model=model)
    with pytest.raises(LearnerError, match="not finite"):
        learner.step([replace(scored, advantages=tuple(a * 10 for a in scored.advantages)) for scored in groups])
    assert all(torch.equal(before[name], tensor) for name, tensor in learner.weights())


def test_nothing_to_train_on_changes_no_weight_but_counts_the_step():
    model = tiny_model()
    before = snapshot(model)
    learner = Learner(make_config(), model=model)
    metrics = learner.step(make_groups(model, dead={0, 1, 2})).metrics
    assert metrics["groups/dead_fraction"] == 1
    assert metrics["learner/updates"] == metrics["loss"] == metrics["grad_norm"] == 0
    assert learner.policy_version == 1
    assert all(torch.equal(before[name], tensor) for name, tensor in learner.weights())
    assert learner.step([]).metrics["learner/updates"] == 0


def test_recorded_selections_agree_with_recomputed_ones_and_replay_gives_the_same_step():
    results = {}
    for mode in ("recompute", "replay"):
        model = tiny_model()
        learner = Learner(make_config(algorithm={"selection": mode}), model=model)
        results[mode] = learner.step(make_groups(model, record=True)).metrics
    assert results["recompute"].pop("selection/agreement") == 1.0
    assert results["replay"] == pytest.approx(results["recompute"], rel=1e-4, abs=1e-6)


def test_a_changed_record_lowers_agreement_and_changes_the_replayed_policy():
    model = tiny_model()
    groups = make_groups(model, record=True)

    def first_free_block(completion):
        # the free choice of the last, sparse queries becomes another block: 0 is forced, the last is the query's own
        selection = completion.selection.clone()
        free = selection[:, :, :, 1]
        selection[:, :, :, 1] = torch.where((free > 1) & (selection[:, :, :, 2] > 3), 1, free)
        return replace(completion, selection=selection)

    changed = [
        replace(scored, group=replace(scored.group, completions=tuple(first_free_block(c) for c in scored.group.completions))) for scored in groups
    ]
    recomputed = Learner(make_config(), model=tiny_model()).step(changed).metrics
    assert 0.5 < recomputed["selection/agreement"] < 1
    replayed = Learner(make_config(algorithm={"selection": "replay", "mismatch_bound": None}), model=tiny_model()).step(changed).metrics
    assert replayed["mismatch/mean"] > 1e-4


def test_replay_needs_records():
    model = tiny_model()
    with pytest.raises(ValueError, match="recorded no selections"):
        Learner(make_config(algorithm={"selection": "replay"}), model=model).step(make_groups(model))


def test_sparse_queries_counts_those_with_unselected_blocks():
    prompt = Prompt(prompt_id="p", token_ids=(1,) * 10, question="", answer="", text="")
    completions = tuple(Completion(token_ids=(2,) * n, logprobs=(-3.0,) * n, text="", finish_reason="stop", policy_version=0) for n in (2, 6))
    scored = ScoredGroup(group=Group(prompt=prompt, completions=completions), scores=(Score(value=0.0, parts={}),) * 2, advantages=(-0.5, 0.5))
    metrics = Learner(make_config(algorithm={"mismatch_bound": None}), model=tiny_model()).step([scored]).metrics
    # blocks of 4, n = 3: queries from position 12 on see a fourth block; queries are 9, 10 and 9 … 14
    assert metrics["selection/sparse_queries"] == pytest.approx(3 / 8)


def test_repeated_steps_raise_the_rewarded_completion():
    model = tiny_model()
    groups = make_groups(model, num_groups=1, group_size=2)
    scored = groups[0]
    prompt = list(scored.group.prompt.token_ids)
    worse, better = (list(completion.token_ids) for completion in scored.group.completions)

    def margin():
        return sum(policy_logprobs(model, prompt, better)[0]) - sum(policy_logprobs(model, prompt, worse)[0])

    start = margin()
    learner = Learner(make_config(algorithm={"mismatch_bound": None, "epsilon_high": 10.0}), model=model)
    for _ in range(5):
        learner.step(groups)
    assert margin() > start + 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_half_precision_compute_keeps_fp32_weights_ratio_one_and_kl_zero(dtype, device):
    model = tiny_model()
    groups = make_groups(model)
    config = make_config(model={"dtype": dtype, "device": device}, algorithm={"kl_coefficient": 0.1, "inner_epochs": 2, "mismatch_bound": None})
    learner = Learner(config, model=model)
    metrics = learner.step(groups).metrics
    assert metrics["check/first_ratio_deviation"] == metrics["check/first_kl_difference"] == 0
    assert 0 < metrics["mismatch/mean"] < 0.2
    assert metrics.get("fp16/skipped", 0.0) == 0
    assert metrics["grad_norm/phi"] > 0
    assert all(tensor.dtype == torch.float32 for _, tensor in learner.weights())


def test_an_fp16_overflow_skips_the_update_and_lowers_the_loss_scale():
    model = tiny_model()
    before = snapshot(model)
    groups = [replace(scored, advantages=tuple(a * 1e6 for a in scored.advantages)) for scored in make_groups(model)]
    learner = Learner(make_config(model={"dtype": "float16"}, algorithm={"mismatch_bound": None}), model=model)
    metrics = learner.step(groups).metrics
    assert metrics["fp16/skipped"] == 1
    assert metrics["fp16/loss_scale"] == 2**15
    assert all(torch.equal(before[name], tensor) for name, tensor in learner.weights())


def test_gradient_checkpointing_gives_the_same_step():
    updated = []
    for checkpointing in (False, True):
        model = tiny_model()
        learner = Learner(make_config(model={"gradient_checkpointing": checkpointing}, algorithm={"kl_coefficient": 0.1}), model=model)
        learner.step(make_groups(model))
        updated.append(snapshot(model))
    assert all(torch.equal(updated[0][name], updated[1][name]) for name in updated[0])


def test_resumed_steps_are_bit_equal(tmp_path):
    start = tiny_model()
    start.save_pretrained(tmp_path / "start")
    config = make_config(
        model={"path": str(tmp_path / "start"), "attention_backend": "torch"},
        algorithm={"kl_coefficient": 0.1, "reference_refresh_steps": 2, "inner_epochs": 2, "mismatch_bound": None},
        optimizer={"schedule": "cosine", "warmup_steps": 1},
    )
    groups = [make_groups(start, seed=seed) for seed in range(6)]
    learner = Learner(config)
    for step in range(3):
        learner.step(groups[step])
    learner.save_model(tmp_path / "checkpoint")
    torch.save(learner.state_dict(), tmp_path / "learner.pt")
    expected = [learner.step(groups[step]).metrics for step in range(3, 6)]
    resumed = Learner(config)
    resumed.load_state_dict(torch.load(tmp_path / "learner.pt", weights_only=True), tmp_path / "checkpoint")
    assert resumed.policy_version == 3
    assert [resumed.step(groups[step]).metrics for step in range(3, 6)] == expected
    for (name, ours), (_, theirs) in zip(resumed.weights(), learner.weights()):
        assert torch.equal(ours, theirs), name


def test_state_of_another_format_or_model_is_refused(tmp_path):
    learner = Learner(make_config(), model=tiny_model())
    with pytest.raises(ValueError, match="format 0"):
        learner.load_state_dict(learner.state_dict() | {"format": 0}, tmp_path)
    config = tiny_model().config
    config.hidden_size = 8
    NSAForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does not hold the weights"):
        learner.load_state_dict(learner.state_dict(), tmp_path)


def test_saved_model_loads_with_the_auto_class_and_keeps_its_own_backend_setting(tmp_path):
    model = tiny_model()
    learner = Learner(make_config(model={"attention_backend": "torch"}), model=model)
    learner.step(make_groups(model))
    learner.save_model(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.attention_backend == "auto"
    assert model.config.attention_backend == "torch"
    weights = dict(learner.weights())
    assert all(torch.equal(weights[name], parameter) for name, parameter in loaded.named_parameters())


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == torch.device("cpu")
    with pytest.raises(ValueError, match="no CUDA GPU"):
        resolve_device("cuda")


def test_kernels_without_a_gpu_are_refused_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="the kernels need a CUDA GPU, got tensors on cpu"):
        Learner(make_config(model={"attention_backend": "triton", "path": "nowhere"}), device="cpu")
