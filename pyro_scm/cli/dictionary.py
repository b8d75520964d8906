"""`pyro-scm dictionary`: the vectors that a run has learnt for perturbations and covariates."""

from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from pyro_scm.cli.outputs import claim_folder, remark
from pyro_scm.cli.parsing import UsageError, Verbs, add_verb, path, whole
from pyro_scm.cli.pictures import save
from pyro_scm.cli.runs import add_run_options, load_run
from pyro_scm.errors import DataError, listing

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["add"]

DESCRIPTION = """\
What each perturbation and covariate does to the latents, as vectors: which are alike, and a map of them.

Writes vectors.csv (every member's), entries.csv, neighbours.csv (most alike by cosine; 'agree' is the share of members
that say so), cosine.csv, map.csv, and the figures map.png and cosine.png. Latents of two members differ in order, sign
and rotation, so members are averaged by their cosines only. An --annotation, a table with one row a perturbation such
as its mechanism of action, colours the map.
"""

EXAMPLES = """\
  pyro-scm simulate --descriptors 16 --out sim.h5ad
  pyro-scm fit sim.h5ad --model cpa --environment perturbation --control control --representation multi-hot --latent 5 \
--epochs 30 --out run
  pyro-scm dictionary run --out dictionary

examples with data of your own:
  pyro-scm dictionary drugs_run --annotation lincs_pert_info.tsv --name pert_iname --colour MOA --out dictionary
"""


def add(verbs: Verbs) -> None:
    """Add the verb to the parser."""
    parser = add_verb(
        verbs,
        "dictionary",
        run,
        summary="vectors of perturbations and covariates: map, neighbours, cosines",
        description=DESCRIPTION,
        examples=EXAMPLES,
    )
    add_run_options(parser, data=False)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--dose", metavar="UM", type=float, help="of all perturbations (default: each one's largest)")
    which.add_argument("--every", action="store_true", help="one entry for each environment: all doses, combinations")
    parser.add_argument("--annotation", metavar="FILE", type=path, help="table (.csv or .tsv) about perturbations")
    parser.add_argument("--name", metavar="COLUMN", help="its column of their names (default: the first)")
    parser.add_argument("--colour", metavar="COLUMN", help="column to colour the map by (default: the kind of entry)")
    parser.add_argument("--neighbours", metavar="N", type=whole, default=5, help="nearest neighbours of each")
    parser.add_argument("--method", choices=("pca", "umap"), default="pca", help="of the map (default: pca)")
    parser.add_argument("--out", metavar="FOLDER", type=path, required=True, help="folder for tables and figures")


def run(args: Namespace) -> None:
    """Read, draw and write."""
    if args.name is not None and args.annotation is None:
        raise UsageError(f"--name {args.name}: of which table? Add --annotation FILE")
    out = claim_folder(args.out)
    from pyro_scm.dictionaries import dictionary

    fitted, _ = load_run(args.folder, args.model)
    found = dictionary(fitted, dose=args.dose, every=args.every)
    if args.annotation is not None:
        found = found.annotate(read_annotation(args.annotation, args.name))
    neighbours = found.neighbours(args.neighbours)
    tables = {"vectors": found.frame(), "entries": found.table, "neighbours": neighbours, "cosine": found.cosine()}
    figures = {"cosine": found.heatmap()}
    if len(found.table) > 2:
        tables["map"] = found.project(args.method)
        figures["map"] = found.figure(args.colour, args.method)
    save(out, tables, figures)
    kinds = found.table["kind"].value_counts()
    shown = ", ".join(f"{number} of kind {kind}" for kind, number in kinds.items())
    remark(args, f"{out}: vectors of {shown}, of {len(fitted)} members")
    first = neighbours[neighbours["rank"] == 1].sort_values("cosine", ascending=False).head(3)
    pairs = zip(first["name"], first["neighbour"], first["cosine"], strict=True)
    remark(args, "most alike: " + ", ".join(f"{a} and {b} ({c:.2f})" for a, b, c in pairs))


def read_annotation(file: Path, column: str | None) -> "pd.DataFrame":
    """A user's table, indexed by names.

    Raises:
        DataError: no such file or column, or no table.
    """
    import pandas as pd

    if not file.is_file():
        raise DataError(f"--annotation {file}: no such file")
    try:
        table = pd.read_csv(file, sep="\t" if ".tsv" in file.suffixes or ".txt" in file.suffixes else ",")
    except (ValueError, OSError) as error:
        raise DataError(f"--annotation {file}: not a readable table ({error})") from error
    chosen = str(table.columns[0]) if column is None else column
    if chosen not in table or table.shape[1] < 2:
        raise DataError(f"--annotation {file}: no column {chosen!r} beside others: it has {listing(table.columns, 20)}")
    return table.dropna(subset=[chosen]).set_index(chosen)
