"""The bundled prior `fashion`: a stock `DDPMPipeline` that draws 32-pixel grey pictures of clothes, trained on Fashion-MNIST.

`DDPMPipeline.from_pretrained(str(path()))` loads it, and `prior: {component: unconditional, path: fashion}` is it as a prior; this
module only knows where it is and which classes it draws, so it imports neither torch nor diffusers. The weights, and those of the
classifier `fashion-classifier` that rewards can ask, are made by `python -m pipelines.fashion.build`.

Fashion-MNIST: Xiao, Rasul, Vollgraf, 2017, https://arxiv.org/abs/1708.07747
"""

from __future__ import annotations

from pathlib import Path

PATH = Path(__file__).parent / "weights"

CLASSES: tuple[str, ...] = (
    *("t-shirt", "trouser", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
)
"""Names by label, 0 to 9; the data set calls the first "T-shirt/top"."""

TOPS: tuple[str, ...] = ("t-shirt", "pullover", "coat", "shirt")
"""What is worn on the upper body, against the rest."""


def path() -> Path:
    """Folder of `fashion`, to give to `DDPMPipeline.from_pretrained`."""
    return PATH
