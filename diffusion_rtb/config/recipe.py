"""What was asked of a run, in one sentence that people can read aloud."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePath

from diffusion_rtb.config.sections import Component, RunConfig

__all__ = ["component_name", "evaluated_as", "recipe"]

WORDS: Mapping[str, str] = {
    "rtb": "RTB", "trust_pcl": "Trust-PCL", "vargrad": "VarGrad", "ddpo": "DDPO", "dpo": "DPO", "dpok": "DPOK", "grpo": "GRPO",
    "ram": "RAM", "nft": "DiffusionNFT", "orw_cfm_w2": "ORW-CFM-W2", "elbo_vargrad": "ELBO VarGrad",
    "reinforce_kl": "REINFORCE with KL", "reinforce_naive": "naive REINFORCE", "gmm": "a Gaussian mixture",
    "gaussian": "a Gaussian", "flux": "FLUX", "flux2": "FLUX.2", "stable_diffusion_xl": "Stable Diffusion XL",
    "dit": "DiT", "pixart": "PixArt", "qwen_image": "Qwen-Image", "z_image": "Z-Image", "lumina2": "Lumina 2",
}  # fmt: skip
"""Names that a rule would misspell."""


def recipe(config: RunConfig, beta: float | None = None, iterations: str | None = None) -> str:
    """Trust-PCL per step on Stable Diffusion (emoji), reward classifier, beta 2, 100 iterations.

    Args:
        config: Of the run.
        beta: What it was trained for; None: the config's.
        iterations: How far it was trained; None: as far as the config says.
    """
    parts = [
        f"{_objective(config.objective)} on {_prior(config.prior)}",
        f"reward {component_name(config.reward)}",
        f"beta {config.beta.value if beta is None else beta:.6g}",
        f"{config.train.iterations if iterations is None else iterations} iterations",
    ]
    parts += [] if config.train.ema is None else [f"moving average {config.train.ema:g} of the posterior"]
    return ", ".join(parts)


def component_name(component: Component) -> str:
    """A component as people call it: clip_score, or the attribute of `module:attribute`."""
    return component.component.rpartition(":")[2]


def _objective(component: Component) -> str:
    name = _spelled(component_name(component))
    length = (component.model_extra or {}).get("length")
    return f"{name} per step" if length == 1 else f"{name} over {length} steps" if isinstance(length, int) else name


def _prior(component: Component) -> str:
    name, path = _spelled(component_name(component)), (component.model_extra or {}).get("path")
    return f"{name} ({PurePath(path).name})" if isinstance(path, str) and path else name


def _spelled(name: str) -> str:
    """stable_diffusion_3 as Stable Diffusion 3; a class of one's own keeps its name."""
    if name in WORDS:
        return WORDS[name]
    return " ".join(word.capitalize() for word in name.split("_")) if re.fullmatch(r"[a-z0-9_]+", name) else name


def evaluated_as(config: RunConfig) -> str:
    """What something that was made elsewhere is evaluated as: on Stable Diffusion (emoji), reward classifier, beta 2."""
    return f"on {_prior(config.prior)}, reward {component_name(config.reward)}, beta {config.beta.value:.6g}"
