"""Conditions beyond a run's table: another dose, the parts of a combination; and how far they are from training.

A condition is a row of the environments' representation. What is new about one decides how far a prediction for it can
be trusted: `novelty` says it in words and numbers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from pyro_scm.batch import DOSE, PART
from pyro_scm.composition import Columns
from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.errors import DataError, ModelError, listing
from pyro_scm.run import Environments, Run

__all__ = [
    "SEPARATOR",
    "alone_at",
    "at_dose",
    "entered",
    "novelty",
    "part_doses",
    "parts",
    "perturbations",
    "single_dose",
    "singles",
]

Row: TypeAlias = NDArray[np.float32]

SEPARATOR = "+"
_LOG_DOSE = "log10(1 + dose)"
_UNKNOWN = f"{_LOG_DOSE} unknown"
_NAMED = "perturbation="
_USUAL = 0.95  # quantile of training conditions' distances to their own nearest
_NEAR = 1e-4


# ---------------------------------------------------------------------- conditions by name
def parts(table: pd.DataFrame) -> list[tuple[str, ...]]:
    """The perturbations that each environment combines; none in a reference, and parts that name one do not count.

    Args:
        table: of environments; ``A+ctrl`` is A alone where ctrl is a reference.
    """
    references = {str(n) for n, ref in zip(table["perturbation"], table["is_reference"], strict=True) if ref}
    return [
        () if ref else tuple(part for part in str(name).split(SEPARATOR) if part not in references)
        for name, ref in zip(table["perturbation"], table["is_reference"], strict=True)
    ]


def perturbations(run: Run) -> dict[str, list[int]]:
    """Single perturbations that the run's table has, each with the rows of its environments, by dose.

    Args:
        run: from `fit` or `load`.
    """
    table = run.environments.table
    found: dict[str, list[int]] = {}
    for i, own in enumerate(parts(table)):
        if len(own) == 1:
            found.setdefault(own[0], []).append(i)
    return {name: sorted(rows, key=lambda i: single_dose(table["dose"].iloc[i])) for name, rows in found.items()}


def single_dose(value: Any) -> float:
    """A dose of the environment table in uM; NaN where it is not known, or is that of a combination."""
    return float("nan") if value is None or isinstance(value, str) else float(value)


def at_dose(run: Run, environment: str, dose: float) -> Row:
    """``[F]`` representation of an environment of a single perturbation at another dose.

    Args:
        run: whose representation tells doses: ``"multi-dose"``, ``"multi-hot"``, ``"molecules"`` or ``"dose"``.
        environment: name of one of its environments.
        dose: uM, 0 or more.

    Raises:
        DataError: an unknown environment, a combination or reference, or a dose that is none.
        ModelError: a representation that does not look at doses.
    """
    if not 0 <= dose < float("inf"):
        raise DataError(f"dose {dose}: give a dose in uM, 0 or more")
    e = run.environments.index(environment)
    own = run.environments.table.iloc[e]
    if isinstance(own["dose"], str) or len(parts(run.environments.table)[e]) != 1:
        raise DataError(f"{environment!r} is a reference or a combination: name one perturbation to give another dose")
    row: Row = run.environments.representation[e].copy()
    known = single_dose(own["dose"])
    changed = False
    for i, name in enumerate(run.schema.features):
        head = name.partition(": ")[2] if name.startswith(PART) else name
        present = row[i] != 0
        if name.startswith(DOSE) and present:
            row[i], changed = dose, True
        elif _holds_dose(name, head, float(row[i]), known):
            row[i], changed = np.log10(1 + dose), True
        elif head == _UNKNOWN:
            row[i] = 0
    if not changed:
        raise ModelError(
            f"the representation of {environment!r} does not hold its dose: fit with doses in 'multi-dose', "
            "'multi-hot', 'molecules' or 'dose'"
        )
    return row


def _holds_dose(name: str, head: str, value: float, known: float) -> bool:
    """Whether a feature is log10(1 + dose): of a named perturbation, or of a part that is there."""
    if name.startswith(_NAMED):
        return value != 0 and abs(value - np.log10(1 + known)) < _NEAR
    return head == _LOG_DOSE and (value != 0 or not name.startswith(PART))


def singles(run: Run, environment: str) -> dict[str, Row]:
    """The parts of a combination, each alone: name -> ``[F]`` representation, in the combination's context.

    A part's own environment at its dose, where the table has it; else taken from the combination's representation,
    where this keeps parts apart (``"multi-dose"``, ``"multi-hot"``, ``"molecules"``); else the part at another dose.

    Args:
        run: from `fit` or `load`.
        environment: name of a combination.

    Raises:
        DataError: an unknown environment, one that is no combination, or a part that nothing describes.
    """
    e = run.environments.index(environment)
    table, representation = run.environments.table, run.environments.representation
    names = parts(table)[e]
    if len(names) < 2:
        raise DataError(f"{environment!r} is no combination: name one such as 'A+B'")
    row, columns = representation[e], Columns.of(run.schema)
    slots = _slots(run.schema.features)
    found: dict[str, Row] = {}
    for name, dose in zip(names, part_doses(table, e), strict=True):
        alone = row.copy()
        measured = alone_at(table, name, dose, e)
        if measured >= 0:
            alone = representation[measured]
        elif name in columns.perturbations:
            alone[list(columns.perturbations.values())] = 0
            alone[columns.perturbations[name]] = row[columns.perturbations[name]]
        elif len(slots) >= len(names):
            for slot in slots:
                alone[slot] = 0
            alone[slots[0]] = row[slots[str(table["perturbation"].iloc[e]).split(SEPARATOR).index(name)]]
        else:
            rows = perturbations(run).get(name, [])
            if not rows:
                raise DataError(
                    f"{name!r} alone is in no environment of the run, and the representation does not describe it"
                )
            alone = representation[next((i for i in rows if _same_context(table, i, e)), rows[-1])]
        found[name] = alone
    return found


def part_doses(table: pd.DataFrame, e: int) -> list[float]:
    """Dose of each of the `parts` of an environment; NaN where it is not known."""
    given, names = table["dose"].iloc[e], str(table["perturbation"].iloc[e]).split(SEPARATOR)
    doses = [float(d) for d in given.split(SEPARATOR)] if isinstance(given, str) else [single_dose(given)]
    doses = doses * len(names) if len(doses) == 1 else doses
    own = parts(table)[e]
    return [dose for name, dose in zip(names, doses, strict=True) if name in own]


def alone_at(table: pd.DataFrame, name: str, dose: float, like: int) -> int:
    """Row of a perturbation alone, at a dose, in the cell line and time of another row; -1 where there is none."""
    for i, own in enumerate(parts(table)):
        if own == (name,) and _same_context(table, i, like):
            known = part_doses(table, i)[0]
            if np.isclose(known, dose, rtol=1e-6, atol=0, equal_nan=True):
                return i
    return -1


def _same_context(table: pd.DataFrame, one: int, other: int) -> bool:
    return all(str(table[c].iloc[one]) == str(table[c].iloc[other]) for c in ("time", "cell_line"))


def _slots(features: Sequence[str]) -> list[list[int]]:
    """Positions of the features of each part."""
    found: dict[str, list[int]] = {}
    for i, name in enumerate(features):
        if name.startswith(PART):
            found.setdefault(name.partition(":")[0], []).append(i)
    return list(found.values())


def entered(
    run: Run, cells: EnvironmentDataset, conditions: Mapping[str, tuple[str, ArrayLike]]
) -> tuple[Run, EnvironmentDataset]:
    """The run and the cells with further conditions in their tables, so that these can be asked for by name.

    Args:
        run: from `fit` or `load`.
        cells: whose environments are the run's.
        conditions: name -> (environment that is like it in cell line and time, ``[F]`` representation).

    Raises:
        DataError: cells with other environments than the run's, or a name that is taken.
    """
    before = run.environments
    if [str(n) for n in cells.environments.index] != [str(n) for n in before.table.index]:
        raise DataError(
            "the cells have other environments than the run: read them together with those it was fitted to, and split "
            "them afterwards"
        )
    taken = set(conditions) & {str(n) for n in before.table.index}
    if taken:
        raise DataError(f"{listing(sorted(taken))} is an environment of the run: choose another name")
    if not conditions:
        return run, cells
    like = [before.index(name) for name, _ in conditions.values()]
    rows = np.stack([np.asarray(r, np.float32) for _, r in conditions.values()])

    def longer(table: pd.DataFrame) -> pd.DataFrame:
        added = table.iloc[like].set_axis(pd.Index(list(conditions), name=table.index.name)).assign(is_reference=False)
        added = added.assign(**{c: v for c, v in {"trained": False, "cells": 0}.items() if c in table})
        records = table.to_dict("records") + added.to_dict("records")
        return pd.DataFrame(records, index=pd.Index([*table.index, *added.index], name=table.index.name))

    together = np.concatenate([before.representation, rows])
    return (
        replace(run, environments=Environments(longer(before.table), together)),
        replace(cells, environments=longer(cells.environments), representation=together),
    )


# ---------------------------------------------------------------------- what is new
def novelty(run: Run, conditions: str | Sequence[str] | Mapping[str, ArrayLike] | None = None) -> pd.DataFrame:
    """How far conditions are from those that the run was fitted to.

    The distance is 1 - Tanimoto similarity, sum min(r, s) / sum max(r, s), of representations without negative numbers
    (fingerprints, one-hot, doses as log10(1 + uM)), otherwise the root mean square difference of features in standard
    deviations over the training conditions.

    Args:
        run: from `fit` or `load`.
        conditions: names of environments, or name -> ``[F]`` representation; every environment by default.

    Returns:
        One row a condition: trained, nearest (training condition), distance to it, usual (the distance that 95 % of the
        training conditions are within of their own nearest), far (distance > usual), parts, unseen (parts of no
        training cell), doses (those outside the training doses), and warning, empty where there is nothing to say.

    Raises:
        DataError: an unknown environment, a representation of another length, or a run without training conditions.

    Example:
        >>> novelty(run, "env_3")["trained"].tolist()
        [True]
    """
    table = run.environments.table
    if conditions is None:
        conditions = [str(n) for n in table.index]
    if isinstance(conditions, str):
        conditions = [conditions]
    if isinstance(conditions, Mapping):
        asked = {str(name): np.asarray(r, np.float32) for name, r in conditions.items()}
        bad = [name for name, r in asked.items() if r.shape != (len(run.schema.features),)]
        if bad:
            raise DataError(f"{listing(bad)}: represent a condition by the run's {len(run.schema.features)} features")
        named: dict[str, int] = {}
    else:
        named = {name: run.environments.index(name) for name in conditions}
        asked = {name: run.environments.representation[e] for name, e in named.items()}
    known, every = _Known.of(run), parts(table)
    rows = []
    for name, r in asked.items():
        e = named.get(name)
        trained = e is not None and bool(table["trained"].iloc[e])
        rows.append({"condition": name, **known.describe(r, () if e is None else every[e], trained)})
    return pd.DataFrame(rows).set_index("condition")


@dataclass(frozen=True, eq=False)
class _Known:
    """The training conditions.

    Args:
        run: that was fitted to them.
        names: T names.
        rows: ``[T, F]``.
        seen: perturbations in them, alone or in combinations.
        references: names of unperturbed cells.
        alike: whether similarity is Tanimoto's.
        scale: ``[F]`` of features, where it is not.
        usual: distance of a training condition to its nearest, 95 % quantile.
    """

    run: Run
    names: tuple[str, ...]
    rows: NDArray[np.float64]
    seen: frozenset[str]
    references: frozenset[str]
    alike: bool
    scale: NDArray[np.float64]
    usual: float

    @staticmethod
    def of(run: Run) -> "_Known":
        table = run.environments.table
        trained = table["trained"].to_numpy(dtype=bool)
        if not trained.any():
            raise DataError("no environment of the run's table was trained on: there is nothing to be near to")
        rows = _comparable(run, run.environments.representation[trained])
        seen = frozenset(part for own, used in zip(parts(table), trained, strict=True) if used for part in own)
        references = frozenset(str(n) for n in table["perturbation"][table["is_reference"].to_numpy(dtype=bool)])
        sd = rows.std(0)
        alike = bool((run.environments.representation >= 0).all())
        names = tuple(str(n) for n in table.index[trained])
        found = _Known(run, names, rows, seen, references, alike, np.where(sd > 0, sd, 1.0), float("nan"))
        others = [found.distances(r)[np.arange(len(rows)) != i] for i, r in enumerate(rows)]
        own = [d.min() for d, r in zip(others, rows, strict=True) if len(d) and r.any()]
        return replace(found, usual=float(np.quantile(own, _USUAL)) if own else float("nan"))

    def distances(self, r: NDArray[np.float64]) -> NDArray[np.float64]:
        if self.alike:
            common, either = np.minimum(self.rows, r).sum(1), np.maximum(self.rows, r).sum(1)
            alike: NDArray[np.float64] = np.divide(common, either, out=np.ones(len(common)), where=either > 0)
            return 1.0 - alike
        difference: NDArray[np.float64] = np.sqrt((((self.rows - r) / self.scale) ** 2).mean(1))
        return difference

    def describe(self, r: Row, names: Sequence[str], trained: bool) -> dict[str, Any]:
        """Columns of `novelty`."""
        distance = self.distances(_comparable(self.run, r[None])[0])
        near = int(distance.argmin())
        columns = Columns.of(self.run.schema)
        by_feature = [n for n, i in columns.perturbations.items() if r[i] != 0 and n not in self.references]
        unseen = [n for n in dict.fromkeys([*names, *by_feature]) if n not in self.seen]
        doses = self._doses(r)
        far = bool(distance[near] > self.usual)
        return {
            "trained": trained,
            "nearest": self.names[near],
            "distance": float(distance[near]),
            "usual": self.usual,
            "far": far and not trained,
            "parts": len(names) or len(by_feature),
            "unseen": ", ".join(unseen),
            "doses": "; ".join(doses),
            "warning": "" if trained else self._warning(unseen, by_feature, doses, far, near, float(distance[near])),
        }

    def _warning(
        self, unseen: Sequence[str], by_feature: Sequence[str], doses: Sequence[str], far: bool, near: int, away: float
    ) -> str:
        said = []
        blind = [n for n in unseen if n in by_feature]
        if blind:
            said.append(f"no training cell had {listing(blind)}: nothing was learnt of its effect")
        others = [n for n in unseen if n not in blind]
        if others:
            said.append(f"no training cell had {listing(others)}: it is predicted from its features alone")
        said += doses
        if far:
            kind = "1 - Tanimoto" if self.alike else "standard deviations"
            said.append(
                f"{away:.2g} ({kind}) from the nearest training condition, {self.names[near]!r}; these are "
                f"usually within {self.usual:.2g}"
            )
        return "; ".join(said)

    def _doses(self, r: Row) -> list[str]:
        """Amounts, doses and times beyond those of training."""
        trained = self.run.environments.representation[self.run.environments.table["trained"].to_numpy(dtype=bool)]
        said = []
        for i, name in enumerate(self.run.schema.features):
            inner = name.partition(": ")[2] if name.startswith(PART) else name
            title = name.partition("=")[2] if name.startswith((DOSE, _NAMED)) else inner
            if not (name.startswith((DOSE, _NAMED, "time /")) or inner == _LOG_DOSE):
                if name.startswith("cell_line=") and r[i] and not trained[:, i].any():
                    said.append(f"no training cell was of {name.partition('=')[2]!r}")
                continue
            seen = trained[:, i][trained[:, i] != 0]
            if not r[i] or not len(seen) or seen.min() * (1 - _NEAR) <= r[i] <= seen.max() * (1 + _NEAR):
                continue
            logged = inner == _LOG_DOSE or name.startswith(_NAMED)
            value, low, high = (10**v - 1 if logged else v * (24 if name.startswith("time") else 1)
                                for v in (float(r[i]), float(seen.min()), float(seen.max())))  # fmt: skip
            what = "time" if name.startswith("time") else f"dose of {title}" if title != _LOG_DOSE else "dose"
            said.append(f"{what} {value:.3g} is outside the {low:.3g} to {high:.3g} of training")
        return said


def _comparable(run: Run, rows: NDArray[Any]) -> NDArray[np.float64]:
    """Doses in uM as log10(1 + uM), so that a high dose does not outweigh all else."""
    result: NDArray[np.float64] = rows.astype(np.float64)
    own = run.schema.doses
    result[:, own] = np.log10(1 + np.maximum(result[:, own], 0))
    return result
