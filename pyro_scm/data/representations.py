"""Representations r [E, F] of environments, built from the environment table."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pyro_scm.batch import DOSE, PART
from pyro_scm.errors import DataError, listing

__all__ = ["Representation", "represent"]

Representation: TypeAlias = str | Sequence[str] | pd.DataFrame | NDArray[Any] | Mapping[str, NDArray[Any]]
"""What `represent` accepts: a kind, several kinds side by side, or the user's own rows."""

KINDS = (
    "one-hot", "multi-hot", "multi-dose", "morgan", "descriptors", "molecules", "dose", "time", "cell_line",
)  # fmt: skip
MISSING = ("error", "zero")
PARTS = ".."  # between the SMILES of a combination's parts, which no SMILES holds


def represent(
    table: pd.DataFrame,
    kind: Representation = "one-hot",
    *,
    radius: int = 2,
    bits: int = 1024,
    separator: str = "+",
    missing_smiles: str = "error",
) -> tuple[NDArray[np.float32], list[str]]:
    """Representation r [E, F] of environments, with zeros for what a reference lacks (a perturbation, a molecule).

    Args:
        table: environment table of E rows with the columns perturbation, dose (uM), time (h), cell_line, smiles and
            is_reference.
        kind: ``"one-hot"`` (environment's perturbation), ``"multi-hot"`` (each part of a combination ``A+B``, times
            log10(1 + dose) where doses are known), ``"multi-dose"`` (the dose of each part in uM, 1 where it is not
            known), ``"morgan"`` (fingerprint of the SMILES, a combination's as of a mixture), ``"descriptors"``
            (RDKit's, see `chemistry.bounded_descriptors`), ``"molecules"`` (fingerprint, descriptors and log10(1 + uM)
            of each part of a combination, whose SMILES are written ``A..B``), ``"dose"`` (log10(1 + uM)), ``"time"``
            (h / 24), ``"cell_line"`` (one-hot), a list of these, or the user's own rows: an array ``[E, F]``, or a
            DataFrame or mapping keyed by environment or perturbation name.
        radius: of the Morgan fingerprint.
        bits: of the Morgan fingerprint.
        separator: between the parts of a combination.
        missing_smiles: ``"error"``, or ``"zero"`` for zeros in place of a molecule that is not known.

    Returns:
        r ``[E, F]`` and the F feature names.

    Raises:
        DataError: an unknown kind, a missing column, or an environment without a row.
    """
    if missing_smiles not in MISSING:
        raise DataError(f"missing_smiles = {missing_smiles!r}: use one of {', '.join(MISSING)}")
    chemical = {"radius": radius, "bits": bits, "missing": missing_smiles}
    if isinstance(kind, str):
        return _kind(table, kind, separator, chemical)
    if isinstance(kind, pd.DataFrame):
        if not kind.index.is_unique:
            double = kind.index[kind.index.duplicated()].unique()
            raise DataError(f"the representation has several rows for {listing(double)}: keep one for each")
        rows = {str(k): row for k, row in zip(kind.index, kind.to_numpy(), strict=True)}
        return _keyed(table, rows, list(kind.columns))
    if isinstance(kind, Mapping):
        return _keyed(table, kind, None)
    if isinstance(kind, np.ndarray):
        return _array(table, kind)
    parts = [_kind(table, str(k), separator, chemical) for k in kind]
    if not parts:
        raise DataError(f"no representation given: name at least one of {listing(KINDS)}")
    return np.concatenate([values for values, _ in parts], axis=1), [name for _, names in parts for name in names]


def _kind(
    table: pd.DataFrame, kind: str, separator: str, chemical: Mapping[str, Any]
) -> tuple[NDArray[np.float32], list[str]]:
    perturbed = ~table["is_reference"].to_numpy(dtype=bool)
    if kind == "one-hot":
        return _one_hot(table["perturbation"].where(perturbed), "perturbation")
    if kind in ("multi-hot", "multi-dose"):
        return _multi_hot(table, perturbed, separator, kind == "multi-dose")
    if kind in ("morgan", "descriptors"):
        return _molecular(table, perturbed, kind, **chemical)
    if kind == "molecules":
        return _molecules(table, perturbed, separator, **chemical)
    if kind == "dose":
        return _filled(np.log10(1 + np.where(perturbed, _single_doses(table), 0.0)), "log10(1 + dose)")
    if kind == "time":
        return _filled(_column(table, "time").to_numpy(dtype=float) / 24, "time / 24 h")
    if kind == "cell_line":
        return _one_hot(_column(table, "cell_line"), "cell_line")
    raise DataError(f"unknown representation {kind!r}: use one of {', '.join(KINDS)}, or give an array [E, F]")


def _column(table: pd.DataFrame, name: str) -> "pd.Series[Any]":
    if name not in table or table[name].isna().all():
        raise DataError(
            f"the environments have no {name}: name the obs column that holds it (from_anndata(..., {name}=COLUMN))"
        )
    return table[name]


def _single_doses(table: pd.DataFrame) -> NDArray[np.float64]:
    dose = _column(table, "dose")
    combined = [label for label, value in dose.items() if isinstance(value, str)]
    if combined:
        raise DataError(
            f"{listing(combined)} have one dose for each part: represent them as 'multi-hot' instead of 'dose'"
        )
    return dose.to_numpy(dtype=float)


def _one_hot(values: "pd.Series[Any]", name: str) -> tuple[NDArray[np.float32], list[str]]:
    dummies = pd.get_dummies(values.astype("object"), dtype=np.float32)
    return dummies.to_numpy(np.float32), [f"{name}={c}" for c in dummies.columns]


def _filled(values: NDArray[np.float64], name: str) -> tuple[NDArray[np.float32], list[str]]:
    """A number and a flag for where it is unknown, so that an unknown dose is not mistaken for dose 0."""
    unknown = np.isnan(values)
    columns, names = [np.where(unknown, 0, values)], [name]
    if unknown.any():
        columns, names = [*columns, unknown.astype(float)], [*names, f"{name} unknown"]
    return np.stack(columns, 1).astype(np.float32), names


def _multi_hot(
    table: pd.DataFrame, perturbed: NDArray[np.bool_], separator: str, linear: bool
) -> tuple[NDArray[np.float32], list[str]]:
    split, amounts = _parts(table, perturbed, separator)
    names = sorted({part for parts in split for part in parts})
    column = {name: i for i, name in enumerate(names)}
    values = np.zeros((len(table), len(names)), np.float32)
    for row, parts, doses in zip(values, split, amounts, strict=True):
        for part, dose in zip(parts, doses, strict=True):
            row[column[part]] = 1.0 if np.isnan(dose) else dose if linear else np.log10(1 + dose)
    return values, [(DOSE if linear else "perturbation=") + name for name in names]


def _parts(
    table: pd.DataFrame, perturbed: NDArray[np.bool_], separator: str
) -> tuple[list[list[str]], list[list[float]]]:
    """Names and doses of the parts of each environment's perturbation; none in a reference."""
    split = [str(p).split(separator) if used else [] for p, used in zip(table["perturbation"], perturbed, strict=True)]
    doses = table["dose"] if "dose" in table else pd.Series(np.nan, table.index)
    amounts = [
        _amounts(dose, len(parts), separator, str(label)) if parts else []
        for parts, dose, label in zip(split, doses, table.index, strict=True)
    ]
    return split, amounts


def _amounts(dose: Any, parts: int, separator: str, label: str) -> list[float]:
    given = [float(d) for d in str(dose).split(separator)] if isinstance(dose, str) else [float(dose)]
    if len(given) == 1:
        return given * parts
    if len(given) != parts:
        raise DataError(
            f"environment {label!r} has {parts} perturbations and {len(given)} doses: give one dose for each"
        )
    return given


def _known(
    table: pd.DataFrame, perturbed: NDArray[np.bool_], missing: str
) -> tuple["pd.Series[Any]", NDArray[np.bool_]]:
    """SMILES, and which environments have one."""
    smiles = _column(table, "smiles")
    lacking = perturbed & smiles.isna().to_numpy()
    if lacking.any() and missing == "error":
        raise DataError(
            f"no SMILES for {listing(table.index[lacking])}: fill the SMILES column, drop these environments, choose "
            "another representation, or take zeros for them (missing_smiles='zero')"
        )
    return smiles, perturbed & ~lacking


def _features(
    smiles: Sequence[str], names: Sequence[str], kind: str, radius: int, bits: int
) -> tuple[NDArray[np.float32], list[str]]:
    """Fingerprints or descriptors of molecules."""
    from pyro_scm.data.chemistry import bounded_descriptors, morgan

    if kind == "descriptors":
        return bounded_descriptors(smiles, names)
    titles = [f"morgan{2 * radius}:{i}" for i in range(bits)]
    return morgan(smiles, radius=radius, bits=bits, names=names) if smiles else np.zeros((0, bits), np.float32), titles


def _molecular(
    table: pd.DataFrame, perturbed: NDArray[np.bool_], kind: str, radius: int, bits: int, missing: str
) -> tuple[NDArray[np.float32], list[str]]:
    smiles, known = _known(table, perturbed, missing)
    names = [str(n) for n in table.index[known]]
    mixtures = [str(s).replace(PARTS, ".") for s in smiles[known]]
    rows, titles = _features(mixtures, names, kind, radius, bits)
    values = np.zeros((len(table), len(titles)), np.float32)
    values[known] = rows
    return values, titles


def _molecules(
    table: pd.DataFrame, perturbed: NDArray[np.bool_], separator: str, radius: int, bits: int, missing: str
) -> tuple[NDArray[np.float32], list[str]]:
    """Fingerprint, descriptors and dose of each part of a combination, one part after the other."""
    smiles, known = _known(table, perturbed, missing)
    split, amounts = _parts(table, perturbed, separator)
    molecules = [str(s).split(PARTS) if used else [] for s, used in zip(smiles, known, strict=True)]
    for label, own, parts in zip(table.index, molecules, split, strict=True):
        if own and len(own) != len(parts):
            raise DataError(
                f"environment {str(label)!r} has {len(parts)} perturbations and {len(own)} SMILES: give one for each, "
                f"with {PARTS!r} between them"
            )
    flat = [text for own in molecules for text in own]
    labels = [str(label) for label, own in zip(table.index, molecules, strict=True) for _ in own]
    both = [_features(flat, labels, kind, radius, bits) for kind in ("morgan", "descriptors")]
    described = iter(np.concatenate([rows for rows, _ in both], axis=1))
    titles = [*both[0][1], *both[1][1], "log10(1 + dose)"]
    values = np.zeros((len(table), max(map(len, split), default=1), len(titles)), np.float32)
    for row, own, doses in zip(values, molecules, amounts, strict=True):
        for slot, dose in zip(row, doses, strict=False):
            slot[-1] = 1.0 if np.isnan(dose) else np.log10(1 + dose)
        for slot, _ in zip(row, own, strict=False):
            slot[:-1] = next(described)
    names = [f"{PART}{p + 1}: {title}" for p in range(values.shape[1]) for title in titles]
    return values.reshape(len(table), -1), names


def _array(table: pd.DataFrame, values: NDArray[Any]) -> tuple[NDArray[np.float32], list[str]]:
    if values.ndim != 2 or len(values) != len(table):
        raise DataError(
            f"the representation has shape {values.shape}, the environment table {len(table)} rows: give an array "
            f"[{len(table)}, F] in the table's order ({listing(table.index)})"
        )
    if values.dtype.kind not in "fiub":
        raise DataError(f"the representation has dtype {values.dtype}: give numbers")
    return _finite(values.astype(np.float32), table), [f"feature {i}" for i in range(values.shape[1])]


def _keyed(
    table: pd.DataFrame, rows: Mapping[str, NDArray[Any]], names: Sequence[Any] | None
) -> tuple[NDArray[np.float32], list[str]]:
    width = {len(row) for row in rows.values()}
    if len(width) != 1:
        raise DataError(f"the representation's rows have lengths {sorted(width)}: give vectors of one length")
    values = np.zeros((len(table), width.pop()), np.float32)
    missing = []
    for i, (label, perturbation, reference) in enumerate(
        zip(table.index, table["perturbation"], table["is_reference"], strict=True)
    ):
        row = rows.get(str(label), rows.get(str(perturbation)))
        if row is not None:
            try:
                values[i] = row
            except (TypeError, ValueError) as error:
                raise DataError(f"the representation of {str(label)!r} is not a vector of numbers: {error}") from error
        elif not reference:
            missing.append(label)
    if missing:
        raise DataError(
            f"the representation has no row for {listing(missing)}: add them by environment or perturbation"
        )
    titles = [f"feature {i}" for i in range(values.shape[1])] if names is None else [str(n) for n in names]
    return _finite(values, table), titles


def _finite(values: NDArray[np.float32], table: pd.DataFrame) -> NDArray[np.float32]:
    bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
    if len(bad):
        raise DataError(f"the representation of {listing(table.index[bad])} is not finite: remove NaN and infinities")
    return values
