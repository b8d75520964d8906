import pyro
import pytest
import torch
from pyro import poutine
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_scm import graphs
from pyro_scm.batch import Batch, Schema
from pyro_scm.errors import ModelError
from pyro_scm.likelihoods import Gaussian, Likelihood
from pyro_scm.model import LatentModel
from pyro_scm.nn import mlp
from pyro_scm.priors import EnvironmentPrior, StandardPrior, TablePrior
from pyro_scm.regimes import TableRegime
from pyro_scm.scm import IndependentSCM, LinearSCM
from pyro_scm.shifts import LinearShift

SCHEMA = Schema(genes=("a", "b"), environments=("control", "A"), features=("f",), counts=False, cells=8)


def cells(observed: bool = True) -> Batch:
    return Batch(
        index=torch.tensor([1, 4, 5, 7]),
        env=torch.tensor([0, 1, 1, 0]),
        row=torch.tensor([0, 1, 1, 0]),
        r=torch.tensor([[0.0], [2.0]]),
        perturbed=torch.tensor([0.0, 1.0]),
        total=8,
        x=torch.arange(8.0).reshape(4, 2) if observed else None,
    )


def run(model: nn.Module, batch: Batch | None = None) -> poutine.Trace:
    trace = poutine.trace(model).get_trace(cells() if batch is None else batch)
    trace.compute_log_prob()
    return trace


def full_model() -> LatentModel:
    torch.manual_seed(2)
    regime = TableRegime(torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, -1.0]]))
    prior, scm = EnvironmentPrior(mlp(1, (), 6), 3), LinearSCM(graphs.full(3), initial=1.0)
    return LatentModel(prior, Gaussian(mlp(3, (4,), 2), SCHEMA), scm, LinearShift(1, 3), regime)


def test_the_program_is_prior_shift_equations_likelihood() -> None:
    model = full_model()
    trace, batch = run(model), cells()
    assert [n for n, site in trace.nodes.items() if site["type"] == "sample"] == ["data", "z", "c", "x"]
    z, c = trace.nodes["z"]["value"], trace.nodes["c"]["value"]
    assert model.shift is not None
    noise = z + model.shift(batch)
    a = model.scm.matrix  # type: ignore[attr-defined]
    gain = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, -1.0], [1.0, 0.0, -1.0], [1.0, 1.0, 1.0]])
    torch.testing.assert_close(c, gain * (c @ a.T) + noise)
    torch.testing.assert_close(trace.nodes["z"]["log_prob"], 2 * model.prior(batch).log_prob(z))
    expected = model.likelihoods[0].distribution(c, batch).log_prob(batch.x)  # type: ignore[operator]
    torch.testing.assert_close(trace.nodes["x"]["log_prob"], 2 * expected)  # four of eight cells
    assert trace.nodes["_RETURN"]["value"].keys() == {"x"}


def test_sites_are_scaled_to_all_cells_of_the_data_set() -> None:
    trace = run(full_model())
    assert trace.nodes["z"]["scale"] == pytest.approx(2)
    assert trace.nodes["x"]["scale"] == pytest.approx(2)
    for site in ("z", "c", "x"):
        assert trace.nodes[site]["fn"].batch_shape == (4,)
    assert [trace.nodes[s]["fn"].event_shape for s in ("z", "c", "x")] == [(3,), (3,), (2,)]


def test_without_layer_shift_or_regime_c_is_z() -> None:
    model = LatentModel(StandardPrior(3), Gaussian(mlp(3, (), 2), SCHEMA))
    assert isinstance(model.scm, IndependentSCM)
    assert model.latent == 3
    assert model.sites == ("c_0", "c_1", "c_2")
    assert model.spec is None
    trace = run(model)
    assert torch.equal(trace.nodes["z"]["value"], trace.nodes["c"]["value"])


def test_an_unobserved_batch_is_simulated() -> None:
    trace = run(full_model(), cells(observed=False))
    assert not trace.nodes["x"]["is_observed"]
    assert trace.nodes["x"]["value"].shape == (4, 2)


def test_parts_of_different_sizes_are_refused() -> None:
    with pytest.raises(ModelError, match=r"^the prior has 3 latents and the causal layer 2: make them equal$"):
        LatentModel(StandardPrior(3), Gaussian(mlp(3, (), 2), SCHEMA), LinearSCM(graphs.full(2)))


def test_draws_of_an_outer_plate_broadcast_through_every_part() -> None:
    model, z = full_model(), torch.randn(5, 4, 3)
    with pyro.plate("draws", 5, dim=-2):
        together = run(poutine.condition(model, data={"z": z}))
    for s in range(5):
        alone = run(poutine.condition(model, data={"z": z[s]}))
        torch.testing.assert_close(together.nodes["c"]["value"][s], alone.nodes["c"]["value"])
        torch.testing.assert_close(together.nodes["x"]["log_prob"][s], alone.nodes["x"]["log_prob"])


class Second(Gaussian):
    """The same genes at a site of their own."""

    site = "w"


def test_a_model_may_have_several_likelihoods() -> None:
    both: list[Likelihood] = [Gaussian(mlp(3, (), 2), SCHEMA), Second(mlp(3, (), 2), SCHEMA)]
    model = LatentModel(StandardPrior(3), both)
    trace = run(model, cells(observed=False))
    assert trace.nodes["_RETURN"]["value"].keys() == {"x", "w"}
    assert not torch.equal(trace.nodes["x"]["value"], trace.nodes["w"]["value"])


class Pooled(nn.Module):
    """A prior with a global mean: z_n ~ N(m, 1), m ~ N(0, 10)."""

    latent = 3

    def forward(self, batch: Batch) -> pyro.distributions.Independent:
        m: Tensor = pyro.sample("m", pyro.distributions.Normal(torch.zeros(3), 10.0).to_event(1))
        return pyro.distributions.Normal(m.expand(len(batch), 3), 1.0).to_event(1)


def test_parts_may_own_sites_outside_the_plate() -> None:
    trace = run(LatentModel(Pooled(), Gaussian(mlp(3, (), 2), SCHEMA)))
    assert trace.nodes["m"]["cond_indep_stack"] == ()
    assert trace.nodes["m"]["scale"] == 1
    assert trace.nodes["m"]["fn"].batch_shape == ()
    assert trace.nodes["z"]["scale"] == pytest.approx(2)


def test_a_model_is_a_pyro_module_whose_parameters_svi_finds() -> None:
    model = full_model()
    assert isinstance(model, PyroModule)
    with poutine.trace(param_only=True) as capture:
        model(cells())
    sites = capture.trace.nodes.values()
    found = {id(site["value"].unconstrained()) for site in sites if site["type"] == "param"}
    assert found == {id(p) for p in model.parameters()}


def test_a_table_of_environments_limits_where_a_model_answers() -> None:
    model = LatentModel(TablePrior(torch.zeros(2, 3), torch.ones(2, 3)), Gaussian(mlp(3, (), 2), SCHEMA))
    run(model)
    with pytest.raises(ModelError, match="cannot answer for one outside it"):
        run(model, cells().under(torch.zeros(1)))
