"""Packed networks: equality with a network rounded alike, sizes, damage."""

import dataclasses
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fedcunet.config import RunConfig, TrainingConfig
from fedcunet.data import FACE68, LSP14, load
from fedcunet.data.crops import Crops
from fedcunet.errors import UserError
from fedcunet.packed import (
    code_vector,
    round_significant,
)
from fedcunet.quant.functions import binarise, ternarise
from fedcunet.quant.layers import QuantConv2d
from fedcunet.training.checkpoint import load_checkpoint, save_checkpoint, tensors_sha256
from fedcunet.training.evaluation import predict
from fedcunet.training.local import make_optimizer, train_pass
from fedcunet.training.network import build_network, state_tensors
from fedcunet.training.packed import (
    _HEADER,
    Packed,
    _checksum,
    _Header,
    pack_network,
    unpack_network,
)

TINY = RunConfig().replace(model__unets=1, model__order=0, quant__bits="8,1,8", quant__alpha=True)
SETTINGS = [
    ("8,1,8", True),
    ("32,1,32", False),
    ("8,2,8", True),
    ("8,2,8", False),
    ("32,32,32", False),
    ("6,32,6", False),
]


def shaken(config: RunConfig, num_landmarks: int = 14) -> nn.Module:
    """A network whose BatchNorm has spreads over decades, and a few channels that are dead."""
    model = build_network(config, num_landmarks)
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            shake(module, generator)
            module.running_mean.copy_(torch.randn(module.num_features, generator=generator))
            module.running_var.copy_(torch.randn(module.num_features, generator=generator).exp())
            module.running_var[:2] = 0
    return model.eval()


@torch.no_grad()
def shake(module: nn.BatchNorm2d, generator: torch.Generator) -> None:
    module.weight.copy_(1 + 0.1 * torch.randn(module.num_features, generator=generator))
    module.bias.copy_(0.3 * torch.randn(module.num_features, generator=generator))


@torch.no_grad()
def measured(config: RunConfig) -> nn.Module:
    """A network whose BatchNorm has the statistics of pictures; one of its filters is zero."""
    model = build_network(config, 14)
    hidden = [module for module in model.modules() if isinstance(module, QuantConv2d)]
    for convolution in hidden[:1]:
        convolution.weight[3] = 0
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            shake(module, generator)
            module.momentum = 1.0
    model.train()(pictures(8))
    return model.eval()


def with_quant(bits: str, alpha: bool) -> RunConfig:
    return TINY.replace(quant__bits=bits, quant__alpha=alpha)


def pictures(count: int = 2) -> torch.Tensor:
    return torch.rand(count, 3, 64, 64, generator=torch.Generator().manual_seed(1))


# Networks


def rounded_reference(model: nn.Module, config: RunConfig, bits: int) -> nn.Module:
    """The checkpoint's network with each tensor rounded by itself, as a file of it would be."""
    spec = config.quant.spec()
    reference = build_network(config, 14)
    reference.load_state_dict(model.state_dict())
    for module in reference.modules():
        if isinstance(module, nn.BatchNorm2d):
            variance, mean = module.running_var.double().numpy(), module.running_mean.numpy()
            scale = module.weight.detach().double().numpy() / np.sqrt(variance + module.eps)
            code = code_vector(scale, bits=bits, weights_N=variance + module.eps).values(bits)
            shift = code_vector(
                module.bias.detach().double().numpy() - mean.astype(np.float64) * code, bits=bits
            )
            with torch.no_grad():
                module.weight.copy_(torch.from_numpy(code))
                module.bias.copy_(torch.from_numpy(shift.values(bits)))
            module.running_mean.zero_()
            module.running_var.fill_(1 - module.eps)
        elif isinstance(module, nn.Conv2d):
            is_quantised = isinstance(module, QuantConv2d) and spec.weight_bits != 32
            weight = module.weight.detach()
            if not is_quantised:
                rounded = weight.half().float()
            else:
                quantise = binarise if spec.weight_bits == 1 else ternarise
                rounded = quantise(weight, scaled=False)
                if spec.alpha:
                    alpha = quantise(weight, scaled=True).abs().amax(dim=(1, 2, 3)).numpy()
                    most = 24 - int(weight[0].numel()).bit_length()
                    alpha = round_significant(alpha, most)
                    relative = np.where(alpha > 0, alpha, np.inf).astype(np.float64) ** -2
                    code = code_vector(alpha, bits=bits, weights_N=relative)
                    alpha = torch.from_numpy(round_significant(code.values(bits), most))
                    rounded = rounded * alpha.view(-1, 1, 1, 1)
            with torch.no_grad():
                module.weight.copy_(rounded)
    return reference.eval()


@torch.no_grad()
@pytest.mark.parametrize(
    "config",
    [
        *(with_quant(bits, alpha) for bits, alpha in SETTINGS),
        TINY.replace(model__kind="stacked"),
        TINY.replace(model__iterative=True),
        TINY.replace(quant__input_quantizer="ranged"),
    ],
    ids=lambda config: (
        f"{config.model.kind}-{config.model.iterative}-{config.quant.input_quantizer}"
        f"-{config.quant.bits}-{config.quant.alpha}"
    ),
)
def test_a_loaded_network_equals_one_that_was_rounded_alike(config: RunConfig) -> None:
    model = measured(config)
    loaded = unpack_network(pack_network(model, config, LSP14, vector_bits=8).content)
    reference = rounded_reference(model, config, 8)
    for name, tensor in state_tensors(reference).items():
        assert torch.equal(tensor, state_tensors(loaded.model)[name]), name
    outputs = zip(loaded.model.eval()(pictures()), reference(pictures()), strict=True)
    assert all(torch.equal(found, wanted) for found, wanted in outputs)
    assert (loaded.config, loaded.scheme) == (config, LSP14)


@torch.no_grad()
def test_folding_loses_nothing_but_precision() -> None:
    model = measured(TINY)
    loaded = unpack_network(pack_network(model, TINY, LSP14, vector_bits=16).content).model.eval()
    for name, norm in model.named_modules():
        if isinstance(norm, nn.BatchNorm2d):
            spread = norm.running_var.sqrt() * torch.randn(500, norm.num_features)
            x = (norm.running_mean + spread)[:, :, None, None]
            assert torch.allclose(loaded.get_submodule(name)(x), norm(x), atol=1e-3), name


@torch.no_grad()
@pytest.mark.parametrize(("bits", "alpha"), [("8,1,8", True), ("8,2,8", True), ("8,2,8", False)])
def test_loaded_weights_are_what_the_weight_quantiser_gives(bits: str, alpha: bool) -> None:
    config = with_quant(bits, alpha)
    model = measured(config)
    loaded = unpack_network(pack_network(model, config, LSP14).content).model
    quantise = binarise if config.quant.spec().weight_bits == 1 else ternarise
    for name, module in loaded.named_modules():
        if isinstance(module, QuantConv2d):
            assert torch.equal(quantise(module.weight, scaled=alpha), module.weight), name
            ours = quantise(module.weight, scaled=False)
            assert torch.equal(ours, quantise(model.get_submodule(name).weight, scaled=False))


@pytest.mark.parametrize(("unets", "most"), [(16, 2_450_000), (4, 630_000)])
def test_a_binary_network_is_as_small_as_it_should_be(unets: int, most: int) -> None:
    scheme = dataclasses.replace(FACE68, num_landmarks=16)
    config = TINY.replace(model__unets=unets, model__order=1, quant__bits="32,1,32")
    # Statistics that have spread and dead channels take more than those of a fresh network.
    packed = pack_network(shaken(config, 16), config, scheme)
    assert len(packed.content) <= most
    assert sum(packed.bytes_by_part.values()) == len(packed.content)
    if unets == 4:
        fresh = pack_network(build_network(config, 16), config, scheme)
        assert len(fresh.content) <= len(packed.content)
    else:
        assert packed.bytes_by_part["weights"] == 1_983_488


def test_a_file_keeps_its_setting_and_facts(tmp_path: Path) -> None:
    config = TINY.replace(seed=7, data__sigma=1.5)
    path = tmp_path / "network.fcpk"
    packed = pack_network(shaken(config, 68), config, FACE68, {"epoch": "3"})
    path.write_bytes(packed.content)
    loaded = load_checkpoint(path)
    assert (loaded.config, loaded.scheme, loaded.facts) == (config, FACE68, {"epoch": "3"})
    again = pack_network(loaded.model, loaded.config, loaded.scheme, loaded.facts)
    assert len(again.content) <= len(packed.content)


def test_a_trained_network_finds_the_same_points_when_packed(
    make_300w: Callable[..., Path],
) -> None:
    root = make_300w({"helen/testset": [f"{n}_1.jpg" for n in range(4)]})
    crops = Crops(load("300w", root, "test").annotations, FACE68, size=64)
    config = with_quant("32,1,32", True)
    model = build_network(config, 68)
    train_pass(
        model,
        crops,
        make_optimizer(model, TrainingConfig(optimizer="adam"), 1e-2),
        batch_size=4,
        num_epochs=14,
        sigma=2.0,
        augmentation=None,
        seed=(0,),
    )
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model(crops.batch(range(4)).images_B3HW)  # so few steps are not enough for the statistics
    loaded = unpack_network(pack_network(model, config, FACE68).content).model
    before_NK2, after_NK2 = predict(model, crops), predict(loaded, crops)
    before, after = (
        np.linalg.norm(points_NK2 - crops.targets()[0], axis=2).mean()
        for points_NK2 in (before_NK2, after_NK2)
    )
    assert before < 25  # something was learned: 34 without
    # A few of the still flat heatmaps have two peaks, which may change places.
    assert abs(after / before - 1) < 0.03
    assert np.median(np.linalg.norm(after_NK2 - before_NK2, axis=2)) < 0.3  # pixels of the crop


# What is refused


@pytest.fixture(scope="module")
def packed() -> Packed:
    return pack_network(shaken(TINY), TINY, LSP14)


@pytest.fixture(scope="module")
def content(packed: Packed) -> bytes:
    return packed.content


def test_every_damage_is_refused_in_one_line(content: bytes) -> None:
    generator = np.random.default_rng(0)
    header = range(_HEADER.size + 40)
    for position in [*header, *generator.integers(len(content), size=100), -1]:
        damaged = bytearray(content)
        damaged[position] ^= 1 << int(generator.integers(8))
        with pytest.raises(UserError, match=r"^packed network: [^\n]+$"):
            unpack_network(bytes(damaged))
    for length in [*range(60), *generator.integers(len(content), size=30), len(content) - 1]:
        with pytest.raises(UserError, match=r"^packed network: [^\n]+$"):
            unpack_network(content[:length])
    with pytest.raises(UserError, match=r"expected \d+ bytes, found"):
        unpack_network(content + b"\x00")


def sealed(header: _Header, setting: bytes, body: bytes) -> bytes:
    """A file with the right lengths and checksum around whatever it holds."""
    fields = header._replace(setting_bytes=len(setting), body_bytes=len(body))
    text = _HEADER.pack(*fields) + setting + body
    return text + _checksum(text)


def opened(content: bytes) -> tuple[_Header, bytes, bytes]:
    header = _Header._make(_HEADER.unpack_from(content))
    start = _HEADER.size + header.setting_bytes
    return header, content[_HEADER.size : start], content[start:-8]


def test_a_file_made_to_deceive_is_refused(packed: Packed) -> None:
    header, setting, body = opened(packed.content)
    assert unpack_network(sealed(header, setting, body)).config == TINY
    text = zlib.decompress(setting)
    nested = b"[" * 60_000
    bomb = zlib.compress(b" " * 10**7)
    grid = packed.bytes_by_part["weights"]  # of the first alpha: its kind, then its lower end
    strange = body[:grid] + b"\x03" + body[grid + 1 :]
    no_number = body[: grid + 1] + struct.pack("<f", np.nan) + body[grid + 5 :]
    wrong: list[tuple[bytes, str]] = [
        (sealed(header._replace(version=2), setting, body), "version"),
        (sealed(header._replace(bits=3), setting, body), "expected 4 to 16"),
        (sealed(header._replace(bits=9), setting, body), "bytes of body"),
        (sealed(header._replace(apart_norms=2**32 - 1), setting, body), "bytes of body"),
        (sealed(header._replace(layout_id=b"12345678"), setting, body), "tensors"),
        (sealed(header, setting, body[:-2]), "bytes of body"),
        (sealed(header, setting[:-5], body), "setting cannot be read"),
        (sealed(header, bomb, body), "too long"),
        (sealed(header, zlib.compress(nested), body), "setting cannot be read"),
        (sealed(header, zlib.compress(b"[]"), body), "expected config, scheme and facts"),
        (sealed(header, zlib.compress(text.replace(b"lsp14", b"lsp15")), body), "lsp15"),
        (sealed(header, zlib.compress(text.replace(b'"unets":1', b'"unets":9')), body), "tensors"),
        (sealed(header, zlib.compress(text.replace(b"unets", b"units")), body), "units"),
        (sealed(header, setting, body[:-2] + b"\x00\x7c"), "not finite"),
        (sealed(header, setting, strange), "grid of kind 3"),
        (sealed(header, setting, no_number), "cannot go from nan"),
    ]
    for file, reason in wrong:
        with pytest.raises(UserError, match=reason):
            unpack_network(file)


def test_no_change_behind_a_right_checksum_ends_otherwise_than_in_words(content: bytes) -> None:
    header, setting, body = opened(content)
    generator = np.random.default_rng(1)
    for _ in range(10):
        changed = np.frombuffer(body, dtype=np.uint8).copy()
        at = generator.integers(changed.size, size=200)
        changed[at] = generator.integers(256, size=200)
        try:
            model = unpack_network(sealed(header, setting, changed.tobytes())).model
        except UserError:
            continue
        assert all(bool(tensor.isfinite().all()) for tensor in state_tensors(model).values())


def test_a_network_with_bfloat16_latents_is_saved_as_it_was_packed(tmp_path: Path) -> None:
    config = TINY.replace(quant__storage="frugal", quant__latent="bfloat16")
    unpacked = unpack_network(pack_network(build_network(config, 14), config, LSP14).content)
    assert unpacked.config == config.replace(quant__latent="float32")
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, unpacked.model, unpacked.config, LSP14)
    assert tensors_sha256(load_checkpoint(path).model) == tensors_sha256(unpacked.model)


def test_a_file_shorter_than_it_says_is_not_read(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "network.fcpk"
    for short in (content[:-1], content[:20], content[:4]):
        path.write_bytes(short)
        with pytest.raises(UserError, match=rf"packed network {path}: expected \d+ bytes"):
            load_checkpoint(path)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("stem.conv.weight", 7e4, "too large for float16"),
        ("stem.norm.bias", float("nan"), "not finite"),
        ("stem.norm.running_var", -1.0, "below 0"),
        ("stem.norm.weight", 3e38, "too large for float32"),
    ],
)
def test_a_network_that_cannot_be_held_is_not_packed(name: str, value: float, reason: str) -> None:
    model = shaken(TINY)
    with torch.no_grad():
        tensor = state_tensors(model)[name]
        tensor[(0,) * tensor.dim()] = value
    with pytest.raises(UserError, match=reason):
        pack_network(model, TINY, LSP14)


@pytest.mark.parametrize("bits", [3, 17, 32])
def test_other_precisions_are_refused(bits: int) -> None:
    with pytest.raises(UserError, match="expected 4 to 16"):
        pack_network(shaken(TINY), TINY, LSP14, vector_bits=bits)


def test_a_checkpoint_is_still_a_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, shaken(TINY, 68), TINY, FACE68)
    assert load_checkpoint(path).config == TINY
