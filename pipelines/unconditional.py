"""Pixel models without conditioning, DDPM and DDIM, as prior and posterior: a stock `DDPMPipeline` or `DDIMPipeline` with a LoRA.

The network sees no prompt, so a run has one: `prompts: {list: [""]}`, or any text that the reward wants to be asked about
(`clip_score` with "a cat"). Several could not be told apart by the posterior, and are refused.

DDPM: Ho et al., 2020, https://arxiv.org/abs/2006.11239. DDIM: Song et al., 2020, https://arxiv.org/abs/2010.02502
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_rtb.files.completeness import read_json
from pipelines._diffusers.lora import ATTENTION
from pipelines._diffusers.prior import DiffusersPrior
from pipelines._diffusers.settings import PriorSettings, check_plain
from pipelines._models.proof import Parts

__all__ = ["Unconditional"]


class Unconditional(DiffusersPrior):
    """A pipeline of one `UNet2DModel` on pixels, 3 channels or grey, as a `Prior`; all is checked before weights load.

    Args:
        path: A diffusers folder or a hub id, of either pipeline.
        **settings: See `DiffusersPrior`. The scheduler, DDPMScheduler by default, runs in a `DDPMPipeline`, DDIMScheduler in a
            `DDIMPipeline`. Others must not scale their states, as the pipeline does not either.

    Raises:
        ValueError: a setting is out of range, the sampler is deterministic or scales its states, or the folder is incomplete,
            damaged or of another kind.
    """

    family = "unconditional"
    pipeline = "DDPMPipeline"
    published = "google/ddpm-cifar10-32"
    parts = Parts(("unet",))
    denoiser = "unet"
    targets = ATTENTION
    sampler = "DDPMScheduler"

    def __init__(self, path: str = published, **settings: Unpack[PriorSettings]) -> None:
        self.pipeline = "DDIMPipeline" if settings.get("scheduler") == "DDIMScheduler" else "DDPMPipeline"
        super().__init__(path, **settings)

    def read_index(self, folder: Path) -> Sequence[str]:
        """Both pipelines are made of the same parts; the sampler decides which of them runs."""
        return ("DDPMPipeline", "DDIMPipeline")

    def check_files(self, folder: Path) -> None:
        """Refuse a network that draws something else than pictures, or predicts its variance too."""
        where = folder / "unet" / "config.json"
        config = read_json(where)
        taken, given = (int(config.get(name, 3)) for name in ("in_channels", "out_channels"))
        if taken not in (1, 3) or given != taken:
            raise ValueError(
                f"{where}: in_channels is {taken} and out_channels {given}; this prior draws pictures of 3 channels, or 1, with a "
                "network that answers as many. Latents need an autoencoder, and a predicted variance differs in each dimension."
            )

    def check_scheduler(self, scheduler: Any) -> None:
        """The pipelines hand the network their states as they are, and only `DDIMPipeline` passes eta on."""
        check_plain(scheduler, self.pipeline, eta=self.pipeline == "DDIMPipeline")

    def read_prompts(self, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]], folder: Path) -> None:
        """Refuse more prompts than one."""
        if len(prompts) > 1:
            raise ValueError(
                f"{len(prompts)} prompts, the first are {prompts[0]!r} and {prompts[1]!r}: the network of an unconditional model "
                'sees none of them, so its posterior can be that of one prompt only. Give one, such as prompts.list: [""].'
            )

    def settings(self) -> dict[str, Any]:
        """Steps and eta, as arguments of the pipeline's call; in bfloat16, which NumPy lacks, it can answer tensors only."""
        return super().settings() | ({"output_type": "pt"} if self.dtype == "bfloat16" else {})

    def arguments(self, prompts: Sequence[str]) -> dict[str, Any]:
        """Keyword arguments of `pipe.__call__` for so many samples."""
        return self.settings() | {"batch_size": len(prompts), "output_type": "pt"}

    def features(self, prompts: Sequence[str]) -> Float[Tensor, "batch 0"]:
        """Nothing is known of a prompt."""
        return torch.zeros(len(prompts), 0, device=self.device)

    def decode_with_gradient(
        self, x_0: Float[Tensor, "batch channels rows columns"]
    ) -> Float[Tensor, "batch 3 rows columns"]:
        """Images in [0, 1], float32: what the pipeline itself answers; grey ones three times."""
        images = super().decode_with_gradient(x_0)
        return images.expand(-1, 3, -1, -1)

    def as_written(self, prompt: str) -> str:
        """The pipeline's call takes no prompt."""
        return ""
