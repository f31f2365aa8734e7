"""Hosts for the tests: network namespaces that a bridge joins, each with a hostname and processes of its own."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

CLONE_NEWNET = 0x40000000


class Hosts:
    """Makes the hosts on entry, and removes them on exit with whatever still runs there.

    They have the addresses 10.99.0.1, 10.99.0.2 and so on, in a network that nothing else can reach.
    """

    def __init__(self, *names: str) -> None:
        self.names = names
        self._prefix = f"imagemill{os.getpid()}-"

    def __enter__(self) -> Hosts:
        if os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("unshare") is None:
            pytest.skip("network namespaces need root, iproute2 and util-linux")
        try:
            self._make()
        except subprocess.CalledProcessError as error:
            self._remove()
            pytest.skip(f"network namespaces can't be made here: {error.stderr}")
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._remove()

    def address(self, name: str) -> str:
        """The IP address of a host."""
        return f"10.99.0.{1 + self.names.index(name)}"

    @contextmanager
    def at(self, name: str) -> Iterator[None]:
        """What is opened or started inside, in this thread, is on that host, and stays there."""
        with Path("/proc/thread-self/ns/net").open() as here, Path(f"/run/netns/{self._prefix}{name}").open() as there:
            _enter(there.fileno())
            try:
                yield
            finally:
                _enter(here.fileno())

    def cut_off(self, name: str) -> None:
        """Pull the cable of a host."""
        self._on_bridge("ip", "link", "set", f"to-{self.names.index(name)}", "down")

    def join(self, name: str) -> None:
        """Plug it in again."""
        self._on_bridge("ip", "link", "set", f"to-{self.names.index(name)}", "up")

    def start(
        self,
        name: str,
        command: Sequence[str],
        log: Path,
        environment: Mapping[str, str],
        *,
        hostname: str,
    ) -> subprocess.Popen[bytes]:
        """Start a command on a host, with a hostname and processes of its own; killed, it takes all of these with it."""
        alone = ["unshare", "--uts", "--pid", "--fork", "--mount-proc", "--kill-child"]
        named = ["sh", "-c", 'echo "$0" > /proc/sys/kernel/hostname && exec "$@"', hostname]
        with self.at(name), log.open("ab") as file:
            return subprocess.Popen(
                [*alone, *named, *command], env=dict(environment), stdin=subprocess.DEVNULL, stdout=file, stderr=file
            )

    def _make(self) -> None:
        _run("ip", "netns", "add", self._prefix + "bridge")
        self._on_bridge("ip", "link", "add", "bridge", "type", "bridge")
        self._on_bridge("ip", "link", "set", "bridge", "up")
        for number, name in enumerate(self.names):
            space, end = self._prefix + name, f"to-{number}"
            _run("ip", "netns", "add", space)
            self._on_bridge(*f"ip link add {end} type veth peer name eth0 netns {space}".split())
            self._on_bridge(*f"ip link set {end} master bridge up".split())
            for command in (f"addr add {self.address(name)}/24 dev eth0", "link set eth0 up", "link set lo up"):
                _run("ip", "-n", space, *command.split())

    def _on_bridge(self, *command: str) -> None:
        _run("ip", "netns", "exec", self._prefix + "bridge", *command)

    def _remove(self) -> None:
        for name in (*self.names, "bridge"):
            subprocess.run(["ip", "netns", "delete", self._prefix + name], check=False, capture_output=True)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=30)


def _enter(namespace: int) -> None:
    if ctypes.CDLL(None, use_errno=True).setns(namespace, CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "setns")
