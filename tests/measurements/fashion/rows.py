"""The rows of the table, each of one class: what is drawn for it, and its numbers."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter, process_time

from torch import Tensor

from diffusion_rtb.behaviours.prior_buffer import PriorBuffer
from diffusion_rtb.chain.seeds import seed_of
from diffusion_rtb.comparison.variants import Variants
from diffusion_rtb.config.components import build
from diffusion_rtb.config.load import RunConfig, load_config
from diffusion_rtb.resampling import systematic_draw
from diffusion_rtb.sampling.batch import Batch
from diffusion_rtb.sampling.sampler import Sampler
from diffusion_rtb.steering._reward_guidance import Guidance, guided
from diffusion_rtb.training.assemble import assemble
from diffusion_rtb.training.trainer import Trainer
from pipelines.fashion import CLASSES, TOPS
from pipelines.fashion.build import data
from rewards.classifier import Classifier
from rewards.embedders.features import Features
from tests.measurements.fashion.judging import Judge, Numbers
from tests.measurements.fashion.pool import draw_pool, trained_on, x_0_of_prior

__all__ = ["GUIDED", "TARGETS", "TRAINED", "Table"]

log = logging.getLogger(__name__)

CONFIG = Path("configs/fashion/class.yaml")
TARGETS: dict[str, tuple[str, ...]] = {**{name: (name,) for name in CLASSES}, "tops": TOPS}
TRAINED = ("reinforce_kl", "ddpo", "dpok", "rtb", "vargrad", "trust_pcl_v", "value_gradient", "rtb_after")
AFTER = {"rtb_after": "value_gradient"}
"""Rows that start from the posterior of another."""
GUIDED = {"dps": 0, "lgd_mc": 8}
"""Samples of LGD-MC; 0: DPS."""
SCALES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)
TUNED_ON = "dress"
PRIOR, KEPT, DRAWN, TUNING, REAL = 4096, 1024, 256, 96, 6000
"""Judged samples of the prior; trajectories of it to train on; samples of other rows; of each scale; real pictures."""
DRAWN_NEAR = {"value_gradient": 1024, "rtb_after": 1024}
"""Samples of rows whose distance to the re-weighted prior is smaller than what 256 samples can tell."""


@dataclass(frozen=True)
class Table:
    """Everything that the rows of one invocation share."""

    out: Path
    pictures: Path
    """The data set's folder."""
    variants: Variants
    overrides: tuple[str, ...] = ()

    def config(self, target: str, method: str) -> RunConfig:
        """The run of a class and a method."""
        wanted = list(TARGETS[target])
        changes = [f"reward.target={wanted if len(wanted) > 1 else wanted[0]}", f"out={self.out / 'runs'}"]
        changes.append(f"name={self._name(target, method)}")
        if method in AFTER:
            changes.append(f"start={self.out / 'runs' / self._name(target, AFTER[method])}")
        return load_config(CONFIG, [*self.variants.overrides("objectives", method), *changes, *self.overrides])

    def _name(self, target: str, method: str) -> str:
        return f"{target.replace(' ', '-')}.{method}"

    def judge(self, target: str) -> Judge:
        """Real pictures are the training half's."""
        reward, features = (
            Classifier(list(TARGETS[target]), model="fashion-classifier"),
            Features("fashion-classifier"),
        )
        return Judge(reward, features, features.embed(shown(self.real(target, "train")[:REAL])))

    def real(self, target: str, half: str) -> Tensor:
        """Real pictures of a class in [-1, 1]."""
        return data.load(half, self.pictures).of(tuple(CLASSES.index(name) for name in TARGETS[target]))

    def row(self, target: str, method: str) -> tuple[Numbers, Tensor]:
        """Numbers of a row, and the images that it is about."""
        judge = self.judge(target)
        if method == "real":
            images = shown(self.real(target, "t10k"))
            return judge.of(images), images
        config = self.config(target, method if method in TRAINED else "config")
        beta = config.beta.value
        trainer = assemble(config) if method in TRAINED else None
        sampler = untrained(config) if trainer is None else trainer.sampler
        draw_pool(sampler, self.out / "prior", 0, KEPT, PRIOR, log.info)
        if method in ("prior", "reweighted"):
            images = sampler.prior.decode(x_0_of_prior(self.out / "prior", KEPT))
            weights = (
                (beta * judge.reward(images, [""] * len(images)).double()).exp() if method == "reweighted" else None
            )
            shown_first = slice(None) if weights is None else systematic_draw(weights / weights.sum(), DRAWN, 0)
            return judge.of(images, weights), images[shown_first]
        spent = {} if trainer is None else self.train(trainer)
        if trainer is None:
            batch = self.guided(sampler, judge, method, beta)
        else:
            with trainer.final():
                batch = drawn(sampler, DRAWN_NEAR.get(method, DRAWN))
        assert batch.images is not None
        assert batch.log_q is not None
        assert batch.log_p is not None
        moved = judge.moved(batch.log_q, batch.log_p, batch.reward, beta)
        return judge.of(batch.images) | moved | spent, batch.images

    def train(self, trainer: Trainer) -> Numbers:
        """Train a run to its end from wherever it was left; the prior's trajectories are the pool's."""
        source, count = trainer.sources.prior
        if count and isinstance(source, PriorBuffer):
            reward = trainer.sampler.reward
            prior = trained_on(
                self.out / "prior", KEPT, lambda x_0: reward(trainer.prior.decode(x_0), [""] * len(x_0)), source.noised
            )
            source.memory, source.drawn = {0: prior}, {0: len(prior)}
        seconds, cpu = perf_counter(), process_time()
        trainer.fit()
        if trainer.interrupted:
            raise KeyboardInterrupt
        return {"seconds": perf_counter() - seconds, "cpu_seconds": process_time() - cpu}

    def guided(self, sampler: Sampler, judge: Judge, method: str, beta: float) -> Batch:
        """Samples guided by the classifier, at the scale that came nearest to the real pictures of one class."""
        reward = Classifier(list(judge.reward.targets), model="fashion-classifier", grad=True)

        def log_likelihood(x_0: Tensor) -> Tensor:
            return beta * reward((x_0 / 2 + 0.5).clamp(0, 1).expand(-1, 3, -1, -1), [""] * len(x_0))

        def at(scale: float, count: int) -> Batch:
            return drawn(sampler, count, Guidance(log_likelihood, scale, GUIDED[method]))

        file = self.out / f"scale.{method}.txt"
        if not file.exists():
            if judge.reward.targets != [CLASSES.index(TUNED_ON)]:
                self.row(TUNED_ON, method)
            else:
                found = {}
                for scale in SCALES:
                    images = at(scale, TUNING).images
                    assert images is not None
                    found[scale] = judge.of(images)["frechet"]
                log.info("%s: Fréchet distance by scale %s", method, found)
                file.write_text(str(min(found, key=lambda scale: found[scale] or 0)))
        return at(float(file.read_text()), DRAWN)


def untrained(config: RunConfig) -> Sampler:
    """The prior and the reward of a run, without a run's folder."""
    prior, reward = build(config.prior, "prior"), build(config.reward, "reward")
    for part in (prior, reward):
        part.load_weights()
    return Sampler(prior, reward, config.prompts.texts(), config.train.micro_batch)


def drawn(sampler: Sampler, count: int, guidance: Guidance | None = None) -> Batch:
    """Trajectories with their images and both log-densities: of the posterior, or of the prior under guidance."""
    seeds, prior = [seed_of(0, "eval", 0, k) for k in range(count)], sampler.prior
    with nullcontext() if guidance is None else guided(prior.pipe.unet, prior.pipe.scheduler, guidance):
        batch = sampler.draw([0] * count, seeds, of_prior=guidance is not None, images=True)
    if guidance is not None:
        batch = replace(batch, log_q=batch.log_p, log_p=None)  # what drew them was not the prior
    return sampler.completed(batch)


def shown(images: Tensor) -> Tensor:
    """[-1, 1] and grey -> what rewards see."""
    return (images / 2 + 0.5).expand(-1, 3, -1, -1)
