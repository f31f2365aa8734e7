from __future__ import annotations

import cv2
import numpy as np
import pytest

from imagemill.shared.errors import OperationFailed, OutOfMemory
from imagemill.worker.hardware.device import Device
from imagemill.worker.imaging.opencv import set_up, translated


def test_set_up_limits_threads_and_disables_opencl() -> None:
    before = cv2.getNumThreads()
    try:
        set_up(Device(threads=1))
        assert cv2.getNumThreads() == 1
        assert not cv2.ocl.useOpenCL()
    finally:
        cv2.setNumThreads(before)


def test_opencv_error_is_translated() -> None:
    with pytest.raises(OperationFailed, match="resizing failed") as caught, translated("resizing"):
        cv2.resize(np.zeros((2, 2, 3), np.uint8), (0, 0))
    assert isinstance(caught.value.__cause__, cv2.error)


def test_memory_error_is_translated() -> None:
    @translated("filling")
    def starve() -> None:
        raise MemoryError("Unable to allocate 9 GiB")

    with pytest.raises(OutOfMemory, match=r"filling.*9 GiB"):
        starve()


def test_opencv_out_of_memory_is_translated() -> None:
    with pytest.raises(OutOfMemory), translated("resizing"):
        cv2.resize(np.zeros((1, 1, 3), np.uint8), (2**31 - 1, 2**31 - 1))


def test_other_errors_are_not_translated() -> None:
    with pytest.raises(ZeroDivisionError), translated("counting"):
        1 / 0  # noqa: B018
