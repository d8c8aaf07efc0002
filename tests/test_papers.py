"""The papers' experiments, at sizes that take seconds."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

for needed in ("click", "rich", "matplotlib", "gymnasium"):
    pytest.importorskip(needed)

import numpy as np  # noqa: E402

from bench.__main__ import command  # noqa: E402
from bench.papers import characters, control, copying, cost  # noqa: E402
from bench.papers.models import MIXERS, SequenceModel, fit, parameters  # noqa: E402
from bench.papers.part import Options, Store  # noqa: E402

pytestmark = pytest.mark.slow

PARTS: tuple[ModuleType, ...] = (cost, copying, characters, control)
COSTS = {"batch": 1, "lengths": (16, 32), "seconds": 1e-3}
STEPS = {"steps": 2, "every": 1}
TINY: dict[ModuleType, dict[str, Any]] = {
    cost: {**COSTS, "width": 32},
    copying: {**STEPS, "length": 16, "width": 8, "batch": 4},
    characters: {**STEPS, "width": 32, "batch": 2, "held_out": 3},
    control: {**STEPS, "episodes": 10, "tested": 2, "width": 32, "batch": 4},
}
FEW: dict[ModuleType, dict[str, Any]] = {  # of the full settings: fewer and shorter, not smaller
    cost: COSTS,
    copying: {"steps": 1, "length": 64, "batch": 1, "seeds": (0, 1), "layers": (1, 3)},
    characters: {"steps": 1, "batch": 1, "held_out": 1},
    control: {"steps": 1, "batch": 1, "episodes": 10, "tested": 1},
}
OPTIONS = Options(False, "cpu", (), None, None)

parts = pytest.mark.parametrize("part", PARTS, ids=lambda part: part.NAME)
kinds = pytest.mark.parametrize("kind", MIXERS)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(copying, "_HELD_OUT", 16)
    monkeypatch.setattr(control, "_ASKED", (0.95,))
    for part in PARTS:
        monkeypatch.setattr(part, "QUICK", replace(part.QUICK, **TINY[part]))
        monkeypatch.setattr(part, "FULL", replace(part.FULL, **FEW[part]))
    yield


def small(kind: str) -> SequenceModel:
    return SequenceModel(kind, nn.Linear(3, 32), 32, 2, 5, conv=4, expansion=2.0)


def test_the_command_writes_every_section(tmp_path: Path) -> None:
    words = ["papers", *(part.NAME for part in PARTS), "--output", str(tmp_path)]
    command.main(words, standalone_mode=False)
    page = (tmp_path / "papers.md").read_text("utf-8")
    for part in PARTS:
        stored = json.loads((tmp_path / f"papers-{part.NAME}.json").read_text("utf-8"))
        section = part.section(stored["result"])
        assert f"\n## {section.title}\n" in page
        assert section.claim and section.found and section.comparable
        for plot in section.plots:
            picture = f"papers-{part.NAME}-{plot.name}.png"
            assert (tmp_path / picture).stat().st_size > 1000 and f"]({picture})" in page
        for table in section.tables:
            assert table.rows and all(len(row) == len(table.columns) for row in table.rows)


@parts
def test_the_full_setting_runs(part: ModuleType, tmp_path: Path) -> None:
    result = part.run(replace(OPTIONS, full=True), Store(tmp_path / "store.json", OPTIONS))
    section = part.section(json.loads(json.dumps(result)))
    assert section.tables and section.plots


@pytest.mark.parametrize(
    ("part", "work", "pieces"),
    [
        (cost, "_measure", 2),
        (copying, "_train", 6),
        (characters, "train", 5),
        (control, "_train", 3),
    ],
    ids=lambda value: getattr(value, "NAME", None),
)
def test_a_run_goes_on_where_it_stopped(
    part: ModuleType, work: str, pieces: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, done = getattr(part, work), []

    def stop_at_second(*args: Any) -> Any:
        if len(done) == 1:
            raise KeyboardInterrupt
        done.append(args[1:3])
        return original(*args)

    def go_on(*args: Any) -> Any:
        done.append(args[1:3])
        return original(*args)

    path = tmp_path / "store.json"
    monkeypatch.setattr(part, work, stop_at_second)
    with pytest.raises(KeyboardInterrupt):
        part.run(OPTIONS, Store(path, OPTIONS))
    monkeypatch.setattr(part, work, go_on)
    result = part.run(OPTIONS, Store(path, OPTIONS))
    assert len(done) == pieces and all(args != done[0] for args in done[1:])
    again = part.run(OPTIONS, Store(path, OPTIONS))
    assert len(done) == pieces and json.dumps(again) == json.dumps(result)


@kinds
def test_no_output_sees_later_inputs(kind: str) -> None:
    model, x, t = small(kind).double(), torch.randn(2, 12, 3).double(), 7
    changed = x.clone()
    changed[:, t:] += 1
    y, z = model(x), model(changed)
    torch.testing.assert_close(y[:, :t], z[:, :t])
    assert (y[:, t:] != z[:, t:]).any(-1).all()


@kinds
def test_every_parameter_has_a_gradient(kind: str) -> None:
    model = small(kind)
    model(torch.randn(2, 12, 3)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


def test_unknown_kind() -> None:
    with pytest.raises(ValueError, match=r"expected a kind of minGRU.*got 'RNN'"):
        SequenceModel("RNN", nn.Identity(), 32, 1, 1)


@pytest.mark.parametrize("setting", [characters.QUICK, characters.FULL], ids=["quick", "full"])
def test_models_of_characters_have_equal_parameters(setting: characters.Setting) -> None:
    sizes = []
    for kind in characters._KINDS:
        with torch.device("meta"):
            width = characters._width(setting, kind, 65)
            sizes.append(parameters(characters._build(setting, kind, 65, width)))
    assert max(sizes) < 1.04 * min(sizes), sizes


@torch.no_grad()
@pytest.mark.parametrize("kind", characters.CELLS)
def test_the_step_form_is_the_parallel_one(kind: str) -> None:
    model = characters._build(characters.QUICK, kind, 7, 32)
    tokens = torch.arange(40) ** 2 % 7
    assert 0 < characters._step_difference(model, tokens) < 1e-4
    written, speed = characters._write(model, tokens)
    assert len(written) == characters._WRITTEN and speed > 0
    assert written == characters._write(model, tokens)[0]


def test_fit_reports_and_stops() -> None:
    weight = nn.Parameter(torch.ones(1))
    model = nn.ParameterList([weight])
    values = iter([0.1, 0.5, 0.9])
    curve = fit(
        model,
        lambda: weight.square().sum(),
        lambda: next(values),
        steps=100,
        rate=0.1,
        every=4,
        label="",
        solved=lambda value: value > 0.8,
    )
    assert [(point["step"], point["value"]) for point in curve] == [(4, 0.1), (8, 0.5), (12, 0.9)]
    assert 1 > curve[0]["loss"] > curve[1]["loss"] > curve[2]["loss"]


def test_what_is_to_be_copied_stands_in_order() -> None:
    setting = copying.FULL
    x, tokens = copying.draw(setting, 8, torch.Generator().manual_seed(0))
    assert x.shape == (8, setting.length + setting.remembered)
    for row, wanted in zip(x, tokens, strict=True):
        assert row[row > 1].tolist() == wanted.tolist()
        assert (row[-setting.remembered :] == 1).all() and (row == 1).sum() == setting.remembered


def test_the_script_of_each_environment_beats_its_errors() -> None:
    for environment in control._SCRIPTS:
        means = [
            control.scripted(environment, np.full(4, errors), 0).returns().mean()
            for errors in (1.0, 0.0)
        ]
        assert means[1] > means[0] + 50, environment


def test_a_policy_sees_in_play_what_it_saw_in_training() -> None:
    setting, name = control.QUICK, "Pendulum-v1"
    policy = control.Policy(setting, "minGRU", control._data(setting, name), "cpu")
    played = policy.play(name, 2, -100.0, 0)
    earlier = played.rewards.cumsum(1) - played.rewards
    inputs = policy.inputs(-100.0 - earlier, played.seen, played.actions)
    for t in (0, 3, 50, 199):
        window = inputs[:, max(t + 1 - setting.context, 0) : t + 1]
        action = (policy.model(window)[:, -1].detach().numpy() * policy.action_scale).clip(-2, 2)
        np.testing.assert_allclose(action, played.actions[:, t], rtol=1e-4, atol=1e-5)


def test_memory_of_the_fused_scan_is_less(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("minGRU", "minGRU in PyTorch")
    monkeypatch.setattr(cost, "LAYERS", {name: cost.LAYERS[name] for name in names})
    fused, unfused = cost._measure(cost.QUICK, 8192, "cpu").values()
    assert 2 * fused["peak"] < unfused["peak"]
