"""Whatever goes wrong is one line that says what to do, and leaves what was there untouched."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import FIT, SMALL

Works = Callable[..., str]
Fails = Callable[..., str]
FITTED = ("fit", "SIM", "--model", "vae", *FIT, *SMALL)


def filled(words: tuple[str, ...], screen: Path, run: Path, out: Path) -> list[str]:
    """SIM, RUN and OUT as paths."""
    places = {"SIM": screen, "RUN": run, "OUT": out}
    result = []
    for word in words:
        for name, place in places.items():
            word = word.replace(name, str(place))
        result.append(word)
    return result


@pytest.mark.parametrize(
    ("words", "message"),
    [
        # the words themselves
        ((), "the following arguments are required: VERB; see `pyro-scm --help`"),
        (("fits",), "invalid choice: 'fits'"),
        (("fit", "SIM"), "the following arguments are required: --out; see `pyro-scm fit --help`"),
        (("fit", "SIM", "--out", "OUT", "--epoch", "3"), "unrecognized arguments: --epoch 3"),
        (("fit", "SIM", "--out", "OUT", "--epochs", "0"), "argument --epochs: '0' is not a whole number of 1 or more"),
        (("fit", "SIM", "--out", "OUT", "--counts", "--continuous"), "not allowed with argument"),
        (("simulate", "--graph", "tree", "--out", "OUT/s.h5ad"), "argument --graph: 'tree' is neither one of empty"),
        (("compare", "SIM", "--models", "vae", *FIT, "--out", "OUT"), "one of the arguments --hold-out"),
        (("counterfactual", "RUN", "SIM", "--out", "OUT/c.h5ad", "--do", "c_1"), "'c_1' is neither c_J=NUMBER"),
        (("data",), "the following arguments are required: ACTION"),
        # models and their options
        (("models", "vaz"), "unknown model 'vaz': use one of ae, vae"),
        (("fit", "SIM", *FIT, "--out", "OUT"), "--model is missing: choose one that `pyro-scm models` lists"),
        (("fit", "SIM", "--model", "vaz", *FIT, "--out", "OUT"), "unknown model 'vaz'"),
        ((*FITTED, "--option", "depth=3", "--out", "OUT"), "the model vae has no option 'depth': it has latent, hidden"),
        ((*FITTED, "--option", "hidden=wide", "--likelihood", "poisson", "--out", "OUT"), "unknown likelihood 'poisson'"),
        ((*FITTED, "--option", "latent=many", "--out", "OUT"), "unknown"),
        ((*FITTED, "--option", "graph=0-1", "--out", "OUT"), "--option graph: a graph cannot be given here"),
        ((*FITTED, "--likelihood", "negative-binomial", "--out", "OUT"), "needs counts and the data are continuous"),
        ((*FITTED, "--training", "momentum=1", "--out", "OUT"), "the training has no option 'momentum': it has schedule"),
        ((*FITTED, "--training", "schedule=step", "--out", "OUT"), "unknown schedule 'step'"),
        ((*FITTED, "--training", "patience=long", "--out", "OUT"), "--training patience=long: give a number"),
        ((*FITTED, "--training", "patience=3", "--out", "OUT"), "patience needs validation cells"),
        ((*FITTED, "--device", "cuda:99", "--out", "OUT"), "--device cuda:99: cannot be used"),
        ((*FITTED, "--device", "abacus", "--out", "OUT"), "--device abacus: cannot be used"),
        # the data
        (("fit", "none.h5ad", "--model", "vae", *FIT, "--out", "OUT"), "none.h5ad: no such file"),
        (("fit", "RUN/data.json", "--model", "vae", *FIT, "--out", "OUT"), "data.json: not a readable .h5ad file"),
        (("fit", "SIM", "--model", "vae", "--out", "OUT"), "which obs column names the perturbation? Add --environment"),
        (("fit", "SIM", "--model", "vae", "--environment", "drug", "--out", "OUT"), "SIM: no obs column 'drug'"),
        (
            ("fit", "SIM", "--model", "vae", "--environment", "perturbation", "--control", "DMSO", "--out", "OUT"),
            "SIM: control 'DMSO' is not in obs column 'perturbation': it has 'control'",
        ),
        ((*FITTED, "--dose", "perturbation", "--out", "OUT"), "dose column 'perturbation' holds 'control'"),
        ((*FITTED, "--layer", "raw", "--out", "OUT"), "no layer 'raw'"),
        ((*FITTED, "--counts", "--out", "OUT"), "SIM: X: "),
        ((*FITTED, "--hold-out", "env_9", "--out", "OUT"), "SIM: no environment 'env_9': did you mean one of"),
        ((*FITTED, "--hold-out", "control", "--out", "OUT"), "'control' is a reference"),
        ((*FITTED, "--validation-fraction", "1", "--out", "OUT"), "'1' is not a number between 0 and 1"),
        ((*FITTED, "--genes", "5", "--out", "OUT"), "expression is negative"),
        # representations
        ((*FITTED, "--representation", "two-hot", "--out", "OUT"), "SIM: --representation: unknown representation 'two-hot'"),
        ((*FITTED, "--representation", "uns:genes", "--out", "OUT"), "uns:genes: no table of this name in uns: this file has"),
        ((*FITTED, "--representation", "morgan", "--out", "OUT"), "which obs column holds the SMILES? Write morgan:COLUMN"),
        ((*FITTED, "--representation", "morgan:smiles", "--out", "OUT"), "SIM: no obs column 'smiles'"),
        ((*FITTED, "--representation", "dose", "--out", "OUT"), "dose: which obs column holds it? Add --dose COLUMN"),
        ((*FITTED, "--representation", "cell_line", "--out", "OUT"), "Add --cell-line COLUMN"),
        ((*FITTED, "--representation", "dose:uM", "--out", "OUT"), "'dose:uM': only morgan, uns and table take something"),
        (
            (*FITTED, "--representation", "uns:descriptors,uns:descriptors", "--out", "OUT"),
            "several features are called 'descriptor_0'",
        ),
        # runs
        (("embed", "OUT/none", "SIM", "--out", "OUT/e.h5ad"), "no manifest.json: give the folder of a run"),
        (("embed", "RUN/training", "SIM", "--out", "OUT/e.h5ad"), "add --model FILE.py:FUNCTION"),
        ((*FITTED, "--out", "RUN"), "RUN: holds a run already: add --resume to go on with it"),
        (("fit", "SIM", "--resume", "--out", "OUT"), "OUT: there is no training of `pyro-scm fit` to resume"),
        (
            ("fit", "SIM", "--resume", "--lr", "0.1", "--latent", "4", "--model", "vae", "--genes", "3", "--layer", "raw",
             "--out", "RUN"),
            "RUN: was fitted with other options (model, genes, layer, latent, lr): with --resume leave them out",
        ),
        # questions
        (("predict", "RUN", "--environment", "env_9", "--out", "OUT/p.h5ad"), "--environment env_9: the run does not know"),
        (("counterfactual", "RUN", "SIM", "--out", "OUT/c.h5ad"), "say what is to be different: --do c_J=VALUE"),
        (("counterfactual", "RUN", "SIM", "--do", "c_7=1", "--out", "OUT/c.h5ad"), "'c_7'"),
        (
            ("counterfactual", "RUN", "SIM", "--do", "c_1=1", "--do", "c_1+=1", "--out", "OUT/c.h5ad"),
            "--do c_1 is given twice",
        ),
        (("counterfactual", "RUN", "SIM", "--environment", "env_9", "--out", "OUT/c.h5ad"), "no environment 'env_9'"),
        (("counterfactual", "RUN", "SIM", "--do", "c_1=1", "--of", "env_9", "--out", "OUT/c.h5ad"), "no environment 'env_9'"),
        (("evaluate", "RUN", "SIM", "--hold-out", "control"), "SIM: 'control' is a reference"),
        (("compare", "SIM", "--models", "vaz", *FIT, "--hold-out", "env_1", "--out", "OUT"), "unknown model 'vaz'"),
        (
            ("compare", "SIM", "--models", "vae", *FIT, "--hold-out", "env_1", "--option", "depth=2", "--out", "OUT"),
            "none of the models vae has the option depth",
        ),
        (("data", "get", "l1001", "--out", "OUT"), "no data set 'l1001': there are 'l1000-phase1'"),
        (("data", "get", "l1000-phase1", "--match", "x", "--out", "OUT"), "l1000-phase1: no file matches 'x'"),
        # results
        (("embed", "RUN", "SIM", "--out", "SIM"), "SIM: this is the input file, which is never overwritten"),
        (("embed", "RUN", "SIM", "--out", "OUT/e.csv"), "e.csv: the result is a .h5ad file: give a name that ends in .h5ad"),
        (("evaluate", "RUN", "SIM", "--out", "OUT/e.h5ad"), "e.h5ad: the result is a .csv file"),
        (("simulate", "--out", "SIM/s.h5ad"), "cannot be made"),
        (("simulate", "--targets", "9", "--out", "OUT/s.h5ad"), "targets = 9: choose between 1 and the number of latents"),
        (("simulate", "--interventions", "push", "--out", "OUT/s.h5ad"), "unknown interventions 'push': use shift"),
        (("simulate", "--graph", "0-1,1-0", "--latent", "2", "--out", "OUT/s.h5ad"), "cycle"),
    ],
)  # fmt: skip
def test_errors_are_one_line(
    fails: Fails, screen: Path, run: Path, tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    if words == (*FITTED, "--option", "latent=many", "--out", "OUT"):
        words, message = (*FITTED[:-6], "--option", "latent=many", "--out", "OUT"), "latent='many' is of another kind"
    if "hidden=wide" in words:
        message = "the model vae: hidden=('wide',)"
    found = fails(*filled(words, screen, run, tmp_path / "out"))
    assert filled((message,), screen, run, tmp_path / "out")[0] in found
