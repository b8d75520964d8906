"""Runs the notebooks and keeps them with their outputs: `python notebooks/execute.py [01 02 ...]`, all by default.

The scripts (``NN_name.py``, jupytext py:percent) are what is edited; ``NN_name.ipynb`` beside each is made of them.
"""

import argparse
import os
import resource
import sys
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parent
KERNEL = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
_SECONDS = 900
"""That a cell may take, and the start of the kernel, on a busy machine."""


def execute(script: Path) -> Path:
    """The notebook of a script, run from its first cell to its last.

    Raises:
        CellExecutionError: a cell failed; the notebook is then left as it was.
        RuntimeError: its outputs tell the name of a folder of this machine.
    """
    os.environ.pop("MPLBACKEND", None)  # a backend named there would leave the figures out
    notebook = jupytext.read(script)
    notebook.metadata = nbformat.from_dict(KERNEL)
    for i, cell in enumerate(notebook.cells):
        cell.id = f"cell-{i}"  # random names would change with every run
    NotebookClient(
        notebook,
        timeout=_SECONDS,
        startup_timeout=_SECONDS,
        record_timing=False,
        resources={"metadata": {"path": str(FOLDER)}},
    ).execute()
    notebook.metadata.pop("language_info", None)
    text = nbformat.writes(notebook)
    private = [p for p in (str(FOLDER.parent), os.environ.get("PYRO_SCM_DATA", ""), str(Path.home())) if len(p) > 1]
    told = [p for p in private if p in text]
    if told:
        raise RuntimeError(f"{script.name}: its outputs tell {told[0]}: print names, not paths, and silence warnings")
    target = script.with_suffix(".ipynb")
    target.write_text(text + "\n")
    return target


def main(arguments: list[str]) -> int:
    os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"  # of kernels without widgets, by tqdm
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("numbers", nargs="*", help="of the notebooks, such as 01 04")
    chosen = parser.parse_args(arguments).numbers
    for script in sorted(FOLDER.glob("[0-9][0-9]_*.py")):
        if chosen and script.name[:2] not in chosen:
            continue
        started = resource.getrusage(resource.RUSAGE_CHILDREN)
        target = execute(script)
        ended = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = ended.ru_utime + ended.ru_stime - started.ru_utime - started.ru_stime
        print(f"{target.name}: {cpu:.0f} s of CPU, {target.stat().st_size / 1000:.0f} kB", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
