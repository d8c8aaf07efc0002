"""``python -m bench distributed``, alone or by ``torchrun``: data and context parallel training.

Trains the character model of the experiments with the rows of every batch sharded over data ranks
and their time over context ranks. ``--check`` trains it again, in one process and from the start,
on the same batches, and compares the losses.
"""

from __future__ import annotations

import json
import os
import statistics
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
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
from bench.papers.words import characters_of
from bench.run import write
from bench.table import say
from msrnn_ops.distributed import shard_time

TOLERANCE = 1e-5  # of a loss, relative
_CLIP = 1.0


@dataclass(frozen=True)
class Options:
    """What the command line says."""

    context: int = 1  # ranks that share a sequence
    fsdp: bool = False
    steps: int = 40
    check: bool = False  # against one process
    save: Path | None = None  # folders of checkpoints
    load: Path | None = None
    json: Path | None = None  # the file of the results
    device: str = "cpu"


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
        self.setting, self.device, self.mesh = setting, device, mesh
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
        logits = self.model(x).flatten(0, 1)
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


def _initialise(device: str) -> torch.device:
    backend = "nccl" if device == "cuda" else "gloo"
    if dist.is_torchelastic_launched():
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, "tcp://localhost:0", rank=0, world_size=1)
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device(device)


def _write(path: Path, words: Sequence[str], found: dict[str, Any]) -> None:
    """Puts a run beside those of other commands in the file."""
    ranks = dist.get_world_size()
    torchrun = f"torchrun --standalone --nproc-per-node {ranks}"
    python = torchrun if dist.is_torchelastic_launched() else "python"
    head = machine.head(f"{python} -m bench", words)
    runs = json.loads(path.read_text("utf-8"))["runs"] if path.exists() else {}
    runs[head.pop("command")] = {"date": head.pop("date"), **found}
    write(path, {**head, "runs": runs})


def run(options: Options, words: Sequence[str]) -> None:
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world % options.context:
        raise SystemExit(f"expected a divisor of {world} ranks, got {options.context}")
    warnings.filterwarnings("ignore", "FSDP2-wrapped .* view tensor")  # as of any linear layer
    device = _initialise(options.device)
    ranks, first = dist.get_world_size(), dist.get_rank() == 0
    shape = ranks // options.context, options.context
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("data", "context"))
    text, setting = characters_of([]), Setting()
    model = setting, len(text.characters), device
    training = Training(*model, mesh, fsdp=options.fsdp)
    if options.load:
        training.load(options.load)
    start, label = training.step, f"{ranks} ranks" if first else ""
    losses, speed = training.train(text.train, options.steps, label)
    if options.save:
        training.save(options.save)
    found: dict[str, Any] = {"text": text.name, "setting": asdict(setting)}
    found |= {"ranks": ranks, "threads_each": torch.get_num_threads()}
    found |= {"data": shape[0], "context": shape[1], "sharding": "FSDP" if options.fsdp else "DDP"}
    found |= {"first_step": start, "losses": losses, "tokens_per_second": speed}
    message, differs = "", False
    if options.check and first:
        alone = Training(*model)
        expected, alone_speed = alone.train(text.train, start + options.steps, "one process")
        pairs = zip(losses, expected[start:], strict=True)
        difference = max(abs(loss - exact) / exact for loss, exact in pairs)
        differs = not difference <= TOLERANCE
        found |= {"one_process_losses": expected[start:], "difference": difference}
        found |= {"tolerance": TOLERANCE, "one_process_tokens_per_second": alone_speed}
        message = f"; one process {alone_speed:,.0f}, losses differ by {difference:.1e} at most"
    if first:
        say(
            f"{shape[0]} x {shape[1]} ranks (data x context), {found['sharding']}: loss of step "
            f"{start + 1} {losses[0]:.4f}, of step {training.step} {losses[-1]:.4f}; "
            f"{speed:,.0f} tokens/s{message}"
        )
        if options.json:
            _write(options.json, words, found)
    dist.barrier()
    dist.destroy_process_group()
    if differs:
        raise SystemExit(f"expected losses within {TOLERANCE} of those of one process")
