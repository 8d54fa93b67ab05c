"""The main job: search, slim, fine-tune, measure, and write down what came of it.

A run directory is the job's memory. Everything that is made is written there when it is made, so a run that was stopped
goes on from what it holds: the dense weights are not trained again and no trial is evaluated twice.
"""

from __future__ import annotations

import logging
import math
import shlex
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import torch
from optuna.samplers import BaseSampler
from torch import nn

from amc.data import Data
from amc.errors import AmcError, Interrupted, SearchFailed, UsageError
from amc.evaluate import Metric, Tune
from amc.export import export_onnx
from amc.policy import Policy, load_policy
from amc.weights import save_weights, weights_sha256
from latency.memory import resources
from search.anchors import Chooser
from search.compose import Setup, with_objects
from search.display import Display
from search.finish import SETTLED, Candidate, accuracies, finetune_steps, finish, measure_latency, policy_of, result_of
from search.finished import RunResult, read_document
from search.front import FRONT, FrontSampler, begin, front_lines, front_policy, front_problem, with_front
from search.layers import layer_figures
from search.live import watching
from search.numbers import metric_name
from search.report import notebook_html, write_report
from search.run_directory import (
    DENSE_ONNX,
    MODEL,
    MODEL_ONNX,
    POLICY,
    REPORT,
    RESULT,
    STUDY,
    TABLE,
    RunDirectory,
    check_free,
    check_resumable,
    default_path,
    owned,
)
from search.run_sensitivity import write_sensitivity
from search.settings import Settings, apart_from_workers, settings_from, shared_names
from search.settle import FINALISTS, ranked, settle
from search.start import prepare, resumed_settings, versions
from search.storage import Leases, copy_study, open_shared, open_storage, released
from search.strategies import make_sampler
from search.strategies.moves import MovingSampler
from search.study import Progress, SearchResult, open_study, search
from search.sweep import share
from search.tensorboard import FOLDER as SCALARS
from search.tensorboard import Scalars, check_installed
from search.warm import policies, warm_start

log = logging.getLogger("amc")


@dataclass(frozen=True)
class Result:
    """What a run found.

    policy: the best policy. model: the slim, fine-tuned model (None where a finished run is looked at again).
    path: the run directory. summary: what `result.json` holds.
    """

    policy: Policy
    model: nn.Module | None
    path: Path
    summary: Mapping[str, Any]

    def __repr__(self) -> str:
        best, dense = self.summary["best"], self.summary["dense"]
        metric = self.summary["search"].get("metric", "accuracy")
        return (
            f"Result({self.path}: {metric} {best['accuracy']:.4f} of {dense['accuracy']:.4f}, "
            f"{best['flops'] / dense['flops']:.3f} of the FLOPs, by {best['source']})"
        )

    def _repr_html_(self) -> str | None:
        """What a notebook shows; without the run's files, it falls back on the text."""
        try:
            return notebook_html(self.path)
        except AmcError:
            return None


def run(
    *,
    model: Any = None,
    data: Any = None,
    metric: Metric | None = None,
    finetune: Tune | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    quiet: bool = True,
    **settings: Any,
) -> Result:
    """Finds a policy under the budget, slims, fine-tunes, measures and writes a run directory, as the commands do.

    model, data: what the options take, or a module and data sets of your own. metric: a model's worth, higher is
    better, in place of the accuracy. finetune: `(model, steps)`, trains a slim model in place for about so many steps,
    in place of cross entropy on the labels; few steps for each score, many for the result. out: the run directory.
    settings: any field of `Settings`.

    Raises:
        AmcError: whatever in the arguments can't be used.
    """
    if resume:
        if out is None:
            raise UsageError("resume=True needs out=…, the directory of the run to go on with")
        texts = {name: value for name, value in (("model", model), ("data", data)) if isinstance(value, str)}
        named = resumed_settings(Path(out), {**settings, **texts})
        _, own_model, own_data = with_objects({}, model, data)
    else:
        named, own_model, own_data = with_objects(settings, model, data)
    threads = torch.get_num_threads()
    try:
        return run_job(
            named,
            out=out,
            resume=resume,
            model=own_model,
            data=own_data,
            metric=metric,
            finetune=finetune,
            display=Display(quiet=quiet),
        )
    finally:
        torch.set_num_threads(threads)


def run_job(
    settings: Settings,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    model: nn.Module | None = None,
    data: Any = None,
    metric: Metric | None = None,
    finetune: Tune | None = None,
    display: Display,
    shared: Path | None = None,
) -> Result:
    """The main job on settings that are already read; `model` and `data` are objects in place of what they name.

    shared: another run of the same dense model, from which a new one takes what does not depend on the budget.
    """
    if settings.tensorboard:
        check_installed()
    path = Path(out) if out is not None else default_path(settings.model)
    check_resumable(path) if resume else check_free(path)
    if resume and (path / REPORT).exists() and _asks_no_more(path, settings):
        return finished_result(path, display)
    with owned(path, resume=resume) as directory:
        try:
            if resume and _asks_no_more(path, settings):
                _report(directory)
                return finished_result(path, display)
            if shared is not None:
                share(shared, path)
            own = {"model": model, "data": data, "metric": metric, "finetune": finetune}
            setup = prepare(directory, settings, **own, display=display)
            with closing(setup.executor or ExitStack()):
                _announce(setup, display)
                dense = _dense_accuracies(setup, display)
                setup, found, proxy = _search(directory, setup, display)
            if found.best is None:
                raise SearchFailed(f"no trial of the search in {path} succeeded; run.log says why")
            best, uniform = finish(setup, found.best, directory.path, display)
            write_sensitivity(setup, found.trials, directory, display)
            return _conclude(directory, setup, found, proxy, dense, best, uniform, display)
        except KeyboardInterrupt:
            log.info("stopped by a signal")
            raise Interrupted(f"stopped; go on by: amc search --out {shlex.quote(str(path))} --resume") from None


def _asks_no_more(path: Path, settings: Settings) -> bool:
    """Whether the run is finished, with the settings asked for: its result says so, and is written last."""
    if not (path / RESULT).exists():
        return False
    before = settings_from(read_document(path / RESULT, RunResult).settings)
    return apart_from_workers(before) == apart_from_workers(settings_from(settings.as_json()))


def finished_result(path: Path, display: Display) -> Result:
    """The result of a finished run, from its files."""
    display.say(f"the run in {path} is finished; there is nothing to go on with")
    return Result(load_policy(path / POLICY), None, path, RunDirectory(path).read_json(RESULT))


def _announce(setup: Setup, display: Display) -> None:
    groups, frozen = setup.structure.groups, setup.structure.frozen
    display.say(
        f"{setup.loaded.name} on {setup.data.name}: {len(groups)} groups, {sum(g.channels for g in groups)} channels"
        + (f", {len(frozen)} frozen (`amc groups` says why)" if frozen else "")
        + f"; budget: {setup.problem.budget}"
    )
    display.say(_examples(setup.data))
    if setup.data.train is None:
        log.warning("there is no train split: neither candidates nor the result are fine-tuned or recalibrated")
    elif setup.settings.finetune_epochs and setup.evaluator.tune is None:
        steps = finetune_steps(setup.settings, len(setup.data.train))
        if steps < SETTLED:
            log.warning(
                "the final fine-tune is short: %d steps, from %d examples in batches of %d; raise --finetune-epochs or "
                "lower --finetune-batch",
                steps,
                len(setup.data.train),
                setup.settings.finetune_batch,
            )
    if setup.data.test is None and setup.metric is None:
        log.warning("there is no test split, so no figure of the result is on images that the search never saw")


def _dense_accuracies(setup: Setup, display: Display) -> tuple[float, float | None]:
    """The dense model's `accuracies`; first of all, so that a split that can't be read is known before the search.

    Raises:
        UsageError: its metric is no number.
    """
    dense = accuracies(setup, setup.loaded.model)
    if not math.isfinite(dense[0]):
        raise UsageError(f"the dense model's {metric_name(setup.metric)} is {dense[0]}; it must be a number")
    display.say(f"the dense model's {metric_name(setup.metric)} on the search split: {dense[0]:.4f}")
    classes = setup.data.num_classes  # None: nobody knows
    if setup.metric is None and classes and dense[0] < (1.5 - 0.5 / classes) / classes:  # hardly better than chance
        log.warning(
            "the dense model guesses: are these its weights (--weights), and its normalization (--mean, --std)?"
        )
    return dense


def _examples(data: Data) -> str:
    """How many examples each split has, and how images are normalized."""
    splits = {"train": data.train, "val (searched on)": data.val, "test": data.test}
    text = "examples: " + ", ".join(f"{name} {'none' if x is None else len(x)}" for name, x in splits.items())
    normalize = getattr(data.val, "normalize", None)
    return f"{text}; images normalized by {normalize}" if normalize is not None else text


def _search(directory: RunDirectory, setup: Setup, display: Display) -> tuple[Setup, SearchResult, dict[str, object]]:
    """Searches until the budget is met as measured.

    Returns the setup of the last round, with its corrected costs, what was found, and what the score is worth.
    """
    settings, planned = setup.settings, setup.problem
    front = front_problem(settings, planned)

    def sampler(setup: Setup) -> BaseSampler:
        if front:
            return FrontSampler(front, settings.strategy, trials=settings.planned_trials(), seed=settings.seed)
        made = make_sampler(settings.strategy, setup.problem, trials=settings.planned_trials(), seed=settings.seed)
        if setup.problem is not planned and isinstance(made, MovingSampler):  # a further round
            made.start_from(setup.problem.widths(one.widths) for one in ranked(setup.problem, study)[:FINALISTS])
        return made

    study, leases = _open_study(directory, setup, sampler(setup))
    if front:
        begin(study, front)
    warm_start(study, setup.problem, settings.warm_start, leases)
    chooser = _chooser(directory, setup)

    def search_round(setup: Setup, trials: int | None, time_limit: float | None) -> SearchResult:
        study.sampler = sampler(setup)
        ends = time_limit and time_limit * (1 - chooser.share)
        with watching(setup, study, display, trials, ends) as view:

            def on_trial(progress: Progress) -> None:
                best, latest = progress.best, progress.latest
                done = progress.trials + progress.failed
                reward = f"reward {latest.reward:.4f}" if latest else "failed"
                log.info("trial %d: %s, best %s", done, reward, f"{best.reward:.4f}" if best else "none")
                view.trial(progress)
                if scalars:
                    scalars.catch_up(study)

            found = search(
                front or setup.problem,
                study,
                trials=trials,
                time_limit=ends,
                seed=settings.seed,
                on_trial=on_trial,
                executor=setup.executor,
                leases=leases,
            )
        if front:
            return with_front(found, study, front, setup.problem)
        with display.bar("checking the score by longer fine-tunes") as report:
            return chooser.choose(setup.problem, study, found, report)

    recording = Scalars(directory / SCALARS, setup.problem) if settings.tensorboard else nullcontext()
    with released(study), recording as scalars:
        if scalars:
            scalars.catch_up(study)
        setup, found = settle(setup, study, search_round)
        if leases:
            copy_study(study, directory / STUDY)
    if setup.bench is not None:
        setup.bench.table.save(directory / TABLE)
    return setup, found, chooser.proxy()


def _chooser(directory: RunDirectory, setup: Setup) -> Chooser:
    """Who chooses the policy that the search ends with; by the score alone without training examples.

    So it is without score steps, for a front, and in a study that processes share, each of which would make its own.
    """
    settings, evaluator = setup.settings, setup.evaluator
    makes = evaluator.trains and settings.score_steps and not settings.pareto and settings.storage is None
    share = settings.anchor_share if makes else 0.0
    images = (settings.score_images or len(setup.data.val)) + settings.calibration_images
    rest = images / (3 * settings.score_batch)  # a step is a forward and a backward pass, three of a forward one
    return Chooser(directory, evaluator.recovered, score_steps=settings.score_steps, share=share, rest=rest)


def _open_study(directory: RunDirectory, setup: Setup, sampler: BaseSampler) -> tuple[optuna.Study, Leases | None]:
    """The run's own study, or the one that it shares with other processes, which must have the same settings."""
    settings = setup.settings
    if settings.storage is None:
        if not (directory / STUDY).exists():
            policies(setup.problem, settings.warm_start)  # what can't be read is refused before there is a study
        return open_study(open_storage(directory / STUDY), "search", sampler), None
    storage = open_shared(settings.storage)
    leases, study = Leases(storage), open_study(storage, settings.study, sampler)
    mine = {name: value for name, value in settings.as_json().items() if name in shared_names()}
    mine |= {"data_fingerprint": setup.data.fingerprint, "weights": weights_sha256(setup.loaded.model)}
    with leases.locked():
        theirs = study.user_attrs.get("run")
        if theirs is None:
            study.set_user_attr("run", mine)
    for name, value in mine.items():
        if theirs is not None and theirs.get(name) != value:
            raise UsageError(
                f"the study {settings.study!r} in the database was begun with another {name} ({theirs.get(name)!r}, "
                f"not {value!r}); processes that share a study need the same, and another search another --study NAME"
            )
    return study, leases


def _conclude(
    directory: RunDirectory,
    setup: Setup,
    found: SearchResult,
    proxy: Mapping[str, object],
    dense: tuple[float, float | None],
    best: Candidate,
    uniform: Candidate,
    display: Display,
) -> Result:
    """Writes the models, the policy and the result; the result last, since it marks the run as finished."""
    winner = _winner(setup.settings, best, uniform)
    searched = {
        "strategy": setup.settings.strategy,
        "trials": found.trials,
        "failed": found.failed,
        "seconds": found.seconds,
        "evaluation_seconds": found.evaluation_seconds,
        "seed": setup.settings.seed,
        "metric": metric_name(setup.metric),
        "widths": dict(best.widths),
    }
    policy = policy_of(setup, winner, found.trials, versions())
    with directory.replacing() as new:
        with display.bar("exporting and measuring") as report:
            save_weights(winner.model, new / MODEL)
            export_onnx(winner.model, setup.loaded.inputs, new / MODEL_ONNX)
            with _uniform_file(setup, winner, uniform, new / MODEL_ONNX) as files:
                readings = measure_latency(setup, directory / DENSE_ONNX, files, report)
                batch, every = setup.settings.latency_batch, {"dense": directory / DENSE_ONNX, **files}
                memory = {name: resources(path.read_bytes(), batch)["memory"] for name, path in every.items()}
            profiled = {"dense": directory / DENSE_ONNX, "best": new / MODEL_ONNX}
            layers = layer_figures(setup, winner.widths, profiled)
        policy.save(new / POLICY)
        front = {f"{FRONT}{i}.json": outcome for i, outcome in enumerate(found.front, 1)}
        for name, outcome in front.items():
            front_policy(policy, outcome, setup.order).save(new / name)
        summary = result_of(setup, dense, winner, uniform, readings, memory, searched, proxy)
        summary |= {"layers": layers} | ({"front": front_lines(front)} if front else {})
        RunDirectory(new).write_json(RESULT, summary)
    for stale in set(directory.path.glob(f"{FRONT}*.json")) - {directory / name for name in front}:
        stale.unlink()
    _report(directory)
    return Result(policy, winner.model, directory.path, summary)


def _winner(settings: Settings, best: Candidate, uniform: Candidate) -> Candidate:
    """The better of the two, both of which are within the budget."""
    if best.accuracy >= uniform.accuracy:
        return best
    if not settings.finetune_epochs:
        log.warning(
            "without a fine-tune the uniform policy is the better one; what the search found, for a fine-tune of your "
            "own, is under `search` in result.json"
        )
    return uniform


def _report(directory: RunDirectory) -> None:
    try:
        write_report(directory.path)
    except Exception as error:  # what was found stays found
        log.warning("the report could not be written (`amc report %s` tries again): %s", directory.path, error)


@contextmanager
def _uniform_file(setup: Setup, winner: Candidate, uniform: Candidate, best: Path) -> Iterator[dict[str, Path]]:
    """The ONNX files to measure: the winner's, and the uniform policy's in a temporary place where it is another."""
    if winner.widths == uniform.widths:
        yield {"best": best}
        return
    with tempfile.TemporaryDirectory() as folder:
        other = Path(folder, "uniform.onnx")
        export_onnx(uniform.model, setup.loaded.inputs, other)
        yield {"best": best, "uniform": other}
