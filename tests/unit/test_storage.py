"""Networks that keep packed sources: what they hold, how they train, what they refuse."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fedcunet.config import RunConfig
from fedcunet.data import load
from fedcunet.errors import UserError
from fedcunet.quant import QuantSpec, seed_rounding
from fedcunet.quant.layers import clamp_latent_weights, quantised_weights
from fedcunet.quant.storage import Stored, store
from fedcunet.training.central import LAST, train_network
from fedcunet.training.checkpoint import load_checkpoint, tensors_sha256
from fedcunet.training.local import make_optimizer
from fedcunet.training.network import build_network
from tests.made_networks import SOURCE_818, batch, gradients, network


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


def test_what_stages_would_leave_out_is_refused() -> None:
    model = store(network(SOURCE_818), frugal=True)
    image, target = batch(2)
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


@pytest.mark.parametrize(
    ("kind", "quantizer", "storage"),
    [
        ("dunet", "source", "packed"),
        ("stacked", "paper", "frugal"),
        ("iterative", "source", "frugal"),
    ],
)
def test_all_of_a_step_is_on_the_networks_device(
    kind: str, quantizer: str, storage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The device `meta` computes nothing, but most of its operations refuse tensors of others.
    monkeypatch.setattr("fedcunet.quant.rounding.Rounding.generator", lambda *_: None)
    config = RunConfig().replace(
        model__kind="stacked" if kind == "stacked" else "dunet",
        model__iterative=kind == "iterative",
        model__unets=1,
        model__order=0,
        quant__bits="6,1,6",
        quant__input_quantizer=quantizer,
        quant__storage=storage,
    )
    model = build_network(config, 3).to("meta").train()
    optimizer = make_optimizer(model, config.training, 1e-3)
    heatmaps = model(torch.empty(2, 3, 64, 64, device="meta"))
    sum(heatmap.square().mean() for heatmap in heatmaps).backward()
    optimizer.step()
    kept = [tensor for state in optimizer.state.values() for tensor in state.values()]
    assert {tensor.device.type for tensor in kept if tensor.dim()} == {"meta"}
