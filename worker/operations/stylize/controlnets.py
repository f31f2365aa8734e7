"""ControlNets for one base model: loaded on demand, with the least recently used dropped above a limit."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import torch
from billiard.exceptions import SoftTimeLimitExceeded
from diffusers import ControlNetModel, MultiControlNetModel

from imagemill.shared.errors import ModelUnavailable, OutOfMemory, sentence
from imagemill.worker.hardware.errors import is_out_of_memory
from imagemill.worker.hardware.memory import give_up_caches
from imagemill.worker.models import stamps
from imagemill.worker.models.diffusion_models import ControlNet
from imagemill.worker.operations.stylize.loading import LoadPart, check_finite, from_disk
from imagemill.worker.operations.stylize.loras import Stamp, stamp

SHARED = ("in_channels", "cross_attention_dim", "block_out_channels", "layers_per_block")
"""What a UNet and its ControlNets have in common."""


class ControlNets:
    """At most `limit` stay loaded unless one job needs more. For one thread.

    `unet` is the configuration of the base `model`'s UNet, which a ControlNet must share. `find` returns where a control's
    ControlNet is, `load_part` makes room for one, and `place` moves it to the device.
    """

    def __init__(
        self,
        model: str,
        unet: Any,
        dtype: torch.dtype,
        limit: int,
        find: Callable[[str], ControlNet],
        load_part: LoadPart,
        place: Callable[[Any], None],
    ) -> None:
        self._model, self._unet, self._dtype, self._limit = model, unet, dtype, limit
        self._find, self._load_part, self._place = find, load_part, place
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
        """The network for these controls: one ControlNet, or several as one. Raises ModelUnavailable."""
        found = [self._find(control) for control in controls]
        versions = {each.name: _version(each) for each in found}
        stale = [name for name, version in versions.items() if name in self._loaded and self._loaded[name][1] != version]
        idle = [name for name in self._loaded if name not in versions]
        missing = len(versions.keys() - self._loaded.keys())
        for name in [*stale, *idle[: max(0, len(self._loaded) + missing - self._limit)]]:
            del self._loaded[name]
        for each in found:
            if each.name not in self._loaded:
                self._loaded[each.name] = self._with_room(each, versions), versions[each.name]
            self._loaded.move_to_end(each.name)
        networks = [self._loaded[each.name][0] for each in found]
        return networks[0] if len(networks) == 1 else MultiControlNetModel(networks)

    def _with_room(self, found: ControlNet, needed: Collection[str]) -> Any:
        """Load a ControlNet, if need be in the place of those that are not needed now."""
        size, load = stamps.size(found.folder.parent, found.folder.name), partial(self._load, found)
        idle = [name for name in self._loaded if name not in needed]
        try:
            return self._load_part(found.name, size, load)
        except ModelUnavailable as error:
            if not (error.passing and idle):
                raise
        for name in idle:
            del self._loaded[name]
        give_up_caches()
        return self._load_part(found.name, size, load)

    def _load(self, found: ControlNet) -> Any:
        try:
            network = ControlNetModel.from_pretrained(found.folder, **from_disk(found.folder, self._dtype))
            check_finite(network)
            differences = [name for name in SHARED if _plain(network.config[name]) != _plain(self._unet[name])]
            if not differences:
                self._place(network)
        except Exception as error:  # the files may contain anything
            if isinstance(error, SoftTimeLimitExceeded):
                raise
            if is_out_of_memory(error):
                raise OutOfMemory(f"the ControlNet {found.name} does not fit into memory: {sentence(error)}") from error
            reason = f"the ControlNet {found.name} can't be used from {found.folder}: {sentence(error)}"
            raise ModelUnavailable.of_part(found.name, reason) from error
        if differences:
            reason = f"the ControlNet {found.name} does not fit the model {self._model}: another {', '.join(differences)}"
            raise ModelUnavailable.of_part(found.name, reason, misfit=True)
        return network


def _version(found: ControlNet) -> tuple[Stamp, ...]:
    try:
        return tuple(map(stamp, sorted(found.folder.glob("*.safetensors"))))
    except OSError as error:
        reason = f"the ControlNet {found.name} can't be read: {sentence(error)}"
        raise ModelUnavailable.of_part(found.name, reason) from error


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
