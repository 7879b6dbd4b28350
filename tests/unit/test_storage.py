"""Packed sources: packing, exact gradients by recomputation, packed equal to unpacked."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from fedcunet.config import RunConfig
from fedcunet.data import load
from fedcunet.errors import UserError
from fedcunet.models import DUNet
from fedcunet.quant import QuantSpec, engine, quantise_network, seed_rounding
from fedcunet.quant.layers import clamp_latent_weights, quantised_weights
from fedcunet.quant.outputs import gather, pool_with_index, unpool
from fedcunet.quant.sources import (
    QuantiseSource,
    Source,
    pack_channels,
    packed_channels,
    source_codes,
    unpack_channels,
)
from fedcunet.quant.storage import StoredDUNet
from fedcunet.training.central import LAST, train_network
from fedcunet.training.checkpoint import load_checkpoint, tensors_sha256
from fedcunet.training.network import build_network

SOURCE_818 = QuantSpec(
    input_bits=8, weight_bits=1, gradient_bits=8, alpha=True, input_quantizer="source"
)
WHOLE = slice(None)


def network(
    spec: QuantSpec, *, unets: int = 2, order: int = 1, width: int = 8, growth: int = 4
) -> DUNet:
    """A small network in float64 whose BatchNorms have weights of both signs."""
    torch.manual_seed(1)
    model = DUNet(unets, order, 3, width=width, growth=growth).double().train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, -0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
    quantise_network(model, spec)
    return model


def batch(size: int, height: int = 64, width: int = 64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    image = torch.rand(size, 3, height, width, generator=generator, dtype=torch.float64)
    shape = (size, 3, height // 4, width // 4)
    return image, torch.rand(shape, generator=generator, dtype=torch.float64)


def gradients(model: nn.Module, image: Tensor, target: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    sum((heatmap - target).square().mean() for heatmap in model(image)).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def worst_difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest relative difference of a parameter's gradient."""
    assert found.keys() == expected.keys()
    return max(float((found[n] - expected[n]).norm() / expected[n].norm()) for n in expected)


@given(
    bits=st.sampled_from([2, 4, 6, 8]),
    shape=st.tuples(*[st.integers(1, high) for high in (3, 9, 5, 5)]),
    seed=st.integers(0, 100),
)
@settings(max_examples=60, deadline=None)
def test_packed_codes_come_back_in_the_bytes_that_are_counted(
    bits: int, shape: tuple[int, int, int, int], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, shape, generator=generator, dtype=torch.uint8)
    packed = pack_channels(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape[1] == packed_channels(shape[1], bits)
    assert unpack_channels(packed, bits, shape[1]).equal(codes)
    row = unpack_channels(packed[:, :, :1], bits, shape[1])
    assert row.equal(codes[:, :, :1])


@pytest.mark.parametrize(("bits", "share"), [(8, 1), (6, 0.75), (4, 0.5)])
def test_a_source_takes_its_bits(bits: int, share: float) -> None:
    source = Source((2, 8, 4, 4), bits=bits, packed=True, like=torch.zeros(0))
    assert source.data.nbytes == 2 * 8 * 16 * share


def test_source_quantiser_has_a_scale_for_each_sample_and_channel() -> None:
    x = torch.tensor([[[[0.4, -1.0]], [[30.0, 10.0]]], [[[0.0, 0.0]], [[-3.0, 0.4]]]])
    x.requires_grad_()
    y = QuantiseSource.apply(x, 3)  # levels -3 to 3
    expected = [[[[1 / 3, -1.0]], [[30.0, 10.0]]], [[[0.0, 0.0]], [[-3.0, 0.0]]]]
    assert y.detach().allclose(torch.tensor(expected))
    (y * torch.arange(8.0).view_as(y)).sum().backward()
    assert x.grad.flatten().tolist() == list(range(8))


def test_source_quantiser_passes_on_what_is_not_finite() -> None:
    assert not QuantiseSource.apply(torch.tensor([[[[float("nan"), 1.0]]]]), 8).isfinite().any()
    assert not QuantiseSource.apply(torch.tensor([[[[float("inf"), 1.0]]]]), 8).isfinite().all()


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8, 9, 16])
@pytest.mark.parametrize("channels", [1, 6])
def test_packed_and_unpacked_sources_give_equal_codes_and_statistics(
    bits: int, channels: int
) -> None:
    x = torch.randn(3, channels, 4, 6, generator=torch.Generator().manual_seed(bits)) + 0.5
    codes, step = source_codes(x, bits)
    sources = [
        Source((3, channels, 4, 6), bits=bits, packed=packed, like=x) for packed in (True, False)
    ]
    for source in sources:
        for sample in range(3):
            part = slice(sample, sample + 1)
            source.store(part, codes[part].clone(), step[part])
        source.finish()
        assert source.load(WHOLE, WHOLE).equal(codes)
        assert source.load(slice(1, 2), slice(2, 4)).equal(codes[1:2, :, 2:4])
        values = codes * step
        assert source.mean_C.allclose(values.mean((0, 2, 3)), atol=1e-6)
        assert source.variance_C.allclose(values.var((0, 2, 3), correction=0), rtol=1e-4)
    assert sources[0].variance_C.equal(sources[1].variance_C)


def test_pooling_keeps_the_first_of_equal_maxima_and_spreads_back_to_it() -> None:
    x = torch.randint(0, 3, (2, 3, 6, 8), generator=torch.Generator().manual_seed(0)).float()
    x.requires_grad_()
    expected = F.max_pool2d(x, 2)
    best, index = pool_with_index(x.detach())
    assert best.equal(expected)
    assert gather(x.detach(), index).equal(best)
    weight = torch.arange(best.numel(), dtype=torch.float32).view_as(best)
    (expected * weight).sum().backward()
    assert unpool(weight, index).equal(x.grad)


@pytest.mark.parametrize(
    ("unets", "order", "shape"),
    [
        (1, 0, (3, 64, 64)),
        (2, 0, (4, 64, 64)),
        (3, 2, (2, 128, 64)),
        (2, 1, (1, 64, 192)),
        (2, 1, (2, 320, 64)),
    ],
)
def test_gradients_are_those_of_plain_autograd(
    unets: int, order: int, shape: tuple[int, int, int]
) -> None:
    plain = network(QuantSpec(), unets=unets, order=order)
    stored = StoredDUNet.from_plain(copy.deepcopy(plain))
    image, target = batch(*shape)
    found = gradients(stored, image, target)
    assert worst_difference(found, gradients(plain, image, target)) < 1e-10
    for mine, theirs in zip(stored.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec(weight_bits=1, alpha=True),
        QuantSpec(input_bits=8, weight_bits=2),
        QuantSpec(input_bits=4, input_quantizer="paper"),
        QuantSpec(input_bits=8, weight_bits=1, alpha=True, input_quantizer="source"),
        QuantSpec(input_bits=4, weight_bits=2, input_quantizer="source"),
    ],
    ids=lambda spec: f"{spec.name} {spec.input_quantizer}",
)
def test_quantised_gradients_are_those_of_fake_quantisation(spec: QuantSpec) -> None:
    plain = network(spec)
    stored = StoredDUNet.from_plain(copy.deepcopy(plain))
    image, target = batch(4)
    with torch.no_grad():
        plain.unets[0].neck.grow.conv.weight[0] *= 20  # some latent weights outside [-1, 1]
        stored.unets[0].neck.grow.conv.weight[0] *= 20
    found = gradients(stored, image, target)
    assert worst_difference(found, gradients(plain, image, target)) < 1e-8


@pytest.mark.parametrize("chunk_values", [2**9, 2**13])
def test_the_size_of_the_work_space_does_not_change_the_gradients(
    monkeypatch: pytest.MonkeyPatch, chunk_values: int
) -> None:
    model = network(QuantSpec(input_bits=8, input_quantizer="source"))
    image, target = batch(2)
    expected = gradients(StoredDUNet.from_plain(copy.deepcopy(model)), image, target)
    monkeypatch.setattr(engine, "CHUNK_VALUES", chunk_values)
    found = gradients(StoredDUNet.from_plain(model), image, target)
    assert worst_difference(found, expected) < 1e-10


@pytest.mark.parametrize(
    ("bits", "gradient_scale"), [(8, "tensor"), (8, "channel"), (6, "channel"), (4, "channel")]
)
def test_packed_storage_trains_bit_for_bit_as_unpacked(bits: int, gradient_scale: str) -> None:
    spec = QuantSpec(
        input_bits=bits,
        weight_bits=1,
        gradient_bits=bits,
        alpha=True,
        input_quantizer="source",
        gradient_scale=gradient_scale,
    )
    image, target = (tensor.float() for tensor in batch(2))
    results = []
    for packed in (True, False):
        model = StoredDUNet.from_plain(network(spec, growth=3).float(), packed=packed)
        seed_rounding(model, 7)
        optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-3)
        losses = []
        for _ in range(3):
            loss = sum((heatmap - target).square().mean() for heatmap in model(image))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            clamp_latent_weights(quantised_weights(model))
            losses.append(float(loss.detach()))
        results.append((losses, model.state_dict()))
    (packed_losses, packed_state), (losses, state) = results
    assert packed_losses == losses
    assert len(set(losses)) == 3
    assert all(packed_state[name].equal(state[name]) for name in state)


@pytest.mark.parametrize("gradient_scale", ["channel", "tensor"])
def test_gradients_at_16_bits_are_nearly_those_in_full(gradient_scale: str) -> None:
    spec = QuantSpec(gradient_bits=16, gradient_scale=gradient_scale)
    image, target = batch(4)
    found = gradients(StoredDUNet.from_plain(network(spec)), image, target)
    expected = gradients(StoredDUNet.from_plain(network(QuantSpec())), image, target)
    # A step is 2^-15 of the range; one scale for a tensor leaves less of it for small values.
    difference = worst_difference(found, expected)
    assert 0 < difference < (0.003 if gradient_scale == "channel" else 0.3)


def test_a_head_without_loss_has_the_gradients_of_plain_autograd() -> None:
    plain = network(QuantSpec())
    stored = StoredDUNet.from_plain(copy.deepcopy(plain))
    image, _ = batch(2)
    for model in (plain, stored):
        model(image)[0].square().sum().backward()
    unread = "unets.1.up.0.adapt.conv.weight"
    assert not dict(stored.named_parameters())[unread].grad.any()
    found = stored.stem.conv.weight.grad
    assert float((found - plain.stem.conv.weight.grad).norm() / found.norm()) < 1e-10


def test_evaluation_goes_through_the_plain_layers() -> None:
    plain = network(SOURCE_818).eval()
    stored = StoredDUNet.from_plain(copy.deepcopy(plain))
    image, _ = batch(1)
    for mine, theirs in zip(stored(image), plain(image), strict=True):
        assert mine.equal(theirs)
    assert list(stored.state_dict()) == list(plain.state_dict())


def test_source_setting_puts_every_map_between_layers_on_its_grid() -> None:
    model = network(QuantSpec(input_bits=3, input_quantizer="source")).eval()
    seen: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append(output)

    for block in (
        model.stem,
        model.links[0],
        model.unets[1].up[3].grow,
        model.unets[0].down[0].skip,
    ):
        block.register_forward_hook(keep)
    model(batch(1)[0])
    assert len(seen) == 4
    for output in seen:
        for channel in output[0]:
            assert len(channel.unique()) <= 7


def test_the_backward_pass_runs_once_and_gives_the_image_no_gradient() -> None:
    model = StoredDUNet.from_plain(network(SOURCE_818))
    image, _ = batch(2)
    loss = model(image)[-1].sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="only once"):
        loss.backward()
    with pytest.raises(UserError, match="gradients of the image"):
        model(image.requires_grad_())


def test_one_value_a_channel_is_refused() -> None:
    model = StoredDUNet.from_plain(network(SOURCE_818))
    with pytest.raises(UserError, match="larger batch"):
        model(batch(1)[0])


def test_a_setting_with_packed_storage_builds_it_and_refuses_other_networks() -> None:
    config = RunConfig().replace(quant__storage="packed", quant__input_quantizer="source")
    assert isinstance(build_network(config, 2), StoredDUNet)
    for change in ({"model__kind": "stacked"}, {"model__iterative": True}):
        with pytest.raises(UserError, match="plain DU-Nets only"):
            config.replace(**change)


def test_packed_storage_trains_through_the_ordinary_loop(
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
        quant__storage="packed",
        training__epochs=1,
    )
    sets = load("300w", root, "train"), load("300w", root, "test")
    model = train_network(config, *sets, tmp_path)
    assert isinstance(model, StoredDUNet)
    checkpoint = load_checkpoint(tmp_path / LAST)
    assert checkpoint.config == config
    assert tensors_sha256(checkpoint.model) == tensors_sha256(model)
    start = build_network(config, 68).state_dict()
    moved = [name for name, tensor in model.state_dict().items() if not tensor.equal(start[name])]
    assert len(moved) > 0.9 * len(start)


def counted(function: Callable[[], object]) -> int:
    """Bytes that `function` leaves in the sources."""
    total = 0
    original = Source.finish

    def finish(source: Source) -> None:
        nonlocal total
        total += source.data.nbytes
        original(source)

    Source.finish = finish
    try:
        function()
    finally:
        Source.finish = original
    return total


@pytest.mark.parametrize(("bits", "share"), [(8, 1 / 8), (6, 0.75 / 8), (4, 0.5 / 8)])
def test_packed_sources_take_their_share_of_float64(bits: int, share: float) -> None:
    image, _ = batch(2)
    spec = QuantSpec(input_bits=bits, input_quantizer="source")
    packed, plain = (
        counted(lambda chosen=chosen: StoredDUNet.from_plain(network(chosen))(image))
        for chosen in (spec, QuantSpec())
    )
    assert packed == plain * share
