import math
from functools import cache

import mpmath
import numpy as np
import pytest
import torch
from pyro.distributions import Independent
from scipy import stats
from torch import Tensor
from torch.distributions import Poisson

from pyro_scm.distributions import TABLE, NegativeBinomial, normal

# Sparse in each direction, dense where a formula changes: around 8 (Stirling's series), x = mu, and mu = theta.
THETAS = (1e-8, 1e-5, 1e-2, 0.3, 1.0, 7.9, 8.1, 50.0, 3e3, 1e5, 1e8, 1e12)
MEANS = (1e-8, 1e-4, 0.01, 0.5, 3.0, 20.0, 997.3, 2e4, 1e6, 1e8)
COUNTS = (0.0, 1.0, 2.0, 7.0, 8.0, 19.0, 100.0, 1e3, 2e4, 999_000.0, 1e6)
NEAR = (0.9, 0.999, 1.0, 1.001, 1.1)


@cache
def grid() -> tuple[Tensor, Tensor, Tensor]:
    """float32 log mu, log theta and counts."""
    points = [(mu, theta, x) for mu in MEANS for theta in THETAS for x in COUNTS]
    points += [(factor * x, theta, x) for x in COUNTS[1:] for theta in THETAS for factor in NEAR]
    mu, theta, x = torch.tensor(points, dtype=torch.float64).unbind(1)
    return mu.log().float(), theta.log().float(), x.float()


def exact(log_mean: float, log_theta: float, x: float) -> tuple[float, float, float]:
    """log p and its derivatives by log mu and log theta, with 50 digits, of these very float32 numbers."""
    with mpmath.workdps(50):
        log_mean, log_theta = mpmath.mpf(log_mean), mpmath.mpf(log_theta)
        mu, theta = mpmath.exp(log_mean), mpmath.exp(log_theta)
        odds = mpmath.log1p(mu / theta)
        log_prob = mpmath.loggamma(x + theta) - mpmath.loggamma(theta) - mpmath.loggamma(x + 1)
        log_prob += -theta * odds + x * (log_mean - mpmath.log(theta + mu))
        by_mean = theta * (x - mu) / (theta + mu)
        by_theta = theta * (mpmath.digamma(x + theta) - mpmath.digamma(theta) - odds - (x - mu) / (theta + mu))
        return float(log_prob), float(by_mean), float(by_theta)


@cache
def reference() -> Tensor:
    """``(points, 3)``: what `exact` gives on the grid."""
    return torch.tensor([exact(*map(float, point)) for point in zip(*grid(), strict=True)], dtype=torch.float64)


def evaluated(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """log p and its gradients on the grid."""
    log_mean, log_theta, x = (t.to(dtype, copy=True) for t in grid())
    log_mean.requires_grad_()
    log_theta.requires_grad_()
    log_prob = NegativeBinomial(log_mean, log_theta).log_prob(x)
    gradients = torch.autograd.grad(log_prob.sum(), (log_mean, log_theta))
    return log_prob.detach(), *gradients


def test_the_reference_agrees_with_scipy() -> None:
    for mu, theta, x in ((3.0, 0.3, 0), (3.0, 1.0, 7), (997.3, 50.0, 1000), (2e4, 3e3, 19_000)):
        expected = stats.nbinom(theta, theta / (theta + mu)).logpmf(x)
        assert exact(math.log(mu), math.log(theta), x)[0] == pytest.approx(expected, abs=1e-7)


def test_log_prob_keeps_its_digits_in_float32() -> None:
    found, expected = evaluated(torch.float32)[0].double(), reference()[:, 0]
    assert found.isfinite().all()
    assert ((found - expected).abs() <= 1e-5 * expected.abs() + 1e-4).all()


def test_log_prob_is_exact_in_float64() -> None:
    torch.testing.assert_close(evaluated(torch.float64)[0], reference()[:, 0], rtol=1e-11, atol=1e-9)


def test_gradients_are_exact_in_float64() -> None:
    _, by_mean, by_theta = evaluated(torch.float64)
    torch.testing.assert_close(by_mean, reference()[:, 1], rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(by_theta, reference()[:, 2], rtol=1e-8, atol=1e-8)


def test_gradients_are_finite_and_right_in_float32() -> None:
    _, by_mean, by_theta = (t.double() for t in evaluated(torch.float32))
    assert by_mean.isfinite().all()
    assert by_theta.isfinite().all()
    # mu is only known to a part in 1e7 and so is its distance from x: near x = mu that is all there is to know
    log_mean, log_theta, x = (t.double() for t in grid())
    share = (log_theta - torch.logaddexp(log_mean, log_theta)).exp()  # theta / (theta + mu)
    known = 3e-7 * share * torch.maximum(log_mean.exp() * (1 + log_mean.abs()), x)
    assert ((by_mean - reference()[:, 1]).abs() <= 1e-5 * reference()[:, 1].abs() + known + 1e-6).all()
    assert ((by_theta - reference()[:, 2]).abs() <= 1e-4 * reference()[:, 2].abs() + known + 1e-5).all()


def test_derivatives_pass_gradcheck_to_second_order() -> None:
    log_mean = torch.tensor([-3.0, 0.2, 2.0, 9.0], dtype=torch.float64, requires_grad=True)
    log_theta = torch.tensor([[-4.0], [0.4], [1.9], [5.0]], dtype=torch.float64, requires_grad=True)
    for count in (0.0, 1.0, 6.0, 30.0):
        x = torch.full((4, 4), count, dtype=torch.float64)

        def log_prob(a: Tensor, b: Tensor, x: Tensor = x) -> Tensor:
            return NegativeBinomial(a, b).log_prob(x)

        assert torch.autograd.gradcheck(log_prob, (log_mean, log_theta))
        assert torch.autograd.gradgradcheck(log_prob, (log_mean, log_theta))


def test_gradients_hold_where_the_formula_changes() -> None:
    theta = torch.tensor([1.0, 8.0, 3.0], dtype=torch.float64)  # x + theta = 8, theta = 8, x + 1 = 8
    x, log_mean = torch.tensor([7.0, 2.0, 7.0], dtype=torch.float64), torch.tensor(0.7, dtype=torch.float64)
    log_theta = theta.log().requires_grad_()
    (found,) = torch.autograd.grad(NegativeBinomial(log_mean, log_theta).log_prob(x).sum(), log_theta)
    expected = [exact(0.7, float(t.detach()), float(c))[2] for t, c in zip(log_theta, x, strict=True)]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_at_its_mean_the_gradient_by_the_mean_vanishes() -> None:
    log_mean = torch.zeros(3, requires_grad=True)
    NegativeBinomial(log_mean, torch.tensor([-2.0, 1.0, 8.0])).log_prob(torch.ones(3)).sum().backward()
    assert log_mean.grad is not None
    assert log_mean.grad.tolist() == [0, 0, 0]


def test_tends_to_the_poisson_distribution() -> None:
    x = torch.arange(0.0, 300.0)
    for mu in (0.1, 5.0, 150.0):
        found = NegativeBinomial(torch.tensor(mu).log(), torch.tensor(1e12).log()).log_prob(x)
        torch.testing.assert_close(found.double(), Poisson(torch.tensor(mu).double()).log_prob(x), rtol=1e-5, atol=1e-4)


def test_a_mean_beyond_float32_costs_its_logarithm_a_count() -> None:
    log_mean = torch.tensor([-60.0, -61.0, -90.0, -200.0], requires_grad=True)
    x = torch.tensor([3.0, 3.0, 3.0, 0.0])
    log_prob = NegativeBinomial(log_mean, torch.tensor(1.0)).log_prob(x)
    torch.testing.assert_close(log_prob.diff()[:2], torch.tensor([-3.0, -87.0]))
    assert float(log_prob[3].detach()) == pytest.approx(0, abs=1e-6)
    log_prob.sum().backward()
    assert log_mean.grad is not None
    torch.testing.assert_close(log_mean.grad, x)


def test_probabilities_sum_to_one() -> None:
    x = torch.arange(0.0, 4000.0, dtype=torch.float64)[:, None]
    mu, theta = torch.tensor([0.5, 40.0], dtype=torch.float64), torch.tensor([0.2, 3.0], dtype=torch.float64)
    total = NegativeBinomial(mu.log(), theta.log()).log_prob(x).exp().sum(0)
    torch.testing.assert_close(total, torch.ones(2, dtype=torch.float64), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("mu", "theta"), [(0.2, 0.5), (5.0, 1.0), (30.0, 1e6), (2000.0, 20.0)])
def test_samples_have_its_mean_variance_and_zeros(mu: float, theta: float) -> None:
    law = NegativeBinomial(torch.tensor(mu).log(), torch.tensor(theta).log())
    n = 40_000
    x = law.sample((n,))
    variance = mu + mu**2 / theta
    assert float(law.mean) == pytest.approx(mu, rel=1e-5)
    assert float(law.variance) == pytest.approx(variance, rel=1e-5)
    assert abs(float(x.mean()) - mu) < 4 * math.sqrt(variance / n)
    assert float(x.var()) == pytest.approx(variance, rel=0.1)
    zeros = float(law.log_prob(torch.tensor(0.0)).exp())
    assert abs(float((x == 0).float().mean()) - zeros) < 4 * math.sqrt(zeros * (1 - zeros) / n) + 1e-9
    assert (x == x.round()).all()


def test_samples_follow_its_probabilities() -> None:
    torch.manual_seed(3)
    law = NegativeBinomial(torch.tensor(4.0).log(), torch.tensor(2.0).log())
    counts = np.bincount(law.sample((20_000,)).int().numpy(), minlength=20)[:20]
    expected = law.log_prob(torch.arange(20.0)).exp().double().numpy()
    assert stats.chisquare(counts, expected / expected.sum() * counts.sum()).pvalue > 1e-3


def test_shapes_broadcast_and_expand() -> None:
    log_mean, log_theta = torch.randn(4, 1, 3), torch.randn(5, 1)
    law = NegativeBinomial(log_mean, log_theta)
    assert law.batch_shape == (4, 5, 3)
    assert law.event_shape == ()
    assert law.mean.shape == (4, 5, 3)
    assert law.variance.shape == (4, 5, 3)
    assert law.sample().shape == (4, 5, 3)
    assert law.sample((2,)).shape == (2, 4, 5, 3)
    x = law.sample()
    expected = [
        [
            [NegativeBinomial(log_mean[i, 0, k], log_theta[j, 0]).log_prob(x[i, j, k]) for k in range(3)]
            for j in range(5)
        ]
        for i in range(4)
    ]
    torch.testing.assert_close(law.log_prob(x), torch.tensor(expected))
    wide = law.expand((2, 4, 5, 3))
    assert wide.batch_shape == (2, 4, 5, 3)
    assert wide.mean.shape == (2, 4, 5, 3)
    torch.testing.assert_close(wide.log_prob(x), law.log_prob(x).expand(2, 4, 5, 3))
    assert wide.sample().shape == (2, 4, 5, 3)
    assert isinstance(wide, NegativeBinomial)


def test_as_an_event_it_sums_over_genes() -> None:
    law = NegativeBinomial(torch.randn(4, 3), torch.randn(3))
    x = law.sample()
    assert isinstance(law.to_event(1), Independent)
    torch.testing.assert_close(law.to_event(1).log_prob(x), law.log_prob(x).sum(-1))
    assert law.to_event(1).expand((2, 4)).sample().shape == (2, 4, 3)


@pytest.mark.parametrize("x", [-1.0, 0.5, float("nan")])
def test_what_is_no_count_is_refused_where_validation_is_on(x: float) -> None:
    law = NegativeBinomial(torch.zeros(()), torch.zeros(()), validate_args=True)
    with pytest.raises(ValueError, match="to be within the support"):
        law.log_prob(torch.tensor(x))
    with pytest.raises(ValueError, match="Expected parameter log_mean"):
        NegativeBinomial(torch.tensor(float("nan")), torch.zeros(()), validate_args=True)


@pytest.mark.parametrize("rate", [0.1, 5.0])
def test_many_parameters_at_once_give_what_each_gives_alone(rate: float) -> None:
    log_mean, log_theta = torch.randn(3, 4, 5, requires_grad=True), torch.randn(3, 5, requires_grad=True)
    x = torch.poisson(torch.full((4, 5), rate))

    def log_prob(a: Tensor, b: Tensor) -> Tensor:
        return NegativeBinomial(a, b, validate_args=False).log_prob(x)

    together = torch.func.vmap(log_prob)(log_mean, log_theta)
    alone = torch.stack([log_prob(a, b) for a, b in zip(log_mean, log_theta, strict=True)])
    torch.testing.assert_close(together, alone)
    separate = torch.autograd.grad(alone.sum(), (log_mean, log_theta))
    for found, expected in zip(torch.autograd.grad(together.sum(), (log_mean, log_theta)), separate, strict=True):
        torch.testing.assert_close(found, expected)
    many = torch.poisson(torch.full((3, 4, 5), rate))
    by_count = torch.func.vmap(lambda x: NegativeBinomial(log_mean[0], log_theta[0], validate_args=False).log_prob(x))
    torch.testing.assert_close(by_count(many), NegativeBinomial(log_mean[0], log_theta[0]).log_prob(many))
    inside = torch.func.vmap(torch.func.grad(lambda a, b: log_prob(a, b).sum()))(log_mean, log_theta)
    torch.testing.assert_close(inside, separate[0])


@pytest.mark.parametrize("shape", [(), (6,), (4, 6), (3, 4, 6)])
def test_cells_of_many_zeros_have_the_density_of_each_count(shape: tuple[int, ...]) -> None:
    """Zeros have a density of their own formula: together with other counts they give what each gives alone."""
    x = torch.poisson(torch.full(shape, 0.2, dtype=torch.float64))
    log_mean = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    log_theta = torch.randn(shape[-1:], dtype=torch.float64, requires_grad=True)
    found = NegativeBinomial(log_mean, log_theta).log_prob(x)
    wide = log_theta.expand(shape)
    points = zip(*(t.detach().flatten().tolist() for t in (log_mean, wide, x)), strict=True)
    expected = torch.tensor([exact(*point) for point in points], dtype=torch.float64)
    torch.testing.assert_close(found.flatten(), expected[:, 0], rtol=1e-9, atol=1e-9)
    by_mean, by_theta = torch.autograd.grad(found.sum(), (log_mean, log_theta))
    torch.testing.assert_close(by_mean.flatten(), expected[:, 1], rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(by_theta, expected[:, 2].reshape(shape).sum_to_size(shape[-1:]), rtol=1e-8, atol=1e-8)
    assert (NegativeBinomial(log_mean, log_theta).log_prob(torch.zeros(())).detach() <= 0).all()


def test_zeros_alone_keep_their_digits_in_float32() -> None:
    zero = grid()[2] == 0
    log_mean, log_theta, x = (t[zero].clone() for t in grid())
    expected = reference()[zero]
    log_mean.requires_grad_()
    log_theta.requires_grad_()
    log_prob = NegativeBinomial(log_mean, log_theta).log_prob(x)
    torch.testing.assert_close(log_prob.detach().double(), expected[:, 0], rtol=1e-5, atol=1e-6)
    by_mean, by_theta = torch.autograd.grad(log_prob.sum(), (log_mean, log_theta))
    torch.testing.assert_close(by_mean.double(), expected[:, 1], rtol=1e-5, atol=1e-6)
    known = 3e-7 * log_mean.detach().exp().double()  # the gradient is a difference of numbers of at most this size
    assert ((by_theta.double() - expected[:, 2]).abs() <= 1e-4 * expected[:, 2].abs() + known + 1e-6).all()


def test_normal_is_diagonal_over_its_last_dimension() -> None:
    loc, scale = torch.randn(4, 3), torch.rand(4, 3) + 0.5
    law = normal(loc, scale)
    assert law.batch_shape == (4,)
    assert law.event_shape == (3,)
    x = torch.randn(4, 3)
    expected = stats.norm(loc.numpy(), scale.numpy()).logpdf(x.numpy()).sum(-1)
    np.testing.assert_allclose(law.log_prob(x).numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("log_theta", [-6.0, -2.0, 2.0, 7.9])
@pytest.mark.parametrize("log_mean", [-6.0, 0.0, 3.0])
def test_many_small_counts_are_looked_up_and_lose_nothing(log_mean: float, log_theta: float) -> None:
    cells, genes = 600, 12
    torch.manual_seed(3)
    lm = (log_mean + 0.3 * torch.randn(cells, genes)).requires_grad_()
    lt = (log_theta + 0.1 * torch.randn(genes)).clamp(max=8).requires_grad_()
    x = NegativeBinomial(lm, lt).sample().clamp(max=200)
    x[::50, ::5] = 300.0  # beyond the table
    fast = NegativeBinomial(lm, lt).log_prob(x)
    # one theta a cell and gene takes the exact form
    wide = [t.detach().double().expand(cells, genes).requires_grad_() for t in (lm, lt)]
    slow = NegativeBinomial(*wide).log_prob(x.double())
    assert torch.allclose(fast.double(), slow, rtol=1e-5, atol=2e-4)
    by_mean, by_theta = torch.autograd.grad(fast.sum(), (lm, lt))
    exact_mean, exact_theta = torch.autograd.grad(slow.sum(), wide)
    assert torch.allclose(by_mean.double(), exact_mean, rtol=1e-5, atol=2e-5)
    assert torch.allclose(by_theta.double(), exact_theta.sum(0), rtol=1e-3, atol=2e-2)


def test_tables_are_the_same_for_members_of_an_ensemble_and_for_draws() -> None:
    torch.manual_seed(4)
    lm, lt = torch.randn(3, 200, 5), torch.randn(3, 5)
    x = torch.poisson(torch.full((200, 5), 2.0))

    def log_prob(a: Tensor, b: Tensor) -> Tensor:
        return NegativeBinomial(a, b, validate_args=False).log_prob(x)

    together = torch.func.vmap(log_prob)(lm, lt)
    alone = torch.stack([log_prob(a, b) for a, b in zip(lm, lt, strict=True)])
    assert torch.allclose(together, alone, atol=1e-6)
    x[7, 2] = 400.0
    draws = NegativeBinomial(lm, lt[0]).log_prob(x)
    alone = torch.stack([log_prob(a, b) for a, b in zip(lm, lt, strict=True)])
    assert torch.allclose(draws[0], alone[0], atol=1e-6)
    batched = torch.func.vmap(lambda a, b, c: NegativeBinomial(a, b, validate_args=False).log_prob(c))
    assert torch.allclose(batched(lm, lt, x.expand(3, -1, -1)), alone, atol=1e-4)


def test_a_scale_of_one_row_gives_the_density_of_the_expanded_one() -> None:
    torch.manual_seed(6)
    loc = torch.randn(4, 7, 3, dtype=torch.float64, requires_grad=True)
    scale = torch.rand(3, dtype=torch.float64).add(0.1).requires_grad_()
    x = torch.randn(7, 3, dtype=torch.float64)
    found, expected = normal(loc, scale), torch.distributions.Normal(loc, scale.expand_as(loc))
    assert torch.allclose(found.log_prob(x), expected.log_prob(x).sum(-1), rtol=1e-12)
    ours = torch.autograd.grad(found.log_prob(x).sum(), (loc, scale))
    theirs = torch.autograd.grad(expected.log_prob(x).sum(), (loc, scale))
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(ours, theirs, strict=True))
    wide = normal(loc[0], scale).expand([5, 7])
    assert wide.log_prob(x).shape == (5, 7)
    assert torch.allclose(wide.log_prob(x)[3], normal(loc[0], scale).log_prob(x))
    prior = normal(torch.zeros(7, 3, dtype=torch.float64), torch.ones(7, 3, dtype=torch.float64))
    kl = torch.distributions.kl_divergence(normal(loc[0], scale), prior)
    by_hand = 0.5 * (scale**2 + loc[0] ** 2 - 1 - 2 * scale.log()).sum(-1)
    assert torch.allclose(kl, by_hand, rtol=1e-12)


@pytest.mark.parametrize("largest", [100, 3000])
def test_genes_known_to_have_large_counts_are_evaluated_exactly_and_the_others_looked_up(largest: int) -> None:
    torch.manual_seed(0)
    x = torch.poisson(torch.full((80, 5), 20.0))
    x[3, 1], x[70, 4] = largest, 2 * largest
    large = (x.amax(0) >= TABLE).nonzero().squeeze(1)
    log_mean, log_theta = torch.randn(80, 5, requires_grad=True), torch.randn(5, requires_grad=True)
    found = NegativeBinomial(log_mean, log_theta, large=large).log_prob(x)
    expected = NegativeBinomial(log_mean, log_theta).log_prob(x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    for a, b in zip(*(torch.autograd.grad(v.sum(), (log_mean, log_theta)) for v in (found, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)

    def one(mean: Tensor) -> Tensor:
        return NegativeBinomial(mean, log_theta, validate_args=False, large=large).log_prob(x)

    many = torch.func.vmap(one)(torch.stack([log_mean, 2 * log_mean]))
    torch.testing.assert_close(many[0], found)


@pytest.mark.parametrize("shape", [(3,), (6, 3)])
def test_the_normals_gradients_are_those_of_finite_differences_and_of_torch(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    value, loc = torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    scale = torch.rand(shape, dtype=torch.float64) + 0.2
    inputs = tuple(v.requires_grad_() for v in (value, loc, scale))

    def log_prob(value: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
        return normal(loc, scale).base_dist.log_prob(value)

    torch.testing.assert_close(log_prob(*inputs), torch.distributions.Normal(loc, scale).log_prob(value))
    assert torch.autograd.gradcheck(log_prob, inputs)
    assert torch.autograd.gradgradcheck(log_prob, inputs)  # penalties on gradients differentiate twice
    weights = torch.randn(4, 6, 3, dtype=torch.float64)
    found = torch.func.vmap(lambda l: torch.func.grad(lambda s: (log_prob(value.detach(), l, s)).sum())(scale.detach()))
    expected = torch.func.vmap(
        lambda l: torch.func.grad(
            lambda s: torch.distributions.Normal(l, s, validate_args=False).log_prob(value.detach()).sum()
        )(scale.detach())
    )
    torch.testing.assert_close(found(weights), expected(weights))
