"""Fine-tuning: the recovery of a slimmed model, short inside the search and long for the final one.

SGD with Nesterov momentum and a one-cycle learning rate (Smith and Topin, arXiv 1708.07120) that is annealed to nothing
within the given steps, however few they are: a rate that is still high at the end measures the rate, not the policy.
Images are augmented by a random crop per image (zero padding of an eighth of the side) and a flip, where these suit.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amc.errors import DataError
from amc.forward import call, device_of, logits, to_device
from amc.seeding import seeded

Batch = tuple[Any, Any]
Loss = Callable[[Tensor, Tensor], Tensor]
Progress = Callable[[int, int], object]
log = logging.getLogger("amc")

IGNORED = -100
"""A label that stands for none: cross entropy leaves it out, and so does the accuracy."""
AUGMENTATIONS = ("crop", "flip")


class Diverged(ArithmeticError):
    """The training loss stopped being finite."""


class Split(Protocol):
    """Labelled examples that can be drawn by index."""

    def __len__(self) -> int: ...

    def batch(self, indices: Sequence[int] | np.ndarray) -> Batch:
        """Inputs and labels of the given examples, each with the examples along the first axis."""
        ...


def cross_entropy(output: Tensor, labels: Tensor) -> Tensor:
    """Torch's, but for labels that don't fit the model's output, which raise a DataError."""
    shares = isinstance(labels, Tensor) and labels.is_floating_point() and labels.shape == output.shape
    if not shares or output.dim() < 2:
        check_classes(output, labels, "a training step of your own (finetune=… in Python)", lowest=0)
    return F.cross_entropy(output, labels)


def check_classes(output: Tensor, labels: Any, instead: str, *, lowest: float = -math.inf) -> None:
    """Raises a DataError unless `labels` has a class number for each prediction in `output` `(N, classes, ...)`.

    instead: what a user with other labels can give. lowest: of the class numbers, beside `IGNORED`.
    """
    wanted = output.shape[:1] + output.shape[2:]
    if output.dim() < 2 or not isinstance(labels, Tensor) or labels.shape != wanted:
        given = f"of shape {tuple(labels.shape)}" if isinstance(labels, Tensor) else f"of type {type(labels).__name__}"
        found = f"predictions of shape {tuple(wanted)}" if output.dim() > 1 else "a model without an output a class"
        if output.dim() > 2:
            found += f" (the model's output is {tuple(output.shape)}, its classes the axis after the batch)"
        raise DataError(f"labels {given} don't fit {found}; give class numbers, one for each prediction, or {instead}")
    classes = output.shape[1]
    strange = labels[(labels >= classes) | ((labels < lowest) & (labels != IGNORED))]
    if len(strange):
        raise DataError(
            f"the label {int(strange[0])} is none of the model's {classes} classes, which are 0 to {classes - 1}: "
            f"do model and data belong together? ({IGNORED} stands for no label)"
        )


def finetune(
    model: nn.Module,
    split: Split,
    *,
    epochs: int | None = None,
    steps: int | None = None,
    lr: float = 0.02,
    batch: int = 128,
    weight_decay: float = 1e-4,
    augment: Sequence[str] = (),
    loss: Loss = cross_entropy,
    precision: torch.dtype = torch.float32,
    seed: int = 0,
    progress: Progress | None = None,
) -> None:
    """Trains `model` in place on shuffled batches of `split` for `epochs`, or for exactly `steps`, whichever is given.

    lr: the peak of the one-cycle rate. precision: see `train`. progress: called with (steps done, steps in all).

    Raises:
        Diverged: the loss became NaN or infinite.
    """
    if steps is None:
        steps = (epochs or 0) * max(len(split) // batch, 1)
    with seeded(seed, "finetune"):
        train(
            model,
            draw(split, steps, batch=batch, augment=augment, seed=seed),
            steps=steps,
            lr=lr,
            weight_decay=weight_decay,
            loss=loss,
            precision=precision,
            progress=progress,
        )


def train(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    steps: int,
    lr: float,
    weight_decay: float = 1e-4,
    loss: Loss = cross_entropy,
    precision: torch.dtype = torch.float32,
    progress: Progress | None = None,
) -> list[float]:
    """One-cycle SGD over `batches`, in place; the model ends in eval mode. Returns the loss of every step.

    precision: of convolutions and matrix products (`torch.autocast`); weights and the loss stay as they are.

    Raises:
        Diverged: the loss became NaN or infinite. DataError: a label is none of the model's classes.
    """
    losses: list[float] = []
    if steps == 0:
        return losses
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        log.warning("nothing is fine-tuned: no parameter of the model requires a gradient")
        model.eval()
        return losses
    optimizer = torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=weight_decay, nesterov=True)
    rise = min(max(0.1, 2.5 / (steps + 1)), 0.9)  # a tenth, but at least a step: a rise of no steps divides by zero
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps + 1, pct_start=rise)
    device = device_of(model)
    model.train()
    for step, (inputs, labels) in enumerate(batches):
        with rounded_to(precision, device):
            output = logits(call(model, to_device(inputs, device)))
        value = loss(output.float() if output.dtype == precision else output, to_device(labels, device))
        losses.append(value.item())
        if not np.isfinite(losses[-1]):
            found = f"the training loss became {losses[-1]} at step {step + 1} of {steps}; "
            first = "nothing was learned yet, so do the data or the weights hold NaN or infinite numbers?"
            raise Diverged(found + ("lower the learning rate" if step else first))
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        for parameter in parameters:  # of an embedding with sparse=True: momentum and weight decay move every row
            if parameter.grad is not None and parameter.grad.is_sparse:
                parameter.grad = parameter.grad.to_dense()
        optimizer.step()
        schedule.step()
        if progress:
            progress(step + 1, steps)
    optimizer.zero_grad(set_to_none=True)
    model.eval()
    return losses


def rounded_to(precision: torch.dtype, device: torch.device) -> AbstractContextManager[object]:
    """Where convolutions and matrix products are computed in `precision`; as the caller has it for float32."""
    return nullcontext() if precision == torch.float32 else torch.autocast(device.type, precision)


def draw(split: Split, steps: int, *, batch: int, augment: Sequence[str] = (), seed: int = 0) -> Iterator[Batch]:
    """`steps` batches of `split`, shuffled anew each epoch, the incomplete last batch of an epoch left out."""
    rng = np.random.default_rng(seed)
    size = min(batch, len(split))
    order = np.empty(0, dtype=np.int64)
    for _ in range(steps):
        if len(order) < size:
            order = rng.permutation(len(split))
        inputs, labels = split.batch(order[:size])
        order = order[size:]
        yield augmented(inputs, augment, rng), labels


def augmented(inputs: Any, augment: Sequence[str], rng: np.random.Generator) -> Any:
    """Images `(N, C, H, W)` with the named augmentations; anything else as it is."""
    if not isinstance(inputs, Tensor) or inputs.dim() != 4:
        return inputs
    count, _, height, width = inputs.shape
    if "crop" in augment:
        pad = max(height // 8, 1)
        padded = F.pad(inputs, (pad, pad, pad, pad))
        offsets = rng.integers(0, 2 * pad + 1, (count, 2)).tolist()
        crops = [image[:, y : y + height, x : x + width] for image, (y, x) in zip(padded, offsets, strict=True)]
        inputs = torch.stack(crops)
    if "flip" in augment:
        chosen = torch.from_numpy(rng.random(count) < 0.5).view(-1, 1, 1, 1)
        inputs = torch.where(chosen, inputs.flip(3), inputs)
    return inputs
