"""Where a model will run: this machine, another one, or one that is known from its table alone.

A device measures ONNX models beside a baseline and has a fingerprint. Who asks it need not know where it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from amc.errors import DeviceError, UsageError
from latency import worker
from latency.paired import Model, Reading, measure


class Device(Protocol):
    """What `open_device` returns. Its `measure` has the signature of `latency.measure`."""

    name: str

    @property
    def measure(self) -> Callable[..., dict[str, Reading]]:
        """`latency.measure`, there. Raises DeviceError, ModelError, UsageError."""
        ...

    def profile(self, model: bytes, **options: Any) -> list[Any]:
        """ONNX Runtime's profile events of the model's nodes."""
        ...

    def fingerprint(self) -> dict[str, Any]:
        """What makes two machines the same device for a latency table."""
        ...

    def close(self) -> None:
        """Let go of the device."""
        ...


def short(provider: str) -> str:
    """`cuda` of `CUDAExecutionProvider`, and of `CUDA`."""
    return provider.removesuffix("ExecutionProvider").lower()


def check_providers(device: Device, names: Sequence[str]) -> None:
    """Refuse providers that the device's ONNX Runtime lacks, before anything is measured. Raises DeviceError."""
    available = sorted(short(name) for name in device.fingerprint()["available"])
    for name in names:
        if short(name) not in available:
            raise DeviceError(
                f"--latency-providers {name}: the ONNX Runtime of {device.name} has no such provider; it has: "
                f"{', '.join(available)}"
            )


class LocalDevice:
    """This machine, in this process."""

    name = "local"

    def measure(self, models: Mapping[str, Model], **options: Any) -> dict[str, Reading]:
        """As `latency.measure`."""
        return measure(models, **options)

    def profile(self, model: bytes, **options: Any) -> list[Any]:
        """ONNX Runtime's profile events of the model's nodes."""
        import tempfile

        from latency.session import as_error

        with tempfile.TemporaryDirectory() as folder:
            try:
                return worker.profile_model(model, folder=folder, **options)
            except worker.WorkerError as error:
                raise as_error(error) from error

    def fingerprint(self) -> dict[str, Any]:
        """This machine's."""
        return worker.fingerprint()

    def close(self) -> None:
        """Nothing is held."""


class TableDevice:
    """A device that is not there, known from its latency table: it predicts, and measures nothing.

    Raises DeviceError: the table can't be read, or was never finished.
    """

    def __init__(self, path: str) -> None:
        from latency.table import LatencyTable

        self.name, self.table = path, LatencyTable.load(path)
        if self.table.error is None:
            raise DeviceError(
                f"the latency table {path} was cut short, so that nothing says how far off its predictions are; finish"
                f" it by `amc latency --model … --table {path}` on the device that it is of"
            )

    def measure(self, models: Mapping[str, Model], **options: Any) -> dict[str, Reading]:
        """Always a DeviceError."""
        raise DeviceError(f"`{self.name}` is a latency table: it predicts, but nothing can be measured on it")

    def profile(self, model: bytes, **options: Any) -> list[Any]:
        """Always a DeviceError."""
        raise DeviceError(f"`{self.name}` is a latency table: it predicts, but nothing can be profiled on it")

    def fingerprint(self) -> dict[str, Any]:
        """Of the device that the table was built on."""
        return self.table.device.model_dump()

    def close(self) -> None:
        """Nothing is held."""


def open_device(text: str) -> Device:
    """`local`, `ssh://USER@HOST:PORT`, or the path of a latency table.

    Raises:
        UsageError: it is none of these.
        DeviceError: the device can't be reached, or the table can't be read or was never finished.
    """
    if text == "local":
        return LocalDevice()
    if text.startswith("ssh://"):
        from latency.remote import SshDevice

        return SshDevice.at(text)
    if text.endswith(".json"):
        return TableDevice(text)
    raise UsageError(f"--device {text} must be `local`, `ssh://USER@HOST:PORT`, or a latency table (a .json file)")
