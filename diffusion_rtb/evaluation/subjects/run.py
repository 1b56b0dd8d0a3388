"""The folder of a run, with its latest checkpoint: prior and posterior share seeds, and both log-densities are known."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from safetensors.torch import save

from diffusion_rtb.config.load import RunConfig
from diffusion_rtb.config.prompts import PromptTable
from diffusion_rtb.config.recipe import recipe
from diffusion_rtb.evaluation.choice import evaluated
from diffusion_rtb.evaluation.samples import Sampled
from diffusion_rtb.evaluation.subject import Loaded, Options, Subject
from diffusion_rtb.files.lock import folder_lock
from diffusion_rtb.files.terminal import say
from diffusion_rtb.files.whole import check_writable, clear_unfinished
from diffusion_rtb.interfaces import Prior, Reward
from diffusion_rtb.out_of_memory import remedied
from diffusion_rtb.run.export import export_posterior, exported
from diffusion_rtb.run.folder import is_run
from diffusion_rtb.run.posterior import open_trained_run
from diffusion_rtb.sampling.sampler import Sampler
from diffusion_rtb.scoring.prompts import check_reward_prompts

__all__ = ["RunSubject", "chosen", "sampled"]

PICTURE = 2_000_000
"""Bytes that the sheet and the numbers may take, to know beforehand whether there is room."""


class RunSubject(Subject):
    """A run as its latest whole checkpoint left it.

    Raises:
        ValueError: the folder is no run, has no complete checkpoint, or its config is not the one that was trained.
    """

    kind = "run"

    def __init__(self, path: Path, options: Options) -> None:
        self.run = open_trained_run(path, options.all_overrides, checkpoint=options.checkpoint)
        self.path, self.unseen = path, self.run.config.eval.unseen is not None
        self.folder = options.out or self.run.folder / ("unseen" if self.unseen else "eval")
        self.eval, self.tools = self.run.config.eval, self.run.components.eval
        self.rows, self.table = chosen(self.run.config)
        self.beta = self.run.progress.beta

    @staticmethod
    def recognises(path: Path) -> bool:
        """Whether a path is of this kind."""
        return path.is_dir() and is_run(path)

    @property
    def name(self) -> str:
        """That of its folder."""
        return self.run.folder.resolve().name

    @property
    def recipe(self) -> str:
        """See `diffusion_rtb.config.recipe`."""
        return recipe(self.run.config, self.beta, self.run.progress.iterations)

    @property
    def seeds(self) -> Mapping[str, Any]:
        """The run's, on which those of the samples depend."""
        return {
            "run": self.run.config.seed,
            "sample": "seed_of(run, 'eval', row of the prompt in the run's table, index)",
        }

    @property
    def facts(self) -> Mapping[str, Any]:
        """How far it was trained, and in which space its training looked at its diversity."""
        watch = self.run.config.watch
        space = None if watch is None or watch.embedder is None else watch.embedder.model_dump()
        return {"run": self.run.progress.as_json() | {"watch_embedder": space}}

    @property
    def identity(self) -> Mapping[str, Any]:
        """What the checkpoint holds of posterior and reward, and the config without what changes no sample."""
        config = self.run.config.model_dump(mode="json", exclude={"eval", "train", "name", "out"})
        weights = {name: sha256(save(held)).hexdigest() for name, held in self.run.checkpoint.tensors.items()}
        return {"weights": weights, "config": config, "prompts": self.table.sha256, "rows": self.rows}

    @contextmanager
    def held(self) -> Iterator[None]:
        """See `Subject`; of a run also the folder of the exported posterior is written."""
        run = self.run
        weights = sum(t.numel() * t.element_size() for t in run.checkpoint.tensors[run.weights].values())
        check_writable(run.folder, needed=weights + PICTURE)
        check_writable(self.folder, files=("metrics.json", "side_by_side.png", "timing.json"))
        if not self.unseen:
            check_writable(exported(run.folder, run.checkpoint.state["prior"]), files=("README.md",))
        with folder_lock(run.folder), remedied(run.config, "eval"):
            for place in (run.folder, self.folder):
                clear_unfinished(place)
            say(run.progress.sentence)
            yield

    def load(self) -> Loaded:
        """Prior, posterior and reward. The card of the exported posterior tells of the run's own prompts alone."""
        run, reward = self.run, self.run.reward()
        check_reward_prompts(reward, self.table.texts, self.table.metadata)
        prior = run.prior()

        def finish(numbers: Mapping[str, Any], card: Mapping[str, Mapping[str, Any]]) -> None:
            export_posterior(run.config, prior, run.folder, run.progress, evaluation=card)

        found = sampled(run.config, prior, reward, self.rows, self.table)
        return found if self.unseen else replace(found, finish=finish)


def chosen(config: RunConfig) -> tuple[list[int], PromptTable]:
    """See `evaluated`; what is not all of the run's is said."""
    table = config.prompts.table()
    rows, own = evaluated(config.eval, table)
    if config.eval.unseen is not None:
        say(f"Evaluated are {len(rows)} prompts that the run was not trained on (eval.unseen).")
    elif len(rows) < len(table):
        say(f"Evaluated are {len(rows)} of the run's {len(table)} prompts (eval.prompts).")
    return rows, own


def sampled(config: RunConfig, prior: Prior, reward: Reward, rows: Sequence[int], table: PromptTable) -> Loaded:
    """Both sides of a prior with its posterior attached, at the same seeds."""
    sampler = Sampler(prior, reward, table.texts, config.eval.batch, table.metadata)
    sides = [
        Sampled(sampler, count, config.seed, posterior=posterior, numbers=rows)
        for posterior, count in ((False, config.eval.prior_samples), (True, config.eval.samples))
    ]
    return Loaded(prior=sides[0], posterior=sides[1], sampling=prior.fingerprint(), seconds=sampler.stopwatch.read)
