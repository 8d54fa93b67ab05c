"""Channel labels through normalizations, and the statistics of what is left.

Where a norm's statistics span channels (layer norm, group norm, a mean of squares), channels may leave it all the same:
the statistics are then those of the others. `MASKED` computes them so in the dense model, for comparison (DESIGN 8).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from amc.labels import Operand, support
from amc.ops_elements import Handler, table
from amc.ops_products import channels, reduced_axes

if TYPE_CHECKING:
    from amc.tracer import Tracer


def _batch_norm(run: Tracer, args: tuple, kwargs: dict, out: Any) -> None:
    x = args[0]
    operands = [run.operand(x), *(channels(run, t, x.ndim) for t in args[1:5] if isinstance(t, Tensor))]
    run.set(out[0], run.labels.combine(operands, x.ndim, f"meets a norm of fixed size in {run.where()}"))


def _weight_norm(run: Tracer, args: tuple, kwargs: dict, out: Any) -> None:
    factors = run.labels.combine([run.operand(t) for t in args[:2]], args[0].ndim, "weight norm over a fixed size")
    run.set(out[0], factors)


def _layer_norm(run: Tracer, args: tuple, kwargs: dict, out: Any) -> None:
    """Channels may leave a layer norm: its statistics are then those of the channels that are left."""
    x, shape, weights = args[0], args[1], [t for t in args[2:4] if isinstance(t, Tensor)]
    axes = set(range(x.ndim - len(shape), x.ndim))
    partial = [f for f in run.factors(x) if support(f) & axes and not support(f) <= axes]
    for factor in partial:
        run.labels.coarsen(factor, support(factor) & axes)
    factors = list(run.factors(x))
    if not weights and hasattr(run.module(), "normalized_shape"):
        rest = [run.labels.pin(f, axes, f"{run.where()} fixes its normalized_shape and has no weight") for f in factors]
        factors = [f for f in rest if f is not None]
    whole = Operand(tuple(factors), tuple(n > 1 for n in x.shape))
    reason = f"meets a norm of fixed size in {run.where()}"
    result = run.labels.combine([whole, *(run.operand(t) for t in weights)], x.ndim, reason)
    run.set(out[0] if isinstance(out, (tuple, list)) else out, result)


def _group_norm(run: Tracer, args: tuple, kwargs: dict, out: Any) -> None:
    x, weight, bias, *_, groups, _ = args
    operands = [run.operand(x), channels(run, weight, x.ndim), channels(run, bias, x.ndim)]
    factors = run.labels.combine(operands, x.ndim, f"meets a norm of fixed size in {run.where()}")
    for factor in factors:
        if support(factor) != {1} or weight is None:
            run.labels.freeze(factor, f"{run.where()} fixes its num_channels and has no weight")
        elif 1 < groups < x.shape[1]:
            run.record.balanced.append((factor.ravel(), groups))
    run.set(out[0], factors)


def _kept(run: Tracer, x: Tensor, axes: Iterable[int]) -> Tensor | None:
    """1 for entries that stay, 0 for removed channels that a statistic over `axes` would take in."""
    mask: np.ndarray | None = None
    for factor in run.factors(x):
        if support(factor) and support(factor) <= set(axes):
            gone = run.gone(factor)
            mask = gone if mask is None else mask | gone
    if mask is None or not mask.any():
        return None
    return torch.from_numpy(np.ascontiguousarray(~mask)).to(x.device, x.dtype)


def _masked_moments(x: Tensor, keep: Tensor, axes: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance and number of the kept entries."""
    keep = keep.expand_as(x)
    number = keep.sum(axes, keepdim=True).clamp_min(1)  # of nothing at all, the entries are zero anyway
    mean = (x * keep).sum(axes, keepdim=True) / number
    return mean, (((x - mean) ** 2) * keep).sum(axes, keepdim=True) / number, number


def _masked_mean(run: Tracer, args: tuple, kwargs: dict) -> Any:
    axes = reduced_axes(args[0], args, kwargs)
    keep = _kept(run, args[0], axes)
    if keep is None:
        return None
    mean = _masked_moments(args[0], keep, axes)[0]
    return mean if (args[2] if len(args) > 2 else kwargs.get("keepdim", False)) else mean.squeeze(axes)


def _masked_var(run: Tracer, args: tuple, kwargs: dict) -> Any:
    axes = reduced_axes(args[0], args, kwargs)
    keep = _kept(run, args[0], axes)
    if keep is None:
        return None
    _, variance, number = _masked_moments(args[0], keep, axes)
    correction = kwargs.get("correction", 1)
    variance = variance * number / (number - (1 if correction is None else correction))
    return variance if kwargs.get("keepdim", False) else variance.squeeze(axes)


def _masked_std(run: Tracer, args: tuple, kwargs: dict) -> Any:
    variance = _masked_var(run, args, kwargs)
    return None if variance is None else variance.sqrt()


def _with_mean(spread: Callable[[Tracer, tuple, dict], Any]) -> Callable[[Any, tuple, dict], Any]:
    """The operation that gives a measure of spread and the mean."""

    def both(run: Tracer, args: tuple, kwargs: dict) -> Any:
        found = spread(run, args, kwargs)
        return None if found is None else (found, _masked_mean(run, args, kwargs))

    return both


def _masked_layer_norm(run: Tracer, args: tuple, kwargs: dict) -> Any:
    x, shape, weight, bias, eps = args
    axes = list(range(x.ndim - len(shape), x.ndim))
    keep = _kept(run, x, axes)
    if keep is None:
        return None
    mean, variance, _ = _masked_moments(x, keep, axes)
    scale = (variance + eps).rsqrt()
    out = (x - mean) * scale
    out = out * weight if weight is not None else out
    return (out + bias if bias is not None else out), mean, scale


def _masked_group_norm(run: Tracer, args: tuple, kwargs: dict) -> Any:
    x, weight, bias, *_, groups, eps = args
    keep = _kept(run, x, range(1, x.ndim))
    if keep is None:
        return None
    view = (x.shape[0], groups, -1, *x.shape[2:])
    split = x.reshape(view)
    mask = keep.expand(1, x.shape[1], *(1,) * (x.ndim - 2)).reshape(1, groups, -1, *(1,) * (x.ndim - 2))
    mean, variance, _ = _masked_moments(split, mask, list(range(2, split.ndim)))
    scale = (variance + eps).rsqrt()
    out = ((split - mean) * scale).reshape(x.shape)
    shape = (1, -1, *(1,) * (x.ndim - 2))
    out = out * weight.reshape(shape) if weight is not None else out
    return (out + bias.reshape(shape) if bias is not None else out), mean, scale


def _masked_batch_norm(run: Tracer, args: tuple, kwargs: dict) -> Any:
    """Only where statistics come from the input itself and labels lie on other axes: weight standardization."""
    x, weight, bias, mean, _, training, _, eps = args
    axes = [axis for axis in range(x.ndim) if axis != 1]
    keep = _kept(run, x, axes) if training or mean is None else None
    if keep is None:
        return None
    mean, variance, _ = _masked_moments(x, keep, axes)
    shape = (1, -1, *(1,) * (x.ndim - 2))
    out = (x - mean) * (variance + eps).rsqrt()
    out = out * weight.reshape(shape) if weight is not None else out
    return (out + bias.reshape(shape) if bias is not None else out), mean, variance


MASKED: dict[str, Callable[[Any, tuple, dict], Any]] = {
    "aten.mean": _masked_mean,
    "aten.var": _masked_var,
    "aten.std": _masked_std,
    "aten.var_mean": _with_mean(_masked_var),
    "aten.std_mean": _with_mean(_masked_std),
    "aten.native_layer_norm": _masked_layer_norm,
    "aten.native_batch_norm": _masked_batch_norm,
    "aten.native_group_norm": _masked_group_norm,
}


HANDLERS: dict[str, Handler] = table(
    (_weight_norm, "_weight_norm_interface"),
    (_batch_norm, "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm"),
    (_layer_norm, "native_layer_norm"),
    (_group_norm, "native_group_norm"),
)
