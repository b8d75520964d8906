"""What a table asks: conditions that training has not seen, and what predictions of them are scored on."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from pyro_scm import metrics
from pyro_scm.baselines import BASELINES, Baseline, MeanAlike, Ridge, controls, environment_means
from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.data.single_cell import halves
from pyro_scm.data.splits import Split
from pyro_scm.evaluation import score

__all__ = ["Fitted", "Question", "alike", "asked", "inner", "simple"]

FloatArray: TypeAlias = NDArray[np.float64]
Fitted: TypeAlias = Callable[[EnvironmentDataset], Baseline]


@dataclass(frozen=True, eq=False)
class Question:
    """Held-out conditions.

    Args:
        train: training cells, without the control cells that are scored against.
        names: E conditions.
        truth: ``[E, G]`` mean expression.
        control: ``[E, G]`` of control cells that are not in training.
        genes: ``[E, top]`` columns of the genes that differ most.
        before: ``[E, G]`` control that predictions start from.
        other: ``[E, G]`` change of the other half of the held-out cells: a noise ceiling. None where all are scored.
        offset: ``[E, G]`` what was taken from expression before, and makes r2 of the mean what it is in publications.
    """

    train: EnvironmentDataset
    names: tuple[str, ...]
    truth: FloatArray
    control: FloatArray
    genes: NDArray[np.int64]
    before: FloatArray
    other: FloatArray | None = None
    offset: FloatArray | float = 0.0

    def rows(self, name: str, kind: str, seed: int, change: FloatArray) -> list[tuple[Any, ...]]:
        """Rows of `Comparison.scores` of predicted changes ``[E, G]``."""
        rank = metrics.perturbation_rank(self.truth - self.control, change)
        truth, control = self.truth + self.offset, self.control + self.offset
        found = []
        for i, environment in enumerate(self.names):
            values = score(truth[i], control[i] + change[i], control[i], self.genes[i])
            found += [(name, kind, seed, environment, m, v) for m, v in {**values, "rank": float(rank[i])}.items()]
        return found

    def pearson(self, change: FloatArray) -> float:
        """Mean over conditions of the correlation of true and predicted change; an undefined one counts as 0."""
        truth = self.truth - self.control
        found = [metrics.delta_pearson(t, c, np.zeros_like(t)) for t, c in zip(truth, change, strict=True)]
        return float(np.nan_to_num(found).mean())

    @property
    def units(self) -> dict[str, list[str]]:
        """Doses and times of one perturbation are no cases of their own, and parts are shared: `Comparison.gate`."""
        table = self.train.environments.loc[list(self.names)]
        lines = table["cell_line"].astype(str)
        return {
            str(n): [f"{part} {line}" for part in str(p).split("+")]
            for n, p, line in zip(table.index, table["perturbation"], lines, strict=True)
        }


def asked(split: Split, top: int = 50, references: EnvironmentDataset | None = None, seed: int = 0) -> Question:
    """What a split asks: where each condition has 4 cells, half of them name its differential genes, half are scored.

    With fewer all cells are scored and name the genes too, as in the published tables.

    Args:
        split: of training and test cells.
        top: differential genes.
        references: control cells to score against; half of the training ones by default, which then leave training.
        seed: of the halves.
    """
    train, test = split.train, split.test
    if references is None:
        own = train.subset(train.reference[train.env])
        _, references = halves(own, seed)
        train = train.subset(~np.isin(np.asarray(train.origin), np.asarray(references.origin)))
    names = tuple(
        str(n) for n in test.environments.index[test.present] if not test.reference[test.environment_index(str(n))[0]]
    )
    first = scored = test
    halved = np.bincount(test.env)[test.environment_index(*names)].min() >= 4
    if halved:
        first, scored = halves(test, seed)
    depth = train.schema.summary.depth
    index = test.environment_index(*names)
    control, before = controls(references, names, depth), controls(train, names, depth)
    half = environment_means(first, depth)[0][index]
    return Question(
        train=train,
        names=names,
        truth=environment_means(scored, depth)[0][index],
        control=control,
        genes=np.argsort(-np.abs(half - control) / _spread(train, depth), axis=1, kind="stable")[:, :top],
        before=before,
        other=half - before if halved else None,
    )


def _spread(train: EnvironmentDataset, depth: float) -> FloatArray:
    """``[G]`` standard deviation of control cells, never 0."""
    values: Any = train.subset(train.reference[train.env]).normalised(depth)
    dense = np.asarray(values if isinstance(values, np.ndarray) else values.toarray(), np.float64)
    found: FloatArray = dense.std(axis=0)
    return found + max(float(np.median(found)), 1e-6)


def inner(
    question: Question, names: Sequence[str], top: int = 50, references: EnvironmentDataset | None = None
) -> Question:
    """The same question about training conditions, to choose by, with as much kept apart.

    Scored against controls that are trained on too, a choice would fall on whatever repeats their noise.

    Args:
        question: whose training cells are split.
        names: training conditions to hold out.
        top: differential genes.
        references: see `asked`.
    """
    train = question.train
    held = np.isin(train.env, train.environment_index(*names))
    return asked(Split(train.subset(~held), None, train.subset(held)), top, references)


# ---------------------------------------------------------------------- what is simple
def alike(*columns: str) -> Fitted:
    """A further baseline: the mean of the training conditions that agree in these columns (`MeanAlike`)."""
    return lambda train: MeanAlike(columns).fit(train)


def simple(
    question: Question, further: Mapping[str, Fitted], recentre: Sequence[str]
) -> tuple[dict[str, Baseline], dict[str, FloatArray]]:
    """The suite's baselines and further ones, fitted, and the changes ``[E, G]`` that they predict.

    Ridge stands there recentred as well, and halfway to the baseline that it is recentred on, as models do: what
    recentring and averaging give is not to be taken for what a model knows.

    Args:
        question: what is asked.
        further: name -> how it is fitted to training cells.
        recentre: names of baselines that ridge is recentred on too.
    """
    made = {name: kind().fit(question.train) for name, kind in BASELINES.items()}
    made |= {name: fitted(question.train) for name, fitted in further.items()}
    changes = {name: b.predict(question.names) - question.before for name, b in made.items()}
    ridge = made["ridge"]
    assert isinstance(ridge, Ridge)
    seen = ridge.predict(ridge.trained_names)
    for name in recentre:
        if name != "ridge":
            whole = changes["ridge"] + made[name].of_rest(seen, question.names)
            changes |= {f"ridge on {name}": whole, f"ridge half on {name}": (whole + changes[name]) / 2}
    return made, changes
