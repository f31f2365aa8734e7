"""A certificate authority for the tests."""

from __future__ import annotations

import shutil
import ssl
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.services.images import ImageServer


@dataclass(frozen=True)
class Certificate:
    """PEM files of a certificate and its key."""

    file: Path
    key: Path


class Authority:
    """Makes its own certificate, and signs others, in a folder."""

    def __init__(self, folder: Path, name: str = "ca") -> None:
        if shutil.which("openssl") is None:
            pytest.skip("openssl is not installed")
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.name = folder, name
        extensions = ["-addext", "basicConstraints=critical,CA:TRUE", "-addext", "keyUsage=critical,keyCertSign"]
        self.file = self._request(name, f"/CN={name}", "-x509", *extensions).file

    def sign(self, name: str, *hosts: str, days: int = 2) -> Certificate:
        """A certificate for host names and addresses; for a client, none."""
        made = self._request(name, f"/CN={name}", suffix="csr")
        names = ",".join(f"{'IP' if host.replace('.', '').isdecimal() else 'DNS'}:{host}" for host in hosts or [name])
        extensions = self.folder / f"{name}.ext"
        extensions.write_text(f"subjectAltName={names}\n")
        request, signed = made.file, self.folder / f"{name}.pem"
        _openssl(
            *("x509", "-req", "-in", str(request), "-out", str(signed), "-days", str(days), "-extfile", str(extensions)),
            *("-CA", str(self.file), "-CAkey", str(self.folder / f"{self.name}.key"), "-CAcreateserial"),
        )
        return Certificate(signed, made.key)

    def _request(self, name: str, subject: str, *more: str, suffix: str = "pem") -> Certificate:
        made = Certificate(self.folder / f"{name}.{suffix}", self.folder / f"{name}.key")
        key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", str(made.key)]
        _openssl("req", "-new", *key, "-subj", subject, "-out", str(made.file), *more)
        return made


def with_tls(server: ImageServer, certificate: Certificate) -> str:
    """Have a server that has not started yet speak TLS; returns the URL at `localhost`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate.file, certificate.key)
    server.listener.socket = context.wrap_socket(server.listener.socket, server_side=True)
    return f"https://localhost:{server.port}"


def _openssl(*arguments: str) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True, timeout=60)
