"""What a run does before its first iteration: rewards learn their statistics, and an objective its V, both from the prior."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffusion_rtb.abilities import ObjectiveTraits
from diffusion_rtb.chain.forward_process import noised
from diffusion_rtb.chain.seeds import seed_of
from diffusion_rtb.chain.trajectory import Trajectory
from diffusion_rtb.config.components import build, locate
from diffusion_rtb.interfaces import RefinesValue, Terms, Walks, WarmsUp
from diffusion_rtb.sampling.batch import Batch
from diffusion_rtb.sampling.sampler import Sampler
from diffusion_rtb.scoring.memory import innermost, observing, wanting_rewards
from diffusion_rtb.training.processes import Processes
from diffusion_rtb.training.schedules import nth_prompt

if TYPE_CHECKING:
    from diffusion_rtb.behaviours.prior_buffer import PriorBuffer

__all__ = ["learn_statistics", "prior_terms", "warm_up"]


def learn_statistics(sampler: Sampler, run_seed: int, processes: Processes, between: Callable[[], object]) -> None:
    """Show the prior's samples to rewards that want some before training, see `StatefulReward.wanted`.

    The processes draw a share each and learn from all; `between` is called before each micro-batch that is drawn. A reward inside
    another learns first: what the outer one sees depends on it.
    """
    drawn: list[tuple[list[int], Tensor]] = []
    while wanted := wanting_rewards(sampler.reward):
        if not drawn:
            total = len(sampler.prompts)
            numbers = processes.share(range(-(-max(wanted.values()) // processes.count) * processes.count))
            for chunk in sampler.chunks(len(numbers)):
                between()
                rows = [nth_prompt(run_seed, n, total) for n in numbers[chunk]]
                seeds = [seed_of(run_seed, "statistics", n) for n in numbers[chunk]]
                drawn.append((rows, sampler.samples_of_prior(rows, seeds)))
        with observing(sampler.reward, lambda row: processes.gather(row)[0], only=innermost(wanted)):
            for rows, x_0 in drawn:
                sampler.rewards(x_0, rows)
        if wanting_rewards(sampler.reward).items() >= wanted.items():
            raise RuntimeError(
                f"Rewards that wanted samples before training still want as many after seeing {len(drawn)} batches: {wanted}. "
                "`wanted` of a reward with a memory must fall to 0 once it has been shown them."
            )


def warm_up(
    objective: Any,
    sampler: Sampler,
    buffer: PriorBuffer,
    keep: bool,
    beta: float,
    between: Callable[[], object],
    look: Callable[[Terms], object] = lambda terms: None,
    tell: Callable[[str], object] = lambda announcement: None,
) -> bool:
    """Let an objective with a value network learn it from trajectories of the prior.

    Of each only x_0 is held where the objective noises states anew (`warm_up_states`), else all states.

    Args:
        objective: Has `warm_up` and `warm_up_updates`, or does not warm up.
        sampler: Draws what is missing.
        buffer: Where prior trajectories are stored, or how many would be.
        keep: The run goes on to draw from the buffer; otherwise nothing stays in it.
        beta: Of the first iteration's target; nats per unit of reward.
        between: Called before each micro-batch that is drawn, and each update on noised states.
        look: Shown the prior's samples before anything is learned from them.
        tell: Told first what is about to be done, in a sentence for who waits for it, then each part that is done and its seconds.

    Returns:
        Whether the objective warms up.
    """
    traits = ObjectiveTraits.of(objective)
    if not isinstance(objective, WarmsUp) or traits.warm_up_updates == 0:
        return False
    tell(
        f"Before the first iteration: {buffer.capacity:,} samples of the prior for each prompt, {len(sampler.prompts)} in all, "
        f"then {traits.warm_up_updates:,} updates of V{_rounds(objective)}."
    )
    done = _timed(tell)
    clean = traits.warm_up_states == "noised"
    drawn = buffer.everything(sampler) if keep else buffer.passing(sampler, between)
    terms = prior_terms(sampler, drawn, clean)
    done(f"{len(terms.reward):,} samples of the prior, mean reward {float(terms.reward.mean()):.3g}")
    look(terms)

    def noise(x_0: Tensor, timesteps: Tensor, generator: torch.Generator) -> Tensor:
        between()
        return noised(sampler.prior.pipe.scheduler, x_0, timesteps, generator)

    objective.warm_up(terms, beta, noise)
    done(f"{traits.warm_up_updates:,} updates of V")
    if isinstance(objective, RefinesValue):
        for nth in range(objective.warm_up_rounds):
            seed = seed_of(buffer.seed, "walks", nth)
            walks = _walks(objective, sampler, beta, seed, between)
            done(f"{len(walks.reward):,} trajectories led by V, mean reward {float(walks.reward.mean()):.3g}")
            objective.refine(walks, terms, beta, noise)
            done("updates of V where it led")
    return True


def _timed(tell: Callable[[str], object]) -> Callable[[str], None]:
    """Tells what was done, with the seconds since it was last called."""
    began = time.perf_counter()

    def done(what: str) -> None:
        nonlocal began
        now = time.perf_counter()
        tell(f"    {what}: {now - began:.1f} s")
        began = now

    return done


def _rounds(objective: Any) -> str:
    """What is announced of them."""
    if not isinstance(objective, RefinesValue) or objective.warm_up_rounds == 0:
        return ""
    times, walks = objective.warm_up_rounds, objective.walks
    return (
        f", and {times} time{'s' * (times > 1)} {walks:,} trajectories of each prompt led by V, with updates after them"
    )


def _walks(objective: RefinesValue, sampler: Sampler, beta: float, seed: int, between: Callable[[], object]) -> Walks:
    """Where the objective's V leads the prior, as many trajectories of each prompt as it asks for."""
    rows = [row for row in range(len(sampler.prompts)) for _ in range(objective.walks)]
    seeds = [seed_of(seed, number) for number in range(len(rows))]
    # By name, as a run names all that it is made of: training knows no way of steering.
    method = build({"component": "value_guidance", "scale": objective.scale}, "steering")
    steered, parts = locate("diffusion_rtb.steering:steered"), []
    for chunk in sampler.chunks(len(rows)):
        between()
        known = [sampler.metadata[row] for row in rows[chunk]]
        found = steered(
            sampler.prior,
            sampler.reward,
            method,
            sampler.texts(rows[chunk]),
            seeds[chunk],
            beta,
            metadata=known,
            learned=objective.value,
            means=True,
        )
        parts.append((found.trajectory.to("cpu"), found.means.cpu(), found.reward.float().cpu()))
    trajectory = Trajectory.cat([part for part, _, _ in parts])
    return Walks(
        x=trajectory.x,
        times=torch.cat([trajectory.timesteps, torch.zeros(1)]),
        mean_p=torch.cat([means for _, means, _ in parts]),
        std=trajectory.std,
        reward=torch.cat([reward for _, _, reward in parts]),
        features=sampler.features(torch.tensor(rows)),
    )


def prior_terms(sampler: Sampler, batches: Iterable[Batch], clean: bool) -> Terms:
    """What an objective sees of trajectories that the prior drew; if `clean`, x is (batch, 1, *dims): x_0."""
    x, log_p, reward, prompt = [], [], [], []
    for batch in batches:
        trajectory = batch.trajectory
        x.append(trajectory.x[:, -1:].clone() if clean else trajectory.x)  # a view would hold on to all the states
        log_p.append(trajectory.log_prob)
        reward.append(batch.reward)
        prompt.append(batch.prompt)
    device = sampler.prior.device
    rows = torch.cat(prompt)
    density = torch.cat(log_p).to(device)
    return Terms(
        log_q=density.clone().requires_grad_(),
        log_p=density,
        reward=torch.cat(reward).to(density),
        prompt=rows.to(device),
        x=torch.cat(x),
        timesteps=trajectory.timesteps.to(device),
        features=sampler.features(rows),
        log_behaviour=density,
    )
