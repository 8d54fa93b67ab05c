"""`amc apply POLICY --out DIR`: a saved policy, a dense model, and out comes the slim model with its ONNX file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from amc.errors import UsageError
from search.cli import add_settings, given_settings
from search.settings import settings_from


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The policy, the model it goes to, and where the result goes."""
    parser.add_argument("policy", metavar="POLICY", help="policy file")
    parser.add_argument("--out", metavar="DIR", help="where model.safetensors, model.onnx and the policy go")
    parser.add_argument("--force", action="store_true", help="take another structure if every group still fits")
    add_settings(parser, ("model", "data"))


def execute(arguments: argparse.Namespace) -> Any:
    """Applies the policy; returns what was written, and what the slim model costs."""
    if not arguments.out:
        raise UsageError("apply needs --out DIR, where the slim model goes")
    given = given_settings(arguments)

    from amc.application import applied, example_of
    from amc.cost import analytic, spent
    from amc.export import export_bytes
    from amc.files import write_atomic
    from amc.policy import load_policy
    from amc.weights import save_weights
    from search.compose import calibration, is_trained_here, load_dense, read_data
    from search.display import Display
    from search.run_directory import check_free, check_writable, writable
    from search.trust import check_named

    out = Path(arguments.out)
    check_free(out)
    check_writable("--out", out)
    policy = load_policy(arguments.policy)
    name = policy.model.name
    if "model" not in given:
        check_named(arguments.policy, Path(arguments.policy).parent, "model", name, f"give it: --model {name}")
    display = Display(quiet=arguments.quiet, json=arguments.json)
    settings = settings_from({"model": name, **given})
    data = read_data(settings) if "data" in given or is_trained_here(settings) else None
    loaded = load_dense(settings, data, example=example_of(policy), classifies=False, display=display)
    batches = calibration(data, settings) if data else None
    found = applied(loaded.model, policy, inputs=loaded.inputs, force=arguments.force, batches=batches)

    content = export_bytes(found.model, loaded.inputs)  # first, so that a model without an ONNX form leaves nothing
    with writable("--out", out):
        out.mkdir(parents=True, exist_ok=True)
        save_weights(found.model, out / "model.safetensors")
        write_atomic(out / "model.onnx", content)
        policy.save(out / "policy.json")
    groups, costs = found.structure.groups, analytic(found.structure)
    dense = spent(costs, [group.channels for group in groups])
    slim = spent(costs, [len(found.kept[g.name]) if g.name in found.kept else g.channels for g in groups])
    display.show(
        "\n".join(f"{name}: {slim[name]:,} of {dense[name]:,} ({slim[name] / dense[name]:.3f})" for name in costs)
    )
    if found.reranked:
        display.show(f"other weights than the policy was found for: channels were ranked again by {policy.importance}")
    display.show(f"{out}/: model.safetensors, model.onnx, policy.json")
    return {"path": str(out), "reranked": found.reranked, "dense": dense, "slim": slim, "widths": policy.widths}
