"""Simple baselines: predictions of an unseen environment's mean expression that a model has to beat.

Each is fitted to training cells and predicts control + change, where the control is the mean of the training reference
cells of the environment's own context (time and cell line), and the change is all that tells the baselines apart.
Expression is normalised as in `EnvironmentDataset.normalised`, at the training cells' median library size.
"""

import copy
from collections.abc import Hashable, Sequence
from typing import Any, Self, TypeAlias, cast

import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray

from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.errors import DataError, ModelError, listing

__all__ = [
    "BASELINES",
    "Additive",
    "Baseline",
    "MeanAlike",
    "NearestEnvironment",
    "NoChange",
    "Ridge",
    "TrainingMean",
    "controls",
    "environment_means",
    "matched_references",
]

FloatArray: TypeAlias = NDArray[np.float64]

_CONTEXT = ("time", "cell_line")
_SEPARATOR = "+"
_ALPHAS = tuple(10.0 ** (k / 2) for k in range(-8, 9))
_TIED = 1e-9  # similarities closer than this are equal: the order of environments must not decide


# ---------------------------------------------------------------------- controls
def matched_references(cells: EnvironmentDataset, environments: Sequence[str]) -> list[tuple[int, ...]]:
    """References with cells that each environment is compared with: those of its time and cell line, else all.

    Args:
        cells: with reference cells.
        environments: names.

    Returns:
        Row numbers in the environment table, for each name.

    Raises:
        DataError: an unknown environment, or no reference cells.
    """
    index = cells.environment_index(*environments)
    present = [int(e) for e in cells.present if cells.reference[e]]
    if not present:
        raise DataError(
            "no cells of a reference environment: there is no control to predict a change from; keep the unperturbed "
            "cells in training, or name them with control= when the data are read"
        )
    contexts = _contexts(cells)
    own: dict[Hashable, list[int]] = {}
    for e in present:
        own.setdefault(contexts[e], []).append(e)
    return [tuple(own.get(contexts[e], present)) for e in index]


def controls(cells: EnvironmentDataset, environments: Sequence[str], depth: float | None = None) -> FloatArray:
    """Mean normalised expression of the reference cells that each environment is compared with.

    Args:
        cells: with reference cells.
        environments: names.
        depth: counts a cell is scaled to; by default the median library size of these cells.

    Returns:
        ``[len(environments), G]``.

    Raises:
        DataError: an unknown environment, or no reference cells.
    """
    references = matched_references(cells, environments)
    means, counts = environment_means(cells.subset(cells.reference[cells.env]), depth or cells.schema.summary.depth)
    return _pooled(means, counts, references)


def environment_means(cells: EnvironmentDataset, depth: float) -> tuple[FloatArray, NDArray[np.int64]]:
    """Mean normalised expression and number of cells of every environment of the table.

    Args:
        cells: N cells.
        depth: counts a cell is scaled to.

    Returns:
        ``[E, G]``, NaN where an environment has no cells, and ``[E]``.
    """
    number = len(cells.environments)
    counts = np.bincount(cells.env, minlength=number)
    sums = np.zeros((number, len(cells.genes)))
    for start, values in cells.normalised_blocks(depth):
        env = cells.env[start : start + values.shape[0]]
        member = sp.csr_matrix((np.ones(len(env)), (env, np.arange(len(env)))), shape=(number, len(env)))
        product: Any = member @ values.astype(np.float64)
        sums += product if isinstance(product, np.ndarray) else product.toarray()
    with np.errstate(invalid="ignore"):
        return sums / np.where(counts > 0, counts, np.nan)[:, None], counts


def _pooled(means: FloatArray, counts: NDArray[np.int64], references: Sequence[tuple[int, ...]]) -> FloatArray:
    """Mean over all cells of each set of environments."""
    known = {r: np.average(means[list(r)], axis=0, weights=counts[list(r)]) for r in set(references)}
    return np.array([known[r] for r in references]).reshape(len(references), means.shape[1])


def _contexts(cells: EnvironmentDataset) -> list[tuple[Hashable, ...]]:
    """Time and cell line of every environment; what is not known is a value of its own."""
    columns = [cells.environments[name] for name in _CONTEXT]
    return [tuple(None if pd.isna(v) else v for v in row) for row in zip(*columns, strict=True)]


# ---------------------------------------------------------------------- the baselines
class Baseline:
    """Abstract: control + change; a subclass gives `_change`, and `_learn` where it learns more than mean changes."""

    def fit(self, train: EnvironmentDataset) -> Self:
        """Learn from training cells.

        Args:
            train: cells of reference and perturbed environments.

        Raises:
            DataError: no reference cells, or no perturbed ones for a baseline that needs them.
        """
        self.known = train.subset(np.empty(0, np.int64))  # the table of environments, without the cells
        self.reference, self.contexts = train.reference, _contexts(train)
        self.representation = train.representation.astype(np.float64)
        means, counts = environment_means(train, train.schema.summary.depth)
        self.control = _pooled(means, counts, matched_references(train, [str(n) for n in train.environments.index]))
        self.trained = train.present[~self.reference[train.present]]
        self.cells = counts[self.trained]
        self.changes = means[self.trained] - self.control[self.trained]
        self._learn()
        return self

    def predict(self, environments: Sequence[str]) -> FloatArray:
        """Mean normalised expression in the named environments, ``[len(environments), G]``.

        A reference environment is predicted to be its control.

        Raises:
            DataError: no such environment in the table of the training cells.
            ModelError: not fitted.
        """
        if not hasattr(self, "control"):
            raise ModelError(f"{type(self).__name__} is not fitted: call fit(train) first")
        index = self.known.environment_index(*environments)
        return self.control[index] + self._of(index)

    def of_rest(self, predicted: FloatArray, environments: Sequence[str]) -> FloatArray:
        """What the baseline says of the named environments when it is told what a model missed in training.

        It is fitted anew to measured - predicted change of the training environments in place of the change. Added to
        the model's prediction, this makes of a model that knows nothing the baseline itself, and leaves of a model
        whatever the baseline cannot say.

        Args:
            predicted: ``[T, G]`` a model's mean normalised expression in the T training environments, in the order of
                `trained_names`.
            environments: names.

        Returns:
            ``[len(environments), G]``, 0 in reference environments.

        Raises:
            DataError: no such environment, or predictions of another shape.
        """
        if predicted.shape != self.changes.shape:
            raise DataError(
                f"predictions of shape {predicted.shape} for {self.changes.shape[0]} training environments and "
                f"{self.changes.shape[1]} genes: give one row for each of trained_names, in their order"
            )
        rest = copy.copy(self)
        rest.changes = self.changes + self.control[self.trained] - predicted
        rest._learn()
        return rest._of(self.known.environment_index(*environments))

    @property
    def trained_names(self) -> list[str]:
        """The T perturbed environments that have training cells."""
        return [str(self.known.environments.index[e]) for e in self.trained]

    def _of(self, index: NDArray[np.int64]) -> FloatArray:
        """Changes of environments by row number; none of a reference."""
        result = np.zeros((len(index), self.control.shape[1]))
        for row, e in zip(result, index.tolist(), strict=True):
            if not self.reference[e]:
                row += self._change(e)
        return result

    def _learn(self) -> None:
        """Nothing beyond the mean changes."""

    def _change(self, environment: int) -> FloatArray:
        """Predicted change ``[G]`` from control of one environment, by its row number."""
        raise NotImplementedError  # abstract

    def _need_perturbed(self) -> None:
        if not len(self.trained):
            raise DataError(
                f"{type(self).__name__}: there are no perturbed training cells to learn a change from: hold out fewer "
                "environments"
            )

    def _typical(self, environment: int) -> FloatArray:
        """Mean of the training environments' changes, in the context of an environment where there are any."""
        own = [self.contexts[e] == self.contexts[environment] for e in self.trained]
        mean: FloatArray = self.changes[np.array(own) if any(own) else np.ones(len(own), bool)].mean(axis=0)
        return mean


class NoChange(Baseline):
    """mean_e = control: what a model must beat to know anything about perturbations."""

    def _change(self, environment: int) -> FloatArray:
        return np.zeros(self.control.shape[1])


class TrainingMean(Baseline):
    """mean_e = control + mean over perturbed training environments of (their mean - their control), each counting once.

    Of the environments of the same time and cell line, or of all where training has none of those. Knows nothing of the
    perturbation, and is hard to beat where most perturbations do much the same (Ahlmann-Eltze et al. 2025).
    """

    def _learn(self) -> None:
        self._need_perturbed()

    def _change(self, environment: int) -> FloatArray:
        return self._typical(environment)


class MeanAlike(Baseline):
    """mean_e = control + mean change of the training environments that agree with e in columns of the table.

    ``("perturbation", "time")`` is the mean of a drug's other doses at that time, ``("dose",)`` of all drugs at that
    dose. The columns count in turn, and each is passed over where no training environment would be left.

    Args:
        columns: of the environment table; none for the mean of all.
    """

    def __init__(self, columns: Sequence[str] = ()) -> None:
        self.columns = tuple(columns)

    def _learn(self) -> None:
        self._need_perturbed()
        table = self.known.environments
        unknown = [name for name in self.columns if name not in table]
        if unknown:
            raise DataError(f"the environments have no {listing(unknown)}: use some of {listing(table, 20)}")
        self.keys = [table[name].astype(str).tolist() for name in self.columns]

    def _change(self, environment: int) -> FloatArray:
        chosen = list(range(len(self.trained)))
        for key in self.keys:
            chosen = [t for t in chosen if key[self.trained[t]] == key[environment]] or chosen
        mean: FloatArray = self.changes[chosen].mean(axis=0)
        return mean


class Additive(Baseline):
    """mean_{A+B} = control + change_A + change_B, the changes of single perturbations seen in training.

    Where training has a part in several environments, those of the same cell line and time are taken as far as there
    are any, of these the ones of the nearest dose, and averaged. A part that training has not seen alone is given the
    change of `TrainingMean`: an unseen perturbation which is no combination is predicted as `TrainingMean` does, and
    one that was seen at another dose or in another cell line as it was there. Parts that name a reference (``A+ctrl``)
    add nothing.
    """

    def _learn(self) -> None:
        self._need_perturbed()
        table = self.known.environments
        names = [str(name) for name in table["perturbation"]]
        unperturbed = {name for name, reference in zip(names, self.reference, strict=True) if reference}
        self.parts = [
            [(part, dose) for part, dose in _parts(name, given) if part not in unperturbed]
            for name, given in zip(names, table["dose"], strict=True)
        ]
        self.singles: dict[str, list[int]] = {}
        for i, e in enumerate(self.trained.tolist()):
            if len(self.parts[e]) == 1:
                self.singles.setdefault(self.parts[e][0][0], []).append(i)

    def _change(self, environment: int) -> FloatArray:
        total = np.zeros(self.control.shape[1])
        for part, dose in self.parts[environment]:
            total += self._single(environment, part, dose)
        return total

    def _single(self, environment: int, part: str, dose: float) -> FloatArray:
        chosen = self.singles.get(part, [])
        if not chosen:
            return self._typical(environment)
        for column in (1, 0):  # the cell line tells more than the time
            place = self.contexts[environment][column]
            chosen = [i for i in chosen if self.contexts[self.trained[i]][column] == place] or chosen
        far = np.array([abs(self.parts[self.trained[i]][0][1] - dose) for i in chosen])
        far = np.where(np.isnan(far), np.inf, far)
        mean: FloatArray = self.changes[np.array(chosen)[far <= far.min() + _TIED]].mean(axis=0)
        return mean


def _parts(perturbation: str, dose: object) -> list[tuple[str, float]]:
    """Parts of a combination with log(1 + dose) of each, NaN where it is not known."""
    names = perturbation.split(_SEPARATOR)
    amounts = [float(d) for d in dose.split(_SEPARATOR)] if isinstance(dose, str) else [cast("float", dose)]
    if len(amounts) == 1:
        amounts *= len(names)
    if len(amounts) != len(names):
        amounts = [np.nan] * len(names)
    return [(name, float(np.log1p(amount))) for name, amount in zip(names, amounts, strict=True)]


class Ridge(Baseline):
    """mean_e = control + b + r_e W, (b, W) minimising sum_e w_e |change_e - b - r_e W|^2 + alpha |W|^2.

    The constant b is not penalised, so that a large alpha gives the mean of the training changes. Weights are
    w_e = sqrt(cells of e), scaled to mean 1: between those for noise of the environments' means alone (cells) and for
    what the representation cannot explain alone (equal). alpha is the one of smallest leave-one-environment-out error,
    exact from the residuals and leverages of one singular value decomposition (Golub, Heath and Wahba 1979).

    Args:
        alphas: grid, in units of the mean squared distance of the representations from their mean.
    """

    def __init__(self, alphas: Sequence[float] = _ALPHAS) -> None:
        if not alphas or min(alphas) <= 0:
            raise ModelError(f"alphas {listing(alphas)}: give positive penalties")
        self.alphas = tuple(alphas)

    def _learn(self) -> None:
        self._need_perturbed()
        weight = np.sqrt(self.cells) / np.sqrt(self.cells).mean()
        share = weight / weight.sum()
        design, root = self.representation[self.trained], np.sqrt(weight)[:, None]
        self.centre, typical = share @ design, share @ self.changes
        target = root * (self.changes - typical)
        left, singular, right = np.linalg.svd(root * (design - self.centre), full_matrices=False)
        rotated, unit = left.T @ target, float(np.sum(singular**2)) / len(design) or 1.0
        best = np.inf
        for alpha in self.alphas:
            kept = singular**2 / (singular**2 + alpha * unit)
            residual = target - (left * kept) @ rotated
            leverage = np.minimum(share + (left**2) @ kept, 1 - 1e-12)  # a lone environment has leverage 1
            error = float(np.sum((residual / (1 - leverage)[:, None]) ** 2))
            if error < best:
                best, self.alpha = error, alpha * unit
        self.weights = right.T @ ((singular / (singular**2 + self.alpha))[:, None] * rotated)
        self.intercept = typical - self.centre @ self.weights

    def _change(self, environment: int) -> FloatArray:
        change: FloatArray = self.intercept + self.representation[environment] @ self.weights
        return change


class NearestEnvironment(Baseline):
    """mean_e = control + change of the training environment whose representation is most similar to that of e.

    Similarity is Tanimoto's, sum_f min(r_f, s_f) / sum_f max(r_f, s_f), where no representation has a negative entry
    (fingerprints, one-hot), otherwise the cosine. Environments that are equally near are averaged: with one-hot rows
    all are, and the prediction is the mean over all of training.
    """

    def _learn(self) -> None:
        self._need_perturbed()
        self.near = self.representation[self.trained]
        self.tanimoto = bool((self.representation >= 0).all())

    def _change(self, environment: int) -> FloatArray:
        row = self.representation[environment]
        if self.tanimoto:
            common = np.minimum(self.near, row).sum(axis=1)
            size = self.near.sum(axis=1) + row.sum() - common
        else:
            common = self.near @ row
            size = np.linalg.norm(self.near, axis=1) * np.linalg.norm(row)
        similarity = np.divide(common, size, out=np.zeros(len(size)), where=size > 0)
        mean: FloatArray = self.changes[similarity >= similarity.max() - _TIED].mean(axis=0)
        return mean


BASELINES: dict[str, type[Baseline]] = {
    "no_change": NoChange,
    "training_mean": TrainingMean,
    "additive": Additive,
    "ridge": Ridge,
    "nearest": NearestEnvironment,
}
"""Baselines by name, in the order of a table."""
