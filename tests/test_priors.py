import math

import pyro
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributions import kl_divergence

from pyro_scm.batch import Batch
from pyro_scm.distributions import normal
from pyro_scm.errors import ModelError
from pyro_scm.nn import mlp
from pyro_scm.priors import (
    Dense,
    EnvironmentPrior,
    FlatPrior,
    SparseSoftmax,
    StandardPrior,
    TablePrior,
    TopK,
    known,
)


def cells(**changes: object) -> Batch:
    """Five cells in three of the four environments of a table; row 1 of r is a reference."""
    fields: dict[str, object] = {
        "index": torch.arange(5),
        "env": torch.tensor([3, 0, 3, 2, 0]),
        "row": torch.tensor([2, 1, 2, 0, 1]),
        "r": torch.tensor([[1.0, -2.0], [5.0, 5.0], [0.5, 3.0]]),
        "perturbed": torch.tensor([1.0, 0.0, 1.0]),
        "total": 5,
    }
    return Batch(**{**fields, **changes})  # type: ignore[arg-type]


# ---------------------------------------------------------------------- sparsifiers
def test_the_sparse_softmax_weighs_with_absolute_values() -> None:
    v = torch.tensor([1.0, -3.0, 0.5])
    weights = [math.exp(a) for a in (1.0, 3.0, 0.5)]
    expected = [x * w / sum(weights) for x, w in zip((1.0, -3.0, 0.5), weights, strict=True)]
    torch.testing.assert_close(SparseSoftmax()(v), torch.tensor(expected))
    cold = [math.exp(a / 0.5) for a in (1.0, 3.0, 0.5)]
    expected = [x * w / sum(cold) for x, w in zip((1.0, -3.0, 0.5), cold, strict=True)]
    torch.testing.assert_close(SparseSoftmax(0.5)(v), torch.tensor(expected))


@settings(derandomize=True, max_examples=30, deadline=None)
@given(st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=6), st.floats(0.05, 10))
def test_the_sparse_softmax_is_odd_and_shrinks(values: list[float], temperature: float) -> None:
    sparse, v = SparseSoftmax(temperature), torch.tensor(values)
    torch.testing.assert_close(sparse(-v), -sparse(v))
    assert (sparse(v).abs() <= v.abs() + 1e-6).all()
    assert (sparse(v) * v >= 0).all()


def test_a_cold_softmax_keeps_the_largest_and_nothing_else() -> None:
    v = torch.tensor([[1.0, -3.0, 2.9], [0.1, 0.2, -0.3]])
    torch.testing.assert_close(SparseSoftmax(1e-3)(v), torch.tensor([[0.0, -3.0, 0.0], [0.0, 0.0, -0.3]]))
    torch.testing.assert_close(SparseSoftmax(1e6)(v), v / 3, rtol=1e-4, atol=1e-4)


def test_the_temperature_is_a_buffer_that_forward_does_not_change() -> None:
    sparse = SparseSoftmax(0.7)
    assert dict(sparse.named_parameters()) == {}
    for _ in range(3):
        sparse(torch.randn(4, 3))
    assert float(sparse.state_dict()["temperature"]) == pytest.approx(0.7)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_that_is_not_positive_is_refused(temperature: float) -> None:
    with pytest.raises(ModelError, match=f"temperature {temperature} of the sparse softmax: give a positive number"):
        SparseSoftmax(temperature)


def test_top_k_keeps_the_k_largest_absolute_values() -> None:
    v = torch.tensor([[1.0, -3.0, 2.0], [0.1, 0.2, -0.3]])
    assert torch.equal(TopK()(v), torch.tensor([[0.0, -3.0, 0.0], [0.0, 0.0, -0.3]]))
    assert torch.equal(TopK(2)(v), torch.tensor([[0.0, -3.0, 2.0], [0.0, 0.2, -0.3]]))
    assert torch.equal(TopK(9)(v), v)


def test_top_k_passes_the_gradient_straight_through() -> None:
    v = torch.tensor([[1.0, -3.0, 2.0]], requires_grad=True)
    (TopK(1)(v) * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert v.grad is not None
    assert v.grad.tolist() == [[1, 2, 3]]


def test_top_none_is_refused() -> None:
    with pytest.raises(ModelError, match="top-0: an environment must be allowed to move at least one latent"):
        TopK(0)


def test_dense_changes_nothing() -> None:
    v = torch.randn(3, 4)
    assert Dense()(v) is v


# ---------------------------------------------------------------------- priors without environments
def test_the_standard_prior_is_standard_everywhere() -> None:
    law = StandardPrior(3)(cells())
    assert law.batch_shape == (5,)
    assert law.event_shape == (3,)
    assert (law.base_dist.loc == 0).all()
    assert (law.base_dist.scale == 1).all()
    z = torch.randn(5, 3)
    torch.testing.assert_close(law.log_prob(z), -z.square().sum(-1) / 2 - 1.5 * math.log(2 * math.pi))
    assert list(StandardPrior(3).parameters()) == []
    assert StandardPrior(3).state_dict() == {}


def test_the_flat_prior_simulates_but_has_no_density() -> None:
    law = FlatPrior(3)(cells())
    assert law.log_prob(torch.full((5, 3), 100.0)).tolist() == [0] * 5
    assert law.batch_shape == (5,)
    draws = law.expand((4000, 5)).sample()
    assert float(draws.mean()) == pytest.approx(0, abs=4 / math.sqrt(60_000))
    assert float(draws.std()) == pytest.approx(1, rel=0.02)


# ---------------------------------------------------------------------- the environment prior
def test_the_environment_prior_is_its_formula() -> None:
    net = mlp(2, (), 6)
    prior = EnvironmentPrior(net, 3, SparseSoftmax(0.5))
    batch = cells()
    out = batch.r @ net[0].weight.T + net[0].bias
    mu, log_sigma = out[:, :3], 3 * torch.tanh(out[:, 3:] / 3)
    mu = mu * torch.softmax(mu.abs() / 0.5, -1)
    log_sigma = log_sigma * torch.softmax(log_sigma.abs() / 0.5, -1)
    mu, log_sigma = (v * torch.tensor([[1.0], [0.0], [1.0]]) for v in (mu, log_sigma))
    law = prior(batch)
    torch.testing.assert_close(law.base_dist.loc, mu[batch.row])
    torch.testing.assert_close(law.base_dist.scale, log_sigma.exp()[batch.row])
    loc, scale = prior.moments(batch.r, batch.perturbed)
    torch.testing.assert_close(loc, mu)
    torch.testing.assert_close(scale, log_sigma.exp())


@pytest.mark.parametrize("sparsifier", [None, TopK(1), Dense()])
def test_a_reference_environment_is_exactly_standard(sparsifier: nn.Module | None) -> None:
    law = EnvironmentPrior(mlp(2, (7,), 6), 3, sparsifier)(cells()).base_dist
    reference = torch.tensor([False, True, False, False, True])
    assert (law.loc[reference] == 0).all()
    assert (law.scale[reference] == 1).all()
    assert (law.loc[~reference] != 0).any(-1).all()
    assert (law.scale[~reference] != 1).any(-1).all()


def test_the_sparsifier_is_the_softmax_by_default() -> None:
    assert isinstance(EnvironmentPrior(mlp(2, (), 6), 3).sparsifier, SparseSoftmax)


def test_an_environment_may_move_the_mean_alone() -> None:
    prior = EnvironmentPrior(mlp(2, (), 3), 3, Dense(), scale=False)
    law = prior(cells()).base_dist
    assert (law.scale == 1).all()
    torch.testing.assert_close(law.loc[0], prior.net(cells().r)[2])


def test_a_wild_network_cannot_make_a_prior_narrower_or_wider_than_its_bounds() -> None:
    class Wild(nn.Module):
        def forward(self, r: Tensor) -> Tensor:
            return torch.tensor([0.0, 0.0, 1e6, -1e6]).expand(len(r), 4)

    scale = EnvironmentPrior(Wild(), 2, Dense())(cells()).base_dist.scale
    torch.testing.assert_close(scale[0], torch.tensor([math.exp(3), math.exp(-3)]))


def test_the_network_is_evaluated_once_for_each_distinct_environment() -> None:
    net = mlp(2, (7,), 6)
    rows: list[int] = []
    net.register_forward_hook(lambda module, given, out: rows.append(len(given[0])))
    EnvironmentPrior(net, 3)(cells())
    assert rows == [3]  # five cells, three environments
    EnvironmentPrior(net, 3)(cells().under(torch.zeros(2)))
    assert rows == [3, 1]


def test_gradients_reach_the_network_from_perturbed_cells_alone() -> None:
    prior = EnvironmentPrior(mlp(2, (), 6), 3, Dense())
    for env, expected in ((1, 0.0), (2, 2.0)):  # rows of r: a reference, a perturbed one of two cells
        prior.zero_grad()
        law = prior(cells()).base_dist
        (law.loc + law.scale)[cells().row == env].sum().backward()
        bias = prior.net[0].bias.grad  # type: ignore[index, union-attr]
        assert (bias[:3] == expected).all()


# ---------------------------------------------------------------------- KL (seed, appendix A)
def appendix_a(mu_x: Tensor, sigma_x: Tensor, mu_e: Tensor, sigma_e: Tensor) -> Tensor:
    """KL(N(mu(x), diag sigma(x)^2) || N(mu_e, diag sigma_e^2)) as the seed's appendix A writes it."""
    d = mu_x.shape[-1]
    return 0.5 * (
        2 * sigma_e.log().sum(-1)
        - 2 * sigma_x.log().sum(-1)
        - d
        + ((mu_x - mu_e).square() / sigma_e.square()).sum(-1)
        + (sigma_x.square() / sigma_e.square()).sum(-1)
    )


def test_the_divergence_is_that_of_the_seed_s_appendix() -> None:
    prior = EnvironmentPrior(mlp(2, (4,), 6), 3)
    p = prior(cells())
    q = normal(torch.randn(5, 3), torch.rand(5, 3) + 0.2)
    found = kl_divergence(q, p)
    expected = appendix_a(q.base_dist.loc, q.base_dist.scale, p.base_dist.loc, p.base_dist.scale)
    torch.testing.assert_close(found, expected)
    n = 40_000
    z = q.sample((n,))
    terms = q.log_prob(z) - p.log_prob(z)
    assert ((terms.mean(0) - expected).abs() < 4 * terms.std(0) / math.sqrt(n)).all()


def test_the_divergence_from_the_reference_by_hand() -> None:
    """One latent, q = N(2, 1): KL from N(0, 1) is 2."""
    torch.testing.assert_close(
        appendix_a(torch.tensor([2.0]), torch.ones(1), torch.zeros(1), torch.ones(1)), torch.tensor(2.0)
    )


# ---------------------------------------------------------------------- tables
def test_a_table_prior_looks_up_each_cell_s_environment() -> None:
    loc, scale = torch.arange(8.0).reshape(4, 2), torch.rand(4, 2) + 0.5
    prior = TablePrior(loc, scale)
    law = prior(cells()).base_dist
    torch.testing.assert_close(law.loc, loc[[3, 0, 3, 2, 0]])
    torch.testing.assert_close(law.scale, scale[[3, 0, 3, 2, 0]])
    assert prior.latent == 2
    assert list(prior.parameters()) == []
    assert set(prior.state_dict()) == {"loc", "log_scale"}
    loc.zero_()
    assert (prior.loc[1:] != 0).all()  # a table of its own


def test_a_learnt_table_starts_standard_and_has_gradients() -> None:
    prior = TablePrior(torch.ones(4, 2), torch.full((4, 2), 2.0), learn=True)
    torch.testing.assert_close(prior(cells()).base_dist.scale.detach(), torch.full((5, 2), 2.0))
    prior.reset_parameters()
    law = prior(cells())
    assert (law.base_dist.loc == 0).all()
    assert (law.base_dist.scale == 1).all()
    law.log_prob(torch.ones(5, 2)).sum().backward()
    assert prior.loc.grad is not None
    assert prior.loc.grad[:, 0].tolist() == [2, 0, 1, 2]
    fixed = TablePrior(torch.ones(4, 2), torch.ones(4, 2))
    fixed.reset_parameters()
    assert (fixed.loc == 1).all()


def test_an_environment_outside_the_table_is_refused() -> None:
    assert known(cells()) is not None
    with pytest.raises(ModelError, match=r"keeps a table of environments and cannot answer for one outside it: use"):
        TablePrior(torch.ones(4, 2), torch.ones(4, 2))(cells().under(torch.zeros(2)))


def test_priors_draw_inside_the_plate() -> None:
    batch = cells()
    for prior in (StandardPrior(3), FlatPrior(3), EnvironmentPrior(mlp(2, (), 6), 3)):
        with batch.plate():
            assert pyro.sample("z", prior(batch)).shape == (5, 3)
