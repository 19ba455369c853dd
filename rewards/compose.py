"""Several rewards → one: the weighted sum of the parts."""

from __future__ import annotations

from collections.abc import Mapping


def combine(parts: Mapping[str, float | None], weights: Mapping[str, float]) -> float | None:
    """Σ weight × part; None as soon as a part with a weight is None (the sample then leaves its group's statistics).

    Raises:
        ValueError: a part without a weight.
    """
    missing = [name for name in parts if name not in weights]
    if missing:
        raise ValueError(f"no weight for {', '.join(missing)}; weights are given for {', '.join(weights)}")
    total = 0.0
    for name, value in parts.items():
        if weights[name] == 0:
            continue
        if value is None:
            return None
        total += weights[name] * value
    return total
