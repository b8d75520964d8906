"""Tables of the whole suite on real screens: models beside simple baselines and a noise ceiling, over several splits.

`compared` does one split and `joined` puts splits into one `Comparison`, so that verdicts are of all held-out
environments together. A ceiling is what the other half of the held-out cells says of the half that is scored: a
prediction free of noise could do better than it, one that is measured could not.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pyro_scm import evaluation
from pyro_scm.baselines import controls, environment_means
from pyro_scm.comparison import COLUMNS, Comparison
from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.data.single_cell import halves
from pyro_scm.data.splits import Split
from pyro_scm.mean_predictions import predict_means
from pyro_scm.run import Run

__all__ = ["CEILING", "compared", "joined", "judged", "reported", "seconds", "with_baselines"]

FloatArray: TypeAlias = NDArray[np.float64]

CEILING = "other half of the cells"
_MAIN = "delta_pearson"


def compared(split: Split, models: Mapping[str, Mapping[str, Any]], **options: Any) -> Comparison:
    """`pyro_scm.compare` on one split, with the noise ceiling and what follows from each model's predictions.

    ``"NAME, mean of members"`` is the mean prediction of the ensemble. ``"NAME, recentred"`` is the training mean's
    change plus the member's own deviation from its mean over the training environments: what a model knows of one
    environment beyond what all have in common. Both are of the kind ``"derived"``, which no verdict is about unless
    `judged` is asked for one.

    Args:
        split: see `pyro_scm.compare`.
        models: label -> options, ``"recipe"`` among them where the label is no recipe.
        **options: more of `pyro_scm.compare`.
    """
    found = evaluation.compare(split, models, **options)
    truth = _Truth(split, found.config["environments"], int(found.config["seed"]))
    rows = truth.rows(CEILING, "ceiling", -1, truth.other)
    for name, run in found.runs.items():
        change, recentred = truth.predicted(run, int(found.config["predicted_from"]))
        rows += truth.rows(f"{name}, mean of members", "derived", -1, change.mean(0))
        for seed, own in zip(run.seeds, recentred, strict=True):
            rows += truth.rows(f"{name}, recentred", "derived", seed, own)
    return replace(found, scores=pd.concat([found.scores, pd.DataFrame(rows, columns=COLUMNS)], ignore_index=True))


def with_baselines(comparison: Comparison, split: Split, names: Sequence[str], suffix: str = "") -> Comparison:
    """The comparison with further baselines, fitted to another split of the same held-out cells and references.

    Args:
        comparison: of `compared`.
        split: with more training cells, or with another representation.
        names: of `pyro_scm.baselines.BASELINES`.
        suffix: to tell them from others of these names.
    """
    own = evaluation.evaluate({}, split, baselines=names, seed=int(comparison.config["seed"])).scores
    own["model"] += suffix
    return replace(comparison, scores=pd.concat([own, comparison.scores], ignore_index=True))


class _Truth:
    """What `pyro_scm.compare` scores a split on: the same halves of held-out cells and of references.

    Args:
        split: whose held-out environments have 4 cells or more.
        environments: names of them.
        seed: of the halves.
    """

    def __init__(self, split: Split, environments: Sequence[str], seed: int) -> None:
        self.environments = list(environments)
        train = split.train
        references = train.subset(train.reference[train.env])
        _, kept = halves(references, seed)
        self.train = train.subset(~np.isin(_rows(train), _rows(kept)))
        depth = self.train.schema.summary.depth
        first, second = halves(split.test.of(*self.environments), seed)
        index = split.test.environment_index(*self.environments)
        self.truth = environment_means(second, depth)[0][index]
        self.control = controls(kept, self.environments, depth)
        self.depth = depth
        self.before = controls(self.train, self.environments, depth)
        self.other = environment_means(first, depth)[0][index] - self.before

    def rows(self, model: str, kind: str, seed: int, change: FloatArray) -> list[tuple[Any, ...]]:
        """Scores of predicted changes ``[E, G]``."""
        return [
            (model, kind, seed, name, metric, value)
            for name, true, control, own in zip(self.environments, self.truth, self.control, change, strict=True)
            for metric, value in evaluation.score(true, control + own, control).items()
        ]

    def predicted(self, run: Run, cells: int) -> tuple[FloatArray, FloatArray]:
        """Changes ``[K, E, G]`` as each member predicts them, and recentred on the training environments."""
        train, table, held_out = self.train, self.train.environments, len(self.environments)
        trained = [str(table.index[e]) for e in train.present if not train.reference[e]]
        asked = [*self.environments, *trained]
        change = predict_means(run, train, asked, cells=cells) - controls(train, asked, self.depth)
        measured = environment_means(train, self.depth)[0][train.environment_index(*trained)]
        common = (measured - controls(train, trained, self.depth)).mean(0)
        own, theirs = change[:, :held_out], change[:, held_out:]
        return own, common + own - theirs.mean(1, keepdims=True)


def _rows(cells: EnvironmentDataset) -> NDArray[np.int64]:
    return np.arange(len(cells)) if cells.origin is None else cells.origin


def joined(parts: Sequence[Comparison]) -> Comparison:
    """Comparisons of several splits, each environment held out in one, as one."""
    scores = pd.concat([part.scores for part in parts], ignore_index=True)
    units = {name: own for part in parts for name, own in part.config.get("units", {}).items()}
    return Comparison(scores, config={**parts[0].config, "units": units})


def seconds(parts: Sequence[Comparison]) -> pd.DataFrame:
    """Wall time of a model's ensemble: mean over splits, seconds a fit of all members."""
    rows = [
        {"model": name, "members": len(run.seeds), "seconds": run.history.groupby("epoch")["seconds"].first().sum()}
        for part in parts
        for name, run in part.runs.items()
    ]
    table = (
        pd.DataFrame(rows).groupby("model", sort=False).agg(members=("members", "first"), seconds=("seconds", "mean"))
    )
    return table.assign(seconds_a_member=table["seconds"] / table["members"])


def judged(comparison: Comparison, names: Sequence[str]) -> pd.DataFrame:
    """The gate for a few models or derived predictions that were chosen beforehand, which share its 5 % alone.

    Twelve models need nine environments for a verdict and one needs six: where there are few, choose first.
    """
    scores = comparison.scores[comparison.scores["model"].isin(names) | (comparison.scores["kind"] == "baseline")]
    kind = scores["kind"].where(scores["kind"] == "baseline", "model")
    return Comparison(scores.assign(kind=kind), config=comparison.config).gate(_MAIN).set_index("model")


def reported(
    name: str, parts: Sequence[Comparison], chosen: Sequence[str]
) -> tuple[dict[str, pd.DataFrame], dict[str, Any]]:
    """Tables and figure of one question: summary, verdicts, each environment's scores, and seconds of the fits.

    Args:
        name: of the question; tables are called after it.
        parts: one comparison a split.
        chosen: see `judged`.
    """
    both = joined(parts)
    main = both.scores[both.scores["metric"] == _MAIN]
    means = main.groupby(["model", "environment"], sort=False)["value"].mean().unstack("environment")
    verdict = both.gate(_MAIN).set_index("model").assign(of="all models")
    tables = {
        f"{name}_summary": both.brief((_MAIN, "delta_r2", "rmse", "delta_pearson_deg", "rank")),
        f"{name}_gate": pd.concat([verdict, judged(both, chosen).assign(of="chosen beforehand")]),
        f"{name}_environments": means.loc[main["model"].unique()],
        f"{name}_seconds": seconds(parts),
    }
    return tables, {name: both.figure()}
