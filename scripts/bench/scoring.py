"""Times the reward pool on ordinary completions, and the clustering of votes. CPU only, no data needed.

    python scripts/bench/scoring.py

4,096 completions of about GSM8K's length with rewards `accuracy` and `format`, the start of the workers counted; then the
votes of 500 problems with 64 samples each, on one core. Append what it prints, with date and machine, to RESULTS.md.
"""

from __future__ import annotations

import itertools
import random
import time

from rewards.pool import FunctionSpec, Sample, WorkerPool
from rewards.voting import cluster

COMPLETIONS, GROUP, PROBLEMS, VOTES = 4096, 16, 500, 64


def completion(generator: random.Random) -> Sample:
    """A few sums in words and numbers, right in two of three cases."""
    numbers = [generator.randint(2, 400) for _ in range(12)]
    steps = " ".join(f"Then there are {a} + {b} = <<{a}+{b}={a + b}>>{a + b} of them, which costs ${a * b}." for a, b in itertools.pairwise(numbers))
    answer = str(sum(numbers))
    given = answer if generator.random() < 0.67 else str(generator.randint(1, 999))
    return Sample(prompt="q", completion=f" {steps} </think> <answer> {given} </answer>", answer=answer)


def main() -> None:
    """Print seconds of three runs of the pool, and of the clustering."""
    generator = random.Random(0)
    samples = [completion(generator) for _ in range(COMPLETIONS)]
    for _ in range(3):
        begin = time.perf_counter()
        with WorkerPool([FunctionSpec(name="accuracy"), FunctionSpec(name="format")], deadline_s=5.0) as pool:
            futures = [pool.submit(samples[first : first + GROUP]) for first in range(0, COMPLETIONS, GROUP)]
            faults = sum(outcome.fault is not None for future in futures for row in future.result(timeout=60) for outcome in row)
        print(f"pool      {COMPLETIONS} completions   {time.perf_counter() - begin:.2f} s   {faults} faults", flush=True)
    forms = ("{}", "{}.0", "\\frac{{{}}}{{1}}", "${}$", "x = {}", "{} cm", "\\sqrt{{{}}}", "{}\\%")
    votes = [[generator.choice(forms).format(generator.randint(1, 12)) for _ in range(VOTES)] for _ in range(PROBLEMS)]
    begin = time.perf_counter()
    classes = sum(len(set(cluster(answers))) for answers in votes)
    print(f"votes     {PROBLEMS} x {VOTES}   {time.perf_counter() - begin:.2f} s on one core   {classes} classes")


if __name__ == "__main__":
    main()
