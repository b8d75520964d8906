"""The command line: `main` reads the arguments, runs one verb and turns errors into one line.

Nothing heavy is imported here or at the top of a verb's module, so that ``--help`` answers at once.
"""

import os
import sys
import traceback
import warnings
from argparse import Namespace
from collections.abc import Sequence

from pyro_scm.cli.check import add as add_check
from pyro_scm.cli.compare import add as add_compare
from pyro_scm.cli.counterfactual import add as add_counterfactual
from pyro_scm.cli.data import add as add_data
from pyro_scm.cli.demo import add as add_demo
from pyro_scm.cli.dictionary import add as add_dictionary
from pyro_scm.cli.dose_response import add as add_dose_response
from pyro_scm.cli.embed import add as add_embed
from pyro_scm.cli.evaluate import add as add_evaluate
from pyro_scm.cli.fit import add as add_fit
from pyro_scm.cli.identify import add as add_identify
from pyro_scm.cli.interactions import add as add_interactions
from pyro_scm.cli.models import add as add_models
from pyro_scm.cli.parsing import Formatter, Parser, ShowVersion, add_general
from pyro_scm.cli.predict import add as add_predict
from pyro_scm.cli.scatter import add as add_scatter
from pyro_scm.cli.simulate import add as add_simulate
from pyro_scm.cli.tune import add as add_tune
from pyro_scm.cli.unmix import add as add_unmix
from pyro_scm.errors import PyroScmError

__all__ = ["build_parser", "main"]

DESCRIPTION = """\
Latent causal models of gene expression under perturbation.

A model learns, from cells measured under several perturbations, a few latent causal variables c_0, c_1, ... behind the
genes, and which of them each perturbation moves. A fitted model can then say what a perturbation does that it has never
seen, or what the same cells would have been had they been treated otherwise.
"""

EXAMPLES = """\
a first session (about a minute):
  pyro-scm simulate --descriptors 16 --out sim.h5ad
  pyro-scm fit sim.h5ad --model environment_vae --environment perturbation --control control \
--representation uns:descriptors --latent 5 --hold-out env_09,env_10 --epochs 30 --out run
  pyro-scm evaluate run sim.h5ad

`pyro-scm VERB --help` explains each verb, with examples.
"""

VERBS = (
    add_models,
    add_simulate,
    add_fit,
    add_evaluate,
    add_check,
    add_predict,
    add_counterfactual,
    add_embed,
    add_dictionary,
    add_dose_response,
    add_interactions,
    add_scatter,
    add_unmix,
    add_identify,
    add_compare,
    add_tune,
    add_demo,
    add_data,
)


def build_parser() -> Parser:
    """The parser of the whole command line."""
    parser = Parser(prog="pyro-scm", description=DESCRIPTION, epilog=EXAMPLES, formatter_class=Formatter)
    parser.set_defaults(debug=False, quiet=False)
    parser.add_argument("--version", action=ShowVersion, help="print the version and stop")
    verbs = parser.add_subparsers(title="verbs", dest="verb", metavar="VERB", required=True)
    for add_verb in VERBS:
        add_verb(verbs)
    for each in (parser, *verbs.choices.values()):  # after the options of its own
        add_general(each)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: its words; those of the process by default.

    Returns:
        the exit status: 0; 2 for an error, which is then one line on the error stream; 1 for one that nobody foresaw;
        130 for an interruption from the keyboard.
    """
    if argv is None and not sys.warnoptions:  # a library's remark to programmers is no help to who types commands
        warnings.simplefilter("ignore")
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    args = Namespace()
    try:
        args = build_parser().parse_args(words)
        args.run_verb(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        _complain(f"interrupted{_left_behind(args)}")
        return 130
    except BrokenPipeError:  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if debug:
            traceback.print_exc()
        message, status = _explained(error)
        _complain(message)
        return status
    return 0


def _complain(message: str) -> None:
    print("pyro-scm: " + " ".join(message.split()), file=sys.stderr)


def _explained(error: Exception) -> tuple[str, int]:
    """What to say of an error, and the exit status."""
    if isinstance(error, PyroScmError):
        return f"error: {error}", 2
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return "error: out of memory: use fewer cells or genes, fewer seeds or draws, or a smaller --batch-size", 2
    if isinstance(error, OSError):
        return f"error: {error.filename or 'file'}: {error.strerror or error}", 2
    return f"error: unexpected {type(error).__name__}: {error} (run it again with --debug to see where)", 1


def _left_behind(args: Namespace) -> str:
    """Where an interrupted verb can be taken up again."""
    return str(args.interrupted(args)) if hasattr(args, "interrupted") else ""
