"""Stable Diffusion 1.x and 2.x as prior and posterior: a stock `StableDiffusionPipeline`, made stochastic, with a LoRA.

Which prior is tilted with classifier-free guidance, and which without, is in `pipelines._diffusers.guidance`.

DDIM and eta: Song et al., 2020, https://arxiv.org/abs/2010.02502
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from pipelines._diffusers.guidance import Guidance, TiltedPrior
from pipelines._diffusers.kohya import elsewhere, write_kohya
from pipelines._diffusers.lora import ATTENTION
from pipelines._diffusers.prior import DiffusersPrior
from pipelines._diffusers.proof import Parts
from pipelines._diffusers.settings import DTYPES, check_size, own_size
from pipelines._diffusers.shapes import check_shapes

__all__ = ["StableDiffusion"]

REMEMBERED_PROMPTS = 1024
"""Prompt embeddings kept; one takes 236 kB at the size of Stable Diffusion 1.5."""


class StableDiffusion(DiffusersPrior):
    """A Stable Diffusion 1.x or 2.x pipeline (epsilon or v prediction) as a `Prior`; all is checked before weights load.

    Args:
        path: A diffusers folder, a hub id, "emoji" for the bundled prior, or "random:sd15" for random weights in its place.
        steps: Denoising steps T; 50 by default.
        timesteps: Instead of `steps` the timesteps themselves, falling, where the scheduler takes them (DDPMScheduler). More of
            them where the reward is decided: a Gaussian can follow the tilt of a transition only if it decides little.
        guidance: Classifier-free guidance scale g >= 1, the same for prior and posterior; 1 is none.
        tilted_prior: States which prior is tilted, "guided" (needs guidance > 1) or "unguided" (needs guidance 1). The
            default follows from `guidance`; stating it turns a later change of `guidance` into an error.
        eta: Noise level in (0, 1] of schedulers that have one (DDIM). 1 is the DDPM posterior variance. Below 1 the chain
            is not memoryless: x_0 depends on x_T, and one log Z per prompt cannot fit.
        scheduler: Class name in diffusers; DDIMScheduler by default. It keeps the pipeline's own noise schedule.
        scheduler_arguments: Constructor arguments of the scheduler that differ from the pipeline's.
        negative_prompt: What guidance moves away from; the empty prompt by default.
        dtype: Of the frozen networks: "float32", "float16" or "bfloat16". Adapters are always float32.
        device: Where to run, such as "cpu" or "cuda:1"; accelerate's choice by default.
        height: Image height in pixels, a multiple of 8, together with `width`; the model's own size by default.
        width: Image width in pixels.
        decode_batch: Images the autoencoder decodes at once.
        variant: Of the weight files, as in `from_pretrained`; by default the plain ones or, where there are none, "fp16".
        revision: Branch, tag or commit of a hub id.

    Raises:
        ValueError: a setting is out of range, the sampler is deterministic, or the folder is incomplete, damaged or of
            another kind.
    """

    family = "stable_diffusion"
    pipeline = "StableDiffusionPipeline"
    parts = Parts(("vae", "unet", "text_encoder"), {"tokenizer": "text_encoder"})
    denoiser = "unet"
    targets = ATTENTION
    # What the stock pipeline insists on; older configs lack both, and clipping latents ruins them.
    sampler_settings: ClassVar = {"clip_sample": False, "steps_offset": 1}
    without = ("safety_checker", "feature_extractor")
    options: ClassVar = {"requires_safety_checker": False}

    def __init__(
        self,
        path: str = "stable-diffusion-v1-5/stable-diffusion-v1-5",
        *,
        steps: int | None = None,
        timesteps: Sequence[int] | None = None,
        guidance: float = 1.0,
        tilted_prior: TiltedPrior | None = None,
        eta: float = 1.0,
        scheduler: str | None = None,
        scheduler_arguments: dict[str, Any] | None = None,
        negative_prompt: str | None = None,
        dtype: Literal["float32", "float16", "bfloat16"] = "float32",
        device: str | None = None,
        height: int | None = None,
        width: int | None = None,
        decode_batch: int = 8,
        variant: str | None = None,
        revision: str | None = None,
    ) -> None:
        self.guidance = Guidance(guidance, tilted_prior, negative_prompt)
        check_size(height, width, decode_batch)
        self.decode_batch, self._given_size = decode_batch, (height, width) if height and width else None
        self._embedded: dict[str, Tensor] = {}
        super().__init__(
            path,
            steps=steps,
            timesteps=timesteps,
            eta=eta,
            scheduler=scheduler,
            scheduler_arguments=scheduler_arguments,
            dtype=dtype,
            device=device,
            variant=variant,
            revision=revision,
        )

    def check_files(self, folder: Path) -> None:
        """Refuse a UNet that a text-to-image pipeline cannot call; see `check_shapes`."""
        check_shapes(folder)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of an image, in pixels."""
        return self._given_size or own_size(self.network, self.pipe.vae_scale_factor)

    @property
    def dims(self) -> tuple[int, ...]:
        """Shape (channels, height, width) of one latent."""
        height, width = self.size
        factor = self.pipe.vae_scale_factor
        return (self.network.config.in_channels, height // factor, width // factor)

    def settings(self) -> dict[str, Any]:
        """Steps, eta, guidance and size, as arguments of the pipeline's call."""
        height, width = self.size
        return super().settings() | self.guidance.settings() | {"height": height, "width": width}

    def arguments(self, prompts: Sequence[str]) -> dict[str, Any]:
        """Keyword arguments of `pipe.__call__` for these prompts: embeddings, guidance, steps, eta, size."""
        call = self.settings() | {"prompt_embeds": self._embed(prompts)}
        if "negative_prompt" in call:
            call["negative_prompt_embeds"] = self._embed([call.pop("negative_prompt")] * len(prompts))
        return call

    def features(self, prompts: Sequence[str]) -> Float[Tensor, "batch features"]:
        """Mean of each prompt's token embeddings, float32, detached."""
        return self._embed(prompts).float().mean(1)

    @torch.no_grad()
    def _embed(self, prompts: Sequence[str]) -> Float[Tensor, "batch tokens features"]:
        """Token embeddings; the text encoder sees each distinct prompt once, alone, whatever batch it came in.

        So an embedding does not depend on its neighbours and replay meets the very numbers of the rollout.
        """
        for prompt in dict.fromkeys(prompts):
            if prompt not in self._embedded:
                self._embedded[prompt], _ = self.pipe.encode_prompt(prompt, self.device, 1, False)
        answer = torch.cat([self._embedded[prompt] for prompt in prompts])
        for prompt in list(self._embedded)[:-REMEMBERED_PROMPTS]:
            del self._embedded[prompt]
        return answer

    @torch.no_grad()
    def decode(self, x_0: Float[Tensor, "batch channels rows columns"]) -> Float[Tensor, "batch 3 height width"]:
        """Images in [0, 1], float32: what the pipeline itself answers for output_type="pt", without a safety checker."""
        vae, processor = self.pipe.vae, self.pipe.image_processor
        latents = x_0.to(self.device, DTYPES[self.dtype]) / vae.config.scaling_factor
        images = [
            processor.postprocess(vae.decode(part).sample, output_type="pt").float()
            for part in latents.split(self.decode_batch)
        ]
        return torch.cat(images)

    def fingerprint(self) -> dict[str, Any]:
        """What a checkpoint must agree with, the guidance too."""
        return super().fingerprint() | {"guidance": self.guidance.fingerprint()}

    def export(self, folder: Path, card: str) -> None:
        """Write the adapters for diffusers and, under kohya's names, for others; the scheduler's config; `card` as README.md."""
        super().export(folder, card)
        write_kohya(self.network, Path(folder), self.fingerprint()["adapter"]["alpha"])

    def elsewhere(self) -> str:
        """For the model card: which exported file is for which program, and the settings to use there."""
        sampler = type(self.pipe.scheduler).__name__
        return elsewhere(self.base_model, sampler, self.settings(), "Stable Diffusion 1.x and 2.x")
