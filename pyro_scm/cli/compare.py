"""`pyro-scm compare`: models beside baselines on unseen environments."""

from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyro_scm.cli.fit import add_selection_options, add_training_options, check_device, keep_genes, training
from pyro_scm.cli.inputs import DataOptions, Memory, add_data_options, environments, read, represented
from pyro_scm.cli.models import guide_options
from pyro_scm.cli.outputs import claim_folder, remark
from pyro_scm.cli.parsing import (
    UsageError,
    Verbs,
    add_verb,
    assignment,
    matching,
    names,
    natural,
    path,
    share,
    whole,
    widths,
)
from pyro_scm.cli.runs import absolute, recipe
from pyro_scm.errors import DataError

if TYPE_CHECKING:
    from pyro_scm.data.dataset import EnvironmentDataset
    from pyro_scm.data.splits import Split
    from pyro_scm.evaluation import Comparison

__all__ = ["add", "add_claim_options", "recentring", "show"]

DESCRIPTION = """\
Fit several models on the same cells and score what they say of environments that none of them has seen, beside simple
baselines that any model should beat.

Scored is the change from control, averaged over cells: delta_pearson (correlation over genes, best 1), delta_r2 (share
of the change explained, best 1, below 0 is worse than predicting no change), rmse (in the data's units, log-normalised
where these are counts, best 0); *_deg over the most differential genes; rank (best 0, chance 0.5). Each is a mean over
held-out environments; ± is the standard deviation over seeds. A model wins only if it is better than every simple
baseline in delta_pearson, in pairs over environments and allowing for the number of models, and worse than the best of
them neither in rmse nor in rank. The split is searched for what leaks into the scores (--protocol). DIR receives
scores.csv (each environment and seed), summary.csv, gate.csv (one verdict a model), differences.csv (each model against
each baseline), verdict.csv (each metric against its best baseline), config.json, figure.png, and each model's run in a
folder of its own, for the other verbs.
"""

EXAMPLES = """\
  pyro-scm simulate --descriptors 16 --out sim.h5ad
  pyro-scm compare sim.h5ad --models vae,environment_vae,baselines --environment perturbation --control control \
--representation uns:descriptors --latent 5 --hold-out env_09,env_10 --seeds 2 --epochs 30 --out compared
  pyro-scm compare sim.h5ad --models translation_vae,ridge --environment perturbation --control control \
--representation uns:descriptors --hold-out-fraction 0.3 --seeds 2 --epochs 30 --out compared
"""

SHOWN = ("delta_pearson", "delta_r2", "rmse", "delta_pearson_deg", "rank", "nll", "energy_distance")


def add(verbs: Verbs) -> None:
    """Add the verb to the parser."""
    parser = add_verb(
        verbs,
        "compare",
        run,
        summary="score models beside simple baselines on unseen environments",
        description=DESCRIPTION,
        examples=EXAMPLES,
    )
    add_data_options(parser)
    split = parser.add_argument_group("what is trained on")
    held = split.add_mutually_exclusive_group(required=True)
    held.add_argument(
        "--hold-out",
        metavar="ENV,...",
        action="append",
        help="environments, or perturbations with all their doses, to predict; may be given several times",
    )
    held.add_argument(
        "--hold-out-fraction",
        metavar="SHARE",
        type=share,
        help="share of the perturbations, between 0 and 1, drawn at random to predict",
    )
    split.add_argument("--split-seed", metavar="N", type=natural, default=0, help="of that draw")
    add_selection_options(split)
    model = parser.add_argument_group("models").add_argument
    model(
        "--models",
        metavar="A,B,...",
        type=names,
        required=True,
        help="models as `pyro-scm models` lists them or FILE.py:FUNCTION; the simple baselines (no_change, "
        "training_mean, additive, ridge, nearest) are always scored too, and alone with --models baselines",
    )
    model("--latent", metavar="D", type=whole, help="number of latent causal variables (default: each model's own, 20)")
    model(
        "--hidden",
        metavar="WIDTHS",
        type=widths,
        help="widths of the hidden layers of decoders and encoders; 0 for none (default: each model's own, 128)",
    )
    model(
        "--option",
        metavar="NAME=VALUE",
        type=assignment,
        action="append",
        default=[],
        help="any other option, for all models that have it; may be given several times",
    )
    model(
        "--degs",
        metavar="N",
        type=natural,
        default=50,
        help="differential genes of each environment for the *_deg scores; 0 for none",
    )
    add_claim_options(split)
    add_training_options(parser)
    parser.add_argument_group("output").add_argument(
        "--out", metavar="DIR", type=path, required=True, help="folder for tables, figure and runs"
    )


def add_claim_options(group: Any) -> None:
    """What the scores are said to show, which the split is searched for leaks by, and what more is scored."""
    group.add_argument(
        "--protocol",
        choices=("environment", "perturbation", "scaffold", "combination", "cell_line", "dose"),
        help="what is said to be unseen; leaks that contradict it are named (default: what is held out: perturbation, "
        "or environment where other doses or times of one are in training)",
    )
    group.add_argument(
        "--distances",
        action="store_true",
        help="draw cells too and score their distribution: energy_distance, mmd, variance_r2",
    )
    group.add_argument(
        "--recentre",
        metavar="BASELINE|COLUMN,...",
        help="score each model a second time, as 'NAME, recentred', with what a simple baseline makes of the model's "
        "errors in training environments added: training_mean (the common change is measured instead of predicted), "
        "additive, ridge, nearest; or the mean over those alike in columns, such as dose or time,dose",
    )
    group.add_argument("--plate", metavar="COLUMN", help="obs column of plates or batches that are said to be unseen")


def run(args: Namespace) -> None:
    """Fit, score, save and print."""
    out = claim_folder(args.out)
    check_device(args.device)
    from pyro_scm.evaluation import compare

    options = DataOptions.given(args)
    models, _ = chosen(args)
    adata, cells = read(args.data, options)
    cells = represented(args.data, adata, cells, options)
    split = _split(args, cells)
    settings = training(args)
    remark(
        args,
        f"{len(models)} models with {len(settings['seeds'])} seeds each, on {len(split.train)} cells; predicted are "
        f"{len(split.test.present)} environments: {', '.join(str(name) for name in split.held_out)}",
    )
    comparison = compare(
        split,
        models,
        degs=args.degs,
        protocol=args.protocol,
        plate=args.plate,
        distances=args.distances,
        recentre=recentring(args),
        device=args.device,
        progress=False if args.quiet else None,
        **settings,
    )
    comparison.save(out)
    for label, fitted in comparison.runs.items():
        given = {name: value for name, value in models[label].items() if name != "recipe"}
        source = str(models[label].get("recipe", label))
        data = replace(options, counts=cells.counts)
        held_out = tuple(str(name) for name in split.held_out)
        fitted.save(out / label)
        Memory(data, held_out, args.validation_fraction or 0.0, args.genes, source, given, settings).save(out / label)
    show(comparison, args)
    remark(args, f"tables, figure and runs saved in {out}")


def recentring(args: Namespace) -> str | tuple[str, ...] | bool:
    """A baseline's name, or columns of the environment table."""
    from pyro_scm.baselines import BASELINES

    if not args.recentre:
        return False
    return args.recentre if args.recentre in BASELINES else tuple(args.recentre.split(","))


def chosen(args: Namespace) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Models with their options, and the baselines that were named.

    Raises:
        UsageError: an option that no model has.
    """
    from pyro_scm.baselines import BASELINES

    asked = [name for name in args.models if name not in BASELINES and name != "baselines"]
    baselines = [name for name in BASELINES if name in args.models or "baselines" in args.models]
    given = dict(args.option)
    if args.latent is not None:
        given["latent"] = args.latent
    if args.hidden is not None:
        given |= {"hidden": args.hidden, "guide_hidden": args.hidden}
    models: dict[str, dict[str, Any]] = {}
    used: set[str] = set()
    for name in asked:
        known = recipe(name).options | guide_options()
        own = matching({n: v for n, v in given.items() if n in known}, known, f"the model {name}")
        used |= set(own)
        file, _, function = name.partition(":")
        label = function or Path(file).stem
        models[label] = own if label == name else {**own, "recipe": absolute(name)}
    unused = sorted(set(given) - used)
    if unused and asked:
        raise UsageError(f"none of the models {', '.join(asked)} has the option {', '.join(unused)}")
    return models, baselines


def _split(args: Namespace, cells: "EnvironmentDataset") -> "Split":
    """Training, validation and held-out cells.

    Raises:
        DataError: cells that cannot be split so.
    """
    from pyro_scm.data import splits

    try:
        split = splits.by_environment(
            cells,
            held_out=environments(cells, args.hold_out) if args.hold_out else None,
            fraction=args.hold_out_fraction or 0.2,
            validation_fraction=args.validation_fraction or 0.0,
            seed=args.split_seed,
        )
        train, validation, test = keep_genes(args.genes, split.train, split.validation, split.test)
    except DataError as error:
        raise DataError(f"{args.data}: {error}") from error
    return replace(split, train=train, validation=validation, test=test)


def show(comparison: "Comparison", args: Namespace) -> None:
    """Print the scores, the paired differences from every baseline, and one verdict a model."""
    from pyro_scm.gate import sentence

    print(comparison.brief(SHOWN).to_string())
    notes = comparison.config.get("notes", ())
    for note in notes:
        remark(args, f"note: {note}")
    if not any(str(note).startswith("leak") for note in notes):
        remark(args, f"no leaks found: {comparison.config.get('protocol', 'cell')}s are unseen".replace("_", " "))
    pairs = comparison.differences()
    if pairs.empty:
        return
    remark(args, f"\n{pairs['metric'].iloc[0]}, model - baseline, in pairs [95 % interval, of all models at once]:")
    cells = pairs.assign(text=[_shown(row) for row in pairs.to_dict("records")])
    grid = cells.pivot(index="baseline", columns="model", values="text")
    grid = grid.loc[pairs["baseline"].unique(), pairs["model"].unique()].rename_axis(None).rename_axis(None, axis=1)
    remark(args, grid.to_string())
    for row in comparison.gate().to_dict("records"):
        remark(args, sentence({str(name): value for name, value in row.items()}))


def _shown(row: dict[Any, Any]) -> str:
    """A difference and its interval."""
    if not row["units"]:
        return "–"
    low, high = row["lower"], row["upper"]
    return f"{row['difference']:+.3f}" + (
        f" [{low:+.3f}, {high:+.3f}]" if low == low else ""
    )  # NaN for one environment
