"""The host waits at most once per step for the device, however large the batch: in a rollout, a score and a gradient pass."""

from __future__ import annotations

import pytest

from tests.measurements.waits import FEW, NAMES, counts, pipeline, rows


@pytest.mark.parametrize("name", NAMES)
def test_one_wait_per_step_and_none_of_the_batch(name: str) -> None:
    pipe = pipeline(name)
    bare, *ours = rows(pipe, name, 2).values()
    for row in ours:
        assert row.per_step("waits") <= 1, row.many.waits
        assert row.besides("waits") <= 7, row.many.waits
    if name in ("DDIM", "DDPM"):  # the others' own steps wait for nothing
        assert bare.per_step("waits") >= 6
    rollout, score, gradient = ours
    assert rollout.per_step("sends") <= bare.per_step("sends")  # noise of generators on the CPU
    assert score.per_step("sends") == gradient.per_step("sends") == 0
    for row, larger in zip((bare, *ours), counts(pipe, name, 3, FEW), strict=True):
        assert larger.waits.total() == row.few.waits.total()
