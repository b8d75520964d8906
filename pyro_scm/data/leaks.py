"""What a split lets leak into its scores, given what the scores are said to show.

The same split may be clean for one claim and leak for another: other doses of a drug in training are what "unseen dose"
needs, and what "unseen drug" must not have. `leaks` takes the claim (`PROTOCOLS`) and names every leak with what to do.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.data.splits import Split, categories, compound_keys, origins
from pyro_scm.errors import DataError, listing

__all__ = ["PROTOCOLS", "in_words", "leaks"]

PROTOCOLS: Mapping[str, tuple[str, ...]] = {
    "cell": (),
    "environment": ("environment",),
    "perturbation": ("perturbation", "dose", "compound", "combination"),
    "scaffold": ("perturbation", "dose", "compound", "combination", "scaffold"),
    "combination": ("combination",),
    "cell_line": ("cell_line",),
    "dose": ("perturbation",),
}
"""What is said to be unseen -> kinds of `leaks` that contradict it, besides those that contradict everything."""

_CURES = {
    "cell": "leave these cells out of one of the two",
    "environment": "hold out all cells of the environment",
    "perturbation": "hold out all environments of the perturbation, or say less: protocol='environment'",
    "dose": "hold out all its doses, or say less: protocol='dose'",
    "compound": "hold out every name and salt of the compound",
    "combination": "hold out every cell of the combination, in either order",
    "cell_line": "hold out all perturbed cells of the line, or say less: protocol='combination'",
    "scaffold": "split by scaffold: splits.by_group(cells, 'scaffold')",
    "plate": "hold out whole plates",
    "reference": "keep half of the reference cells out of training for scoring, as pyro_scm.compare does",
    "degs": "call differential genes on other cells than those scored: data.single_cell.halves, or training cells",
}

Found: TypeAlias = Iterator[tuple[str, int, str]]


class _Part(NamedTuple):
    """Cells that a model has learnt or was chosen from, and the word for them."""

    word: str
    cells: EnvironmentDataset


def leaks(
    split: Split,
    protocol: str | None = None,
    *,
    plate: str | None = None,
    references: EnvironmentDataset | None = None,
    degs_from: EnvironmentDataset | None = None,
    scored: EnvironmentDataset | None = None,
) -> pd.DataFrame:
    """Search a split for what training and validation cells tell of the test, contrary to what the scores should show.

    Kinds:

    - cell: the same cells.
    - environment: the environment has cells in training.
    - perturbation: the perturbation has, at the same dose, in whatever time or cell line.
    - dose: the perturbation has, at another dose (dose siblings).
    - compound: the compound has, under another name or as another salt.
    - combination: the combination has, its parts in whatever order; or the pair of perturbation and category, where the
      split holds out such pairs.
    - cell_line: the cell line has perturbed cells in training. Its reference cells may be there: a prediction needs
      something to start from.
    - scaffold: a training compound has the same Bemis-Murcko scaffold; acyclic compounds have none.
    - plate: perturbed cells of the same plate are in training.
    - reference: reference cells that are scored against were trained on, so that their noise is in the prediction too.
    - degs: differential genes were called on the cells that are scored, so that genes are chosen by their noise.

    Args:
        split: of `pyro_scm.data.splits`, or of your own making.
        protocol: what the scores are said to show, a key of `PROTOCOLS`; `Split.protocol` by default.
        plate: obs column (or covariate) of the plate or batch, where plates are said to be unseen.
        references: reference cells that the scores are computed against.
        degs_from: cells that differential genes were called on.
        scored: cells that the scores are computed on; all of the test by default.

    Returns:
        One row for each leak: kind, name (held-out environment, or plate), cells (held-out cells it touches), detail,
        and cure (what to do). No rows for a clean split.

    Raises:
        DataError: an unknown protocol, or no such column; cell lines or compounds that are not known where the protocol
            is about them.

    Example:
        >>> from pyro_scm.data import splits
        >>> leaks(splits.by_environment(cells, held_out=["env_3"]), "perturbation").empty
        True
    """
    chosen = split.protocol if protocol is None else protocol
    if chosen not in PROTOCOLS:
        raise DataError(f"unknown protocol {chosen!r}: use one of {listing(PROTOCOLS, len(PROTOCOLS))}")
    seen = [_Part("training", split.train)]
    if split.validation is not None:
        seen.append(_Part("validation", split.validation))
    rows: list[tuple[str, str, int, str]] = []
    for part in seen:
        for kind in ("cell", *PROTOCOLS[chosen]):
            rows += [(kind, *found) for found in _FINDERS[kind](part, split.test, split.combination)]
        if plate is not None:
            rows += [("plate", *found) for found in _plates(part, split.test, plate)]
        if references is not None:
            rows += [("reference", *found) for found in _same(part, references, "scored against are in the")]
    if degs_from is not None:
        called = _Part("cells that differential genes were called on", degs_from)
        rows += [("degs", *found) for found in _same(called, split.test if scored is None else scored, "are among the")]
    table = pd.DataFrame(rows, columns=["kind", "name", "cells", "detail"])
    return table.assign(cure=[_CURES[kind] for kind in table["kind"]])


def in_words(table: pd.DataFrame) -> list[str]:
    """The rows of `leaks` in words, one for each kind.

    Args:
        table: of `leaks`.
    """
    lines = []
    for kind, own in table.groupby("kind", sort=False):
        several = f" and {len(own) - 1} more" if len(own) > 1 else ""
        first = own.iloc[0]
        lines.append(f"leak ({kind}): {first['name']!r}{several}: {first['detail']}; {first['cure']}")
    return lines


# ---------------------------------------------------------------------- cells
def _same(part: _Part, cells: EnvironmentDataset, where: str) -> Found:
    """The same rows of one data set, by place and name."""
    names = pd.MultiIndex.from_arrays([origins(cells), cells.obs.index.astype(str)])
    shared = names.isin(pd.MultiIndex.from_arrays([origins(part.cells), part.cells.obs.index.astype(str)]))
    for e, count in _counts(cells, np.asarray(shared)):
        words = part.word if part.word.startswith("cells") else f"{part.word} cells"
        yield _name(cells, e), count, f"{count} of its cells {where} {words}"


def _cells(part: _Part, test: EnvironmentDataset, _: str | None) -> Found:
    yield from _same(part, test, "are among the")


def _counts(cells: EnvironmentDataset, chosen: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Environments with chosen cells, and how many."""
    counts = np.bincount(cells.env[chosen], minlength=len(cells.environments))
    return [(int(e), int(counts[e])) for e in np.flatnonzero(counts)]


def _name(cells: EnvironmentDataset, environment: int) -> str:
    return str(cells.environments.index[environment])


def _perturbed(cells: EnvironmentDataset) -> list[tuple[int, int]]:
    """Environments with cells that are no references, and how many they have."""
    return _counts(cells, ~cells.reference[cells.env])


# ---------------------------------------------------------------------- environments that have something in common
def _shared(
    part: _Part,
    test: EnvironmentDataset,
    keys: Callable[[EnvironmentDataset], Sequence[Hashable | None]],
    words: str,
) -> Found:
    """Held-out environments with the key of an environment with perturbed cells in the other part."""
    there = keys(part.cells)
    met: dict[Hashable, dict[str, int]] = {}
    for e, count in _perturbed(part.cells):
        met.setdefault(there[e], {})[_name(part.cells, e)] = count
    here = keys(test)
    for e, count in _perturbed(test):
        if here[e] is not None and here[e] in met:
            others = met[here[e]]
            yield (
                _name(test, e),
                count,
                f"{words} {sum(others.values())} {part.word} cells ({listing(list(others), 3)})",
            )


def _environments(part: _Part, test: EnvironmentDataset, _: str | None) -> Found:
    yield from _shared(part, test, lambda cells: [str(n) for n in cells.environments.index], "the environment has")


def _perturbations(part: _Part, test: EnvironmentDataset, _: str | None) -> Found:
    def keys(cells: EnvironmentDataset) -> list[Hashable | None]:
        doses = cells.environments["dose"]
        return [
            (parts[0], None if pd.isna(dose) else dose) if len(parts) == 1 else None
            for parts, dose in zip(_parts(cells), doses, strict=True)
        ]

    yield from _shared(part, test, keys, "the perturbation, at the same dose, has")


def _doses(part: _Part, test: EnvironmentDataset, _: str | None) -> Found:
    def known(cells: EnvironmentDataset) -> dict[int, tuple[str, Any]]:
        parts, doses = _parts(cells), cells.environments["dose"].tolist()
        return {e: (parts[e][0], doses[e]) for e, _ in _perturbed(cells) if len(parts[e]) == 1 and pd.notna(doses[e])}

    met: dict[str, set[Any]] = {}
    for name, dose in known(part.cells).values():
        met.setdefault(name, set()).add(dose)
    here = known(test)
    for e, count in _perturbed(test):
        if e in here:
            name, dose = here[e]
            others = sorted(met.get(name, set()) - {dose})
            if others:
                yield _name(test, e), count, f"{name!r} has {part.word} cells at {listing(others, 3)} uM"


def _combinations(part: _Part, test: EnvironmentDataset, covariate: str | None) -> Found:
    def keys(cells: EnvironmentDataset) -> list[Hashable | None]:
        return [parts if len(parts) > 1 else None for parts in _parts(cells)]

    if covariate is None:
        yield from _shared(part, test, keys, "the combination has")
        return
    here, there = _pairs(test, covariate), _pairs(part.cells, covariate)
    shared = here.isin(there[~part.cells.reference[part.cells.env]]) & ~test.reference[test.env]
    for e, count in _counts(test, np.asarray(shared)):
        pair = here[np.flatnonzero(np.asarray(shared) & (test.env == e))[0]]
        yield _name(test, e), count, f"{pair[0]!r} in {pair[1]!r} has {part.word} cells"


def _pairs(cells: EnvironmentDataset, covariate: str) -> pd.MultiIndex:
    """Perturbation, its parts in order, and category of each cell."""
    parts = np.array(["+".join(own) for own in _parts(cells)], dtype=object)
    return pd.MultiIndex.from_arrays([parts[cells.env], categories(cells, covariate)])


def _parts(cells: EnvironmentDataset) -> list[tuple[str, ...]]:
    """Parts of each environment's perturbation in alphabetical order, without those that name a reference."""
    names = [str(name) for name in cells.environments["perturbation"]]
    unperturbed = {name for name, reference in zip(names, cells.reference, strict=True) if reference}
    return [tuple(sorted(p for p in name.split("+") if p not in unperturbed)) for name in names]


def _cell_lines(part: _Part, test: EnvironmentDataset, _: str | None) -> Found:
    if test.environments["cell_line"].iloc[test.present].isna().all():
        raise DataError(
            "protocol 'cell_line': the test environments have no cell line: read the data with cell_line=COLUMN"
        )
    yield from _shared(
        part,
        test,
        lambda cells: [None if pd.isna(line) else str(line) for line in cells.environments["cell_line"]],
        "its cell line has",
    )


# ---------------------------------------------------------------------- chemistry
def _compounds(part: _Part, test: EnvironmentDataset, _: str | None) -> Found:
    """The same parent molecule under another name."""
    there, here = compound_keys(part.cells), compound_keys(test)
    own, theirs = _parts(test), _parts(part.cells)
    met: dict[Hashable, set[tuple[str, ...]]] = {}
    for e, _count in _perturbed(part.cells):
        if there[e] is not None:
            met.setdefault(there[e], set()).add(theirs[e])
    for e, count in _perturbed(test):
        others = ["+".join(name) for name in sorted(met.get(here[e], set()) - {own[e]})]
        if here[e] is not None and others:
            yield _name(test, e), count, f"the compound, or a salt of it, is {listing(others, 3)} in {part.word}"


def _scaffolds(part: _Part, test: EnvironmentDataset, _: str | None) -> Found:
    there, here = _scaffold_keys(part.cells), _scaffold_keys(test)
    own, theirs = compound_keys(test), compound_keys(part.cells)
    perturbed = _perturbed(test)
    if not any(own[e] is not None for e, _ in perturbed):
        raise DataError(
            "protocol 'scaffold': no test environment has a SMILES that can be read: read the data with smiles=COLUMN"
        )
    met: dict[Hashable, dict[Hashable, str]] = {}
    for e, _count in _perturbed(part.cells):
        met.setdefault(there[e], {})[theirs[e]] = "+".join(_parts(part.cells)[e])
    for e, count in perturbed:
        others = {name for compound, name in met.get(here[e], {}).items() if compound != own[e]}
        if here[e] and others:
            yield _name(test, e), count, f"{listing(sorted(others), 3)} in {part.word} have its scaffold"


def _scaffold_keys(cells: EnvironmentDataset) -> list[str | None]:
    """Scaffold of each environment's compound; None where there is none, empty for acyclic ones."""
    return [None if key is None else _scaffold(str(key)) for key in compound_keys(cells)]


@lru_cache(maxsize=2**16)
def _scaffold(smiles: str) -> str:
    from pyro_scm.data.chemistry import scaffold

    return scaffold(smiles)


# ---------------------------------------------------------------------- plates
def _plates(part: _Part, test: EnvironmentDataset, column: str) -> Found:
    """Plates of held-out perturbed cells that have perturbed cells in the other part."""
    here, there = np.array(categories(test, column)), np.array(categories(part.cells, column))
    met = pd.Series(there[~part.cells.reference[part.cells.env]]).value_counts().to_dict()
    held = pd.Series(here[~test.reference[test.env]]).value_counts(sort=False)
    for plate, count in held.items():
        if plate in met:
            yield str(plate), int(count), f"{met[plate]} perturbed {part.word} cells are on the same {column}"


_FINDERS: Mapping[str, Callable[[_Part, EnvironmentDataset, str | None], Found]] = {
    "cell": _cells,
    "environment": _environments,
    "perturbation": _perturbations,
    "dose": _doses,
    "compound": _compounds,
    "combination": _combinations,
    "cell_line": _cell_lines,
    "scaffold": _scaffolds,
}
