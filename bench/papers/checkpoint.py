"""A local Llama-style checkpoint as a language model of decoder.py, through transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer

from bench.papers.decoder import Attend, attend_all

_ATTENTION = "bench_papers"
_UNUSUAL = ("sliding_window", "softcap", "s_aux")  # arguments of other kinds of attention


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
    return others["attend"](module.layer_idx, q, k, v).transpose(1, 2), None


AttentionInterface.register(_ATTENTION, _attention)


class Checkpoint:
    """Calls as :class:`bench.papers.decoder.LanguageModel`, and its tokenizer."""

    def __init__(self, path: Path, device: str) -> None:
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
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
