"""Channel labels through sums, and through products: multiply, then sum.

A product with a weight couples the input's channels with the weight's input axis, and hands on the labels of its output
axis. A product of two activations is attention, and what is left of its batch axes are heads.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from amc.labels import Factors, Operand, along, support
from amc.ops_elements import Handler, pinned, table
from amc.record import WeightUse

if TYPE_CHECKING:
    from amc.tracer import Tracer


def reduced(run: Tracer, factors: Factors, axes: Iterable[int]) -> tuple[Factors, Factors]:
    """Sum over `axes`: the factors that vary along other axes, and those that the sum takes in."""
    kept, taken = [], []
    for factor in factors:
        hit = support(factor) & set(axes)
        if not hit:
            kept.append(factor)
        elif hit == support(factor):
            taken.append(factor)
        else:
            kept.append(run.labels.coarsen(factor, hit))
    return tuple(kept), tuple(taken)


def reduced_axes(source: Tensor, args: tuple, kwargs: dict) -> list[int]:
    """The axes that a reduction takes in, not negative."""
    dims = args[1] if len(args) > 1 else kwargs.get("dim")
    if dims is None or isinstance(dims, (torch.dtype, bool)) or (isinstance(dims, (list, tuple)) and not dims):
        return list(range(source.ndim))
    return [d % max(source.ndim, 1) for d in ([dims] if isinstance(dims, int) else dims)]


def _drop(factors: Factors, axes: Iterable[int], ndim: int) -> list[np.ndarray]:
    """Leave out reduced axes, unless the result has them still (keepdim)."""
    return [f if f.ndim == ndim else f.squeeze(tuple(axes)) for f in factors]


def _sum(run: Tracer, args: tuple, kwargs: dict, out: Any) -> None:
    axes = reduced_axes(args[0], args, kwargs)
    kept, _ = reduced(run, run.factors(args[0]), axes)
    run.set(out, _drop(kept, axes, out.ndim))


def _norm(run: Tracer, args: tuple, kwargs: dict, out: Any) -> None:
    dims = args[2] if len(args) > 2 else kwargs.get("dim")
    _sum(run, (args[0], dims), {}, out)


def _mean(run: Tracer, args: tuple, kwargs: dict, out: Any) -> None:
    axes = reduced_axes(args[0], args, kwargs)
    kept, taken = reduced(run, run.factors(args[0]), axes)
    for result in out if isinstance(out, (tuple, list)) else [out]:
        run.set(result, _drop(kept, axes, result.ndim))
        for factor in taken:
            run.mark_statistic(result, factor)


def _extreme(run: Tracer, args: tuple, kwargs: dict, out: Any) -> None:
    axes = reduced_axes(args[0], args, kwargs)
    kept, taken = reduced(run, run.factors(args[0]), axes)
    run.labels.freeze(taken, f"{run.where()} compares them with each other")
    for result in out if isinstance(out, (tuple, list)) else [out]:
        run.set(result, _drop(kept, axes, result.ndim))


def _softmax(run: Tracer, args: tuple, kwargs: dict, out: Any) -> None:
    pinned(run, args[0], [args[1] % args[0].ndim], out, "compares them with each other")


def _cumsum(run: Tracer, args: tuple, kwargs: dict, out: Any) -> None:
    axis = (args[1] if len(args) > 1 else kwargs.get("dim", -1)) % args[0].ndim
    for result in out if isinstance(out, (tuple, list)) else [out]:
        pinned(run, args[0], [axis], result, "accumulates over them")


def _sorted(at: int) -> Handler:
    """Values and places in the order of size along the axis that the argument `at` names."""

    def handle(run: Tracer, args: tuple, kwargs: dict, out: Any) -> None:
        axis = (args[at] if len(args) > at else kwargs.get("dim", -1)) % args[0].ndim
        for result in out:
            pinned(run, args[0], [axis], result, "sorts them")

    return handle


def _matmul(run: Tracer, a: Tensor, b: Tensor, out: Tensor) -> Factors:
    """`(…, m, k) @ (…, k, n)`: multiply as `(…, m, k, n)`, then sum over k."""
    left, right = run.operand(a), run.operand(b)
    for tensor, operand, axis in ((a, left, a.ndim - 1), (b, right, b.ndim - 2)):
        for factor in operand.factors:
            if support(factor) == {axis} and run.is_weight(tensor):
                run.mark_input(factor)
    right_weight = run.is_weight(b)
    attention = not right_weight and not run.is_weight(a)
    # `A @ B` of parameters makes a weight, and no positions; in `F.linear(A, B)`, B is transposed.
    made = run.is_weight(a) and right_weight and not (run.source(b).whole and run.name(b) is None)
    wide_left = Operand(tuple(f[..., None] for f in left.factors), (*left.wide, False))
    wide_right = Operand(
        tuple(np.expand_dims(f, -3) for f in right.factors), (*right.wide[:-2], False, *right.wide[-2:])
    )
    ndim = out.ndim + 1
    reason = f"multiplies a tensor of fixed size in {run.where()}"
    product = run.labels.combine([wide_left, wide_right], ndim, reason)
    kept, _ = reduced(run, product, [ndim - 2])
    if attention:
        for factor in kept:
            if max(support(factor)) < ndim - 3:
                run.labels.mark_heads(factor)
    elif not made:  # the positions of a weight are a constant of the structure
        rows = set(range(ndim - 2)) if right_weight else {ndim - 1}
        rest = [run.labels.pin(f, rows, f"{run.where()} takes them for positions, not for channels") for f in kept]
        kept = tuple(f for f in rest if f is not None)
    if not attention and not made:
        outputs = b.shape[-1] if right_weight else a.shape[-2]
        out_axis = 1 if run.name(b) else 0
        use = WeightUse("linear", outputs, a.shape[-1], out.numel() // outputs, out_axis=out_axis)
        weight, given = (b, a) if right_weight else (a, b)
        run.count(weight, given, out.numel() * a.shape[-1], use)
    return tuple(f.squeeze(-2) for f in kept)


def _mm(run: Tracer, args: tuple, kwargs: dict, out: Any) -> None:
    run.set(out, _matmul(run, args[0], args[1], out))


def _addmm(run: Tracer, args: tuple, kwargs: dict, out: Any) -> None:
    factors = _matmul(run, args[1], args[2], out)
    product = Operand(factors, tuple(n > 1 for n in out.shape))
    reason = f"meets a tensor of fixed size in {run.where()}"
    run.set(out, run.labels.combine([product, run.operand(args[0])], out.ndim, reason))


def _mv(run: Tracer, args: tuple, kwargs: dict, out: Any) -> None:
    column = args[1][:, None]
    run.set(column, [f[:, None] for f in run.factors(args[1])])
    source = run.source(args[1])
    run.set_source(column, replace(source, whole=source.whole and not run.is_weight(args[0])))
    factors = _matmul(run, args[0], column, out[:, None])
    run.set(out, [f.squeeze(-1) for f in factors])


def _dot(run: Tracer, args: tuple, kwargs: dict, out: Any) -> None:
    """Sum of the products of two vectors."""
    run.labels.combine([run.operand(t) for t in args], 1, f"multiplies a tensor of fixed size in {run.where()}")
    run.set(out, ())


def _convolution(run: Tracer, args: tuple, kwargs: dict, out: Any) -> None:
    x, weight, bias, strides, *_, transposed, _, groups = args
    ins = groups * weight.shape[1] if not transposed else weight.shape[0]
    outs = weight.shape[0] if not transposed else groups * weight.shape[1]
    others = [axis for axis in range(x.ndim) if axis != 1]
    given = [run.labels.pin(f, others, f"{run.where()} slides over them") for f in run.factors(x)]
    sources = [f.ravel() for f in given if f is not None and support(f) == {1}]
    source = sources[0] if sources else None
    result = _weight_labels(run, weight, source, ins, outs, transposed, groups)
    factors: list[np.ndarray] = [] if result is None else [along(result, 1, out.ndim)]
    if bias is not None:
        operands = [channels(run, bias, out.ndim), Operand(tuple(factors), tuple(n > 1 for n in out.shape))]
        factors = list(run.labels.combine(operands, out.ndim, f"meets a bias of fixed size in {run.where()}"))
    run.set(out, factors)
    sites = math.prod((x if transposed else out).shape[2:])
    kind = "depthwise" if groups == ins > 1 else "conv"
    use = WeightUse(kind, outs, ins, math.prod(out.shape[2:]), strides[0], weight.shape[-1], int(transposed))
    run.count(weight, x, out.shape[0] * sites * weight.numel(), use)


def _weight_labels(
    run: Tracer, weight: Tensor, source: np.ndarray | None, ins: int, outs: int, transposed: bool, groups: int
) -> np.ndarray | None:
    """Couple a convolution's input with its weight's input axis; the labels of its output channels."""
    in_axis, out_axis = (0, 1) if transposed else (1, 0)
    by_axis: dict[int, np.ndarray] = {}
    for factor in run.factors(weight):
        rest = run.labels.pin(factor, range(2, weight.ndim), "a kernel's size")
        if rest is not None:
            by_axis[min(support(rest))] = rest.ravel()
            if len(support(rest)) > 1:
                run.labels.freeze(rest, f"the weight of {run.where()} mixes its axes")
    reason = f"the other factor of {run.where()} has a fixed size"
    if groups == 1:
        incoming = by_axis.get(in_axis)
        if incoming is not None and source is not None:
            run.labels.unify(incoming, source)
        else:
            run.labels.freeze([x for x in (incoming, source) if x is not None], reason)
        if incoming is not None:
            run.mark_input(incoming)
        return by_axis.get(out_axis)
    if ins == groups:
        return _depthwise(run, source, by_axis, outs // ins, transposed)
    name = run.source(weight).parameter
    rows = by_axis.get(0)
    blocked = run.record.axes.get((name or "", 1))
    columns = source if not transposed else run.labels.fresh(outs)
    if name is None or rows is None or blocked is None or columns is None or source is None:
        run.labels.freeze([x for x in (source, *by_axis.values()) if x is not None], reason)
        return None if transposed else rows
    if blocked.blocks == 1:
        blocked.labels, blocked.blocks, blocked.role = columns, groups, "out" if transposed else "in"
    else:
        run.labels.unify(blocked.labels, columns)
    if transposed:
        run.labels.unify(rows, source)
        run.mark_input(rows)
    run.record.balanced += [(rows, groups), (columns, groups)]
    return rows if not transposed else columns


def _depthwise(
    run: Tracer, source: np.ndarray | None, by_axis: dict[int, np.ndarray], multiplier: int, transposed: bool
) -> np.ndarray | None:
    """Each input channel makes `multiplier` output channels: they leave together."""
    rows = by_axis.get(0)
    reason = f"the other factor of {run.where()} has a fixed size"
    if rows is None or source is None:
        run.labels.freeze([x for x in (rows, source, *by_axis.values()) if x is not None], reason)
        return None
    for axis, labels in by_axis.items():
        if axis:
            run.labels.freeze(labels, "a depthwise convolution's multiplier")
    if transposed:
        run.labels.unify(rows, source)
        return np.repeat(rows, multiplier)
    run.labels.unify(rows, np.repeat(source, multiplier))
    return rows


def channels(run: Tracer, vector: Tensor | None, ndim: int, axis: int = 1) -> Operand:
    """A vector of one entry per channel as an operand on `axis`."""
    if vector is None:
        return Operand((), (False,) * ndim)
    factors = tuple(along(f.ravel(), axis, ndim) for f in run.factors(vector))
    return Operand(factors, tuple(a == axis and vector.numel() > 1 for a in range(ndim)))


PRODUCTS: tuple[Handler, ...] = (_mm, _addmm, _mv, _convolution)
"""Handlers of what costs multiply-accumulates."""

HANDLERS: dict[str, Handler] = table(
    (_sum, "sum"),
    (_norm, "linalg_vector_norm norm"),
    (_mean, "mean var std var_mean std_mean"),
    (_extreme, "amax amin max min argmax argmin any all prod logsumexp median"),
    (_softmax, "_softmax _log_softmax _safe_softmax"),
    (_cumsum, "cumsum cumprod cummax cummin logcumsumexp"),
    (_sorted(1), "sort"),
    (_sorted(2), "topk"),
    (_mm, "mm bmm"),
    (_addmm, "addmm baddbmm"),
    (_mv, "mv"),
    (_dot, "dot vdot"),
    (_convolution, "convolution"),
)
