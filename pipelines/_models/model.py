"""A published model: where it is, proved whole, with what users add to it; then the pipeline that is loaded from it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from diffusion_rtb.files.completeness import tensor_shapes
from pipelines._models.additions import Additions
from pipelines._models.family import Family
from pipelines._models.folder import is_hub_id, left_out, local_folder, settled
from pipelines._models.proof import check_folder, network_files, quiet, read_scheduler_config
from pipelines._models.random_weights import is_random, random_pipeline
from pipelines._models.single_file import check_single_file, configs_for, is_single_file, read_single_file

__all__ = ["Model"]


class Model:
    """A model at a path; nothing happens before it is asked for something.

    Args:
        path: A folder, a hub id, or a name; see `local_folder`.
        kind: What it has to be.
        additions: What users put into it.
        config: Of a single file: a diffusers folder with the configs of its architecture.
        variant: Of its weight files.
        revision: Of a hub id.
    """

    def __init__(
        self,
        path: str,
        kind: Family,
        additions: Additions,
        *,
        config: str | None = None,
        variant: str | None = None,
        revision: str | None = None,
    ) -> None:
        self.path, self.kind, self.additions, self.config = path, kind, additions, config
        self.single = is_single_file(path)
        if config and not self.single:
            raise ValueError(
                f"config={config!r} is for a checkpoint in a single file, and path={path!r} is none: leave it out."
            )
        self._asked = variant, revision
        self._found: tuple[Path, str | None] | None = None
        self.denoiser_shapes: Mapping[str, tuple[int, ...]] = {}
        """Of the denoiser's weights, by their files' headers; empty before they have been looked at, and where there are none."""

    @property
    def here(self) -> bool:
        """Whether it can be looked at without fetching it."""
        return self._found is not None or self.single or not is_hub_id(self.path)

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

        kind, (variant, revision) = self.kind, self._asked
        whole = not self.single and not is_random(self.path)
        if self.single:
            folder = configs_for(Path(self.path), kind.pipeline, self.config)
        else:
            folder = local_folder(self.path, getattr(diffusers, kind.pipeline), kind.without, variant, revision)
        pipelines = kind.read_index(folder)
        self.additions.check(getattr(diffusers, kind.pipeline))
        variant = check_folder(folder, pipelines, kind.parts, variant, kind.check_files, weights=whole)
        if self.single:
            self.denoiser_shapes = check_single_file(Path(self.path), folder)
            self.additions.check_fit(folder, self.denoiser_shapes)
            return folder, None
        if whole:
            self.denoiser_shapes = tensor_shapes(network_files(folder, kind.parts, variant)[kind.denoiser])
            self.additions.check_fit(folder, self.denoiser_shapes)
        elif self.additions != Additions():
            raise ValueError(f"path={self.path!r} has random weights: leave vae, lora and textual_inversions out.")
        return folder, variant

    @property
    def scheduler_config(self) -> dict[str, Any]:
        """Its noise schedule: betas, prediction type, spacing, offset."""
        return read_scheduler_config(self.find()[0])

    @property
    def left_out(self) -> list[str]:
        """Parts that its pipeline needs and it does not have, see `folder.left_out`."""
        import diffusers

        return left_out(self.find()[0], getattr(diffusers, self.kind.pipeline))

    def weight_files(self) -> dict[str, list[Path]]:
        """The safetensors files of each network; empty where there are none, or not yet."""
        if not self.here or is_random(self.path):
            return {}
        if self.single:
            return {"whole pipeline": [Path(self.path)]}
        folder, variant = self.find()
        return network_files(folder, self.kind.parts, variant)

    def load(self, scheduler: Any, dtype: torch.dtype, device: torch.device) -> tuple[Any, str]:
        """The pipeline, frozen and quiet, and a digest that tells its weights from another model's."""
        import diffusers

        folder, variant = self.find()
        pipeline, networks = getattr(diffusers, self.kind.pipeline), self.kind.parts.networks
        options = {"scheduler": scheduler, "dtype": dtype} | dict(self.kind.options)
        options |= dict.fromkeys([*self.kind.without, *self.left_out])
        if is_random(self.path):
            return random_pipeline(pipeline, folder, networks, device=device, **options)
        options |= self.additions.replaced(dtype)
        if self.single:
            pipe = read_single_file(pipeline, Path(self.path), folder, **options)
        else:
            with quiet():
                pipe = pipeline.from_pretrained(folder, variant=variant, use_safetensors=True, **options)
        with quiet():
            self.additions.add_to(pipe)
        return pipe, settled(pipe, networks, folder, dtype=dtype, device=device)

    def code(self, base: str, dtype: str) -> list[str]:
        """Lines of Python that load it as `pipe`, with plain diffusers.

        Args:
            base: What it is called: a folder or a hub id.
            dtype: Such as "float32".
        """
        config = "" if self.config is None else f", config={self.config!r}"
        load = f"from_single_file({self.path!r}{config}" if self.single else f"from_pretrained({base!r}"
        name = "torch_dtype" if self.single else "dtype"
        absent = "".join(f", {part}=None" for part in self.left_out)
        return [f"pipe = {self.kind.pipeline}.{load}, {name}=torch.{dtype}{absent})", *self.additions.code(dtype)]
