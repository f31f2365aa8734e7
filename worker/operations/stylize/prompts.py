"""The embeddings of prompts, in pieces of 75 tokens, computed once per job and cached.

Weights, pieces and padding are those of AUTOMATIC1111's web UI with its default settings, but for one: it runs prompts of
different lengths in separate steps, and here, as with its setting to pad them, the shorter one is filled up with empty pieces.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from imagemill.shared.options.stylize import DiffusionStylize
from imagemill.shared.prompts import parse

LENGTH = 75
"""Tokens that the text encoder reads at a time, between the marks for beginning and end."""

BACKTRACK = 20
"""A piece ends after its last comma if fewer tokens than this follow the comma; they move to the next piece."""

REMEMBERED = 64
"""Most pieces that are remembered, at up to 630 kB (SDXL in fp32); a process works on a few jobs at once."""

NO_MEAN = 1e-5
"""A mean below this share of the standard deviation counts as 0."""

Piece = list[tuple[int, float]]
"""Up to 75 tokens with their weights."""


@dataclass(frozen=True)
class Embedding:
    """One prompt: [1, 77 * pieces, width], and for SDXL the pooled embedding of its first piece [1, width]."""

    tokens: torch.Tensor
    pooled: torch.Tensor | None

    def zeros(self) -> Embedding:
        """One of the same shape that says nothing."""
        return Embedding(torch.zeros_like(self.tokens), None if self.pooled is None else torch.zeros_like(self.pooled))


@dataclass(frozen=True)
class Embeddings:
    """The prompt and, with guidance, the negative prompt, in the same number of pieces."""

    prompt: Embedding
    negative: Embedding | None

    @property
    def pieces(self) -> int:
        """Number of pieces that were embedded."""
        return self.prompt.tokens.shape[1] // (LENGTH + 2) * (2 if self.negative else 1)

    def arguments(self, count: int) -> dict[str, torch.Tensor]:
        """The arguments of a pipeline's call for `count` images."""
        given: dict[str, torch.Tensor] = {}
        for prefix, embedding in (("", self.prompt), ("negative_", self.negative)):
            if embedding is not None:
                given[f"{prefix}prompt_embeds"] = embedding.tokens.repeat(count, 1, 1)
                if embedding.pooled is not None:
                    given[f"{prefix}pooled_prompt_embeds"] = embedding.pooled.repeat(count, 1)
        return given


class Prompts:
    """Computes embeddings with the text encoder of `pipe`, or both of SDXL's, and keeps recently used ones. For one thread."""

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe
        self._suffixes = ("", "_2") if getattr(pipe, "text_encoder_2", None) is not None else ("",)
        self._known: OrderedDict[tuple[Any, ...], Embeddings] = OrderedDict()

    def of(self, options: DiffusionStylize) -> Embeddings:
        """The embeddings of a job's prompts; activate its LoRAs first, as they may change the text encoder."""
        negative = options.negative_prompt if options.cfg > 1 else None
        key = (options.prompt, negative, options.loras)
        if key not in self._known:
            self._known[key] = self._embedded(options.prompt, negative)
        self._known.move_to_end(key)
        while len(self._known) > 1 and sum(known.pieces for known in self._known.values()) > REMEMBERED:
            self._known.popitem(last=False)
        return self._known[key]

    def forget(self) -> None:
        """Drop all cached embeddings, because the file of an adapter has changed."""
        self._known.clear()

    def _embedded(self, prompt: str, negative: str | None) -> Embeddings:
        texts = [prompt] if negative is None else [prompt, negative]
        cut = [[pieces(text, getattr(self._pipe, f"tokenizer{suffix}")) for suffix in self._suffixes] for text in texts]
        most = max(len(found) for each in cut for found in each)
        made = [self._joined([found + [[]] * (most - len(found)) for found in each]) for each in cut]
        if negative == "" and getattr(self._pipe.config, "force_zeros_for_empty_prompt", False):  # SDXL was trained so
            made[1] = made[0].zeros()
        return Embeddings(made[0], made[1] if negative is not None else None)

    def _joined(self, cut: list[list[Piece]]) -> Embedding:
        """A prompt's pieces, once per text encoder, joined to one embedding."""
        embedded = [[self._piece(suffix, piece) for piece in found] for suffix, found in zip(self._suffixes, cut, strict=True)]
        tokens = torch.cat([torch.cat([hidden for hidden, _ in found], dim=1) for found in embedded], dim=-1)
        return Embedding(tokens, embedded[-1][0][1])

    def _piece(self, suffix: str, piece: Piece) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The embedding of a piece [1, 77, width], and the pooled one if the text encoder makes one."""
        tokenizer, encoder = (getattr(self._pipe, f"{part}{suffix}") for part in ("tokenizer", "text_encoder"))
        ids = [tokenizer.bos_token_id, *(token for token, _ in piece), tokenizer.eos_token_id]
        ids += [tokenizer.pad_token_id] * (LENGTH + 2 - len(ids))
        given = torch.tensor([ids], device=self._pipe.device)
        if len(self._suffixes) == 1:
            return weighted(encoder(given)[0], piece), None
        output = encoder(given, output_hidden_states=True)
        pooled = output[0] if output[0].ndim == 2 else None
        return weighted(output.hidden_states[-2], piece), pooled


def pieces(prompt: str, tokenizer: Any) -> list[Piece]:
    """A prompt's tokens in pieces, of which there is at least one."""
    found: list[Piece] = []
    comma = tokenizer.convert_tokens_to_ids(",</w>")
    for section in parse(prompt):
        tokens = [
            (token, span.weight)
            for span in section
            for token in tokenizer(span.text, add_special_tokens=False, truncation=False).input_ids
        ]
        while len(tokens) > LENGTH:
            end = LENGTH
            if tokens[end][0] != comma:
                after = [place + 1 for place in range(LENGTH - BACKTRACK, LENGTH) if tokens[place][0] == comma]
                end = after[-1] if after else LENGTH
            found.append(tokens[:end])
            tokens = tokens[end:]
        found.append(tokens)
    return found if found[-1] or len(found) == 1 else found[:-1]


def weighted(hidden: torch.Tensor, piece: Piece) -> torch.Tensor:
    """An embedding [1, 77, width], multiplied by the weights of its tokens and scaled to its former mean.

    Restoring the mean has no foundation but that results are better, and that prompts are written for it. A mean near 0, as
    of a text encoder whose last layer has no bias, is only rounding and says nothing about the scale: it is left as it is.
    """
    weights = [weight for _, weight in piece]
    if all(weight == 1 for weight in weights):
        return hidden
    factors = torch.ones(hidden.shape[1], dtype=torch.float32, device=hidden.device)
    factors[1 : len(weights) + 1] = torch.tensor(weights, device=hidden.device)
    before = hidden.float()
    changed = before * factors[:, None]
    if before.mean().abs() > NO_MEAN * before.std() and changed.mean().abs() > NO_MEAN * changed.std():
        changed = changed * (before.mean() / changed.mean())
    return changed.to(hidden.dtype)


@lru_cache(maxsize=16)
def about_pieces(options: DiffusionStylize) -> int:
    """About how many pieces a job's prompts have, at four letters per token. Attention to more of them takes more memory."""
    prompts = [options.prompt] + [options.negative_prompt] * (options.cfg > 1)
    letters = [[sum(len(span.text.encode()) for span in section) for section in parse(prompt)] for prompt in prompts]
    return max(sum(max(1, -(-count // (4 * LENGTH))) for count in sections) for sections in letters)
