"""Names → reward functions: the built-in ones, `path/to/file.py:function` and `package.module:function`.

A user's file is loaded under a private module name, so that it can be called anything. Whatever goes wrong while loading
is one ValueError line.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rewards.base import Reward, detect_style, last_line

BUILTIN: dict[str, str] = {
    "accuracy": "rewards.correctness:accuracy",
    "countdown": "rewards.countdown:countdown",
    "format": "rewards.format:format_reward",
    "tag_count": "rewards.format:tag_count",
    "language": "rewards.language:language_share",
    "length": "rewards.length:short_enough",
    "math_verify": "rewards.math_verify:math_verify",
    "overlong": "rewards.length:overlong",
    "reasoning_gym": "rewards.gym:reasoning_gym",
    "repetition": "rewards.length:repetition",
}
"""Built-in name → module:function; imported when asked for."""

REQUIRED: dict[str, tuple[str, ...]] = {"length": ("target_tokens", "max_tokens"), "overlong": ("max_tokens", "buffer_tokens")}
"""Arguments that a built-in reward cannot do without."""

EXTRAS: dict[str, tuple[str, str]] = {"math_verify": ("math_verify", "math-verify"), "reasoning_gym": ("reasoning_gym", "reasoning-gym")}
"""Built-in reward → (package it imports, our extra that installs it)."""

MEMORY_MB: dict[str, int] = {"math_verify": 4096}
"""Address space of a worker that runs such a reward, where the configuration sets none."""


def names() -> list[str]:
    """The built-in names."""
    return sorted(BUILTIN)


def load(name: str, arguments: Mapping[str, Any] | None = None, context: Mapping[str, Any] | None = None) -> Reward:
    """The reward called `name`; `context` values (`prefilled`) are given to functions that name such a parameter.

    Raises:
        ValueError: unknown name, no such file or function, an error while importing, a signature that fits none.
    """
    function = _find(name)
    style, parameters, keywords = detect_style(name, function)
    given = {key: value for key, value in (context or {}).items() if key in parameters}
    unknown = [key for key in arguments or {} if key not in parameters and not keywords]
    if unknown:
        raise ValueError(f"reward {name}: unknown argument {', '.join(unknown)}; it takes {', '.join(sorted(parameters))}")
    if name in BUILTIN:
        missing = [key for key in REQUIRED.get(name, ()) if key not in (arguments or {})]
        if missing:
            raise ValueError(f"reward {name} needs {', '.join(missing)} in its arguments")
        if name == "language" and (arguments or {}).get("detector") == "py3langid":
            _require("reward language with detector py3langid", "py3langid", "language")
    return Reward(name=name, function=function, style=style, parameters=parameters, keywords=keywords, arguments={**given, **(arguments or {})})


def _find(name: str) -> Callable[..., Any]:
    target = BUILTIN.get(name, name)
    if name in EXTRAS:
        _require(f"reward {name}", *EXTRAS[name])
    module_name, colon, function_name = target.rpartition(":")
    if not colon or not module_name or not function_name:
        near = difflib.get_close_matches(name, BUILTIN, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"unknown reward {name!r}{hint} (built in: {', '.join(names())}; or path/to/file.py:function, package.module:function)")
    module = _load_file(name, Path(module_name).expanduser()) if module_name.endswith(".py") else _load_module(name, module_name)
    function = getattr(module, function_name, None)
    if function is None:
        near = difflib.get_close_matches(function_name, [key for key in vars(module) if not key.startswith("_")], n=1)
        raise ValueError(f"reward {name}: no function {function_name} in {module_name}" + (f"; did you mean {near[0]}?" if near else ""))
    if not callable(function):
        raise ValueError(f"reward {name}: {function_name} in {module_name} is not callable")
    return function


def _require(what: str, package: str, extra: str) -> None:
    """Import an optional package now: some take seconds, which must not count against the first call's deadline."""
    try:
        importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise ValueError(f"{what}: {package} cannot be imported: {last_line(error)}") from error
        raise ValueError(f"{what} needs a package that is not installed: pip install -e '.[{extra}]' (in the checkout of nsa-grpo)") from error


def _load_file(name: str, path: Path) -> Any:
    if not path.is_file():
        raise ValueError(f"reward {name}: no file {path}")
    private = "_reward_file_" + hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
    if private in sys.modules:
        return sys.modules[private]
    spec = importlib.util.spec_from_file_location(private, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"reward {name}: {path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[private] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[private]
        raise ValueError(f"reward {name}: {path} cannot be loaded: {_where(error)}{last_line(error)}") from error
    return module


def _load_module(name: str, module_name: str) -> Any:
    try:
        return importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        raise ValueError(f"reward {name}: module {module_name} cannot be imported: {_where(error)}{last_line(error)}") from error


def _where(error: BaseException) -> str:
    return f"line {error.lineno}: " if isinstance(error, SyntaxError) and error.lineno else ""
