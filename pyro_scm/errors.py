"""Typed errors: each message says what was given, what was expected and what to do about it."""

from collections.abc import Iterable

__all__ = [
    "CheckpointError",
    "DataError",
    "InterventionError",
    "ModelError",
    "PyroScmError",
    "TrainingError",
    "listing",
    "nearest",
]


class PyroScmError(Exception):
    """Base of every error that this package raises on purpose; the command line prints it as one line."""


class DataError(PyroScmError, ValueError):
    """Data that cannot be used: names the file, column, row or value."""


class ModelError(PyroScmError, ValueError):
    """A model, guide and data that do not fit together: names the part or the site."""


class InterventionError(PyroScmError, KeyError):
    """An intervention on a site or environment that does not exist, or with a value of the wrong shape."""

    def __str__(self) -> str:  # KeyError would print the repr of the message
        return str(self.args[0]) if self.args else ""


class TrainingError(PyroScmError, RuntimeError):
    """Training that cannot go on: names the step, the site and the parameter."""


class CheckpointError(PyroScmError, ValueError):
    """A run folder that is incomplete, damaged or of another model."""


def nearest(name: str, known: Iterable[str], limit: int = 5) -> list[str]:
    """The known names most like a wrong one, or the first ones where none is like it: what a message suggests."""
    import difflib

    names = list(known)
    return difflib.get_close_matches(name, names, n=limit, cutoff=0.4) or names[:limit]


def listing(values: Iterable[object], limit: int = 5) -> str:
    """The first `limit` values, quoted and comma-separated, and how many more there are."""
    items = [repr(v) for v in values]
    more = len(items) - limit
    return ", ".join(items[:limit]) + (f" and {more} more" if more > 0 else "")
