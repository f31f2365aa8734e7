"""Checks of engines and of their models' files."""

from __future__ import annotations

from collections.abc import Iterator

from imagemill.shared.engines import ENGINES
from imagemill.shared.errors import ImagemillError
from imagemill.shared.settings import Settings
from imagemill.worker.hardware.device import Device
from imagemill.worker.models.catalogue import CONVERTED, MODELS, WEIGHTS, Weights, is_part
from imagemill.worker.models.checksums import digest, hash_file
from imagemill.worker.models.files import is_current, path_of, state, variant, variant_record
from imagemill.worker.node.checks.finding import Finding
from imagemill.worker.node.offer import incomplete, missing, models_of, present, shortcomings
from imagemill.worker.operations.registry import create


def check_engines(settings: Settings) -> Iterator[Finding]:
    """Can every configured engine be imported, and use its execution provider?"""
    for row in ENGINES:
        operation, engine = row.operation, row.name
        if operation not in settings.worker.operations or engine not in settings.worker.engines:
            continue
        try:
            if create(operation, engine).spec.runtime == "onnxruntime":
                from imagemill.worker.operations.remove_background.onnx_model import check_there  # needs onnxruntime

                check_there(Device.of(settings, 1))
        except ImagemillError as error:
            yield Finding("models", "failed", error.message)
        else:
            found = "installed" if models_of(engine) else "installed, needs no models"
            yield Finding("models", "ok", f"{operation} ({engine}): {found}")


def check_models(settings: Settings) -> Iterator[Finding]:
    """Do the configured engines have their models' files, as they were published?"""
    for problem, fix in shortcomings(settings):
        yield Finding("models", "failed", problem, fix)
    missing_models = missing(settings)
    for engine in settings.worker.engines:
        absent, here = missing_models.get(engine, []), present(settings, engine)
        if here and models_of(engine):
            yield Finding("models", "ok", f"{engine}: {', '.join(here)}")
        if here and absent:
            yield Finding("models", "ok", f"{engine}: not installed: {', '.join(absent)}", "imagemill models pull NAME")
        names = {file for model in here for file in MODELS.get(model, ())}
        for weights in (weights for weights in WEIGHTS if weights.engine == engine and weights.name in names):
            yield from _check_file(weights, settings)
    for found, fix in incomplete(settings):
        yield Finding("models", "warning", found, fix)


def _check_file(weights: Weights, settings: Settings) -> Iterator[Finding]:
    name, folder = weights.name, settings.weights.folder.expanduser()
    if _is_damaged(weights, settings):
        yield Finding("models", "warning", f"{name} is damaged, or not the published file", f"imagemill models pull {name}")
    quantisable = weights.engine not in CONVERTED and not is_part(name)
    if settings.onnx.int8 and quantisable and not is_current(path_of(folder, weights), "int8"):
        fix = f"imagemill models quantize {name} --images FOLDER, or unset IMAGEMILL_ONNX__INT8"
        yield Finding("models", "warning", f"{name} has no 8-bit version, so it runs in 32 bits", fix)


def _is_damaged(weights: Weights, settings: Settings) -> bool:
    """Whether a file differs from the published one, or from what its conversion made. It is read only if it has changed
    since."""
    folder = settings.weights.folder.expanduser()
    path = path_of(folder, weights)
    try:
        if weights.engine in CONVERTED:
            made = variant_record(path, "safetensors").get("sha256")  # None if converted elsewhere
            return made is not None and made != digest(variant(path, "safetensors"))
        if state(folder, weights) == "unchecked":
            return hash_file(path, weights.checksum).checksum != weights.checksum
    except OSError:
        return True
    return state(folder, weights) == "damaged"
