"""The engine on ISNet's real weights, where IMAGEMILL_TEST_WEIGHTS names a folder with them: as isnet-fp16.onnx, or as nodes
have them, in rembg/isnet-general-use.onnx.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from skimage import data

from imagemill.shared.engines import parse_options
from imagemill.shared.messages import Item
from imagemill.worker.hardware.device import Device
from imagemill.worker.imaging.picture import Picture, Pixels
from imagemill.worker.models import batch_axis, single_precision
from imagemill.worker.models.files import record_variant, variant
from imagemill.worker.operations.base import Inputs
from imagemill.worker.operations.remove_background.rembg import Rembg

MODEL = "isnet-general-use"
FILES = ("isnet-fp16.onnx", f"rembg/{MODEL}.onnx")
FOUND = [path for name in FILES if (path := Path(os.environ.get("IMAGEMILL_TEST_WEIGHTS", "nowhere"), name)).is_file()]

pytestmark = [
    pytest.mark.skipif(not FOUND, reason=f"IMAGEMILL_TEST_WEIGHTS names no folder with {' or '.join(FILES)}"),
    pytest.mark.timeout(900),  # the network takes seconds, and importing rembg up to a minute
]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A weights folder with the file and the variant that CPUs run."""
    folder = tmp_path_factory.mktemp("weights")
    original = folder / "rembg" / f"{MODEL}.onnx"
    original.parent.mkdir()
    shutil.copyfile(FOUND[0], original)
    outcome, reason = single_precision.make(original, variant(original, "fp32"))
    assert outcome in ("made", "needless"), reason
    record_variant(original, "fp32", accepted=outcome == "made", details={})
    return folder


@pytest.fixture(scope="module")
def photo() -> Pixels:
    return np.ascontiguousarray(data.astronaut())


def cut(weights: Path, photo: Pixels, **options: object) -> Pixels:
    operation = Rembg()
    operation.load(Device(threads=2, weights=weights))
    inputs = Inputs(Item(index=0, source="https://photos.example/a.png"), parse_options("remove-background", "rembg", options))
    work = operation.prepare(Picture(photo), inputs)
    return operation.finish(work, operation.run(work.samples)).pixels


@pytest.fixture(scope="module")
def by_rembg(weights: Path, photo: Pixels) -> Pixels:
    """What rembg's own session makes of the photo, with the same file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("U2NET_HOME", str(weights / "rembg"))
        patch.setenv("MODEL_CHECKSUM_DISABLED", "1")
        from rembg import new_session, remove  # type: ignore[import-untyped]

        session = new_session(MODEL, providers=["CPUExecutionProvider"])
        return np.asarray(remove(Image.fromarray(photo), session=session))


def test_exact_returns_the_very_pixels_of_rembg(weights: Path, photo: Pixels, by_rembg: Pixels) -> None:
    np.testing.assert_array_equal(cut(weights, photo, model=MODEL, exact="true"), by_rembg)


def test_alpha_equals_rembgs_up_to_half_precision(weights: Path, photo: Pixels, by_rembg: Pixels) -> None:
    apart = np.abs(cut(weights, photo, model=MODEL)[..., 3].astype(int) - by_rembg[..., 3])
    assert apart.max() <= 2
    assert apart.mean() < 0.1


def test_batch_axis_is_freed_because_only_the_output_that_is_read_counts(weights: Path, tmp_path: Path) -> None:
    outcome, reason = batch_axis.make(weights / "rembg" / f"{MODEL}.onnx", tmp_path / "dynamic.onnx")
    assert outcome in ("made", "needless"), reason
