"""Regimes: which mechanisms an environment changes or cuts, as gains of the structural equations."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyro_scm.batch import Batch
from pyro_scm.priors import known

__all__ = ["TableRegime"]


class TableRegime(nn.Module):
    """gain[e, j]: 1 leaves f_j as it is, 0 cuts its parents (hard intervention), anything else rescales it.

    Args:
        gain: ``(E, d)``.
    """

    def __init__(self, gain: Tensor) -> None:
        super().__init__()
        self.gain: Tensor
        self.register_buffer("gain", gain.to(torch.get_default_dtype()).clone())

    def forward(self, batch: Batch) -> Tensor:
        """``(n, d)``."""
        return F.embedding(known(batch), self.gain)
