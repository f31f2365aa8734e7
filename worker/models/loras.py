"""LoRAs of the operator's own, whatever trained them, as nodes load them: diffusers' names, and no scales beside the weights.

diffusers understands some namings only in part, and drops what it doesn't know. So each layer is looked up in a checkpoint of
its family and written in the one form that needs no converting, in which `up @ down` is what is added to the layer's weight.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import pad

from imagemill.shared.errors import ConfigurationError, sentence
from imagemill.worker.models.checksums import read_json
from imagemill.worker.models.lora_names import Layers, Place, diffusers_name, split
from imagemill.worker.models.sources import metadata_of
from imagemill.worker.models.torch_archive import DAMAGED, read

KEPT = (torch.float16, torch.bfloat16, torch.float32)
"""Types in which weights are written as they are."""
MAGNITUDES = {"dora_scale", "magnitude"}
PLAIN = {"down", "up", "alpha"}
PEFT, PEFT_CONFIG = "base_model.model.", "adapter_config.json"
METADATA = "lora_adapter_metadata"
"""Where diffusers writes the scales, in a safetensors file."""

Parts = dict[str, Tensor]
"""The tensors of one layer by their roles."""


@dataclass(frozen=True)
class Scales:
    """What a trainer's configuration says about scales: a value for all layers or those of a part, and exceptions by name."""

    config: Mapping[str, Any]

    def of(self, place: Place, rank: int) -> float:
        """The factor of a layer's weights; 1 where the configuration says nothing."""
        patterns = self._get(place, "alpha_pattern") or {}
        own = [alpha for end, alpha in patterns.items() if f".{place.name}".endswith(f".{end.removeprefix('^')}")]
        alpha = own[0] if own else self._get(place, "lora_alpha")
        return 1.0 if alpha is None else float(alpha) / (rank**0.5 if self._get(place, "use_rslora") else rank)

    def _get(self, place: Place, key: str) -> Any:
        return self.config.get(f"{place.part}.{key}", self.config.get(key))


def from_file(source: Path, target: Path, family: str, known: Sequence[Layers]) -> tuple[str, str]:
    """Write a LoRA as nodes load it; return its family and a sentence about it.

    `family` is what the tensors' names tell, if anything, and `known` are the layers of a checkpoint of each family on this
    host. Raises ConfigurationError.
    """
    try:
        tensors = read(source)
        layers = _layers(tensors)
        candidates = [layers_there for layers_there in known if family in ("", layers_there.family)]
        if not candidates:
            return family, _copied(source, tensors, layers, family, target)
        scales = _scales(source, tensors)
        written, fitting = _converted(layers, scales, candidates)
    except ConfigurationError:
        raise
    except (*DAMAGED, KeyError, IndexError, TypeError, OverflowError) as error:
        raise ConfigurationError(f"it is no LoRA, or it is damaged: {sentence(error)}") from error
    save_file(written, target)
    return fitting.family, f"parts: LoRA of {len(layers)} layers"


def _layers(tensors: Mapping[str, Tensor]) -> dict[str, Parts]:
    """The tensors by layer and role. Raises ConfigurationError for values that are not finite numbers."""
    layers: dict[str, Parts] = {}
    for name, tensor in tensors.items():
        layer, role = split(name)
        if not tensor.is_floating_point() and role != "alpha":
            raise ConfigurationError(f"its tensor {name} has no floats")
        if not tensor.float().isfinite().all():
            raise ConfigurationError(f"it has values that are not finite numbers, in {name}")
        if role in layers.setdefault(layer, {}):
            raise ConfigurationError(f"it has two tensors for the same purpose, such as {name}")
        layers[layer][role] = tensor
    return layers


def _copied(source: Path, tensors: Mapping[str, Tensor], layers: Mapping[str, Parts], family: str, target: Path) -> str:
    """Write a LoRA as it is, for diffusers to convert, as no checkpoint of its family is here that tells its layers."""
    missing = family or "sd15"
    if any(not parts.keys() <= PLAIN or layer.startswith(PEFT) for layer, parts in layers.items()):
        raise ConfigurationError(f"converting it takes the layers of {missing}: run `imagemill models pull {missing}` first")
    for layer, parts in layers.items():
        _pair(layer, parts)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, target, metadata_of(source) or None)
    none = f"none of {family}" if family else "none"
    return (
        f"parts: LoRA of {len(layers)} layers, not compared with those of a checkpoint, as {none} is here: "
        f"to be sure, run `imagemill models pull {missing}`, remove this and add it again"
    )


def _converted(layers: Mapping[str, Parts], scales: Scales, candidates: Sequence[Layers]) -> tuple[dict[str, Tensor], Layers]:
    """The tensors that nodes load, and the first candidate that they fit. Raises ConfigurationError if there is none."""
    faults = []
    for candidate in candidates:
        try:
            return _of_one_rank(dict(_written(layers, scales, candidate))), candidate
        except ConfigurationError as error:
            faults.append(error.message)
    raise ConfigurationError("; ".join(dict.fromkeys(faults)))


def _written(layers: Mapping[str, Parts], scales: Scales, known: Layers) -> Iterator[tuple[str, Tensor]]:
    places = {layer: place for layer in layers if (place := known.find(layer)) is not None}
    strangers = [layer for layer in layers if layer not in places]
    if strangers:
        raise ConfigurationError(
            f"{len(strangers)} of its {len(layers)} layers are not in {known.family}, such as {strangers[0][:200]}"
        )
    by_place = {place: layer for layer, place in places.items()}
    twice = next((layer for layer, place in places.items() if by_place[place] != layer), None)
    if twice is not None:
        raise ConfigurationError(f"it has two layers for one weight: {twice[:200]} and {by_place[places[twice]][:200]}")
    for part in dict.fromkeys(place.part for place in by_place):
        of_dora = [MAGNITUDES & layers[layer].keys() != set() for place, layer in by_place.items() if place.part == part]
        if any(of_dora) and not all(of_dora):
            raise ConfigurationError(
                f"{sum(of_dora)} of {len(of_dora)} layers of its {part} are of a DoRA; expected all or none"
            )
    for layer, place in places.items():
        yield from _layer(layer, layers[layer], place, known, scales)


def _layer(layer: str, parts: Parts, place: Place, known: Layers, scales: Scales) -> Iterator[tuple[str, Tensor]]:
    shape, name = known.shapes[place], diffusers_name(place)
    down, up, rank = _pair(layer, parts)
    if (up.shape[0], down.shape[1]) != (shape[0], math.prod(shape[1:])):
        raise ConfigurationError(
            f"its layer {layer[:200]} is for a weight of {up.shape[0]} x {down.shape[1]} numbers, and in {known.family} "
            f"that has {shape[0]} x {math.prod(shape[1:])}"
        )
    if rank:
        up = up * (float(parts["alpha"]) / rank if "alpha" in parts else scales.of(place, rank))
    kind = next(tensor.dtype for role, tensor in parts.items() if role != "alpha")
    yield f"{name}.lora_A.weight", _stored(down.reshape(-1, *shape[1:]), kind)
    yield f"{name}.lora_B.weight", _stored(up.reshape(*up.shape, *(1,) * (len(shape) - 2)), kind)
    for role in MAGNITUDES & parts.keys():
        end = "" if place.part == "unet" else ".weight"  # diffusers and transformers, which load them, look for other names
        yield f"{name}.lora_magnitude_vector{end}", _magnitude(layer, parts[role].float(), role, shape)


def _of_one_rank(written: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same with zeros added, so that all layers of a text encoder have one rank: diffusers looks at some of them only."""
    for part in ("text_encoder.", "text_encoder_2."):
        own = [name for name in written if name.startswith(part)]
        rank = max((len(written[name]) for name in own if name.endswith("lora_A.weight")), default=0)
        for name in own:
            if name.endswith("lora_A.weight"):
                written[name] = pad(written[name], (0, 0, 0, rank - len(written[name])))
            elif name.endswith("lora_B.weight"):
                written[name] = pad(written[name], (0, rank - written[name].shape[1]))
    return written


def _pair(layer: str, parts: Parts) -> tuple[Tensor, Tensor, int]:
    """`down` float32 [rank, in] and `up` [out, rank] of a layer, and the rank that divides alpha.

    `in` counts all numbers of a kernel. The rank is 0 where alpha has no effect. Raises ConfigurationError.
    """
    numbers = {role: tensor.float() for role, tensor in parts.items()}
    have = numbers.keys() - {"alpha"} - MAGNITUDES
    if have in ({"down", "up"}, {"down", "up", "mid"}):
        down, up = numbers["down"], numbers["up"].flatten(1)
        rank = len(down)
        if "mid" in have:
            down = torch.einsum("mnkl,ni->mikl", numbers["mid"], down.flatten(1))
        if up.shape[1] != len(down):
            raise ConfigurationError(f"its layer {layer[:200]} has ranks of {rank} and {up.shape[1]}; expected the same")
        return down.flatten(1), up, rank
    if {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"} <= have:
        return _hadamard(numbers)
    if any(role.startswith("lokr_w1") for role in have) and any(role.startswith("lokr_w2") for role in have):
        return _kronecker(numbers)
    raise ConfigurationError(f"its layer {layer[:200]} has only {', '.join(sorted(have)) or 'an alpha'}; expected a pair")


def _hadamard(parts: Parts) -> tuple[Tensor, Tensor, int]:
    """LoHa: the product, number by number, of two matrices of low rank. Its rank is at most the product of theirs."""
    up_1, down_1 = _factors(parts["hada_w1_a"], parts["hada_w1_b"], parts.get("hada_t1"))
    up_2, down_2 = _factors(parts["hada_w2_a"], parts["hada_w2_b"], parts.get("hada_t2"))
    rank = len(down_1)
    if rank * len(down_2) >= min(len(up_1), down_1.shape[1]):
        return *_whole((up_1 @ down_1) * (up_2 @ down_2)), rank
    up = torch.einsum("oi,oj->oij", up_1, up_2).flatten(1)
    return torch.einsum("ik,jk->ijk", down_1, down_2).flatten(0, 1), up, rank


def _kronecker(parts: Parts) -> tuple[Tensor, Tensor, int]:
    """LoKr: a small matrix, each of whose numbers is multiplied by the whole of another, which may be of low rank."""
    small = parts["lokr_w1"] if "lokr_w1" in parts else parts["lokr_w1_a"] @ parts["lokr_w1_b"]
    rank = next((len(parts[role]) for role in ("lokr_w1_b", "lokr_w2_b") if role in parts), 0)
    if "lokr_w2" in parts:
        down, up = _whole(parts["lokr_w2"].flatten(1))
    else:
        up, down = _factors(parts["lokr_w2_a"], parts["lokr_w2_b"], parts.get("lokr_t2"))
    blocks = small.shape[1]
    down, up = torch.kron(torch.eye(blocks), down), torch.kron(small, up)
    return (*(_whole(up @ down) if len(down) > min(len(up), down.shape[1]) else (down, up)), rank)


def _factors(one: Tensor, other: Tensor, core: Tensor | None) -> tuple[Tensor, Tensor]:
    """Two factors [out, rank] and [rank, in] of LyCORIS' matrices; a `core` [rank, rank, h, w] makes kernels of them."""
    if core is None:
        return one, other.flatten(1)
    return one.T, torch.einsum("ijkl,jr->irkl", core, other).flatten(1)


def _whole(change: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix of any rank as a product of two, one of which changes nothing."""
    out, into = change.shape
    return (torch.eye(into), change) if into <= out else (change, torch.eye(out))


def _magnitude(layer: str, lengths: Tensor, role: str, shape: Sequence[int]) -> Tensor:
    """DoRA's length of each output's weights, in the shape that peft gives it."""
    if lengths.numel() != shape[0] or (role == "dora_scale" and lengths.shape[0] != shape[0]):
        raise ConfigurationError(
            f"its dora_scale of {layer[:200]} has {' x '.join(map(str, lengths.shape))} numbers; "
            f"expected one for each of {shape[0]} outputs"
        )
    return lengths.reshape((-1,) if len(shape) == 2 else (1, -1, 1, 1))


def _stored(numbers: Tensor, kind: torch.dtype) -> Tensor:
    """Numbers in this type if it can hold them exactly."""
    same = numbers.to(kind) if kind in KEPT else numbers
    return (same if torch.equal(same.float(), numbers) else numbers).contiguous()


def _scales(source: Path, tensors: Mapping[str, Tensor]) -> Scales:
    """The scales in a file's metadata, or in the configuration beside an adapter of peft's. Raises ConfigurationError."""
    if any(name.startswith(PEFT) for name in tensors):
        config = read_json(source.parent / PEFT_CONFIG)
        if not config:
            raise ConfigurationError(f"its scale is in {PEFT_CONFIG}, which is missing beside it")
        return Scales(config)
    config = json.loads(metadata_of(source).get(METADATA, "{}"))
    return Scales(config if isinstance(config, dict) else {})
