"""Splits into training, validation and held-out cells, and the search for what leaks between them.

Every split is deterministic in its seed, keeps reference environments in training, and is searched for leaks before it
is returned. What it must not share with training differs: an unseen compound may not be there under another name or as
another salt, whereas an unseen dose of a compound leaves its other doses in training. `Split.promises` says which.
"""

from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.errors import DataError, listing, nearest

__all__ = ["KINDS", "Split", "by_combination", "by_dose", "by_environment", "by_group", "by_row", "check", "leaks"]

KINDS = ("cell", "reference", "environment", "perturbation", "compound", "representation", "combination")
"""Kinds of `leaks`."""

Keys: TypeAlias = list[Hashable | None]


@dataclass(frozen=True, eq=False)
class Split:
    """Cells to train on, to choose a model by, and to score.

    Args:
        train: with every reference environment.
        validation: held out in the same way as `test`, without anything in common with it; None if not asked for.
        test: at least one cell.
        held_out: names of what is in `test` only: environments, or (perturbation, category) pairs of `by_combination`.
            Given to the same function as `held_out`, they make the same test cells again.
        promises: kinds of `leaks` that these parts must not have.
        combination: covariate of `by_combination`.
        protocol: what is unseen, and `data.leaks.leaks` takes the scores to show: ``"cell"``, ``"environment"``,
            ``"perturbation"``, ``"scaffold"``, ``"dose"``, ``"combination"`` or ``"cell_line"``.
    """

    train: EnvironmentDataset
    validation: EnvironmentDataset | None
    test: EnvironmentDataset
    held_out: tuple[Any, ...] = ()
    promises: tuple[str, ...] = ("cell",)
    combination: str | None = None
    protocol: str = "cell"


# ---------------------------------------------------------------------- the splits
def by_environment(
    cells: EnvironmentDataset,
    *,
    held_out: Sequence[str] | None = None,
    fraction: float = 0.2,
    validation_fraction: float = 0.0,
    seed: int = 0,
) -> Split:
    """Whole environments unseen: those named, or a random `fraction` of the perturbations with all their environments.

    Perturbations that are one compound under several names, or that the representation cannot tell apart, are drawn
    together.

    Args:
        cells: all cells.
        held_out: names of environments, or of perturbations (all their doses, times and cell lines).
        fraction: of the perturbations, held out for testing where `held_out` is None.
        validation_fraction: of the perturbations, held out for validation.
        seed: of the draw.

    Raises:
        DataError: a name that does not exist or is a reference, a fraction that cannot be held out, or a leak.

    Example:
        >>> split = by_environment(cells, fraction=0.25, seed=0)
        >>> len(split.train), len(split.test)
        (140, 40)
    """
    unit = _units(cells, [str(p) for p in cells.environments["perturbation"]])
    sizes = _perturbations_of(cells, unit)
    if held_out is None:
        test, validation = _draw(sizes, fraction, validation_fraction, seed)
        tested = np.flatnonzero(np.isin(unit, test))
    else:
        tested = _environments(cells, held_out)
        others = {u: n for u, n in sizes.items() if u not in set(unit[tested])}
        validation = _draw_validation(others, sum(sizes.values()), validation_fraction, np.random.default_rng(seed))
    named = set() if held_out is None else {str(name) for name in held_out}
    whole = named <= set(cells.environments["perturbation"].astype(str))
    return _checked(
        cells,
        np.isin(cells.env, tested),
        np.isin(unit, validation)[cells.env],
        held_out=_names(cells, tested),
        promises=("cell", "reference", "environment", "compound", "representation")
        + (("perturbation",) if whole else ()),
        protocol="perturbation" if whole or _whole(cells, tested) else "environment",
    )


def by_group(
    cells: EnvironmentDataset,
    groups: Mapping[str, int] | str = "tanimoto",
    *,
    fraction: float = 0.2,
    validation_fraction: float = 0.0,
    threshold: float = 0.6,
    seed: int = 0,
) -> Split:
    """Whole groups of perturbations unseen, so that no close analogue of a held-out compound is in training.

    Groups are drawn at random while they fit into `fraction` of all perturbations, so that a group larger than that
    stays in training; where none fits, the smallest is held out.

    Args:
        cells: all cells.
        groups: group of each perturbation; or ``"tanimoto"``, components of the graph of compounds whose Morgan
            fingerprints are at least `threshold` similar; or ``"scaffold"``, compounds with one Bemis-Murcko scaffold.
        fraction: of the perturbations, held out for testing.
        validation_fraction: of the perturbations, held out for validation.
        threshold: Tanimoto similarity in (0, 1].
        seed: of the draw.

    Raises:
        DataError: a perturbation without a group or SMILES, a fraction that cannot be held out, or a leak.
    """
    number = _groups(cells, groups, threshold)
    unit = _units(cells, [number.get(str(p)) for p in cells.environments["perturbation"]])
    test, validation = _draw(_perturbations_of(cells, unit), fraction, validation_fraction, seed)
    return _checked(
        cells,
        np.isin(unit, test)[cells.env],
        np.isin(unit, validation)[cells.env],
        held_out=_names(cells, np.flatnonzero(np.isin(unit, test))),
        promises=("cell", "reference", "environment", "perturbation", "compound", "representation"),
        protocol="scaffold" if groups == "scaffold" else "perturbation",
    )


def by_dose(
    cells: EnvironmentDataset,
    *,
    doses: str | Sequence[float] = "highest",
    held_out: Sequence[str] | None = None,
    fraction: float = 1.0,
    validation_fraction: float = 0.0,
    seed: int = 0,
) -> Split:
    """Doses unseen of perturbations whose other doses are in training.

    Args:
        cells: all cells.
        doses: ``"highest"`` or ``"lowest"`` of each perturbation, ``"middle"`` (the median of three or more, so that
            training brackets it), or doses in uM. Doses of combinations (``"1+0.5"``) are never held out.
        held_out: perturbations, or environments of `Split.held_out`; by default every perturbation that keeps a dose in
            training.
        fraction: of these perturbations, held out for testing.
        validation_fraction: of these perturbations, held out for validation.
        seed: of the draw.

    Raises:
        DataError: no dose, an unknown name or dose, a perturbation that would keep no dose in training, or a leak.
    """
    names = cells.environments["perturbation"].astype(str).to_numpy()
    asked = None if held_out is None else set(names[_environments(cells, held_out)])
    chosen = _dosed(cells, doses, asked)
    kept = np.array(sorted(chosen))
    test, validation = _draw(dict.fromkeys(range(len(kept)), 1), fraction, validation_fraction, seed, leave=0)
    tested = np.concatenate([chosen[p] for p in kept[test]])
    validated = np.concatenate([chosen[p] for p in kept[validation]]) if validation else np.empty(0, np.int64)
    return _checked(
        cells,
        np.isin(cells.env, tested),
        np.isin(cells.env, validated),
        held_out=_names(cells, np.sort(tested)),
        promises=("cell", "reference", "environment", "representation"),
        protocol="dose",
    )


def by_combination(
    cells: EnvironmentDataset,
    *,
    covariate: str,
    held_out: Sequence[tuple[str, str]] | None = None,
    fraction: float = 0.2,
    validation_fraction: float = 0.0,
    seed: int = 0,
) -> Split:
    """Pairs (perturbation, category) unseen, such as a drug in a cell line, though training has both on their own.

    Args:
        cells: all cells.
        covariate: name of a covariate, of an obs column, or ``"cell_line"``.
        held_out: pairs; all doses and times of the perturbation in the category.
        fraction: of the pairs, held out for testing where `held_out` is None; fewer where more would take a
            perturbation or a category out of training.
        validation_fraction: of the pairs, held out for validation.
        seed: of the draw.

    Raises:
        DataError: an unknown covariate or pair, a perturbation or category that would leave training, or a leak.
    """
    pairs = np.array(_pairs(cells, covariate), dtype=object)
    perturbed = ~cells.reference[cells.env]
    known = sorted({(str(p), str(c)) for p, c in pairs[perturbed]})
    room = _Room(known, {str(c) for _, c in pairs[~perturbed]})
    if held_out is not None:
        test = _asked_pairs(held_out, known, covariate)
        refused = [pair for pair in test if not room.take(pair)]
        if refused:
            raise DataError(
                f"holding out {listing(test)} leaves no cell of {listing(refused[0])} in training for one of the two: "
                "hold out fewer pairs, or use by_environment for whole perturbations"
            )
        share = 0.0
    else:
        test, share = [], _share("fraction", fraction)
    order = [known[i] for i in np.random.default_rng(seed).permutation(len(known))]
    test += room.fill(order, round(max(share * len(known), 1)) if share else 0)
    if not test:
        raise DataError(
            f"no pair of a perturbation and {covariate!r} can be held out: "
            "each perturbation or category would leave training with it"
        )
    share = _share("validation_fraction", validation_fraction, zero=True)
    validation = room.fill(order, round(max(share * len(known), 1)) if share else 0)
    if share and not validation:
        raise DataError(
            f"no pair of a perturbation and {covariate!r} is left for validation: hold out fewer for testing"
        )
    sides = dict.fromkeys(test, 1) | dict.fromkeys(validation, 2)
    side = np.array([sides.get((str(p), str(c)), 0) for p, c in pairs])
    return _checked(
        cells,
        side == 1,
        side == 2,
        held_out=tuple(sorted(test)),
        promises=("cell", "reference", "combination"),
        combination=covariate,
        protocol="combination",
    )


def by_row(
    cells: EnvironmentDataset,
    fraction: float = 0.1,
    validation_fraction: float = 0.0,
    *,
    seed: int = 0,
    stratify: bool = True,
) -> Split:
    """Random cells held out, of environments that training has seen.

    Args:
        cells: all cells.
        fraction: of the cells, held out for testing.
        validation_fraction: of the cells, held out for validation.
        seed: of the draw.
        stratify: hold out the same fraction of each environment, to the nearest cell, and leave each at least one cell
            in training; otherwise only reference environments are sure to keep one.

    Raises:
        DataError: fractions that leave no cell to train on or to hold out.
    """
    shares = _shares(fraction, validation_fraction)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(cells))
    met, first = np.unique(cells.env[order], return_index=True)
    pinned = np.zeros(len(cells), bool)
    pinned[order[first if stratify else first[cells.reference[met]]]] = True
    stratum = cells.env if stratify else np.zeros(len(cells), np.int64)
    counts, pins = np.bincount(stratum), np.bincount(stratum, weights=pinned).astype(np.int64)
    tested = _seats(counts, shares[0], counts - pins, rng)
    validated = _seats(counts, shares[1], counts - pins - tested, rng)
    queue = np.lexsort((rng.random(len(cells)), ~pinned, stratum))  # the pinned cell of each stratum comes first
    queued = stratum[queue]
    place = np.arange(len(cells)) - (np.cumsum(counts) - counts)[queued] - pins[queued]
    side = np.zeros(len(cells), np.int64)
    side[queue] = np.select(
        [place < 0, place < tested[queued], place < (tested + validated)[queued]], [0, 1, 2], default=0
    )
    return _checked(cells, side == 1, side == 2)


# ---------------------------------------------------------------------- leaks
def leaks(
    train: EnvironmentDataset,
    held_out: EnvironmentDataset,
    *,
    combination: str | None = None,
    kinds: Collection[str] = KINDS,
) -> pd.DataFrame:
    """What two sets of cells have in common, one row for each held-out environment and kind of leak.

    `data.leaks.leaks` searches a whole split for what contradicts the claim made with it, plates, scaffolds and scoring
    included.

    Kinds:

    - cell: the same cells (the same name, from the same row).
    - reference: a reference environment is held out.
    - environment: the environment has cells in training.
    - perturbation: the perturbation has, at another dose or time, or with its parts in another order.
    - compound: training has the compound under another name, or another salt of it: equal canonical SMILES or parent.
      Environments without a SMILES, or with one that cannot be read, are not compared, nor are combinations.
    - representation: training has another environment with the same row, which the model therefore cannot tell apart.
    - combination: the perturbation has cells in training in the same category of the covariate `combination`.

    Args:
        train: cells to train on.
        held_out: cells to validate on or to score.
        combination: name of a covariate, of an obs column, or ``"cell_line"``; needed for the kind of this name only.
        kinds: to look for.

    Returns:
        Table with the columns kind, environment (held out) and detail.

    Raises:
        DataError: an unknown kind or covariate.
    """
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise DataError(f"unknown kind of leak {listing(unknown)}: use some of {', '.join(KINDS)}")
    rows: list[tuple[str, str, str]] = []
    for kind in KINDS:
        if kind in kinds:
            found = _FINDERS[kind](train, held_out, combination)
            rows += [(kind, str(environment), detail) for environment, detail in found]
    return pd.DataFrame(rows, columns=["kind", "environment", "detail"])


def check(split: Split) -> None:
    """Search all parts of a split for the leaks that it promises not to have.

    Raises:
        DataError: lists them.
    """
    named = {"training": split.train, "validation": split.validation, "test": split.test}
    parts = [(name, part) for name, part in named.items() if part is not None]
    for i, (first, seen) in enumerate(parts):
        for second, unseen in parts[i + 1 :]:
            found = leaks(seen, unseen, combination=split.combination, kinds=split.promises)
            if len(found):
                lines = [f"{k} {e!r}: {d}" for k, e, d in found.head(5).itertuples(index=False)]
                more = f"; and {len(found) - 5} more" if len(found) > 5 else ""
                raise DataError(
                    f"{len(found)} leaks between the {first} and the {second} cells: {'; '.join(lines)}{more}. "
                    "Hold out both sides of each, or use a representation that tells them apart"
                )


Finding: TypeAlias = Iterable[tuple[str, str]]


def _cell_leaks(train: EnvironmentDataset, held_out: EnvironmentDataset, _: str | None) -> Finding:
    here, there = origins(held_out), origins(train)
    rows = np.flatnonzero(np.isin(here, there)).tolist()
    cell = dict(zip(there.tolist(), train.obs.index, strict=True)) if rows else {}
    names, shared = _environment_names(held_out), dict[str, list[str]]()
    for row in rows:
        if cell[int(here[row])] == held_out.obs.index[row]:
            shared.setdefault(names[held_out.env[row]], []).append(str(held_out.obs.index[row]))
    return [(e, f"{len(found)} cells are in both ({listing(found, 3)})") for e, found in shared.items()]


def origins(cells: EnvironmentDataset) -> NDArray[np.int64]:
    """Row of each cell in the data set that these cells were split from."""
    return np.arange(len(cells)) if cells.origin is None else cells.origin


def _reference_leaks(train: EnvironmentDataset, held_out: EnvironmentDataset, _: str | None) -> Finding:
    names = _environment_names(held_out)
    return [(names[e], "is a reference, and held out") for e in held_out.present if held_out.reference[e]]


def _environment_leaks(train: EnvironmentDataset, held_out: EnvironmentDataset, _: str | None) -> Finding:
    cells = np.bincount(train.env, minlength=len(train.environments)).tolist()
    counts = dict(zip(_environment_names(train), cells, strict=True))
    names = np.array(_environment_names(held_out), dtype=object)[held_out.present]
    return [(name, f"has {counts[name]} cells in training") for name in names if counts.get(name)]


def _key_leaks(
    train: EnvironmentDataset,
    held_out: EnvironmentDataset,
    keys: Callable[[EnvironmentDataset], Keys],
    same: str,
    label: Callable[[EnvironmentDataset], list[str]],
) -> Finding:
    """Held-out environments, not references, with the key of an environment in training that has another label."""
    seen: dict[Hashable, list[tuple[str, str]]] = {}
    labels, key, names = label(train), keys(train), _environment_names(train)
    for t in train.present.tolist():
        seen.setdefault(key[t], []).append((labels[t], names[t]))
    labels, key, names = label(held_out), keys(held_out), _environment_names(held_out)
    for e in held_out.present[~held_out.reference[held_out.present]].tolist():
        others = [name for other, name in seen.get(key[e], []) if other != labels[e]] if key[e] is not None else []
        if others:
            yield names[e], f"{same} {listing(others, 3)}"


def _environment_names(cells: EnvironmentDataset) -> list[str]:
    return [str(name) for name in cells.environments.index]


def _perturbation_names(cells: EnvironmentDataset) -> list[str]:
    return [str(name) for name in cells.environments["perturbation"]]


def _perturbation_keys(cells: EnvironmentDataset) -> Keys:
    """Each environment's parts, in no order; None for references."""
    names = zip(cells.environments["perturbation"], cells.reference, strict=True)
    return [None if reference else tuple(sorted(str(name).split("+"))) for name, reference in names]


def compound_keys(cells: EnvironmentDataset) -> Keys:
    """Parent of each environment's molecule; None where there is none, and for a mixture that is a combination."""
    table = cells.environments
    columns = zip(table["perturbation"], table["smiles"], cells.reference, strict=True)
    return [
        None if reference or not isinstance(text, str) or ("+" in str(name) and "." in text) else _parent(text)
        for name, text, reference in columns
    ]


@lru_cache(maxsize=2**16)
def _parent(smiles: str) -> str | None:
    from pyro_scm.data.chemistry import parent

    try:
        return parent(smiles)
    except DataError:  # a placeholder such as "restricted": nothing to compare
        return None


def _representation_keys(cells: EnvironmentDataset) -> Keys:
    """Bytes of each environment's row; adding zero makes one of the two zeros."""
    return [(row + np.float32(0)).tobytes() for row in cells.representation]


def _perturbation_leaks(train: EnvironmentDataset, held_out: EnvironmentDataset, _: str | None) -> Finding:
    return _key_leaks(train, held_out, _perturbation_keys, "the perturbation of", _environment_names)


def _compound_leaks(train: EnvironmentDataset, held_out: EnvironmentDataset, _: str | None) -> Finding:
    return _key_leaks(train, held_out, compound_keys, "the compound, or a salt of it, of", _perturbation_names)


def _representation_leaks(train: EnvironmentDataset, held_out: EnvironmentDataset, _: str | None) -> Finding:
    return _key_leaks(train, held_out, _representation_keys, "the representation of", _environment_names)


def _combination_leaks(train: EnvironmentDataset, held_out: EnvironmentDataset, covariate: str | None) -> Finding:
    if covariate is None:
        return
    seen = Counter(_pairs(train, covariate))
    names = _environment_names(held_out)
    for e, (p, c) in sorted(set(zip(held_out.env.tolist(), _pairs(held_out, covariate), strict=True))):
        if seen[p, c] and not held_out.reference[e]:
            yield names[e], f"{p!r} in {c!r} has {seen[p, c]} cells in training"


_FINDERS: dict[str, Callable[[EnvironmentDataset, EnvironmentDataset, str | None], Finding]] = {
    "cell": _cell_leaks,
    "reference": _reference_leaks,
    "environment": _environment_leaks,
    "perturbation": _perturbation_leaks,
    "compound": _compound_leaks,
    "representation": _representation_leaks,
    "combination": _combination_leaks,
}


# ---------------------------------------------------------------------- what is held out together
def _units(cells: EnvironmentDataset, extra: Keys) -> NDArray[np.int64]:
    """``[E]`` number of the unit that is held out as a whole; -1 for references and environments without cells.

    Two environments are in one unit if they share a perturbation, compound, representation or value of `extra`.
    """
    columns = [_perturbation_keys(cells), compound_keys(cells), _representation_keys(cells), extra]
    unit = np.arange(len(cells.environments))
    free = np.isin(unit, cells.present) & ~cells.reference
    for column in columns:
        first: dict[Hashable, int] = {}
        for e in np.flatnonzero(free):
            if column[e] is not None:
                other = unit[first.setdefault(column[e], int(e))]
                if other != unit[e]:
                    unit[unit == max(other, unit[e])] = min(other, unit[e])
    return np.where(free, unit, -1)


def _perturbations_of(cells: EnvironmentDataset, unit: NDArray[np.int64]) -> dict[int, int]:
    """Number of perturbations in each unit."""
    table = pd.DataFrame({"unit": unit, "perturbation": cells.environments["perturbation"].astype(str).to_numpy()})
    sizes = table[table["unit"] >= 0].groupby("unit")["perturbation"].nunique()
    return {int(u): int(n) for u, n in zip(sizes.index, sizes.to_numpy(), strict=True)}


def _groups(cells: EnvironmentDataset, groups: Mapping[str, int] | str, threshold: float) -> dict[str, int]:
    """Group of each perturbation that has cells."""
    here = cells.present[~cells.reference[cells.present]]
    table = cells.environments.iloc[here].drop_duplicates("perturbation")
    names = [str(p) for p in table["perturbation"]]
    if not isinstance(groups, str):
        missing = [name for name in names if name not in groups]
        if missing:
            raise DataError(f"no group for {listing(missing)}: give every perturbation a group, or leave out its cells")
        return {name: int(groups[name]) for name in names}
    if groups not in ("tanimoto", "scaffold"):
        raise DataError(f"unknown groups {groups!r}: use 'tanimoto', 'scaffold', or a group for each perturbation")
    from pyro_scm.data.chemistry import morgan, scaffold_groups, tanimoto_groups

    missing = [name for name, text in zip(names, table["smiles"], strict=True) if not isinstance(text, str)]
    if missing:
        raise DataError(
            f"no SMILES for {listing(missing)}: fill the SMILES column, leave out their cells, or map groups"
        )
    smiles = [str(text) for text in table["smiles"]]
    if groups == "scaffold":
        numbers = scaffold_groups(smiles, names)
    else:
        numbers = tanimoto_groups(morgan(smiles, names=names, desalt=True), threshold)
    return dict(zip(names, numbers.tolist(), strict=True))


def _dosed(
    cells: EnvironmentDataset, doses: str | Sequence[float], asked: set[str] | None
) -> dict[str, NDArray[np.int64]]:
    """Perturbation -> environments of the doses to hold out, where it keeps another dose."""
    known = ("highest", "middle", "lowest")
    if isinstance(doses, str) and doses not in known:
        raise DataError(f"unknown doses {doses!r}: use one of {listing(known)}, or doses in uM")
    amount = pd.to_numeric(cells.environments["dose"], errors="coerce").astype(float)
    table = cells.environments.assign(dose=amount, index=np.arange(len(amount))).iloc[cells.present]
    table = table[~table["is_reference"].astype(bool) & table["dose"].notna()]
    if table.empty:
        raise DataError(
            "the environments have no dose: name the obs column that holds it (from_anndata(..., dose=COLUMN))"
        )
    if not isinstance(doses, str):
        absent = [d for d in doses if not np.isclose(table["dose"], d, rtol=1e-5, atol=0).any()]
        if absent:
            raise DataError(
                f"no environment has dose {listing(absent)} uM: it has {listing(sorted(set(table['dose'])), 10)}"
            )
    chosen = {}
    for name, rows in table.groupby(table["perturbation"].astype(str)):
        values = rows["dose"].to_numpy(dtype=float)
        held = _held_doses(values, doses)
        if held.any() and (asked is None or name in asked):
            chosen[str(name)] = rows["index"].to_numpy(dtype=np.int64)[held]
    refused = sorted((asked or set()) - set(chosen))
    if refused or not chosen:
        who = listing(refused) if refused else "every perturbation"
        raise DataError(
            f"{who} would have no dose held out, or none left in training: 'highest' and 'lowest' need two doses, "
            "'middle' three, and numbers one besides those held out"
        )
    return chosen


def _held_doses(values: NDArray[np.float64], doses: str | Sequence[float]) -> NDArray[np.bool_]:
    """Which environments of a perturbation have a dose to hold out; none where no other dose would be left."""
    distinct = np.unique(values)
    if not isinstance(doses, str):
        held = np.isclose(values[:, None], np.asarray(list(doses), float), rtol=1e-5, atol=0).any(axis=1)
        return held if not held.all() else np.zeros_like(held)
    if len(distinct) < (3 if doses == "middle" else 2):
        return np.zeros(len(values), bool)
    place = {"highest": -1, "middle": len(distinct) // 2, "lowest": 0}[doses]
    return np.asarray(values == distinct[place])


# ---------------------------------------------------------------------- pairs of a perturbation and a category
def _pairs(cells: EnvironmentDataset, covariate: str) -> list[tuple[str, str]]:
    """(perturbation, category) of each cell."""
    perturbation = cells.environments["perturbation"].astype(str).to_numpy()[cells.env]
    return list(zip(perturbation.tolist(), categories(cells, covariate), strict=True))


def categories(cells: EnvironmentDataset, covariate: str) -> list[str]:
    """Category of each cell."""
    if covariate in cells.covariates:
        names = cells.categories[covariate]
        return [names[code] for code in cells.covariates[covariate]]
    lines = cells.environments["cell_line"]
    if covariate == "cell_line" and lines.notna().any():
        return [str(line) for line in lines.to_numpy()[cells.env]]
    if covariate not in cells.obs:
        have = [*cells.covariates, *cells.obs.columns]
        raise DataError(f"no covariate, obs column or cell line {covariate!r}: these cells have {listing(have, 20)}")
    values = cells.obs[covariate]
    if values.isna().any():
        raise DataError(
            f"obs column {covariate!r} is missing in {listing(values.index[values.isna()])}: fill or drop them"
        )
    return [str(value) for value in values]


def _asked_pairs(
    held_out: Sequence[tuple[str, str]], known: Sequence[tuple[str, str]], covariate: str
) -> list[tuple[str, str]]:
    asked = list(dict.fromkeys((str(p), str(c)) for p, c in held_out))
    if not asked:
        raise DataError("held_out names no pair: give (perturbation, category) pairs, or None to draw some")
    for pair in asked:
        if pair not in known:
            names = {f"{p} in {c}": (p, c) for p, c in known}
            near = nearest(" in ".join(pair), names)
            raise DataError(
                f"no cells of {pair!r} for {covariate!r}: did you mean one of {listing(names[n] for n in near)}?"
            )
    return asked


class _Room:
    """Which pairs can still leave training without taking the last of a perturbation or a category with them."""

    def __init__(self, pairs: Iterable[tuple[str, str]], reference: set[str]) -> None:
        self.pairs = set(pairs)
        self.reference = reference
        self.perturbations = Counter(p for p, _ in self.pairs)
        self.categories = Counter(c for _, c in self.pairs)

    def take(self, pair: tuple[str, str]) -> bool:
        """Take a pair out, if that can be done."""
        p, c = pair
        if pair not in self.pairs or self.perturbations[p] < 2 or (self.categories[c] < 2 and c not in self.reference):
            return False
        self.pairs.remove(pair)
        self.perturbations[p] -= 1
        self.categories[c] -= 1
        return True

    def fill(self, order: Iterable[tuple[str, str]], number: int) -> list[tuple[str, str]]:
        """Take out the first pairs of `order` that can be, at most `number`."""
        taken: list[tuple[str, str]] = []
        for pair in order:
            if len(taken) < number and self.take(pair):
                taken.append(pair)
        return taken


# ---------------------------------------------------------------------- drawing
def _share(what: str, value: float, *, zero: bool = False, one: bool = False) -> float:
    good = 0 < value < 1 or (zero and value == 0) or (one and value == 1)
    if not good:
        limits = f"{'[' if zero else '('}0, 1{']' if one else ')'}"
        raise DataError(f"{what} is {value!r}: give a number in {limits}")
    return float(value)


def _shares(fraction: float, validation_fraction: float, *, one: bool = False) -> tuple[float, float]:
    shares = _share("fraction", fraction, one=one), _share("validation_fraction", validation_fraction, zero=True)
    if sum(shares) > 1 or (sum(shares) == 1 and not one):
        raise DataError(f"fraction {fraction} and validation_fraction {validation_fraction} leave nothing to train on")
    return shares


def _draw(
    sizes: Mapping[int, int], fraction: float, validation_fraction: float, seed: int, leave: int = 1
) -> tuple[list[int], list[int]]:
    """Units for testing and for validation, of about these fractions of the total size; at least `leave` are left."""
    shares = _shares(fraction, validation_fraction, one=leave == 0)
    needed = 1 + bool(shares[1]) + leave
    if len(sizes) < needed:
        raise DataError(
            f"{len(sizes)} sets of perturbations to draw from, {needed} are needed: those that share a "
            "compound, a group or a row of the representation are one set; change the groups or the representation"
        )
    rng, total = np.random.default_rng(seed), sum(sizes.values())
    test = _fit(sizes, shares[0] * total, rng, len(sizes) - leave - bool(shares[1]))
    rest = {unit: size for unit, size in sizes.items() if unit not in test}
    return test, _draw_validation(rest, total, validation_fraction, rng, leave)


def _draw_validation(
    sizes: Mapping[int, int], total: int, share: float, rng: np.random.Generator, leave: int = 1
) -> list[int]:
    share = _share("validation_fraction", share, zero=True)
    if not share:
        return []
    if len(sizes) <= leave:
        raise DataError("nothing is left for validation: hold out less for testing, or take validation_fraction=0")
    return _fit(sizes, share * total, rng, len(sizes) - leave)


def _fit(sizes: Mapping[int, int], budget: float, rng: np.random.Generator, most: int) -> list[int]:
    """Random units of at most this total size and number; the smallest where none fits."""
    units, room = list(sizes), max(round(budget), 1)
    taken: list[int] = []
    for i in rng.permutation(len(units)):
        if sizes[units[i]] <= room and len(taken) < most:
            taken.append(units[i])
            room -= sizes[units[i]]
    return taken or [min(units, key=lambda unit: sizes[unit])]


def _seats(
    counts: NDArray[np.int64], share: float, free: NDArray[np.int64], rng: np.random.Generator
) -> NDArray[np.int64]:
    """`share` of each count to the nearest whole number below or above, by largest remainder, and at most `free`."""
    wanted = share * counts
    seats = np.floor(wanted).astype(np.int64)
    spare = int(np.floor(wanted.sum() + 0.5)) - int(seats.sum())
    seats[np.lexsort((rng.random(len(counts)), seats - wanted))[:spare]] += 1
    return np.asarray(np.minimum(seats, free))


# ---------------------------------------------------------------------- names and parts
def _environments(cells: EnvironmentDataset, names: Sequence[str]) -> NDArray[np.int64]:
    """Environments of these names or perturbations: at least one, with cells, none a reference."""
    if isinstance(names, str):
        names = [names]
    perturbations = cells.environments["perturbation"].astype(str).to_numpy()
    found = [np.empty(0, np.int64)]
    for name in names:
        rows = np.flatnonzero(perturbations == str(name))
        rows = rows if len(rows) else cells.environment_index(name)
        if cells.reference[rows].any():
            raise DataError(f"{str(name)!r} is a reference: references stay in training, hold out others")
        rows = rows[np.isin(rows, cells.present)]
        if not len(rows):
            raise DataError(f"{str(name)!r} has no cells here: hold out others")
        found.append(rows)
    every = np.unique(np.concatenate(found))
    if not len(every):
        raise DataError("held_out names no environment: give names, or None to draw some")
    return every


def _whole(cells: EnvironmentDataset, environments: NDArray[np.int64]) -> bool:
    """Whether these are all environments with cells of their perturbations."""
    names = cells.environments["perturbation"].astype(str).to_numpy()
    others = np.setdiff1d(cells.present, environments)
    return not np.isin(names[others], names[environments]).any()


def _names(cells: EnvironmentDataset, environments: NDArray[np.int64]) -> tuple[str, ...]:
    return tuple(str(name) for name in cells.environments.index[environments])


def _checked(
    cells: EnvironmentDataset,
    test: NDArray[np.bool_],
    validation: NDArray[np.bool_],
    **described: Any,
) -> Split:
    """The split by masks of cells, after a search for leaks."""
    train = ~test & ~validation
    if not test.any() or not train.any():
        raise DataError(
            f"{int(test.sum())} cells are held out for testing and {int(train.sum())} left to train on: "
            "both need some; change what is held out"
        )
    split = Split(
        train=cells.subset(train),
        validation=cells.subset(validation) if validation.any() else None,
        test=cells.subset(test),
        **described,
    )
    check(split)
    return split
