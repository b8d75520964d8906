import math
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pyro
import pytest
import torch

from guides import amortise
from pyro_scm import query
from pyro_scm.coordinates import InCausalVariables, _Pushed, in_noise
from pyro_scm.distributions import normal
from pyro_scm.errors import ModelError
from pyro_scm.infer import fit
from pyro_scm.models import structured_environment_vae, structured_translation_vae
from pyro_scm.objectives import Objective
from pyro_scm.run import Run
from pyro_scm.scm import IndependentSCM, LatentSCM, LinearSCM, MechanismSCM
from tests.screens import cells

SMALL = {"latent": 3, "hidden": (8,), "environment_hidden": (4,), "depth": 3}
GRAPH = nx.DiGraph([(0, 1), (0, 2), (1, 3), (2, 3)])


def layers() -> list[LatentSCM]:
    torch.manual_seed(0)
    linear, networks = LinearSCM(GRAPH, initial=0.8), MechanismSCM(GRAPH, hidden=5)
    for p in networks.parameters():
        p.data.normal_()
    return [IndependentSCM(4), linear, networks]


@pytest.mark.parametrize("scm", layers(), ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("gained", [False, True])
def test_noise_is_the_inverse_of_solving(scm: LatentSCM, gained: bool) -> None:
    z = torch.randn(7, 4)
    gain = torch.rand(7, 4) * 2 if gained else None
    torch.testing.assert_close(scm.noise(scm.solve(z, gain), gain), z, rtol=1e-4, atol=1e-5)


def test_the_law_of_linear_variables_is_the_normal_of_their_covariance() -> None:
    scm = layers()[1]
    assert isinstance(scm, LinearSCM)
    scale, shift = torch.tensor([0.5, 1.0, 2.0, 0.3]), torch.tensor([1.0, 0.0, -1.0, 0.5])
    law = _Pushed(normal(torch.zeros(4), scale), scm, shift, None)
    mixing = torch.linalg.inv(torch.eye(4) - scm.matrix.detach())
    expected = torch.distributions.MultivariateNormal(mixing @ shift, mixing @ torch.diag(scale**2) @ mixing.T)
    c = torch.randn(6, 4)
    torch.testing.assert_close(law.log_prob(c).detach(), expected.log_prob(c), rtol=1e-4, atol=1e-4)
    torch.manual_seed(0)
    drawn = law.sample((20_000,))
    torch.testing.assert_close(drawn.mean(0), expected.mean, rtol=0, atol=0.06)
    torch.testing.assert_close(drawn.T.cov(), expected.covariance_matrix, rtol=0.06, atol=0.06)


def pair(build: Any = structured_translation_vae, mechanism: str = "network") -> tuple[Any, Any]:
    torch.manual_seed(1)
    model = build(cells().schema, **SMALL, mechanism=mechanism)
    for p in model.scm.parameters():
        p.data.normal_(std=0.5)
    view = InCausalVariables(model)
    return view, amortise(view, cells(), hidden=(8,))


def trained(**settings: Any) -> Run:
    view, guide = pair()
    return fit(view, guide, cells(), seeds=(0, 1), **{"epochs": 4, "batch_size": 40, "progress": False, **settings})


@pytest.mark.parametrize("build", [structured_environment_vae, structured_translation_vae])
@pytest.mark.parametrize("mechanism", ["linear", "network"])
def test_the_bound_and_its_gradients_are_the_same_in_both_coordinates(build: Any, mechanism: str) -> None:
    """Draw for draw, and so in expectation: the same c gives the same terms as the z that it is the solution of."""
    view, guide = pair(build, mechanism)
    run = fit(view, guide, cells(), epochs=1, lr=1e-9, fresh=False, progress=False)
    noise_run = in_noise(run)
    batch = cells()[::3]
    losses, gradients = [], []
    for model, own in ((run.model, run.guide), (noise_run.model, noise_run.guide)):
        torch.manual_seed(0)
        loss = pyro.infer.Trace_ELBO().differentiable_loss(model.forward, own.forward, batch)
        decoder = (model.model if isinstance(model, InCausalVariables) else model).likelihoods[0].net
        gradients.append(torch.autograd.grad(loss, list(decoder.parameters())))
        losses.append(float(loss.detach()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_in_expectation_the_sampled_divergence_is_the_closed_form() -> None:
    """Where c = z the closed form is known: the mean over draws comes to it."""
    torch.manual_seed(1)
    schema = cells().schema
    model = structured_environment_vae(schema, **{**SMALL, "graph": nx.empty_graph(3, nx.DiGraph)})
    view = InCausalVariables(model)
    guide = amortise(view, cells(), hidden=(8,))
    plain = amortise(model, cells(), hidden=(8,))
    plain.local["z"].load_state_dict(guide.local["c"].state_dict())
    batch, objective = cells()[::3], Objective()
    with torch.no_grad():
        exact = float(objective.terms(objective.world(model.forward, plain.forward, batch)).kl)
        drawn = [float(objective.terms(objective.world(view.forward, guide.forward, batch)).kl) for _ in range(600)]
    assert np.mean(drawn) == pytest.approx(exact, abs=4 * np.std(drawn) / math.sqrt(len(drawn)))
    assert np.std(drawn) > 0


def test_gradients_in_both_coordinates_reach_the_mechanisms() -> None:
    run = trained(lr=0.02)
    before = trained(lr=1e-9)
    moved = [n for n in run.parameters if ".scm." in n and not torch.equal(run.parameters[n], before.parameters[n])]
    assert moved
    losses = run.history.groupby("epoch")["loss"].mean()
    assert losses.iloc[-1] < losses.iloc[0]


def test_a_run_in_noise_answers_queries_as_any_other(tmp_path: Path) -> None:
    run = in_noise(trained())
    model, guide = run.member(1)
    for name, own in model.named_parameters():
        assert torch.equal(own, run.parameters[f"model.{name}"][1])
    assert torch.equal(guide.scm.mechanisms[0].first, model.scm.mechanisms[0].first)
    batch = cells()[:6]
    latents = query.abduct(guide, batch)
    with torch.no_grad():
        shift = model.shift(batch)
        c = model.scm.solve(latents["z"] + shift)
        torch.testing.assert_close(c, guide.guide.local["c"](batch).mean, rtol=1e-4, atol=1e-5)
    answer = query.counterfactual(run, cells().subset(np.arange(5)), do={"c_1": 2.0})
    assert np.allclose(answer.c[..., 1], 2.0)
    run.save(tmp_path / "run")
    again = Run.restore(tmp_path / "run", *run.member(0))
    assert all(torch.equal(again.parameters[n], v) for n, v in run.parameters.items())


def test_other_runs_are_refused() -> None:
    with pytest.raises(ModelError, match="trained in z already"):
        in_noise(in_noise(trained(epochs=1)))
