"""How the networks of a pipeline are computed: the same numbers but for rounding, which a run's fingerprint therefore holds."""

from __future__ import annotations

from typing import Any, Literal

import torch

from diffusion_rtb.config.section import Section

__all__ = ["Speed"]

Attention = Literal["flash", "efficient", "cudnn", "math"]

_SWITCHES = {
    "flash": torch.backends.cuda.enable_flash_sdp,
    "efficient": torch.backends.cuda.enable_mem_efficient_sdp,
    "cudnn": torch.backends.cuda.enable_cudnn_sdp,
    "math": torch.backends.cuda.enable_math_sdp,
}


class Speed(Section):
    """Settings that make a pipeline faster where they suit it; all of them off by default.

    `attention` and `tf32` are torch's own switches: they hold for the whole process, rewards included.
    """

    compile: str | None = None
    """Back end of torch.compile for the denoiser, such as "inductor": its repeated blocks, or all of it where it has none."""
    channels_last: bool = False
    """The denoiser's weights with their channels last, which convolutions on tensor cores want."""
    attention: Attention | None = None
    """The one implementation of scaled_dot_product_attention that is allowed; null: torch chooses."""
    tf32: bool | None = None
    """Whether float32 matrices and convolutions may be rounded to 10 bits on CUDA; null: as torch has it, convolutions alone."""

    def check(self) -> None:
        """Refuse a back end that torch.compile does not have, before anything is loaded; ValueError."""
        if self.compile is not None and self.compile not in (known := torch._dynamo.list_backends(None)):
            raise ValueError(
                f"speed.compile={self.compile!r} is no back end of torch.compile; use one of {', '.join(known)}."
            )

    def apply(self, denoiser: Any) -> None:
        """Switch on what was asked for; the posterior's adapters may come later."""
        if self.attention is not None:
            for name, switch in _SWITCHES.items():
                switch(name == self.attention)
        if self.tf32 is not None:
            torch.set_float32_matmul_precision("high" if self.tf32 else "highest")
            torch.backends.cudnn.allow_tf32 = self.tf32
        if self.channels_last:
            denoiser.to(memory_format=torch.channels_last)
        if self.compile is not None:
            whole = not getattr(denoiser, "_repeated_blocks", None)
            (denoiser.compile if whole else denoiser.compile_repeated_blocks)(backend=self.compile)

    def fingerprint(self) -> dict[str, Any]:
        """What was asked for; empty where nothing was, as of runs that are older than these settings."""
        found = {
            name: value for name, value in self.model_dump().items() if value != type(self).model_fields[name].default
        }
        return {"speed": found} if found else {}
