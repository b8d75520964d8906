import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats

from guides import MeanField
from pyro_scm.errors import ModelError

SITES = {
    "real": dist.Normal(0.0, 1.0),
    "real vector": dist.Normal(torch.zeros(3), 1.0).to_event(1),
    "real, one a perturbation": dist.Normal(torch.zeros(4, 3), 1.0).to_event(1),
    "positive": dist.Gamma(2.0, 2.0),
    "positive vector": dist.Gamma(torch.ones(2, 3), 2.0).to_event(1),
    "unit interval": dist.Beta(2.0, 2.0),
    "interval": dist.Uniform(-1.0, 3.0),
    "simplex": dist.Dirichlet(torch.ones(4)),
}


def at(site: dist.Distribution, loc: float, scale: float) -> dist.Distribution:
    """The variational distribution with given parameters."""
    q = MeanField(site)
    with torch.no_grad():
        q.loc.fill_(loc)
        q.raw_scale.fill_(math.log(math.expm1(scale - 1e-4)))  # softplus above a floor of 1e-4
    q.requires_grad_(False)
    law: dist.Distribution = q()
    return law


@pytest.mark.parametrize("name", SITES)
def test_it_has_the_shape_and_support_of_the_site(name: str) -> None:
    site = SITES[name]
    law = MeanField(site)()
    assert law.batch_shape == site.batch_shape
    assert law.event_shape == site.event_shape
    with pyro.plate("draws", 50, dim=-1 - len(site.batch_shape)):
        value = pyro.sample("theta", law)
    assert value.shape == (50, *site.batch_shape, *site.event_shape)
    assert bool(site.support.check(value).all())
    assert law.has_rsample


def test_on_the_reals_it_is_a_normal_so_that_the_divergence_has_a_closed_form() -> None:
    law = at(SITES["real vector"], 0.5, 2.0)
    kl = torch.distributions.kl_divergence(law, SITES["real vector"])
    one = 0.5 * (2.0**2 + 0.5**2 - 1) - math.log(2.0)
    assert float(kl) == pytest.approx(3 * one, rel=1e-5)


def test_on_the_positive_reals_it_is_log_normal() -> None:
    law = at(SITES["positive"], 0.3, 0.7)
    for value in (0.1, 1.0, 5.0):
        expected = stats.lognorm.logpdf(value, s=0.7, scale=math.exp(0.3))
        assert float(law.log_prob(torch.tensor(value))) == pytest.approx(expected, rel=1e-4)


def test_on_the_unit_interval_it_is_logit_normal() -> None:
    law = at(SITES["unit interval"], -0.4, 0.9)
    for value in (0.05, 0.5, 0.9):
        logit = math.log(value / (1 - value))
        expected = stats.norm.logpdf(logit, -0.4, 0.9) - math.log(value * (1 - value))  # |d logit / d value|
        assert float(law.log_prob(torch.tensor(value))) == pytest.approx(expected, rel=1e-4)


def test_the_density_integrates_to_one_on_an_interval() -> None:
    law = at(SITES["interval"], 0.2, 0.5)
    grid = torch.linspace(-0.999, 2.999, 20_001)
    mass = np.trapezoid(law.log_prob(grid).exp().numpy(), grid.numpy())
    assert mass == pytest.approx(1.0, abs=1e-3)


def test_a_vector_sums_the_densities_of_its_components() -> None:
    law = at(SITES["positive vector"], 0.3, 0.7)
    value = torch.tensor([[0.5, 1.0, 2.0], [3.0, 4.0, 5.0]])
    expected = stats.lognorm.logpdf(value.numpy(), s=0.7, scale=math.exp(0.3)).sum(1)
    np.testing.assert_allclose(law.log_prob(value).numpy(), expected, rtol=1e-4)


def test_a_simplex_of_four_parts_has_three_free_parameters() -> None:
    assert MeanField(SITES["simplex"]).loc.shape == (3,)


def test_it_starts_narrow_near_the_middle() -> None:
    torch.manual_seed(0)
    q = MeanField(dist.Normal(torch.zeros(500), 1.0).to_event(1), scale=0.2).requires_grad_(False)
    for _ in range(2):
        law = q().base_dist
        torch.testing.assert_close(law.scale, torch.full((500,), 0.2001), rtol=1e-4, atol=1e-5)
        assert float(law.loc.abs().max()) < 0.05
        assert 0.008 < float(law.loc.std()) < 0.012
        first = law.loc.clone()
        q.reset_parameters()
    assert not torch.equal(q().base_dist.loc, first)


def test_the_scale_never_reaches_zero() -> None:
    q = MeanField(SITES["real"]).requires_grad_(False)
    q.raw_scale.fill_(-200.0)
    assert float(q().scale) == pytest.approx(1e-4)


@pytest.mark.parametrize("site", [dist.Bernoulli(0.5), dist.Poisson(3.0)])
def test_a_discrete_site_is_refused(site: dist.Distribution) -> None:
    with pytest.raises(ModelError, match=rf"{type(site).__name__} is discrete: write its guide, or marginalise it"):
        MeanField(site)
