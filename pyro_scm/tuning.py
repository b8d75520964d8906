"""`tune`: many comparisons over models and hyper-parameters, chosen on validation environments.

One trial is one `evaluation.compare` of one model with one set of hyper-parameters, trained as an ensemble of seeds and
scored on the validation environments. The test environments are scored once, at the end, for the best trial alone. The
folder of a study holds journal.log (Optuna's record of the trials), study.json (what is tuned, and on what),
trials.csv, best.json, and the comparison of the best trial.
"""

import contextlib
import hashlib
import importlib.util
import inspect
import json
import os
import signal
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pandas as pd
import torch

from pyro_scm import checkpoints, recipes
from pyro_scm.baselines import BASELINES
from pyro_scm.data import splits
from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.data.splits import Split
from pyro_scm.errors import CheckpointError, DataError, ModelError, PyroScmError, TrainingError, listing, nearest
from pyro_scm.evaluation import LOWER_IS_BETTER, Comparison, compare
from pyro_scm.infer import fit

if TYPE_CHECKING:
    from multiprocessing.context import SpawnProcess

    from optuna import Study, Trial
    from optuna.trial import BaseTrial, FrozenTrial

__all__ = ["SCORES", "Best", "Tuning", "tune"]

SCORES = ("delta_pearson", "delta_r2", "rmse", "delta_pearson_deg", "delta_r2_deg", "rmse_deg", "rank", "nll",
          "reconstruction", "reconstruction_rmse")  # fmt: skip
"""Metrics of `Comparison` that a study can be chosen by."""

# what a study sets itself, of the options of `fit`
_OWN = ("seeds", "objective", "validation", "fresh", "device", "fabric", "checkpoint", "checkpoint_every", "progress")
_STATES = {"COMPLETE": "complete", "PRUNED": "failed", "FAIL": "killed", "RUNNING": "running"}
_NAME = "tune"
_IDLE_DEATHS = 4  # processes killed without a trial, after which something is wrong
_SAMPLED_CELLS = 64  # of which a study remembers the expression, to know its data again

Space: TypeAlias = "Mapping[str, tuple[float, float] | tuple[str, float, float] | list[Any]]"
Chosen: TypeAlias = "tuple[str, dict[str, Any], dict[str, Any]]"
"""A model, options of it and its guide, and options of the training."""


# ---------------------------------------------------------------------- the space
@dataclass(frozen=True)
class _Range:
    """Numbers from `low` to `high`, both included."""

    low: float
    high: float
    log: bool
    whole: bool

    def suggest(self, trial: "BaseTrial", name: str) -> int | float:
        if self.whole:
            return int(trial.suggest_int(name, int(self.low), int(self.high), log=self.log))
        return float(trial.suggest_float(name, self.low, self.high, log=self.log))


@dataclass(frozen=True)
class _Choice:
    """Some values, without an order."""

    values: tuple[Any, ...]

    def suggest(self, trial: "BaseTrial", name: str) -> Any:
        by_text = {json.dumps(value): value for value in self.values}  # Optuna takes no tuples
        return by_text[str(trial.suggest_categorical(name, list(by_text)))]


def _dimension(name: str, given: Any) -> _Range | _Choice:
    """One hyper-parameter of a space.

    Raises:
        ModelError: neither a range nor a choice.
    """
    if isinstance(given, list):
        try:
            texts = [json.dumps(value) for value in given]
        except TypeError:
            raise ModelError(f"space: {name} = {given!r}: choices are numbers, words, or tuples of them") from None
        if not texts or len(set(texts)) < len(texts):
            raise ModelError(f"space: {name} = {given!r}: give one value or more, each once")
        return _Choice(tuple(given))
    log = isinstance(given, tuple) and len(given) == 3 and given[0] == "log"
    ends = given[1:] if log else given
    numbers = isinstance(ends, tuple) and all(isinstance(v, int | float) and not isinstance(v, bool) for v in ends)
    if not numbers or len(ends) != 2:
        raise ModelError(f"space: {name} = {given!r}: give (low, high), ('log', low, high) or a list of values")
    low, high = ends
    if not (low < high and np.isfinite([low, high]).all()) or (log and low <= 0):
        raise ModelError(f"space: {name} = {given!r}: low is below high" + (", and above 0 on a log scale" * log))
    return _Range(low, high, log, isinstance(low, int) and isinstance(high, int))


def _keyword_only(function: Callable[..., Any]) -> set[str]:
    parameters = inspect.signature(function).parameters.values()
    return {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}


def _training_names() -> set[str]:
    """Options of `fit` that can be tuned."""
    return _keyword_only(fit) - set(_OWN)


# ---------------------------------------------------------------------- a study
@dataclass(frozen=True, eq=False)
class _Job:
    """What a process needs to know to run trials of a study.

    Args:
        folder: of the study.
        parts: the splits.
        models: label -> recipe and the options that are fixed for it.
        space: name -> what a trial may choose from.
        score: metric.
        seeds: of each trial's ensemble.
        trials: of the whole study.
        training: fixed options of `fit`.
        degs: differential genes of each environment.
        seed: of the search, of halves and of predictions.
        device: of the training.
    """

    folder: Path
    parts: tuple[Split, ...]
    models: Mapping[str, tuple[str, Mapping[str, Any]]]
    space: Mapping[str, _Range | _Choice]
    score: str
    seeds: tuple[int, ...]
    trials: int
    training: Mapping[str, Any]
    degs: int
    seed: int
    device: str

    @property
    def journal(self) -> Path:
        """Optuna's record."""
        return self.folder / "journal.log"

    def check(self) -> None:
        """Find out before any training what cannot work.

        Raises:
            ModelError: an unknown score, model or option.
            DataError: a split that cannot be scored.
        """
        if self.score not in SCORES:
            raise ModelError(f"unknown score {self.score!r}: use one of {', '.join(SCORES)}")
        if self.score.endswith("_deg") and (not self.degs or importlib.util.find_spec("scanpy") is None):
            raise ModelError(f"{self.score} needs differential genes: ask for some (degs), and pyro-scm[single-cell]")
        if not self.models:
            raise ModelError("no models: give the names of one or more")
        owners = {label: self.model_options(label) for label in self.models}
        known = set().union(*owners.values()) | _training_names()
        for name in self.space:
            if name not in known:
                raise ModelError(
                    f"space: no model in {', '.join(self.models)}, nor its guide or training, has an option {name!r}: "
                    f"did you mean one of {listing(nearest(name, sorted(known)))}?"
                )
            if name in self.training:
                raise ModelError(f"{name} is both in the space and fixed to {self.training[name]!r}: leave one out")
        for label, (recipe, fixed) in self.models.items():
            for name in fixed:
                if name not in owners[label]:
                    raise ModelError(
                        f"model {recipe!r} has no option {name}: it has {', '.join(sorted(owners[label]))}"
                    )
        for name in self.training:
            if name not in _training_names():
                raise ModelError(
                    f"{name} is not an option of a study's training: {', '.join(sorted(_training_names()))}"
                )
        for split in self.parts:
            for part in (_validated(split), split):
                compare(part, {}, baselines=(), degs=0, seed=self.seed)

    def model_options(self, label: str) -> set[str]:
        """Names of the options of a model and its guide."""
        return set(recipes.recipe(self.models[label][0]).options) | _keyword_only(recipes.make)

    def chosen(self, trial: "BaseTrial") -> Chosen:
        """What a trial is made of; a name that some model has is never that of an option of the training."""
        label = str(trial.suggest_categorical("model", list(self.models)))
        own, anyone = self.model_options(label), set().union(*(self.model_options(other) for other in self.models))
        options, training = dict(self.models[label][1]), dict(self.training)
        for name, dimension in self.space.items():
            if name in own and name not in options:
                options[name] = dimension.suggest(trial, name)
            elif name not in anyone:
                training[name] = dimension.suggest(trial, name)
        return label, options, training

    def compared(
        self, split: Split, label: str, options: Mapping[str, Any], training: Mapping[str, Any], **others: Any
    ) -> Comparison:
        """One model on one split."""
        model = {label: {"recipe": self.models[label][0], **options}}
        settings = {"seeds": self.seeds, "seed": self.seed, "device": self.device, "progress": False}
        return compare(split, model, **{**settings, **training, **others})

    def settings(self) -> dict[str, Any]:
        """What must agree for a study to go on, as JSON has it."""
        made = {
            "models": {label: {"recipe": recipe, **options} for label, (recipe, options) in self.models.items()},
            "space": {name: asdict(dimension) for name, dimension in self.space.items()},
            "score": self.score,
            "seeds": self.seeds,
            "training": self.training,
            "degs": self.degs,
            "seed": self.seed,
            "splits": [_fingerprint(split) for split in self.parts],
        }
        try:
            found: dict[str, Any] = json.loads(json.dumps(made))
        except TypeError as error:
            raise ModelError(f"options of a study are numbers, words, or tuples of them ({error})") from None
        return found


def _validated(split: Split) -> Split:
    """The same training, scored on the validation cells."""
    if split.validation is None:
        raise DataError(
            "a split has no validation cells, which trials are scored on: make it with validation_fraction=0.2"
        )
    return replace(split, test=split.validation, held_out=())


def _fingerprint(split: Split) -> dict[str, Any]:
    """What tells a split from others."""
    found: dict[str, Any] = {"held_out": [str(name) for name in split.held_out]}
    digest = hashlib.sha256()
    for name, part in (("training", split.train), ("validation", split.validation), ("test", split.test)):
        assert part is not None
        found[name] = len(part)
        names = [*part.genes, "", *map(str, part.cells), "", *map(str, part.environments.index)]
        digest.update("\n".join(names).encode())
        for values in (part.env, part.representation, part.batch(np.arange(min(_SAMPLED_CELLS, len(part)))).x):
            digest.update(np.ascontiguousarray(values).tobytes())
    return {**found, "sha256": digest.hexdigest()}


# ---------------------------------------------------------------------- what a study finds
@dataclass(frozen=True)
class Best:
    """The trial with the best score.

    Args:
        model: its name.
        options: of the model and its guide.
        training: options of `fit`.
        score: median over seeds of the mean over validation environments.
        spread: standard deviation over seeds; NaN for one seed.
    """

    model: str
    options: dict[str, Any]
    training: dict[str, Any]
    score: float
    spread: float


@dataclass(frozen=True, eq=False)
class Tuning:
    """What `tune` found.

    Args:
        trials: one row a trial: trial, state (``"complete"``; ``"failed"``, for which note says why; ``"killed"`` with
            its process, and tried again), model, each hyper-parameter (NaN where the model has none), score, spread
            over seeds, seconds and note.
        best: by the score on validation environments.
        comparisons: the best trial on the test environments of each split, beside baselines.
        config: what was tuned, and on what.
    """

    trials: pd.DataFrame
    best: Best
    comparisons: tuple[Comparison, ...]
    config: dict[str, Any] = field(default_factory=dict)

    def top(self, number: int = 10) -> pd.DataFrame:
        """The trials with the best scores, the best first."""
        done = self.trials[self.trials["state"] == "complete"]
        upwards = self.config["score"] in LOWER_IS_BETTER
        return done.sort_values("score", ascending=upwards, kind="stable").head(number).set_index("trial")

    def save(self, folder: str | Path) -> Path:
        """Write trials.csv, best.json and the comparisons (test/, or test_1/, test_2/, ...); return the folder.

        Raises:
            CheckpointError: a file cannot be written; none is ever left half written.
        """
        folder = Path(folder)
        checkpoints.write_text(folder / "trials.csv", self.trials.to_csv(index=False))
        checkpoints.write_text(folder / "best.json", json.dumps(asdict(self.best), indent=1))
        for name, comparison in self.tests().items():
            comparison.save(folder / name)
        return folder

    def tests(self) -> dict[str, Comparison]:
        """The comparisons by the name of their folder."""
        if len(self.comparisons) == 1:
            return {"test": self.comparisons[0]}
        return {f"test_{i}": comparison for i, comparison in enumerate(self.comparisons, 1)}


def tune(
    cells: EnvironmentDataset | Split | Sequence[Split],
    models: Sequence[str] | Mapping[str, Mapping[str, Any]],
    space: Space,
    *,
    folder: str | Path,
    trials: int = 40,
    seeds: Sequence[int] = (0, 1, 2),
    score: str = "delta_pearson",
    processes: int = 1,
    baselines: Sequence[str] = tuple(BASELINES),
    degs: int = 50,
    seed: int = 0,
    device: str = "auto",
    progress: bool | None = None,
    **training: Any,
) -> Tuning:
    """Search models and hyper-parameters for the best score on validation environments, with Optuna's TPE sampler.

    A trial trains one model with one set of hyper-parameters as an ensemble, on the training cells; of each member, the
    epoch of the lowest validation loss is kept, as `compare` does. Its score is the median over seeds of the mean over
    validation environments (and over splits). The best trial is trained again, which gives the same members, and its
    predictions of the test environments are scored beside baselines: the test environments choose nothing.

    Called again with the same arguments, a study goes on where it stopped; `trials` may be raised. A trial is a
    function of its hyper-parameters and seeds; with one process, a study that was stopped any number of times makes the
    same trials as one that was not. With several, what a trial tries depends on which others have ended.

    Several processes are started anew and receive a copy of the cells: a script that asks for them must do so below
    ``if __name__ == "__main__":``. A trial whose process is killed is tried once more.

    Args:
        cells: a split with validation cells, or several, over which a trial's score is averaged; or cells, of whose
            perturbations a fifth is then held out for testing and a fifth for validation.
        models: names of recipes, or label -> options that are fixed for this model, as in `compare`.
        space: name of a hyper-parameter -> ``(low, high)`` (whole numbers if both are), ``("log", low, high)``, or a
            list of values. Its name says whose it is: an option of the models, of `recipes.make` for the guides
            (guide_hidden, conditioning, inputs), or of `fit`. Models without the option do without.
        folder: for the study.
        trials: in all, with those that are there already.
        seeds: of each trial's ensemble.
        score: one of `SCORES`.
        processes: that run trials at the same time.
        baselines: names in `BASELINES`, to score beside the best trial.
        degs: differential genes of each environment; 0 for none. In trials they are called for ``*_deg`` scores only.
        seed: of the search, of halves and of predictions.
        device: of the training; see `fit`.
        progress: show a progress bar; by default where the error stream is a terminal.
        **training: more of `fit`, the same in all trials, such as epochs.

    Raises:
        ModelError: an unknown model, score or option, a space that is none, or Optuna is not installed.
        DataError: a split without validation cells, or one that cannot be scored.
        CheckpointError: the folder holds a study of other settings, or another process is at work in it.
        TrainingError: no trial ended with a score, or a worker process could not start.
    """
    _optuna()
    if trials < 1 or processes < 1:
        raise ModelError(f"trials = {trials}, processes = {processes}: give 1 or more")
    job = _Job(
        folder=Path(folder),
        parts=_parts(cells, seed),
        models=_labelled(models),
        space={name: _dimension(name, given) for name, given in space.items()},
        score=score,
        seeds=tuple(int(s) for s in seeds),
        trials=trials,
        training=training,
        degs=degs,
        seed=seed,
        device=device,
    )
    job.check()
    with _claimed(job.folder), _quiet():
        config = _opened(job)
        _search(job, processes, sys.stderr.isatty() if progress is None else progress)
        table, best = _found(job)
        comparisons = [
            job.compared(split, best.model, best.options, best.training, baselines=baselines, degs=degs)
            for split in job.parts
        ]
        tuning = Tuning(table, best, tuple(comparisons), config)
        tuning.save(job.folder)
    return tuning


def _parts(cells: EnvironmentDataset | Split | Sequence[Split], seed: int) -> tuple[Split, ...]:
    if isinstance(cells, EnvironmentDataset):
        return (splits.by_environment(cells, validation_fraction=0.2, seed=seed),)
    parts = (cells,) if isinstance(cells, Split) else tuple(cells)
    if not parts:
        raise DataError("no splits: give one or more")
    return parts


def _labelled(models: Sequence[str] | Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[str, dict[str, Any]]]:
    """Label -> recipe and fixed options."""
    names = [models] if isinstance(models, str) else models
    given = names if isinstance(names, Mapping) else {name: {} for name in names}
    return {
        label: (str(options.get("recipe", label)), {n: v for n, v in options.items() if n != "recipe"})
        for label, options in given.items()
    }


# ---------------------------------------------------------------------- the folder
@contextlib.contextmanager
def _claimed(folder: Path) -> Iterator[None]:
    """Keep the folder to this process; the system lets go of it when the process ends, however it does.

    Raises:
        CheckpointError: another process has it, or it cannot be written.
    """
    import fcntl

    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("ab")
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written to ({error.strerror}): name another folder") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(
                f"{folder}: another process is tuning here: wait for it, or name another folder; for more than one "
                "process at a time, ask for them with processes"
            ) from None
        yield


def _opened(job: _Job) -> dict[str, Any]:
    """Begin a study, or take it up again: trials that ran when it stopped are then given back.

    Returns:
        its settings.

    Raises:
        CheckpointError: it has other settings, or its files are damaged.
    """
    optuna = _optuna()
    settings, file = job.settings(), job.folder / "study.json"
    if file.is_file():
        try:
            before = json.loads(file.read_text())
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{file}: not readable ({error}): name another folder") from error
        changed = [name for name in settings if not isinstance(before, dict) or before.get(name) != settings[name]]
        if changed:
            told = "; ".join(f"{n} = {_short(before.get(n))}, asked for {_short(settings[n])}" for n in changed[:3])
            raise CheckpointError(
                f"{job.folder}: holds a study of other settings ({told}): use the same, or another folder"
            )
    elif job.journal.exists():
        raise CheckpointError(f"{job.folder}: has a journal and no study.json, so nobody knows of what: name another")
    checkpoints.write_text(file, json.dumps(settings, indent=1))
    _mend(job.journal)
    try:
        study = optuna.create_study(
            study_name=_NAME,
            storage=_storage(job.journal),
            direction="minimize" if job.score in LOWER_IS_BETTER else "maximize",
            load_if_exists=True,
        )
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{job.journal}: damaged ({error}): restore it from a copy, or name another") from error
    for trial in study.get_trials(deepcopy=False):
        if trial.state.name == "RUNNING":
            study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
    return settings


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _mend(journal: Path) -> None:
    """Remove what a process that was killed may have left: a lock, and half a line at the end of the journal."""
    journal.with_name(journal.name + ".lock").unlink(missing_ok=True)
    if journal.is_file():
        whole = journal.read_bytes().rfind(b"\n") + 1
        if whole < journal.stat().st_size:
            os.truncate(journal, whole)


def _storage(journal: Path) -> Any:
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    return JournalStorage(JournalFileBackend(str(journal)))


def _optuna() -> Any:
    """The package, which is optional.

    Raises:
        ModelError: it is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise ModelError(f"optuna cannot be imported ({error}): install pyro-scm[sweep]") from error
    return optuna


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Optuna keeps its remarks to itself."""
    optuna = _optuna()
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(before)


# ---------------------------------------------------------------------- trials
# A trial fills one of the study's places 0 ... trials - 1. It is complete or failed (Optuna's PRUNED, which the sampler
# avoids) and keeps its place, or was killed with its process (Optuna's FAIL, which it ignores) and gives it back.


def _taken(history: Sequence["FrozenTrial"], *, ended: bool = False) -> set[int]:
    """Places that are filled, or are being filled."""
    states = ("COMPLETE", "PRUNED") if ended else ("COMPLETE", "PRUNED", "RUNNING")
    return {t.user_attrs["place"] for t in history if t.state.name in states and "place" in t.user_attrs}


def _next(study: "Study", job: _Job) -> "tuple[Trial, Chosen] | None":
    """A new trial in the first free place, or None where there is none; one process at a time."""
    import fcntl

    from optuna.samplers import TPESampler

    with job.journal.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        taken = _taken(study.get_trials(deepcopy=False))
        free = [place for place in range(job.trials) if place not in taken]
        if not free:
            return None
        own = int(np.random.SeedSequence((job.seed, free[0])).generate_state(1)[0])
        study.sampler = TPESampler(seed=own, constant_liar=True)  # running trials are avoided, too
        trial = study.ask()
        trial.set_user_attr("worker", os.getpid())  # before the place: who holds one is known
        trial.set_user_attr("place", free[0])
        return trial, job.chosen(trial)


def _run_trials(job: _Job, done: Callable[["Study"], None] = lambda _: None) -> None:
    """Run trials until no place is free."""
    optuna = _optuna()
    study = optuna.load_study(study_name=_NAME, storage=_storage(job.journal))
    while (found := _next(study, job)) is not None:
        trial, chosen = found
        started = time.perf_counter()
        state = None
        try:
            value, spread = _scored(job, *chosen)
            trial.set_user_attr("spread", spread)
        except (PyroScmError, MemoryError, torch.OutOfMemoryError) as error:
            value, state = None, optuna.trial.TrialState.PRUNED
            trial.set_user_attr("note", " ".join(str(error).split()) or type(error).__name__)
        trial.set_user_attr("seconds", time.perf_counter() - started)
        study.tell(trial, value, state=state)
        done(study)


def _scored(job: _Job, label: str, options: Mapping[str, Any], training: Mapping[str, Any]) -> tuple[float, float]:
    """Median and standard deviation over seeds of the mean over validation environments and splits.

    Raises:
        TrainingError: training that diverged, or a score that is not defined.
    """
    degs = job.degs if job.score.endswith("_deg") else 0
    means = []
    for split in job.parts:
        table = job.compared(_validated(split), label, options, training, baselines=(), degs=degs).scores
        means.append(table[table["metric"] == job.score].groupby("seed")["value"].mean())
    by_seed = pd.concat(means, axis=1).mean(axis=1, skipna=False).dropna()
    if by_seed.empty:
        raise TrainingError(f"{job.score} is not defined: the model predicts no change in any validation environment")
    return float(by_seed.median()), float(by_seed.std())


def _search(job: _Job, processes: int, progress: bool) -> None:
    """Run the trials that are missing."""
    from tqdm import tqdm

    study = _optuna().load_study(study_name=_NAME, storage=_storage(job.journal))

    def advance(study: "Study") -> None:
        history = study.get_trials(deepcopy=False)
        scores = [t.value for t in history if t.state.name == "COMPLETE" and t.value is not None]
        if scores:
            best = min(scores) if job.score in LOWER_IS_BETTER else max(scores)
            bar.set_postfix_str(f"best {job.score} {best:.3f}", refresh=False)
        bar.update(len(_taken(history, ended=True) & set(range(job.trials))) - bar.n)

    there = len(_taken(study.get_trials(deepcopy=False), ended=True) & set(range(job.trials)))
    with tqdm(total=job.trials, initial=there, unit="trial", disable=not progress) as bar:
        if processes == 1:
            _run_trials(job, advance)
        else:
            _in_processes(job, study, processes, advance)


# ---------------------------------------------------------------------- several processes
def _in_processes(job: _Job, study: "Study", processes: int, done: Callable[["Study"], None]) -> None:
    """Run the trials that are missing in processes of their own, as long as there are any."""
    from multiprocessing import get_context
    from multiprocessing.connection import wait

    context = get_context("spawn")  # a forked copy of torch's threads may hang
    threads = max(1, (os.cpu_count() or 1) // processes)
    workers: list[SpawnProcess] = []
    deaths: Counter[int] = Counter()
    try:
        while True:
            missing = job.trials - len(_taken(study.get_trials(deepcopy=False), ended=True) & set(range(job.trials)))
            for _ in range(min(processes, missing) - len(workers)):
                workers.append(context.Process(target=_work, args=(job, threads), daemon=True))
                workers[-1].start()
            if not workers:
                return
            wait([w.sentinel for w in workers], timeout=0.5)
            ended = [w for w in workers if not w.is_alive()]
            workers = [w for w in workers if w not in ended]
            for worker in ended:
                _bury(study, worker, deaths)
            done(study)
    finally:
        for worker in workers:
            worker.terminate()
            worker.join()


def _work(job: _Job, threads: int) -> None:
    """What a process does: it runs trials, and ends with the one that started it."""
    from multiprocessing import parent_process

    from tqdm import tqdm

    tqdm.set_lock(threading.RLock())  # its own kind would outlive a process that is killed
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interruption from the keyboard reaches the parent, which stops us
    parent = parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    torch.set_num_threads(threads)
    with _quiet():
        _run_trials(job)


def _bury(study: "Study", worker: "SpawnProcess", deaths: "Counter[int]") -> None:
    """Give back the place of a trial whose process was killed; the second time, the trial has failed.

    Raises:
        TrainingError: the process ended by itself, or too many were killed before they had a trial.
    """
    from optuna.trial import TrialState

    if not worker.exitcode:
        return
    history = study.get_trials(deepcopy=False)
    running = [t for t in history if t.state.name == "RUNNING" and t.user_attrs.get("worker") == worker.pid]
    for trial in running:
        place = trial.user_attrs.get("place", -1)
        deaths[place] += 1
        study.tell(trial.number, state=TrialState.PRUNED if deaths[place] > 1 else TrialState.FAIL)
    if not running:
        deaths[-1] += 1
    if worker.exitcode > 0 or deaths[-1] > _IDLE_DEATHS:
        what = f"in trial {running[0].user_attrs.get('place')}" if running else "before its first trial"
        raise TrainingError(
            f"a worker process stopped {what} (exit code {worker.exitcode}); what it printed says why. A script that "
            "asks for several processes must do so below `if __name__ == '__main__':`; try processes = 1"
        )


# ---------------------------------------------------------------------- the end
def _found(job: _Job) -> tuple[pd.DataFrame, Best]:
    """All trials, and the best of them.

    Raises:
        TrainingError: none has a score.
    """
    optuna = _optuna()
    study = optuna.load_study(study_name=_NAME, storage=_storage(job.journal))
    history = [t for t in study.get_trials(deepcopy=False) if t.user_attrs.get("place", job.trials) < job.trials]
    history.sort(key=lambda t: (t.user_attrs["place"], t.number))
    rows = [_row(job, trial) for trial in history]
    table = pd.DataFrame(rows, columns=["trial", "state", "model", *job.space, "score", "spread", "seconds", "note"])
    checkpoints.write_text(job.folder / "trials.csv", table.to_csv(index=False))
    sign = -1.0 if job.score in LOWER_IS_BETTER else 1.0
    scores = {i: sign * row["score"] for i, row in enumerate(rows) if row["state"] == "complete"}
    if not scores:
        raise TrainingError(f"none of the {job.trials} trials has a score; the first: {rows[0]['note']}")
    best = max(scores, key=lambda i: scores[i])
    label, options, training = job.chosen(optuna.trial.FixedTrial(history[best].params))
    return table, Best(label, options, training, rows[best]["score"], rows[best]["spread"])


def _row(job: _Job, trial: "FrozenTrial") -> dict[str, Any]:
    optuna, nan = _optuna(), float("nan")
    replay = optuna.trial.FixedTrial(trial.params)
    values = {n: dimension.suggest(replay, n) for n, dimension in job.space.items() if n in trial.params}
    note = trial.user_attrs.get("note", "")
    if not note and trial.state.name in ("PRUNED", "FAIL"):
        note = "its process was killed" + (" twice" if trial.state.name == "PRUNED" else "")
    return {
        "trial": trial.user_attrs["place"],
        "state": _STATES[trial.state.name],
        "model": trial.params.get("model"),
        **values,
        "score": nan if trial.value is None else trial.value,
        "spread": trial.user_attrs.get("spread", nan),
        "seconds": trial.user_attrs.get("seconds", nan),
        "note": note,
    }
