"""`pyro-scm identify`: what a design can recover, and what the graph is worth."""

from argparse import Namespace

from pyro_scm.cli.outputs import claim, remark, write_csv
from pyro_scm.cli.parsing import Verbs, add_verb, path, seeds, share
from pyro_scm.cli.runs import add_run_options, cells_for, load_run

__all__ = ["add"]

DESCRIPTION = """\
Say what the data and model of a run can identify, before anybody believes an arrow.

First what theory grants: of the noise z, the targets, the causal order and the graph, from the kind of intervention,
whether targets are known, the number of environments and the decoder, each with its source. Then what the data say: the
model is fitted again with and without its edges to the same 70 % of each environment's cells; printed is the gain of
the graph on the other cells, in nats per cell, with a bootstrap interval. A graph that is worth nothing there is
reported as not identified, whatever its arrows. Takes as long as two fits of the run, seconds where all is linear and
Gaussian.
"""

EXAMPLES = """\
  pyro-scm simulate --latent 5 --environments 6 --interventions hard --decoder linear --graph multi-growing \
--out sim.h5ad
  pyro-scm fit sim.h5ad --model structured_environment_vae --environment perturbation --control control --latent 5 \
--option interventions=hard --option hidden=, --option edges=order-free \
--seeds 1 --epochs 5 --out run
  pyro-scm identify run sim.h5ad
"""


def add(verbs: Verbs) -> None:
    """Add the verb to the parser."""
    parser = add_verb(
        verbs,
        "identify",
        run,
        summary="what can be identified, and what the graph is worth",
        description=DESCRIPTION,
        examples=EXAMPLES,
    )
    add_run_options(parser)
    parser.add_argument(
        "--interventions",
        choices=("noise", "mechanism", "hard"),
        help="what environments do to their targets, if it is not what the model takes them for",
    )
    parser.add_argument(
        "--estimator",
        choices=("auto", "exact", "svi"),
        default="auto",
        help="exact likelihood (linear and Gaussian models), or fits as the run was made; auto takes exact if it can",
    )
    parser.add_argument(
        "--test-share", metavar="SHARE", type=share, default=0.3, help="share of each environment's cells to score on"
    )
    parser.add_argument(
        "--seeds",
        metavar="N|A,B,...",
        type=seeds,
        help="seeds of the fits (default: the run's; 8 restarts where the fit is exact)",
    )
    parser.add_argument("--out", metavar="FILE.csv", type=path, help="file for the claims, one row each")


def run(args: Namespace) -> None:
    """Refit, compare and print."""
    out = claim(args.out, ".csv", [args.data]) if args.out is not None else None
    from pyro_scm.identify import identify

    fitted, memory = load_run(args.folder, args.model)
    _, cells = cells_for(fitted, memory, args)
    report = identify(
        fitted,
        cells,
        interventions=args.interventions,
        estimator=args.estimator,
        held_out=args.test_share,
        seeds=args.seeds,
    )
    print(report)
    if out is not None:
        low, high = report.interval()
        write_csv(report.table().assign(gain=report.gain, low=low, high=high, verdict=report.verdict), out)
        remark(args, f"claims saved in {out}")
