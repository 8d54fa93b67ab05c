"""Reconstruction: least squares gives the readers of pruned channels back what can be had from the kept ones.

He et al. (Channel Pruning for Accelerating Very Deep Neural Networks, ICCV 2017, section 3.1), as AMC used it, refit
every reader's weights so that its output on sampled patches is as before. All that the fit needs of the data is the
Gram matrix `G = XᵀX` of a reader's input patches, and the dense weights W, since the dense outputs are `Y = XW`: it is
gathered once, and a policy's weights are then a small linear solve, without data. With S kept and T removed,

    W'_S = W_S + (G_SS + ridge)⁻¹ G_ST W_T,

which is `(G_SS + ridge)⁻¹ (G_S: W + ridge W_S)`: the ridge shrinks towards the plain slice, so nothing removed changes
nothing, and an input that never fires keeps its weights.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from amc.errors import ModelError
from amc.forward import call, device_of, to_device
from amc.groups import Structure
from amc.modes import eval_mode
from amc.roles import channel_axis, is_transposed_linear, output_axis, owner, readers, watching
from amc.seeding import derive
from amc.weights import identity

RIDGE = 1e-3  # of the mean diagonal of G_SS


@dataclass(frozen=True, eq=False)
class Gram:
    """What least squares needs to know of one reader, all float64.

    A reader with `inputs` channels and a kernel of `kernel` elements sees D = inputs * kernel values a patch, and one
    more, constantly 1, where it has a bias.

    matrix: `(D, D)` sum over patches of the outer product.
    weight: `(D, outputs)` of the dense model; the last row is the bias where there is one.
    samples: patches.
    """

    matrix: Tensor
    weight: Tensor
    kernel: int
    bias: bool
    samples: int

    def columns(self, inputs: np.ndarray) -> Tensor:
        """The patch values of input channels, the bias's constant not among them."""
        return torch.from_numpy((inputs[:, None] * self.kernel + np.arange(self.kernel)).ravel())


Grams = Mapping[str, Gram]


def gather(
    model: nn.Module,
    structure: Structure,
    batches: Sequence[tuple[Any, Any]],
    *,
    patches_per_image: int = 10,
    seed: int = 0,
) -> Grams:
    """The Gram matrix of every layer that reads a group's channels, by the name of its weight.

    Convolutions of any kernel, stride, padding and dilation, and linear layers. Grouped and transposed convolutions are
    left out, and so are layers that compute something else than `XW` and those whose weight others have, too: they keep
    their sliced weights. Memory: 8 D² bytes a layer.

    Args:
        model: the dense model; it is left as it is.
        structure: its groups.
        batches: calibration `(inputs, labels)`; labels are not looked at.
        patches_per_image: positions sampled a layer and image (tokens for a linear layer), with replacement.
        seed: of that sample.
    """
    with eval_mode(model):  # in which a spectral norm leaves its estimate as it is
        layers = {name: owner(model, name) for name in readers(model, structure)}
        tied = _tied(model)
        dense = {name: _dense(layer) for name, layer in layers.items() if _fits(layer) and not tied & _owned(layer)}
    layers = {name: layers[name] for name in dense}
    generators = {name: torch.Generator().manual_seed(derive(seed, "gather", name)) for name in layers}
    sums: dict[str, Tensor] = {}
    samples = dict.fromkeys(layers, 0)
    linear: dict[str, bool] = {}

    def see(name: str, layer: nn.Module, inputs: Tensor) -> None:
        if name not in linear:
            linear[name] = _is_product(layer, inputs, *dense[name])
        if not linear[name]:
            return
        x = patches(layer, inputs, patches_per_image, generators[name]).double()
        if layer.bias is not None:
            x = torch.cat([x, x.new_ones(len(x), 1)], 1)
        samples[name] += len(x)
        sums[name] = x.T @ x + sums.get(name, 0)

    device = device_of(model)
    with torch.inference_mode(), eval_mode(model), watching(model, layers, see):
        for inputs, _ in batches:
            call(model, to_device(inputs, device))
    return {name: Gram(total.cpu().clone(), *dense[name], samples=samples[name]) for name, total in sums.items()}


def refit(slim_model: nn.Module, structure: Structure, grams: Grams, kept: Mapping[str, np.ndarray]) -> None:
    """Refits the readers of pruned groups in place; `kept` gives a group's kept units (all of them, if it is absent).

    A layer that computes its weight anew each time (weight norm, a pruning mask) keeps it: a fit would not last there.

    Raises:
        ModelError: the slim model's layers don't have the shapes that `kept` says.
    """
    removed = _removed(structure, kept)
    for name, gram in grams.items():
        if name not in structure.tensors:  # computed
            continue
        layer = owner(slim_model, name)
        out = output_axis(layer)
        gone = removed.get((name, 1 - out), np.empty(0, np.int64))
        if not len(gone):
            continue
        inputs = (len(gram.weight) - gram.bias) // gram.kernel
        outputs = gram.weight.shape[1]
        stay = gram.columns(np.setdiff1d(np.arange(inputs), gone))
        if gram.bias:
            stay = torch.cat([stay, torch.tensor([len(gram.weight) - 1])])
        columns = torch.from_numpy(np.setdiff1d(np.arange(outputs), removed.get((name, out), ())).astype(np.int64))
        _write(name, layer, solve(gram, stay, gram.columns(gone), columns), gram.bias)


def solve(gram: Gram, stay: Tensor, gone: Tensor, outputs: Tensor) -> Tensor:
    """The least-squares weights of the patch values that stay, `(len(stay), len(outputs))`."""
    weight = gram.weight[:, outputs]
    inner = gram.matrix[stay][:, stay]
    ridge = RIDGE * inner.diagonal().mean() + torch.finfo(torch.float64).tiny
    factor = torch.linalg.cholesky(inner + ridge * torch.eye(len(stay), dtype=inner.dtype))
    return weight[stay] + torch.cholesky_solve(gram.matrix[stay][:, gone] @ weight[gone], factor)


def patches(layer: Any, inputs: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Up to `count` random patches an image of what a layer multiplies its weights with, `(samples, D)`."""
    if not isinstance(layer, _ConvNd):
        inputs = inputs.unsqueeze(0) if inputs.dim() == 1 else inputs
        tokens = inputs.reshape(len(inputs), -1, inputs.shape[-1])
        image, place = _sample(len(inputs), tokens.shape[1:2], count, generator, inputs.device)
        return tokens[image, place[0]]
    dims = len(layer.kernel_size)
    windows: Any = F.pad(inputs if inputs.dim() == dims + 2 else inputs.unsqueeze(0), _padding(layer), _pad_mode(layer))
    for axis, (size, stride, dilation) in enumerate(zip(layer.kernel_size, layer.stride, layer.dilation, strict=True)):
        windows = windows.unfold(axis + 2, dilation * (size - 1) + 1, stride)[..., ::dilation]
    image, place = _sample(len(windows), windows.shape[2 : 2 + dims], count, generator, inputs.device)
    return windows[image, :, *place].flatten(1)


def _sample(
    images: int, positions: Sequence[int], count: int, generator: torch.Generator, device: torch.device
) -> tuple[Tensor, list[Tensor]]:
    """Image and position of each sample, `(samples,)`; every position once where there are no more than `count`."""
    total = int(np.prod(positions))
    if total <= count:
        place = torch.arange(total).repeat(images)
    else:
        place = torch.randint(total, (images * count,), generator=generator)
    image = torch.arange(images).repeat_interleave(min(count, total))
    return image.to(device), [p.to(device) for p in torch.unravel_index(place, tuple(positions))]


def _padding(layer: _ConvNd) -> list[int]:
    """The layer's padding as `F.pad` takes it: last dimension first, before and after."""
    pads: list[int] = []
    for axis in reversed(range(len(layer.kernel_size))):
        if layer.padding == "same":
            total = layer.dilation[axis] * (layer.kernel_size[axis] - 1)
            pads += [total // 2, total - total // 2]
        else:
            each = 0 if layer.padding == "valid" else int(layer.padding[axis])
            pads += [each, each]
    return pads


def _pad_mode(layer: _ConvNd) -> str:
    return "constant" if layer.padding_mode == "zeros" else layer.padding_mode


def _fits(layer: nn.Module) -> bool:
    if isinstance(layer, _ConvNd):
        return layer.groups == 1 and not isinstance(layer, _ConvTransposeNd)
    return isinstance(layer, nn.Linear) or is_transposed_linear(layer)


def _owned(layer: nn.Module) -> set[tuple[Any, ...]]:
    """The memory of a module's own parameters."""
    return {identity(f"{id(layer)}.{name}", p) for name, p in layer._parameters.items() if p is not None}


def _tied(model: nn.Module) -> set[tuple[Any, ...]]:
    """The memory of parameters that several modules have."""
    counts = Counter(key for module in model.modules() for key in _owned(module))
    return {key for key, count in counts.items() if count > 1}


def _is_product(layer: Any, inputs: Tensor, weight: Tensor, kernel: int, bias: bool) -> bool:
    """Whether a layer gives, for the first image, its patches times its dense weights; up to rounding."""
    first = inputs[:1] if channel_axis(layer, inputs) else inputs
    try:
        actual = layer.forward(first)
    except TypeError:  # it takes more than its input
        return False
    actual = actual.movedim(channel_axis(layer, actual), -1).double().cpu()
    actual = actual.reshape(-1, actual.shape[-1])
    x = patches(layer, first, len(actual), torch.Generator()).double().cpu()
    expected = F.linear(x, weight[: x.shape[1]].T, weight[-1] if bias else None)
    close = 1e-2 * expected.abs().max()
    return actual.shape == expected.shape and bool((actual - expected).abs().max() <= close)


def _dense(layer: Any) -> tuple[Tensor, int, bool]:
    """Weight `(D, outputs)` with the bias as its last row, kernel elements, whether there is a bias."""
    weight = layer.weight.detach().double().cpu()
    kernel = int(np.prod(layer.kernel_size)) if isinstance(layer, _ConvNd) else 1
    weight = weight.clone() if is_transposed_linear(layer) else weight.flatten(1).T.clone()
    if layer.bias is None:
        return weight, kernel, False
    return torch.cat([weight, layer.bias.detach().double().cpu().unsqueeze(0)]), kernel, True


@torch.no_grad()
def _write(name: str, layer: Any, fitted: Tensor, bias: bool) -> None:
    rows = fitted[:-1] if bias else fitted
    weight = rows if is_transposed_linear(layer) else rows.T
    if weight.numel() != layer.weight.numel() or weight.shape[0] != layer.weight.shape[0]:
        raise ModelError(
            f"{name!r} of the slim model has shape {tuple(layer.weight.shape)}, but the kept channels give "
            f"{tuple(weight.shape)}; slim the model by the same kept channels before refitting it"
        )
    layer.weight.copy_(weight.reshape(layer.weight.shape))
    if bias:
        layer.bias.copy_(fitted[-1])


def _removed(structure: Structure, kept: Mapping[str, np.ndarray]) -> dict[tuple[str, int], np.ndarray]:
    """(tensor, axis) -> positions that no longer exist."""
    removed: dict[tuple[str, int], np.ndarray] = {}
    for group in structure.groups:
        if group.name in kept:
            for part in group.slices:
                gone = part.index[~np.isin(part.unit, kept[group.name])]
                before = removed.get((part.tensor, part.axis), np.empty(0, np.int64))
                removed[part.tensor, part.axis] = np.union1d(before, gone).astype(np.int64)
    return removed
