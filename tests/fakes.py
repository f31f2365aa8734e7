"""Operations that implement the real interface; each but the first misbehaves in one way."""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import time
from collections.abc import Hashable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from imagemill.shared.errors import ConfigurationError
from imagemill.worker.hardware.device import Device
from imagemill.worker.imaging.picture import Picture
from imagemill.worker.operations.base import Inputs, Operation, Sample, Spec, Work

AnySample = Sample[Any, Any]
AnyWork = Work[Any, Any, Any]


def digest(pixels: Any) -> str:
    """What tells an image from others."""
    return hashlib.sha1(pixels.tobytes(), usedforsecurity=False).hexdigest()


class Invert(Operation[Any, Any, Any, Any]):
    """Inverts each image; `run` gets whole pictures, in batches of up to 4.

    Into the file IMAGEMILL_TEST_RUNS it writes each image that it begins; IMAGEMILL_TEST_SECONDS is how long it takes for one.
    """

    spec = Spec("stylize", "opencv", max_batch=4)

    def load(self, device: Device) -> None:
        self.device = device

    def fingerprint(self, options: Any) -> str:
        return type(self).__name__

    def prepare(self, picture: Picture, inputs: Inputs[Any]) -> AnyWork:
        return Work([Sample(picture.pixels, inputs.options)], plan=picture)

    def group_key(self, sample: AnySample) -> Hashable:
        return sample.data.shape

    def together(self, options: Any) -> bool:
        return True

    def run(self, samples: Sequence[AnySample]) -> list[Any]:
        if runs := os.environ.get("IMAGEMILL_TEST_RUNS"):
            with Path(runs).open("a") as file:  # lines as short as these are appended in one piece, also by several processes
                file.write("".join(f"{digest(sample.data)} {time.time_ns()}\n" for sample in samples))
        time.sleep(len(samples) * float(os.environ.get("IMAGEMILL_TEST_SECONDS", 0)))
        return [255 - sample.data for sample in samples]

    def finish(self, work: AnyWork, outputs: Sequence[Any]) -> Picture:
        return replace(work.plan, pixels=outputs[0])


class SlowLoad(Invert):
    """Takes 5 s to load; Celery kills a replacement child after 4 s by default."""

    def load(self, device: Device) -> None:
        time.sleep(5)


class BrokenLoad(Invert):
    """Fails to load because of a bug."""

    def load(self, device: Device) -> None:
        raise RuntimeError("the weights are not there")


class Unfit(Invert):
    """Fails to load with a ConfigurationError."""

    def load(self, device: Device) -> None:
        raise ConfigurationError("there is no such GPU")


class Nameless(Invert):
    """Has a bug in `fingerprint`."""

    def fingerprint(self, options: Any) -> str:
        raise NameError("name 'fingerprint' is not defined")


class Tells(Invert):
    """Writes the visible GPUs to stderr."""

    def load(self, device: Device) -> None:
        sys.stderr.write(f"CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES')}\n")


class Heavy(Invert):
    """Imports the neural runtimes, as the real engines do."""

    def load(self, device: Device) -> None:
        import onnxruntime  # noqa: F401
        import torch  # noqa: F401


class Deadly(Invert):
    """A white image kills the process, as a crash in native code would."""

    def run(self, samples: Sequence[AnySample]) -> list[Any]:
        outputs = super().run(samples)
        for sample in samples:
            if sample.data.size > 3 and sample.data.min() == 255:
                os.kill(os.getpid(), signal.SIGKILL)
        return outputs


class Poisons(Invert):
    """After a white image, every `run` of this process fails with torch's error for a lost GPU."""

    poisoned = False

    def run(self, samples: Sequence[AnySample]) -> list[Any]:
        self.poisoned |= any(sample.data.size > 3 and sample.data.min() == 255 for sample in samples)
        if self.poisoned:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return super().run(samples)


class Gated(Invert):
    """Creates a file `at-*` for each image; from the third one on, waits for the file `open` in the same folder."""

    spec = Spec("stylize", "opencv", max_batch=1)

    def run(self, samples: Sequence[AnySample]) -> list[Any]:
        folder = Path(os.environ["IMAGEMILL_TEST_GATE"])
        if samples[0].data.shape[0] != 64 or samples[0].data[0, 0, 0] != 128:  # not the warm-up
            count = len(list(folder.glob("at-*")))
            (folder / f"at-{count}-{os.getpid()}").touch()
            while count >= 2 and not (folder / "open").exists():
                time.sleep(0.01)
        return super().run(samples)


class Hangs(Invert):
    """A white image takes forever; at the soft time limit, it gives up."""

    def run(self, samples: Sequence[AnySample]) -> list[Any]:
        outputs = super().run(samples)
        while any(sample.data.size > 3 and sample.data.min() == 255 for sample in samples):
            self.wait()
        return outputs

    def wait(self) -> None:
        time.sleep(1)


class HangsForGood(Hangs):
    """It ignores the soft time limit, as native code may."""

    def wait(self) -> None:
        with suppress(BaseException):
            super().wait()


class Greedy(Invert):
    """For a white image, takes memory until the kernel kills the process, or where that is not limited, kills itself."""

    def run(self, samples: Sequence[AnySample]) -> list[Any]:
        if any(sample.data.size > 3 and sample.data.min() == 255 for sample in samples):
            taken = [bytearray(os.urandom(1 << 20)) * 64 for _ in range(16)]
            os.kill(os.getpid(), signal.SIGKILL)
            del taken
        return super().run(samples)
