"""What PyTorch builds on an op: higher derivatives, transforms, compile, export, autocast."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from conftest import SCANS, Scan, norm_error, scans
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import msrnn_ops as ms

OPS = torch.ops.msrnn_ops


def small(scan: Scan, time: int = 5) -> tuple[list[Tensor], Tensor]:
    inputs = [x.requires_grad_() for x in scan.inputs(2, time, 3, torch.float64)]
    return inputs, torch.randn(2, 3, dtype=torch.float64, requires_grad=True)


@scans
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_first_and_second_derivatives(scan: Scan, reverse: bool) -> None:
    inputs, h0 = small(scan)

    def function(*x: Tensor) -> Tensor:
        return scan(*x, reverse=reverse, return_state=True)

    assert gradcheck(function, [*inputs, h0], check_forward_ad=True)
    assert gradgradcheck(function, [*inputs, h0])
    packed = torch.tensor([0, 2, 2, 5])
    inputs = [x.detach()[:1].requires_grad_() for x in inputs]
    h0 = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)

    def of_packed(*x: Tensor) -> Tensor:
        return scan(*x, reverse=reverse, cu_seqlens=packed, return_state=True)

    assert gradcheck(of_packed, [*inputs, h0], check_forward_ad=True)
    assert gradgradcheck(of_packed, [*inputs, h0])


@scans
def test_second_derivatives_without_h0_and_at_t_0(scan: Scan) -> None:
    inputs, h0 = small(scan)
    assert gradgradcheck(lambda *x: scan(*x), inputs)
    empty = [x.detach()[:, :0].requires_grad_() for x in inputs]
    _, last = scan(*empty, h0, return_state=True)
    (grad,) = torch.autograd.grad(last.sum(), h0, create_graph=True)
    assert torch.equal(grad, torch.ones_like(h0))


@scans
def test_torch_func(scan: Scan) -> None:
    inputs, h0 = small(scan)
    inputs, h0 = [x.detach() for x in inputs], h0.detach()

    def loss(*x: Tensor) -> Tensor:
        return scan(*x).square().sum()

    where = tuple(range(len(inputs) + 1))
    leaves = [x.clone().requires_grad_() for x in (*inputs, h0)]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    got = torch.func.grad(loss, argnums=where)(*inputs, h0)
    torch.testing.assert_close(got, expected)

    tangents = tuple(torch.randn_like(x) for x in (*inputs, h0))
    _, tangent = torch.func.jvp(loss, (*inputs, h0), tangents)
    exact = sum((g * t).sum() for g, t in zip(expected, tangents, strict=True))
    torch.testing.assert_close(tangent, exact)

    stacked = [torch.stack([x, 2 * x, -x]) for x in (*inputs, h0)]
    if scan.name in ("decay_scan", "log_scan"):
        stacked[0] = -stacked[0].abs()
    rows = [scan(*(x[i] for x in stacked)) for i in range(3)]
    torch.testing.assert_close(torch.vmap(scan.function)(*stacked), torch.stack(rows))
    per_sample = torch.func.vmap(torch.func.grad(loss, argnums=where))(*stacked)
    for got_one, i in zip(per_sample, where, strict=True):
        assert got_one.shape == stacked[i].shape
    hessian = torch.func.hessian(lambda x: loss(x, *inputs[1:], h0))(inputs[0])
    reverse = torch.func.jacrev(torch.func.grad(lambda x: loss(x, *inputs[1:], h0)))(inputs[0])
    torch.testing.assert_close(hessian, reverse)


def test_vmap_over_packed_sequences_is_a_clear_error() -> None:
    x, ends = torch.randn(2, 2, 1, 4, 3), torch.tensor([0, 4])
    with pytest.raises(ValueError, match="vmap with cu_seqlens"):
        torch.vmap(lambda a, b: ms.linear_scan(a, b, cu_seqlens=ends))(*x)


@scans
def test_forward_mode_without_torch_func(scan: Scan) -> None:
    inputs, h0 = small(scan)
    inputs = [x.detach() for x in inputs]
    tangent = torch.randn_like(inputs[0])
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(inputs[0], tangent)
        h = scan(dual, *inputs[1:], h0.detach())
        got = torch.autograd.forward_ad.unpack_dual(h).tangent
    step = 1e-6
    numeric = scan(inputs[0] + step * tangent, *inputs[1:], h0) - scan(
        inputs[0] - step * tangent, *inputs[1:], h0
    )
    torch.testing.assert_close(got, numeric.detach() / (2 * step), rtol=1e-5, atol=1e-7)


def op_arguments(scan: Scan) -> tuple[torch.OpOverload, tuple[object, ...]]:
    name = scan.name.removesuffix("_identity")
    flags = (scan.name.endswith("_identity"),) if name.startswith("min_") else ()
    inputs = [x.requires_grad_() for x in scan.inputs(2, 6, 3, torch.float32)]
    h0 = torch.randn(2, 3, requires_grad=True)
    return getattr(OPS, name).default, (*inputs, h0, None, False, *flags)


@scans
def test_opcheck(scan: Scan) -> None:
    op, arguments = op_arguments(scan)
    torch.library.opcheck(op, arguments)
    without = list(arguments)
    without[len(scan.draw) if not scan.joint else 1] = None
    torch.library.opcheck(op, tuple(without))
    packed = [x[:1].detach() if isinstance(x, Tensor) and x.dim() == 3 else x for x in arguments]
    position = 1 if scan.joint else len(scan.draw)
    packed[position] = torch.randn(2, 3)
    packed[position + 1] = torch.tensor([0, 2, 6])
    torch.library.opcheck(op, tuple(packed))


@scans
def test_opcheck_backward(scan: Scan) -> None:
    op, arguments = op_arguments(scan)
    detached = [x.detach() if isinstance(x, Tensor) else x for x in arguments]
    h, last = op(*detached)
    backward = getattr(OPS, f"{op._opname}_backward").default
    kept = 1 if scan.name in ("linear_scan", "decay_scan") or scan.joint else len(scan.draw)
    rest = detached[1 if scan.joint else len(scan.draw) :]
    for grads in ((torch.randn_like(h), torch.randn_like(last)), (None, last), (h, None)):
        torch.library.opcheck(backward, (*grads, *detached[:kept], h, *rest))


def test_direct_calls_are_differentiable_and_safe() -> None:
    op, arguments = op_arguments(SCANS[3])
    h, _ = op(*arguments)
    assert h.requires_grad
    with pytest.raises(RuntimeError, match="one shape"):
        OPS.min_gru(torch.ones(1, 2, 3), torch.ones(1, 2, 4), None, None, False, False)
    with pytest.raises(RuntimeError, match="state of shape"):
        x = torch.ones(1, 2, 3)
        OPS.min_gru(x, x, torch.ones(2, 3), None, False, False)
    # Any cu_seqlens stays in bounds.
    x = torch.ones(1, 8, 3)
    for ends in ([0, 100], [-5, 3, 2, 50], [4, 8]):
        h, last = OPS.linear_scan(x, x, None, torch.tensor(ends), False)
        assert h.shape == x.shape and last.shape == (len(ends) - 1, 3)


@scans
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile(scan: Scan, dynamic: bool) -> None:
    torch._dynamo.reset()

    def function(*x: Tensor) -> tuple[Tensor, ...]:
        h, last = scan(*(v * 1.0 for v in x), return_state=True)
        return h * 2, last

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic)
    for batch, time in ((2, 7), (3, 11)) if dynamic else ((2, 7),):
        inputs = [x.requires_grad_() for x in scan.inputs(batch, time, 5, torch.float32)]
        h0 = torch.randn(batch, 5, requires_grad=True)
        results = []
        for call in (function, compiled):
            h, last = call(*inputs, h0)
            grads = torch.autograd.grad(h.square().sum() + last.sum(), [*inputs, h0])
            results.append([h, last, *grads])
        torch.testing.assert_close(*results)


def test_compile_with_packed_sequences_and_reverse() -> None:
    x, ends = torch.randn(2, 1, 9, 5), torch.tensor([0, 4, 4, 9], dtype=torch.int32)

    def function(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
        return ms.min_gru(a, b, cu_seqlens=ends, reverse=True)

    got = torch.compile(function, fullgraph=True)(*x, ends)
    torch.testing.assert_close(got, function(*x, ends))


@scans
def test_export(scan: Scan) -> None:
    class Module(torch.nn.Module):
        def forward(self, *x: Tensor) -> Tensor:
            return scan(*x)

    inputs = scan.inputs(2, 6, 5, torch.float32)
    time = torch.export.Dim("time", min=2, max=100)
    program = torch.export.export(
        Module(), tuple(inputs), dynamic_shapes=(tuple({1: time} for _ in inputs),)
    )
    longer = scan.inputs(2, 30, 5, torch.float32)
    torch.testing.assert_close(program.module()(*longer), scan(*longer))


def test_autocast_promotes_inputs_and_leaves_h0() -> None:
    gate, candidate = torch.randn(1, 5, 4).bfloat16(), torch.randn(1, 5, 4)
    h0 = torch.randn(1, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ms.min_gru(gate, gate, h0).dtype == torch.bfloat16
        assert ms.min_gru(candidate, candidate, h0).dtype == torch.float32
        mixed = ms.min_gru(gate, candidate, h0.bfloat16())
    torch.testing.assert_close(mixed, ms.min_gru(gate.float(), candidate, h0.bfloat16().float()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        gates = torch.nn.Linear(4, 8)(candidate)
        h, last = ms.min_gru_joint(gates, h0, return_state=True)
    assert h.dtype == torch.bfloat16 and last.dtype == torch.float32


def test_meta_and_fake_tensors() -> None:
    x = torch.empty(2, 5, 3, device="meta", dtype=torch.bfloat16)
    h, last = ms.min_gru(x, x, return_state=True)
    assert h.shape == (2, 5, 3) and h.dtype == torch.bfloat16 and last.dtype == torch.float32
    assert h.device.type == "meta"


@scans
def test_only_what_backward_needs_is_kept(scan: Scan) -> None:
    kept: list[Tensor] = []
    inputs = [x.requires_grad_() for x in scan.inputs(2, 6, 3, torch.float32)]
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        h = scan(*inputs)
    pointers = {x.data_ptr() for x in kept}
    allowed = {x.data_ptr() for x in inputs} | {h.data_ptr()}
    assert pointers <= allowed
    if scan.name in ("linear_scan", "decay_scan"):
        assert inputs[1].data_ptr() not in pointers


def test_gradients_of_a_part_of_the_inputs() -> None:
    gate, candidate = torch.randn(2, 1, 6, 3)
    h0 = torch.randn(1, 3, requires_grad=True)
    (only_h0,) = torch.autograd.grad(ms.min_gru(gate, candidate, h0).sum(), h0)
    a = torch.sigmoid(-gate.double()).cumprod(1).sum(1)
    assert norm_error(only_h0, a) < 1e-6
    _, last = ms.min_gru(gate, candidate, h0, return_state=True)
    (from_last,) = torch.autograd.grad(last.sum(), h0)
    assert norm_error(from_last, torch.sigmoid(-gate.double()).prod(1)) < 1e-6


def test_modules_that_use_ops_can_be_copied() -> None:
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.projection = torch.nn.Linear(3, 6)

        def forward(self, x: Tensor) -> Tensor:
            return ms.min_gru_joint(self.projection(x))

    layer = Layer()
    x = torch.randn(1, 4, 3)
    torch.testing.assert_close(copy.deepcopy(layer)(x), layer(x))


def in_place_calls() -> dict[str, tuple[object, ...]]:
    """Every op that changes a state, with the arguments of a direct call."""
    state = ms.MultiState(ms.Policy.h2o(6, scope="head"), batch=2, kv_heads=2, head_dim=16)
    for _ in range(9):
        ms.attend_evict(torch.randn(2, 4, 16), *torch.randn(2, 2, 2, 16), state)
    kept, numbers = tuple(state._tensors()), state.policy._numbers
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
    addresses = [t.data_ptr() for t in one._tensors()]
    compiled = torch.compile(prefill, fullgraph=True)(x, one, valid)
    torch.testing.assert_close(compiled, prefill(x, other, valid))
    fast = torch.compile(step, fullgraph=True)
    for _ in range(10):
        x = torch.randn(2, 2, 16)
        got, expected = fast(x, one), step(x, other)
        torch.testing.assert_close(got[0], expected[0])
        assert torch.equal(got[1], expected[1])
    assert addresses == [t.data_ptr() for t in one._tensors()]
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
        state.to("cpu"),
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
    for word in ("attention", "slots=3", "kept [3, 3] of 3", "seen [5, 5]", "bfloat16", "cpu"):
        assert word in repr(half)
    on_meta = ms.MultiState(ms.Policy.tova(3), batch=2, kv_heads=4, head_dim=16, device="meta")
    assert "meta" in repr(on_meta) and state.to("meta").keys.device.type == "meta"
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
