import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor, nn

from guides import GaussianEncoder, MeanField, PointEncoder, amortise
from pyro_scm import models
from pyro_scm.batch import Batch
from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.ensemble import System
from pyro_scm.errors import ModelError
from pyro_scm.infer import fit
from pyro_scm.objectives import Objective
from tests.screens import cells, hierarchical


class Conjugate(nn.Module):
    """theta ~ prior;  x_ng | theta ~ likelihood(theta)."""

    def __init__(self, prior: Any, likelihood: Any) -> None:
        super().__init__()
        self.prior, self.likelihood = prior, likelihood

    def forward(self, batch: Batch) -> None:
        theta = pyro.sample("theta", self.prior)
        with batch.plate():
            law = self.likelihood(theta.unsqueeze(-1).expand(len(batch), 1) if theta.dim() else theta)
            pyro.sample("x", law.expand((len(batch), 1)).to_event(1), obs=batch.x)


def of_values(values: Tensor) -> EnvironmentDataset:
    """A data set of one gene with the given values."""
    import anndata
    import pandas as pd

    obs = pd.DataFrame({"p": "control"}, index=[f"cell {i}" for i in range(len(values))])
    adata = anndata.AnnData(values[:, None].numpy(), obs=obs, var=pd.DataFrame(index=["g"]))
    return EnvironmentDataset.from_anndata(adata, environment="p", control="control", counts=False)


# ---------------------------------------------------------------------- structure
def test_sites_inside_the_plate_get_encoders_and_those_outside_free_parameters() -> None:
    model = hierarchical()
    guide = amortise(model, cells(), inputs=("x", "e"), hidden=(6,))
    assert list(guide.local) == ["z"]
    assert isinstance(guide.local["z"], GaussianEncoder)
    assert list(guide.outside) == ["spread", "centre", "share"]
    assert all(isinstance(q, MeanField) for q in guide.outside.values())
    batch = cells()[:5]
    trace = poutine.trace(guide).get_trace(batch)
    for name, inside in (("z", True), ("spread", False), ("centre", False), ("share", False)):
        assert any(frame.name == "data" for frame in trace.nodes[name]["cond_indep_stack"]) == inside
    assert trace.nodes["z"]["value"].shape == (5, 3)
    assert trace.nodes["z"]["scale"] == pytest.approx(100 / 5)
    assert trace.nodes["centre"]["value"].shape == (3,)


def test_the_guide_samples_in_the_models_own_order_and_returns_every_value() -> None:
    guide = amortise(hierarchical(), cells())
    trace = poutine.trace(guide).get_trace(cells()[:5])
    sites = [name for name in trace.stochastic_nodes if name != "data"]
    assert sites == ["spread", "centre", "share", "z"]
    values = trace.nodes["_RETURN"]["value"]
    assert list(values) == sites
    assert all(torch.equal(values[name], trace.nodes[name]["value"]) for name in sites)


def test_several_local_sites_each_get_an_encoder_of_their_size() -> None:
    def program(batch: Batch) -> None:
        with batch.plate():
            pyro.sample("scalar", dist.Normal(0.0, 1.0))
            pyro.sample("vector", dist.Normal(torch.zeros(4), 1.0).to_event(1))

    guide = amortise(program, cells(), inputs=("x", "plate"))
    assert list(guide.local) == ["scalar", "vector"]
    values = guide(cells()[:6])
    assert values["vector"].shape == (6, 4)
    assert values["scalar"].shape[0] == 6


def test_model_and_guide_match_in_pyros_own_eyes() -> None:
    model, batch = hierarchical(), cells()[:10]
    guide = amortise(model, cells())
    with pyro.validation_enabled(True):
        guided = poutine.trace(guide).get_trace(batch)
        replayed = poutine.trace(poutine.replay(model, trace=guided)).get_trace(batch)
        pyro.util.check_model_guide_match(replayed, guided)  # warns, and warnings are errors here
        replayed.compute_log_prob()
        guided.compute_log_prob()


def test_a_schema_serves_as_well_as_the_cells() -> None:
    torch.manual_seed(0)
    one = amortise(hierarchical(), cells())
    torch.manual_seed(0)
    other = amortise(hierarchical(), cells().schema)
    assert {n: tuple(p.shape) for n, p in one.named_parameters()} == {
        n: tuple(p.shape) for n, p in other.named_parameters()
    }
    torch.testing.assert_close(one.local["z"].mean, other.local["z"].mean)


def test_building_a_guide_leaves_no_parameters_in_pyros_store() -> None:
    amortise(models.vae(cells().schema, latent=2), cells())
    assert len(pyro.get_param_store()) == 0


def test_it_remembers_how_it_was_built() -> None:
    guide = amortise(models.vae(cells().schema), cells(), inputs=("x",), hidden=(4, 5), conditioning="film")
    assert guide.spec == {"inputs": ["x"], "hidden": [4, 5], "conditioning": "film", "family": "normal"}


def test_the_point_family_makes_points_of_local_sites_only() -> None:
    model = hierarchical()
    guide = amortise(model, cells(), family="point", inputs=("x",))
    assert isinstance(guide.local["z"], PointEncoder)
    assert all(isinstance(q, MeanField) for q in guide.outside.values())
    first, second = guide(cells()[:4]), guide(cells()[:4])
    assert torch.equal(first["z"], second["z"])
    assert not torch.equal(first["centre"], second["centre"])


# ---------------------------------------------------------------------- messages
def test_an_unknown_family_is_refused() -> None:
    with pytest.raises(ModelError, match="unknown guide family 'flow': use one of normal, point"):
        amortise(hierarchical(), cells(), family="flow")


def test_unknown_inputs_and_conditioning_are_refused() -> None:
    with pytest.raises(ModelError, match=r"guide inputs \('x', 'dose'\): give 'x' and any of \['e', 'plate', 'y'\]"):
        amortise(hierarchical(), cells(), inputs=("x", "dose"))
    with pytest.raises(ModelError, match="unknown conditioning 'hyper'"):
        amortise(hierarchical(), cells(), conditioning="hyper")


def test_a_model_without_latent_sites_is_refused() -> None:
    def program(batch: Batch) -> None:
        with batch.plate():
            pyro.sample("x", dist.Normal(torch.zeros(8), 1.0).to_event(1), obs=batch.x)

    with pytest.raises(ModelError, match="the model has no latent sites: there is nothing for a guide to infer"):
        amortise(program, cells())


def test_a_discrete_global_site_is_refused() -> None:
    def program(batch: Batch) -> None:
        pyro.sample("mask", dist.Bernoulli(0.5))

    with pytest.raises(ModelError, match="distribution Bernoulli is discrete: write its guide"):
        amortise(program, cells())


# ---------------------------------------------------------------------- inference against exact posteriors
VALUES = torch.tensor([1.9, 0.4, 2.2, 1.1, 3.0, 1.6, 2.4, 0.9, 1.3, 2.7, 1.8, 2.1])
SIGMA, TAU = 0.8, 1.5


def gaussian() -> tuple[Conjugate, float, float, float]:
    """A normal mean, its posterior mean and standard deviation, and the log evidence."""
    precision = 1 / TAU**2 + len(VALUES) / SIGMA**2
    mean = float(VALUES.sum()) / SIGMA**2 / precision
    covariance = SIGMA**2 * torch.eye(len(VALUES)) + TAU**2
    evidence = torch.distributions.MultivariateNormal(torch.zeros(len(VALUES)), covariance).log_prob(VALUES)
    model = Conjugate(dist.Normal(0.0, TAU), lambda theta: dist.Normal(theta, SIGMA))
    return model, mean, precision**-0.5, float(evidence)


def test_at_the_exact_posterior_the_bound_is_the_log_evidence() -> None:
    model, mean, sd, evidence = gaussian()
    data = of_values(VALUES)
    guide = amortise(model, data)
    q = guide.outside["theta"]
    with torch.no_grad():
        q.loc.fill_(mean)
        q.raw_scale.fill_(math.log(math.expm1(sd - 1e-4)))
    # the log-likelihood is quadratic in theta: the average over epsilon = -1 and 1 is its exact expectation
    noise = {"theta": torch.tensor([1.0, -1.0])}
    losses = System(model, guide, Objective(particles=2))(data.batch(), noise)
    assert float(losses["loss"].detach()) * len(VALUES) == pytest.approx(-evidence, rel=1e-5)
    with torch.no_grad():
        q.loc.add_(0.1)
    off = System(model, guide, Objective(particles=2))(data.batch(), noise)
    gap = 0.5 * 0.1**2 / sd**2  # KL between two normals of the same scale
    assert float((off["loss"] - losses["loss"]).detach()) * len(VALUES) == pytest.approx(gap, rel=1e-3)


def test_a_normal_mean_is_inferred_with_pyros_own_svi() -> None:
    model, mean, sd, _ = gaussian()
    data = of_values(VALUES)
    guide = amortise(model, data)
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.03}), Objective(particles=4))
    for step in range(300):
        if step == 150:
            svi.optim.set_state({n: _slower(s) for n, s in svi.optim.get_state().items()})
        svi.step(data.batch())
    law = guide.outside["theta"]()
    assert float(law.loc.detach()) == pytest.approx(mean, abs=0.05)
    assert float(law.scale.detach()) == pytest.approx(sd, rel=0.2)


def _slower(state: dict[str, Any]) -> dict[str, Any]:
    for group in state["param_groups"]:
        group["lr"] = 0.005
    return state


def trained(model: nn.Module, data: EnvironmentDataset) -> tuple[float, float]:
    """Mean and standard deviation of theta under the guide that `fit` leaves behind."""
    guide = amortise(model, data)
    run = fit(
        model, guide, data, objective=Objective(particles=4), epochs=300, lr=0.08, schedule="cosine", progress=False
    )
    draws = run.guide.outside["theta"]().sample((20_000,))  # type: ignore[operator,index,union-attr]
    return float(draws.mean()), float(draws.std())


def test_fit_infers_a_site_on_the_reals() -> None:
    model, mean, sd, _ = gaussian()
    found = trained(model, of_values(VALUES))
    assert found[0] == pytest.approx(mean, abs=0.05)
    assert found[1] == pytest.approx(sd, rel=0.1)


def test_fit_infers_a_positive_site() -> None:
    values = torch.distributions.Exponential(torch.tensor(2.5)).sample((60,))
    model = Conjugate(dist.Gamma(3.0, 1.0), lambda theta: dist.Exponential(theta))
    mean, sd = trained(model, of_values(values))
    shape, rate = 3.0 + len(values), 1.0 + float(values.sum())
    assert mean == pytest.approx(shape / rate, rel=0.02)
    assert sd == pytest.approx(shape**0.5 / rate, rel=0.1)


def test_fit_infers_a_site_on_the_unit_interval() -> None:
    values = (torch.arange(60) % 4 == 0).float()
    model = Conjugate(dist.Beta(2.0, 3.0), lambda theta: dist.Bernoulli(theta))
    mean, sd = trained(model, of_values(values))
    a, b = 2.0 + 15, 3.0 + 45
    assert mean == pytest.approx(a / (a + b), rel=0.02)
    assert sd == pytest.approx((a * b / (a + b) ** 2 / (a + b + 1)) ** 0.5, rel=0.1)


def test_a_latent_model_with_global_sites_is_trained_as_an_ensemble() -> None:
    data = cells()
    guide = amortise(hierarchical(), data)
    run = fit(hierarchical(), guide, data, seeds=(0, 1), epochs=6, lr=0.02, kl_warmup=0.0, progress=False)
    first, last = run.history["loss"].iloc[:2].to_numpy(), run.history["loss"].iloc[-2:].to_numpy()
    assert (last < first).all()
    assert run.parameters["guide.outside.centre.loc"].shape == (2, 3)
