"""`Check`: a number, the threshold it is judged by, where that comes from, and what it means in plain words."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from pyro_scm.report import Report

if TYPE_CHECKING:
    from arviz import InferenceData
    from matplotlib.figure import Figure

__all__ = ["OWN", "Check", "Checks", "graded", "ks_band", "skipped"]

OWN = "a choice of this package"
"""Source of thresholds that nobody else is to blame for."""

_ORDER = ("bad", "look", "good", "not applicable")


@dataclass(frozen=True)
class Check:
    """One check of a fitted model.

    Args:
        name: what is checked.
        value: the number that is judged; NaN where the check does not apply.
        threshold: by what.
        source: of the threshold.
        verdict: ``"good"``, ``"look"`` (at the figure, before relying on it), ``"bad"`` or ``"not applicable"``.
        words: what the number means for who uses the model.
        draw: makes the figure, if there is one.
        detail: what the number is a summary of.
    """

    name: str
    value: float
    threshold: str
    source: str
    verdict: str
    words: str
    draw: "Callable[[], Figure] | None" = field(default=None, repr=False)
    detail: pd.DataFrame | None = field(default=None, repr=False)

    def figure(self) -> "Figure | None":
        """The figure of this check, drawn when it is asked for."""
        return self.draw() if self.draw is not None else None

    def __str__(self) -> str:
        return f"{self.name}: {self.value:.3g} ({self.threshold}): {self.verdict}. {self.words}"


def graded(value: float, good: float, look: float) -> str:
    """The verdict of a value; lower is better if `good` is below `look`, else higher.

    Args:
        value: NaN is bad.
        good: last good value.
        look: last value that is not bad.
    """
    sign = 1 if good <= look else -1
    if sign * value <= sign * good:
        return "good"
    return "look" if sign * value <= sign * look else "bad"


def ks_band(number: int, several: int = 1, level: float = 0.95) -> float:
    """Largest distance of an ECDF of `number` uniform values from the diagonal, with this probability.

    Args:
        number: of values.
        several: ECDFs that shall all stay inside (Bonferroni).
        level: the probability.

    Source: Massart, "The tight constant in the Dvoretzky-Kiefer-Wolfowitz inequality", Ann. Probab. 1990.
    """
    return math.sqrt(math.log(2 * several / (1 - level)) / (2 * number))


def skipped(name: str, why: str) -> Check:
    """A check that has nothing to say of this model."""
    return Check(name, float("nan"), "-", "-", "not applicable", why)


@dataclass(frozen=True)
class Checks:
    """All checks of a fitted model.

    Args:
        checks: one after the other.
        data: the draws that most of them read.
    """

    checks: Sequence[Check]
    data: "InferenceData" = field(repr=False)

    @property
    def table(self) -> pd.DataFrame:
        """One row a check: value, threshold, source of the threshold, verdict, plain words."""
        columns = ("value", "threshold", "source", "verdict", "words")
        rows = [{"check": c.name, **{name: getattr(c, name) for name in columns}} for c in self.checks]
        return pd.DataFrame(rows).set_index("check")

    @property
    def verdict(self) -> str:
        """The worst of the verdicts."""
        found = {c.verdict for c in self.checks}
        return next(v for v in _ORDER if v in found)

    def __getitem__(self, name: str) -> Check:
        return next(c for c in self.checks if c.name == name)

    def figures(self) -> "dict[str, Figure]":
        """Check -> figure, of those that have one."""
        drawn = {c.name: c.figure() for c in self.checks}
        return {name: figure for name, figure in drawn.items() if figure is not None}

    def summary(self) -> str:
        """One sentence."""
        number = {v: [c.name for c in self.checks if c.verdict == v] for v in _ORDER}
        bad = f": {', '.join(number['bad'])}" if number["bad"] else ""
        return (
            f"{len(number['good'])} checks are good, {len(number['look'])} want a look, {len(number['bad'])} are bad"
            f"{bad}; {len(number['not applicable'])} do not apply."
        )

    def write(self, path: str | Path, title: str = "Checks of a fitted model", notes: Iterable[str] = ()) -> Path:
        """One HTML page with the table, the figures and what each check means.

        Args:
            path: of the page.
            title: of the page.
            notes: paragraphs at its top.

        Raises:
            CheckpointError: the file cannot be written.
        """
        report = Report(title)
        for note in (*notes, self.summary()):
            report.text(note)
        report.table(self.table[["value", "verdict", "threshold"]])
        for check in self.checks:
            report.section(f"{check.name}: {check.verdict}", check.words)
            if check.verdict != "not applicable":
                report.text(f"Value {check.value:.3g}; {check.threshold}. Source of the threshold: {check.source}.")
            figure = check.figure()
            if figure is not None:
                report.figure(figure, check.name)
            if check.detail is not None and len(check.detail) <= 40:
                report.table(check.detail)
        return report.write(path)


def canvas(rows: int = 1, columns: int = 1, size: tuple[float, float] = (4.2, 3.2)) -> "tuple[Figure, Any]":
    """A figure without pyplot, and its axes as an array."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes
