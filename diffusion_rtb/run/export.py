"""Hand the posterior out: the adapters in diffusers' own format, with a model card."""

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

__all__ = ["export_posterior"]


def export_posterior(
    config: RunConfig,
    prior: Prior,
    folder: Path | str,
    trained: Progress,
    evaluation: Mapping[str, Mapping[str, Any]] | None = None,
) -> Path:
    """Write FOLDER/lora, whole or not at all: weights that plain diffusers loads, and their card, see `model_card`."""
    target = Path(folder, "lora")
    card = model_card(
        config.model_dump(mode="json"),
        base_model=prior.base_model if isinstance(prior, HasBaseModel) else config.prior.component,
        snippet=prior.snippet(prompt=config.prompts.texts()[0]) if isinstance(prior, HasSnippet) else "",
        fingerprint=prior.fingerprint(),
        elsewhere=prior.elsewhere() if isinstance(prior, HasElsewhere) else "",
        trained=trained,
        evaluation=evaluation,
        start=started_from(Path(folder)),
    )
    with whole_folder(target) as unfinished:
        prior.export(unfinished, card)
    return target
