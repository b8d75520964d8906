"""Penalties that learn a graph: what they measure, and what they do in a training."""

from typing import Any

import networkx as nx
import numpy as np
import pytest
import torch

from guides import amortise
from pyro_scm import graphs
from pyro_scm.data import synthetic
from pyro_scm.infer import fit
from pyro_scm.likelihoods import Gaussian
from pyro_scm.model import LatentModel
from pyro_scm.nn import mlp
from pyro_scm.objectives import Objective, World
from pyro_scm.objectives.structure import Acyclicity, EdgeSparsity, acyclicity
from pyro_scm.priors import StandardPrior
from pyro_scm.scm import LinearSCM, MechanismSCM, OrderFreeSCM


def world(total: int = 7) -> World:
    batch: Any = type("Cells", (), {"total": total})()
    return World(batch, {}, {})


@pytest.mark.parametrize("seed", range(5))
def test_acyclicity_is_zero_for_dags_alone(seed: int) -> None:
    torch.manual_seed(seed)
    dag = 3 * torch.randn(5, 5, dtype=torch.float64).tril(-1)
    order = torch.randperm(5)
    dag = dag[order][:, order]
    assert float(acyclicity(dag)) == pytest.approx(0, abs=1e-12)
    i, j = (int(v) for v in torch.nonzero(dag)[0])
    dag[j, i] = 0.5
    assert float(acyclicity(dag)) > 1e-5
    assert torch.isfinite(acyclicity(100 * dag))


def test_acyclicity_of_one_cycle_by_hand() -> None:
    a = torch.tensor([[0.0, 0.5], [0.8, 0.0]], dtype=torch.float64)
    s = 1 + 1.1 * 0.64
    assert float(acyclicity(a)) == pytest.approx(-np.log(1 - 0.25 * 0.64 / s**2))
    assert acyclicity(torch.stack([a, 0 * a])).shape == (2,)


def test_penalties_are_in_nats_per_cell_times_cells() -> None:
    scm = OrderFreeSCM(2, cut=0.0)
    with torch.no_grad():
        scm.weight.copy_(torch.tensor([[9.0, 0.5], [-0.8, 9.0]]))  # the diagonal is no edge
    assert float(EdgeSparsity(scm, 0.1)(world()).detach()) == pytest.approx(7 * 0.1 * 1.3)
    h = float(acyclicity(scm.matrix).detach())
    penalty = Acyclicity(scm, 0.1)
    assert float(penalty(world()).detach()) == pytest.approx(7 * 0.1 * h)
    assert [n for n, _ in penalty.named_parameters()] == ["alpha"]  # the layer stays the model's


def test_the_multiplier_ascends_while_there_is_a_cycle() -> None:
    scm = OrderFreeSCM(2, cut=0.0)
    with torch.no_grad():
        scm.weight.fill_(0.7)
    penalty = Acyclicity(scm)
    with torch.no_grad():
        penalty.alpha.fill_(2.0)
    value = penalty(world())
    slope, down = torch.autograd.grad(value, [penalty.alpha, scm.weight])
    assert float(slope) == pytest.approx(-float(value.detach()))  # a descent step raises alpha
    assert float(down[0, 1]) > 0
    h = float(acyclicity(scm.matrix).detach())
    assert float(value.detach()) == pytest.approx(7 * 0.1 * np.exp(2) * h, rel=1e-5)


def test_a_network_s_path_norm_is_penalised() -> None:
    torch.manual_seed(0)
    scm = MechanismSCM(graphs.full(3), hidden=4)
    expected = sum((m.second.abs()[:, :, None] * m.first.abs() * m.mask[:, None]).sum() for m in scm.mechanisms)  # type: ignore[operator, union-attr, misc]
    assert float(EdgeSparsity(scm, 1.0)(world(1)).detach()) == pytest.approx(float(expected.detach()))


def trained(scm: LinearSCM, penalties: dict[str, Any], **settings: Any) -> Any:
    """Cells of 2 latents, 0 -> 1, whose noise is read off genes 0 and 1; only the causal layer learns."""
    adata = synthetic.simulate(
        latent=2, genes=2, environments=1, cells=600, graph=[[0, 1]], decoder="linear", noise=0.3
    )
    adata.X = adata.obsm["c"] + 0.3 * np.random.default_rng(0).normal(size=(600, 2))
    adata.X = adata.X.astype(np.float32)
    cells = synthetic.dataset(adata)
    net = mlp(2, (), 2)
    likelihood = Gaussian(net, cells.schema)
    with torch.no_grad():  # x = c + noise
        net[0].weight.copy_(torch.diag(1 / likelihood.spread))
        net[0].bias.copy_(-likelihood.centre / likelihood.spread)
    net.requires_grad_(False)
    likelihood.raw_scale.requires_grad_(False)
    with torch.no_grad():
        likelihood.raw_scale.copy_((0.3 / likelihood.spread - likelihood.floor).expm1().log())
    model = LatentModel(StandardPrior(2), likelihood, scm=scm)
    guide = amortise(model, cells, inputs=("x",), hidden=(16,))
    return fit(
        model, guide, cells, objective=Objective(penalties=penalties), progress=False,
        **{"epochs": 40, "batch_size": 100, "lr": 0.02, "fresh": False, **settings},
    )  # fmt: skip


def test_gates_keep_the_edge_that_matters_and_cut_the_other() -> None:
    scm = LinearSCM(nx.DiGraph([(0, 1)]), cut=0.1)
    run = trained(scm, {"edges": EdgeSparsity(scm, 0.02)})
    assert abs(float(run.model.scm.matrix[1, 0].detach())) > 0.4
    idle = LinearSCM(nx.DiGraph([(0, 1)]), cut=0.1)
    with torch.no_grad():
        idle.weight.fill_(0.3)
    run = trained(idle, {"edges": EdgeSparsity(idle, 5.0)}, epochs=10)
    assert float(run.model.scm.matrix[1, 0].detach()) == 0.0
    assert not run.model.scm.learnt().edges


def test_cycles_are_driven_out_in_one_fit_of_an_ensemble() -> None:
    scm = OrderFreeSCM(2, initial=0.5, cut=0.05)
    penalties = {"edges": EdgeSparsity(scm, 0.01), "cycles": Acyclicity(scm, 0.1)}
    run = trained(scm, penalties, seeds=(0, 1))
    for k in range(2):
        learnt = run.member(k)[0].scm
        assert float(acyclicity(learnt.matrix.detach())) < 1e-6
        assert learnt.learnt().number_of_edges() == 1
    assert "penalties.cycles.alpha" in run.parameters
    assert (run.parameters["penalties.cycles.alpha"] > 0).all()
