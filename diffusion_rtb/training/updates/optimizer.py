"""The optimizer of a run: AdamW, with its moments in float32 or in 8 bits.

    AdamW       12 bytes per trainable number besides itself: gradient and two moments in float32
    AdamW8bit    6 bytes and a little: the moments in blocks of 256 numbers of 8 bits with a scale each

8-bit optimizers: Dettmers et al. 2022, https://arxiv.org/abs/2110.02861
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable

import torch

from diffusion_rtb.config.sections import TrainConfig
from diffusion_rtb.interfaces import Objective

__all__ = ["adam", "check_optimizer", "own_parameters"]

ADAM_EPS = 1e-15
"""Next to nothing: a gradient of 1e-9 is as good as one of 1, and an objective may come in any unit."""

EPS_8BIT = 1e-8
"""Squares far below the largest of their block are 0 in 8 bits: an update by such a number would be as large as 1 / eps allows."""


def check_optimizer(train: TrainConfig) -> None:
    """Refuse an optimizer whose package is missing, before anything is loaded; ValueError."""
    if train.optimizer == "adamw8bit" and importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(
            "train.optimizer asks for 'adamw8bit', which is not installed: pip install 'diffusion-rtb[bnb]', or take 'adamw'."
        )


def own_parameters(objective: Objective) -> list[torch.nn.Parameter]:
    """What an objective learns besides the posterior: log Z, V."""
    held = objective.parameters() if isinstance(objective, torch.nn.Module) else ()
    return [parameter for parameter in held if parameter.requires_grad]


def adam(posterior: Iterable[torch.nn.Parameter], objective: Objective, train: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer of a run: the posterior's parameters, and a group of the objective's own where it has some.

    Tensors of fewer than 4,096 numbers have moments in float32 in any case.
    """
    groups = [{"params": list(posterior), "lr": train.lr}]
    if owned := own_parameters(objective):
        groups.append({"params": owned, "lr": train.lr_objective})
    betas = (train.adam_beta1, train.adam_beta2)
    if train.optimizer == "adamw":
        return torch.optim.AdamW(groups, weight_decay=0.0, betas=betas, eps=ADAM_EPS)
    from bitsandbytes.optim import AdamW8bit

    optimizer: torch.optim.Optimizer = AdamW8bit(groups, weight_decay=0.0, betas=betas, eps=EPS_8BIT)
    return optimizer
