"""`pyro-scm counterfactual`: what the same cells would have been."""

from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias

from pyro_scm.cli.inputs import labels
from pyro_scm.cli.outputs import claim, remark, write_csv, write_h5ad
from pyro_scm.cli.parsing import COVARIATES, UsageError, Verbs, add_verb, names, natural, path, probability, whole
from pyro_scm.cli.runs import add_run_options, cells_for, load_run
from pyro_scm.errors import listing

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor
    from torch.distributions import Distribution

    from pyro_scm.data.dataset import EnvironmentDataset
    from pyro_scm.query import Worlds
    from pyro_scm.run import Run

__all__ = ["add"]

Change: TypeAlias = "float | Distribution | Callable[[Tensor], Tensor]"

DESCRIPTION = """\
What would these very cells have been, had something been different?

For each cell the model infers the noise that explains it (abduction), changes something (action), and lets the rest of
the model follow with that same noise (prediction). What changes is a causal variable (--do), its noise (--noise) or
the environment (--environment), or several of them. The result has the same cells, with layers 'factual' (the model's
reconstruction of the cell) and 'counterfactual' (also X), in the data's units, and 'counterfactual_sd', the spread over
members of the ensemble; obsm 'z', 'c' and 'c_factual' are those of the best member.

How far an answer is from what was seen is always said: obs 'extrapolation' (standard deviations from the mean of all
cells in the file to the values of each cell), uns 'support', and a warning where the model extrapolates.

c_3 of one member is not c_3 of another: with --do and --noise only the best member (the lowest loss) is asked. To know
what a c_j means, embed the cells first. --environment alone asks all members and averages their expression.
"""

EXAMPLES = """\
  pyro-scm simulate --out sim.h5ad
  pyro-scm fit sim.h5ad --model structured_environment_vae --environment perturbation --control control --latent 5 \
--epochs 30 --out run
  pyro-scm counterfactual run sim.h5ad --do c_3=2.0 --out cf.h5ad
  pyro-scm counterfactual run sim.h5ad --do c_0+=1 --do c_1=0 --draws 10 --out cf.h5ad
  pyro-scm counterfactual run sim.h5ad --do "c_2~normal(1,0.5)" --noise c_0=0 --out cf.h5ad
  pyro-scm counterfactual run sim.h5ad --environment env_02 --of control --out cf.h5ad --effects effects.csv
  pyro-scm counterfactual run sim.h5ad --do c_0+=1 --through c_1,c_2 --draws 50 --out cf.h5ad --effects effects.csv
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
        help="set a causal variable to a value in its own units (see `pyro-scm embed`), move it with c_J+=VALUE, or "
        "draw it with c_J~normal(MEAN,SD) or c_J~uniform(LOW,HIGH); may be given several times",
    )
    question(
        "--noise",
        metavar="c_J=VALUE",
        type=action,
        action="append",
        default=[],
        help="likewise for the noise of a causal variable, which goes on hearing its parents; may be given several "
        "times",
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
    contrast = parser.add_argument_group("contrast").add_argument
    contrast(
        "--effects", metavar="FILE.csv", type=path, help="also write the average effect on each gene, with interval"
    )
    contrast("--by", metavar="COLUMN", help="average within the groups of this obs column")
    contrast(
        "--through",
        metavar="c_J,...",
        type=names,
        help="split the effect into that through these causal variables and that past them (natural indirect and "
        "direct effects)",
    )
    contrast(
        "--level",
        metavar="P",
        type=probability,
        default=0.9,
        help="of the intervals, over members and --draws (default: %(default)s)",
    )
    parser.add_argument("--out", metavar="FILE.h5ad", type=path, required=True, help="file to write")


_LAWS = {"normal": "Normal", "uniform": "Uniform"}


def action(text: str) -> "tuple[str, Change]":
    """``c_3=2.0``; ``c_3+=1``, a step from the natural value; or ``c_3~normal(0,1)``, drawn."""
    if "~" in text:
        return _law(text)
    name, equals, number = text.partition("=")
    try:
        value = float(number)
    except ValueError:
        equals, value = "", 0.0
    step = name.endswith("+")
    name = name.removesuffix("+").strip()
    if not (equals and name and abs(value) < float("inf")):
        raise ArgumentTypeError(f"{text!r} is neither c_J=NUMBER nor c_J+=NUMBER nor c_J~normal(MEAN,SD)")
    return (name, lambda c: c + value) if step else (name, value)


def _law(text: str) -> "tuple[str, Change]":
    name, _, law = (part.strip() for part in text.partition("~"))
    kind, opened, rest = law.partition("(")
    try:
        a, b = (float(part) for part in rest.removesuffix(")").split(","))
    except ValueError:
        a, b, opened = 0.0, 0.0, ""
    fits = abs(a) < float("inf") and abs(b) < float("inf") and (b > 0 if kind == "normal" else b > a)
    if not (name and opened and rest.endswith(")") and kind in _LAWS and fits):
        raise ArgumentTypeError(f"{text!r} is neither c_J~normal(MEAN,SD) nor c_J~uniform(LOW,HIGH)")
    from torch import distributions

    return name, getattr(distributions, _LAWS[kind])(a, b)


def run(args: Namespace) -> None:
    """Ask and write."""
    given = [("--do", args.do), ("--noise", args.noise)]
    if not args.do and not args.noise and args.environment is None and not args.covariate:
        raise UsageError(
            "say what is to be different: --do c_J=VALUE, --noise c_J=VALUE, --environment ENV or "
            "--covariate NAME=VALUE"
        )
    for option, actions in given:
        twice = sorted({name for name, _ in actions if [n for n, _ in actions].count(name) > 1})
        if twice:
            raise UsageError(f"{option} {twice[0]} is given twice: give it once")
    if args.effects is None and (args.by or args.through):
        raise UsageError("--by and --through are of the table of effects: add --effects FILE.csv")
    out = claim(args.out, ".h5ad", [args.data])
    table = None if args.effects is None else claim(args.effects, ".csv", [args.data])
    import pyro_scm

    fitted, memory = load_run(args.folder, args.model)
    _, every = cells_for(fitted, memory, args)
    cells = every.of(*labels(every, args.of)) if args.of else every
    if not len(cells):
        raise UsageError(f"--of {','.join(args.of)}: there are no such cells in {args.data}")
    where = args.environment and _one(cells, args.environment)
    on_nodes = bool(args.do or args.noise)
    asked = fitted.only(fitted.best) if on_nodes or args.through else fitted
    question = {
        "do": dict(args.do) or None,
        "noise": dict(args.noise) or None,
        "environment": where,
        "covariates": dict(args.covariate),
        "draws": args.draws,
        "seed": args.seed,
    }
    worlds = pyro_scm.counterfactual(asked, cells, **question, reference=every if on_nodes else None)
    adata = worlds.to_anndata(cells)
    best = slice(asked.best, asked.best + 1)
    own = replace(worlds, z=worlds.z[best], c=worlds.c[best], factual_c=worlds.factual_c[best])
    adata.obsm["z"], adata.obsm["c"] = own.z.mean((0, 1)), own.c.mean((0, 1))
    adata.obsm["c_factual"] = own.factual_c.mean((0, 1))
    adata.obs["environment_asked"] = where or cells.environments.index[cells.env].astype(str)
    if table is not None:
        write_csv(_effects(args, asked, cells, worlds, question), table)
    write_h5ad(adata, out)
    one = len(asked) < len(fitted)
    who = f"best of {len(fitted)} members (seed {asked.seeds[0]})" if one else f"average of {len(fitted)} members"
    remark(args, f"{out}: layers 'factual' and 'counterfactual' of {len(cells)} cells, {who}")
    remark(args, f"largest changes: {_largest(worlds)}")
    for warning in worlds.support.warnings() if worlds.support is not None else ():
        remark(args, f"warning: {warning}")


def _effects(
    args: Namespace, asked: "Run", cells: "EnvironmentDataset", worlds: "Worlds", question: dict[str, Any]
) -> "pd.DataFrame":
    """Average effects with intervals: of all cells or by group; in all, or through mediators and past them.

    Every row says how far the answer is from what was seen.
    """
    import pandas as pd

    from pyro_scm.query import Contrast, mediate

    if args.through:
        found = mediate(asked, cells, args.through, **question)
        parts = {
            kind: getattr(found, kind) for kind in ("total", "direct", "indirect", "total_direct", "total_indirect")
        }
    else:
        parts = {"total": Contrast(worlds.effect, worlds.cells, worlds.genes, cells.obs)}
    tables = [part.by(args.by, args.level) if args.by else part.average(args.level) for part in parts.values()]
    table: pd.DataFrame = pd.concat(tables, keys=parts, names=["kind"])
    if worlds.support is not None:
        support = worlds.support.table
        table["outside"] = support["outside"].astype(float).max()
        table["extrapolates"] = worlds.support.extrapolates
    return table


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
