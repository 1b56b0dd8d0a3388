"""Pictures that come with a prompt: to start from, to follow, to fill in."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import Tensor

from diffusion_rtb.config.component_errors import nearest

__all__ = ["PICTURES", "EncodedOnce", "Pictures"]

PICTURES = ("image", "mask_image", "control_image")
"""Arguments of a pipeline's call that take a picture with each prompt."""

REMEMBERED = 1024
"""Encoded pictures that are kept."""


class Pictures:
    """The pictures of a run's prompts, by the argument of the call that takes them.

    Args:
        columns: Argument -> the column of the prompt file that names the file.
    """

    def __init__(self, columns: Mapping[str, str]) -> None:
        self.columns = dict(columns)
        self.files: dict[str, dict[str, Path]] = {argument: {} for argument in columns}
        """Argument -> prompt -> file."""

    def read(self, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]], folder: Path) -> None:
        """Learn which picture belongs to which prompt, and look at its header.

        Raises:
            ValueError: a column or a file is missing, a file is no picture, or pictures of one argument differ in size.
        """
        for argument, column in self.columns.items():
            sizes: dict[tuple[int, int], str] = {}
            for prompt, row in zip(prompts, metadata, strict=True):
                file = self._file(argument, column, prompt, row, folder)
                sizes.setdefault(_size(file, column, prompt), prompt)
                self.files[argument][prompt] = file
            if len(sizes) > 1:
                (a, first), (b, second) = list(sizes.items())[:2]
                raise ValueError(
                    f"The pictures in column {column!r} have different sizes, {a[0]} x {a[1]} for {first!r} and {b[0]} x {b[1]} "
                    f"for {second!r}: a batch holds one size. Resize them to one."
                )

    def _file(self, argument: str, column: str, prompt: str, row: Mapping[str, Any], folder: Path) -> Path:
        named = row.get(column)
        if not isinstance(named, str) or not named:
            has = f"it has {', '.join(map(repr, row))}" if row else "it has no columns but the prompt"
            raise ValueError(
                f"The prompt {prompt!r} has no column {column!r} with a picture for `{argument}` ({has}).{nearest(column, row)} "
                f'Give the prompts in a file, e.g. prompts.jsonl with {{"prompt": …, "{column}": "cat.png"}} on each line.'
            )
        file = folder / Path(named).expanduser()
        if not file.is_file():
            raise ValueError(
                f"The prompt {prompt!r}: {column} is {named!r}, and there is no file {file}. Paths count from the folder of the "
                "prompt file; set prompts.folder where the pictures were moved."
            )
        return file

    def of(self, prompts: Sequence[str]) -> dict[str, Any]:
        """Arguments of the call for these prompts, a list of pictures each.

        Raises:
            ValueError: a prompt is not one of the run's.
        """
        return {argument: [self._opened(argument, prompt) for prompt in prompts] for argument in self.columns}

    def _opened(self, argument: str, prompt: str) -> Any:
        from PIL import Image

        if prompt not in self.files[argument]:
            raise ValueError(
                f"The prompt {prompt!r} has no picture for `{argument}`: it is none of the run's {len(self.files[argument])} "
                "prompts, whose file says which picture belongs to which."
            )
        with Image.open(self.files[argument][prompt]) as picture:
            return picture.convert("L" if argument == "mask_image" else "RGB")

    def digests(self) -> dict[str, str]:
        """Argument -> a hash of its prompts and of what their files hold."""
        found = {}
        for argument, files in self.files.items():
            held = hashlib.sha256()
            for prompt in sorted(files):
                held.update(f"{prompt}\0".encode() + hashlib.sha256(files[prompt].read_bytes()).digest())
            found[argument] = held.hexdigest()
        return found


def _size(file: Path, column: str, prompt: str) -> tuple[int, int]:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(file) as picture:
            size: tuple[int, int] = picture.size
    except UnidentifiedImageError:
        raise ValueError(
            f"The prompt {prompt!r}: {column} is {file}, which is no picture that Pillow can read."
        ) from None
    return size


class EncodedOnce:
    """The `encode` of an autoencoder: each picture once, alone, and the mean of its posterior where a draw is asked for.

    Pipelines encode what they condition on at each call and draw from the posterior: a replayed chain would be that of another
    condition.

    Args:
        vae: An autoencoder whose posterior is Normal in each number; others are left as they are.
    """

    def __init__(self, vae: Any) -> None:
        self.encode = vae.encode
        self.rows: dict[str, Tensor] = {}

    def __call__(self, x: Tensor, return_dict: bool = True) -> Any:
        answers = [self._row(row) for row in x.split(1)]
        if any(answer is None for answer in answers):
            return self.encode(x, return_dict=return_dict)
        posterior = DiagonalGaussianDistribution(torch.cat([answer for answer in answers if answer is not None]))
        posterior.sample = lambda generator=None: posterior.mode()
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    def _row(self, row: Tensor) -> Tensor | None:
        key = hashlib.sha256(row.detach().float().cpu().numpy().tobytes()).hexdigest()
        if key not in self.rows:
            posterior = getattr(self.encode(row), "latent_dist", None)
            if not isinstance(posterior, DiagonalGaussianDistribution):
                return None
            # In the order of a trajectory's states: pictures come with their channels last, and kernels round accordingly.
            self.rows[key] = posterior.parameters.contiguous()
            for old in list(self.rows)[:-REMEMBERED]:
                del self.rows[old]
        return self.rows[key]
