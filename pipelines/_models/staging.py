"""The networks of a pipeline take turns on its device, by accelerate's hooks, which diffusers' pipelines know."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn

__all__ = ["Staging"]


class Staging:
    """A network is brought to the device when it is called, and the one before it leaves. Frozen weights alone move.

    Adapters stay where they are, with their gradients: the optimizer counts on that.

    Args:
        networks: All of them.
        waiting: Those that take turns; the others are on the device for good.
        device: The device.
    """

    def __init__(self, networks: Sequence[nn.Module], waiting: Sequence[nn.Module], device: torch.device) -> None:
        self.device = torch.empty(0, device=device).device  # with its number
        self.here: nn.Module | None = None
        self._waiting = set(waiting)
        for network in networks:
            if network not in self._waiting:
                network.to(device)
            add_hook_to_module(network, _Turn(self))

    def bring(self, network: nn.Module) -> None:
        """Have this network on the device, and the one that was there in its place on the host."""
        if network is self.here:
            return
        if self.here in self._waiting and self.here is not None:
            _move(self.here, torch.device("cpu"))
        if network in self._waiting:
            _move(network, self.device)
        self.here = network


class _Turn(ModelHook):  # type: ignore[misc] # accelerate is not annotated
    """accelerate's hook before `forward`, and before the `encode` and `decode` of diffusers' VAEs."""

    def __init__(self, staging: Staging) -> None:
        self.staging = staging
        self.execution_device = staging.device  # where a pipeline believes that it is

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        self.staging.bring(module)
        return args, kwargs


def _move(network: nn.Module, device: torch.device) -> None:
    """All but what is trained: its optimizer counts on finding it where it was."""
    for module in network.modules():
        if not any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
            module._apply(lambda tensor: tensor.to(device), recurse=False)
