"""IRM's verdict at its smallest size, and its logic on numbers by hand."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from experiments import irm_verdict, launch
from experiments.irm_verdict import IrmVerdict, Weighted
from pyro_scm import recipes
from pyro_scm.ensemble import System, stack_initial
from pyro_scm.objectives import IRM, Objective


def test_the_penalty_finds_the_regulators_and_silences_the_autoencoder(tmp_path: Path) -> None:
    arguments = ["--preset", "smoke", "--out", str(tmp_path)]
    assert launch.launch(irm_verdict.__file__, IrmVerdict, irm_verdict.main, arguments) == 0
    (folder,) = (tmp_path / "irm_verdict").iterdir()
    scores = pd.read_csv(folder / "scores.csv", index_col=0)
    control = scores[scores["setting"] == "regression, 1 gene"].set_index(["model", "weight"])
    plain, held = control.loc[("one w", 0.0)], control.loc[("one w", 1000.0)]
    # without the penalty the fit is least squares; with it the spurious gene is not used
    assert plain["ood"] == pytest.approx(control.loc["least squares", "ood"].iloc[0], rel=0.02)
    assert plain["share on spurious"] > 0.3
    assert held["share on spurious"] < 0.15
    assert held["ood"] < plain["ood"]
    screen = scores[scores["setting"] == "loading"].set_index(["model", "weight"])
    assert screen.loc[("vae", 0.0), "ood"] > screen.loc[("vae", 0.0), "inside"] + 5  # there is a gap to cut
    nothing, held = screen.loc["nothing"].iloc[0], screen.loc[("vae", 10.0)]
    assert held["inside"] == pytest.approx(nothing["inside"], rel=0.1)  # a decoder that says nothing
    assert (folder / "gap.png").is_file()


def test_environments_and_genes_are_what_they_are_said_to_be() -> None:
    parts = irm_verdict.screen_cells(0, 40, 4, "loading")
    sets = [set(getattr(parts, n).present) for n in ("train", "inside", "validation", "ood")]
    assert sets[0] == sets[1]
    assert not sets[0] & sets[2]
    assert not (sets[0] | sets[2]) & sets[3]
    assert parts.spurious.sum() == 8
    assert not set(parts.train.cells) & set(parts.inside.cells)
    stable = parts.of(~parts.spurious)
    assert len(stable.train.genes) == 16
    np.testing.assert_array_equal(stable.ood.x, parts.ood.x[:, ~parts.spurious])
    # the relation of spurious genes to stable ones changes its sign
    x, y = (np.asarray(c.x) for c in (parts.train, parts.ood))
    one, other = (np.corrcoef(v.T)[~parts.spurious][:, parts.spurious].ravel() for v in (x, y))
    assert np.corrcoef(one, other)[0, 1] < -0.5
    one, other = (np.corrcoef(v[:, ~parts.spurious].T).ravel() for v in (x, y))
    assert np.corrcoef(one, other)[0, 1] > 0.8


def test_every_member_has_the_penalty_of_its_own_weight() -> None:
    parts = irm_verdict.screen_cells(0, 40, 2, "loading")
    model, guide = recipes.make("vae", parts.train.schema, latent=2, hidden=(), guide_hidden=(4,))
    system = System(model, guide, Objective(penalties={"irm": Weighted((0.0, 2.0, 5.0))}))
    drawn = stack_initial(system, range(6))["penalties.irm.own"]
    assert drawn.tolist() == [0, 2, 5, 0, 2, 5]
    penalty, plain = Weighted((3.0,)), IRM(warmup=0.3)
    penalty.reset_parameters()
    for each in (penalty, plain):
        each.at(0.15)
    world = Objective().world(model, guide, parts.train.batch())
    torch.testing.assert_close(penalty(world), 3 * plain(world))
    (gradient,) = torch.autograd.grad(penalty(world), penalty.own)
    assert float(gradient) == 0


def test_what_knows_nothing_is_a_normal_for_each_gene() -> None:
    parts = irm_verdict.regression_cells(0, 40, 2)
    columns = np.array([False] * 4 + [True] * 2)
    x = np.asarray(parts.train.x, float)[:, columns]
    law = torch.distributions.Normal(torch.tensor(x.mean(0)), torch.tensor(x.std(0)))
    of = {
        e: -law.log_prob(torch.tensor(np.asarray(parts.ood.x, float)[parts.ood.env == e][:, columns]))
        for e in parts.ood.present
    }
    expected = np.mean([float(v.sum(1).mean()) for v in of.values()])
    assert irm_verdict.marginal(parts, columns)["ood"] == pytest.approx(expected)


def test_the_verdict_by_hand() -> None:
    def row(screen: int, weight: float, inside: float, validation: float, ood: float) -> dict[str, object]:
        label = {"setting": "s", "model": "m", "screen": screen}
        return {**label, "weight": weight, "inside": inside, "validation": validation, "ood": ood}

    scores = pd.DataFrame(
        [
            row(0, 0.0, 1.0, 1.0, 11.0),
            row(0, 1.0, 1.0, 2.0, 7.0),
            row(0, 9.0, 2.0, 5.0, 4.0),
            row(1, 0.0, 1.0, 3.0, 21.0),
            row(1, 1.0, 1.0, 5.0, 11.0),
            row(1, 9.0, 2.0, 2.0, 8.0),
        ]
    )
    table = irm_verdict.cuts(scores)
    by = table.set_index(["choice", "screen"])
    assert by["weight"].to_dict() == {
        ("validation", 0): 1, ("validation", 1): 9, ("free", 0): 0, ("free", 1): 9,
        ("best on OOD", 0): 9, ("best on OOD", 1): 9,
    }  # fmt: skip
    assert by.loc[("validation", 0), "cut"] == pytest.approx(0.4)
    assert by.loc[("validation", 1), "cut"] == pytest.approx(0.7)
    assert by.loc[("free", 0), "cut"] == 0
    found = irm_verdict.verdicts(table).loc[("s", "m")]
    assert found.loc["validation", "cut"] == pytest.approx(1 - 12 / 30)
    assert found.loc["validation", "ood change"] == pytest.approx((-4 - 13) / 2)
    assert found.loc["validation", "inside change"] == pytest.approx(0.5)
    assert found.loc["validation", "cut by 30 %"]
    assert found.loc["free", "gap"] == pytest.approx(8)
    low, high = irm_verdict.interval(np.array([1.0, 2.0, 3.0]), np.array([2.0, 4.0, 6.0]))
    assert low == high == pytest.approx(0.5)  # each is cut by half: no spread, whatever the sizes of the gaps
    low, high = irm_verdict.interval(np.array([1.0, 4.0]), np.array([4.0, 4.0]))
    assert (low, high) == pytest.approx((0.0, 0.75))
