"""The file of saved batch sizes: written, read back, and ignored when malformed."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest

from imagemill.worker.line.batch_sizes import Known
from imagemill.worker.tuning.saved_sizes import path_of, read, write
from tests.fakes import Invert

GPU = "NVIDIA GeForce RTX 3090"
SIZES = {"(512, 512)": Known(peaks={1: 10, 8: 70}, fits=8, fails=9, free=80)}
OTHER = replace(Invert.spec, engine="other")


def test_written_sizes_are_read_back(tmp_path: Path) -> None:
    path = write(tmp_path, GPU, Invert.spec, SIZES)
    assert path == tmp_path / "tuned" / "nvidia-geforce-rtx-3090.json"
    assert read(tmp_path, GPU, Invert.spec) == SIZES
    assert read(tmp_path, "another", Invert.spec) == read(tmp_path, GPU, OTHER) == {}


def test_write_keeps_other_kinds_and_engines(tmp_path: Path) -> None:
    write(tmp_path, GPU, Invert.spec, SIZES)
    write(tmp_path, GPU, OTHER, {"x": Known(fits=1)})
    write(tmp_path, GPU, Invert.spec, {"y": Known(fits=2)})
    assert read(tmp_path, GPU, Invert.spec) == {**SIZES, "y": Known(fits=2)}
    assert read(tmp_path, GPU, OTHER) == {"x": Known(fits=1)}


@pytest.mark.parametrize("name", ["///", "..", "µ"])
def test_file_stays_in_its_folder_for_any_device_name(name: str, tmp_path: Path) -> None:
    assert path_of(tmp_path, name).parent == tmp_path / "tuned"


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[1]",
        json.dumps({"version": 2, "engines": {"stylize/opencv": {"x": {"fits": 3}}}}),
        json.dumps({"version": 1, "engines": []}),
        json.dumps({"version": 1, "engines": {"stylize/opencv": {"x": {"peaks": {"0": 3}}}}}),
        json.dumps({"version": 1, "engines": {"stylize/opencv": {"x": {"fits": "many"}}}}),
    ],
)
def test_malformed_file_is_ignored_and_replaced(content: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = path_of(tmp_path, GPU)
    path.parent.mkdir()
    path.write_text(content)
    with caplog.at_level(logging.WARNING, "imagemill.worker.tuning.saved_sizes"):
        assert read(tmp_path, GPU, Invert.spec) == {}
    assert len(caplog.records) == ("stylize" in content and '"version": 1' in content)
    write(tmp_path, GPU, Invert.spec, SIZES)
    assert read(tmp_path, GPU, Invert.spec)["(512, 512)"] == SIZES["(512, 512)"]
