"""All of a diffusers pipeline as a `Prior` that is not of one family: found, proved whole, made stochastic, with a LoRA.

A family is a subclass in a file of its own. It says which pipeline of diffusers it is and what the pipeline is made of (see
`Family`), and how it is called: `arguments` and `features`, which `text_to_image.py` does for prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any

import torch
from jaxtyping import Float
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from pipelines._diffusers.decoding import decoded, state_shape
from pipelines._diffusers.export import snippet
from pipelines._diffusers.lora import check_only
from pipelines._diffusers.posterior import Lora, Posterior, posterior_of
from pipelines._diffusers.scheduler import (
    build_scheduler,
    check_eta,
    check_sampler,
    own_settings,
    scheduler_class,
    takes_eta,
)
from pipelines._diffusers.settings import DTYPES, check_run, check_timesteps, default_device, number_of_steps
from pipelines._models.additions import Additions
from pipelines._models.family import Family
from pipelines._models.folder import BUNDLED
from pipelines._models.memory import Memory
from pipelines._models.model import Model
from pipelines._models.speed import Speed

__all__ = ["DiffusersPrior"]


class DiffusersPrior(Family):
    """A folder of diffusers as prior and posterior; the constructor checks all it can, and the weights load at first use.

    Args:
        path: A diffusers folder, a hub id, the name of a bundled prior, or "random:NAME", see `random_weights`.
        steps: Denoising steps T; 50 by default.
        timesteps: Instead of `steps` the timesteps themselves, falling.
        eta: Noise level in [0, 1] of schedulers that have one; 0, no noise, for objectives that learn from noised samples.
        scheduler: Class name in diffusers; the family's `sampler` by default. It keeps the pipeline's own noise schedule.
        scheduler_arguments: Constructor arguments of the scheduler that differ from the pipeline's.
        dtype: Of the frozen networks, a name of `DTYPES`. Adapters are always float32.
        device: Where to run; accelerate's choice by default.
        memory: What it may do to take less memory, see `Memory`.
        speed: How its denoiser is computed, see `Speed`.
        decode_batch: Samples decoded at once.
        vae: A diffusers folder of an autoencoder to use instead of the pipeline's own.
        lora: A LoRA, a .safetensors file or a folder, that is merged into the prior; the posterior's own comes on top.
        lora_scale: What that LoRA's update is multiplied by.
        textual_inversions: Tokens that prompts use -> the .safetensors files that hold what was learned for them.
        config: For a `path` that is one .safetensors file: a diffusers folder with the configs of its architecture.
        variant: Of the weight files; by default the plain ones or, where there are none, "fp16".
        revision: Branch, tag or commit of a hub id.

    Raises:
        ValueError: a setting is out of range, the sampler cannot be recorded, or the folder is incomplete, damaged or of
            another kind.
    """

    def __init__(
        self,
        path: str,
        *,
        steps: int | None = None,
        timesteps: Sequence[int] | None = None,
        eta: float = 1.0,
        scheduler: str | None = None,
        scheduler_arguments: Mapping[str, Any] | None = None,
        dtype: str = "float32",
        device: str | None = None,
        memory: Memory | None = None,
        speed: Speed | None = None,
        decode_batch: int = 8,
        vae: str | None = None,
        lora: str | None = None,
        lora_scale: float = 1.0,
        textual_inversions: Mapping[str, str] | None = None,
        config: str | None = None,
        variant: str | None = None,
        revision: str | None = None,
    ) -> None:
        self.path, self.eta, self.dtype = path, eta, dtype
        self.timesteps = None if timesteps is None else [int(t) for t in timesteps]
        self.steps = number_of_steps(steps, timesteps)
        check_run(dtype, device, decode_batch)
        check_eta(eta)
        self.decode_batch = decode_batch
        additions = Additions(vae, lora, lora_scale, dict(textual_inversions or {}))
        self._model = Model(path, self, additions, config=config, variant=variant, revision=revision)
        scheduler_class(scheduler or self.sampler)
        self._scheduler = scheduler or self.sampler, dict(scheduler_arguments or {})
        self._device = device
        self.memory, self.speed = memory or Memory(), speed or Speed()
        self.speed.check()
        self._staging: Any = None
        self._pipe: Any = None
        self._digest = ""
        self._dims: tuple[int, ...] | None = None
        self._posterior: Posterior | None = None
        self.why_no_noise: str | None = None  # see `KnowsNoise`
        # A hub id is not fetched before the run starts.
        self._sampler: Any = self._built_sampler() if self._model.here else None

    def _built_sampler(self) -> Any:
        """The sampler on the model's own noise schedule, after the model has been proved; no weights are loaded."""
        config = self._model.scheduler_config  # first: the folder may decide which scheduler it is
        name, arguments = self._scheduler
        sampler = build_scheduler(config, name, arguments, always=self.sampler_settings, predicts=self.predicts)
        self.check_scheduler(sampler)
        check_timesteps(self.pipeline, self.timesteps)
        self.why_no_noise = check_sampler(sampler, self.steps, self.eta, self.timesteps)
        return sampler

    def load_weights(self) -> None:
        """Load the pipeline; a hub id is fetched first. Once.

        Raises:
            ValueError: see the class, for a hub id.
            OSError: a hub id cannot be fetched.
        """
        if self._pipe is not None:
            return
        sampler = self._sampler or self._built_sampler()
        device = torch.device(self._device or default_device())
        first = torch.device("cpu") if self.memory.offload else device
        self._pipe, self._digest = self._model.load(sampler, DTYPES[self.dtype], first)
        self._staging = self.memory.place(self._pipe, self.denoiser, device)
        self.speed.apply(self.network)

    @property
    def known_sampler(self) -> Any:
        """The scheduler, where the model is here."""
        return self._sampler

    @property
    def pipe(self) -> Any:
        """The stock pipeline."""
        self.load_weights()
        return self._pipe

    @property
    def network(self) -> Any:
        """The pipeline's denoiser, which is both prior and posterior."""
        return getattr(self.pipe, self.denoiser)

    @property
    def device(self) -> torch.device:
        """Where the network is when it is used."""
        return self._staging.device if self._staging else next(self.network.parameters()).device

    @property
    def loop_networks(self) -> Sequence[nn.Module]:
        """The networks that the denoising loop evaluates."""
        return (self.network,)

    @property
    def dims(self) -> tuple[int, ...]:
        """Shape of one state, asked of the pipeline itself, once: it may pack its latents."""
        if self._dims is None:
            self._dims = state_shape(self.pipe, self.arguments([self.any_prompt]))
        return self._dims

    def arguments(self, prompts: Sequence[str]) -> dict[str, Any]:
        """Keyword arguments of `pipe.__call__` for these prompts; the family's to say."""
        raise NotImplementedError

    @torch.no_grad()
    def decode(self, x_0: Float[Tensor, "batch *dims"]) -> Float[Tensor, "batch *shape"]:
        """Images in [0, 1], float32: what the pipeline itself answers where its chain ends in x_0."""
        return self.decode_with_gradient(x_0)

    def decode_with_gradient(self, x_0: Float[Tensor, "batch *dims"]) -> Float[Tensor, "batch *shape"]:
        """The same, differentiable in x_0 where gradients are on; a family that sees other images overrides this one."""
        parts = x_0.to(self.device, DTYPES[self.dtype]).split(self.decode_batch)
        images = []
        for part in parts:
            call = self.arguments([self.any_prompt] * len(part))
            images.append(decoded(self.pipe, call, part, self.loop_networks, self.output_type))
        return torch.cat(images)

    def settings(self) -> dict[str, Any]:
        """The arguments of the pipeline's call that do not depend on the prompt, as `snippet` and the card show them."""
        call: dict[str, Any] = (
            {"num_inference_steps": self.steps} if self.timesteps is None else {"timesteps": self.timesteps}
        )
        return call | ({"eta": self.eta} if takes_eta(self.pipe.scheduler) else {})

    def attach(
        self,
        *,
        full: bool = False,
        rank: PositiveInt | None = None,
        alpha: PositiveFloat | None = None,
        target_modules: Annotated[Sequence[str], Field(min_length=1)] | None = None,
        seed: int = 0,
    ) -> None:
        """Add the posterior to the denoiser, a LoRA or, with `full`, weights of its own; at the start posterior = prior.

        Args:
            full: Train the weights themselves: those that are trained are held twice, the second time in float32.
            rank: Rank of every LoRA matrix pair; 8 by default.
            alpha: The update of a LoRA is scaled by alpha / rank; 8 by default.
            target_modules: Ends of module names; the family's `targets` by default, with `full` the whole denoiser.
            seed: Of the initial A matrices; the global random generators are left as they were.

        Raises:
            ValueError: see `posterior_of`, `pipelines._diffusers.lora.add_lora` and `pipelines._diffusers.full.add_full`.
        """
        asked = self._asked(full=full, rank=rank, alpha=alpha, target_modules=target_modules)
        if self._staging:
            self._staging.bring(self.network)  # the posterior is made where it is, and stays there
        asked.add(self.network, seed)
        self._posterior = asked

    def check_posterior(self, **posterior: Any) -> None:
        """Refuse arguments of `attach` that do not go together, or that the headers of the weight files rule out; ValueError."""
        asked, shapes = self._asked(**posterior), self._model.denoiser_shapes
        if shapes:
            asked.check(shapes)

    def _asked(
        self,
        *,
        full: bool = False,
        rank: int | None = None,
        alpha: float | None = None,
        target_modules: Sequence[str] | None = None,
        **_: Any,
    ) -> Posterior:
        return posterior_of(full, rank, alpha, target_modules, self.targets)

    def load_lora(self, path: Path) -> None:
        """Take a LoRA that any tool has made for the posterior, instead of `attach`; a file, or a folder that holds one.

        Raises:
            ValueError: it is none, does not fit this model, or changes more of it than the denoiser, so that switching it off would
                not give the prior.
        """
        found = Additions(lora=str(path))
        found.check(type(self.pipe))
        found.check_layers(self._model.denoiser_shapes)
        if self._staging:
            self._staging.bring(self.network)
        found.load_lora(self.pipe)
        check_only(self.pipe, self.network, path)
        self.network.eval()
        digest = sha256(found.lora_file.read_bytes()).hexdigest()
        self._posterior = Lora(source={"lora": found.lora_file.name, "sha256": digest})

    def weight_files(self) -> dict[str, list[Path]]:
        """The safetensors files of each network; empty for a hub id that is not loaded yet, and for random weights."""
        return self._model.weight_files()

    def trained_numbers(self, **posterior: Any) -> int:
        """How many numbers `attach` would make trainable, by the headers of the denoiser's files; 0 for a hub id."""
        shapes = self._model.denoiser_shapes
        return self._asked(**posterior).numbers(shapes) if shapes else 0

    @property
    def _carried(self) -> Posterior:
        return self._posterior or Lora()

    def parameters(self) -> dict[str, nn.Parameter]:
        """The LoRA parameters by name, or the trained weights by their names in the stock network; empty before `attach`."""
        return self._carried.parameters(self.network)

    def as_prior(self) -> AbstractContextManager[None]:
        """Inside the block the network is the prior: adapters off, or its own weights."""
        return self._carried.off(self.network)

    def fingerprint(self) -> dict[str, Any]:
        """What a checkpoint must agree with, as plain JSON values; a family adds what else decides about its samples."""
        sampler = self.pipe.scheduler
        return {
            "family": self.family,
            "weights": self._digest,
            "dims": list(self.dims),
            "dtype": self.dtype,
            "sampler": {
                "scheduler": type(sampler).__name__,
                "steps": self.steps,
                "timesteps": self.timesteps,
                "eta": float(self.eta) if takes_eta(sampler) else None,
                "settings": own_settings(sampler),
            },
            "adapter": None if self._posterior is None else self._posterior.description,
            **self.memory.fingerprint,
            **self.speed.fingerprint(),
        }

    def export(self, folder: Path, card: str) -> None:
        """Write the adapters for diffusers, or the trained denoiser; the scheduler's config; `card` as README.md.

        Raises:
            ValueError: there is no posterior yet.
        """
        if self._posterior is None:
            raise ValueError("There is no posterior to export: call attach(...) and load or train it first.")
        folder = Path(folder)
        self._posterior.write(self.pipe, self.denoiser, folder)
        self.pipe.scheduler.save_pretrained(folder / "scheduler")
        (folder / "README.md").write_text(card, encoding="utf-8")

    @property
    def base_model(self) -> str:
        """What to give to the pipeline's `from_pretrained`: a hub id or a folder."""
        return BUNDLED.get(self.path, self.path)

    def snippet(self, folder: str = "path/to/this/folder", prompt: str = "a cat") -> str:
        """Python that samples an exported posterior with plain diffusers, the way this prior samples it."""
        sampler = type(self.pipe.scheduler).__name__
        load = self._model.code(self.base_model, self.dtype)
        loading = self._carried.loading(self.pipe, self.denoiser, self.dtype)
        names = (self.pipeline, load, sampler, folder, self.as_written(prompt), self.settings(), loading)
        return snippet(*names, self.answers, self.pipe.scheduler.config.get("window"))
