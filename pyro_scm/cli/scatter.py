"""`pyro-scm scatter`: predicted against observed changes of every gene, a panel for each condition."""

from argparse import Namespace

from pyro_scm.cli.inputs import labels
from pyro_scm.cli.outputs import claim_folder, remark, table
from pyro_scm.cli.parsing import Verbs, add_verb, whole
from pyro_scm.cli.pictures import add_prediction_options, save
from pyro_scm.cli.runs import add_run_options, cells_for, load_run

__all__ = ["add"]

DESCRIPTION = """\
Look at predictions gene by gene: predicted against observed change from control, differential genes marked.

Writes genes.csv, scores.csv and figure.png with a panel for each condition, its r2 and the correlation of its changes
in the title. This is to look at: the scores share the noise of the controls on both sides; `pyro-scm evaluate` keeps
them apart and shows what simple baselines score.
"""

EXAMPLES = """\
  pyro-scm simulate --descriptors 16 --out sim.h5ad
  pyro-scm fit sim.h5ad --model environment_vae --environment perturbation --control control \
--representation uns:descriptors --latent 5 --hold-out env_09,env_10 --epochs 30 --out run
  pyro-scm scatter run sim.h5ad --out scatter
  pyro-scm scatter run sim.h5ad --environment env_09,env_02 --degs 5 --out scatter
"""


def add(verbs: Verbs) -> None:
    """Add the verb to the parser."""
    parser = add_verb(
        verbs,
        "scatter",
        run,
        summary="predicted against observed change of every gene",
        description=DESCRIPTION,
        examples=EXAMPLES,
    )
    add_run_options(parser)
    parser.add_argument(
        "--environment",
        metavar="ENV,...",
        action="append",
        help="environments, or perturbations with all their doses (default: those that the run was not fitted to); may "
        "be given several times",
    )
    parser.add_argument("--degs", metavar="N", type=whole, default=20, help="most differential genes to mark")
    parser.add_argument("--panels", metavar="N", type=whole, default=12, help="in the figure, at most")
    add_prediction_options(parser, draws=False)


def run(args: Namespace) -> None:
    """Predict, draw and write."""
    out = claim_folder(args.out)
    from pyro_scm.agreement import scatter

    fitted, memory = load_run(args.folder, args.model)
    _, cells = cells_for(fitted, memory, args)
    chosen = labels(cells, args.environment) if args.environment else None
    found = scatter(fitted, cells, chosen, top=args.degs, references=args.references, level=args.level, seed=args.seed)
    save(out, {"genes": found.genes, "scores": found.scores}, {"figure": found.figure(number=args.panels)})
    table(found.scores.drop(columns="warning"))
    for name, warning in found.scores["warning"].items():
        if warning:
            remark(args, f"warning: {name}: {warning}")
    remark(args, f"saved in {out}")
