"""A model on onnxruntime that frees its memory after each run and never falls back to another device."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from billiard.exceptions import SoftTimeLimitExceeded
from numpy.typing import NDArray

from imagemill.shared.errors import ConfigurationError, OperationFailed, OutOfMemory, sentence
from imagemill.worker.hardware.device import Device, give_back
from imagemill.worker.hardware.errors import DeviceUnusable, is_out_of_memory
from imagemill.worker.operations.open_model import getting

Tensor = NDArray[np.float32]

NAMES = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}
DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
"""What a model may take as input."""
LARGEST_BATCH = 8
"""Most images in a batch on a GPU; TensorRT builds its engine for batches of one up to this many."""

SMALL = 512
"""Largest input side in pixels at which CPUs run one image per core. Models with larger input take gigabytes per image."""


class Network:
    """One opened ONNX file. Up to `abreast` runs may take place at the same time. `output` names the output to use, else the
    first.

    Raises ConfigurationError if the file is damaged, DeviceUnusable if the session would run on a device other than `device`,
    and OutOfMemory if the network does not fit.
    """

    def __init__(self, path: Path, name: str, device: Device, abreast: int = 1, output: str | None = None) -> None:
        self.name = name
        self.hint = f"check it with `imagemill models verify` or get it again with {getting(name)}"
        check_there(device)
        try:
            self._session = _opened(path, device, abreast, providers(device, path, _profile(path, device)))
        except SoftTimeLimitExceeded:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise OutOfMemory(f"the model {name} does not fit into memory: {sentence(error)}") from error
            message = f"the model {name} can't be opened from {path} ({sentence(error)}): {self.hint}"
            raise ConfigurationError(message) from error
        wanted, got = NAMES[device.provider], self._session.get_providers()
        if got[0] != wanted:
            raise DeviceUnusable(
                f"the model {name} should run on {device.provider}, but onnxruntime could not start {wanted} and would use "
                f"{got[0]}: install the driver, CUDA and cuDNN that onnxruntime {onnxruntime.__version__} was built for"
            )
        self._session.disable_fallback()  # otherwise a failed run would be repeated on the CPU
        self.inputs = self._session.get_inputs()
        # Usually, the first is the fused map, and the others are intermediate maps.
        self._output = output or self._session.get_outputs()[0].name
        give_back()  # opening takes twice the model's memory for a moment

    def run(self, feed: dict[str, NDArray[Any]]) -> Tensor:
        """The output for the inputs by name. Raises OutOfMemory and OperationFailed."""
        try:
            (output,) = self._session.run([self._output], feed, _run_options(self._session))
        except Exception as error:
            if is_out_of_memory(error):
                raise OutOfMemory(f"there was not enough memory for the model {self.name}: {sentence(error)}") from error
            if type(error).__module__.startswith("onnxruntime") or isinstance(error, RuntimeError | ValueError):
                raise OperationFailed(f"the model {self.name} failed: {sentence(error)}") from error
            raise  # such as the task's time limit
        return np.asarray(output, np.float32)


class OnnxModel:
    """One opened model with an image as its only input, whose side is `size` pixels. `output` names the output to use.

    On a GPU, images share batches if the model's batch axis is dynamic. On CPUs, up to `abreast` images run in parallel,
    one per run.

    Raises what `Network` does, and ConfigurationError if the file is not a segmentation model.
    """

    def __init__(self, path: Path, name: str, device: Device, size: int, output: str | None = None) -> None:
        self.abreast = device.threads if device.provider == "cpu" and size <= SMALL else 1
        self._network = Network(path, name, device, self.abreast, output)
        self._input = self._network.inputs[0]
        if len(self._network.inputs) != 1 or len(self._input.shape) != 4 or self._input.type not in DTYPES:
            raise ConfigurationError(f"{path} is not a segmentation model with one image as input: {self._network.hint}")
        self.batches = device.provider != "cpu" and not isinstance(self._input.shape[0], int)
        self._threads = ThreadPoolExecutor(self.abreast, "model")

    def run(self, data: Sequence[Tensor], *, together: bool = True) -> list[Tensor]:
        """The output, float32 [1, size, size], for each of the tensors, float32 [3, size, size].

        Without `together`, each image runs alone, as a GPU's rounding may depend on the batch. Raises OutOfMemory and
        OperationFailed.
        """
        if not data:
            return []
        if together and self.batches:
            return list(self._run(np.stack(data)))
        return [batch[0] for batch in self._threads.map(self._run, [tensor[None] for tensor in data])]

    def _run(self, batch: Tensor) -> Tensor:
        return self._network.run({self._input.name: batch.astype(DTYPES[self._input.type], copy=False)})


def providers(device: Device, path: Path, shapes: dict[str, str]) -> list[tuple[str, dict[str, Any]]]:
    """The execution providers of a session in order of preference, with options; `shapes` are TensorRT's, see `_profile`."""
    cpu: tuple[str, dict[str, Any]] = (NAMES["cpu"], {})
    if device.provider == "cpu":
        return [cpu]
    cuda = {
        "device_id": 0,  # the process is pinned to one GPU
        "arena_extend_strategy": "kSameAsRequested",
        "cudnn_conv_algo_search": "HEURISTIC",  # an exhaustive search takes seconds for each batch size
    }
    tensorrt = {
        "device_id": 0,
        "trt_engine_cache_enable": True,  # building an engine takes minutes
        "trt_engine_cache_path": str(path.parent / "tensorrt"),
        **shapes,
    }
    if device.memory_limit is not None:
        cuda["gpu_mem_limit"] = device.memory_limit
        tensorrt["trt_max_workspace_size"] = device.memory_limit
    chain = [(NAMES["cuda"], cuda), cpu]  # CUDA runs what TensorRT can't, the CPU runs shapes and the like
    return [(NAMES["tensorrt"], tensorrt), *chain] if device.provider == "tensorrt" else chain


def _opened(path: Path, device: Device, abreast: int, chain: list[tuple[str, dict[str, Any]]]) -> Any:
    # U2Net at 320 pixels (44.0 M parameters) on 2 cores, modes interleaved; CPU seconds per image, and MB held while images
    # run and after malloc_trim, which follows each shift:
    #     one image on two threads: arena on 0.63, 253, 253;   arena off 0.60, 210, 1
    #     two images on one thread each: arena on 0.52, 490, 490;   arena off 0.53, 508, 1
    # Two threads wait for each other after every step of the model, so one image per core is cheaper. Without the arena, all
    # memory is freed; shrinking the arena after each run takes 10 % longer. Batches of 4 gain nothing on CPUs. On a GPU,
    # calling cudaMalloc for each tensor is too slow, so the arena is on and shrunk after each run.
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = device.threads - abreast + 1  # the calling thread works too
    options.inter_op_num_threads = 1
    options.enable_mem_pattern = False  # it keeps a memory block for the largest run per shape
    options.enable_cpu_mem_arena = False
    # Threads that spin between the model's steps take CPU time from decoding and encoding.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    if device.provider != "cpu":
        onnxruntime.preload_dlls()  # the loader does not search where pip installs CUDA and cuDNN
    # Without fallback, a session that fails on these providers is not reopened on the CPU.
    return onnxruntime.InferenceSession(str(path), options, providers=chain, enable_fallback=0)


def _run_options(session: Any) -> Any:
    """Options of one run: afterwards, a GPU's unused memory is freed."""
    options = onnxruntime.RunOptions()
    options.log_severity_level = 3
    if session.get_providers()[0] != NAMES["cpu"]:
        options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "gpu:0")
    return options


def check_there(device: Device) -> None:
    """Raise DeviceUnusable if the installed onnxruntime does not support the device's provider at all."""
    wanted = NAMES[device.provider]
    if wanted not in onnxruntime.get_available_providers():
        raise DeviceUnusable(
            f"models should run on {device.provider}, but the installed onnxruntime has no {wanted}: "
            "pip uninstall onnxruntime && pip install 'imagemill[rembg-gpu]'"
        )


def _profile(path: Path, device: Device) -> dict[str, str]:
    """TensorRT's range of batch sizes; empty for other providers and if the batch axis is fixed."""
    if device.provider != "tensorrt":
        return {}
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    source = onnxruntime.InferenceSession(str(path), options, providers=[NAMES["cpu"]]).get_inputs()[0]
    if isinstance(source.shape[0], int):
        return {}
    rest = "x".join(str(side) for side in source.shape[1:])
    ranges = {"min": 1, "opt": LARGEST_BATCH, "max": LARGEST_BATCH}
    return {f"trt_profile_{kind}_shapes": f"{source.name}:{count}x{rest}" for kind, count in ranges.items()}
