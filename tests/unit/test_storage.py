"""Networks that keep packed sources: exact gradients by recomputation, packed equal to unpacked."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedcunet.config import RunConfig
from fedcunet.data import load
from fedcunet.errors import UserError
from fedcunet.models import DUNet, IterativeRefinement, StackedHourglass
from fedcunet.quant import QuantSpec, pieces, quantise_network, seed_rounding
from fedcunet.quant.layers import clamp_latent_weights, quantised_weights
from fedcunet.quant.outputs import GradientQuantiser
from fedcunet.quant.storage import Stored, store
from fedcunet.quant.workspace import Workspace
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
    stored = store(copy.deepcopy(plain))
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
    stored = store(copy.deepcopy(plain))
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
    expected = gradients(store(copy.deepcopy(model)), image, target)
    monkeypatch.setattr(pieces, "CHUNK_VALUES", chunk_values)
    found = gradients(store(model), image, target)
    assert worst_difference(found, expected) < 1e-10


@pytest.mark.timeout(1500)  # 200 steps, where other work may take the machine
@pytest.mark.parametrize(
    ("bits", "gradient_scale", "frugal", "steps"),
    [
        (8, "channel", False, 50),
        (6, "channel", True, 50),
        (4, "channel", False, 3),
        (8, "tensor", True, 3),
    ],
)
def test_packed_storage_trains_bit_for_bit_as_unpacked(
    bits: int, gradient_scale: str, frugal: bool, steps: int
) -> None:
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
        model = store(
            network(spec, growth=3, unets=1, order=0).float(), packed=packed, frugal=frugal
        )
        seed_rounding(model, 7)
        optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-3)
        losses = []
        for _ in range(steps):
            loss = sum((heatmap - target).square().mean() for heatmap in model(image))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            clamp_latent_weights(quantised_weights(model))
            losses.append(float(loss.detach()))
        results.append((losses, model.state_dict()))
    (packed_losses, packed_state), (losses, state) = results
    assert packed_losses == losses
    assert len(set(losses)) == steps
    assert all(packed_state[name].equal(state[name]) for name in state)


@pytest.mark.parametrize("gradient_scale", ["channel", "tensor"])
def test_gradients_at_16_bits_are_nearly_those_in_full(gradient_scale: str) -> None:
    spec = QuantSpec(gradient_bits=16, gradient_scale=gradient_scale)
    image, target = batch(4)
    found = gradients(store(network(spec)), image, target)
    expected = gradients(store(network(QuantSpec())), image, target)
    # A step is 2^-15 of the range; one scale for a tensor leaves less of it for small values.
    difference = worst_difference(found, expected)
    assert 0 < difference < (0.003 if gradient_scale == "channel" else 0.3)


def test_a_head_without_loss_has_the_gradients_of_plain_autograd() -> None:
    plain = network(QuantSpec())
    stored = store(copy.deepcopy(plain))
    image, _ = batch(2)
    for model in (plain, stored):
        model(image)[0].square().sum().backward()
    unread = "unets.1.up.0.adapt.conv.weight"
    assert not dict(stored.named_parameters())[unread].grad.any()
    found = stored.stem.conv.weight.grad
    assert float((found - plain.stem.conv.weight.grad).norm() / found.norm()) < 1e-10


def test_evaluation_goes_through_the_plain_layers() -> None:
    plain = network(SOURCE_818).eval()
    stored = store(copy.deepcopy(plain))
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
    model = store(network(SOURCE_818))
    image, _ = batch(2)
    loss = model(image)[-1].sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="only once"):
        loss.backward()
    with pytest.raises(UserError, match="gradients of the image"):
        model(image.requires_grad_())


def test_one_value_a_channel_is_refused() -> None:
    model = store(network(SOURCE_818))
    with pytest.raises(UserError, match="larger batch"):
        model(batch(1)[0])


@pytest.mark.parametrize("change", [{}, {"model__kind": "stacked"}, {"model__iterative": True}])
@pytest.mark.parametrize("storage", ["packed", "frugal"])
def test_a_setting_with_storage_builds_it(storage: str, change: dict[str, str | bool]) -> None:
    config = RunConfig().replace(model__unets=1, model__order=0, quant__storage=storage, **change)
    model = build_network(config, 2)
    assert isinstance(model, Stored)
    assert model.frugal == (storage == "frugal")


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
    assert isinstance(model, Stored)
    checkpoint = load_checkpoint(tmp_path / LAST)
    assert checkpoint.config == config
    assert tensors_sha256(checkpoint.model) == tensors_sha256(model)
    start = build_network(config, 68).state_dict()
    moved = [name for name, tensor in model.state_dict().items() if not tensor.equal(start[name])]
    assert len(moved) > 0.9 * len(start)


@pytest.mark.parametrize(("bits", "share"), [(8, 1 / 8), (6, 0.75 / 8), (4, 0.5 / 8)])
@pytest.mark.parametrize("frugal", [False, True])
def test_packed_codes_take_their_share_of_float64(bits: int, share: float, frugal: bool) -> None:
    image, _ = batch(2)
    spec = QuantSpec(input_bits=bits, input_quantizer="source")
    packed, plain = (
        store(network(chosen), packed=packed, frugal=frugal).record(image)
        for chosen, packed in ((spec, True), (QuantSpec(), False))
    )
    heatmaps = sum(heatmap.nbytes for heatmap in plain.heatmaps())
    indices = sum(
        output.index.nbytes
        for step in plain._steps
        for output in step.outputs()
        if output.index is not None
    )
    found = packed.held_bytes() - heatmaps - indices / 4
    assert found == share * (plain.held_bytes() - heatmaps - indices)


def test_frugal_storage_holds_about_half_of_packed() -> None:
    image, _ = batch(2)
    model = network(SOURCE_818, width=32, growth=8)
    frugal_bytes, packed_bytes = (
        store(model, frugal=frugal).record(image).held_bytes() for frugal in (True, False)
    )
    assert frugal_bytes < 0.53 * packed_bytes


@pytest.mark.parametrize(
    ("frugal", "gradient_bits", "dtype"),
    [
        (True, 8, torch.int8),
        (True, 16, torch.int16),
        (True, 32, torch.float64),
        (False, 8, torch.float64),
    ],
)
def test_gradients_wait_in_codes_in_frugal_storage_alone(
    frugal: bool, gradient_bits: int, dtype: torch.dtype
) -> None:
    spec = QuantSpec(input_bits=8, gradient_bits=gradient_bits, input_quantizer="source")
    model = store(network(spec), frugal=frugal)
    seen: set[torch.dtype] = set()

    def look(parameter: nn.Parameter, gradient: Tensor) -> None:
        outputs = [output for step in tape._steps for output in step.outputs()]
        waiting = [output.source.waiting for output in outputs]
        seen.update(each.data.dtype for each in waiting if each is not None)

    model.update = look
    tape = model.record(batch(2)[0])
    tape.backward([torch.ones_like(heatmap) for heatmap in tape.heatmaps()])
    assert seen == {dtype}


def test_one_scale_for_a_tensor_is_that_of_the_whole_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    largest: dict[GradientQuantiser, float] = {}

    class Watched(GradientQuantiser):
        def __call__(self, gradient: Tensor, workspace: Workspace) -> Tensor:
            largest[self] = max(largest.get(self, 0), float(gradient.abs().max()))
            return super().__call__(gradient, workspace)

    monkeypatch.setattr("fedcunet.quant.engine.GradientQuantiser", Watched)
    spec = QuantSpec(input_bits=8, gradient_bits=8, gradient_scale="tensor")
    gradients(store(network(spec)), *batch(3))
    scaled = [each for each in largest if each.peak is not None]
    assert len(scaled) > 20
    assert all(largest[each] == float(each.peak) for each in scaled)


def test_what_stages_would_leave_out_is_refused() -> None:
    model = store(network(SOURCE_818), frugal=True)
    image, target = batch(2)
    model.unets[0].neck.grow.norm.eval()
    with pytest.raises(UserError, match=r"found unets\.0\.neck\.grow\.norm in evaluation mode"):
        model(image)
    model.train()
    handle = model.stem.register_forward_hook(lambda module, inputs, output: None)
    with pytest.raises(UserError, match=r"no hooks on layers.*found one on stem"):
        model(image)
    handle.remove()
    seen: list[Tensor] = []
    weight = model.stem.conv.weight
    handles = [
        weight.register_hook(seen.append),
        weight.register_post_accumulate_grad_hook(seen.append),
    ]
    gradients(model, image, target)  # no optimiser takes the gradients: the hooks see them
    assert len(seen) == 2
    model.update = lambda parameter, gradient: None
    for handle in handles:
        with pytest.raises(UserError, match=r"hooks on parameters.*stem\.conv\.weight"):
            model(image)
        handle.remove()
    model(image)


def small_network(kind: str, spec: QuantSpec) -> nn.Module:
    """One of the three networks, one with heads of both kinds."""
    torch.manual_seed(3)
    model: nn.Module
    if kind == "stacked":
        model = StackedHourglass(2, 3, width=8, num_supervisions=1)
    elif kind == "stacked detection":
        model = StackedHourglass(2, 3, width=8, supervision="detection")
    elif kind == "refined hourglass":
        model = IterativeRefinement(StackedHourglass(1, 3, width=8))
    else:
        dunet = DUNet(2, 1, 3, width=8, growth=4, supervision="detection")
        model = IterativeRefinement(dunet)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, -0.5, 1.5)
    return quantise_network(model.double().train(), spec)


@pytest.mark.parametrize("frugal", [False, True])
@pytest.mark.parametrize(
    "spec",
    [QuantSpec(), QuantSpec(input_bits=8, weight_bits=1, alpha=True, input_quantizer="source")],
    ids=lambda spec: spec.name,
)
@pytest.mark.parametrize(
    "kind", ["stacked", "stacked detection", "refined hourglass", "refined DU-Net"]
)
def test_every_network_has_the_gradients_of_plain_autograd(
    kind: str, spec: QuantSpec, frugal: bool
) -> None:
    plain = small_network(kind, spec)
    stored = store(copy.deepcopy(plain), frugal=frugal)
    image, target = batch(2)
    found = gradients(stored, image, target)
    # Two passes through an hourglass whose stem has two channels lose a digit more.
    assert worst_difference(found, gradients(plain, image, target)) < 1e-9
    for mine, theirs in zip(stored.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


@given(
    unets=st.integers(1, 3),
    order=st.integers(0, 2),
    supervisions=st.integers(1, 3),
    bits=st.sampled_from([4, 5, 6, 8, 11, 32]),
    size=st.integers(2, 3),
    # At 64 by 64 the neck is one pixel: BatchNorm of two values magnifies the last digit.
    sides=st.tuples(st.sampled_from([128, 192]), st.sampled_from([64, 128])),
    frugal=st.booleans(),
)
@settings(max_examples=12, deadline=None, derandomize=True)
def test_any_du_net_has_the_gradients_of_plain_autograd(
    unets: int,
    order: int,
    supervisions: int,
    bits: int,
    size: int,
    sides: tuple[int, int],
    frugal: bool,
) -> None:
    torch.manual_seed(4)
    model = DUNet(
        unets,
        min(order, unets - 1),
        2,
        num_supervisions=min(supervisions, unets),
        width=5,
        growth=3,
    )
    plain = quantise_network(
        model.double().train(), QuantSpec(input_bits=bits, input_quantizer="source")
    )
    stored = store(copy.deepcopy(plain), frugal=frugal)
    image, _ = batch(size, *sides)
    target = torch.zeros((), dtype=torch.float64)
    found = gradients(stored, image, target)
    # Networks this small, BatchNorm over so few values, lose two digits against those chosen above.
    assert worst_difference(found, gradients(plain, image, target)) < 1e-8


@pytest.mark.parametrize("bits", [8, 32])
def test_computing_sources_again_changes_no_bit_of_the_gradients(bits: int) -> None:
    spec = QuantSpec(input_bits=bits, weight_bits=1, alpha=True, input_quantizer="source")
    model = network(spec).float()
    image, target = (tensor.float() for tensor in batch(2))
    found, expected = (
        gradients(store(copy.deepcopy(model), frugal=frugal), image, target)
        for frugal in (True, False)
    )
    assert all(found[name].equal(expected[name]) for name in expected)
