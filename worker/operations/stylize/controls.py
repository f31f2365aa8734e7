"""Control pictures drawn from the source with OpenCV, like those that ControlNets were trained on: white lines on black.

The formulas for scribbles and line art are those of the preprocessors `scribble_xdog` and `lineart_standard` of the web UI's
extension for ControlNet (Mikubill/sd-webui-controlnet, scripts/processor.py), which need no network.
"""

from __future__ import annotations

from typing import Literal, get_args

import cv2
import numpy as np
from numpy.typing import NDArray

from imagemill.shared.options.stylize import DiffusionStylize
from imagemill.worker.imaging.picture import Grey, Pixels

Kind = Literal["canny", "scribble", "lineart", "tile"]
KINDS: tuple[Kind, ...] = get_args(Kind)

FINE, COARSE = 0.5, 5.0
"""Standard deviations of the two blurs whose difference makes a scribble, in pixels."""
STROKE = 16
"""Grey levels by which a stroke is darker than its surroundings."""
AROUND = 6.0
"""Standard deviation of the blur that a line is compared with, in pixels."""
LINE = 8
"""Grey levels by which a pixel is darker than its surroundings and counts as part of a line."""


def drawn(kind: Kind, rgb: Pixels, options: DiffusionStylize) -> Pixels | Grey:
    """The control picture for RGB [h, w, 3]: lines [h, w], 0 to 255, or for `tile` the picture itself."""
    match kind:
        case "canny":
            return edges_of(rgb, options.canny_low, options.canny_high)
        case "scribble":
            return scribble_of(rgb)
        case "lineart":
            return line_art_of(rgb)
        case "tile":
            return rgb


def edges_of(rgb: Pixels, low: int, high: int) -> Grey:
    """Edges [h, w], 0 or 255, of RGB [h, w, 3]: Canny, A Computational Approach to Edge Detection, IEEE TPAMI 8(6), 1986."""
    return np.asarray(cv2.Canny(rgb, low, high), np.uint8)


def scribble_of(rgb: Pixels) -> Grey:
    """Strokes [h, w], 0 or 255, where a picture is darker than its surroundings: Winnemöller et al., XDoG, Comput. Graph.
    36(6), 2012."""
    return np.asarray((_darker(_blurred(rgb, FINE), COARSE, rgb) > STROKE) * 255, np.uint8)


def line_art_of(rgb: Pixels) -> Grey:
    """Lines [h, w], 0 to 255, as strong as they are dark, with the median line at half brightness."""
    depth = _darker(rgb.astype(np.float32), AROUND, rgb)
    lines = depth[depth > LINE]
    usual = max(16.0, float(np.median(lines))) if lines.size else 16.0
    return np.asarray(np.clip(depth * (127 / usual), 0, 255), np.uint8)


def _darker(fine: NDArray[np.float32], sigma: float, rgb: Pixels) -> NDArray[np.float32]:
    """How much darker each pixel is than its surroundings, 0 to 255, in the channel in which that is least."""
    return np.asarray(np.clip((_blurred(rgb, sigma) - fine).min(axis=2), 0, 255), np.float32)


def _blurred(rgb: Pixels, sigma: float) -> NDArray[np.float32]:
    return np.asarray(cv2.GaussianBlur(rgb.astype(np.float32), (0, 0), sigma), np.float32)
