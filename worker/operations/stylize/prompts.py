"""What a prompt means to the model: computed once per job and kept while it is in use."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch

from imagemill.shared.options.stylize import DiffusionStylize

REMEMBERED = 16  # prompts; a few jobs run at a time in one process
CUT = "prompt_cut"
"""The note of an image whose prompt, or negative prompt, is longer than the model reads."""


@dataclass(frozen=True)
class Meaning:
    """Embeddings [1, tokens, width] of the prompt and, where it counts, of the negative one; `cut` if one was too long."""

    prompt: torch.Tensor
    negative: torch.Tensor | None
    cut: bool


class Prompts:
    """Embeddings by `pipe`'s text encoder, the latest few remembered. For one thread."""

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe
        self._known: OrderedDict[tuple[Any, ...], Meaning] = OrderedDict()

    def of(self, options: DiffusionStylize) -> Meaning:
        """The meaning of a job's prompts; its LoRAs must be set, as they may change the text encoder too."""
        guided = options.cfg > 1
        key = (options.prompt, options.negative_prompt if guided else None, options.loras)
        if key not in self._known:
            prompt, negative = self._pipe.encode_prompt(options.prompt, self._pipe.device, 1, guided, options.negative_prompt)
            cut = self._too_long(options.prompt) or (guided and self._too_long(options.negative_prompt))
            self._known[key] = Meaning(prompt, negative if guided else None, cut)
        self._known.move_to_end(key)
        while len(self._known) > REMEMBERED:
            self._known.popitem(last=False)
        return self._known[key]

    def forget(self) -> None:
        """Compute all anew: an adapter's file has changed."""
        self._known.clear()

    def _too_long(self, text: str) -> bool:
        tokenizer = self._pipe.tokenizer
        return bool(len(tokenizer(text, truncation=False).input_ids) > tokenizer.model_max_length)
