"""The programs in the documents."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def blocks(path: Path) -> list[str]:
    """The ```python blocks of a Markdown file; those marked ```py are fragments that do not run by themselves."""
    return re.findall(r"^```python\n(.*?)^```", path.read_text(), flags=re.DOTALL | re.MULTILINE)
