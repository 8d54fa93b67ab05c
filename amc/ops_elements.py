"""Channel labels through operations that work element by element, or only move elements."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from amc.labels import Factors, Operand, along, stride, support
from amc.record import WeightUse

if TYPE_CHECKING:
    from amc.tracer import Tracer

Handler = Callable[["Tracer", tuple, dict, Any], None]
LARGEST = 1 << 22
"""Labels are spread out over at most so many elements when a view reorders them."""


def table(*entries: tuple[Handler, str]) -> dict[str, Handler]:
    """Operation -> handler, from `(handler, names)`."""
    return {name: handle for handle, names in entries for name in names.split()}


def pointwise(run: Tracer, args: tuple, kwargs: dict, out: Any) -> None:
    """Labels merge position by position."""
    operands = [run.operand(t) for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
    factors = run.labels.combine(operands, out.ndim, f"meets a tensor of fixed size in {run.where()}")
    run.set(out, factors)


def _unchanged(run: Tracer, args: tuple, kwargs: dict, out: Any) -> None:
    run.set(out, run.factors(args[0]))


def _copy(run: Tracer, args: tuple, kwargs: dict, out: Any) -> None:
    """What fills a slice of a tensor, all of its channels, labels the whole tensor (circular padding)."""
    target, source = args[0], args[1]
    whole, factors = target._base, run.factors(source)
    if run.factors(target) or target.numel() >= target.untyped_storage().nbytes() // target.element_size():
        pointwise(run, (target, source), {}, out)
    elif whole is not None and source.shape == target.shape and _spans(target, whole, factors):
        run.set(target, factors)
        run.set(whole, factors)
    else:
        run.freeze([source], f"{run.where()} writes them into a part of another tensor")


def _spans(part: Tensor, whole: Tensor, factors: Factors) -> bool:
    """Whether a slice has as many positions as its tensor along each axis with labels."""
    axes = {axis for factor in factors for axis in support(factor)}
    return (
        part.ndim == whole.ndim
        and part.stride() == whole.stride()
        and all(part.shape[a] == whole.shape[a] for a in axes)
    )


def _permute(run: Tracer, args: tuple, kwargs: dict, out: Any) -> None:
    run.set(out, [f.transpose([d % f.ndim for d in args[1]]) for f in run.factors(args[0])])


def _transpose(run: Tracer, args: tuple, kwargs: dict, out: Any) -> None:
    a, b = (args[1], args[2]) if len(args) > 2 else (0, -1)
    run.set(out, [f.swapaxes(a, b) for f in run.factors(args[0])] if args[0].ndim > 1 else run.factors(args[0]))


def _unsqueeze(run: Tracer, args: tuple, kwargs: dict, out: Any) -> None:
    run.set(out, [np.expand_dims(f, args[1] % out.ndim) for f in run.factors(args[0])])


def _expand(run: Tracer, args: tuple, kwargs: dict, out: Any) -> None:
    run.set(out, [f.reshape((1,) * (out.ndim - f.ndim) + f.shape) for f in run.factors(args[0])])


def _view(run: Tracer, args: tuple, kwargs: dict, out: Any) -> None:
    if not isinstance(out, Tensor):
        return
    kept: list[np.ndarray] = []
    for factor in run.factors(args[0]):
        moved = reshape(run, factor, tuple(args[0].shape), tuple(out.shape))
        if moved is not None and any(support(moved) & support(other) for other in kept):
            run.labels.freeze(moved, f"a view in {run.where()} merges them with other channels")
        elif moved is not None:
            kept.append(moved)
    run.set(out, kept)


def reshape(run: Tracer, factor: np.ndarray, old: tuple[int, ...], new: tuple[int, ...]) -> np.ndarray | None:
    """Labels of a view from `old` to `new`.

    Where axes are merged, a joint labelling over several of them must come out rectangular: only the most major of
    its axes goes on shrinking. In the order of the merge that is the head of (heads, features), and in a channel
    shuffle the channel of (channels of a group, groups).
    """
    spread, target, touched = list(factor.shape), [1] * len(new), []
    for olds, news in chunks(old, new):
        varying = support(factor)
        hit = varying & set(olds)
        if hit and sum(old[a] > 1 for a in olds) > 1 and len(varying) > 1:
            major = min(hit) if varying <= set(olds) else max(varying, key=lambda a: stride(factor, a))
            factor = run.labels.coarsen(factor, varying - {major})
            spread = [1 if a in varying - {major} and a not in olds else n for a, n in enumerate(spread)]
            hit = support(factor) & set(olds)
        if hit:
            touched += news
            for a in olds:
                spread[a] = old[a]
            for a in news:
                target[a] = new[a]
    spread = [max(n, m) if n > 1 else m for n, m in zip(spread, factor.shape, strict=True)]
    if math.prod(spread) > LARGEST or math.prod(spread) != math.prod(target):
        run.labels.freeze(factor, f"a view in {run.where()} spreads them over the whole tensor")
        return None
    moved = np.broadcast_to(factor, spread).reshape(target)
    for axis in touched:
        first = moved.take([0], axis)
        if moved.shape[axis] > 1 and (moved == first).all():
            moved = first
    return moved


def chunks(old: tuple[int, ...], new: tuple[int, ...]) -> Iterable[tuple[list[int], list[int]]]:
    """The finest matching stretches of axes of two shapes of the same size; axes of size 1 are left out."""
    left, right = [a for a, n in enumerate(old) if n != 1], [a for a, n in enumerate(new) if n != 1]
    while left and right:
        olds, news = [left.pop(0)], [right.pop(0)]
        a, b = old[olds[0]], new[news[0]]
        while a != b:
            if a < b:
                olds.append(left.pop(0))
                a *= old[olds[-1]]
            else:
                news.append(right.pop(0))
                b *= new[news[-1]]
        yield olds, news


def _slice(run: Tracer, args: tuple, kwargs: dict, out: Any) -> None:
    axis = (args[1] if len(args) > 1 else 0) % args[0].ndim
    start, stop, step = (*args[2:], *(None,) * (5 - len(args)))[:3]
    window = slice(start, stop, kwargs.get("step", step) or 1)
    _window(run, args[0], axis, window, out)


def _window(run: Tracer, source: Tensor, axis: int, window: slice, out: Tensor) -> None:
    kept = []
    for factor in run.factors(source):
        if axis in support(factor) and out.shape[axis] == 1:
            rest = run.labels.pin(factor, [axis], f"{run.where()} takes one of them by its position")
            if rest is None:
                continue
            factor = rest
        elif axis in support(factor) and out.shape[axis] != source.shape[axis]:
            if len(support(factor)) > 1:
                factor = run.labels.coarsen(factor, [axis])
            else:
                factor = factor[tuple(window if a == axis else slice(None) for a in range(factor.ndim))]
        kept.append(factor)
    run.set(out, kept)


def _split(run: Tracer, args: tuple, kwargs: dict, out: Any) -> None:
    """Equal parts must stay equal, so their channels are merged part by part; unequal parts have sizes of their own."""
    source, at = args[0], 0
    axis = (args[2] if len(args) > 2 else kwargs.get("dim", 0)) % source.ndim
    for part in out:
        _window(run, source, axis, slice(at, at + part.shape[axis]), part)
        at += part.shape[axis]
    if len({part.shape[axis] for part in out}) == 1:
        for part in out[1:]:
            for a, b in zip(run.factors(out[0]), run.factors(part), strict=True):
                run.labels.unify(a, b)


def _select(run: Tracer, args: tuple, kwargs: dict, out: Any) -> None:
    source, axis = args[0], args[1] % args[0].ndim
    _take_one(run, source, axis, [out])


def _unbind(run: Tracer, args: tuple, kwargs: dict, out: Any) -> None:
    axis = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % args[0].ndim
    _take_one(run, args[0], axis, out)


def _take_one(run: Tracer, source: Tensor, axis: int, outs: Sequence[Tensor]) -> None:
    reason = f"{run.where()} takes one of them by its position"
    rest = [run.labels.pin(f, [axis], reason) for f in run.factors(source)]
    for out in outs:
        run.set(out, [f.squeeze(axis) for f in rest if f is not None])


def _restride(run: Tracer, args: tuple, kwargs: dict, out: Any) -> None:
    """`as_strided_` only changes the memory layout where pooling calls it."""
    factors = run.factors(args[0])
    if all(f.ndim == out.ndim and all(n in (1, m) for n, m in zip(f.shape, out.shape, strict=True)) for f in factors):
        run.set(out, factors)
    else:
        run.freeze([args[0]], f"{run.where()} reads memory by strides")


def _cat(run: Tracer, args: tuple, kwargs: dict, out: Any) -> None:
    parts = [t for t in args[0] if t.ndim == out.ndim]
    axis = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % out.ndim
    joined, others = [], []
    labelled = any(axis in support(f) for t in parts for f in run.factors(t))
    for part in parts:
        operand = run.operand(part)
        mine: np.ndarray | None = None
        rest = []
        for factor in operand.factors:
            if axis in support(factor) and len(support(factor)) > 1:
                factor = run.labels.coarsen(factor, [axis])
            if support(factor) == {axis}:
                mine = factor
            else:
                rest.append(factor)
        wide = tuple(w and a != axis for a, w in enumerate(operand.wide))
        others.append(Operand(tuple(rest), wide))
        if labelled and mine is None:
            mine = along(run.labels.fresh(part.shape[axis]), axis, out.ndim)
            run.labels.freeze(mine, f"{run.where()} joins them with channels of fixed number")
        joined.append(mine)
    factors = list(run.labels.combine(others, out.ndim, f"joined with a tensor of fixed size in {run.where()}"))
    if labelled:
        factors.append(np.concatenate([j for j in joined if j is not None], axis))
    run.set(out, factors)


def _stack(run: Tracer, args: tuple, kwargs: dict, out: Any) -> None:
    axis = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % out.ndim
    operands = [run.operand(t) for t in args[0]]
    factors = run.labels.combine(operands, out.ndim - 1, f"stacked with a tensor of fixed size in {run.where()}")
    run.set(out, [np.expand_dims(f, axis) for f in factors])


def _pad(run: Tracer, args: tuple, kwargs: dict, out: Any) -> None:
    """Channels that a padded shortcut adds get labels like any others: they are coupled with those they are added to.

    Code that computes the amounts from shapes lets them shrink, equally before and after; where the amounts are fixed,
    the trial removal fails and freezes these channels alone, not the shortcut's own.
    """
    source, amounts = args[0], args[1]
    by_axis = {source.ndim - 1 - i // 2: amounts[i : i + 2] for i in range(0, len(amounts), 2)}
    kept = []
    for factor in run.factors(source):
        for axis in support(factor) & {a for a, amount in by_axis.items() if any(amount)}:
            if len(support(factor)) > 1:
                factor = run.labels.coarsen(factor, [axis])
                continue
            before, after = (max(n, 0) for n in by_axis[axis])
            factor = factor.take(range(max(-by_axis[axis][0], 0), factor.shape[axis] + min(by_axis[axis][1], 0)), axis)
            extra = run.labels.fresh(before + after)
            if before == after > 0:  # the code may well compute both from the number that is missing
                run.record.balanced.append((extra, 2))
            elif before and after:
                run.labels.freeze(extra, f"{run.where()} pads by unequal numbers of channels (F.pad)")
            first, last = np.split(extra, [before])
            factor = np.concatenate([along(first, axis, factor.ndim), factor, along(last, axis, factor.ndim)], axis)
        kept.append(factor)
    run.set(out, kept)


def _repeat(run: Tracer, args: tuple, kwargs: dict, out: Any) -> None:
    times = args[1]
    moved = []
    for factor in run.factors(args[0]):
        factor = factor.reshape((1,) * (out.ndim - factor.ndim) + factor.shape)
        moved.append(np.tile(factor, [t if a in support(factor) else 1 for a, t in enumerate(times)]))
    run.set(out, moved)


def _roll(run: Tracer, args: tuple, kwargs: dict, out: Any) -> None:
    dims = args[2] if len(args) > 2 and args[2] else range(args[0].ndim)
    pinned(run, args[0], [d % args[0].ndim for d in dims], out, "shifts them by a fixed number")


def _log_sigmoid(run: Tracer, args: tuple, kwargs: dict, out: Any) -> None:
    pointwise(run, args, kwargs, out[0])


def _unfold(run: Tracer, args: tuple, kwargs: dict, out: Any) -> None:
    """Windows over one axis, which come last."""
    pinned(run, args[0], [args[1] % args[0].ndim], out, "takes windows over them")
    run.set(out, [f[..., None] for f in run.factors(out)])


def _flip(run: Tracer, args: tuple, kwargs: dict, out: Any) -> None:
    factors = run.factors(args[0])
    dims = tuple(d % args[0].ndim for d in args[1])
    run.set(out, [np.flip(f, dims) for f in factors])


def pinned(run: Tracer, source: Tensor, axes: Iterable[int], out: Tensor, what: str) -> None:
    """The operation keeps the shape, and needs `axes` as they are."""
    rest = [run.labels.pin(f, axes, f"{run.where()} {what}") for f in run.factors(source)]
    run.set(out, [f for f in rest if f is not None])


def _embedding(run: Tracer, args: tuple, kwargs: dict, out: Any) -> None:
    weight, origin = args[0], run.source(args[0]).name
    rest = [run.labels.pin(f, [0], f"{run.where()} looks entries up") for f in run.factors(weight)]
    if origin is not None:
        run.use(origin, WeightUse("other", weight.shape[1], weight.shape[0], math.prod(out.shape[:-1]), out_axis=1))
    run.set(out, [f.reshape((1,) * (out.ndim - 1) + f.shape[1:]) for f in rest if f is not None])


def _index(run: Tracer, args: tuple, kwargs: dict, out: Any) -> None:
    source, indices = args[0], list(args[1])
    axes: list[int] = []
    at = 0
    for index in indices:
        step = index.ndim if index is not None and index.dtype in (torch.bool, torch.uint8) else 1
        axes += range(at, at + step) if index is not None else []
        at += step
    inserted = out.ndim - (source.ndim - len(axes))
    front = axes[0] if axes == list(range(axes[0], axes[-1] + 1)) else 0
    moved = []
    for factor in run.factors(source):
        rest = run.labels.pin(factor, axes, f"{run.where()} picks entries by position")
        if rest is not None:
            shape = [n for a, n in enumerate(rest.shape) if a not in axes]
            moved.append(rest.reshape(shape[:front] + [1] * inserted + shape[front:]))
    run.set(out, moved)


def _index_select(run: Tracer, args: tuple, kwargs: dict, out: Any) -> None:
    pinned(run, args[0], [args[1] % args[0].ndim], out, "picks entries by position")


def _glu(run: Tracer, args: tuple, kwargs: dict, out: Any) -> None:
    source = args[0]
    axis = (args[1] if len(args) > 1 else kwargs.get("dim", -1)) % source.ndim
    half = source.shape[axis] // 2
    kept = []
    for factor in run.factors(source):
        if axis in support(factor):
            first, last = np.split(factor, [half], axis)
            run.labels.unify(first, last)
            factor = first
        kept.append(factor)
    run.set(out, kept)


def _channel_shuffle(run: Tracer, args: tuple, kwargs: dict, out: Any) -> None:
    source, groups = args
    shape = (source.shape[0], groups, source.shape[1] // groups, *source.shape[2:])
    moved = []
    for factor in run.factors(source):
        split = reshape(run, factor, tuple(source.shape), shape)
        if split is not None:
            merged = reshape(run, split.swapaxes(1, 2), (shape[0], shape[2], shape[1], *shape[3:]), tuple(out.shape))
            moved += [] if merged is None else [merged]
    run.set(out, moved)


def _ignored(run: Tracer, args: tuple, kwargs: dict, out: Any) -> None:
    """Reads a value or makes a tensor of its own: no labels."""


VALUES: tuple[Handler, ...] = (pointwise, _view, _unsqueeze, _expand, _permute, _transpose, _unchanged)
"""Handlers of operations that work element by element, or only show the same elements in another shape."""

HANDLERS: dict[str, Handler] = table(
    (pointwise, "hardswish hardswish_ hardsigmoid hardtanh hardtanh_ _prelu_kernel lerp where masked_fill clamp mish"),
    (pointwise, "leaky_relu leaky_relu_ softplus elu elu_ silu_ rrelu_with_noise copy"),
    (_unchanged, "clone detach alias _to_copy contiguous lift_fresh lift_fresh_copy positive dropout native_dropout_"),
    (_unchanged, "zeros_like ones_like full_like empty_like rand_like randn_like fill_ zero_ fill bernoulli"),
    (_unchanged, "bernoulli_ uniform_ normal_ exponential_ geometric_ cauchy_ log_normal_ random_"),
    (_copy, "copy_"),
    (_permute, "permute"),
    (_transpose, "t t_ transpose transpose_ numpy_T"),
    (_unsqueeze, "unsqueeze unsqueeze_"),
    (_expand, "expand"),
    (_view, "squeeze squeeze_ view _unsafe_view reshape _reshape_alias view_copy"),
    (_slice, "slice"),
    (_split, "split split_with_sizes split_with_sizes_copy"),
    (_select, "select"),
    (_unbind, "unbind"),
    (_cat, "cat"),
    (_stack, "stack"),
    (_pad, "constant_pad_nd"),
    (_repeat, "repeat"),
    (_roll, "roll"),
    (_flip, "flip"),
    (_log_sigmoid, "log_sigmoid_forward"),
    (_unfold, "unfold"),
    (_embedding, "embedding"),
    (_index, "index"),
    (_index_select, "index_select"),
    (_glu, "glu"),
    (_channel_shuffle, "channel_shuffle native_channel_shuffle"),
    (_restride, "as_strided_"),
    (_ignored, "sym_size sym_stride _local_scalar_dense is_same_size new_zeros new_empty new_ones new_full equal"),
)
