"""The value network: shapes, its start at one number, gradients into every parameter, what it depends on, that it learns."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from diffusion_rtb.interfaces import Terms
from diffusion_rtb.objectives import _value
from diffusion_rtb.objectives._value import Block, ValueNetwork, time_embedding, values_along
from diffusion_rtb.objectives.trust_pcl import TrustPCL
from tests.oracles.terms import close, random_terms

IMAGES = [(4, 8, 8), (4, 4, 4), (1, 5, 9), (3, 4, 16), (4, 16, 16), (4, 2, 3)]
TOKENS, VIDEOS = [(16, 4), (33, 3), (1, 2)], [(4, 3, 2, 2), (2, 4, 8, 9)]
SHAPES = [*IMAGES, *TOKENS, *VIDEOS, (2,), (1,)]

each_network = pytest.mark.parametrize(
    ("dims", "blocks"), [*((dims, 0) for dims in SHAPES), *((dims, 2) for dims in SHAPES)]
)


def inputs(dims: tuple[int, ...], features: int = 6, rows: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(rows, *dims), torch.tensor([900.0, 500.0, 20.0][:rows]), torch.randn(rows, features)


def perturbed(network: ValueNetwork) -> ValueNetwork:
    """As after some training: no weight is zero."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network


@each_network
def test_starts_at_zero_then_at_the_given_number(dims: tuple[int, ...], blocks: int) -> None:
    network = ValueNetwork(dims, 6, width=8, blocks=blocks)
    values = network(*inputs(dims))
    assert values.shape == (3,)
    assert torch.count_nonzero(values) == 0
    assert not network.initialised
    network.start(torch.tensor(1.5))
    assert torch.equal(network(*inputs(dims)), torch.full((3,), 1.5))
    assert network.initialised


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 4), st.lists(st.integers(1, 20), min_size=2, max_size=3))
def test_any_size_of_latent(channels: int, sides: list[int]) -> None:
    """Whatever the size, what is left before the output layer is at most 4 along each side, and so the network stays small."""
    network = ValueNetwork((channels, *sides), 2, width=8)
    assert network(*inputs((channels, *sides), 2)).shape == (3,)
    assert network.output.in_features <= 8 * 4 ** len(sides)


def test_tokens_are_an_image_of_one_row() -> None:
    """Packed states (tokens, channels) go through the same layers as (channels, 1, tokens), with the middle row of each filter."""
    tokens, image = (
        perturbed(ValueNetwork((33, 3), 6, width=8, blocks=2)),
        ValueNetwork((3, 1, 33), 6, width=8, blocks=2),
    )
    wanted = image.state_dict()
    for name, value in tokens.state_dict().items():
        rows = wanted[name]
        if value.shape == rows.shape:
            rows.copy_(value)
        else:
            rows.zero_()[..., 1, :] = value
    x, t, features = inputs((33, 3))
    torch.testing.assert_close(tokens(x, t, features), image(x.mT[:, :, None], t, features))


@each_network
def test_gradients_reach_every_parameter(dims: tuple[int, ...], blocks: int) -> None:
    network = perturbed(ValueNetwork(dims, 6, width=8, blocks=blocks))
    network(*inputs(dims)).sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@each_network
def test_depends_on_state_time_and_prompt_row_by_row(dims: tuple[int, ...], blocks: int) -> None:
    network = perturbed(ValueNetwork(dims, 6, width=8, blocks=blocks))
    x, t, features = inputs(dims)
    before = network(x, t, features)
    first = torch.tensor([True, False, False])
    for changed in (
        network(torch.where(first.reshape(3, *[1] * len(dims)), -x, x), t, features),
        network(x, torch.where(first, 100.0, t), features),
        network(x, t, torch.where(first[:, None], -features, features)),
    ):
        assert changed[0] != before[0]
        # Rows do not mix; other batch-mates may change the order of float32 sums inside a matrix product.
        torch.testing.assert_close(changed[1:], before[1:])


def test_the_length_of_a_prompt_vector_does_not_matter() -> None:
    network = perturbed(ValueNetwork((2,), 6, width=8))
    x, t, features = inputs((2,))
    # Scaling by a power of two is exact; only the small constant in the root mean square differs: 1e-7 of 1e-2.
    torch.testing.assert_close(network(x, t, 1024 * features), network(x, t, features), rtol=1e-4, atol=1e-4)
    unconditional = perturbed(ValueNetwork((2,), 0, width=8))
    assert unconditional(x, t, torch.zeros(3, 0)).shape == (3,)


def test_same_seed_same_network() -> None:
    networks = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        networks.append(ValueNetwork((4, 8, 8), 6).state_dict())
    assert all(torch.equal(networks[0][k], networks[1][k]) for k in networks[0])
    assert any(not torch.equal(networks[0][k], networks[2][k]) for k in networks[0])


def test_half_precision_states_are_computed_in_the_weights_own() -> None:
    x, t, features = inputs((4, 8, 8))
    network = perturbed(ValueNetwork((4, 8, 8), 6, width=8))
    half = network(x.bfloat16(), t, features)
    assert half.dtype == torch.float32
    assert torch.equal(half, network(x.bfloat16().float(), t, features))


def test_a_block_adds_to_what_it_gets() -> None:
    """h + layer(silu(norm(h)·(1 + scale) + shift)), by the functions of torch; and only the blocks are added to the network."""
    plain, deep = ValueNetwork((4, 8, 8), 6, width=8), perturbed(ValueNetwork((4, 8, 8), 6, width=8, blocks=1))
    block = deep.layers[-1]
    assert isinstance(block, Block)
    h, scale, shift = torch.randn(3, 8, 4, 4), torch.randn(3, 8, 1, 1), torch.randn(3, 8, 1, 1)
    inside = functional.silu(functional.group_norm(h, 8, block.norm.weight, block.norm.bias) * (1 + scale) + shift)
    torch.testing.assert_close(
        block(h, scale, shift), h + functional.conv2d(inside, block.layer.weight, block.layer.bias, padding=1)
    )
    own = {name for name in deep.state_dict() if not name.startswith(("layers.2.", "films.2."))}
    assert own == set(plain.state_dict())


def test_time_embedding_is_cos_and_sin() -> None:
    embedding = time_embedding(torch.tensor([0.0, 250.0], dtype=torch.float64), 4)
    expected = [[1, 1, 0, 0], [math.cos(250), math.cos(2.5), math.sin(250), math.sin(2.5)]]
    # exp(log) of the frequency 1/100 is good to 1e-16, times an angle of 2.5.
    torch.testing.assert_close(embedding, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-13)


@pytest.mark.parametrize("dims", [(), (0,), (4, 0, 8), (16, 0), (1, 2, 4, 8, 8)])
def test_shapes_without_a_network_are_refused(dims: tuple[int, ...]) -> None:
    with pytest.raises(
        ValueError, match=r"No value network for states of shape .* takes vectors .*, .tokens, channels."
    ):
        ValueNetwork(dims, 6)


def steps_of_noise(dims: tuple[int, ...], batch: int, steps: int = 4) -> Terms:
    """Posterior = prior, x a random walk, and a reward that the first state gives away: V(x_t) has to find it there."""
    x = torch.randn(batch, 1, *dims) + 0.1 * torch.randn(batch, steps + 1, *dims).cumsum(dim=1)
    log_p = torch.randn(batch, steps)
    reward = 3 + x[:, -1].flatten(1).mean(dim=1) * math.sqrt(math.prod(dims))
    timesteps = torch.linspace(1000, 1000 / steps, steps)
    prompt = torch.zeros(batch, dtype=torch.long)
    return Terms(log_p.clone().requires_grad_(), log_p, reward, prompt, x, timesteps, torch.ones(batch, 2))


def test_first_batch_sets_v_to_the_mean_estimate_of_alpha_log_z() -> None:
    """At the start V is alpha·mean log w everywhere: all stretches are in balance but the last, which sees r - V."""
    terms = steps_of_noise((2,), 16)
    objective = TrustPCL(1)
    objective.prepare(1, (2,), 2)
    answer = objective(terms, 2.0)
    spread = terms.reward - terms.reward.mean()
    torch.testing.assert_close(answer.log_z, 2.0 * terms.reward.mean().expand(16))
    torch.testing.assert_close(answer.residual, -2.0 * spread)
    torch.testing.assert_close(answer.loss.detach(), 0.5 * (spread**2).mean() / 4)


def test_every_boundary_sees_its_own_state_time_and_prompt() -> None:
    """The batched call against one call per trajectory and boundary."""
    terms = replace(steps_of_noise((2,), 3, steps=6), features=torch.randn(3, 5))
    objective = TrustPCL(2)
    objective.prepare(1, (2,), 5)
    assert isinstance(objective.value, ValueNetwork)
    objective.value.start(torch.tensor(0.5))
    network = perturbed(objective.value)
    values = objective.boundary_values(terms, 2.0)
    for row in range(3):
        singly = [
            network(terms.x[row, i][None], terms.timesteps[i : i + 1], terms.features[row][None]) for i in (0, 2, 4)
        ]
        torch.testing.assert_close(values[row], torch.cat([*singly, terms.reward[row][None]]))


@pytest.mark.parametrize(("dims", "length"), [((2,), 2), ((4, 4, 4), 4), ((16, 4), 4)])
def test_learns_a_value_that_depends_on_the_state(dims: tuple[int, ...], length: int) -> None:
    """The loss falls by ten: a scalar log Z would leave all of it, a perfect V the 1-4 % that the random walk adds."""
    objective = TrustPCL(length, width=16)
    objective.prepare(1, dims, 2)
    objective(steps_of_noise(dims, 256), 2.0)  # the output bias: the mean needs no training
    optimizer = torch.optim.Adam(objective.parameters(), lr=3e-3)
    before = objective(steps_of_noise(dims, 256), 2.0).loss.item()
    for _ in range(200):
        optimizer.zero_grad()
        objective(steps_of_noise(dims, 64), 2.0).loss.backward()
        optimizer.step()
    assert objective(steps_of_noise(dims, 256), 2.0).loss.item() < before / 10


def test_states_in_pieces_have_the_same_values_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """However little of the states is on the network's device at once; and the piece's activations are computed again."""
    network = perturbed(ValueNetwork((2, 4, 4), 3, width=8)).double()
    network.start(torch.tensor(0.5))
    terms = random_terms(0)
    terms = replace(terms, x=torch.randn(6, 5, 2, 4, 4, dtype=torch.float64))

    def values_and_gradients(numbers: int) -> tuple[Tensor, list[Tensor], list[int]]:
        sizes: list[int] = []
        monkeypatch.setattr(_value, "NUMBERS", numbers)
        hook = network.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
        values = values_along(network, terms, torch.zeros(()), 1.0)
        found = torch.autograd.grad(values.square().sum(), list(network.parameters()))
        hook.remove()
        return values.detach(), list(found), sizes

    values, gradients, sizes = values_and_gradients(2**22)
    pieced, same, small = values_and_gradients(5 * 32)
    assert sizes == [24]
    assert small == [5, 5, 5, 5, 4, 4, 5, 5, 5, 5]
    close(pieced, values)
    for one, other in zip(same, gradients, strict=True):
        close(one, other)
