"""The `nsa-grpo` command: one verb per job, thin dispatch, imports only what the verb needs (so `--help` is quick).

    nsa-grpo train configs/gsm8k_smollm2_1gpu.yaml train.steps=20

User mistakes (a ValueError or a file that is not there) print `error: …` on stderr and exit with 2; Ctrl-C prints
`interrupted` and exits with 130; a run that failed prints its cause and exits with 1; anything else is a fault of ours and
keeps its traceback (`--traceback` keeps it always).
"""

from __future__ import annotations

import argparse
import errno
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from grpo.errors import RunFailed

USER_ERRORS = (ValueError, FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)

_FLAGS = ("--traceback", "--sft", "--help")
_OVERRIDE = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*=")
_MARKS = {"grpo": "cli.py", "nsa": "config.py", "rewards": "math_equal.py"}


def check_packages() -> None:
    """The packages grpo, nsa and rewards must be the ones that lie side by side; PyPI has others of the same names.

    Raises:
        ValueError: naming the file or folder that shadows one of them.
    """
    home = Path(__file__).resolve().parent.parent
    for name, mark in _MARKS.items():
        spec = importlib.util.find_spec(name)
        places = [] if spec is None else [Path(place).resolve() for place in spec.submodule_search_locations or ()]
        if home / name in places[:1] and (home / name / mark).is_file():
            continue
        found = "nothing" if spec is None else spec.origin or ", ".join(map(str, places))
        raise ValueError(f"package {name} must be {home / name}, but Python finds {found}: rename or uninstall what shadows it")


def _train(args: argparse.Namespace) -> int:
    from grpo.config import RunConfig, load_config

    config = load_config(RunConfig, args.config, args.overrides)
    from grpo.trainer import train

    print(f"run folder: {train(config)}")
    return 0


def _resume(args: argparse.Namespace) -> int:
    from grpo.config import RunConfig, load_config
    from grpo.log import CONFIG_FILE

    run_dir = Path(args.run_dir)
    if not (run_dir / CONFIG_FILE).is_file():
        raise FileNotFoundError(f"{run_dir} is not a run folder: it has no {CONFIG_FILE}")
    config = load_config(RunConfig, run_dir / CONFIG_FILE, args.overrides)
    from grpo.trainer import train

    print(f"run folder: {train(config, resume_from=run_dir)}")
    return 0


def _sft(args: argparse.Namespace) -> int:
    from grpo.config import SftConfig, load_config

    config = load_config(SftConfig, args.config, args.overrides)
    from grpo.sft import run_sft

    print(f"checkpoint: {run_sft(config)}")
    return 0


def _convert(args: argparse.Namespace) -> int:
    from nsa.convert import convert, parse_overrides

    overrides = parse_overrides(args.overrides)
    print(convert(args.source, args.destination, **overrides).summary())
    return 0


def _eval(args: argparse.Namespace) -> int:
    from grpo.eval_run import run_eval

    run_eval(args.checkpoints, data=args.data, overrides=args.overrides, output=args.output)
    return 0


def _sample(args: argparse.Namespace) -> int:
    from grpo.sample import run_sample

    return run_sample(args.checkpoint, prompt=args.prompt, data=args.data, num_rows=args.rows, overrides=args.overrides)


def _rewards_check(args: argparse.Namespace) -> int:
    from grpo.rewards_check import check_gold, check_reward

    columns = {"split": args.split, "question_column": args.question_column, "answer_column": args.answer_column, "limit": args.limit}
    if args.reward:
        return check_reward(args.data, args.reward, num_rows=args.rows, **columns)
    return check_gold(args.data, show=args.show, against=args.against, completions=args.completions, **columns)


def _config(args: argparse.Namespace) -> int:
    import json

    import yaml

    from grpo.config import RunConfig, SftConfig, load_config

    schema = SftConfig if args.sft else RunConfig
    if args.action == "schema":
        print(json.dumps(schema.model_json_schema(), indent=2))
        return 0
    config = load_config(schema, args.config, args.overrides)
    if args.action == "show":
        print(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True), end="")
        return 0
    from grpo.config_check import check_config

    return check_config(config)


def _doctor(args: argparse.Namespace) -> int:
    from grpo.doctor import run_doctor

    return run_doctor(args.config, args.overrides)


def _report(args: argparse.Namespace) -> int:
    run_dir = Path(args.run_dir)
    if not run_dir.is_dir():
        raise FileNotFoundError(f"no run folder {run_dir}")
    from grpo.report import write_report

    print(f"report: {write_report(run_dir)}")
    return 0


def _quickstart(args: argparse.Namespace) -> int:
    from grpo.quickstart import main as quickstart

    return int(quickstart(args.arguments) or 0)


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog="nsa-grpo",
        description="GRPO for language models with native sparse attention.",
        epilog="examples:\n  nsa-grpo quickstart\n  nsa-grpo train configs/gsm8k_smollm2_1gpu.yaml train.steps=20\n  nsa-grpo VERB --help",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--traceback", action="store_true", help="show Python's traceback for user errors too")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    train = _add(verbs, "train", _train, "run GRPO", "nsa-grpo train configs/gsm8k_smollm2_1gpu.yaml train.seed=1 log.wandb=true")
    train.add_argument("config", metavar="CONFIG", help="YAML file (configs/README.md explains every key)")
    _overrides(train)

    resume = _add(verbs, "resume", _resume, "go on with a run from its last checkpoint", "nsa-grpo resume runs/gsm8k train.steps=200")
    resume.add_argument("run_dir", metavar="RUN_DIR")
    _overrides(resume)

    sft = _add(verbs, "sft", _sft, "supervised fine-tuning: cold start, adaptation", "nsa-grpo sft configs/sft_gsm8k_smollm2.yaml epochs=2")
    sft.add_argument("config", metavar="CONFIG")
    _overrides(sft)

    convert = _add(
        verbs,
        "convert",
        _convert,
        "turn a dense Llama/Qwen2/Qwen3 checkpoint (folder, hub name or .gguf) into an NSA one",
        "nsa-grpo convert HuggingFaceTB/SmolLM2-135M-Instruct smollm2-nsa num_selected_blocks=4 select_block_size=32",
        "nsa-grpo convert model.gguf smollm2-nsa window_size=64",
    )
    convert.add_argument("source", metavar="SOURCE")
    convert.add_argument("destination", metavar="DESTINATION")
    _overrides(convert)

    evaluate = _add(
        verbs,
        "eval",
        _eval,
        "pass@k, maj@k and avg@k with intervals, for checkpoints and datasets",
        "nsa-grpo eval runs/gsm8k/checkpoints/step-000100 --data gsm8k_test.jsonl.gz",
        "nsa-grpo eval base tuned --data openai/gsm8k:main evaluation.samples=16 evaluation.k=[1,8,16] data.eval_limit=200",
        "nsa-grpo eval tuned --data gsm8k_test.jsonl.gz --data math500.jsonl.gz --output evals/tuned evaluation.samples=64",
    )
    evaluate.add_argument("checkpoints", metavar="CHECKPOINT", nargs="+", help="folder or hub name; several are compared")
    evaluate.add_argument("--data", required=True, action="append", help="problems: file, folder or hub name; give it again for several")
    evaluate.add_argument("--output", default=None, help="folder for reports, figures and every completion; an interrupted evaluation goes on there")
    _overrides(evaluate)

    sample = _add(
        verbs,
        "sample",
        _sample,
        "look at completions of a checkpoint",
        'nsa-grpo sample runs/gsm8k/checkpoints/step-000100 --prompt "What is 3 + 4?"',
        "nsa-grpo sample CHECKPOINT --data gsm8k_test.jsonl.gz --rows 3 evaluation.temperature=0.7 evaluation.samples=2",
    )
    sample.add_argument("checkpoint", metavar="CHECKPOINT")
    source = sample.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", help="one question")
    source.add_argument("--data", help="questions from a file, folder or hub name")
    sample.add_argument("--rows", type=_positive, default=2, help="rows of --data to show (default 2)")
    _overrides(sample)

    _rewards_parser(verbs)
    _config_parser(verbs)

    doctor = _add(verbs, "doctor", _doctor, "what this machine can run, and what a config would need", "nsa-grpo doctor", "nsa-grpo doctor run.yaml")
    doctor.add_argument("config", metavar="CONFIG", nargs="?", default=None)
    _overrides(doctor)

    report = _add(verbs, "report", _report, "plots, samples and a page of a run", "nsa-grpo report runs/gsm8k")
    report.add_argument("run_dir", metavar="RUN_DIR")

    _add(
        verbs,
        "quickstart",
        _quickstart,
        "the whole job on a tiny model, in minutes on two cores (options: --out FOLDER, --seed N, --twin NAME)",
        "nsa-grpo quickstart",
        "nsa-grpo quickstart --out runs/try --seed 1 train.steps=20",
    )
    return parser


def _rewards_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    rewards = _add(verbs, "rewards", None, "check rewards against data", "nsa-grpo rewards check gsm8k_train.jsonl.gz")
    actions = rewards.add_subparsers(dest="action", required=True, metavar="ACTION")
    check = _add(
        actions,
        "check",
        _rewards_check,
        "score every gold answer as an answer (must be 100 %), compare two checkers, or call a reward of yours on sample rows",
        "nsa-grpo rewards check gsm8k_train.jsonl.gz",
        "nsa-grpo rewards check math500.jsonl.gz --against math_verify --completions solution",
        "nsa-grpo rewards check gsm8k_train.jsonl.gz --reward my_rewards.py:brevity --rows 3",
    )
    check.add_argument("data", metavar="DATA", help="file, folder or hub name")
    check.add_argument("--reward", help="registered name, path/to/file.py:function or package.module:function")
    check.add_argument("--rows", type=_positive, default=2, help="sample rows for --reward (default 2)")
    check.add_argument("--show", type=_positive, default=10, help="failing golds and disagreements to list (default 10)")
    check.add_argument("--against", help="a second checker, for instance math_verify: where the two disagree, side by side")
    check.add_argument("--completions", metavar="COLUMN", help="also judge the texts of this column (solution, text, …)")
    check.add_argument("--split", default="train")
    check.add_argument("--question-column", default=None)
    check.add_argument("--answer-column", default=None)
    check.add_argument("--limit", type=_positive, default=None)


def _config_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    config = _add(verbs, "config", None, "show, describe or check a configuration", "nsa-grpo config check run.yaml", "nsa-grpo config schema")
    actions = config.add_subparsers(dest="action", required=True, metavar="ACTION")
    show = _add(actions, "show", _config, "print the resolved configuration", "nsa-grpo config show run.yaml rollout.group_size=16")
    schema = _add(actions, "schema", _config, "print the JSON schema", "nsa-grpo config schema --sft")
    check = _add(actions, "check", _config, "rewards on a sample row, then data, model, GPU and memory", "nsa-grpo config check run.yaml")
    for action in (show, check):
        action.add_argument("config", metavar="CONFIG")
        _overrides(action)
    for action in (show, schema, check):
        action.add_argument("--sft", action="store_true", help="the configuration of `nsa-grpo sft`")


def _add(
    verbs: argparse._SubParsersAction[argparse.ArgumentParser], name: str, run: Callable[[argparse.Namespace], int] | None, what: str, *examples: str
) -> argparse.ArgumentParser:
    epilog = "examples:\n" + "\n".join(f"  {example}" for example in examples)
    parser = verbs.add_parser(
        name, help=what.replace("%", "%%"), description=what, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if run is not None:
        parser.set_defaults(run=run)
    return parser


def _overrides(parser: argparse.ArgumentParser) -> None:
    """key=value arguments are taken out of the list before argparse sees it: it cannot mix them with options."""
    parser.set_defaults(takes_overrides=True)
    parser.epilog = f"{parser.epilog}\n\nkey.sub=value arguments override the configuration; values are YAML."


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number >= 1, got {text!r}")
    return int(text)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse; `overrides` are the key=value arguments, wherever they stand (an option's value is not one of them)."""
    parser = build_parser()
    if "quickstart" in argv[:2] and not {"-h", "--help"} & set(argv):
        place = list(argv).index("quickstart")
        args = parser.parse_args(argv[: place + 1])
        args.arguments = list(argv[place + 1 :])  # argparse.REMAINDER would refuse an option in the first place
        return args
    overrides, rest = [], []
    for position, argument in enumerate(argv):
        before = argv[position - 1] if position else ""
        is_value = before.startswith("--") and "=" not in before and before not in _FLAGS
        is_override = _OVERRIDE.match(argument) is not None and not is_value and not os.path.exists(argument)
        (overrides if is_override else rest).append(argument)
    args = parser.parse_args(rest)
    if overrides and not getattr(args, "takes_overrides", False):
        parser.error(f"{args.verb} takes no key=value arguments, got {overrides[0]}")
    args.overrides = overrides
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    args = parse_arguments(sys.argv[1:] if argv is None else list(argv))
    try:
        check_packages()
        return args.run(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader left (`… | head`): no traceback at exit
        return 141
    except RunFailed as error:
        if args.traceback:
            raise
        print(f"error: {error}", file=sys.stderr)
        if error.details:
            print(error.details, file=sys.stderr)
        return 1
    except USER_ERRORS as error:
        if args.traceback:
            raise
        for line in (str(error) or type(error).__name__).split("\n"):
            print(f"error: {line}", file=sys.stderr)
        return 2
    except OSError as error:
        if args.traceback or error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"error: {os.strerror(error.errno)}{f': {error.filename}' if error.filename else ''}; what is complete is kept", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
