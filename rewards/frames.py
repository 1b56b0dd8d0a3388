"""A reward for pictures, on the frames of a video."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor

from diffusion_rtb.config.prompts import Metadata
from rewards._nested import Nested, inner_values

__all__ = ["Frames"]


class Frames(Nested):
    r"""r(x) = mean_i r_inner(x_i), or the smallest, over the frames x_1, …, x_count of a video.

    The frames lie below each other in one tall picture, the first at the top, as `wan` with `frames: all` draws them. The inner
    reward sees each of them alone, at its own size.

    Args:
        reward: The inner reward, `{component: NAME, argument: value}`.
        count: Frames of a video.
        over: "mean", or "min" for the worst frame.

    Raises:
        ValueError: count is below 1; a picture's height is no multiple of it.
    """

    def __init__(self, reward: Mapping[str, Any], count: int, *, over: Literal["mean", "min"] = "mean") -> None:
        if count < 1:
            raise ValueError(f"count={count}: a video has at least one frame.")
        super().__init__([reward])
        (self.name,) = self.inner
        self.count, self.over = count, over

    def __call__(
        self,
        images: Float[Tensor, "batch 3 frames_times_height width"],
        prompts: Sequence[str],
        metadata: Sequence[Metadata] | None = None,
    ) -> Float[Tensor, " batch"]:
        if images.shape[2] % self.count:
            raise ValueError(
                f"frames: pictures of {images.shape[2]} x {images.shape[3]} pixels do not hold {self.count} frames below each "
                "other. Set prior.frames: all and count to prior.num_frames."
            )
        frames = images.unflatten(2, (self.count, -1)).transpose(1, 2).flatten(0, 1)
        texts = [prompt for prompt in prompts for _ in range(self.count)]
        rows = None if metadata is None else [row for row in metadata for _ in range(self.count)]
        values = inner_values(self.rewards[self.name], frames, texts, self.name, rows).unflatten(0, (-1, self.count))
        return values.mean(1) if self.over == "mean" else values.amin(1)
