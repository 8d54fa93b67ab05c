"""Trains dense weights of a built-in architecture, for benchmarks on networks that come without.

    python benchmarks/dense.py --model plain20 --data imagefolder:DIR --out plain20.safetensors

SGD with Nesterov momentum 0.9 and weight decay 5e-4, one-cycle rate peaking at 0.1, batches of 128, random crop and
flip. 15 epochs are short of what such networks can reach, and take a quarter of an hour of a core.
"""

from __future__ import annotations

import argparse

import torch

from amc.catalog import PRECISIONS
from amc.data import IMAGENET_MEAN, IMAGENET_STD, load_data
from amc.evaluate import accuracy, batches_of
from amc.finetune import finetune
from amc.layout import arranged
from amc.models import load_model
from amc.registry import resolve
from amc.weights import save_weights


def told(done: int, steps: int) -> None:
    """Says now and then how far it is."""
    if done % 500 == 0 or done == steps:
        print(f"{done}/{steps}", flush=True)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--model", "--data", "--out"):
        parser.add_argument(name, required=True)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--precision", default="float32", choices=PRECISIONS)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    data = load_data(args.data, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    assert data.train is not None
    model = arranged(load_model(args.model, data=data).model, torch.channels_last)
    finetune(
        model,
        data.train,
        epochs=args.epochs,
        lr=0.1,
        weight_decay=5e-4,
        augment=data.augment,
        precision=resolve(PRECISIONS, args.precision, "--precision"),
        progress=told,
    )
    save_weights(model, args.out)
    print(f"{args.out}: {accuracy(model, batches_of(data.val)):.4f} on the search split")


if __name__ == "__main__":
    main()
