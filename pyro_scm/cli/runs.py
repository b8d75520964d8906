"""Fitted runs: read from their folder, and cells brought into a run's terms."""

from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyro_scm.cli.inputs import DataOptions, Memory, read, represent_parts
from pyro_scm.cli.parsing import Parser, assignment, path
from pyro_scm.errors import CheckpointError, DataError, listing

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

    from pyro_scm.data.dataset import EnvironmentDataset
    from pyro_scm.recipes import Recipe
    from pyro_scm.run import Run

__all__ = ["absolute", "add_run_options", "cells_for", "load_run", "make", "place", "recipe"]


def add_run_options(parser: Parser, data: bool = True) -> None:
    """A fitted run, and cells for it."""
    parser.add_argument("folder", metavar="RUN", type=path, help="folder of a run that `pyro-scm fit` made")
    if data:
        parser.add_argument(
            "data", metavar="DATA.h5ad", type=path, help="cells by genes; read with the options the run was fitted with"
        )
        parser.add_argument(
            "--data-option",
            metavar="NAME=VALUE",
            type=assignment,
            action="append",
            default=[],
            help="change one of the remembered options of reading the data, such as environment=condition or layer=raw",
        )
    parser.add_argument(
        "--model", metavar="FILE.py:FUNCTION", help="where the model is, if the run was fitted with one of your own"
    )


def load_run(folder: Path, model: str | None = None) -> "tuple[Run, Memory]":
    """A fitted run and what the command line remembers of it.

    Args:
        folder: of the run.
        model: ``FILE.py:FUNCTION``, needed for a model of the user's own.

    Raises:
        CheckpointError: no run, a damaged one, or one whose model has to be named.
    """
    from pyro_scm import checkpoints, recipes
    from pyro_scm.batch import Schema

    memory = Memory.load(folder)
    _, manifest = checkpoints.read(folder)
    spec = manifest.get("model")
    if spec and spec.get("name") in recipes.RECIPES and manifest.get("guide"):
        return recipes.load(folder), memory
    if model is None:
        raise CheckpointError(
            f"{folder}: its model is not one of the named ones, and a run stores no code: add --model "
            f"{memory.model or 'FILE.py:FUNCTION'}"
        )
    built, guide = make(model, Schema.from_json(manifest["schema"]), memory.options or {})
    return recipes.load(folder, built, guide), memory


def absolute(model: str) -> str:
    """``FILE.py:FUNCTION`` that holds from any folder; other names as they are."""
    file, colon, function = model.partition(":")
    return f"{path(file).resolve()}{colon}{function}" if file.endswith(".py") else model


def recipe(name: str) -> "Recipe":
    """A recipe by name, also from a file of the user's, which may go wrong in any way.

    Raises:
        ModelError: it did, or there is none of this name.
    """
    from pyro_scm import recipes
    from pyro_scm.errors import ModelError, PyroScmError

    try:
        return recipes.recipe(name)
    except PyroScmError:
        raise
    except Exception as error:
        raise ModelError(f"--model {name}: {type(error).__name__}: {error}") from error


def make(name: str, schema: Any, options: Mapping[str, Any]) -> Any:
    """Model and guide by name, also from a file of the user's, which may go wrong in any way.

    Raises:
        ModelError: it did.
    """
    from pyro_scm import recipes
    from pyro_scm.errors import ModelError, PyroScmError

    recipe(name)
    try:
        return recipes.make(name, schema, **options)
    except PyroScmError:
        raise
    except Exception as error:
        if name in recipes.RECIPES:
            raise
        raise ModelError(f"--model {name}: {type(error).__name__}: {error}") from error


def cells_for(run: "Run", memory: Memory, args: Namespace) -> "tuple[AnnData, EnvironmentDataset]":
    """The file of a verb, and its cells in the run's terms: its genes, categories, environments, representation.

    Environments that the run does not know are added to it, where its representation can tell what they are.

    Raises:
        DataError: cells that do not fit the run.
    """
    options = memory.data.changed(args.data_option)
    adata, cells = read(args.data, options, absent_controls=True)
    try:
        if cells.counts != run.schema.counts:
            kinds = ("continuous values", "counts")
            raise DataError(
                f"holds {kinds[cells.counts]}, the run was fitted to {kinds[run.schema.counts]}: give a file or layer "
                "(--data-option layer=LAYER) of the same kind"
            )
        return adata, _in_terms_of(run, _with_genes(run, cells), adata, options)
    except DataError as error:
        raise DataError(f"{args.data}: {str(error).removeprefix(f'{args.data}: ')}") from error


def _with_genes(run: "Run", cells: "EnvironmentDataset") -> "EnvironmentDataset":
    """The run's genes, in its order."""
    if cells.genes == run.schema.genes:
        return cells
    column = {gene: i for i, gene in enumerate(cells.genes)}
    missing = [gene for gene in run.schema.genes if gene not in column]
    if missing:
        raise DataError(f"lacks {len(missing)} of the run's {len(run.schema.genes)} genes: {listing(missing)}")
    chosen = [column[gene] for gene in run.schema.genes]
    return replace(cells, x=cells.x[:, chosen], var=cells.var.iloc[chosen])


def _in_terms_of(
    run: "Run", cells: "EnvironmentDataset", adata: "AnnData", options: DataOptions
) -> "EnvironmentDataset":
    import numpy as np

    covariates = {name: _recoded(cells, name, values) for name, values in run.schema.covariates.items()}
    place = {key: i for i, key in enumerate(_keys(run.environments.table))}
    keys = _keys(cells.environments)
    unknown = [e for e in cells.present if keys[e] not in place]
    if unknown:
        _add_environments(run, cells, unknown, adata.uns, options)
        place |= {keys[e]: len(place) + i for i, e in enumerate(unknown)}
    number = np.full(len(keys), -1, np.int64)
    number[cells.present] = [place[keys[e]] for e in cells.present]
    return replace(
        cells,
        env=number[cells.env],
        environments=run.environments.table.drop(columns="trained"),
        representation=run.environments.representation,
        features=run.schema.features,
        covariates=covariates,
        categories=dict(run.schema.covariates),
    )


def _recoded(cells: "EnvironmentDataset", name: str, values: Sequence[str]) -> Any:
    import numpy as np

    if name not in cells.covariates:
        raise DataError(f"lacks the covariate {name!r} that the run was fitted with: add --data-option covariates=NAME")
    mapped = [values.index(v) if v in values else -1 for v in cells.categories[name]]
    codes = np.array(mapped, np.int64)[cells.covariates[name]]
    if (codes < 0).any():
        new = sorted({cells.categories[name][c] for c in np.unique(cells.covariates[name][codes < 0])})
        raise DataError(f"covariate {name!r} has {listing(new)}, the run knows {listing(values)}: drop these cells")
    return codes


def _keys(table: "pd.DataFrame") -> list[tuple[str, ...]]:
    """What makes an environment the same in two files; its label depends on what else is in the file."""
    columns = ("perturbation", "dose", "time", "cell_line")
    return [tuple(_text(value) for value in row) for row in table[list(columns)].itertuples(index=False)]


def _text(value: Any) -> str:
    if value is None or value != value:  # NaN
        return ""
    return f"{value:g}" if isinstance(value, float | int) else str(value)


def _add_environments(
    run: "Run", cells: "EnvironmentDataset", unknown: Sequence[int], uns: Mapping[str, Any], options: DataOptions
) -> None:
    """Enter environments that the run was not fitted with into its table.

    Raises:
        DataError: its representation has nothing to say of them.
    """
    import numpy as np
    import pandas as pd

    from pyro_scm.run import Environments

    rows = cells.environments.iloc[list(unknown)]
    before = run.environments
    labels = [str(label) for label in rows.index]
    clash = sorted(set(labels) & {str(n) for n in before.table.index})
    if clash:
        raise DataError(
            f"{listing(clash)} is another environment in the run (another dose, time or cell line): rename it"
        )
    if options.environment is None and not options.representation:  # a file that carries its representation
        values = place(run, labels, cells.representation[list(unknown)], cells.features)
    else:
        values = place(run, labels, *represent_parts(rows, uns, options))
    records = before.table.to_dict("records") + rows.assign(trained=False).to_dict("records")
    index = pd.Index([*before.table.index, *labels], name=before.table.index.name)
    table = pd.DataFrame(records, index=index)[list(before.table.columns)]
    run.environments = Environments(table, np.concatenate([before.representation, values]))


_OPTIONAL = ("perturbation=", "dose=", "part ", "cell_line=")
"""Features that are 0 where a file lacks them: it has no such perturbation or cell line, or fewer parts."""


def place(run: "Run", labels: Sequence[str], values: Any, features: Sequence[str]) -> Any:
    """Rows ``[E, F]`` of new environments in a run's representation.

    Args:
        run: that does not know them.
        labels: E names, for the message.
        values: ``[E, F']`` their representation by itself.
        features: names of its F' columns.

    Raises:
        DataError: the run's representation does not cover them.
    """
    import numpy as np

    column = {name: i for i, name in enumerate(run.schema.features)}
    strange = [f for f, used in zip(features, (values != 0).any(0), strict=True) if used and f not in column]
    absent = [f for f in column if f not in features and not f.startswith(_OPTIONAL) and not f.endswith(" unknown")]
    if strange or absent:
        raise DataError(
            f"the run was fitted without {listing(labels)}, and its representation of environments does not cover "
            f"{'it' if len(labels) == 1 else 'them'} ({listing(strange or absent, 3)}): fit with one that describes "
            "unseen environments, such as morgan:SMILES_COLUMN or table:FILE.csv"
        )
    result = np.zeros((len(labels), len(column)), np.float32)
    for j, name in enumerate(features):
        if name in column:
            result[:, column[name]] = values[:, j]
    return result
