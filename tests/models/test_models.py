import functools
import math
from collections.abc import Callable
from typing import Any

import networkx as nx
import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from torch import nn

from guides import amortise
from pyro_scm import graphs, models
from pyro_scm.batch import Batch, Schema
from pyro_scm.data import synthetic
from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.errors import ModelError
from pyro_scm.likelihoods import Gaussian, GaussianFixed, NegativeBinomialLikelihood, StudentT
from pyro_scm.model import LatentModel
from pyro_scm.nn import reset_parameters
from pyro_scm.objectives import Objective
from pyro_scm.priors import Dense, EnvironmentPrior, FlatPrior, SparseSoftmax, StandardPrior, TopK
from pyro_scm.scm import IndependentSCM, LinearSCM, MechanismSCM
from pyro_scm.shifts import EnvironmentShift
from tests.screens import SECOND_SEED

BUILD: dict[str, Callable[..., LatentModel]] = {name: getattr(models, name) for name in models.__all__}
# prior, causal layer, shift, what the decoder reads beside c
COMPOSITION: dict[str, tuple[type, type, type | None, bool]] = {
    "ae": (FlatPrior, IndependentSCM, None, False),
    "vae": (StandardPrior, IndependentSCM, None, False),
    "conditional_vae": (StandardPrior, IndependentSCM, None, True),
    "environment_vae": (EnvironmentPrior, IndependentSCM, None, False),
    "translation_vae": (StandardPrior, IndependentSCM, EnvironmentShift, False),
    "structured_environment_vae": (EnvironmentPrior, LinearSCM, None, False),
    "structured_translation_vae": (StandardPrior, LinearSCM, EnvironmentShift, False),
}
VARIATIONAL = [name for name in COMPOSITION if name != "ae"]
SPARSE = ["environment_vae", "translation_vae", "structured_environment_vae", "structured_translation_vae"]
STRUCTURED = ["structured_environment_vae", "structured_translation_vae"]


@functools.cache
def cells(observation: str = "gaussian") -> EnvironmentDataset:
    """120 cells of 7 genes in a control and three environments, each described by five numbers."""
    adata = synthetic.simulate(
        latent=3, genes=7, environments=4, cells=30, descriptors=5, observation=observation, depth=200.0
    )
    return synthetic.dataset(adata, "descriptors")


def make(name: str, observation: str = "gaussian", **options: Any) -> tuple[LatentModel, Any, Batch]:
    """A small model, its guide and some of the cells, the same at every call."""
    torch.manual_seed(4)
    data = cells(observation)
    model = BUILD[name](data.schema, latent=3, hidden=(6,), **options)
    guide = amortise(model, data, inputs=("x", "e"), hidden=(8,), family="point" if name == "ae" else "normal")
    reset_parameters(guide)
    return model, guide, data.batch(torch.arange(0, 120, 3))


def test_every_model_is_listed_here() -> None:
    assert set(BUILD) == {*COMPOSITION, "adversarial_prior_ae", *SECOND_SEED}  # which have files of their own


@pytest.mark.parametrize("name", COMPOSITION)
def test_each_model_is_its_composition(name: str) -> None:
    model, _, _ = make(name)
    prior, scm, shift, conditional = COMPOSITION[name]
    assert type(model.prior) is prior
    assert type(model.scm) is scm
    assert type(model.shift) is (shift or type(None))
    assert model.regime is None
    assert model.latent == 3
    (likelihood,) = model.likelihoods
    assert type(likelihood) is Gaussian
    assert likelihood.conditional is conditional
    layers = [layer for layer in likelihood.net if isinstance(layer, nn.Linear)]  # type: ignore[union-attr]
    assert [layer.in_features for layer in layers] == [3 + 5 * conditional, 6]
    assert layers[-1].out_features == 7


@pytest.mark.parametrize("name", SPARSE)
def test_environment_networks_read_the_representation(name: str) -> None:
    model, _, _ = make(name, environment_hidden=(9,))
    part = model.prior if isinstance(model.prior, EnvironmentPrior) else model.shift
    layers = [layer for layer in part.net if isinstance(layer, nn.Linear)]  # type: ignore[union-attr]
    outputs = 6 if isinstance(model.prior, EnvironmentPrior) else 3
    assert [(layer.in_features, layer.out_features) for layer in layers] == [(5, 9), (9, outputs)]


@pytest.mark.parametrize("name", SPARSE)
def test_sparsity_by_name(name: str) -> None:
    for sparsity, kind in (("softmax", SparseSoftmax), ("top-k", TopK), ("dense", Dense)):
        model, _, _ = make(name, sparsity=sparsity, temperature=0.2, k=2)
        part: Any = model.prior if isinstance(model.prior, EnvironmentPrior) else model.shift
        assert type(part.sparsifier) is kind
        assert float(getattr(part.sparsifier, "temperature", 0.2)) == pytest.approx(0.2)
        assert getattr(part.sparsifier, "k", 2) == 2


@pytest.mark.parametrize("name", ["environment_vae", "structured_environment_vae"])
def test_environments_may_leave_the_scale_alone(name: str) -> None:
    for scale in (True, False):
        model, _, batch = make(name, scale=scale)
        assert bool((model.prior(batch).base_dist.scale == 1).all()) is not scale


@pytest.mark.parametrize("name", STRUCTURED)
def test_the_causal_layer_is_layered_or_as_given(name: str) -> None:
    assert sorted(make(name, depth=2)[0].scm.graph.edges) == [(0, 2), (1, 2)]
    assert sorted(make(name)[0].scm.graph.edges) == [(0, 1), (1, 2)]  # as deep as it has nodes
    graph = graphs.from_edges([("b", "a")], ["c"])
    model, _, _ = make(name, graph=graph, mechanism="network")
    assert type(model.scm) is MechanismSCM
    assert model.sites == ("c_b", "c_c", "c_a")
    assert nx.utils.graphs_equal(model.scm.graph, graph)


@pytest.mark.parametrize("name", COMPOSITION)
def test_the_likelihood_follows_the_data(name: str) -> None:
    assert type(make(name, "negative-binomial")[0].likelihoods[0]) is NegativeBinomialLikelihood
    assert type(make(name, likelihood="student-t")[0].likelihoods[0]) is StudentT
    assert type(make(name, likelihood="normal-fixed")[0].likelihoods[0]) is GaussianFixed
    linear = BUILD[name](cells().schema, latent=3, hidden=())
    assert len(linear.likelihoods[0].net) == 1  # type: ignore[arg-type]


# ---------------------------------------------------------------------- the record of how it was built
@pytest.mark.parametrize("name", COMPOSITION)
def test_a_model_remembers_its_name_and_options(name: str) -> None:
    schema = cells().schema
    model = BUILD[name](schema, latent=3, hidden=(6,))
    assert model.spec == {"name": name, "options": {"latent": 3, "hidden": (6,)}}
    again = BUILD[name](schema, **model.spec["options"])
    again.load_state_dict(model.state_dict())
    assert BUILD[name](schema).latent == 20
    assert BUILD[name](schema).spec == {"name": name, "options": {}}
    assert BUILD[name].__doc__
    assert "~" in BUILD[name].__doc__.split("\n")[0]


def test_a_model_with_a_graph_of_the_user_s_own_has_no_record() -> None:
    for name in STRUCTURED:
        assert make(name, graph=graphs.full(3))[0].spec is None
        assert make(name, graph=None)[0].spec is not None


# ---------------------------------------------------------------------- initial values
CONSTANT = ("raw_scale", "raw_dispersion", "offset")


@pytest.mark.parametrize("observation", ["gaussian", "negative-binomial"])
@pytest.mark.parametrize("name", COMPOSITION)
def test_drawing_anew_reaches_every_parameter_and_follows_the_seed(name: str, observation: str) -> None:
    options = {"mechanism": "network"} if name in STRUCTURED else {}
    model, _, _ = make(name, observation, **options)
    draws = []
    for seed in (1, 1, 2):
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(torch.nan)
        torch.manual_seed(seed)
        reset_parameters(model)
        draws.append({n: p.detach().clone() for n, p in model.named_parameters()})
    for n, first in draws[0].items():
        assert first.isfinite().all(), n
        assert torch.equal(first, draws[1][n]), n
        assert bool((first == draws[2][n]).all()) is n.endswith(CONSTANT), n


def test_a_model_is_built_with_its_initial_values() -> None:
    (gaussian,), (counts,) = make("vae")[0].likelihoods, make("vae", "negative-binomial")[0].likelihoods
    torch.testing.assert_close(gaussian.scale, 1.05 * gaussian.spread, rtol=1e-4, atol=1e-4)  # type: ignore[operator]
    assert (counts.raw_dispersion == 1).all()


def test_building_draws_from_torch_s_generator() -> None:
    first, second = make("structured_environment_vae")[0], make("structured_environment_vae")[0]
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


# ---------------------------------------------------------------------- options that do not exist or fit
@pytest.mark.parametrize("name", SPARSE)
def test_an_unknown_sparsity_is_refused(name: str) -> None:
    with pytest.raises(ModelError, match="unknown sparsity 'l1': use 'softmax', 'top-k' or 'dense'"):
        make(name, sparsity="l1")
    with pytest.raises(ModelError, match="temperature 0 of the sparse softmax"):
        make(name, temperature=0)
    with pytest.raises(ModelError, match="top-0"):
        make(name, sparsity="top-k", k=0)


@pytest.mark.parametrize("name", STRUCTURED)
def test_an_unknown_mechanism_or_a_graph_of_another_size_is_refused(name: str) -> None:
    with pytest.raises(ModelError, match="unknown mechanism 'spline': use 'linear' or 'network'"):
        make(name, mechanism="spline")
    with pytest.raises(ModelError, match="the graph has 4 nodes and latent is 3: make them equal"):
        make(name, graph=graphs.full(4))
    with pytest.raises(ModelError, match="0 layers for 3 nodes"):
        make(name, depth=0)


@pytest.mark.parametrize("name", COMPOSITION)
def test_an_unknown_or_unfit_likelihood_is_refused(name: str) -> None:
    with pytest.raises(ModelError, match="unknown likelihood 'cauchy'"):
        make(name, likelihood="cauchy")
    with pytest.raises(ModelError, match="the data are continuous"):
        make(name, likelihood="negative-binomial")
    with pytest.raises(TypeError, match="unexpected keyword argument 'wings'"):
        make(name, wings=2)


# ---------------------------------------------------------------------- as Pyro programs
@pytest.mark.parametrize("name", COMPOSITION)
def test_sites_and_shapes(name: str) -> None:
    model, _, batch = make(name)
    trace = poutine.trace(model).get_trace(batch.unobserved())
    assert [n for n, s in trace.nodes.items() if s["type"] == "sample"] == ["data", "z", "c", "x"]
    assert trace.nodes["z"]["value"].shape == trace.nodes["c"]["value"].shape == (40, 3)
    assert trace.nodes["x"]["value"].shape == (40, 7)
    assert trace.nodes["x"]["scale"] == pytest.approx(3)


def test_only_the_conditional_vae_breaks_the_independence_of_x_and_e_given_c() -> None:
    for name in COMPOSITION:
        model, _, batch = make(name)
        c = torch.randn(40, 3)
        here, elsewhere = model.likelihoods[0], batch.under(torch.full((5,), 3.0))
        same = torch.equal(here.mean(c, batch), here.mean(c, elsewhere))  # type: ignore[operator]
        assert same is (name != "conditional_vae")


@pytest.mark.parametrize("name", COMPOSITION)
def test_any_node_can_be_set_by_plain_pyro(name: str) -> None:
    model, _, batch = make(name)
    with torch.no_grad():
        trace = poutine.trace(poutine.do(model, data={"c_1": 4.0})).get_trace(batch.unobserved())
    assert (trace.nodes["c"]["value"][:, 1] == 4).all()
    assert (trace.nodes["c_1"]["value"] != 4).all()


@pytest.mark.parametrize("observation", ["gaussian", "negative-binomial"])
@pytest.mark.parametrize("name", COMPOSITION)
def test_pyro_s_own_svi_trains_it(name: str, observation: str) -> None:
    model, guide, batch = make(name, observation)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    loss = Trace_ELBO() if name == "ae" else TraceMeanField_ELBO()
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), loss)
    losses = [svi.step(batch) for _ in range(60)]
    assert all(math.isfinite(v) for v in losses)
    share = 0.9 if observation == "gaussian" else 0.97  # counts are mostly noise that no model explains
    assert sum(losses[-5:]) / 5 < share * losses[0]
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_pyro_s_own_svi_takes_the_objective() -> None:
    for name in ("ae", "structured_environment_vae"):
        pyro.clear_param_store()
        model, guide, batch = make(name)
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), Objective())
        losses = [svi.step(batch) for _ in range(40)]
        assert sum(losses[-5:]) / 5 < 0.9 * losses[0]
        assert svi.evaluate_loss(batch) == pytest.approx(losses[-1], rel=0.2)


# ---------------------------------------------------------------------- the objective is the evidence lower bound
def gradients(loss: Any, model: LatentModel, guide: Any, batch: Batch) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of all parameters under a fixed seed."""
    named = {f"{k}.{n}": p for k, m in (("model", model), ("guide", guide)) for n, p in m.named_parameters()}
    for p in named.values():
        p.grad = None
    torch.manual_seed(9)
    value = loss.loss_and_grads(model, guide, batch)
    return value, {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in named.items()}


@pytest.mark.parametrize("observation", ["gaussian", "negative-binomial"])
@pytest.mark.parametrize("name", VARIATIONAL)
def test_loss_and_gradients_are_those_of_the_mean_field_bound(name: str, observation: str) -> None:
    model, guide, batch = make(name, observation)
    found, ours = gradients(Objective(), model, guide, batch)
    expected, pyros = gradients(TraceMeanField_ELBO(), model, guide, batch)
    assert found == pytest.approx(expected, rel=1e-5)
    assert ours.keys() == pyros.keys()
    for n, gradient in pyros.items():
        size = float(gradient.abs().max())
        assert size > 0, n
        torch.testing.assert_close(ours[n], gradient, rtol=1e-5, atol=1e-5 * size)
    torch.manual_seed(9)
    assert Objective().loss(model, guide, batch) == pytest.approx(found, rel=1e-6)
    torch.manual_seed(9)
    assert float(Objective().differentiable_loss(model, guide, batch).detach()) == pytest.approx(found, rel=1e-6)


def test_an_autoencoder_s_loss_is_its_reconstruction() -> None:
    model, guide, batch = make("ae")
    found, ours = gradients(Objective(), model, guide, batch)
    expected, pyros = gradients(Trace_ELBO(), model, guide, batch)
    assert found == pytest.approx(expected, rel=1e-5)
    for n, gradient in pyros.items():
        torch.testing.assert_close(ours[n], gradient, rtol=1e-5, atol=1e-5 * float(gradient.abs().max()))
    with torch.no_grad():
        c = guide(batch)["z"]
        error = -model.likelihoods[0].distribution(c, batch).log_prob(batch.x)  # type: ignore[operator]
    assert found == pytest.approx(3 * float(error.sum()), rel=1e-5)  # 40 of 120 cells


@pytest.mark.parametrize("name", ["vae", "structured_environment_vae", "structured_translation_vae"])
def test_the_loss_is_that_of_the_sampled_bound_on_average(name: str) -> None:
    model, guide, batch = make(name)
    n = 250
    with torch.no_grad():
        ours = torch.tensor([Objective().loss(model, guide, batch) for _ in range(n)])
        theirs = torch.tensor([Trace_ELBO().loss(model, guide, batch) for _ in range(n)])
    error = float((ours.var() / n + theirs.var() / n).sqrt())
    assert abs(float(ours.mean() - theirs.mean())) < 4 * error
    assert error < 0.01 * abs(float(ours.mean()))


def test_a_mini_batch_estimates_the_loss_of_all_cells() -> None:
    model, guide, _ = make("ae")  # no noise: the estimate is exact over a partition
    data = cells()
    with torch.no_grad():
        whole = Objective().loss(model, guide, data.batch())
        parts = [Objective().loss(model, guide, data.batch(torch.arange(k, 120, 4))) for k in range(4)]
    assert sum(parts) / 4 == pytest.approx(whole, rel=1e-5)


def test_a_schema_is_all_that_a_model_needs() -> None:
    schema = Schema(genes=("a", "b"), environments=("control", "A"), features=("f",), counts=False, cells=2)
    for name in (*COMPOSITION, "adversarial_prior_ae"):
        model = BUILD[name](schema, latent=2, hidden=(3,))
        trace = poutine.trace(model).get_trace(Batch.example(schema).unobserved())
        assert trace.nodes["x"]["value"].shape == (2, 2), name
