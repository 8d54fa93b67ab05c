"""Latency of any policy from measurements of a few: a regression whose features are what kernels do with channels.

Whole networks are measured, at random policies, as AOWS does (Berman et al., CVPR 2020, section 3.2), since a network's
time is not the sum of its layers alone: layouts change between them, and kernels are fused. Each policy tells about
all groups at once, so a hundred are enough.

A layer computes in proportion to its inputs times its outputs, each as they are or rounded up to the block of a kernel
(4, 8 or 16 channels). Which kernel runs depends on the inputs: fewer than a block are read as they lie, multiples of 4
from a blocked layout, and others take the slow way (ONNX Runtime's `nchwc_transformer.cc`). A layer also moves its
inputs and outputs, more where its layout isn't the one that the next layer reads, and fetches its weights, whatever
the size of the image (so a depthwise layer of small images pays by the channel).

The same features describe every layer; what they leave over is taken up by coefficients of the layer's own shape, and
by a table of each group's widths. A prior shrinks all of them towards zero (ridge regression), each family by a scale
of its own. These scales, the noise, and whether blocks are of 8 or 16 channels are for the samples to say: what makes
these most probable counts (the evidence of Bayesian linear regression; MacKay, 1992). Samples that disagree with all
others (something else ran meanwhile) lose their weight (Huber, 1964), judged by their leave-one-out residual, in which
an outlier can't hide.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.optimize import minimize, nnls

from amc.groups import Structure

BLOCKS = (4, 8, 16)
KERNELS = (8, 16)
"""Blocks of the kernels that vectors of 256 and 512 bits have."""
ALIGNMENT = 4
"""Channels that a blocked layout can hold come in multiples of this."""
ALIGNMENTS = (2, 4, 8, 16, 32, 64)
STEPS = 24
"""At most so many steps in a group's own table."""

# How far each family of coefficients may reach, in dense latencies, and the relative noise of a sample: where the
# search for the most probable scales begins.
CONSTANT, COMMON, DEPTHWISE, SPECIFIC, LINEAR, ALIGNED, STEP = 0.01, 0.5, 5.0, 0.05, 0.015, 0.0005, 0.00015
NOISE = 0.02
EXACT = 0.001
"""The noise of samples that another predictor made: none, but for what makes a matrix invertible."""
TRUST = 1.5
"""Standard deviation of a scale's logarithm round its beginning: few samples must not send it far."""
FARTHEST = 6.0
"""A scale's logarithm moves by no more: beyond, matrices lose their inverse."""


@dataclass(frozen=True, eq=False)
class Shapes:
    """What a model's latency depends on: its layers' sizes as functions of the widths.

    channels: `(groups,)`. outputs, inputs: `(layers,)` dense counts; an input of 1 is a depthwise layer's.
    lost_outputs, lost_inputs: `(groups, layers)` how many of them a removed unit takes.
    work, traffic, weights: `(layers,)` shares of the dense model's multiply-accumulates, of the elements its layers
        write, and of its weights.
    layer_class, group_class: `(layers,)`, `(groups,)` the same number for equal shapes: what is alike is measured once.
    """

    channels: np.ndarray
    outputs: np.ndarray
    inputs: np.ndarray
    lost_outputs: np.ndarray
    lost_inputs: np.ndarray
    work: np.ndarray
    traffic: np.ndarray
    weights: np.ndarray
    layer_class: np.ndarray
    group_class: np.ndarray

    @classmethod
    def of(cls, structure: Structure) -> Shapes:
        """The layers that multiply (`structure.positions`), and the groups that thin them."""
        names = [name for name in structure.positions if len(structure.tensors[name].shape) > 1]
        row = {name: i for i, name in enumerate(names)}
        shapes = [structure.tensors[name].shape for name in names]
        lost = np.zeros((2, len(structure.groups), len(names)))
        touched: list[list[tuple[object, ...]]] = []
        for g, group in enumerate(structure.groups):
            touched.append([])
            for part in group.slices:
                if part.tensor in row and part.axis < 2:
                    lost[part.axis, g, row[part.tensor]] += len(part.index) / group.channels / part.blocks
                    shape = structure.tensors[part.tensor].shape
                    touched[-1].append((structure.positions[part.tensor], shape, part.axis))
        positions = np.array([structure.positions[name] for name in names], dtype=float)
        weights = np.array([float(np.prod(shape)) for shape in shapes])
        work = positions * weights
        traffic = positions * [shape[0] for shape in shapes]
        owned = [tuple(bool(lost[axis, :, i].any()) for axis in (0, 1)) for i in range(len(names))]
        layers = [(structure.positions[name], shapes[i], owned[i]) for i, name in enumerate(names)]
        groups = [
            (group.channels, tuple(sorted(map(repr, parts))))
            for group, parts in zip(structure.groups, touched, strict=True)
        ]
        return cls(
            channels=np.array([group.channels for group in structure.groups]),
            outputs=np.array([shape[0] for shape in shapes], dtype=float),
            inputs=np.array([shape[1] for shape in shapes], dtype=float),
            lost_outputs=lost[0],
            lost_inputs=lost[1],
            work=work / max(work.sum(), 1.0),
            traffic=traffic / max(traffic.sum(), 1.0),
            weights=weights / max(weights.sum(), 1.0),
            layer_class=_numbered(layers),
            group_class=_numbered(groups),
        )

    def layer_features(self, widths: np.ndarray, block: int | None) -> list[np.ndarray]:
        """`(n, groups)` widths to `(n, features, layers)` each of what computes, what moves and what fetches weights.

        block: of the device's kernels; None leaves the features that never fall as a width grows.
        """
        gone = self.channels - widths
        outputs, inputs = self.outputs - gone @ self.lost_outputs, self.inputs - gone @ self.lost_inputs
        out, into = outputs / self.outputs, inputs / self.inputs
        compute = [out * into, *(_rounded(outputs, self.outputs, b) * _rounded(inputs, self.inputs, b) for b in BLOCKS)]
        move, fetch = [out, into], [out * into]
        if block is not None:
            full, depthwise = _rounded(outputs, self.outputs, block), self.inputs == 1
            # A depthwise layer of one channel is an ordinary one; else it is blocked or slow.
            reads = _kernels(np.where(depthwise, outputs, inputs), np.where(depthwise, 2, block))
            plain, blocked, slow = reads
            compute += [plain * into * full, blocked * into * full, slow * out * into]
            compute.append(blocked * full * _rounded(inputs, self.inputs, block))
            fetch += [blocked * into * full, slow * out * into]
            for one in reads:
                move.append(one * into)
                for then in _kernels(outputs, block):
                    move += [one * then * 1.0, one * then * full, one * then * out]
        shares = ((compute, self.work), (move, self.traffic), (fetch, self.weights))
        return [np.stack(features, axis=1) * share for features, share in shares]

    @cached_property
    def kinds(self) -> list[tuple[np.ndarray, float]]:
        """`(layers,)` masks of layers that share coefficients, and these' scale. Memory bounds depthwise layers."""
        depthwise = self.inputs == 1
        found = [(~depthwise, COMMON), (depthwise, DEPTHWISE)]
        found += [(self.layer_class == kind, SPECIFIC) for kind in np.unique(self.layer_class)]
        return [(mask, scale) for mask, scale in found if mask.any()]

    @cached_property
    def group_features(self) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """Group class -> its features of each width `(channels + 1, features)`, and where their scales begin."""
        found = {}
        for kind in np.unique(self.group_class):
            channels = int(self.channels[self.group_class == kind][0])
            widths = np.arange(channels + 1)
            columns, scales = [widths / channels], [LINEAR]
            for step in ALIGNMENTS:
                if step <= channels:
                    columns += [(widths % step == 0) * 1.0, (widths % step == 0) * widths / channels]
                    scales += [ALIGNED, ALIGNED]
            for knot in np.unique(np.linspace(1, channels, min(channels, STEPS)).round())[1:]:
                columns.append((widths >= knot) * 1.0)
                scales.append(STEP)
            found[int(kind)] = np.stack(columns, axis=1), np.array(scales)
        return found


@dataclass(frozen=True, eq=False)
class Predictor:
    """Relative latency (dense is about 1) as constant + layers + a table for each group.

    weights: `(features, layers)`. tables: for each group, `(channels + 1,)` by width.
    spread: the standard deviation of the leave-one-out residuals, relative.
    block: as in `Shapes.layer_features`.
    """

    shapes: Shapes
    constant: float
    weights: np.ndarray
    tables: tuple[np.ndarray, ...]
    spread: float = 0.0
    block: int | None = None

    def __call__(self, widths: Sequence[Sequence[int]] | np.ndarray) -> np.ndarray:
        """`(n, groups)` widths to `(n,)` relative latencies."""
        rows = np.asarray(widths)
        layers = np.concatenate(self.shapes.layer_features(rows, self.block), axis=1)
        own = sum(table[rows[:, g]] for g, table in enumerate(self.tables))
        return self.constant + np.tensordot(layers, self.weights, 2) + own


def fit(shapes: Shapes, widths: np.ndarray, ratios: np.ndarray) -> Predictor:
    """The predictor of these samples: `(n, groups)` widths, `(n,)` latencies over the dense model's."""
    found = (_fit(_Columns(shapes, block), widths, ratios) for block in KERNELS)
    return max(found, key=lambda pair: pair[0])[1]


def _fit(columns: _Columns, widths: np.ndarray, ratios: np.ndarray) -> tuple[float, Predictor]:
    """The log evidence but for a constant, and the predictor."""
    design = columns.design(widths, ratios)
    families = [columns.family == family for family in np.unique(columns.family)]
    grams = np.stack([design[:, members] @ design[:, members].T for members in families])
    logs = np.zeros(len(families) + 1)
    for _ in range(2):
        weight, _, _ = _settled(_Evidence(grams, np.ones(len(design))), logs)
        found = minimize(
            _Evidence(grams, weight), logs, jac=True, method="L-BFGS-B", bounds=[(-FARTHEST, FARTHEST)] * len(logs)
        )
        logs = found.x
    weight, dual, spread = _settled(_Evidence(grams, np.ones(len(design))), logs)
    scaled = np.zeros(design.shape[1])
    for members, log in zip(families, logs, strict=False):
        scaled[members] = np.exp(2 * log)
    return -float(found.fun), columns.predictor(columns.scales * scaled * (design.T @ dual), spread)


@dataclass(frozen=True, eq=False)
class _Evidence:
    """How improbable samples are, as a function of the families' scales and of the noise.

    grams: `(families, n, n)` covariances of the samples where a scale is as it begins. weight: `(n,)` of each sample.
    Called with the logarithms of the scales over their beginnings, the noise last: minus the log evidence, and its
    gradient.
    """

    grams: np.ndarray
    weight: np.ndarray

    def covariance(self, logs: np.ndarray) -> np.ndarray:
        noise = NOISE**2 * np.exp(2 * logs[-1]) / self.weight
        found: np.ndarray = np.tensordot(np.exp(2 * logs[:-1]), self.grams, 1) + np.diag(noise)
        return found

    def __call__(self, logs: np.ndarray) -> tuple[float, np.ndarray]:
        covariance = self.covariance(logs)
        inverse = np.linalg.inv(covariance)
        dual = inverse.sum(axis=1)
        slope = inverse - np.outer(dual, dual)
        noise = NOISE**2 * np.exp(2 * logs[-1]) / self.weight
        gradient = [*np.exp(2 * logs[:-1]) * np.tensordot(self.grams, slope, 2), noise @ np.diag(slope)]
        value = (dual.sum() + np.linalg.slogdet(covariance)[1] + (logs**2).sum() / TRUST**2) / 2
        return float(value), np.array(gradient) + logs / TRUST**2


def _settled(evidence: _Evidence, logs: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Weights that no outlier keeps, the dual coefficients under them, and the spread of leave-one-out residuals."""
    for _ in range(8):
        inverse = np.linalg.inv(evidence.covariance(logs))
        dual = inverse.sum(axis=1)
        left_out = np.abs(dual / np.diag(inverse))
        spread = 1.4826 * float(np.median(left_out))
        weight = np.minimum(1.0, 2.5 * spread / np.maximum(left_out, 1e-12)) ** 2
        evidence = _Evidence(evidence.grams, weight)
    return weight, dual, spread


def fit_rising(shapes: Shapes, widths: np.ndarray, ratios: np.ndarray) -> Predictor:
    """A predictor that never falls as a width grows: rising features alone, and no coefficient below zero.

    ratios: without noise, the predictions of another.
    """
    columns = _Columns(shapes, None)
    design = columns.design(widths, ratios)
    # Normal equations, whose size is the number of columns; the prior makes them positive definite.
    gram = design.T @ design + EXACT**2 * np.eye(design.shape[1])
    root = np.linalg.cholesky(gram).T
    target = np.linalg.solve(root.T, design.sum(axis=0))
    coefficients, _ = nnls(root, target, maxiter=30 * len(root))
    return columns.predictor(columns.scales * coefficients, 0.0)


class _Columns:
    """The columns of the regression, where their scales begin, and the way back from coefficients to a predictor.

    family: `(columns,)` the same number for columns that share a scale: a kind of features of a kind of layers (of all
        that are not depthwise, of all that are, of each shape alone), or a kind of a group's own features.
    """

    def __init__(self, shapes: Shapes, block: int | None) -> None:
        self.shapes, self.block = shapes, block
        kinds = [part.shape[1] for part in shapes.layer_features(shapes.channels[None], block)]
        self.count = sum(kinds)
        features = np.repeat(np.arange(len(kinds)), kinds)
        self.tables: dict[int, np.ndarray] = {}
        scales, family = [np.array([CONSTANT])], [np.array(["constant"])]
        for _, scale in shapes.kinds:
            scales.append(np.full(self.count, scale))
            family.append(np.array([f"{scale} {feature}" for feature in features]))
        for kind, (table, begins) in shapes.group_features.items():
            chosen = (np.diff(table, axis=0) >= 0).all(axis=0) if block is None else np.ones(len(begins), dtype=bool)
            self.tables[kind] = table[:, chosen]
            scales.append(begins[chosen])
            family.append(begins[chosen].astype(str))
        self.scales, self.family = np.concatenate(scales), np.concatenate(family)

    def __call__(self, widths: np.ndarray) -> np.ndarray:
        """`(n, groups)` widths to `(n, columns)`."""
        layers = np.concatenate(self.shapes.layer_features(widths, self.block), axis=1)
        columns = [np.ones((len(widths), 1)), *(layers[:, :, mask].sum(axis=2) for mask, _ in self.shapes.kinds)]
        for kind, table in self.tables.items():
            columns.append(table[widths[:, self.shapes.group_class == kind]].sum(axis=1))
        return np.concatenate(columns, axis=1)

    def design(self, widths: np.ndarray, ratios: np.ndarray) -> np.ndarray:
        """The columns where their scales begin, over the measured: relative errors count."""
        return self(widths) * self.scales / ratios[:, None]

    def predictor(self, coefficients: np.ndarray, spread: float) -> Predictor:
        """Coefficients gathered by layer and by group."""
        constant, rest = float(coefficients[0]), coefficients[1:]
        weights = np.zeros((self.count, len(self.shapes.work)))
        for mask, _ in self.shapes.kinds:
            weights[:, mask] += rest[: self.count, None]
            rest = rest[self.count :]
        tables = {}
        for kind, table in self.tables.items():
            tables[kind], rest = table @ rest[: table.shape[1]], rest[table.shape[1] :]
        own = tuple(tables[int(kind)] for kind in self.shapes.group_class)
        return Predictor(self.shapes, constant, weights, own, spread, self.block)


def _rounded(count: np.ndarray, dense: np.ndarray, block: int) -> np.ndarray:
    """A count over the dense one, both rounded up to blocks."""
    return np.ceil(count / block) / np.ceil(dense / block)


def _kernels(count: np.ndarray, block: np.ndarray | int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Masks of counts that are read as they lie, from a blocked layout, and the slow way."""
    plain, even = count < block, count % ALIGNMENT == 0
    return plain, ~plain & even, ~plain & ~even


def _numbered(keys: Sequence[object]) -> np.ndarray:
    """The same number for equal keys, in order of appearance."""
    seen: dict[object, int] = {}
    return np.array([seen.setdefault(key, len(seen)) for key in keys], dtype=int)
