"""Runs a model and keeps the channel labels of every tensor it makes.

A `TorchDispatchMode` sees each low-level operation after PyTorch took apart the composite ones, so a handler for some
eighty operations covers what users write, whatever modules they write it in. The handlers are one plain dict in
`amc.coupling_ops`; an operation without one freezes the labels that reach it, so that an unknown operation costs
prunable channels, never a wrong coupling.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from amc import coupling_ops
from amc.errors import ModelError
from amc.forward import Inputs, call, flatten, random_batch
from amc.labels import Factors, Operand, along, support
from amc.modes import branching, evaluating
from amc.ops_norms import MASKED
from amc.ops_products import PRODUCTS
from amc.record import Axis, Record, Source, WeightUse
from amc.weights import identity, state_tensors

OUTPUT = "its channels are the model's output"


def state_names(model: nn.Module) -> dict[int, str]:
    """id of each parameter and persistent buffer -> the first state-dict name of its memory."""
    names: dict[int, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name, tensor in state_tensors(model).items():
        names.setdefault(id(tensor), first.setdefault(identity(name, tensor), name))
    return names


class Tracer(TorchDispatchMode):
    """Labels every tensor of a forward run.

    removed: `(tensor, axis)` -> mask of the positions to leave out of statistics that span channels. With it the run
        computes what a slim model should: a layer norm over the channels that are left.
    """

    def __init__(self, model: nn.Module, removed: Mapping[tuple[str, int], np.ndarray] | None = None) -> None:
        super().__init__()
        self.model = model
        self.record = Record()
        self.labels = self.record.labels
        self.removed = removed
        self.stack: list[str] = []
        self._counting = True
        self._names = state_names(model)
        self._met: dict[str, Factors] = {}
        self._factors = WeakTensorKeyDictionary()
        self._source = WeakTensorKeyDictionary()
        self._statistic = WeakTensorKeyDictionary()
        self._gone = np.zeros(0, bool)
        self._owner: dict[int, Axis] = {}

    # -- what handlers read and write -------------------------------------------------------------------------------

    def factors(self, tensor: Any) -> Factors:
        """The labels of a tensor; a parameter or buffer that is met for the first time gets fresh ones."""
        if not isinstance(tensor, Tensor):
            return ()
        known = self._factors.get(tensor)
        if known is None:
            name = self._names.get(id(tensor))
            known = () if name is None else self._meet_parameter(name, tensor)
            if name is not None:
                self._factors[tensor] = known
        return known

    def set(self, tensor: Tensor, factors: Sequence[np.ndarray]) -> None:
        """Label a result."""
        self._factors[tensor] = tuple(f for f in factors if support(f))

    def operand(self, tensor: Tensor) -> Operand:
        """A tensor as an operand of a pointwise operation."""
        wide = tuple(size > 1 and step != 0 for size, step in zip(tensor.shape, tensor.stride(), strict=True))
        return Operand(self.factors(tensor), wide)

    def name(self, tensor: Any) -> str | None:
        """The state-dict name of a parameter or persistent buffer."""
        return self._names.get(id(tensor)) if isinstance(tensor, Tensor) else None

    def source(self, tensor: Tensor) -> Source:
        """What a tensor was computed from."""
        name = self.name(tensor)
        return self._source.get(tensor, Source()) if name is None else Source(True, name, True)

    def set_source(self, tensor: Tensor, source: Source) -> None:
        """Note what a result was computed from."""
        self._source[tensor] = source

    def is_weight(self, tensor: Tensor) -> bool:
        """Whether a product with this tensor is one with a weight.

        A batch of matrices that has no parameter's shape is no weight: queries made of learned tokens.
        """
        source = self.source(tensor)
        return source.weight and (source.whole or tensor.ndim == 2)

    def mark_statistic(self, tensor: Tensor, labels: np.ndarray) -> None:
        """`tensor` is a statistic over these channels, good for normalizing them and for nothing else."""
        self._statistic[tensor] = [*self._statistic.get(tensor, []), labels]

    def mark_input(self, factor: np.ndarray) -> None:
        """A product sums over this axis of a weight; one that made the channels first, a tied one, is known by that."""
        owner = self._owner.get(int(factor.ravel()[0]))
        if owner is not None:
            use = self.record.uses.get(owner.tensor)
            owner.role = "out" if use is not None and use.out_axis == owner.axis else "in"

    def freeze(self, tensors: Sequence[Any], reason: str) -> None:
        """Every label of these tensors must stay."""
        for tensor in tensors:
            self.labels.freeze(self.factors(tensor), reason)

    def module(self) -> nn.Module:
        """The module that runs now."""
        return self.model.get_submodule(self.stack[-1] if self.stack else "")

    def where(self) -> str:
        """Its name, for messages."""
        name = self.stack[-1] if self.stack else ""
        return f"`{name}`" if name else "the model's forward"

    def gone(self, labels: np.ndarray) -> np.ndarray:
        """Which of these labels are removed in this run."""
        if len(self._gone) < self.labels.size:
            self._gone = np.concatenate([self._gone, np.zeros(self.labels.size - len(self._gone), bool)])
        return self._gone[labels]

    def count(self, weight: Tensor, given: Tensor, macs: int, use: WeightUse) -> None:
        """Add a product's multiply-accumulates to its weight's; a constant, where it isn't one parameter as a whole."""
        source = self.source(weight)
        if source.name is not None:
            self.use(source.name, use)
        each = weight[0] if use.kind == "linear" and weight.ndim == 3 else weight  # a batch may repeat its matrix
        whole = source.parameter
        if each.numel() != coupling_ops.distinct(each):
            self.freeze([given], f"they meet an expanded weight in {self.where()}")
            whole = None
        if whole is None:
            self.freeze([weight], f"the weight of {self.where()} is computed from others, or a part of one")
        if self._recurrent() or not self._counting:
            return
        if whole is None:
            self.record.fixed_macs += macs
        else:
            self.record.macs[whole] = self.record.macs.get(whole, 0) + macs

    def _recurrent(self) -> bool:
        """Whether a recurrent layer runs: by its kind, dtype and device, one fused operation or many products."""
        return isinstance(self.module(), nn.RNNBase | nn.RNNCellBase)

    def use(self, weight: str, use: WeightUse) -> None:
        """Note what a weight is first used for."""
        self.record.uses.setdefault(weight, use)

    # -- the run ----------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Run an operation and label its result."""
        kwargs = kwargs or {}
        packet = str(func.overloadpacket)
        given = (self._before(args[0]), *args[1:]) if torch.Tag.inplace_view in func.tags else args
        masked = MASKED.get(packet) if self.removed is not None else None
        out = masked(self, args, kwargs) if masked else None
        out = func(*args, **kwargs) if out is None else out
        tensors = list(_arguments(args, kwargs))
        coupling_ops.track_origin(self, func, tensors, out)
        if self.removed is not None and isinstance(out, Tensor | tuple):
            self._zero_over_zero(out)
        handler = coupling_ops.handler(func)
        if handler in PRODUCTS or any(self.factors(t) or t in self._statistic for t in tensors):
            self._pass_statistics(func, tensors, out)
            try:
                if handler is None:
                    raise NotImplementedError
                handler(self, given, kwargs, out)
            except Exception:  # a call that the handler doesn't foresee costs channels, not the model
                self.freeze(tensors, f"{packet.removeprefix('aten.')} in {self.where()} is not understood")
        return out

    def _before(self, tensor: Tensor) -> Tensor:
        """The tensor as it is before an operation that changes its shape in place (`squeeze_`), with its labels."""
        alias = tensor.detach()
        self._factors[alias] = self.factors(tensor)
        return alias

    def _zero_over_zero(self, out: Any) -> None:
        """A removed channel's weight over its own norm is still removed: zero, not NaN."""
        for tensor in flatten(out):
            if tensor.is_floating_point() and self.source(tensor).weight and tensor.isnan().any():
                tensor.nan_to_num_(0.0, float("inf"), -float("inf"))

    def _pass_statistics(self, func: Any, tensors: Sequence[Tensor], out: Any) -> None:
        marks = [m for t in tensors for m in self._statistic.get(t, [])]
        if not marks:
            return
        labelled = [f for t in tensors if t not in self._statistic for f in self.factors(t)]
        if coupling_ops.keeps_values(func) and isinstance(out, Tensor):
            if not labelled:
                self._statistic[out] = marks
                return
            classes = np.unique(np.concatenate([self.labels.find(f).ravel() for f in labelled]))
            if all(np.isin(self.labels.find(m), classes).all() for m in marks):
                return  # the statistic has come back to its channels: a normalization
        for mark in marks:
            self.labels.freeze(mark, f"{self.where()} uses a mean over them, which changes with their number")

    def _meet_parameter(self, name: str, tensor: Tensor) -> Factors:
        if name in self._met:
            return self._met[name]
        factors = []
        for axis, size in enumerate(tensor.shape):
            if size > 1:
                labels = self.labels.fresh(size)
                self.record.axes[name, axis] = self._owner[int(labels[0])] = Axis(name, axis, labels)
                factors.append(along(labels, axis, tensor.ndim))
                mask = self.removed.get((name, axis)) if self.removed is not None else None
                if mask is not None and len(mask) == size:
                    self.gone(labels)
                    self._gone[labels] = mask
        self._met[name] = tuple(factors)
        return self._met[name]

    def run(self, inputs: Inputs) -> Record:
        """One forward pass in evaluation mode, without gradients; the model is left as it was.

        Raises:
            ModelError: the forward raises; it names the innermost module that was running.
        """
        self.record.output = self._pass(inputs, evaluating(self.model))
        if not any(True for _ in flatten(self.record.output)):
            raise ModelError(
                f"the model returns no tensor (but {type(self.record.output).__name__}); return one, or a tuple, a "
                "mapping or an object with attributes that holds one"
            )
        return self.record

    def reach(self, inputs: Inputs) -> None:
        """Passes that reach parameters that `run` didn't: in training mode, and on a batch of random inputs.

        Nothing of these is counted, and channels that only they make stay: nothing else is known of them.
        """
        start, known = self.labels.size, set(self.record.axes)
        self._counting = False
        for given, mode in ((inputs, branching), (random_batch(inputs), evaluating)):
            scout = Tracer(self.model)
            try:
                scout._pass(given, mode(self.model))
            except ModelError:  # training wants targets, the batch is fixed …
                continue
            if not self.unmet() <= scout.unmet():
                self._pass(given, mode(self.model))
        for key, axis in self.record.axes.items():
            if key not in known:
                roots = self.labels.find(axis.labels)
                self.labels.freeze(roots[roots >= start], "the example inputs don't reach them in evaluation mode")

    def unmet(self) -> frozenset[str]:
        """Parameters that no operation was given."""
        names = (self._names.get(id(p)) for p in self.model.parameters() if p.numel())
        return frozenset(name for name in names if name is not None and name not in self._met)

    def _pass(self, inputs: Inputs, mode: AbstractContextManager[None]) -> Any:
        """The model's output in a mode; its labels are frozen."""
        handles = []
        for name, module in self.model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                raise ModelError(f"`{name}` is a TorchScript module, which can't be traced; give the Python module")
            handles.append(module.register_forward_pre_hook(self._enter(name), prepend=True))
            handles.append(module.register_forward_hook(self._leave))
        try:
            for tensor in flatten(inputs):
                self._source[tensor] = Source(inputs=True)
            with mode, self:
                output = call(self.model, inputs)
        except Exception as error:
            raise ModelError(
                f"the model's forward fails in {self.where()}: {describe(error)}; check that the model runs on inputs "
                f"of the shape given ({', '.join(str(tuple(t.shape)) for t in flatten(inputs))})"
            ) from error
        finally:
            for handle in handles:
                handle.remove()
        for tensor in flatten(output):
            self.freeze([tensor], OUTPUT)
            for mark in self._statistic.get(tensor, []):
                self.labels.freeze(mark, "the model returns a mean over them")
        return output

    def _enter(self, name: str) -> Callable[..., None]:
        def enter(module: nn.Module, _: Any) -> None:
            self.stack.append(name)
            if isinstance(module, nn.MultiheadAttention):
                reason = f"nn.MultiheadAttention (`{name}`) ties its projections' widths to its embed_dim"
                self.freeze(list(module.parameters()), reason)

        return enter

    def _leave(self, *_: Any) -> None:
        self.stack.pop()


def describe(error: BaseException) -> str:
    """The first line of an error."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


def _arguments(args: tuple, kwargs: dict) -> Iterator[Tensor]:
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from (item for item in value if isinstance(item, Tensor))
