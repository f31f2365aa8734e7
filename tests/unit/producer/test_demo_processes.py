"""The demo's download of its model, from servers that answer, fail or hang."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from imagemill.producer import demo_processes
from imagemill.producer.demo_processes import ModelPull
from imagemill.shared.settings import WeightsSettings
from tests.services.images import ImageServer, answers
from tests.u2netp import PATH, python_path

MODEL = b"not a real model" * 1000


@pytest.fixture
def mirror() -> Iterator[ImageServer]:
    with ImageServer() as server:
        yield server


@pytest.fixture
def weights(mirror: ImageServer, tmp_path: Path) -> WeightsSettings:
    return WeightsSettings(folder=tmp_path / "weights", mirror=mirror.url(""))


@pytest.fixture
def catalogue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A catalogue for child processes in which MODEL is the right file."""
    monkeypatch.setenv("PYTHONPATH", python_path(MODEL, tmp_path / "catalogue"))


def pull(folder: Path, weights: WeightsSettings, *, offline: bool = False) -> str | None:
    with ModelPull(folder, weights, offline=offline) as process:
        return process.wait()


@pytest.mark.usefixtures("catalogue")
def test_model_is_downloaded_once_and_then_found_offline(mirror: ImageServer, weights: WeightsSettings, tmp_path: Path) -> None:
    mirror.routes[PATH] = MODEL
    assert pull(tmp_path, weights) is None
    assert (weights.folder / "rembg" / "u2netp.onnx").read_bytes() == MODEL
    assert pull(tmp_path, weights) is None
    assert pull(tmp_path, weights, offline=True) is None
    assert mirror.hits[PATH] == 1


@pytest.mark.parametrize(
    ("status", "body", "reason"), [(200, b"wrong bytes", "checksum"), (404, b"", "404"), (200, b"<!doctype html>", "checksum")]
)
def test_bad_mirror_is_reported_in_one_line(
    status: int, body: bytes, reason: str, mirror: ImageServer, weights: WeightsSettings, tmp_path: Path
) -> None:
    mirror.routes[PATH] = answers(status, body)
    message = pull(tmp_path, weights)
    assert message is not None
    assert reason in message
    assert "\n" not in message
    assert not message.startswith("error")
    assert not (weights.folder / "rembg" / "u2netp.onnx").exists()


def test_silent_publisher_is_given_up(
    mirror: ImageServer, weights: WeightsSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_processes, "ANSWER_SECONDS", 0.1)
    mirror.routes[PATH] = mirror.hang
    assert pull(tmp_path, weights) == "its publisher does not answer"


def test_offline_never_asks_the_publisher(mirror: ImageServer, weights: WeightsSettings, tmp_path: Path) -> None:
    assert pull(tmp_path, weights, offline=True) == "u2netp is missing"
    (weights.folder / "rembg").mkdir(parents=True)
    (weights.folder / "rembg" / "u2netp.onnx").write_bytes(b"damaged")
    message = pull(tmp_path, weights, offline=True)
    assert message is not None
    assert "checksum" in message
    assert mirror.connections == 0
