"""Independence of the noise from the environment, as a penalty without a second player.

An alternative to adversaries: nothing is trained against the encoder, so there is no alternation to balance.
"""

import torch
from torch import Tensor

from pyro_scm.errors import ModelError
from pyro_scm.objectives.elbo import Penalty, World
from pyro_scm.sites import Z

__all__ = ["MEASURES", "Independence"]

MEASURES = ("hsic", "mmd")


class Independence(Penalty):
    """weight * dependence of z and the environment among the cells of a batch, times the number of cells.

    With the kernel k(z, z') = exp(-|z - z'|^2 / mean |z - z'|^2), which no rescaling of z deceives, both unbiased:

    - hsic: Hilbert-Schmidt independence criterion of k and l(e, e') = [e = e'] (Song et al., JMLR 2012, HSIC_1).
    - mmd: squared maximum mean discrepancy of the cells of an environment and all others, the mean over environments
      with two cells in the batch or more: small environments count as much as large ones (Gretton et al., JMLR 2012).

    Args:
        measure: ``"hsic"`` or ``"mmd"``.
        weight: nats per cell of a unit; k is at most 1, so that a unit is much.
        site: the guide's site.

    Raises:
        ModelError: an unknown measure.
    """

    def __init__(self, measure: str = "hsic", weight: float = 1.0, site: str = Z) -> None:
        super().__init__(weight)
        if measure not in MEASURES:
            raise ModelError(f"unknown measure of independence {measure!r}: use one of {', '.join(MEASURES)}")
        self.measure, self.site = measure, site

    def penalty(self, world: World) -> Tensor:
        """The unweighted term."""
        kernel = _kernel(world.guide[self.site]["value"])
        row, environments = world.batch.row, world.batch.r.shape[0]
        member = (row.unsqueeze(-1) == torch.arange(environments, device=row.device)).to(kernel.dtype)
        measured = _hsic(kernel, member @ member.T) if self.measure == "hsic" else _mmd(kernel, member)
        return measured * world.batch.total


def _kernel(z: Tensor) -> Tensor:
    """``(n, n)``, 0 on its diagonal: no cell is compared with itself."""
    squared = (z.unsqueeze(-2) - z.unsqueeze(-3)).square().sum(-1)
    n = z.shape[-2]
    mean = squared.sum() / max(n * (n - 1), 1)
    away = 1 - torch.eye(n, dtype=z.dtype, device=z.device)
    return torch.exp(-squared / mean.clamp(min=1e-12)) * away


def _hsic(k: Tensor, same: Tensor) -> Tensor:
    """HSIC_1 of kernel matrices whose diagonals do not count; 0 for fewer than 4 cells."""
    n = k.shape[-1]
    if n < 4:
        return k.sum() * 0
    l = same * (1 - torch.eye(n, dtype=k.dtype, device=k.device))
    ks, ls = k.sum(-1), l.sum(-1)
    both = (k * l).sum() + ks.sum() * ls.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (ks * ls).sum()
    return both / (n * (n - 3))


def _mmd(k: Tensor, member: Tensor) -> Tensor:
    """Mean over environments of MMD^2(cells of e, the other cells), k with a diagonal of 0."""
    n, cells = k.shape[-1], member.sum(0)
    inside = (member * (k @ member)).sum(0)
    across = k.sum(-1) @ member - inside
    others = n - cells
    outside = k.sum() - inside - 2 * across
    each = (
        inside / (cells * (cells - 1)).clamp(min=1)
        + outside / (others * (others - 1)).clamp(min=1)
        - 2 * across / (cells * others).clamp(min=1)
    )
    counted = ((cells > 1) & (others > 1)).to(k.dtype)
    return (each * counted).sum() / counted.sum().clamp(min=1)
