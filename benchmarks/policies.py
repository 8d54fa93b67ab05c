"""Policies whose end is known: drawn at random, fine-tuned to the end, and kept, for `scores.py` to be judged by.

    python benchmarks/policies.py --model resnet56 --weights resnet56.pt --data imagefolder:DIR

A keep ratio is drawn uniformly for each stage and scattered by a quarter from block to block, seed 0, and all are
projected onto half of the FLOPs; no search proposed them and no score was seen. (Ratios drawn block by block would
average out over the many blocks of a stage: all policies would be the same but for noise.) Fine-tuning is that of
`headline.py`, with one seed or `--seeds`. What a policy reached goes into `benchmarks/results/MODEL-policies.json` at
once, so the command can be stopped and started again, and several can share the work (`--shard 1/2`).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from headline import recovered, settings

from amc.catalog import PRECISIONS
from amc.evaluate import accuracy, batches_of
from amc.files import write_atomic
from amc.problem import Problem
from search.compose import compose
from search.settings import settings_from
from search.strategies.moves import stages

RESULTS = Path(__file__).parent / "results"
SCATTER = 0.25
WHAT = (
    "widths of the blocks' inner convolutions, accuracy on the val and test splits after two epochs of fine-tuning: "
    "means, and of each seed"
)


def drawn(problem: Problem, count: int) -> list[tuple[int, ...]]:
    """Policies of random keep ratios, projected onto the budget."""
    rng, channels = np.random.default_rng(0), np.array(problem.budget.dense)
    policies = []
    for _ in range(count):
        ratios = np.empty(len(channels))
        for stage in stages(problem):
            ratios[stage] = rng.uniform(0.1, 1.0) * np.exp(rng.normal(0.0, SCATTER, len(stage)))
        policies.append(problem.admit(np.clip(ratios * channels, 1, channels).tolist()))
    return policies


def load(model: str) -> dict[str, Any]:
    """The results so far."""
    path = RESULTS / f"{model}-policies.json"
    return json.loads(path.read_text()) if path.exists() else {"what": WHAT, "policies": []}


def policy_of(kept: dict[str, Any], name: str, widths: Sequence[int]) -> Any:
    """What is kept of a policy, to be added to."""
    for policy in kept["policies"]:
        if policy["name"] == name:
            return policy
    kept["policies"].append({"name": name, "widths": list(widths), "seeds": []})
    return kept["policies"][-1]


def main() -> None:
    """Fine-tunes every policy with every seed that it lacks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--model", "--weights", "--data"):
        parser.add_argument(name, required=True)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--precision", default="float32", choices=PRECISIONS)
    parser.add_argument("--count", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--shard", default="0/1", metavar="I/N")
    parser.set_defaults(whole=False, refitted=False)
    args = parser.parse_args()
    setup = compose(settings_from(settings(args)))
    index, of = map(int, args.shard.split("/"))
    for i, widths in list(enumerate(drawn(setup.problem, args.count)))[index::of]:
        name = f"r{i:02}"
        for seed in range(len(policy_of(load(args.model), name, widths)["seeds"]), args.seeds):
            model, _ = recovered(setup, setup.problem.named(widths), seed=seed)
            splits = {"val": setup.data.val, "test": setup.data.test}
            reached = {split: accuracy(model, batches_of(data)) for split, data in splits.items() if data is not None}
            kept = load(args.model)  # again: another process may have added to it
            policy = policy_of(kept, name, widths)
            policy["seeds"].append({"precision": args.precision, **reached})
            policy |= {split: round(float(np.mean([one[split] for one in policy["seeds"]])), 6) for split in reached}
            kept["policies"].sort(key=lambda policy: policy["name"])
            write_atomic(RESULTS / f"{args.model}-policies.json", json.dumps(kept, indent=1) + "\n")
            print(name, seed, widths, reached, flush=True)


if __name__ == "__main__":
    main()
