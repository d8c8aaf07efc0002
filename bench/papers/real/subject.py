"""What the experiments on pretrained models have in common: the model, the texts, their sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.papers import words
from bench.papers.checkpoint import Checkpoint
from bench.papers.part import Options
from bench.papers.real import source
from bench.table import say

SHORTEST = 128  # tokens that an experiment makes sense with


@dataclass(frozen=True)
class Excerpts:
    """Tokens (rows, T + 1) of texts, of which the first may be the one that begins a text."""

    rows: Tensor
    names: Sequence[str]  # the text of each row


@dataclass(frozen=True)
class Subject:
    """A checkpoint and the texts to read."""

    model: Checkpoint
    texts: Mapping[str, str]
    facts: Mapping[str, Any]  # for the results file

    def fitting(self, length: int) -> int:
        """So many tokens, or as many as the model and the shortest text have room for."""
        whole = {name: len(self.model.encode(text)) for name, text in self.texts.items()}
        shortest = min(whole, key=whole.__getitem__)
        limits = {
            f"the context of the model, {self.model.context:,} tokens": self.model.context,
            f"{shortest}, {whole[shortest]:,} tokens": whole[shortest] - 1,
        }
        limit = min(limits, key=limits.__getitem__)
        if limits[limit] >= length:
            return length
        if limits[limit] < SHORTEST:
            raise SystemExit(
                f"python -m bench papers: expected a context and texts of {SHORTEST} tokens or "
                f"more, got {limit}"
            )
        say(f"{limits[limit]:,} tokens in place of {length:,}: {limit}")
        return limits[limit]

    def excerpts(self, length: int, number: int) -> Excerpts:
        """As many of each text, spread over it."""
        start = self.model.start_token
        fresh = length + 1 if start is None else length
        rows, names = [], []
        for i, (name, text) in enumerate(self.texts.items()):
            tokens = self.model.encode(text)
            share = number // len(self.texts) + (i < number % len(self.texts))
            for j in range(share):
                first = (len(tokens) - fresh) * (2 * j + 1) // (2 * share)  # not the title page
                row = tokens[first : first + fresh]
                rows.append(row if start is None else torch.cat([torch.tensor([start]), row]))
                names.append(name)
        return Excerpts(torch.stack(rows).to(self.model.model.device), names)


def texts_of(options: Options) -> dict[str, str]:
    """By their names; Python's documentation topics where none were given."""
    texts = {path.name: path.read_text("utf-8") for path in options.text}
    if not texts:
        title, (text,) = words.read(())
        texts = {title: text}
    return texts


def subject(name: str, options: Options, dtype: torch.dtype) -> Subject:
    """A checkpoint of source.py, or the one of the command line in its place."""
    folder = options.model or source.fetch(name, options.cache or source.usual_cache())
    model = Checkpoint(folder, options.device, dtype)
    texts = texts_of(options)
    facts = {
        "checkpoint": source.facts(folder),
        "parameters": model.parameters,
        "dtype": str(dtype).removeprefix("torch."),
        "texts_sha256": {name: source.checksum_of(text) for name, text in texts.items()},
    }
    return Subject(model, texts, facts)
