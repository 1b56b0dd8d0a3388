"""What an iteration takes, and so the whole run and its evaluation."""

from __future__ import annotations

from diffusion_rtb.abilities import ObjectiveTraits
from diffusion_rtb.doctor.finding import Examined, Finding
from diffusion_rtb.doctor.patient import Patient
from diffusion_rtb.doctor.words import many, seconds_text
from diffusion_rtb.evaluation.choice import evaluated
from diffusion_rtb.interfaces import RefinesValue, WarmsUp
from diffusion_rtb.training.compatibility import check_owner
from diffusion_rtb.training.observers import PROMPTS
from diffusion_rtb.training.updates.optimizer import own_parameters
from diffusion_rtb.training.watch.look import plan

__all__ = ["PLACE", "examine"]

PLACE = 70

BUSY, SHORT = 0.7, 0.5
"""Share of one core below which a process on the CPU was kept waiting; seconds below which that is chance."""

LONG = 24 * 3600.0
"""Seconds of a run from where on it is worth a look whether all of it is needed."""


def examine(patient: Patient) -> Examined:
    """Seconds per iteration by phase, before the first iteration, of the run and of its evaluation."""
    dry, train = patient.dry, patient.config.train
    factor = train.prompts_per_iteration / dry.prompts / patient.processes
    each, first = factor * dry.seconds, _before(patient)
    sheets, looks = _sheets(patient), _looks(patient)
    run = sum(first.values()) + train.iterations * each + sheets + looks
    evaluation = _evaluation(patient)
    phases = {name: factor * spent for name, spent in dry.phases.items()}
    calls = round(factor * dry.calls.count)
    text = f"{seconds_text(each)} an iteration, {many(calls, 'call')} of the network with at most {dry.calls.rows} rows"
    if dry.prompts < train.prompts_per_iteration or patient.processes > 1:
        text += f"; measured on {dry.prompts} of its {train.prompts_per_iteration} prompts by one process, and scaled"
    findings = [Finding("ok", text), *_shared(patient), _whole(run, evaluation), *_owner(patient)]
    rows = [(name, seconds_text(spent)) for name, spent in phases.items()]
    rows += [(name, f"{seconds_text(spent)}, once") for name, spent in first.items()]
    rows += [("sample sheets", f"{seconds_text(sheets)} in all")] if sheets else []
    rows += [("looks of `watch`", f"{seconds_text(looks)} in all, without its judges")] if looks else []
    numbers = {
        "iteration": each, "phases": phases, "before": first, "sheets": sheets, "looks": looks,
        "run": run, "evaluation": evaluation,
        "network_calls": calls, "network_rows": dry.calls.rows, "iterations": train.iterations, "dry_prompts": dry.prompts,
        "first_dry_iteration": dry.first_seconds, "cpu_share": dry.cpu_seconds / dry.seconds,
    }  # fmt: skip
    cost = f"about {seconds_text(run)} of training and {seconds_text(evaluation)} of evaluation"
    return Examined(findings, rows, numbers, cost=cost)


def _shared(patient: Patient) -> list[Finding]:
    """Is a CPU so busy with others that the seconds are theirs?"""
    dry = patient.dry
    share = dry.cpu_seconds / dry.seconds
    if patient.device.type != "cpu" or share >= BUSY or dry.seconds < SHORT:
        return []
    text = f"others are at work here: this process had {share:.0%} of one core, so alone it takes about {share:.2g} times as long"
    return [Finding("look", text, "ask again when the machine is idle")]


def _whole(run: float, evaluation: float) -> Finding:
    text = f"about {seconds_text(run)} for the run, {seconds_text(evaluation)} for eval, without its embedder and judge"
    if run > LONG:
        return Finding("look", text, "train.gradient_steps, fewer prior.steps or train.iterations, or more processes")
    return Finding("ok", text)


def _before(patient: Patient) -> dict[str, float]:
    """Seconds of what comes before the first iteration, and of filling buffers when a prompt has its first turn."""
    objective, rate, wanted = patient.loaded.objective, patient.timed, patient.loaded.wanted
    drawing = (rate.rollout + rate.reward) / patient.processes
    buffer, count = patient.mixture.prior
    traits = ObjectiveTraits.of(objective)
    warms = isinstance(objective, WarmsUp) and traits.warm_up_updates != 0
    found = {"statistics": wanted * drawing} if wanted else {}
    if count or warms:
        prompts = len(patient.config.prompts.texts())
        turns = patient.config.train.iterations * patient.config.train.prompts_per_iteration
        filled = prompts if warms else min(prompts, turns)
        found["prior samples"] = buffer.capacity * filled * drawing
    if warms:
        found["warm-up of V"] = patient.dry.warm_up * (traits.warm_up_updates or 0)
    if isinstance(objective, RefinesValue) and objective.warm_up_rounds:
        led = objective.walks * len(patient.config.prompts.texts()) * (rate.rollout + rate.reward + rate.score)
        found["rounds of V"] = objective.warm_up_rounds * (led + patient.dry.warm_up * objective.round_updates)
    return found


def _sheets(patient: Patient) -> float:
    train = patient.config.train
    if not train.grid_every:
        return 0.0
    count = train.grid_samples * min(PROMPTS, len(patient.config.prompts.texts()))
    return (train.iterations // train.grid_every) * count * (patient.timed.rollout + patient.timed.reward)


def _looks(patient: Patient) -> float:
    """Seconds of drawing: the prior once, the posterior every so often and in the end, with both densities."""
    watch, rate = patient.config.watch, patient.timed
    if watch is None:
        return 0.0
    drawn, _ = plan(patient.config, watch)
    drawing, later = rate.rollout + rate.reward, (patient.config.train.iterations - 1) // watch.every + 1
    return len(drawn) * (drawing + later * (drawing + rate.score))


def _evaluation(patient: Patient) -> float:
    held, rate = patient.config.eval, patient.timed
    prompts = len(evaluated(held, patient.config.prompts.table())[0])
    drawn = (held.samples + held.prior_samples) * (rate.rollout + rate.reward)
    return prompts * (drawn + held.samples * rate.score)


def _owner(patient: Patient) -> list[Finding]:
    """An objective with parameters of its own trains in one process."""
    try:
        check_owner(patient.loaded.objective, bool(own_parameters(patient.loaded.objective)), patient.processes)
    except ValueError as error:
        return [Finding("stop", str(error))]
    return []
