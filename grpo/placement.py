"""Where actors go: which cluster, and which share of a GPU. Knows nothing of Ray but its address format."""

from __future__ import annotations

import os
import socket

from grpo.config import RunConfig

_KNOCK_DEADLINE_S = 5.0


def gpu_shares(config: RunConfig) -> tuple[float, float]:
    """GPUs of the rollout and of the learner actor.

    Raises:
        ValueError: CUDA is asked for where there is none, or with a share of 0.
    """
    from grpo.learner import resolve_device

    device = config.model.device if cluster_address(config) else resolve_device(config.model.device).type
    default = 0.5 if device.startswith("cuda") else 0.0
    shares = []
    for name, given in (("rollout_gpus", config.runtime.rollout_gpus), ("learner_gpus", config.runtime.learner_gpus)):
        if given == 0 and device.startswith("cuda"):
            raise ValueError(f"runtime.{name} is 0 but model.device is {config.model.device}: give it a share, or set model.device to cpu")
        shares.append(default if given is None else given)
    return shares[0], shares[1]


def cluster_address(config: RunConfig) -> str | None:
    """The cluster to join; None for an instance of our own (`local` asks for that where RAY_ADDRESS is set)."""
    address = config.runtime.address or os.environ.get("RAY_ADDRESS")
    return None if address == "local" else address


def knock(address: str) -> None:
    """Raise OSError where nobody listens at host:port; Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=_KNOCK_DEADLINE_S).close()
