"""The papers' experiments on finite transformers, their command and their report, at tiny sizes."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("click")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from click import Abort
from click.testing import CliRunner
from tiny_llama import tiny_llama

import msrnn_ops as ms
from bench.__main__ import command
from bench.papers import recall, states, states_report, words
from bench.papers.decoder import (
    AttendSequence,
    AttendStates,
    Decoder,
    LanguageModel,
    Training,
    attend_all,
    train,
)
from bench.papers.part import Options, Store

pytestmark = pytest.mark.slow

TRAINING = Training(steps=10, rate=3e-3, warmup=2)
TINY = states.Scale(
    vocabulary=200,
    width=16,
    layers=2,
    heads=2,
    context=64,
    training=TRAINING,
    batch=2,
    copies=1,
    states=(6, 16),
    windows=3,
    prompt=16,
    texts=2,
    recall=recall.Task(
        facts=2,
        keys=4,
        distances=(0, 60),
        width=16,
        layers=1,
        heads=2,
        training=TRAINING,
        batch=4,
        rows=6,
    ),
    speed=states.Speed(50, 16, 2, 2, 64, 2, 0.01),
)
OPTIONS = Options(full=False, device="cpu", text=(), model=None, dataset=None)


def papers(*words: str) -> None:
    command.main(["papers", *words], standalone_mode=False)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(states, "QUICK", TINY)


def _decoder() -> Decoder:
    torch.manual_seed(0)
    model = Decoder(50, 32, 2, 4)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return model


def _stepped(
    model: LanguageModel, tokens: torch.Tensor, policy: ms.Policy, prompt: int
) -> torch.Tensor:
    attend = AttendStates(policy)
    parts = [model(tokens[:, :prompt], attend)]
    for start in range(prompt, tokens.shape[1]):
        parts.append(model(tokens[:, start : start + 1], attend, start))
    return torch.cat(parts, 1)


@torch.no_grad()
def test_all_ways_to_attend_agree_while_everything_is_kept() -> None:
    model, tokens = _decoder(), torch.randint(50, (2, 20))
    policy = ms.Policy.tova(20)
    for logits in (model(tokens, AttendSequence(policy)), _stepped(model, tokens, policy, 7)):
        torch.testing.assert_close(logits, model(tokens), rtol=1e-3, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("name", states.POLICIES)
def test_a_sequence_is_the_steps_one_after_the_other(name: str) -> None:
    model, tokens = _decoder(), torch.randint(50, (2, 24))
    policy = states.POLICIES[name](8)
    logits = model(tokens, AttendSequence(policy))
    torch.testing.assert_close(logits, _stepped(model, tokens, policy, 1), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(logits, model(tokens), rtol=1e-3, atol=1e-3)


def test_training_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    def losses(folder: str, stop_at: int | None = None) -> tuple[list[float], torch.Tensor]:
        torch.manual_seed(0)
        model, seen = Decoder(20, 16, 1, 2), []

        def lesson(step: int) -> tuple[torch.Tensor, torch.Tensor]:
            seen.append(step)
            if step == stop_at:
                raise KeyboardInterrupt
            tokens = torch.randint(20, (2, 9), generator=torch.Generator().manual_seed(step))
            return tokens[:, :-1], tokens[:, 1:]

        store = Store(tmp_path / folder / "part.json", OPTIONS)
        found = train(model, lesson, TRAINING, "decoder", store)
        steps.append(seen)
        return found, model.head.weight.detach()

    steps: list[list[int]] = []
    whole = losses("whole")
    with pytest.raises(KeyboardInterrupt):
        losses("stopped", stop_at=6)
    resumed = losses("stopped")
    assert steps == [list(range(10)), list(range(6, 10))]
    assert resumed[0] == whole[0]
    assert torch.equal(resumed[1], whole[1])


def test_words(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    text = "The cat sat on the mat, and the cat ate.\n\n" * 30 + "Rare things follow here: 42 ÄÖ."
    path.write_text(text, encoding="utf-8")
    corpus = words.corpus([path], 60)
    assert len(corpus.vocabulary) <= 60
    assert " cat" in corpus.vocabulary and " things" not in corpus.vocabulary
    spelled = "".join(
        corpus.vocabulary[token] for part in (corpus.train, corpus.held_out) for token in part
    )
    assert spelled == text
    assert len(corpus.train) > 5 * len(corpus.held_out) > 0


@pytest.mark.parametrize(
    ("token", "kind"),
    [
        ("", "start of the text"),
        ("\n\n", "line break"),
        ("  ", "space"),
        (" 17", "number"),
        (" Mrs", "capitalised word"),
        (" cat", "word"),
        (" (", "punctuation"),
    ],
)
def test_kinds_of_tokens(token: str, kind: str) -> None:
    assert words.kind_of(token) == kind


def test_recall_asks_for_what_was_told() -> None:
    task = TINY.recall
    generator = torch.Generator().manual_seed(0)
    for questions in (1, 2):
        tokens, values = recall._draw(task, 20, 7, questions, generator)
        assert tokens.shape == (20, 1 + task.facts + 7 + questions)
        for row, wanted in zip(tokens.tolist(), values.tolist(), strict=True):
            facts = [divmod(token - 1 - 2 * task.keys, task.keys) for token in row[1:3]]
            told = dict(facts)
            assert len(told) == task.facts
            assert [told[key - 1] for key in row[-questions:]] == wanted
            assert all(task.keys < token <= 2 * task.keys for token in row[3:10])
    longest, _ = recall._draw(task, 1, max(task.distances), 1, generator)
    assert longest.shape[1] == task.context


@torch.no_grad()
def test_recall_finds_what_is_kept() -> None:
    model, tokens = _decoder(), torch.randint(50, (3, 20))
    again = torch.cat([tokens, tokens[:, -1:]], 1)
    everything = ms.Policy.tova(21)
    for answer, wanted in (
        (recall._token_by_token, model(tokens)),
        (recall._after_a_prompt, model(again)),
    ):
        found = answer(everything, model, tokens)
        torch.testing.assert_close(found, wanted[:, -1], rtol=1e-3, atol=1e-3)


def _result(at: dict[str, float], forgotten: dict[str, float]) -> dict[str, object]:
    policies = {name: {"8": perplexity} for name, perplexity in at.items()}
    perplexity = {"full": 7.0, "policies": policies}
    return {"subject": {"context": 64}, "perplexity": perplexity, "forgotten": forgotten}


def test_the_verdict_follows_the_results() -> None:
    at = {name: 9.0 for name in states.POLICIES} | {"TOVA-layer": 8.0}
    forgotten = {name: 0.2 for name in states.POLICIES}
    assert "as in the paper" in states_report.verdict(_result(at, forgotten))
    worse = at | {"H2O-head": 7.5, "H2O-layer": 7.9}
    verdict = states_report.verdict(_result(worse, forgotten | {"TOVA-layer": 0.3}))
    assert "unlike in the paper, H2O-head and H2O-layer did better" in verdict
    assert (
        "30.0% goes to states that TOVA-layer has dropped, 20.0% to those that H2O-head" in verdict
    )
    assert "it drops more" in verdict
    assert "it drops no more" in states_report.verdict(_result(worse, forgotten))


@torch.no_grad()
def test_forgotten_attention_of_a_window() -> None:
    model, tokens = _decoder(), torch.randint(50, (1, 13))
    for weight in model.parameters():
        torch.nn.init.zeros_(weight)  # so that all attention is equal
    subject = states.Subject(model, tokens, str, {})
    found = states._forgotten(subject, 6)["Window"]
    dropped = [max(t + 1 - 7, 0) / (t + 1) for t in range(12)]  # a token sees itself and six more
    assert found == pytest.approx(sum(dropped) / 12)


@pytest.mark.usefixtures("tiny")
def test_the_command_writes_one_report(tmp_path: Path) -> None:
    papers("states", "--output", str(tmp_path))
    result = json.loads((tmp_path / "papers-states.json").read_text("utf-8"))["result"]
    page = (tmp_path / "papers.md").read_text("utf-8")
    section = states.section(result)
    for text in (section.title, *(table.title for table in section.tables)):
        assert text in page
    pictures = re.findall(r"!\[.*\]\((.*)\)", page)
    assert pictures == [f"papers-states-{plot.name}.png" for plot in section.plots]
    assert {path.name for path in tmp_path.iterdir()} == {
        "papers.md",
        "papers-states.json",
        *pictures,
    }
    (tmp_path / "papers.md").unlink()
    papers("--report", "--output", str(tmp_path))
    assert (tmp_path / "papers.md").read_text("utf-8") == page
    assert set(result["perplexity"]["policies"]) == set(states.POLICIES)
    assert result["perplexity"]["states"] == [6, 8, 16]
    eighth, *_, full = result["speed"]
    assert eighth["batch"] > full["batch"] == TINY.speed.rows
    assert eighth["bytes"] <= full["bytes"]


@pytest.mark.usefixtures("tiny")
def test_the_command_goes_on_where_it_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(states, "_writing", stop)
        with pytest.raises(Abort):
            papers("states", "--output", str(tmp_path))
    monkeypatch.setattr(states, "_perplexity", stop)  # they are known already
    papers("states", "--output", str(tmp_path))
    assert (tmp_path / "papers.md").exists()


@pytest.mark.parametrize("scale", [states.QUICK, states.FULL], ids=["quick", "full"])
def test_the_sizes_fit_together(scale: states.Scale) -> None:
    task, speed = scale.recall, scale.speed
    for sizes in (scale, task, speed):
        for name, policy in states.POLICIES.items():
            bounded = policy(sizes.context // 8)
            head_dim = sizes.width // sizes.heads
            ms.MultiState(bounded, batch=0, kv_heads=sizes.heads, head_dim=head_dim)
            assert bounded.scope == ("head" if name.endswith("head") else "layer")
    assert scale.context // 8 in scale.states
    assert max(scale.states) < scale.context
    assert task.facts <= task.keys
    assert scale.copies < scale.batch


@pytest.mark.parametrize(
    ("words_", "message"),
    [
        (["costs"], "'costs' is not one of 'cost', 'copying'"),
        (["--text", "nowhere.txt"], "'nowhere.txt' does not exist"),
        (["--model", "."], "--model and --dataset go together"),
        (["--hasty"], "No such option"),
    ],
)
def test_wrong_arguments(words_: list[str], message: str) -> None:
    result = CliRunner().invoke(command, ["papers", *words_])
    assert result.exit_code == 2 and message in result.output


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ModuleNotFoundError("No module named 'gymnasium'", name="gymnasium")

    monkeypatch.setattr("importlib.import_module", absent)
    with pytest.raises(SystemExit, match=re.escape("pip install 'msrnn_ops[papers]'")):
        papers("control")


@torch.no_grad()
def test_a_checkpoint_is_the_model_that_was_saved(tmp_path: Path) -> None:
    tiny_llama(tmp_path)
    from transformers import AutoModelForCausalLM

    from bench.papers.checkpoint import Checkpoint

    model = Checkpoint(tmp_path, "cpu")
    text = "A text,\n\nand more of it."
    tokens = model.encode(text)
    assert "".join(map(model.spell, tokens.tolist())) == text
    assert model.start_token is not None and model.spell(model.start_token) == ""
    tokens = tokens[None]
    wanted = AutoModelForCausalLM.from_pretrained(tmp_path)(tokens).logits
    close = partial(torch.testing.assert_close, rtol=1e-3, atol=1e-3)
    close(model(tokens, attend_all), wanted)
    close(model(tokens, AttendSequence(ms.Policy.tova(64))), wanted)
    policy = ms.Policy.tova(8)
    close(_stepped(model, tokens, policy, 1), model(tokens, AttendSequence(policy)))


def test_a_checkpoint_that_attends_otherwise_is_refused(tmp_path: Path) -> None:
    tiny_llama(tmp_path)
    import transformers

    from bench.papers.checkpoint import Checkpoint

    config = transformers.Gemma2Config(
        vocab_size=257, hidden_size=32, intermediate_size=48, num_hidden_layers=1, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, query_pre_attn_scalar=8,
    )  # fmt: skip
    transformers.Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="softcap"):
        Checkpoint(tmp_path, "cpu")(torch.zeros(1, 8, dtype=torch.long))


@torch.no_grad()
def test_layers_with_a_window_keep_it(tmp_path: Path) -> None:
    tiny_llama(tmp_path)
    import transformers

    from bench.papers.checkpoint import Checkpoint

    config = transformers.MistralConfig.from_pretrained(tmp_path, sliding_window=4)
    transformers.MistralForCausalLM(config).save_pretrained(tmp_path)
    model, tokens = Checkpoint(tmp_path, "cpu"), torch.randint(257, (1, 24))
    wanted = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)(tokens).logits
    bounded = AttendSequence(ms.Policy.tova(2))
    torch.testing.assert_close(model(tokens, bounded), wanted, rtol=1e-3, atol=1e-3)
    assert not bounded.expiry  # it was not asked


@pytest.mark.usefixtures("tiny")
def test_the_command_measures_a_checkpoint(tmp_path: Path) -> None:
    tiny_llama(tmp_path / "tiny-llama")
    text = tmp_path / "text.txt"
    text.write_text("Some words, again and again.\n" * 30, encoding="utf-8")
    model = ["--model", str(tmp_path / "tiny-llama"), "--dataset", str(text)]
    papers("states", *model, "--output", str(tmp_path / "out"))
    stored = json.loads((tmp_path / "out" / "papers-states.json").read_text("utf-8"))
    assert stored["result"]["subject"]["name"] == "tiny-llama"
    assert str(tmp_path) not in (tmp_path / "out" / "papers.md").read_text("utf-8")
