"""A trained probe: how well environments or covariates of held-out cells can be read off their latents."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pyro_scm.errors import DataError, listing
from pyro_scm.metrics.arguments import FloatArray, IntArray, finite, one_of

LEARNT = 0.95
"""Balanced accuracy on leaked labels above which a probe is trusted to find what there is."""


class Probe(NamedTuple):
    """Balanced accuracy of a probe on held-out cells, and what it is where latents know nothing of the environment.

    Lower is better for latents that should be free of the environment; chance is the best they can do.
    """

    accuracy: float
    """Mean over environments of the share of their held-out cells that are recognised."""
    chance: float
    """Mean of the same after permuting which environment each cell is in, with the probe trained anew."""
    upper: float
    """Largest of the permuted accuracies."""
    p_value: float
    """Share of permutations that do as well, (1 + count) / (1 + permutations)."""
    leaked: float
    """Accuracy of the same probe on the same cells where the label itself is among the latents (one-hot)."""

    @property
    def learns(self) -> bool:
        """Whether the probe finds a leaked label (above 0.95): if not, an accuracy near chance shows nothing."""
        return self.leaked > LEARNT


def environment_probe(
    z: ArrayLike,
    environment: ArrayLike,
    *,
    kind: Literal["linear", "network"] = "linear",
    test: float = 0.3,
    permutations: int = 20,
    seed: int,
) -> Probe:
    """Train a classifier of environments on some cells and score it on others.

    Lower is better for latents that should be free of the environment (a basal state, a counterfactual code), higher
    for latents that should show it. Environments weigh alike in training and score, whatever their number of cells. A
    linear probe at chance does not show independence: a network may find what it missed. That the probe can learn on
    these cells is shown by a positive control, `Probe.leaked`: with too few cells for so many latents it does not.

    Args:
        z: Latents of cells, shape [n, d].
        environment: Environment of each cell, or its category of a covariate, shape [n]; each with 2 cells or more.
        kind: ``"linear"`` (logistic regression) or ``"network"`` (one hidden layer of 64).
        test: Share of each environment's cells that are held out, in (0, 1).
        permutations: Number of trainings with permuted environments, 1 or more.
        seed: Of the split, the permutations and the network.

    Returns:
        Accuracy, level of chance, its upper end, a p-value, and the accuracy on leaked labels.

    Raises:
        DataError: arguments of other shapes, one environment only, or an environment of one cell.

    Source: Alain and Bengio 2016, "Understanding intermediate layers using linear classifier probes".
    """
    latents = finite(z, "z", 2)
    names, labels = np.unique(np.asarray(environment).astype(str), return_inverse=True)
    if labels.shape != latents.shape[:1]:
        raise DataError(f"z has shape {latents.shape} and environment {labels.shape}: expected (n, d) and (n,)")
    few = [str(n) for n in names[np.bincount(labels) < 2]]
    if len(names) < 2 or few:
        raise DataError(
            f"{len(names)} environment(s), with one cell: {listing(few) or 'none'}: a probe needs two environments or "
            "more of two cells or more; leave small ones out"
        )
    one_of(kind, "kind", ("linear", "network"))
    if not 0.0 < test < 1.0 or permutations < 1:
        raise DataError(f"test is {test} and permutations {permutations}: expected a share in (0, 1) and 1 or more")
    rng = np.random.default_rng(seed)
    accuracy = _score(latents, labels, kind, test, rng)
    permuted = np.array([_score(latents, rng.permutation(labels), kind, test, rng) for _ in range(permutations)])
    leaked = np.concatenate([latents, np.eye(len(names))[labels]], axis=1)
    return Probe(
        accuracy=accuracy,
        chance=float(permuted.mean()),
        upper=float(permuted.max()),
        p_value=float((1 + np.sum(permuted >= accuracy)) / (1 + permutations)),
        leaked=_score(leaked, labels, kind, test, rng),
    )


def probes(
    z: ArrayLike,
    labels: Mapping[str, ArrayLike],
    *,
    kind: Literal["linear", "network"] = "linear",
    test: float = 0.3,
    permutations: int = 20,
    seed: int,
) -> dict[str, Probe]:
    """`environment_probe` of several labels of the same cells: environments, cell lines, batches.

    Lower is better for latents that should be free of a label. A label of which all cells have the same value is left
    out, for there is nothing to read.

    Args:
        z: Latents of cells, shape [n, d].
        labels: Name -> value of each cell, shape [n]; values of a single cell are left out with their cell.
        kind: see `environment_probe`.
        test: see `environment_probe`.
        permutations: see `environment_probe`.
        seed: see `environment_probe`.

    Returns:
        Probe of each label that has two values or more with two cells or more.

    Raises:
        DataError: see `environment_probe`.
    """
    latents, found = finite(z, "z", 2), {}
    for name, values in labels.items():
        label = np.asarray(values).astype(str)
        if label.shape != latents.shape[:1]:
            raise DataError(f"z has shape {latents.shape} and {name} {label.shape}: expected (n, d) and (n,)")
        _, place, counts = np.unique(label, return_inverse=True, return_counts=True)
        kept = counts[place] >= 2
        if len(np.unique(label[kept])) >= 2:
            found[name] = environment_probe(
                latents[kept], label[kept], kind=kind, test=test, permutations=permutations, seed=seed
            )
    return found


def _score(z: FloatArray, labels: IntArray, kind: str, test: float, rng: np.random.Generator) -> float:
    """Balanced accuracy of a probe trained on one part of the cells, on the other."""
    import warnings

    from sklearn.exceptions import ConvergenceWarning

    training, held_out = _split(labels, test, rng)
    mean, scale = z[training].mean(0), z[training].std(0)
    standard = (z - mean) / np.where(scale > 0, scale, 1.0)
    rows = _evened(training, labels, rng)
    probe = _classifier(kind, int(rng.integers(2**31)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a probe that needs longer is scored as it stands
        probe.fit(standard[rows], labels[rows])
    right = probe.predict(standard[held_out]) == labels[held_out]
    cells = np.bincount(labels[held_out])
    return float(np.mean(np.bincount(labels[held_out], weights=right) / cells))


def _split(labels: IntArray, test: float, rng: np.random.Generator) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Rows to train on and rows held out, one or more of each environment in both."""
    training, held_out = [], []
    for e in range(int(labels.max()) + 1):
        rows = rng.permutation(np.flatnonzero(labels == e))
        cut = min(max(1, round(test * len(rows))), len(rows) - 1)
        held_out.append(rows[:cut])
        training.append(rows[cut:])
    return np.concatenate(training), np.concatenate(held_out)


def _evened(rows: NDArray[np.intp], labels: IntArray, rng: np.random.Generator) -> NDArray[np.intp]:
    """As many rows of each environment, as many as there are in all."""
    environments = int(labels.max()) + 1
    size = max(1, len(rows) // environments)
    parts = []
    for e in range(environments):
        own = rows[labels[rows] == e]
        parts.append(rng.permutation(own)[:size] if len(own) >= size else rng.choice(own, size))
    return np.concatenate(parts)


def _classifier(kind: str, seed: int) -> Any:
    from sklearn.linear_model import LogisticRegression
    from sklearn.neural_network import MLPClassifier

    if kind == "linear":
        return LogisticRegression(max_iter=200)
    return MLPClassifier((64,), max_iter=100, early_stopping=False, random_state=seed)
