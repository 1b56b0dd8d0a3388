"""A published model: where it is, proved whole, with what users add to it; then the pipeline that is loaded from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from diffusion_rtb.files.completeness import tensor_shapes
from pipelines._models.additions import Additions
from pipelines._models.family import Family
from pipelines._models.folder import is_hub_id, load_pipeline, local_folder
from pipelines._models.proof import check_folder, network_files, read_scheduler_config
from pipelines._models.random_weights import is_random, random_pipeline

__all__ = ["Model"]


class Model:
    """A model at a path; nothing happens before it is asked for something.

    Args:
        path: A folder, a hub id, or a name; see `local_folder`.
        kind: What it has to be.
        additions: What users put into it.
        variant: Of its weight files.
        revision: Of a hub id.
    """

    def __init__(
        self, path: str, kind: Family, additions: Additions, variant: str | None = None, revision: str | None = None
    ) -> None:
        self.path, self.kind, self.additions = path, kind, additions
        self._asked = variant, revision
        self._found: tuple[Path, str | None] | None = None

    @property
    def here(self) -> bool:
        """Whether it can be looked at without fetching it."""
        return self._found is not None or not is_hub_id(self.path)

    def find(self) -> tuple[Path, str | None]:
        """Its folder and the variant of its weights, all of them proved; a hub id is fetched first. No weights are loaded.

        Raises:
            ValueError: it is incomplete, damaged or of another kind, or an addition does not fit.
            OSError: a hub id cannot be fetched.
        """
        if self._found is None:
            self._found = self._proved()
        return self._found

    def _proved(self) -> tuple[Path, str | None]:
        import diffusers

        kind, (variant, revision), whole = self.kind, self._asked, not is_random(self.path)
        folder = local_folder(self.path, getattr(diffusers, kind.pipeline), kind.without, variant, revision)
        pipelines = kind.read_index(folder)
        self.additions.check(getattr(diffusers, kind.pipeline))
        variant = check_folder(folder, pipelines, kind.parts, variant, kind.check_files, weights=whole)
        if whole:
            files = network_files(folder, kind.parts, variant)
            self.additions.check_fit(folder, tensor_shapes(files[kind.denoiser]))
        elif self.additions != Additions():
            raise ValueError(f"path={self.path!r} has random weights: leave vae, lora and textual_inversions out.")
        return folder, variant

    @property
    def scheduler_config(self) -> dict[str, Any]:
        """Its noise schedule: betas, prediction type, spacing, offset."""
        return read_scheduler_config(self.find()[0])

    def weight_files(self) -> dict[str, list[Path]]:
        """The safetensors files of each network; empty where there are none, or not yet."""
        if not self.here or is_random(self.path):
            return {}
        folder, variant = self.find()
        return network_files(folder, self.kind.parts, variant)

    def load(self, scheduler: Any, dtype: torch.dtype, device: torch.device) -> tuple[Any, str]:
        """The pipeline, frozen and quiet, and a digest that tells its weights from another model's."""
        import diffusers

        folder, variant = self.find()
        load = random_pipeline if is_random(self.path) else load_pipeline
        return load(
            getattr(diffusers, self.kind.pipeline),
            folder,
            self.kind.parts.networks,
            dtype=dtype,
            device=device,
            scheduler=scheduler,
            variant=variant,
            additions=self.additions,
            **dict.fromkeys(self.kind.without),
            **self.kind.options,
        )
