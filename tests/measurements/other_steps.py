"""A posterior that was trained on 20 steps, sampled with others: `python -m tests.measurements.other_steps OUT [STEPS ...]`.

configs/gaussian.yaml is trained (seconds); its posterior is a table of affine corrections, one for each step. For a chain of other
steps the same change of the predicted noise is read between them, linearly in log(alpha_bar / (1 - alpha_bar)): what a network that
is given the noise level does by itself. Reward, KL and ELBO over 20,000 samples, beside the best chain of those steps.
"""

from __future__ import annotations

import logging
import sys

import numpy as np
import torch
from torch import Tensor

from diffusion_rtb.config.components import build
from diffusion_rtb.config.load import load_config
from diffusion_rtb.sampling.sampler import Sampler
from diffusion_rtb.training.assemble import assemble

CONFIG, SAMPLES = "configs/gaussian.yaml", 20_000
ROW = "| {} | {} | {:.3f} | {:.3f} ± {:.3f} | {:.3f} ± {:.3f} | {:.3f} |\n"


def changes(prior: object) -> tuple[np.ndarray, Tensor]:
    """log-SNR of each step, x_0's end first, and by how much the posterior changes the predicted noise: (steps, dim, dim + 1)."""
    denoiser = prior.pipe.denoiser  # type: ignore[attr-defined]
    t = torch.tensor(sorted(prior.coefficients.timesteps))  # type: ignore[attr-defined]
    level = denoiser.alpha_bar[t].double()
    own = denoiser.correction
    u = torch.cat([own.slope.detach(), own.offset.detach()[:, :, None]], 2).double()
    return (level / (1 - level)).log().numpy(), denoiser.gain[t].double()[:, None, None] * u


def set_changes(prior: object, snr: np.ndarray, change: Tensor) -> None:
    """Let a prior of other steps change the predicted noise as one of these levels does."""
    denoiser = prior.pipe.denoiser  # type: ignore[attr-defined]
    mine, _ = changes(prior)
    flat = change.flatten(1).numpy()
    order = snr.argsort()
    read = np.stack([np.interp(mine, snr[order], column[order]) for column in flat.T], 1)
    t = torch.tensor(sorted(prior.coefficients.timesteps))  # type: ignore[attr-defined]
    gain = denoiser.gain[t].double()
    per_gain = torch.where(gain == 0, 0, 1 / gain)
    u = per_gain[:, None, None] * torch.from_numpy(read).reshape(len(mine), *change.shape[1:])
    with torch.no_grad():
        denoiser.correction.slope.copy_(u[:, :, :-1])
        denoiser.correction.offset.copy_(u[:, :, -1])


def main(out: str, *steps: str) -> None:
    """Train, and print a row for each number of steps."""
    config = load_config(CONFIG, [f"out={out}", "name=other-steps"])
    trainer = assemble(config)
    trainer.fit()
    snr, change = changes(trainer.prior)
    given = config.reward.model_dump()["density"]
    head = "| steps | of which the posterior was trained on | reward | KL | ELBO | best ELBO |\n|---|---|---|---|---|---|\n"
    sys.stdout.write(head)
    for count in [int(each) for each in steps] or [20, 10, 50, 100]:
        prior = build(config.prior.model_dump() | {"steps": count}, "prior")
        prior.attach()
        set_changes(prior, snr, change)
        sampler = Sampler(prior, trainer.sampler.reward, [""], 2000)
        batch = sampler.completed(sampler.draw([0] * SAMPLES, list(range(SAMPLES))))
        assert batch.log_q is not None
        assert batch.log_p is not None
        ratio = (batch.log_q - batch.log_p).sum(1)
        elbo = config.beta.value * batch.reward - ratio
        errors = [float(values.std()) / SAMPLES**0.5 for values in (ratio, elbo)]
        best = prior.solve(config.beta.value, **given).best_elbo
        numbers = (float(ratio.mean()), errors[0], float(elbo.mean()), errors[1])
        sys.stdout.write(ROW.format(count, len(snr), float(batch.reward.mean()), *numbers, best))
        sys.stdout.flush()


if __name__ == "__main__":
    logging.disable(logging.INFO)
    main(*sys.argv[1:])
