"""Two modalities: the mixture of proteins, the experts of a product, and what is missing."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from pyro import poutine
from torch.distributions import kl_divergence

from guides import amortise
from guides.encoders import GaussianEncoder, ProductEncoder
from pyro_scm import models, recipes
from pyro_scm.batch import Batch
from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.distributions import NegativeBinomial, TwoNegativeBinomials, normal
from pyro_scm.errors import DataError, ModelError
from pyro_scm.likelihoods import ProteinMixture
from pyro_scm.objectives import Objective
from tests.compositions import cells, screen


def made(family: str = "product", **options: Any) -> tuple[Any, Any, Batch]:
    torch.manual_seed(2)
    data = cells("multi-hot", counts=True)
    model, guide = recipes.make(
        "multicpa", data.schema, latent=3, hidden=(8,), guide_hidden=(8,), family=family, **options
    )
    return model, guide, data[::7]


# ---------------------------------------------------------------------- the mixture
def test_the_mixture_is_that_of_two_negative_binomials() -> None:
    torch.manual_seed(0)
    background, foreground, logits, theta = (torch.randn(4, 3, dtype=torch.float64) for _ in range(4))
    law = TwoNegativeBinomials(background, background + foreground.abs(), logits, theta)
    y = torch.arange(12, dtype=torch.float64).reshape(4, 3)
    low, high = (NegativeBinomial(b, theta).log_prob(y).exp() for b in (background, background + foreground.abs()))
    share = torch.sigmoid(logits)
    torch.testing.assert_close(law.log_prob(y).exp(), share * low + (1 - share) * high)
    every = torch.arange(4000.0, dtype=torch.float64)[:, None, None]
    mass = law.expand((1, 4, 3)).log_prob(every.expand(4000, 4, 3)).exp()
    torch.testing.assert_close(mass.sum(0), torch.ones(4, 3, dtype=torch.float64), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close((mass * every).sum(0), law.mean, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close((mass * every.square()).sum(0) - law.mean.square(), law.variance, rtol=1e-2, atol=1e-2)
    drawn = law.sample((20_000,))
    error = (law.variance / 20_000).sqrt()
    assert ((drawn.mean(0) - law.mean).abs() < 6 * error).all()


def test_foreground_is_above_background_and_nothing_overflows() -> None:
    model, _, batch = made()
    proteins = model.likelihoods[1]
    law = proteins.mixture(1e4 * torch.randn(len(batch), 3), batch, 1e4 * torch.randn(len(batch), 4))
    assert (law.foreground > law.background).any()
    assert (law.foreground >= law.background).all()
    assert law.log_prob(batch.y).isfinite().all()  # softplus written out as log(1 + exp) is infinite from 88 on


def test_each_cell_is_compared_with_its_own_proteins() -> None:
    """Not with those of another row of the batch: cells in another order have the same densities in that order."""
    model, guide, batch = made()
    order = torch.randperm(len(batch))
    moved = replace(
        batch, index=batch.index[order], env=batch.env[order], row=batch.row[order], x=batch.x[order],
        y=batch.y[order], size=batch.size[order], covariates={n: v[order] for n, v in batch.covariates.items()},
    )  # fmt: skip

    def densities(b: Batch) -> torch.Tensor:
        with torch.no_grad():
            means = {n: s["fn"].mean for n, s in poutine.trace(guide).get_trace(b).nodes.items()
                     if s["type"] == "sample" and n != "data"}  # fmt: skip
            site = poutine.trace(poutine.condition(model, data=means)).get_trace(b).nodes["y"]
            result: torch.Tensor = site["fn"].log_prob(site["value"])
            return result

    before, after = densities(batch), densities(moved)
    assert before.shape == (len(batch),)
    torch.testing.assert_close(after, before[order], rtol=1e-4, atol=1e-3)
    assert len(set(before.tolist())) == len(batch)


def test_the_divergence_of_the_background_is_that_of_two_log_normals() -> None:
    model, guide, batch = made()
    with torch.no_grad():
        q, p = guide.local["log_background"](batch), model.likelihoods[1].background(len(batch))
        kl = kl_divergence(q, p)
        logs = q.expand((20_000, len(batch))).sample()
        as_log_normals = []
        for law in (q, p):
            base = torch.distributions.LogNormal(law.base_dist.loc, law.base_dist.scale)
            as_log_normals.append(base.log_prob(logs.exp()).sum(-1))
        ratio = as_log_normals[0] - as_log_normals[1]
    assert ((kl - ratio.mean(0)).abs() < 6 * ratio.std(0) / 20_000**0.5).all()
    assert (p.base_dist.scale > 0.1).all()


def test_backgrounds_start_at_each_proteins_level() -> None:
    data = cells()
    assert data.y is not None
    y = data.y.copy()
    y[:, 1] = 300 + np.arange(len(y)) % 5  # a protein of high counts
    y[:4] = np.nan
    made_of = replace(data, y=y)
    level = np.log1p(np.quantile(y[4:], 0.2, axis=0))
    found = made_of.schema.summary.log_background
    assert found is not None
    np.testing.assert_allclose(found.numpy(), level, rtol=1e-6)
    model, _ = recipes.make("multicpa", made_of.schema, latent=3, hidden=(4,))
    law = model.likelihoods[1].mixture(torch.zeros(1, 3), made_of.batch(np.arange(1)), torch.zeros(1, y.shape[1]))
    np.testing.assert_allclose(law.background.detach().numpy()[0], level, rtol=1e-5)
    assert replace(data, y=np.full_like(y, np.nan)).schema.summary.log_background.tolist() == [0.0] * y.shape[1]


def test_missing_proteins_are_worth_nothing() -> None:
    model, guide, batch = made()
    none = replace(batch, y=torch.full_like(batch.y, torch.nan))
    some = replace(batch, y=torch.where(torch.arange(len(batch))[:, None] % 2 == 0, batch.y, torch.nan))
    with torch.no_grad():
        for given, share in ((none, 0.0), (some, 0.5), (batch, 1.0)):
            site = Objective().world(model.forward, guide.forward, given).model["y"]
            counted = site["fn"].log_prob(site["value"])
            assert counted.isfinite().all()
            assert float((counted != 0).float().mean()) == pytest.approx(share, abs=0.02)
    loss = Objective().differentiable_loss(model.forward, guide.forward, some)
    gradients = torch.autograd.grad(loss, [*model.parameters(), *guide.parameters()], allow_unused=True)
    assert all(g is None or g.isfinite().all() for g in gradients)


def test_missing_proteins_are_read_and_half_missing_ones_refused() -> None:
    adata = screen(True).copy()
    adata.obsm["protein"] = adata.obsm["protein"].copy()
    adata.obsm["protein"].iloc[:5] = np.nan
    data = EnvironmentDataset.from_anndata(adata, environment="drug", control="DMSO", proteins="protein")
    assert data.y is not None
    assert np.isnan(data.y).all(1).sum() == 5
    again = EnvironmentDataset.from_anndata(data.to_anndata())
    np.testing.assert_array_equal(again.y, data.y)
    adata.obsm["protein"].iloc[7, 1] = np.nan
    with pytest.raises(DataError, match="obsm 'protein'"):
        EnvironmentDataset.from_anndata(adata, environment="drug", control="DMSO", proteins="protein")


def test_cells_without_proteins_are_refused() -> None:
    schema = replace(cells().schema, proteins=())
    with pytest.raises(ModelError, match="the cells have no proteins: name the obsm entry"):
        models.multicpa(schema)
    with pytest.raises(ModelError, match="the cells have no proteins"):
        ProteinMixture(torch.nn.Linear(3, 8), schema)


# ---------------------------------------------------------------------- encoders
def test_a_product_is_that_of_its_experts_and_one_prior() -> None:
    _, guide, batch = made()
    product = guide.local["z"]
    assert type(product) is ProductEncoder
    with torch.no_grad():
        law = product(batch).base_dist
        parts = [
            product.rna(batch).base_dist,
            product.protein(batch).base_dist,
            normal(torch.zeros_like(law.loc), torch.ones(3)).base_dist,
        ]
        z = torch.linspace(-3, 3, 2001, dtype=torch.float64)
        for n, j in ((0, 0), (5, 2)):
            logs = sum(
                torch.distributions.Normal(p.loc[n, j].double(), p.scale[n, j].double()).log_prob(z) for p in parts
            )
            weight = torch.softmax(torch.as_tensor(logs), 0)
            mean = (weight * z).sum()
            torch.testing.assert_close(mean.float(), law.loc[n, j], rtol=1e-3, atol=1e-3)
            spread = (weight * (z - mean).square()).sum().sqrt().float()
            torch.testing.assert_close(spread, law.scale[n, j], rtol=1e-3, atol=1e-3)


def test_an_expert_that_saw_nothing_is_left_out() -> None:
    _, guide, batch = made()
    product = guide.local["z"]
    absent = torch.full_like(batch.y, torch.nan)
    with torch.no_grad():
        rna, protein = product.rna(batch).base_dist, product.protein(batch).base_dist
        for without, expert in (
            (replace(batch, y=None), rna),
            (replace(batch, y=absent), rna),
            (replace(batch, x=None), protein),
            (replace(batch, x=torch.full_like(batch.x, torch.nan)), protein),
        ):
            law = product(without).base_dist
            precision = 1 + expert.scale.square().reciprocal()
            torch.testing.assert_close(law.scale, precision.rsqrt())
            torch.testing.assert_close(law.loc, expert.loc * (precision - 1) / precision)
        neither = product(replace(batch, y=absent, x=torch.full_like(batch.x, torch.nan))).base_dist
        assert (neither.loc == 0).all()
        assert (neither.scale == 1).all()
        with pytest.raises(ModelError, match="cells without expression and proteins"):
            product(batch.unobserved())


def test_one_modality_may_be_missing_in_each_cell() -> None:
    """The law of a cell depends on its own modalities alone, whatever the others of the batch lack."""
    _, guide, batch = made()
    product = guide.local["z"]
    first = torch.arange(len(batch))[:, None] % 2 == 0
    mixed = replace(batch, y=torch.where(first, batch.y, torch.nan), x=torch.where(first, torch.nan, batch.x))
    with torch.no_grad():
        law = product(mixed).base_dist
        no_y, no_x = product(replace(batch, y=None)).base_dist, product(replace(batch, x=None)).base_dist
    torch.testing.assert_close(law.loc, torch.where(first, no_x.loc, no_y.loc))
    torch.testing.assert_close(law.scale, torch.where(first, no_x.scale, no_y.scale))


def test_proteins_are_read_on_a_logarithmic_scale() -> None:
    model, guide, batch = made("normal")
    encoder = guide.local["z"]
    assert type(encoder) is GaussianEncoder
    read = encoder._proteins(batch)
    assert read.shape == (len(batch), 5)
    torch.testing.assert_close(read[:, :4], torch.log1p(batch.y) / 4)
    assert (read[:, 4] == 1).all()
    huge = replace(batch, y=1e6 * torch.ones_like(batch.y))
    assert encoder(huge).mean.abs().max() < 100
    with torch.no_grad():
        assert encoder(replace(batch, x=None)).mean.isfinite().all()
    with pytest.raises(ModelError, match="a product of experts needs 'x' and 'y'"):
        amortise(model, cells("multi-hot", counts=True), inputs=("x", "e"), family="product")
