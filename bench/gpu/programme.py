"""All sections, most important first: a run may be cut off at any time."""

from __future__ import annotations

from pathlib import Path

from bench.gpu.background import Background
from bench.gpu.card import Card
from bench.gpu.inpaint import Inpaint
from bench.gpu.memory import out_of_memory, tune
from bench.gpu.sections import Section
from bench.gpu.stylize import Stylize


def programme(card: Card, folder: Path) -> list[Section]:
    """The sections with the seconds that they take on a fast card, and after which they are stopped on any card.

    A model takes 60 to 120 s to compile for one shape.
    """
    diffusion, lama, u2net = Stylize(card, folder), Inpaint(card, folder), Background(card, folder)
    rows = (
        ("card", 2, 20, card.measure_matmul),
        ("Stable Diffusion, eager", 40, 150, diffusion.eager),
        ("Stable Diffusion through the line", 30, 90, diffusion.through_the_line),
        ("Stable Diffusion, compiled", 80, 200, diffusion.compiled),
        ("Stable Diffusion, compiled, through the line", 20, 70, diffusion.compiled_through_the_line),
        ("LaMa, eager", 15, 50, lama.eager),
        ("LaMa through the line", 20, 50, lama.through_the_line),
        ("out of memory", 15, 50, lambda: out_of_memory(card, diffusion)),
        ("tune", 15, 60, lambda: tune(card, diffusion)),
        ("U²-Net, eager", 10, 30, u2net.eager),
        ("U²-Net through the line, 2 megapixels", 15, 40, u2net.small_photos),
        ("U²-Net through the line, 12 megapixels", 15, 40, u2net.large_photos),
        ("LaMa, compiled", 40, 90, lama.compiled),
        ("U²-Net, compiled", 40, 90, u2net.compiled),
        ("U²-Net on onnxruntime", 20, 60, u2net.onnx),
        ("Stable Diffusion, more", 30, 60, diffusion.more),
        ("Stable Diffusion, fp32", 25, 60, diffusion.full_precision),
        ("Stable Diffusion, compiled, other batches", 80, 400, diffusion.other_shapes),
    )
    scale = 0.0 if card.small else 1.0
    return [Section(name, least * scale, most, run) for name, least, most, run in rows]
