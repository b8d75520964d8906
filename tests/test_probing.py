"""Latents that hold an environment or a covariate are called entangled, others are not."""

from dataclasses import replace
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from numpy.typing import NDArray
from pyro.distributions import Delta
from torch import Tensor, nn

from pyro_scm import recipes
from pyro_scm.batch import Batch
from pyro_scm.data import synthetic
from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.errors import DataError
from pyro_scm.infer import fit
from pyro_scm.probing import disentanglement


class Told(nn.Module):
    """A guide whose z is given for each cell, by its place."""

    def __init__(self, z: NDArray[Any]) -> None:
        super().__init__()
        self.z = torch.as_tensor(np.asarray(z, np.float32))

    def forward(self, batch: Batch) -> Tensor:
        with batch.plate():
            value: Tensor = pyro.sample("z", Delta(self.z[batch.index], event_dim=1))
        return value


@pytest.fixture(scope="module")
def cells() -> EnvironmentDataset:
    found = synthetic.dataset(synthetic.simulate(latent=3, genes=8, environments=4, cells=60, seed=1), "oracle")
    batch = np.arange(len(found)) % 2
    return replace(found, covariates={"batch": batch}, categories={"batch": ("x", "y")})


def told(cells: EnvironmentDataset, z: NDArray[Any]) -> Any:
    model, guide = recipes.make("vae", cells.schema, latent=z.shape[1])
    run = fit(model, guide, cells, epochs=1, progress=False)
    return replace(run, guide=Told(z), parameters={k: v for k, v in run.parameters.items() if k.startswith("model.")})


def test_what_the_latents_hold_is_found_and_what_they_do_not_is_at_chance(cells: EnvironmentDataset) -> None:
    z = np.random.default_rng(0).normal(size=(len(cells), 3))
    z[:, 1] += 5 * cells.covariates["batch"]
    table = disentanglement(told(cells, z), cells, permutations=10).set_index("label")
    assert table.index.tolist() == ["environment", "batch"]
    assert table["values"].tolist() == [4, 2]
    assert table["verdict"].tolist() == ["at chance", "entangled"]
    assert table.loc["batch", "accuracy"] > 0.95
    assert table.loc["environment", "accuracy"] == pytest.approx(1 / 4, abs=0.15)
    assert (table["leaked"] > 0.95).all()


def test_a_probe_that_does_not_learn_gives_no_verdict(cells: EnvironmentDataset) -> None:
    few = cells.subset(np.concatenate([np.flatnonzero(cells.env == e)[:4] for e in range(4)]))
    z = np.random.default_rng(0).normal(size=(len(few), 2000))
    table = disentanglement(told(few, z), few, ["batch"], permutations=10)
    assert table.set_index("label").loc["batch", "verdict"] == "probe does not learn"


def test_there_must_be_something_to_probe(cells: EnvironmentDataset) -> None:
    run = told(cells, np.zeros((len(cells), 3)))
    with pytest.raises(DataError, match="no covariate 'donor': these cells have 'batch'"):
        disentanglement(run, cells, ["donor"])
    with pytest.raises(DataError, match="these cells have one environment"):
        disentanglement(run, cells.of("control"), [])
