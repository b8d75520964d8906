"""Arguments: the parser, its help, and words to values."""

import argparse
import json
from argparse import ArgumentTypeError
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

from pyro_scm.errors import PyroScmError

__all__ = [
    "COVARIATES",
    "Formatter",
    "Parser",
    "ShowVersion",
    "UsageError",
    "Verbs",
    "add_general",
    "add_verb",
    "assignment",
    "matching",
    "names",
    "natural",
    "path",
    "positive",
    "probability",
    "seeds",
    "share",
    "whole",
    "widths",
]


class UsageError(PyroScmError):
    """A command that cannot be understood."""


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of descriptions and examples, and shows the defaults of options."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        default = action.default
        if default in (None, argparse.SUPPRESS, []) or isinstance(default, bool) or "default" in text:
            return text
        shown = ",".join(str(v) for v in default) if isinstance(default, tuple) else "%(default)s"
        return f"{text} (default: {shown})"


class Parser(argparse.ArgumentParser):
    """A parser that raises its complaints, so that they are printed like all others: as one line."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        """Raise what the parser has to complain about."""
        raise UsageError(f"{message}; see `{self.prog} --help`")


Verbs: TypeAlias = "argparse._SubParsersAction[Parser]"


class ShowVersion(argparse.Action):
    """``--version``: looks the version up only when it is asked for."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, help=help, default=argparse.SUPPRESS)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        """Print the version and stop."""
        from importlib.metadata import version

        print(f"pyro-scm {version('pyro-scm')}")
        parser.exit()


def add_general(parser: argparse.ArgumentParser) -> None:
    """``--debug`` and ``--quiet``, which may stand before or after the verb."""
    group = parser.add_argument_group("general")
    suppress = argparse.SUPPRESS
    group.add_argument("--debug", action="store_true", default=suppress, help="show the traceback of an error")
    group.add_argument(
        "--quiet", action="store_true", default=suppress, help="no progress bars and remarks: only results and errors"
    )


def add_verb(
    verbs: Verbs,
    name: str,
    run: Callable[[argparse.Namespace], None],
    *,
    summary: str,
    description: str,
    examples: str,
) -> Parser:
    """A parser for one verb.

    Args:
        verbs: of the whole parser.
        name: of the verb.
        run: what it does.
        summary: one line, for the list of verbs.
        description: for a reader who knows biology and no machine learning.
        examples: command lines, each after two blanks.
    """
    parser = verbs.add_parser(
        name, help=summary, description=description, epilog=f"examples:\n{examples}", formatter_class=Formatter
    )
    parser.set_defaults(run_verb=run)
    return parser


# ---------------------------------------------------------------------- words to values
def _number(text: str, kind: type[int] | type[float], least: float, above: bool, what: str) -> Any:
    try:
        value = kind(text)
    except ValueError:
        raise ArgumentTypeError(f"{text!r} is not {what}") from None
    if not (value > least if above else value >= least) or value == float("inf"):
        raise ArgumentTypeError(f"{text!r} is not {what}")
    return value


def whole(text: str) -> int:
    """1, 2, 3, ..."""
    return int(_number(text, int, 1, False, "a whole number of 1 or more"))


def natural(text: str) -> int:
    """0, 1, 2, ..."""
    return int(_number(text, int, 0, False, "a whole number of 0 or more"))


def positive(text: str) -> float:
    """A number above 0."""
    return float(_number(text, float, 0, True, "a number above 0"))


def probability(text: str) -> float:
    """A number from 0 to 1."""
    what = "a number from 0 to 1"
    value = float(_number(text, float, 0, False, what))
    if value > 1:
        raise ArgumentTypeError(f"{text!r} is not {what}")
    return value


def share(text: str) -> float:
    """A number between 0 and 1, neither of them."""
    what = "a number between 0 and 1"
    value = float(_number(text, float, 0, True, what))
    if value >= 1:
        raise ArgumentTypeError(f"{text!r} is not {what}")
    return value


def names(text: str) -> tuple[str, ...]:
    """``A,B,C``."""
    found = tuple(part.strip() for part in text.split(",") if part.strip())
    if not found:
        raise ArgumentTypeError(f"{text!r} names nothing")
    return found


def widths(text: str) -> tuple[int, ...]:
    """``128,64``: widths of hidden layers; ``0`` for none."""
    return () if text.strip() in ("", "0") else tuple(whole(part) for part in names(text))


def seeds(text: str) -> tuple[int, ...]:
    """``3`` is 0, 1, 2; ``0,5,7`` and ``5,`` are these themselves."""
    if "," not in text:
        return tuple(range(whole(text)))
    found = tuple(natural(part) for part in names(text))
    if len(set(found)) < len(found):
        raise ArgumentTypeError(f"{text!r} names a seed twice")
    return found


def assignment(text: str) -> tuple[str, Any]:
    """``NAME=VALUE``; numbers, true, false, none and comma-separated lists are understood."""
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise ArgumentTypeError(f"{text!r} is not of the form NAME=VALUE")
    return name.strip(), _value(value.strip())


def covariate(text: str) -> tuple[str, str]:
    """``NAME=VALUE``, both as they are written."""
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise ArgumentTypeError(f"{text!r} is not of the form NAME=VALUE")
    return name.strip(), value.strip()


COVARIATES: dict[str, Any] = {"metavar": "NAME=VALUE", "type": covariate, "action": "append", "default": []}
"""How an option is read that names covariates and their values, once for each."""


def _value(text: str) -> Any:
    plain = {"none": None, "true": True, "false": False}
    if text.lower() in plain:
        return plain[text.lower()]
    if "," in text:
        return tuple(_value(part.strip()) for part in text.split(",") if part.strip())
    try:
        number = json.loads(text)
    except ValueError:
        return text
    return number if isinstance(number, int | float) else text


def matching(given: Mapping[str, Any], defaults: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Options of the kinds that their defaults have.

    Args:
        given: name -> value.
        defaults: name -> default of every option there is.
        what: has these options, for the message.

    Raises:
        UsageError: an option that does not exist, or a value of another kind.
    """
    result = {}
    for name, value in given.items():
        if name not in defaults:
            raise UsageError(f"{what} has no option {name!r}: it has {', '.join(defaults)}")
        default = defaults[name]
        if isinstance(default, tuple) and not isinstance(value, tuple):
            value = () if value in ("", None) else (value,)
        kinds: tuple[type, ...] = (type(default),)
        if isinstance(default, float) and not isinstance(default, bool):
            kinds = (float, int)
        wrong = not isinstance(value, kinds) or (isinstance(value, bool) and not isinstance(default, bool))
        if isinstance(default, tuple) and default:
            wrong = not all(isinstance(each, type(default[0])) for each in value)
        if default is not None and wrong:
            raise UsageError(f"{what}: {name}={value!r} is of another kind than its default {default!r}")
        result[name] = value
    return result


def path(text: str) -> Path:
    """A path, with ``~`` for the home folder."""
    return Path(text).expanduser()
