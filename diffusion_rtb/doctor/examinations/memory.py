"""A memory plan by component, and what a dry iteration really took."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from diffusion_rtb.abilities import ObjectiveTraits
from diffusion_rtb.behaviours._stored_size import stores
from diffusion_rtb.doctor.activations import activation_bytes, scaled
from diffusion_rtb.doctor.finding import Examined, Finding
from diffusion_rtb.doctor.patient import Patient
from diffusion_rtb.doctor.room import Room, room_of
from diffusion_rtb.doctor.sizes import bytes_of, module_bytes, reward_networks
from diffusion_rtb.doctor.words import many
from diffusion_rtb.files.whole import size_text
from diffusion_rtb.out_of_memory import smaller_settings
from diffusion_rtb.reward_check.measures import peak_memory
from diffusion_rtb.sampling.sampler import decoded
from diffusion_rtb.scoring.call import evaluate_reward
from diffusion_rtb.training.rounding_floor import networks_of
from diffusion_rtb.training.updates.optimizer import own_parameters

__all__ = ["PLACE", "Plan", "examine"]

PLACE = 50

KEPT = 1024
"""Prompts whose embeddings priors keep, at most."""

NEAR = 0.9
"""Share of the free memory above which a plan is worth a look."""

MIB = 2**20
FACTOR = {"adamw": 4.0, "adamw8bit": 2.5}
"""A trained number, its gradient, and two moments of the optimizer; in numbers of 4 bytes."""

REMEMBERED = "behaviours' memories"
"""Name of their line."""

GONE_BACK_TO = "copy to go back to"
"""Name of the line of what `Trainer` copies: all of the above but gradients."""

SLACK = 256 * MIB
"""Of an accelerator's libraries and allocator."""


@dataclass(frozen=True)
class Part:
    """A line of the plan."""

    name: str
    bytes: int
    where: Literal["device", "host", "passing"] = "device"
    """passing: on the device too, but only for a while, one after the other."""
    note: str = ""


@dataclass(frozen=True)
class Plan:
    """All that a run holds."""

    parts: list[Part]
    host_is_device: bool

    @property
    def device(self) -> int:
        """Bytes at most on the device: what stays there, and the largest of what passes."""
        passing = max(part.bytes for part in self.parts if part.where == "passing")
        kinds = ("device", "host") if self.host_is_device else ("device",)
        return passing + sum(part.bytes for part in self.parts if part.where in kinds)

    @property
    def host(self) -> int:
        """Bytes on the host."""
        return sum(part.bytes for part in self.parts if part.where == "host")


def examine(patient: Patient) -> Examined:
    """The plan against the device's memory, then a dry iteration against the plan."""
    loaded, train = patient.loaded, patient.config.train
    passing, activations = _passing(patient)
    plan = Plan([*_resident(patient), *_trajectories(patient), *passing], patient.device.type == "cpu")
    room = room_of(patient.device)
    fit = _fits(patient, plan, room, activations)
    rows = [(part.name, size_text(part.bytes) + (f"  {part.note}" if part.note else "")) for part in plan.parts]
    numbers: dict[str, Any] = {
        "parts": [vars(part) for part in plan.parts], "device": plan.device, "host": plan.host, "free": room.free,
        "total": room.total, "activations": {str(count): found for count, found in activations.items()},
    }  # fmt: skip
    if fit.verdict == "stop":
        patient.closed = "it would not fit into memory"
        return Examined([fit], rows, numbers)
    if train.micro_batch not in activations:
        activations[train.micro_batch] = activation_bytes(loaded.sampler, patient.samples, train.micro_batch)
    predicted = scaled(activations[1], activations.get(2, activations[1]), train.micro_batch)
    measured = activations[train.micro_batch]
    numbers |= {"activations_predicted": predicted, "activations_measured": measured}
    dry = _dry_finding(patient, plan, numbers)
    cost = f"{size_text(plan.device)} of memory on {room.device}"
    return Examined([fit, _scaling(predicted, measured, train.micro_batch), dry], rows, numbers, cost=cost)


def _resident(patient: Patient) -> list[Part]:
    """What stays on the device from the beginning to the end."""
    prior, reward, objective = patient.loaded.prior, patient.loaded.sampler.reward, patient.loaded.objective
    trained = bytes_of(prior.parameters().values())
    average = trained if patient.config.train.ema is not None else 0
    older = trained if ObjectiveTraits.of(objective).keeps_old else 0
    networks = networks_of(prior.pipe).values()
    owned = bytes_of(own_parameters(objective))
    call = prior.arguments(patient.loaded.sampler.prompts[:1])
    factor = FACTOR[patient.config.train.optimizer]
    embedding = bytes_of(value for value in call.values() if isinstance(value, Tensor))
    count = min(len(patient.config.prompts.texts()), KEPT)
    parts = [
        Part("prior's networks", module_bytes(*networks) - trained),
        Part("posterior, AdamW", round(factor * trained), note="numbers, gradients, two moments"),
        Part("moving average", average, note="of the posterior (train.ema)"),
        Part("older posterior", older, note="of the objective"),
        Part("reward's networks", module_bytes(*reward_networks(reward))),
        Part("objective, AdamW", round(factor * owned)),
        Part("embeddings", embedding * count, note=f"of {many(count, 'prompt')}"),
        Part(GONE_BACK_TO, round((factor - 1) * (trained + owned)) + average + older, "host", "if it fails"),
    ]
    return [part for part in parts if part.bytes]


def _trajectories(patient: Patient) -> list[Part]:
    """States and densities of one iteration, and what the behaviours remember when they are full."""
    config, batch = patient.config, patient.samples
    each = bytes_of(batch) - (0 if batch.images is None else bytes_of([batch.images]))
    count = config.train.prompts_per_iteration * config.train.group // patient.processes
    where: Literal["device", "host"] = "host" if batch.trajectory.x.device.type == "cpu" else "device"
    found = [Part("trajectories", round(each / len(batch) * count), where, f"{count} of an iteration")]
    for store in stores(config, patient.loaded.prior, patient.loaded.objective, patient.mixture):
        note = f"{store.count} per prompt ({store.key}), twice while a checkpoint is written"
        found.append(Part(REMEMBERED, 2 * store.size, "host", note))
    return found


def _passing(patient: Patient) -> tuple[list[Part], dict[int, int]]:
    """What one micro-batch takes in passing: the gradient's activations, the decoder, the reward."""
    sampler, batch, size = patient.loaded.sampler, patient.samples, patient.config.train.micro_batch
    activations = {count: activation_bytes(sampler, batch, count) for count in (1, 2) if count <= size}
    one = scaled(activations[1], activations.get(2, activations[1]), size)
    device = patient.device
    with peak_memory(device) as decoder:
        images = decoded(sampler.prior, batch.trajectory.x_0.to(device))
    rows = batch.prompt.tolist()
    with peak_memory(device) as reward:
        evaluate_reward(
            sampler.reward, images, sampler.texts(rows), "reward", metadata=[sampler.metadata[row] for row in rows]
        )
    said, then = f"of a micro-batch of {size}, one step", "while there are no activations"
    return [
        Part("activations", one, "passing", said),
        Part("decoding", round(decoder.mib * MIB), "passing", then),
        Part("reward's call", round(reward.mib * MIB) + bytes_of([images]), "passing", then),
    ], activations


def _fits(patient: Patient, plan: Plan, room: Room, activations: dict[int, int]) -> Finding:
    text = f"{size_text(plan.device)} planned on {room.device}, where {size_text(room.free)} of {size_text(room.total)} are free"
    if not plan.host_is_device:
        text += f"; {size_text(plan.host)} on the host"
    if plan.device <= NEAR * room.free:
        return Finding("ok", text)
    return Finding("stop" if plan.device > room.free else "look", text, _smaller(patient, plan, room, activations))


def _smaller(patient: Patient, plan: Plan, room: Room, activations: dict[int, int]) -> str:
    """The settings that help: the micro-batch that would fit by the plan, and what else takes less."""
    train = patient.config.train
    one, two = activations[1], activations.get(2, activations[1])
    rest, batch = plan.device - scaled(one, two, train.micro_batch), train.prompts_per_iteration * train.group
    fitting = [
        n for n in range(1, train.micro_batch) if batch % n == 0 and rest + scaled(one, two, n) <= NEAR * room.free
    ]
    advice = [f"train.micro_batch={fitting[-1]} (it is {train.micro_batch}), which would fit"] if fitting else []
    others = smaller_settings(patient.config, "train")
    return "\n".join([*advice, *(line for line in others if not (fitting and line.startswith("train.micro_batch")))])


def _scaling(predicted: int, measured: int, size: int) -> Finding:
    text = f"activations of a micro-batch of {size}: {size_text(predicted)} scaled from 1 and 2 trajectories, "
    text += f"{size_text(measured)} measured"
    far = measured > 1.25 * predicted + MIB
    return Finding("look" if far else "ok", text, "the plan is that much too small: leave room" if far else "")


def _dry_finding(patient: Patient, plan: Plan, numbers: dict[str, Any]) -> Finding:
    """What the dry iteration took, beside what the plan says of it."""
    dry, sizes = patient.dry, {part.name: part for part in plan.parts}
    whole = patient.config.train.prompts_per_iteration // patient.processes
    left_out = 0
    if plan.host_is_device:  # fewer trajectories, and memories that are not full
        left_out = sizes["trajectories"].bytes * (whole - dry.prompts) // whole
        left_out += sum(part.bytes for part in plan.parts if part.name == REMEMBERED)
    planned, measured = plan.device - left_out, dry.peak - (patient.loaded.before if plan.host_is_device else 0)
    numbers |= {"dry_planned": planned, "dry_measured": measured}
    if plan.host_is_device:
        text = f"a dry iteration: {size_text(planned)} by the plan; the process grew by {size_text(measured)}, with libraries and"
        return Finding("ok", f"{text} what it has freed")
    text = f"a dry iteration: {size_text(planned)} by the plan, {size_text(measured)} were allocated at most"
    far = measured > 1.25 * planned + SLACK
    return Finding("look" if far else "ok", text, "leave that much more room" if far else "")
