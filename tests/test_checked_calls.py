"""The tests execute the annotations of the packages: a wrong shape or type is an error at the call that has it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from beartype.roar import BeartypeCallHintParamViolation, BeartypeCallHintReturnViolation
from jaxtyping import Float
from torch import Tensor

from diffusion_rtb.chain.normal import normal_log_prob
from diffusion_rtb.chain.seeds import seed_of
from diffusion_rtb.chain.trajectory import Trajectory
from tests.checked_calls import decorated_by

X = torch.zeros(2, 3)
WRONG: dict[str, Any] = {
    "dimensions of two arguments": lambda: normal_log_prob(X, X[:, :2], 1.0),
    "type beside shapes": lambda: normal_log_prob(X, X, "1"),  # type: ignore[arg-type]
    "dtype": lambda: normal_log_prob(X, X.long(), 1.0),
    "type without shapes": lambda: seed_of("9", 1),  # type: ignore[arg-type]
    "field of a dataclass": lambda: Trajectory(X, X, X, X),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_argument_is_an_error(name: str) -> None:
    with pytest.raises(BeartypeCallHintParamViolation):
        WRONG[name]()


def test_what_is_right_is_let_through() -> None:
    assert normal_log_prob(X, X, 1.0).shape == (2,)
    assert normal_log_prob(X[:1], X[:1], 1.0).shape == (1,), "the sizes of one call are not those of the next"


def test_an_answer_of_another_shape_is_an_error() -> None:
    def first(x: Float[Tensor, "batch dims"]) -> Float[Tensor, " batch"]:
        return x[0]

    with pytest.raises(BeartypeCallHintReturnViolation):
        decorated_by()(first)(X)
    assert decorated_by()(first)(X[:, :2]).shape == (2,)


@pytest.mark.usefixtures("shapes_unchecked")
def test_where_shapes_are_unchecked_nothing_is() -> None:
    seed_of("9", 1)  # type: ignore[arg-type]
    Trajectory(X, X, X, X)
