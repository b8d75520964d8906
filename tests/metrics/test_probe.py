import numpy as np
import pytest

from pyro_scm.errors import DataError
from pyro_scm.metrics import environment_probe, probes

RNG = np.random.default_rng(0)
NAMES = np.repeat(["a", "b", "c"], [300, 60, 40])
CODES = np.repeat([0, 1, 2], [300, 60, 40])


def test_independent_latents_are_at_chance_whatever_the_sizes_of_the_environments() -> None:
    probe = environment_probe(RNG.normal(size=(400, 4)), NAMES, seed=1)
    assert probe.accuracy == pytest.approx(1 / 3, abs=0.12)
    assert probe.chance == pytest.approx(1 / 3, abs=0.05)
    assert probe.accuracy <= probe.upper + 0.05
    assert probe.p_value > 0.05


def test_a_shift_is_read_off_held_out_cells() -> None:
    z = RNG.normal(size=(400, 4)) + 4 * np.eye(4)[CODES]
    probe = environment_probe(z, NAMES, seed=1)
    assert probe.accuracy > 0.9
    assert probe.upper < 0.6
    assert probe.p_value == pytest.approx(1 / 21)


def test_the_score_is_of_cells_that_were_not_trained_on() -> None:
    """With more latents than cells any labels can be learnt by heart; held-out cells stay at chance."""
    z, labels = RNG.normal(size=(40, 200)), np.repeat([0, 1], 20)
    assert environment_probe(z, labels, permutations=5, seed=0).accuracy < 0.85
    assert environment_probe(z, labels, permutations=5, seed=0).p_value > 1 / 6


def test_only_a_network_sees_a_difference_of_scale() -> None:
    z = RNG.normal(size=(600, 2)) * np.repeat([1.0, 6.0], 300)[:, None]
    labels = np.repeat([0, 1], 300)
    linear = environment_probe(z, labels, permutations=2, seed=0)
    network = environment_probe(z, labels, kind="network", permutations=2, seed=0)
    assert linear.accuracy < 0.65
    assert network.accuracy > 0.8


def test_units_do_not_matter_and_seeds_do_what_they_say() -> None:
    z = RNG.normal(size=(400, 3)) + np.eye(3)[CODES]
    first = environment_probe(z, NAMES, permutations=3, seed=5)
    assert environment_probe(z, NAMES, permutations=3, seed=5) == first
    assert environment_probe(1000 * z + 3, NAMES, permutations=3, seed=5).accuracy == pytest.approx(
        first.accuracy, abs=0.02
    )
    assert environment_probe(np.c_[z, np.ones(400)], NAMES, permutations=3, seed=5).accuracy == pytest.approx(
        first.accuracy, abs=0.02
    )


@pytest.mark.parametrize(
    ("z", "labels", "options", "message"),
    [
        (np.ones((4, 2)), ["a", "a", "b"], {}, r"z has shape \(4, 2\) and environment \(3,\)"),
        (np.ones((4, 2)), ["a"] * 4, {}, r"1 environment\(s\), with one cell: none: a probe needs two"),
        (np.ones((4, 2)), ["a", "a", "b", "c"], {}, "with one cell: 'b', 'c'"),
        (np.full((4, 2), np.nan), ["a", "a", "b", "b"], {}, "z holds nan"),
        (np.ones((4, 2)), ["a", "a", "b", "b"], {"kind": "tree"}, "kind is 'tree'"),
        (np.ones((4, 2)), ["a", "a", "b", "b"], {"test": 1.0}, r"test is 1\.0 and permutations 20"),
        (np.ones((4, 2)), ["a", "a", "b", "b"], {"permutations": 0}, "permutations 0"),
    ],
)
def test_arguments_that_make_no_probe_are_refused(z: object, labels: object, options: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        environment_probe(z, labels, seed=0, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["linear", "network"])
@pytest.mark.parametrize("values", [2, 8])
def test_a_probe_is_shown_to_learn_on_leaked_labels(kind: str, values: int) -> None:
    """Latents that know nothing, and the same with the label among them: at chance, and above 95 %."""
    labels = np.repeat(np.arange(values), 60)
    z = RNG.normal(size=(len(labels), 5))
    probe = environment_probe(z, labels, kind=kind, permutations=3, seed=0)  # type: ignore[arg-type]
    assert probe.accuracy == pytest.approx(1 / values, abs=0.15)
    assert probe.leaked > 0.95
    assert probe.learns


def test_a_probe_that_cannot_learn_says_so() -> None:
    """28 cells to train on against 3000 latents: near chance, with the label or without it, and so no evidence."""
    labels = np.repeat([0, 1], 20)
    probe = environment_probe(RNG.normal(size=(40, 3000)), labels, permutations=2, seed=0)
    assert not probe.learns


def test_environments_and_covariates_are_probed_each() -> None:
    batch = np.tile(["x", "y"], 200)
    z = RNG.normal(size=(400, 3)) + 4 * (batch == "x")[:, None]
    donors = np.array(["only"] * 400)
    rare = np.where(np.arange(400) == 7, "once", np.where(np.arange(400) % 2, "p", "q"))
    found = probes(z, {"environment": NAMES, "batch": batch, "donor": donors, "rare": rare}, permutations=5, seed=0)
    assert set(found) == {"environment", "batch", "rare"}  # a single value cannot be read; a single cell is left out
    assert found["batch"].accuracy > 0.95
    assert found["rare"].chance == pytest.approx(1 / 2, abs=0.15)
    assert found["environment"].accuracy <= found["environment"].upper + 0.05
    with pytest.raises(DataError, match=r"z has shape \(400, 3\) and batch \(2,\)"):
        probes(z, {"batch": ["x", "y"]}, seed=0)
