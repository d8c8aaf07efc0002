"""An oracle that bounds no cache: full attention in float64 under a mask that the policy closes.

This is how the paper evaluates its policies. It shares nothing with the package but the meaning of
a policy's five fields.
"""

from __future__ import annotations

import torch
from torch import Tensor

import msrnn_ops as ms

NEAR = 1e-5  # relative distance of two float32 scores that may be taken for each other


class Row:
    """One row, on the CPU. Every token stays; ``visible`` (G, T) says which are attended to."""

    def __init__(self, policy: ms.Policy, kv_heads: int) -> None:
        self.policy = policy
        self.groups = kv_heads if policy.scope == "head" else 1
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.visible = torch.zeros(self.groups, 0, dtype=torch.bool, device="cpu")
        self.total = torch.zeros(self.groups, 0, dtype=torch.float64, device="cpu")
        self.near_ties = 0

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Output (Hq, Dh) of one more token, and its attention (G, T) averaged over heads."""
        q, k, v = (x.cpu().double() for x in (q, k, v))
        self.keys.append(k)
        self.values.append(v)
        one = torch.ones(self.groups, 1, device="cpu")
        self.visible = torch.cat([self.visible, one.bool()], 1)
        self.total = torch.cat([self.total, one.double() * 0], 1)
        kv_heads, head_dim = k.shape
        shared = q.shape[0] // kv_heads
        keys = torch.stack(self.keys, 1).repeat_interleave(shared, 0)  # (Hq, T, Dh)
        values = torch.stack(self.values, 1).repeat_interleave(shared, 0)
        seen = self.visible.repeat_interleave(q.shape[0] // self.groups, 0)  # (Hq, T)
        logits = torch.einsum("hd,htd->ht", q, keys) / head_dim**0.5
        weights = logits.masked_fill(~seen, -torch.inf).softmax(-1)
        mean = weights.unflatten(0, (self.groups, -1)).mean(1)
        self.total += mean
        return torch.einsum("ht,htd->hd", weights, values), mean

    def reduce(self, mean: Tensor, kept: list[list[int]] | None) -> None:
        """Closes the mask down to N states, following `kept` where float32 could not tell."""
        now = self.visible.shape[1] - 1
        for g in range(self.groups):
            score = {"position": mean[g] * 0, "attention": mean[g], "accumulated": self.total[g]}
            value = score[self.policy.score].tolist()
            states = self.visible[g].nonzero()[:, 0].tolist()
            free = [p for p in states if p >= self.policy.sinks and p <= now - self.policy.recent]
            free.sort(key=lambda p: (value[p], p))
            excess = max(len(states) - self.policy.slots, 0)
            gone = set(free[:excess])
            theirs = gone if kept is None else set(states) - set(kept[g])
            if theirs != gone and len(theirs) == excess and theirs <= set(free):
                limit = value[free[excess - 1]] * (1 + NEAR)
                if all(value[p] <= limit for p in theirs) and self.policy.score != "position":
                    gone = theirs
                    self.near_ties += 1
            self.visible[g, list(gone)] = False
            self.total[g, list(gone)] = 0

    def step(self, q: Tensor, k: Tensor, v: Tensor, kept: list[list[int]] | None = None) -> Tensor:
        out, mean = self.attend(q, k, v)
        self.reduce(mean, kept)
        return out

    def prompt(
        self, q: Tensor, k: Tensor, v: Tensor, kept: list[list[int]] | None = None
    ) -> Tensor:
        """q (Hq, T, Dh): every token attended, then one reduction."""
        if q.shape[1] == 0:
            return q.cpu().double()
        q, k, v = (x.cpu() for x in (q, k, v))
        outs = []
        for t in range(q.shape[1]):
            out, mean = self.attend(q[:, t], k[:, t], v[:, t])
            outs.append(out)
        self.reduce(mean, kept)
        return torch.stack(outs, 1)

    def kept(self) -> list[list[int]]:
        return [self.visible[g].nonzero()[:, 0].tolist() for g in range(self.groups)]


def kept_lists(state: ms.MultiState, row: int) -> list[list[int]]:
    return [[p for p in g if p >= 0] for g in state.kept_positions()[row].tolist()]
