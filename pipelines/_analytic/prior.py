"""What the analytic priors share: the `Prior` protocol around a `VectorPipeline`.

They are pipelines like any other: vectors (dim,) take the place of latents, `decode` answers vectors (batch, dim) in data units in
the place of images, and prompts change nothing. Nothing is downloaded, and all of it runs in float32 or float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_rtb.abilities import TwoPhase
from pipelines._analytic.schedule import Schedule, StepCoefficients, build_vector_scheduler, step_coefficients
from pipelines._diffusers.scheduler import check_eta, check_sampler, takes_eta
from pipelines._diffusers.settings import check_device, check_dtype

DTYPES = {"float32": torch.float32, "float64": torch.float64}


class VectorPrior(TwoPhase):
    """A denoiser in closed form, a stock scheduler and a trainable correction, which is what "adapters" are here.

    Args:
        family: Name for the fingerprint.
        density: The prior's parameters for the fingerprint, as JSON values.
        make: Makes the `VectorDenoiser`.
        schedule: The noise schedule.
        steps: T.
        eta: Noise level of DDIM.
        scheduler: Class name in diffusers.
        dtype: Of everything.
        device: Where to run; None is the CPU, which is the fastest for networks this small.

    Raises:
        ValueError: a setting is unknown or out of range.
    """

    def __init__(
        self,
        family: str,
        density: Mapping[str, Any],
        make: Callable[[], Any],
        *,
        schedule: Schedule,
        steps: int,
        eta: float,
        scheduler: str,
        dtype: str,
        device: str | None,
    ) -> None:
        check_eta(eta)
        self._sampler = build_vector_scheduler(scheduler, schedule, steps)
        self.why_no_noise: str | None = check_sampler(self._sampler, steps, eta)
        """See `KnowsNoise`."""
        check_dtype(dtype, DTYPES)
        check_device(device)
        self.family, self.density, self.schedule = family, dict(density), schedule
        self.steps, self.eta, self.dtype = steps, eta, dtype
        self.coefficients: StepCoefficients = step_coefficients(self._sampler, steps, eta)
        self._make, self._device = make, torch.device(device or "cpu")
        self._pipe: Any = None
        self._adapter: dict[str, Any] | None = None

    def load_weights(self) -> None:
        """Make the pipeline, once."""
        if self._pipe is not None:
            return
        from pipelines._analytic.pipeline import VectorPipeline

        with default_dtype(torch.float64):
            denoiser = self._make()
        gain = torch.zeros(self.steps + 1, dtype=torch.float64)
        by = self.coefficients if self.eta else step_coefficients(self._sampler, self.steps, 1.0)
        gain[by.timesteps] = by.std / by.by_noise
        denoiser.follow(self._sampler.alphas_cumprod, gain)
        # diffusers' own `to` warns of casts, even where every number is meant to be cast.
        torch.nn.Module.to(denoiser, self._device, DTYPES[self.dtype]).requires_grad_(False).eval()
        self._pipe = VectorPipeline(denoiser, self._sampler)
        self._pipe.set_progress_bar_config(disable=True)

    @property
    def known_sampler(self) -> Any:
        """The scheduler."""
        return self._sampler

    @property
    def pipe(self) -> Any:
        """The `VectorPipeline`."""
        self.load_weights()
        return self._pipe

    @property
    def device(self) -> torch.device:
        """Where the denoiser is."""
        return torch.device(self.pipe.denoiser.device)

    @property
    def dims(self) -> tuple[int, ...]:
        """(dim,)."""
        return (self.pipe.denoiser.dim,)

    def arguments(self, prompts: Sequence[str]) -> dict[str, Any]:
        """Keyword arguments of `pipe.__call__`: as many vectors as there are prompts, steps, eta."""
        return {"batch_size": len(prompts)} | self._sampling()

    def _sampling(self) -> dict[str, Any]:
        return {"num_inference_steps": self.steps} | ({"eta": self.eta} if takes_eta(self.pipe.scheduler) else {})

    def features(self, prompts: Sequence[str]) -> Float[Tensor, "batch features"]:
        """Nothing: the prior is the same for every prompt."""
        return torch.zeros(len(prompts), 0, device=self.device)

    @torch.no_grad()
    def decode(self, x_0: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch dim"]:
        """Vectors in data units, in the dtype of the chain."""
        return self.decode_with_gradient(x_0)

    def decode_with_gradient(self, x_0: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch dim"]:
        """The same, differentiable in x_0."""
        answer: Tensor = self.pipe.denoiser.data_units(x_0)
        return answer

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """The correction's parameters by name; empty before `attach`."""
        correction = self.pipe.denoiser.correction
        return {} if correction is None else dict(correction.named_parameters())

    @contextmanager
    def as_prior(self) -> Iterator[None]:
        """Inside the block the network is the prior (correction off). Nests."""
        denoiser = self.pipe.denoiser
        before, denoiser.posterior_on = denoiser.posterior_on, False
        try:
            yield
        finally:
            denoiser.posterior_on = before

    def fingerprint(self) -> dict[str, Any]:
        """What a checkpoint must agree with, as plain JSON values."""
        sampler = self.pipe.scheduler
        return {
            "family": self.family,
            "density": self.density,
            "dims": list(self.dims),
            "dtype": self.dtype,
            "sampler": {
                "scheduler": type(sampler).__name__,
                "steps": self.steps,
                "eta": float(self.eta) if takes_eta(sampler) else None,
                "schedule": asdict(self.schedule),
            },
            "adapter": self._adapter,
        }

    def export(self, folder: Path, card: str) -> None:
        """Write the whole posterior as a pipeline's folder (a few kB), and `card` as README.md.

        Raises:
            ValueError: there is no posterior yet.
        """
        if self._adapter is None:
            raise ValueError("There is no posterior to export: call attach(...) and load or train it first.")
        self.pipe.save_pretrained(folder)
        (Path(folder) / "README.md").write_text(card, encoding="utf-8")

    @property
    def base_model(self) -> str:
        """What the model card calls the prior."""
        return self.family

    def snippet(self, folder: str = "path/to/this/folder", prompt: str = "") -> str:
        """Python that samples an exported posterior the way this prior samples it; prompts change nothing."""
        options = ", ".join(f"{name}={value!r}" for name, value in self._sampling().items())
        network, sampler = type(self.pipe.denoiser), type(self.pipe.scheduler).__name__
        return f"""import torch
from diffusers import {sampler}
from {network.__module__} import {network.__name__}
from pipelines._analytic.pipeline import VectorPipeline

folder = {folder!r}
denoiser = {network.__name__}.from_pretrained(folder, subfolder="denoiser", dtype=torch.{self.dtype})
pipe = VectorPipeline(denoiser, {sampler}.from_pretrained(folder, subfolder="scheduler"))
x = pipe(batch_size=1000, generator=torch.Generator().manual_seed(0), {options}).vectors"""

    def _attached(self, seed: int, description: Mapping[str, Any]) -> None:
        """Add the correction, drawn from `seed`; the global generators are left as they were."""
        if self._adapter is not None:
            raise ValueError("The posterior is attached already; attach it once, to a newly made prior.")
        denoiser, device = self.pipe.denoiser, self.device  # that of the first parameter, as soon as there is one
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            denoiser.add_correction()
        denoiser.correction.to(device, DTYPES[self.dtype]).requires_grad_(True)
        self._adapter = dict(description)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Inside the block torch makes floating tensors of this dtype unless told otherwise."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
