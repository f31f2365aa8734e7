"""Several Stable Diffusion models side by side, and models whose files change."""

from __future__ import annotations

import shutil
import weakref
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from imagemill.shared.options.stylize import DiffusionStylize
from imagemill.worker.models import added
from imagemill.worker.models.added import Added, AddedFile
from imagemill.worker.operations.stylize.diffusion import Diffusion
from tests.pipelines import pipeline_folder
from tests.styles import loaded, styled

OPTIONS = DiffusionStylize()


@pytest.fixture(scope="module")
def two(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A weights folder with the catalogue's model, and a copy of it that was added as `ours`."""
    folder = shutil.copytree(weights, tmp_path_factory.mktemp("two") / "weights")
    shutil.copytree(folder / "diffusion" / "sd15", folder / "diffusion" / "ours")
    index = folder / "diffusion" / "ours" / "model_index.json"
    file = AddedFile(path=str(index.relative_to(folder)), size=index.stat().st_size, sha256="0" * 64)
    fields = dict(name="ours", kind="checkpoint", family="sd15", files=[file], source="ours", added=datetime.now(UTC))
    added.write(folder, Added.model_validate(fields))
    return folder


@pytest.fixture
def operation(two: Path) -> Diffusion:
    operation = loaded(two)
    operation._pipeline.memory.limit = 10**12
    return operation


def test_models_that_fit_into_memory_stay_open(operation: Diffusion) -> None:
    opened = []
    for model in ("sd15-canny", "ours", "sd15-canny"):
        styled(operation, model=model)
        opened.append(operation._pipeline.current)
    assert opened[0] is opened[2]
    assert operation._pipeline.memory.loads == 2
    weights = sum(tensor.nbytes for tensor in opened[0]._text.unet.parameters())  # type: ignore[union-attr]
    assert operation._pipeline.memory.taken > 2 * weights


def test_model_that_is_closed_leaves_nothing_behind(two: Path) -> None:
    operation = loaded(two)
    styled(operation)
    closed = weakref.ref(operation._pipeline.current._text.unet)  # type: ignore[union-attr]
    styled(operation, model="ours")
    assert closed() is None


def test_memory_is_saved_in_the_model_that_runs(operation: Diffusion) -> None:
    """Not in the one that ran before."""
    styled(operation)
    before = operation._pipeline.current
    assert operation.relieve(1)
    styled(operation, model="ours")
    now = operation._pipeline.current
    assert now is not before
    assert [pipe._text.vae.use_slicing for pipe in (before, now)] == [False, True]  # type: ignore[union-attr]


def test_model_whose_files_were_replaced_is_loaded_again(weights: Path, tmp_path: Path) -> None:
    operation = loaded(shutil.copytree(weights, tmp_path / "weights"))
    before, digest = styled(operation), operation.fingerprint(OPTIONS)
    shutil.rmtree(tmp_path / "weights" / "diffusion" / "sd15")
    other = pipeline_folder(tmp_path / "other", seed=7) / "diffusion" / "sd15"
    shutil.copytree(other, tmp_path / "weights" / "diffusion" / "sd15")
    assert not np.array_equal(styled(operation), before)
    assert operation.fingerprint(OPTIONS) != digest
