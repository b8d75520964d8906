"""How many threads torch may use: small steps are slower on several, and far slower where the machine is shared."""

import contextlib
from collections.abc import Iterator

import torch

__all__ = ["few_threads"]

# Floating-point operations of a step below which waking a second thread costs more than it brings.
_WORTH_SHARING = 2e9


@contextlib.contextmanager
def few_threads(operations: float = 0.0) -> Iterator[None]:
    """One thread inside, unless a step has work enough to share.

    Args:
        operations: floating-point operations of a step; 0 for many small calls.
    """
    before = torch.get_num_threads()
    if operations < _WORTH_SHARING:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
