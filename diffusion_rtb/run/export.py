"""Hand the posterior out: adapters or trained weights in diffusers' own format, with a model card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusion_rtb.abilities import HasBaseModel, HasElsewhere, HasSnippet
from diffusion_rtb.config.load import RunConfig
from diffusion_rtb.files.whole import whole_folder
from diffusion_rtb.interfaces import Prior
from diffusion_rtb.run.manifest import started_from
from diffusion_rtb.run.model_card import model_card
from diffusion_rtb.run.progress import Progress

__all__ = ["export_posterior", "exported"]


def exported(folder: Path, fingerprint: Mapping[str, Any]) -> Path:
    """Where the posterior of a run's folder is handed out: lora/, or posterior/ where the weights themselves were trained."""
    return folder / ("posterior" if "full" in (fingerprint.get("adapter") or {}) else "lora")


def export_posterior(
    config: RunConfig,
    prior: Prior,
    folder: Path | str,
    trained: Progress,
    evaluation: Mapping[str, Mapping[str, Any]] | None = None,
) -> Path:
    """Write FOLDER/lora or FOLDER/posterior, whole or not at all: weights that plain diffusers loads, and their card.

    See `exported` and `model_card`.
    """
    fingerprint = prior.fingerprint()
    target = exported(Path(folder), fingerprint)
    card = model_card(
        config.model_dump(mode="json"),
        base_model=prior.base_model if isinstance(prior, HasBaseModel) else config.prior.component,
        snippet=prior.snippet(prompt=config.prompts.texts()[0]) if isinstance(prior, HasSnippet) else "",
        fingerprint=fingerprint,
        elsewhere=prior.elsewhere() if isinstance(prior, HasElsewhere) else "",
        trained=trained,
        evaluation=evaluation,
        start=started_from(Path(folder)),
    )
    with whole_folder(target) as unfinished:
        prior.export(unfinished, card)
    return target
