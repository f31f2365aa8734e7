"""A real S3 server for the tests: OpenStack Swift."""

from __future__ import annotations

import fcntl
import json
import os
import pwd
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tests.services.unavailable import unavailable

SWIFT = "2.38.3"
SWIFT_VENV = Path(__file__).resolve().parents[2] / ".services" / f"swift-{SWIFT}"
MODULES = {
    "proxy": "swift.proxy.server",
    "account": "swift.account.server",
    "container": "swift.container.server",
    "object": "swift.obj.server",
}
# Only the filters that S3 clients need; the usual pipeline also has versioned_writes and others.
PIPELINE = "catch_errors healthcheck proxy-logging listing_formats bulk s3api tempauth copy slo symlink proxy-server"

# One ring per server, with one replica on one device. Runs in Swift's own virtual environment.
MAKE_RINGS = """
import json, sys
from swift.common.ring import RingBuilder
folder, ports = sys.argv[1], json.loads(sys.argv[2])
for kind, port in ports.items():
    builder = RingBuilder(part_power=6, replicas=1, min_part_hours=0)
    builder.add_dev({"id": 0, "region": 1, "zone": 1, "weight": 1, "ip": "127.0.0.1", "port": port, "device": "disk"})
    builder.rebalance()
    builder.get_ring().save(f"{folder}/{kind}.ring.gz")
"""

# Swift reads swift.conf from /etc/swift unless another folder is set before its modules are imported.
# PR_SET_PDEATHSIG (1) has the kernel stop the server if the test run dies first.
RUN_SERVER = """
import ctypes, importlib, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)
folder, module, conf = sys.argv[1:4]
from swift.common.utils import set_swift_dir
set_swift_dir(folder)
sys.argv = [module, conf, "-v"]
importlib.import_module(module).main()
"""


class S3Server:
    """OpenStack Swift's S3 interface on 127.0.0.1 or `host`, with SigV4 checks, path-style URLs and region us-east-1.

    Swift is installed once, into its own virtual environment under `.services/`. Objects are kept in a temporary
    folder, which `stop` removes.
    """

    access_key = "test:tester"

    def __init__(self, host: str = "127.0.0.1") -> None:
        self._host = host
        self.secret_key = secrets.token_hex(16)
        self.endpoint_url = ""
        self._folder: Path | None = None
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def environment(self) -> dict[str, str]:
        """AWS variables for boto3 that also hide the user's own configuration."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def start(self) -> S3Server:
        """Install Swift on first use, start its servers and wait for them; skip or fail the test if that fails."""
        python = install_swift()
        self._folder = folder = _folder_with_xattrs()
        try:
            ports = self._configure(python, folder)
            for kind in MODULES:
                self._launch(python, folder, kind)
            for kind in MODULES:
                self._wait_for(folder, kind, ports[kind])
        except BaseException:
            self.stop()
            raise
        self.endpoint_url = f"http://{self._host}:{ports['proxy']}"
        return self

    def stop(self) -> None:
        """Stop the servers and remove their data."""
        for process in self._processes.values():
            process.terminate()
        for process in self._processes.values():
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._processes.clear()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def __enter__(self) -> S3Server:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def _configure(self, python: str, folder: Path) -> dict[str, int]:
        (folder / "devices" / "disk").mkdir(parents=True)
        ports = dict(zip(MODULES, free_ports(len(MODULES)), strict=True))
        limits = "[swift-constraints]\nmax_meta_value_length = 2048\n"
        (folder / "swift.conf").write_text(f"[swift-hash]\nswift_hash_path_suffix = {secrets.token_hex(8)}\n{limits}")
        for kind, port in ports.items():
            (folder / f"{kind}.conf").write_text(self._conf(folder, kind, port))
        rings = {kind: port for kind, port in ports.items() if kind != "proxy"}
        subprocess.run([python, "-c", MAKE_RINGS, str(folder), json.dumps(rings)], check=True, capture_output=True, timeout=60)
        return ports

    def _conf(self, folder: Path, kind: str, port: int) -> str:
        user = pwd.getpwuid(os.getuid()).pw_name
        pipeline = PIPELINE if kind == "proxy" else f"healthcheck {kind}-server"
        host = self._host if kind == "proxy" else "127.0.0.1"
        lines = [
            "[DEFAULT]",
            f"bind_ip = {host}\nbind_port = {port}\nworkers = 0\nuser = {user}",
            f"swift_dir = {folder}\ndevices = {folder}/devices\nmount_check = false\nfallocate_reserve = 0",
            # Swift complains if there is no syslog socket; UDP to the discard port costs nothing.
            "log_level = ERROR\nlog_udp_host = 127.0.0.1\nlog_udp_port = 9",
            f"[pipeline:main]\npipeline = {pipeline}",
            f"[app:{kind}-server]\nuse = egg:swift#{kind}",
        ]
        if kind == "proxy":
            # There is only one device, so a slow disk must not make the proxy give up on it.
            lines.append("account_autocreate = true\nnode_timeout = 60\nconn_timeout = 10\nerror_suppression_limit = 1000000")
            user_line = f"user_{self.access_key.replace(':', '_')} = {self.secret_key} .admin"
            extra = {"s3api": "location = us-east-1", "tempauth": user_line}
            names = [name for name in PIPELINE.split() if name != "proxy-server"]
            lines += [f"[filter:{name}]\nuse = egg:swift#{name.replace('-', '_')}\n{extra.get(name, '')}" for name in names]
        else:
            lines.append("container_update_timeout = 60\n[filter:healthcheck]\nuse = egg:swift#healthcheck")
        return "\n".join(lines) + "\n"

    def _launch(self, python: str, folder: Path, kind: str) -> None:
        with (folder / f"{kind}.log").open("wb") as log:
            self._processes[kind] = subprocess.Popen(
                [python, "-W", "ignore", "-c", RUN_SERVER, str(folder), MODULES[kind], str(folder / f"{kind}.conf")],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _wait_for(self, folder: Path, kind: str, port: int) -> None:
        process, host = self._processes[kind], self._host if kind == "proxy" else "127.0.0.1"
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            try:
                with direct.open(f"http://{host}:{port}/healthcheck", timeout=5):
                    return
            except OSError:
                try:
                    process.wait(0.05)
                except subprocess.TimeoutExpired:
                    continue
                break
        tail = (folder / f"{kind}.log").read_text(errors="replace")[-400:]
        raise unavailable(f"Swift's {kind} server did not start: {tail}")


def install_swift() -> str:
    """The Python executable of Swift's virtual environment, created on first use; a lock serialises parallel test runs."""
    SWIFT_VENV.parent.mkdir(parents=True, exist_ok=True)
    python, ready = SWIFT_VENV / "bin" / "python", SWIFT_VENV / "ready"
    with (SWIFT_VENV.parent / f"{SWIFT_VENV.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if ready.exists() and python.exists():
            return str(python)
        steps = [
            [sys.executable, "-m", "venv", "--clear", str(SWIFT_VENV)],
            [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", f"swift=={SWIFT}"],
            [str(python), "-W", "ignore", "-c", "import swift.proxy.server, swift.obj.server"],
        ]
        for step in steps:
            try:
                subprocess.run(step, check=True, capture_output=True, text=True, timeout=600, env=_own_environment())
            except (OSError, subprocess.SubprocessError) as error:
                output = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
                raise unavailable(f"Swift {SWIFT} can't be installed: {output[-1] if output else error}") from error
        ready.touch()
    return str(python)


def _own_environment() -> dict[str, str]:
    """This environment without the variables that would point the new venv at this venv's packages."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}


def _folder_with_xattrs() -> Path:
    """A new folder on a file system that supports user extended attributes, where Swift keeps its metadata."""
    reason = ""
    for parent in (None, SWIFT_VENV.parent):  # tmpfs supports them only since Linux 6.6
        folder = Path(tempfile.mkdtemp(prefix="imagemill-s3-", dir=parent))
        try:
            os.setxattr(folder, "user.imagemill", b"1")
        except (OSError, AttributeError) as error:
            reason = str(error)
            folder.rmdir()
        else:
            return folder
    raise unavailable(f"Swift needs extended attributes, which no folder here supports: {reason}")


def free_ports(count: int) -> list[int]:
    """Distinct ports of 127.0.0.1 that are free at the moment."""
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


@contextmanager
def changed_environment(changes: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables, and restore them on exit."""
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
