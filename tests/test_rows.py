"""Rows by index: a batch uses, in place, some rows of a larger state, and no others."""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from backends import INTERPRETED
from scans import reference
from test_multi_state import close, draw, every_dtype, every_policy, make, policies, same_state
from torch import Tensor

import msrnn_ops as ms
from msrnn_ops import backend
from msrnn_ops.operators.multi_state import IN_PLACE
from msrnn_ops.operators.scan import STEPS
from msrnn_ops.state import restore

HEADS = (4, 2, 24)
COUNT = 7  # rows of the state
KINDS = {"int32": torch.int32, "int64": torch.int64}
every_kind = pytest.mark.parametrize("kind", KINDS)
BACKENDS = ["kernels", "reference"]


def used_state(
    policy: ms.Policy, dtype: torch.dtype = torch.float32, count: int = COUNT
) -> ms.MultiState:
    """A state whose rows have seen 0, 1, 2 ... tokens and hold NaN in every free slot."""
    state = make(policy, count, HEADS, dtype)
    for row in range(count):
        for _ in range(2 * row):
            q, k, v = draw(1, HEADS, dtype)
            ms.attend_evict(q, k, v, state, rows=torch.tensor([row]))
    return state


def part(state: ms.MultiState, rows: list[int]) -> ms.MultiState:
    """A copy of some rows."""
    return restore([x[rows].clone() for x in state.tensors()], state.policy)


def bits(state: ms.MultiState) -> list[Tensor]:
    """Everything that a state holds, as numbers that are equal to themselves."""
    return [x.clone().view(torch.uint8) for x in state.tensors()]


def untouched(state: ms.MultiState, before: list[Tensor], rows: list[int]) -> None:
    others = [row for row in range(COUNT) if row not in rows]
    for name, x, old in zip(state.TENSORS, bits(state), before, strict=True):
        assert torch.equal(x[others], old[others]), name


def operator(name: str) -> Callable[..., Any]:
    """A direct call, whose rows nobody has looked at."""
    namespace = backend.namespace(name, torch.empty(0).device)
    assert namespace is not None
    found = IN_PLACE.get((namespace, name)) or STEPS[namespace, name]
    return found


@every_policy
@every_dtype
@every_kind
def test_a_step_changes_its_rows_alone(name: str, dtype: torch.dtype, kind: str) -> None:
    """It has the bits of a step on a state of these rows."""
    state = used_state(policies(4)[name], dtype)
    rows = [5, 0, 6, 2]
    for _ in range(3):
        before, alone = bits(state), part(state, rows)
        q, k, v = draw(4, HEADS, dtype)
        out = ms.attend_evict(q, k, v, state, rows=torch.tensor(rows, dtype=KINDS[kind]))
        assert torch.equal(out, ms.attend_evict(q, k, v, alone))
        same_state(part(state, rows), alone)
        untouched(state, before, rows)


@pytest.mark.parametrize("name", ["tova", "h2o_head", "window"])
@pytest.mark.parametrize("slots", [3, 90], ids=lambda n: f"slots{n}")
@every_kind
def test_rows_that_name_no_row_do_nothing(name: str, slots: int, kind: str) -> None:
    """Nor does one that an earlier row of the batch has; the kernels find that by themselves."""
    state = used_state(policies(slots)[name])
    index = [-1, 3, 6, COUNT, 3, -(2**31), 2**31 - 1, 1, 1]
    rows, used = torch.tensor(index, dtype=KINDS[kind]), [1, 2, 7]
    named = [index[b] for b in used]
    before, alone = bits(state), part(state, named)
    q, k, v = draw(len(index), HEADS, torch.float32)
    kept, numbers = state.tensors(), state.policy.numbers
    out = operator("attend_evict")(q, k, v, rows, *kept, *numbers, 0.2)
    exact = ms.attend_evict(q[used], k[used], v[used], alone, scale=0.2)
    close(out[used], exact.double())
    assert not out[[b for b in range(len(index)) if b not in used]].any()
    untouched(state, before, named)
    assert torch.equal(state.position[named], alone.position)
    assert torch.equal(state.seen[named], alone.seen)
    assert torch.equal(state.free[named], alone.free)


@pytest.mark.parametrize("name", ["tova", "h2o", "h2o_head", "window"])
@pytest.mark.parametrize("slots", [4, 90], ids=lambda n: f"slots{n}")
def test_the_halves_of_a_step_have_the_bits_of_the_whole(name: str, slots: int) -> None:
    whole = used_state(policies(slots)[name])
    halves = part(whole, list(range(COUNT)))
    rows = torch.tensor([4, -1, 1, 6], dtype=torch.int32)
    for _ in range(2):
        q, k, v = draw(4, HEADS, torch.float32)
        out, scores = ms.attend_scores(q, k, v, halves, rows=rows)
        assert scores.shape == (4, *halves.position.shape[1:])
        assert not scores[1].any() and not out[1].any()
        torch.testing.assert_close(scores[0].sum(), torch.tensor(4.0))
        before = bits(halves)
        ms.evict(halves, scores, rows=rows)
        untouched(halves, before, [4, 1, 6])
        assert torch.equal(out, ms.attend_evict(q, k, v, whole, rows=rows))
        same_state(whole, halves)


def test_evict_looks_at_no_row_beyond_the_state() -> None:
    state = used_state(ms.Policy.tova(4))
    q, k, v = draw(2, HEADS, torch.float32)
    rows = torch.tensor([6, 3])
    _, scores = ms.attend_scores(q, k, v, state, rows=rows)
    before, marks = bits(state), state.tensors()[2:]
    wild = torch.tensor([COUNT, -2, -1])
    operator("evict")(torch.ones(3, 1, 5), wild, *marks, *state.policy.numbers)
    untouched(state, before, [])
    twice = torch.tensor([6, 6])
    operator("evict")(scores[[0, 0]], twice, *marks, *state.policy.numbers)
    assert state.seen[6] == 13
    untouched(state, before, [6])


@pytest.mark.parametrize("how", BACKENDS)
@every_policy
def test_prompts_continue_their_rows(name: str, how: str) -> None:
    """Padded ones, on some rows of a state: as on a state of these rows alone."""
    state = used_state(policies(4)[name])
    rows = [6, 1, 0]
    before, alone = bits(state), part(state, rows)
    q, k, v = (torch.cat([x, x[:1]]) for x in draw(3, HEADS, torch.float32, 5))
    valid = torch.rand(4, 5) > 0.3
    valid[0] = False
    index = torch.tensor([*rows, -1])
    with reference() if how == "reference" else contextlib.nullcontext():
        out = ms.attend_prompt(q, k, v, state, valid=valid, rows=index)
        exact = ms.attend_prompt(q[:3], k[:3], v[:3], alone, valid=valid[:3])
    close(out[:3], exact.double())
    assert not out[3].any()
    same_state(part(state, rows), alone)
    untouched(state, before, rows)


@pytest.mark.parametrize("how", BACKENDS)
@every_policy
@every_kind
def test_packed_prompts(name: str, how: str, kind: str) -> None:
    """One behind the other, each as if it were alone; 0 where none is."""
    state = used_state(policies(4)[name])
    ends, rows = [1, 6, 6, 7, 12], [5, 2, -1, 0]
    before, alone = bits(state), [part(state, [row]) for row in rows]
    q, k, v = (x[0].transpose(0, 1) for x in draw(1, HEADS, torch.float32, 14))
    whole = KINDS[kind]
    with reference() if how == "reference" else contextlib.nullcontext():
        out = ms.attend_prompt(
            q, k, v, state, rows=torch.tensor(rows, dtype=whole),
            cu_seqlens=torch.tensor(ends, dtype=whole),
        )  # fmt: skip
        for n, (start, end) in enumerate(itertools.pairwise(ends)):
            if rows[n] < 0:
                assert not out[start:end].any()
                continue
            one = (x[start:end].transpose(0, 1)[None] for x in (q, k, v))
            exact = ms.attend_prompt(*one, alone[n])
            close(out[start:end], exact[0].transpose(0, 1).double())
            if start < end:
                same_state(part(state, [rows[n]]), alone[n])
    assert not out[:1].any() and not out[12:].any()
    untouched(state, before, [5, 0])  # and not row 2, whose prompt has no token


def test_packed_prompts_of_all_rows() -> None:
    state, other = (make(ms.Policy.h2o(4), 3, HEADS, torch.float32) for _ in range(2))
    q, k, v = draw(3, HEADS, torch.float32, 6)
    packed = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)]
    out = ms.attend_prompt(*packed, state, cu_seqlens=torch.tensor([0, 6, 12, 18]))
    exact = ms.attend_prompt(q, k, v, other)
    close(out.unflatten(0, (3, 6)).transpose(1, 2), exact.double())
    assert torch.equal(state.position, other.position)
    nothing = ms.attend_prompt(*(x[:0] for x in packed), state, cu_seqlens=torch.zeros(4).int())
    assert nothing.shape == (0, 4, 24) and state.seen.tolist() == [6, 6, 6]


@pytest.mark.parametrize("name", ["attend_prompt", "store_prompt"])
def test_prompts_look_at_no_row_beyond_the_state(name: str) -> None:
    state = used_state(ms.Policy.tova(4))
    before = bits(state)
    q, k, v = draw(5, HEADS, torch.float32, 3)
    packed = (None,) if name == "attend_prompt" else ()
    rest = (*state.tensors(), *state.policy.numbers, 0.2)
    wild = torch.tensor([-1, COUNT, -(2**60), 2**60, -2])
    out = operator(name)(q, k, v, None, *packed, wild, *rest)
    assert out is None or not out.any()
    untouched(state, before, [])
    rows = torch.tensor([COUNT, 4, 4, 2, -1])
    operator(name)(q, k, v, None, *packed, rows, *rest)
    untouched(state, before, [4, 2])
    assert state.seen.tolist() == [0, 2, 7, 6, 11, 10, 12]
    kept = state.kept_positions()
    alone = used_state(ms.Policy.tova(4))
    for x, y in zip(alone.tensors(), before, strict=True):
        x.view(torch.uint8).copy_(y)
    ms.attend_prompt(q[1:2], k[1:2], v[1:2], alone, rows=torch.tensor([4]), scale=0.2)
    assert torch.equal(kept[4], alone.kept_positions()[4])  # the first of the same


def test_reset_of_rows() -> None:
    state = used_state(ms.Policy.h2o(4))
    before = bits(state)
    state.reset(torch.tensor([4, -1, 1, 4], dtype=torch.int32))
    fresh = make(state.policy, 2, HEADS, torch.float32)
    mine = part(state, [4, 1])
    for x in ("position", "score", "free", "seen", "last_evicted"):
        assert torch.equal(getattr(mine, x), getattr(fresh, x)), x
    untouched(state, before, [4, 1])
    with torch._subclasses.FakeTensorMode():  # as on a device, whose numbers nobody waits for
        ms.MultiState(state.policy, batch=2, kv_heads=1, head_dim=8).reset(torch.tensor([1]))
    wild = torch.compile(lambda s, r: s.reset(r), backend="eager")
    wild(state, torch.tensor([COUNT, 3, -5]))
    untouched(state, before, [4, 1, 3])
    assert state.seen.tolist() == [0, 0, 4, 0, 0, 10, 12]


# A serving engine: requests come, are served some at a time, stop, and leave their row to others.


class Request:
    """Tokens of one request, some as prompts; and what it gets alone."""

    def __init__(self, policy: ms.Policy) -> None:
        self.alone = make(policy, 1, HEADS, torch.float32)
        self.left = random.randrange(1, 12)

    def expected(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if len(q) == 1:
            return ms.attend_evict(q, k, v, self.alone)
        one = (x.transpose(0, 1)[None] for x in (q, k, v))
        return ms.attend_prompt(*one, self.alone)[0].transpose(0, 1)


def serve(policy: ms.Policy, turns: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Outputs in company and alone, of a random schedule on five rows."""
    state = make(policy, 5, HEADS, torch.float32)
    running: dict[int, Request] = {}
    for _ in range(turns):
        for row in random.sample(range(5), 5):
            if row in running and (running[row].left <= 0 or random.random() < 0.1):
                del running[row]  # finished, or aborted
            if row not in running and random.random() < 0.4:
                running[row] = Request(policy)
                state.reset(torch.tensor([row]))
        chosen = [row for row in running if random.random() < 0.8]
        counts = [random.choice([1, 1, 1, 2, 5]) for _ in chosen]
        ends = [0, *itertools.accumulate(counts)]
        q, k, v = (torch.randn(ends[-1], heads, HEADS[2]) for heads in (4, 2, 2))
        out = torch.full_like(q, torch.nan)
        singles = [i for i, n in enumerate(counts) if n == 1]
        if singles:
            at = [ends[i] for i in singles] + [0]  # the last one is padding
            rows = torch.tensor([chosen[i] for i in singles] + [-1], dtype=torch.int32)
            out[at[:-1]] = ms.attend_evict(q[at], k[at], v[at], state, rows=rows)[:-1]
        prompts = [i for i, n in enumerate(counts) if n > 1]
        if prompts:
            where = torch.cat([torch.arange(ends[i], ends[i + 1]) for i in prompts])
            lengths = torch.tensor([0, *itertools.accumulate(counts[i] for i in prompts)])
            out[where] = ms.attend_prompt(
                q[where], k[where], v[where], state, cu_seqlens=lengths,
                rows=torch.tensor([chosen[i] for i in prompts]),
            )  # fmt: skip
        for i, row in enumerate(chosen):
            tokens = slice(ends[i], ends[i + 1])
            running[row].left -= counts[i]
            yield out[tokens], running[row].expected(q[tokens], k[tokens], v[tokens])


@pytest.mark.parametrize("name", ["tova", "tova_head", "window+i", "h2o", "h2o_head"])
@pytest.mark.parametrize("schedules", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_requests_do_not_meet(name: str, schedules: int) -> None:
    """Whatever else is served, aborted or was in the row before: bit for bit what is got alone."""
    turns = 4 if INTERPRETED else 12
    for _ in range(schedules):
        for together, alone in serve(policies(random.choice([1, 3, 8]))[name], turns):
            assert torch.equal(together, alone)


# Steps of the scans.

SCANS = {
    "min_gru": (ms.min_gru_step, 2),
    "min_lstm": (ms.min_lstm_step, 3),
}
every_scan = pytest.mark.parametrize("name", SCANS)
WIDE = {torch.float64: torch.float64}
CLOSE = {torch.float32: 3e-7, torch.float64: 1e-15, torch.bfloat16: 1e-6, torch.float16: 1e-6}


@every_scan
@pytest.mark.parametrize("dtype", CLOSE, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("activation", ["g", "identity"])
@pytest.mark.parametrize("how", BACKENDS)
def test_scan_steps(name: str, dtype: torch.dtype, activation: str, how: str) -> None:
    """Against float64: the rows named change, the others and what lies between rows do not."""
    step, inputs = SCANS[name]
    for channels in (1, 40, 300):
        memory = torch.randn(COUNT, channels + 3).to(WIDE.get(dtype, torch.float32))
        h, before = memory[:, :channels], memory.clone()
        index = [5, -1, 0, 6]
        used, named = [0, 2, 3], [5, 0, 6]
        x = (torch.randn(inputs, 4, 2 * channels) * 3).to(dtype)[:, :, ::2]
        with reference() if how == "reference" else contextlib.nullcontext():
            out = step(*x, h, rows=torch.tensor(index, dtype=torch.int32), activation=activation)
        exact = step(*x[:, used].double(), before[named, :channels].double(), activation=activation)
        assert out.dtype == h.dtype and not out[1].any()
        torch.testing.assert_close(
            out[used].double(), exact, rtol=2 * CLOSE[dtype], atol=2 * CLOSE[dtype]
        )
        assert torch.equal(h[named], out[used])
        before[named, :channels] = h[named]
        assert torch.equal(memory, before)


@every_scan
def test_scan_steps_of_rows_that_name_no_row(name: str) -> None:
    step, inputs = SCANS[name]
    h = torch.randn(COUNT, 5)
    x, before = torch.randn(inputs, 7, 5), h.clone()
    rows = torch.tensor([COUNT, 2, -1, 2, -(2**40), 3, 2**40])
    out = operator(name)(*x, h, rows, True)
    exact = step(*x[:, [1, 5]], before[[2, 3]], activation="identity")
    torch.testing.assert_close(out[[1, 5]], exact)
    assert not out[[0, 2, 3, 4, 6]].any()
    before[[2, 3]] = out[[1, 5]]
    assert torch.equal(h, before)
    assert operator(name)(*x[:, :0], h, rows[:0], True).shape == (0, 5)
    assert not operator(name)(*x, h[:0], rows, True).any()
    infinite = torch.tensor([-torch.inf, -1e4, 0, 1e4, torch.inf, torch.nan]).expand(inputs, 1, -1)
    h = torch.randn(2, 6)
    exact = step(*infinite, h[1:])
    out = step(*infinite, h, rows=torch.tensor([1]))
    torch.testing.assert_close(out, exact, equal_nan=True)


# What is refused, before anything is written.


def wrong_rows() -> dict[str, tuple[Any, str]]:
    return {
        "list": ([0, 1], "expected rows to be a tensor, got list"),
        "float": (torch.zeros(2), "expected rows in int32 or int64, got torch.float32"),
        "shape": (torch.tensor([0]), r"expected rows of shape \(2,\), got \(1,\)"),
        "matrix": (torch.zeros(2, 1).long(), r"expected rows of shape \(2,\), got \(2, 1\)"),
        "device": (torch.zeros(2).long().to("meta"), "expected rows on the device of "),
        "beyond": (torch.tensor([0, 3]), r"expected rows in \[0, 3\), or -1 for none, got 3"),
        "negative": (torch.tensor([-2, 0]), r"expected rows in \[0, 3\), or -1 for none, got -2"),
        "twice": (torch.tensor([1, 1]), "each name another row of the state, got 1 twice"),
    }


def calls() -> dict[str, tuple[Callable[..., Any], list[Tensor]]]:
    state = make(ms.Policy.h2o(3), 3, HEADS, torch.float32)
    q, k, v = draw(2, HEADS, torch.float32)
    prompt = draw(2, HEADS, torch.float32, 4)
    packed = [x[0].transpose(0, 1) for x in prompt]
    ends, h = torch.tensor([0, 1, 4]), torch.zeros(3, 5)
    marks = state.tensors()[2:]
    gru, lstm = torch.randn(2, 2, 5), torch.randn(3, 2, 5)
    return {
        "attend_evict": (lambda r: ms.attend_evict(q, k, v, state, rows=r), marks),
        "attend_scores": (lambda r: ms.attend_scores(q, k, v, state, rows=r), marks),
        "evict": (lambda r: ms.evict(state, torch.ones(2, 1, 4), rows=r), marks),
        "attend_prompt": (lambda r: ms.attend_prompt(*prompt, state, rows=r), marks),
        "packed": (lambda r: ms.attend_prompt(*packed, state, rows=r, cu_seqlens=ends), marks),
        "min_gru_step": (lambda r: ms.min_gru_step(*gru, h, rows=r), [h]),
        "min_lstm_step": (lambda r: ms.min_lstm_step(*lstm, h, rows=r), [h]),
    }


@pytest.mark.parametrize("wrong", wrong_rows())
@pytest.mark.parametrize("name", calls())
def test_wrong_rows(name: str, wrong: str) -> None:
    run, written = calls()[name]
    rows, words = wrong_rows()[wrong]
    if wrong in ("beyond", "negative", "twice") and not torch.empty(0).is_cpu:
        pytest.skip("nobody waits for the numbers on a device")
    before = [x.clone() for x in written]
    caller = "attend_prompt" if name == "packed" else name
    with pytest.raises((TypeError, ValueError), match=rf"{caller}: .*{words}"):
        run(rows)
    assert all(map(torch.equal, written, before))


def test_wrong_packed_prompts() -> None:
    state = make(ms.Policy.h2o(3), 3, HEADS, torch.float32)
    packed = [x[0].transpose(0, 1) for x in draw(1, HEADS, torch.float32, 4)]
    rows = torch.tensor([0, 1])

    def refused(words: str, *tokens: Tensor, **changes: Any) -> None:
        settings = {"rows": rows, "cu_seqlens": torch.tensor([0, 1, 4]), **changes}
        with pytest.raises((TypeError, ValueError), match=f"attend_prompt: .*{words}"):
            ms.attend_prompt(*(tokens or packed), state, **settings)

    refused("within 0 to T = 4, got 0 to 5", cu_seqlens=torch.tensor([0, 1, 5]))
    refused("not to decrease, got 3 and then 2", cu_seqlens=torch.tensor([0, 3, 2]))
    refused("cu_seqlens in int32 or int64", cu_seqlens=torch.zeros(3))
    refused("cu_seqlens to be a tensor, got list", cu_seqlens=[0, 1, 4])
    refused(r"cu_seqlens of shape \(N \+ 1,\)", cu_seqlens=torch.zeros(0).long())
    refused(r"rows of shape \(3,\), got \(2,\)", cu_seqlens=torch.tensor([0, 1, 2, 4]))
    refused("valid or cu_seqlens .*, got both", valid=torch.ones(1, 4).bool())
    refused("a batch of 3 as in the state, got 2", rows=None)
    refused(r"q of shape \(total, H, Dh\)", *draw(2, HEADS, torch.float32, 4))


@pytest.mark.parametrize("name", SCANS)
def test_wrong_states_of_scan_steps(name: str) -> None:
    step, inputs = SCANS[name]
    x, rows = torch.randn(inputs, 2, 5), torch.tensor([0, 2])

    def refused(words: str, h: Any, x: Tensor = x, rows: Tensor = rows, **more: Any) -> None:
        with pytest.raises((TypeError, ValueError), match=f"{name}_step: .*{words}"):
            step(*x, h, rows=rows, **more)

    refused(r"h of shape \(rows of the state, 5\), got \(3, 4\)", torch.zeros(3, 4))
    refused(r"h of shape \(rows of the state, 5\), got \(5,\)", torch.zeros(5))
    refused("h in torch.float32, .* got torch.bfloat16", torch.zeros(3, 5).bfloat16())
    refused("h in torch.float32, .* got torch.float64", torch.zeros(3, 5).double())
    refused("channels side by side", torch.zeros(5, 3).T)
    refused("rows that do not overlap", torch.zeros(5).expand(3, 5))
    refused("h to be a tensor, got NoneType", None)
    refused(r"of shape \(B, D\) with rows", torch.zeros(3, 5), x[:, 0])
    refused("activation 'g' or 'identity'", torch.zeros(3, 5), activation="tanh")


@pytest.mark.parametrize("name", calls())
def test_rows_have_no_gradient_and_no_batch(name: str) -> None:
    run, _ = calls()[name]
    rows = torch.tensor([[0, 1], [2, 0]])
    with pytest.raises(RuntimeError, match=r"which torch\.vmap cannot"):
        torch.vmap(run)(rows)
    if name == "evict":
        return
    for x in (y for y in _cells(run) if y.is_floating_point()):
        x.requires_grad_()
    with pytest.raises(RuntimeError, match="changes the state in place and has no gradient"):
        run(torch.tensor([0, 1]))


def _cells(function: Callable[..., Any]) -> Iterator[Tensor]:
    """The tensors that a function is given by those around it, but for the state."""
    for cell in function.__closure__ or ():
        values = cell.cell_contents
        if isinstance(values, Tensor) and values.shape == (3, 5):
            continue
        yield from (x for x in (values if isinstance(values, (list, tuple)) else [values])
                    if isinstance(x, Tensor))  # fmt: skip


def test_rows_in_a_compiled_function() -> None:
    """Whole graphs; the rows are looked at by the kernels then."""
    policy = ms.Policy.tova(3)

    def serve_once(state: ms.MultiState, h: Tensor, x: list[Tensor], rows: Tensor) -> list[Tensor]:
        q, k, v, *gates = x
        out, scores = ms.attend_scores(q, k, v, state, rows=rows)
        ms.evict(state, scores, rows=rows)
        again = ms.attend_evict(q, k, v, state, rows=rows)
        return [out, scores, again, ms.min_gru_step(*gates, h, rows=rows)]

    compiled = torch.compile(serve_once, fullgraph=True, backend="aot_eager")
    states = [used_state(policy) for _ in range(1)]
    states.append(part(states[0], list(range(COUNT))))
    hidden = [torch.ones(COUNT, 5), torch.ones(COUNT, 5)]
    for index in ([3, -1, 0], [6, 5, 4]):
        x = [*draw(3, HEADS, torch.float32), *torch.randn(2, 3, 5)]
        rows = torch.tensor(index)
        expected = serve_once(states[0], hidden[0], x, rows)
        for a, b in zip(compiled(states[1], hidden[1], x, rows), expected, strict=True):
            assert torch.equal(a, b)
        same_state(*states)
        assert torch.equal(*hidden)
