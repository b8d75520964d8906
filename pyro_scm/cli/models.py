"""`pyro-scm models`: the named models."""

import inspect
from argparse import Namespace
from typing import Any

from pyro_scm.cli.outputs import columns
from pyro_scm.cli.parsing import Verbs, add_verb

__all__ = ["add"]

DESCRIPTION = """\
List the named models, or explain one.

Every model is a program that makes expression x from latent causal variables c, and these from noise z; what tells the
models apart is where the environment e (the perturbation) enters. The table gives the program in one line, what the
guide (the encoder) reads to infer z from a cell, and the section of the source that the model comes from.
"""

EXAMPLES = """\
  pyro-scm models
  pyro-scm models environment_vae
"""


def add(verbs: Verbs) -> None:
    """Add the verb to the parser."""
    parser = add_verb(
        verbs,
        "models",
        run,
        summary="list the named models, or explain one",
        description=DESCRIPTION,
        examples=EXAMPLES,
    )
    parser.add_argument("name", metavar="NAME", nargs="?", help="a model, to read all about it and its options")


def run(args: Namespace) -> None:
    """Print the table, or one model."""
    from pyro_scm import recipes

    if args.name is None:
        rows = [("MODEL", "GUIDE READS", "SECTION", "PROGRAM")]
        rows += [(n, ", ".join(r.inputs), r.section, r.summary) for n, r in recipes.RECIPES.items()]
        print(columns(rows))
        return
    found = recipes.recipe(args.name)
    print(f"{args.name}\n\n{inspect.getdoc(found.build) or 'No description.'}\n")
    print(f"The guide reads {', '.join(found.inputs)} and is of the family {found.family!r}.")
    for title, flag, options in (
        ("Options of the model", "--option", found.options),
        ("Options of the guide", "--option", guide_options()),
        ("Options of the training", "--training", training_options()),
    ):
        print(f"\n{title} (pyro-scm fit ... {flag} NAME=VALUE) and their defaults:")
        print(columns([(f"  {name}", _shown(value)) for name, value in options.items()]))


def guide_options() -> dict[str, Any]:
    """Names and defaults of the options of the guide that a model gets."""
    from pyro_scm import recipes

    return _defaults(recipes.make)


def training_options() -> dict[str, Any]:
    """Names and defaults of the options of `fit` that have no flag of their own."""
    from pyro_scm.infer import fit

    flags = ("seeds", "objective", "validation", "epochs", "batch_size", "lr", "fresh", "device", "progress")
    return {n: v for n, v in _defaults(fit).items() if n not in flags and not n.startswith("checkpoint")}


def _defaults(function: Any) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def _shown(value: Any) -> str:
    """A default as it would be written on the command line."""
    if isinstance(value, tuple):
        return ",".join(str(v) for v in value)
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)
