"""The arithmetic of a batch: how many trajectories, of whom, in which pieces, by how many processes."""

from __future__ import annotations

from collections.abc import Sequence

from diffusion_rtb.doctor.finding import Examined, Finding
from diffusion_rtb.doctor.patient import Patient
from diffusion_rtb.doctor.words import many
from diffusion_rtb.training.compatibility import check_processes

__all__ = ["PLACE", "examine"]

PLACE = 20


def examine(patient: Patient) -> Examined:
    """An iteration's trajectories in a sentence, whose turn prompts have, and which numbers of processes can share them."""
    config, train = patient.config, patient.config.train
    prompts, total = train.prompts_per_iteration // patient.processes, len(config.prompts.texts())
    shares = {name: prompts * count for name, (_, count) in patient.mixture.items() if count > 0}
    pieces = {name: _pieces(count, train.micro_batch) for name, count in shares.items()}
    own = next(iter(shares))
    parts = ", ".join(
        f"{count} {'of the posterior' if name == own else f'of {name}'}" for name, count in shares.items()
    )
    each = "" if patient.processes == 1 else f" in each of {patient.processes} processes"
    text = (
        f"{many(prompts, 'prompt')} x group {train.group} = {sum(shares.values())} trajectories an iteration{each} ({parts}), "
        f"through the network in {many(sum(map(len, pieces.values())), 'micro-batch')} of at most {train.micro_batch}"
    )
    findings = [Finding("ok", text), _turns(train.iterations * train.prompts_per_iteration, total), _processes(patient)]
    numbers = {
        "prompts": total, "prompts_per_iteration": train.prompts_per_iteration, "group": train.group, "trajectories": shares,
        "micro_batches": pieces, "processes": patient.processes, "iterations": train.iterations,
    }  # fmt: skip
    return Examined(findings, numbers=numbers)


def _pieces(count: int, micro_batch: int) -> list[int]:
    return [min(micro_batch, count - start) for start in range(0, count, micro_batch)]


def _turns(turns: int, prompts: int) -> Finding:
    """How often a prompt is trained on."""
    if turns < prompts:
        text = f"only {turns:,} of the {prompts:,} prompts have a turn in the whole run"
        return Finding("look", text, "train.iterations or train.prompts_per_iteration higher")
    return Finding("ok", f"{many(prompts, 'prompt')}, each with about {turns / prompts:.3g} turns in the whole run")


def _processes(patient: Patient) -> Finding:
    try:
        check_processes(patient.config, patient.mixture, patient.processes)
    except ValueError as error:
        return Finding("stop", str(error))
    fitting = [n for n in range(1, patient.config.train.prompts_per_iteration + 1) if _fits(patient, n)]
    others = [n for n in fitting if n != patient.processes]
    text = f"{many(patient.processes, 'process')}"
    return Finding("ok", f"{text}; {_listed(others)} could share the prompts" if others else text)


def _fits(patient: Patient, count: int) -> bool:
    try:
        check_processes(patient.config, patient.mixture, count)
    except ValueError:
        return False
    return True


def _listed(numbers: Sequence[int]) -> str:
    shown = [str(number) for number in numbers[:6]]
    return " or ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)
