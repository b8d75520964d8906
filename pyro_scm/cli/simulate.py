"""`pyro-scm simulate`: a synthetic screen whose truth is known."""

from argparse import ArgumentTypeError, Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pyro_scm.cli.outputs import claim, remark, write_h5ad
from pyro_scm.cli.parsing import Verbs, add_verb, names, natural, path, positive, probability, whole

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["add"]

DESCRIPTION = """\
Simulate a perturbation screen from a latent causal model, and keep the truth beside it.

Each cell has a few latent causal variables, joined by a graph; every gene reads some of them. The first environment is
the control; each other one acts on one latent (or --targets of them). Cells go to X; the perturbation and its true
targets to obs; the true latents to obsm 'z' (noise) and 'c' (causal variables); the generating model to uns 'truth'.
"""

EXAMPLES = """\
  pyro-scm simulate --out sim.h5ad
  pyro-scm simulate --latent 5 --genes 50 --environments 11 --cells 500 --graph growing --descriptors 16 --seed 0 \
--out sim.h5ad
  pyro-scm simulate --observation counts --interventions shift,hard --graph 0-1,1-2,0-2 --latent 3 --out counts.h5ad
"""

GRAPHS = ("empty", "growing", "multi-growing", "layered")


def add(verbs: Verbs) -> None:
    """Add the verb to the parser."""
    parser = add_verb(
        verbs,
        "simulate",
        run,
        summary="make a synthetic screen whose truth is known",
        description=DESCRIPTION,
        examples=EXAMPLES,
    )
    size = parser.add_argument_group("size").add_argument
    size("--latent", metavar="D", type=whole, default=5, help="number of latent causal variables")
    size("--genes", metavar="G", type=whole, default=50, help="number of genes")
    size("--environments", metavar="E", type=whole, default=11, help="number of environments, the control among them")
    size("--cells", metavar="N", type=whole, default=500, help="number of cells in each environment")
    truth = parser.add_argument_group("truth").add_argument
    truth(
        "--graph",
        metavar="GRAPH",
        type=graph,
        default="growing",
        help="graph of the latents: empty, growing (a random tree), multi-growing (0 to 3 parents), layered; or edges "
        "PARENT-CHILD such as 0-1,1-2",
    )
    truth(
        "--mechanism",
        choices=("linear", "network"),
        default="linear",
        help="how a latent depends on its parents",
    )
    truth("--decoder", choices=("linear", "network"), default="network", help="how genes depend on the latents")
    truth(
        "--attachment",
        metavar="P",
        type=probability,
        default=0.5,
        help="probability that a gene reads a latent, from 0 to 1",
    )
    truth(
        "--interventions",
        metavar="KINDS",
        type=names,
        default=("shift",),
        help="what environments do, in turn: shift (of a latent's mean), scale (of its spread), mechanism (its sign "
        "flips), hard (it is cut from its parents)",
    )
    truth("--targets", metavar="N", type=whole, default=1, help="number of latents that an environment acts on")
    truth(
        "--strength",
        metavar="SD",
        type=positive,
        default=5.0,
        help="standard deviation of the shifts, in standard deviations of a latent's noise",
    )
    seen = parser.add_argument_group("observation").add_argument
    seen(
        "--observation",
        choices=("gaussian", "counts"),
        default="gaussian",
        help="continuous expression, or negative binomial counts",
    )
    seen(
        "--noise",
        metavar="SD",
        type=positive,
        default=0.1,
        help="standard deviation of the noise of a gene (gaussian only)",
    )
    seen("--depth", metavar="COUNTS", type=positive, default=2000.0, help="median counts of a cell (counts only)")
    seen(
        "--descriptors",
        metavar="N",
        type=natural,
        default=0,
        help="numbers that describe each environment's effect, as a fingerprint describes a drug: from them a model "
        "predicts unseen environments (uns 'descriptors'); 0 for none",
    )
    output = parser.add_argument_group("output").add_argument
    output("--seed", metavar="N", type=natural, default=0, help="of everything random")
    output("--out", metavar="FILE.h5ad", type=path, required=True, help="file to write")


def graph(text: str) -> str | tuple[tuple[int, int], ...]:
    """A kind of graph, or edges ``0-1,1-2``."""
    if text in GRAPHS:
        return text
    try:
        edges = [edge.split("-") for edge in names(text)]
        return tuple((int(parent), int(child)) for parent, child in edges)
    except ValueError:
        raise ArgumentTypeError(
            f"{text!r} is neither one of {', '.join(GRAPHS)} nor edges PARENT-CHILD such as 0-1,1-2"
        ) from None


def run(args: Namespace) -> None:
    """Simulate, write, and say what was made."""
    out = claim(args.out, ".h5ad")
    from pyro_scm.data.synthetic import Screen, simulate

    adata = simulate(
        Screen(
            latent=args.latent,
            genes=args.genes,
            environments=args.environments,
            cells=args.cells,
            graph=args.graph,
            mechanism=args.mechanism,
            decoder=args.decoder,
            attachment=args.attachment,
            observation="gaussian" if args.observation == "gaussian" else "negative-binomial",
            noise=args.noise,
            depth=args.depth,
            interventions=args.interventions,
            targets=args.targets,
            strength=args.strength,
            descriptors=args.descriptors,
            seed=args.seed,
        )
    )
    write_h5ad(adata, out)
    for line in described(adata, args):
        remark(args, line)


def described(adata: "AnnData", args: Namespace) -> list[str]:
    """What was made, and what to do with it."""
    matrix = adata.uns["truth"]["graph"]
    edges = [f"{parent} -> {child}" for child, parent in _pairs(matrix)]
    targets = adata.obs.drop_duplicates("perturbation").set_index("perturbation")["targets"]
    acts = [f"{name} on {target}" for name, target in targets.items() if target]
    known = " --representation uns:descriptors" if args.descriptors else ""
    return [
        f"{args.out}: {adata.n_obs} cells x {adata.n_vars} genes in {args.environments} environments, "
        f"{args.observation} expression",
        f"graph of the latents: {', '.join(edges) or 'no edges'}",
        f"environments act on latents: {', '.join(acts) or 'only a control'}",
        f"next: pyro-scm fit {args.out} --model environment_vae --environment perturbation --control control{known} "
        f"--latent {args.latent} --out run",
    ]


def _pairs(matrix: Any) -> Sequence[tuple[int, int]]:
    """Positions of the ones."""
    return [(int(i), int(j)) for i, row in enumerate(matrix) for j, value in enumerate(row) if value]
