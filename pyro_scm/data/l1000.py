"""LINCS L1000 data sets: the GEO metadata tables, doses, times, vehicle centring and stacked plates.

Levels: Subramanian et al. 2017, Cell 171:1437 (level 3: normalised log2 expression per well; level 4: robust z-scores
per well; level 5: one z-score signature per condition). `pyro_scm.data.gct` reads the files.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pyro_scm.data.gct import MISSING, Table, cleaned, identifier, read, read_table, refuse_duplicates
from pyro_scm.errors import DataError, listing

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = [
    "centre_on_vehicle",
    "join_metadata",
    "landmarks",
    "load_plates",
    "parse_dose",
    "parse_time",
    "standardise",
]

_LANDMARK_COLUMNS = ("pr_is_lmark", "pr_is_lm", "is_lmark", "is_lm", "feature_space")
_SAMPLE_IDS = ("sig_id", "inst_id", "distil_id", "id")
_TEXT_SOURCES: Mapping[str, tuple[str, ...]] = {
    "perturbation": ("pert_iname", "cmap_name", "pert_desc", "pert_id", "perturbation"),
    "pert_id": ("pert_id",),
    "pert_type": ("pert_type",),
    "cell_line": ("cell_id", "cell_iname", "cell_line"),
    "smiles": ("canonical_smiles", "smiles"),
    "plate": ("rna_plate", "plate", "det_plate"),
    "well": ("rna_well", "well", "det_well"),
}
# (column of the value, column of the unit or the unit itself): the first that gives a number wins
_DOSE_SOURCES = (
    ("pert_idose", None),
    ("pert_dose", "pert_dose_unit"),
    ("exp_pert_dose", "exp_pert_dose_unit"),
    ("dose_um", "um"),
    ("dose", "um"),
)
_TIME_SOURCES = (
    ("pert_itime", None),
    ("pert_time", "pert_time_unit"),
    ("exp_pert_time", "exp_pert_time_unit"),
    ("time_h", "h"),
    ("time", "h"),
)
_STANDARD = ("perturbation", "pert_id", "pert_type", "dose", "time", "cell_line", "smiles", "plate", "well", "control")
_CONTROL_TYPES = ("ctl_vehicle", "ctl_untrt", "ctl_vector")  # and their consensus signatures, ctl_vehicle.cns ...
_MICROMOLAR = {"pm": Fraction(1, 10**6), "nm": Fraction(1, 1000), "um": Fraction(1), "mm": Fraction(1000)}
_HOURS = {
    **dict.fromkeys(("m", "min", "mins", "minute", "minutes"), Fraction(1, 60)),
    **dict.fromkeys(("h", "hr", "hrs", "hour", "hours"), Fraction(1)),
    **dict.fromkeys(("d", "day", "days"), Fraction(24)),
}
_QUANTITY = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)\s*(.*)", re.IGNORECASE)
_MAD_TO_SIGMA = 1.4826  # 1 / Phi^-1(3/4): the MAD of a normal variable times this is its standard deviation


def landmarks(var: pd.DataFrame) -> NDArray[np.bool_]:
    """Which genes are measured landmarks (978 of the 12,328), by ``pr_is_lmark``, ``pr_is_lm`` or ``feature_space``.

    Args:
        var: gene annotation, one row per gene.

    Returns:
        [genes].

    Raises:
        DataError: none of the columns is there.
    """
    for name in _LANDMARK_COLUMNS:
        if name in var:
            return var[name].astype(str).str.lower().isin(["1", "1.0", "true", "landmark"]).to_numpy(bool)
    raise DataError(
        f"no column of {listing(_LANDMARK_COLUMNS)} tells the landmarks apart: there are {listing(var.columns, 10)}; "
        "join the gene_info table with join_metadata(adata, genes=...)"
    )


def join_metadata(
    adata: "AnnData",
    *,
    signatures: Table | None = None,
    perturbations: Table | None = None,
    cells: Table | None = None,
    genes: Table | None = None,
) -> "AnnData":
    """The columns of the GEO tables added to obs and var; values that are there already stay, gaps are filled.

    Args:
        adata: from `gct.read`.
        signatures: ``*_sig_info*`` (level 5) or ``*_inst_info*`` (level 3 and 4): a path (tab or comma separated, .gz
            allowed) or a DataFrame with ``sig_id``, ``inst_id`` or ``distil_id``, matched with the sample names.
        perturbations: ``*_pert_info*``, by ``pert_id``.
        cells: ``*_cell_info*``, by ``cell_id``.
        genes: ``*_gene_info*``, by ``pr_gene_id``, matched with ``var["pr_gene_id"]`` or else the gene names.

    Returns:
        A copy. Perturbations and cells are looked up after the signatures were joined.

    Raises:
        DataError: a table without its id column or with contradictory rows, and samples or genes that are not in it.
    """
    joined = adata.copy()
    obs, var = joined.obs, joined.var
    if signatures is not None:
        obs = _joined(obs, [obs.index], signatures, _SAMPLE_IDS, "signatures", "sample")
    if perturbations is not None:
        keys = _key_columns(obs, ("pert_id",), "perturbations")
        obs = _joined(obs, keys, perturbations, ("pert_id",), "perturbations", "sample")
    if cells is not None:
        keys = _key_columns(obs, ("cell_id", "cell_iname", "cell_line"), "cells")
        obs = _joined(obs, keys, cells, ("cell_id", "cell_iname"), "cells", "sample")
    if genes is not None:
        keys = [var["pr_gene_id"]] if "pr_gene_id" in var else [var.index]
        var = _joined(var, keys, genes, ("pr_gene_id", "gene_id"), "genes", "gene")
    joined.obs, joined.var = obs, var
    return joined


def _key_columns(obs: pd.DataFrame, names: Sequence[str], what: str) -> "list[pd.Series[Any]]":
    found = [obs[name] for name in names if name in obs]
    if not found:
        raise DataError(
            f"{what}: obs has no column {listing(names)} to look the table up by; join signatures=... first "
            f"(obs has {listing(obs.columns, 10)})"
        )
    return found


def _joined(
    frame: pd.DataFrame,
    keys: "Sequence[pd.Series[Any] | pd.Index[Any]]",
    source: Table,
    id_names: Sequence[str],
    what: str,
    kind: str,
    *,
    table_wins: bool = False,
) -> pd.DataFrame:
    """`frame` with the table's columns, looked up by whichever pair of key and id column matches most of its rows."""
    table, where = read_table(source, what)
    ids = [name for name in id_names if name in table]
    if not ids:
        raise DataError(f"{where}: no id column {listing(id_names)}; there are {listing(table.columns, 10)}")
    texts = [pd.Series([identifier(v) for v in key], index=frame.index, dtype=object) for key in keys]
    columns = {name: table[name].map(identifier) for name in ids}
    pairs = [(key, name) for key in texts for name in ids]
    key, name = max(pairs, key=lambda pair: int(pair[0].isin(set(columns[pair[1]])).sum()))
    unknown = frame.index[~key.isin(set(columns[name]))]
    if len(unknown):
        raise DataError(
            f"{where}: no metadata for {len(unknown)} of {len(frame)} {kind}s ({listing(unknown)}; {name} "
            f"{listing(key[unknown].unique())}): give the table of the same release, or drop these {kind}s"
        )
    table = table.drop(columns=name).set_index(pd.Index(columns[name], dtype=object))
    table = table[table.index.isin(set(key))]
    table = table[~table.reset_index().astype(str).duplicated().to_numpy()]
    refuse_duplicates(table.index, f"{where}: rows that differ for one {name}")
    return _merged(frame, table.reindex(pd.Index(key)).set_axis(frame.index), table_wins)


def _merged(frame: pd.DataFrame, table: pd.DataFrame, table_wins: bool) -> pd.DataFrame:
    merged = frame.copy()
    for name in table:
        new = cleaned(str(name), table[name].to_numpy())
        if name in frame:
            old = frame[name].to_numpy()
            first, second = (new, old) if table_wins else (old, new)
            gaps = pd.isna(first)
            if not gaps.any():
                new = first
            else:
                new = cleaned(str(name), np.where(gaps, second.astype(object), first.astype(object)))
        merged[name] = new
    return merged


def parse_dose(value: object, unit: object = None) -> float:
    """A dose in uM: ``"500 nM"`` is 0.5; NaN where it is missing or its unit is not a concentration (%, ng, ul).

    Args:
        value: text with a unit (``"10.0 um"``, ``"10 µM"``), or a number.
        unit: the unit, where the value has none of its own.

    Returns:
        uM, or NaN. A number without any unit is unknown, hence NaN; of ``"300|300.0"`` both parts must agree.
    """
    return _quantity(value, unit, _MICROMOLAR)


def parse_time(value: object, unit: object = None) -> float:
    """A time in hours: ``"24 h"``, ``"6 H"`` or ``"30 m"`` (0.5); NaN where it or its unit is missing or unknown.

    Args:
        value: text with a unit, or a number.
        unit: the unit, where the value has none of its own.

    Returns:
        hours, or NaN.
    """
    return _quantity(value, unit, _HOURS)


def _quantity(value: object, unit: object, factors: Mapping[str, Fraction]) -> float:
    text = "" if value is None else str(value).strip()
    if "|" in text:
        parts = {_quantity(part, unit, factors) for part in text.split("|")}
        return parts.pop() if len(parts) == 1 else float("nan")
    found = _QUANTITY.fullmatch(text)
    if text.lower() in MISSING or found is None:
        return float("nan")
    own = (found[2] or str(unit)).strip().lower().replace("\u00b5", "u").replace("\u03bc", "u")
    factor = factors.get(own)
    number = Fraction(found[1])  # exact, so that 40 nM is the float 0.04 and not a neighbour of it
    return float(number * factor) if factor is not None and number >= 0 else float("nan")


def standardise(adata: "AnnData", *, control_names: Sequence[str] = ("DMSO",)) -> "AnnData":
    """The obs columns that the rest of the package reads, from whatever the L1000 release called them.

    ``perturbation`` (pert_iname, else pert_desc, else pert_id), ``pert_id``, ``pert_type`` (lower case), ``dose`` (uM;
    pert_idose, else pert_dose with its unit), ``time`` (h), ``cell_line``, ``smiles``, ``plate`` (rna_plate, else
    det_plate), ``well`` and ``control``. The source columns stay.

    Args:
        adata: from `gct.read` or `join_metadata`.
        control_names: perturbations that are controls besides those whose pert_type is ctl_vehicle, ctl_untrt or
            ctl_vector (for an shRNA plate, say, ``("EMPTY", "GFP")``); case does not matter.

    Returns:
        A copy; a column without a source is left out. Controls have dose 0, whatever the file records for the vehicle.

    Raises:
        DataError: no column names the perturbation.
    """
    result = adata.copy()
    obs = result.obs
    new: dict[str, NDArray[Any]] = {}
    for name, sources in _TEXT_SOURCES.items():
        present = [obs[source] for source in sources if source in obs]
        if present:
            new[name] = _first_known(present)
    if "perturbation" not in new:
        raise DataError(
            f"no obs column of {listing(_TEXT_SOURCES['perturbation'])} names the perturbation: obs has "
            f"{listing(obs.columns, 10)}; join the sig_info or inst_info table with join_metadata first"
        )
    if "pert_type" in new:
        new["pert_type"] = np.asarray([t if pd.isna(t) else t.lower() for t in new["pert_type"]], dtype=object)
    new["control"] = _is_control(new, control_names)
    for name, quantities, parse in (("dose", _DOSE_SOURCES, parse_dose), ("time", _TIME_SOURCES, parse_time)):
        values = _first_number(obs, quantities, parse)
        if values is not None:
            new[name] = values
    if "dose" in new:
        new["dose"][new["control"]] = 0.0
    for name in _STANDARD:
        if name in new:
            obs[name] = new[name]
    return result


def _first_known(columns: "Sequence[pd.Series[Any]]") -> NDArray[Any]:
    values = np.full(len(columns[0]), None, dtype=object)
    for column in columns:
        texts = np.asarray(column.astype(object), dtype=object)
        gaps = pd.isna(values) & ~pd.isna(texts)
        values[gaps] = [identifier(v) for v in texts[gaps]]
    return cleaned("name", values)


def _is_control(columns: Mapping[str, NDArray[Any]], control_names: Sequence[str]) -> NDArray[np.bool_]:
    names = {name.lower() for name in control_names}
    control = np.zeros(len(columns["perturbation"]), bool)
    for name in ("perturbation", "pert_id"):
        if name in columns:
            control |= np.asarray([str(v).lower() in names for v in columns[name]])
    if "pert_type" in columns:
        control |= np.asarray([str(v).startswith(_CONTROL_TYPES) for v in columns["pert_type"]])
    return control


def _first_number(
    obs: pd.DataFrame, sources: Sequence[tuple[str, str | None]], parse: Callable[[object, object], float]
) -> NDArray[np.float64] | None:
    present = [(value, unit) for value, unit in sources if value in obs]
    if not present:
        return None
    result = np.full(len(obs), np.nan)
    for value, unit in present:
        # to_numpy keeps float32, whose shortest text is the dose that was written: 44.4, not 44.400001525878906
        texts = [str(v) for v in obs[value].to_numpy()]
        units = [str(v) for v in obs[unit].to_numpy()] if unit in obs else [unit] * len(obs)
        pairs = list(zip(texts, units, strict=True))
        known = {pair: parse(*pair) for pair in set(pairs)}
        numbers = np.asarray([known[pair] for pair in pairs])
        result = np.where(np.isnan(result), numbers, result)
    return result


def centre_on_vehicle(
    adata: "AnnData",
    *,
    plate: str = "plate",
    control: str = "control",
    statistic: str = "median",
    scale: bool = False,
    floor: float = 0.1,
) -> "AnnData":
    """Subtract m_p, or take (x - m_p) / (1.4826 MAD_p), with m_p and MAD_p of a gene over the vehicle wells of plate p.

    The scaled form with floor 0.1 is the vehicle-controlled level 4 z-score (Subramanian et al. 2017).

    Args:
        adata: level 3 (log2 expression). Z-scores (``uns["l1000_level"]`` 4 or 5) are refused.
        plate: obs column.
        control: boolean obs column of the vehicle wells.
        statistic: "median" or "mean".
        scale: divide by the robust spread.
        floor: smallest MAD (log2 units): a saturated gene has none, and must not blow up.

    Returns:
        A copy with the centred X (NaN stays NaN) and ``uns["l1000_centred"]``.

    Raises:
        DataError: names the plates without vehicle wells (with `scale`: with fewer than two); columns that are not
            there; z-scores; an unknown statistic.
    """
    _check_centring(adata, plate, control, statistic, floor)
    x = np.array(adata.X.toarray() if hasattr(adata.X, "toarray") else adata.X, dtype=np.float32)
    vehicle = adata.obs[control].to_numpy(bool)
    plates = adata.obs[plate].astype(str).to_numpy()
    needed = 2 if scale else 1
    names = list(dict.fromkeys(plates))
    short = [name for name in names if int(vehicle[plates == name].sum()) < needed]
    if short:
        raise DataError(
            f"plate {listing(short)}: fewer than {needed} vehicle wells ({control!r} is true in none or too few): "
            "centring needs them; drop the plate or mark its controls"
        )
    for name in names:
        wells = plates == name
        reference = pd.DataFrame(x[wells & vehicle])  # its median and mean skip NaN without a warning
        centre = reference.median() if statistic == "median" else reference.mean()
        x[wells] -= centre.to_numpy(np.float32)
        if scale:
            spread = (reference - reference.median()).abs().median().clip(lower=floor) * _MAD_TO_SIGMA
            x[wells] /= spread.to_numpy(np.float32)
    result = adata.copy()
    result.X = x
    result.uns["l1000_centred"] = {"statistic": statistic, "scaled": scale}
    return result


def _check_centring(adata: "AnnData", plate: str, control: str, statistic: str, floor: float) -> None:
    if statistic not in ("median", "mean"):
        raise DataError(f"statistic={statistic!r}: expected 'median' or 'mean'")
    if not floor > 0:
        raise DataError(f"floor={floor}: the smallest MAD must be positive")
    level = adata.uns.get("l1000_level")
    if level in (4, 5):
        raise DataError(
            f"these are level {level} z-scores, which are relative to controls already: centre level 3 instead "
            "(or correct adata.uns['l1000_level'] if it is wrong)"
        )
    for name in (plate, control):
        if name not in adata.obs:
            raise DataError(f"no obs column {name!r}: run standardise first; obs has {listing(adata.obs.columns, 10)}")
    if adata.obs[plate].isna().any():
        unknown = adata.obs_names[adata.obs[plate].isna()]
        raise DataError(f"obs column {plate!r} is missing in {len(unknown)} samples ({listing(unknown)})")
    if adata.obs[control].dtype.kind != "b":
        raise DataError(f"obs column {control!r} has type {adata.obs[control].dtype}: expected booleans")


def load_plates(paths: Sequence[str | Path], obs: Table | None = None, genes: Sequence[str] | None = None) -> "AnnData":
    """Several plates, standardised and stacked on their common genes.

    Genes are matched by Entrez id (``pr_gene_id``) where every file has it, else by symbol, else by row id: symbols
    change over the years (CABC1 became ADCK3). Names and annotation of the genes are those of the first file.

    Args:
        paths: GCT or GCTX files of one level.
        obs: more sample annotation, by sample id (sig_id, inst_id, distil_id, id) or by ``plate`` and ``well``; where
            it has a value it replaces the file's.
        genes: symbols or ids to keep, in this order. None: all common genes, in the first file's order.

    Returns:
        samples of all files in order x genes; obs has the columns of `standardise` and of `obs`.

    Raises:
        DataError: no file, samples that appear twice, files of different levels, no common gene, unknown genes, samples
            that `obs` does not have.
    """
    from anndata import AnnData

    if isinstance(paths, str | Path) or not len(paths):
        raise DataError(f"paths={paths!r}: give a list of GCT or GCTX files")
    plates = [standardise(read(path)) for path in paths]
    levels = {plate.uns["l1000_level"] for plate in plates if "l1000_level" in plate.uns}
    if len(levels) > 1:
        raise DataError(f"{listing(str(p) for p in paths)}: levels {sorted(levels)} do not go together in one matrix")
    keys = _gene_keys([plate.var for plate in plates])
    common = _common_genes(keys, plates[0].var, genes)
    x = np.concatenate([plate.X[:, key.get_indexer(common)] for plate, key in zip(plates, keys, strict=True)])
    samples = pd.Index([name for plate in plates for name in plate.obs_names], dtype=object)
    refuse_duplicates(samples, f"{listing(str(p) for p in paths)}: samples in more than one file")
    var = plates[0].var.iloc[keys[0].get_indexer(common)].copy()
    var.index = _gene_names(var, common)
    table = _stacked([plate.obs for plate in plates], samples)
    if obs is not None:
        table = _annotated(table, obs)
    result = AnnData(X=x, obs=table, var=var)
    if levels:
        result.uns["l1000_level"] = levels.pop()
    return result


def _gene_keys(tables: Sequence[pd.DataFrame]) -> "list[pd.Index[Any]]":
    """One unique name per gene and file, of the best kind that every file has."""
    for name in ("pr_gene_id", "pr_gene_symbol"):
        if all(name in t and t[name].notna().all() and t[name].is_unique for t in tables):
            return [pd.Index(t[name].map(identifier), dtype=object) for t in tables]
    return [t.index for t in tables]


def _common_genes(keys: "Sequence[pd.Index[Any]]", var: pd.DataFrame, genes: Sequence[str] | None) -> "pd.Index[Any]":
    shared = set(keys[0]).intersection(*keys[1:])
    if not shared:
        raise DataError(f"the files have no gene in common: {listing(keys[0], 3)}, but {listing(keys[-1], 3)}")
    if genes is None:
        genes = [key for key in keys[0] if key in shared]
    columns: list[Any] = [keys[0], *(var[c] for c in ("pr_gene_symbol", "pr_gene_id") if c in var), var.index]
    lookup = {str(name): key for column in reversed(columns) for name, key in zip(column, keys[0], strict=True)}
    unknown = [g for g in genes if lookup.get(g) not in shared]
    if unknown:
        raise DataError(f"genes {listing(unknown)} are not in all files; {len(shared)} are, e.g. {listing(keys[0], 3)}")
    if not len(genes):
        raise DataError("genes is empty: name at least one, or leave it out for all common genes")
    chosen: pd.Index[Any] = pd.Index([lookup[g] for g in genes], dtype=object)
    refuse_duplicates(chosen, "genes: named twice")
    return chosen


def _gene_names(var: pd.DataFrame, common: "pd.Index[Any]") -> "pd.Index[Any]":
    symbols = var.get("pr_gene_symbol")
    if symbols is None or symbols.isna().any() or not symbols.is_unique:
        return common
    return pd.Index([str(symbol) for symbol in symbols], dtype=object)


def _stacked(tables: Sequence[pd.DataFrame], samples: "pd.Index[Any]") -> pd.DataFrame:
    columns: dict[str, NDArray[Any]] = {}
    for name in _STANDARD:
        if any(name in table for table in tables):
            parts = [t[name].to_numpy() if name in t else np.full(len(t), np.nan) for t in tables]
            columns[name] = np.concatenate([p.astype(object) for p in parts])
    columns = {name: _as_standard(name, values) for name, values in columns.items()}
    return pd.DataFrame(columns, index=samples)


def _as_standard(name: str, values: NDArray[Any]) -> NDArray[Any]:
    if name == "control":
        return values.astype(bool)
    return values.astype(np.float64) if name in ("dose", "time") else cleaned("name", values)


def _annotated(obs: pd.DataFrame, source: Table) -> pd.DataFrame:
    """`obs` with the user's table, by sample id or else by plate and well."""
    table, _ = read_table(source, "obs")
    if not {"plate", "well"} <= set(table.columns) or any(name in table for name in _SAMPLE_IDS):
        return _joined(obs, [obs.index], table, _SAMPLE_IDS, "obs", "sample", table_wins=True)
    wells = [f"{p}:{w}" for p, w in zip(*(_key_columns(obs, (c,), "obs")[0] for c in ("plate", "well")), strict=True)]
    table = table.assign(id=table["plate"].astype(str) + ":" + table["well"].astype(str))
    return _joined(obs, [pd.Index(wells, dtype=object)], table, ("id",), "obs", "sample", table_wins=True)
