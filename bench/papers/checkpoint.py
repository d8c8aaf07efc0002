"""A local Llama-style checkpoint as a language model of decoder.py, through transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer

from bench.papers.decoder import Attend, attend_all

_VERSION = tuple(map(int, transformers.__version__.split(".")[:2]))
CACHE = "cache" if _VERSION >= (5, 24) else "past_key_values"  # the argument's name
_ATTENTION = "bench_papers"
_UNUSUAL = ("softcap", "s_aux")  # arguments of other kinds of attention
_PIECE = 512  # tokens whose logits are there at once


def _attention(
    module: Any, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None, **others: Any
) -> tuple[Tensor, None]:
    scale = q.shape[-1] ** -0.5
    unusual = [name for name in _UNUSUAL if others.get(name) is not None]
    if attention_mask is not None or unusual or others.get("scaling", scale) != scale:
        raise ValueError(
            "bench.papers: expected a model whose tokens attend to all before them, with logits "
            f"scaled by 1 / sqrt(head_dim), got {type(module).__name__} ({', '.join(unusual)})"
        )
    window = others.get("sliding_window")
    if window is not None:  # of the model's own: nothing to bound
        return attend_window(q, k, v, window).transpose(1, 2), None
    return others["attend"](module.layer_idx, q, k, v).transpose(1, 2), None


def attend_window(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Attention to the last tokens, of which the token itself is one; all tokens are there."""
    if q.shape[2] != k.shape[2]:
        raise ValueError("bench.papers: expected all tokens at once in layers with a window")
    step = torch.arange(q.shape[2], device=q.device)
    seen = (step[:, None] >= step) & (step[:, None] < step + window)
    return scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)


AttentionInterface.register(_ATTENTION, _attention)


class Checkpoint:
    """Calls as :class:`bench.papers.decoder.LanguageModel`, and its tokenizer."""

    def __init__(self, path: Path, device: str, dtype: torch.dtype | None = None) -> None:
        dtype = dtype or (torch.bfloat16 if device == "cuda" else torch.float32)
        self.model = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, attn_implementation=_ATTENTION, local_files_only=True
        )
        self.model.to(device).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        self.context: int = self.model.config.max_position_embeddings
        self.vocabulary: int = self.model.config.vocab_size
        self.parameters = sum(weight.numel() for weight in self.model.parameters())

    def encode(self, text: str) -> Tensor:
        """Tokens of a text, without any that begin or end it."""
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return torch.tensor(ids)

    @property
    def start_token(self) -> int | None:
        token: int | None = self.tokenizer.bos_token_id
        return token

    def spell(self, token: int) -> str:
        """A token as text; a special one as nothing."""
        if token in self.tokenizer.all_special_ids:
            return ""
        text: str = self.tokenizer.decode([token])
        return text

    def __call__(self, tokens: Tensor, attend: Attend = attend_all, start: int = 0) -> Tensor:
        positions = torch.arange(start, start + tokens.shape[1], device=tokens.device)[None]
        logits: Tensor = self.model(
            tokens, position_ids=positions, use_cache=False, attend=attend
        ).logits
        return logits

    def hidden(self, tokens: Tensor, attend: Attend, start: int = 0) -> Tensor:
        """What the head makes logits of, (B, T, width)."""
        positions = torch.arange(start, start + tokens.shape[1], device=tokens.device)[None]
        found: Tensor = self.model.model(
            tokens, position_ids=positions, use_cache=False, attend=attend
        )[0]
        return found

    def losses(self, tokens: Tensor, attend: Attend = attend_all) -> Tensor:
        """Of tokens (B, T + 1): the loss in nats of each after the first, (B, T)."""
        hidden, targets = self.hidden(tokens[:, :-1], attend), tokens[:, 1:]
        found = []
        for part, target in zip(hidden.split(_PIECE, 1), targets.split(_PIECE, 1), strict=True):
            logits = self.model.lm_head(part).float().flatten(0, 1)  # classes last: no copy
            found.append(cross_entropy(logits, target.flatten(), reduction="none").view_as(target))
        return torch.cat(found, 1)
