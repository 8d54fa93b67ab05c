"""Channel labels: which elements of a tensor leave together, as arrays that broadcast to its shape.

Coupling is found by running the model once on labels instead of on values alone (abstract interpretation; Cousot and
Cousot, POPL 1977). Every axis of every weight gets a fresh label per position. A tensor carries *factors*: integer
arrays of its rank, full-sized on the axes along which labels vary and of size 1 elsewhere. An element leaves as soon
as one of its labels does. Operations move labels about (a view reshapes the array), and merge labels that have to
leave together (an addition merges position by position) in a union-find.

Three rules keep every intermediate tensor rectangular, which is what makes a slim model runnable:

- factors of one tensor vary along disjoint axes;
- where labels vary along several axes at once (the heads and features of attention) and an operation needs one of these
  axes alone, labels are merged along the other: a whole head becomes one unit (`coarsen`);
- a labelled axis that meets an axis of full size without labels can't shrink (`freeze`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

Factors = tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Operand:
    """What a pointwise operation has to know of a tensor.

    wide: whether each axis has more than one distinct entry (size above 1, not merely expanded).
    """

    factors: Factors
    wide: tuple[bool, ...]

    def lifted(self, ndim: int) -> Operand:
        """The same, broadcast to `ndim` axes."""
        lead = ndim - len(self.wide)
        factors = tuple(f.reshape((1,) * lead + f.shape) for f in self.factors)
        return Operand(factors, (False,) * lead + self.wide)


def support(factor: np.ndarray) -> frozenset[int]:
    """The axes along which a factor's labels vary."""
    return frozenset(axis for axis, size in enumerate(factor.shape) if size > 1)


def along(labels: np.ndarray, axis: int, ndim: int) -> np.ndarray:
    """`(n,)` labels as a factor on `axis` of a tensor of `ndim` axes."""
    return labels.reshape([-1 if a == axis else 1 for a in range(ndim)])


def stride(factor: np.ndarray, axis: int) -> int:
    """How far labels are apart along `axis`: fresh labels ascend, so a view's more major axis has the larger stride."""
    at: list[int] = [0] * factor.ndim
    first = int(factor[tuple(at)])
    at[axis] = 1
    return abs(int(factor[tuple(at)]) - first)


class Labels:
    """A union-find over labels. A class is named by its smallest label, so that names follow the forward order."""

    def __init__(self) -> None:
        self.size = 0
        self._parent = np.arange(1 << 12)
        self._frozen: list[tuple[np.ndarray, str]] = []
        self._heads: list[np.ndarray] = []

    def fresh(self, count: int) -> np.ndarray:
        """`(count,)` new labels, ascending."""
        start, self.size = self.size, self.size + count
        while self.size > len(self._parent):
            self._parent = np.concatenate([self._parent, np.arange(len(self._parent), 2 * len(self._parent))])
        return np.arange(start, self.size)

    def find(self, labels: np.ndarray) -> np.ndarray:
        """The class of each label."""
        root = self._parent[labels]
        while not np.array_equal(up := self._parent[root], root):
            root = up
        self._parent[labels] = root
        return root

    def unify(self, a: np.ndarray, b: np.ndarray) -> None:
        """Merge the classes of two arrays of labels, position by position (they broadcast)."""
        a, b = np.broadcast_arrays(self.find(a), self.find(b))
        differ = a != b
        if differ.any():
            for x, y in np.unique(np.stack([a[differ], b[differ]]), axis=1).T.tolist():
                x, y = self._root(x), self._root(y)
                self._parent[max(x, y)] = min(x, y)

    def freeze(self, labels: np.ndarray | Iterable[np.ndarray], reason: str) -> None:
        """These labels must stay; the first reason given for a class is the one that is told."""
        for part in [labels] if isinstance(labels, np.ndarray) else labels:
            self._frozen.append((np.unique(part), reason))

    def coarsen(self, factor: np.ndarray, axes: Iterable[int]) -> np.ndarray:
        """Merge labels along `axes`; the factor that is left varies along the others only."""
        rows = factor
        for axis in axes:
            rows = rows.take([0], axis)
        self.unify(factor, rows)
        return rows

    def mark_heads(self, labels: np.ndarray) -> None:
        """These classes are attention heads."""
        self._heads.append(np.unique(labels))

    def pin(self, factor: np.ndarray, axes: Iterable[int], reason: str) -> np.ndarray | None:
        """`axes` can't shrink: what is left of the factor, or None once its labels are frozen."""
        hit = support(factor) & set(axes)
        if not hit:
            return factor
        if hit == support(factor):
            self.freeze(factor, reason)
            return None
        return self.coarsen(factor, hit)

    def combine(self, operands: Sequence[Operand], ndim: int, reason: str) -> Factors:
        """The labels of a pointwise operation's result; `reason` is why a label is frozen if it has no partner."""
        lifted = [operand.lifted(ndim) for operand in operands]
        covered = [frozenset[int]().union(*map(support, o.factors)) for o in lifted]
        merged: list[np.ndarray] = []
        for at, operand in enumerate(lifted):
            for factor in operand.factors:
                bare = {
                    axis
                    for other, cover in zip(lifted, covered, strict=True)
                    if other is not lifted[at]
                    for axis in support(factor)
                    if other.wide[axis] and axis not in cover
                }
                rest = self.pin(factor, bare, reason)
                if rest is not None:
                    merged = self._meet(merged, rest, reason)
        return tuple(merged)

    def _meet(self, factors: list[np.ndarray], new: np.ndarray, reason: str) -> list[np.ndarray]:
        """Add a factor to those of a tensor, merging it with every factor that varies along one of its axes."""
        apart = []
        for old in factors:
            common = support(old) & support(new)
            if not common:
                apart.append(old)
            elif support(old) == support(new):
                self.unify(old, new)
                new = old
            elif common in (support(old), support(new)):
                few, many = (old, new) if common == support(old) else (new, old)
                extra = support(many) - common
                if max(stride(many, a) for a in extra) <= min(stride(many, a) for a in common):
                    new = self.coarsen(many, extra)  # a scale per head meets a head's features
                    self.unify(new, few)
                else:
                    self.freeze(few, f"it is shared by several heads ({reason})")
                    new = self.coarsen(many, common)
            else:
                apart.append(self.coarsen(old, common))
                new = self.coarsen(new, common)
        return [*apart, new]

    def roots_frozen(self) -> dict[int, str]:
        """Frozen class -> reason."""
        reasons: dict[int, str] = {}
        for labels, reason in self._frozen:
            for root in self.find(labels).tolist():
                reasons.setdefault(root, reason)
        return reasons

    def roots_head(self) -> set[int]:
        """Classes that are attention heads."""
        return {root for labels in self._heads for root in self.find(labels).tolist()}

    def _root(self, label: int) -> int:
        while (up := int(self._parent[label])) != label:
            label = up
        return label
