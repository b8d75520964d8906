from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pyro_scm import query, recipes
from pyro_scm.batch import Batch, Schema
from pyro_scm.infer import fit
from pyro_scm.objectives import Independence, Objective, World
from tests.compositions import cells

SCHEMA = Schema(("g",), ("a", "b", "c"), ("r",), counts=False)


def world(z: Tensor, row: Tensor) -> World:
    batch = replace(Batch.example(SCHEMA, len(z)), row=row, r=torch.zeros(3, 1), perturbed=torch.ones(3))
    return World(batch, {"z": {"value": z}}, {})


def measured(measure: str, z: Tensor, row: Tensor) -> float:
    return float(Independence(measure)(world(z, row))) / len(z)


@pytest.mark.parametrize("measure", ["hsic", "mmd"])
def test_it_is_zero_on_average_where_nothing_depends_and_positive_where_something_does(measure: str) -> None:
    torch.manual_seed(0)
    row = torch.arange(60) % 3
    alike = torch.tensor([measured(measure, torch.randn(60, 4), row) for _ in range(200)])
    assert abs(float(alike.mean())) < 4 * float(alike.std()) / 200**0.5
    assert float(alike.min()) < 0  # unbiased
    for shift in (lambda z: z + row[:, None], lambda z: z * (1 + row[:, None])):  # means, spreads
        moved = torch.tensor([measured(measure, shift(torch.randn(60, 4)), row) for _ in range(20)])
        assert float(moved.min()) > float(alike.max())


@pytest.mark.parametrize("measure", ["hsic", "mmd"])
def test_no_rescaling_of_the_noise_deceives_it(measure: str) -> None:
    torch.manual_seed(0)
    row = torch.arange(30) % 3
    z = torch.randn(30, 4) + row[:, None]
    for factor in (1e-3, 1e3):
        assert measured(measure, factor * z, row) == pytest.approx(measured(measure, z, row), rel=1e-3)


def test_hsic_is_that_of_its_definition() -> None:
    """Song et al. 2012, equation 5, written out."""
    torch.manual_seed(0)
    n, row = 9, torch.arange(9) % 3
    z = torch.randn(n, 2, dtype=torch.float64)
    distance = torch.cdist(z, z).square()
    k = torch.exp(-distance / (distance.sum() / (n * (n - 1))))
    l = (row[:, None] == row).double()
    k.fill_diagonal_(0)
    l.fill_diagonal_(0)
    one = torch.ones(n, dtype=torch.float64)
    inside = torch.trace(k @ l) + (one @ k @ one) * (one @ l @ one) / ((n - 1) * (n - 2))
    expected = (inside - 2 / (n - 2) * (one @ k @ l @ one)) / (n * (n - 3))
    assert measured("hsic", z, row) == pytest.approx(float(expected), rel=1e-9)


def test_mmd_counts_every_environment_alike_and_leaves_out_those_of_one_cell() -> None:
    torch.manual_seed(0)
    z = torch.randn(7, 2, dtype=torch.float64)
    row = torch.tensor([0, 0, 0, 1, 1, 1, 2])
    distance = torch.cdist(z, z).square()
    k = torch.exp(-distance / (distance.sum() / 42))

    def mean(a: list[int], b: list[int]) -> Tensor:
        return torch.stack([k[i, j] for i in a for j in b if i != j]).mean()

    total = []
    for e in (0, 1):
        own, rest = [int(i) for i in (row == e).nonzero()], [int(i) for i in (row != e).nonzero()]
        total.append(mean(own, own) + mean(rest, rest) - 2 * mean(own, rest))
    assert measured("mmd", z, row) == pytest.approx(float(sum(total)) / 2, rel=1e-9)


def test_too_few_cells_say_nothing() -> None:
    for measure in ("hsic", "mmd"):
        assert measured(measure, torch.randn(1, 2), torch.zeros(1, dtype=torch.int64)) == 0


@pytest.mark.parametrize("measure", ["hsic", "mmd"])
def test_it_takes_the_environment_out_of_the_basal_state(measure: str) -> None:
    data = cells()

    def dependence(weight: float) -> float:
        torch.manual_seed(1)
        options: dict[str, Any] = {"prior": "flat", "family": "point", "inputs": ("x",)}
        model, guide = recipes.make("cpa", data.schema, latent=3, hidden=(8,), guide_hidden=(8,), **options)
        objective = (
            recipes.objective("cpa", model, data, independence=weight, measure=measure) if weight else Objective()
        )
        run = fit(model, guide, data, objective=objective, epochs=25, batch_size=140, lr=0.02, progress=False)
        z = torch.as_tensor(query.embed(run, data)["z"][0])
        return float(Independence(measure)(World(data.batch(), {"z": {"value": z}}, {})))

    assert dependence(100.0) < 0.3 * dependence(0.0)
