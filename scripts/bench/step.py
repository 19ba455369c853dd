"""Times one GRPO step's parts on a random model: rollout (tokens/s), update (tokens/s), weight sync, beside a dense peer.

    python scripts/bench/step.py                        # CPU, tiny shape
    python scripts/bench/step.py --shape smollm2 --device cuda --dtype bfloat16 --sequences 512 --prompt 128 --new 256

The peer is Transformers' LlamaForCausalLM of the same size in the same process: `generate` for the rollout, forward and
backward over the same packed tokens (padded, SDPA) for the update. Random weights and tokens; nothing is downloaded.
Append what it prints, with date, machine and command, to RESULTS.md.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from grpo.config import AlgorithmSection, DataSection, ModelSection, OptimizerSection, RolloutSection, RunConfig
from grpo.data_types import Prompt, Score, ScoredGroup
from grpo.learner import Learner
from grpo.rollout.engine import Sampling
from grpo.rollout.torch_engine import TorchEngine
from nsa import NSAConfig, NSAForCausalLM

SHAPES = {
    "tiny": {"hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 400},
    "smollm2": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
    },
}
SPARSITY = {
    "tiny": {"compress_block_size": 8, "compress_stride": 4, "select_block_size": 8, "num_selected_blocks": 4, "window_size": 8},
    "smollm2": {"compress_block_size": 16, "compress_stride": 8, "select_block_size": 16, "num_selected_blocks": 8, "window_size": 64},
}


def median_seconds(run: Callable[[], object], device: str, repeats: int) -> float:
    """Median wall time after one warm-up call."""
    times = []
    for index in range(repeats + 1):
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        if index:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=93)
    parser.add_argument("--new", type=int, default=45)
    parser.add_argument("--micro-batch", type=int, default=16384, help="tokens")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--kv", choices=["separate", "shared"], default="separate")
    parser.add_argument("--no-graphs", action="store_true")
    parser.add_argument("--no-peer", action="store_true")
    args = parser.parse_args()
    if args.sequences % args.group:
        parser.error(f"--sequences {args.sequences} must be a multiple of --group {args.group}")

    torch.manual_seed(0)
    shape, dtype = SHAPES[args.shape], getattr(torch, args.dtype)
    common = {"max_position_embeddings": 8192, "tie_word_embeddings": True, "pad_token_id": 0, "eos_token_id": None, "bos_token_id": None}
    model = NSAForCausalLM(NSAConfig(**shape, **SPARSITY[args.shape], **common, kv=args.kv))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({f"t{i}": i for i in range(shape["vocab_size"])}, unk_token="t0")))
    config = RunConfig(
        model=ModelSection(path="random", device=args.device, dtype=args.dtype),
        data=DataSection(train="random"),
        rollout=RolloutSection(group_size=args.group, max_tokens=args.new),
        algorithm=AlgorithmSection(mismatch_bound=None),
        optimizer=OptimizerSection(micro_batch_tokens=args.micro_batch),
    )
    learner = Learner(config, model=model)
    twin = NSAForCausalLM(model.config)
    engine = TorchEngine(
        twin, tokenizer, max_sequences=args.sequences, device=args.device, dtype=dtype, cuda_graphs=not args.no_graphs
    )
    source = torch.Generator().manual_seed(0)
    prompts = [
        Prompt(prompt_id=str(i), token_ids=tuple(torch.randint(1, shape["vocab_size"], (args.prompt,), generator=source).tolist()), question="", answer="", text="")
        for i in range(args.sequences // args.group)
    ]
    sampling = Sampling(max_tokens=args.new, group_size=args.group, stop=())
    tokens = args.sequences * args.new
    packed = args.sequences * (args.prompt + args.new)
    print(f"{torch.__version__}, {torch.cuda.get_device_name() if args.device == 'cuda' else f'CPU, {torch.get_num_threads()} threads'}, {vars(args)}")

    sync = median_seconds(lambda: engine.load_weights(1, learner.weights()), args.device, args.repeats)
    seconds = median_seconds(lambda: list(engine.generate(prompts, sampling)), args.device, args.repeats)
    print(f"rollout   NSA engine            {seconds:8.3f} s  {tokens / seconds:10.0f} new tokens/s  {seconds / args.new * 1e3:8.2f} ms a step")
    groups = [replace(group) for group in engine.generate(prompts, sampling)]
    scored = [
        ScoredGroup(
            group=group,
            scores=tuple(Score(value=float(i % 2), parts={}) for i in range(args.group)),
            advantages=tuple(float(i % 2) - 0.5 for i in range(args.group)),
        )
        for group in groups
    ]
    update = median_seconds(lambda: learner.step(scored), args.device, args.repeats)
    print(f"update    NSA learner           {update:8.3f} s  {packed / update:10.0f} tokens/s")
    print(f"sync      learner → engine      {sync:8.3f} s")
    if args.device == "cuda":
        print(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
    if args.no_peer:
        return
    del learner, engine, model, twin
    dense = LlamaForCausalLM(LlamaConfig(**shape, **common)).to(args.device)
    ids = torch.randint(1, shape["vocab_size"], (args.sequences, args.prompt + args.new), device=args.device)
    rows = max(1, args.micro_batch // ids.shape[1])

    def dense_update() -> None:
        for part in ids.split(rows):
            with torch.autocast(args.device, dtype=dtype, enabled=dtype != torch.float32):
                dense(part, labels=part, use_cache=False).loss.backward()

    seconds = median_seconds(dense_update, args.device, args.repeats)
    print(f"update    dense Llama, HF       {seconds:8.3f} s  {packed / seconds:10.0f} tokens/s (forward and backward alone)")
    dense = dense.to(dtype).eval()
    options = {"max_new_tokens": args.new, "do_sample": True, "pad_token_id": 0}
    seconds = median_seconds(lambda: dense.generate(ids[:, : args.prompt], **options), args.device, 1)
    print(f"rollout   dense Llama, generate {seconds:8.3f} s  {tokens / seconds:10.0f} new tokens/s  {seconds / args.new * 1e3:8.2f} ms a step")


if __name__ == "__main__":
    main()
