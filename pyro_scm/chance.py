"""Random numbers that leave no trace in torch's own generators."""

import contextlib
from collections.abc import Iterator

import torch

__all__ = ["forked"]


@contextlib.contextmanager
def forked() -> Iterator[None]:
    """Whatever is seeded or drawn inside, torch's generators are afterwards as they were, those of all GPUs too."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(list(devices)):
        yield
