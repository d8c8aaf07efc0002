"""The layers: against the equations in float64, and in the places of torch.nn.GRU and LSTM."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
from scans import norm_error
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_sequence

import msrnn_ops as ms
from msrnn_ops.reference import accumulation_dtype

CELLS = {"MinGRU": ms.nn.MinGRU, "MinLSTM": ms.nn.MinLSTM}
PEERS = {"MinGRU": nn.GRU, "MinLSTM": nn.LSTM}
cells = pytest.mark.parametrize("cell", list(CELLS))


def state(h: Any) -> Tensor:
    """The state that a layer returned, minLSTM's twice the same."""
    if isinstance(h, tuple):
        assert torch.equal(h[0], h[1])
        assert h[0].numel() == 0 or h[0].data_ptr() != h[1].data_ptr()  # for in-place changes
        return h[0]
    return h


def phi(x: Tensor, activation: str) -> Tensor:
    return x if activation == "identity" else torch.where(x >= 0, x + 0.5, torch.sigmoid(x))


def one_direction(layer: Any, suffix: str, x: Tensor, h: Tensor, reverse: bool) -> Any:
    """x (B, T, F) and h (B, H) in float64, step by step."""
    weight = getattr(layer, f"weight_ih_{suffix}").double()
    p = x @ weight.T
    if layer.bias:
        p = p + getattr(layer, f"bias_ih_{suffix}").double()
    outputs = []
    for t in reversed(range(x.shape[1])) if reverse else range(x.shape[1]):
        if isinstance(layer, ms.nn.MinGRU):
            gate, candidate = p[:, t].chunk(2, -1)
            z = torch.sigmoid(gate)
            keep = 1 - z
        else:
            forget, new, candidate = p[:, t].chunk(3, -1)
            f, i = torch.sigmoid(forget), torch.sigmoid(new)
            keep, z = f / (f + i), i / (f + i)
        h = keep * h + z * phi(candidate, layer.activation)
        outputs.append(h)
    return torch.stack(outputs[::-1] if reverse else outputs, 1), h


def oracle(layer: Any, x: Tensor, h0: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """All layers in float64 over x (B, T, F), without dropout."""
    x, last = x.double(), []
    for i in range(layer.num_layers):
        outputs = []
        for suffix, reverse in (("", False), ("_reverse", True))[: 1 + layer.bidirectional]:
            k = len(last)
            h = x.new_zeros(x.shape[0], layer.hidden_size) if h0 is None else h0[k].double()
            output, h = one_direction(layer, f"l{i}{suffix}", x, h, reverse)
            outputs.append(output)
            last.append(h)
        x = torch.cat(outputs, -1)
    return x, torch.stack(last)


@cells
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one_way", "two_ways"])
@pytest.mark.parametrize("activation", ["g", "identity"])
@pytest.mark.parametrize("layers", [1, 3])
def test_values_and_gradients(cell: str, bidirectional: bool, activation: str, layers: int) -> None:
    layer = CELLS[cell](
        5, 7, layers, bidirectional=bidirectional, batch_first=True, activation=activation
    )
    x = torch.randn(3, 11, 5, requires_grad=True)
    h0 = torch.randn(layers * (1 + bidirectional), 3, 7, requires_grad=True)
    wanted = (x, h0, *layer.parameters())
    weights = torch.randn(3, 11, 7 * (1 + bidirectional)), torch.randn_like(h0)

    def both(output: Tensor, last: Tensor) -> tuple[Tensor, ...]:
        total = (output * weights[0]).sum() + (last * weights[1]).sum()
        return output, last, *torch.autograd.grad(total, wanted)

    output, last = layer(x, h0)
    found = both(output, state(last))
    exact = both(*oracle(layer, x, h0))
    for mine, truth in zip(found, exact, strict=True):
        assert norm_error(mine, truth.double()) < 1e-6


@cells
@pytest.mark.parametrize("batch_first", [False, True], ids=["time_major", "batch_first"])
@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
def test_layouts(cell: str, batch_first: bool, bias: bool) -> None:
    layer = CELLS[cell](4, 6, 2, bias, batch_first)
    x, h0 = torch.randn(3, 9, 4), torch.randn(2, 3, 6)
    exact, exact_last = oracle(layer, x, h0)
    output, last = layer(x if batch_first else x.transpose(0, 1), h0)
    assert output.is_contiguous()
    assert norm_error(output if batch_first else output.transpose(0, 1), exact) < 1e-6
    assert norm_error(state(last), exact_last) < 1e-6
    output, last = layer(x[1], h0[:, 1])
    assert norm_error(output, exact[1]) < 1e-6
    assert norm_error(state(last), exact_last[:, 1]) < 1e-6


@cells
@pytest.mark.parametrize("order", ["sorted", "any"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one_way", "two_ways"])
def test_a_packed_sequence_is_its_rows_alone(cell: str, order: str, bidirectional: bool) -> None:
    lengths = [9, 7, 7, 2, 1] if order == "sorted" else [2, 9, 1, 7, 7]
    rows = [torch.randn(n, 4, requires_grad=True) for n in lengths]
    layer = CELLS[cell](4, 6, 2, bidirectional=bidirectional)
    h0 = torch.randn(2 * (1 + bidirectional), 5, 6, requires_grad=True)
    packed = pack_sequence(rows, enforce_sorted=order == "sorted")
    with torch.inference_mode():  # leaves nothing behind that a backward pass cannot use
        layer(packed.to(torch.float32))
    output, last = layer(packed, h0)
    assert isinstance(output, PackedSequence)
    assert torch.equal(output.batch_sizes, packed.batch_sizes)
    padded, found_lengths = nn.utils.rnn.pad_packed_sequence(output)
    assert found_lengths.tolist() == lengths
    wanted = (*rows, h0, *layer.parameters())
    found = torch.autograd.grad(padded.square().sum() + state(last).sum(), wanted)
    total = torch.zeros((), dtype=torch.float64)
    for i, row in enumerate(rows):
        alone, alone_last = oracle(layer, row[None], h0[:, i : i + 1])
        assert norm_error(padded[: lengths[i], i], alone[0]) < 1e-6
        assert norm_error(state(last)[:, i], alone_last[:, 0]) < 1e-6
        total = total + alone.square().sum() + alone_last.sum()
    for mine, truth in zip(found, torch.autograd.grad(total, wanted), strict=True):
        assert norm_error(mine, truth.double()) < 1e-6


def test_packing_under_export_leaves_nothing_behind() -> None:
    """Index tensors of fake ones must not reach later calls."""
    sizes, data = torch.tensor([3, 2, 1]), torch.randn(6, 4)

    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = ms.nn.MinGRU(4, 6)

        def forward(self, data: Tensor) -> Tensor:
            return self.rnn(PackedSequence(data, sizes))[0].data

    module = Packed()
    expected = module(data)
    program = torch.export.export(module, (data,))
    torch.testing.assert_close(program.module()(data), expected)
    assert type(module(data)) is Tensor


def script(kind: Any, options: dict[str, Any], packed: bool) -> list[Any]:
    """What people write around nn.GRU and nn.LSTM: facts about what comes out of it."""
    torch.manual_seed(0)
    rnn = kind(5, 8, **options).train()
    rnn.flatten_parameters()
    for name, parameter in rnn.named_parameters():
        if "weight" in name:
            nn.init.orthogonal_(parameter)
        elif "bias" in name:
            nn.init.zeros_(parameter)
    directions = 2 if rnn.bidirectional else 1
    first, second = (4, 6) if rnn.batch_first else (6, 4)
    x = torch.randn(first, second, 5, dtype=options.get("dtype"), requires_grad=True)
    h0 = x.new_zeros(rnn.num_layers * directions, 4, rnn.hidden_size)
    pair = "LSTM" in kind.__name__
    given: Any = x
    if packed:
        given = pack_padded_sequence(
            x, torch.tensor([3, 6, 1, 2]), batch_first=rnn.batch_first, enforce_sorted=False
        )
    output, hidden = rnn(given, (h0, h0.clone()) if pair else h0)
    output, hidden = rnn(given, hidden)
    facts: list[Any] = [type(output), type(hidden)]
    tensors = [output.data, *(hidden if pair else [hidden])]
    if not packed and not rnn.batch_first:
        tensors.append(output.view(-1, rnn.hidden_size * directions))
    facts += [(y.shape, y.dtype, y.device, y.requires_grad) for y in tensors]
    sum(y.sum() for y in tensors).backward()
    facts += [x.grad.shape, all(p.grad is not None for p in rnn.parameters())]
    copied = copy.deepcopy(rnn.eval())
    copied.load_state_dict(rnn.state_dict())
    facts.append(torch.equal(copied(given)[0].data, rnn(given)[0].data))
    return facts


@cells
@pytest.mark.parametrize("packed", [False, True], ids=["tensor", "packed"])
@pytest.mark.parametrize("batch_first", [False, True], ids=["time_major", "batch_first"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one_way", "two_ways"])
def test_swapping_one_word(cell: str, packed: bool, batch_first: bool, bidirectional: bool) -> None:
    options: dict[str, Any] = dict(
        num_layers=3, bias=True, batch_first=batch_first, dropout=0.25,
        bidirectional=bidirectional, device="cpu", dtype=torch.float64,
    )  # fmt: skip
    expected, found = (script(k, options, packed) for k in (PEERS[cell], CELLS[cell]))
    assert found == expected
    positional = CELLS[cell](5, 8, 3, False, batch_first, 0.0, bidirectional)
    assert not list(p for name, p in positional.named_parameters() if "bias" in name)


@cells
def test_steps_equal_the_sequence(cell: str) -> None:
    layer = CELLS[cell](4, 6, 2)
    x = torch.randn(9, 3, 4)
    output, last = layer(x)
    h = None
    for t in range(9):
        y, h = layer.step(x[t], h)
        torch.testing.assert_close(y, output[t], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(state(h), state(last), atol=1e-6, rtol=1e-5)
    y, h = layer.step(x[0, 1], state(last)[:, 1])
    expected, h_expected = layer.step(x[0], last)
    torch.testing.assert_close(y, expected[1])
    torch.testing.assert_close(state(h), state(h_expected)[:, 1])


@cells
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_step_without_gradients_takes_a_short_way(
    cell: str, layers: int, dtype: torch.dtype
) -> None:
    """The same bits, in memory of its own, and the same words where it is wrong."""
    layer = CELLS[cell](4, 6, layers, dtype=dtype).eval()
    x, wide = torch.randn(3, 4, dtype=dtype), accumulation_dtype(dtype)
    for h in (torch.rand(layers, 3, 6, dtype=wide), torch.rand(layers, 3, 6, dtype=dtype), None):
        y, last = layer.step(x, h)
        with torch.no_grad():
            again, h_again = layer.step(x, h)
            assert torch.equal(again, y) and torch.equal(state(h_again), state(last))
            assert state(h_again).dtype == state(last).dtype
            assert again.data_ptr() != state(h_again)[-1].data_ptr()
            if h is not None:
                negated, _ = layer.step(x, torch._neg_view(-h))
                assert torch.equal(negated, y)
    wrong = [
        (x[0, 0], h),
        (x[:, :3], h),
        (x.long(), h),
        (x.to_sparse(), h),
        (x, torch.zeros(layers + 1, 3, 6, dtype=wide)),
        (x, torch.zeros(layers, 2, 6, dtype=wide)),
        (x, torch.zeros(layers, 3, 6, dtype=torch.int32)),
        (x, 1.0),
    ]
    for arguments in wrong:
        found = []
        for recorded in (True, False):
            with torch.set_grad_enabled(recorded), pytest.raises(Exception) as caught:
                layer.step(*arguments)
            found.append((type(caught.value), str(caught.value)))
        assert found[0] == found[1]


@cells
@pytest.mark.parametrize("layers", [1, 2])
def test_results_may_be_changed_in_place(cell: str, layers: int) -> None:
    """As those of nn.GRU: no views, and nothing that backward reads."""
    layer, weight = CELLS[cell](4, 6, layers), torch.rand(6, requires_grad=True)
    x, h = torch.randn(3, 4), torch.rand(layers, 3, 6)
    expected = torch.autograd.grad(layer.step(x, h)[0].relu().sum(), layer.weight_ih_l0)[0]
    y, _ = layer.step(x, h)
    assert torch.equal(torch.autograd.grad(y.relu_().sum(), layer.weight_ih_l0)[0], expected)
    for recorded in (True, False):
        with torch.set_grad_enabled(recorded):
            y, last = layer.step(x, h)
            _, h_n = layer(x[None], h)
        for result in (y, state(last), state(h_n)):
            assert not result._is_view()
            result.detach_().mul_(weight).sum().backward()


def test_a_step_with_weights_that_are_nowhere() -> None:
    layer = ms.nn.MinGRU(4, 6, bias=False, device="meta")
    with torch.no_grad(), pytest.raises(ValueError, match="input on the device of its weights"):
        layer.step(torch.rand(3, 4), torch.rand(1, 3, 6))


@cells
def test_a_float32_state_carries_bfloat16_on_without_rounding(cell: str) -> None:
    layer = CELLS[cell](4, 6, 1, dtype=torch.bfloat16)
    x = torch.randn(10, 3, 4, dtype=torch.bfloat16)
    whole, last = layer(x, torch.zeros(1, 3, 6))
    assert whole.dtype == torch.bfloat16 and state(last).dtype == torch.float32
    first, h = layer(x[:4], torch.zeros(1, 3, 6))
    second, h = layer(x[4:], h)
    rounded = state(last).bfloat16().float()
    assert not torch.equal(state(last), rounded)
    # As near as matrix products of other sizes round their bfloat16 results.
    assert norm_error(torch.cat([first, second]), whole.double()) < 4e-3
    assert norm_error(state(h), state(last).double()) < 4e-3
    assert state(layer(x)[1]).dtype == torch.bfloat16
    y, h = layer.step(x[0], torch.zeros(1, 3, 6))
    assert y.dtype == torch.bfloat16 and state(h).dtype == torch.float32


@cells
def test_dropout_is_between_layers(cell: str) -> None:
    layer = CELLS[cell](4, 6, 2, dropout=1.0)
    x = torch.randn(5, 3, 4)
    second = CELLS[cell](6, 6)
    names = {"weight_ih_l0": layer.weight_ih_l1, "bias_ih_l0": layer.bias_ih_l1}
    second.load_state_dict(names)
    torch.testing.assert_close(layer(x)[0], second(torch.zeros(5, 3, 6))[0])
    torch.testing.assert_close(layer.step(x[0])[0], second.step(torch.zeros(3, 6))[0])
    assert (
        norm_error(layer.eval()(x)[0].transpose(0, 1), oracle(layer, x.transpose(0, 1))[0]) < 1e-6
    )


@cells
def test_nothing_to_run_over(cell: str) -> None:
    layer = CELLS[cell](4, 6, 2)
    h0 = torch.randn(2, 3, 6)
    output, last = layer(torch.randn(0, 3, 4), h0)
    assert output.shape == (0, 3, 6) and torch.equal(state(last), h0)
    output, last = layer(torch.randn(5, 0, 4))
    assert output.shape == (5, 0, 6) and state(last).shape == (2, 0, 6)


def test_forget_bias() -> None:
    torch.manual_seed(0)
    gru, lstm = ms.nn.MinGRU(64, 256, forget_bias=3.0), ms.nn.MinLSTM(64, 256, forget_bias=3.0)
    assert (gru.bias_ih_l0[:256] + 3).abs().max() <= 1 / 8
    assert (lstm.bias_ih_l0[:256] - 3).abs().max() <= 1 / 8
    for layer, kept_at_least in ((gru, 0.93), (lstm, 0.63)):  # without it 0.5
        assert layer.bias_ih_l0[256:].abs().max() <= 1 / 8
        h0 = torch.ones(1, 1, 256)
        kept = state(layer(torch.zeros(1, 1, 64), h0)[1]) - state(layer(torch.zeros(1, 1, 64))[1])
        assert kept.mean() > kept_at_least


@cells
def test_compile_export_autocast_and_copies(cell: str) -> None:
    layer = CELLS[cell](4, 6, 2, batch_first=True, bidirectional=True)
    x, h0 = torch.randn(3, 9, 4, requires_grad=True), torch.randn(4, 3, 6)
    output, last = layer(x, h0)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, h0), (output, last))
    grad = torch.autograd.grad(output.square().sum(), x)
    torch.testing.assert_close(torch.autograd.grad(compiled(x, h0)[0].square().sum(), x), grad)
    length = torch.export.Dim("length", min=2, max=64)
    program = torch.export.export(layer, (x.detach(),), dynamic_shapes={"input": {1: length}})
    longer = torch.randn(3, 17, 4)
    torch.testing.assert_close(program.module()(longer)[0], layer(longer)[0])
    with torch.autocast("cpu", torch.bfloat16):
        half, half_last = layer(x, h0)
    assert half.dtype == torch.bfloat16 and state(half_last).dtype == torch.float32
    assert norm_error(half, output.detach().double()) < 0.02
    saved = io.BytesIO()
    torch.save(layer, saved)
    saved.seek(0)
    for other in (
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(saved, weights_only=False),
    ):
        assert torch.equal(other(x, h0)[0], output)
    assert "bidirectional=True" in repr(layer)


def heinsen(log_a: Tensor, log_b: Tensor) -> Tensor:
    total = log_a.cumsum(1)
    return (total + (log_b - total).logcumsumexp(1)).exp()


@cells
@pytest.mark.parametrize("widened", [False, True], ids=["plain", "widened"])
def test_weights_of_mingru_pytorch(cell: str, widened: bool) -> None:
    """Their forward pass, in float64: candidate first, two cumulative sums in log-space."""
    inner = 9 if widened else 6
    name = "to_hidden_and_gate" if cell == "MinGRU" else "to_hidden_and_f_i_gate"
    parts = 2 if cell == "MinGRU" else 3
    weights = {f"net.3.{name}.weight": torch.randn(parts * inner, 6, dtype=torch.float64)}
    if widened:
        weights["net.3.to_out.weight"] = torch.randn(6, inner, dtype=torch.float64)
    x = torch.randn(2, 8, 6, dtype=torch.float64)
    softplus = nn.functional.softplus
    candidate, *gates = (x @ weights[f"net.3.{name}.weight"].T).chunk(parts, -1)
    if cell == "MinGRU":
        log_a, log_z = -softplus(gates[0]), -softplus(-gates[0])
    else:
        difference = softplus(-gates[0]) - softplus(-gates[1])
        log_a, log_z = -softplus(difference), -softplus(-difference)
    expected = heinsen(log_a, log_z + phi(candidate, "g").log())
    if widened:
        expected = expected @ weights["net.3.to_out.weight"].T
    layer, out = ms.nn.load_mingru_pytorch(weights, "net.3.")
    assert type(layer) is CELLS[cell]
    torch.testing.assert_close(out(layer(x)[0]), expected)
    with pytest.raises(ValueError, match=r"expected one of net\.to_hidden"):
        ms.nn.load_mingru_pytorch(weights, "net.")
    with pytest.raises(ValueError, match=r"no biases, got net\.3\.to_out\.bias"):
        ms.nn.load_mingru_pytorch(weights | {"net.3.to_out.bias": torch.randn(6)}, "net.3.")
    weights["net.3.to_out.weight"] = torch.randn(6, inner + 1)
    with pytest.raises(ValueError, match=r"to_out.weight of shape \(D, "):
        ms.nn.load_mingru_pytorch(weights, "net.3.")
    weights[f"net.3.{name}.weight"] = torch.randn(parts * inner + 1, 6)
    with pytest.raises(ValueError, match=r"H, D\), got"):
        ms.nn.load_mingru_pytorch(weights, "net.3.")


BLOCKS: dict[str, dict[str, Any]] = {
    "gru": {},
    "lstm": {"cell": "lstm", "expansion": 1.5},
    "bare": {"conv": 0, "mlp": 0},
    "pointwise_conv": {"conv": 1},
}
blocks = pytest.mark.parametrize("options", BLOCKS.values(), ids=list(BLOCKS))


@blocks
def test_block_against_its_equation(options: dict[str, Any]) -> None:
    block = ms.nn.MinRNNBlock(8, **options).double()
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    y = nn.functional.rms_norm(x, (8,), block.norm.weight)
    if block.conv is not None:
        steps, taps = block.conv.weight.shape[2], block.conv.weight[:, 0]
        y = block.conv.bias + sum(
            nn.functional.pad(y, (0, 0, k, 0))[:, :9] * taps[:, steps - 1 - k] for k in range(steps)
        )
    expected = x + block.out(oracle(block.rnn, y)[0])
    if block.mlp is not None:
        expected = expected + block.mlp(expected)
    torch.testing.assert_close(block(x), expected)


@blocks
def test_block_in_parts_and_steps(options: dict[str, Any]) -> None:
    block = ms.nn.MinRNNBlock(8, **options)
    x = torch.randn(2, 9, 8, requires_grad=True)
    whole = block(x)
    first, carried = block(x[:, :2], return_state=True)
    second, carried = block(x[:, 2:6], carried, return_state=True)
    steps = []
    for t in range(6, 9):
        y, carried = block.step(x[:, t], carried)
        steps.append(y)
    parts = torch.cat([first, second, torch.stack(steps, 1)], 1)
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-5)
    grads = [torch.autograd.grad(y.square().sum(), x)[0] for y in (parts, whole)]
    torch.testing.assert_close(*grads, atol=1e-4, rtol=1e-4)
    y, carried = block.step(x[:, 0])
    torch.testing.assert_close(y, whole[:, 0], atol=1e-5, rtol=1e-5)
    half = copy.deepcopy(block).bfloat16()
    assert half(x.bfloat16(), return_state=True)[1].h.dtype == torch.float32
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), whole)


def test_block_states_are_small_and_checked() -> None:
    block = ms.nn.MinRNNBlock(8)
    _, carried = block(torch.randn(1, 500, 8), return_state=True)
    assert carried.inputs.untyped_storage().nbytes() == 3 * 8 * 4
    y, after = block(torch.randn(1, 0, 8), carried, return_state=True)
    assert y.shape == (1, 0, 8)
    assert torch.equal(after.inputs, carried.inputs) and torch.equal(after.h, carried.h)
    other = ms.nn.MinRNNBlock(8, conv=2)
    with pytest.raises(ValueError, match=r"shapes \(1, 8\) and \(1, 1, 8\), got .* \(1, 3, 8\)"):
        other(torch.randn(1, 4, 8), carried)
    with pytest.raises(TypeError, match="expected state to be a BlockState, got tuple"):
        block(torch.randn(1, 4, 8), tuple(carried))
    with pytest.raises(ValueError, match=r"x of shape \(B, 8\), got \(8,\)"):
        block.step(torch.randn(8))
    with pytest.raises(TypeError, match="width to be an int"):
        ms.nn.MinRNNBlock(8.0)


# What layers and blocks have in common.
OPTIONS: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (ValueError, r"dropout in \[0, 1\], got -0.5", {"dropout": -0.5}),
    (TypeError, "dropout to be a number, got True", {"dropout": True}),
    (TypeError, "forget_bias to be a number, got True", {"forget_bias": True}),
    (TypeError, "forget_bias to be a number, got None", {"forget_bias": None}),
    (TypeError, "forget_bias to be a number, got 'x'", {"forget_bias": "x"}),
    (ValueError, "forget_bias to be finite, got nan", {"forget_bias": float("nan")}),
    (ValueError, "forget_bias to be finite, got inf", {"forget_bias": float("inf")}),
    (ValueError, "activation 'g' or 'identity', got None", {"activation": None}),
    *(
        (TypeError, f"dtype to be float32, .* or float16, got {dtype!r}", {"dtype": dtype})
        for dtype in (torch.complex64, torch.int8, torch.float8_e4m3fn, "float32")
    ),
]


@cells
def test_errors(cell: str) -> None:
    kind = CELLS[cell]
    wrong: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (ValueError, "hidden_size >= 1, got 0", {"hidden_size": 0}),
        (TypeError, "input_size to be an int, got 2.5", {"input_size": 2.5}),
        (ValueError, "num_layers >= 1", {"num_layers": 0}),
        (ValueError, r"dropout in \[0, 1\], got 2", {"dropout": 2}),
        (TypeError, "dropout to be a number", {"dropout": "0.1"}),
        (ValueError, "proj_size=0", {"proj_size": 3}),
        (ValueError, "'g' or 'identity', got 'tanh'", {"activation": "tanh"}),
        (TypeError, "bias to be a bool, got str", {"bias": "no"}),
        (TypeError, "batch_first to be a bool, got str", {"batch_first": "false"}),
        (TypeError, "bidirectional to be a bool, got int", {"bidirectional": 1}),
        (TypeError, "learnable_h0 to be a bool, got str", {"learnable_h0": "no"}),
        (ValueError, "bias=True with forget_bias", {"bias": False, "forget_bias": 1.0}),
        *OPTIONS,
    ]
    for error, words, options in wrong:
        with pytest.raises(error, match=f"{cell}: .*{words}"):
            kind(**{"input_size": 4, "hidden_size": 6} | options)
    with pytest.warns(UserWarning, match="acts between layers"):
        kind(4, 6, dropout=0.5)
    layer = kind(4, 6)
    with pytest.raises(RuntimeError, match=r"with 4 features, got \(5, 3, 7\)"):
        layer(torch.randn(5, 3, 7))
    with pytest.raises(ValueError, match=r"got \(5, 3, 2, 4\)"):
        layer(torch.randn(5, 3, 2, 4))
    with pytest.raises(TypeError, match=f"{cell}: expected input to be a tensor, got list"):
        layer([1.0])
    with pytest.raises(RuntimeError, match=r"hx of shape \(1, 3, 6\), got \(1, 5, 6\)"):
        layer(torch.randn(5, 3, 4), torch.randn(1, 5, 6))
    with pytest.raises(RuntimeError, match=r"hx of shape \(1, 6\), got \(1, 3, 6\)"):
        layer(torch.randn(5, 4), torch.randn(1, 3, 6))
    with pytest.raises(RuntimeError, match=r"hx of shape \(1, 2, 6\)"):
        layer(pack_sequence([torch.randn(3, 4)] * 2), torch.randn(1, 3, 6))
    with pytest.raises(TypeError, match="hx to be a tensor"):
        layer(torch.randn(5, 3, 4), 1.0)
    with pytest.raises(ValueError, match=r"input of shape \(B, F\)"):
        layer.step(torch.randn(5, 3, 4))
    with pytest.raises(ValueError, match="one direction for step"):
        kind(4, 6, bidirectional=True).step(torch.randn(3, 4))


def test_errors_of_pairs_and_blocks() -> None:
    layer, h = ms.nn.MinLSTM(4, 6), torch.zeros(1, 3, 6)
    with pytest.raises(ValueError, match=r"in one shape, got \(1, 3, 6\) and \(1, 3, 5\)"):
        layer(torch.randn(5, 3, 4), (h, h[..., :5]))
    for pair, got in [((h, h, h), "tuple of Tensor, Tensor, Tensor"), ([h], "list of Tensor")]:
        with pytest.raises(TypeError, match=f"a tensor or a pair of tensors, got a {got}$"):
            layer(torch.randn(5, 3, 4), pair)
    with pytest.raises(TypeError, match=r"got a tuple of NoneType, NoneType$"):
        layer(torch.randn(5, 3, 4), (None, None))
    wrong: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (ValueError, "cell 'gru' or 'lstm', got 'rnn'", {"cell": "rnn"}),
        (ValueError, r"cell 'gru' or 'lstm', got \[\]", {"cell": []}),
        (ValueError, "conv >= 0, got -1", {"conv": -1}),
        (TypeError, "conv to be an int, got 2.5", {"conv": 2.5}),
        (TypeError, "conv to be an int, got True", {"conv": True}),
        (TypeError, "mlp to be a number, got True", {"mlp": True}),
        (ValueError, "mlp to be finite, got nan", {"mlp": float("nan")}),
        (ValueError, "mlp >= 0, got -1", {"mlp": -1}),
        (TypeError, "expansion to be a number, got '2'", {"expansion": "2"}),
        (TypeError, "expansion to be a number, got True", {"expansion": True}),
        (ValueError, "expansion to be finite, got inf", {"expansion": float("inf")}),
        (ValueError, "expansion >= 0, got -1", {"expansion": -1}),
        (ValueError, "expansion that leaves a channel, .*, got 0.0", {"expansion": 0.0}),
        (ValueError, r"dropout in \[0, 1\], got 2", {"dropout": 2}),
        (ValueError, "activation 'g' or 'identity', got 'tanh'", {"activation": "tanh"}),
        *OPTIONS,
    ]
    for error, words, options in wrong:
        with pytest.raises(error, match=f"MinRNNBlock: expected {words}"):
            ms.nn.MinRNNBlock(8, **options)
    with pytest.raises(ValueError, match=r"x of shape \(B, T, 8\), got \(2, 8\)"):
        ms.nn.MinRNNBlock(8)(torch.randn(2, 8))


def test_a_padded_batch_is_what_packing_is_for() -> None:
    """Right-padded rows: states before the padding are right, h_n is not; packed, both are."""
    rows = [torch.randn(n, 4) for n in (3, 6)]
    layer = ms.nn.MinGRU(4, 6, batch_first=True)
    output, _ = layer(pad_sequence(rows, batch_first=True))
    packed, last = layer(pack_sequence(rows, enforce_sorted=False))
    padded, _ = nn.utils.rnn.pad_packed_sequence(packed, batch_first=True)
    torch.testing.assert_close(padded[0, :3], output[0, :3])
    torch.testing.assert_close(last[0, 0], output[0, 2])


def test_a_trace_takes_a_state_of_another_dtype() -> None:
    x, h0 = torch.randn(1, 4, 3), torch.randn(1, 3)
    with torch.no_grad():
        traced = torch.jit.trace(lambda a, h: ms.linear_scan(a, a, h), (x, h0), check_trace=False)
        assert torch.equal(traced(x, h0.bfloat16()), ms.linear_scan(x, x, h0.bfloat16().float()))
        step = torch.jit.trace(ms.min_gru_step, (x[:, 0], x[:, 0], h0), check_trace=False)
        assert step(x[:, 0], x[:, 0], h0.double()).dtype == torch.float32


def test_a_subclass_may_have_a_time() -> None:
    class Timed(ms.nn.MinGRU):
        def __init__(self) -> None:
            super().__init__(4, 3)
            self.time = 0.5

    output, _ = Timed()(torch.randn(5, 2, 4))
    assert output.shape == (5, 2, 3)


@pytest.mark.parametrize("cell", CELLS)
def test_the_surface_of_nn_gru(cell: str) -> None:
    """What scripts ask of an nn.GRU or nn.LSTM beside calling it."""
    layer = CELLS[cell](4, 6, 2, bidirectional=True)
    assert layer.mode == cell
    names = {id(parameter): name for name, parameter in layer.named_parameters()}
    assert [[names[id(x)] for x in pair] for pair in layer.all_weights] == [
        [f"weight_ih_{suffix}", f"bias_ih_{suffix}"]
        for suffix in ("l0", "l0_reverse", "l1", "l1_reverse")
    ]
    assert len(CELLS[cell](4, 6, bias=False).all_weights[0]) == 1
    x, h = torch.randn(5, 3, 4), torch.randn(4, 3, 6)
    assert layer.get_expected_hidden_size(x, None) == (4, 3, 6)
    assert layer.get_expected_hidden_size(x[0], torch.tensor([2, 1])) == (4, 2, 6)
    layer.check_input(x, None)
    layer.check_forward_args(x, (h, h) if cell == "MinLSTM" else h, None)
    with pytest.raises(RuntimeError, match=r"hx of shape \(4, 3, 6\), got \(4, 2, 6\)"):
        layer.check_forward_args(x, h[:, :2], None)
    order = torch.tensor([2, 0, 1])
    assert torch.equal(layer.permute_hidden(h, order), h[:, order])
    assert layer.permute_hidden((h, h), order)[1].shape == h.shape
    assert layer.permute_hidden(h, None) is h
    assert not isinstance(layer, nn.RNNBase)  # there are no weight_hh to initialise


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.parametrize("conv", [0, 4])
def test_errors_of_what_a_block_is_given(conv: int) -> None:
    block, x = ms.nn.MinRNNBlock(8, conv=conv), torch.randn(2, 5, 8)
    h, inputs = block(x, return_state=True)[1]
    wrong: list[tuple[type[Exception], str, Any, Any]] = [
        *(
            (ValueError, f"x in torch.float32, the dtype of its weights, got {y.dtype}", y, None)
            for y in (x.double(), x.bfloat16(), x.int())
        ),
        (ValueError, "x on the device of its weights, cpu, got meta", x.to("meta"), None),
        (TypeError, "x to be a strided tensor, got torch.sparse_coo", x.to_sparse(), None),
        (TypeError, "state.h to be a tensor, got NoneType", x, (None, inputs)),
        (TypeError, "state.inputs to be a tensor, got NoneType", x, (h, None)),
        (TypeError, "state.h in torch.float32, got torch.float64", x, (h.double(), inputs)),
        (ValueError, "state.h on the device of x, cpu, got meta", x, (h.to("meta"), inputs)),
        (TypeError, "state.h to be a strided tensor", x, (h.to_sparse(), inputs)),
    ]
    if conv:
        wrong += [
            (
                TypeError,
                "state.inputs in torch.float32, got torch.float64",
                x,
                (h, inputs.double()),
            ),
            (ValueError, "state.inputs on the device of x, cpu", x, (h, inputs.to("meta"))),
            (TypeError, "state.inputs to be a strided tensor", x, (h, inputs.to_sparse())),
        ]
    for error, words, y, state in wrong:
        given = None if state is None else ms.nn.BlockState(*state)
        with pytest.raises(error, match=f"MinRNNBlock: expected {words}"):
            block(y, given)
        with pytest.raises(error, match=f"MinRNNBlock: expected {words}"):
            block.step(y.select(1, 0), given)
    with pytest.raises(TypeError, match="MinRNNBlock: expected return_state to be a bool, got str"):
        block(x, None, "no")
    narrow, words = x[..., :7], r"MinRNNBlock: expected x of shape \((B|rows), 8\), got \(\d+, 7\)"
    with pytest.raises(ValueError, match=words):
        block.step(narrow[:, 0])
    with pytest.raises(ValueError, match=words):
        block(pack_sequence(list(narrow)))
    with pytest.raises(ValueError, match=words):
        block(torch.nested.nested_tensor(list(narrow), layout=torch.jagged))
    with torch.autocast("cpu", torch.bfloat16):
        assert block(x.bfloat16(), ms.nn.BlockState(h, inputs)).shape == x.shape
        for y in (x.int(), x.double()):  # which autocast leaves as they are
            with pytest.raises(ValueError, match=rf"MinRNNBlock: .*float32, .* got {y.dtype}"):
                block(y)
        with pytest.raises(TypeError, match=r"MinRNNBlock: expected state.h in .* got torch.int32"):
            block(x, ms.nn.BlockState(h.int(), inputs))
        if conv:
            with pytest.raises(TypeError, match=r"state.inputs in .* got torch.float64"):
                block(x, ms.nn.BlockState(h, inputs.double()))


@cells
def test_errors_of_sparse_tensors(cell: str) -> None:
    layer, x, h = CELLS[cell](4, 6), torch.randn(5, 3, 4), torch.zeros(1, 3, 6)
    for call, words in [
        (lambda: layer(x.to_sparse()), "input to be a strided tensor, got torch.sparse_coo"),
        (lambda: layer.step(x[0].to_sparse()), "input to be a strided tensor"),
        (lambda: layer(x, h.to_sparse()), "hx to be a strided tensor"),
    ]:
        with pytest.raises(TypeError, match=f"{cell}: expected {words}"):
            call()


@pytest.mark.parametrize("cell", CELLS)
def test_errors_of_dtypes_and_devices_name_the_argument(cell: str) -> None:
    layer, x = CELLS[cell](4, 6), torch.randn(5, 3, 4)
    with pytest.raises(
        ValueError, match=f"{cell}: expected input in torch.float32, .* its weights"
    ):
        layer(x.double())
    with pytest.raises(ValueError, match=f"{cell}: expected input in torch.float32"):
        layer.step(x[0].bfloat16())
    with pytest.raises(TypeError, match=f"{cell}: expected hx in torch.float32, got torch.float64"):
        layer(x, torch.zeros(1, 3, 6, dtype=torch.float64))
    with pytest.raises(ValueError, match="input on the device of its weights, cpu, got meta"):
        layer(x.to("meta"))
    with pytest.raises(ValueError, match="hx on the device of input, cpu, got meta"):
        layer(x, torch.zeros(1, 3, 6, device="meta"))
    with pytest.raises(TypeError, match=r"MinRNNBase.__init__\(\) missing 1 required"):
        CELLS[cell](4)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x)[0].dtype == torch.bfloat16
        for y in (x.int(), x.double()):  # which autocast leaves as they are
            with pytest.raises(ValueError, match=f"{cell}: expected input in torch.float32"):
                layer(y)
        with pytest.raises(TypeError, match=f"{cell}: expected hx in torch.float32, got torch.int"):
            layer(x, torch.zeros(1, 3, 6, dtype=torch.int32))
    layer.double()
    assert layer(x.double(), torch.zeros(1, 3, 6, dtype=torch.float64))[0].dtype == torch.float64


@pytest.mark.parametrize("cell", CELLS)
def test_learnable_states(cell: str) -> None:
    layer = CELLS[cell](4, 6, 2, bidirectional=True, learnable_h0=True)
    suffixes = ("l0", "l0_reverse", "l1", "l1_reverse")
    starts = [getattr(layer, f"h0_{suffix}") for suffix in suffixes]
    assert all(start.shape == (6,) and not start.any() for start in starts)
    for start in starts:
        nn.init.normal_(start)
    x = torch.randn(5, 3, 4)
    hx = torch.stack([start.detach() for start in starts])[:, None].expand(4, 3, 6)
    output, last = layer(x)
    right, right_last = layer(x, hx.contiguous())
    torch.testing.assert_close((output, last), (right, right_last))
    output.sum().backward()
    assert all(start.grad.abs().sum() > 0 for start in starts)
    one = CELLS[cell](4, 6, learnable_h0=True)
    nn.init.normal_(one.h0_l0)
    torch.testing.assert_close(one.step(x[0])[0], one(x[:1])[0][0])
    torch.testing.assert_close(one.step(x[0, 0])[0], one(x[:1, 0])[0][0])
    assert "learnable_h0=True" in repr(one) and "learnable_h0" not in repr(CELLS[cell](4, 6))
    old = CELLS[cell](4, 6)
    del old.__dict__["learnable_h0"]  # as of a layer that was pickled before there were any
    old(x)


def test_a_trace_holds_operators_in_grad_mode_too() -> None:
    layer, x = ms.nn.MinGRU(4, 5), torch.randn(3, 2, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated, and shapes are checked
        traced = torch.jit.trace(layer, x)
        file = io.BytesIO()
        torch.jit.save(traced, file)
        file.seek(0)
        loaded = torch.jit.load(file)
    y = torch.randn(9, 6, 4, requires_grad=True)
    torch.testing.assert_close(loaded(y), layer(y))
    got = torch.autograd.grad(loaded(y)[0].square().sum(), y)
    torch.testing.assert_close(got, torch.autograd.grad(layer(y)[0].square().sum(), y))
