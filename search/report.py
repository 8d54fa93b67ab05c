"""The report of a run: one page that says what was lost, what was gained, where the channels went, and what to do next.

It is made from the files of the run directory alone, so it can be made again, elsewhere and later. It needs no network
and no script, and forbids itself both: the directory may come from a stranger. What was not measured is left out and
said; nothing is made up.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amc.files import write_atomic
from search.commands import apply_command, changed, commands
from search.drawing import Chart
from search.finished import BudgetLine, FinishedRun, ModelFigures, RunResult, TrialRecord, read_run
from search.numbers import (
    NAMES,
    UNITS,
    WEAK,
    amount,
    difference_text,
    duration,
    maximized,
    name_of,
    wilson,
    worth_text,
)
from search.settings import Settings

TOP_TRIALS = 10
PARTS = ("front", "channels", "layers", "search", "costs", "trust")
"""Of the page that hold figures."""


def write_report(path: Path) -> None:
    """Writes `report.html` from the files of a finished run directory.

    Raises:
        RunError: there is no finished run, or its result can't be read. What else can't be read is named in the page.
    """
    write_run_report(read_run(path))


def write_run_report(run: FinishedRun) -> Path:
    """Writes `report.html` of a run that was read; returns where it is."""
    page = run.path / "report.html"
    write_page(page, "report.html.j2", report_of(run))
    return page


def write_page(path: Path, template: str, values: Mapping[str, Any]) -> None:
    """Renders a template of ours to a file."""
    write_atomic(path, render(template, values).encode("utf-8", "replace"))


def notebook_html(path: Path) -> str:
    """What a notebook shows of a finished run: the verdict, the figures side by side, and the charts."""
    return render("notebook.html.j2", report_of(read_run(path)))


def render(template: str, values: Mapping[str, Any]) -> str:
    """A template of ours as text; every text in `values` is escaped, but figures."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("search", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(worth=worth_text, amount=amount, spent=spent_text, cost_name=name_of, duration=duration)
    return environment.get_template(template).render(**values)


def maximized_in(result: RunResult, metric: str) -> str:
    """What the search of a run maximized, in words; the first versions knew one reward."""
    return maximized(result.settings.get("reward", "accuracy"), metric, bool(result.front))


def report_of(run: FinishedRun) -> dict[str, Any]:
    """What the page shows, by the names of the template."""
    from search import figures

    result, trials = run.result, run.trials
    resolved = run.settings.resolved
    widths = [(name, count) for name, count in run.channels.items() if name in result.best.widths]
    metric = result.search.metric
    what = maximized_in(result, metric)
    charts: dict[str, list[Chart]] = {part: [] for part in PARTS}
    charts["layers"] = [chart for kind in ("flops", "ms") if (chart := figures.layer_bars(result.layers, kind))]
    if widths:
        charts["channels"] = [figures.keep_ratios(dict(widths), result.best.widths, result.uniform.widths)]
    if trials:
        charts["search"] = [figures.convergence({run.name: trials}, by, what) for by in ("trial", "minute")]
        for cost in trial_costs(result, trials):
            searched = result.front and cost == result.budget[0].cost
            chart = figures.trade_off(cost, trials, dense_cost(result, cost), metric)
            charts["front" if searched else "costs"].append(chart)
    if len(result.proxy.anchors) > 1:
        charts["trust"].append(
            figures.proxy_scatter(result.proxy.anchors, result.proxy.spearman, metric, result.proxy.steps)
        )
    predicted = predictions(result)
    if predicted:
        charts["trust"].append(figures.latency_scatter(predicted, conditions(result.settings)))
    if run.sensitivity and run.sensitivity.groups:
        charts["trust"].append(figures.sensitivity_map(run.sensitivity, metric))
    return {
        "title": f"{result.settings.get('model', 'model')} on {result.settings.get('data', 'data')}",
        "run": run,
        "result": result,
        "metric": metric,
        "what": what,
        "timed": any(layer.dense_ms is not None for layer in result.layers),
        "verdict": verdict(run),
        "met": all(line.met for line in result.budget),
        "recovery": recovery(result.settings),
        "weak": result.proxy.spearman is not None and result.proxy.spearman < WEAK,
        "columns": columns(result),
        "rows": rows(run),
        "widths": widths,
        "charts": charts,
        "top_trials": sorted(trials, key=lambda t: (-t.reward, t.number))[:TOP_TRIALS],
        "trial_costs": trial_costs(result, trials),
        "dense_predicted": dense_cost(result, "latency"),
        "missing": missing(run),
        "frozen": resolved.frozen,
        "commands": commands(run),
        "apply_front": apply_command(run, result.front[0].policy) if result.front else None,
        "settings": settings_rows(run),
        "notes": run.notes,
    }


def verdict(run: FinishedRun) -> str:
    """What a person wants to know, in one sentence."""
    result, best, dense = run.result, run.result.best, run.result.dense
    parts = [
        f"{_share(line.achieved, line, result)} of the {name_of(line.cost)}"
        for line in result.budget
        if line.achieved is not None and line.cost != "latency"
    ]
    if not parts and best.flops is not None and dense.flops:
        parts.append(f"{100 * best.flops / dense.flops:.1f} % of the FLOPs")
    if best.speedup is not None:
        parts.append(f"{best.speedup:.2f} times the speed" + (" (slower)" if best.speedup < 1 else ""))
    unseen = best.test_accuracy is not None and dense.test_accuracy is not None
    now = best.test_accuracy if unseen else best.accuracy
    before = dense.test_accuracy if unseen else dense.accuracy
    assert now is not None
    assert before is not None
    where = "the unseen split" if unseen else "the search split"
    metric = result.search.metric
    worth = worth_text(now, metric) if metric == "accuracy" else f"{metric} {worth_text(now, metric)}"
    sentence = (
        f"{_listed(parts) or 'A slim model'}, at {worth} on {where}: "
        f"{difference_text(now, before, metric)} against the dense model"
    )
    ours, theirs = interval(run, best), interval(run, dense)
    if ours and theirs and ours[0] <= theirs[1] and theirs[0] <= ours[1]:
        sentence += " (their 95 % intervals overlap)"
    return sentence + f"; {against_uniform(result)}.{_broken(result)}"


def recovery(settings: Mapping[str, Any]) -> str:
    """What was done to both policies after the search."""
    epochs = settings.get("finetune_epochs", Settings.finetune_epochs)
    if not epochs:
        return "Neither policy was fine-tuned (--finetune-epochs 0); more is to be had from both."
    return f"Both policies were fine-tuned the same way, for {epochs} epoch{'' if epochs == 1 else 's'}."


def _broken(result: RunResult) -> str:
    """The limits that the policy is not known to keep, in a sentence of their own."""
    over = [name_of(line.cost) for line in result.budget if line.met is False]
    unknown = [name_of(line.cost) for line in result.budget if line.met is None]
    said = f" It is above the limit of {_listed(over)}." if over else ""
    return said + (f" Whether it keeps the limit of {_listed(unknown)} was not measured." if unknown else "")


def _listed(parts: Sequence[str]) -> str:
    """`a, b and c`."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def _share(value: float, line: BudgetLine, result: RunResult) -> str:
    """A part of a budget as a share of the dense model's cost."""
    return f"{100 * value / (dense_cost(result, line.cost) or line.limit / line.fraction):.1f} %"


def spent_text(value: float, line: BudgetLine, result: RunResult) -> str:
    """A part of a budget: an amount; of latency, a share of the dense model's, as it was measured in pairs."""
    share = _share(value, line, result)
    return f"{share} of dense" if line.cost == "latency" else f"{amount(value, line.cost)} ({share})"


def against_uniform(result: RunResult) -> str:
    """How the search did against keeping the same share everywhere."""
    if result.best.source == "uniform":
        return "the uniform policy ended better than the searched one, so it is what you get"
    if result.best.widths and result.best.widths == result.uniform.widths:
        return "it is the uniform policy: the search found none that it takes for better"
    difference = difference_text(result.best.accuracy, result.uniform.accuracy, result.search.metric)
    return f"on the search split, {difference} against the uniform policy at the same budget"


def interval(run: FinishedRun, model: ModelFigures) -> tuple[float, float] | None:
    """The 95 % interval of an accuracy on the unseen split, where the number of examples is known."""
    examples, value = run.settings.resolved.test_examples, model.test_accuracy
    counted = run.result.search.metric == "accuracy" and value is not None and 0 <= value <= 1
    return wilson(value, examples) if examples and counted and value is not None else None


def columns(result: RunResult) -> list[tuple[str, str, ModelFigures]]:
    """The models of the table: key in `result.json`, heading, figures."""
    best = {"search": "best (searched)", "uniform": "best (uniform)"}.get(result.best.source or "", "best")
    return [("dense", "dense", result.dense), ("best", best, result.best), ("uniform", "uniform", result.uniform)]


@dataclass(frozen=True)
class Cell:
    """A number of the table. key: where it is in `result.json`; value: what is there; more: a line under it."""

    key: str
    value: float | None
    text: str
    more: str = ""


def rows(run: FinishedRun) -> list[tuple[str, list[Cell]]]:
    """The lines of the table; a line of which nothing was measured is left out."""
    examples = run.settings.resolved.test_examples
    metric = run.result.search.metric
    unseen = f"{metric}, unseen split{f' ({examples:,} examples)' if examples else ''}"
    found = [
        (unseen, [_accuracy(run, key, model, "test_accuracy") for key, _, model in columns(run.result)]),
        (f"{metric}, search split", [_accuracy(run, key, model, "accuracy") for key, _, model in columns(run.result)]),
    ]
    for cost in NAMES:
        field = "latency_ms" if cost == "latency" else cost
        found.append((name_of(cost), [_cost(run.result, key, m, field, cost) for key, _, m in columns(run.result)]))
    found.append(("latency, predicted", [_predicted(key, model) for key, _, model in columns(run.result)]))
    found.append(("speed-up, measured in pairs", [_speedup(key, model) for key, _, model in columns(run.result)]))
    return [(name, cells) for name, cells in found if any(cell.value is not None for cell in cells)]


def _accuracy(run: FinishedRun, key: str, model: ModelFigures, field: str) -> Cell:
    value = getattr(model, field)
    bounds = interval(run, model) if field == "test_accuracy" else None
    more = f"{100 * bounds[0]:.2f} to {100 * bounds[1]:.2f}" if bounds else ""
    metric = run.result.search.metric
    return Cell(f"{key}.{field}", value, "–" if value is None else worth_text(value, metric), more)


def _cost(result: RunResult, key: str, model: ModelFigures, field: str, cost: str) -> Cell:
    value, dense = getattr(model, field), getattr(result.dense, field)
    share = f"{100 * value / dense:.1f} % of dense" if value is not None and dense and key != "dense" else ""
    return Cell(f"{key}.{field}", value, "–" if value is None else amount(value, cost), share)


def _predicted(key: str, model: ModelFigures) -> Cell:
    value = model.latency_predicted_ms
    return Cell(f"{key}.latency_predicted_ms", value, "–" if value is None else amount(value, "latency"))


def _speedup(key: str, model: ModelFigures) -> Cell:
    bounds = model.speedup_ci95
    more = f"{bounds[0]:.2f} to {bounds[1]:.2f}" if bounds else ""
    return Cell(f"{key}.speedup", model.speedup, "–" if model.speedup is None else f"{model.speedup:.2f}×", more)


def dense_cost(result: RunResult, cost: str) -> float | None:
    """The dense model's cost, where it was measured; of latency, by the table that predicted the trials'."""
    predicted = next((line.limit / line.fraction for line in result.budget if line.cost == cost == "latency"), None)
    value = predicted or (result.dense.latency_ms if cost == "latency" else getattr(result.dense, cost, None))
    return value if isinstance(value, int | float) and value > 0 else None


def trial_costs(result: RunResult, trials: Sequence[TrialRecord]) -> list[str]:
    """The costs that every trial stored."""
    known = dict.fromkeys([*UNITS, *(line.cost for line in result.budget)])
    return [cost for cost in known if trials and all(cost in trial.costs for trial in trials)]


def predictions(result: RunResult) -> dict[str, tuple[float, float]]:
    """Predicted and measured latency, ms, of the models that have both; of one policy, once."""
    same = result.best.widths == result.uniform.widths
    shown = {"best, uniform": result.best} if same else {"best": result.best, "uniform": result.uniform}
    return {
        name: (model.latency_predicted_ms, model.latency_ms)
        for name, model in shown.items()
        if model.latency_predicted_ms is not None and model.latency_ms is not None
    }


def conditions(settings: Mapping[str, Any]) -> str:
    """How latency was measured."""
    batch, threads = (settings.get(f"latency_{name}", 1) for name in ("batch", "threads"))
    return f"Batch {batch}, {threads} thread{'' if threads == 1 else 's'}; on the dashed line they agree"


def missing(run: FinishedRun) -> list[str]:
    """What this run did not measure."""
    result = run.result
    absent = {
        "the interval of the accuracy (the number of test examples is not recorded)": not (
            result.best.test_accuracy is None or run.settings.resolved.test_examples
        ),
        "accuracy on an unseen split": result.best.test_accuracy is None,
        "latency": result.best.latency_ms is None,
        "predicted latency": result.best.latency_predicted_ms is None,
        "the score of the search against fine-tuned accuracy": result.proxy.spearman is None,
        "how sensitive each group is (a longer search looks, and amc sensitivity does at any time)": (
            run.sensitivity is None
        ),
    }
    return [what for what, is_absent in absent.items() if is_absent]


def settings_rows(run: FinishedRun) -> list[tuple[str, str, bool]]:
    """Every setting: name, value, and whether it differs from the default."""
    different = {name for name, _ in changed(run.result.settings)}
    return [(name, _shown(value), name in different) for name, value in run.result.settings.items()]


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value)) or "–"
    return "–" if value is None else str(value)


def dense_id(run: FinishedRun) -> str:
    """What tells whether two runs pruned the same dense model."""
    if run.policy:
        return run.policy.model.weights_sha256
    return hashlib.sha256(run.result.dense.model_dump_json().encode()).hexdigest()
