"""The search of a run: its study and its sampler, and rounds until the budget is met as measured."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from functools import partial

import optuna
from optuna.samplers import BaseSampler

from amc.errors import UsageError
from amc.weights import weights_sha256
from search.anchors import Chooser
from search.compose import Setup
from search.display import Display
from search.executor import done
from search.front import FrontSampler, begin, front_problem, with_front
from search.live import watching
from search.run_directory import STUDY, TABLE, RunDirectory
from search.settings import Settings, shared_names
from search.settle import FINALISTS, ranked, settle
from search.storage import Leases, copy_study, open_shared, open_storage, released
from search.strategies import make_sampler
from search.strategies.moves import MovingSampler
from search.study import Progress, SearchResult, open_study, search
from search.tensorboard import FOLDER as SCALARS
from search.tensorboard import Scalars
from search.warm import policies, warm_start

log = logging.getLogger("amc")

CHECKING = "checking the score by longer fine-tunes"


def search_to_budget(
    directory: RunDirectory, setup: Setup, display: Display
) -> tuple[Setup, SearchResult, dict[str, object]]:
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

    def go_on(setup: Setup, trials: int | None, time_limit: float | None, *, half: bool = False) -> SearchResult:
        with watching(setup, study, display, trials, time_limit, passing=half) as view:

            def on_trial(progress: Progress) -> None:
                best, latest = progress.best, progress.latest
                done = progress.trials + progress.failed
                reward = f"reward {latest.reward:.4f}" if latest else "failed"
                log.info("trial %d: %s, best %s", done, reward, f"{best.reward:.4f}" if best else "none")
                view.trial(progress)
                if scalars:
                    scalars.catch_up(study)

            return search(
                front or setup.problem,
                study,
                trials=trials // 2 if trials and half else trials,
                time_limit=time_limit / 2 if time_limit and half else time_limit,
                seed=settings.seed,
                on_trial=on_trial,
                executor=setup.executor,
                leases=leases,
            )

    def search_round(setup: Setup, trials: int | None, time_limit: float | None) -> SearchResult:
        study.sampler = chosen = sampler(setup)
        ends = time_limit and time_limit * (1 - chooser.share)
        if isinstance(chosen, MovingSampler) and chooser.pauses(trials):
            if not chooser.begun:
                go_on(setup, trials, ends, half=True)
            with display.bar(CHECKING) as report:
                chooser.learn(setup.problem, study, trials, report)
            chosen.worth = partial(chooser.worth, setup.problem)
        found = go_on(setup, trials, ends)
        if front:
            return with_front(found, study, front, setup.problem)
        with display.bar(CHECKING) as report:
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
    # Ray's workers need not be where the training data are.
    executor = setup.executor if settings.engine == "local" else None
    return Chooser(
        directory,
        executor.submit if executor else lambda widths, steps: done(partial(evaluator.recovered, widths, steps)),
        at_once=executor.workers if executor else 1,
        score_steps=settings.score_steps,
        share=share,
        rest=rest,
    )


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
        defaults = Settings().as_json()  # of what an earlier version knew nothing of
        if theirs is None:
            study.set_user_attr("run", mine)
    for name, value in mine.items():
        if theirs is not None and theirs.get(name, defaults.get(name)) != value:
            raise UsageError(
                f"the study {settings.study!r} in the database was begun with another {name} ({theirs.get(name)!r}, "
                f"not {value!r}); processes that share a study need the same, and another search another --study NAME"
            )
    return study, leases
