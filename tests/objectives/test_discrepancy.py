from typing import Any

import pytest
import torch

from pyro_scm import models, recipes
from pyro_scm.errors import ModelError
from pyro_scm.objectives import Objective, discrepancy
from pyro_scm.objectives.discrepancy import InterventionMMD, _mmd
from tests.compositions import cells


def made(counts: bool = False) -> tuple[Any, Any, Any]:
    torch.manual_seed(0)
    data = cells("multi-hot", counts)
    options: dict[str, Any] = {"latent": 3, "hidden": (), "environment_hidden": (4,), "guide_hidden": (8,)}
    return (*recipes.make("discrepancy_vae", data.schema, **options), data)


def test_the_discrepancy_of_weighted_pairs_is_that_of_a_loop() -> None:
    torch.manual_seed(0)
    both, pairs = torch.randn(10, 3, dtype=torch.float64), torch.rand(5, 5, dtype=torch.float64)
    off = pairs * (1 - torch.eye(5))
    squared = torch.cdist(both, both).square()
    width = (squared[5:, 5:] * off).sum() / off.sum()
    k = torch.stack([torch.exp(-squared / (2 * s * width)) for s in (0.25, 0.5, 1, 2, 4)]).mean(0)
    total = sum(off[i, j] * (k[i, j] + k[5 + i, 5 + j] - k[i, 5 + j] - k[j, 5 + i]) for i in range(5) for j in range(5))
    assert float(_mmd(both, pairs)) == pytest.approx(float(total / off.sum()), rel=1e-9)


@pytest.mark.parametrize("counts", [False, True])
def test_it_is_lowest_at_the_true_shifts(counts: bool) -> None:
    """Virtual cells are control cells under the perturbation: without the shift they are controls."""
    model, guide, data = made(counts)
    penalty = InterventionMMD(model, 1.0)
    batch = data[::2]
    with torch.no_grad():
        world = Objective().world(model.forward, guide.forward, batch)
        real = batch.x
        references = (1 - batch.perturbed[batch.row]).sum()
        assert references > 3

        class Truth(torch.nn.Module):
            """E[x | c] that gives each perturbed cell's own expression, but for its noise."""

            centre, spread = model.likelihoods[0].centre, model.likelihoods[0].spread

            def mean(self, c: Any, b: Any) -> Any:
                return real if counts else real + 0.01

        shifted = float(penalty(world))
        model.likelihoods[0] = Truth()
        assert float(penalty(world)) < 0.2 * shifted


def test_without_controls_in_the_batch_it_is_zero() -> None:
    model, guide, data = made()
    batch = data.of("A 10 uM")[:]
    with torch.no_grad():
        world = Objective().world(model.forward, guide.forward, batch)
        assert float(InterventionMMD(model)(world)) == 0


def test_weights_stand_beside_the_mean_over_genes_and_may_be_left_out() -> None:
    model, _, data = made()
    objective = discrepancy(model, data, mmd=2.0, edges=0.5)
    assert {n: p.weight for n, p in objective.penalties.items()} == {"mmd": 24.0, "edges": 6.0}
    assert discrepancy(model, data, mmd=0.0, edges=0.0).penalties == {}
    with pytest.raises(ModelError, match=r"no shift and linear causal layer: build it with models\.discrepancy_vae"):
        discrepancy(models.vae(data.schema, latent=2), data)
