"""Small models of each family with random weights, ControlNets and LoRAs, and the engine that has loaded one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from imagemill.worker.operations.stylize.diffusion import Diffusion
from tests.pipelines import lora_file, pipeline_folder
from tests.styles import loaded


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = pipeline_folder(tmp_path_factory.getbasetemp() / "weights", controls=("canny", "tile"), checker=True)
    pipeline_folder(folder, "sdxl", ("canny", "scribble"))
    for number, name in enumerate(("red", "green", "blue")):
        lora_file(folder / "diffusion" / "loras" / f"{name}.safetensors", folder, seed=number)
    lora_file(folder / "diffusion" / "loras" / "xl.safetensors", folder, "sdxl")
    return folder


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Run torch on one thread, also in tests that simulate a GPU."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def operation(weights: Path) -> Diffusion:
    return loaded(weights)
