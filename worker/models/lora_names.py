"""How LoRAs name the layers that they change: like diffusers, peft, kohya's scripts, LyCORIS or ComfyUI."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from imagemill.shared.errors import ConfigurationError
from imagemill.worker.models.checksums import read_json
from imagemill.worker.models.sources import header_of

ROLES = {
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora_mid.weight": "mid",
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_A.default.weight": "down",
    ".lora_B.default.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    ".alpha": "alpha",
    ".dora_scale": "dora_scale",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    **{f".{name}": name for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")},
    **{f".{name}": name for name in ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")},
}
"""What a tensor does in its layer, by the end of its name."""

OTHERS = {
    "an (IA)3": (".on_input",),
    "an OFT": (".oft_blocks", ".oft_diag", ".oft_R.weight"),
    "a GLoRA": (".a1.weight", ".b2.weight"),
    "a difference between whole checkpoints": (".diff", ".diff_b"),
    "a LoRA that also changes norms": (".w_norm", ".b_norm"),
    "a LoRA that also changes biases": (".lora_B.bias", ".lora_up.bias"),
}
"""Relatives of LoRAs that nodes can't use, by the ends of names in them."""

PREFIXES = {
    "lora_unet_": "unet",
    "lycoris_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "unet.": "unet",
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
    "base_model.model.": "unet",
    "diffusion_model.": "unet",
}
"""The part of a checkpoint by the beginning of a layer's name; without any of them, it is the UNet."""

TOP = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
RESNET = {"conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
"""Stability's names of a UNet's layers by diffusers'; those of its blocks follow from their numbers."""

ENDS = tuple(sorted(ROLES, key=len, reverse=True))
TELLING = tuple(end for end in ENDS if end != ".alpha")
EXPECTED = "expected a LoRA, LoCon, DoRA, LoHa or LoKr"


class Place(NamedTuple):
    """A layer of a checkpoint: its part, such as `unet`, and its name in diffusers, without `text_model.`."""

    part: str
    name: str


@dataclass(frozen=True)
class Layers:
    """The layers of a checkpoint that a LoRA can change, with the shape of each one's weight.

    `found` is a layer by each of its names, with underscores for dots.
    """

    family: str
    shapes: Mapping[Place, tuple[int, ...]]
    found: Mapping[tuple[str, str], Place]

    def find(self, layer: str) -> Place | None:
        """The layer that a LoRA calls so; None if the checkpoint has none of that name."""
        part, rest = part_of(layer)
        return self.found.get((part, _flat(rest.replace(".processor", ""))))


def is_lora(names: Iterable[str]) -> bool:
    """Whether a file with tensors of these names is a LoRA. Raises ConfigurationError for a relative that nodes can't use."""
    names = list(names)
    for other, ends in OTHERS.items():
        if any(name.endswith(ends) for name in names):
            raise ConfigurationError(f"it is {other}, which nodes can't use; {EXPECTED}")
    return any(name.endswith(TELLING) for name in names)


def split(name: str) -> tuple[str, str]:
    """The layer that a tensor belongs to, and its role there. Raises ConfigurationError."""
    end = next((end for end in ENDS if name.endswith(end)), None)
    if end is None:
        raise ConfigurationError(f"its tensor {name[:200]} is no part of a LoRA; {EXPECTED}")
    return name.removesuffix(end), ROLES[end]


def part_of(layer: str) -> tuple[str, str]:
    """The part of a checkpoint that a layer belongs to, such as `unet`, and its name there."""
    for prefix, part in PREFIXES.items():
        if layer.startswith(prefix):
            return part, layer.removeprefix(prefix).removeprefix("base_model.model.")
    return "unet", layer


def layers_of(checkpoint: Path, family: str) -> Layers:
    """The layers of the checkpoint in a folder of diffusers' layout; reads no weights. Raises ConfigurationError."""
    shapes = {}
    for part in ("unet", "text_encoder", "text_encoder_2"):
        for file in sorted((checkpoint / part).glob("*.safetensors")):
            for name, (_, shape) in header_of(file).items():
                if name.endswith(".weight") and len(shape) in (2, 4) and "embeddings." not in name:
                    shapes[Place(part, name.removesuffix(".weight").removeprefix("text_model."))] = shape
    count = read_json(checkpoint / "unet" / "config.json").get("layers_per_block", 2)
    found: dict[tuple[str, str], Place] = {}
    for place in shapes:
        others = _in_unet(place.name, shapes, count) if place.part == "unet" else _in_text_encoder(place.name)
        found |= {(place.part, _flat(name)): place for name in (place.name, *others)}
    return Layers(family, shapes, found)


def diffusers_name(place: Place) -> str:
    """The name that diffusers looks for in a LoRA's file."""
    below = "" if place.part == "unet" or place.name == "text_projection" else "text_model."
    return f"{place.part}.{below}{place.name}"


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _in_text_encoder(name: str) -> Iterator[str]:
    """Other names of a text encoder's layer: old versions of diffusers called attention's layers like the UNet's."""
    yield f"text_model.{name}"
    old = re.sub(r"\b(q|k|v|out)_proj$", r"to_\1", name)
    yield from (old, f"text_model.{old}")


def _in_unet(name: str, layers: Iterable[Place], count: int) -> Iterator[str]:
    """Other names of a UNet's layer: Stability's, and that of diffusers' old attention processors.

    `layers` are all layers of the checkpoint, and `count` is the number of layers in each block.
    """
    yield from [name.removesuffix(".0")] * name.endswith(".to_out.0")
    yield from (theirs + name.removeprefix(ours) for ours, theirs in TOP.items() if name == ours)
    block = re.fullmatch(r"(down|up|mid)_block(?:s\.(\d+))?\.(\w+)\.(\d+)\.(.+)", name)
    if block is None:
        return
    way, level, kind, number, rest = block[1], int(block[2] or 0), block[3], int(block[4]), block[5]
    first = level * (count + 1)
    if way == "mid":
        place = TOP[f"mid_block.{kind}.{number}"]
    elif kind in ("downsamplers", "upsamplers"):
        attending = any(layer.name.startswith(f"up_blocks.{level}.attentions.") for layer in layers)
        place = f"input_blocks.{first + count + 1}.0" if way == "down" else f"output_blocks.{first + count}.{1 + attending}"
        rest = "op" if way == "down" else rest
    else:
        place = (
            f"{'input' if way == 'down' else 'output'}_blocks.{first + number + (way == 'down')}.{int(kind == 'attentions')}"
        )
    yield f"{place}.{RESNET.get(rest, rest)}"
