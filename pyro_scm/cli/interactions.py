"""`pyro-scm interactions`: combinations against the sum of their parts."""

from argparse import ArgumentTypeError, Namespace

from pyro_scm.cli.outputs import claim_folder, remark, table
from pyro_scm.cli.parsing import UsageError, Verbs, add_verb, assignment, whole
from pyro_scm.cli.pictures import add_prediction_options, save
from pyro_scm.cli.runs import add_run_options, cells_for, load_run

__all__ = ["add"]

DESCRIPTION = """\
Do combinations of perturbations do more, or less, than the sum of their parts?

Predicted changes from control, of the combination and of each part alone, are compared for every member of the
ensemble; where combination and parts were measured, so are the observed. 'synergy' is 0 for an additive combination,
0.5 for half as much again along the sum, -1 for no change at all; 'deviation' is any departure from the sum, relative
to its size. Writes scores.csv, matrix.csv (predicted synergies of pairs) and figure.png: predicted above the diagonal,
observed below it, and the one against the other.
"""

EXAMPLES = """\
  pyro-scm interactions pairs_run pairs.h5ad --out pairs
  pyro-scm interactions pairs_run pairs.h5ad --combination KLF1+CEBPA --gene HBG1 --out pairs
  pyro-scm interactions drugs_run drugs.h5ad --all --amount nutlin=1 --amount dex=0.1 --out pairs
"""


def add(verbs: Verbs) -> None:
    """Add the verb to the parser."""
    parser = add_verb(
        verbs,
        "interactions",
        run,
        summary="combinations against the sum of their parts, predicted and observed",
        description=DESCRIPTION,
        examples="\nexamples with data of your own:\n" + EXAMPLES,
    )
    add_run_options(parser)
    question = parser.add_argument_group("question").add_argument
    question(
        "--combination",
        metavar="ENV",
        action="append",
        default=[],
        help="an environment such as A+B (default: all combinations that the run knows); may be given several times",
    )
    question("--all", action="store_true", help="every pair of the perturbations that the run knows alone")
    question(
        "--amount",
        metavar="NAME=AMOUNT",
        type=_amount,
        action="append",
        default=[],
        help="with --all: only these, each at this amount, in the representation's unit (default: the largest that the "
        "run knows)",
    )
    question("--gene", metavar="GENE", help="synergy of one gene, in the unit of expression (default: all genes)")
    question("--bootstraps", metavar="N", type=whole, default=200, help="resamples of the observed cells")
    add_prediction_options(parser)


def _amount(text: str) -> tuple[str, float]:
    name, value = assignment(text)
    if isinstance(value, bool) or not isinstance(value, float | int) or value < 0:
        raise ArgumentTypeError(f"{text!r} is not NAME=AMOUNT, a number of 0 or more")
    return name, float(value)


def run(args: Namespace) -> None:
    """Predict, draw and write."""
    if args.all and args.combination:
        raise UsageError("--all and --combination: choose one")
    if args.amount and not args.all:
        raise UsageError("--amount is for --all: environments have amounts of their own")
    out = claim_folder(args.out)
    from pyro_scm.combinations import ALL, interactions

    fitted, memory = load_run(args.folder, args.model)
    _, cells = cells_for(fitted, memory, args)
    found = interactions(
        fitted,
        cells,
        ALL if args.all else args.combination or None,
        amounts=dict(args.amount),
        gene=args.gene,
        references=args.references,
        draws=args.draws,
        bootstraps=args.bootstraps,
        level=args.level,
        seed=args.seed,
    )
    pairs = found.scores["parts"].str.count(r"\+").eq(1).any()
    save(
        out,
        {"scores": found.scores, **({"matrix": found.matrix()} if pairs else {})},
        {"figure": found.figure()} if pairs else {},
    )
    remark(args, f"{out}: {len(found.scores)} combinations, {len(fitted)} members; largest departures:")
    order = found.scores["synergy"].abs().sort_values(ascending=False).index[:5]
    columns = ["synergy", "synergy_low", "synergy_high", "observed_synergy"]
    if not args.quiet:
        table(found.scores.loc[order, columns])
    new = found.scores.index[found.scores["warning"] != ""]
    for name in new[:5]:
        remark(args, f"warning: {name}: {found.scores['warning'].loc[name]}")
    if len(new) > 5:
        remark(args, f"warning: {len(new) - 5} more combinations are unlike training: see 'warning' in scores.csv")
