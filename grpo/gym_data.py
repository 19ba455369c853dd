"""Problems made by the package `reasoning-gym` (optional extra): the data name `reasoning-gym:TASK?setting=value&…`.

    data.train=reasoning-gym:chain_sum?size=2000&seed=1&max_terms=3 data.eval=reasoning-gym:chain_sum?size=200&seed=2

`size` (default 500) and `seed` (default 0) are the package's; other settings are the task's own. Each row carries what
rewards/gym.py needs to build its entry again. Leaves out the reward itself.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qsl

from grpo.config import parse_yaml

PREFIX = "reasoning-gym:"


def read_gym(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (place, columns) of every problem of `reasoning-gym:TASK?…`.

    Raises:
        ValueError: the package is not installed, no such task, or a setting that the task does not take.
    """
    if importlib.util.find_spec("reasoning_gym") is None:
        raise ValueError(f"{name}: reasoning-gym is not installed: pip install -e '.[reasoning-gym]' (in the checkout of nsa-grpo)")
    from rewards.gym import dataset

    task, _, query = name.removeprefix(PREFIX).partition("?")
    settings = {key: parse_yaml(value) for key, value in parse_qsl(query, keep_blank_values=True)}
    configuration = json.dumps({"seed": 0, **settings}, sort_keys=True)
    entries = dataset(task, configuration)
    for index in range(len(entries)):
        entry = entries[index]
        columns = {"gym_task": task, "gym_config": configuration, "gym_index": index}
        yield f"{name}, problem {index}", {"question": str(entry["question"]), "answer": str(entry["answer"]), **columns}
