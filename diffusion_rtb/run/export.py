"""Hand the posterior out: the adapters in diffusers' own format, with a model card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusion_rtb.config.load import RunConfig
from diffusion_rtb.files.whole import whole_folder
from diffusion_rtb.interfaces import Prior
from diffusion_rtb.run.model_card import model_card
from diffusion_rtb.run.progress import Progress

__all__ = ["export_posterior"]


def export_posterior(
    config: RunConfig,
    prior: Prior,
    folder: Path | str,
    trained: Progress,
    evaluation: Mapping[str, Mapping[str, Any]] | None = None,
) -> Path:
    """Write FOLDER/lora, whole or not at all: weights that plain diffusers loads, and their card; return that folder.

    Args:
        config: Of the run that trained the posterior.
        prior: With the posterior attached.
        folder: The run's folder.
        trained: How far, and for which beta.
        evaluation: The card's table, metric -> {"prior": value, "posterior": value}; None: not evaluated yet.
    """
    target = Path(folder, "lora")
    # A pipeline family may know where its base model comes from and how plain diffusers samples it.
    snippet, elsewhere = getattr(prior, "snippet", None), getattr(prior, "elsewhere", None)
    card = model_card(
        config.model_dump(mode="json"),
        base_model=getattr(prior, "base_model", config.prior.component),
        snippet=snippet(prompt=config.prompts.texts()[0]) if snippet else "",
        fingerprint=prior.fingerprint(),
        elsewhere=elsewhere() if elsewhere else "",
        trained=trained,
        evaluation=evaluation,
    )
    with whole_folder(target) as unfinished:
        prior.export(unfinished, card)
    return target
