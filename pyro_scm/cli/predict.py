"""`pyro-scm predict`: cells in an environment, also one that nobody has measured."""

from argparse import Namespace
from typing import TYPE_CHECKING, Any

from pyro_scm.cli.inputs import MOLECULAR, DataOptions, Memory, represent_parts
from pyro_scm.cli.outputs import claim, remark, write_h5ad
from pyro_scm.cli.parsing import COVARIATES, UsageError, Verbs, add_verb, natural, path, whole
from pyro_scm.cli.runs import add_run_options, load_run, place
from pyro_scm.errors import listing

if TYPE_CHECKING:
    import pandas as pd

    from pyro_scm.run import Run

__all__ = ["add"]

DESCRIPTION = """\
Simulate cells as they would be measured in an environment: one that was trained on, one that was held out, or a drug or
dose that nobody has measured.

Every member of the ensemble simulates its own cells (obs 'member', 'seed'; 'best' marks the one with the lowest loss):
where the members disagree, the data do not say. How far the environment is from those that the run was fitted to is in
obs 'nearest_training', 'distance' and 'warning', and is said: unseen parts of a combination, a dose outside the range,
a molecule unlike all others. Expression is in the data's units; counts are drawn at the training
cells' median library size. For a drug that is not in the data give its structure with --smiles: the run must have been
fitted with a representation that contains morgan:SMILES_COLUMN.
"""

EXAMPLES = """\
  pyro-scm simulate --descriptors 16 --out sim.h5ad
  pyro-scm fit sim.h5ad --model environment_vae --environment perturbation --control control \
--representation uns:descriptors --latent 5 --hold-out env_09,env_10 --epochs 30 --out run
  pyro-scm predict run --environment env_09 --cells 200 --out pred.h5ad

examples with data of your own:
  pyro-scm predict drugs_run --environment vorinostat --dose 0.5 --out pred.h5ad
  pyro-scm predict drugs_run --environment aspirin --smiles "CC(=O)Oc1ccccc1C(=O)O" --dose 10 --out pred.h5ad
"""


def add(verbs: Verbs) -> None:
    """Add the verb to the parser."""
    parser = add_verb(
        verbs,
        "predict",
        run,
        summary="simulate cells in an environment, also an unseen one",
        description=DESCRIPTION,
        examples=EXAMPLES,
    )
    add_run_options(parser, data=False)
    where = parser.add_argument_group("environment").add_argument
    where(
        "--environment",
        metavar="ENV",
        required=True,
        help="name of an environment or perturbation that the run knows; with --smiles, a name for the new one",
    )
    where("--smiles", metavar="SMILES", help="structure of a drug that the run has never seen")
    where("--dose", metavar="DOSE", help="dose, in uM; of a combination A+B in the form 1+0.5")
    where("--time", metavar="HOURS", type=float, help="time of treatment, in h")
    where("--cell-line", metavar="NAME", help="cell line, as the data call it")
    where(
        "--covariate",
        **COVARIATES,
        help="covariate of the cells, such as cell_type=B; needed of those whose effects the model has; may be given "
        "several times",
    )
    what = parser.add_argument_group("output").add_argument
    what("--cells", metavar="N", type=whole, default=500, help="cells to simulate, of each member")
    what("--mean", action="store_true", help="expected expression of each cell, without the noise of measurement")
    what("--seed", metavar="N", type=natural, default=0, help="of the simulation")
    what("--out", metavar="FILE.h5ad", type=path, required=True, help="file to write")


def run(args: Namespace) -> None:
    """Predict and write."""
    out = claim(args.out, ".h5ad")
    import pyro_scm
    from pyro_scm.conditions import novelty

    fitted, memory = load_run(args.folder, args.model)
    known = {str(name) for name in fitted.environments.table.index}
    details = [args.smiles, args.dose, args.time, args.cell_line]
    where: Any = args.environment
    if args.environment not in known or any(value is not None for value in details):
        where = described(fitted, memory, args)
    covariates = dict(args.covariate)
    x = pyro_scm.predict(fitted, where, covariates=covariates, cells=args.cells, seed=args.seed, mean=args.mean)
    new = novelty(fitted, where if isinstance(where, str) else {args.environment: where}).iloc[0]
    adata = _as_anndata(x, fitted, args.environment)
    adata.obs["nearest_training"], adata.obs["distance"] = str(new["nearest"]), float(new["distance"])
    adata.obs["warning"] = str(new["warning"])
    write_h5ad(adata, out)
    units = "counts" if fitted.schema.counts else "the data's units"
    remark(args, f"{out}: {len(fitted)} x {args.cells} cells x {x.shape[2]} genes in {args.environment!r}, in {units}")
    if isinstance(where, str):
        trained = bool(fitted.environments.table["trained"].iloc[fitted.environments.index(where)])
        remark(args, "the run was fitted to cells of this environment" if trained else "the run has not seen it")
    if not new["trained"]:
        remark(
            args,
            f"nearest training condition: {new['nearest']!r}, at distance {new['distance']:.2g} (training conditions "
            f"are usually within {new['usual']:.2g} of each other)",
        )
    if new["warning"]:
        remark(args, f"warning: {new['warning']}")


READERS = {
    "smiles": set(MOLECULAR),
    "dose": {"dose", "multi-hot", "multi-dose", "molecules"},
    "time": {"time"},
    "cell_line": {"cell_line"},
}
"""What describes an environment, and the representations that look at it."""


def described(fitted: "Run", memory: Memory, args: Namespace) -> Any:
    """Representation ``[F]`` of an environment that is not in the run's table.

    What the command line leaves open is taken from the environments of the same perturbation, as far as these agree.

    Raises:
        DataError: no such perturbation, or a representation that does not cover it.
    """
    import pandas as pd

    options = memory.data
    kinds = _kinds(memory, args)
    table = fitted.environments.table
    names = zip(table.index, table["perturbation"], strict=True)
    like = table[[args.environment in (str(name), str(perturbation)) for name, perturbation in names]]
    if not len(like) and args.smiles is None and not kinds & {*MOLECULAR, "multi-hot", "multi-dose", "table"}:
        fitted.environments.index(args.environment)  # refuses it, with the nearest names
    if like["is_reference"].any():
        raise UsageError(
            f"--environment {args.environment}: this is a reference, which has no dose or structure; the run knows "
            f"{listing(like.index)}"
        )
    row: dict[str, Any] = {"is_reference": False}
    row["perturbation"] = str(like["perturbation"].iloc[0]) if len(like) else args.environment
    for column, readers in READERS.items():
        row[column] = _detail(column, bool(kinds & readers), like, table, args, options)
    rows = pd.DataFrame([row], index=[args.environment])
    for column in ("dose", "time"):
        if not isinstance(row[column], str):
            rows[column] = rows[column].astype(float)
    return place(fitted, [args.environment], *represent_parts(rows, {}, options))[0]


def _kinds(memory: Memory, args: Namespace) -> set[str]:
    """Kinds of the run's representation.

    Raises:
        UsageError: it cannot be made anew, or does not look at what the command line says.
    """
    shown = ", ".join(memory.data.representation or ("one-hot",))
    kinds = {part.partition(":")[0] for part in memory.data.representation or ("one-hot",)}
    known = memory.model and (memory.data.environment or memory.data.representation)
    if not known or "uns" in kinds:
        shown = f"by {shown}, a table in the data file" if known else "in a way that it does not remember"
        raise UsageError(
            f"--environment {args.environment}: the run does not know it by name, and represents environments {shown}: "
            "name one of the run's, or predict in Python from a representation of your own"
        )
    for column, readers in READERS.items():
        value = getattr(args, column)
        if value is not None and not kinds & readers:
            better = "morgan:SMILES_COLUMN" if column == "smiles" else sorted(readers)[0]
            raise UsageError(
                f"--{column.replace('_', '-')} {value}: the run represents environments by {shown}, which does not "
                f"look at it: fit with a --representation that contains {better}"
            )
    return kinds


def _detail(
    column: str, read: bool, like: "pd.DataFrame", table: "pd.DataFrame", args: Namespace, options: DataOptions
) -> Any:
    """Dose, time, cell line or structure of an environment; None where the representation does not look at it.

    Raises:
        UsageError: it is needed and nothing says what it is.
    """
    given = getattr(args, column)
    flag = f"--{column.replace('_', '-')}"
    if not read:
        return None
    if given is not None:
        return _dose(given, options) if column == "dose" else given
    values = like[column].dropna().unique().tolist()
    if len(values) > 1:
        raise UsageError(
            f"--environment {args.environment}: the run knows it with several values of {column}, {listing(values)}: "
            f"choose one with {flag}"
        )
    if not len(values) and table[column].notna().any():
        raise UsageError(f"--environment {args.environment}: the run has to know its {column}: add {flag}")
    return values[0] if len(values) else None


def _dose(text: str, options: DataOptions) -> float | str:
    parts = text.split(options.separator)
    try:
        amounts = [float(part) for part in parts]
    except ValueError:
        amounts = [-1.0]
    if not all(0 <= amount < float("inf") for amount in amounts):
        raise UsageError(f"--dose {text}: give a dose in uM, or one for each part such as 1{options.separator}0.5")
    return amounts[0] if len(amounts) == 1 else text


def _as_anndata(x: Any, fitted: "Run", environment: str) -> Any:
    """Cells of all members below each other."""
    import numpy as np
    import pandas as pd
    from anndata import AnnData

    members, cells, genes = x.shape
    member = np.repeat(np.arange(members), cells)
    obs = pd.DataFrame(
        {
            "environment": pd.Categorical([environment] * len(member)),
            "member": member,
            "seed": np.array(fitted.seeds)[member],
            "best": member == fitted.best,
        },
        index=[f"member_{k}_cell_{i}" for k in range(members) for i in range(cells)],
    )
    return AnnData(X=x.reshape(-1, genes), obs=obs, var=pd.DataFrame(index=list(fitted.schema.genes)))
