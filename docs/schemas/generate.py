"""Writes the JSON Schemas beside this file: python docs/schemas/generate.py. A test holds them equal to the models."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from amc.policy import Policy
from latency.table import LatencyTable
from search.finished import RunResult, SettingsFile
from search.settings import Settings

HERE = Path(__file__).resolve().parent


def schemas() -> dict[str, Any]:
    """File name -> schema."""
    settings = SettingsFile.model_json_schema()
    fields = TypeAdapter(Settings).json_schema()
    settings["properties"]["settings"] = {**fields, "additionalProperties": False}
    return {
        "policy.json": Policy.model_json_schema(),
        "settings.json": settings,
        "result.json": RunResult.model_json_schema(),
        "latency-table.json": LatencyTable.model_json_schema(),
    }


def text_of(schema: Any) -> str:
    """A schema as it is written."""
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def main() -> None:
    """Writes them."""
    for name, schema in schemas().items():
        (HERE / name.replace(".json", ".schema.json")).write_text(text_of(schema))


if __name__ == "__main__":
    main()
