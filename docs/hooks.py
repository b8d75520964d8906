"""Pages that are made when the site is built: notebooks, the reference of the public names, the command line."""

import argparse
import ast
import os
import re
import sys
from pathlib import Path
from typing import Any

import griffe
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PACKAGE = "pyro_scm"
BESIDE = ("guides", "pyro_scm.data.splits", "pyro_scm.errors", "pyro_scm.identify")
"""Modules that users import from although no name of theirs is in ``pyro_scm.__all__``."""


def public() -> dict[str, str]:
    """Name -> module that users find it in (the module itself for a module), of ``pyro_scm.__all__``; not imported."""
    tree = ast.parse(source(PACKAGE).read_text())
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == PACKAGE:
            whole = node.module == PACKAGE
            found |= {a.name: f"{PACKAGE}.{a.name}" if whole else node.module for a in node.names}
    return dict(sorted(found.items(), key=lambda item: item[0].lower()))


def modules() -> list[str]:
    """Every module with a page of its own."""
    return sorted({*public().values(), *BESIDE})


def source(module: str) -> Path:
    """File of a module."""
    path = ROOT.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def summary(module: str, name: str | None = None) -> str:
    """First line of the docstring of a module, or of what it defines or imports under a name."""
    tree = ast.parse(source(module).read_text())
    if name is None:
        return (ast.get_docstring(tree) or "").split("\n")[0]
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            return (ast.get_docstring(node) or "").split("\n")[0]
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module and any(a.name == name for a in node.names):
            return summary(node.module, name)
    raise LookupError(f"{module} has no {name}")


def index() -> str:
    """The table of all public names."""
    lines = [
        "# Reference",
        "",
        "Names of `pyro_scm` (`import pyro_scm as ps`), each with a link to its description. They are loaded when they",
        "are first used. In the examples of docstrings, which the tests run, the following is there already:",
        "",
        "```py",
        (ROOT / "docs" / "example_setup.py").read_text().split("\n\n", 1)[1].rstrip(),
        "```",
        "",
        "| name | what it is |",
        "|---|---|",
    ]
    for name, module in public().items():
        whole = module == f"{PACKAGE}.{name}"
        text = summary(module, None if whole else name).replace("|", "\\|").replace("``", "`")
        target = f"({page(module)})" if whole else f"[{module}.{name}]"
        lines.append(f"| [`{name}`]{target} | {text} |")
    lines += ["", "Beside them:", ""]
    lines += [f"- [`{module}`]({page(module)}): {summary(module)}" for module in BESIDE]
    return "\n".join(lines) + "\n"


def page(module: str) -> str:
    """Name of a module's page in the folder api."""
    return f"{module.removeprefix(f'{PACKAGE}.')}.md"


def command_line() -> str:
    """The help of every verb."""
    os.environ["COLUMNS"] = "110"
    sys.path.insert(0, str(ROOT))  # these sources, whatever is installed
    from pyro_scm.cli import build_parser

    parser = build_parser()
    verbs = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    parts = ["# Command line", "", "```text", parser.format_help().strip(), "```"]
    for verb, own in verbs.choices.items():
        parts += ["", f"## {verb}", "", "```text", own.format_help().strip(), "```"]
    return "\n".join(parts) + "\n"


def readme_table(section: str) -> str:
    """The table of a section of the README, which is written there once."""
    text = (ROOT / "README.md").read_text().split(f"\n## {section}\n")[1].split("\n## ")[0]
    return "\n".join(line for line in text.split("\n") if line.startswith("|"))


def notebooks() -> list[str]:
    """Those that are there, in order."""
    return [f"notebooks/{path.name}" for path in sorted((ROOT / "notebooks").glob("*.ipynb"))]


def on_config(config: Any) -> Any:
    """Add what was found to the navigation."""
    if notebooks():
        config["nav"].append({"Notebooks": notebooks()})
    pages = [{module.removeprefix(f"{PACKAGE}."): f"api/{page(module)}"} for module in modules()]
    config["nav"].append({"Reference": ["api/index.md", {"Command line": "api/cli.md"}, *pages]})
    return config


@event_priority(100)  # before mkdocs-jupyter, which replaces the list of files
def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are written here."""
    written = {"api/index.md": index(), "api/cli.md": command_line()}
    for module in modules():
        written[f"api/{page(module)}"] = f"# {module}\n\n::: {module}\n"
    for path, content in written.items():
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put tables of the README where a page asks for them: ``<!-- README: Models -->``."""
    return re.sub(r"<!-- README: (.+?) -->", lambda found: readme_table(found[1]), markdown)


class Examples(griffe.Extension):
    """For mkdocstrings: ``Example:`` in a docstring is the section that holds examples, as ``Examples:`` is."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rename the section."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
