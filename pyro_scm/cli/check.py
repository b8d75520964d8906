"""`pyro-scm check`: can a fitted run's posterior, predictions and intervals be trusted?"""

from argparse import Namespace

from pyro_scm.cli.inputs import labels
from pyro_scm.cli.outputs import claim, remark, table
from pyro_scm.cli.parsing import Verbs, add_verb, natural, path, whole
from pyro_scm.cli.runs import add_run_options, cells_for, load_run
from pyro_scm.errors import DataError

__all__ = ["add"]

DESCRIPTION = """\
Check a fitted run before its uncertainty is used, and write one HTML page with figures and a verdict for each check.

The guide: is its posterior near the true one (PSIS k-hat, gap of the bound, simulation-based calibration)? The
ensemble: do its members agree, which latents carry information? The model: are simulated cells like the real ones
(mean, variance and zeros of each gene), LOO and LOO-PIT? Predictions: do 50, 80 and 95 % intervals cover environments
that were held out? Each verdict is good, look (at the figure, before relying on it) or bad, with its threshold and
where that comes from; checks that do not apply to a model say why. Cells and genes are sampled; give more for sharper
checks.
"""

EXAMPLES = """\
  pyro-scm simulate --descriptors 16 --out sim.h5ad
  pyro-scm fit sim.h5ad --model environment_vae --environment perturbation --control control \
--representation uns:descriptors --latent 5 --hold-out env_09,env_10 --epochs 30 --seeds 3 --out run
  pyro-scm check run sim.h5ad --most-cells 100 --draws 50 --out checks.html
  pyro-scm check run sim.h5ad --most-cells 100 --draws 50 --conformal --out checks.html
"""


def add(verbs: Verbs) -> None:
    """Add the verb to the parser."""
    parser = add_verb(
        verbs,
        "check",
        run,
        summary="can the posterior and the predictions of a run be trusted?",
        description=DESCRIPTION,
        examples=EXAMPLES,
    )
    add_run_options(parser)
    parser.add_argument(
        "--hold-out",
        metavar="ENV,...",
        action="append",
        help="environments that the run was not fitted to, for the coverage of its intervals (default: those that it "
        "held out); may be given several times",
    )
    parser.add_argument("--draws", metavar="S", type=whole, default=200, help="of each member's posterior")
    parser.add_argument(
        "--particles", metavar="N", type=whole, default=16, help="of each estimate of a cell's log-likelihood"
    )
    parser.add_argument("--most-cells", metavar="N", type=whole, default=300, help="cells to check, at most")
    parser.add_argument("--most-genes", metavar="N", type=whole, default=100, help="genes to check, at most")
    parser.add_argument(
        "--conformal", action="store_true", help="judge held-out intervals after conformal recalibration"
    )
    parser.add_argument("--seed", metavar="N", type=natural, default=0, help="of cells, genes and draws")
    parser.add_argument("--out", metavar="FILE.html", type=path, required=True, help="page to write")


def run(args: Namespace) -> None:
    """Check, write and print."""
    out = claim(args.out, ".html", [args.data])
    import numpy as np

    from pyro_scm.criticism import checks

    fitted, memory = load_run(args.folder, args.model)
    _, cells = cells_for(fitted, memory, args)
    trained = fitted.environments.table["trained"].to_numpy(bool)
    asked = args.hold_out or memory.hold_out
    chosen = np.zeros(len(trained), bool)
    if asked:
        chosen[cells.environment_index(*labels(cells, asked))] = True
    seen = trained[cells.env] & ~chosen[cells.env]
    if not seen.any():
        raise DataError(f"{args.data}: holds no cell of an environment that the run was fitted to: check it on those")
    try:
        found = checks(
            fitted,
            cells.subset(seen),
            cells.subset(chosen[cells.env]) if chosen.any() else None,
            draws=args.draws,
            particles=args.particles,
            most_cells=args.most_cells,
            most_genes=args.most_genes,
            conformal=args.conformal,
            seed=args.seed,
        )
    except DataError as error:
        raise DataError(f"{args.data}: {error}") from error
    notes = [
        f"Run {args.folder}: {memory.model or 'model'}, {len(fitted)} members, {int(seen.sum())} cells of "
        f"{int(trained.sum())} environments it was fitted to, {int(chosen[cells.env].sum())} cells held out."
    ]
    found.write(out, f"Checks of {args.folder.name}", notes)
    table(found.table[["value", "verdict", "threshold"]])
    remark(args, f"\n{found.summary()}\npage saved in {out}")
