"""Does a UNet fit the autoencoder and the text encoder beside it? Asked of their config files, before any weights are loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusion_rtb.files.completeness import read_json

__all__ = ["check_shapes"]

NEEDED = {
    8: "it edits pictures (InstructPix2Pix) and wants one beside the noise",
    9: "it fills in pictures (inpainting) and wants a mask and a picture beside the noise",
    5: "it wants a depth map beside the noise",
    7: "it enlarges pictures and wants a small one beside the noise",
}
"""What a network with so many input channels is, where the latents have 4."""


def check_shapes(folder: Path) -> None:
    """Refuse networks that a text-to-image pipeline cannot call: they would fail in a matrix product, hours or a download later.

    Args:
        folder: Holds unet/, vae/ and text_encoder/ with a config.json each.

    Raises:
        ValueError: the UNet wants other inputs than latents, a timestep and the prompt's embeddings of this text encoder.
    """
    unet, vae, text = (read_json(folder / name / "config.json") for name in ("unet", "vae", "text_encoder"))
    where = folder / "unet" / "config.json"
    _check_channels(where, unet, int(vae.get("latent_channels", 4)))
    _check_width(where, unet, text)
    for key, wants in (
        ("class_embed_type", "a class label"),
        ("num_class_embeds", "a class label"),
        ("addition_embed_type", "further embeddings (as SDXL does)"),
    ):
        if unet.get(key) is not None:
            raise ValueError(
                f"{where}: {key} is {unet[key]!r}, so this UNet wants {wants}, which this pipeline does not give it. "
                "Use a text-to-image model that is called with a prompt alone, or the prior of its own family."
            )


def _check_channels(where: Path, unet: Mapping[str, Any], latents: int) -> None:
    taken, given = int(unet.get("in_channels", 4)), int(unet.get("out_channels", 4))
    if taken != latents:
        why = NEEDED.get(taken, "it wants something beside the noise") if latents == 4 else "it belongs to another VAE"
        raise ValueError(
            f"{where}: in_channels is {taken}, and the VAE's latents have {latents}: {why}. Use a text-to-image model."
        )
    if given != latents:
        why = "it predicts a variance besides" if given == 2 * latents else "it belongs to another VAE"
        raise ValueError(
            f"{where}: out_channels is {given}, and the VAE's latents have {latents}: {why}. Use a model that predicts the noise "
            "(epsilon or v) alone."
        )


def _check_width(where: Path, unet: Mapping[str, Any], text: Mapping[str, Any]) -> None:
    """The prompt's embeddings as the UNet reads them and as the text encoder writes them."""
    through = unet.get("encoder_hid_dim")
    key = "cross_attention_dim" if through is None else "encoder_hid_dim"
    wanted = unet.get(key, 1280)
    widths = set(wanted) if isinstance(wanted, list) else {wanted}
    made = text.get("hidden_size")
    if made is not None and widths != {made}:
        raise ValueError(
            f"{where}: {key} is {wanted}, and the text encoder's embeddings have {made} numbers ({where.parents[1]}/text_encoder/"
            "config.json, hidden_size): the two are of different models. Copy text_encoder and tokenizer from the UNet's own model."
        )
