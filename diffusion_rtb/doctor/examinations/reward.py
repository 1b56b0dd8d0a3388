"""The reward on a few samples of the prior: what `check-reward` asks, in short, and the tilt that beta makes of its spread."""

from __future__ import annotations

from diffusion_rtb.doctor.finding import Examined, Finding, Verdict
from diffusion_rtb.doctor.patient import Patient
from diffusion_rtb.doctor.words import many
from diffusion_rtb.reach import NEXT_TO_NOTHING
from diffusion_rtb.reward_check.report import Report, check_reward
from diffusion_rtb.reward_check.samples import Samples
from diffusion_rtb.reward_check.subject import Check, Status
from diffusion_rtb.training.rounding_floor import asked_tilt

__all__ = ["PLACE", "examine"]

PLACE = 40

SAMPLES = 8
"""Samples that the checks see."""

CHECKS = ("spread", "repeat", "one by one", "order", "prompts", "broken", "levels")
"""Of `reward_check`, beside those of the first call; the others want more samples than these, or more time."""

FAR = 5.0
"""Nats of beta·sd from where on hardly any prior sample looks like the posterior's, also where rewards are skewed: docs/beta.md."""

VERDICTS: dict[Status, Verdict] = {"pass": "ok", "info": "ok", "skip": "ok", "warn": "look", "fail": "stop"}


def examine(patient: Patient) -> Examined:
    """Finite, of the right shape, deterministic, telling samples apart; and beta times their spread."""
    sampler, batch = patient.loaded.sampler, patient.samples
    assert batch.images is not None
    chosen = list(range(0, len(batch), max(1, len(batch) // SAMPLES)))[:SAMPLES]
    texts = sampler.texts(batch.prompt[chosen])
    known = dict(zip(sampler.prompts, sampler.metadata, strict=True))
    samples = Samples(batch.images[chosen].float(), texts, "draws of the prior", known)
    name = patient.config.reward.component
    report = check_reward(sampler.reward, samples, name=name, device=patient.device, only=CHECKS)
    tilt = asked_tilt(patient.config, batch)
    mean, std = float(batch.reward.mean()), float(batch.reward.std(correction=0))
    rows = [("prior samples", f"reward {mean:.4g} ± {std:.3g} over {many(len(batch), 'sample')}")]
    numbers = {"mean": mean, "std": std, "tilt": tilt, "samples": len(batch), "checks": report.as_json()["checks"]}
    return Examined([*_checked(report), _tilt(patient, tilt, len(batch) > len(sampler.prompts))], rows, numbers)


def _checked(report: Report) -> list[Finding]:
    bad = [Finding(_verdict(c), f"{c.name}: {c.message}") for c in report.checks if _verdict(c) != "ok"]
    passed = [check.name for check in report.checks if check.status == "pass"]
    return [Finding("ok", f"{', '.join(passed)}: as they should be"), *bad] if passed else bad


def _verdict(check: Check) -> Verdict:
    """So few samples may well be alike where a reward is rare."""
    return "look" if check.name == "spread" and check.status == "fail" else VERDICTS[check.status]


def _tilt(patient: Patient, tilt: float, several: bool) -> Finding:
    """How far beta asks the posterior to go."""
    if patient.config.beta.kl_budget is not None:
        return Finding("ok", f"the posterior is to go {tilt:.3g} nats from the prior (kl_budget)")
    if not several:
        return Finding("ok", "beta times the reward's spread within a prompt is not measured: one sample of each")
    text = f"beta times the reward's spread within a prompt is {tilt:.2g} nats"
    if tilt > FAR:
        text += ": that is far from the prior, whose samples can hardly check such a posterior"
        less = f"beta={patient.config.beta.value * FAR / tilt:.2g} or less"
        return Finding("look", text, f"{less}, or beta={{value: 1.0, kl_budget: {{nats: 2.0}}}} (docs/beta.md)")
    if 0 < tilt < NEXT_TO_NOTHING:
        one = f"beta={patient.config.beta.value / tilt:.2g} makes it one nat (docs/beta.md)"
        return Finding("look", f"{text}: next to nothing is asked for, the posterior will be the prior", one)
    return Finding("ok", text)
