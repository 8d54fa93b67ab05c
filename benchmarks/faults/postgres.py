"""A PostgreSQL server of one's own on loopback, in a temporary folder, that can be stopped and started."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path


class Unavailable(Exception):
    """There is no PostgreSQL here that could be started."""


class Postgres:
    """A server; `url` is what `--storage` takes."""

    def __init__(self) -> None:
        self._bin = _binaries()
        self.folder = Path(tempfile.mkdtemp(prefix="amc-postgres-"))
        self._user = "postgres" if os.geteuid() == 0 else None
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"postgresql://postgres@127.0.0.1:{self.port}/postgres"
        if self._user:  # the server refuses to run as root
            shutil.chown(self.folder, self._user)
        data = str(self.folder / "data")
        self._call("initdb", "-A", "trust", "-U", "postgres", "-D", data, "-E", "UTF8", "--no-sync")
        self.start()

    def start(self) -> None:
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories= -c fsync=off"
        log = str(self.folder / "log")
        self._call("pg_ctl", "-w", "-D", str(self.folder / "data"), "-l", log, "-o", options, "start")

    def stop(self, how: str = "immediate") -> None:
        """Stops it; `immediate` is a crash."""
        self._call("pg_ctl", "-w", "-D", str(self.folder / "data"), "-m", how, "stop")

    def close(self) -> None:
        """Stops it and removes its folder."""
        self.stop("fast")
        shutil.rmtree(self.folder, ignore_errors=True)

    def _call(self, program: str, *words: str) -> None:
        line = [str(self._bin / program), *words]
        if self._user:
            line = ["setpriv", "--reuid", self._user, "--regid", self._user, "--init-groups", *line]
        done = subprocess.run(line, cwd="/", capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL)
        if done.returncode:
            raise Unavailable(f"{program} failed: {done.stdout[-500:]}{done.stderr[-500:]}")


def _binaries() -> Path:
    found = shutil.which("initdb")
    places = [Path(found).parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    if not places:
        raise Unavailable("PostgreSQL is not installed (apt-get install postgresql)")
    return places[0]
