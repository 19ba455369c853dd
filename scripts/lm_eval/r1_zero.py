"""What r1_zero.yaml needs: the prompt of a row, and the scores of a completion. lm-eval imports this file by its path."""

from __future__ import annotations

from typing import Any

from grpo.prompts import R1_ZERO_TEMPLATE
from rewards.format import is_well_formed
from rewards.math_equal import equivalent


def prompt(doc: dict[str, Any]) -> str:
    """The prompt that `nsa-grpo eval` gives with the default template."""
    return R1_ZERO_TEMPLATE.replace("{question}", str(doc["question"]))


def score(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """lm-eval cuts the stop string off; it belongs to the completion."""
    completion = results[0] + "</answer>" if "<answer>" in results[0] else results[0]
    return {"accuracy": float(equivalent(str(doc["answer"]), completion)), "well_formed": float(is_well_formed(completion))}
