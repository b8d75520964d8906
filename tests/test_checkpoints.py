import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pyro_scm import checkpoints
from pyro_scm.checkpoints import read, write, write_text
from pyro_scm.errors import CheckpointError
from pyro_scm.infer import fit
from pyro_scm.recipes import load
from tests.screens import cells, make, train

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "deep.b": torch.tensor([1, 2]), "scalar": torch.tensor(0.5)}
MANIFEST = {"kind": "test", "numbers": [1, 2.5, math.inf], "nothing": None, "text": "µM"}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---------------------------------------------------------------------- what is written is read
def test_what_is_written_is_read(tmp_path: Path) -> None:
    write(tmp_path / "new" / "folder", TENSORS, MANIFEST)
    tensors, manifest = read(tmp_path / "new" / "folder")
    assert equal(tensors, TENSORS)
    assert {name: tensors[name].dtype for name in tensors} == {name: TENSORS[name].dtype for name in TENSORS}
    assert MANIFEST.items() <= manifest.items()
    assert manifest["format"] == 1


def test_views_and_tensors_with_gradients_can_be_written(tmp_path: Path) -> None:
    values = torch.arange(6.0, requires_grad=True).reshape(2, 3).T
    write(tmp_path, {"view": values, "part": values[:1]}, {})
    tensors, _ = read(tmp_path)
    assert tensors["view"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert tensors["part"].tolist() == [[0, 3]]
    assert not tensors["view"].requires_grad


def test_a_manifest_may_hold_what_is_not_finite(tmp_path: Path) -> None:
    write(tmp_path, {}, {"best": [math.inf, math.nan, -math.inf], "exact": 0.1 + 0.2})
    _, manifest = read(tmp_path)
    assert manifest["best"][0] == math.inf
    assert math.isnan(manifest["best"][1])
    assert manifest["exact"] == 0.1 + 0.2


def test_a_second_write_replaces_the_first_and_leaves_no_litter(tmp_path: Path) -> None:
    write(tmp_path, TENSORS, MANIFEST)
    first = files(tmp_path)
    write(tmp_path, {"a": torch.ones(2)}, {"kind": "other"})
    tensors, manifest = read(tmp_path)
    assert equal(tensors, {"a": torch.ones(2)})
    assert manifest["kind"] == "other"
    assert len(files(tmp_path)) == len(first) == 2
    write(tmp_path, {"a": torch.ones(2)}, {"kind": "third"})  # the same tensors under another manifest
    assert equal(read(tmp_path)[0], {"a": torch.ones(2)})
    assert len(files(tmp_path)) == 2


def test_other_files_in_the_folder_are_left_alone(tmp_path: Path) -> None:
    write_text(tmp_path / "history.csv", "a,b\n")
    write(tmp_path, TENSORS, MANIFEST)
    assert (tmp_path / "history.csv").read_text() == "a,b\n"


def test_text_is_written_whole(tmp_path: Path) -> None:
    write_text(tmp_path / "sub" / "notes.txt", "first")
    write_text(tmp_path / "sub" / "notes.txt", "µ second")
    assert (tmp_path / "sub" / "notes.txt").read_text() == "µ second"
    assert files(tmp_path / "sub") == ["notes.txt"]


def test_nothing_in_a_run_folder_can_run_code(tmp_path: Path) -> None:
    train("structured_environment_vae", epochs=1, checkpoint=tmp_path).save(tmp_path / "again")
    kinds = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert kinds == {".json", ".safetensors", ".csv"}
    for path in tmp_path.rglob("*.json"):
        json.loads(path.read_text())
    for path in tmp_path.rglob("*.safetensors"):
        data = path.read_bytes()
        header = int.from_bytes(data[:8], "little")
        names = json.loads(data[8 : 8 + header])
        assert sum(entry["data_offsets"][1] - entry["data_offsets"][0] for entry in names.values()) == (
            len(data) - 8 - header
        )


def test_loading_never_unpickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pickle

    train("environment_vae", epochs=2, checkpoint=tmp_path)
    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, lambda *_, **__: pytest.fail("a pickle was loaded"))
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch.load was called"))
    load(tmp_path)
    train("environment_vae", epochs=2, checkpoint=tmp_path)


# ---------------------------------------------------------------------- interrupted writes
@pytest.mark.parametrize("nth", [1, 2])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_write_leaves_the_old_pair(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nth: int, error: BaseException
) -> None:
    write(tmp_path, TENSORS, MANIFEST)
    before = files(tmp_path)
    moved, move = 0, os.replace

    def failing(*args: Any) -> None:
        nonlocal moved
        moved += 1
        if moved == nth:  # the tensors are moved first, then the manifest
            raise error
        move(*args)

    monkeypatch.setattr(os, "replace", failing)
    expected = CheckpointError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        write(tmp_path, {"a": torch.zeros(3)}, {"kind": "new"})
    monkeypatch.undo()
    tensors, manifest = read(tmp_path)
    assert equal(tensors, TENSORS)
    assert manifest["kind"] == "test"
    assert set(before) <= set(files(tmp_path))
    assert not [name for name in files(tmp_path) if name.startswith(".")]  # no temporary files
    write(tmp_path, {"a": torch.zeros(3)}, {"kind": "new"})
    assert equal(read(tmp_path)[0], {"a": torch.zeros(3)})
    assert len(files(tmp_path)) == 2


def test_a_full_disk_is_reported_and_an_old_run_still_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = train("vae", epochs=1)
    run.save(tmp_path)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    message = r"could not write \d+ bytes \(No space left on device\); what was there before is untouched"
    with pytest.raises(CheckpointError, match=message):
        train("vae", epochs=2).save(tmp_path)
    monkeypatch.undo()
    loaded = load(tmp_path)
    assert equal(loaded.parameters, run.parameters)


@pytest.mark.parametrize("nth", range(1, 5))
def test_a_training_killed_while_saving_goes_on_from_the_save_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nth: int
) -> None:
    def run(**options: Any) -> Any:
        model, guide = make("vae", cells().schema)
        return fit(model, guide, cells(), epochs=4, checkpoint_every=2, progress=False, **options)

    moved, move = 0, os.replace

    def dying(*args: Any) -> None:
        nonlocal moved
        moved += 1
        if moved == 5 + nth:  # five files a save: tensors and manifest of the training and of the run, history
            raise KeyboardInterrupt
        move(*args)

    monkeypatch.setattr(os, "replace", dying)
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint=tmp_path)
    monkeypatch.undo()
    assert len(load(tmp_path).parameters) > 0
    assert equal(run(checkpoint=tmp_path).parameters, run().parameters)


# ---------------------------------------------------------------------- folders that cannot be used
def test_a_folder_that_cannot_be_made_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"file/run/tensors-\w+\.safetensors: could not write \d+ bytes \(Not a"):
        write(tmp_path / "file" / "run", TENSORS, MANIFEST)


def test_a_folder_without_a_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no manifest\.json: give the folder of a run that was saved"):
        read(tmp_path)
    with pytest.raises(CheckpointError, match=r"nowhere: no manifest\.json"):
        read(tmp_path / "nowhere")


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b""])
def test_a_manifest_that_is_no_json_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"manifest\.json: not readable"):
        read(tmp_path)


@pytest.mark.parametrize("content", [[1, 2], {"kind": "run"}, "text"])
def test_json_that_is_no_manifest_is_refused(tmp_path: Path, content: Any) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"manifest\.json: not a manifest of this package"):
        read(tmp_path)


def test_a_newer_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "FORMAT", 7)
    write(tmp_path, TENSORS, MANIFEST)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="written in format 7, this version reads up to 1: update pyro-scm"):
        read(tmp_path)


def test_missing_tensors_are_reported(tmp_path: Path) -> None:
    write(tmp_path, TENSORS, MANIFEST)
    next(tmp_path.glob("tensors-*")).unlink()
    with pytest.raises(CheckpointError, match=r"tensors-\w+\.safetensors: not readable .*: the folder is incomplete"):
        read(tmp_path)


def test_a_manifest_cannot_point_outside_its_folder(tmp_path: Path) -> None:
    write(tmp_path / "run", TENSORS, MANIFEST)
    tensors = next((tmp_path / "run").glob("tensors-*"))
    tensors.rename(tmp_path / "run.safetensors")
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    manifest["tensors"] = "../run.safetensors"
    del manifest["manifest_sha256"]
    manifest["manifest_sha256"] = checkpoints._digest(manifest)
    (tmp_path / "run" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"run/run\.safetensors: not readable"):
        read(tmp_path / "run")


@pytest.mark.parametrize("place", [0.0, 0.3, 0.7, 0.999])
def test_a_flipped_bit_among_the_tensors_is_noticed(tmp_path: Path, place: float) -> None:
    write(tmp_path, TENSORS, MANIFEST)
    path = next(tmp_path.glob("tensors-*"))
    flip(path, int(place * path.stat().st_size))
    with pytest.raises(CheckpointError, match=r"damaged \(its SHA-256 differs from the manifest's\): restore"):
        read(tmp_path)


def test_a_flipped_bit_anywhere_in_the_manifest_is_noticed(tmp_path: Path) -> None:
    write(tmp_path, TENSORS, {"epoch": 4, "loss": 1.25, "kind": "run"})
    path = tmp_path / "manifest.json"
    content = path.read_bytes()
    for position, byte in enumerate(content):
        if chr(byte).isspace():
            continue  # layout means nothing
        flip(path, position)
        with pytest.raises(CheckpointError):
            read(tmp_path)
        path.write_bytes(content)
    assert read(tmp_path)[1]["epoch"] == 4


def test_a_changed_number_in_the_manifest_is_reported(tmp_path: Path) -> None:
    write(tmp_path, TENSORS, {"epoch": 4})
    path = tmp_path / "manifest.json"
    path.write_text(path.read_text().replace('"epoch": 4', '"epoch": 5'))
    with pytest.raises(CheckpointError, match=r"manifest\.json: damaged \(its SHA-256 differs\): restore the folder"):
        read(tmp_path)


def flip(path: Path, position: int) -> None:
    """Flip one bit of a file."""
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(bytes(data))
