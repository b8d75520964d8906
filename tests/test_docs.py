"""The documentation site: nothing is missing from it, and it builds without a warning."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import pyro_scm as ps
from tests.documents import ROOT

DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def hooks() -> Any:
    pytest.importorskip("mkdocs", reason="needs mkdocs: pip install 'pyro-scm[docs]'")
    pytest.importorskip("griffe", reason="needs mkdocstrings: pip install 'pyro-scm[docs]'")
    spec = importlib.util.spec_from_file_location("docs_hooks", DOCS / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_reference_has_every_public_name(hooks: Any) -> None:
    assert set(hooks.public()) == set(ps.__all__)
    table = hooks.index()
    for name, module in hooks.public().items():
        assert re.search(rf"^\| \[`{name}`\].* \| \S.* \|$", table, flags=re.MULTILINE), name
        assert module in hooks.modules()


def test_command_line_page_has_every_verb(hooks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from pyro_scm.cli import VERBS

    monkeypatch.setenv("COLUMNS", "110")  # which the page sets for good
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert len(re.findall(r"^## ", hooks.command_line(), flags=re.MULTILINE)) == len(VERBS)


def test_every_page_is_in_the_navigation() -> None:
    listed = set(re.findall(r"[\w/]+\.md", (ROOT / "mkdocs.yml").read_text()))
    there = {str(path.relative_to(DOCS)) for folder in (".", "experiments") for path in (DOCS / folder).glob("*.md")}
    assert listed == there


def test_pages_of_experiments_are_the_originals() -> None:
    for path in (DOCS / "experiments").iterdir():
        assert path.resolve() == ROOT / "experiments" / path.name


def test_readme_tables_are_found(hooks: Any) -> None:
    from pyro_scm.recipes import RECIPES

    shown = hooks.on_page_markdown((DOCS / "models.md").read_text())
    assert "<!--" not in shown
    assert re.findall(r"^\| `(\w+)` \|", shown, flags=re.MULTILINE) == list(RECIPES)


def test_figure_is_small() -> None:
    assert (DOCS / "assets" / "overview.png").stat().st_size < 150_000


@pytest.mark.slow
@pytest.mark.usefixtures("hooks")
def test_site_builds_without_a_warning(tmp_path: Path) -> None:
    for package in ("mkdocs_jupyter", "mkdocstrings_handlers.python", "material"):
        pytest.importorskip(package, reason="needs the site's plugins: pip install 'pyro-scm[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert built.returncode == 0, built.stderr
    assert (tmp_path / "api" / "infer.html").is_file()
