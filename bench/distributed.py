"""``python -m bench.distributed``, alone or by ``torchrun``: data and context parallel training.

Trains the character model of ``bench.papers`` with the rows of every batch sharded over data ranks
and their time over context ranks. ``--check`` trains it again, in one process and from the start,
on the same batches, and compares the losses.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from bench import machine
from bench.papers.models import SequenceModel
from bench.text import load
from msrnn_ops.distributed import shard_time

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # of a loss, relative
_CLIP = 1.0


@dataclass(frozen=True)
class Setting:
    width: int = 64
    layers: int = 2
    batch: int = 8  # windows of a step, of all ranks together
    time: int = 255  # characters of a window; odd, so that its shards are not equal
    rate: float = 3e-3


class Training:
    """A model and its optimizer, over the ranks of a mesh ("data", "context") or in one process."""

    def __init__(
        self,
        setting: Setting,
        characters: int,
        device: torch.device,
        mesh: DeviceMesh | None = None,
        *,
        fsdp: bool = False,
        dtype: torch.dtype = torch.float32,
        autocast: bool = False,
    ) -> None:
        torch.manual_seed(0)
        embedding = nn.Embedding(characters, setting.width)
        sizes = setting.width, setting.layers, characters
        model = SequenceModel("minGRU", embedding, *sizes, conv=4).to(device, dtype)
        self.model: nn.Module = model
        if mesh is not None:
            shard_time(model, mesh["context"])
            if fsdp:
                for block in model.blocks:
                    fully_shard(block)
                fully_shard(model)
            else:
                self.model = DistributedDataParallel(model)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=setting.rate)
        self.setting, self.device, self.mesh, self.autocast = setting, device, mesh, autocast
        self.step = 0

    def train(self, tokens: Tensor, steps: int, label: str = "") -> tuple[list[float], float]:
        """Some steps more: the loss of each over its whole batch, and the tokens of a second."""
        losses, seconds = [], []
        for _ in track(range(steps), label, disable=not label):
            start = time.perf_counter()
            losses.append(self._step(tokens).item())  # waits for the device
            seconds.append(time.perf_counter() - start)
        curve = torch.tensor(losses, dtype=torch.float64, device=self.device)
        if self.mesh is not None:
            dist.all_reduce(curve)
        speed = self.setting.batch * self.setting.time / statistics.median(seconds)
        return curve.tolist(), speed

    def _step(self, tokens: Tensor) -> Tensor:
        """Returns this rank's part of the loss: the parts add up to the mean over all tokens."""
        generator = torch.Generator().manual_seed(self.step)  # on every rank the same batch
        windows = tokens.unfold(0, self.setting.time + 1, 1)
        chosen = torch.randint(len(windows), (self.setting.batch,), generator=generator)
        rows = windows[chosen].to(self.device)
        x, target = self._share(rows[:, :-1]), self._share(rows[:, 1:])
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            logits = self.model(x).flatten(0, 1)
        logits = logits.float() if self.autocast else logits
        total = cross_entropy(logits, target.flatten(), reduction="sum")
        loss = total / (self.setting.batch * self.setting.time)
        self.optimizer.zero_grad()
        # DDP and FSDP average gradients over ranks. Shares are not equal: they have to be added up.
        (loss * (self.mesh.size() if self.mesh else 1)).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), _CLIP)
        self.optimizer.step()
        self.step += 1
        return loss.detach()

    def _share(self, x: Tensor) -> Tensor:
        """Of (rows, time) what this rank has."""
        if self.mesh is not None:
            for dim, ranks in enumerate((self.mesh["data"], self.mesh["context"])):
                x = x.tensor_split(ranks.size(), dim)[ranks.get_local_rank()]
        return x

    def _state(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer, "step": self.step}

    def save(self, folder: Path) -> None:
        state_dict_saver.save(self._state(), checkpoint_id=folder)

    def load(self, folder: Path) -> None:
        """What any number of ranks saved, with DDP or FSDP."""
        state = self._state()
        state_dict_loader.load(state, checkpoint_id=folder)
        states = {"model_state_dict": state["model"], "optim_state_dict": state["optimizer"]}
        set_state_dict(self.model, self.optimizer, **states)
        self.step = state["step"]


def _arguments(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.distributed", description=__doc__)
    add = parser.add_argument
    add("--context", type=int, default=1, help="ranks that share a sequence (%(default)s)")
    add("--fsdp", action="store_true", help="fully_shard over all ranks instead of DDP")
    add("--steps", type=int, default=40, help="(%(default)s)")
    add("--check", action="store_true", help="compare with one process; exit 1 where it differs")
    add("--save", type=Path, metavar="FOLDER", help="of a checkpoint, to write at the end")
    add("--load", type=Path, metavar="FOLDER", help="of a checkpoint of any number of ranks")
    add("--bfloat16", action="store_true", help="autocast to it")
    add("--text", type=Path, metavar="FILE", help="to learn, UTF-8 (Python's documentation)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="(%(default)s)")
    add("--json", type=Path, metavar="FILE", help="add the results to this file")
    arguments = parser.parse_args(words)
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    if arguments.context < 1 or ranks % arguments.context:
        parser.error(f"--context: expected a divisor of {ranks} ranks, got {arguments.context}")
    if arguments.steps < 1:
        parser.error(f"--steps: expected at least 1, got {arguments.steps}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU, and torch sees none here")
    return arguments


def _initialise(device: str) -> torch.device:
    backend = "nccl" if device == "cuda" else "gloo"
    if dist.is_torchelastic_launched():
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, "tcp://localhost:0", rank=0, world_size=1)
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device(device)


def _command(words: Sequence[str]) -> str:
    """The command line, its files without their folders."""
    python = "python"
    if dist.is_torchelastic_launched():
        python = f"torchrun --standalone --nproc-per-node {dist.get_world_size()}"
    return " ".join([python, "-m bench.distributed", *(re.sub(r"\S*/", "", x) for x in words)])


def _write(path: Path, command: str, run: dict[str, Any]) -> None:
    """Puts a run beside those of other commands in the file."""
    runs = json.loads(path.read_text("utf-8"))["runs"] if path.exists() else {}
    runs[command] = {"date": time.strftime("%Y-%m-%d"), **run}
    results = {"machine": machine.machine(), "versions": machine.versions(), "runs": runs}
    path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", "utf-8")


def main(words: Sequence[str]) -> None:
    arguments = _arguments(words)
    warnings.filterwarnings("ignore", "FSDP2-wrapped .* view tensor")  # as of any linear layer
    device = _initialise(arguments.device)
    ranks, first = dist.get_world_size(), dist.get_rank() == 0
    shape = ranks // arguments.context, arguments.context
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("data", "context"))
    corpus, setting = load(arguments.text), Setting()
    model = setting, len(corpus.characters), device
    training = Training(*model, mesh, fsdp=arguments.fsdp, autocast=arguments.bfloat16)
    if arguments.load:
        training.load(arguments.load)
    start, label = training.step, f"{ranks} ranks" if first else ""
    losses, speed = training.train(corpus.train, arguments.steps, label)
    if arguments.save:
        training.save(arguments.save)
    run: dict[str, Any] = {"text": corpus.name, "setting": asdict(setting)}
    run |= {"ranks": ranks, "threads_each": torch.get_num_threads()}
    run |= {"data": shape[0], "context": shape[1], "sharding": "FSDP" if arguments.fsdp else "DDP"}
    run |= {"first_step": start, "losses": losses, "tokens_per_second": speed}
    message, differs = "", False
    if arguments.check and first:
        alone = Training(*model, autocast=arguments.bfloat16)
        expected, alone_speed = alone.train(corpus.train, start + arguments.steps, "one process")
        tolerance = TOLERANCE[torch.bfloat16 if arguments.bfloat16 else torch.float32]
        pairs = zip(losses, expected[start:], strict=True)
        difference = max(abs(loss - exact) / exact for loss, exact in pairs)
        differs = not difference <= tolerance
        run |= {"one_process_losses": expected[start:], "difference": difference}
        run |= {"tolerance": tolerance, "one_process_tokens_per_second": alone_speed}
        message = f"; one process {alone_speed:,.0f}, losses differ by {difference:.1e} at most"
    if first:
        Console(soft_wrap=True).print(
            f"{shape[0]} x {shape[1]} ranks (data x context), {run['sharding']}: loss of step "
            f"{start + 1} {losses[0]:.4f}, of step {training.step} {losses[-1]:.4f}; "
            f"{speed:,.0f} tokens/s{message}"
        )
        if arguments.json:
            _write(arguments.json, _command(words), run)
    dist.barrier()
    dist.destroy_process_group()
    if differs:
        raise SystemExit(f"expected losses within {run['tolerance']} of those of one process")


if __name__ == "__main__":
    main(sys.argv[1:])
