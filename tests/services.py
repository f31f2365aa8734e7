"""Real services that the tests start themselves: Redis, an S3 server and a web server."""

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
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from imagemill.producer.embedded_redis import EmbeddedRedis

__all__ = ["ImageServer", "RedisServer", "S3Server", "ServiceMissing"]

RedisServer = EmbeddedRedis
"""`RedisServer(folder)` with start, stop, kill, restart and url."""


class ServiceMissing(Exception):  # a state of this machine, not a fault
    """A service that can't be had here, and why."""


# --- S3 ---------------------------------------------------------------------------------------------------------------

SWIFT = "2.38.3"
SWIFT_VENV = Path(__file__).resolve().parent.parent / ".services" / f"swift-{SWIFT}"
KINDS = ("proxy", "account", "container", "object")
MODULES = {"proxy": "swift.proxy.server", "account": "swift.account.server", "container": "swift.container.server"}
MODULES["object"] = "swift.obj.server"
# versioned_writes and the rest of Swift's usual pipeline are left out: only what S3 clients need.
PIPELINE = "catch_errors healthcheck proxy-logging listing_formats bulk s3api tempauth copy slo symlink proxy-server"

# One ring per kind: one replica on one device. Run by the interpreter that has Swift.
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

# Swift looks for swift.conf in /etc/swift unless it is told before its modules are imported.
# The kernel ends the server when the test run dies without having stopped it (1: PR_SET_PDEATHSIG).
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
    """OpenStack Swift with its S3 interface on 127.0.0.1: checks SigV4, keeps objects on disk, path-style addresses.

    Swift is installed once into a virtual environment of its own under `.services/`; the data is
    in a temporary folder that `stop` removes. Region us-east-1.
    """

    access_key = "test:tester"

    def __init__(self) -> None:
        self.secret_key = secrets.token_hex(16)
        self.endpoint_url = ""
        self._folder: Path | None = None
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def environment(self) -> dict[str, str]:
        """The AWS variables that boto3 reads, with nothing of the user's own configuration."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def start(self) -> S3Server:
        """Install at first use, start the four servers and wait for them; ServiceMissing where that can't be."""
        python = install_swift()
        self._folder = folder = _folder_with_xattrs()
        try:
            ports = self._configure(python, folder)
            for kind in KINDS:
                self._launch(python, folder, kind)
            for kind in KINDS:
                self._wait_for(folder, kind, ports[kind])
        except BaseException:
            self.stop()
            raise
        self.endpoint_url = f"http://127.0.0.1:{ports['proxy']}"
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
        ports = dict(zip(KINDS, free_ports(len(KINDS)), strict=True))
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
        lines = [
            "[DEFAULT]",
            f"bind_ip = 127.0.0.1\nbind_port = {port}\nworkers = 0\nuser = {user}",
            f"swift_dir = {folder}\ndevices = {folder}/devices\nmount_check = false\nfallocate_reserve = 0",
            # Without a syslog socket Swift would complain; UDP to the discard port costs nothing.
            "log_level = ERROR\nlog_udp_host = 127.0.0.1\nlog_udp_port = 9",
            f"[pipeline:main]\npipeline = {pipeline}",
            f"[app:{kind}-server]\nuse = egg:swift#{kind}",
        ]
        if kind == "proxy":
            # One device and no replicas: a slow disk must not make the proxy give that device up.
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
        process = self._processes[kind]
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            try:
                with direct.open(f"http://127.0.0.1:{port}/healthcheck", timeout=5):
                    return
            except OSError:
                try:
                    process.wait(0.05)
                except subprocess.TimeoutExpired:
                    continue
                break
        tail = (folder / f"{kind}.log").read_text(errors="replace")[-400:]
        raise ServiceMissing(f"Swift's {kind} server did not start: {tail}")


def install_swift() -> str:
    """The Python that has Swift, installed at first use; parallel test runs wait for each other."""
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
                told = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
                raise ServiceMissing(f"Swift {SWIFT} can't be installed: {told[-1] if told else error}") from error
        ready.touch()
    return str(python)


def _own_environment() -> dict[str, str]:
    """The environment without what would point the new venv's Python at this one's packages."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}


def _folder_with_xattrs() -> Path:
    """A new folder on a file system that keeps user attributes, in which Swift keeps its metadata."""
    reason = ""
    for parent in (None, SWIFT_VENV.parent):  # a tmpfs has them only from Linux 6.6
        folder = Path(tempfile.mkdtemp(prefix="imagemill-s3-", dir=parent))
        try:
            os.setxattr(folder, "user.imagemill", b"1")
        except (OSError, AttributeError) as error:
            reason = str(error)
            folder.rmdir()
        else:
            return folder
    raise ServiceMissing(f"no folder here keeps extended attributes, which Swift needs: {reason}")


def free_ports(count: int) -> list[int]:
    """Different ports of 127.0.0.1 that nobody listens on at the moment."""
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


# --- Web --------------------------------------------------------------------------------------------------------------

Handler = BaseHTTPRequestHandler
Route = bytes | Callable[[Handler], None]


class ImageServer:
    """A threaded web server on 127.0.0.1 with keep-alive, whose answers tests script.

    `routes` maps paths without query to bytes (200, image/png) or to a callable that gets the
    request's handler; other paths get `fallback`, or 404. `hits` counts requests per path, `connections` the TCP
    connections; `last_headers` and `last_path` are of the latest request. `released` ends stalls; `stop` sets it.
    """

    def __init__(self, routes: Mapping[str, Route] | None = None) -> None:
        self.routes: dict[str, Route] = dict(routes or {})
        self.fallback: Route | None = None
        self.hits: Counter[str] = Counter()
        self.connections = 0
        self.last_headers: dict[str, str] = {}
        self.last_path = ""
        self.stalled = threading.Event()
        self.released = threading.Event()
        self._lock = threading.Lock()
        self._server = self._make_server()
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        """The address of a path on this server."""
        return f"http://{host}:{self.port}{path}"

    def start(self) -> ImageServer:
        """Serve until `stop`."""
        self._thread.start()
        return self

    def stop(self) -> None:
        """Release what stalls and close."""
        self.released.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> ImageServer:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def hang(self, handler: Handler) -> None:
        """A route that takes the request and says nothing until released."""
        self.stalled.set()
        self.released.wait(60)
        handler.close_connection = True

    def trickle(self, data: bytes, pause: float = 0.05) -> Route:
        """A route that sends its headers at once and then one byte per `pause` seconds."""

        def send(handler: Handler) -> None:
            start_reply(handler, 200, {"Content-Length": str(len(data)), "Content-Type": "image/png"})
            for n in range(len(data)):
                if self.released.wait(pause):
                    break
                handler.wfile.write(data[n : n + 1])

        return send

    def _make_server(self) -> ThreadingHTTPServer:
        outer = self

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, request: object, client_address: object) -> None:
                """A client that hung up is part of the tests; anything else would be a fault in them."""
                if not isinstance(sys.exception(), ConnectionError):
                    super().handle_error(request, client_address)  # type: ignore[arg-type]

        class Request(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # headers and body are two writes; on kept connections each would wait 40 ms

            def setup(self) -> None:
                super().setup()
                with outer._lock:
                    outer.connections += 1

            def do_GET(self) -> None:
                outer._answer(self)

            def log_message(self, *args: object) -> None:
                """Quiet."""

        return Server(("127.0.0.1", 0), Request)

    def _answer(self, handler: Handler) -> None:
        path = handler.path.partition("?")[0]
        with self._lock:
            self.hits[path] += 1
            self.last_headers = dict(handler.headers.items())
            self.last_path = handler.path
        route = self.routes.get(path, self.fallback)
        if route is None:
            reply(handler, 404, b"no such thing", "text/plain")
        elif isinstance(route, bytes):
            reply(handler, 200, route)
        else:
            route(handler)


def start_reply(handler: Handler, status: int, headers: Mapping[str, str]) -> None:
    """Status line and headers."""
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name, value)
    handler.end_headers()


def reply(
    handler: Handler, status: int, body: bytes, kind: str = "image/png", headers: Mapping[str, str] | None = None
) -> None:
    """A whole answer."""
    start_reply(handler, status, {"Content-Type": kind, "Content-Length": str(len(body)), **(headers or {})})
    handler.wfile.write(body)


def answers(status: int, body: bytes = b"", kind: str = "image/png", headers: Mapping[str, str] | None = None) -> Route:
    """A route that always gives this answer."""
    return lambda handler: reply(handler, status, body, kind, headers)


def html(text: str = "<!DOCTYPE html><html><body>Please log in</body></html>", kind: str = "text/html; charset=utf-8") -> Route:
    """A web page where an image was expected."""
    return answers(200, text.encode(), kind)


def redirect(location: str, status: int = 302) -> Route:
    """A redirect; to its own path it is a loop."""
    raw = location.encode().decode("latin-1")  # http.server writes headers in latin-1; servers send UTF-8
    return answers(status, headers={"Location": raw})


def failing(times: int, status: int, then: bytes, headers: Mapping[str, str] | None = None) -> Route:
    """`status` for the first `times` requests, the bytes afterwards."""
    lock, left = threading.Lock(), [times]

    def send(handler: Handler) -> None:
        with lock:
            left[0] -= 1
            failed = left[0] >= 0
        if failed:
            reply(handler, status, b"try later", "text/plain", headers)
        else:
            reply(handler, 200, then)

    return send


def truncated(data: bytes, missing: int) -> Route:
    """Announces all of `data` and closes the connection `missing` bytes before its end."""

    def send(handler: Handler) -> None:
        start_reply(handler, 200, {"Content-Length": str(len(data)), "Content-Type": "image/png"})
        handler.wfile.write(data[: len(data) - missing])
        handler.close_connection = True

    return send


def endless(kind: str = "image/png", length: int | None = None) -> Route:
    """Sends until the client hangs up; without `length` it doesn't say how much."""

    def send(handler: Handler) -> None:
        handler.close_connection = True
        start_reply(handler, 200, {"Content-Type": kind, **({"Content-Length": str(length)} if length else {})})
        block = b"\x89PNG" + bytes(65_532)
        while True:
            handler.wfile.write(block)

    return send


@contextmanager
def changed_environment(changes: Mapping[str, str]) -> Iterator[None]:
    """The environment with `changes`, and as it was afterwards."""
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
