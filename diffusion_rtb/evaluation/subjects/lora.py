"""A LoRA that any tool has made: switched off it is the prior, so both log-densities are known."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

from diffusion_rtb.abilities import LoadsLora
from diffusion_rtb.config.load import ConfigError, load_config
from diffusion_rtb.config.recipe import evaluated_as
from diffusion_rtb.evaluation.subject import Loaded, Options, Subject, folder_of
from diffusion_rtb.evaluation.subjects.run import chosen, sampled
from diffusion_rtb.files.lock import folder_lock
from diffusion_rtb.files.whole import check_writable, clear_unfinished
from diffusion_rtb.out_of_memory import doing, remedied
from diffusion_rtb.run.checks import describe_components

__all__ = ["LoraSubject"]

SUFFIX = ".safetensors"


class LoraSubject(Subject):
    """A .safetensors file, or a folder with one, on the prior of `--config`, with its reward, prompts and section `eval:`.

    Raises:
        ConfigError: there is no config, or it is wrong.
        ValueError: the config's prior takes no LoRA.
    """

    kind = "lora"

    def __init__(self, path: Path, options: Options) -> None:
        if options.config is None:
            raise ConfigError(
                f"{path} is a LoRA: say by --config CONFIG which prior it belongs to, and with which reward and prompts it is "
                "evaluated. One of a run of this package is evaluated by the run's folder."
            )
        self.path, self.config = path, load_config(options.config, options.all_overrides)
        self.components = describe_components(self.config)
        target = self.components.prior.target
        if not (isinstance(target, type) and issubclass(target, LoadsLora)):
            raise ValueError(
                f"{path}: the prior {self.components.prior.name!r} of {options.config} takes no LoRA; those on diffusers' "
                "pipelines do."
            )
        self.eval, self.tools, self.beta = self.config.eval, self.components.eval, self.config.beta.value
        self.rows, self.table = chosen(self.config)
        self.folder = folder_of(self, options)

    @staticmethod
    def recognises(path: Path) -> bool:
        """Whether a path is of this kind."""
        if path.is_dir():
            return any(path.glob(f"*{SUFFIX}"))
        return path.suffix == SUFFIX and path.is_file()

    @property
    def file(self) -> Path:
        """The LoRA's own file.

        Raises:
            ValueError: a folder holds several, and none by the usual name.
        """
        if not self.path.is_dir():
            return self.path
        usual = self.path / "pytorch_lora_weights.safetensors"
        found = [usual] if usual.exists() else sorted(self.path.glob(f"*{SUFFIX}"))
        if len(found) > 1:
            raise ValueError(
                f"{self.path} holds {len(found)} files *{SUFFIX}: name the one that is meant, e.g. {found[0]}."
            )
        return found[0]

    @property
    def name(self) -> str:
        """That of its folder or file."""
        place = self.path.resolve()
        return place.parent.name if place.name == "lora" else place.stem if place.is_file() else place.name

    @property
    def recipe(self) -> str:
        """Whose it is; how it was made nobody said."""
        return f"The LoRA {self.name} {evaluated_as(self.config)}"

    @property
    def seeds(self) -> Mapping[str, Any]:
        """The config's, on which those of the samples depend."""
        return {
            "run": self.config.seed,
            "sample": "seed_of(run, 'eval', row of the prompt in the config's table, index)",
        }

    @property
    def identity(self) -> Mapping[str, Any]:
        """The file, and the config without what changes no sample."""
        config = self.config.model_dump(
            mode="json", exclude={"eval", "train", "name", "out", "objective", "behaviours"}
        )
        digest = sha256(self.file.read_bytes()).hexdigest()
        return {"lora": digest, "config": config, "prompts": self.table.sha256, "rows": self.rows}

    @contextmanager
    def held(self) -> Iterator[None]:
        """See `Subject`."""
        check_writable(self.folder, files=("metrics.json", "side_by_side.png", "timing.json"))
        self.folder.mkdir(parents=True, exist_ok=True)
        with folder_lock(self.folder), remedied(self.config, "eval"):
            clear_unfinished(self.folder)
            yield

    def load(self) -> Loaded:
        """Prior, LoRA and reward."""
        with doing("loading the prior"):
            prior: Any = self.components.prior.build()
        prior.load_lora(self.file)
        with doing("loading the reward"):
            reward = self.components.reward.build()
        return sampled(self.config, prior, reward, self.rows, self.table)
