"""The worker pool: hangs, crashes, faults, memory, threads and asyncio, and no process left behind."""

import asyncio
import gc
import json
import logging
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path

import pytest

from rewards.base import Outcome, Sample
from rewards.pool import FunctionSpec, WorkerPool

FUNCTIONS = """
import os, time

def own(completion, **meta):
    if "hang" in completion:
        while True:
            pass
    if "power" in completion:
        9 ** 9 ** 9 ** 9          # holds the interpreter
    if "crash" in completion:
        os._exit(3)
    if "exit" in completion:
        raise SystemExit(4)
    if "raise" in completion:
        raise RuntimeError("boo")
    if "nan" in completion:
        return float("nan")
    if "none" in completion:
        return None
    if "memory" in completion:
        return len(bytearray(10 << 30))
    if "print" in completion:
        print("noise on stdout", flush=True)
        os.write(1, b"more noise")
    return 1.0

def group(prompts, completions, **columns):
    if any("hang" in completion for completion in completions):
        time.sleep(1000)
    if any("raise" in completion for completion in completions):
        raise KeyError("boo")
    if any("short" in completion for completion in completions):
        return [1.0]
    return [float(len(completions))] * len(completions)

def slow(completion):
    time.sleep(1)
    return 1.0

def pid(completion):
    return os.getpid()
"""


@pytest.fixture
def path(tmp_path: Path) -> str:
    file = tmp_path / "mine.py"
    file.write_text(FUNCTIONS)
    return str(file)


def samples(*completions: str) -> list[Sample]:
    return [Sample(prompt="q", completion=completion, answer="4") for completion in completions]


def result(future: "Future[list[list[Outcome]]]") -> list[list[Outcome]]:
    return future.result(timeout=30)


def gone(process_id: int, within: float = 5.0) -> bool:
    end = time.monotonic() + within
    while time.monotonic() < end:
        try:
            state = Path(f"/proc/{process_id}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


def test_bad_samples_cost_only_themselves(path: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    words = ["ok", "hang", "crash", "exit", "raise", "nan", "none", "print", "power", "raise again", "ok"]
    with WorkerPool([FunctionSpec(name=f"{path}:own")], deadline_s=0.4, save_dir=tmp_path / "saved") as pool, caplog.at_level(logging.WARNING):
        rows = result(pool.submit(samples(*words)))
    faults = [row[0].fault for row in rows]
    assert faults == [None, "timeout", "crash", "crash", "raised", "value", None, None, "timeout", "raised", None]
    assert [row[0].value for row in rows if row[0].fault is None] == [1.0, None, 1.0, 1.0]
    assert pool.counters == {"timeouts": 2, "failures": 5}
    assert caplog.text.count("RuntimeError: boo") == 1  # once per function
    saved = [json.loads(file.read_text()) for file in (tmp_path / "saved").iterdir()]
    assert sorted(entry["completion"] for entry in saved) == ["crash", "exit", "hang", "power"]


def test_a_group_function_that_fails_is_repeated_one_by_one(path: str) -> None:
    with WorkerPool([FunctionSpec(name=f"{path}:group")], deadline_s=0.4) as pool:
        assert [row[0].value for row in result(pool.submit(samples("a", "b", "c")))] == [3.0, 3.0, 3.0]
        rows = result(pool.submit(samples("a", "hang", "c")))
        assert [(row[0].value, row[0].fault) for row in rows] == [(1.0, None), (None, "timeout"), (1.0, None)]
        rows = result(pool.submit(samples("a", "raise")))
        assert [(row[0].value, row[0].fault) for row in rows] == [(1.0, None), (None, "raised")]
        assert [row[0].fault for row in result(pool.submit(samples("short", "b")))] == ["value", "value"]


def test_a_hang_costs_the_deadline_and_little_more(path: str) -> None:
    with WorkerPool([FunctionSpec(name=f"{path}:own")], workers=1, deadline_s=0.5) as pool:
        result(pool.submit(samples("ok")))
        time.sleep(1.0)  # the spare worker stands ready
        start = time.perf_counter()
        assert [row[0].fault for row in result(pool.submit(samples("hang", "ok")))] == ["timeout", None]
        assert time.perf_counter() - start < 1.5


def test_a_memory_limit_stops_the_greedy_function_only(path: str) -> None:
    with WorkerPool([FunctionSpec(name=f"{path}:own")], memory_mb=1024) as pool:
        rows = result(pool.submit(samples("ok", "memory", "ok")))
    assert [row[0].fault for row in rows] == [None, "raised", None]
    assert "MemoryError" in rows[1][0].detail


def test_several_functions_give_one_outcome_each(path: str) -> None:
    specs = [FunctionSpec(name="accuracy"), FunctionSpec(name="format"), FunctionSpec(name=f"{path}:group")]
    with WorkerPool(specs, context={"prefilled": False}) as pool:
        (row,) = result(pool.submit(samples("<think>a</think> <answer>4</answer>")))
        assert [outcome.value for outcome in row] == [1.0, 1.0, 1.0]
        assert row[0].answer == "4"
        assert result(pool.submit([])) == []


def test_odd_text_crosses_the_pipes(path: str) -> None:
    with WorkerPool([FunctionSpec(name="accuracy"), FunctionSpec(name="format")]) as pool:
        texts = ["\x00", "\ud800", "x" * 2_000_000, "(" * 5000, "line\nline\r\u2028", "__import__('os')._exit(1)", "<answer>4</answer>"]
        rows = result(pool.submit(samples(*texts)))
        assert [row[0].fault for row in rows] == [None] * len(texts)
        assert [row[0].value for row in rows] == [0.0] * (len(texts) - 1) + [1.0]


def test_faults_in_loading_are_one_value_error(path: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no function missing"):
        WorkerPool([FunctionSpec(name=f"{path}:missing")])
    (tmp_path / "dies.py").write_text("import os; os._exit(7)")
    with pytest.raises(ValueError, match="died while loading"):
        WorkerPool([FunctionSpec(name=f"{tmp_path / 'dies.py'}:f")])
    (tmp_path / "sleeps.py").write_text("import time; time.sleep(1000)")
    with pytest.raises(ValueError, match="did not load within"):
        WorkerPool([FunctionSpec(name=f"{tmp_path / 'sleeps.py'}:f")], start_deadline_s=0.5)
    with pytest.raises(ValueError, match="workers"):
        WorkerPool([FunctionSpec(name="accuracy")], workers=0)


def test_it_works_from_threads(path: str) -> None:
    with WorkerPool([FunctionSpec(name=f"{path}:own")], deadline_s=0.4) as pool:
        found: dict[int, list[str | None]] = {}

        def score(number: int) -> None:
            found[number] = [row[0].fault for row in result(pool.submit(samples("ok", "hang" if number == 1 else "ok")))]

        threads = [threading.Thread(target=score, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == {0: [None, None], 1: [None, "timeout"], 2: [None, None], 3: [None, None]}


def test_it_works_from_asyncio(path: str) -> None:
    async def score() -> tuple[list[list[Outcome]], int]:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0.02)

        ticking = asyncio.create_task(tick())
        with WorkerPool([FunctionSpec(name=f"{path}:own")], deadline_s=0.4) as pool:
            rows = await asyncio.wrap_future(pool.submit(samples("ok", "power")))
        ticking.cancel()
        return rows, ticks

    rows, ticks = asyncio.run(score())
    assert [row[0].fault for row in rows] == [None, "timeout"]
    assert ticks > 5  # the loop was never blocked


def test_workers_outlive_the_thread_that_made_the_pool(path: str) -> None:
    made: list[WorkerPool] = []
    thread = threading.Thread(target=lambda: made.append(WorkerPool([FunctionSpec(name=f"{path}:pid")], workers=1)))
    thread.start()
    thread.join()
    (pool,) = made
    try:
        first = result(pool.submit(samples("a")))[0][0].value
        time.sleep(0.2)
        assert first is not None
        assert not gone(int(first), within=0.1)
        assert result(pool.submit(samples("a")))[0][0].fault is None
    finally:
        pool.close()


def test_close_leaves_no_process_and_cancels_what_waits(path: str) -> None:
    pool = WorkerPool([FunctionSpec(name=f"{path}:own")], deadline_s=30)
    waiting = pool.submit(samples("hang"))
    time.sleep(0.3)
    process_ids = pool.process_ids()
    assert process_ids
    pool.close()
    pool.close()
    assert all(gone(process_id) for process_id in process_ids)
    with pytest.raises(RuntimeError, match="closed"):
        waiting.result(timeout=5)
    with pytest.raises(RuntimeError, match="closed"):
        pool.submit(samples("ok"))


def test_workers_die_with_a_killed_parent(path: str) -> None:
    script = (
        "import sys, time\nfrom rewards.pool import *\nfrom rewards.base import Sample\n"
        f"pool = WorkerPool([FunctionSpec(name={path + ':own'!r})], deadline_s=100)\n"
        "pool.submit([Sample(prompt='', completion='hang', answer='')])\ntime.sleep(0.5)\n"
        "print(*pool.process_ids(), flush=True)\ntime.sleep(100)\n"
    )
    root = str(Path(__file__).resolve().parents[2])
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=root) as parent:
        assert parent.stdout is not None
        process_ids = [int(word) for word in parent.stdout.readline().split()]
        parent.kill()
    assert process_ids
    assert all(gone(process_id) for process_id in process_ids)


def test_repeated_hangs_leak_neither_processes_nor_descriptors(path: str) -> None:
    with WorkerPool([FunctionSpec(name=f"{path}:own")], deadline_s=0.1) as pool:
        result(pool.submit(samples("ok")))
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(3):
            result(pool.submit(samples("hang", "crash", "ok")))
        assert len(pool.process_ids()) <= 3
        assert len(os.listdir("/proc/self/fd")) <= before + 4


def test_rewards_does_not_import_torch() -> None:
    code = "import sys, rewards.pool, rewards.registry, rewards.correctness; sys.exit(bool({'torch', 'sympy'} & set(sys.modules)))"
    root = str(Path(__file__).resolve().parents[2])
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


BOMBS = [
    "9^{9^{9^9}}", "10^9!", "(10^9)!", "(" * 5000 + "1" + ")" * 5000, "9" * 100_000, "\x00" * 1000, "__import__('os').system('touch {}')",
    r"\frac{" * 3000, "1," * 50_000, r"(x+1)^{500}(x+2)^{500}",
]  # fmt: skip


def ordinary(number: int) -> str:
    return f"<think> {'She sells the eggs and keeps the rest. ' * 8} </think> <answer> {number % 7} </answer>"


def test_200_bombs_among_4096_samples_lose_no_result_and_execute_nothing(tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    texts = [ordinary(number) for number in range(4096)]
    for place in range(200):
        texts[place * 20 + 3] = f"<answer> {BOMBS[place % len(BOMBS)].replace('{}', str(marker))} </answer>"
    with WorkerPool([FunctionSpec(name="accuracy")], deadline_s=5.0) as pool:
        before = time.perf_counter()
        futures = [pool.submit(samples(*texts[first : first + 16])) for first in range(0, 4096, 16)]
        rows = [row[0] for future in futures for row in result(future)]
        spent = time.perf_counter() - before
        assert pool.counters == {}
    assert len(rows) == 4096
    assert [row.fault for row in rows] == [None] * 4096
    bombs = {place * 20 + 3 for place in range(200)}
    assert [row.value for row in rows] == [float(number % 7 == 4 and number not in bombs) for number in range(4096)]
    assert spent < 60  # seconds on an idle machine; one bomb of each kind costs milliseconds
    assert not marker.exists()


def test_each_bomb_costs_the_builtin_checker_at_most_50_ms_of_cpu(tmp_path: Path) -> None:
    from rewards.correctness import accuracy

    for bomb in BOMBS:
        text = f"<answer> {bomb.replace('{}', str(tmp_path / 'executed'))} </answer>"
        best = 1.0
        for _ in range(3):
            start = time.process_time()
            assert accuracy(completion=text, answer="4").value == 0.0
            best = min(best, time.process_time() - start)
        assert best <= 0.05, bomb[:30]


def test_hanging_functions_cost_the_deadline_each_and_no_result_is_lost(path: str) -> None:
    texts = ["hang" if number % 40 == 7 else "ok" for number in range(240)]
    with WorkerPool([FunctionSpec(name=f"{path}:own")], workers=2, deadline_s=0.3) as pool:
        start = time.perf_counter()
        rows = [row[0] for future in [pool.submit(samples(*texts[first : first + 8])) for first in range(0, 240, 8)] for row in result(future)]
        spent = time.perf_counter() - start
    assert [row.fault for row in rows] == ["timeout" if text == "hang" else None for text in texts]
    assert spent < 6 * (0.3 + 2.0)  # two workers share six hangs; the rest is room for starts on a busy machine


def test_each_function_has_its_own_deadline(path: str) -> None:
    specs = [FunctionSpec(name=f"{path}:own", deadline_s=0.3), FunctionSpec(name=f"{path}:slow", deadline_s=20.0)]
    with WorkerPool(specs, workers=1, deadline_s=0.1) as pool:
        (row,) = result(pool.submit(samples("hang")))
    assert [outcome.fault for outcome in row] == ["timeout", None]


def test_results_stream_before_a_hang_is_over(path: str) -> None:
    with WorkerPool([FunctionSpec(name=f"{path}:own")], workers=2, deadline_s=3.0) as pool:
        result(pool.submit(samples("ok", "ok")))
        slow = pool.submit(samples("hang"))
        start = time.perf_counter()
        assert [row[0].fault for row in result(pool.submit(samples(*["ok"] * 20)))] == [None] * 20
        assert time.perf_counter() - start < 2.0
        assert not slow.done()
        assert result(slow)[0][0].fault == "timeout"


@pytest.mark.ray
def test_deadlines_hold_inside_a_ray_actor(path: str) -> None:
    script = (
        "import os, sys, time\nos.environ['RAY_USAGE_STATS_ENABLED'] = '0'\nimport ray\n"
        "ray.init(address='local', num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level='error', object_store_memory=80 * 2**20)\n"
        "@ray.remote(max_concurrency=4)\nclass Actor:\n"
        "    def __init__(self):\n"
        "        from rewards.pool import FunctionSpec, WorkerPool\n"
        f"        self.pool = WorkerPool([FunctionSpec(name={path + ':own'!r})], deadline_s=0.5)\n"
        "    def score(self, texts):\n"
        "        from rewards.base import Sample\n"
        "        rows = self.pool.submit([Sample(prompt='', completion=text, answer='') for text in texts]).result(timeout=30)\n"
        "        return [row[0].fault for row in rows]\n"
        "actor = Actor.remote()\n"
        "print(ray.get([actor.score.remote(['ok', 'hang', 'power', 'ok']), actor.score.remote(['ok', 'crash'])], timeout=100))\n"
    )
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=root, capture_output=True, text=True, timeout=200, env={**os.environ, "PYTHONPATH": root}
    )
    assert done.stdout.strip() == "[[None, 'timeout', 'timeout', None], [None, 'crash']]", done.stderr[-2000:]


def rss_kb(process_id: int) -> int:
    return next(int(line.split()[1]) for line in Path(f"/proc/{process_id}/status").read_text().split("\n") if line.startswith("VmRSS"))


@pytest.mark.slow
def test_fifty_rounds_of_bombs_and_hangs_leak_neither_processes_nor_memory(path: str, tmp_path: Path) -> None:
    bombs = [f"<answer> {bomb.replace('{}', str(tmp_path / 'executed'))} </answer>" for bomb in BOMBS]
    with WorkerPool([FunctionSpec(name="accuracy"), FunctionSpec(name=f"{path}:own")], deadline_s=0.2) as pool:

        def one_round(number: int) -> None:
            bad = ["hang", "crash"] if number % 4 == 0 else ["ok", "ok"]
            rows = result(pool.submit(samples(*bombs, *bad, "ok", *map(ordinary, range(16)))))
            assert len(rows) == len(bombs) + 19

        for number in range(5):
            one_round(number)
        gc.collect()
        own, descriptors, children = rss_kb(os.getpid()), len(os.listdir("/proc/self/fd")), len(pool.process_ids())
        for number in range(50):
            one_round(number)
        gc.collect()
        assert len(pool.process_ids()) <= max(3, children)
        assert len(os.listdir("/proc/self/fd")) <= descriptors + 4
        assert rss_kb(os.getpid()) - own < 20_000
        assert all(rss_kb(process_id) < 300_000 for process_id in pool.process_ids())
    assert not (tmp_path / "executed").exists()
