"""Puts the quantisers into a network: every convolution but the first and the last ones."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedcunet.errors import UserError
from fedcunet.models.blocks import Feature
from fedcunet.quant.functions import QuantiseGradient, QuantiseInput, QuantiseWeight
from fedcunet.quant.kernels import FULL as FULL
from fedcunet.quant.rounding import Rounding as Rounding
from fedcunet.quant.sources import QuantiseFeature, QuantiseSource


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantSpec:
    """Bit widths of a training step, in the paper's notation I-W-G, and how they are applied.

    The defaults of quantiser and scale are what learned best on real faces; `paper` and `tensor`
    are the paper's literal forms. `source` quantises the feature maps where they are produced
    instead of the inputs of the convolutions (`sources.py`).
    """

    input_bits: int = FULL  # inputs of the convolutions, 2 to 16, or 32
    weight_bits: int = FULL  # 1 (BW), 2 (TW), or 32
    gradient_bits: int = FULL  # gradients of the activations between layers, 2 to 16, or 32
    alpha: bool = False  # scale per filter (BW-alpha)
    # Range [-1, 1]; `input_range`; or no fixed range, on outputs in place of inputs.
    input_quantizer: Literal["paper", "ranged", "source"] = "source"
    input_range: float = 4.0  # a power of two: the range of `ranged`
    gradient_scale: Literal["tensor", "channel"] = "channel"  # channel: a sample and channel each
    weight_share: float = 1.0  # 0 to 1: of the way from float weights to quantised ones

    def __post_init__(self) -> None:
        for name, bits in (("input", self.input_bits), ("gradient", self.gradient_bits)):
            if bits != FULL and not 2 <= bits <= 16:
                raise UserError(f"{name} bits: expected 2 to 16, or 32 for float32, found {bits}")
        if self.weight_bits not in (1, 2, FULL):
            raise UserError(
                f"weight bits: expected 1 (binary), 2 (ternary) or 32 for float32, "
                f"found {self.weight_bits}"
            )
        if self.alpha and self.weight_bits == FULL:
            raise UserError("alpha: expected with weights at 1 or 2 bits, found weights at 32 bits")
        if self.input_quantizer not in ("paper", "ranged", "source"):
            raise UserError(
                f"input quantizer: expected 'paper', 'ranged' or 'source', "
                f"found '{self.input_quantizer}'"
            )
        if self.gradient_scale not in ("tensor", "channel"):
            raise UserError(
                f"gradient scale: expected 'tensor' or 'channel', found '{self.gradient_scale}'"
            )
        if not 2.0**-8 <= self.input_range <= 2.0**8 or _mantissa(self.input_range) != 0.5:
            raise UserError(
                f"input range: expected a power of two from 1/256 to 256, found {self.input_range}"
            )

    @property
    def source_bits(self) -> int:
        """Bits of the feature maps where they are produced: 32 unless `source` is chosen."""
        return self.input_bits if self.input_quantizer == "source" else FULL

    @property
    def name(self) -> str:
        """The paper's name of the setting, such as `BW-α-QIG(818)` or `float32`."""
        if self.weight_bits == self.input_bits == self.gradient_bits == FULL:
            return "float32"
        weights = {1: "BW", 2: "TW", FULL: "FW"}[self.weight_bits] + ("-α" if self.alpha else "")
        if self.input_bits == self.gradient_bits == FULL:
            return weights
        widths = (self.input_bits, self.weight_bits, self.gradient_bits)
        joined = "".join(map(str, widths)) if max(widths) < 10 else ",".join(map(str, widths))
        return f"{weights}-QIG({joined})"


def _mantissa(value: float) -> float:
    return float(torch.frexp(torch.tensor(value)).mantissa)


class QuantConv2d(nn.Conv2d):
    """A convolution without bias whose weights, input and output gradient are quantised.

    The parameter `weight` is the latent float weight; see `QuantSpec` for what is done with it.
    """

    spec: QuantSpec
    rounding: Rounding

    @classmethod
    def from_float(cls, conv: nn.Conv2d, spec: QuantSpec, rounding: Rounding) -> "QuantConv2d":
        """A quantised convolution that shares the weight of `conv`."""
        quantised = cls.__new__(cls)
        quantised.__dict__.update(conv.__dict__)
        quantised.spec, quantised.rounding = spec, rounding
        return quantised

    def forward(self, x_BCHW: Tensor) -> Tensor:
        spec = self.spec
        weight = self.weight.float() if self.weight.dtype == torch.bfloat16 else self.weight
        if spec.input_bits != FULL and spec.source_bits == FULL:
            input_range = 1.0 if spec.input_quantizer == "paper" else spec.input_range
            x_BCHW = _apply(QuantiseInput, x_BCHW, spec.input_bits, input_range)
        if spec.weight_bits != FULL:
            weight = _apply(QuantiseWeight, weight, spec.weight_bits, spec.alpha, spec.weight_share)
        y_BCHW = F.conv2d(x_BCHW, weight, None, self.stride, self.padding)
        if spec.gradient_bits != FULL and torch.is_grad_enabled():
            generator = self.rounding.generator(y_BCHW.device)
            per_channel = spec.gradient_scale == "channel"
            y_BCHW = _apply(QuantiseGradient, y_BCHW, spec.gradient_bits, per_channel, generator)
        if spec.source_bits != FULL:
            y_BCHW = _apply(QuantiseSource, y_BCHW, spec.source_bits)
        return y_BCHW


def _apply(function: type[torch.autograd.Function], *arguments: object) -> Tensor:
    result: Tensor = function.apply(*arguments)  # type: ignore[no-untyped-call]
    return result


def quantise_network(model: nn.Module, spec: QuantSpec) -> nn.Module:
    """Replaces the convolutions of `model` in place, except those that `end_layers()` names.

    Names and shapes of all parameters stay as they are; a spec of 32-32-32 changes nothing.
    """
    if spec == QuantSpec():
        return model
    ends = set(model.end_layers())  # type: ignore[operator]
    rounding = Rounding()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Conv2d) and name not in ends:
            parent, _, attribute = name.rpartition(".")
            quantised = QuantConv2d.from_float(module, spec, rounding)
            setattr(model.get_submodule(parent), attribute, quantised)
    if spec.source_bits != FULL:
        for name, module in list(model.named_modules()):
            if isinstance(module, Feature):
                parent, _, attribute = name.rpartition(".")
                setattr(model.get_submodule(parent), attribute, QuantiseFeature(spec.source_bits))
    return model


def seed_rounding(model: nn.Module, seed: int) -> None:
    """Seeds the stochastic rounding of all layers of `model`; nothing for a float network."""
    if isinstance(getattr(model, "rounding", None), Rounding):
        model.rounding.seed(seed)  # type: ignore[operator, union-attr]
        return
    for module in model.modules():
        if isinstance(module, QuantConv2d):
            module.rounding.seed(seed)
            return


def quantised_weights(model: nn.Module) -> list[Tensor]:
    """The latent weights at 1 or 2 bits, which are clamped to [-1, 1] after every step."""
    return [
        module.weight
        for module in model.modules()
        if isinstance(module, QuantConv2d) and module.spec.weight_bits != FULL
    ]


@contextmanager
def weights_on_their_way(model: nn.Module, share: float) -> Iterator[None]:
    """Within it, training steps have weights at `share` of the way to 1 or 2 bits."""

    def set_share(share: float) -> None:
        for module in model.modules():
            if isinstance(module, QuantConv2d):
                module.spec = replace(module.spec, weight_share=share)

    if share == 1:
        yield
        return
    set_share(share)
    try:
        yield
    finally:
        set_share(1.0)


@torch.no_grad()
def clamp_latent_weights(weights: list[Tensor]) -> None:
    """Clamps latent weights to [-1, 1] in place (BinaryConnect; paper, Eq. 5)."""
    if weights:
        torch._foreach_clamp_min_(weights, -1.0)
        torch._foreach_clamp_max_(weights, 1.0)
