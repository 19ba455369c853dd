"""New tokens a second in vLLM: an NSA model beside a dense Llama of the same size, same vLLM, same requests, random weights.

    python scripts/bench/rollout.py                                   # shapes 135m and 1b, all three cases; one GPU, some minutes
    python scripts/bench/rollout.py --shapes 1b --cases 64x16384+2048 --profile
    python scripts/bench/rollout.py --shapes 1b --together            # engines of a shape start side by side, then take turns
    python scripts/bench/rollout.py --shapes tiny --cases 4x40+16 --dtype float32                      # CPU build of vLLM

A case is SEQUENCESxPROMPT+NEW; `--group` sequences share a prompt, which prefix caching computes once. Every model has a process of its
own and does each case once after a warm-up request. Columns: whole time and prefill (until all sequences have a token), new tokens a
second over all of it and in steps of decodes alone, the median of these steps, and with --profile the GPU's part of a step, the
rest being the host's, and what the GPU does in a prefill (both in runs of their own: a profiler costs a second). Weight sync: every
parameter copied in place from tensors on the GPU, cached prompts forgotten.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:] = [str(HERE.parents[1]), *(entry for entry in sys.path if Path(entry).resolve() != HERE)]

from rich.console import Console
from rich.table import Table

SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
             "head_dim": 32, "vocab_size": 512},
    "135m": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
             "head_dim": 64, "vocab_size": 49152},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
           "head_dim": 64, "vocab_size": 128256},
}  # fmt: skip
"""`135m`: SmolLM2-135M. `1b`: Llama-3.2-1B."""
MODELS = ("nsa", "dense")
SPARSITY = {"compress_block_size": 32, "compress_stride": 16, "select_block_size": 64, "num_selected_blocks": 16, "window_size": 512}
PROFILED_STEPS = 10
PROFILED_KERNELS = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """`sequences` requests of `prompt` tokens each, `new` more for each."""

    sequences: int
    prompt: int
    new: int

    @staticmethod
    def parse(text: str) -> Case:
        found = re.fullmatch(r"(\d+)x(\d+)\+(\d+)", text)
        if not found:
            raise ValueError(f"a case is SEQUENCESxPROMPT+NEW like 64x16384+2048, got {text!r}")
        return Case(sequences=int(found[1]), prompt=int(found[2]), new=int(found[3]))

    def __str__(self) -> str:
        return f"{self.sequences} × ({self.prompt} + {self.new})"


def write_model(folder: Path, shape: str, model: str, kv: str, dtype: str, context: int) -> None:
    """A configuration that vLLM fills with random weights."""
    import torch
    from transformers import LlamaConfig

    from nsa import NSAConfig

    common: dict[str, Any] = {
        **SHAPES[shape], "max_position_embeddings": context, "tie_word_embeddings": True, "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
    }  # fmt: skip
    config = NSAConfig(**common, **SPARSITY, kv=kv, gate="blend") if model == "nsa" else LlamaConfig(**common)
    config.architectures = ["NSAForCausalLM" if model == "nsa" else "LlamaForCausalLM"]
    config.dtype = getattr(torch, dtype)
    config.save_pretrained(folder)


class Bench:
    """One engine in this process."""

    def __init__(self, args: argparse.Namespace) -> None:
        os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_NO_USAGE_STATS="1", HF_HUB_OFFLINE="1")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        cases = [Case.parse(text) for text in args.cases.split(",")]
        context = max(case.prompt + case.new for case in cases) + 16
        self.args, self.counter = args, 0
        self.vocabulary = SHAPES[args.shapes]["vocab_size"]
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            write_model(Path(folder), args.shapes, args.models, args.kv, args.dtype, context)
            from vllm.engine.arg_utils import EngineArgs
            from vllm.usage.usage_lib import UsageContext
            from vllm.v1.engine.llm_engine import LLMEngine

            sizes = sorted({1, 2, 4, 8, 16, 32} | {case.sequences for case in cases})
            options: dict[str, Any] = {
                "model": folder, "load_format": "dummy", "dtype": args.dtype, "skip_tokenizer_init": True, "max_model_len": context,
                "max_num_seqs": max(case.sequences for case in cases), "logprobs_mode": "processed_logprobs", "disable_log_stats": True,
                "gpu_memory_utilization": args.gpu_share, "stream_interval": 8, "enable_prefix_caching": True, "generation_config": "vllm",
                "compilation_config": {"cudagraph_capture_sizes": sizes},
            }  # fmt: skip
            if args.cache_gib:
                options["kv_cache_memory_bytes"] = int(args.cache_gib * 2**30)
            if args.models == "nsa":
                options["worker_extension_cls"] = "grpo.rollout.vllm_worker.WeightAccess"
            # As grpo's driver starts it: vLLM takes more tokens a step where no server answers requests.
            self.engine = LLMEngine.from_engine_args(EngineArgs(**options), usage_context=UsageContext.LLM_CLASS)
        self.started = time.perf_counter() - start
        cache = self.engine.vllm_config.cache_config
        self.cache_tokens = (cache.num_gpu_blocks or 0) * cache.block_size

    def submit(self, case: Case, seed: int) -> None:
        """All requests of a case."""
        import torch
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        generator = torch.Generator().manual_seed(seed)
        group = min(self.args.group, case.sequences)
        for first in range(0, case.sequences, group):
            token_ids = torch.randint(0, self.vocabulary, (case.prompt,), generator=generator).tolist()
            for _ in range(min(group, case.sequences - first)):
                self.counter += 1
                parameters = SamplingParams(
                    temperature=1.0, max_tokens=case.new, ignore_eos=True, logprobs=0, flat_logprobs=True, detokenize=False,
                    output_kind=RequestOutputKind.DELTA, skip_clone=True,
                )  # fmt: skip
                self.engine.add_request(f"{self.counter}", {"type": "token", "prompt_token_ids": token_ids}, parameters)

    def run(self, case: Case, *, seed: int = 0, profile: bool = False) -> dict[str, float]:
        """Seconds, tokens a second and step times of a case; nothing of it is in the prefix cache before."""
        import torch

        self.engine.reset_prefix_cache()
        self.submit(case, seed)
        started: set[str] = set()
        made, steps, times = 0, 0, []
        prefill, profiler, gpu_ms = 0.0, None, 0.0
        start = time.perf_counter()
        while self.engine.has_unfinished_requests():
            before = time.perf_counter()
            if profile and prefill and steps == PROFILED_STEPS:
                profiler = self._start_profile()
            outputs = self.engine.step()
            now = time.perf_counter()
            made += sum(len(output.outputs[0].token_ids) for output in outputs)
            if not prefill:
                started.update(output.request_id for output in outputs if output.outputs[0].token_ids)
                prefill = now - start if len(started) >= case.sequences else 0.0
                continue
            steps += 1
            if profiler is None:
                times.append(now - before)
            elif steps == 2 * PROFILED_STEPS:
                torch.cuda.synchronize()
                profiler.__exit__(None, None, None)
                gpu_ms, profiler = self._report(profiler, f"a decode step of {case}", PROFILED_STEPS), None
        total = time.perf_counter() - start
        step = statistics.median(times) if times else 0.0
        return {
            "seconds": total, "prefill_s": prefill, "tokens_per_s": case.sequences * case.new / total, "step_ms": 1e3 * step,
            "decode_tokens_per_s": case.sequences / step if step else 0.0, "gpu_ms": gpu_ms, "made": made,
        }  # fmt: skip

    def _start_profile(self) -> Any:
        import torch

        torch.cuda.synchronize()
        profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
        profiler.__enter__()
        return profiler

    def profile_prefill(self, case: Case, *, seed: int) -> None:
        """Do a case's prefill again and print what the GPU did in it."""
        import torch

        self.engine.reset_prefix_cache()
        self.submit(Case(sequences=case.sequences, prompt=case.prompt, new=1), seed)
        profiler, start = self._start_profile(), time.perf_counter()
        while self.engine.has_unfinished_requests():
            self.engine.step()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        profiler.__exit__(None, None, None)
        self._report(profiler, f"the prefill of {case}, {1e3 * seconds:.0f} ms by the clock", 1)

    def _report(self, profiler: Any, what: str, steps: int) -> float:
        """Print the kernels of a step (or of all that was profiled, as one), return the GPU's milliseconds."""
        rows = sorted(profiler.key_averages(), key=lambda row: -row.self_device_time_total)
        total = sum(row.self_device_time_total for row in rows) / 1e3 / steps
        print(f"{self.args.shapes} {self.args.models}: {total:.3f} ms of GPU in {what}", file=sys.stderr)
        for row in rows[:PROFILED_KERNELS]:
            ms, count = row.self_device_time_total / 1e3 / steps, row.count / steps
            print(f"   {ms:8.3f} ms  {count:6.1f} times  {row.key[:100]}", file=sys.stderr, flush=True)
        if self.args.traces:
            name = re.sub(r"\W+", "-", f"{self.args.shapes} {self.args.models} {what}")
            profiler.export_chrome_trace(f"{self.args.traces}/{name}.json.gz")
        return total

    def sync(self) -> dict[str, float]:
        """Seconds to bring in every weight by its checkpoint name, median of three."""
        engine = self.engine
        model: Any = engine.apply_model(lambda model: [(p.name, p.view.clone()) for p in model.hf_parameters()])[0]
        times = []
        for _ in range(3):
            start = time.perf_counter()
            engine.collective_rpc("nsa_begin_load")
            for named in model:
                engine.collective_rpc("nsa_load", args=([named],))
            engine.collective_rpc("nsa_end_load")
            engine.reset_prefix_cache()
            times.append(time.perf_counter() - start)
        return {"sync_s": statistics.median(times), "weight_bytes": float(sum(tensor.nbytes for _, tensor in model))}


def serve(args: argparse.Namespace) -> None:
    """The child: reads what to do, one JSON line each, and answers with one."""

    def answer(value: dict[str, float]) -> None:
        print("RESULT " + json.dumps(value), flush=True)

    bench = Bench(args)
    bench.run(Case(sequences=2, prompt=64, new=12))
    answer({"started": bench.started, "cache_tokens": float(bench.cache_tokens)})
    for line in sys.stdin:
        request = json.loads(line)
        if request == "sync":
            answer(bench.sync())
            continue
        case = Case(**request)
        facts = bench.run(case, seed=1)
        if args.profile:
            short = Case(sequences=case.sequences, prompt=case.prompt, new=min(case.new, 4 * PROFILED_STEPS))
            facts["gpu_ms"] = bench.run(short, seed=2, profile=True)["gpu_ms"]
            bench.profile_prefill(case, seed=3)
        answer(facts)


class Child:
    """A model's process."""

    def __init__(self, args: argparse.Namespace, shape: str, model: str, share: float) -> None:
        self.shape, self.model = shape, model
        options = {"shapes": shape, "models": model, "cases": args.cases, "dtype": args.dtype, "kv": args.kv, "group": args.group,
                   "gpu-share": share, "cache-gib": args.cache_gib, "traces": args.traces}  # fmt: skip
        command = [sys.executable, __file__, "--child", *(f"--{name}={value}" for name, value in options.items())]
        self.process = subprocess.Popen(
            [*command, *(["--profile"] if args.profile else [])], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def read(self) -> dict[str, float]:
        """The next answer.

        Raises:
            RuntimeError: the process ended; what it wrote to stderr stands above.
        """
        assert self.process.stdout
        for line in self.process.stdout:
            if line.startswith("RESULT "):
                return json.loads(line[7:])
        raise RuntimeError(f"the process of {self.model} ({self.shape}) ended with exit code {self.process.wait()}")

    def ask(self, request: Any) -> dict[str, float]:
        assert self.process.stdin
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self.read()

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def measure(args: argparse.Namespace, children: list[Child], rows: list[list[str]], speeds: dict[tuple[str, ...], tuple[float, float]]) -> None:
    """All cases on some children, one after the other; a line is printed as soon as it is known. `speeds`: of (shape, case, model)."""
    for child in children:
        facts = child.read()
        print(f"{child.shape} {child.model}: started in {facts['started']:.0f} s, cache of {facts['cache_tokens']:.0f} tokens", flush=True)
    for text in args.cases.split(","):
        case = Case.parse(text)
        for child in children:
            facts = child.ask(asdict(case))
            speeds[child.shape, text, child.model] = mine = facts["tokens_per_s"], facts["decode_tokens_per_s"]
            gpu = f"{facts['gpu_ms']:.2f}" if facts["gpu_ms"] else ""
            dense = speeds.get((child.shape, text, "dense"), (0.0, 0.0))
            ratios = [f"{ours / theirs:.2f}" if theirs else "" for ours, theirs in zip(mine, dense)]
            rows.append([
                child.shape, child.model, str(case), f"{facts['seconds']:.1f}", f"{facts['prefill_s']:.1f}", f"{facts['tokens_per_s']:.0f}",
                f"{facts['decode_tokens_per_s']:.0f}", f"{facts['step_ms']:.2f}", gpu, " / ".join(ratios),
            ])  # fmt: skip
            print(" | ".join(rows[-1]), flush=True)
    for child in children:
        if child.model == "nsa":
            facts = child.ask("sync")
            print(f"{child.shape} nsa: weight sync of {facts['weight_bytes'] / 1e9:.2f} GB {facts['sync_s']:.3f} s", flush=True)
        child.close()


HEADINGS = ("shape", "model", "case", "s", "prefill s", "new tokens/s", "in decode", "step ms", "GPU ms", "of dense, all / decode")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="135m,1b", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--models", default="dense,nsa", help="dense first, so that nsa's rows say what part of it they are")
    parser.add_argument("--cases", default="512x128+512,64x16384+2048,64x65536+1024")
    parser.add_argument("--group", type=int, default=16, help="sequences of a prompt")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--kv", default="shared", choices=("shared", "separate"), help="of the NSA model; separate has three times the cache")
    parser.add_argument("--gpu-share", type=float, default=0.9, help="of the GPU's memory, for all engines that run at the same time")
    parser.add_argument("--cache-gib", type=float, default=0.0, help="of each engine's cache; 0: what fits")
    parser.add_argument("--together", action="store_true")
    parser.add_argument("--profile", action="store_true", help="of decode steps, on the GPU")
    parser.add_argument("--traces", default="", help="a folder for what --profile saw, as Chrome traces")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        serve(args)
        return
    try:
        for name, allowed in (("shapes", tuple(SHAPES)), ("models", MODELS)):
            for value in getattr(args, name).split(","):
                if value not in allowed:
                    raise ValueError(f"--{name} takes {', '.join(allowed)}, got {value!r}")
        for text in args.cases.split(","):
            Case.parse(text)
        if importlib.util.find_spec("vllm") is None:
            raise ValueError("vLLM is not installed here: pip install '.[vllm]' in a checkout")
    except ValueError as error:
        parser.error(str(error))
    rows: list[list[str]] = []
    speeds: dict[tuple[str, ...], tuple[float, float]] = {}
    models = sorted(args.models.split(","))  # dense first
    for shape in args.shapes.split(","):
        for turn in [models] if args.together else [[model] for model in models]:
            measure(args, [Child(args, shape, model, args.gpu_share / len(turn)) for model in turn], rows, speeds)
    table = Table(*HEADINGS)
    for row in rows:
        table.add_row(*row)
    Console(width=180).print(table)


if __name__ == "__main__":
    main()
