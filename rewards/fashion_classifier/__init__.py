"""The bundled classifier `fashion-classifier`: which of Fashion-MNIST's ten classes of clothes a small picture shows.

    reward: {component: classifier, model: fashion-classifier, target: sneaker}

is log p(sneaker | x), and `target: [t-shirt, pullover, coat, shirt]` log p(one of these | x). `classifier.json` says which network
of timm it is, how large its input, and the classes in order.
`python -m pipelines.fashion.build` made it; the data set is Fashion-MNIST: Xiao, Rasul, Vollgraf, 2017,
https://arxiv.org/abs/1708.07747, MIT licence.
"""

from __future__ import annotations

from pathlib import Path

PATH = Path(__file__).parent


def path() -> Path:
    """Folder with `classifier.json` and `model.safetensors`."""
    return PATH
