"""The reward server keeps what its OpenAPI description promises: schemathesis makes requests from it, good and bad."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from diffusion_rtb.remote_reward.app import Served, create_app
from diffusion_rtb.remote_reward.messages import JSON_TYPE, NPZ_TYPE, Limits
from diffusion_rtb.remote_reward.serve import numpy_score
from tests.oracles.serving import ask, in_thread

schemathesis: Any = pytest.importorskip("schemathesis", reason="pip install 'diffusion-rtb[test]'")
checks: Any = pytest.importorskip("schemathesis.specs.openapi.checks")

TOKEN = "correct-horse-battery"
HEADERS = {"Authorization": f"Bearer {TOKEN}"}

brightness = numpy_score(lambda images, prompts: images.mean((1, 2, 3)), "brightness")
app = create_app(brightness, Served("brightness", "brightness-0", Limits(8, 100_000, 20_000), token=TOKEN))
schema = schemathesis.openapi.from_asgi("/openapi.json", app)

HEADER = np.frombuffer(b'{"schema_version": 1, "prompts": ["a", "b"]}', np.uint8)
FLOATS = arrays.arrays(np.float32, (2, 3, 2, 4), elements=st.floats(0, 1, width=32))
BYTES = arrays.arrays(np.uint8, (2, 3, 4, 2))


def archive(images: np.ndarray[Any, Any]) -> bytes:
    with io.BytesIO() as file:
        np.savez(file, header=HEADER, images=images)
        return file.getvalue()


schemathesis.openapi.media_type(NPZ_TYPE, (FLOATS | BYTES).map(archive))


def excluded(case: Any) -> list[Any]:
    """That there are as many prompts as images, and that text is base64 of a PNG, is more than a JSON schema can say."""
    return [checks.positive_data_acceptance] if case.media_type == JSON_TYPE else []


@schema.parametrize()  # type: ignore[untyped-decorator]
@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
def test_every_answer_is_a_described_one(case: Any) -> None:
    case.call_and_validate(headers=HEADERS, excluded_checks=excluded(case))


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with in_thread(app) as address:
        yield address


def test_its_examples_are_answered(url: str) -> None:
    status, description, _ = ask("GET", url, "/openapi.json")
    assert status == 200
    examples = description["paths"]["/score"]["post"]["requestBody"]["content"][JSON_TYPE]["examples"]
    assert set(examples) == {"json_png", "json_uint8"}
    for example in examples.values():
        body = json.dumps(example["value"])
        status, answer, _ = ask("POST", url, "/score", body, HEADERS | {"Content-Type": JSON_TYPE})
        assert (status, answer["rewards"]) == (200, [0.0])


def test_refusals_are_described(url: str) -> None:
    description = ask("GET", url, "/openapi.json")[1]
    described = {path: set(next(iter(item.values()))["responses"]) for path, item in description["paths"].items()}
    assert described == {
        "/health": {"200"},
        "/info": {"200", "401"},
        "/prompts": {"200", "400", "401", "408", "413", "422", "500", "503"},
        "/score": {"200", "400", "401", "408", "413", "415", "422", "500", "503"},
    }
    for path, method in (("/info", "get"), ("/score", "post")):
        assert description["paths"][path][method]["security"] == [{"token": []}]
