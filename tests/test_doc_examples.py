"""The examples in docstrings and in the pages of docs/ run as they stand."""

import doctest
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from tests.documents import ROOT, blocks

EXAMPLES = sorted(
    path.relative_to(ROOT)
    for package in ("pyro_scm", "guides")
    for path in (ROOT / package).rglob("*.py")
    if ">>> " in path.read_text()
)
PAGES = sorted(path.name for path in (ROOT / "docs").glob("*.md") if blocks(path))


@pytest.fixture(scope="module")
def prepared() -> dict[str, Any]:
    """What docs/example_setup.py leaves: the names that every example may use."""
    import torch

    torch.manual_seed(0)
    names: dict[str, Any] = {}
    exec(compile((ROOT / "docs" / "example_setup.py").read_text(), "example_setup.py", "exec"), names)
    return names


def named(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("path", EXAMPLES, ids=named)
def test_docstring_says_what_happens(
    path: Path, prepared: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = import_module(named(path))
    monkeypatch.chdir(tmp_path)  # examples may write files
    found = [t for t in doctest.DocTestFinder(exclude_empty=True).find(module, extraglobs=prepared) if t.examples]
    assert found  # an example that no docstring holds is never run
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    said: list[str] = []
    for test in found:
        runner.run(test, out=said.append)
    assert not runner.summarize(verbose=False).failed, "".join(said)


@pytest.mark.parametrize("page", PAGES)
def test_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in blocks(ROOT / "docs" / page):
        exec(compile(block, page, "exec"), names)
