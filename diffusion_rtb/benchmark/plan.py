"""What is measured, in which order: the rows of `models.yaml` taken apart into parts that stand alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, ValidationError

from diffusion_rtb.config.component_errors import nearest
from diffusion_rtb.config.section import Section
from diffusion_rtb.config.sections import Component
from diffusion_rtb.config.yaml_text import read_yaml

__all__ = ["DTYPES", "Dtype", "Measure", "Model", "Part", "chosen", "load_models", "plan"]

Dtype = Literal["bfloat16", "float16", "tf32", "float32"]
DTYPES: tuple[Dtype, ...] = ("bfloat16", "float16", "tf32", "float32")

Measure = Literal["rate", "network", "sampling", "iteration", "update", "floor", "compiled"]

BUILT_IN = Path(__file__).with_name("models.yaml")


class Size(Section):
    """Of an iteration."""

    batch: PositiveInt
    """Trajectories that pass through the network at once."""
    steps: PositiveInt
    """Denoising steps."""


class Model(Section):
    """A row of the table of models."""

    prior: Component
    """Without dtype, device and steps."""
    posterior: dict[str, Any] = Field(default_factory=dict)
    """As in a config: {full: true}, or of a LoRA what differs from the default."""
    steps: PositiveInt
    """Denoising steps where nothing else is said."""
    batches: Annotated[tuple[PositiveInt, ...], Field(strict=False, min_length=1)]
    """Of one network call, and of sampling."""
    iterations: Annotated[tuple[Size, ...], Field(strict=False)]
    """Of the trainer."""
    dtypes: Annotated[tuple[Dtype, ...], Field(strict=False, min_length=1)]
    """The most wanted first."""
    compile: PositiveFloat
    """Seconds that compiling is expected to take."""


@dataclass(frozen=True)
class Part:
    """One measurement: what is written at once, and what is not repeated."""

    measure: Measure
    dtype: Dtype
    model: str = ""
    batch: int = 0
    steps: int = 0
    row: Model | None = field(default=None, compare=False)

    @property
    def name(self) -> str:
        """Such as sdxl-bfloat16-iteration-b4-t10."""
        numbers = [f"b{self.batch}" if self.batch else "", f"t{self.steps}" if self.steps else ""]
        return "-".join(part for part in (self.model, self.dtype, self.measure, *numbers) if part)

    @property
    def facts(self) -> dict[str, Any]:
        """What its result begins with, as plain JSON values."""
        facts = {"measure": self.measure, "dtype": self.dtype}
        return facts | ({"model": self.model, "batch": self.batch, "steps": self.steps} if self.model else {})


def load_models(file: Path | None = None) -> dict[str, Model]:
    """The rows of `models.yaml`, or of a file of one's own.

    Raises:
        ValueError: a row has other keys or values than those of `Model`.
    """
    place = BUILT_IN if file is None else file
    rows = read_yaml(place.read_text(encoding="utf-8"))
    if not isinstance(rows, Mapping) or not rows:
        raise ValueError(f"{place} holds no models: it is a mapping of names to rows, as {BUILT_IN} is.")
    found = {}
    for name, row in rows.items():
        try:
            found[str(name)] = Model.model_validate(row)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the row"
            raise ValueError(f"{place}, model {name}: {where}: {first['msg']}, got {first['input']!r}.") from None
    return found


def plan(models: Mapping[str, Model], dtypes: Sequence[str] = DTYPES) -> list[Part]:
    """All parts: the machine's rates, then each model in its first dtype, each in its second, and so on; compiling comes last.

    So the numbers that are wanted most are there first, if the time is short.
    """
    used = [dtype for dtype in DTYPES if dtype in dtypes and any(dtype in row.dtypes for row in models.values())]
    parts = [Part("rate", dtype) for dtype in used]
    ranks = max((len(row.dtypes) for row in models.values()), default=0)
    for rank in range(ranks):
        for name, row in models.items():
            if rank < len(row.dtypes) and row.dtypes[rank] in dtypes:
                parts += _parts(name, row, row.dtypes[rank])
    for name, row in models.items():
        first = next((dtype for dtype in row.dtypes if dtype in dtypes), None)
        if first is not None:
            parts.append(Part("compiled", first, name, row.batches[0], row.steps, row))
    return parts


def _parts(name: str, row: Model, dtype: Dtype) -> list[Part]:
    """Of one model in one dtype, those with the same steps beside each other: they share a loaded prior."""
    parts = [Part("network", dtype, name, batch, row.steps, row) for batch in row.batches]
    parts += [Part("sampling", dtype, name, batch, row.steps, row) for batch in row.batches]
    parts += [Part("floor", dtype, name, row.batches[0], row.steps, row)]
    kinds: tuple[Measure, ...] = ("iteration", "update")
    parts += [Part(kind, dtype, name, size.batch, size.steps, row) for size in row.iterations for kind in kinds]
    return sorted(parts, key=lambda part: part.steps != row.steps)


def chosen(parts: Sequence[Part], names: Iterable[str]) -> list[Part]:
    """The parts of these names; a name may be the beginning of several: `sdxl-bfloat16`.

    Raises:
        ValueError: nothing has that name.
    """
    found = []
    for name in names:
        here = [part for part in parts if part.name == name or part.name.startswith(f"{name}-")]
        if not here:
            known = [part.name for part in parts]
            raise ValueError(f"There is no part {name!r}.{nearest(name, known)} --list shows all {len(known)} of them.")
        found += here
    return list(dict.fromkeys(found))
