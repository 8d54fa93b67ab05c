"""Channel labels through operations over space: pooling, resampling, and those that trade channels for positions."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from amc.labels import along
from amc.ops_elements import Handler, pinned, table

if TYPE_CHECKING:
    from amc.tracer import Tracer


def _spatial(dims: int) -> Handler:
    """Pooling and resampling over the last `dims` axes."""

    def handle(run: Tracer, args: tuple, kwargs: dict, out: Any) -> None:
        source = args[0]
        for result in out if isinstance(out, (tuple, list)) else [out]:
            if result.ndim == source.ndim:
                last = range(source.ndim - dims, source.ndim)
                pinned(run, source, last, result, "pools or resamples over them")

    return handle


def _pixel_shuffle(run: Tracer, args: tuple, kwargs: dict, out: Any) -> None:
    """`(C r r, H, W)` to `(C, H r, W r)`."""
    _gathered(run, args[0], 2, args[1] ** 2, out)


def _col2im(run: Tracer, args: tuple, kwargs: dict, out: Any) -> None:
    """`(C k k, L)` to `(C, H, W)`."""
    _gathered(run, args[0], 1, math.prod(args[2]), out)


def _pixel_unshuffle(run: Tracer, args: tuple, kwargs: dict, out: Any) -> None:
    """`(C, H r, W r)` to `(C r r, H, W)`."""
    _scattered(run, args[0], 3, args[1] ** 2, out)


def _im2col(run: Tracer, args: tuple, kwargs: dict, out: Any) -> None:
    """`(C, H, W)` to `(C k k, L)`."""
    _scattered(run, args[0], 2, math.prod(args[1]), out)


def _gathered(run: Tracer, source: Tensor, dims: int, copies: int, out: Tensor) -> None:
    """The copies of a channel, one for each place of a block or window, stay together; `dims` axes are spatial."""
    moved = []
    for factor in _channels(run, source, dims):
        merged = run.labels.coarsen(factor.reshape(-1, copies), [1])
        moved.append(along(merged.ravel(), out.ndim - 3, out.ndim))
    run.set(out, moved)


def _scattered(run: Tracer, source: Tensor, place: int, copies: int, out: Tensor) -> None:
    """Each channel becomes that many, on the `place`-th axis from the end."""
    moved = [np.repeat(factor.ravel(), copies) for factor in _channels(run, source, 2)]
    run.set(out, [along(labels, out.ndim - place, out.ndim) for labels in moved])


def _channels(run: Tracer, source: Tensor, dims: int) -> Iterable[np.ndarray]:
    """The labels of what is not spatial; the `dims` last axes are needed as they are."""
    for factor in run.factors(source):
        last = range(source.ndim - dims, source.ndim)
        rest = run.labels.pin(factor, last, f"{run.where()} moves positions of a labelled axis")
        if rest is not None:
            yield rest


HANDLERS: dict[str, Handler] = table(
    (_pixel_shuffle, "pixel_shuffle"),
    (_pixel_unshuffle, "pixel_unshuffle"),
    (_im2col, "im2col"),
    (_col2im, "col2im"),
    (_spatial(1), "avg_pool1d max_pool1d adaptive_avg_pool1d upsample_linear1d upsample_nearest1d _upsample_nearest1d"),
    (_spatial(1), "reflection_pad1d replication_pad1d"),
    (_spatial(2), "avg_pool2d max_pool2d_with_indices _adaptive_avg_pool2d adaptive_avg_pool2d adaptive_max_pool2d"),
    (_spatial(2), "upsample_nearest2d upsample_bilinear2d upsample_bicubic2d _upsample_nearest_exact2d"),
    (_spatial(2), "_upsample_bilinear2d_aa _upsample_bicubic2d_aa reflection_pad2d replication_pad2d"),
    (_spatial(2), "grid_sampler_2d"),
    (_spatial(3), "avg_pool3d max_pool3d_with_indices _adaptive_avg_pool3d adaptive_max_pool3d upsample_nearest3d"),
    (_spatial(3), "upsample_trilinear3d reflection_pad3d replication_pad3d"),
)
