"""Metadata of prompts over the wire: every row arrives with its image, and nothing unbounded is parsed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save
from torch import Tensor

from diffusion_rtb.remote_reward.app import Served, create_app
from diffusion_rtb.remote_reward.codec import decode, encode
from diffusion_rtb.remote_reward.messages import ENCODINGS, JSON_TYPE, Encoding, Limits, WireError
from diffusion_rtb.remote_reward.serve import numpy_score, torch_score
from diffusion_rtb.scoring.call import evaluate_reward
from diffusion_rtb.scoring.metadata import takes_metadata
from diffusion_rtb.scoring.prompts import check_reward_prompts
from rewards.remote import Remote
from rewards.weighted_sum import WeightedSum
from tests.config.test_prompt_metadata import Rows, by_row
from tests.config.test_prompts import JSON, KEYS
from tests.oracles.serving import ask, await_health, free_port, in_thread, start_process

IMAGES = torch.rand(7, 3, 4, 4, generator=torch.Generator().manual_seed(0))
PROMPTS = list("abcdefg")
ROWS = [{"value": float(i) / 3, "include": [{"class": "Bär", "count": i}]} for i in range(7)]
VALUES = torch.tensor([row["value"] for row in ROWS])


def app(reward: Any = by_row, check: Any = None, **more: Any) -> Any:
    served = Served("mine", "mine-0", metadata=takes_metadata(reward), **more)
    return create_app(torch_score(reward, "mine", "cpu"), served, check)


@given(
    rows=st.lists(st.dictionaries(KEYS, JSON, max_size=3), min_size=2, max_size=2), encoding=st.sampled_from(ENCODINGS)
)
def test_rows_arrive_as_they_were(rows: list[dict[str, Any]], encoding: Encoding) -> None:
    images = np.zeros((2, 3, 1, 1), np.float32)
    batch = decode(*encode(images, ["a", "b"], encoding, rows), Limits())
    assert batch.metadata == tuple(rows)
    assert decode(*encode(images, ["a", "b"], encoding), Limits()).metadata is None


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("limits", [{"max_batch": 3}, {"max_body_bytes": 1200}, {}])
def test_each_image_keeps_its_row_however_the_batch_is_cut(encoding: Encoding, limits: dict[str, int]) -> None:
    with in_thread(app(limits=Limits(**limits))) as one, in_thread(app(limits=Limits(**limits))) as other:
        reward = Remote([one, other], encoding=encoding)
        assert takes_metadata(reward)
        assert torch.equal(evaluate_reward(reward, IMAGES, PROMPTS, "remote", metadata=ROWS), VALUES)


def test_a_numpy_reward_gets_them_too() -> None:
    def values(images: Any, prompts: Sequence[str], metadata: Rows) -> Any:
        return np.array([row["value"] for row in metadata], np.float32)

    served = create_app(numpy_score(values), Served("mine", "mine-0", metadata=True))
    with in_thread(served) as url:
        assert torch.equal(evaluate_reward(Remote(url), IMAGES, PROMPTS, "remote", metadata=ROWS), VALUES)


def test_without_metadata_the_reward_gets_empty_rows() -> None:
    def counted(images: Tensor, prompts: Sequence[str], metadata: Rows) -> Tensor:
        return torch.tensor([float(len(row)) for row in metadata])

    with in_thread(app(counted)) as url:
        assert torch.equal(evaluate_reward(Remote(url), IMAGES, PROMPTS, "remote"), torch.zeros(7))


def test_a_reward_without_is_sent_none() -> None:
    def brightness(images: Tensor, prompts: Sequence[str]) -> Tensor:
        return images.mean((1, 2, 3))

    with in_thread(app(brightness, limits=Limits(max_body_bytes=2000))) as url:
        reward = Remote(url)
        assert not takes_metadata(reward)
        large = [{"value": "x" * 10_000}] * 7
        torch.testing.assert_close(reward(IMAGES, PROMPTS, large), IMAGES.mean((1, 2, 3)))


def test_who_sends_none_is_told_what_is_missing() -> None:
    body, media_type = encode(IMAGES.numpy(), PROMPTS, "json_png")
    with in_thread(app()) as url:
        status, said, _ = ask("POST", url, "/score", body, {"Content-Type": media_type})
    assert status == 422
    assert "'mine' takes metadata: send, as `metadata`, the JSON of one object per image" in said["message"]


BAD: list[tuple[Any, int, str]] = [
    (["{}"], 422, "2 prompts and 1 rows of metadata"),
    (["{}", 3], 422, r"metadata\.1"),
    (["{}", "[]"], 422, r"metadata\.1: '\[\]' is no object"),
    (["{}", "{"], 422, r"metadata\.1 is not a line of JSON"),
    (['{"x": NaN}', "{}"], 422, "NaN is not a JSON number"),
    (['{"x": 1e999}', "{}"], 422, "1e999 is not a JSON number"),
    (['{"x": ' + "[" * 30_000 + "]" * 30_000 + "}", "{}"], 422, "recursion"),
    (["{}", '{"x": "' + "y" * 2**16 + '"}'], 413, "has 65545 bytes, above 65536: leave out"),
]


@pytest.mark.parametrize("metadata, status, expected", BAD)
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_foreign_metadata_are_refused(metadata: Any, status: int, expected: str, encoding: Encoding) -> None:
    images = np.zeros((2, 3, 1, 1), np.float32)
    body, media_type = encode(images, ["a", "b"], encoding)
    if media_type == JSON_TYPE:
        body = json.dumps(json.loads(body) | {"metadata": metadata}).encode()
    else:
        request = json.dumps({"schema_version": 2, "prompts": ["a", "b"], "metadata": metadata}).encode()
        body = save({"images": images, "request": np.frombuffer(request, np.uint8)})
    with pytest.raises(WireError, match=expected) as error:
        decode(body, media_type, Limits())
    assert error.value.status == status


def picky(prompts: Sequence[str], metadata: Rows) -> None:
    unfit = [prompt for prompt, row in zip(prompts, metadata, strict=True) if row.get("value") != float(len(prompt))]
    if unfit:
        raise ValueError(f"{len(unfit)} are unfit, the first is {unfit[0]!r}")


def test_all_prompts_are_shown_to_the_servers_reward() -> None:
    prompts = ["x" * (i % 50) + str(i) for i in range(2500)]
    rows = [{"value": float(len(prompt))} for prompt in prompts]
    with in_thread(app(check=picky)) as url:
        reward = WeightedSum([{"component": "remote", "servers": url}])
        check_reward_prompts(reward, prompts, rows)
        rows[2222] = {}
        with pytest.raises(ValueError, match=f"'remote' does not take the 2500 prompts: {url}: 1 are unfit, .*2222'"):
            check_reward_prompts(reward, prompts, rows)


def test_a_server_as_it_is_started_knows_what_its_reward_wants() -> None:
    port = free_port()
    process = start_process({"component": "tests.config.test_prompt_metadata:Picky", "wanted": "value"}, port)
    try:
        await_health(port)
        reward = Remote(f"http://127.0.0.1:{port}")
        assert torch.equal(evaluate_reward(reward, IMAGES, PROMPTS, "remote", metadata=ROWS), torch.full((7,), 2.0))
        reward.check_prompts(PROMPTS, ROWS)
        with pytest.raises(ValueError, match="does not take the 7 prompts: 7 have no 'value'"):
            reward.check_prompts(PROMPTS, [{}] * 7)
    finally:
        process.kill()
        process.wait()
