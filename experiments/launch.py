"""What every experiment shares: flags from a dataclass, seeds, a results folder, and the record of how it was made."""

import argparse
import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pandas as pd

from pyro_scm.checkpoints import write_text
from pyro_scm.errors import DataError, PyroScmError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from pyro_scm.run import Run

ROOT = Path(__file__).resolve().parents[1]

UNSEEN_ENVIRONMENT_MODELS: dict[str, dict[str, Any]] = {
    "vae": {},
    "conditional_vae": {},
    "environment_vae": {"scale": False},
    "translation_vae": {},
    "structured_environment_vae": {"scale": False},
}
"""Models, with their options, that experiments on unseen environments compare."""


class Config(Protocol):
    """A frozen dataclass with the experiment's numbers as defaults, and presets by name."""

    @classmethod
    def preset(cls, name: str) -> Any:
        """The configuration of ``"quick"`` or ``"paper"``."""
        ...


def briefly(run: "Run") -> dict[str, Any]:
    """Settings of `refine` for half as many epochs at a third of the run's rate."""
    return {"epochs": max(run.settings.epochs // 2, 1), "lr": float(np.max(run.settings.lr)) / 3}


@dataclass(frozen=True)
class Results:
    """What an experiment leaves behind.

    Args:
        tables: name -> table; each becomes NAME.csv.
        figures: name -> figure; each becomes NAME.png and NAME.svg.
        text: what was seen, in sentences.
    """

    tables: Mapping[str, pd.DataFrame]
    figures: Mapping[str, "Figure"]
    text: str = ""


def data_folder(name: str) -> Path:
    """A folder of public data below the one that PYRO_SCM_DATA names.

    Raises:
        DataError: the variable is not set, or the folder is not there.
    """
    root = os.environ.get("PYRO_SCM_DATA")
    if not root:
        raise DataError("PYRO_SCM_DATA is not set: point it to the folder that holds the public data sets")
    if not (Path(root) / name).is_dir():
        raise DataError(f"{Path(root) / name}: no such folder: PYRO_SCM_DATA points to {root}")
    return Path(root) / name


def launch(script: str, config: type[Any], main: Callable[[Any], Results], argv: list[str] | None = None) -> int:
    """Run an experiment from the command line; a finished run of the same configuration is shown, not repeated.

    Args:
        script: its ``__file__``.
        config: its configuration class.
        main: configuration -> results.
        argv: arguments; the process's by default.

    Returns:
        exit status.
    """
    options, chosen = _parse(config, argv)
    folder = Path(options.out) / Path(script).stem / _digest(chosen)
    try:
        if options.force or not (folder / "config.json").is_file():
            started = time.perf_counter()
            _keep(folder, main(chosen), chosen, time.perf_counter() - started)
        print((folder / "summary.txt").read_text())
        print(f"Results: {folder}")
    except PyroScmError as error:
        print(f"{Path(script).name}: error: {error}", file=sys.stderr)
        return 2
    return 0


def _parse(config: type[Any], argv: list[str] | None) -> tuple[argparse.Namespace, Any]:
    module = sys.modules[config.__module__]
    parser = argparse.ArgumentParser(description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=("smoke", "quick", "paper"), default="quick", help="sizes (default: quick)")
    parser.add_argument("--out", default=str(ROOT / "results"), help="results folder (default: results/)")
    parser.add_argument("--force", action="store_true", help="run again even where results exist")
    defaults = config.preset("quick")
    for field in dataclasses.fields(config):
        value = getattr(defaults, field.name)
        kind = type(value[0]) if isinstance(value, tuple) else type(value)
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=kind,
            nargs="+" if isinstance(value, tuple) else None,
            default=None,
            help=f"(quick: {value})",
        )
    options = parser.parse_args(argv)
    given = {
        f.name: tuple(v) if isinstance(v, list) else v
        for f in dataclasses.fields(config)
        if (v := getattr(options, f.name)) is not None
    }
    return options, dataclasses.replace(config.preset(options.preset), **given)


def _digest(config: Any) -> str:
    text = json.dumps(dataclasses.asdict(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _keep(folder: Path, results: Results, config: Any, seconds: float) -> None:
    """config.json is written last: a folder that has it is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in results.tables.items():
        write_text(folder / f"{name}.csv", table.to_csv())
    for name, figure in results.figures.items():
        for suffix in ("png", "svg"):
            figure.savefig(folder / f"{name}.{suffix}", dpi=150, bbox_inches="tight")
    shown = [results.text, *(f"{n}\n{t.to_string(float_format=lambda v: f'{v:.3f}')}" for n, t in results.tables.items()
                             if len(t) <= 60)]  # fmt: skip
    write_text(folder / "summary.txt", "\n\n".join(s for s in shown if s) + "\n")
    record = {"config": dataclasses.asdict(config), "seconds": round(seconds, 1), **_environment()}
    write_text(folder / "config.json", json.dumps(record, indent=1))


def _environment() -> dict[str, Any]:
    from importlib.metadata import version

    git = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT, check=False
    ).stdout.strip()
    packages = ("torch", "pyro-ppl", "numpy", "pandas", "anndata")
    return {"revision": git or None, "python": sys.version.split()[0], "versions": {p: version(p) for p in packages}}
