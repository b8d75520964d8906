"""`pyro-scm tune`: search models and hyper-parameters."""

import argparse
from argparse import ArgumentTypeError, Namespace
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyro_scm.cli.compare import chosen, show
from pyro_scm.cli.fit import TRAINING, add_training_options, check_device, keep_genes, training
from pyro_scm.cli.inputs import DataOptions, Memory, add_data_options, environments, read, represented
from pyro_scm.cli.models import guide_options, training_options
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
)
from pyro_scm.cli.runs import recipe
from pyro_scm.errors import DataError

if TYPE_CHECKING:
    from pyro_scm.data.dataset import EnvironmentDataset
    from pyro_scm.data.splits import Split
    from pyro_scm.tuning import Tuning

__all__ = ["add", "space"]

DESCRIPTION = """\
Search models and their settings for those that predict unseen environments best.

Each trial trains one model with one choice of settings, with several seeds, and is scored on environments set aside for
validation. What was seen so far decides what is tried next (Optuna's TPE sampler). The best trial is then scored on the
test environments, beside simple baselines; these environments choose nothing, so that this score is an honest one.

Stopped at any time, the same command goes on where it stopped; --trials may be raised. A trial whose training diverges
is kept as failed, one whose process is killed is tried again. DIR receives journal.log (Optuna's record), study.json
(what is tuned), trials.csv (each trial), best.json, and test/ with the tables, figure and run of the best trial.
"""

EXAMPLES = """\
  pyro-scm simulate --descriptors 16 --out sim.h5ad
  pyro-scm tune sim.h5ad --model environment_vae,translation_vae --environment perturbation --control control \
--representation uns:descriptors --space latent=3:8 --space lr=log:1e-3:1e-2 --space sparsity=softmax,top-k \
--hold-out env_09,env_10 --trials 4 --seeds 2 --epochs 10 --folder study

examples with data of your own:
  pyro-scm tune drugs.h5ad --model environment_vae,translation_vae --environment drug --control DMSO \
--representation morgan:smiles --hold-out-fraction 0.2 --splits 3 --space latent=5:50 --space 'hidden=128|256|256,128' \
--trials 40 --processes 2 --folder study
"""


def add(verbs: Verbs) -> None:
    """Add the verb to the parser."""
    parser = add_verb(
        verbs,
        "tune",
        run,
        summary="search models and hyper-parameters",
        description=DESCRIPTION,
        examples=EXAMPLES,
    )
    parser.set_defaults(interrupted=interrupted, latent=None, hidden=None)  # --space or --option says those
    add_data_options(parser)
    split = parser.add_argument_group("what is trained on")
    held = split.add_mutually_exclusive_group(required=True)
    held.add_argument(
        "--hold-out",
        metavar="ENV,...",
        action="append",
        help="environments, or perturbations with all their doses, to test the best trial on; may be given several "
        "times",
    )
    held.add_argument(
        "--hold-out-fraction",
        metavar="SHARE",
        type=share,
        help="share of the perturbations, between 0 and 1, drawn at random to test the best trial on",
    )
    split.add_argument(
        "--validation-fraction",
        metavar="SHARE",
        type=share,
        default=0.2,
        help="share of the perturbations, between 0 and 1, set aside to score trials on",
    )
    split.add_argument(
        "--genes",
        metavar="N",
        type=whole,
        help="keep the N most variable genes, chosen on the training cells (default: all)",
    )
    split.add_argument("--split-seed", metavar="N", type=natural, default=0, help="of these draws")
    split.add_argument(
        "--splits", metavar="N", type=whole, default=1, help="draw so many splits, and score a trial by its mean on all"
    )
    _add_search_options(parser.add_argument_group("what is searched"))
    add_training_options(parser)
    parser.add_argument_group("output").add_argument(
        "--folder",
        metavar="DIR",
        type=path,
        required=True,
        help="folder for the study; one that is there is gone on with",
    )


def _add_search_options(group: argparse._ArgumentGroup) -> None:
    """Models, space and how it is searched."""
    add = group.add_argument
    add(
        "--model",
        dest="models",
        metavar="A,B,...",
        type=names,
        required=True,
        help="models as `pyro-scm models` lists them or FILE.py:FUNCTION, to choose from",
    )
    add(
        "--space",
        metavar="NAME=VALUES",
        type=space,
        action="append",
        required=True,
        help="an option of models, guides or training, as `pyro-scm models NAME` lists them, and what to choose from: "
        "5:50 (from 5 to 50, whole numbers), 0.1:1 (any), log:1e-4:1e-2 (on a logarithmic scale), softmax,top-k (one "
        "of these), 128|256,128 (where a choice itself holds commas); may be given several times",
    )
    add(
        "--option",
        metavar="NAME=VALUE",
        type=assignment,
        action="append",
        default=[],
        help="an option that is the same in all trials, for all models that have it; may be given several times",
    )
    add("--trials", metavar="N", type=whole, default=40, help="in all, with those that DIR holds already")
    add("--processes", metavar="N", type=whole, default=1, help="trials at the same time")
    add(
        "--score",
        metavar="METRIC",
        default="delta_pearson",
        help="what is best: delta_pearson, delta_r2, rmse, each also as *_deg, rank, nll, reconstruction or "
        "reconstruction_rmse",
    )
    add(
        "--degs",
        metavar="N",
        type=natural,
        default=50,
        help="differential genes of each environment for the *_deg scores; 0 for none",
    )


def space(text: str) -> tuple[str, Any]:
    """``NAME=LOW:HIGH``, ``NAME=log:LOW:HIGH``, ``NAME=A,B,C`` or ``NAME=A|B,C``, as `pyro_scm.tune` takes them."""
    name, equals, values = (part.strip() for part in text.partition("="))
    if not equals or not name or not values:
        raise ArgumentTypeError(f"{text!r} is not of the form NAME=VALUES")
    log, colon, rest = values.partition(":")
    ends = (rest if log == "log" and ":" in rest else values).split(":")
    if colon and len(ends) == 2:
        found = tuple(assignment(f"{name}={end}")[1] for end in ends)
        if not all(isinstance(end, int | float) and not isinstance(end, bool) for end in found):
            raise ArgumentTypeError(f"{text!r}: the ends of a range are numbers: LOW:HIGH or log:LOW:HIGH")
        return name, ("log", *found) if log == "log" else found
    if colon and (log == "log" or len(ends) > 2):
        raise ArgumentTypeError(f"{text!r}: a range is LOW:HIGH or log:LOW:HIGH")
    parts = values.split("|" if "|" in values else ",")
    return name, [assignment(f"{name}={part}")[1] for part in parts if part.strip()]


# ---------------------------------------------------------------------- what to do
def run(args: Namespace) -> None:
    """Search, save and print."""
    folder = claim_folder(args.folder)
    check_device(args.device)
    from pyro_scm.tuning import tune

    options = DataOptions.given(args)
    models, baselines = chosen(args)
    if baselines:
        raise UsageError(f"--model {baselines[0]}: baselines have nothing to tune: all of them are scored at the end")
    sought, settings = _searched(args)
    adata, cells = read(args.data, options)
    cells = represented(args.data, adata, cells, options)
    parts = [_split(args, cells, args.split_seed + i) for i in range(args.splits)]
    remark(
        args,
        f"{args.trials} trials of {len(settings['seeds'])} seeds each, on {len(parts[0].train)} cells; scored on "
        + ", ".join(str(len(part.validation.present) if part.validation is not None else 0) for part in parts)
        + " environments, the best one tested on "
        + ", ".join(str(len(part.test.present)) for part in parts),
    )
    tuning = tune(
        parts,
        models,
        sought,
        folder=folder,
        trials=args.trials,
        score=args.score,
        processes=args.processes,
        degs=args.degs,
        device=args.device,
        progress=False if args.quiet else None,
        **settings,
    )
    source = str(models[tuning.best.model].get("recipe", tuning.best.model))
    fitted = {"seeds": settings["seeds"], **tuning.best.training}
    data = replace(options, counts=cells.counts)
    for part, (name, comparison) in zip(parts, tuning.tests().items(), strict=True):
        saved = comparison.runs[tuning.best.model].save(folder / name / tuning.best.model)
        held_out = tuple(str(name) for name in part.held_out)
        kept = Memory(data, held_out, args.validation_fraction, args.genes, source, tuning.best.options, fitted)
        kept.save(saved)
    _show(tuning, args)
    remark(args, f"trials, tables, figure and run saved in {folder}")


def _searched(args: Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """The space, its values of the kinds that options have, and what is fixed in the training.

    Raises:
        UsageError: an option that does not exist, is given twice, or is of another kind.
    """
    found: dict[str, Any] = {}
    flags = {name: default for name, default in TRAINING.items() if name != "seeds"}
    known = training_options() | flags | guide_options()
    for model in args.models:
        known |= recipe(model).options
    for name, values in args.space:
        if name in found:
            raise UsageError(f"--space {name}: given twice: leave one out")
        if name in flags and getattr(args, name) is not None:
            raise UsageError(f"--{name.replace('_', '-')} and --space {name} say the same: leave one out")
        if name in dict(args.option) or name in dict(args.training or ()):
            raise UsageError(f"{name} is fixed, and in --space: leave one out")
        numbers = values[-2:] if isinstance(values, tuple) else values
        checked = [matching({name: value}, known, "the space")[name] for value in numbers]
        found[name] = (*values[:-2], *checked) if isinstance(values, tuple) else checked
    return found, {name: value for name, value in training(args).items() if name not in found}


def _split(args: Namespace, cells: "EnvironmentDataset", seed: int) -> "Split":
    """Training, validation and test cells.

    Raises:
        DataError: cells that cannot be split so.
    """
    from pyro_scm.data import splits

    try:
        split = splits.by_environment(
            cells,
            held_out=environments(cells, args.hold_out) if args.hold_out else None,
            fraction=args.hold_out_fraction or 0.2,
            validation_fraction=args.validation_fraction,
            seed=seed,
        )
        train, validation, test = keep_genes(args.genes, split.train, split.validation, split.test)
    except DataError as error:
        raise DataError(f"{args.data}: {error}") from error
    return replace(split, train=train, validation=validation, test=test)


def _show(tuning: "Tuning", args: Namespace) -> None:
    """Print the best trials, then the scores of the best on the test environments."""
    top = tuning.top().drop(columns=["state", "note"]).dropna(axis=1, how="all")
    print(top.to_string(float_format=lambda v: f"{v:.4g}", na_rep="-"))
    failed = tuning.trials[tuning.trials["state"] == "failed"]
    if len(failed):
        remark(args, f"note: {len(failed)} trials failed; trial {failed['trial'].iloc[0]}: {failed['note'].iloc[0]}")
    best = {**tuning.best.options, **tuning.best.training}
    settings = ", ".join(f"{n}={v:.4g}" if isinstance(v, float) else f"{n}={v}" for n, v in best.items())
    remark(args, f"the best: {tuning.best.model} with {settings}; on environments that chose nothing:")
    for comparison in tuning.comparisons:
        show(comparison, args)


def interrupted(args: Namespace) -> str:
    """How an interrupted study is taken up again."""
    if not (Path(args.folder) / "journal.log").is_file():
        return " before the first trial"
    return f"; the trials that have ended are in {args.folder}: the same command goes on with it"
