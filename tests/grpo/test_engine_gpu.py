"""On a GPU: CUDA-graph decoding draws what eager decoding draws, and its log-probs are those of a packed forward."""

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from grpo.data_types import Group, Prompt
from grpo.rollout.engine import Sampling
from grpo.rollout.torch_engine import TorchEngine
from nsa import NSAConfig, NSAForCausalLM

pytestmark = pytest.mark.gpu


def make_engine(*, graphs: bool, dtype: torch.dtype = torch.float32) -> TorchEngine:
    torch.manual_seed(0)
    config = NSAConfig(
        vocab_size=211, hidden_size=96, intermediate_size=128, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2,
        compress_block_size=8, compress_stride=4, select_block_size=8, num_selected_blocks=4, window_size=16, eos_token_id=3,
    )  # fmt: skip
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({f"t{i}": i for i in range(211)}, unk_token="t0")))
    return TorchEngine(NSAForCausalLM(config), tokenizer, max_sequences=24, device="cuda", dtype=dtype, cuda_graphs=graphs)


def prompts() -> list[Prompt]:
    source = torch.Generator().manual_seed(2)
    lengths = [5, 40, 70, 33, 90, 64, 1, 17]
    ids = [tuple(torch.randint(4, 211, (n,), generator=source).tolist()) for n in lengths]
    return [Prompt(prompt_id=str(i), token_ids=x, question="", answer="", text="") for i, x in enumerate(ids)]


def run(engine: TorchEngine, sampling: Sampling) -> dict[str, Group]:
    return {group.prompt.prompt_id: group for group in engine.generate(prompts(), sampling)}


@pytest.mark.parametrize("record", [False, True])
def test_graphs_draw_what_eager_steps_draw(record: bool) -> None:
    sampling = Sampling(max_tokens=60, group_size=6, record_selection=record)
    graph_engine = make_engine(graphs=True)
    eager, first = run(make_engine(graphs=False), sampling), run(graph_engine, sampling)
    again = run(graph_engine, sampling)
    for key, group in eager.items():
        for ours, other, repeat in zip(group.completions, first[key].completions, again[key].completions, strict=True):
            assert ours.token_ids == other.token_ids == repeat.token_ids
            assert torch.allclose(torch.tensor(ours.logprobs), torch.tensor(other.logprobs), atol=1e-4)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_logprobs_are_those_of_a_packed_forward(dtype: torch.dtype, bound: float) -> None:
    engine = make_engine(graphs=True, dtype=dtype)
    for group in run(engine, Sampling(max_tokens=60, group_size=6)).values():
        scores = engine.score([group.prompt.token_ids + completion.token_ids for completion in group.completions])
        for completion, score in zip(group.completions, scores, strict=True):
            difference = (score[len(group.prompt.token_ids) :] - torch.tensor(completion.logprobs)).abs()
            assert difference.median() <= bound


def test_load_weights_reaches_captured_graphs() -> None:
    engine = make_engine(graphs=True)
    sampling = Sampling(max_tokens=20, group_size=2)
    before = run(engine, sampling)
    run(engine, sampling)
    torch.manual_seed(7)
    other = NSAForCausalLM(engine.config)
    engine.load_weights(1, ((name, parameter.detach()) for name, parameter in other.named_parameters()))
    after = run(engine, sampling)
    assert any(before[key].completions[0].token_ids != after[key].completions[0].token_ids for key in before)
    fresh = TorchEngine(other, engine.tokenizer, max_sequences=24, device="cuda", cuda_graphs=False)
    expected = run(fresh, sampling)
    assert all(expected[key].completions[0].token_ids == after[key].completions[0].token_ids for key in expected)
