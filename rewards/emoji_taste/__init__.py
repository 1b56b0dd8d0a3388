"""The bundled head `emoji-taste` of `linear_probe`: how much somebody who likes symmetric and colourful pictures likes one.

    reward: {component: linear_probe}

It stands for a model of preferences whose rule is known: pairs of the bundled prior's pictures, labelled by the odds
exp(s_i − s_j) of the rule in `pipelines/emoji/build/taste.py`, and one linear layer on `emoji-clip` fitted to the labels, as
reward models are to those of people. `python -m pipelines.emoji.build --stage taste` made it.
"""

from __future__ import annotations

from pathlib import Path

PATH = Path(__file__).parent


def path() -> Path:
    """Folder with `head.safetensors`."""
    return PATH
