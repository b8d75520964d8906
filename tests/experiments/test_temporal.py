"""The experiment on time courses at its smallest size, and its parts where the answer is known."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import pyro_scm as ps
from experiments import launch, temporal
from experiments.temporal import BooleanNetwork, StepPrior, Temporal
from guides import amortise
from pyro_scm.likelihoods import likelihood_for
from pyro_scm.priors import Dense, TopK

AND_OR = BooleanNetwork(((0, 1), (2,), (0, 2)), ((False, False, False, True), (True, False), (False, True, True, True)))


def test_sparse_innovations_find_what_moved_and_the_rules(tmp_path: Path) -> None:
    argv = ["--preset", "smoke", "--out", str(tmp_path)]
    assert launch.launch(temporal.__file__, Temporal, temporal.main, argv) == 0
    (folder,) = (tmp_path / "temporal").iterdir()
    changes = pd.read_csv(folder / "change_scores.csv").set_index("reading")
    assert set(changes.index) == set(temporal.READINGS)
    assert changes.loc["sparse innovations", "F1 targets"] > 0.9
    assert changes.loc["sparse innovations", "mcc z"] > 0.95
    assert changes.loc["unrelated, dense", "F1 targets"] < 0.8
    rules = pd.read_csv(folder / "rule_scores.csv").set_index("reading")
    assert rules.loc["sparse innovations", "states"] > 0.95
    assert rules.loc["sparse innovations", "truth table"] >= rules.loc["true states", "truth table"] - 0.1
    assert rules.loc["unrelated, dense", "states"] < 0.95
    assert (folder / "scores.png").is_file()


# ---------------------------------------------------------------------- time courses and the model
@pytest.mark.parametrize("moving", [1, 2])
def test_innovations_move_so_many_latents_or_none_and_each_latent_once(moving: int) -> None:
    steps = temporal.changes(np.random.default_rng(3), latent=4, steps=20, moving=moving)
    moved = (steps != 0).sum(1)
    assert set(moved) == {0, moving}
    assert (steps != 0).any(0).all()
    assert ((np.abs(steps[steps != 0]) >= 2) & (np.abs(steps[steps != 0]) <= 4)).all()


def test_cumulative_representations_make_means_of_innovations() -> None:
    r = temporal.representation("cumulative", 4)
    assert r.tolist() == [[0, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert temporal.representation("one-hot", 3).tolist() == [[0, 0], [1, 0], [0, 1]]
    steps = torch.tensor([[3.0, 1.0], [-1.0, 2.0], [0.5, 0.0]])
    for sparsifier, expected in (
        (Dense(), [[0, 0], [3, 1], [2, 3], [2.5, 3]]),
        (TopK(1), [[0, 0], [3, 0], [3, 2], [3.5, 2]]),
    ):
        prior = StepPrior(3, 2, sparsifier)
        with torch.no_grad():
            prior.step.copy_(steps)
        loc, scale = prior.moments(torch.as_tensor(r))
        assert loc.tolist() == expected
        assert bool((scale == 1).all())


def test_the_prior_is_a_part_of_any_model() -> None:
    means = np.cumsum(temporal.changes(np.random.default_rng(0), 2, 4), 0)
    cells, _ = temporal.measured(np.concatenate([np.zeros((1, 2)), means]), genes=6, cells=20, seed=0)
    cells = cells.with_representation(temporal.representation("cumulative", 5))
    model = ps.LatentModel(StepPrior(4, 2, Dense()), likelihood_for(cells.schema, nn.Linear(2, 6)))
    guide = amortise(model, cells, inputs=("x",), hidden=())
    run = ps.fit(model, guide, cells, seeds=(0, 1), epochs=10, lr=3e-2, device="cpu", progress=False)
    losses = run.history.pivot(index="epoch", columns="member", values="loss")
    assert (losses.iloc[-1] < losses.iloc[0]).all()
    assert ps.predict(run, "t004", cells=3).shape == (2, 3, 6)


def test_the_loss_is_minus_the_density_of_the_cells() -> None:
    """Up to its constant, against torch's own law of x given the time."""
    torch.manual_seed(0)
    means = np.concatenate([np.zeros((1, 2)), np.cumsum(temporal.changes(np.random.default_rng(1), 2, 3), 0)])
    cells, _ = temporal.measured(means, genes=5, cells=30, seed=2)
    config = Temporal(seeds=1, restarts=1, latent=2, genes=5, iterations=3)
    (fit,) = temporal.maximise("unrelated, dense", cells, config)
    covariance = fit.mixing @ fit.mixing.T + np.diag(fit.psi)
    at = torch.as_tensor((fit.offset + fit.means @ fit.mixing.T)[cells.env])
    law = torch.distributions.MultivariateNormal(at, torch.as_tensor(covariance))
    density = float(law.log_prob(torch.as_tensor(np.asarray(cells.x, float))).mean())
    assert -density - 2.5 * np.log(2 * np.pi) == pytest.approx(fit.loss, rel=1e-6)


def test_the_noise_of_cells_is_its_posterior_mean() -> None:
    rng = np.random.default_rng(0)
    mixing, psi = rng.normal(size=(6, 2)), rng.uniform(0.5, 1, 6)
    fit = temporal.Fit(mixing, rng.normal(size=6), psi, rng.normal(size=(3, 2)), 0.0)
    x, time = rng.normal(size=(4, 6)), np.array([0, 2, 1, 2])
    gain = mixing.T @ np.linalg.inv(mixing @ mixing.T + np.diag(psi))
    expected = fit.means[time] + (x - fit.offset - fit.means[time] @ mixing.T) @ gain.T
    assert np.allclose(fit.noise(x, time), expected)


def test_change_scores_by_hand() -> None:
    rng = np.random.default_rng(0)
    z = rng.normal(size=(200, 2))
    true = np.array([[3.0, 0.0], [0.0, 0.0], [0.0, -2.0]])
    means = np.array([[0.0, 0.0], [0.1, -6.0], [0.1, -6.0], [2.1, -6.5]])  # turned round, the first one negative
    right = temporal.change_scores(true, z, np.stack([z[:, 1], -z[:, 0]], 1), means)
    assert right == {"mcc z": pytest.approx(1.0), "F1 targets": 1.0, "F1 times": 1.0}
    # taken for each other: every step is put on the wrong latent, the times are still right
    wrong = temporal.change_scores(true, z, z, means)
    assert (wrong["F1 targets"], wrong["F1 times"]) == (0.0, 1.0)


# ---------------------------------------------------------------------- Boolean networks
def test_the_rules_of_a_network_by_hand() -> None:
    """s_0 := s_0 and s_1;  s_1 := not s_2;  s_2 := s_0 or s_2."""
    for state in temporal.every_state(3):
        a, b, c = (bool(v) for v in state)
        assert [AND_OR.next(j, state) for j in range(3)] == [a and b, not c, a or c]
    assert AND_OR.truth().shape == (8, 3)
    assert AND_OR.truth()[0b110].tolist() == [True, True, True]


def test_one_switch_at_a_time_changes_and_only_as_its_rule_says() -> None:
    states, outside = AND_OR.simulate(np.random.default_rng(0), 300)
    changed = states[1:] != states[:-1]
    assert (changed.sum(1) <= 1).all()
    assert (changed[outside].sum(1) == 1).all()
    for t in np.flatnonzero(~outside & changed.any(1)):
        j = int(np.flatnonzero(changed[t])[0])
        assert states[t + 1, j] == AND_OR.next(j, states[t])
    assert 0.2 < outside.mean() < 0.4


def test_rules_are_found_from_enough_transitions_and_not_from_scrambled_ones() -> None:
    states, outside = AND_OR.simulate(np.random.default_rng(1), 400)
    found = temporal.infer_rules(states, outside)
    assert found.regulators == AND_OR.regulators
    assert (found.truth() == AND_OR.truth()).all()
    scores = temporal.rule_scores(AND_OR, states, found)
    assert scores == {"truth table": 1.0, "truth table, visited": 1.0, "F1 regulators": 1.0}
    order = np.random.default_rng(0).permutation(len(states))
    scrambled = temporal.rule_scores(AND_OR, states, temporal.infer_rules(states[order], outside))
    assert scrambled["truth table"] < 0.9


def test_random_networks_have_no_idle_regulator() -> None:
    rng = np.random.default_rng(0)
    for _ in range(30):
        network = BooleanNetwork.random(rng, 4)
        for regulators, table in zip(network.regulators, network.tables, strict=True):
            cube = np.array(table).reshape((2,) * len(regulators))
            for axis in range(cube.ndim):
                assert (np.take(cube, 0, axis) != np.take(cube, 1, axis)).any()


def test_states_are_cut_between_the_two_groups() -> None:
    means = np.array([[0.1, 9.0], [4.2, 9.1], [0.3, 5.2], [3.8, 5.0], [-0.2, 9.2]])
    assert temporal.binarised(means).tolist() == [
        [False, True], [True, True], [False, False], [True, False], [False, True],
    ]  # fmt: skip
    assert not temporal.binarised(np.ones((3, 1))).any()


def test_flipped_and_exchanged_latents_are_read_as_their_true_ones() -> None:
    states, outside = AND_OR.simulate(np.random.default_rng(1), 400)
    z = np.repeat(4.0 * states, 3, 0) + np.random.default_rng(2).normal(size=(3 * len(states), 3))
    turn = np.array([[0, -2.0, 0], [0, 0, 1], [0.5, 0, 0]])
    scores = temporal.boolean_scores(AND_OR, states, outside, z, z @ turn, 4.0 * states @ turn)
    assert scores["states"] == 1.0
    assert scores["truth table"] == 1.0
