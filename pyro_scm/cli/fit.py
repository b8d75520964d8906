"""`pyro-scm fit`: train an ensemble."""

import argparse
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from pyro_scm.cli.inputs import DataOptions, Memory, add_data_options, environments, read, represented
from pyro_scm.cli.models import guide_options, training_options
from pyro_scm.cli.outputs import claim_folder, remark, table
from pyro_scm.cli.parsing import (
    Parser,
    UsageError,
    Verbs,
    add_verb,
    assignment,
    matching,
    path,
    positive,
    seeds,
    share,
    whole,
    widths,
)
from pyro_scm.cli.runs import absolute, make, recipe
from pyro_scm.errors import CheckpointError, DataError, listing

if TYPE_CHECKING:
    from pyro_scm.data.dataset import EnvironmentDataset
    from pyro_scm.run import Run

__all__ = ["add", "add_selection_options", "add_training_options", "check_device", "keep_genes", "training"]

Test = TypeVar("Test", bound="EnvironmentDataset | None")

DESCRIPTION = """\
Fit a model to cells, with several seeds at once, and save the run in a folder.

The model learns latent causal variables from all environments together, and which of them each environment moves. Fit
with several seeds: what differs between them is not known from the data. The folder also keeps how the data were read
(data.json), so that evaluate, embed, predict and counterfactual need not be told again, and the losses of each epoch
(history.csv, in nats per cell; a model is the better, the lower its loss).
"""

EXAMPLES = """\
  pyro-scm simulate --descriptors 16 --out sim.h5ad
  pyro-scm fit sim.h5ad --model environment_vae --environment perturbation --control control \
--representation uns:descriptors --latent 5 --seeds 2 --hold-out env_09,env_10 --epochs 30 --out run
  pyro-scm fit sim.h5ad --resume --epochs 60 --out run


examples with data of your own:
  pyro-scm fit drugs.h5ad --model environment_vae --environment drug --control DMSO --dose dose_uM \
--representation morgan:smiles,dose --genes 2000 --hold-out vorinostat --out drugs_run
  pyro-scm fit drugs.h5ad --model cpa --environment drug --control DMSO --dose dose_uM --representation multi-dose \
--adversary 5 --option prior=flat --option family=point --option inputs=x --out cpa_as_published
  pyro-scm fit drugs.h5ad --model my_model.py:build --environment drug --control DMSO --option depth=3 --out my_run
  pyro-scm fit atlas.h5ad --model environment_vae --environment drug --control DMSO --devices 4 --out atlas_run
"""

TRAINING = {"seeds": (0, 1, 2), "epochs": 100, "batch_size": 128, "lr": 1e-3}
"""What the flags of the training are by default."""


def add(verbs: Verbs) -> None:
    """Add the verb to the parser."""
    parser = add_verb(verbs, "fit", run, summary="fit a model to cells", description=DESCRIPTION, examples=EXAMPLES)
    parser.set_defaults(interrupted=interrupted)
    add_data_options(parser)
    kept = parser.add_argument_group("what is trained on")
    kept.add_argument(
        "--hold-out",
        metavar="ENV,...",
        action="append",
        help="environments, or perturbations with all their doses, that are not trained on: what the model says of "
        "them can then be checked; may be given several times",
    )
    add_selection_options(kept)
    model = parser.add_argument_group("model").add_argument
    model("--model", metavar="NAME", help="see `pyro-scm models`; or FILE.py:FUNCTION, a function of your own")
    model("--latent", metavar="D", type=whole, help="number of latent causal variables (default: the model's own, 20)")
    model(
        "--hidden",
        metavar="WIDTHS",
        type=widths,
        help="widths of the hidden layers of decoder and encoder, such as 128,64; 0 for none (default: the model's "
        "own, 128)",
    )
    model(
        "--likelihood",
        metavar="KIND",
        help="how expression scatters: normal, normal-fixed, student-t or negative-binomial (default: "
        "negative-binomial for counts, else normal)",
    )
    model(
        "--option",
        metavar="NAME=VALUE",
        type=assignment,
        action="append",
        help="any other option of the model or guide, as `pyro-scm models NAME` lists them; may be given several times",
    )
    add_training_options(parser)
    add_objective_options(parser)
    parser.add_argument_group("output").add_argument(
        "--out", metavar="RUN", type=path, required=True, help="folder for the run"
    )


def add_selection_options(group: argparse._ArgumentGroup) -> None:
    """Which environments and genes are kept for what."""
    add = group.add_argument
    add(
        "--validation-fraction",
        metavar="SHARE",
        type=share,
        help="share of the perturbations, between 0 and 1, set aside to choose the best epoch by (default: none, the "
        "last epoch is kept)",
    )
    add(
        "--genes",
        metavar="N",
        type=whole,
        help="keep the N most variable genes, chosen on the training cells (default: all)",
    )


def add_training_options(parser: Parser) -> None:
    """How it is trained."""
    add = parser.add_argument_group("training").add_argument
    add(
        "--seeds",
        metavar="SEEDS",
        type=seeds,
        help="members of the ensemble: a number of them such as 3, or seeds such as 0,5,7 (default: 3)",
    )
    add("--epochs", metavar="N", type=whole, help="passes over the cells (default: 100)")
    add("--batch-size", metavar="N", type=whole, help="cells of each step (default: 128)")
    add("--lr", metavar="RATE", type=positive, help="learning rate of Adam (default: 0.001)")
    add(
        "--training",
        metavar="NAME=VALUE",
        type=assignment,
        action="append",
        help="any other option of the training, as `pyro-scm models NAME` lists them, such as schedule=cosine; may be "
        "given several times",
    )
    add(
        "--device",
        metavar="DEVICE",
        default="auto",
        help="cpu, cuda, cuda:1, mps; auto takes a GPU where there is one",
    )
    if parser.prog.endswith(" fit"):
        add(
            "--devices",
            metavar="N",
            type=whole,
            help="processes that train together on this machine, one a GPU (or one a share of the CPU's cores); needs "
            "pyro-scm[distributed]. The result is that of one process, to rounding (default: 1)",
        )
        add(
            "--nodes",
            metavar="M",
            type=whole,
            help="machines that train together: start the same command on each, with MASTER_ADDR, MASTER_PORT and "
            "NODE_RANK set, or under Slurm (default: 1)",
        )
        add("--checkpoint-every", metavar="N", type=whole, default=10, help="epochs between savings of the training")
        add(
            "--resume",
            action="store_true",
            help="go on with the training in RUN, with its options (none need be repeated); --epochs may be raised",
        )


def add_objective_options(parser: Parser) -> None:
    """What is trained for beside the likelihood."""
    group = parser.add_argument_group(
        "objective",
        "What some models are trained for beside the likelihood of the cells. CPA's adversaries are off\n"
        "unless asked for: networks that try to tell a cell's perturbation, cell line and covariates from its\n"
        "basal state, which the encoder is to prevent. In a test on one cell type of Kang's blood cells they\n"
        "made CPA as it is by default predict worse, and CPA as published gained more from the penalty that\n"
        "--objective independence=10 puts in their place.",
    )
    group.add_argument(
        "--adversary",
        metavar="WEIGHT",
        type=positive,
        help="weight of the adversaries of cpa, chemcpa and multicpa, beside the reconstruction's mean over genes: 1 "
        "to 60 were published (default: none)",
    )
    group.add_argument(
        "--objective",
        metavar="NAME=VALUE",
        type=assignment,
        action="append",
        help="any other option of a model's objective; of cpa, chemcpa and multicpa: covariate_adversary (weight of "
        "the adversaries of cell line and covariates; as --adversary by default), gradient_penalty (3), critic_hidden "
        "(64,64), warmup (share of the epochs over which the adversaries' weight rises, 0), independence (weight of a "
        "penalty on what basal states tell of the perturbation, 0) and its measure (hsic or mmd), protein_weight (1), "
        "kl_weight (1). Steps of the adversaries for each of the model: --training critic_steps=2. May be given "
        "several times",
    )


# ---------------------------------------------------------------------- what to do
def run(args: Namespace) -> None:
    """Fit, save, and print the losses."""
    out = claim_folder(args.out)
    memory = _resumed(args, out) if args.resume else _planned(args, out)
    check_device(args.device)
    import pyro_scm
    from pyro_scm import parallel, recipes

    several = (args.devices or 1) * (args.nodes or 1) > 1
    fabric = parallel.launch(args.devices or 1, args.nodes or 1, args.device) if several else None
    first = parallel.is_first(fabric)
    args.quiet |= not first
    adata, cells = read(args.data, memory.data)
    cells = represented(args.data, adata, cells, memory.data)
    train, validation, test = parts(args.data, cells, memory)
    model, guide = make(memory.model, train.schema, memory.options)
    if first:
        replace(memory, data=replace(memory.data, counts=cells.counts)).save(out)
    for line in (*_described(train, validation, test), *_salts(cells)):
        remark(args, line)
    settings = dict(memory.training)
    asked = settings.pop("objective", {})
    fitted = pyro_scm.fit(
        model,
        guide,
        train,
        validation=validation,
        device=args.device,
        fabric=fabric,
        checkpoint=out,
        checkpoint_every=args.checkpoint_every,
        progress=False if args.quiet else None,
        objective=recipes.objective(memory.model, model, train, **asked),
        **{"critic_steps": recipe(memory.model).critic_steps, **settings},
    )
    if first:
        _report(fitted.to("cpu"), test, args)


def _salts(cells: "EnvironmentDataset") -> Iterator[str]:
    """A line for each compound that goes by several names or salts."""
    for _, drugs in cells.same_compounds().groupby("parent"):
        kind = "one compound" if drugs["identical"].all() else "salts of one compound"
        yield f"note: {', '.join(sorted(set(drugs['name'])))} are {kind}"


def _planned(args: Namespace, out: Path) -> Memory:
    """What the command line asks for.

    Raises:
        UsageError: no model, or options that do not exist.
        CheckpointError: the folder holds a run.
    """
    if (out / "manifest.json").exists() or (out / "training" / "manifest.json").exists():
        raise CheckpointError(
            f"--out {out}: holds a run already: add --resume to go on with it, or name another folder"
        )
    if args.model is None:
        raise UsageError("--model is missing: choose one that `pyro-scm models` lists")
    return Memory(
        data=DataOptions.given(args),
        hold_out=tuple(args.hold_out or ()),
        validation_fraction=args.validation_fraction or 0.0,
        genes=args.genes,
        model=absolute(args.model),
        options=_options(args, args.model),
        training=training(args) | _given_objective(args, args.model),
    )


def _resumed(args: Namespace, out: Path) -> Memory:
    """What the training in a folder was asked for, with its number of epochs changed.

    Raises:
        CheckpointError: nothing to go on with, or other options than its own.
    """
    memory = Memory.load(out)
    if not (out / "training" / "manifest.json").exists() or not memory.model:
        raise CheckpointError(f"--out {out}: there is no training of `pyro-scm fit` to resume: leave --resume out")
    asked = {
        "model": args.model and absolute(args.model),
        "hold_out": args.hold_out and tuple(args.hold_out),
        "validation_fraction": args.validation_fraction,
        "genes": args.genes,
    }
    changed = [name for name, value in asked.items() if value is not None and value != getattr(memory, name)]
    given = DataOptions.given(args)
    names = [f.name for f in fields(DataOptions) if getattr(args, f.name) is not None]
    changed += [name for name in names if getattr(given, name) != getattr(memory.data, name)]
    wanted = _options(args, args.model or memory.model)
    changed += [name for name, value in wanted.items() if memory.options.get(name) != value]
    now = {name: getattr(args, name) for name in TRAINING} | dict(args.training or ())
    changed += [n for n, v in now.items() if v is not None and n != "epochs" and memory.training.get(n) != v]
    own = memory.training.get("objective", {})
    wanted = _given_objective(args, args.model or memory.model).get("objective", {})
    changed += [n for n, v in wanted.items() if _plain(own.get(n)) != _plain(v)]
    if changed:
        raise CheckpointError(
            f"--out {out}: was fitted with other options ({', '.join(changed)}): with --resume leave them out, or name "
            "another folder"
        )
    return replace(memory, training={**memory.training, "epochs": args.epochs or memory.training["epochs"]})


def _options(args: Namespace, model: str) -> dict[str, Any]:
    """Options of a model and its guide.

    Raises:
        UsageError: one that does not exist, or of another kind.
    """
    given = dict(args.option or ())
    for name in ("latent", "hidden", "likelihood"):
        if getattr(args, name) is not None:
            if name in given:
                raise UsageError(f"--{name} and --option {name} say the same: leave one out")
            given[name] = getattr(args, name)
    if "graph" in given:
        raise UsageError("--option graph: a graph cannot be given here: use the option depth, or fit in Python")
    if args.hidden is not None:
        given.setdefault("guide_hidden", args.hidden)
    if isinstance(given.get("inputs"), str):
        given["inputs"] = (given["inputs"],)
    return matching(given, recipe(model).options | guide_options(), f"the model {model}")


def _given_objective(args: Namespace, model: str) -> dict[str, dict[str, Any]]:
    """Options of a model's objective, as the argument ``objective``; nothing where none are given.

    Raises:
        UsageError: one that the model's objective does not have, or of another kind.
    """
    import inspect

    given = dict(args.objective or ())
    if args.adversary is not None:
        if "adversary" in given:
            raise UsageError("--adversary and --objective adversary say the same: leave one out")
        given["adversary"] = args.adversary
    if not given:
        return {}
    build = recipe(model).objective
    if build is None:
        raise UsageError(
            f"--adversary and --objective: the model {model} is trained by its likelihood alone: cpa, chemcpa, "
            "multicpa, discrepancy_vae and adversarial_prior_ae have an objective of their own"
        )
    parameters = inspect.signature(build).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    return {"objective": matching(given, defaults, f"the objective of {model}")}


def _plain(value: Any) -> Any:
    """JSON has no tuples."""
    return list(value) if isinstance(value, tuple) else value


def training(args: Namespace) -> dict[str, Any]:
    """Options of `pyro_scm.fit`.

    Raises:
        UsageError: one that does not exist, or of another kind.
    """
    flags = {n: default if getattr(args, n) is None else getattr(args, n) for n, default in TRAINING.items()}
    given = dict(args.training or ())
    for name, value in given.items():
        numbers = value if isinstance(value, tuple) else (value,)
        if name != "schedule" and any(isinstance(number, str) for number in numbers):
            raise UsageError(f"--training {name}={value}: give a number")
    return flags | matching(given, training_options() if given else {}, "the training")


def check_device(name: str) -> None:
    """Check a device.

    Raises:
        UsageError: there is none of this name.
    """
    import torch

    if name == "auto":
        return
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"--device {name}: cannot be used ({str(error).splitlines()[0]}): try cpu") from error


def parts(
    file: Path, cells: "EnvironmentDataset", memory: Memory
) -> "tuple[EnvironmentDataset, EnvironmentDataset | None, EnvironmentDataset | None]":
    """Training cells, validation cells and held-out cells, with the genes that are kept.

    Raises:
        DataError: names that do not exist, or cells that cannot be split so.
    """
    from pyro_scm.data import splits

    aside = memory.validation_fraction
    train, validation, test = cells, None, None
    try:
        if memory.hold_out:
            names = environments(cells, memory.hold_out)
            split = splits.by_environment(cells, held_out=names, validation_fraction=aside)
            train, validation, test = split.train, split.validation, split.test
        elif aside:
            split = splits.by_environment(cells, fraction=aside)
            train, validation = split.train, split.test
        return keep_genes(memory.genes, train, validation, test)
    except DataError as error:
        raise DataError(f"{file}: {error}") from error


def keep_genes(
    genes: int | None,
    train: "EnvironmentDataset",
    validation: "EnvironmentDataset | None",
    test: Test,
) -> "tuple[EnvironmentDataset, EnvironmentDataset | None, Test]":
    """The most variable genes of the training cells, in all parts.

    Raises:
        DataError: expression that has no dispersion, or scanpy is not installed.
    """
    if genes is None:
        return train, validation, test
    from pyro_scm.data.single_cell import highly_variable

    kept_validation = None if validation is None else highly_variable(validation, genes, chosen_on=train)
    kept_test = None if test is None else highly_variable(test, genes, chosen_on=train)
    return highly_variable(train, genes), kept_validation, cast("Test", kept_test)


# ---------------------------------------------------------------------- what is said
def _described(
    train: "EnvironmentDataset", validation: "EnvironmentDataset | None", test: "EnvironmentDataset | None"
) -> list[str]:
    """What is trained on, and what may be wrong with it."""
    kind = "counts" if train.counts else "continuous expression"
    lines = [
        f"training cells: {len(train)} x {len(train.genes)} genes ({kind}), {len(train.present)} environments, "
        f"each described by {len(train.features)} numbers"
    ]
    if validation is not None:
        lines.append(f"validation cells: {len(validation)} of {len(validation.present)} environments")
    if test is not None:
        lines.append(f"held-out cells: {len(test)} of {len(test.present)} environments")
        strangers = indescribable(train, test)
        if strangers:
            lines.append(
                f"note: training tells nothing of {listing(strangers)}, because no training environment shares a "
                "feature with them: choose a representation that describes unseen environments (see --representation)"
            )
    if not train.reference.any():
        lines.append("note: there are no control cells (--control): no environment is the reference")
    return lines


def indescribable(train: "EnvironmentDataset", test: "EnvironmentDataset") -> list[str]:
    """Held-out environments whose representation is built of features that no training environment has."""
    seen = (train.representation[train.present] != 0).any(0)
    used = test.representation[test.present] != 0
    alone = used.any(1) & ~(used & seen).any(1)
    return [str(test.environments.index[e]) for e in test.present[alone]]


def _report(fitted: "Run", test: "EnvironmentDataset | None", args: Namespace) -> None:
    """Print the losses of each member."""
    import pandas as pd

    rows = pd.DataFrame({"seed": fitted.seeds, "epoch": fitted.stopped})
    history = fitted.history.set_index(["seed", "epoch"])
    kept = pd.MultiIndex.from_arrays([fitted.seeds, fitted.stopped])
    rows["training"] = history["loss"].reindex(kept).to_numpy()
    if "validation_loss" in history:
        rows["validation"] = history["validation_loss"].reindex(kept).to_numpy()
    if test is not None:
        rows["held-out"] = losses(fitted, test)
    rows["best"] = ["*" if k == fitted.best else "" for k in range(len(fitted))]
    remark(args, "losses in nats per cell (negative ELBO: lower is better):")
    table(rows, index=False)
    remark(args, f"run saved in {args.out}")


def losses(fitted: "Run", cells: "EnvironmentDataset", size: int = 1024) -> Sequence[float]:
    """Negative ELBO of cells per cell, in nats, of each member; all members see the same noise.

    Args:
        fitted: a run.
        cells: that it was not trained on.
        size: of a batch.
    """
    import pyro
    import torch

    from pyro_scm.chance import forked
    from pyro_scm.objectives import Objective

    objective, result = Objective(), []
    for k in range(len(fitted)):
        model, guide = fitted.member(k)
        total = 0.0
        with forked(), pyro.validation_enabled(False):
            torch.manual_seed(0)
            for batch in cells.batches(size):  # the loss of a batch estimates that of all cells
                total += objective.loss(model, guide, batch) / batch.total * len(batch)
        result.append(total / len(cells))
    return result


def interrupted(args: Namespace) -> str:
    """Where an interrupted training can be taken up again."""
    import json

    try:
        epoch = json.loads((args.out / "training" / "manifest.json").read_text())["epoch"]
    except (OSError, ValueError, KeyError):
        return " before the first checkpoint: nothing was saved"
    return (
        f"; the training is saved up to epoch {epoch} in {args.out}: go on with "
        f"`pyro-scm fit {args.data} --resume --out {args.out}`"
    )
