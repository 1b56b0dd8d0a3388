"""What the three trainings share: a wall-clock schedule, averaged weights and a checkpoint that can be resumed.

Every training has a budget in minutes. Progress is the time spent so far over that budget, over all runs: a training
that was interrupted goes on where its checkpoint stopped, and the learning rate reaches 0 exactly when the budget is used.
"""

from __future__ import annotations

import copy
import logging
import math
import time
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from diffusion_rtb.files.whole import whole
from pipelines.emoji.build.learning.muon import Muon

log = logging.getLogger(__name__)


class Training:
    """Muon with warm-up and cosine decay over `minutes`, an average of the weights, and checkpoints.

    `while not run.done: ...; run.step(loss)` is the whole loop.
    """

    def __init__(
        self, model: nn.Module, file: Path, *, minutes: float, lr: float, decay: float = 0.999, largest: int = 4096
    ) -> None:
        self.model, self.file, self.minutes, self.lr, self.decay = model, file, minutes, lr, decay
        self.average = copy.deepcopy(model).requires_grad_(False).eval()
        self.optimizer = Muon(model.parameters(), lr=lr, largest=largest)
        self.steps, self.seconds, self.loss = 0, 0.0, math.nan
        if file.exists():
            self._resume()
        self._clock = self._saved = self._logged = time.monotonic()

    @property
    def progress(self) -> float:
        """Share of the budget that is used, 0..1."""
        return min(1.0, self.seconds / (60 * self.minutes))

    @property
    def done(self) -> bool:
        """Whether the budget is used; saves the last state when it is."""
        if self.progress < 1:
            return False
        self.save()
        return True

    def step(self, loss: Tensor) -> None:
        """Backward, update, average, and now and then a log line and a checkpoint."""
        rate = self.lr * min(1.0, (self.steps + 1) / 200) * (0.5 + 0.5 * math.cos(math.pi * self.progress))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - decay)
        for kept, buffer in zip(self.average.buffers(), self.model.buffers(), strict=True):
            kept.copy_(buffer)
        value = float(loss.detach())
        self.loss = value if math.isnan(self.loss) else 0.98 * self.loss + 0.02 * value
        self._tick()

    def _tick(self) -> None:
        now = time.monotonic()
        self.seconds += now - self._clock
        self._clock = now
        if now - self._logged > 20:
            self._logged = now
            log.info("%s step %d, %.1f min, loss %.4f", self.file.stem, self.steps, self.seconds / 60, self.loss)
        if now - self._saved > 90:
            self._saved = now
            self.save()

    def save(self) -> None:
        """Write weights, average, optimiser and counters to one safetensors file, atomically."""
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"average.{k}": v for k, v in self.average.state_dict().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{k}": v for k, v in state.items()}
        counters = {"steps": str(self.steps), "seconds": str(self.seconds)}
        with whole(self.file) as unfinished:
            save_file({k: v.detach().contiguous().clone() for k, v in tensors.items()}, unfinished, metadata=counters)

    def _resume(self) -> None:
        with safe_open(self.file, framework="pt") as data:
            counters = data.metadata()
            tensors = {k: data.get_tensor(k) for k in data.keys()}
        self.steps, self.seconds = int(counters["steps"]), float(counters["seconds"])
        self.model.load_state_dict(_part(tensors, "model."))
        self.average.load_state_dict(_part(tensors, "average."))
        states: dict[int, dict[str, Tensor]] = {}
        for key, value in _part(tensors, "optimizer.").items():
            index, _, name = key.partition(".")
            states.setdefault(int(index), {})[name] = value
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": states})
        log.info("%s resumes at step %d, %.1f min", self.file.stem, self.steps, self.seconds / 60)


def load_average(model: nn.Module, file: Path) -> int:
    """Put the averaged weights of a checkpoint into `model` and return its step count."""
    with safe_open(file, framework="pt") as data:
        model.load_state_dict({k[8:]: data.get_tensor(k) for k in data.keys() if k.startswith("average.")})
        return int(data.metadata()["steps"])


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
