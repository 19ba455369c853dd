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
import sys
import time
from collections.abc import Callable
from pathlib import Path

# Python puts this folder first on its path, where kernels.py would pass for the package `kernels` that transformers looks for.
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parent]

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
    "tiny": {
        "hidden_size": 128,
        "intermediate_size": 320,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 400,
    },
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
COMMON = {"max_position_embeddings": 8192, "tie_word_embeddings": True, "pad_token_id": 0, "eos_token_id": None, "bos_token_id": None}


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
    parser.add_argument("--backend", default="auto", help="attention backend of ours: auto, torch, triton")
    parser.add_argument("--no-peer", action="store_true")
    args = parser.parse_args()
    if args.sequences % args.group:
        parser.error(f"--sequences {args.sequences} must be a multiple of --group {args.group}")
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {where}, {vars(args)}")
    torch.manual_seed(0)
    time_ours(args)
    if not args.no_peer:
        time_peer(args)


def time_ours(args: argparse.Namespace) -> None:
    """Weight sync, rollout and update of the engine and the learner."""
    shape = SHAPES[args.shape]
    model = NSAForCausalLM(NSAConfig(**shape, **SPARSITY[args.shape], **COMMON, kv=args.kv, attention_backend=args.backend))
    words = {f"t{i}": i for i in range(shape["vocab_size"])}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="t0")))
    config = RunConfig(
        model=ModelSection(path="random", device=args.device, dtype=args.dtype),
        data=DataSection(train="random"),
        rollout=RolloutSection(group_size=args.group, max_tokens=args.new),
        algorithm=AlgorithmSection(mismatch_bound=None),
        optimizer=OptimizerSection(micro_batch_tokens=args.micro_batch),
    )
    learner = Learner(config, model=model)
    engine = TorchEngine(
        NSAForCausalLM(model.config),
        tokenizer,
        max_sequences=args.sequences,
        device=args.device,
        dtype=getattr(torch, args.dtype),
        cuda_graphs=not args.no_graphs,
    )
    source = torch.Generator().manual_seed(0)
    ids = torch.randint(1, shape["vocab_size"], (args.sequences // args.group, args.prompt), generator=source).tolist()
    prompts = [Prompt(prompt_id=str(i), token_ids=tuple(row), question="", answer="", text="") for i, row in enumerate(ids)]
    sampling = Sampling(max_tokens=args.new, group_size=args.group, stop=())
    tokens, packed = args.sequences * args.new, args.sequences * (args.prompt + args.new)

    sync = median_seconds(lambda: engine.load_weights(1, learner.weights()), args.device, args.repeats)
    print(f"sync      learner → engine      {sync:8.3f} s", flush=True)
    seconds = median_seconds(lambda: list(engine.generate(prompts, sampling)), args.device, args.repeats)
    print(
        f"rollout   NSA engine            {seconds:8.3f} s  {tokens / seconds:10.0f} new tokens/s  {seconds / args.new * 1e3:8.2f} ms a step",
        flush=True,
    )
    rewards = [float(i % 2) for i in range(args.group)]
    scored = [
        ScoredGroup(group=group, scores=tuple(Score(value=r, parts={}) for r in rewards), advantages=tuple(r - 0.5 for r in rewards))
        for group in engine.generate(prompts, sampling)
    ]
    update = median_seconds(lambda: learner.step(scored), args.device, args.repeats)
    print(f"update    NSA learner           {update:8.3f} s  {packed / update:10.0f} tokens/s (prompts counted for each sample)", flush=True)
    if args.device == "cuda":
        print(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")


def time_peer(args: argparse.Namespace) -> None:
    """Transformers' dense Llama of the same size: forward and backward over the same tokens, and `generate`."""
    dtype = getattr(torch, args.dtype)
    model = LlamaForCausalLM(LlamaConfig(**SHAPES[args.shape], **COMMON)).to(args.device)
    ids = torch.randint(1, model.config.vocab_size, (args.sequences, args.prompt + args.new), device=args.device)
    rows = max(1, args.micro_batch // ids.shape[1])

    def update() -> None:
        for part in ids.split(rows):
            with torch.autocast(args.device, dtype=dtype, enabled=dtype != torch.float32):
                model(part, labels=part, use_cache=False).loss.backward()

    seconds = median_seconds(update, args.device, args.repeats)
    print(f"update    dense Llama, HF       {seconds:8.3f} s  {ids.numel() / seconds:10.0f} tokens/s (forward and backward alone)", flush=True)
    model = model.to(dtype).eval()
    seconds = median_seconds(lambda: model.generate(ids[:, : args.prompt], max_new_tokens=args.new, do_sample=True, pad_token_id=0), args.device, 1)
    tokens = args.sequences * args.new
    print(f"rollout   dense Llama, generate {seconds:8.3f} s  {tokens / seconds:10.0f} new tokens/s  {seconds / args.new * 1e3:8.2f} ms a step")


if __name__ == "__main__":
    main()
