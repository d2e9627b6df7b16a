"""One rank reads a model from disk, the others receive it: module by module, each just before it is sharded.

So a host holds one whole copy however many ranks it has, beside one module and its shards for each of them.

Invariants
- After `receive` every rank has rank 0's parameters and buffers bit for bit, those that no checkpoint stores included.
- A tensor under two names (a tied head) travels once and stays one tensor.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

_CHUNK = 1 << 28  # bytes in one broadcast: bounds the copies that the backend makes


def reads_from_disk() -> bool:
    """Whether this rank is the one that reads."""
    return dist.get_rank() == 0


def receive(module: nn.Module, device: torch.device) -> None:
    """Move what `module` holds and FSDP2 has not sharded yet to `device`, with rank 0's values on all ranks.

    On other ranks these may be meta tensors. Collective.
    """
    if dist.get_world_size() == 1:
        return
    slots = list(_slots(module))
    said: list[object] = [[(name, t.shape, t.dtype) for name, t, _ in slots]]
    here = said[0]
    dist.broadcast_object_list(said, src=0)
    assert here == said[0], f"rank {dist.get_rank()} builds {here}, rank 0 {said[0]}"
    for _, tensor, places in slots:
        value = _empty(tensor, device) if tensor.is_meta else _moved(tensor, device)
        for part in value.detach().reshape(-1).view(torch.uint8).split(_CHUNK):
            dist.broadcast(part, src=0)
        for holder, name in places:
            holder[name] = value


def _slots(module: nn.Module) -> Iterator[tuple[str, Tensor, list[tuple[dict[str, Tensor | None], str]]]]:
    """Every unsharded tensor once, by its first name, with all the places that hold it."""
    places: dict[Tensor, list[tuple[dict[str, Tensor | None], str]]] = {}
    names: dict[Tensor, str] = {}
    for prefix, part in module.named_modules():
        for holder in (part._parameters, part._buffers):
            for name, tensor in holder.items():
                if tensor is not None and not isinstance(tensor, DTensor):
                    names.setdefault(tensor, f"{prefix}.{name}")
                    places.setdefault(tensor, []).append((holder, name))
    for tensor, name in names.items():
        yield name, tensor, places[tensor]


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    tensor.data = tensor.data.to(device).contiguous()
    return tensor


def _empty(tensor: Tensor, device: torch.device) -> Tensor:
    empty = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
