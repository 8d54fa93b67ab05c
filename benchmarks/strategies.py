"""Which strategy, and when? All of them at equal trials, five seeds each, on problems that cost nothing to score.

    python benchmarks/strategies.py                     # what is not yet in benchmarks/results/strategies.jsonl
    python benchmarks/strategies.py --shard 1/4         # every fourth of the runs, from the second on
    python benchmarks/strategies.py --page              # docs/strategies.md and strategies.json, from what there is

A run is a line of that file, written when it ends, so a benchmark that was interrupted goes on where it stopped. The
embedded model (`--problems digits-0.5 digits-0.25 digits-latency`) takes about a second a policy.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # for `tests`, which is not installed

from amc.problem import Problem  # noqa: E402
from benchmarks.surrogate import NOISE, resnet20  # noqa: E402
from search.strategies import STRATEGIES, make_sampler  # noqa: E402
from search.study import Progress, open_study, search  # noqa: E402
from tests.synthetic import concave, staged  # noqa: E402

RAW = ROOT / "benchmarks" / "results" / "strategies.jsonl"
SUMMARY = RAW.with_suffix(".json")
PAGE = ROOT / "docs" / "strategies.md"
SEEDS, FIRST_SEED = 5, 100  # `auto` and its surrogate were designed on the seeds 0 to 4 of `concave` and `staged`
T95 = {3: 4.303, 4: 3.182, 5: 2.776}  # Student's t of so many values

PROBLEMS = {
    "concave": "20 groups that add up: extremely uneven optima, far from any tilt",
    "staged": "18 groups in three stages; neighbours interact in cost and accuracy, optima tilt either way",
    "noisy": "the same, each score off by a point (standard deviation); judged by the true accuracy",
    "deep": "54 groups in three stages, as in a ResNet-56 or deeper",
    "resnet20": "a surrogate of ResNet-20's fine-tuned accuracy (`benchmarks/surrogate.py`), each score off by 0.15 "
    "points; judged by the true accuracy",
    "digits-0.5": "the embedded model at `flops=0.5`, searched and judged by soft accuracy; the best is the best found",
    "digits-0.25": "the same at `flops=0.25`",
    "digits-latency": "the same at `latency=0.6`, within the latency table of a run",
}
EMBEDDED = {"digits-0.5": "flops=0.5", "digits-0.25": "flops=0.25", "digits-latency": "latency=0.6"}
CHEAP = ("concave", "staged", "noisy", "deep", "resnet20")
TABLE = RAW.with_name("digits-latency-table.json")
COUNTS = (30, 100, 300, 1000)
"""Trials after which a longer run says what it has found so far."""


def problem_of(name: str, seed: int) -> tuple[Problem, Callable[[Any], float], float | None]:
    """The problem, what a policy is truly worth, and the best that any is, where that is known."""
    makers: dict[str, Callable[..., tuple[Problem, float]]] = {
        "concave": partial(concave, 20),
        "staged": staged,
        "noisy": partial(staged, noise=0.01),
        "deep": partial(staged, 18),
        "resnet20": partial(resnet20, noise=NOISE),
    }
    if name in makers:
        problem, top = makers[name](seed=seed)
        clean = {"noisy": partial(staged, seed=seed), "resnet20": resnet20}.get(name, lambda: (problem, top))()[0]
        return problem, lambda policy: clean.evaluate(policy).accuracy, top
    problem = embedded(name)
    return problem, lambda policy: problem.evaluate(policy).score, None


@cache
def embedded(name: str) -> Problem:
    """One for all runs of a process: it remembers what policies scored. All have the same latency table, a kept one."""
    from search import build

    return build(budget=EMBEDDED[name], device=str(TABLE), threads=1)


def run(name: str, strategy: str, trials: int, seed: int) -> dict[str, Any]:
    """One search. `own_seconds`: CPU time of a trial beside its score; `curve`: what was found when."""
    problem, truth, top = problem_of(name, seed)
    curve: dict[int, float] = {}

    def on_trial(progress: Progress) -> None:
        if progress.trials in COUNTS and progress.best is not None:
            curve[progress.trials] = truth(progress.best.widths)

    start = time.process_time()
    study = open_study(None, "benchmark", make_sampler(strategy, problem, trials=trials, seed=seed))
    result = search(problem, study, trials=trials, seed=seed, on_trial=on_trial)
    seconds = time.process_time() - start
    assert result.best is not None
    return {
        "problem": name,
        "strategy": strategy,
        "trials": trials,
        "seed": seed,
        "accuracy": truth(result.best.widths),
        "top": top,
        "scored": result.trials,
        "own_seconds": None if name in EMBEDDED else round(seconds / result.trials, 4),  # others cost nothing to score
        "curve": curve,
    }


def kept() -> dict[tuple[str, str, int, int], dict[str, Any]]:
    """The runs that ended, by problem, strategy, trials and seed."""
    lines = RAW.read_text().splitlines() if RAW.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]  # the last may have been cut off
    return {(row["problem"], row["strategy"], row["trials"], row["seed"]): row for row in rows}


def interval(values: list[float]) -> list[float | None]:
    """Mean, and half of its 95 % interval over the seeds; None where there are too few for one."""
    half = None
    if len(values) in T95:
        half = round(T95[len(values)] * float(np.std(values, ddof=1)) / len(values) ** 0.5, 3)
    return [round(float(np.mean(values)), 3), half]


def median(seconds: list[float | None]) -> float | None:
    """Of those that are known."""
    known = [second for second in seconds if second is not None]
    return round(float(np.median(known)), 3) if known else None


def summary() -> list[dict[str, Any]]:
    """A row for each problem, trials and strategy: points below the best, and above `random` seed by seed."""
    runs = kept()
    rows = []
    for problem, trials in sorted({(key[0], key[2]) for key in runs}):
        here = {(key[1], key[3]): row for key, row in runs.items() if (key[0], key[2]) == (problem, trials)}
        for strategy in STRATEGIES:
            mine = {seed: row for (name, seed), row in here.items() if name == strategy}
            if not mine:
                continue
            found = max(row["accuracy"] for row in here.values())
            tops = {seed: row["top"] if row["top"] is not None else found for seed, row in mine.items()}
            below = [100 * (tops[seed] - row["accuracy"]) for seed, row in mine.items()]
            over = [
                100 * (row["accuracy"] - here["random", seed]["accuracy"])
                for seed, row in mine.items()
                if ("random", seed) in here
            ]
            rows.append(
                {
                    "problem": problem,
                    "trials": trials,
                    "strategy": strategy,
                    "seeds": len(mine),
                    "scored": round(float(np.mean([row["scored"] for row in mine.values()])), 1),
                    "below_best": interval(below),
                    "over_random": interval(over) if over else None,
                    "own_seconds": median([row["own_seconds"] for row in mine.values()]),
                }
            )
    return rows


INTRODUCTION = """\
What the tables show at 30 and 100 trials. Where intervals overlap, nothing is said to be better:

- **`auto`** has the lowest mean, or one whose interval meets the lowest's, on every problem at both counts. It scores
  the uniform and the tilted policies; then, of many children of the best, what a Gaussian process expects most of.
- **`sensitivity`** is level with `auto` on `concave` and `staged` at 100 trials, and ends by itself before. It first
  spends two trials a group on probes: below about three trials a group (30 here; 100 on `deep`) it is no choice.
- **`greedy`** is level with `auto` on `deep` at a fraction of its work. Where the optimum is far from uniform
  (`concave`), one exchange at a time does not get there.
- **`evolution`** and **`anneal`** have means behind `auto`'s everywhere at 100 trials. There they are level with `tpe`
  and `cmaes` on the smaller problems, and before `tpe` on `deep`.
- **`nsga2`** can't be told from `random` at 30 trials on any of these problems. At 100 it is ahead on all but
  `digits-0.25` and `digits-latency`, where its means are.
- **`ddpg`** at 100 trials is above `random` on `staged`, `noisy`, `deep`, `resnet20` and `digits-0.5`, and at 30 on
  `staged`, `deep` and `resnet20`; on `concave`, `digits-0.25` and `digits-latency` its mean at 100 is, and the interval
  of the difference holds 0. At 30 on `digits-0.25` it is below: give it 100 trials or more.
- **`digits-latency`** leaves six groups few policies that are worth their latency: all runs of 100 trials end in one of
  three scores. `auto` finds the best of them with every seed, `nsga2` with three of five, `ddpg` and `random` with one.
- **`tilt`** and **`uniform`**, five trials and one, beat 100 random ones on `deep` and lose to 30 on `concave`.
- A point of score noise takes `auto` at 100 trials from about 0.1 points below the best to 1 (`staged`, `noisy`).

But for the embedded model's (`digits`), these problems have known optima and cost nothing to score. They say how well a
strategy climbs, not that a network's score is worth climbing. Points are hundredths of accuracy (`digits`: of soft
accuracy); `±` is half a 95 % interval of the mean over seeds (Student). `auto`, `sensitivity` and their surrogate were
designed on `concave` and `staged`, with other seeds than the tables'; `noisy` and `deep` played no part in it, and
`resnet20` rests on 22 policies that lie along tilts, where `tilt` is at home. What all strategies take of the processor
up to 2,000 trials, storing included, is in [Reliability](reliability.md).
"""


def page(rows: list[dict[str, Any]]) -> str:
    """The page of `docs/`."""
    lines = [
        "# Strategies",
        "",
        "Generated by `python benchmarks/strategies.py --page` from `benchmarks/results/strategies.jsonl`.",
        "",
        INTRODUCTION,
        "| strategy | what it is |",
        "|---|---|",
        *(f"| `{name}` | {text} |" for name, (text, _) in STRATEGIES.items()),
    ]
    for problem, text in PROBLEMS.items():
        here = [row for row in rows if row["problem"] == problem]
        counts = sorted({row["trials"] for row in here})
        if not here:
            continue
        lines += ["", f"## {problem}: {text}", "", "Points below the best policy; in brackets, above `random`.", ""]
        lines += [
            "| strategy | " + " | ".join(f"{count} trials" for count in counts) + " | ms a trial beside scoring |"
        ]
        lines += ["|---|" + "---:|" * (len(counts) + 1)]

        def of(strategy: str, count: int, here: list[dict[str, Any]] = here) -> dict[str, Any] | None:
            return next((row for row in here if (row["strategy"], row["trials"]) == (strategy, count)), None)

        named = sorted(
            {row["strategy"] for row in here},
            key=lambda s: (of(s, 100) or of(s, counts[0]) or here[0])["below_best"][0],
        )
        for strategy in named:
            found = [of(strategy, count) for count in counts]
            costs = [row["own_seconds"] for row in found if row and row["own_seconds"] is not None]
            cost = f"{1000 * max(costs):.0f}" if costs else ""
            lines.append(f"| `{strategy}` | " + " | ".join(map(_cell, found)) + f" | {cost} |")
    return "\n".join([*lines, ""])


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    text = _with_interval(row["below_best"], "")
    if row["over_random"] and row["strategy"] != "random":
        text += f" ({_with_interval(row['over_random'], '+')})"
    if row["seeds"] < SEEDS:
        text += f", {row['seeds']} seed{'s' * (row['seeds'] > 1)}"
    return text if row["scored"] >= row["trials"] else f"{text}, ended at {row['scored']:g}"


def _with_interval(found: list[float | None], sign: str) -> str:
    mean, half = found
    return f"{mean:{sign}.2f}" + ("" if half is None else f" ± {half:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=CHEAP)
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=[s for s in STRATEGIES if s != "gp"])
    parser.add_argument("--trials", nargs="+", type=int, default=[30, 100])
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--shard", default="0/1", metavar="I/N")
    parser.add_argument("--page", action="store_true", help="only write the summary and the page")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if not args.page:
        index, of = map(int, args.shard.split("/"))
        jobs = [
            (problem, strategy, trials, seed)
            for trials in args.trials
            for problem in args.problems
            for strategy in args.strategies
            for seed in range(FIRST_SEED, FIRST_SEED + args.seeds)
        ]
        for job in jobs[index::of]:
            if job not in kept():
                row = run(*job)
                with RAW.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(*job, f"{row['accuracy']:.4f}", flush=True)
    rows = summary()
    SUMMARY.write_text(json.dumps(rows, indent=1) + "\n")
    PAGE.write_text(page(rows))


if __name__ == "__main__":
    main()
