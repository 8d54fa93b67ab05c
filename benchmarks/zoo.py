"""What can be pruned of forty architectures of `transformers`, in tiny random configurations.

    python benchmarks/zoo.py              # writes docs/architectures.md
    python benchmarks/zoo.py ViT BERT     # prints these alone

For each: groups found and verified, the uniform policy at `flops=0.5` slimmed (or the lowest that can be reached),
exported, and compared between torch and ONNX Runtime.
"""

from __future__ import annotations

import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from amc.cost import analytic
from amc.coupling import trace
from amc.errors import ModelError
from amc.forward import call, logits
from amc.groups import Group, Structure
from amc.slim import slim
from amc.verify import verify

VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}
TEXT = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT = {"vocab_size": 60, "n_layer": 2, "n_head": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = {**TEXT, "num_key_value_heads": 2}
STAGES = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1]}
PYRAMID = {"depths": [1] * 4, "hidden_sizes": [16, 32, 40, 64], "num_attention_heads": [1, 2, 5, 8], "image_size": 32}
IMAGE, LOGITS = "ForImageClassification", "ForSequenceClassification"

ZOO: dict[str, tuple[str, str, dict[str, Any]]] = {
    "ResNet": ("ResNet", IMAGE, {**STAGES, "embedding_size": 8}),
    "ConvNeXt": ("ConvNext", IMAGE, STAGES),
    "ConvNeXtV2": ("ConvNextV2", IMAGE, STAGES),
    "RegNet": (
        "RegNet",
        IMAGE,
        {"embedding_size": 8, "hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 2, 1], "groups_width": 8},
    ),
    "BiT": (
        "Bit",
        IMAGE,
        {"embedding_size": 8, "hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1], "num_groups": 4},
    ),
    "MobileNetV1": ("MobileNetV1", IMAGE, {"depth_multiplier": 0.25, "image_size": 32}),
    "MobileNetV2": ("MobileNetV2", IMAGE, {"depth_multiplier": 0.35, "image_size": 32}),
    "EfficientNet": (
        "EfficientNet",
        IMAGE,
        {"width_coefficient": 0.5, "depth_coefficient": 0.3, "image_size": 32, "hidden_dim": 640},
    ),
    "PoolFormer": ("PoolFormer", IMAGE, {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}),
    "SwiftFormer": ("SwiftFormer", IMAGE, {"image_size": 32, "depths": [1] * 4, "embed_dims": [16, 24, 32, 40]}),
    "ViT": ("ViT", IMAGE, VIT),
    "DeiT": ("DeiT", IMAGE, VIT),
    "BEiT": ("Beit", IMAGE, {**VIT, "use_relative_position_bias": True}),
    "ViT-MSN": ("ViTMSN", IMAGE, VIT),
    "DINOv2": ("Dinov2", IMAGE, {key: value for key, value in VIT.items() if key != "intermediate_size"}),
    "Swin": (
        "Swin",
        IMAGE,
        {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
    ),
    "SwinV2": (
        "Swinv2",
        IMAGE,
        {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
    ),
    "PVT": ("Pvt", IMAGE, PYRAMID),
    "PVTv2": ("PvtV2", IMAGE, PYRAMID),
    "SegFormer": (
        "Segformer",
        IMAGE,
        {**{key: value for key, value in PYRAMID.items() if key != "image_size"}, "decoder_hidden_size": 16},
    ),
    "LeViT": (
        "Levit",
        IMAGE,
        {
            "image_size": 64,
            "hidden_sizes": [32, 48, 64],
            "num_attention_heads": [2, 3, 4],
            "depths": [1, 1, 1],
            "key_dim": [8, 8, 8],
        },
    ),
    "CvT": ("Cvt", IMAGE, {"embed_dim": [16, 32, 48], "num_heads": [1, 2, 3], "depth": [2, 2, 3], "image_size": 64}),
    "MobileViT": (
        "MobileViT",
        IMAGE,
        {"image_size": 64, "hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 24, 32, 64]},
    ),
    "MobileViTV2": ("MobileViTV2", IMAGE, {"image_size": 64, "width_multiplier": 0.25}),
    "FocalNet": ("FocalNet", IMAGE, {"image_size": 32, "embed_dim": 16, "depths": [1, 1, 1, 1]}),
    "BERT": ("Bert", LOGITS, TEXT),
    "RoBERTa": ("Roberta", LOGITS, TEXT),
    "ALBERT": ("Albert", LOGITS, {**TEXT, "embedding_size": 16}),
    "ELECTRA": ("Electra", LOGITS, {**TEXT, "embedding_size": 16}),
    "DistilBERT": (
        "DistilBert",
        LOGITS,
        {"vocab_size": 60, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 32},
    ),
    "MobileBERT": (
        "MobileBert",
        LOGITS,
        {**TEXT, "intermediate_size": 32, "embedding_size": 16, "intra_bottleneck_size": 16},
    ),
    "DeBERTaV2": ("DebertaV2", LOGITS, {**TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}),
    "FNet": (
        "FNet",
        LOGITS,
        {key: value for key, value in TEXT.items() if key != "num_attention_heads"},
    ),
    "GPT-2": ("GPT2", LOGITS, {**GPT, "n_embd": 32, "n_positions": 32}),
    "GPT-NeoX": ("GPTNeoX", LOGITS, TEXT),
    "OPT": (
        "OPT",
        LOGITS,
        {**{k: v for k, v in TEXT.items() if k != "intermediate_size"}, "ffn_dim": 48, "word_embed_proj_dim": 32},
    ),
    "BLOOM": ("Bloom", LOGITS, {**GPT, "hidden_size": 32}),
    "Llama": ("Llama", LOGITS, GROUPED),
    "Mistral": ("Mistral", LOGITS, GROUPED),
    "Qwen2": ("Qwen2", LOGITS, GROUPED),
    "Qwen3": ("Qwen3", LOGITS, {**GROUPED, "head_dim": 8}),
    "Gemma": ("Gemma", LOGITS, {**TEXT, "num_key_value_heads": 1, "head_dim": 8}),
    "Phi-3": ("Phi3", LOGITS, GROUPED),
}


@dataclass(frozen=True)
class Row:
    """A line of the table. `difference` is the largest between torch and ONNX Runtime, `nan` where export failed."""

    name: str
    structure: Structure
    seconds: float
    lowest: float
    reached: float
    difference: float


def build(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model with three classes, drawn at random, and inputs of batch 1."""
    import transformers

    prefix, task, options = ZOO[name]
    config = getattr(transformers, f"{prefix}Config")(**options, num_labels=3)
    torch.manual_seed(0)
    model = getattr(transformers, prefix + task)(config).eval()
    for parameter in model.parameters():  # as initialized, deep ones compute nothing but zeros
        if parameter.ndim > 1:
            nn.init.kaiming_normal_(parameter)
        else:
            nn.init.uniform_(parameter, 0.5, 1.5)
    if task == LOGITS:
        return model, {"input_ids": torch.randint(3, 60, (1, 8))}
    size = 64 if options.get("image_size") == 64 else 32
    return model, {"pixel_values": torch.randn(1, 3, size, size)}


def halved(structure: Structure) -> dict[str, int]:
    """The uniform policy at half the FLOPs: one keep ratio for all, or the floors where that is out of reach."""
    flops = analytic(structure)["flops"]
    dense = flops([group.channels for group in structure.groups])

    def widths(ratio: float) -> list[int]:
        return [group.snap_down(ratio * group.channels) for group in structure.groups]

    ratio = next((r for r in np.linspace(1, 0, 201) if flops(widths(float(r))) <= dense / 2), 0.0)
    return dict(zip((g.name for g in structure.groups), widths(float(ratio)), strict=True))


def chosen(group: Group, width: int) -> np.ndarray:
    """`width` units, equally many of each cell."""
    cells = np.zeros(group.channels, int) if group.cells is None else group.cells
    number = int(cells.max()) + 1
    return np.sort(np.concatenate([np.flatnonzero(cells == cell)[: width // number] for cell in range(number)]))


def measure(name: str) -> Row:
    """Trace, verify, slim by the uniform policy, export, compare."""
    model, inputs = build(name)
    start = time.perf_counter()
    structure = verify(model, inputs, trace(model, inputs))
    seconds = time.perf_counter() - start
    flops = analytic(structure)["flops"]
    dense = flops([group.channels for group in structure.groups])
    policy = halved(structure)
    small = slim(model, structure, {group.name: chosen(group, policy[group.name]) for group in structure.groups})
    return Row(
        name,
        structure,
        seconds,
        flops([group.floor for group in structure.groups]) / dense,
        flops([policy[group.name] for group in structure.groups]) / dense,
        exported(small, inputs),
    )


def exported(model: nn.Module, inputs: dict[str, Tensor]) -> float:
    """The largest difference between torch and ONNX Runtime."""
    import onnxruntime

    from amc.export import export_onnx

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        try:
            export_onnx(Logits(model, next(iter(inputs))), tuple(inputs.values()), path)
        except ModelError as error:
            print(f"  {error}", file=sys.stderr)
            return float("nan")
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        feeds = zip((i.name for i in session.get_inputs()), (x.numpy() for x in inputs.values()), strict=True)
        actual = session.run(None, dict(feeds))[0]
    with torch.no_grad():
        return float(np.abs(actual - logits(call(model, inputs)).numpy()).max())


class Logits(nn.Module):
    """A model of one keyword input as one from a tensor to a tensor."""

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__()
        self.model, self.name = model, name

    def forward(self, value: Tensor) -> Tensor:
        return logits(self.model(**{self.name: value}))


def table(rows: list[Row]) -> str:
    lines = [
        "| architecture | groups | of these heads | FLOPs that can go | uniform reaches | trace and verify, s "
        "| ONNX differs by | frozen |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        heads = sum(group.kind == "head" for group in row.structure.groups)
        frozen = "; ".join(sorted({f.reason for f in row.structure.frozen if "model's output" not in f.reason}))
        onnx = "no" if np.isnan(row.difference) else f"{row.difference:.0e}"
        lines.append(
            f"| {row.name} | {len(row.structure.groups)} | {heads} | {1 - row.lowest:.1%} | {row.reached:.3f} "
            f"| {row.seconds:.2f} | {onnx} | {frozen.replace('|', '/') or 'the classifier alone'} |"
        )
    return "\n".join(lines) + "\n"


def main(names: list[str]) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    rows = []
    for name in names or ZOO:
        rows.append(measure(name))
        print(table(rows[-1:]).splitlines()[-1], flush=True)
    if not names:
        Path("docs/architectures.md").write_text(f"# Architectures\n\n{__doc__}\n{table(rows)}")


if __name__ == "__main__":
    main(sys.argv[1:])
