"""ControlNets for one base model: loaded on demand, with the least recently used dropped above a limit."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from billiard.exceptions import SoftTimeLimitExceeded
from diffusers import ControlNetModel, MultiControlNetModel

from imagemill.shared.errors import OperationFailed, OutOfMemory, sentence
from imagemill.worker.hardware.errors import is_out_of_memory
from imagemill.worker.models.diffusion_models import ControlNet
from imagemill.worker.operations.stylize.loading import from_disk
from imagemill.worker.operations.stylize.loras import Stamp, stamp


class ControlNets:
    """At most `limit` stay loaded unless one job needs more. For one thread.

    `width` is that of the text embeddings of the base `model`, which a ControlNet must share. `find` returns where a control's
    ControlNet is; `place` moves a loaded one to the device.
    """

    def __init__(
        self,
        model: str,
        width: int,
        dtype: torch.dtype,
        limit: int,
        find: Callable[[str], ControlNet],
        place: Callable[[Any], None],
    ) -> None:
        self._model, self._width, self._dtype, self._limit = model, width, dtype, limit
        self._find, self._place = find, place
        self._loaded: OrderedDict[str, tuple[Any, tuple[Stamp, ...]]] = OrderedDict()

    @property
    def loaded(self) -> list[str]:
        """Names of the ControlNets in memory, least recently used first."""
        return list(self._loaded)

    @property
    def networks(self) -> list[Any]:
        """The ControlNets in memory."""
        return [network for network, _ in self._loaded.values()]

    def of(self, controls: Sequence[str]) -> Any:
        """The network for these controls: one ControlNet, or several as one. Raises OperationFailed and OutOfMemory."""
        found = [self._find(control) for control in controls]
        versions = {each.name: tuple(map(stamp, sorted(each.folder.glob("*.safetensors")))) for each in found}
        stale = [name for name, version in versions.items() if name in self._loaded and self._loaded[name][1] != version]
        idle = [name for name in self._loaded if name not in versions]
        missing = len(versions.keys() - self._loaded.keys())
        for name in [*stale, *idle[: max(0, len(self._loaded) + missing - self._limit)]]:
            del self._loaded[name]
        for each in found:
            if each.name not in self._loaded:
                self._loaded[each.name] = self._load(each), versions[each.name]
            self._loaded.move_to_end(each.name)
        networks = [self._loaded[each.name][0] for each in found]
        return networks[0] if len(networks) == 1 else MultiControlNetModel(networks)

    def _load(self, found: ControlNet) -> Any:
        try:
            network = ControlNetModel.from_pretrained(found.folder, **from_disk(found.folder, self._dtype))
        except Exception as error:  # the files may contain anything
            if isinstance(error, SoftTimeLimitExceeded):
                raise
            if is_out_of_memory(error):
                raise OutOfMemory(f"the ControlNet {found.name} does not fit into memory: {sentence(error)}") from error
            raise OperationFailed(
                f"the ControlNet {found.name} can't be used from {found.folder}: {sentence(error)}"
            ) from error
        if network.config.cross_attention_dim != self._width:
            raise OperationFailed(f"the ControlNet {found.name} does not fit the model {self._model}")
        self._place(network)
        return network
