"""Steering against the truth, for docs/steering.md: `python -m tests.measurements.steering_table [gmm25|mixed|emoji]`.

gmm25: the 25 Gaussians in 40 steps, where the truth is known; TV of the modes' proportions of all samples together, and of a group.
mixed: prior and exact posterior of the same, mixed with weight w, against p^(1 - w)·p*^w.
emoji: prior, reward, steps and beta of configs/emoji_trust_pcl.yaml.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from functools import partial
from time import process_time

import torch
from torch import Tensor

from diffusion_rtb.chain.seeds import generators, seed_of
from diffusion_rtb.config.components import build
from diffusion_rtb.config.load import load_config
from diffusion_rtb.exact import ExactTarget, Modes, exact_target
from diffusion_rtb.steering import Aim, Method, Particles, State, rewards_of, steered
from diffusion_rtb.steering.best_of import BestOf
from diffusion_rtb.steering.rlg import RLG
from diffusion_rtb.steering.smc import SMC
from diffusion_rtb.steering.svdd import SVDD
from diffusion_rtb.steering.value_guidance import ValueGuidance
from pipelines.gmm import GMM
from tests.oracles.analytic import noised_mixture

SAMPLES, ROWS = 8192, 65_536
"""Samples of each row of the table, and particles at most."""


def gmm25() -> Iterator[str]:
    config = load_config("configs/gmm25.yaml", ["prior.steps=40"])
    prior, reward = build(config.prior, "prior"), build(config.reward, "reward")
    prior.attach()
    target = exact_target(prior, reward, 1.0)
    yield "| method | particles | value | TV | TV of a group | Z | network calls per sample |\n|---|---|---|---|---|---|---|"
    for method, value in methods():
        chain, seconds = along(prior, reward, method, partial(soft_value, prior, target) if value == "exact" else None)
        yield line(prior, target, method, value, chain) + f" <!-- {seconds:.1f} CPU s -->"
    with target.as_exact():  # type: ignore[misc]
        x = prior.pipe(**prior.arguments([""] * SAMPLES), generator=torch.Generator().manual_seed(0)).vectors
    yield f"| the truth, through the same chain | – | – | {tv(shares(x, target.modes), target.modes):.3f} | – | – | 40 |"  # type: ignore[arg-type]


def methods() -> Iterator[tuple[Method, str]]:
    yield SMC(2, threshold=0.0), "none"
    for n in (4, 16, 64, 256):
        yield BestOf(n), "none"
        yield SMC(n, threshold=0.0), "none"
        for temper in (0.0, 2.0, 4.0):
            yield SMC(n, temper=temper), f"r(x̂), temper {temper:g}"
        yield SMC(n), "exact"
    for n in (4, 16, 64):
        for choice in ("drawn", "best"):
            yield SVDD(n, choice), "r(x̂), temper 2"
            yield SVDD(n, choice), "exact"
    for n in (1, 4, 16, 64):
        yield ValueGuidance(particles=n), "exact"


def along(
    prior: GMM, reward: Callable[..., Tensor], method: Method, value: Callable[[State], Tensor] | None
) -> tuple[Particles, float]:
    groups = min(ROWS // method.particles, -(-SAMPLES // method.kept))
    rows = groups * method.particles
    drawn = generators([seed_of(0, k) for k in range(rows)])
    aim = Aim(rewards_of(prior, reward, [""] * rows), 1.0, value)
    start = process_time()
    with prior.as_prior(), method.around(prior.pipe, aim, generators=drawn) as chain:
        prior.pipe(**prior.arguments([""] * rows), generator=drawn)
    return chain, process_time() - start


def soft_value(prior: GMM, target: ExactTarget, state: State) -> Tensor:
    """log E_p[f/g | x_t] = log f_t - log g_t of the noised densities, but for the reward's floor."""
    assert target.modes is not None
    network = prior.pipe.denoiser
    means = (target.modes.centres - network.shift.double()) / network.scale.double()
    variance, a = 0.3 / float(network.scale) ** 2, float(network.alpha_bar[int(state.timestep)])
    weights, equal = target.modes.weights.clamp(min=math.exp(-10) / 25), torch.full((25,), 1 / 25, dtype=torch.float64)
    of = [noised_mixture(means, w, variance, a).log_prob(state.x_t.double()) for w in (weights, equal)]
    return of[0] - of[1]


def line(prior: GMM, target: ExactTarget, method: Method, value: str, chain: Particles) -> str:
    assert target.modes is not None
    modes, n = target.modes, method.particles
    x = prior.decode(chain.trajectory.x_0).unflatten(0, (-1, n))[:, : method.kept]
    own = torch.stack([shares(group, modes) for group in x[:512]]) if method.kept > 1 else None
    of_group = "–" if own is None else f"{sum(tv(s, modes) for s in own) / len(own):.3f}"
    z = "–"
    if chain.weighs:
        values = chain.log_z.exp()
        z = f"{float(values.mean()):.2f} ± {float(values.std()) / math.sqrt(len(values)):.2f}"
    name = type(method).__name__ + (", best" if getattr(method, "choice", "") == "best" else "")
    whole = tv(shares(x.flatten(0, 1), modes), modes)
    return f"| {name} | {n} | {value} | {whole:.3f} | {of_group} | {z} | {40 * n // method.kept} |"


def shares(x: Tensor, modes: Modes) -> Tensor:
    nearest = torch.cdist(x.double(), modes.centres.double()).argmin(1)
    return torch.bincount(nearest, minlength=len(modes.centres)) / len(x)


def tv(found: Tensor, modes: Modes, weights: Tensor | None = None) -> float:
    return 0.5 * float((found - (modes.weights if weights is None else weights)).abs().sum())


def mixed() -> Iterator[str]:
    config = load_config("configs/gmm25.yaml", ["prior.steps=160"])
    prior, reward = build(config.prior, "prior"), build(config.reward, "reward")
    prior.attach()
    target = exact_target(prior, reward, 1.0)
    assert target.modes is not None
    network, equal = prior.pipe.denoiser, torch.full((25,), 1 / 25, dtype=torch.float64)
    yield "| weight | TV to p^(1-w)·p*^w | TV through the exact chain of that | 8,192 exact draws |\n|---|---|---|---|"
    for weight in (0.0, 0.5, 1.0, 1.5, 2.0):
        truth = equal ** (1 - weight) * target.modes.weights**weight * (target.modes.weights > 0 if weight else 1)
        truth = truth / truth.sum()
        rows = generators([seed_of(0, k) for k in range(SAMPLES)])
        aim = Aim(lambda x: x[:, 0], 1.0)
        call = prior.arguments([""] * SAMPLES) | {"generator": rows}
        with target.as_exact(), RLG(weight).around(prior.pipe, aim, as_prior=lambda: network.weighted(equal)):  # type: ignore[misc]
            x = prior.pipe(**call).vectors
        with network.weighted(truth):
            exact = prior.pipe(**call | {"generator": generators([seed_of(0, k) for k in range(SAMPLES)])}).vectors
        drawn = torch.bincount(torch.multinomial(truth, SAMPLES, replacement=True), minlength=25) / SAMPLES
        errors = [tv(shares(y, target.modes), target.modes, truth) for y in (x, exact)]
        yield f"| {weight:g} | {errors[0]:.3f} | {errors[1]:.3f} | {tv(drawn, target.modes, truth):.3f} |"


def emoji() -> Iterator[str]:
    config = load_config("configs/emoji_trust_pcl.yaml")
    prior, reward = build(config.prior, "prior"), build(config.reward, "reward")
    head = "| method | particles | log Z of six groups | mean reward | first ancestors left | CPU s per group |"
    yield f"{head}\n|---|---|---|---|---|---|"
    for method in (SMC(32, threshold=0.0), SMC(32, temper=0.0), SMC(32)):
        start, found = process_time(), []
        for seed in range(6):
            found.append(steered(prior, reward, method, ["a cat emoji"], [seed], config.beta.value))
        seconds = (process_time() - start) / 6
        log_z = torch.cat([group.log_z for group in found if group.log_z is not None])
        kept = torch.cat([group.reward[: method.kept] for group in found])
        starts = [len(group.trajectory.x[:, 0].flatten(1).unique(dim=0)) for group in found]
        temper = f", temper {method.temper:g}" if isinstance(method, SMC) and method.threshold else ""
        shown = "re-weighted at the end" if isinstance(method, SMC) and not method.threshold else temper
        low, high = float(log_z.min()), float(log_z.max())
        mean = float(log_z.logsumexp(0)) - math.log(len(log_z))
        yield (
            f"| {type(method).__name__} {shown} | {method.particles} | {mean:.2f} [{low:.2f}, {high:.2f}] | "
            f"{float(kept.mean()):.2f} | {sum(starts) / 6:.1f} | {seconds:.0f} |"
        )


def main(which: str) -> None:
    """Write the rows as they come."""
    torch.manual_seed(0)
    for row in {"gmm25": gmm25, "mixed": mixed, "emoji": emoji}[which]():
        sys.stdout.write(row + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "gmm25")
