"""Folders of plain tensors and JSON: written atomically, checked on reading, never able to run code."""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyro_scm.errors import CheckpointError

__all__ = ["read", "write", "write_bytes", "write_text"]

MANIFEST = "manifest.json"
FORMAT = 1


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole or not at all, readable as the user's other files are.

    Raises:
        CheckpointError: it cannot be written; what was there before is untouched.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                os.fchmod(file.fileno(), 0o666 & ~_umask())
            os.replace(temporary, path)
        finally:
            Path(temporary).unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"{path}: could not write {len(data)} bytes ({error.strerror}); what was there before is untouched"
        ) from error


def _umask() -> int:
    """The process's mask of file modes, which can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def write(folder: str | Path, tensors: Mapping[str, Tensor], manifest: Mapping[str, Any]) -> None:
    """Save tensors and a JSON manifest; a reader sees the old pair or the new pair, never half of one.

    The tensor file carries its own digest in its name and the manifest, written last, points to it.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    from safetensors.torch import save

    folder = Path(folder)
    data = save({name: value.detach().cpu().contiguous() for name, value in tensors.items()})
    digest = hashlib.sha256(data).hexdigest()
    name = f"tensors-{digest[:16]}.safetensors"
    write_bytes(folder / name, data)
    entries = {**manifest, "format": FORMAT, "tensors": name, "sha256": digest}
    text = json.dumps({**entries, "manifest_sha256": _digest(entries)}, indent=1, allow_nan=True)
    write_bytes(folder / MANIFEST, text.encode())
    for old in folder.glob("tensors-*.safetensors"):
        if old.name != name:
            old.unlink(missing_ok=True)


def _digest(entries: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest's content, whatever its layout."""
    canonical = json.dumps(json.loads(json.dumps(entries)), sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def read(folder: str | Path, device: torch.device | str = "cpu") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and manifest of a folder that `write` made.

    Raises:
        CheckpointError: missing, damaged (the digest differs) or of a newer format.
    """
    from safetensors.torch import load

    folder = Path(folder)
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: no {MANIFEST}: give the folder of a run that was saved") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / MANIFEST}: not readable ({error})") from error
    if not isinstance(manifest, dict) or not {"tensors", "sha256", "format", "manifest_sha256"} <= manifest.keys():
        raise CheckpointError(f"{folder / MANIFEST}: not a manifest of this package, or damaged")
    digest = manifest.pop("manifest_sha256")
    if isinstance(manifest["format"], int) and manifest["format"] > FORMAT:
        raise CheckpointError(
            f"{folder}: written in format {manifest['format']}, this version reads up to {FORMAT}: update pyro-scm"
        )
    if _digest(manifest) != digest:
        raise CheckpointError(f"{folder / MANIFEST}: damaged (its SHA-256 differs): restore the folder from a copy")
    path = folder / Path(str(manifest["tensors"])).name
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: not readable ({error.strerror}): the folder is incomplete") from error
    if hashlib.sha256(data).hexdigest() != manifest["sha256"]:
        raise CheckpointError(
            f"{path}: damaged (its SHA-256 differs from the manifest's): restore the folder from a copy"
        )
    tensors = {name: value.to(device) for name, value in load(data).items()}
    return tensors, manifest
