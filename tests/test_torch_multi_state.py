"""What PyTorch builds on multi-state attention: mutation, gradients, compile, export, copies."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor

import msrnn_ops as ms

OPS = torch.ops.msrnn_ops


def in_place_calls() -> dict[str, tuple[object, ...]]:
    """Every op that changes a state, with the arguments of a direct call."""
    state = ms.MultiState(ms.Policy.h2o(6, scope="head"), batch=2, kv_heads=2, head_dim=16)
    for _ in range(9):
        ms.attend_evict(torch.randn(2, 4, 16), *torch.randn(2, 2, 2, 16), state)
    kept, numbers = tuple(state.tensors()), state.policy.numbers
    token = (torch.randn(2, 4, 16), *torch.randn(2, 2, 2, 16))
    prompt = (torch.randn(2, 4, 5, 16), *torch.randn(2, 2, 2, 5, 16), torch.rand(2, 5) > 0.3)
    keys, values, position, score, free, seen, last = kept
    marks = (position, score, free, seen, last)
    return {
        "attend_evict": (*token, *kept, *numbers, 0.25),
        "attend_scores": (*token, keys, values, position, free, seen, 0.25),
        "evict": (torch.rand(position.shape), *marks, *numbers),
        "attend_prompt": (*prompt, *kept, *numbers, 0.25),
        "store_prompt": (*prompt, *kept, *numbers, 0.25),
    }


def sequence_call() -> tuple[object, ...]:
    q, k, v = torch.randn(2, 4, 7, 16), *torch.randn(2, 2, 2, 7, 16)
    return q, k, v, torch.rand(2, 7) > 0.3, 3, True, 1, 0, 0, 0.25


@pytest.mark.parametrize("name", in_place_calls())
def test_opcheck_of_in_place_ops(name: str) -> None:
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(getattr(OPS, name).default, in_place_calls()[name], test_utils=tests)


@pytest.mark.parametrize("name", in_place_calls())
def test_in_place_ops_refuse_gradients(name: str) -> None:
    arguments = list(in_place_calls()[name])
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(arguments[0], torch.ones_like(arguments[0]))
        with pytest.raises(RuntimeError, match="no forward-mode gradient"):
            getattr(OPS, name)(dual, *arguments[1:])
    arguments[0].requires_grad_()
    with pytest.raises(RuntimeError, match="has no gradient"):
        getattr(OPS, name)(*arguments)
    with torch.no_grad():
        getattr(OPS, name)(*arguments)


def test_opcheck_of_attend_sequence() -> None:
    arguments = sequence_call()
    leaves = [x.requires_grad_() if isinstance(x, Tensor) and i < 3 else x
              for i, x in enumerate(arguments)]  # fmt: skip
    torch.library.opcheck(OPS.attend_sequence.default, tuple(leaves))
    leaves[3] = None
    torch.library.opcheck(OPS.attend_sequence.default, tuple(leaves))
    detached = [x.detach() if isinstance(x, Tensor) else x for x in arguments]
    out, expiry = OPS.attend_sequence(*detached)
    backward = (torch.randn_like(out), *detached[:3], expiry, detached[3], 0.25)
    torch.library.opcheck(OPS.attend_sequence_backward.default, backward)


def test_transforms_of_attend_sequence_are_right_or_errors() -> None:
    q, k, v = torch.randn(1, 2, 9, 8), *torch.randn(2, 1, 1, 9, 8)
    policy = ms.Policy.tova(4)

    def loss(q: Tensor) -> Tensor:
        return ms.attend_sequence(q, k, v, policy)[0].square().sum()

    leaf = q.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(q), expected)
    with pytest.raises(RuntimeError):
        torch.func.jvp(loss, (q,), (q,))
    with pytest.raises(RuntimeError), torch.autograd.forward_ad.dual_level():
        loss(torch.autograd.forward_ad.make_dual(q, q))
    with pytest.raises(RuntimeError):
        torch.vmap(loss)(q[None])
    (once,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    with pytest.raises(RuntimeError):
        once.sum().backward()


@pytest.mark.parametrize("policy", [ms.Policy.tova(6), ms.Policy.h2o(6, scope="head")], ids=repr)
def test_compiled_decoding(policy: ms.Policy) -> None:
    """A prompt and steps in whole graphs; the state's tensors stay where they are."""
    torch._dynamo.reset()
    one, other = (ms.MultiState(policy, batch=2, kv_heads=2, head_dim=16) for _ in range(2))
    weight = torch.randn(16, 16)

    def prefill(x: Tensor, state: ms.MultiState, valid: Tensor) -> Tensor:
        q = (x @ weight).repeat(1, 2, 1, 1)
        return ms.attend_prompt(q, x, x, state, valid=valid) * 2

    def step(x: Tensor, state: ms.MultiState) -> tuple[Tensor, Tensor]:
        out = ms.attend_evict((x @ weight).repeat(1, 2, 1), x, x, state)
        return out * 2, state.kept_positions()

    valid = torch.rand(2, 11) > 0.3
    x = torch.randn(2, 2, 11, 16)
    addresses = [t.data_ptr() for t in one.tensors()]
    compiled = torch.compile(prefill, fullgraph=True)(x, one, valid)
    torch.testing.assert_close(compiled, prefill(x, other, valid))
    fast = torch.compile(step, fullgraph=True)
    for _ in range(10):
        x = torch.randn(2, 2, 16)
        got, expected = fast(x, one), step(x, other)
        torch.testing.assert_close(got[0], expected[0])
        assert torch.equal(got[1], expected[1])
    assert addresses == [t.data_ptr() for t in one.tensors()]
    assert torch.equal(one.seen, other.seen) and torch.equal(one.last_evicted, other.last_evicted)


def test_compiled_steps_refuse_gradients() -> None:
    torch._dynamo.reset()
    state = ms.MultiState(ms.Policy.tova(3), batch=1, kv_heads=1, head_dim=8)
    q, k, v = torch.randn(3, 1, 1, 8)
    step = torch.compile(lambda q: ms.attend_evict(q * 1.0, k, v, state))
    with pytest.raises(RuntimeError, match="has no gradient"):
        step(q.requires_grad_())
    assert not state.seen.any()


def test_compiled_attend_sequence() -> None:
    torch._dynamo.reset()

    def function(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, expiry = ms.attend_sequence(q * 1.0, k, v, ms.Policy.tova(4))
        return out * 2, expiry

    inputs = [torch.randn(1, h, 9, 8, requires_grad=True) for h in (4, 2, 2)]
    results = []
    for call in (function, torch.compile(function, fullgraph=True)):
        out, expiry = call(*inputs)
        results.append([out, expiry, *torch.autograd.grad(out.square().sum(), inputs)])
    torch.testing.assert_close(*results)


def test_multi_state_is_a_tree_and_can_be_copied() -> None:
    state = ms.MultiState(ms.Policy.h2o(3), batch=2, kv_heads=1, head_dim=8)
    for _ in range(5):
        ms.attend_evict(*torch.randn(3, 2, 1, 8), state)
    leaves, tree = torch.utils._pytree.tree_flatten(state)
    assert len(leaves) == 7
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    copies = [
        torch.utils._pytree.tree_unflatten([x.clone() for x in leaves], tree),
        copy.deepcopy(state),
        pickle.loads(pickle.dumps(state)),
        torch.load(buffer),
        state.to(state.keys.device),
    ]
    token = torch.randn(3, 2, 1, 8)
    expected = ms.attend_evict(*token, state)
    for other in copies:
        assert other.policy == state.policy
        assert torch.equal(ms.attend_evict(*token, other), expected)
        assert torch.equal(other.kept_positions(), state.kept_positions())


def test_changes_in_place_are_seen_by_autograd() -> None:
    state = ms.MultiState(ms.Policy.tova(3), batch=1, kv_heads=1, head_dim=8)
    state.keys.zero_()
    weight = torch.ones(8, requires_grad=True)
    loss = (state.keys * weight).sum()
    ms.attend_evict(*torch.randn(3, 1, 1, 8), state)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with torch.inference_mode():
        inside = ms.MultiState(ms.Policy.tova(3), batch=1, kv_heads=1, head_dim=8)
        ms.attend_evict(*torch.randn(3, 1, 1, 8), inside)


def test_export_with_a_state() -> None:
    class Step(torch.nn.Module):
        def forward(self, x: Tensor, state: ms.MultiState) -> Tensor:
            return ms.attend_evict(x, x, x, state)

    one, other = (
        ms.MultiState(ms.Policy.tova(3), batch=1, kv_heads=2, head_dim=8) for _ in range(2)
    )
    x = torch.randn(1, 2, 8)
    program = torch.export.export(Step(), (x, one))
    for _ in range(5):
        x = torch.randn(1, 2, 8)
        torch.testing.assert_close(program.module()(x, one), ms.attend_evict(x, x, x, other))
    assert torch.equal(one.kept_positions(), other.kept_positions())


def test_multi_state_to_reset_repr_nbytes() -> None:
    state = ms.MultiState(ms.Policy.tova(3), batch=2, kv_heads=4, head_dim=16)
    for _ in range(5):
        ms.attend_evict(torch.randn(2, 4, 16), *torch.randn(2, 2, 4, 16), state)
    half = state.to(torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half.seen.dtype == torch.int64
    assert torch.equal(half.position, state.position) and half.position is not state.position
    marks = 2 * 4 * 8 + 2 * 8 + 2 * 8 + 2 * 8  # position, free, seen, last_evicted
    assert state.nbytes == 2 * (2 * 4 * 4 * 16 * 4) + marks
    assert half.nbytes == 2 * (2 * 4 * 4 * 16 * 2) + marks
    words = ["attention", "slots=3", "kept [3, 3] of 3", "seen [5, 5]", "bfloat16"]
    for word in (*words, half.keys.device.type):
        assert word in repr(half)
    on_meta = ms.MultiState(ms.Policy.tova(3), batch=2, kv_heads=4, head_dim=16, device="meta")
    assert "meta" in repr(on_meta) and state.to("meta").keys.device.type == "meta"
    with torch.device("meta"):
        assert ms.MultiState(ms.Policy.tova(3), batch=2, kv_heads=4, head_dim=16).seen.is_meta
    state.reset()
    assert state.kept_positions().eq(-1).all() and not state.seen.any()
    fresh = ms.MultiState(ms.Policy.tova(3), batch=2, kv_heads=4, head_dim=16)
    token = torch.randn(2, 4, 16), *torch.randn(2, 2, 4, 16)
    assert torch.equal(ms.attend_evict(*token, state), ms.attend_evict(*token, fresh))
    empty = ms.MultiState(ms.Policy.tova(3), batch=0, kv_heads=4, head_dim=16)
    assert ms.attend_evict(torch.ones(0, 4, 16), *torch.ones(2, 0, 4, 16), empty).shape[0] == 0
    assert "kept []" in repr(empty)


def test_direct_calls_of_multi_state_ops_stay_in_bounds() -> None:
    calls = in_place_calls()
    for name, position in (("attend_evict", 1), ("store_prompt", 2), ("evict", 1)):
        broken = list(calls[name])
        broken[position] = torch.ones(1, 1)
        with pytest.raises(RuntimeError, match="expected"):
            getattr(OPS, name)(*broken)
    arguments = list(calls["attend_evict"])
    for free, seen in ((10**6, 9), (-5, 9), (2, 10**9), (2, -7)):  # a state that somebody broke
        arguments[7] = torch.full((2, 2), free)
        arguments[8] = torch.full((2,), seen)
        assert OPS.attend_evict(*arguments).shape == (2, 4, 16)
    arguments[5] = torch.full((2, 2, 7), 3)
    assert OPS.attend_evict(*arguments).shape == (2, 4, 16)
    broken = ms.MultiState(ms.Policy.window_sinks(40, 39), batch=1, kv_heads=1, head_dim=8)
    broken.position[:] = torch.arange(41) % 39  # more protected states than slots
    ms.attend_prompt(*torch.randn(3, 1, 1, 39, 8), broken)
    headless = (torch.ones(2, 0, 5, 16), *calls["store_prompt"][1:])
    with pytest.raises(RuntimeError, match="multiple"):
        OPS.store_prompt(*headless)


@pytest.mark.parametrize("kind", ["pickle", "pt"])
def test_states_of_0_1_0_are_read(kind: str) -> None:
    """There Policy and MultiState were of msrnn_ops.multi_state; five tokens had been seen."""
    path = Path(__file__).parent / "pickles" / f"state-0.1.0.{kind}"
    policy = ms.Policy.h2o(3, scope="head")
    if kind == "pickle":
        state = pickle.loads(path.read_bytes())
    else:
        saved = torch.load(path, weights_only=True, map_location="cpu")
        state = saved["state"]
        assert saved["policy"] == policy
    assert type(state) is ms.MultiState and state.policy == policy
    assert state.seen.tolist() == [5, 5]
    assert state.kept_positions().tolist() == [[[0, 1, 4]] * 2] * 2
    state = state.to(torch.get_default_device())
    ms.attend_evict(torch.randn(2, 4, 8), *torch.randn(2, 2, 2, 8), state)
    assert state.seen.tolist() == [6, 6]
