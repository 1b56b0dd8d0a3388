"""What a family of pipelines says of itself, and what it may look at before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from diffusion_rtb.abilities import TwoPhase
from diffusion_rtb.files.completeness import read_json
from pipelines._models.proof import Parts

__all__ = ["Family"]


class Family(TwoPhase):
    """The class attributes of a family, and its checks; those of its arguments are in its constructor."""

    family: ClassVar[str]
    """Name for the fingerprint."""
    pipeline: str
    """Class in diffusers; model_index.json must name it, or one of `also`."""
    also: ClassVar[Sequence[str]] = ()
    """Classes of the same kind; a folder of one of them is loaded as what it is."""
    published: ClassVar[str] = ""
    """Hub id of the model that is meant where none is given."""
    parts: Parts
    """Networks and vocabularies that must be whole."""
    denoiser: str
    """The network that carries the LoRA: one of the parts."""
    targets: ClassVar[Sequence[str]]
    """Ends of the names of its modules that the LoRA adapts unless told otherwise."""
    sampler: ClassVar[str] = "DDIMScheduler"
    """The scheduler unless told otherwise."""
    sampler_settings: ClassVar[Mapping[str, Any]] = {}
    """Constructor arguments of any scheduler that has them, whatever the folder says."""
    predicts: str = "epsilon"
    """What the denoiser predicts where the scheduler's config does not say so, as diffusers' `prediction_type` has it."""
    without: Sequence[str] = ()
    """Parts of the pipeline that are not loaded."""
    options: ClassVar[Mapping[str, Any]] = {}
    """Further arguments of `from_pretrained`."""
    output_type: ClassVar[str] = "pt"
    """How the pipeline is asked for images: "pt", or "np" where it knows no tensors."""
    answers: ClassVar[str] = "images"
    """What the pipeline's answer calls them."""
    any_prompt: str = ""
    """A prompt that is always allowed: asked for shapes, and to decode, which no prompt has a part in."""

    def read_index(self, folder: Path) -> Sequence[str]:
        """Choose the class to load by a folder's model_index.json, before anything of the folder is checked.

        Returns:
            The classes that model_index.json may name.
        """
        index = folder / "model_index.json"
        named = str(read_json(index).get("_class_name")) if index.is_file() else ""
        self.pipeline = named if named in self.also else self.pipeline
        return tuple(dict.fromkeys((self.pipeline, *self.also)))

    def check_files(self, folder: Path) -> None:
        """Refuse a folder whose parts do not fit each other, by their config files; the parts are there.

        Raises:
            ValueError: they do not.
        """

    def check_scheduler(self, scheduler: Any) -> None:
        """Refuse a scheduler that this pipeline's call cannot drive.

        Raises:
            ValueError: it cannot.
        """

    def as_written(self, prompt: str) -> str:
        """The arguments of the pipeline's call for one prompt, as Python."""
        return f"prompt={prompt!r}"
