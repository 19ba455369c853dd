"""Where actors go: which cluster, which share of a GPU, and what follows where two share one. Knows nothing of Ray but its
address format."""

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
    on_gpu, parallel = device.startswith("cuda"), config.rollout.tensor_parallel
    defaults = (0.0, 0.0) if not on_gpu else (0.5, 0.5) if parallel == 1 else (float(parallel), 1.0)
    shares = []
    for name, given, default in zip(
        ("rollout_gpus", "learner_gpus"), (config.runtime.rollout_gpus, config.runtime.learner_gpus), defaults, strict=True
    ):
        if given == 0 and on_gpu:
            raise ValueError(f"runtime.{name} is 0 but model.device is {config.model.device}: give it a share, or set model.device to cpu")
        shares.append(default if given is None else given)
    if on_gpu and parallel > 1 and shares[0] != parallel:
        raise ValueError(f"rollout.tensor_parallel is {parallel}, so runtime.rollout_gpus must be {parallel} too, got {shares[0]:g}")
    return shares[0], shares[1]


def shares_gpu(config: RunConfig) -> bool:
    """Whether sampler and learner work on one GPU."""
    from grpo.learner import resolve_device

    if config.runtime.kind == "local":
        return resolve_device(config.model.device).type == "cuda"
    rollout, learner = gpu_shares(config)
    return 0 < rollout < 1 and 0 < learner < 1


def sleeps(config: RunConfig) -> bool:
    """Whether the sampler gives up its memory while the learner works: as `rollout.sleep` says, else where vLLM shares a GPU."""
    if config.rollout.sleep is not None:
        return config.rollout.sleep
    return config.rollout.engine == "vllm" and shares_gpu(config)


def cluster_address(config: RunConfig) -> str | None:
    """The cluster to join; None for an instance of our own (`local` asks for that where RAY_ADDRESS is set)."""
    address = config.runtime.address or os.environ.get("RAY_ADDRESS")
    return None if address == "local" else address


def knock(address: str) -> None:
    """Raise OSError where nobody listens at host:port; Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=_KNOCK_DEADLINE_S).close()
