"""What a run leaves behind: the slim models, the policy, the result and the report."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from amc.errors import AmcError
from amc.export import export_onnx
from amc.policy import Policy, load_policy
from amc.weights import save_weights
from latency.memory import resources
from search.compose import Setup
from search.display import Display
from search.finish import Candidate, measure_latency
from search.layers import layer_figures
from search.numbers import metric_name
from search.report import notebook_html, write_report
from search.result import front_lines, front_policy, policy_of, result_of
from search.run_directory import DENSE_ONNX, FRONT, MODEL, MODEL_ONNX, POLICY, RESULT, RunDirectory
from search.settings import Settings
from search.start import versions
from search.study import SearchResult

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


def finished_result(path: Path, display: Display) -> Result:
    """The result of a finished run, from its files."""
    display.say(f"the run in {path} is finished; there is nothing to go on with")
    return Result(load_policy(path / POLICY), None, path, RunDirectory(path).read_json(RESULT))


def conclude(
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
    winner = _winner(setup.settings, found, best, uniform)
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
        with display.bar("exporting and measuring") as shown:
            save_weights(winner.model, new / MODEL)
            export_onnx(winner.model, setup.loaded.inputs, new / MODEL_ONNX)
            with _uniform_file(setup, winner, uniform, new / MODEL_ONNX) as files:
                readings = measure_latency(setup, directory / DENSE_ONNX, files, shown)
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
    report(directory)
    return Result(policy, winner.model, directory.path, summary)


def _winner(settings: Settings, found: SearchResult, best: Candidate, uniform: Candidate) -> Candidate:
    """The better of the two that are within the budget as measured."""
    if found.alone or best.accuracy >= uniform.accuracy:
        return best
    if not settings.finetune_epochs:
        log.warning(
            "without a fine-tune the uniform policy is the better one; what the search found, for a fine-tune of your "
            "own, is under `search` in result.json"
        )
    return uniform


def report(directory: RunDirectory) -> None:
    """Writes the page that shows the run; that it can't be written is only said."""
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
