"""Have a pipeline do what it does to a state around its denoising loop: shape it, decode it.

Both run the pipeline's own `__call__`, so no family repeats unpacking, scaling, shifting or the order of a video's axes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diffusion_rtb.chain.scheduler import in_place_of, previous_sample, unchanged, with_previous_sample
from diffusion_rtb.chain.seeds import global_seed

__all__ = ["decoded", "state_shape"]


class _Seen(Exception):  # noqa: N818 - no error: it ends a call that has said enough
    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape


def state_shape(pipe: Any, call: Mapping[str, Any]) -> tuple[int, ...]:
    """Shape of one state as the pipeline hands it to its scheduler, without the batch; one network evaluation.

    Args:
        pipe: The pipeline.
        call: Arguments of its call for one sample.
    """

    def stop(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        raise _Seen(tuple(sample.shape[1:]))

    with _stepping(pipe.scheduler, stop), torch.no_grad(), global_seed(0):
        try:
            pipe(**call, generator=torch.Generator().manual_seed(0))
        except _Seen as seen:
            return seen.shape
    raise ValueError(
        f"{type(pipe).__name__} made no step: its call ended before its scheduler was asked. Set steps to at least 1."
    )


def decoded(
    pipe: Any,
    call: Mapping[str, Any],
    x_0: Float[Tensor, "batch *dims"],
    networks: Sequence[nn.Module],
    output_type: str,
) -> Float[Tensor, "batch *shape"]:
    """What the pipeline itself answers where its chain ends in x_0; float32. One network evaluation.

    Every step answers x_0, and the networks of the loop are evaluated once each: what they answer does not matter then. Where
    gradients are on, the answer is differentiable in x_0; the no_grad that decorates the pipeline's call is taken off.

    It may be asked for in the middle of the pipeline's own loop, where a chain is steered by what is seen. The steps are those of
    the scheduler's class, so that who records the loop sees none of them; pipeline and scheduler are afterwards what they were.

    Args:
        pipe: The pipeline.
        call: Arguments of its call for as many samples.
        x_0: Where the chain ends.
        networks: Those that the loop evaluates.
        output_type: "pt", or "np" for pipelines that know no tensors.
    """

    def answer(made: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        output = made(*args, **kwargs)
        return with_previous_sample(output, x_0.to(previous_sample(output)))

    step, run = type(pipe.scheduler).step.__get__(pipe.scheduler), inspect.unwrap(type(pipe).__call__)
    with ExitStack() as stack:
        stack.enter_context(unchanged(pipe))
        stack.enter_context(global_seed(0))
        stack.enter_context(_stepping(pipe.scheduler, lambda *args, **kwargs: answer(step, *args, **kwargs)))
        for network in networks:
            stack.enter_context(_evaluated_once(network))
        rows = [torch.Generator().manual_seed(0) for _ in x_0]
        found = run(pipe, **(dict(call) | {"generator": rows, "output_type": output_type, "return_dict": False}))[0]
    images = found if isinstance(found, Tensor) else torch.as_tensor(found).movedim(-1, -3)
    return images.float()


@contextmanager
def _stepping(scheduler: Any, step: Callable[..., Any]) -> Iterator[None]:
    """Replace `step` of one scheduler instance; all its attributes are put back."""
    with unchanged(scheduler):
        scheduler.step = in_place_of(scheduler.step, step)
        yield


@contextmanager
def _evaluated_once(network: nn.Module) -> Iterator[None]:
    """Inside the block the network answers every call with what it answered to the first."""
    own, forward = vars(network).get("forward"), network.forward
    answers: list[Any] = []

    def first(*args: Any, **kwargs: Any) -> Any:
        if not answers:
            with torch.no_grad():
                answers.append(forward(*args, **kwargs))
        return answers[0]

    network.forward = first
    try:
        yield
    finally:
        del network.forward
        if own is not None:
            network.forward = own
