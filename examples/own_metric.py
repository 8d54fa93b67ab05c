"""A metric of your own: a network that finds discs in noise, pruned for the intersection over union of its masks.

A metric is a function of the model, higher is better. It is what the search maximizes, and the report calls it by the
function's name. Recovery trains with the cross entropy between the model's first output, `(N, classes, …)`, and the
labels, which suits segmentation as it is. Run it:

    python examples/own_metric.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import search
from amc.finetune import train

SIZE = 16


class Segmenter(nn.Module):
    """Down, up, and a skip connection; two classes a pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.Sequential(nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU())
        self.coarse = nn.Sequential(nn.Conv2d(12, 24, 3, 2, padding=1), nn.BatchNorm2d(24), nn.ReLU())
        self.up = nn.ConvTranspose2d(24, 12, 2, 2)
        self.head = nn.Conv2d(24, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.fine(x)
        return self.head(torch.cat([fine, self.up(self.coarse(fine))], 1))


def discs(count: int, seed: int) -> TensorDataset:
    draw = torch.Generator().manual_seed(seed)
    centre, radius = torch.rand(count, 2, 1, 1, generator=draw) * SIZE, 2 + 3 * torch.rand(count, 1, 1, generator=draw)
    grid = torch.stack(torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij"))
    masks = (grid - centre).square().sum(1).sqrt() < radius
    images = masks.float() + 0.8 * torch.randn(count, SIZE, SIZE, generator=draw)
    return TensorDataset(images.unsqueeze(1), masks.long())


def iou(model: nn.Module, examples: TensorDataset) -> float:
    images, masks = examples.tensors
    with torch.inference_mode():
        found = model(images).argmax(1)
    return float(((found == 1) & (masks == 1)).sum() / ((found == 1) | (masks == 1)).sum().clamp_min(1))


def main(out: str = "runs/own-metric", steps: int = 100, trials: int = 12) -> search.Result:
    torch.manual_seed(0)
    splits = {"train": discs(512, seed=1), "val": discs(128, seed=2)}
    model = Segmenter()
    batches = (splits["train"][torch.randint(0, 512, (32,)).tolist()] for _ in range(steps))
    train(model, batches, steps=steps, lr=0.1)

    def mask_iou(candidate: nn.Module) -> float:
        return iou(candidate, splits["val"])

    result = search.run(
        model=model, data=splits, metric=mask_iou,  # the report calls it so
        budget="flops=0.4", trials=trials, score_batch=32, finetune_batch=32, finetune_epochs=3, out=out,
    )  # fmt: skip
    dense, best = result.summary["dense"], result.summary["best"]
    print(f"IoU {dense['accuracy']:.3f} at {dense['flops']:,} FLOPs; {best['accuracy']:.3f} at {best['flops']:,}")
    return result


if __name__ == "__main__":
    main()
