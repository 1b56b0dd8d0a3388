"""The classifier behind `model: fashion-classifier`: a small network of timm, trained with smoothed labels.

The reward is log p(y | x), so p has to mean something: labels are smoothed by 0.02, which keeps the log-probability of a class that
a picture is not near -6 nats instead of anywhere, and leaves p calibrated without a temperature.
Label smoothing and calibration: Müller, Kornblith, Hinton, 2019, https://arxiv.org/abs/1906.02629
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import timm
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from pipelines.emoji.build.learning.training import Training, load_average
from pipelines.fashion import CLASSES
from pipelines.fashion.build.data import Pictures

log = logging.getLogger(__name__)

ARCHITECTURE = "test_resnet"  # of timm; 0.4 M parameters
SIZE = 64  # pixels that the pictures are enlarged to: the network divides its input by 32
BATCH, RATE, DECAY, SMOOTHING = 128, 2e-3, 0.998, 0.02
NOISE = 0.1  # largest standard deviation added; a chain's last step leaves pictures softer or rougher than real ones
SHIFT = 2  # pixels, the border


def create() -> Any:
    """The untrained network."""
    return timm.create_model(ARCHITECTURE, pretrained=False, num_classes=len(CLASSES))


def train(pictures: Pictures, work: Path, minutes: float) -> None:
    """Train for `minutes` of wall time in total; the checkpoint is `work/classifier.safetensors`."""
    torch.manual_seed(0)
    model = create()
    run = Training(model, work / "classifier.safetensors", minutes=minutes, lr=RATE, decay=DECAY)
    torch.manual_seed(1 + run.steps)
    while not run.done:
        chosen = torch.randint(len(pictures.labels), (BATCH,))
        x = prepared(augmented(pictures.images[chosen]))
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(x)
        run.step(F.cross_entropy(logits.float(), pictures.labels[chosen], label_smoothing=SMOOTHING))


def augmented(images: Float[Tensor, "batch 1 32 32"]) -> Float[Tensor, "batch 1 32 32"]:
    """One shift for all, half of them mirrored, with noise of another strength each."""
    rows, columns = torch.randint(-SHIFT, SHIFT + 1, (2,)).tolist()
    moved = torch.roll(images, (rows, columns), (2, 3))  # the border is black, so what comes in is black
    mirrored = torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, moved.flip(3), moved)
    return (mirrored + NOISE * torch.rand(len(images), 1, 1, 1) * torch.randn_like(images)).clamp(-1, 1)


def prepared(images: Float[Tensor, "batch 1 32 32"]) -> Float[Tensor, "batch 3 size size"]:
    """What the reward feeds the network with: three equal channels, enlarged."""
    large = F.interpolate(images, size=(SIZE, SIZE), mode="bilinear", antialias=True)
    return large.expand(-1, 3, -1, -1)  # timm's mean and deviation of this network are 1/2: [-1, 1] already


@torch.no_grad()
def logits(model: Any, images: Float[Tensor, "count 1 32 32"]) -> Float[Tensor, "count classes"]:
    """Outputs for pictures in [-1, 1]."""
    return torch.cat([model(prepared(part)) for part in images.split(500)])


def calibration_error(
    log_probs: Float[Tensor, "count classes"], labels: Int[Tensor, " count"], bins: int = 15
) -> float:
    """ECE = sum_b |b|/n · |accuracy_b - confidence_b| over equal bins of the largest probability.

    Guo, Pleiss, Sun, Weinberger, 2017, https://arxiv.org/abs/1706.04599
    """
    confidence, predicted = log_probs.exp().max(1)
    right = (predicted == labels).float()
    bin_of = (confidence * bins).long().clamp_max(bins - 1)
    gaps = [(right[bin_of == b] - confidence[bin_of == b]).sum().abs() for b in range(bins)]
    return float(torch.stack(gaps).sum() / len(labels))


def trained(work: Path) -> tuple[Any, int]:
    """The averaged weights and the number of training steps behind them."""
    model = create()
    steps = load_average(model, work / "classifier.safetensors")
    return model.requires_grad_(False).eval(), steps
