"""Faults that end a run and are not a user's mistake in an argument (those are ValueErrors). One clear line each."""

from __future__ import annotations


class RunFailed(RuntimeError):
    """A run cannot go on. `str(error)` is one line that names the owner; `details` holds what helps to find the cause."""

    def __init__(self, message: str, details: str = "") -> None:
        super().__init__(message)
        self.details = details


class ActorFailed(RunFailed):
    """A part of the run raised, died or gave nothing within its deadline. `owner` is rollout, reward or learner."""

    def __init__(self, owner: str, what: str, details: str = "") -> None:
        super().__init__(f"the {owner} {what}", details)
        self.owner = owner


class EngineFailed(RunFailed):
    """The sampler's engine failed, stalled, or was asked for something it cannot do in its state."""
