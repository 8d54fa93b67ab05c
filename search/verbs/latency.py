"""`amc latency`: compare ONNX files on a device, or build a model's latency table."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amc.errors import UsageError
from search.cli import add_settings, given_settings
from search.settings import Settings, settings_from

if TYPE_CHECKING:
    from rich.table import Table

    from latency.device import Device
    from latency.paired import Reading
    from latency.profile import LayerTime
    from search.display import Display


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The files, or the model whose table is built; the device and how it runs."""
    parser.add_argument("files", nargs="*", metavar="FILE.onnx", help="files to compare; the first is the baseline")
    parser.add_argument("--table", metavar="FILE", help="build the latency table of --model, or go on building it")
    parser.add_argument("--profile", action="store_true", help="also where the time goes, by layer")
    parser.add_argument("--energy", action="store_true", help="also joules a run, where this machine counts them")
    parser.add_argument(
        "--optimization",
        default="all",
        choices=("all", "extended", "basic", "none"),
        help="ONNX Runtime's graph optimization (default all, as in production)",
    )
    add_settings(parser, ("device",), leave_out=("accelerator", "threads"))
    add_settings(parser, ("model", "data", "groups"), leave_out=("importance",))


def execute(arguments: argparse.Namespace) -> Any:
    """Measures; returns the readings, or what the table is worth."""
    if bool(arguments.files) == bool(arguments.table):
        raise UsageError("give ONNX files to compare, or --model NAME --table FILE to build a latency table")
    settings = settings_from(given_settings(arguments))

    from latency.device import check_providers, open_device
    from search.display import Display

    display = Display(quiet=arguments.quiet, json=arguments.json)
    device = open_device(settings.device)
    try:
        check_providers(device, settings.latency_providers)
        if arguments.table:
            return _build(settings, device, Path(arguments.table), arguments, display)
        return _compare(settings, device, arguments, display)
    finally:
        device.close()


def _compare(settings: Settings, device: Device, arguments: argparse.Namespace, display: Display) -> Any:
    models = {file: Path(file) for file in arguments.files}
    options = {
        "batch": settings.latency_batch,
        "threads": settings.latency_threads,
        "providers": settings.latency_providers,
        "optimization": arguments.optimization,
    }
    baseline = arguments.files[0]
    if arguments.energy:
        check_energy(settings)
    with display.bar("measuring") as report:
        readings = device.measure(models, baseline=baseline, seed=settings.seed, progress=report, **options)
    display.show(reading_table(readings, baseline, device.name))
    from latency.memory import resources

    data = {name: path.read_bytes() for name, path in models.items()}
    found = {name: _json(reading) | resources(data[name], settings.latency_batch) for name, reading in readings.items()}
    if arguments.energy:
        from latency.energy import energy_of

        for name, joules in energy_of(data, **options).items():
            found[name]["energy_j"] = joules
    display.show(resource_table(found))
    result = {"device": device.fingerprint(), "baseline": baseline, "models": found}
    if arguments.profile:
        from latency.profile import profile_layers

        layers = profile_layers(device, data, **options)
        display.show(profile_table(layers, list(models)))
        result["layers"] = [asdict(layer) for layer in layers]
    return result


def _json(reading: Reading) -> dict[str, Any]:
    figures = {name: value for name, value in vars(reading).items() if name != "passes"}
    return {**figures, "speedup": reading.speedup, "speedup_ci95": list(reading.speedup_ci95)}


def check_energy(settings: Settings) -> None:
    """Raises a UsageError or DeviceError now, rather than after measuring, if energy can't be measured."""
    if settings.device != "local":
        raise UsageError("--energy reads this machine's own counters: it needs --device local")
    from latency.energy import open_counter

    open_counter(settings.latency_providers)


def short(files: Iterable[str]) -> dict[str, str]:
    """File names as given -> as much of their ends as tells them apart."""
    from search.comparison import short_names

    given = list(files)
    return dict(zip(given, short_names([Path(name) for name in given]), strict=True))


def resource_table(found: dict[str, dict[str, Any]]) -> Table:
    """Bytes, and joules where they were measured, for a person."""
    from rich.table import Table

    energy = any("energy_j" in figures for figures in found.values())
    table = Table(title="beside time", title_justify="left")
    for name in ("", "file, kB", "activations at the peak, kB", *(["energy, mJ a run"] if energy else [])):
        table.add_column(name, justify="right" if name else "left", overflow="fold")
    shown = short(found)
    for name, figures in found.items():
        memory = "-" if figures["memory"] is None else f"{figures['memory'] / 1e3:.0f}"
        joules = [f"{1e3 * figures['energy_j']:.4g}"] if energy else []
        table.add_row(shown[name], f"{figures['size'] / 1e3:.0f}", memory, *joules)
    return table


def reading_table(readings: dict[str, Reading], baseline: str, device: str) -> Table:
    """The readings for a person."""
    from rich.table import Table

    table = Table(title=f"latency on {device}, ms", title_justify="left")
    for name in ("", "median", "min", "p95", "baseline beside it", "ratio", "speed-up", "95 % interval"):
        table.add_column(name, justify="right" if name else "left", overflow="fold")
    shown = short(readings)
    for name, reading in readings.items():
        low, high = reading.speedup_ci95
        times = (f"{value:.4g}" for value in (reading.median_ms, reading.min_ms, reading.p95_ms))
        if name == baseline:
            table.add_row(f"{shown[name]} (baseline)", *times)
        else:
            paired = f"{reading.baseline_ms:.4g}", f"{reading.ratio:.3f}", f"{reading.speedup:.2f}x"
            table.add_row(shown[name], *times, *paired, f"{low:.2f} to {high:.2f}")
    return table


def profile_table(layers: list[LayerTime], names: list[str]) -> Table:
    """Where the time goes, a row for each layer."""
    from rich.table import Table

    table = Table(title="time of each layer, ms a run", title_justify="left")
    table.add_column("layer", overflow="fold")
    for name in short(names).values():
        table.add_column(name, justify="right", overflow="fold")
    for layer in layers:
        table.add_row(layer.layer, *(f"{layer.ms[name]:.4f}" if name in layer.ms else "-" for name in names))
    return table


def _build(settings: Settings, device: Device, path: Path, arguments: argparse.Namespace, display: Display) -> Any:
    from search.bench import OnnxFiles, measure_table
    from search.compose import load_dense, read_data, trace_model
    from search.run_directory import check_writable

    given = given_settings(arguments)
    if not path.parent.is_dir():
        raise UsageError(f"--table {path}: there is no folder {path.parent}; make it first")
    check_writable("--table", path.parent)
    data = read_data(settings) if "data" in given or "model" not in given else None
    loaded = load_dense(settings, data, classifies=False, display=display)
    structure = trace_model(loaded, settings)
    files = OnnxFiles.of(loaded, structure)
    table = measure_table(settings, loaded.name, files, structure, device, path=path, display=display)
    error = table.error
    display.show(
        f"{path}: {len(table.samples)} policies of {table.model} on {table.device.cpu}, dense {table.dense_ms:.4g} ms"
    )
    if error:
        display.show(
            f"error on {error.policies} policies that were held out: {error.mean:.1%} on average, "
            f"{error.within_10_percent:.0%} within 10 %"
            + ("" if error.spearman is None else f", rank correlation {error.spearman:.3f}")
        )
    return {"path": str(path), "dense_ms": table.dense_ms, "samples": len(table.samples), "error": _dump(error)}


def _dump(error: Any) -> Any:
    return None if error is None else error.model_dump()
