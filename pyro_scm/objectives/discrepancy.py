"""The discrepancy-VAE's own terms: virtual intervened cells must be distributed as real ones, with few edges."""

from typing import Any

import torch
from torch import Tensor

from pyro_scm.batch import Batch
from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.errors import ModelError
from pyro_scm.model import LatentModel
from pyro_scm.objectives.elbo import Objective, Penalty, World
from pyro_scm.objectives.structure import EdgeSparsity
from pyro_scm.scm import LinearSCM
from pyro_scm.sites import Z

__all__ = ["InterventionMMD", "discrepancy"]

_WIDTHS = (0.25, 0.5, 1.0, 2.0, 4.0)  # of the kernels, in mean squared distances of real cells


class InterventionMMD(Penalty):
    """weight * MMD^2(virtual cells, observed cells) of the perturbed cells of a batch, times the number of cells.

    Every perturbed cell has a virtual twin: E[x | c] of the noise of a reference cell of the batch under the perturbed
    cell's environment. Both are in standard deviations of the genes, counts as log1p(x / size * depth). Unbiased, five
    Gaussian kernels whose widths follow the real cells. Cells of one environment count twice: otherwise environments
    could change places.

    Args:
        model: with a shift of the environments.
        weight: nats per cell of a unit.

    Source: Zhang et al., "Identifiability Guarantees for Causal Disentanglement from Soft Interventions", NeurIPS 2023.
    """

    def __init__(self, model: LatentModel, weight: float = 10.0) -> None:
        super().__init__(weight)
        self._model = (model,)  # not a part of this penalty

    def penalty(self, world: World) -> Tensor:
        """The unweighted term; 0 in a batch without reference cells."""
        (model,), batch = self._model, world.batch
        assert batch.x is not None
        on = batch.perturbed.index_select(0, batch.row)
        references = (1 - on).sum()
        place = torch.arange(len(batch), device=on.device).remainder(references.clamp(min=1))
        donor = torch.argsort(on, stable=True).index_select(0, place.long())
        noise = world.guide[Z]["value"].index_select(-2, donor) + model.shift(batch)  # type: ignore[misc]
        likelihood: Any = model.likelihoods[0]
        virtual, real = likelihood.mean(model.scm.solve(noise), batch), batch.x
        if batch.size is not None:
            virtual, real = (_logged(value, batch) for value in (virtual, real))
        both = (torch.cat((virtual, real), -2) - likelihood.centre) / likelihood.spread
        alike = 1 + (batch.row.unsqueeze(-1) == batch.row).to(on.dtype)
        return _mmd(both, on.unsqueeze(-1) * on * alike * (references > 0)) * batch.total


def _logged(x: Tensor, batch: Batch) -> Tensor:
    assert batch.size is not None
    return torch.log1p(x * (batch.size.mean() / batch.size).unsqueeze(-1))


def _mmd(both: Tensor, pairs: Tensor) -> Tensor:
    """Unbiased MMD^2 of the first half and the second half of the rows.

    Args:
        both: ``(2 n, G)`` virtual cells, then real ones.
        pairs: ``(n, n)`` weights of pairs; no cell is compared with itself or its twin.
    """
    n = len(pairs)
    norms = both.square().sum(-1)
    squared = (norms.unsqueeze(-1) + norms.unsqueeze(-2) - 2 * both @ both.mT).clamp(min=0)
    pairs = pairs * (1 - torch.eye(n, dtype=pairs.dtype, device=pairs.device))
    count = pairs.sum().clamp(min=1)
    width = ((squared[n:, n:] * pairs).sum() / count).detach().clamp(min=1e-6)
    kernel = torch.stack([torch.exp(-squared / (2 * s * width)) for s in _WIDTHS]).mean(0)
    across = kernel[:n, n:]
    return ((kernel[:n, :n] + kernel[n:, n:] - across - across.mT) * pairs).sum() / count


def discrepancy(
    model: LatentModel, cells: EnvironmentDataset, *, mmd: float = 10.0, edges: float = 1e-3, kl_weight: float = 1.0
) -> Objective:
    """The objective of a `discrepancy_vae`: the evidence lower bound, the MMD of intervened cells, few edges.

    Args:
        model: made by `discrepancy_vae`.
        cells: training cells.
        mmd: weight of `InterventionMMD`, beside the reconstruction's mean over genes.
        edges: weight of `EdgeSparsity`, likewise.
        kl_weight: see `Objective`.

    Raises:
        ModelError: a model without a shift and a linear causal layer.
    """
    if model.shift is None or not isinstance(model.scm, LinearSCM):
        raise ModelError("this model has no shift and linear causal layer: build it with models.discrepancy_vae")
    genes = len(cells.genes)
    penalties: dict[str, Penalty] = {
        "mmd": InterventionMMD(model, mmd * genes),
        "edges": EdgeSparsity(model.scm, edges * genes),
    }
    return Objective(kl_weight=kl_weight, penalties={name: p for name, p in penalties.items() if p.weight})
