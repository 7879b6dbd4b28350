"""Optimisers with 8-bit state: codes without bias, steps near to those of float state."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedcunet.config import RunConfig, TrainingConfig
from fedcunet.data import load
from fedcunet.errors import UserError
from fedcunet.models import DUNet, IterativeRefinement
from fedcunet.quant import QuantSpec, quantise_network, seed_rounding
from fedcunet.quant.layers import Rounding, quantised_weights
from fedcunet.quant.storage import Stored, store
from fedcunet.training.central import LAST, train_network
from fedcunet.training.checkpoint import load_checkpoint, tensors_sha256
from fedcunet.training.compact import SIGNED, UNSIGNED, CompactOptimizer, LogarithmicCodes
from fedcunet.training.local import OPTIMIZERS, make_optimizer
from fedcunet.training.network import build_network, get_vector, set_vector
from fedcunet.training.packed import pack_network, unpack_network


@given(count=st.integers(1, 700), exponent=st.integers(-60, 20), seed=st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
@pytest.mark.parametrize("codes", [SIGNED, UNSIGNED], ids=["signed", "unsigned"])
def test_codes_are_off_by_at_most_one_size(
    codes: LogarithmicCodes, count: int, exponent: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(count, generator=generator) * 2.0**exponent
    values[::3] = 0
    values = values if codes.signed else values.abs()
    coded, scales = codes.encode(values, Rounding())
    assert coded.element_size() == 1
    assert coded.numel() == count
    assert scales.numel() == -(-count // 256)
    found = codes.decode(coded, scales)
    factor = 2 ** (1 / codes.steps)
    smallest = values.abs().max() * 2 ** (-(codes.levels - 1) / codes.steps)
    error = (found - values).abs()
    assert bool((error <= values.abs() * (factor - 1) * 1.001 + smallest).all())
    assert bool((found[values == 0] == 0).all())
    assert codes.signed or bool((found[values > 0] > 0).all())


@pytest.mark.parametrize("codes", [SIGNED, UNSIGNED], ids=["signed", "unsigned"])
def test_codes_are_right_in_the_mean(codes: LogarithmicCodes) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.exp(torch.randn(256, generator=generator))
    rounding = Rounding()
    total = torch.zeros(256)
    for _ in range(2000):
        total += codes.decode(*codes.encode(values, rounding))
    # A size is up to 12 % away; the mean of 2000 roundings by an eightieth of that.
    assert ((total / 2000 - values).abs() / values).max() < 0.01


class Plain(nn.Module):
    """A parameter that a `CompactOptimizer` takes for a network's."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(count))
        self.rounding = Rounding()
        self.update = None


def group(model: Plain, lr: float) -> list[dict[str, Any]]:
    return [{"params": [model.weight], "lr": lr}]


def losses(optimizer: torch.optim.Optimizer, model: Plain, steps: int) -> list[float]:
    """Of a badly scaled regression with noise; curvatures span six powers of ten."""
    generator = torch.Generator().manual_seed(1)
    curvature = 10.0 ** torch.linspace(-3, 3, len(model.weight))
    found = []
    for _ in range(steps):
        noise = torch.randn(len(model.weight), generator=generator)
        gradient = curvature * (model.weight.detach() - 1 + 0.3 * noise)
        model.weight.grad = gradient
        optimizer.step()
        found.append(float((model.weight.detach() - 1).square().mean()))
    return found


@pytest.mark.parametrize(("name", "lr"), [("rmsprop", 1e-2), ("adam", 1e-2), ("sgd", 1e-4)])
@pytest.mark.parametrize("count", [100, 5000])
def test_state_in_codes_follows_state_in_float32(name: str, lr: float, count: int) -> None:
    coded, plain = Plain(count), Plain(count)
    found = losses(CompactOptimizer(coded, group(coded, lr), name), coded, 200)
    expected = losses(OPTIMIZERS[name](group(plain, lr)), plain, 200)
    if count == 100:
        # Too few values for codes.
        torch.testing.assert_close(coded.weight, plain.weight, rtol=1e-4, atol=1e-6)
    else:
        assert not coded.weight.equal(plain.weight)
        for mine, theirs in zip(found, expected, strict=True):
            assert abs(mine - theirs) < 0.03 * theirs + 1e-3


@pytest.mark.parametrize("name", ["rmsprop", "adam"])
def test_a_gradient_whose_square_overflows_leaves_weights_finite(name: str) -> None:
    model = Plain(5000)
    optimizer = CompactOptimizer(model, group(model, 1e-3), name)
    for size in (1e25, 1.0):
        optimizer.apply(model.weight, torch.full_like(model.weight, size))
        assert model.weight.isfinite().all()


def test_state_takes_a_byte_a_value() -> None:
    model = Plain(2**16)
    optimizer = CompactOptimizer(model, group(model, 1e-3), "rmsprop")
    losses(optimizer, model, 1)
    state = optimizer.state[model.weight]
    assert sum(value.nbytes for value in state.values()) == 2**16 * (1 + 4 / 256) + 4


def frugal(spec: QuantSpec, *, unets: int = 2, iterative: bool = False) -> Stored:
    torch.manual_seed(0)
    model: nn.Module = DUNet(unets, unets - 1, 3, width=16, growth=8)
    if iterative:
        model = IterativeRefinement(model)
    return store(quantise_network(model, spec).train(), frugal=True)


def step(model: Stored, optimizer: torch.optim.Optimizer) -> None:
    image = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    sum(heatmap.square().mean() for heatmap in model(image)).backward()
    optimizer.step()


@pytest.mark.parametrize("iterative", [False, True])
def test_steps_in_the_backward_pass_are_those_after_it(iterative: bool) -> None:
    models = [frugal(QuantSpec(weight_bits=1, alpha=True), iterative=iterative) for _ in range(2)]
    training = TrainingConfig(optimizer="sgd", latent_rate=3.0)
    step(models[0], make_optimizer(models[0], training, 0.1))
    assert all(parameter.grad is None for parameter in models[0].parameters())
    assert models[1].update is None
    latent = set(quantised_weights(models[1]))
    others = [one for one in models[1].parameters() if one not in latent]
    groups = [{"params": list(latent), "lr": 0.3}, {"params": others, "lr": 0.1}]
    step(models[1], torch.optim.SGD(groups))  # in the first step, momentum changes nothing
    for mine, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)


def test_frozen_parameters_stay_as_they_are() -> None:
    model = frugal(QuantSpec())
    frozen = {"stem.conv.weight", "unets.0.neck.grow.norm.bias"}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    before = copy.deepcopy(dict(model.named_parameters()))
    step(model, make_optimizer(model, TrainingConfig(optimizer="sgd"), 0.1))
    same = {name for name, after in model.named_parameters() if after.equal(before[name])}
    assert same == frozen


def test_gradients_of_parameters_are_never_all_there() -> None:
    model = frugal(QuantSpec())
    waiting: list[int] = []
    model.update = lambda parameter, gradient: waiting.append(len(tape.around.collector.gradients))
    tape = model.record(torch.rand(2, 3, 64, 64))
    tape.backward([torch.ones_like(heatmap) for heatmap in tape.heatmaps()])
    assert len(waiting) == len(list(model.parameters()))
    assert max(waiting) == 0


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = frugal(QuantSpec())
    make_optimizer(model, TrainingConfig(optimizer="rmsprop"), 1e-3)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(UserError, match="expected packed or float32"):
        model(torch.rand(2, 3, 64, 64))


def test_a_resumed_training_ends_as_one_that_was_not_interrupted(
    make_300w: Callable[..., Path], tmp_path: Path
) -> None:
    names = {"helen/trainset": ["1_1.jpg", "2_1.jpg"], "helen/testset": ["3_1.jpg"]}
    root = make_300w(names)
    config = RunConfig().replace(
        model__unets=1,
        model__order=0,
        quant__bits="6,1,6",
        quant__alpha=True,
        quant__input_quantizer="source",
        quant__storage="frugal",
        training__epochs=2,
    )
    sets = load("300w", root, "train"), load("300w", root, "test")
    whole = train_network(config, *sets, tmp_path / "whole")
    train_network(config.replace(training__epochs=1), *sets, tmp_path / "halves")
    resumed = train_network(config, *sets, tmp_path / "halves", resume=True)
    assert tensors_sha256(resumed) == tensors_sha256(whole)


def test_training_follows_that_of_packed_storage() -> None:
    spec = QuantSpec(
        input_bits=8, weight_bits=1, gradient_bits=8, alpha=True, input_quantizer="source"
    )
    ends = []
    for is_frugal in (True, False):
        model = copy.deepcopy(frugal(spec, unets=1))
        model.frugal = is_frugal
        seed_rounding(model, 5)
        optimizer = make_optimizer(model, TrainingConfig(optimizer="rmsprop"), 1e-3)
        ends.append(fitted(model, optimizer))
    assert ends[0][-1] < 0.5 * ends[0][0]
    assert ends[0][-1] < 1.3 * ends[1][-1]


def fitted(model: Stored, optimizer: torch.optim.Optimizer) -> list[float]:
    generator = torch.Generator().manual_seed(6)
    image = torch.rand(4, 3, 64, 64, generator=generator)
    target: Tensor = torch.rand(4, 3, 16, 16, generator=generator)
    found = []
    for _ in range(20):
        loss = sum((heatmap - target).square().mean() for heatmap in model(image))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    return found


def test_latent_weights_in_bfloat16_move_in_the_mean_by_what_float32_ones_move() -> None:
    # A step of bfloat16 at 0.5 is 2^-8: a thousand updates of 2^-16 that are all lost by rounding
    # to the nearest make four steps.
    model = Plain(4096)
    model.weight.data = torch.full((4096,), 0.5).bfloat16()
    optimizer = CompactOptimizer(model, group(model, 1.0), "sgd")
    for _ in range(100):
        optimizer.state.clear()  # no momentum
        optimizer.apply(model.weight, torch.full((4096,), -(2.0**-13)))
    moved = float(model.weight.detach().float().mean()) - 0.5
    assert model.weight.dtype == torch.bfloat16
    assert abs(moved / (100 * 2.0**-13) - 1) < 0.03


def test_latent_weights_in_bfloat16_are_trained_saved_and_loaded(
    make_300w: Callable[..., Path], tmp_path: Path
) -> None:
    names = {"helen/trainset": ["1_1.jpg", "2_1.jpg"], "helen/testset": ["3_1.jpg"]}
    root = make_300w(names)
    config = RunConfig().replace(
        model__unets=1,
        model__order=0,
        quant__bits="8,1,8",
        quant__alpha=True,
        quant__input_quantizer="source",
        quant__storage="frugal",
        quant__latent="bfloat16",
        training__epochs=1,
    )
    sets = load("300w", root, "train"), load("300w", root, "test")
    model = train_network(config, *sets, tmp_path)
    weight = model.unets[0].neck.grow.conv.weight
    assert weight.dtype == torch.bfloat16
    assert not weight.equal(build_network(config, 68).unets[0].neck.grow.conv.weight)
    loaded = load_checkpoint(tmp_path / LAST).model
    assert tensors_sha256(loaded) == tensors_sha256(model)
    assert loaded.unets[0].neck.grow.conv.weight.equal(weight)
    vector = get_vector(model)
    set_vector(loaded, vector)
    assert get_vector(loaded).tobytes() == vector.tobytes()
    unpacked = unpack_network(pack_network(model, config, sets[0].scheme).content).model.eval()
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        found, expected = unpacked(image)[-1], model.eval()(image)[-1]
    assert float((found - expected).norm() / expected.norm()) < 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant__storage": "packed", "quant__bits": "8,1,8"}, "goes with quant.storage frugal"),
        ({"quant__storage": "frugal"}, "goes with weights at 1 or 2 bits"),
    ],
)
def test_bfloat16_where_it_cannot_be_is_refused(change: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        RunConfig().replace(quant__latent="bfloat16", **change)
