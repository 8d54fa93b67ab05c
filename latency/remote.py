"""A device behind SSH: the worker goes over the connection, so do the models, and JSON lines come back.

Nothing is written on the far side and nothing stays there: the worker's source is the first thing on its standard
input, and models are opened from memory. Each request is a connection of its own, so a device that reboots, a killed
daemon or a dropped link costs one try. Three tries with a pause between them, each with a deadline, then a DeviceError:
never a hang, never a made-up number.

The host key is checked against the user's known hosts, and authentication is by key or agent alone. What the far side
prints is data of one schema or an error.
"""

from __future__ import annotations

import asyncio
import json
import re
import shlex
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from amc.errors import DeviceError, ModelError, UsageError
from latency import worker
from latency.paired import Model, Progress, Reading, check_settings, readings
from latency.session import read_model
from latency.table import DeviceInfo

MAX_LINE = 64 << 20
MAX_CHATTER = 100
"""Lines that a login shell may print before the worker speaks."""

_Time = Annotated[float, Field(gt=0, lt=1e9, allow_inf_nan=False)]
_SAMPLES = TypeAdapter(
    dict[str, list[list[Annotated[list[_Time], Field(min_length=2, max_length=2)]]]], config=ConfigDict(strict=True)
)


class _Ready(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    ready: int
    fingerprint: DeviceInfo


class _Answer(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    progress: tuple[int, int, Annotated[str, Field(max_length=500)]] | None = None
    result: Any = None
    error: Annotated[str, Field(max_length=2000)] | None = None
    kind: str | None = None


class _TryAgainError(Exception):
    """Something that may be better in a moment."""


@dataclass
class SshDevice:
    """`ssh://USER@HOST:PORT`, or `ssh://USER@HOST:PORT/path/to/python` where `python3` is not the one to use.

    connect_timeout: seconds for a connection. patience: seconds without a line from the worker, beyond its measuring.
    tries, pause: how often a request is made, and the seconds before the second try (doubled before each further one).
    options: more of `asyncssh.connect` (known hosts, client keys), for tests and programs.
    """

    name: str
    host: str
    port: int
    user: str | None
    python: str = "python3"
    connect_timeout: float = 15.0
    patience: float = 60.0
    tries: int = 3
    pause: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)
    _fingerprint: dict[str, Any] | None = field(default=None, repr=False)

    @classmethod
    def at(cls, url: str, **settings: Any) -> SshDevice:
        """A device from its URL; nothing is connected yet. Raises UsageError, or DeviceError without asyncssh."""
        form = "write it as ssh://USER@HOST:PORT"
        parts = urlsplit(url)
        try:
            port = parts.port or 22
        except ValueError as error:
            raise UsageError(f"--device {url}: the port is not a number from 1 to 65535; {form}") from error
        if parts.password is not None:
            raise UsageError(
                "--device must not hold a password: other users see the command line; use a key or an agent"
            )
        if parts.scheme != "ssh" or not parts.hostname or parts.query or parts.fragment:
            raise UsageError(f"--device {url} is not an SSH address; {form}")
        if not re.fullmatch(r"[A-Za-z0-9_:][\w.:%-]*", parts.hostname) or not re.fullmatch(
            r"[\w][\w.-]*|", parts.username or ""
        ):
            raise UsageError(f"--device {url} has characters that no user or host name has; {form}")
        try:
            import asyncssh  # noqa: F401
        except ImportError as error:
            raise DeviceError("devices behind SSH need asyncssh: pip install 'amc-pruning-search[ssh]'") from error
        return cls(url, parts.hostname, port, parts.username, parts.path or "python3", **settings)

    def measure(
        self,
        models: Mapping[str, Model],
        *,
        baseline: str = "dense",
        batch: int = 1,
        threads: int = 1,
        providers: Sequence[str] | None = None,
        optimization: str = "all",
        seconds: float = 4.0,
        tightness: float = 0.005,
        passes: int = 5,
        tries: int = 3,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> dict[str, Reading]:
        """As `latency.measure`, there. Raises DeviceError when three tries failed."""
        check_settings(baseline, models, batch, threads, optimization, seconds)
        data = {name: read_model(model) for name, model in models.items()}
        settings: dict[str, Any] = {"op": "measure", "baseline": baseline, "batch": batch, "threads": threads}
        settings |= {"providers": None if providers is None else list(providers), "optimization": optimization}
        settings |= {"seconds": seconds, "tightness": tightness, "passes": passes, "seed": seed}

        def take(chosen: Mapping[str, bytes]) -> dict[str, list[list[list[float]]]]:
            def parse(result: Any) -> dict[str, list[list[list[float]]]]:
                found = _SAMPLES.validate_python(result)
                if set(found) != set(chosen) or not all(
                    rounds for passed in found.values() for rounds in [*passed, passed]
                ):
                    raise ValueError("the answer is not about the models that were sent")
                return found

            return self._ask(settings, chosen, parse, self.patience + 3 * seconds, progress)

        return readings(data, baseline, take, tries)

    def profile(self, model: bytes, **options: Any) -> list[Any]:
        """ONNX Runtime's profile events of the model's nodes."""
        parse = TypeAdapter(list[dict[str, Any]]).validate_python
        return self._ask({"op": "profile", **options}, {"model": model}, parse, self.patience, None)

    def fingerprint(self) -> dict[str, Any]:
        """Of the far machine, asked once."""
        if self._fingerprint is None:
            self._ask(None, {}, lambda result: result, self.patience, None)
        assert self._fingerprint is not None
        return self._fingerprint

    def close(self) -> None:
        """Nothing is held between requests."""

    def _ask(
        self,
        request: Mapping[str, Any] | None,
        models: Mapping[str, bytes],
        parse: Callable[[Any], Any],
        patience: float,
        progress: Progress | None,
    ) -> Any:
        """The parsed answer; what may be better in a moment is tried again."""
        reason = ""
        for attempt in range(self.tries):
            if attempt:
                time.sleep(self.pause * 2 ** (attempt - 1))
            try:
                return _run(self._exchange(request, models, parse, patience, progress))
            except _TryAgainError as error:
                reason = str(error)
        raise DeviceError(f"{self.name} did not measure in {self.tries} tries; the last one: {reason}")

    async def _exchange(
        self,
        request: Mapping[str, Any] | None,
        models: Mapping[str, bytes],
        parse: Callable[[Any], Any],
        patience: float,
        progress: Progress | None,
    ) -> Any:
        import asyncssh

        source = Path(worker.__file__).read_bytes()
        start = f"import sys; exec(compile(sys.stdin.buffer.read({len(source)}), 'worker.py', 'exec'))"
        try:
            async with asyncio.timeout(self.connect_timeout):
                connection = await asyncssh.connect(
                    self.host,
                    self.port,
                    username=self.user or (),
                    password=None,
                    preferred_auth="publickey",
                    keepalive_interval=10,
                    **self.options,
                )
            try:
                command = f"{shlex.quote(self.python)} -c {shlex.quote(start)}"
                async with asyncio.timeout(self.connect_timeout):
                    process = await connection.create_process(command, encoding=None, stderr=asyncssh.PIPE)
                talk = _Talk(process, patience)
                await talk.send(source)
                ready = await talk.ready()
                self._fingerprint = ready.fingerprint.model_dump()
                if request is None:
                    return None
                sizes = [[name, len(data)] for name, data in models.items()]
                await talk.send(json.dumps({**request, "models": sizes}).encode() + b"\n")
                for data in models.values():
                    await talk.send(data)
                return parse(await talk.result(progress))
            finally:
                connection.abort()  # closing politely would wait for a worker that may never end
        except asyncssh.HostKeyNotVerifiable as error:
            raise DeviceError(
                f"the host key of {self.host} is unknown or has changed ({error.reason}); connect once with"
                f" `ssh -p {self.port} {self.host}` and check it, or correct ~/.ssh/known_hosts"
            ) from error
        except asyncssh.PermissionDenied as error:
            raise DeviceError(
                f"{self.host} refuses the login of {self.user or 'this user'}: {error.reason}; add your key to its"
                " ~/.ssh/authorized_keys, or load it into your agent"
            ) from error
        except TimeoutError as error:
            raise _TryAgainError("no answer in time") from error
        except (OSError, asyncssh.Error, EOFError) as error:
            raise _TryAgainError(f"the connection failed: {str(error)[:300] or type(error).__name__}") from error
        except (ValidationError, ValueError) as error:
            raise _TryAgainError("what came back is not an answer of the worker") from error


def _run(exchange: Coroutine[Any, Any, Any]) -> Any:
    """What the exchange returns; Ctrl-C ends it at once.

    It has a thread of its own: the caller may have a running event loop (a notebook has).
    """
    started: Future[Callable[[], object]] = Future()

    async def work() -> Any:
        task = asyncio.ensure_future(exchange)
        started.set_result(partial(asyncio.get_running_loop().call_soon_threadsafe, task.cancel))
        return await task

    with ThreadPoolExecutor(1) as pool:
        try:
            return pool.submit(asyncio.run, work()).result()
        except BaseException:  # the pool waits for its thread, which hears of no signal
            with suppress(RuntimeError, TimeoutError):  # it has ended by itself, or never began
                started.result(timeout=1)()
            raise


class _Talk:
    """One conversation with the worker, every step of it under a deadline."""

    def __init__(self, process: Any, patience: float) -> None:
        self.process, self.patience, self.buffer = process, patience, bytearray()

    async def send(self, data: bytes) -> None:
        """Piece by piece, so that a slow link is slow and a dead one is noticed."""
        for at in range(0, len(data), 1 << 18):
            async with asyncio.timeout(self.patience):
                self.process.stdin.write(data[at : at + (1 << 18)])
                await self.process.stdin.drain()

    async def ready(self) -> _Ready:
        """The worker's greeting, behind whatever the login shell printed."""
        for _ in range(MAX_CHATTER):
            line = await self._line()
            if line.startswith(b'{"ready"'):
                ready = _Ready.model_validate_json(line)
                if ready.ready != worker.PROTOCOL:
                    raise ValueError("another protocol")
                return ready
        raise ValueError("no greeting")

    async def result(self, progress: Progress | None) -> Any:
        """The answer's result. Raises ModelError or DeviceError where the worker says so."""
        while True:
            answer = _Answer.model_validate_json(await self._line())
            if answer.progress is not None:
                if progress is not None:
                    progress(*answer.progress)
            elif answer.error is not None:
                raise (ModelError if answer.kind == "model" else DeviceError)(f"on the device: {answer.error}")
            else:
                return answer.result

    async def _line(self) -> bytes:
        async with asyncio.timeout(self.patience):
            while (end := self.buffer.find(b"\n")) < 0:
                part = await self.process.stdout.read(1 << 16)
                if not part:
                    raise EOFError(await self._complaint())
                self.buffer += part
                if len(self.buffer) > MAX_LINE:
                    raise ValueError("a line without end")
        line = bytes(self.buffer[:end])
        del self.buffer[: end + 1]
        return line

    async def _complaint(self) -> str:
        """The last line that the far side wrote to standard error: what a person would look at first."""
        text = (await self.process.stderr.read(1 << 16)).decode(errors="replace")
        lines = ["".join(c for c in line if c.isprintable()).strip() for line in text.splitlines()]
        return next((line[:200] for line in reversed(lines) if line), "the worker ended without an answer")
