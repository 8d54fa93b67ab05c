"""Which torch module an ONNX node came from, by the note that the exporter leaves on it."""

from __future__ import annotations

import ast

import onnx

from amc.export import SCOPES


def module_of(node: onnx.NodeProto) -> str | None:
    """The module's name, empty for the model itself; None where there is no note, or one that is not ours."""
    for entry in node.metadata_props:
        if entry.key == SCOPES and len(entry.value) < 10_000:
            try:
                scopes = ast.literal_eval(entry.value)
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                return None
            if isinstance(scopes, list) and len(scopes) > 1:
                return str(scopes[-2])
    return None
