import math
from dataclasses import replace
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from pyro import poutine
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional as F

from pyro_scm.batch import Batch, Schema, Statistics
from pyro_scm.errors import ModelError
from pyro_scm.likelihoods import (
    Gaussian,
    GaussianFixed,
    GaussianPerCell,
    Likelihood,
    NegativeBinomialLikelihood,
    StudentT,
    likelihood_for,
    outputs_of,
)
from pyro_scm.nn import mlp, reset_parameters

MEAN, SCALE = torch.tensor([10.0, -5.0, 0.0]), torch.tensor([2.0, 0.5, 1.0])
PROPORTION = torch.tensor([0.7, 0.2, 0.1])
CONTINUOUS = Schema(
    genes=("a", "b", "c"),
    environments=("control", "A"),
    features=("f", "g"),
    counts=False,
    statistics=Statistics(MEAN, SCALE, torch.zeros(3), 1.0),
)
COUNTS = replace(CONTINUOUS, counts=True, statistics=Statistics(MEAN, SCALE, PROPORTION, 2000.0))
LOCATED = (Gaussian, GaussianFixed, StudentT)


class Given(nn.Module):
    """A decoder that returns its input."""

    def forward(self, c: Tensor) -> Tensor:
        return c


def cells(**changes: Any) -> Batch:
    fields: dict[str, Any] = {
        "index": torch.arange(4),
        "env": torch.tensor([0, 1, 1, 0]),
        "row": torch.tensor([0, 1, 1, 0]),
        "r": torch.tensor([[0.0, 0.0], [1.0, -1.0]]),
        "perturbed": torch.tensor([0.0, 1.0]),
        "total": 4,
    }
    return Batch(**{**fields, **changes})


# ---------------------------------------------------------------------- continuous
@pytest.mark.parametrize("kind", LOCATED)
def test_the_decoder_speaks_in_standard_deviations_around_each_gene_s_mean(kind: type[Likelihood]) -> None:
    likelihood, c = kind(Given(), CONTINUOUS), torch.randn(4, 3)
    torch.testing.assert_close(likelihood.mean(c, cells()), MEAN + SCALE * c)
    draws = torch.randn(2, 4, 3)
    torch.testing.assert_close(likelihood.mean(draws, cells()), MEAN + SCALE * draws)
    law = likelihood.distribution(c, cells())
    assert law.batch_shape == (4,)
    assert law.event_shape == (3,)


@pytest.mark.parametrize("kind", [Gaussian, StudentT])
def test_the_scale_is_learnt_above_a_floor(kind: type[Gaussian]) -> None:
    likelihood = kind(Given(), CONTINUOUS, floor=0.1)
    reset_parameters(likelihood)
    torch.testing.assert_close(likelihood.scale, 1.1 * SCALE, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        likelihood.raw_scale.copy_(torch.tensor([-1e4, 0.0, 3.0]))
    scale = likelihood.scale.detach()
    assert float(scale[0]) == pytest.approx(0.1 * 2.0)
    torch.testing.assert_close(scale, SCALE * (0.1 + F.softplus(torch.tensor([-1e4, 0.0, 3.0]))))


def test_gaussian_density() -> None:
    likelihood, c, x = Gaussian(Given(), CONTINUOUS), torch.randn(4, 3), 10 * torch.randn(4, 3)
    scale = likelihood.scale.detach().numpy()
    expected = stats.norm((MEAN + SCALE * c).numpy(), scale).logpdf(x.numpy()).sum(-1)
    np.testing.assert_allclose(likelihood.distribution(c, cells()).log_prob(x).detach().numpy(), expected, rtol=1e-5)


def test_a_gaussian_of_fixed_scale_is_squared_error() -> None:
    likelihood, c, x = GaussianFixed(Given(), CONTINUOUS), torch.randn(4, 3), torch.randn(4, 3)
    error = (x - MEAN - SCALE * c).square().sum(-1)
    log_prob = likelihood.distribution(c, cells()).log_prob(x)
    torch.testing.assert_close(log_prob, -error - 1.5 * math.log(math.pi))
    assert list(likelihood.parameters()) == []
    before = likelihood.distribution(c, cells()).base_dist.scale
    reset_parameters(likelihood)
    assert torch.equal(likelihood.distribution(c, cells()).base_dist.scale, before)
    assert (GaussianFixed(Given(), CONTINUOUS, sigma=3.0).distribution(c, cells()).base_dist.scale == 3).all()


def test_student_t_density_has_heavy_tails() -> None:
    likelihood, c, x = StudentT(Given(), CONTINUOUS), torch.randn(4, 3), 10 * torch.randn(4, 3)
    scale = likelihood.scale.detach().numpy()
    expected = stats.t(5.0, (MEAN + SCALE * c).numpy(), scale).logpdf(x.numpy()).sum(-1)
    np.testing.assert_allclose(likelihood.distribution(c, cells()).log_prob(x).detach().numpy(), expected, rtol=1e-5)
    wild = MEAN + torch.tensor([1e4, 0.0, 0.0])
    batch, origin = cells(), torch.zeros(4, 3)
    normal = Gaussian(Given(), CONTINUOUS).distribution(origin, batch).log_prob(wild.expand(4, 3))
    assert (likelihood.distribution(origin, batch).log_prob(wild.expand(4, 3)) > -100).all()
    assert (normal < -1e6).all()


@pytest.mark.parametrize("freedom", [2.0, 0.0, float("nan")])
def test_student_t_needs_a_variance(freedom: float) -> None:
    with pytest.raises(
        ModelError, match=f"{freedom} degrees of freedom: give more than 2, so that the variance exists"
    ):
        StudentT(Given(), CONTINUOUS, freedom=freedom)
    assert StudentT(Given(), CONTINUOUS, freedom=3.0).distribution(torch.zeros(4, 3), cells()).base_dist.df[0, 0] == 3


@pytest.mark.parametrize("kind", LOCATED)
def test_counts_are_refused_by_continuous_likelihoods(kind: type[Likelihood]) -> None:
    message = f"{kind.__name__} is a likelihood of continuous values and the data hold counts: use Negative"
    with pytest.raises(ModelError, match=message):
        kind(Given(), COUNTS)


# ---------------------------------------------------------------------- counts
def test_continuous_values_are_refused_by_the_negative_binomial() -> None:
    with pytest.raises(ModelError, match="needs counts and the data are continuous: use Gaussian or StudentT"):
        NegativeBinomialLikelihood(Given(), CONTINUOUS)


def test_expected_counts_sum_to_the_library_size() -> None:
    likelihood, c = NegativeBinomialLikelihood(Given(), COUNTS), torch.randn(2, 4, 3)
    size = torch.tensor([10.0, 200.0, 3000.0, 1.0])
    mean = likelihood.mean(c, cells(size=size))
    torch.testing.assert_close(mean.sum(-1), size.expand(2, 4))
    shares = PROPORTION * c.exp()
    torch.testing.assert_close(mean, size[:, None] * shares / shares.sum(-1, keepdim=True))


def test_a_decoder_that_says_nothing_gives_each_gene_its_share() -> None:
    mean = NegativeBinomialLikelihood(Given(), COUNTS).mean(torch.zeros(4, 3), cells(size=torch.ones(4)))
    torch.testing.assert_close(mean, PROPORTION.expand(4, 3))


def test_cells_without_a_library_size_have_the_median_of_training() -> None:
    likelihood = NegativeBinomialLikelihood(Given(), COUNTS)
    torch.testing.assert_close(likelihood.mean(torch.randn(4, 3), cells()).sum(-1), torch.full((4,), 2000.0))


def test_a_gene_never_seen_keeps_a_finite_density() -> None:
    statistics = replace(COUNTS.summary, proportion=torch.tensor([1.0, 0.0, 0.0]))
    likelihood = NegativeBinomialLikelihood(Given(), replace(COUNTS, statistics=statistics))
    law = likelihood.distribution(torch.zeros(4, 3), cells())
    assert law.log_prob(torch.tensor([1.0, 1.0, 0.0]).expand(4, 3)).isfinite().all()


def test_negative_binomial_density() -> None:
    likelihood, c = NegativeBinomialLikelihood(Given(), COUNTS), torch.randn(4, 3)
    reset_parameters(likelihood)
    batch, x = cells(size=torch.full((4,), 50.0)), torch.randint(0, 60, (4, 3)).float()
    theta = math.exp(8 * math.tanh(1 / 8))
    mean = likelihood.mean(c, batch).numpy()
    expected = stats.nbinom(theta, theta / (theta + mean)).logpmf(x.numpy()).sum(-1)
    found = likelihood.distribution(c, batch).log_prob(x).detach().numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_dispersion_is_bounded_and_learnt_for_each_gene() -> None:
    likelihood = NegativeBinomialLikelihood(Given(), COUNTS)
    with torch.no_grad():
        likelihood.raw_dispersion.copy_(torch.tensor([-1e4, 0.0, 1e4]))
    law = likelihood.distribution(torch.zeros(4, 3), cells()).base_dist
    mean = law.mean.detach()
    theta = mean.square() / (law.variance.detach() - mean)
    torch.testing.assert_close(theta[0].log(), torch.tensor([-8.0, 0.0, 8.0]), rtol=1e-3, atol=1e-3)
    x = law.sample()
    (-likelihood.distribution(torch.zeros(4, 3), cells()).log_prob(x).sum()).backward()
    assert likelihood.raw_dispersion.grad is not None
    assert likelihood.raw_dispersion.grad.isfinite().all()


# ---------------------------------------------------------------------- any
@pytest.mark.parametrize("kind", ["normal", "normal-fixed", "student-t"])
def test_a_conditional_decoder_reads_the_environment(kind: str) -> None:
    likelihood = likelihood_for(CONTINUOUS, mlp(3 + 2, (), 3), conditional=True, kind=kind)
    c, batch = torch.randn(2, 4, 3), cells()
    whole = torch.cat((c, batch.e.expand(2, 4, 2)), -1)
    torch.testing.assert_close(likelihood.decode(c, batch), likelihood.net(whole))
    moved = batch.under(torch.tensor([3.0, 0.0]))
    assert (likelihood.mean(c, moved) != likelihood.mean(c, batch)).all()
    plain = likelihood_for(CONTINUOUS, mlp(3, (), 3), kind=kind)
    assert torch.equal(plain.mean(c, moved), plain.mean(c, batch))


def test_the_likelihood_follows_the_data_unless_it_is_named() -> None:
    net = mlp(3, (), 3)
    assert type(likelihood_for(CONTINUOUS, net)) is Gaussian
    assert type(likelihood_for(COUNTS, net)) is NegativeBinomialLikelihood
    kinds = {"normal": Gaussian, "normal-fixed": GaussianFixed, "student-t": StudentT}
    for name, kind in kinds.items():
        assert type(likelihood_for(CONTINUOUS, net, kind=name)) is kind
    assert type(likelihood_for(COUNTS, net, kind="negative-binomial")) is NegativeBinomialLikelihood
    assert likelihood_for(COUNTS, net, conditional=True).conditional


def test_a_likelihood_that_does_not_exist_or_fit_is_refused() -> None:
    with pytest.raises(
        ModelError,
        match="unknown likelihood 'cauchy': use one of normal, normal-fixed, normal-per-cell, student-t, neg",
    ):
        likelihood_for(CONTINUOUS, Given(), kind="cauchy")
    with pytest.raises(ModelError, match="NegativeBinomialLikelihood needs counts"):
        likelihood_for(CONTINUOUS, Given(), kind="negative-binomial")
    with pytest.raises(ModelError, match="StudentT is a likelihood of continuous values"):
        likelihood_for(COUNTS, Given(), kind="student-t")


@pytest.mark.parametrize("schema", [CONTINUOUS, COUNTS])
def test_the_program_observes_x_where_it_was_measured_and_draws_it_elsewhere(schema: Schema) -> None:
    likelihood, c = likelihood_for(schema, Given()), torch.zeros(4, 3)
    x = torch.arange(12.0).reshape(4, 3)

    def program(batch: Batch) -> Tensor:
        with batch.plate():
            value: Tensor = likelihood(c, batch)
        return value

    observed = poutine.trace(program).get_trace(cells(x=x)).nodes["x"]
    assert observed["is_observed"]
    assert torch.equal(observed["value"], x)
    drawn = poutine.trace(program).get_trace(cells()).nodes["x"]
    assert not drawn["is_observed"]
    assert drawn["value"].shape == (4, 3)
    draws = torch.stack([pyro.poutine.trace(program).get_trace(cells()).nodes["x"]["value"] for _ in range(300)])
    law = likelihood.distribution(c, cells())
    error = (draws.mean((0, 1)) - law.mean[0]).abs() / (law.variance[0] / 1200).sqrt()
    assert (error < 4).all()


def test_statistics_are_saved_with_the_model() -> None:
    other = NegativeBinomialLikelihood(mlp(3, (), 3), replace(COUNTS, statistics=None))
    other.load_state_dict(NegativeBinomialLikelihood(mlp(3, (), 3), COUNTS).state_dict())
    torch.testing.assert_close(other.log_proportion.exp(), PROPORTION)
    assert float(other.log_depth.exp()) == pytest.approx(2000, rel=1e-5)
    gaussian = Gaussian(mlp(3, (), 3), replace(CONTINUOUS, statistics=None))
    assert (gaussian.spread == 1).all()
    gaussian.load_state_dict(Gaussian(mlp(3, (), 3), CONTINUOUS).state_dict())
    assert torch.equal(gaussian.centre, MEAN)


# ---------------------------------------------------------------------- variances of each cell
def test_a_decoder_may_give_each_cells_variance() -> None:
    torch.manual_seed(0)
    schema, c = CONTINUOUS, torch.randn(5, 3)
    genes = len(schema.genes)
    assert outputs_of(schema, "normal-per-cell") == 2 * genes
    assert outputs_of(schema) == outputs_of(schema, "student-t") == genes
    part = likelihood_for(schema, nn.Linear(3, 2 * genes), kind="normal-per-cell")
    assert type(part) is GaussianPerCell
    law = part.distribution(c, Batch.example(schema, 5)).base_dist
    out = part.net(c)
    torch.testing.assert_close(law.loc, part.centre + part.spread * out[:, :genes])
    scale = part.spread * (0.05 + nn.functional.softplus(out[:, genes:] + 0.5413))
    torch.testing.assert_close(law.scale, scale)
    assert (law.scale[0] != law.scale[1]).all()
    with torch.no_grad():
        part.net.weight.fill_(-1e4)
        assert (part.distribution(c.abs(), Batch.example(schema, 5)).base_dist.scale >= 0.05 * part.spread).all()
    with pytest.raises(ModelError, match="unknown likelihood 'gamma'"):
        outputs_of(schema, "gamma")
