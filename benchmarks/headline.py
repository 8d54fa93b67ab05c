"""Does searching pay? Policies of equal FLOPs by our strategies, plain rules and peers, all fine-tuned the same way.

    python benchmarks/headline.py search --model resnet20 --weights resnet20.pt --data imagefolder:DIR --strategy auto
    python benchmarks/headline.py finetune --model resnet20 --weights resnet20.pt --data imagefolder:DIR --seeds 3
    python benchmarks/summary.py

`search` finds a policy by a strategy of ours, by a rule (`uniform`, `global-l1`, `global-bn_scale`: one threshold for
all layers) or by a peer (`fastnas`, `nni`, `torch-pruning`: `benchmarks/peers.py` says what to install), and keeps it
with its search time (of the processor: other work on the machine changes it little) in
`benchmarks/results/headline-MODEL.json`; a search of ours leaves its run in `runs/`, and goes on there. `finetune`
trains every policy of that file for every seed that it lacks, so both can be stopped and started again. The last writes
`docs/benchmarks.md`.

Only channels inside blocks are pruned, as all peers do; with `--whole`, also those of the residual stream, and the
policy is called `NAME-whole`. A plain network has no such stream, and all its channels may go. Fine-tuning starts from
the plain slice (channels by L1), or with `--refitted` from the least-squares weights of `--reconstruct`, kept as of
`NAME-refitted`: two epochs of SGD with Nesterov momentum 0.9 and weight decay 1e-4, one-cycle rate peaking at 0.02
after a tenth, batches of 128, one random crop a batch (padding 4) and a flip an image. Accuracy is on the test split.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peers import PEERS
from torch import nn

from amc.catalog import PRECISIONS
from amc.data import IMAGENET_MEAN, IMAGENET_STD
from amc.evaluate import accuracy, batches_of
from amc.files import write_atomic
from amc.finetune import Batch, Split, train
from amc.layout import arranged
from amc.seeding import seeded
from search import run
from search.compose import Setup, compose
from search.settings import settings_from
from search.strategies import STRATEGIES
from search.strategies.uniform import uniform_policy

RESULTS = Path(__file__).parent / "results"
INNER, PLAIN = ("*.conv1:out",), ("plain20",)
BUDGET = "flops=0.5"
EPOCHS, BATCH, RATE, RISE = 2, 128, 0.02, 0.1


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What every search here has in common."""
    return {
        "model": args.model,
        "weights": args.weights,
        "data": args.data,
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
        "budget": BUDGET,
        "only": () if args.whole or args.model in PLAIN else INNER,
        "reconstruct": args.refitted,
        "threads": args.threads,
        "precision": args.precision,
    }


# ---- search


def search(args: argparse.Namespace) -> None:
    """Finds one policy, and keeps it."""
    earlier = load(args.model)["policies"][args.warm_start]["search_seconds"] if args.warm_start else 0.0
    start = time.process_time()
    if args.strategy in RULES:
        widths, note = RULES[args.strategy](compose(settings_from(settings(args)))), {}
    else:
        widths, note = searched(args)
    kept = load(args.model)
    policy = {"widths": widths, "search_seconds": time.process_time() - start, **note, "test": {}}
    policy["search_seconds"] += earlier
    kept["policies"][name_of(args)] = policy
    save(args.model, kept)
    print(name_of(args), widths)


def name_of(args: argparse.Namespace) -> str:
    """The name of the policy in the results."""
    return (args.name or args.strategy) + ("-whole" if args.whole else "")


def searched(args: argparse.Namespace) -> tuple[dict[str, int], dict[str, Any]]:
    """What a strategy of ours finds, and what is worth noting of its run, which goes on if it is there."""
    limits = {"trials": args.trials} if args.trials else {"time_limit": args.time_limit}
    limits |= {"score_steps": args.score_steps} if args.score_steps else {}
    limits |= {"anchor_share": args.anchor_share} if args.anchor_share is not None else {}
    limits |= {"warm_start": [str(run_of(args, args.warm_start))]} if args.warm_start else {}
    out = run_of(args, name_of(args))
    resumed = out.exists()
    more = {"strategy": args.strategy, "seed": args.seed, "finetune_epochs": 0, "workers": args.workers, **limits}
    found = run(out=out, resume=resumed, **settings(args), **more).summary
    note = {"trials": found["search"]["trials"], "spearman": found["proxy"]["spearman"]}
    note |= {"warm_start": args.warm_start} if args.warm_start else {}
    note |= {"search_seconds": found["search"]["seconds"]} if resumed else {}  # of the clock, of all its parts
    return found["search"]["widths"], note  # nothing is fine-tuned yet, so which is best is not known


def run_of(args: argparse.Namespace, name: str) -> Path:
    """The run that found a policy."""
    return Path("runs", f"headline-{args.model}-{name}")


def uniform(setup: Setup) -> dict[str, int]:
    """The widths that keep the same share everywhere."""
    return setup.problem.named(uniform_policy(setup.problem))


def one_threshold(criterion: str, setup: Setup) -> dict[str, int]:
    """Widths that one threshold on the importance of all channels gives, the highest that meets the budget."""
    scores = {}
    for group in setup.problem.groups:
        layer = setup.loaded.model.get_submodule(group.name)
        if criterion == "bn_scale":
            layer = setup.loaded.model.get_submodule(group.name.replace("conv", "bn"))
            scores[group.name] = layer.weight.detach().abs().numpy()
        else:
            scores[group.name] = layer.weight.detach().abs().mean(dim=(1, 2, 3)).numpy()

    def widths(threshold: float) -> list[int]:
        return [max(int((scores[g.name] > threshold).sum()), g.floor) for g in setup.problem.groups]

    thresholds = sorted(np.concatenate(list(scores.values())).tolist())
    low, high = 0, len(thresholds) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if setup.problem.budget.met(widths(thresholds[middle])) else (middle + 1, high)
    return setup.problem.named(widths(thresholds[low]))


RULES: dict[str, Callable[[Setup], dict[str, int]]] = {
    "uniform": uniform,
    "global-l1": partial(one_threshold, "l1"),
    "global-bn_scale": partial(one_threshold, "bn_scale"),
    **PEERS,
}


# ---- fine-tune


def finetune(args: argparse.Namespace) -> None:
    """Trains what has no result yet."""
    setup = compose(settings_from(settings(args)))
    assert setup.data.test is not None
    full = setup.costs["flops"]([group.channels for group in setup.problem.groups])
    for seed in range(args.seeds):
        for name, policy in load(args.model)["policies"].items():
            under = f"{name}-refitted" if args.refitted else name
            done = load(args.model)["policies"].get(under, {"test": {}})["test"]
            if str(seed) in done or (args.only and name not in args.only):
                continue
            model, widths = recovered(setup, policy["widths"], seed)
            reached = accuracy(model, batches_of(setup.data.test))
            print(under, seed, reached, flush=True)
            kept = load(args.model)  # again: another process may have added to it
            entry = kept["policies"].setdefault(under, policy | {"test": {}})
            entry["flops"] = setup.costs["flops"](setup.problem.widths(widths)) / full
            entry["test"][str(seed)] = reached
            save(args.model, kept)
    if "dense" not in load(args.model):
        reached = accuracy(setup.loaded.model, batches_of(setup.data.test))
        save(args.model, load(args.model) | {"dense": reached})


def recovered(setup: Setup, named: Mapping[str, int], seed: int) -> tuple[nn.Module, dict[str, int]]:
    """The slim model, fine-tuned by the recipe at the head of this file, and all widths: unnamed groups are whole."""
    widths = {group.name: named.get(group.name, group.channels) for group in setup.problem.groups}
    model, split = setup.evaluator.candidate(widths), setup.data.train
    assert split is not None
    steps = EPOCHS * (len(split) // BATCH)
    with seeded(seed, "headline"):
        batches, precision = drawn(split, steps, seed), setup.evaluator.settings.precision
        train(arranged(model, torch.channels_last), batches, steps=steps, lr=RATE, precision=precision)
    return model, widths


def drawn(split: Split, steps: int, seed: int) -> Iterator[Batch]:
    """Batches with one crop each."""
    rng, order = np.random.default_rng(seed), np.empty(0, np.int64)
    for _ in range(steps):
        order = order if len(order) >= BATCH else rng.permutation(len(split))
        images, labels = split.batch(order[:BATCH])
        order = order[BATCH:]
        y, x = rng.integers(0, 9, 2)
        images = F.pad(images, (4, 4, 4, 4))[:, :, y : y + images.shape[2], x : x + images.shape[3]]
        flipped = torch.from_numpy(rng.random(len(images)) < 0.5).view(-1, 1, 1, 1)
        yield torch.where(flipped, images.flip(3), images), labels


# ---- results


def load(model: str) -> dict[str, Any]:
    """The results so far."""
    path = RESULTS / f"headline-{model}.json"
    return json.loads(path.read_text()) if path.exists() else {"model": model, "budget": BUDGET, "policies": {}}


def save(model: str, kept: dict[str, Any]) -> None:
    """Whole or not at all."""
    write_atomic(RESULTS / f"headline-{model}.json", json.dumps(kept, indent=1) + "\n")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb, run_verb in (("search", search), ("finetune", finetune)):
        sub = verbs.add_parser(verb)
        sub.set_defaults(run=run_verb)
        sub.add_argument("--model", required=True)
        sub.add_argument("--weights", required=True)
        sub.add_argument("--data", required=True)
        sub.add_argument("--threads", type=int)
    one, all_ = verbs.choices["search"], verbs.choices["finetune"]
    one.add_argument("--strategy", required=True, choices=list(dict.fromkeys([*STRATEGIES, *RULES])))
    one.add_argument("--whole", action="store_true", help="the residual stream may lose channels, too")
    one.set_defaults(refitted=False)
    one.add_argument("--name", help="of the policy in the results (default: the strategy's)")
    one.add_argument("--trials", type=int)
    one.add_argument("--time-limit", type=float, default=600.0, help="seconds")
    one.add_argument("--score-steps", type=int, help="of each candidate's quick fine-tune (default: as ever)")
    one.add_argument("--anchor-share", type=float, help="of the search's time (default: as ever)")
    one.add_argument("--precision", default="float32", choices=PRECISIONS, help="of the quick fine-tunes")
    one.add_argument("--warm-start", metavar="NAME", help="of a policy found here, whose run this one starts from")
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--workers", type=int, default=1, help="of a search of ours")
    all_.add_argument("--seeds", type=int, default=3)
    all_.add_argument("--only", nargs="*", help="names of policies")
    all_.add_argument("--refitted", action="store_true", help="start from least-squares weights")
    all_.set_defaults(whole=True, precision="float32")  # policies name the groups that are not whole
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
