"""Data files: how one is read, and what a run remembers of it."""

import json
from argparse import Namespace
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pyro_scm.cli.parsing import Parser, names, natural, path, whole
from pyro_scm.errors import CheckpointError, DataError, listing

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

    from pyro_scm.data.dataset import EnvironmentDataset

__all__ = [
    "DataOptions",
    "Memory",
    "add_data_options",
    "environments",
    "labels",
    "read",
    "represent_parts",
    "represented",
]

MEMORY = "data.json"

MOLECULAR = ("morgan", "descriptors", "molecules")
"""Representations of molecules, written with the obs column of their SMILES: ``morgan:COLUMN``."""


@dataclass(frozen=True)
class DataOptions:
    """How to read a data file; the fields are those of `EnvironmentDataset.from_anndata`.

    Args:
        environment: obs column of the perturbation.
        control: its values in unperturbed cells.
        representation: parts such as ``"one-hot"``, ``"morgan:SMILES"``, ``"uns:KEY"``, ``"table:FILE.csv"``.
        dose: obs column, uM.
        time: obs column, h.
        cell_line: obs column.
        covariates: obs columns.
        proteins: obsm key of surface-protein counts.
        counts: whether the values are counts; None to tell by looking.
        layer: to read instead of X.
        size: obs column of the library size.
        radius: of Morgan fingerprints.
        bits: of Morgan fingerprints.
        separator: between the parts of a combination.
    """

    environment: str | None = None
    control: tuple[str, ...] = ()
    representation: tuple[str, ...] = ()
    dose: str | None = None
    time: str | None = None
    cell_line: str | None = None
    covariates: tuple[str, ...] = ()
    proteins: str | None = None
    counts: bool | None = None
    layer: str | None = None
    size: str | None = None
    radius: int = 2
    bits: int = 1024
    separator: str = "+"

    @staticmethod
    def given(args: Namespace) -> "DataOptions":
        """Those on the command line."""
        found = {f.name: getattr(args, f.name) for f in fields(DataOptions) if getattr(args, f.name) is not None}
        parts = tuple(_absolute(part) for part in found.pop("representation", ()))
        return DataOptions(**found, representation=parts)

    @property
    def smiles(self) -> str | None:
        """The obs column of the molecules."""
        parts = [part.partition(":") for part in self.representation]
        columns = [column for kind, _, column in parts if kind in MOLECULAR and column]
        return columns[0] if columns else None

    def changed(self, assignments: Sequence[tuple[str, Any]]) -> "DataOptions":
        """With some of them replaced, by ``--data-option NAME=VALUE``.

        Raises:
            DataError: no such option.
        """
        kinds = {f.name: f.default for f in fields(DataOptions)}
        values: dict[str, Any] = {}
        for name, value in assignments:
            key = name.replace("-", "_")
            if key not in kinds:
                raise DataError(f"--data-option {name}: there is no such option: use one of {', '.join(kinds)}")
            if isinstance(kinds[key], tuple):
                value = tuple(str(v) for v in value) if isinstance(value, tuple) else (str(value),)
            elif kinds[key] is None and key != "counts":
                value = None if value is None else str(value)
            values[key] = value
        return replace(self, **values)


@dataclass(frozen=True)
class Memory:
    """What the command line remembers of a fit, in RUN/data.json, so that later verbs need not be told again.

    Args:
        data: how the data were read.
        hold_out: names of the environments that were held out.
        validation_fraction: of the perturbations, set aside to choose the epoch by.
        genes: how many of the most variable genes were kept; None for all.
        model: as it was named.
        options: of the model and guide.
        training: of `pyro_scm.fit`.
    """

    data: DataOptions = DataOptions()
    hold_out: tuple[str, ...] = ()
    validation_fraction: float = 0.0
    genes: int | None = None
    model: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Write it into a run's folder."""
        from pyro_scm.checkpoints import write_text

        write_text(folder / MEMORY, json.dumps(asdict(self), indent=1))

    @staticmethod
    def load(folder: Path) -> "Memory":
        """Read it from a run's folder; empty where the run was made in Python.

        Raises:
            CheckpointError: it is damaged.
        """
        file = folder / MEMORY
        if not file.is_file():
            return Memory()
        try:
            stored = {f.name: json.loads(file.read_text())[f.name] for f in fields(Memory)}
            known = {f.name for f in fields(DataOptions)}
            stored["data"] = DataOptions(**{k: _tupled(v) for k, v in stored["data"].items() if k in known})
            stored["hold_out"] = tuple(str(name) for name in stored["hold_out"])
            for part in ("options", "training"):
                stored[part] = {name: _tupled(value) for name, value in stored[part].items()}
            return Memory(**stored)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{file}: damaged ({type(error).__name__}: {error}): delete it and give the options with --data-option"
            ) from error


def _tupled(value: Any) -> Any:
    """JSON has no tuples."""
    return tuple(value) if isinstance(value, list) else value


def _absolute(part: str) -> str:
    """A representation's part that holds from any folder."""
    kind, _, name = part.partition(":")
    return f"table:{path(name).resolve()}" if kind == "table" else part


def add_data_options(parser: Parser) -> None:
    """How to read DATA.h5ad."""
    parser.add_argument("data", metavar="DATA.h5ad", type=path, help="cells by genes, an AnnData file")
    group = parser.add_argument_group("what the data file holds")
    add = group.add_argument
    add(
        "--environment",
        metavar="COLUMN",
        help="obs column that says how each cell was perturbed (drug, guide, ...). An environment is a distinct "
        "combination of it with dose, time and cell line",
    )
    add(
        "--control",
        metavar="VALUE",
        action="append",
        help="value of that column in unperturbed cells (DMSO, NT, ...); may be given several times",
    )
    add(
        "--representation",
        metavar="KINDS",
        type=names,
        help="what the model knows of an environment, several joined by commas: one-hot (its name only: nothing can be "
        "said of unseen ones), multi-hot (parts of a combination A+B), multi-dose (their doses in uM), "
        "morgan:SMILES_COLUMN (fingerprint of the drug's structure), descriptors:SMILES_COLUMN, "
        "molecules:SMILES_COLUMN (both, and the dose, of each part of a combination), dose, time, cell_line, uns:KEY "
        "(a table in the file), table:FILE.csv (first column: environment or perturbation name; the others: features) "
        "(default: one-hot)",
    )
    add("--dose", metavar="COLUMN", help="obs column of the dose, in uM")
    add("--time", metavar="COLUMN", help="obs column of the time of treatment, in h")
    add("--cell-line", metavar="COLUMN", help="obs column of the cell line")
    add("--covariates", metavar="A,B", type=names, help="obs columns of batch, replicate, cell type, ...")
    add("--proteins", metavar="KEY", help="obsm entry of surface-protein counts")
    kind = group.add_mutually_exclusive_group()
    kind.add_argument(
        "--counts",
        action="store_const",
        const=True,
        help="the values are raw counts (default: found out by looking for whole numbers)",
    )
    kind.add_argument(
        "--continuous",
        dest="counts",
        action="store_const",
        const=False,
        help="the values are log-normalised, z-scores or other continuous numbers",
    )
    add("--layer", metavar="LAYER", help="layer to read (default: X)")
    add("--size", metavar="COLUMN", help="obs column of the library size (default: the total count of each cell)")
    add("--radius", metavar="BONDS", type=natural, help="radius of Morgan fingerprints, in bonds (default: 2)")
    add("--bits", metavar="N", type=whole, help="length of Morgan fingerprints (default: 1024)")
    add("--separator", metavar="TEXT", help="between the parts of a combination such as A+B (default: +)")


# ---------------------------------------------------------------------- data files
_LARGE = 1 << 30  # bytes of a file: in memory it takes several times as much


def read(file: Path, options: DataOptions, *, absent_controls: bool = False) -> "tuple[AnnData, EnvironmentDataset]":
    """A file and its cells; the expression of a large file, a zarr folder or a GCTX file stays on disk.

    Args:
        file: its path.
        options: how to read it.
        absent_controls: whether it may lack control cells.

    Raises:
        DataError: names the file, and the column or value at fault.
    """
    from pyro_scm.data.dataset import UNS_KEY, EnvironmentDataset, read_h5ad
    from pyro_scm.data.stored import StoredCells

    stays = file.is_dir() or file.suffix == ".gctx" or (file.is_file() and file.stat().st_size > _LARGE)
    adata = cast("AnnData", StoredCells(file)) if stays else read_h5ad(file)
    try:
        if options.environment is None:
            if UNS_KEY not in adata.uns:
                raise DataError(
                    "which obs column names the perturbation? Add --environment COLUMN: this file has "
                    f"{listing(adata.obs.columns, 20)}"
                )
            _refuse_without_environment(options)
            cells = EnvironmentDataset.from_anndata(adata)
        else:
            control = options.control
            if absent_controls and options.environment in adata.obs:
                here = set(adata.obs[options.environment].astype(str))
                control = tuple(value for value in control if value in here)
            cells = EnvironmentDataset.from_anndata(
                adata,
                environment=options.environment,
                control=control,
                dose=options.dose,
                time=options.time,
                cell_line=options.cell_line,
                smiles=options.smiles,
                covariates=options.covariates,
                proteins=options.proteins,
                layer=options.layer,
                size=options.size,
                counts=options.counts,
                separator=options.separator,
            )
        return adata, cells
    except DataError as error:
        raise DataError(f"{file}: {error}") from error


def _refuse_without_environment(options: DataOptions) -> None:
    """Columns have no meaning for a file that carries its own table of environments."""
    columns = ("control", "dose", "time", "cell_line", "covariates", "proteins", "layer", "size")
    given = [f"--{name.replace('_', '-')}" for name in columns if getattr(options, name)]
    if given:
        raise DataError(
            f"{', '.join(given)} without --environment: this file carries its own table of environments, which is used "
            "as it is; add --environment COLUMN to make it anew"
        )


def represented(
    file: Path, adata: "AnnData", cells: "EnvironmentDataset", options: DataOptions
) -> "EnvironmentDataset":
    """The same cells, their environments represented as the options say.

    Raises:
        DataError: a kind that does not exist, or a table that is missing or incomplete.
    """
    if not options.representation:
        return cells
    try:
        values, features = represent_parts(cells.environments, adata.uns, options)
    except DataError as error:
        raise DataError(f"{file}: --representation: {error}") from error
    return replace(cells, representation=values, features=features)


def represent_parts(table: "pd.DataFrame", uns: Mapping[str, Any], options: DataOptions) -> tuple[Any, tuple[str, ...]]:
    """Rows ``[E, F]`` and feature names of environments, the parts of a representation side by side.

    Args:
        table: of E environments.
        uns: of the file, for ``uns:KEY``.
        options: their representation; one-hot where it has none.

    Raises:
        DataError: a kind that does not exist, or a table that is missing or incomplete.
    """
    import numpy as np

    from pyro_scm.data.representations import represent

    blocks, features = [], []
    for part in options.representation or ("one-hot",):
        kind, _, name = part.partition(":")
        given: Any = kind
        if kind == "uns":
            given = _uns_table(uns, name)
        elif kind == "table":
            given = _csv_table(Path(name))
        elif name and kind not in MOLECULAR:
            raise DataError(f"{part!r}: only {', '.join(MOLECULAR)}, uns and table take something after the colon")
        elif options.environment is not None:
            _refuse_unnamed(kind, name, options)
        values, titles = represent(table, given, radius=options.radius, bits=options.bits, separator=options.separator)
        blocks.append(values)
        features += titles
    double = [name for name, times in Counter(features).items() if times > 1]
    if double:
        raise DataError(f"several features are called {listing(double)}: rename them")
    return np.concatenate(blocks, axis=1), tuple(features)


def _refuse_unnamed(kind: str, name: str, options: DataOptions) -> None:
    """A representation by what no column is named for."""
    if kind in MOLECULAR and not name:
        raise DataError(f"{kind}: which obs column holds the SMILES? Write {kind}:COLUMN")
    if kind in ("dose", "time", "cell_line") and getattr(options, kind) is None:
        raise DataError(f"{kind}: which obs column holds it? Add --{kind.replace('_', '-')} COLUMN")


def _uns_table(uns: Mapping[str, Any], key: str) -> "pd.DataFrame":
    import pandas as pd

    tables = [str(k) for k, v in uns.items() if isinstance(v, pd.DataFrame)]
    if key not in tables:
        raise DataError(f"uns:{key}: no table of this name in uns: this file has {listing(tables) or 'none'}")
    found: pd.DataFrame = uns[key]
    return found


def _csv_table(file: Path) -> "pd.DataFrame":
    import pandas as pd

    if not file.is_file():
        raise DataError(f"table:{file}: no such file")
    try:
        texts = pd.read_csv(file, sep="," if file.suffix == ".csv" else "\t", index_col=0, dtype=str)
    except (ValueError, OSError) as error:
        raise DataError(f"table:{file}: not a readable table ({error})") from error
    if texts.shape[1] == 0:
        raise DataError(f"table:{file}: no features: the first column is the environment, the others its features")
    texts.index = texts.index.astype(str)
    numbers = pd.DataFrame({name: pd.to_numeric(texts[name], errors="coerce") for name in texts}).astype(float)
    bad = numbers.isna()
    if bad.to_numpy().any():
        column = str(bad.columns[bad.any().to_numpy()][0])
        row = str(bad.index[bad[column].to_numpy()][0])
        raise DataError(
            f"table:{file}: column {column!r}, row {row!r} holds {texts.loc[row, column]!r}: features are numbers"
        )
    return numbers


# ---------------------------------------------------------------------- environments by name
def environments(cells: "EnvironmentDataset", given: Sequence[str]) -> list[str]:
    """Names meant on the command line, of environments or perturbations (all their doses), joined by commas or not.

    Args:
        cells: that have them.
        given: words of the command line; a name may itself hold a comma.

    Returns:
        names, each once.

    Raises:
        DataError: no such environment; the message lists the nearest names.
    """
    table = cells.environments
    known = {str(n) for n in table.index} | {str(p) for p in table["perturbation"]}
    found: list[str] = []
    for word in given:
        for name in [word] if word in known else [part.strip() for part in word.split(",")]:
            if name not in known:
                cells.environment_index(name)  # refuses it, with the nearest names
            found.append(name)
    return list(dict.fromkeys(found))


def labels(cells: "EnvironmentDataset", given: Sequence[str]) -> list[str]:
    """The environments that `environments` names, one by one."""
    asked = set(environments(cells, given))
    table = cells.environments
    pairs = zip(table.index, table["perturbation"], strict=True)
    return [str(label) for label, perturbation in pairs if {str(label), str(perturbation)} & asked]
