"""The closed-form likelihood and what its maximum recovers."""

import networkx as nx
import numpy as np
import pytest
import torch
from torch.distributions import MultivariateNormal

from pyro_scm import metrics
from pyro_scm.data import synthetic
from pyro_scm.errors import DataError, ModelError
from pyro_scm.linear_gaussian import LinearGaussian, maximise
from pyro_scm.regimes import target_labels, target_table

D = 3


def screen(kind: str = "hard", seed: int = 0, known: bool = True) -> tuple[np.ndarray, np.ndarray, np.ndarray, object]:
    """x, env and targets of a chain 0 -> 1 -> 2 behind 8 genes, one environment a latent, and the AnnData."""
    adata = synthetic.simulate(
        latent=D, genes=8, environments=D + 1, cells=300, graph=[[0, 1], [1, 2]], decoder="linear",
        interventions=(kind,), strength=3.0, constant=True, seed=seed,
    )  # fmt: skip
    cells = synthetic.dataset(adata)
    targets = target_table(target_labels(cells.environments), range(D)).double().numpy()
    if not known:
        targets[1:] = np.nan
    return np.asarray(cells.x, np.float64), cells.env, targets, adata


def some_fit() -> LinearGaussian:
    """Two sets of parameters with every part in use; environment 1 is hard on node 1, environment 2 moves all."""
    torch.manual_seed(0)
    draw = lambda *shape: torch.randn(2, *shape, dtype=torch.float64)  # noqa: E731
    a = draw(D, D).tril(-1)
    gain = torch.ones(2, 3, D, dtype=torch.float64)
    gain[:, 1, 1] = 0.0
    loc, log_scale = draw(3, D), 0.3 * draw(3, D)
    loc[:, 0] = log_scale[:, 0] = 0.0
    return LinearGaussian(
        draw(5, D), draw(5), draw(5).square() + 0.1, a, loc, log_scale, gain, 1 - gain, np.array([0.0, 1.0])
    )


def sampled(fit: LinearGaussian, k: int, e: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """z and x of n cells by running the equations, one node after the other."""
    z = fit.loc[k, e] + fit.log_scale[k, e].exp() * torch.randn(n, D, dtype=torch.float64)
    c = torch.zeros_like(z)
    for j in range(D):
        c[:, j] = fit.gain[k, e, j] * (c @ fit.matrix[k, j]) + z[:, j]
    noise = fit.psi[k].sqrt() * torch.randn(n, 5, dtype=torch.float64)
    return z, fit.offset[k] + c @ fit.mixing[k].T + noise


@pytest.mark.parametrize("e", [0, 1, 2])
def test_the_density_is_that_of_the_equations(e: int) -> None:
    fit = some_fit()
    for k in range(2):
        _, x = sampled(fit, k, e, 40_000)
        law = MultivariateNormal(x.mean(0), torch.cov(x.T))
        few = x[:50]
        found = fit.log_prob(few, np.full(50, e))[k]
        assert found == pytest.approx(law.log_prob(few).numpy(), abs=0.15)


def test_the_posterior_of_the_noise_is_the_regression_of_z_on_x() -> None:
    fit = some_fit()
    z, x = sampled(fit, 1, 1, 40_000)
    design = torch.cat([torch.ones(len(x), 1, dtype=torch.float64), x], 1)
    expected = design @ torch.linalg.lstsq(design, z).solution
    assert fit.best == 1
    assert fit.noise(x[:50], np.full(50, 1)) == pytest.approx(expected[:50].numpy(), abs=0.1)


def test_the_likelihood_that_is_maximised_is_the_density() -> None:
    x, env, targets, _ = screen()
    fit = maximise(x, env, targets, seeds=(0,), steps=5)
    assert fit.log_likelihood[0] == pytest.approx(fit.log_prob(x, env)[0].mean(), abs=1e-6)


@pytest.mark.parametrize("known", [True, False])
def test_hard_interventions_give_the_graph_the_weights_and_the_noise(known: bool) -> None:
    x, env, targets, adata = screen(known=known)
    fit = maximise(x, env, targets, seeds=(0,))
    matched = metrics.mcc(adata.obsm["z"], fit.noise(x, env))  # type: ignore[attr-defined]
    order = matched.permutation
    assert matched.score > 0.99
    found = nx.to_numpy_array(fit.graph(), nodelist=range(D))[np.ix_(order, order)]
    assert metrics.shd([[0, 1, 0], [0, 0, 1], [0, 0, 0]], found) == 0
    weights = fit.matrix[0].numpy()[np.ix_(order, order)]
    assert np.abs(weights[[1, 2], [0, 1]]) == pytest.approx(1, abs=0.15)
    true = adata.uns["truth"]["targets"].astype(float)  # type: ignore[attr-defined]
    assert np.array_equal(fit.targets[0].numpy()[:, order].round(), true)


def test_a_change_of_mechanism_is_worth_a_graph_at_a_bounded_gain() -> None:
    x, env, targets, _ = screen("mechanism")
    fit = maximise(x, env, targets, kind="mechanism", seeds=(0, 2))  # it has local optima
    without = maximise(x, env, targets, kind="noise", seeds=(0,))
    assert fit.log_likelihood[fit.best] > without.log_likelihood[0] + 0.2
    assert fit.graph(0.1).edges
    assert float((fit.gain - 1).abs().max()) <= 3


def test_shifts_of_the_noise_leave_the_graph_free() -> None:
    x, env, targets, adata = screen("shift")
    full = maximise(x, env, targets, kind="noise", seeds=(0,), sparsity=0.0, cut=0.0)
    assert full.graph(0.05).edges  # nothing drives them out, and they are worth nothing:
    empty = maximise(x, env, targets, kind="noise", mask=np.zeros((D, D)), seeds=(0,))
    assert full.log_likelihood[0] == pytest.approx(empty.log_likelihood[0], abs=1e-3)
    assert metrics.mcc(adata.obsm["z"], empty.noise(x, env)).score > 0.99  # type: ignore[attr-defined]


def test_only_allowed_edges_are_used() -> None:
    x, env, targets, _ = screen()
    mask = np.zeros((D, D))
    mask[2, 1] = 1
    fit = maximise(x, env, targets, mask=mask, seeds=(0, 1))
    assert len(fit) == 2
    assert list(fit.graph().edges) == [(1, 2)]
    assert float(fit.matrix[:, 1, 0].abs().max()) == 0


def test_what_does_not_fit_is_refused() -> None:
    x, env, targets, _ = screen()
    with pytest.raises(ModelError, match="unknown interventions 'soft': use one of noise, hard, mechanism"):
        maximise(x, env, targets, kind="soft")
    with pytest.raises(DataError, match=r"mask has shape \(2, 2\) for 3 latents"):
        maximise(x, env, targets, mask=np.ones((2, 2)))
    with pytest.raises(DataError, match="environment 0, the reference, has 0 cells"):
        maximise(x[env > 0], env[env > 0], targets)
    with pytest.raises(DataError, match="env holds environment 3, targets has 3 rows"):
        maximise(x, env, targets[:3])
    with pytest.raises(DataError, match=r"x has shape \(1200, 8\) and env \(5,\)"):
        maximise(x, env[:5], targets)
