"""What verbs leave behind: files written whole or not at all, remarks and tables."""

import contextlib
import os
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pyro_scm.errors import DataError

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

__all__ = ["claim", "claim_folder", "remark", "table", "write_csv", "write_h5ad"]


def remark(args: Namespace, text: str) -> None:
    """Say something beside the result, unless asked to be quiet."""
    if not args.quiet:
        print(text)


def table(frame: "pd.DataFrame", index: bool = True) -> None:
    """Print a table, numbers to four digits."""
    print(frame.to_string(index=index, float_format=lambda v: f"{v:.4g}", na_rep="-"))


def claim(path: Path, ending: str, inputs: Iterable[Path] = ()) -> Path:
    """Check, before any work, that a file can be written.

    Args:
        path: of the file; its folder is made.
        ending: of its name.
        inputs: files that it must not replace.

    Raises:
        DataError: another ending, a folder, one of the inputs, or a place that cannot be written to.
    """
    if path.suffix != ending:
        raise DataError(f"--out {path}: the result is a {ending} file: give a name that ends in {ending}")
    if path.is_dir():
        raise DataError(f"--out {path}: this is a folder: give the name of a file")
    for other in inputs:
        if path.exists() and other.exists() and path.samefile(other):
            raise DataError(f"--out {path}: this is the input file, which is never overwritten: choose another name")
    claim_folder(path.parent)
    return path


def claim_folder(folder: Path) -> Path:
    """Make a folder to write into.

    Raises:
        DataError: it cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"--out: the folder {folder} cannot be made ({error.strerror}): choose another") from error
    if not os.access(folder, os.W_OK):
        raise DataError(f"--out: the folder {folder} cannot be written to: choose another")
    return folder


def write_h5ad(adata: "AnnData", path: Path) -> None:
    """Write an AnnData whole or not at all.

    Raises:
        DataError: it cannot be written.
    """
    _whole_or_not(path, lambda part: adata.write_h5ad(part))


def write_csv(frame: "pd.DataFrame", path: Path) -> None:
    """Write a table whole or not at all.

    Raises:
        DataError: it cannot be written.
    """
    _whole_or_not(path, lambda part: frame.to_csv(part))


def _whole_or_not(path: Path, write: Callable[[Path], None]) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    with _named(path):
        try:
            write(part)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Errors of HDF5 and of the disk, with the name of the file that they are about."""
    try:
        yield
    except Exception as error:  # HDF5 and anndata raise many kinds
        raise DataError(f"{path}: cannot be written ({error}); what was there before is untouched") from error


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows of words as aligned columns."""
    wide = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(w.ljust(n) for w, n in zip(row, wide, strict=True)).rstrip() for row in rows)
