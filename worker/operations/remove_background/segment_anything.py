"""rembg's `sam`: Segment Anything, which cuts out what points and boxes in an image show.

One network turns the image into an embedding, a second one the embedding and the prompts into masks: Kirillov et al., Segment
Anything, ICCV 2023. Both were made by samexporter, for a frame of 1024 x 684 pixels with the image in its top left corner.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imagemill.shared.errors import ConfigurationError, OperationFailed
from imagemill.shared.options.remove_background import RembgRemoveBackground
from imagemill.worker.hardware.device import Device
from imagemill.worker.imaging.picture import Grey, Picture, Pixels, flatten
from imagemill.worker.imaging.scale import resize
from imagemill.worker.operations.base import Inputs
from imagemill.worker.operations.remove_background.model_families import HIDDEN
from imagemill.worker.operations.remove_background.onnx_model import Network, Tensor
from imagemill.worker.operations.remove_background.prompts import prompts_of
from imagemill.worker.operations.remove_background.run_once import RunOnce
from imagemill.worker.operations.remove_background.session import Opened, Session, Size

FRAME = (1024, 684)  # width and height of the encoder's input
PADDING = -1  # the label of a point that counts for nothing
STRIP = 1 << 20  # pixels of a mask that are interpolated at once
DECODER = ("image_embeddings", "point_coords", "point_labels", "mask_input", "has_mask_input", "orig_im_size")


@dataclass(frozen=True)
class Prompted:
    """An image, float32 [684, 1024, 3] with values 0 to 255, and its prompts: places [n, 2] in it and their labels [n]."""

    image: Tensor
    places: Tensor
    labels: Tensor


class SegmentAnything(Session):
    """What the row's points and boxes show, or else the job's, or else what is in the image's centre."""

    chooses = True

    def data(self, picture: Picture, pixels: Pixels, inputs: Inputs[RembgRemoveBackground]) -> Prompted:
        size = picture.full_size if all(picture.full_size) else picture.size
        image = _rembgs_frame(pixels) if inputs.options.exact else _frame(pixels)
        return Prompted(image, *_prompts(inputs, size))

    def open(self, files: Sequence[Path], name: str, device: Device) -> Opened:
        return _Model(files, name, device)

    def matte(self, output: Tensor, size: Size, part: str | None) -> Grey:  # noqa: ARG002
        width, height = _fitted(size)
        logits = _checked(output)[:, :height, :width].max(axis=0)
        with np.errstate(over="ignore"):  # where exp(-x) is infinite, the sigmoid is 0
            return np.asarray(np.rint(255 / (1 + np.exp(-logits))), np.uint8)

    def rembgs_mask(self, output: Tensor, size: Size, part: str | None) -> Grey:  # noqa: ARG002
        mask = np.zeros(size[::-1], np.uint8)
        for logits in _checked(output):
            for rows, strip in _warped(logits, _inverse(_scaling(size)), size):
                mask[rows][strip.astype(np.float32) > 0] = 255
        return mask


class _Model:
    """Both networks. Images with several results are embedded once."""

    batches = False

    def __init__(self, files: Sequence[Path], name: str, device: Device) -> None:
        encoder, self._decoder = (Network(path, name, device) for path in files)
        self._encoder = RunOnce(_Encoder(encoder))
        if len(encoder.inputs) != 1 or encoder.inputs[0].type != "tensor(float)":
            raise ConfigurationError(f"{files[0]} is not Segment Anything's encoder, with an image as its only input")
        if {one.name for one in self._decoder.inputs} != {*DECODER}:
            raise ConfigurationError(f"{files[1]} is not Segment Anything's decoder, with the inputs {', '.join(DECODER)}")

    def run(self, data: Sequence[Prompted], *, together: bool = True) -> list[Tensor]:
        """The masks of each image as logits, float32 [n, 684, 1024]."""
        embeddings = self._encoder.run([one.image for one in data], together=together)
        return [self._decoded(one, embedding) for one, embedding in zip(data, embeddings, strict=True)]

    def _decoded(self, one: Prompted, embedding: Tensor) -> Tensor:
        nothing = np.zeros((1, 1, 256, 256), np.float32), np.zeros(1, np.float32)  # no earlier mask to improve
        places = np.concatenate([one.places, np.zeros((1, 2), np.float32)])
        labels = np.append(one.labels, np.float32(PADDING))
        size = np.array(FRAME[::-1], np.float32)
        values = (embedding, places[None], labels[None], *nothing, size)
        return np.asarray(self._decoder.run(dict(zip(DECODER, values, strict=True)))[0])


class _Encoder:
    batches = False

    def __init__(self, network: Network) -> None:
        self._network = network

    def run(self, data: Sequence[Tensor], *, together: bool = True) -> list[Any]:  # noqa: ARG002
        return [self._network.run({self._network.inputs[0].name: image}) for image in data]


def _prompts(inputs: Inputs[RembgRemoveBackground], size: Size) -> tuple[Tensor, Tensor]:
    """Places in the frame and labels of an image of `size`, as rembg calculates them. Raises BadMask."""
    places, labels = prompts_of(inputs, size)
    scale = min(FRAME[0] / size[0], FRAME[1] / size[1])
    return (np.array(places).astype(np.float32) * np.float64(scale)).astype(np.float32), np.array(labels, np.float32)


def _fitted(size: Size) -> Size:
    """The size in the frame of an image of `size`."""
    scale = min(FRAME[0] / size[0], FRAME[1] / size[1])
    width, height = (max(1, round(side * scale)) for side in size)
    return width, height


def _frame(pixels: Pixels) -> Tensor:
    """The encoder's input; transparent pixels are composited over grey."""
    width, height = size = _fitted((pixels.shape[1], pixels.shape[0]))
    frame = np.zeros((*FRAME[::-1], 3), np.float32)
    frame[:height, :width] = flatten(resize(pixels, size), HIDDEN)
    return frame


def _rembgs_frame(pixels: Pixels) -> Tensor:
    """The encoder's input as in rembg, which drops alpha and picks single pixels instead of averaging them."""
    size = pixels.shape[1], pixels.shape[0]
    frame = np.empty((*FRAME[::-1], 3), np.float32)
    for channel in range(3):
        for rows, strip in _warped(pixels[..., channel], _scaling(size), FRAME):
            frame[rows, :, channel] = strip.astype(np.uint8)
    return frame


def _scaling(size: Size) -> NDArray[np.float64]:
    """The matrix from places in an image of `size` to places in the frame."""
    scale = min(FRAME[0] / size[0], FRAME[1] / size[1])
    return np.array([[scale, 0, 0], [0, scale, 0], [0, 0, 1]])


def _inverse(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(np.linalg.inv(matrix), np.float64)


def _warped(plane: NDArray[Any], matrix: NDArray[np.float64], size: Size) -> Iterator[tuple[slice, NDArray[np.float64]]]:
    """`plane` [h, w] moved by `matrix` and interpolated linearly at `size`, in strips of rows; 0 outside of it."""
    from scipy.ndimage import map_coordinates  # type: ignore[import-untyped]  # only `exact` needs it

    inverse = _inverse(np.vstack([matrix[:2], [0, 0, 1]]))[:2]
    step = max(1, STRIP // size[0])
    for top in range(0, size[1], step):
        x, y = np.meshgrid(np.arange(size[0]), np.arange(top, min(top + step, size[1])))
        across, down = (row[0] * x + row[1] * y + row[2] for row in inverse)
        yield slice(top, top + step), map_coordinates(plane, [down, across], np.float64, order=1, mode="constant", cval=0)


def _checked(output: Tensor) -> Tensor:
    if output.ndim != 3 or output.shape[1:] != FRAME[::-1]:
        raise OperationFailed(f"Segment Anything's masks have the wrong shape: {output.shape}")
    if not np.isfinite(output).all():
        raise OperationFailed("the model's output is not finite")
    return output
