"""Small networks with one quirk each, and the groups that they have: `TOPOLOGIES[name] = (build, inputs, groups)`.

`groups` is every group with its units, in forward order; whatever else a network has can't be pruned.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Shape = tuple[int, ...]
TOPOLOGIES: dict[str, tuple[Callable[[], nn.Module], tuple[Shape, ...], dict[str, int]]] = {}


def topology(inputs: Shape | tuple[Shape, ...], **groups: int) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Register a network; `a__0` stands for the module `a.0`."""
    shapes = inputs if isinstance(inputs[0], tuple) else (inputs,)
    named = {name.replace("__", "."): channels for name, channels in groups.items()}

    def register(net: type[nn.Module]) -> type[nn.Module]:
        TOPOLOGIES[net.__name__] = (net, shapes, named)  # type: ignore[assignment]
        return net

    return register


def build(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A network with every parameter and buffer drawn at random, and its inputs."""
    make, shapes, _ = TOPOLOGIES[name]
    torch.manual_seed(0)
    net = make()
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase | nn.GroupNorm | nn.LayerNorm | nn.RMSNorm):
            for key, tensor in module.state_dict(keep_vars=True).items():
                if tensor.dtype.is_floating_point:
                    low = 0.5 if key in ("weight", "running_var") else -0.5
                    nn.init.uniform_(tensor, low, 1.5 if low > 0 else 0.5)
    return net.eval(), tuple(torch.randn(shape) for shape in shapes)


def head(channels: int) -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 3))


@topology((1, 3, 8, 8), net__0=8, net__3=12)
class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.PReLU(12), head(12)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


@topology((1, 3, 8, 8), stem=8, inner=6)
class ResidualIdentity(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.outer = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3, padding=1), nn.Conv2d(6, 8, 1)
        self.norm, self.head = nn.BatchNorm2d(8), head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.norm(self.outer(self.inner(x).relu()))
        return self.head(x.relu_())


@topology((1, 3, 8, 8), stem=6, inner=5, outer=10)
class ResidualProjection(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.outer = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 5, 3, 2, 1), nn.Conv2d(5, 10, 1)
        self.project, self.head = nn.Conv2d(6, 10, 1, 2), head(10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        y = self.outer(self.inner(x).relu())
        y += self.project(x)
        return self.head(y)


@topology((1, 3, 8, 8), stem=8, inner=5, outer=8)
class PaddedShortcut(nn.Module):
    """Computes the padding from shapes: the stream's own 8 channels and the 4 + 4 padded ones can all leave."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.outer = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 5, 3, 2, 1), nn.Conv2d(5, 16, 1)
        self.head = head(16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        y = self.outer(self.inner(x).relu())
        missing = (y.shape[1] - x.shape[1]) // 2
        return self.head(y + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, missing, missing)))


@topology((1, 3, 8, 8), stem=8, inner=5)
class PaddedShortcutFixed(nn.Module):
    """Fixes the padding in code: the 4 + 4 padded channels must stay, the others need not."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.outer = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 5, 3, 2, 1), nn.Conv2d(5, 16, 1)
        self.head = head(16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        y = self.outer(self.inner(x).relu())
        return self.head(y + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4)))


@topology((1, 3, 8, 8), stem=4, side=5, last=6)
class WrittenInPlace(nn.Module):
    """Fills a tensor part by part: circular padding does it, and so does a forward that joins halves of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.side, self.other = (nn.Conv2d(4, 5, 3, padding=1, padding_mode="circular") for _ in range(2))
        self.last, self.head = nn.Conv2d(5, 6, 3), head(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        up, down = self.side(x), self.other(x)
        joined = up.new_zeros(up.shape)
        joined[:, :, :4], joined[:, :, 4:] = up[:, :, :4], down[:, :, 4:]
        return self.head(self.last(joined).relu())


@topology((1, 3, 8, 8), a=4, b=5, c=6, last=7)
class Inception(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(3, 6, 5, padding=2)
        self.norm, self.last, self.head = nn.BatchNorm2d(15), nn.Conv2d(15, 7, 1), head(7)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(self.norm(torch.cat([self.a(x), self.b(x), self.c(x)], 1)).relu()))


@topology((1, 3, 8, 8), stem=6, grow1=4, grow2=4)
class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.grow1, self.grow2 = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3, 1, 1), nn.Conv2d(10, 4, 3, 1, 1)
        self.norm, self.head = nn.BatchNorm2d(10), head(14)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.cat([x, self.grow1(x)], 1)
        return self.head(torch.cat([self.grow2(self.norm(x).relu()), x], 1))


@topology((1, 3, 8, 8), stem=8, a=6, b=6)
class ChunkToBranches(nn.Module):
    """Halves that go separate ways: chunk keeps them equal, so one channel of each leaves together."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.head = nn.Conv2d(3, 16, 3), nn.Conv2d(8, 6, 1), nn.Conv2d(8, 6, 1), head(12)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.stem(x).chunk(2, 1)
        return self.head(torch.cat([self.a(left), self.b(right)], 1).relu())


@topology((1, 3, 8, 8), stem=4, inner=4)
class SplitFixed(nn.Module):
    """Split sizes fixed in code: the split channels stay, what is behind does not."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mid, self.inner = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 10, 1), nn.Conv2d(4, 4, 1)
        self.head = head(10)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.mid(self.stem(x).relu()).split([4, 6], 1)
        return self.head(torch.cat([self.inner(a).relu(), b], 1))


@topology((1, 3, 8, 8), left=4, right__0=8)
class Shuffle(nn.Module):
    """ShuffleNet: concatenated branches, shuffled; the channels that stand beside each other leave together."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(3, 4, 1)
        self.right = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, 1, 1, groups=8), nn.Conv2d(8, 4, 1))
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(8 * 64, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.left(x), self.right(x).relu()], 1)
        n, c, h, w = x.shape
        return self.head(x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w))


@topology((1, 3, 8, 8), stem=8, point=10)
class Depthwise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depth = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3, padding=1, groups=8)
        self.norm, self.point, self.head = nn.BatchNorm2d(16), nn.Conv2d(16, 10, 1), head(10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.point(self.norm(self.depth(self.stem(x))).relu()))


@topology((1, 3, 8, 8), stem=12, grouped=16)
class GroupedConvolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.grouped = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 16, 3, padding=1, groups=4)
        self.head = head(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.grouped(self.stem(x).relu()).relu())


@topology((1, 3, 8, 8), stem=8, squeeze=4)
class SqueezeExcitation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.squeeze, self.excite = nn.Conv2d(3, 8, 3), nn.Linear(8, 4), nn.Linear(4, 8)
        self.head = head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        gate = self.excite(self.squeeze(x.mean((2, 3))).relu()).sigmoid()
        return self.head(x * gate[:, :, None, None])


@topology((1, 3, 8, 8), conv=6, fc=10)
class FlattenIntoLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc, self.out = nn.Conv2d(3, 6, 3), nn.Linear(6 * 9, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.conv(x), 2)
        return self.out(F.dropout(self.fc(x.view(x.size(0), -1)), training=self.training).relu())


@topology((1, 3, 8, 8), down1=6, down2=8, up=5, merge=4)
class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 8, 3, 2, 1)
        self.up, self.merge, self.out = nn.ConvTranspose2d(8, 5, 2, 2), nn.Conv2d(11, 4, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down1(x).relu()
        return self.out(self.merge(torch.cat([self.up(self.down2(skip).relu()), skip], 1)).relu())


@topology((1, 3, 8, 8), stem=8, up=8)
class GroupedTransposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.up = nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 8, 2, 2, groups=2)
        self.depth, self.head = nn.ConvTranspose2d(8, 8, 2, groups=8), head(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.depth(self.up(self.stem(x).relu())).relu())


@topology((1, 2, 16), a=6, b=8)
class Convolution1d(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Conv1d(2, 6, 3), nn.Conv1d(6, 8, 3, 2), nn.Linear(8, 3)
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.adaptive_avg_pool1d(self.b(self.norm(self.a(x)).relu()).relu(), 1)[:, :, 0])


@topology((1, 2, 4, 6, 6), a=6, b=8)
class Convolution3d(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Conv3d(2, 6, 3, padding=1), nn.Conv3d(6, 8, 3, 2), nn.Linear(8, 3)
        self.norm = nn.InstanceNorm3d(6, affine=True, track_running_stats=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.b(F.max_pool3d(self.norm(self.a(x)), (1, 2, 2))).relu().mean((2, 3, 4)))


@topology((1, 3, 8, 8), a=8, b=6, c=12)
class Norms(nn.Module):
    """Group norm by two, instance norm, and group norm by one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3), nn.Conv2d(6, 12, 1)
        self.by_two, self.instance = nn.GroupNorm(2, 8), nn.InstanceNorm2d(6, affine=True)
        self.by_one, self.head = nn.GroupNorm(1, 12), head(12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.instance(self.b(self.by_two(self.a(x)).relu())).relu()
        return self.head(self.by_one(self.c(x)).relu())


@topology((1, 3, 8, 8), stem=8, block__1=16)
class ConvNeXtBlock(nn.Module):
    """Layer norm over channels that are last, a scale per channel, a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depth = nn.Conv2d(3, 8, 2, 2), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.block = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.scale, self.head = nn.Parameter(torch.rand(8)), head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.block(self.depth(x).permute(0, 2, 3, 1)) * self.scale
        return self.head(x + y.permute(0, 3, 1, 2))


@topology((1, 3, 8, 8), stem=8)
class NormsByHand(nn.Module):
    """Layer norm over channels by a function for both moments, and by two functions with the unbiased deviation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 8, 3), nn.Parameter(torch.rand(8, 1, 1)), nn.Parameter(torch.rand(8))
        self.head = head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        variance, mean = torch.var_mean(x, dim=1, keepdim=True, unbiased=False)
        x = (x - mean) / (variance + 1e-5).sqrt() * self.a
        x = x.permute(0, 2, 3, 1)
        deviation, mean = torch.std_mean(x, dim=-1, keepdim=True)
        return self.head(((x - mean) / (deviation + 1e-5) * self.b).permute(0, 3, 1, 2))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.qkv, self.proj = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        y = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1) @ v
        return self.proj(y.transpose(1, 2).reshape(n, tokens, -1))


@topology((1, 3, 8, 8), patch=16, attention__qkv=4, mlp__0=20)
class VisionTransformer(nn.Module):
    """Patch embedding, class token, positions, pre-norm attention with fused q, k, v, and an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.cls = nn.Conv2d(3, 16, 4, 4), nn.Parameter(torch.randn(1, 1, 16))
        self.positions, self.attention = nn.Parameter(torch.randn(1, 5, 16)), Attention(16, 4)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(16), nn.LayerNorm(16), nn.LayerNorm(16)
        self.mlp, self.out = nn.Sequential(nn.Linear(16, 20), nn.GELU(), nn.Linear(20, 16)), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.positions
        x = x + self.attention(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return self.out(self.norm3(x)[:, 0])


@topology((1, 5, 12), embed=12, q=2, gate=10)
class GroupedQueryAttention(nn.Module):
    """Four query heads share two key-value heads: two units. Rotary positions, RMS norm by hand, a gated MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.q, self.o = nn.Linear(12, 12), nn.Linear(12, 16, bias=False), nn.Linear(16, 12, bias=False)
        self.k, self.v = nn.Linear(12, 8, bias=False), nn.Linear(12, 8, bias=False)
        self.gate, self.up, self.down = nn.Linear(12, 10), nn.Linear(12, 10), nn.Linear(10, 12)
        self.scale, self.out = nn.Parameter(torch.rand(12)), nn.Linear(12, 3)

    def rotated(self, x: Tensor) -> Tensor:
        angle = torch.arange(x.shape[2])[:, None] * torch.tensor([1.0, 0.1, 1.0, 0.1])
        half = torch.cat([-x[..., 2:], x[..., :2]], -1)
        return x * angle.cos() + half * angle.sin()

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.scale
        q, k, v = (f(y).view(1, 5, -1, 4).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(self.rotated(q), self.rotated(k), v, is_causal=True, enable_gqa=True)
        x = x + self.o(y.transpose(1, 2).flatten(2))
        return self.out(x + self.down(F.silu(self.gate(x)) * self.up(x)))


@topology((1, 3, 8, 8), stem=8)
class SharedModule(nn.Module):
    """One convolution applied three times to its own output."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.shared, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(3):
            x = self.shared(x).relu()
        return self.head(x)


@topology(((1, 3, 8, 8), (1, 4)), image=6, vector=6)
class TwoInputs(nn.Module):
    """Two inputs and a dictionary of two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.vector, self.a, self.b = nn.Conv2d(3, 6, 3), nn.Linear(4, 6), nn.Linear(12, 3), nn.Linear(6, 2)

    def forward(self, image: Tensor, vector: Tensor) -> dict[str, Tensor]:
        x, y = self.image(image).mean((2, 3)), self.vector(vector).relu()
        return {"a": self.a(torch.cat([x, y], 1)), "b": self.b(y)}


@topology((1, 3, 8, 8), stem=8, last=6)
class PixelShuffle(nn.Module):
    """The four copies of a channel leave together."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.shuffle, self.last = nn.Conv2d(3, 32, 3), nn.PixelShuffle(2), nn.Conv2d(8, 6, 3)
        self.head = head(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(self.shuffle(self.stem(x))).relu())


@topology((1, 8, 6), token__0=10, channel__0=12)
class Mixer(nn.Module):
    """Linear layers over tokens as well as over channels: the channels of the first are the positions of the second."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.out = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)
        self.token = nn.Sequential(nn.Linear(8, 10), nn.GELU(), nn.Linear(10, 8))
        self.channel = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.token(self.norm(x).transpose(1, 2)).transpose(1, 2)
        return self.out((x + self.channel(x)).mean(1))


@topology((1, 3, 8, 8), conv=8)
class WeightTied(nn.Module):
    """Two modules that hold one weight, and a buffer with an entry per channel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.b.weight = self.a.weight
        self.register_buffer("shift", torch.randn(1, 8, 1, 1))
        self.head = head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x) + self.shift
        return self.head(x + self.b(self.a(x).relu()).relu())


@topology((1, 3, 8, 8), stem=6, encoder__linear1=9)
class TorchEncoderLayer(nn.Module):
    """nn.MultiheadAttention can't lose heads; its MLP can lose channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.patch = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 8, 4, 4)
        self.encoder, self.out = nn.TransformerEncoderLayer(8, 2, 9, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.encoder(self.patch(self.stem(x).relu()).flatten(2).transpose(1, 2)).mean(1))
