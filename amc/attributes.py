"""Sizes that modules keep beside their weights: what each has to say once its weights are slim.

One dict, class name -> rule. Names instead of classes, so that `transformers.Conv1D` needs no import. The attention
modules of different libraries keep their number of heads, and widths made of it, in a handful of attributes; those are
the last two sets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from amc.errors import ModelError

HEADS = frozenset(("num_heads", "num_attention_heads", "n_heads", "n_head", "heads", "nhead", "num_attn_heads"))
KEY_HEADS = frozenset(("num_key_value_heads", "num_kv_heads", "n_kv_heads", "kv_heads", "num_kv_attention_heads"))
INNER = frozenset(
    [
        "all_head_size",
        "inner_dim",
        "inner_size",
        "split_size",
        "attn_dim",
        "attention_dim",
        "embed_dim",
        "dim",
        "hidden_size",
        "dh",
        "dim_head_in",
        "value_all_head_size",
        "out_projection_dim",
        "proj_dim",
        "projection_size",
        "q_size",
        "kv_size",
        "value_dim",
        "key_dim",
        "val_dim",
        "out_dim_projection",
        "out_dim_keys_values",
        "out_dim_keys",
    ]
)
"""Widths of an attention's projections. Updated only where they equal heads times features, or a sum of such."""


def _linear(module: Any) -> None:
    module.out_features, module.in_features = module.weight.shape


def _bilinear(module: Any) -> None:
    module.out_features, module.in1_features, module.in2_features = module.weight.shape


def _convolution(module: Any) -> None:
    rows, columns = module.weight.shape[:2]
    if module.groups > 1 and module.groups == module.in_channels:
        multiplier = module.out_channels // module.in_channels
        module.groups = rows if module.transposed else rows // multiplier
    outs, ins = (columns, rows) if module.transposed else (rows, columns)
    module.out_channels = outs * (module.groups if module.transposed else 1)
    module.in_channels = ins * (1 if module.transposed else module.groups)


def _features(module: Any) -> None:
    tensor = next(t for t in (module.weight, module.running_mean) if t is not None)
    module.num_features = len(tensor)


def _layer_norm(module: Any) -> None:
    module.normalized_shape = tuple(module.weight.shape)


def _group_norm(module: Any) -> None:
    if module.num_groups == module.num_channels:
        module.num_groups = len(module.weight)
    module.num_channels = len(module.weight)


def _embedding(module: Any) -> None:
    module.embedding_dim = module.weight.shape[1]


def _prelu(module: Any) -> None:
    module.num_parameters = len(module.weight)


def _conv1d(module: Any) -> None:
    module.nx, module.nf = module.weight.shape


RULES: Mapping[str, Callable[[Any], None]] = {
    **dict.fromkeys(("Linear", "LazyLinear", "NonDynamicallyQuantizableLinear"), _linear),
    "Bilinear": _bilinear,
    **{f"Conv{transpose}{n}d": _convolution for transpose in ("", "Transpose") for n in (1, 2, 3)},
    **{f"{norm}{n}d": _features for norm in ("BatchNorm", "InstanceNorm") for n in (1, 2, 3)},
    "SyncBatchNorm": _features,
    "LayerNorm": _layer_norm,
    "RMSNorm": _layer_norm,
    "GroupNorm": _group_norm,
    "Embedding": _embedding,
    "PReLU": _prelu,
    "Conv1D": _conv1d,
}


def update(module: nn.Module) -> None:
    """Make the attributes of a module agree with the shapes of its weights."""
    _recompute(module)
    for cls in type(module).__mro__:
        rule = RULES.get(cls.__name__)
        if rule is not None and cls.__module__.split(".")[0] in ("torch", "transformers", "timm"):
            rule(module)
            return
    shape, weight = vars(module).get("normalized_shape"), getattr(module, "weight", None)
    if isinstance(shape, tuple | list) and isinstance(weight, Tensor) and len(shape) == weight.dim():
        vars(module)["normalized_shape"] = type(shape)(weight.shape)  # a layer norm of the user's own, as ConvNeXt's


def _recompute(module: nn.Module) -> None:
    """The weight that torch's older weight norm, spectral norm and pruning compute in a hook before each forward.

    Raises:
        ModelError: it, or one that a parametrization computes, can't be computed from what is left.
    """
    hooks = [h for h in module._forward_pre_hooks.values() if type(h).__module__.startswith("torch.nn.utils.")]
    training, module.training = module.training, False  # no power iteration
    try:
        with torch.no_grad():
            for hook in hooks:
                hook(module, ())
            getattr(module, "weight", None)  # which computes a parametrized one
    except RuntimeError as error:
        raise ModelError(f"slimmed, its weight can't be computed: {error}") from error
    finally:
        module.training = training


def update_heads(module: nn.Module, dense: int, kept: int, widths: set[int]) -> None:
    """Make an attention module agree with its `kept` of `dense` units.

    widths: of the projections, in the dense model. Key and value heads shrink by the same ratio as the queries'.
    """
    for name, value in list(vars(module).items()):
        heads = name in HEADS | KEY_HEADS and type(value) is int and value % dense == 0
        if heads or (name in INNER and value in widths):
            setattr(module, name, value // dense * kept)
