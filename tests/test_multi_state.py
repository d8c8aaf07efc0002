"""Values, kept positions and gradients of multi-state attention, against two oracles."""

from __future__ import annotations

import contextlib
import copy
import gc
import random
import warnings
import weakref

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from backends import INTERPRETED
from conftest import EXAMPLES
from masked_attention import Row, kept_lists
from scans import reference
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transforms import Seen

import msrnn_ops as ms
from msrnn_ops.multi_state import DecoderStep, attend_evict_unchecked

Heads = tuple[int, int, int]  # Hq, Hkv, Dh
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 1.5e-2, torch.float16: 2e-3, torch.float64: 1e-12}


def policies(slots: int) -> dict[str, ms.Policy]:
    sinks = min(3, slots)
    return {
        "window": ms.Policy.window(slots),
        "window+i": ms.Policy.window_sinks(slots, sinks),
        "h2o": ms.Policy.h2o(slots),
        "h2o_head": ms.Policy.h2o(slots, recent=1, scope="head"),
        "tova": ms.Policy.tova(slots),
        "tova_head": ms.Policy.tova(slots, scope="head"),
        "tova_sinks": ms.Policy.tova(slots, sinks=sinks),
        "tova_protect_last": ms.Policy.tova(slots, protect_last=True),
        "tova_recent": ms.Policy.tova(slots, recent=slots // 2),
        "other_head": ms.Policy(slots, "accumulated", sinks=min(1, slots), scope="head"),
        "window_head": ms.Policy(slots, "position", scope="head"),
    }


every_policy = pytest.mark.parametrize("name", policies(4))
HEADS = {"mha": (4, 4, 16), "gqa2": (4, 2, 40), "gqa4": (8, 2, 64), "gqa7": (7, 1, 8)}
every_heads = pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])


def make(policy: ms.Policy, batch: int, heads: Heads, dtype: torch.dtype) -> ms.MultiState:
    """A state whose free slots hold NaN."""
    _, kv_heads, head_dim = heads
    state = ms.MultiState(policy, batch=batch, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype)
    state.keys.fill_(torch.nan)
    state.values.fill_(torch.nan)
    return state


def draw(
    batch: int, heads: Heads, dtype: torch.dtype, time: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    query_heads, kv_heads, head_dim = heads
    between = () if time is None else (time,)
    return tuple(
        torch.randn(batch, h, *between, head_dim).to(dtype)
        for h in (query_heads, kv_heads, kv_heads)
    )


def close(x: Tensor, exact: Tensor) -> None:
    limit = TOLERANCE[x.dtype]
    torch.testing.assert_close(x.double().cpu(), exact.cpu(), rtol=limit, atol=limit)


def same_state(a: ms.MultiState, b: ms.MultiState) -> None:
    """Equal bit by bit, free slots aside."""
    assert torch.equal(a.position, b.position) and torch.equal(a.free, b.free)
    assert torch.equal(a.seen, b.seen) and torch.equal(a.last_evicted, b.last_evicted)
    assert torch.equal(a.score, b.score)
    filled = (a.position >= 0).expand(-1, a.keys.shape[1], -1)
    assert torch.equal(a.keys[filled], b.keys[filled])
    assert torch.equal(a.values[filled], b.values[filled])


@every_policy
@every_heads
@every_dtype
def test_steps(name: str, heads: Heads, dtype: torch.dtype) -> None:
    """Outputs and kept positions of two rows at every one of many steps."""
    slots, steps = (5, 14) if INTERPRETED else (17, 200)
    state = make(policies(slots)[name], 2, heads, dtype)
    rows = [Row(state.policy, heads[1]) for _ in range(2)]
    for _ in range(steps):
        q, k, v = draw(2, heads, dtype)
        out = ms.attend_evict(q, k, v, state)
        for b, row in enumerate(rows):
            kept = kept_lists(state, b)
            close(out[b], row.step(q[b], k[b], v[b], kept))
            assert kept == row.kept()
    assert sum(row.near_ties for row in rows) <= 2
    assert state.seen.tolist() == [steps, steps]


@every_policy
@every_dtype
@torch.no_grad()
def test_steps_without_checks(name: str, dtype: torch.dtype) -> None:
    """What engines and decoders call gives the same bits, and the words of the door."""
    heads, policy, scale = (4, 2, 16), policies(5)[name], 0.25
    ours, theirs = make(policy, 2, heads, dtype), make(policy, 2, heads, dtype)
    step = DecoderStep(ours, scale)
    for _ in range(12):
        q, k, v = draw(2, heads, dtype)
        expected = ms.attend_evict(q, k, v, theirs, scale=scale)
        assert torch.equal(attend_evict_unchecked(q, k, v, ours, None, scale), expected)
        q, k, v = draw(2, heads, dtype, 1)  # (B, H, 1, Dh)
        expected = ms.attend_evict(q[:, :, 0], k[:, :, 0], v[:, :, 0], theirs, scale=scale)
        out = step(q, k, v)
        assert torch.equal(out, expected.unsqueeze(1)) and out.is_contiguous()
        same_state(ours, theirs)
    wrong = {
        "expected v in the shape of k": (q, k, v[:1]),
        "key-value heads of 2 as in the state": (q, k[:, :1], v[:, :1]),
        "a head_dim of 16 as in the state": (q[..., :8], k[..., :8], v[..., :8]),
        "the dtype of q": (q, k, v.double()),
        "a batch of 2 as in the state": (q[:1], k[:1], v[:1]),
        r"expected q of shape \(B, H, Dh\)": (
            q.expand(-1, -1, 2, -1),
            *(x.expand(-1, -1, 2, -1) for x in (k, v)),
        ),
    }
    for words, arguments in wrong.items():
        with pytest.raises((TypeError, ValueError), match=f"attend_evict: .*{words}"):
            step(*arguments)
        same_state(ours, theirs)


@torch.no_grad()
def test_steps_of_views_that_pytorch_negates() -> None:
    heads = (4, 2, 16)
    ours, theirs = (make(ms.Policy.tova(4), 1, heads, torch.float32) for _ in range(2))
    step = DecoderStep(ours, 0.25)
    for _ in range(3):
        q, k, v = draw(1, heads, torch.float32, 1)
        expected = DecoderStep(theirs, 0.25)(q, k, v)
        negated = [torch._neg_view(-x) for x in (q, k, v)]
        assert torch.equal(step(*negated), expected)
        expected = ms.attend_evict(q[:, :, 0], k[:, :, 0], v[:, :, 0], theirs)
        assert torch.equal(ms.attend_evict(*(x[:, :, 0] for x in negated), ours), expected)
        same_state(ours, theirs)


@torch.no_grad()
def test_steps_of_tensors_that_are_elsewhere() -> None:
    heads = (4, 2, 16)
    state = make(ms.Policy.tova(4), 1, heads, torch.float32)
    step = DecoderStep(state, 0.25)
    q, k, v = draw(1, heads, torch.float32, 1)
    before = copy.deepcopy(state)
    for wrong in ((q, k.to("meta"), v), (q, k, v.to("meta")), (q, k, v[:, :, 0].to_mkldnn())):
        with pytest.raises((ValueError, TypeError, RuntimeError)):
            step(*wrong)
        same_state(state, before)


def test_who_looks_at_a_step_sees_it() -> None:
    """A decoder's step goes past PyTorch's dispatcher only where nobody asks for it there."""
    heads = (4, 2, 16)
    state = make(ms.Policy.tova(4), 1, heads, torch.float32)
    q, k, v = draw(1, heads, torch.float32, 1)
    step = DecoderStep(state, 0.25)
    with torch.no_grad():
        with Seen() as mode:
            step(q, k, v)
        assert sum(name.endswith("attend_evict.default") for name in mode.names) == 1
        with torch.profiler.profile() as found:
            step(q, k, v)
        assert any(event.key.endswith("::attend_evict") for event in found.key_averages())
        assert state.seen.tolist() == [2]
        with torch.inference_mode():
            assert not step(q, k, v).requires_grad
    with ms.use_backend("reference"):
        step(q, k, v)
    versions = [x._version for x in state.tensors()]
    with torch.no_grad():
        step(q, k, v)
    assert all(x._version > y for x, y in zip(state.tensors(), versions, strict=True))
    with pytest.raises(RuntimeError, match="attend_evict changes the state in place"):
        step(q.clone().requires_grad_(), k, v)
    twin = copy.deepcopy(step)
    with torch.no_grad():
        assert torch.equal(twin(q, k, v), step(q, k, v))
        twin(q, k, v)
    assert state.seen.tolist() == [6] and twin.state.seen.tolist() == [7]


def test_a_refused_step_leaves_nothing_behind() -> None:
    """Neither a change that a backward pass would see, nor tensors kept alive."""
    state, (q, k, v) = (
        make(ms.Policy.tova(4), 1, (4, 2, 16), torch.float32),
        draw(1, (4, 2, 16), torch.float32),
    )
    ms.attend_evict(q, k, v, state)
    versions = [x._version for x in state.tensors()]
    alive = weakref.ref(state)
    gc.disable()
    try:
        with pytest.raises(ValueError, match="v in the shape of k"):
            ms.attend_evict(q, k, v[:, :1], state)
        assert [x._version for x in state.tensors()] == versions
        del state
        assert alive() is None
    finally:
        gc.enable()


@pytest.mark.reference
@every_policy
@every_heads
def test_reference_steps(name: str, heads: Heads) -> None:
    """The reference in float64 is the oracle, decision by decision."""
    state = make(policies(9)[name], 2, heads, torch.float64)
    rows = [Row(state.policy, heads[1]) for _ in range(2)]
    for _ in range(40):
        q, k, v = draw(2, heads, torch.float64)
        with reference():
            out = ms.attend_evict(q, k, v, state)
        for b, row in enumerate(rows):
            exact = row.step(q[b], k[b], v[b])
            torch.testing.assert_close(out[b].cpu(), exact, rtol=1e-6, atol=1e-7)
            assert kept_lists(state, b) == row.kept()


@every_policy
@pytest.mark.parametrize("slots", [1, 6, 40], ids=lambda n: f"slots{n}")
@pytest.mark.parametrize("backend", ["float32", "bfloat16", "float16", "reference"])
def test_prompts(name: str, slots: int, backend: str) -> None:
    """A padded prompt, steps, a second prompt with holes, a token as a prompt, steps again."""
    heads, dtype = (4, 2, 24), getattr(torch, backend, torch.float32)
    state = make(policies(slots)[name], 3, heads, dtype)
    rows = [Row(state.policy, heads[1]) for _ in range(3)]

    def prompt(valid: Tensor | None, time: int) -> None:
        q, k, v = draw(3, heads, dtype, time)
        out = ms.attend_prompt(q, k, v, state, valid=valid)
        for b, row in enumerate(rows):
            real = torch.ones(time, dtype=torch.bool) if valid is None else valid[b]
            kept = kept_lists(state, b)
            close(out[b][:, real], row.prompt(q[b][:, real], k[b][:, real], v[b][:, real], kept))
            assert kept == row.kept()
            assert not out[b][:, ~real].any()

    def steps(count: int) -> None:
        for _ in range(count):
            q, k, v = draw(3, heads, dtype)
            out = ms.attend_evict(q, k, v, state)
            for b, row in enumerate(rows):
                kept = kept_lists(state, b)
                close(out[b], row.step(q[b], k[b], v[b], kept))
                assert kept == row.kept()

    def run() -> None:
        left = torch.arange(25) >= torch.tensor([[0], [7], [25]])  # whole, padded, all padding
        prompt(left, 25)
        assert state.seen.tolist() == [25, 18, 0] and kept_lists(state, 2)[0] == []
        steps(12)
        prompt(torch.rand(3, 11) > 0.4, 11)
        prompt(None, 1)
        prompt(None, 0)
        steps(5)

    if backend == "reference":
        with reference():
            run()
    else:
        run()


@every_policy
@pytest.mark.parametrize("slots", [3, 7], ids=lambda n: f"slots{n}")
@pytest.mark.parametrize("backend", ["kernel", "reference"])
def test_states_with_holes(name: str, slots: int, backend: str) -> None:
    """Any slots may be emptied between calls, as msrnn_ops.transformers does for a mask."""
    state = make(policies(slots)[name], 2, HEADS["gqa2"], torch.float32)
    rows = [Row(state.policy, 2) for _ in range(2)]
    for time in (5, 1, 9, 1, 1, 1, 2, 1, 1):
        q, k, v = draw(2, HEADS["gqa2"], torch.float32, time)
        with reference() if backend == "reference" else contextlib.nullcontext():
            if time > 1:
                out = ms.attend_prompt(q, k, v, state)
            else:
                out = ms.attend_evict(q[:, :, 0], k[:, :, 0], v[:, :, 0], state)[:, :, None]
        for b, row in enumerate(rows):
            kept = kept_lists(state, b)
            close(out[b], row.prompt(q[b], k[b], v[b], kept))
            assert kept == row.kept()
            for p in random.sample(range(row.visible.shape[1]), row.visible.shape[1] // 3):
                gone = state.position[b] == p
                state.position[b].masked_fill_(gone, -1)
                if state.score.numel():
                    state.score[b].masked_fill_(gone, 0)
                row.visible[:, p] = False
                row.total[:, p] = 0


@every_policy
def test_a_token_as_a_prompt_is_a_step(name: str) -> None:
    heads = (8, 2, 32)
    steps = 10 if INTERPRETED else 30
    one, other = (make(policies(7)[name], 2, heads, torch.float32) for _ in range(2))
    for _ in range(steps):
        q, k, v = draw(2, heads, torch.float32)
        a = ms.attend_evict(q, k, v, one)
        b = ms.attend_prompt(q[:, :, None], k[:, :, None], v[:, :, None], other)[:, :, 0]
        close(b, a.double())
        assert torch.equal(one.kept_positions(), other.kept_positions())
        assert torch.equal(one.last_evicted, other.last_evicted)


@pytest.mark.long
@every_dtype
def test_a_long_prompt_accumulates_in_parts(dtype: torch.dtype) -> None:
    """H2O over more queries than one part or one pass of the kernel holds."""
    for heads in ((2, 2, 16), (16, 1, 8), (40, 2, 8)):
        state = make(ms.Policy.h2o(50, recent=10), 1, heads, dtype)
        row = Row(state.policy, heads[1])
        for time in (150, 90):
            q, k, v = draw(1, heads, dtype, time)
            out = ms.attend_prompt(q, k, v, state)
            kept = kept_lists(state, 0)
            close(out[0], row.prompt(q[0], k[0], v[0], kept))
            assert kept == row.kept() and row.near_ties <= 1
        by_position = state.position[0, 0].argsort()[1:]
        total = row.total[0, row.kept()[0]] * heads[0]  # the state sums over query heads
        score = state.score[0, 0, by_position].double().cpu()
        torch.testing.assert_close(score, total, rtol=1e-5, atol=0)


@every_policy
@every_dtype
def test_sequence_equals_steps(name: str, dtype: torch.dtype) -> None:
    """Bit by bit, and the expiry is when a step evicted a key."""
    heads, time = (6, 2, 24), 15 if INTERPRETED else 70
    policy = policies(9)[name]
    q, k, v = draw(2, heads, dtype, time)
    out, expiry = ms.attend_sequence(q, k, v, policy)
    state = make(policy, 2, heads, dtype)
    expected = torch.full_like(expiry, time)
    for t in range(time):
        step = ms.attend_evict(q[:, :, t], k[:, :, t], v[:, :, t], state)
        assert torch.equal(step, out[:, :, t])
        for b, g in torch.cartesian_prod(torch.arange(2), torch.arange(expiry.shape[1])).tolist():
            if state.last_evicted[b, g] >= 0:
                expected[b, g, state.last_evicted[b, g]] = t + 1
    assert torch.equal(expiry, expected)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, expiry: Tensor) -> Tensor:
    """Causal attention in which key j is visible to queries j <= t < expiry[j]."""
    time = torch.arange(q.shape[2])
    visible = (time[:, None] >= time) & (time[:, None] < expiry[..., None, :])
    visible = visible.repeat_interleave(q.shape[1] // visible.shape[1], 1)
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    logits = (q @ k.transpose(2, 3) * q.shape[3] ** -0.5).masked_fill(~visible, -torch.inf)
    weights = torch.where(visible.any(-1, keepdim=True), logits.softmax(-1), 0)
    return weights @ v


@pytest.mark.parametrize("name", ["tova", "tova_head", "h2o", "window+i"])
@every_heads
@pytest.mark.parametrize("backend", ["kernel", "reference"])
def test_sequence_gradients(name: str, heads: Heads, backend: str) -> None:
    """Against autograd through masked attention in float64, padding included."""
    time, policy = 26, policies(6)[name]
    q, k, v = (x.requires_grad_() for x in draw(2, heads, torch.float32, time))
    valid = torch.ones(2, time, dtype=torch.bool)
    valid[1, :9] = False
    valid[1, 20] = False
    weight = torch.randn_like(q)
    if backend == "reference":
        with reference():
            out, expiry = ms.attend_sequence(q, k, v, policy, valid=valid)
    else:
        out, expiry = ms.attend_sequence(q, k, v, policy, valid=valid)
    assert not expiry.requires_grad
    grads = torch.autograd.grad((out * weight).sum(), (q, k, v))
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    exact = masked_attention(*wide, expiry) * valid[:, None, :, None]
    close(out.detach(), exact.detach())
    exact_grads = torch.autograd.grad((exact * weight).sum(), wide)
    for got, truth in zip(grads, exact_grads, strict=True):
        torch.testing.assert_close(got.double(), truth, rtol=2e-5, atol=2e-5)
    assert torch.equal(expiry[1, :, :9], torch.arange(9).expand(expiry.shape[1], 9))


@every_dtype
def test_sequence_gradients_of_16_bit_and_views(dtype: torch.dtype) -> None:
    time, heads = 33, (4, 2, 32)
    q, k, v = (
        x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
        for x in draw(1, heads, dtype, time)
    )
    out, expiry = ms.attend_sequence(q, k, v, ms.Policy.tova(8))
    weight = torch.randn(1, time, 4, 32).transpose(1, 2)
    grads = torch.autograd.grad(out, (q, k, v), weight.to(dtype))
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    exact = torch.autograd.grad(masked_attention(*wide, expiry), wide, weight.to(dtype).double())
    for got, truth in zip(grads, exact, strict=True):
        assert got.dtype == dtype and got.shape == truth.shape
        assert (got.double() - truth).norm() <= TOLERANCE[dtype] * 2 * truth.norm()


def test_sequence_of_nothing_and_of_padding() -> None:
    policy = ms.Policy.tova(3)
    out, expiry = ms.attend_sequence(*draw(2, (2, 1, 8), torch.float32, 0), policy)
    assert out.shape == (2, 2, 0, 8) and expiry.shape == (2, 1, 0)
    inputs = [x.requires_grad_() for x in draw(1, (2, 1, 8), torch.float32, 4)]
    out, expiry = ms.attend_sequence(*inputs, policy, valid=torch.zeros(1, 4, dtype=torch.bool))
    out.sum().backward()
    assert not out.any() and expiry.tolist() == [[[0, 1, 2, 3]]]
    assert all(x.grad is not None and not x.grad.any() for x in inputs)


@pytest.mark.flex
def test_sequence_makes_a_flex_attention_mask() -> None:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    heads, time = (4, 2, 16), 24 if INTERPRETED else 130
    for policy in (ms.Policy.tova(20), ms.Policy.tova(20, scope="head")):
        q, k, v = draw(2, heads, torch.float32, time)
        out, expiry = ms.attend_sequence(q, k, v, policy)
        shared = 4 // expiry.shape[1]

        def visible(b: Tensor, h: Tensor, t: Tensor, j: Tensor) -> Tensor:
            return (t >= j) & (t < expiry[b, h // shared, j])  # noqa: B023

        mask = create_block_mask(visible, 2, 4, time, time, device=q.device)
        with warnings.catch_warnings():  # not compiled, so not fused: fine here
            warnings.simplefilter("ignore")
            flex = flex_attention(q, k, v, block_mask=mask, enable_gqa=True)
        close(out, flex.double())


def test_more_slots_than_tokens_is_full_attention() -> None:
    heads, time = (8, 2, 64), 8 if INTERPRETED else 50
    q, k, v = draw(2, heads, torch.float32, time)
    full = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).double()
    for name, policy in policies(64).items():
        out, expiry = ms.attend_sequence(q, k, v, policy)
        close(out, full)
        assert (expiry == time).all(), name
        state = make(policy, 2, heads, torch.float32)
        close(ms.attend_prompt(q, k, v, state), full)
        assert (state.last_evicted == -1).all()


def test_one_slot() -> None:
    """TOVA keeps the one of two states that the current query prefers; Window the newest."""
    heads = (2, 1, 8)
    state = make(ms.Policy.window(1), 1, heads, torch.float32)
    for t in range(5):
        ms.attend_evict(*draw(1, heads, torch.float32), state)
        assert kept_lists(state, 0) == [[t]]
    state = make(ms.Policy.tova(1), 1, heads, torch.float32)
    key = torch.ones(1, 1, 8)
    for t, sign in enumerate((1, -1, -1, 2)):
        ms.attend_evict(torch.ones(1, 2, 8), key * sign, key, state)
        assert kept_lists(state, 0) == [[3 if t == 3 else 0]]
        assert state.last_evicted.tolist() == [[-1 if t == 0 else 0 if t == 3 else t]]


@pytest.mark.parametrize("scope", ["layer", "head"])
@pytest.mark.parametrize("score", ["attention", "accumulated"])
def test_ties_drop_the_oldest(scope: str, score: str) -> None:
    """Equal keys, so equal attention: the oldest unprotected state goes at every step."""
    slots, kv_heads = 5, 2
    policy = ms.Policy(slots, score, sinks=2, scope=scope)
    for dtype in DTYPES:
        state = make(policy, 1, (4, kv_heads, 8), dtype)
        one = torch.ones(1, kv_heads, 8, dtype=dtype)
        q = torch.randn(1, 4, 8).to(dtype)
        for t in range(14):
            ms.attend_evict(q, one, one, state)
            kept = kept_lists(state, 0)
            if score == "attention" and t >= slots:
                assert kept == [[0, 1, t - 2, t - 1, t]] * len(kept)
    # Of slots in any order: the position decides, not the slot.
    state = make(ms.Policy(3, score, scope=scope), 1, (4, kv_heads, 8), torch.float32)
    state.position[:] = torch.tensor([7, 5, 6, -1])
    state.free.fill_(3)
    state.seen.fill_(8)
    state.keys.fill_(1)
    state.values.fill_(1)
    ms.attend_evict(torch.ones(1, 4, 8), *torch.ones(2, 1, kv_heads, 8), state)
    if score == "attention":
        assert (state.last_evicted == 5).all() and (state.free == 1).all()


def test_accumulated_attention_of_an_evicted_state_is_forgotten() -> None:
    heads = (2, 1, 8)
    state = make(ms.Policy.h2o(4, recent=1), 1, heads, torch.float32)
    for _ in range(30):
        ms.attend_evict(*draw(1, heads, torch.float32), state)
        assert not state.score[state.position < 0].any()
        assert (state.score[state.position >= 0] > 0).all()


def test_nan_counts_as_the_lowest_and_stays_in_its_row() -> None:
    heads = (2, 1, 8)
    state = make(ms.Policy.tova(3), 2, heads, torch.float32)
    for _ in range(3):
        ms.attend_evict(*draw(2, heads, torch.float32), state)
    clean = copy.deepcopy(state)
    q, k, v = draw(2, heads, torch.float32)
    expected = ms.attend_evict(q, k, v, clean)
    q[0] = torch.nan  # every attention of row 0 is NaN: the oldest goes
    out = ms.attend_evict(q, k, v, state)
    assert out[0].isnan().all() and torch.equal(out[1], expected[1])
    assert state.last_evicted[0] == 0 and kept_lists(state, 0) == [[1, 2, 3]]
    assert torch.equal(state.position[1], clean.position[1])
    state = make(ms.Policy.h2o(3, recent=1), 1, heads, torch.float32)
    for _ in range(3):
        ms.attend_evict(*draw(1, heads, torch.float32), state)
    middle = state.position[0, 0].tolist().index(1)
    state.score[0, 0, middle] = torch.nan
    ms.attend_evict(*draw(1, heads, torch.float32), state)
    assert state.last_evicted.item() == 1


def test_nan_with_a_payload() -> None:
    """Every NaN is one, whatever its bits."""
    payload = torch.tensor(0x7FC00001, dtype=torch.int32).view(torch.float32)
    heads = (2, 1, 8)
    state = make(ms.Policy.tova(9), 1, heads, torch.float32)
    for t in range(9):
        q, k, v = draw(1, heads, torch.float32)
        if t == 3:
            k[..., 5] = payload
        out = ms.attend_evict(q, k, v, state)
        assert out.isnan().all() == (t >= 3)
    assert ms.min_gru(payload.expand(1, 2, 3), torch.ones(1, 2, 3)).isnan().all()


@pytest.mark.parametrize("backend", ["kernel", "reference"])
def test_a_nan_query_of_a_prompt_reaches_what_it_sees(backend: str) -> None:
    heads = (2, 1, 8)
    state = make(ms.Policy.h2o(6, recent=1), 1, heads, torch.float32)
    q, k, v = draw(1, heads, torch.float32, 12)
    q[:, :, 2] = torch.nan
    if backend == "kernel":
        ms.attend_prompt(q, k, v, state)
    else:
        with reference():
            ms.attend_prompt(q, k, v, state)
    # Keys 0, 1 and 2 are NaN, so lowest; then three of the others go.
    assert not {0, 1, 2} & set(kept_lists(state, 0)[0]) and state.score.isfinite().all()
    # A step whose query is NaN, and clean ones after it.
    state = make(ms.Policy.h2o(3, recent=1), 1, heads, torch.float32)
    evicted = []
    for t in range(6):
        q, k, v = draw(1, heads, torch.float32)
        if backend == "kernel":
            ms.attend_evict(q * (torch.nan if t == 0 else 1), k, v, state)
        else:
            with reference():
                ms.attend_evict(q * (torch.nan if t == 0 else 1), k, v, state)
        evicted.append(state.last_evicted.item())
    assert evicted[:4] == [-1, -1, -1, 0] and state.score.isfinite().all()


@every_policy
@pytest.mark.parametrize("backend", ["kernel", "reference"])
def test_a_prompt_replaces_a_token_that_waits(name: str, backend: str) -> None:
    heads = (4, 2, 8)
    a, b = (make(policies(5)[name], 2, heads, torch.float32) for _ in range(2))

    def run() -> None:
        for _ in range(9):
            token = draw(2, heads, torch.float32)
            ms.attend_evict(*token, a)
            ms.attend_evict(*token, b)
        ms.attend_scores(*draw(2, heads, torch.float32), b)
        assert torch.equal(a.kept_positions(), b.kept_positions())
        prompt = draw(2, heads, torch.float32, 3)
        close(ms.attend_prompt(*prompt, a), ms.attend_prompt(*prompt, b).double())
        assert torch.equal(a.kept_positions(), b.kept_positions())
        assert torch.equal(a.free, b.free) and torch.equal(a.score, b.score)
        nothing = torch.zeros(2, 3, dtype=torch.bool)
        ms.attend_prompt(*prompt, a, valid=nothing)
        assert (a.last_evicted == -1).all() and torch.equal(a.position, b.position)

    if backend == "kernel":
        run()
    else:
        with reference():
            run()


@pytest.mark.parametrize("backend", ["kernel", "reference"])
def test_autocast_changes_nothing(backend: str) -> None:
    heads = (4, 2, 8)
    prompt, token = draw(1, heads, torch.float32, 9), draw(1, heads, torch.float32)

    def run() -> list[Tensor]:
        state = make(ms.Policy.tova(4), 1, heads, torch.float32)
        outs = [ms.attend_prompt(*prompt, state), ms.attend_prompt(*prompt, state)]
        outs += [ms.attend_evict(*token, state), *ms.attend_scores(*token, state)]
        return [*outs, ms.attend_sequence(*prompt, state.policy)[0]]

    def both() -> None:
        expected = run()
        with torch.autocast(prompt[0].device.type, dtype=torch.bfloat16):
            got = run()
        for x, y in zip(got, expected, strict=True):
            assert x.dtype == torch.float32 and torch.equal(x, y)

    if backend == "kernel":
        both()
    else:
        with reference():
            both()


@pytest.mark.reference
def test_reference_halves_in_float64() -> None:
    heads = (4, 2, 8)
    whole, halves = (make(ms.Policy.h2o(4), 1, heads, torch.float64) for _ in range(2))
    with reference():
        for _ in range(9):
            token = draw(1, heads, torch.float64)
            out = ms.attend_evict(*token, whole)
            again, scores = ms.attend_scores(*token, halves)
            ms.evict(halves, scores)
            assert torch.equal(out, again)
    same_state(whole, halves)


def test_infinite_logits() -> None:
    """A logit of -inf is a weight of 0; a block of nothing else does not turn the others to NaN."""
    heads = (1, 1, 8)
    state = make(ms.Policy.tova(1500), 1, heads, torch.float32)
    q, k, v = draw(1, heads, torch.float32, 1500)
    k[:, :, :600] = -torch.inf
    ms.attend_prompt(q, k.clamp(min=-1e30), v, state)
    state.keys.copy_(state.keys.masked_fill(state.keys == -1e30, -torch.inf))
    q1, k1, v1 = draw(1, heads, torch.float32)
    q1 = q1.abs()
    out = ms.attend_evict(q1, k1, v1, state)
    keys = torch.cat([k[:, :, 600:], k1[:, :, None]], 2).double()
    values = torch.cat([v[:, :, 600:], v1[:, :, None]], 2).double()
    close(out, scaled_dot_product_attention(q1[:, :, None].double(), keys, values)[:, :, 0])


@every_dtype
def test_infinite_values(dtype: torch.dtype) -> None:
    """An infinite element makes the outputs' element infinite, and nothing else."""
    heads = (12, 2, 16)
    state = make(ms.Policy.tova(5), 1, heads, dtype)
    for t in range(4):
        q, k, v = draw(1, heads, dtype)
        if t == 2:
            v[0, 1, 5] = -torch.inf
        out = ms.attend_evict(q / 8, k, v, state)
        infinite = torch.zeros_like(out, dtype=torch.bool)
        infinite[0, 6:, 5] = t >= 2
        assert torch.equal(out == -torch.inf, infinite)
        assert torch.equal(out.isfinite(), ~infinite)


@every_policy
def test_rows_are_independent(name: str) -> None:
    """Rows of different fill in one batch give what each gives alone, bit by bit."""
    heads, dtype = (8, 2, 40), torch.float32
    batch = make(policies(12)[name], 3, heads, dtype)
    alone = [make(policies(12)[name], 1, heads, dtype) for _ in range(3)]
    lengths = (30, 5, 0)
    time = max(lengths)
    q, k, v = draw(3, heads, dtype, time)
    valid = torch.arange(time) >= time - torch.tensor(lengths)[:, None]
    out = ms.attend_prompt(q, k, v, batch, valid=valid)
    for b, length in enumerate(lengths):
        row = slice(b, b + 1)
        tokens = [x[row, :, time - length :] for x in (q, k, v)]
        solo = ms.attend_prompt(*tokens, alone[b])
        close(out[row, :, time - length :], solo.double())
        assert torch.equal(batch.kept_positions()[row], alone[b].kept_positions())
    for _ in range(4 if INTERPRETED else 25):
        q, k, v = draw(3, heads, dtype)
        out = ms.attend_evict(q, k, v, batch)
        for b in range(3):
            row = slice(b, b + 1)
            close(out[row], ms.attend_evict(q[row], k[row], v[row], alone[b]).double())
            assert torch.equal(batch.kept_positions()[row], alone[b].kept_positions())
    # From one and the same state on, even the bits are equal.
    states = [copy.deepcopy(batch) for _ in range(3)]
    q, k, v = draw(3, heads, dtype)
    for b, state in enumerate(states):
        state.reorder(torch.tensor([b, b, b]))
    out = ms.attend_evict(q, k, v, batch)
    for b, state in enumerate(states):
        again = ms.attend_evict(*(x[b : b + 1].expand(3, -1, -1) for x in (q, k, v)), state)
        assert torch.equal(again[0], out[b]) and torch.equal(again[1], out[b])
        assert torch.equal(state.position[2], batch.position[b])


@every_policy
def test_reorder(name: str) -> None:
    heads, dtype = (4, 2, 16), torch.float32
    state = make(policies(6)[name], 3, heads, dtype)
    rows = [Row(state.policy, heads[1]) for _ in range(3)]
    for t in range(12 if INTERPRETED else 40):
        if t % 6 == 5:
            index = torch.randint(0, 3, (3,), dtype=torch.int32 if t % 4 else torch.int64)
            addresses = [x.data_ptr() for x in state.tensors()]
            state.reorder(index)
            assert addresses == [x.data_ptr() for x in state.tensors()]
            rows = [copy.deepcopy(rows[i]) for i in index.tolist()]
        q, k, v = draw(3, heads, dtype)
        out = ms.attend_evict(q, k, v, state)
        for b, row in enumerate(rows):
            kept = kept_lists(state, b)
            close(out[b], row.step(q[b], k[b], v[b], kept))
            assert kept == row.kept()


@every_policy
@every_dtype
def test_halves_equal_the_whole(name: str, dtype: torch.dtype) -> None:
    heads = (4, 2, 48)
    slots, steps = (3, 7) if INTERPRETED else (8, 30)
    whole, halves = (make(policies(slots)[name], 2, heads, dtype) for _ in range(2))
    for t in range(steps):
        q, k, v = draw(2, heads, dtype)
        out = ms.attend_evict(q, k, v, whole)
        if t == steps - 2:  # a token that waits is replaced
            ms.attend_scores(*draw(2, heads, dtype), halves)
        again, scores = ms.attend_scores(q, k, v, halves)
        assert scores.shape == halves.position.shape and scores.dtype == torch.float32
        share = heads[0] / scores.shape[1]
        torch.testing.assert_close(scores.sum(-1), torch.full(scores.shape[:2], share))
        assert not scores[halves.position < 0].any()
        ms.evict(halves, scores)
        assert torch.equal(out, again)
        same_state(whole, halves)
    before = copy.deepcopy(halves)
    ms.evict(halves, scores)  # no token waits
    same_state(before, halves)
    with reference():
        ms.evict(halves, scores)
    same_state(before, halves)


LARGE = {
    "many_slots": (1, (4, 1, 64), 5000),
    "many_heads": (1, (48, 3, 128), 900),
    "wide": (2, (5, 1, 256), 700),
    "narrow": (2, (32, 32, 8), 1100),
    "odd": (3, (6, 3, 72), 513),
}


def random_state(policy: ms.Policy, batch: int, heads: Heads, dtype: torch.dtype) -> ms.MultiState:
    """A full state, its positions in random slots."""
    state = make(policy, batch, heads, dtype)
    groups, slots = state.position.shape[1:]
    order = torch.rand(batch, groups, slots).argsort(-1)
    state.position.copy_(order - 1)  # one of them is -1: the free slot
    state.free.copy_((order == 0).int().argmax(-1))
    state.seen.fill_(slots)
    state.keys.copy_(torch.randn_like(state.keys))
    state.values.copy_(torch.randn_like(state.values))
    if policy.score == "accumulated":
        state.score.uniform_(1, 2).masked_fill_(state.position < 0, 0)
    return state


if INTERPRETED:
    LARGE = {"odd": (1, (6, 3, 72), 150)}


@pytest.mark.large
@pytest.mark.parametrize("case", LARGE.values(), ids=LARGE)
@every_dtype
def test_large_states(case: tuple[int, Heads, int], dtype: torch.dtype) -> None:
    """Several blocks of slots, every width of head_dim, many heads a key-value head."""
    batch, heads, slots = case
    _, kv_heads, head_dim = heads
    for policy in (ms.Policy.tova(slots), ms.Policy.tova(slots, scope="head")):
        state = random_state(policy, batch, heads, dtype)
        q, k, v = draw(batch, heads, dtype)
        keys, values = state.keys.double(), state.values.double()
        slot = state.free.expand(-1, kv_heads)[..., None, None].expand(-1, -1, 1, head_dim)
        keys.scatter_(2, slot, k.double()[:, :, None])
        values.scatter_(2, slot, v.double()[:, :, None])
        logits = q.double().unflatten(1, (kv_heads, -1)) @ keys.transpose(2, 3) / head_dim**0.5
        weights = logits.softmax(-1)
        score = weights.sum(2)
        score = score.sum(1, keepdim=True) if policy.scope == "layer" else score
        twin = copy.deepcopy(state)
        out = ms.attend_evict(q, k, v, state)
        close(out, (weights @ values).flatten(1, 2))
        chosen = score.gather(-1, state.free[..., None])[..., 0]
        assert (chosen <= score.amin(-1) * (1 + 1e-5)).all()
        _, sums = ms.attend_scores(q, k, v, twin)
        torch.testing.assert_close(sums.double(), score, rtol=2e-5, atol=1e-8)


@pytest.mark.threads
@pytest.mark.parametrize("name", ["tova", "tova_head", "h2o", "window"])
@every_dtype
def test_bits_do_not_depend_on_threads(name: str, dtype: torch.dtype) -> None:
    heads = (8, 2, 64)
    policy = policies(2100)[name]
    state = random_state(policy, 2, heads, dtype)
    tokens = [draw(2, heads, dtype) for _ in range(3)]
    prompt = draw(2, heads, dtype, 60)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7, 1):
            torch.set_num_threads(threads)
            mine = copy.deepcopy(state)
            outs = [ms.attend_evict(*token, mine) for token in tokens]
            if policy.score != "position":
                ms.attend_prompt(*prompt, mine)
            outs += ms.attend_sequence(*prompt, policies(9)[name])
            results.append((torch.cat([x.flatten() for x in outs]), mine))
    finally:
        torch.set_num_threads(before)
    for out, mine in results[1:]:
        assert torch.equal(out, results[0][0])
        same_state(mine, results[0][1])


def test_strided_queries() -> None:
    """As they leave a projection: no copy is needed, and the bits are those of a copy."""
    joint = torch.randn(2, (8 + 2 + 2) * 32)
    q, k, v = joint.split([8 * 32, 2 * 32, 2 * 32], -1)
    q, k, v = (x.unflatten(-1, (-1, 32)) for x in (q, k, v))
    assert not q.is_contiguous()
    views, copies = (make(ms.Policy.tova(4), 2, (8, 2, 32), torch.float32) for _ in range(2))
    for _ in range(3):
        a = ms.attend_evict(q, k, v, views)
        b = ms.attend_evict(q.contiguous(), k.contiguous(), v.contiguous(), copies)
        assert torch.equal(a, b)
    same_state(views, copies)
    turned = torch.randn(2, 32, 8).transpose(1, 2)  # head_dim not adjacent
    a = ms.attend_evict(turned, k, v, views)
    b = ms.attend_evict(turned.contiguous(), k, v, copies)
    assert torch.equal(a, b) and a.is_contiguous()


def test_scale() -> None:
    heads = (4, 2, 16)
    a, b = (make(ms.Policy.tova(4), 1, heads, torch.float32) for _ in range(2))
    for _ in range(8):
        q, k, v = draw(1, heads, torch.float32)
        close(ms.attend_evict(q, k, v, a, scale=0.5), ms.attend_evict(2 * q, k, v, b).double())
        assert torch.equal(a.position, b.position)


@pytest.mark.parametrize("scale", [-1.5, -0.0, 0, 1e-50, -1e-50])
@pytest.mark.parametrize("padded", [False, True])
@every_dtype
def test_prompts_of_a_scale_that_is_not_positive(
    dtype: torch.dtype, padded: bool, scale: float
) -> None:
    """The first prompt meets no stored tokens, the second does."""
    heads = (4, 2, 16)
    policy = ms.Policy.tova(16)
    state, row = make(policy, 1, heads, dtype), Row(policy, 2)
    for time in (5, 6):
        q, k, v = draw(1, heads, dtype, time)
        valid = torch.arange(time)[None] > 0 if padded else None
        out = ms.attend_prompt(q, k, v, state, valid=valid, scale=scale)[0]
        real = slice(int(padded), None)
        # In float64, the queries with the scale that the loop does not have.
        q = q.double() * (scale * heads[2] ** 0.5)
        exact = row.prompt(q[0, :, real], k[0, :, real], v[0, :, real], kept_lists(state, 0))
        close(out[:, real], exact)
    small = make(ms.Policy.tova(4), 1, heads, dtype)
    ms.attend_prompt(q.to(dtype), k, v, small, scale=0.0)
    assert kept_lists(small, 0) == [[2, 3, 4, 5]]  # of equals the oldest goes


@hypothesis.given(st.data())
@hypothesis.settings(max_examples=EXAMPLES)
def test_any_shape(data: st.DataObject) -> None:
    kv_heads = data.draw(st.integers(1, 4))
    heads = (
        kv_heads * data.draw(st.integers(1, 9)),
        kv_heads,
        8 * data.draw(st.integers(1, 32)),
    )
    slots = data.draw(st.integers(1, 20))
    sinks = data.draw(st.integers(0, slots))
    policy = ms.Policy(
        slots,
        data.draw(st.sampled_from(["position", "attention", "accumulated"])),
        sinks=sinks,
        recent=data.draw(st.integers(0, slots - sinks)),
        scope=data.draw(st.sampled_from(["layer", "head"])),
    )
    dtype = data.draw(st.sampled_from(DTYPES))
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    state = make(policy, 1, heads, dtype)
    row = Row(policy, kv_heads)
    for kind in data.draw(st.lists(st.sampled_from(["step", "prompt"]), max_size=6)):
        if kind == "prompt":
            q, k, v = draw(1, heads, dtype, data.draw(st.integers(0, 12)))
            out = ms.attend_prompt(q, k, v, state)[0]
            kept = kept_lists(state, 0)
            exact = row.prompt(q[0], k[0], v[0], kept)
        else:
            for _ in range(data.draw(st.integers(1, 30))):
                q, k, v = draw(1, heads, dtype)
                out = ms.attend_evict(q, k, v, state)[0]
                kept = kept_lists(state, 0)
                exact = row.step(q[0], k[0], v[0], kept)
                assert kept == row.kept()
        close(out, exact)
        assert kept == row.kept()
