"""A training step of your own: a super-resolution network, which no cross entropy on labels could recover.

`finetune` gets a slim model and a number of steps, and trains it in place: a few steps for each score, many for the
result. Its data are what you give it. `train` in `data` says how long an epoch is, and batch norm is recalibrated on
its inputs; nothing here has labels. Run it:

    python examples/own_training.py
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import search


class Upscaler(nn.Module):
    """Twice the height and width: bilinear, and what convolutions add to it."""

    def __init__(self, channels: int = 24) -> None:
        super().__init__()
        self.up = nn.Upsample(scale_factor=2, mode="bilinear")
        self.body = nn.Sequential(
            *(nn.Conv2d(1, channels, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU()),
            nn.Conv2d(channels, 4, 3, padding=1),
            nn.PixelShuffle(2),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x) + self.body(x)


def images() -> tuple[Tensor, Tensor]:
    sharp = torch.from_numpy(load_digits().images).float().unsqueeze(1) / 16
    return nn.functional.avg_pool2d(sharp, 2), sharp


class Training:
    """Mean squared error against the sharp images, in batches that are the same for every candidate."""

    def __init__(self, blurred: Tensor, sharp: Tensor) -> None:
        self.blurred, self.sharp = blurred, sharp

    def finetune(self, model: nn.Module, steps: int) -> None:
        draw = torch.Generator().manual_seed(0)
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)  # ends settled
        model.train()
        for _ in range(steps):
            chosen = torch.randint(len(self.sharp), (64,), generator=draw)
            loss = nn.functional.mse_loss(model(self.blurred[chosen]), self.sharp[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def main(out: str = "runs/own-training", steps: int = 400, trials: int = 15) -> search.Result:
    torch.manual_seed(0)
    blurred, sharp = images()
    training = Training(blurred[:1400], sharp[:1400])

    def psnr(model: nn.Module) -> float:
        model.eval()
        with torch.inference_mode():
            return -10 * torch.log10(nn.functional.mse_loss(model(blurred[1400:]), sharp[1400:])).item()

    model = Upscaler()
    training.finetune(model, steps)
    result = search.run(
        model=model, data={"train": blurred[:1400], "val": blurred[1400:]}, metric=psnr, finetune=training.finetune,
        budget="flops=0.5", trials=trials, score_steps=20, out=out,
    )  # fmt: skip
    dense, best = result.summary["dense"], result.summary["best"]
    print(f"PSNR {dense['accuracy']:.2f} dB at {dense['flops']:,} FLOPs; {best['accuracy']:.2f} at {best['flops']:,}")
    return result


if __name__ == "__main__":
    main()
