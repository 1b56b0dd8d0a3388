"""Where the networks of a pipeline are, and when: what they take of a device's memory while nobody needs them.

offload "text_encoders"     text encoders come to the device to encode prompts, and leave when the denoiser is needed
offload "all"               of text encoders, denoiser and VAE only the one in use is on the device
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from diffusion_rtb.config.section import Section

if TYPE_CHECKING:
    from pipelines._models.staging import Staging

__all__ = ["Memory"]


class Memory(Section):
    """What a pipeline may do to take less memory; all of it off by default. Only `vae_tiling` changes what is computed."""

    gradient_checkpointing: bool = False
    """The denoiser's activations are computed again for the gradient, block by block, instead of being held."""
    offload: Literal["text_encoders", "all"] | None = None
    """Networks that wait on the host for their turn; each turn is a copy of its weights to the device."""
    vae_tiling: bool = False
    """The VAE decodes large images tile by tile. Tiles are blended, so that pictures, and rewards, are others."""
    embeddings: str | None = None
    """Folder that keeps the embeddings of prompts by content, for all runs; with `offload` the text encoders stay on the host."""

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What of it decides about pictures; empty where nothing does."""
        return {"vae_tiling": True} if self.vae_tiling else {}

    def place(self, pipe: Any, denoiser: str, device: torch.device) -> Staging | None:
        """Bring a pipeline that was loaded to the host where it belongs, and switch on what was asked for.

        Raises:
            ValueError: a part of the pipeline cannot do it.
        """
        if self.gradient_checkpointing:
            _able(
                pipe, denoiser, "enable_gradient_checkpointing", "gradient_checkpointing"
            ).enable_gradient_checkpointing()
        if self.vae_tiling:
            _able(pipe, "vae", "enable_tiling", "vae_tiling").enable_tiling()
        if self.embeddings is not None and not hasattr(pipe, "encode_prompt"):
            raise ValueError(f"memory.embeddings: {type(pipe).__name__} has no text encoders. Leave it out.")
        if self.offload is None:
            return None
        from pipelines._models.staging import Staging

        networks = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
        waiting = [part for name, part in networks.items() if self.offload == "all" or name.startswith("text_encoder")]
        return Staging([*networks.values()], waiting, device)


def _able(pipe: Any, name: str, method: str, setting: str) -> Any:
    network = getattr(pipe, name, None)
    if not hasattr(network, method) or (
        name != "vae" and not getattr(network, "_supports_gradient_checkpointing", True)
    ):
        raise ValueError(f"memory.{setting}: the {name} of {type(pipe).__name__} cannot do that. Leave it out.")
    return network
