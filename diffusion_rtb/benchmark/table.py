"""The results as Markdown tables, one per measure; what was not measured says why."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from diffusion_rtb.files.whole import size_text

__all__ = ["markdown", "state"]

Result = Mapping[str, Any]
Column = tuple[str, Callable[[Result], str]]

NOT_MEASURED = "not measured"


def _number(key: str, form: str = "{:.3g}", scale: float = 1.0) -> Callable[[Result], str]:
    def shown(found: Result) -> str:
        return NOT_MEASURED if found.get(key) is None else form.format(found[key] * scale)

    return shown


def _memory(key: str) -> Callable[[Result], str]:
    return lambda found: NOT_MEASURED if found.get(key) is None else size_text(found[key])


def _phases(found: Result) -> str:
    return " / ".join(f"{seconds:.2f}" for seconds in found["seconds_of"].values())


MODEL: tuple[Column, ...] = (("model", lambda found: found["model"]), ("dtype", lambda found: found["dtype"]))
BATCH: Column = ("batch", lambda found: str(found["batch"]))
STEPS: Column = ("steps", lambda found: str(found["steps"]))
SHARE: Column = ("share of rate", _number("share_of_rate", "{:.0%}"))

TABLES: Mapping[str, tuple[str, Sequence[Column]]] = {
    "rate": (
        "Matrix rate",
        (("dtype", lambda found: found["dtype"]), ("TFLOP/s", _number("flop_per_second", scale=1e-12))),
    ),
    "network": (
        "One network call",
        (
            *MODEL,
            BATCH,
            ("parameters", _number("parameters", "{:.1f} M", 1e-6)),
            ("GFLOP", _number("flop", "{:.4g}", 1e-9)),
            ("ms", _number("seconds", "{:.4g}", 1e3)),
            ("with gradient, ms", _number("seconds_with_gradient", "{:.4g}", 1e3)),
            SHARE,
            ("peak memory", _memory("peak_memory")),
            ("with gradient", _memory("peak_memory_with_gradient")),
        ),
    ),
    "sampling": (
        "Sampling, pictures decoded",
        (
            *MODEL,
            BATCH,
            STEPS,
            ("images/s, bare", _number("images_per_second")),
            ("recorded", _number("images_per_second_recorded")),
            ("overhead", _number("overhead", "{:+.1%}")),
            ("same images", lambda found: "yes" if found["same_images"] else "no"),
            ("waits per step, bare", _number("waits_per_step", "{:.2f}")),
            ("recorded", _number("waits_per_step_recorded", "{:.2f}")),
            SHARE,
            ("peak memory", _memory("peak_memory")),
        ),
    ),
    "iteration": (
        "An iteration of the trainer",
        (
            *MODEL,
            ("micro-batch", lambda found: str(found["micro_batch"])),
            STEPS,
            ("trajectories", lambda found: str(found["trajectories"])),
            ("seconds", _number("seconds", "{:.2f}")),
            ("rollout / reward / log p / gradient", _phases),
            SHARE,
            ("waits per network pass", _number("waits_per_step", "{:.2f}")),
            ("parity, nats", _number("parity", "{:.1g}")),
            ("peak memory", _memory("peak_memory")),
        ),
    ),
    "update": (
        "An update on noised samples",
        (
            *MODEL,
            ("micro-batch", lambda found: str(found["batch"])),
            ("states of each", lambda found: str(found["states"])),
            ("seconds", _number("seconds", "{:.2f}")),
            ("of the network calls alone", _number("seconds_of_calls", "{:.2f}")),
            ("overhead", _number("overhead", "{:+.1%}")),
            ("peak memory", _memory("peak_memory")),
        ),
    ),
    "floor": (
        "Rounding floor",
        (*MODEL, STEPS, ("dimensions", _number("dimensions", "{:.0f}")), ("nats", _number("nats", "{:.2g}"))),
    ),
    "compiled": (
        "torch.compile",
        (
            *MODEL,
            BATCH,
            ("first call, s", _number("first_call", "{:.1f}")),
            ("ms, eager", _number("seconds_eager", "{:.4g}", 1e3)),
            ("compiled", _number("seconds", "{:.4g}", 1e3)),
            ("parity, nats", _number("parity", "{:.1g}")),
        ),
    ),
}


def markdown(machine: Mapping[str, Any], parts: Mapping[str, Result]) -> str:
    """All tables, and what there is no number for."""
    blocks = [_machine(machine)]
    for measure, (title, columns) in TABLES.items():
        rows = [found for found in parts.values() if found["measure"] == measure and not _reason(found)]
        if rows:
            blocks.append(f"**{title}**\n\n{_table(columns, rows)}")
    without = [f"- {name}: {reason}" for name, found in parts.items() if (reason := _reason(found))]
    if without:
        blocks.append("**Not measured**\n\n" + "\n".join(without))
    return "\n\n".join(blocks) + "\n"


def state(found: Result | None) -> str:
    """What is known of a part, in a few words; "" where it is still to be measured."""
    return "" if found is None else _reason(found) or f"measured in {found['took']:.1f} s"


def _machine(machine: Mapping[str, Any]) -> str:
    driver = f", driver {machine['driver']}, CUDA {machine['cuda']}" if "driver" in machine else ""
    cores = f"{machine['cores']} threads, " if machine["device"] == "cpu" else ""
    return (
        f"{machine['name']} ({cores}{size_text(machine['memory'])}{driver}), torch {machine['torch']}, "
        f"diffusers {machine['diffusers']}, diffusion-rtb {machine['diffusion-rtb']}"
    )


def _reason(found: Result) -> str:
    """Why a part has no numbers; "" where it has."""
    if "out_of_memory" in found:
        return f"out of memory {found['out_of_memory']}"
    return str(found.get("failed") or found.get("skipped") or "")


def _table(columns: Sequence[Column], rows: Sequence[Result]) -> str:
    lines = [[title for title, _ in columns], ["---"] * len(columns)]
    lines += [[cell(found) for _, cell in columns] for found in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
