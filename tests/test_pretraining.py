from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from pyro_scm import query, recipes
from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.errors import ModelError
from pyro_scm.infer import fit
from pyro_scm.pretraining import transfer
from pyro_scm.run import Run
from tests.compositions import cells


def pre_trained(name: str, data: EnvironmentDataset, **options: Any) -> Run:
    torch.manual_seed(0)
    own = {"latent": 3, "hidden": (8,), "guide_hidden": (7,), "covariates": ("cell_type",), **options}
    model, guide = recipes.make(name, data.schema, **own)
    return fit(model, guide, data, seeds=(0, 1), epochs=2, progress=False)


def with_genes(data: EnvironmentDataset, names: list[str]) -> EnvironmentDataset:
    """The same cells with these genes: those that are there, and new ones."""
    rng, x = np.random.default_rng(1), np.asarray(data.x)
    columns = [x[:, data.genes.index(g)] if g in data.genes else rng.normal(size=len(data)) for g in names]
    var = data.var.reindex(names)
    return replace(data, x=np.stack(columns, 1).astype(np.float32), var=var)


EXTENDED = ["new1", *[f"g{i}" for i in range(11, -1, -1)], "new2"]


@pytest.mark.parametrize("genes", ["shared", "none"])
def test_all_but_the_layers_of_genes_is_carried_to_an_extended_set(genes: str) -> None:
    data = cells("molecules")
    run = pre_trained("chemcpa", data)
    other = with_genes(data, EXTENDED)
    new = transfer(run, other, genes=genes, seed=5)
    assert len(new) == 2
    assert new.schema.genes == tuple(EXTENDED)
    of_genes = {n for n, p in run.parameters.items() if new.parameters[n].shape != p.shape}
    assert of_genes == {"guide.local.z.net.parts.0.weight", "model.likelihoods.0.net.2.weight",
                        "model.likelihoods.0.net.2.bias"}  # fmt: skip
    for name, p in run.parameters.items():
        if name not in of_genes:
            assert torch.equal(new.parameters[name], p), name
    order = [EXTENDED.index(g) for g in data.genes]
    first, last = new.parameters["guide.local.z.net.parts.0.weight"], new.parameters["model.likelihoods.0.net.2.weight"]
    both = [*order, *(14 + i for i in order)]  # locations, then scales
    carried = torch.equal(first[:, :, order], run.parameters["guide.local.z.net.parts.0.weight"])
    assert carried is (genes == "shared")
    assert torch.equal(last[:, both], run.parameters["model.likelihoods.0.net.2.weight"]) is (genes == "shared")
    assert torch.isfinite(first).all()
    assert (first[0] != first[1]).any()
    model: Any = new.model
    torch.testing.assert_close(model.likelihoods[0].centre, other.schema.summary.mean)


def test_the_same_genes_in_another_order_give_the_same_answers() -> None:
    data = cells("molecules")
    run = pre_trained("chemcpa", data)
    backwards = list(data.genes)[::-1]
    new = transfer(run, with_genes(data, backwards))
    before = query.counterfactual(run, data, environment="A 10 uM")
    after = query.counterfactual(new, with_genes(data, backwards), environment="A 10 uM")
    np.testing.assert_allclose(after.x[..., ::-1], before.x, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(after.z, before.z, rtol=1e-4, atol=1e-4)


def test_training_goes_on_from_there() -> None:
    data = cells("molecules")
    run = pre_trained("chemcpa", data)
    other = with_genes(data, EXTENDED)
    new = transfer(run, other)
    on = fit(new.model, new.guide, other, start=new, seeds=new.seeds, epochs=1, lr=1e-9, progress=False)
    for name, p in new.parameters.items():
        torch.testing.assert_close(on.parameters[name], p, rtol=1e-4, atol=1e-6)
    assert query.predict(on, "C 10 uM", covariates={"cell_type": "T"}, cells=2).shape == (2, 2, 14)


def test_perturbations_and_categories_are_matched_by_name() -> None:
    data = cells()
    run = pre_trained("cpa", data, doser="hill")
    others = data.of("DMSO", "C 10 uM", "B 10 uM")
    table = others.environments.loc[["DMSO", "C 10 uM", "B 10 uM"]].copy()
    table["perturbation"] = ["DMSO", "C", "Z"]
    place = np.array([0, 0, 0, 0, 2, 1, 0])
    renamed = replace(
        others, environments=table, env=place[others.env], categories={"cell_type": ("NK", "T")},
        covariates={"cell_type": others.covariates["cell_type"]},
    ).with_representation("multi-dose")  # fmt: skip
    assert renamed.features == ("dose=C", "dose=Z")
    new = transfer(run, renamed)

    def rows(run: Run, name: str) -> torch.Tensor:
        return run.parameters[f"model.shift.{name}"]

    directions, raw = "effects.directions", "effects.doser.raw"
    assert torch.equal(rows(new, directions)[:, 0], rows(run, directions)[:, 2])
    assert torch.equal(rows(new, raw)[:, :, 0], rows(run, raw)[:, :, 2])
    assert (rows(new, directions)[:, 1, None] != rows(run, directions)).all()
    types = "covariates.tables.0"
    assert torch.equal(rows(new, types)[:, 1], rows(run, types)[:, 1])
    assert (rows(new, types)[:, 0] != rows(run, types)[:, 0]).all()
    read = "guide.local.z.net.parts.1.weight"
    assert torch.equal(new.parameters[read][:, :, 0], run.parameters[read][:, :, 2])
    assert torch.equal(
        new.parameters["model.likelihoods.0.net.0.weight"], run.parameters["model.likelihoods.0.net.0.weight"]
    )


def test_cell_lines_and_numbers_of_the_users_own_are_matched_too() -> None:
    data = cells()
    lined = replace(data, environments=data.environments.assign(cell_line=["PC3"] * 4 + ["A549"] * 3))
    run = pre_trained("cpa", lined.with_representation(["multi-dose", "cell_line"]))
    other = replace(data, environments=data.environments.assign(cell_line=["PC3"] * 3 + ["MCF7"] * 4))
    new = transfer(run, other.with_representation(["multi-dose", "cell_line"]))
    context = "model.shift.covariates.context"
    assert torch.equal(new.parameters[context][:, 1], run.parameters[context][:, 1])
    assert (new.parameters[context][:, 0] != run.parameters[context][:, 0]).all()
    numbers = np.arange(14, dtype=np.float32).reshape(7, 2)
    described = data.with_representation(numbers)
    run = pre_trained("chemcpa", described)
    new = transfer(run, data.with_representation(np.c_[numbers, numbers[:, 0]]))
    first = "model.shift.effects.encoder.0.0.weight"
    assert torch.equal(new.parameters[first][..., :2], run.parameters[first])


def test_what_cannot_be_transferred_is_refused() -> None:
    data = cells("molecules")
    run = pre_trained("chemcpa", data)
    with pytest.raises(ModelError, match="molecules by other features: represent both with the same bits"):
        transfer(run, data.with_representation("molecules", bits=32))
    with pytest.raises(ModelError, match="genes = 'all': use 'shared' or 'none'"):
        transfer(run, data, genes="all")
    run.model.spec = None  # type: ignore[assignment]
    with pytest.raises(ModelError, match="not one of the named models: build it anew"):
        transfer(run, data)
