"""A model on onnxruntime: opened so that memory goes back after each run, and never on another device than was asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from imagemill.shared.errors import ConfigurationError, OperationFailed, OutOfMemory, sentence
from imagemill.worker.hardware.device import Device, give_back
from imagemill.worker.hardware.errors import is_out_of_memory

Tensor = NDArray[np.float32]

NAMES = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}
LARGEST_BATCH = 8
"""Images that go to a GPU at a time; TensorRT builds its engine for one up to so many."""

SMALL = 512
"""Side in pixels of a model's input up to which on CPUs each image has a core to itself. Larger ones take gigabytes each."""


class OnnxModel:
    """One model, opened; `size` is the side of its input in pixels.

    On a GPU images share batches where the model's batch axis is free. On CPUs `abreast` of them run at a time, each for
    itself.

    Raises ConfigurationError where the file is damaged or no such model, and where the session would
    run on another device than the one asked for.
    """

    def __init__(self, path: Path, name: str, device: Device, size: int) -> None:
        self.name = name
        self.abreast = device.threads if device.provider == "cpu" and size <= SMALL else 1
        check_there(device)
        again = f"`imagemill models verify` checks it, `imagemill models pull {name}` fetches it"
        try:
            self._session = _opened(path, device, self.abreast, providers(device, path, _profile(path, device)))
        except Exception as error:
            if is_out_of_memory(error):
                raise OutOfMemory(f"the model {name} does not fit into memory: {sentence(error)}") from error
            raise ConfigurationError(f"the model {name} can't be opened from {path} ({sentence(error)}): {again}") from error
        wanted, got = NAMES[device.provider], self._session.get_providers()
        if got[0] != wanted:
            raise ConfigurationError(
                f"the model {name} was to run on {device.provider}, but onnxruntime could not start {wanted} and would use "
                f"{got[0]}: driver, CUDA and cuDNN must be those that onnxruntime {onnxruntime.__version__} was built for"
            )
        self._session.disable_fallback()  # it would go on with the CPU when a run fails
        self._input, output = self._session.get_inputs()[0], self._session.get_outputs()[0]
        self._outputs = [output.name]  # the first is the fused map, the others are intermediate ones
        if len(self._session.get_inputs()) != 1 or len(self._input.shape) != 4 or self._input.type != "tensor(float)":
            raise ConfigurationError(f"{path} is no model that makes a mask of an image: {again}")
        self.batches = device.provider != "cpu" and not isinstance(self._input.shape[0], int)
        self._threads = ThreadPoolExecutor(self.abreast, "model")
        give_back()  # opening takes as much again as the model

    def run(self, tensors: Sequence[Tensor], *, together: bool = True) -> list[Tensor]:
        """Each image's first output [1, size, size] for tensors [3, size, size], float32.

        Not `together`, none of them shares a batch: a GPU may round otherwise in company. Raises OutOfMemory and
        OperationFailed.
        """
        if not tensors:
            return []
        with self._translated():
            if together and self.batches:
                return list(self._run(np.stack(tensors)))
            return [batch[0] for batch in self._threads.map(self._run, [tensor[None] for tensor in tensors])]

    def _run(self, batch: Tensor) -> Tensor:
        (output,) = self._session.run(self._outputs, {self._input.name: batch}, _run_options(self._session))
        return np.asarray(output, np.float32)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if is_out_of_memory(error):
                raise OutOfMemory(f"there was not enough memory for the model {self.name}: {sentence(error)}") from error
            if type(error).__module__.startswith("onnxruntime") or isinstance(error, RuntimeError | ValueError):
                raise OperationFailed(f"the model {self.name} failed: {sentence(error)}") from error
            raise  # the chunk's time is up, for one


def providers(device: Device, path: Path, shapes: dict[str, str]) -> list[tuple[str, dict[str, Any]]]:
    """What a session is to run on, best first, with options; `shapes` are TensorRT's, see `_profile`."""
    cpu: tuple[str, dict[str, Any]] = (NAMES["cpu"], {})
    if device.provider == "cpu":
        return [cpu]
    cuda = {
        "device_id": 0,  # the process is pinned to one GPU
        "arena_extend_strategy": "kSameAsRequested",
        "cudnn_conv_algo_search": "HEURISTIC",  # batches come in all sizes; trying all algorithms takes seconds for each
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
    chain = [(NAMES["cuda"], cuda), cpu]  # what TensorRT can't do goes to CUDA, shapes and the like to the CPU
    return [(NAMES["tensorrt"], tensorrt), *chain] if device.provider == "tensorrt" else chain


def _opened(path: Path, device: Device, abreast: int, chain: list[tuple[str, dict[str, Any]]]) -> Any:
    # U2Net at 320 pixels (44.0 M parameters) on 2 cores, all modes interleaved; CPU seconds per image, and the MB that are
    # held while images run and after malloc_trim, which follows each chunk:
    #     one image on two threads: arena on 0.63, 253, 253;   arena off 0.60, 210, 1
    #     two images on one thread each: arena on 0.52, 490, 490;   arena off 0.53, 508, 1
    # Two threads wait for each other after each of the model's steps, so an image per core takes less. Without the arena
    # all memory goes back; shrinking it after each run takes 10 % longer. In batches of 4 nothing is gained on CPUs. On a
    # GPU cudaMalloc is too slow for each tensor: there the arena is on, and shrunk.
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = device.threads - abreast + 1  # the thread that runs an image works too
    options.inter_op_num_threads = 1
    options.enable_mem_pattern = False  # it holds one plan of the largest memory per shape
    options.enable_cpu_mem_arena = False
    # Threads that spin between two steps of the model keep decoding and encoding off the cores.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    if device.provider != "cpu":
        onnxruntime.preload_dlls()  # CUDA and cuDNN as pip installs them lie where the loader does not look
    # Without fallback: what fails with the providers asked for is not tried again on the CPU.
    return onnxruntime.InferenceSession(str(path), options, providers=chain, enable_fallback=0)


def _run_options(session: Any) -> Any:
    """Options of one run: memory on a GPU that is not in use goes back after it."""
    options = onnxruntime.RunOptions()
    options.log_severity_level = 3
    if session.get_providers()[0] != NAMES["cpu"]:
        options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "gpu:0")
    return options


def check_there(device: Device) -> None:
    """Raise ConfigurationError where the onnxruntime that is installed can't use what was asked for at all."""
    wanted = NAMES[device.provider]
    if wanted not in onnxruntime.get_available_providers():
        raise ConfigurationError(
            f"models were to run on {device.provider}, but the onnxruntime that is installed has no {wanted}: "
            "pip uninstall onnxruntime && pip install 'imagemill[rembg-gpu]'"
        )


def _profile(path: Path, device: Device) -> dict[str, str]:
    """The range of batches that TensorRT builds an engine for; empty for other providers and where the batch axis is fixed."""
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
