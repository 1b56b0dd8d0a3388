r"""Stable Diffusion 1.x and 2.x as prior and posterior: a stock `StableDiffusionPipeline`, made stochastic, with a LoRA.

Which prior is tilted. With guidance scale g > 1 a step uses the network output

    e_g(x_t) = e(x_t, "") + g · (e(x_t, prompt) - e(x_t, ""))

*guided*    p is the chain that samples with e_g, q_theta the same chain with the LoRA in both branches, the same g. It is
            an ordinary chain of Gaussian transitions, so log q - log p and log Z are exact for it; what is tilted is what
            the pipeline draws, not p(x | prompt) itself. Two network evaluations per step.
*unguided*  g = 1: p is the conditional model itself, one evaluation per step. The tuned network must then be *sampled* with
            g = 1 too: e_g mixes a tuned and a never-trained branch, and what it draws is a sample of neither posterior.

So g is one number for prior and posterior, it belongs to the fingerprint, and `verify` refuses another one.

Classifier-free guidance: Ho and Salimans, 2022, https://arxiv.org/abs/2207.12598
DDIM and eta: Song et al., 2020, https://arxiv.org/abs/2010.02502
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from pipelines._diffusers.export import elsewhere, snippet, write_lora
from pipelines._diffusers.folder import BUNDLED, is_hub_id, load_pipeline, prepare
from pipelines._diffusers.lora import ATTENTION, adapters_off, add_lora, load_lora, lora_parameters
from pipelines._diffusers.scheduler import check_eta, own_settings, scheduler_class, takes_eta
from pipelines._diffusers.settings import (
    DTYPES,
    check_device,
    check_dtype,
    check_guidance,
    check_same_prior,
    check_size,
    default_device,
    number_of_steps,
    own_size,
)

__all__ = ["StableDiffusion"]

COMPONENTS = ("vae", "unet", "text_encoder")
REMEMBERED_PROMPTS = 1024
"""Prompt embeddings kept; one takes 236 kB at the size of Stable Diffusion 1.5."""


class StableDiffusion:
    """A Stable Diffusion 1.x or 2.x pipeline (epsilon or v prediction) as a `Prior`; all is checked before weights load.

    Args:
        path: A diffusers folder, a hub id, or "emoji" for the bundled prior.
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
        OSError: a hub id cannot be fetched.
    """

    def __init__(
        self,
        path: str = "stable-diffusion-v1-5/stable-diffusion-v1-5",
        *,
        steps: int | None = None,
        timesteps: Sequence[int] | None = None,
        guidance: float = 1.0,
        tilted_prior: Literal["guided", "unguided"] | None = None,
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
        folder, files, sampler = _checked(
            {name: value for name, value in locals().items() if name != "self"}, fetch=True
        )
        self.path, self.guidance, self.eta, self.dtype = path, guidance, eta, dtype
        self.timesteps = None if timesteps is None else [int(t) for t in timesteps]
        self.steps = number_of_steps(steps, timesteps)
        self.negative_prompt, self.decode_batch = negative_prompt or "", decode_batch
        self._pipe, self._weights = _load(folder, files, sampler, dtype, device)
        self._size = (height, width) if height and width else own_size(self._pipe)
        self._embedded: dict[str, Tensor] = {}
        self._adapter: dict[str, Any] | None = None

    @staticmethod
    def check(**arguments: Any) -> None:
        """Check constructor arguments, and the files where they are here already, without loading weights.

        Raises:
            ValueError: see the class.
        """
        _checked(arguments, fetch=False)

    @property
    def pipe(self) -> Any:
        """The stock `StableDiffusionPipeline`."""
        return self._pipe

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self._pipe.unet.parameters()).device

    @property
    def dims(self) -> tuple[int, ...]:
        """Shape (channels, height, width) of one latent."""
        height, width = self._size
        factor = self._pipe.vae_scale_factor
        return (self._pipe.unet.config.in_channels, height // factor, width // factor)

    @property
    def tilted_prior(self) -> Literal["guided", "unguided"]:
        """Which prior the posterior tilts; see the module's docstring."""
        return "guided" if self.guidance > 1 else "unguided"

    def arguments(self, prompts: Sequence[str]) -> dict[str, Any]:
        """Keyword arguments of `pipe.__call__` for these prompts: embeddings, guidance, steps, eta, size."""
        call = self._settings() | {"prompt_embeds": self._embed(prompts)}
        if "negative_prompt" in call:
            call["negative_prompt_embeds"] = self._embed([call.pop("negative_prompt")] * len(prompts))
        return call

    def _settings(self) -> dict[str, Any]:
        """The arguments of `pipe.__call__` that do not depend on the prompt."""
        height, width = self._size
        call: dict[str, Any] = {
            **({"num_inference_steps": self.steps} if self.timesteps is None else {"timesteps": self.timesteps}),
            "guidance_scale": self.guidance,
            "height": height,
            "width": width,
        }
        call |= {"negative_prompt": self.negative_prompt} if self.guidance > 1 else {}
        call |= {"eta": self.eta} if takes_eta(self._pipe.scheduler) else {}
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
                self._embedded[prompt], _ = self._pipe.encode_prompt(prompt, self.device, 1, False)
        answer = torch.cat([self._embedded[prompt] for prompt in prompts])
        for prompt in list(self._embedded)[:-REMEMBERED_PROMPTS]:
            del self._embedded[prompt]
        return answer

    @torch.no_grad()
    def decode(self, x_0: Float[Tensor, "batch channels rows columns"]) -> Float[Tensor, "batch 3 height width"]:
        """Images in [0, 1], float32: what the pipeline itself answers for output_type="pt", without a safety checker."""
        vae, processor = self._pipe.vae, self._pipe.image_processor
        latents = x_0.to(self.device, DTYPES[self.dtype]) / vae.config.scaling_factor
        images = [
            processor.postprocess(vae.decode(part).sample, output_type="pt").float()
            for part in latents.split(self.decode_batch)
        ]
        return torch.cat(images)

    def attach(
        self,
        *,
        rank: PositiveInt = 8,
        alpha: PositiveFloat = 8.0,
        target_modules: Annotated[Sequence[str], Field(min_length=1)] = ATTENTION,
        seed: int = 0,
    ) -> None:
        """Add the posterior's LoRA to the UNet; at the start posterior = prior.

        Args:
            rank: Rank of every LoRA matrix pair.
            alpha: The update is scaled by alpha / rank.
            target_modules: Ends of module names: "to_q", "ff.net.2", "conv1", "time_emb_proj", "proj_in", …
            seed: Of the initial A matrices; the global random generators are left as they were.

        Raises:
            ValueError: see `pipelines._diffusers.lora.add_lora`.
        """
        add_lora(self._pipe.unet, rank=rank, alpha=alpha, target_modules=target_modules, seed=seed)
        self._adapter = {"rank": rank, "alpha": float(alpha), "target_modules": sorted(target_modules)}

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """The LoRA parameters by name; empty before `attach`."""
        return lora_parameters(self._pipe.unet)

    def as_prior(self) -> AbstractContextManager[None]:
        """Inside the block the network is the prior (adapters off)."""
        return adapters_off(self._pipe.unet)

    def adapter_state(self) -> dict[str, Tensor]:
        """A copy of the adapters' weights by name."""
        return {name: parameter.detach().clone() for name, parameter in self.parameters().items()}

    def load_adapter(self, state: Mapping[str, Tensor]) -> None:
        """Set the adapters' weights; refuses other names or shapes and then changes nothing."""
        load_lora(self._pipe.unet, state)

    def fingerprint(self) -> dict[str, Any]:
        """What a checkpoint must agree with, as plain JSON values."""
        sampler = self._pipe.scheduler
        return {
            "family": "stable_diffusion",
            "weights": self._weights,
            "dims": list(self.dims),
            "dtype": self.dtype,
            "guidance": {
                "tilted_prior": self.tilted_prior,
                "scale": float(self.guidance),
                "negative_prompt": self.negative_prompt if self.guidance > 1 else None,
            },
            "sampler": {
                "scheduler": type(sampler).__name__,
                "steps": self.steps,
                "timesteps": self.timesteps,
                "eta": float(self.eta) if takes_eta(sampler) else None,
                "settings": own_settings(sampler),
            },
            "adapter": self._adapter,
        }

    def verify(self, trained: Mapping[str, Any]) -> None:
        """Refuse to run a posterior on another prior than it was trained on; warn about another sampler.

        Args:
            trained: The `fingerprint` stored with the adapters.

        Raises:
            ValueError: the model, the image size, the guidance or the adapters' shape differ.
        """
        check_same_prior(self.fingerprint(), trained)

    def export(self, folder: Path, card: str) -> None:
        """Write the adapters for diffusers and, under kohya's names, for others; the scheduler's config; `card` as README.md.

        Raises:
            ValueError: there is no posterior yet.
        """
        if self._adapter is None:
            raise ValueError("There is no posterior to export: call attach(...) and load or train its adapters first.")
        write_lora(self._pipe, Path(folder), self._adapter["rank"], self._adapter["alpha"])
        self._pipe.scheduler.save_pretrained(Path(folder) / "scheduler")
        (Path(folder) / "README.md").write_text(card, encoding="utf-8")

    @property
    def base_model(self) -> str:
        """What to give to `StableDiffusionPipeline.from_pretrained`: a hub id or a folder."""
        return BUNDLED.get(self.path, self.path)

    def snippet(self, folder: str = "path/to/this/folder", prompt: str = "a cat") -> str:
        """Python that samples an exported posterior with plain diffusers, the way this prior samples it."""
        return snippet(self.base_model, self.pipe.scheduler, self.dtype, folder, prompt, self._settings())

    def elsewhere(self) -> str:
        """For the model card: which exported file is for which program, and the settings to use there."""
        return elsewhere(self.base_model, type(self.pipe.scheduler).__name__, self._settings())


def _checked(arguments: Mapping[str, Any], *, fetch: bool) -> Any:
    """Check constructor arguments; what `prepare` found, or None for a hub id that is not to be fetched."""
    from diffusers import StableDiffusionPipeline

    call = inspect.signature(StableDiffusion).bind(**arguments)
    call.apply_defaults()
    given = call.arguments
    check_guidance(given["guidance"], given["tilted_prior"], given["negative_prompt"])
    steps = number_of_steps(given["steps"], given["timesteps"])
    check_size(steps, given["height"], given["width"], given["decode_batch"])
    check_dtype(given["dtype"])
    check_device(given["device"])
    check_eta(given["eta"])
    scheduler_class(given["scheduler"] or "DDIMScheduler")
    if is_hub_id(given["path"]) and not fetch:
        return None
    chosen = ("timesteps", "eta", "scheduler", "scheduler_arguments", "variant", "revision")
    rest = {name: given[name] for name in chosen}
    return prepare(StableDiffusionPipeline, given["path"], COMPONENTS, steps=steps, **rest)


def _load(folder: Path, variant: str | None, sampler: Any, dtype: str, device: str | None) -> tuple[Any, str]:
    from diffusers import StableDiffusionPipeline

    return load_pipeline(
        StableDiffusionPipeline,
        folder,
        COMPONENTS,
        dtype=DTYPES[dtype],
        device=torch.device(device or default_device()),
        scheduler=sampler,
        variant=variant,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
