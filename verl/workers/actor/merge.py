"""Adapters added to the weights they belong to, one gathered weight at a time: what engines and checkpoints get."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from verl.models.lora import adapted_layers, add_delta
from verl.workers.weight_sync.gather import gather_into


class Merger:
    """For a model whose parameters may be sharded: then make it while they are. Does nothing for a weight without an
    adapter.

    It keeps the parameters: while FSDP2 holds weights gathered, a module's own are copies in the computing precision.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = {
            f"{name}.weight": (layer.weight.shape, layer.lora_A, layer.lora_B, layer.lora_scale)
            for name, layer in adapted_layers(model).items()
        }

    def adapts(self, name: str) -> bool:
        return name in self._layers

    @torch.no_grad()
    def __call__(self, name: str, whole: Tensor) -> None:
        """Add the adapter of the layer to `whole`, its gathered weight of any view, in place. Collective."""
        if not self.adapts(name):
            return
        shape, *adapter, scale = self._layers[name]
        a, b = (_gathered(p, whole.device) for p in adapter)
        add_delta(whole.view(shape), a, b, scale)


def _gathered(parameter: Tensor, device: torch.device) -> Tensor:
    """The whole of a parameter in fp32. Collective."""
    out = torch.empty(parameter.numel(), dtype=torch.float32, device=device)
    gather_into(parameter, out)
    return out.view(parameter.shape)
