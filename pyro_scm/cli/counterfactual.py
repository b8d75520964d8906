"""`pyro-scm counterfactual`: what the same cells would have been."""

from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, TypeAlias

from pyro_scm.cli.inputs import labels
from pyro_scm.cli.outputs import claim, remark, write_h5ad
from pyro_scm.cli.parsing import COVARIATES, UsageError, Verbs, add_verb, natural, path, whole
from pyro_scm.cli.runs import add_run_options, cells_for, load_run, only_best
from pyro_scm.errors import listing

if TYPE_CHECKING:
    from torch import Tensor

    from pyro_scm.data.dataset import EnvironmentDataset
    from pyro_scm.query import Worlds

__all__ = ["add"]

Change: TypeAlias = "float | Callable[[Tensor], Tensor]"

DESCRIPTION = """\
What would these very cells have been, had something been different?

For each cell the model infers the noise that explains it (abduction), changes something (action), and lets the rest of
the model follow with that same noise (prediction). What changes is a causal variable (--do) or the environment
(--environment), or both. The result has the same cells, with layers 'factual' (the model's reconstruction of the cell)
and 'counterfactual' (also X), in the data's units, and 'counterfactual_sd', the spread over members of the ensemble;
obsm 'z', 'c' and 'c_factual' are those of the best member.

c_3 of one member is not c_3 of another: with --do only the best member (the lowest loss) is asked. To know what a c_j
means, embed the cells first. --environment alone asks all members and averages their expression.
"""

EXAMPLES = """\
  pyro-scm simulate --out sim.h5ad
  pyro-scm fit sim.h5ad --model structured_environment_vae --environment perturbation --control control --latent 5 \
--epochs 30 --out run
  pyro-scm counterfactual run sim.h5ad --do c_3=2.0 --out cf.h5ad
  pyro-scm counterfactual run sim.h5ad --do c_0+=1 --do c_1=0 --draws 10 --out cf.h5ad
  pyro-scm counterfactual run sim.h5ad --environment env_02 --of control --out cf.h5ad
"""


def add(verbs: Verbs) -> None:
    """Add the verb to the parser."""
    parser = add_verb(
        verbs,
        "counterfactual",
        run,
        summary="what the same cells would have been, had something been different",
        description=DESCRIPTION,
        examples=EXAMPLES,
    )
    add_run_options(parser)
    question = parser.add_argument_group("question").add_argument
    question(
        "--do",
        metavar="c_J=VALUE",
        type=action,
        action="append",
        default=[],
        help="set a causal variable to a value in its own units (see `pyro-scm embed`), or move it with c_J+=VALUE; "
        "may be given several times",
    )
    question("--environment", metavar="ENV", help="put the cells into this environment")
    question(
        "--covariate",
        **COVARIATES,
        help="give the cells another covariate, such as cell_type=B; may be given several times",
    )
    question(
        "--of",
        metavar="ENV,...",
        action="append",
        help="only cells measured in these environments (default: all cells); may be given several times",
    )
    question(
        "--draws",
        metavar="S",
        type=whole,
        help="average over S samples of each cell's posterior (default: its mean alone)",
    )
    question("--seed", metavar="N", type=natural, default=0, help="of the samples")
    parser.add_argument("--out", metavar="FILE.h5ad", type=path, required=True, help="file to write")


def action(text: str) -> "tuple[str, Change]":
    """``c_3=2.0``, or ``c_3+=1`` for a step from the natural value."""
    name, equals, number = text.partition("=")
    try:
        value = float(number)
    except ValueError:
        equals, value = "", 0.0
    step = name.endswith("+")
    name = name.removesuffix("+").strip()
    if not (equals and name and abs(value) < float("inf")):
        raise ArgumentTypeError(f"{text!r} is neither c_J=NUMBER nor c_J+=NUMBER")
    return (name, lambda c: c + value) if step else (name, value)


def run(args: Namespace) -> None:
    """Ask and write."""
    if not args.do and args.environment is None and not args.covariate:
        raise UsageError("say what is to be different: --do c_J=VALUE, --environment ENV or --covariate NAME=VALUE")
    twice = sorted({name for name, _ in args.do if [n for n, _ in args.do].count(name) > 1})
    if twice:
        raise UsageError(f"--do {twice[0]} is given twice: give it once")
    out = claim(args.out, ".h5ad", [args.data])
    import pyro_scm

    fitted, memory = load_run(args.folder, args.model)
    _, cells = cells_for(fitted, memory, args)
    if args.of:
        cells = cells.of(*labels(cells, args.of))
    if not len(cells):
        raise UsageError(f"--of {','.join(args.of)}: there are no such cells in {args.data}")
    where = args.environment and _one(cells, args.environment)
    asked = only_best(fitted) if args.do else fitted
    worlds = pyro_scm.counterfactual(
        asked,
        cells,
        do=dict(args.do) or None,
        environment=where,
        covariates=dict(args.covariate),
        draws=args.draws,
        seed=args.seed,
    )
    adata = worlds.to_anndata(cells)
    best = slice(asked.best, asked.best + 1)
    own = replace(worlds, z=worlds.z[best], c=worlds.c[best], factual_c=worlds.factual_c[best])
    adata.obsm["z"], adata.obsm["c"] = own.z.mean((0, 1)), own.c.mean((0, 1))
    adata.obsm["c_factual"] = own.factual_c.mean((0, 1))
    adata.obs["environment_asked"] = where or cells.environments.index[cells.env].astype(str)
    write_h5ad(adata, out)
    who = f"best of {len(fitted)} members (seed {asked.seeds[0]})" if args.do else f"average of {len(fitted)} members"
    remark(args, f"{out}: layers 'factual' and 'counterfactual' of {len(cells)} cells, {who}")
    remark(args, f"largest changes: {_largest(worlds)}")


def _one(cells: "EnvironmentDataset", name: str) -> str:
    """The one environment of a name.

    Raises:
        DataError: none.
        UsageError: several.
    """
    found = [name] if name in cells.environments.index else labels(cells, [name])
    if len(found) > 1:
        raise UsageError(f"--environment {name}: names several environments, {listing(found)}: choose one")
    return found[0]


def _largest(worlds: "Worlds", number: int = 5) -> str:
    """The genes that change most on average."""
    import numpy as np

    change = worlds.effect.mean((0, 1, 2))
    order = np.argsort(-np.abs(change))[:number]
    return ", ".join(f"{worlds.genes[g]} {change[g]:+.3g}" for g in order)
