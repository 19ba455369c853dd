"""The prompt settings a checkpoint was trained with, kept beside its weights so that evaluation asks in the same way.

`nsa_grpo_prompt.json` holds the prompt section; a template file of the user's is copied to `nsa_grpo_prompt.txt`, so that
the checkpoint can be moved to another machine.
"""

from __future__ import annotations

import json
from pathlib import Path

from grpo.config import PromptSection, build_config
from grpo.prompts import load_template

SETTINGS_FILE = "nsa_grpo_prompt.json"
TEMPLATE_FILE = "nsa_grpo_prompt.txt"
_BUILT_IN = ("r1_zero", "chat", "none")


def save_prompt_settings(folder: str | Path, section: PromptSection) -> None:
    """Write the settings into a checkpoint's folder.

    Raises:
        ValueError: the section's template file cannot be used.
    """
    folder = Path(folder)
    if section.template not in _BUILT_IN:
        text = load_template(section)
        (folder / TEMPLATE_FILE).write_text(f"{text}\n", encoding="utf-8")
        section = section.model_copy(update={"template": TEMPLATE_FILE})
    (folder / SETTINGS_FILE).write_text(json.dumps(section.model_dump(mode="json"), indent=2) + "\n", encoding="utf-8")


def load_prompt_settings(folder: str | Path) -> PromptSection | None:
    """The settings saved with a checkpoint; None for a checkpoint (or hub name) that has none.

    Raises:
        ValueError: a settings file that cannot be read.
    """
    path = Path(folder) / SETTINGS_FILE
    if not path.is_file():
        return None
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    section = build_config(PromptSection, tree)
    if section.template == TEMPLATE_FILE:
        section = section.model_copy(update={"template": str(Path(folder) / TEMPLATE_FILE)})
    return section
