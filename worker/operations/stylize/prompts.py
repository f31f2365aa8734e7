"""The embeddings of prompts, computed once per job and cached."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch

from imagemill.shared.options.stylize import DiffusionStylize

REMEMBERED = 16  # prompts; a process works on a few jobs at once
CUT = "prompt_cut"
"""The note on an image whose prompt or negative prompt was truncated because the model can't read all of it."""


@dataclass(frozen=True)
class Embeddings:
    """Embeddings [1, tokens, width] of the prompt and, with guidance, of the negative prompt; `cut` if one was truncated."""

    prompt: torch.Tensor
    negative: torch.Tensor | None
    cut: bool


class Prompts:
    """Computes embeddings with the text encoder of `pipe` and keeps the most recently used ones. For one thread."""

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe
        self._known: OrderedDict[tuple[Any, ...], Embeddings] = OrderedDict()

    def of(self, options: DiffusionStylize) -> Embeddings:
        """The embeddings of a job's prompts; activate its LoRAs first, as they may change the text encoder."""
        guided = options.cfg > 1
        key = (options.prompt, options.negative_prompt if guided else None, options.loras)
        if key not in self._known:
            prompt, negative = self._pipe.encode_prompt(options.prompt, self._pipe.device, 1, guided, options.negative_prompt)
            cut = self._too_long(options.prompt) or (guided and self._too_long(options.negative_prompt))
            self._known[key] = Embeddings(prompt, negative if guided else None, cut)
        self._known.move_to_end(key)
        while len(self._known) > REMEMBERED:
            self._known.popitem(last=False)
        return self._known[key]

    def forget(self) -> None:
        """Drop all cached embeddings, because the file of an adapter has changed."""
        self._known.clear()

    def _too_long(self, text: str) -> bool:
        tokenizer = self._pipe.tokenizer
        return bool(len(tokenizer(text, truncation=False).input_ids) > tokenizer.model_max_length)
