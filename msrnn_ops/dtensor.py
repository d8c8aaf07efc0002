"""What the package knows of DTensors before it has met one: their module takes long to import."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor


def is_distributed(x: Tensor) -> bool:
    return type(x) not in (Tensor, torch.nn.Parameter) and hasattr(x, "device_mesh")


def replicated(x: Tensor, mesh: DeviceMesh) -> DTensor:
    """A plain tensor that is the same on every rank, as a DTensor."""
    from torch.distributed.tensor import DTensor, Replicate

    return DTensor.from_local(x, mesh, [Replicate()] * mesh.ndim, run_check=False)
