"""Texts as tokens: single characters, or frequent words and characters for what is rare."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import Tensor

_PIECE = re.compile(r" ?\w+| ?[^\w\s]|\s+")
_HELD_OUT = 10  # the last tenth of every text


@dataclass(frozen=True)
class Corpus:
    name: str
    vocabulary: Sequence[str]  # the first one, empty, begins every sequence
    train: Tensor
    held_out: Tensor


def read(paths: Sequence[Path]) -> tuple[str, list[str]]:
    """Names and contents; Python's documentation topics, which CPython carries, for no paths."""
    if not paths:
        return "pydoc_data.topics", ["\n\n".join(topics[key] for key in sorted(topics))]
    names = ", ".join(path.name for path in paths)
    return names, [path.read_text(encoding="utf-8") for path in paths]


def corpus(paths: Sequence[Path], size: int) -> Corpus:
    """`size` tokens: every character, and the words that are most frequent in training."""
    name, texts = read(paths)
    train = [text[: -(len(text) // _HELD_OUT)] for text in texts]
    held_out = [text[-(len(text) // _HELD_OUT) :] for text in texts]
    characters = sorted(set("".join(texts)))
    counts = Counter(piece for text in train for piece in _PIECE.findall(text) if len(piece) > 1)
    words = [word for word, _ in counts.most_common(max(size - len(characters) - 1, 0))]
    vocabulary = ["", *characters, *words]
    index = {piece: i for i, piece in enumerate(vocabulary)}

    def encode(parts: Sequence[str]) -> Tensor:
        tokens: list[int] = []
        for piece in (piece for text in parts for piece in _PIECE.findall(text)):
            known = piece in index
            tokens += [index[piece]] if known else [index[character] for character in piece]
        return torch.tensor(tokens)

    return Corpus(name, vocabulary, encode(train), encode(held_out))


@dataclass(frozen=True)
class Characters:
    """A text, each of its characters a token."""

    name: str
    characters: str
    train: Tensor
    held_out: Tensor

    def spell(self, tokens: Sequence[int]) -> str:
        return "".join(self.characters[token] for token in tokens)


def characters_of(paths: Sequence[Path]) -> Characters:
    name, texts = read(paths[:1])
    characters = "".join(sorted(set(texts[0])))
    index = {character: i for i, character in enumerate(characters)}
    tokens = torch.tensor([index[character] for character in texts[0]])
    split = len(tokens) * (_HELD_OUT - 1) // _HELD_OUT
    return Characters(name, characters, tokens[:split], tokens[split:])


def kind_of(token: str) -> str:
    """A rough part of speech, of what the text itself tells."""
    word = token.strip()
    if not token:
        return "start of the text"
    if not word:
        return "line break" if "\n" in token else "space"
    if word[0].isdigit():
        return "number"
    if word[0].isalpha():
        return "capitalised word" if word[0].isupper() else "word"
    return "punctuation"
