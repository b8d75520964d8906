"""What the verbs that draw leave behind: a folder of tables and figures."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pyro_scm.cli.parsing import Parser, natural, path, probability, whole

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["add_prediction_options", "save"]


def save(folder: Path, tables: Mapping[str, "pd.DataFrame"], figures: Mapping[str, "Figure"]) -> None:
    """Write tables as NAME.csv and figures as NAME.png, each whole or not at all.

    Raises:
        CheckpointError: a file cannot be written.
    """
    from pyro_scm.checkpoints import write_bytes, write_text

    for name, frame in tables.items():
        write_text(folder / f"{name}.csv", frame.to_csv(index=frame.index.name is not None or frame.index.nlevels > 1))
    for name, figure in figures.items():
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=150)
        write_bytes(folder / f"{name}.png", picture.getvalue())


def add_prediction_options(parser: Parser, draws: bool = True) -> None:
    """How predictions are made, and where they go."""
    add = parser.add_argument_group("prediction").add_argument
    add("--references", metavar="N", type=whole, default=200, help="control cells to predict from")
    if draws:
        add(
            "--draws",
            metavar="S",
            type=whole,
            default=1,
            help="draws of each member's posterior, beside the spread over members",
        )
    add("--level", metavar="P", type=probability, default=0.9, help="of all intervals")
    add("--seed", metavar="N", type=natural, default=0, help="of cells and draws")
    parser.add_argument("--out", metavar="FOLDER", type=path, required=True, help="folder for tables and figures")
