"""`pyro-scm dose-response`: predicted curves over doses beside what was observed."""

from argparse import ArgumentTypeError, Namespace

from pyro_scm.cli.outputs import claim_folder, remark
from pyro_scm.cli.parsing import COVARIATES, Verbs, add_verb, names
from pyro_scm.cli.pictures import add_prediction_options, save
from pyro_scm.cli.runs import add_run_options, cells_for, load_run

__all__ = ["add"]

DESCRIPTION = """\
How does the effect of each perturbation grow with its dose: predicted curves, observed points, and EC50s.

Predicted curves have bands over the members of the ensemble (and draws of their posteriors, with --draws); observed
points are means over cells with standard errors. Where a perturbation has three doses or more, Hill curves are fitted
to all points together, as a Bayesian model that shares what perturbations have in common: EC50, Emax and slope have
intervals, and an EC50 outside the doses measured is said to be ('outside', a probability). Writes curves.csv,
points.csv, table.csv and figure.png.

A readout is a change from control: 'effect' (of expression, along the change predicted for the largest dose), 'latent'
(of the latents, along the effect), or a gene. The run must know doses: fit with a --representation of multi-dose,
multi-hot, molecules or dose.
"""

EXAMPLES = """\
  pyro-scm dose-response drugs_run drugs.h5ad --out doses
  pyro-scm dose-response drugs_run drugs.h5ad --perturbation vorinostat,nutlin --readout CDKN1A --out doses
  pyro-scm dose-response drugs_run drugs.h5ad --covariate cell_type=T --draws 10 --hill nuts --out doses
"""


def add(verbs: Verbs) -> None:
    """Add the verb to the parser."""
    parser = add_verb(
        verbs,
        "dose-response",
        run,
        summary="predicted curves over doses, observed points, EC50 with intervals",
        description=DESCRIPTION,
        examples="\nexamples with data of your own:\n" + EXAMPLES,
    )
    add_run_options(parser)
    question = parser.add_argument_group("question").add_argument
    question(
        "--perturbation",
        metavar="NAME,...",
        type=names,
        action="append",
        default=[],
        help="only these (default: all with a known dose); may be given several times",
    )
    question("--readout", metavar="WHAT", default="effect", help="'effect', 'latent' or a gene")
    question("--doses", metavar="UM,...", type=_doses, help="to predict (default: 13 over and beyond those of the run)")
    question(
        "--covariate",
        **COVARIATES,
        help="only cells such as cell_type=B; may be given several times",
    )
    question(
        "--hill",
        choices=("svi", "nuts", "none"),
        default="svi",
        help="how to fit Hill curves: svi (seconds), nuts (minutes) or none (default: svi)",
    )
    add_prediction_options(parser)


def _doses(text: str) -> list[float]:
    try:
        found = [float(part) for part in names(text)]
    except ValueError:
        raise ArgumentTypeError(f"{text!r} are not doses in uM, such as 0.1,1,10") from None
    return found


def run(args: Namespace) -> None:
    """Predict, draw and write."""
    out = claim_folder(args.out)
    from pyro_scm.doses import dose_response

    fitted, memory = load_run(args.folder, args.model)
    _, cells = cells_for(fitted, memory, args)
    found = dose_response(
        fitted,
        cells,
        [name for given in args.perturbation for name in given] or None,
        readout=args.readout,
        doses=args.doses,
        covariates=dict(args.covariate),
        references=args.references,
        draws=args.draws,
        hill=None if args.hill == "none" else args.hill,
        level=args.level,
        seed=args.seed,
    )
    table = found.table()
    save(out, {"curves": found.curves, "points": found.points, "table": table}, {"figure": found.figure()})
    remark(args, f"{out}: {len(table)} curves of {found.unit}, {len(fitted)} members")
    if found.hill is None and args.hill != "none":
        remark(args, "no Hill curves: no perturbation has 3 doses or more with 2 cells or more")
    new = sorted(set(found.curves.loc[found.curves["warning"] != "", "perturbation"]))
    if new:
        remark(args, f"warning: curves of {len(new)} perturbations go beyond what was trained on: see 'warning'")
