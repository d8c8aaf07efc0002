"""The benchmark's parts at tiny sizes: all of the CPU's, and the GPU's with a stand-in for it."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch

for needed in ("click", "rich", "matplotlib"):
    pytest.importorskip(needed)

from bench import peers, report, run  # noqa: E402
from bench.__main__ import command  # noqa: E402
from bench.cpu import accuracy, layers, limits, memory, ops, small, steps, training  # noqa: E402
from bench.cuda import stand_in  # noqa: E402
from bench.cuda import steps as gpu_steps  # noqa: E402
from bench.serving import engine  # noqa: E402
from bench.serving import run as serving  # noqa: E402

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tensors, short times, and nothing that compiles."""

    def put(where: Any, **values: Any) -> None:
        for name, value in values.items():
            monkeypatch.setattr(where, name, value)

    put(run, _SECONDS=1e-3)
    put(ops, SHAPES=((2, 8, 4), (1, 16, 4), (1, 24, 4), (2, 16, 4), (1, 32, 4)))
    put(layers, _SHAPES=((2, 8, 4), (1, 8, 8)))
    put(steps, _SLOTS=(8, 16), _LAYERS=2, _LOOP_SLOTS=8, _LOOP_TOKENS=16)
    put(limits, _SIZES=(1 << 12, 1 << 13))
    put(memory, _in_a_process=lambda op, name: None if name == peers.HEINSEN else 3.0)
    put(accuracy, _LENGTHS=(8, 16), _WIDTH=4)
    for name, make in (
        (peers.HEINSEN_COMPILED, peers.heinsen),
        (peers.ASSOCIATIVE_COMPILED, peers.reference),
    ):
        monkeypatch.setitem(peers.COMPETITORS, name, make)


def test_the_cpu(tmp_path: Path) -> None:
    command.main(["--full", "--output", str(tmp_path)], standalone_mode=False)
    found = json.loads((tmp_path / "cpu.json").read_text("utf-8"))
    assert found["command"].startswith("python -m bench --full --output ")
    assert str(tmp_path.parent) not in found["command"]
    assert list(found["seconds_taken"]) == list(run.CPU_PARTS)
    assert (tmp_path / "cpu.png").stat().st_size > 1000
    assert {row["op"] for row in found["ops"]} == set(peers.OPS)
    for row in found["ops"]:
        tolerance = 1e-3 if row["dtype"] == "float32" else 1.0  # Heinsen's form in bfloat16
        for name, result in row["competitors"].items():
            assert result["error"] < (0.05 if name == peers.OURS else 1) * tolerance, (row, name)
    shown = report.page(tmp_path / "cpu.json")
    for title in ("Forward and backward", "One decode step", "Decoding", "Layers", "min_gru"):
        assert f"**{title}" in shown
    assert "| min_gru | Heinsen | n/a |" in shown
    for table in report.tables(found):
        assert table.rows and all(len(row) == len(table.columns) for row in table.rows)


def test_a_long_sequence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def here(what: str, names: str, kind: str, *, reused: bool = False) -> Any:
        if what == "peak":
            return None if names == "nn.GRU" else 3.0
        with capsys.disabled(), redirect_stdout(io.StringIO()) as printed:
            training.main(what, names, kind, str(torch.get_num_threads()))
        return json.loads(printed.getvalue())

    for name, value in {"SHAPE": (1, 700, 8), "_SECONDS": 1e-3, "_in_a_process": here}.items():
        monkeypatch.setattr(training, name, value)
    command.main(["training", "--output", str(tmp_path)], standalone_mode=False)
    found = json.loads((tmp_path / "training.json").read_text("utf-8"))
    assert "freed_memory" not in found["settings"]
    (table,) = report.tables(found)
    assert [row[0] for row in table.rows] == list(training.LAYERS)
    assert all(len(row) == len(table.columns) for row in table.rows)
    chunked, whole, *_, gru = table.rows
    assert chunked[3].endswith("×") and chunked[4].endswith("×") and not whole[3]
    assert gru[1] == "n/a" and gru[3].endswith("×") and not gru[4]
    assert report.page(tmp_path / "training.json")


def test_small_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small, "SIZES", ((2, 8),))
    threads = torch.get_num_threads()
    command.main(["small", "--output", str(tmp_path)], standalone_mode=False)
    assert torch.get_num_threads() == threads
    found = json.loads((tmp_path / "small.json").read_text("utf-8"))
    (table,) = report.tables(found)
    assert [row[2] for row in table.rows[:3]] == ["min_gru", "min_gru, recorded", "attend_evict"]
    assert len(table.rows) == 3 + 2 * 4 + 2 and all(row[-1].endswith("×") for row in table.rows)
    assert report.page(tmp_path / "small.json")


@pytest.mark.parametrize("cell", ["MinGRU", "MinLSTM"])
def test_steps_by_hand_are_those_of_the_layer(cell: str) -> None:
    layer = small.CELLS[cell](4, 6)
    linear = torch.nn.Linear(4, layer.weight_ih_l0.shape[0])
    linear.weight, linear.bias = layer.weight_ih_l0, layer.bias_ih_l0
    x, h = torch.randn(3, 4), torch.rand(1, 3, 6)
    y, _ = layer.step(x, h if cell == "MinGRU" else (h, h))
    torch.testing.assert_close(small.by_hand(cell, linear, x, h[0]), y)


def test_the_usual_run_has_the_headline_and_starts_without_compiling() -> None:
    cases = ops._cases(full=False)
    assert {case.op.name for case in cases} == {"min_gru", "min_lstm"}
    (headline,) = [case for case in cases if case.compiles()]
    assert headline.op.name == "min_gru" and headline.backward
    assert set(peers.PEERS) < set(headline.competitors())
    rows = next(iter(ops.run(1e-3, False)))["ops"]
    assert peers.HEINSEN in rows[0]["competitors"]
    assert peers.HEINSEN_COMPILED not in rows[0]["competitors"]


def test_the_usual_run_ends_when_its_time_is_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "LIMIT", 1e-9)
    command.main(["--output", str(tmp_path)], standalone_mode=False)
    assert "the time is up: python -m bench cpu --only ops" in capsys.readouterr().out
    assert not (tmp_path / "cpu.json").exists()
    monkeypatch.setattr(run, "LIMIT", 600.0)
    command.main(["--output", str(tmp_path)], standalone_mode=False)
    assert "the time is up" not in capsys.readouterr().out
    found = json.loads((tmp_path / "cpu.json").read_text("utf-8"))
    assert list(found["seconds_taken"]) == [part for part in run.CPU_PARTS if part != "accuracy"]


def test_what_was_measured_before_stays_until_there_is_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command.main(["--only", "limits", "--output", str(tmp_path)], standalone_mode=False)
    before = (tmp_path / "cpu.json").read_text("utf-8")

    def stop(*_: object) -> Any:
        raise RuntimeError("stopped")

    monkeypatch.setattr(limits, "copier", stop)
    with pytest.raises(RuntimeError, match="stopped"):
        command.main(["--only", "limits", "--output", str(tmp_path)], standalone_mode=False)
    assert (tmp_path / "cpu.json").read_text("utf-8") == before
    assert command.commands["cpu"].params[2].default == Path("build/bench")


def test_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in.shrink(monkeypatch.setattr)  # the command does so again, and this takes it back
    command.main(["cuda", "--rehearse", "--output", str(tmp_path)], standalone_mode=False)
    found = json.loads((tmp_path / "cuda.json").read_text("utf-8"))
    assert found["rehearsal"] and report.heading(found).startswith("no GPU: a rehearsal")
    assert list(found["seconds_taken"]) == list(run.CUDA_PARTS)
    tables = report.tables(found)
    assert len(tables) == 10
    for table in tables:
        assert table.rows and all(len(row) == len(table.columns) for row in table.rows)
    failures = [
        (name, result["failed"])
        for row in found["ops"] + found["triton"] + found["peers"] + found["steps"]
        for name, result in row["competitors"].items()
        if "failed" in result
    ]
    assert not {name for name, _ in failures} - {gpu_steps.SCORED}, failures


def test_the_gpu_stops_when_its_time_is_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in.shrink(monkeypatch.setattr)
    words = ["cuda", "--rehearse", "--only", "ops,small", "--limit", "1e-9"]
    command.main([*words, "--output", str(tmp_path)], standalone_mode=False)
    assert "the time is up: python -m bench cuda --only ops" in capsys.readouterr().out
    assert not (tmp_path / "cuda.json").exists()


def test_without_a_gpu() -> None:
    from click.testing import CliRunner

    if torch.cuda.is_available():
        pytest.skip("there is one")
    for words in (["cuda"], ["tune"], ["papers", "--device", "cuda"]):
        result = CliRunner().invoke(command, words)
        assert result.exit_code == 2 and "torch sees none here" in result.output


def test_serving_without_an_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked of each engine, and what is made of its answers."""
    jobs: list[engine.Job] = []

    def answer(job: engine.Job) -> dict[str, Any]:
        jobs.append(job)
        speed = 2.0 if job.policy else 1.0
        bursts = [
            {
                "requests": len(prompts), "prompt_tokens": sum(map(len, prompts)),
                "output_tokens": len(prompts) * outputs, "seconds": 60 / speed, "in_flight": 2,
                "preemptions": 3, "first_token": [1.0, 2.0],
                "latency": [5.0, 6.0], "token_seconds": [0.1 / speed] * len(prompts),
                "course": [(0.1, 1, 1, 100), (1.0, 2, len(prompts) * outputs, 101)],
            }
            for prompts, outputs in zip(job.prompts, job.outputs, strict=True)
        ]  # fmt: skip
        return {"bursts": bursts, "process_bytes": 1 << 30}

    monkeypatch.setattr(serving, "_run", answer)
    options = serving.Options(
        model=tmp_path, budget=8, requests=2, prompt=24, outputs=40, contexts=(32, 64),
        batches=(1, 2), slots=8, steps=4, dtype="bfloat16", policy="h2o", many=5, long=9,
    )  # fmt: skip
    results: dict[str, Any] = {
        "command": "python -m bench serving", "date": "2026-11-30", "machine": {"cores": 2},
        "settings": {"budget": 8, "requests": 2, "prompt": 24, "outputs": 40, "model": "tiny"},
        "versions": {"vllm": "0"},
    }  # fmt: skip
    results["machine"]["processor"], results["settings"]["dtype"] = "this", "bfloat16"
    for name, part in serving.PARTS.items():
        results[name] = part(options, [7, 8, 9])
    slots = [job.policy and job.policy["slots"] for job in jobs]
    # 1/8 and 1/4 of 64 tokens; three turns; memory.
    assert slots == [None, 8, 16, *[None, 8] * 3, 8]
    assert jobs[0].prompts[0][0] == [7, 8, 9] * 8 and len(jobs[0].prompts[0]) == 2
    assert [len(x) for x in jobs[3].prompts] == [1, 1, 2, 2]
    first, second, third = report.tables(results)
    assert [row[5] for row in first.rows] == ["1.00", "2.00", "2.00"]
    assert [row[2] for row in first.rows] == ["1.0"] * 3  # later nobody waits
    assert [row[-1] for row in second.rows] == ["2.00"] * 4
    assert second.rows[2][:2] == ["2 x 32", "20.0"]
    assert [row[1:] for row in third.rows] == [["101", "101"], ["101", "101"]]
    assert "vLLM 0, tiny in bfloat16" in report.heading(results)
    serving.draw(results["burst"], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
