"""A device behind a real sshd on the loopback: it measures, and every way it can fail ends as it should."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from concurrent.futures import Future

import pytest

from amc.errors import DeviceError, ModelError, UsageError
from latency import open_device, worker
from tests.test_latency_session import GOOD

asyncssh = pytest.importorskip("asyncssh")
remote = pytest.importorskip("latency.remote")
SSHD = shutil.which("sshd", path="/usr/sbin:/usr/bin:/sbin")
needs_sshd = pytest.mark.skipif(SSHD is None, reason="no sshd here; on Debian: apt-get install openssh-server")


class Server:
    """An sshd of our own: own host key, own authorized keys, own port, no service of the machine touched."""

    def __init__(self, folder) -> None:
        self.folder = folder
        for name in ("host", "client", "other"):
            key = asyncssh.generate_private_key("ssh-ed25519")
            key.write_private_key(str(folder / name))
            key.write_public_key(str(folder / f"{name}.pub"))
            (folder / name).chmod(stat.S_IRUSR | stat.S_IWUSR)
        shutil.copy(folder / "client.pub", folder / "authorized")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.trust("host")
        self.process: subprocess.Popen[bytes] | None = None

    def trust(self, key: str) -> None:
        public = (self.folder / f"{key}.pub").read_text()
        (self.folder / "known_hosts").write_text(f"[127.0.0.1]:{self.port} {public}")

    def start(self) -> None:
        os.makedirs("/run/sshd", exist_ok=True)
        options = {
            "ListenAddress": "127.0.0.1", "Port": self.port, "HostKey": self.folder / "host", "PidFile": "none",
            "AuthorizedKeysFile": self.folder / "authorized", "StrictModes": "no", "UsePAM": "no",
            "PasswordAuthentication": "no", "PermitRootLogin": "prohibit-password",
        }  # fmt: skip
        command = [str(SSHD), "-D", "-e", "-f", "/dev/null"]
        for name, value in options.items():
            command += ["-o", f"{name}={value}"]
        self.process = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
        while self.process.poll() is None:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port)):
                return
            time.sleep(0.05)
        pytest.skip("sshd does not start here")

    def stop(self) -> None:
        """End the daemon and every session of it, as a power cut would."""
        if self.process is not None:
            children = subprocess.run(
                ["pgrep", "-P", str(self.process.pid)], capture_output=True, text=True, check=False
            )
            for pid in [*children.stdout.split(), str(self.process.pid)]:
                with contextlib.suppress(OSError):
                    os.kill(int(pid), signal.SIGKILL)
            self.process.wait()
            self.process = None

    def device(self, python: str = sys.executable, key: str = "client", **settings):
        options = {"known_hosts": str(self.folder / "known_hosts"), "client_keys": [str(self.folder / key)]}
        options |= {"agent_path": None, "config": None}
        user = os.environ.get("USER") or "root"
        settings = {"options": options, "pause": 0.05, "patience": 300.0, **settings}
        return remote.SshDevice.at(f"ssh://{user}@127.0.0.1:{self.port}{python}", **settings)


@pytest.fixture
def server(tmp_path):
    made = Server(tmp_path)
    made.start()
    yield made
    made.stop()


def script(folder, body: str) -> str:
    """A stand-in for the far side's Python."""
    path = folder / "fake-python"
    path.write_text(f"#!{sys.executable}\nimport sys, time, json\n{body}\n")
    path.chmod(0o755)
    return str(path)


@needs_sshd
def test_measures_there(server):
    device = server.device()
    seen = []
    found = device.measure({"dense": GOOD, "b": GOOD}, seconds=0.05, tries=1, progress=lambda *step: seen.append(step))
    assert list(found) == ["dense", "b"]
    assert found["b"].rounds >= 4
    assert found["b"].median_ms > 0
    assert len(seen) == 10
    assert device.fingerprint() == worker.fingerprint()


@needs_sshd
def test_a_model_at_fault_is_told_from_a_device_at_fault(server):
    with pytest.raises(ModelError, match="take more than"):
        server.device().measure({"dense": GOOD}, batch=10**9)
    with pytest.raises(DeviceError, match="no provider `quantum`"):
        server.device().measure({"dense": GOOD}, providers=["quantum"])


@needs_sshd
def test_another_host_key_is_refused_at_once(server):
    server.trust("other")
    with pytest.raises(DeviceError, match=r"host key of .* is unknown or has changed"):
        server.device().fingerprint()


@needs_sshd
def test_an_unknown_login_key_is_refused(server):
    with pytest.raises(DeviceError, match="refuses the login"):
        server.device(key="other").fingerprint()


@needs_sshd
def test_sshd_killed_in_the_middle_and_back_again(server, tmp_path):
    """The first try dies with the daemon; a later one finds it back, and the caller notices nothing but time."""
    device = server.device(pause=1.0)
    started = threading.Event()

    def cut() -> None:
        started.wait()
        server.stop()
        server.start()

    thread = threading.Thread(target=cut)
    thread.start()
    found = device.measure(
        {"dense": GOOD, "b": GOOD}, seconds=0.8, tightness=1e-9, passes=2, tries=1, progress=lambda *_: started.set()
    )
    thread.join()
    assert found["b"].rounds >= 4


def test_ctrl_c_ends_an_exchange_at_once(monkeypatch):
    """Not when the far side has answered, which may take minutes."""
    ended = Future()

    async def exchange(*_):
        os.kill(os.getpid(), signal.SIGINT)
        try:
            await asyncio.sleep(5)
        except asyncio.CancelledError:
            ended.set_result("by Ctrl-C")
            raise
        ended.set_result("by itself")

    monkeypatch.setattr(remote.SshDevice, "_exchange", exchange)
    with pytest.raises(KeyboardInterrupt):
        remote.SshDevice.at("ssh://somewhere").fingerprint()
    assert ended.result() == "by Ctrl-C"


@needs_sshd
def test_a_daemon_that_stays_away_ends_in_an_error(server):
    server.stop()
    with pytest.raises(DeviceError, match="in 3 tries; the last one: the connection failed"):
        server.device().measure({"dense": GOOD})


@needs_sshd
@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("print('segmentation fault'); sys.exit(1)", "the connection failed"),
        ("print('No module named onnxruntime', file=sys.stderr)", "No module named onnxruntime"),
        ("[print('noise') for _ in range(1000)]", "not an answer of the worker"),
        ('print(\'{"ready": 1, "fingerprint": {"cpu": 7}}\', flush=True); time.sleep(60)', "not an answer"),
        ("time.sleep(60)", "no answer in time"),
        ("sys.stdout.write('x' * 3_000_000); sys.stdout.flush(); time.sleep(60)", "not an answer of the worker"),
    ],
    ids=["crash", "missing", "noise", "schema", "silent", "endless"],
)
def test_a_far_side_that_misbehaves(server, tmp_path, monkeypatch, body, says):
    monkeypatch.setattr(remote, "MAX_LINE", 1 << 20)
    patience = 1.5 if says == "no answer in time" else 300.0
    device = server.device(script(tmp_path, body), patience=patience, tries=2)
    with pytest.raises(DeviceError, match=says):
        device.measure({"dense": GOOD}, seconds=0.05)


@needs_sshd
@pytest.mark.parametrize(
    "result",
    [
        '{"dense": [[[1.0, NaN]]]}',
        '{"dense": [[[1.0, 0.0]]]}',
        '{"dense": [[[1.0]]]}',
        '{"dense": []}',
        '{"other": [[[1.0, 2.0]]]}',
        "[]",
        '{"dense": [[["1.0", "2.0"]]]}',
    ],
)
def test_figures_that_can_not_be_are_refused(server, tmp_path, result):
    ready = {"ready": worker.PROTOCOL, "fingerprint": worker.fingerprint()}
    lines = [json.dumps(ready), f'{{"result": {result}}}']
    body = f"print(*{lines!r}, sep=chr(10), flush=True)\ntime.sleep(60)"
    device = server.device(script(tmp_path, body), tries=1)
    with pytest.raises(DeviceError, match="not an answer of the worker"):
        device.measure({"dense": GOOD}, seconds=0.05)


@needs_sshd
def test_nothing_is_written_there_so_a_full_disk_is_no_matter(server, tmp_path):
    """The far side's Python runs where no file can grow: any write of the worker would end it."""
    limited = "import os, resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))\n"
    limited += f"os.execv({sys.executable!r}, [{sys.executable!r}, *sys.argv[1:]])"
    found = server.device(script(tmp_path, limited)).measure({"dense": GOOD}, seconds=0.05, tries=1)
    assert found["dense"].median_ms > 0


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("ssh://a:secret@host", "must not hold a password"),
        ("ssh://host:99999", "port is not a number"),
        ("ssh://", "not an SSH address"),
        ("ssh://-oProxyCommand=x@host", "no user or host name has"),
        ("telnet", "must be `local`"),
    ],
)
def test_addresses_that_can_not_be(url, says):
    with pytest.raises(UsageError, match=says) as caught:
        open_device(url)
    assert "secret" not in str(caught.value)


def test_an_address_may_be_of_ipv6():
    device = remote.SshDevice.at("ssh://me@[::1]:2222")
    assert (device.host, device.port, device.user) == ("::1", 2222, "me")


def test_the_worker_needs_only_python_numpy_and_onnxruntime():
    code = f"import runpy, sys; runpy.run_path({worker.__file__!r}); "
    code += "print([m for m in ('torch', 'onnx', 'amc', 'pydantic') if m in sys.modules])"
    ran = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert ran.stdout.strip() == "[]"
