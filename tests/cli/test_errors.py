"""Whatever goes wrong is one line that says what to do, and leaves what was there untouched."""

import os
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import anndata
import pytest

import pyro_scm as ps
from pyro_scm import training
from pyro_scm.cli import main
from pyro_scm.cli.outputs import claim_folder, write_h5ad
from pyro_scm.errors import CheckpointError, DataError
from tests.cli.conftest import FIT, SMALL

Works = Callable[..., str]
Fails = Callable[..., str]
VAE = f"fit SIM --model vae {' '.join((*FIT, *SMALL))} --out OUT"


def filled(text: str, screen: Path, run: Path, out: Path) -> str:
    """VAE, FIT, SIM, RUN and OUT in full."""
    for name, value in {"VAE": VAE, "FIT": " ".join(FIT), "SIM": screen, "RUN": run, "OUT": out}.items():
        text = text.replace(name, str(value))
    return text


WORDS = {
    "": "the following arguments are required: VERB; see `pyro-scm --help`",
    "fits": "invalid choice: 'fits'",
    "fit SIM": "the following arguments are required: --out; see `pyro-scm fit --help`",
    "fit SIM --out OUT --epoch 3": "unrecognized arguments: --epoch 3",
    "fit SIM --out OUT --epochs 0": "argument --epochs: '0' is not a whole number of 1 or more",
    "fit SIM --out OUT --counts --continuous": "not allowed with argument",
    "simulate --graph tree --out OUT/s.h5ad": "argument --graph: 'tree' is neither one of empty",
    "compare SIM --models vae FIT --out OUT": "one of the arguments --hold-out --hold-out-fraction is required",
    "counterfactual RUN SIM --out OUT/c.h5ad --do c_1": "'c_1' is neither c_J=NUMBER nor c_J+=NUMBER",
    "data": "the following arguments are required: ACTION",
}
MODELS = {
    "models vaz": "unknown model 'vaz': use one of ae, vae",
    "fit SIM FIT --out OUT": "--model is missing: choose one that `pyro-scm models` lists",
    "fit SIM --model vaz FIT --out OUT": "unknown model 'vaz'",
    "VAE --option depth=3": "the model vae has no option 'depth': it has latent, hidden",
    "VAE --likelihood poisson": "unknown likelihood 'poisson'",
    "VAE --option latent=2": "--latent and --option latent say the same: leave one out",
    "VAE --option hidden=wide": "the model vae: hidden=('wide',) is of another kind than its default (128,)",
    "VAE --option graph=0-1": "--option graph: a graph cannot be given here",
    "VAE --likelihood negative-binomial": "needs counts and the data are continuous",
    "VAE --training momentum=1": "the training has no option 'momentum': it has schedule",
    "VAE --training schedule=step": "unknown schedule 'step'",
    "VAE --training patience=long": "--training patience=long: give a number",
    "VAE --training patience=3": "patience needs validation cells",
    "VAE --device cuda:99": "--device cuda:99: cannot be used",
    "VAE --device abacus": "--device abacus: cannot be used",
}
DATA = {
    "fit none.h5ad --model vae FIT --out OUT": "none.h5ad: no such file",
    "fit RUN/data.json --model vae FIT --out OUT": "data.json: not a readable .h5ad file",
    "fit SIM --model vae --out OUT": "SIM: which obs column names the perturbation? Add --environment COLUMN",
    "fit SIM --model vae --environment drug --out OUT": "SIM: no obs column 'drug'",
    "VAE --control DMSO": "SIM: control 'DMSO' is not in obs column 'perturbation': it has 'control'",
    "VAE --dose perturbation": "dose column 'perturbation' holds 'control'",
    "VAE --layer raw": "SIM: no layer 'raw'",
    "VAE --counts": "SIM: X: ",
    "VAE --hold-out env_9": "SIM: no environment 'env_9': did you mean one of",
    "VAE --hold-out env_1,,env_2": "SIM: no environment ''",
    "VAE --hold-out control": "SIM: 'control' is a reference",
    "VAE --validation-fraction 1": "'1' is not a number between 0 and 1",
    "VAE --genes 5": "SIM: expression is negative",
}
REPRESENTATIONS = {
    "VAE --representation two-hot": "SIM: --representation: unknown representation 'two-hot'",
    "VAE --representation uns:genes": "uns:genes: no table of this name in uns: this file has 'descriptors'",
    "VAE --representation morgan": "morgan: which obs column holds the SMILES? Write morgan:COLUMN",
    "VAE --representation morgan:smiles": "SIM: no obs column 'smiles'",
    "VAE --representation dose": "dose: which obs column holds it? Add --dose COLUMN",
    "VAE --representation cell_line": "cell_line: which obs column holds it? Add --cell-line COLUMN",
    "VAE --representation dose:uM": "'dose:uM': only morgan, descriptors, molecules, uns and table take something",
    "VAE --representation uns:descriptors,uns:descriptors": "several features are called 'descriptor_0'",
}
RUNS = {
    "embed OUT/none SIM --out OUT/e.h5ad": "none: no manifest.json: give the folder of a run",
    "embed RUN/training SIM --out OUT/e.h5ad": "add --model FILE.py:FUNCTION",
    "fit SIM --model vae FIT --out RUN": "RUN: holds a run already: add --resume to go on with it",
    "fit SIM --resume --out OUT": "OUT: there is no training of `pyro-scm fit` to resume",
    "fit SIM --resume --option k=2 --out RUN": "RUN: was fitted with other options (k): with --resume leave them out",
    "fit SIM --resume --option depth=2 --out RUN": "the model environment_vae has no option 'depth'",
    "fit SIM --resume --model vae --latent 4 --lr 0.1 --genes 3 --layer raw --out RUN": (
        "RUN: was fitted with other options (model, genes, layer, latent, lr): with --resume leave them out"
    ),
}
QUESTIONS = {
    "predict RUN --environment env_9 --out OUT/p.h5ad": "--environment env_9: the run does not know it by name",
    "counterfactual RUN SIM --out OUT/c.h5ad": "say what is to be different: --do c_J=VALUE",
    "counterfactual RUN SIM --do c_7=1 --out OUT/c.h5ad": "'c_7'",
    "counterfactual RUN SIM --do c_1=1 --do c_1+=1 --out OUT/c.h5ad": "--do c_1 is given twice",
    "counterfactual RUN SIM --environment env_9 --out OUT/c.h5ad": "no environment 'env_9'",
    "counterfactual RUN SIM --do c_1=1 --of env_9 --out OUT/c.h5ad": "no environment 'env_9'",
    "evaluate RUN SIM --hold-out control": "SIM: 'control' is a reference",
    "evaluate RUN SIM --degs 0 --recentre ridges": "SIM: the environments have no 'ridges': use some of",
    "compare SIM --models vaz FIT --hold-out env_1 --out OUT": "unknown model 'vaz'",
    "compare SIM --models vae FIT --hold-out env_1 --option depth=2 --out OUT": "models vae has the option depth",
    "compare SIM --models vae FIT --hold-out env_9 --out OUT": "SIM: no environment 'env_9'",
    "data get l1001 --out OUT": "no data set 'l1001': there are 'l1000-phase1'",
    "data get l1000-phase1 --match x --out OUT": "l1000-phase1: no file matches 'x'",
}
RESULTS = {
    "embed RUN SIM --out SIM": "SIM: this is the input file, which is never overwritten",
    "embed RUN SIM --out OUT/e.csv": "e.csv: the result is a .h5ad file: give a name that ends in .h5ad",
    "evaluate RUN SIM --out OUT/e.h5ad": "e.h5ad: the result is a .csv file",
    "simulate --out SIM/s.h5ad": "SIM cannot be made",
    "simulate --targets 9 --out OUT/s.h5ad": "targets = 9: choose between 1 and the number of latents (5)",
    "simulate --interventions push --out OUT/s.h5ad": "unknown interventions 'push': use shift",
    "simulate --graph 0-1,1-0 --latent 2 --out OUT/s.h5ad": "cycle",
}


@pytest.mark.parametrize(
    ("command", "message"),
    [*({**WORDS, **MODELS, **DATA, **REPRESENTATIONS, **RUNS, **QUESTIONS, **RESULTS}.items())],
)
def test_errors_are_one_line(fails: Fails, screen: Path, run: Path, tmp_path: Path, command: str, message: str) -> None:
    places = (screen, run, tmp_path / "out")
    assert filled(message, *places) in fails(*shlex.split(filled(command, *places)))


# ---------------------------------------------------------------------- errors that need a setting
def test_debug_shows_the_traceback_before_the_line(
    screen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", str(screen), "--model", "vaz", "--out", str(tmp_path / "run"), "--debug"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert any("recipes.py" in line for line in lines)
    assert lines[-1].startswith("pyro-scm: error: unknown model 'vaz'")


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (RuntimeError("odd\nnews"), 1, "unexpected RuntimeError: odd news (run it again with --debug to see where)"),
        (MemoryError(), 2, "out of memory: use fewer cells"),
        (OSError(28, "No space left on device", "/data/x"), 2, "/data/x: No space left on device"),
        (DataError("two\n  lines"), 2, "two lines"),
    ],
)
def test_any_error_is_one_line(
    fails: Fails, monkeypatch: pytest.MonkeyPatch, error: Exception, status: int, message: str
) -> None:
    from pyro_scm.data import download

    class Broken:
        def values(self) -> None:
            raise error

    monkeypatch.setattr(download, "CATALOGUE", Broken())
    assert message in fails("data", "list", status=status)


def test_evaluation_needs_held_out_environments(works: Works, fails: Fails, screen: Path, tmp_path: Path) -> None:
    works("fit", screen, "--model", "vae", *FIT, *SMALL, "--out", tmp_path / "run")
    message = fails("evaluate", tmp_path / "run", screen)
    assert message.endswith("this run held nothing out: name environments to score with --hold-out ENV")


def test_questions_need_one_environment_and_some_cells(
    fails: Fails, drug_run: Path, drug_screen: Path, tmp_path: Path
) -> None:
    words = ("counterfactual", drug_run, drug_screen, "--out", tmp_path / "c.h5ad")
    message = fails(*words, "--environment", "caffeine")
    assert "--environment caffeine: names several environments, 'caffeine 1 uM A549', " in message
    some = anndata.read_h5ad(drug_screen)
    some[(some.obs["drug"] != "aspirin").to_numpy()].copy().write_h5ad(tmp_path / "some.h5ad")
    words = ("counterfactual", drug_run, tmp_path / "some.h5ad", "--out", tmp_path / "c.h5ad", "--do", "c_1=0")
    assert fails(*words, "--of", "aspirin").startswith("--of aspirin: there are no such cells in ")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"data": {"environment": []}}'])
def test_damaged_memory(fails: Fails, run: Path, screen: Path, tmp_path: Path, text: str) -> None:
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "data.json").write_text(text)
    message = fails("embed", tmp_path / "run", screen, "--out", tmp_path / "e.h5ad")
    assert message.startswith(f"{tmp_path / 'run' / 'data.json'}: damaged")
    assert message.endswith("delete it and give the options with --data-option")


def test_damaged_runs(fails: Fails, run: Path, screen: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    tensors = next((tmp_path / "run").glob("tensors-*.safetensors"))
    tensors.write_bytes(tensors.read_bytes()[:-1])
    assert "damaged" in fails("embed", tmp_path / "run", screen, "--out", tmp_path / "e.h5ad")
    with pytest.raises(CheckpointError, match="damaged"):
        ps.load(tmp_path / "run")


# ---------------------------------------------------------------------- interruptions
def interrupt_at(monkeypatch: pytest.MonkeyPatch, epoch: int) -> None:
    original = training.Trainer._one_epoch

    def one_epoch(self: training.Trainer) -> None:
        if self.epoch == epoch:
            raise KeyboardInterrupt
        original(self)

    monkeypatch.setattr(training.Trainer, "_one_epoch", one_epoch)


def test_interruption_says_where_the_checkpoint_is(
    works: Works,
    screen: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["fit", str(screen), "--model", "vae", *FIT, "--latent", "2", "--seeds", "1", "--epochs", "5"]
    with monkeypatch.context() as patched:
        interrupt_at(patched, 4)
        assert main([*words, "--checkpoint-every", "3", "--out", str(tmp_path / "run")]) == 130
    said = capsys.readouterr().err.splitlines()
    resume = f"pyro-scm fit {screen} --resume --out {tmp_path / 'run'}"
    assert said == [
        f"pyro-scm: interrupted; the training is saved up to epoch 3 in {tmp_path / 'run'}: go on with `{resume}`"
    ]
    works(*shlex.split(resume)[1:])
    works(*words, "--out", tmp_path / "whole")
    resumed, whole = ps.load(tmp_path / "run"), ps.load(tmp_path / "whole")
    assert resumed.losses == whole.losses
    assert len(resumed.history) == 5


def test_interruption_before_the_first_checkpoint(
    screen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupt_at(monkeypatch, 0)
    words = ["fit", str(screen), "--model", "vae", *FIT, *SMALL, "--out", str(tmp_path / "run")]
    assert main(words) == 130
    assert capsys.readouterr().err == "pyro-scm: interrupted before the first checkpoint: nothing was saved\n"
    monkeypatch.undo()
    assert main([*words, "--quiet"]) == 0  # the folder is free


def test_interrupted_transfers_say_where_the_parts_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from pyro_scm.data import download

    def instead(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(download, "get", instead)
    assert main(["data", "get", "l1000-phase1", "--out", str(tmp_path)]) == 130
    assert f"what has arrived is kept in {tmp_path} as *.part" in capsys.readouterr().err


def test_other_interruptions_say_no_more(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from pyro_scm import recipes

    def instead(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(recipes, "recipe", instead)
    assert main(["models", "vae"]) == 130
    assert capsys.readouterr().err == "pyro-scm: interrupted\n"


# ---------------------------------------------------------------------- files
def test_files_are_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "x.h5ad"
    file.write_text("what was there")
    good = ps.simulate(latent=1, genes=2, environments=2, cells=2)
    bad = good.copy()
    bad.uns["odd"] = object()
    with pytest.raises(DataError, match=r"x\.h5ad: cannot be written .*; what was there before is untouched"):
        write_h5ad(bad, file)
    assert file.read_text() == "what was there"
    assert os.listdir(tmp_path) == ["x.h5ad"]

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(anndata.AnnData, "write_h5ad", full)
        with pytest.raises(DataError, match="No space left on device"):
            write_h5ad(good, file)
    assert file.read_text() == "what was there"
    write_h5ad(good, file)
    assert os.listdir(tmp_path) == ["x.h5ad"]
    assert anndata.read_h5ad(file).shape == (4, 2)


def test_results_replace_older_results_and_make_their_folder(works: Works, run: Path, tmp_path: Path) -> None:
    words = ("predict", run, "--environment", "env_1", "--out", tmp_path / "deep" / "er" / "p.h5ad", "--cells")
    works(*words, "2")
    works(*words, "3")
    assert anndata.read_h5ad(tmp_path / "deep" / "er" / "p.h5ad").n_obs == 6
    assert os.listdir(tmp_path / "deep" / "er") == ["p.h5ad"]


def test_the_input_is_recognised_by_any_name(fails: Fails, run: Path, screen: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.h5ad"
    link.symlink_to(screen)
    before = screen.read_bytes()
    assert "this is the input file" in fails("embed", run, screen, "--out", link)
    assert "this is the input file" in fails("counterfactual", run, link, "--do", "c_1=0", "--out", screen)
    assert screen.read_bytes() == before


def test_folders_that_cannot_be_used(fails: Fails, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "s.h5ad").mkdir()
    assert "this is a folder: give the name of a file" in fails("simulate", "--out", tmp_path / "s.h5ad")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(DataError, match="cannot be written to: choose another"):
        claim_folder(tmp_path)
