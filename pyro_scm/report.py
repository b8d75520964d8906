"""`Report`: one self-contained HTML page of text, tables and figures."""

import base64
import html
import io
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from pyro_scm.checkpoints import write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Report"]

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1b1f24; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.7rem; } h2 { font-size: 1.25rem; margin-top: 2.2rem; border-bottom: 1px solid #d7dbe0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .85rem; margin: 1rem 0; }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid #e6e9ed; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } thead th { border-bottom: 2px solid #1b1f24; }
.wide { overflow-x: auto; } img { max-width: 100%; height: auto; } figcaption { color: #57606a; font-size: .9rem; }
figure { margin: 1.2rem 0; } code { background: #f3f4f6; padding: .1rem .3rem; border-radius: 3px; }
"""


class Report:
    """Collects sections and writes them as one HTML file that needs no other file and no network.

    Args:
        title: of the page.
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self.parts: list[str] = []

    def section(self, heading: str, text: str = "") -> None:
        """A heading, and a first paragraph."""
        self.parts.append(f"<h2>{html.escape(heading)}</h2>")
        if text:
            self.text(text)

    def text(self, text: str) -> None:
        """A paragraph."""
        self.parts.append(f"<p>{html.escape(text)}</p>")

    def code(self, text: str) -> None:
        """A command or program."""
        self.parts.append(f"<pre><code>{html.escape(text)}</code></pre>")

    def table(self, frame: pd.DataFrame, digits: int = 3) -> None:
        """A table; numbers to so many digits behind the point."""
        shown = frame.to_html(float_format=lambda v: f"{v:.{digits}f}", na_rep="–", border=0, justify="right")
        self.parts.append(f'<div class="wide">{shown}</div>')

    def figure(self, figure: "Figure", caption: str) -> None:
        """A matplotlib figure, embedded."""
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=130, bbox_inches="tight")
        data = base64.b64encode(buffer.getvalue()).decode()
        text = html.escape(caption)
        self.parts.append(
            f'<figure><img alt="{text}" src="data:image/png;base64,{data}"><figcaption>{text}</figcaption></figure>'
        )

    def write(self, path: str | Path) -> Path:
        """Write the page, whole or not at all.

        Raises:
            CheckpointError: the file cannot be written.
        """
        body = "\n".join(self.parts)
        title = html.escape(self.title)
        write_text(
            Path(path),
            f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
            f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>\n'
            f"<body><h1>{title}</h1>\n{body}\n</body></html>\n",
        )
        return Path(path)
