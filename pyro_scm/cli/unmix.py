"""`pyro-scm unmix`: a dense fit in the coordinates in which its environments' effects are sparse."""

from argparse import Namespace
from typing import TYPE_CHECKING

from pyro_scm.cli.outputs import claim_folder, remark, table
from pyro_scm.cli.parsing import Verbs, add_verb, natural, path, positive
from pyro_scm.cli.runs import add_run_options, cells_for, load_run

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["add"]

DESCRIPTION = """\
Turn the latents of a fitted run so that each environment moves as few of them as possible.

A fit finds the space of the latents, but any rotation of it explains the cells as well. Fit with dense effects
(--option sparsity=dense; for an Environment VAE also --option scale=false), then unmix: of all rotations the one with
the sparsest effects is found from many starts, without looking at cells again, and folded into decoder, encoder and
environment network. --refine N then trains N more epochs under a prior that keeps the effects sparse. The result is a
run like any other. For each member it prints how many latents an environment moves by more than a fifth of its largest
effect, before and after; the contrast of the effects (of several seeds prefer the one with the lowest); and the share
of random starts that found the same basis (where it is low, do not trust it). Of two seeds or more it also prints how
many latents are stable: their effects are found again by the other members. Latents that are not stable should not be
read; a fit with many of them has more latents than the cells determine: fit as many as are stable.
"""

EXAMPLES = """\
  pyro-scm simulate --latent 3 --environments 13 --cells 100 --out sim.h5ad
  pyro-scm fit sim.h5ad --model translation_vae --environment perturbation --control control --latent 3 \
--option sparsity=dense --seeds 2 --epochs 10 --out run
  pyro-scm unmix run sim.h5ad --refine 5 --out sparse
"""


def add(verbs: Verbs) -> None:
    """Add the verb to the parser."""
    parser = add_verb(
        verbs,
        "unmix",
        run,
        summary="turn latents so that environments move few of them",
        description=DESCRIPTION,
        examples=EXAMPLES,
    )
    add_run_options(parser)
    parser.add_argument(
        "--oblique",
        metavar="WEIGHT",
        type=positive,
        help="search beyond rotations, with this weight (0.3, say) against latents that coincide; the fit is then no "
        "longer exactly what it was",
    )
    parser.add_argument(
        "--rank",
        metavar="N",
        type=_rank,
        help="turn only the N directions in which effects are largest, or 'auto': those in which they exceed their "
        "noise (default: all)",
    )
    parser.add_argument(
        "--offset",
        action="store_true",
        help="take off what the effects of all environments have in common, as on screens whose untreated cells differ "
        "from all others",
    )
    parser.add_argument(
        "--scales", action="store_true", help="use the environments' covariances too: they also change latents' scales"
    )
    parser.add_argument(
        "--prior",
        choices=("spike-slab", "student-t"),
        default="spike-slab",
        help="on effects, while --refine trains on (default: spike-slab)",
    )
    parser.add_argument("--refine", metavar="N", type=natural, default=0, help="epochs of training afterwards")
    parser.add_argument("--out", metavar="FOLDER", type=path, required=True, help="folder for the new run")


def run(args: Namespace) -> None:
    """Unmix, train on and save."""
    out = claim_folder(args.out)
    import numpy as np
    import pandas as pd

    from pyro_scm.effects import shifts
    from pyro_scm.errors import DataError
    from pyro_scm.unmixing import STABLE, directions, fold, refine, stability

    if out.resolve() == args.folder.resolve():
        raise DataError(f"--out {args.out}: this is the run itself: choose another folder")
    fitted, memory = load_run(args.folder, args.model)
    _, cells = cells_for(fitted, memory, args)
    trained = fitted.environments.table["trained"]
    known = [name in trained.index and bool(trained[name]) for name in cells.environments.index]
    cells = cells.subset(np.array(known)[cells.env])
    found = directions(fitted, cells, oblique=args.oblique, rank=args.rank, offset=args.offset, scales=args.scales)
    result = fold(fitted, cells, found)
    if args.refine:
        shown = False if args.quiet else None
        result = refine(result, cells, prior=args.prior, offset=args.offset, epochs=args.refine, progress=shown)
    before, after = shifts(fitted), shifts(result)
    several = len(result) > 1
    agreement = stability(result, offset=args.offset)["agreement"].to_numpy() if several else np.full(1, np.nan)
    stable = (agreement.reshape(len(result), -1) > STABLE).sum(1)
    rows = [
        {
            "seed": fitted.seeds[k],
            "moved before": _moved(before, k),
            "moved after": _moved(after, k),
            "rank": d.rank,
            "contrast": d.score,
            "starts that agree": d.agreement,
            "stable latents": stable[k] if several else np.nan,
            "loss": result.losses[k] if args.refine else np.nan,
        }
        for k, d in enumerate(found)
    ]
    table(pd.DataFrame(rows).dropna(axis=1), index=False)
    result.save(out)
    memory.save(out)
    remark(args, f"run saved in {args.out}")


def _rank(text: str) -> int | str:
    return text if text == "auto" else natural(text)


def _moved(effects: "pd.DataFrame", member: int) -> float:
    """Mean number of latents that an environment moves by more than a fifth of its largest effect."""
    import numpy as np

    rows = effects.index.get_level_values("member") == member
    sizes = np.abs(effects.to_numpy()[rows])
    largest = sizes.max(1)
    return float((sizes > 0.2 * largest[:, None])[largest > 0].sum(1).mean())
