"""What ranks tell each other: collectives of a process group that torch.compile traces, too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

Group: TypeAlias = dist.ProcessGroup | DeviceMesh | str | None  # str: its name, which copies

_collectives = torch.ops._c10d_functional


@dataclass(frozen=True)
class Exchange:
    """This rank's part in the exchanges of a call."""

    caller: str  # for errors
    group: str
    rank: int
    ranks: int

    @classmethod
    def among(cls, caller: str, group: Group) -> Exchange:
        """The ranks of a process group or of a mesh of one dimension. None: all ranks."""
        if not dist.is_initialized():
            raise RuntimeError(
                f"{caller}: expected torch.distributed to be initialised, call "
                "torch.distributed.init_process_group first"
            )
        if isinstance(group, DeviceMesh):
            if group.ndim != 1:
                raise ValueError(f"{caller}: expected a mesh of one dimension, got {group.ndim}")
            group = group.get_group()
        distributed: Any = dist.distributed_c10d
        if isinstance(group, str):
            group = distributed._resolve_process_group(group)
        found: Any = distributed.GroupMember.WORLD if group is None else group
        if not isinstance(found, dist.ProcessGroup) or dist.get_rank(found) < 0:
            raise ValueError(f"{caller}: expected a group that this process is in")
        return cls(caller, found.group_name, dist.get_rank(found), dist.get_world_size(found))

    def gather(self, x: Tensor) -> Tensor:
        """What each rank has: (ranks, ...)."""
        return self.wait(self.send(x))

    def send(self, x: Tensor) -> Tensor:
        """Begins to gather: only :meth:`wait` may read what it returns."""
        x = x.unsqueeze(0).contiguous()
        return self._run(_collectives.all_gather_into_tensor, x, self.ranks, self.group)

    def wait(self, x: Tensor) -> Tensor:
        return self._run(_collectives.wait_tensor, x)

    def total(self, x: Tensor) -> Tensor:
        """The sum over ranks, the same bits on each."""
        return self.wait(self._run(_collectives.all_reduce, x.contiguous(), "sum", self.group))

    def _run(self, collective: Callable[..., Tensor], *args: Any) -> Tensor:
        if torch.compiler.is_compiling():
            return collective(*args)
        try:
            return collective(*args)
        except (torch.OutOfMemoryError, NotImplementedError):
            raise
        except RuntimeError as error:
            raise RuntimeError(
                f"{self.caller}: rank {self.rank} of {self.ranks} waited in vain for the others: "
                f"one of them failed, left or called something else ({error})"
            ) from error
