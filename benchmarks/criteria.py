"""How good is each importance criterion? One model, pruned uniformly by every one, scored without any training.

    python benchmarks/criteria.py --data imagefolder:DIR --model resnet20 --weights resnet20.pt
    python benchmarks/criteria.py --page

The first keeps its figures in `benchmarks/results/criteria-MODEL.json`, the second writes `docs/criteria.md` from all
of these. Scored are the same images of the search split for all criteria: as sliced, with batch norm recalibrated, with
the readers refitted by least squares, and with both. The calibration images are drawn from the training split.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path

import numpy as np
import torch

from amc.budget import Budget, parse_budget
from amc.catalog import CRITERIA
from amc.cost import analytic, spent
from amc.coupling import trace
from amc.data import IMAGENET_MEAN, IMAGENET_STD, load_data
from amc.evaluate import accuracy, in_memory, kept_units, recalibrate
from amc.importance import rank
from amc.models import load_model
from amc.reconstruct import gather, refit
from amc.slim import slim
from amc.verify import verify

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[1] / "docs" / "criteria.md"
COLUMNS = {
    "sliced": "as sliced",
    "recalibrated": "recalibrated",
    "refitted": "refitted",
    "both": "refitted, recalibrated",
    "seconds": "seconds to rank",
}

INTRODUCTION = """\
A criterion gives every group one vector for each of its *members*: the layers that produce the group's channels (`l1`,
`l2`, `fpgm`), their norms (`bn_scale`), or the layers that read the channels, which see them after batch norm and
activation (the criteria that need data). `taylor`, `fisher`, `hessian`, `thinet` and `lasso` judge a unit as a whole,
one vector a group. Each member is divided by its `normalize` (`none`, `mean`, `max`, `l2`), then members are
aggregated (`sum`, `mean`, `max`, `first`). A group that a criterion sees nothing of is ranked by `l1`, with a warning.
A criterion of your own is a function and a line: `examples/own_importance.py`.

The tables are of one draw of calibration images and of one width for all: differences of two points are noise. Two
epochs of fine-tuning leave little of them: the policy of ResNet-20 that `auto` found ([Benchmarks](benchmarks.md))
reaches 0.8626 ranked by `l1`, 0.8624 by `lasso`, 0.8596 by `wanda`, 0.8590 by `thinet` and 0.8584 by `fisher` with one
seed, and 0.8596 to 0.8626 by `l1` with three."""


def measure(args: argparse.Namespace) -> dict[str, object]:
    data = load_data(args.data, mean=args.mean, std=args.std, input_size=args.input_size, seed=0)
    assert data.train is not None
    loaded = load_model(args.model, weights=args.weights, data=data)
    dense = loaded.model
    structure = verify(dense, loaded.inputs, trace(dense, loaded.inputs, only=args.only))
    scored = in_memory(data.val, args.images)
    calibration = in_memory(data.train, args.calibration, batch=128)

    costs = analytic(structure)
    budget = Budget.of(structure.groups, costs, parse_budget(args.budget))
    widths = budget.project(budget.dense)
    named = {group.name: width for group, width in zip(structure.groups, widths, strict=True)}

    start = time.perf_counter()
    grams = gather(dense, structure, calibration)
    gathering = time.perf_counter() - start
    rows: dict[str, dict[str, float]] = {}
    for criterion in CRITERIA:
        seeds = range(args.random_seeds) if criterion == "random" else (0,)
        runs = []
        for seed in seeds:
            start = time.perf_counter()
            order = rank(dense, structure, criterion, batches=calibration, seed=seed)
            row = {"seconds": time.perf_counter() - start}
            kept = kept_units(order, named)
            candidate = slim(dense, structure, kept)
            row["sliced"] = accuracy(candidate, scored)
            recalibrate(candidate, calibration)
            row["recalibrated"] = accuracy(candidate, scored)
            candidate = slim(dense, structure, kept)
            refit(candidate, structure, grams, kept)
            row["refitted"] = accuracy(candidate, scored)
            recalibrate(candidate, calibration)
            row["both"] = accuracy(candidate, scored)
            runs.append(row)
        rows[criterion] = {column: round(float(np.mean([run[column] for run in runs])), 4) for column in COLUMNS}
        print(f"{criterion:20s}" + "".join(f"{COLUMNS[c]} {rows[criterion][c]:.3f}  " for c in COLUMNS), flush=True)
    return {
        "model": args.model,
        "budget": args.budget,
        "only": args.only,
        "dense": accuracy(dense, scored),
        "images": sum(len(labels) for _, labels in scored),
        "calibration": args.calibration,
        "random_seeds": args.random_seeds,
        "gather_seconds": round(gathering, 2),
        "costs": spent(costs, widths),
        "widths": named,
        "groups": len(structure.groups),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} thread(s), torch {torch.__version__}",
        "criteria": rows,
    }


def page() -> str:
    """The page of `docs/`, from the kept results."""
    lines = [
        "# Importance criteria",
        "",
        "Generated by `python benchmarks/criteria.py --page` from `benchmarks/results/criteria-*.json`.",
        "",
        INTRODUCTION,
        "",
        "| criterion | what it is |",
        "|---|---|",
        *(f"| `{name}` | {help_.replace('|', '&#124;')} |" for name, (help_, _) in CRITERIA.items()),
        "",
    ]
    for file in sorted(RESULTS.glob("criteria-*.json")):
        result = json.loads(file.read_text())
        rows = sorted(result["criteria"].items(), key=lambda item: -item[1]["both"])
        error = 100 * (0.25 / result["images"]) ** 0.5
        lines += [
            f"## {result['model']}, uniform at `{result['budget']}`, "
            + (", ".join(f"`{pattern}`" for pattern in result["only"]) + " alone" if result["only"] else "all groups"),
            "",
            f"Dense accuracy {result['dense']:.3f}. Accuracy on {result['images']:,} images of the search split "
            f"(standard error at most {error:.1f} points), without training; {result['calibration']} calibration "
            f"images. Patches for least squares: {result['gather_seconds']:.1f} s, once. `random`: mean over "
            f"{result['random_seeds']} seeds. Machine: {result['machine']}.",
            "",
            "| criterion | " + " | ".join(COLUMNS.values()) + " |",
            "|---|" + "---:|" * len(COLUMNS),
        ]
        for name, row in rows:
            accuracies = [f"{row[column]:.3f}" for column in COLUMNS if column != "seconds"]
            lines.append(f"| `{name}` | " + " | ".join([*accuracies, f"{row['seconds']:.1f}"]) + " |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="as `--data` of search.py")
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--weights")
    parser.add_argument("--budget", default="flops=0.5")
    parser.add_argument("--only", nargs="+", default=[], help="shell patterns: prune these groups alone")
    parser.add_argument("--name", help="of the kept results; default the model's")
    parser.add_argument("--mean", type=float, nargs="+", default=IMAGENET_MEAN)
    parser.add_argument("--std", type=float, nargs="+", default=IMAGENET_STD)
    parser.add_argument("--input-size", type=int, nargs=2, default=(32, 32))
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--calibration", type=int, default=512)
    parser.add_argument("--random-seeds", type=int, default=5)
    parser.add_argument("--page", action="store_true", help="write docs/criteria.md from the kept results")
    args = parser.parse_args()
    if args.data:
        RESULTS.mkdir(exist_ok=True)
        file = RESULTS / f"criteria-{args.name or Path(args.model).stem}.json"
        file.write_text(json.dumps(measure(args), indent=1) + "\n")
    if args.page:
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(page())


if __name__ == "__main__":
    main()
