"""`pyro-scm evaluate`: a fitted run beside baselines."""

from argparse import Namespace
from pathlib import Path

from pyro_scm.cli.compare import add_claim_options, recentring, show
from pyro_scm.cli.inputs import environments, labels
from pyro_scm.cli.outputs import claim, remark, write_csv
from pyro_scm.cli.parsing import UsageError, Verbs, add_verb, natural, path
from pyro_scm.cli.runs import add_run_options, cells_for, load_run
from pyro_scm.errors import DataError, listing

__all__ = ["add"]

DESCRIPTION = """\
Score what a run says of environments that it has not seen, beside simple baselines that any model should beat.

The environments are those that the run held out, or those named. Scored is the change from control, averaged over
cells: delta_pearson (correlation over genes, best 1), delta_r2 (share of the change explained, best 1, below 0 is worse
than predicting no change), rmse (in the data's units, log-normalised where these are counts, best 0); *_deg over the
most differential genes; rank (best 0, chance 0.5); nll (nats per cell, lower is better). Each is a mean over the
environments; ± is the standard deviation over the members of the ensemble. The run wins only if it is better than every
simple baseline in delta_pearson, in pairs over environments, and worse than the best of them neither in rmse nor in
rank. What is held out is searched for what leaks into the scores (--protocol). Half of the control cells are kept for
scoring; the run has seen them in its training, which `pyro-scm compare` avoids.
"""

EXAMPLES = """\
  pyro-scm simulate --descriptors 16 --out sim.h5ad
  pyro-scm fit sim.h5ad --model environment_vae --environment perturbation --control control \
--representation uns:descriptors --latent 5 --hold-out env_09,env_10 --epochs 30 --out run
  pyro-scm evaluate run sim.h5ad
  pyro-scm evaluate run sim.h5ad --hold-out env_09 --out scores.csv
"""


def add(verbs: Verbs) -> None:
    """Add the verb to the parser."""
    parser = add_verb(
        verbs,
        "evaluate",
        run,
        summary="score a run beside simple baselines",
        description=DESCRIPTION,
        examples=EXAMPLES,
    )
    add_run_options(parser)
    parser.add_argument(
        "--hold-out",
        metavar="ENV,...",
        action="append",
        help="environments, or perturbations with all their doses, to score (default: those that the run held out); "
        "may be given several times",
    )
    parser.add_argument(
        "--degs",
        metavar="N",
        type=natural,
        default=50,
        help="differential genes of each environment for the *_deg scores; 0 for none",
    )
    add_claim_options(parser)
    parser.add_argument(
        "--out", metavar="FILE.csv", type=path, help="file for the scores of each environment and member"
    )


def run(args: Namespace) -> None:
    """Score and print."""
    out = claim(args.out, ".csv") if args.out is not None else None
    from pyro_scm import evaluation
    from pyro_scm.data import splits

    fitted, memory = load_run(args.folder, args.model)
    _, cells = cells_for(fitted, memory, args)
    asked = args.hold_out or memory.hold_out
    if not asked:
        raise UsageError(f"{args.folder}: this run held nothing out: name environments to score with --hold-out ENV")
    try:
        split = splits.by_environment(cells, held_out=environments(cells, asked))
        comparison = evaluation.evaluate(
            {Path(memory.model or "run").name: fitted},
            split,
            degs=args.degs,
            protocol=args.protocol,
            plate=args.plate,
            distances=args.distances,
            recentre=recentring(args),
        )
    except DataError as error:
        raise DataError(f"{args.data}: {error}") from error
    if out is not None:
        write_csv(comparison.scores.set_index("model"), out)
    show(comparison, args)
    trained = fitted.environments.table["trained"]
    seen = [name for name in labels(cells, asked) if bool(trained[name])]
    if seen:
        remark(args, f"note: the run was fitted to cells of {listing(seen)}: these scores say nothing of unseen ones")
    if out is not None:
        remark(args, f"scores saved in {out}")
