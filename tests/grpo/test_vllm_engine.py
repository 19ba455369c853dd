"""The vLLM engine itself, on the CPU: against the built-in engine, after a sync, as a whole run, and when things go wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo.data_types import Group, Prompt
from grpo.errors import EngineFailed
from grpo.log import read_lines
from grpo.rollout.engine import Sampling
from grpo.rollout.torch_engine import TorchEngine
from grpo.rollout.vllm_settings import VllmSettings
from grpo.rollout.weights import WeightError
from grpo.trainer import train

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]
start_vllm = pytest.importorskip("grpo.rollout.vllm_start", reason="needs vLLM").start_vllm

BOUND = 1e-4


def settings(path, **changes) -> VllmSettings:
    given = {
        "model_path": str(path), "device": "cpu", "dtype": "float32", "max_sequences": 8, "context": 256, "cache_bytes": 2**25, "gpu_share": 0.9,
        "tensor_parallel": 1, "sleeps": False, "cuda_graphs": False, "records_selection": True, "attention_backend": "auto", "stall_deadline_s": 60,
    }  # fmt: skip
    return VllmSettings(**(given | changes))


@pytest.fixture(scope="module")
def torch_engine(tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    engine = TorchEngine(model, AutoTokenizer.from_pretrained(tiny_model), max_sequences=8)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def engine(tiny_model):
    engine = start_vllm(settings(tiny_model))
    yield engine
    engine.close()


PROMPTS = [
    Prompt(prompt_id=f"p{i}", token_ids=tuple(7 + (i + j * j) % 20 for j in range(length)), question="", answer="", text="")
    for i, length in enumerate((1, 9, 40, 90))
]


def run(engine, **sampling) -> dict[str, Group]:
    return {group.prompt.prompt_id: group for group in engine.generate(PROMPTS, Sampling(**sampling))}


def deviation(torch_engine, groups: dict[str, Group]) -> float:
    """Largest difference of a completion's log-probabilities from the built-in engine's score of the same tokens."""
    worst = 0.0
    for group in groups.values():
        start = len(group.prompt.token_ids)
        scored = torch_engine.score([group.prompt.token_ids + one.token_ids for one in group.completions])
        for one, values in zip(group.completions, scored, strict=True):
            worst = max(worst, (values[start:] - torch.tensor(one.logprobs)).abs().max().item())
    return worst


def test_samples_have_the_models_log_probabilities_and_repeat_with_their_seed(engine, torch_engine):
    groups = run(engine, group_size=3, max_tokens=60, seed=3)
    assert set(groups) == {prompt.prompt_id for prompt in PROMPTS}
    assert deviation(torch_engine, groups) < BOUND
    again = run(engine, group_size=3, max_tokens=60, seed=3)
    assert [one.token_ids for group in groups.values() for one in group.completions] == [
        one.token_ids for name in groups for one in again[name].completions
    ]
    other = run(engine, group_size=3, max_tokens=60, seed=4)
    assert any(other[name].completions[0].token_ids != groups[name].completions[0].token_ids for name in groups)
    assert len({one.token_ids for one in groups["p3"].completions}) > 1


def test_greedy_tokens_texts_and_stops_are_those_of_the_built_in_engine(engine, torch_engine):
    for stop in ((), ("+",), ("1 2", "</answer>")):
        mine = run(engine, group_size=2, max_tokens=50, temperature=0.0, stop=stop)
        theirs = run(torch_engine, group_size=2, max_tokens=50, temperature=0.0, stop=stop)
        for name, group in theirs.items():
            for one, other in zip(mine[name].completions, group.completions, strict=True):
                assert (one.token_ids, one.text, one.finish_reason) == (other.token_ids, other.text, other.finish_reason)


def test_truncated_distributions_are_those_that_were_sampled(engine, torch_engine):
    groups = run(engine, group_size=4, max_tokens=12, temperature=0.7, top_k=1)
    assert all(max(map(abs, one.logprobs)) < 1e-6 for group in groups.values() for one in group.completions)
    one = run(engine, group_size=1, max_tokens=1, temperature=0.5, seed=1)["p1"].completions[0]
    plain = torch_engine.score([(*PROMPTS[1].token_ids, token) for token in range(torch_engine.config.vocab_size)])
    expected = (torch.stack([values[-1] for values in plain]) / 0.5).log_softmax(0)
    assert one.logprobs[0] == pytest.approx(expected[one.token_ids[0]].item(), abs=BOUND)


def test_scores_and_block_choices_are_those_of_the_built_in_engine(engine, torch_engine):
    sequences = [prompt.token_ids for prompt in PROMPTS] + [()]
    for mine, theirs in zip(engine.score(sequences), torch_engine.score(sequences), strict=True):
        assert torch.allclose(mine, theirs, atol=BOUND)
    mine = run(engine, group_size=2, max_tokens=40, temperature=0.0, record_selection=True)
    theirs = run(torch_engine, group_size=2, max_tokens=40, temperature=0.0, record_selection=True)
    for name, group in theirs.items():
        assert torch.equal(mine[name].prompt_selection.long(), group.prompt_selection.long())
        for one, other in zip(mine[name].completions, group.completions, strict=True):
            assert torch.equal(one.selection.long(), other.selection.long())


def test_a_groups_prompt_is_computed_once(engine):
    engine.sleep()  # forgets cached prompts
    engine.wake()
    before = engine.health()["prompt_tokens_cached"]
    (group,) = engine.generate(PROMPTS[3:], Sampling(group_size=4, max_tokens=2))
    cached = engine.health()["prompt_tokens_cached"] - before
    assert 3 * 64 <= cached < 3 * len(group.prompt.token_ids)


def test_a_cache_of_zeros_gives_the_same_samples(engine):
    first = run(engine, group_size=2, max_tokens=12, seed=8)
    assert engine._driver.reset_prefix_cache()
    assert engine._driver.call("nsa_zero_cache")[0] > 2**20
    again = run(engine, group_size=2, max_tokens=12, seed=8)
    assert [[one.token_ids for one in first[name].completions] for name in first] == [
        [one.token_ids for one in again[name].completions] for name in first
    ]


def changed_weights(torch_engine) -> list[tuple[str, torch.Tensor]]:
    return [(name, parameter.detach() * 1.1) for name, parameter in torch_engine.model.named_parameters()]


def test_a_sync_changes_everything_and_one_that_breaks_off_stops_the_engine_until_the_next(engine, torch_engine, tiny_model):
    initial = [(name, parameter.detach().clone()) for name, parameter in torch_engine.model.named_parameters()]
    assert engine.checksum() == torch_engine.checksum()
    before = run(engine, group_size=1, max_tokens=20, temperature=0.0)
    new = changed_weights(torch_engine)
    engine.load_weights(7, iter(new))
    torch_engine.load_weights(7, iter(new))
    assert engine.checksum() == torch_engine.checksum()
    after = run(engine, group_size=2, max_tokens=40)
    assert {one.policy_version for group in after.values() for one in group.completions} == {7}
    assert deviation(torch_engine, after) < BOUND
    assert any(after[name].completions[0].logprobs[0] != before[name].completions[0].logprobs[0] for name in after)

    def torn():
        yield from initial[:3]
        raise ConnectionError("the learner died")

    for broken, error, words in (
        (torn(), ConnectionError, "the learner died"),
        (iter(initial[:-1]), WeightError, "no tensor came for 1 of the model's parameters"),
        (iter([*initial[:2], ("model.nothing", torch.zeros(1))]), WeightError, "no parameter named 'model.nothing'"),
        (iter([(initial[0][0], initial[0][1][:2])]), WeightError, "must have shape"),
    ):
        with pytest.raises(error, match=words):
            engine.load_weights(8, broken)
        with pytest.raises(EngineFailed, match="loaded in part; call load_weights"):
            engine.generate(PROMPTS, Sampling())
    engine.load_weights(9, iter(initial))
    torch_engine.load_weights(9, iter(initial))
    assert engine.health()["version"] == 9
    assert deviation(torch_engine, run(engine, group_size=1, max_tokens=10)) < BOUND


@pytest.mark.parametrize("selection", ["recompute", "replay"])
def test_a_whole_run_in_one_process(tiny_config_of, selection):
    check_run(train(tiny_config_of("rollout.engine=vllm", "train.steps=2", f"algorithm.selection={selection}", "rollout.sleep=true")))


@pytest.mark.ray
def test_a_whole_run_of_ray_actors(tiny_config_of):
    check_run(train(tiny_config_of("rollout.engine=vllm", "train.steps=2", "runtime.kind=ray", "runtime.start_deadline_s=200")))


def check_run(run_dir: Path) -> None:
    steps = [line for line in read_lines(run_dir / "metrics.jsonl") if "reward" in line]
    assert [line["step"] for line in steps] == [1, 2]
    assert max(line["mismatch/max"] for line in steps) < BOUND
    assert max(line["probe/max"] for line in steps) < BOUND
    assert all(line["learner/updates"] == 1 for line in steps)
    assert (run_dir / "checkpoints" / "final" / "model.safetensors").is_file()
