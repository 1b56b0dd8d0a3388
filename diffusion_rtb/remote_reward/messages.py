"""What travels between a `remote` reward and a reward server, version 2; torch is not needed on either side.

    GET  /health   -> Health    the process is up; no token
    GET  /info     -> Info      which reward, and what a request may hold
    POST /score    -> Answer    images and prompts in, one finite number per image out
    POST /prompts  -> Checked   all prompts of a run, before it trains: does the reward take them?
    anything else that goes wrong -> Failure, with a status that says whose fault it is

A request is one of

    application/json           `PngRequest`: one base64 PNG (8-bit RGB) per image
    application/x-safetensors  two tensors: `images`, F32 (batch, 3, height, width) in [0, 1], and `request`, U8: the UTF-8 bytes
                               of `PromptsRequest` as JSON

A reward that takes metadata (`Info.metadata`) gets them as `metadata`: for each image the JSON of one object, as text, so that
each is measured before it is parsed.

Nothing is ever unpickled. PNGs are rounded to the nearest multiple of 1/255: they differ from the float images by up to 1/510 per
value. float32 images arrive exactly as they were.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

__all__ = [
    "ENCODINGS",
    "JSON_TYPE",
    "MOST_METADATA",
    "SAFETENSORS_TYPE",
    "SCHEMA_VERSION",
    "Answer",
    "Checked",
    "Encoding",
    "Failure",
    "Health",
    "Info",
    "Limits",
    "PngRequest",
    "PromptsRequest",
    "WireError",
    "parsed",
]

SCHEMA_VERSION = 2
MOST_METADATA = 2**16
"""Bytes of the JSON of the metadata of one prompt."""

JSON_TYPE, SAFETENSORS_TYPE = "application/json", "application/x-safetensors"

Encoding = Literal["safetensors", "json_png"]
ENCODINGS: tuple[Encoding, ...] = get_args(Encoding)


class WireError(ValueError):
    """A message that is refused; `status` and `code` are what a server answers with."""

    def __init__(self, message: str, *, status: int = 400, code: str = "malformed") -> None:
        super().__init__(message)
        self.status, self.code = status, code


@dataclass(frozen=True)
class Limits:
    """What one request may hold at most, so that no request decides how much memory a server needs."""

    max_batch: int = 64
    """Images."""
    max_body_bytes: int = 64 * 2**20
    """Bytes of the body."""
    max_pixels: int = 2**24
    """Height times width, summed over the images: 64 of 512 x 512, 16 of 1024 x 1024; 0.2 GB as float32."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}: it must be a whole number, at least 1.")


def _spoken(version: int) -> int:
    if version != SCHEMA_VERSION:
        raise ValueError(
            f"this side speaks schema version {SCHEMA_VERSION}, the other {version}; use matching versions of diffusion-rtb"
        )
    return version


Version = Annotated[int, AfterValidator(_spoken)]
Prompts = Annotated[list[str], Field(min_length=1)]


class PromptsRequest(BaseModel):
    """Prompts with their metadata: part of the prompts of a run, or what a request says besides its images."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    schema_version: Version
    prompts: Prompts
    """One per image."""
    metadata: list[str] | None = None
    """The JSON of one object per image: what is known of its prompt; for rewards that take metadata."""


class PngRequest(PromptsRequest):
    """Images as PNG files."""

    images: Annotated[list[str], Field(min_length=1)]
    """base64 of one 8-bit RGB PNG each, all of one size."""


Size = Annotated[int, Field(ge=1)]


class _Reply(BaseModel):
    """Unknown fields are let pass: a newer server may say more."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    schema_version: Version = SCHEMA_VERSION


class Health(_Reply):
    """The server is up."""

    status: Literal["ok"] = "ok"


class Info(_Reply):
    """Which reward is served and what a request may hold."""

    version: str
    """Of diffusion-rtb."""
    reward: str
    """Its name."""
    reward_id: str
    """Changes with the reward's name or arguments."""
    encodings: list[str]
    """Of images, as the client names them."""
    max_batch: Size
    """Images per request."""
    max_body_bytes: Size
    """Bytes per request."""
    max_pixels: Size
    """Height times width, summed over the images of a request."""
    metadata: bool
    """Whether the reward takes metadata."""


class Answer(_Reply):
    """The rewards of one request."""

    reward_id: str
    """As in `Info`."""
    rewards: list[FiniteFloat]
    """One per image, in the order of the request."""


class Checked(_Reply):
    """What the reward says to the prompts of a run."""

    refusal: str | None = None
    """Why it does not take them; null: it does."""


class Failure(_Reply):
    """Why there is no answer."""

    code: str
    """For programs."""
    message: str
    """For people."""


Model = TypeVar("Model")


def parsed(validate: Callable[[bytes], Model], content: bytes, what: str) -> Model:
    """JSON text as a model, e.g. by `Answer.model_validate_json`; `what` is what errors call it.

    Raises:
        WireError: it is not JSON (400) or not what the model describes (422).
    """
    try:
        return validate(content)
    except ValidationError as error:
        details = error.errors(include_url=False, include_context=False)
    syntax = details[0]["type"] == "json_invalid"
    reasons = "; ".join(_reason(detail) for detail in details[:3])
    status, code = (400, "malformed") if syntax else (422, "schema")
    raise WireError(f"{what}: {reasons}.", status=status, code=code)


def _reason(detail: Any) -> str:
    place = ".".join(str(part) for part in detail["loc"])
    message = detail["msg"].removeprefix("Value error, ").rstrip(".")
    received = detail["input"]
    shown = f", got {received!r}" if isinstance(received, int | float | bool) else ""
    return f"{place}: {message}{shown}" if place else message
