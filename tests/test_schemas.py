"""The published JSON Schemas are those of the readers, and what a run writes keeps them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "docs" / "schemas"


def generated() -> dict[str, str]:
    spec = importlib.util.spec_from_file_location("_schemas", FOLDER / "generate.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {name: module.text_of(schema) for name, schema in module.schemas().items()}


@pytest.mark.parametrize("name", ["policy.json", "settings.json", "result.json", "latency-table.json"])
def test_the_schemas_are_up_to_date(name):
    path = FOLDER / name.replace(".json", ".schema.json")
    assert path.read_text() == generated()[name], "run: python docs/schemas/generate.py"
    assert json.loads(path.read_text())["type"] == "object"
