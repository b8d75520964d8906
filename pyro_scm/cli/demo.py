"""`pyro-scm demo`: the whole suite on one page."""

from argparse import Namespace

from pyro_scm.cli.outputs import claim_folder, remark
from pyro_scm.cli.parsing import Verbs, add_verb, path, seeds

__all__ = ["add"]

DESCRIPTION = """\
Show everything at once, on simulated cells: no data and no choices are needed.

Simulates a screen whose latent causal model is known, fits baselines and models with several seeds, scores them on
environments that they have not seen, asks a do-query and a counterfactual, and puts what was learnt beside the truth on
one HTML page, with the tables and a fitted run beside it. Takes a few minutes on two cores.
"""

EXAMPLES = """\
  pyro-scm demo --out demo
  pyro-scm demo --quick --seeds 1 --out demo
"""


def add(verbs: Verbs) -> None:
    """Add the verb to the parser."""
    parser = add_verb(
        verbs,
        "demo",
        run,
        summary="show everything on simulated cells, as one HTML page",
        description=DESCRIPTION,
        examples=EXAMPLES,
    )
    parser.add_argument("--out", metavar="DIR", type=path, required=True, help="folder for the page and its tables")
    parser.add_argument("--quick", action="store_true", help="a tiny screen and few epochs: a test, not a result")
    parser.add_argument(
        "--seeds",
        metavar="SEEDS",
        type=seeds,
        default=(0, 1, 2),
        help="members of each model: a number of them, or the seeds themselves",
    )


def run(args: Namespace) -> None:
    """Make the demonstration."""
    out = claim_folder(args.out)
    from pyro_scm.demo import demo

    demo(
        out,
        quick=args.quick,
        seeds=args.seeds,
        progress=False if args.quiet else None,
        say=lambda text: remark(args, text),
    )
