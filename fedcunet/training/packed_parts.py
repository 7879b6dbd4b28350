"""The parts of a packed network: weights, alpha, BatchNorm and end layers to bytes and back.

Of BatchNorm, inference needs only y = scale·x + shift with scale = γ / sqrt(variance + eps) and
shift = β - mean·scale: half of the values, with no loss. Each scale's error is weighted by its
channel's variance, and the shift is computed from the scale as it was rounded, so that the mean of
the channel's output does not move. The loaded network holds them as γ and β beside a mean of 0 and
a variance of 1 - eps. Channels that are nearly constant have scales and shifts a hundred times
those of the others; they may stand apart from a vector's grid, in float32.

The latent weights are set to sign·alpha (trit·alpha). Alpha has so few significant bits that a
filter's mean magnitude is exact in float32: the weight quantiser gives these same values again.

O filters, I input channels, C channels of a BatchNorm layer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from fedcunet.bits import pack_codes, packed_length, unpack_codes
from fedcunet.config import RunConfig
from fedcunet.errors import UserError
from fedcunet.packed import (
    VectorCode,
    code_vector,
    pack_trits,
    pack_vectors,
    round_significant,
    trits_length,
    unpack_trits,
    unpack_vectors,
    vectors_length,
)
from fedcunet.quant.functions import binarise, ternarise
from fedcunet.quant.layers import FULL
from fedcunet.training.network import state_tensors

_FLOAT32_BITS = 24  # significant


class Plan:
    """Which tensors of a network go into which part of a file, and how long the parts are.

    Args:
        model: the network; on the meta device for lengths alone.
        config: its setting.
        vector_bits: of each value of alpha and BatchNorm.
    """

    def __init__(self, model: nn.Module, config: RunConfig, vector_bits: int) -> None:
        spec = config.quant.spec()
        self.weight_bits, self.alpha, self.bits = spec.weight_bits, spec.alpha, vector_bits
        self.norms: dict[str, nn.BatchNorm2d] = {
            f"{name}.": module
            for name, module in model.named_modules()
            if isinstance(module, nn.BatchNorm2d)
        }
        ends = set(model.end_layers())  # type: ignore[operator]
        self.hidden: dict[str, torch.Tensor] = {}
        self.others: dict[str, torch.Tensor] = {}
        for name, tensor in _in_float32(state_tensors(model)).items():
            layer = name.rpartition(".")[0]
            if f"{layer}." not in self.norms:
                part = self.hidden if tensor.dim() == 4 and layer not in ends else self.others
                part[name] = tensor

    @property
    def filters(self) -> list[int]:
        """Lengths of the alpha vectors."""
        return [tensor.shape[0] for tensor in self.hidden.values()] if self.alpha else []

    @property
    def channels(self) -> list[int]:
        """Lengths of the BatchNorm vectors: scale and shift of each layer."""
        return [norm.num_features for norm in self.norms.values() for _ in range(2)]

    def lengths(self, apart_alpha: int, apart_norms: int) -> dict[str, int]:
        """Bytes of each part of the body, with these numbers of values that stand apart."""
        count = sum(tensor.numel() for tensor in self.hidden.values())
        weights = {1: packed_length(count, 1), 2: trits_length(count), FULL: 2 * count}
        return {
            "weights": weights[self.weight_bits],
            "alpha": vectors_length(self.filters, self.bits, apart_alpha),
            "batchnorm": vectors_length(self.channels, self.bits, apart_norms),
            "end_layers": sum(2 * tensor.numel() for tensor in self.others.values()),
        }


def _in_float32(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        name: tensor.float() if tensor.dtype == torch.bfloat16 else tensor
        for name, tensor in tensors.items()
    }


def _flat(tensors: Sequence[torch.Tensor]) -> np.ndarray:
    """All values one after the other, in logical order whatever the memory format."""
    parts = [tensor.detach().cpu().reshape(-1).numpy() for tensor in tensors]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.float32)


def _split(values: np.ndarray, like: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors, named and shaped as `like`, that lie one after the other in `values`."""
    stops = np.cumsum([tensor.numel() for tensor in like.values()])[:-1]
    return {
        name: torch.from_numpy(part).view(tensor.shape)
        for (name, tensor), part in zip(like.items(), np.split(values, stops), strict=True)
    }


def _pack_halves(tensors: Mapping[str, torch.Tensor]) -> bytes:
    halves = []
    for name, tensor in tensors.items():
        half = tensor.detach().half()
        if not bool(half.isfinite().all()):
            raise UserError(f"network: '{name}' has values too large for float16")
        halves.append(half)
    return _flat(halves).astype("<f2").tobytes()


def _unpack_halves(body: bytes, like: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return _split(np.frombuffer(body, dtype="<f2").astype(np.float32), like)


def _pack_weights(plan: Plan) -> bytes:
    tensors = list(plan.hidden.values())
    if plan.weight_bits == FULL:
        return _pack_halves(plan.hidden)
    if plan.weight_bits == 1:
        signs = [binarise(tensor.detach(), scaled=False) > 0 for tensor in tensors]
        return pack_codes(_flat(signs), 1).tobytes()
    trits = [(ternarise(tensor.detach(), scaled=False) + 1).to(torch.uint8) for tensor in tensors]
    return pack_trits(_flat(trits))


def _unpack_weights(body: bytes, plan: Plan) -> dict[str, torch.Tensor]:
    """Hidden weights -1, 0 and 1, or their float16 values."""
    if plan.weight_bits == FULL:
        return _unpack_halves(body, plan.hidden)
    count = sum(tensor.numel() for tensor in plan.hidden.values())
    if plan.weight_bits == 1:
        codes = unpack_codes(np.frombuffer(body, dtype=np.uint8), bits=1, count=count)
        return _split(codes * np.float32(2) - np.float32(1), plan.hidden)
    return _split(unpack_trits(body, count) - np.float32(1), plan.hidden)


def _significant_bits(weight_OIHW: torch.Tensor) -> int:
    """Bits that an alpha may have so that the sum over its filter is exact in float32."""
    return _FLOAT32_BITS - int(weight_OIHW[0].numel()).bit_length()


def _code_alpha(plan: Plan) -> list[VectorCode]:
    codes = []
    quantiser = binarise if plan.weight_bits == 1 else ternarise
    for weight_OIHW in plan.hidden.values() if plan.alpha else ():
        alpha_O = quantiser(weight_OIHW.detach(), scaled=True).abs().amax(dim=(1, 2, 3))
        values_O = round_significant(alpha_O.cpu().numpy(), _significant_bits(weight_OIHW))
        # What follows a filter divides by its spread: relative errors are what matters.
        relative_O = np.where(values_O > 0, values_O, np.inf).astype(np.float64) ** -2
        codes.append(code_vector(values_O, bits=plan.bits, weights_N=relative_O))
    return codes


def _apply_alpha(body: bytes, plan: Plan, weights: dict[str, torch.Tensor]) -> None:
    vectors = unpack_vectors(body, plan.filters, plan.bits)
    for (name, like), alpha_O in zip(plan.hidden.items(), vectors, strict=True):
        rounded_O = torch.from_numpy(round_significant(alpha_O, _significant_bits(like)))
        weights[name] = weights[name] * rounded_O.view(-1, 1, 1, 1)


def _code_norms(plan: Plan) -> list[VectorCode]:
    codes = []
    for name, norm in plan.norms.items():
        values = norm.state_dict()
        gamma_C, beta_C, mean_C, variance_C = (
            values[key].cpu().numpy().astype(np.float64)
            for key in ("weight", "bias", "running_mean", "running_var")
        )
        if variance_C.min() < 0:
            raise UserError(f"network: '{name}running_var' has values below 0")
        scale_C = gamma_C / np.sqrt(variance_C + norm.eps)
        _check_float32(name, scale_C)
        scale = code_vector(scale_C, bits=plan.bits, weights_N=variance_C + norm.eps)
        shift_C = beta_C - mean_C * scale.values(plan.bits)
        _check_float32(name, shift_C)
        codes += [scale, code_vector(shift_C, bits=plan.bits)]
    return codes


def _check_float32(name: str, values: np.ndarray) -> None:
    if np.abs(values).max() > np.finfo(np.float32).max:
        raise UserError(f"network: '{name}' has a scale or shift too large for float32")


def _unpack_norms(body: bytes, plan: Plan) -> dict[str, torch.Tensor]:
    vectors = unpack_vectors(body, plan.channels, plan.bits)
    state = {}
    for index, (name, norm) in enumerate(plan.norms.items()):
        scale_C, shift_C = map(torch.from_numpy, vectors[2 * index : 2 * index + 2])
        state[f"{name}weight"], state[f"{name}bias"] = scale_C, shift_C
        state[f"{name}running_mean"] = torch.zeros_like(scale_C)
        state[f"{name}running_var"] = torch.full_like(scale_C, 1 - norm.eps)
    return state


@dataclass(frozen=True, kw_only=True, slots=True)
class Body:
    """The parts of a body by name, and how many values stand apart in two of them."""

    parts: dict[str, bytes]
    apart_alpha: int
    apart_norms: int


def encode_body(plan: Plan) -> Body:
    """The parts for the network of `plan`. Raises UserError if its values cannot be held."""
    alpha, norms = _code_alpha(plan), _code_norms(plan)
    return Body(
        parts={
            "weights": _pack_weights(plan),
            "alpha": pack_vectors(alpha, plan.bits),
            "batchnorm": pack_vectors(norms, plan.bits),
            "end_layers": _pack_halves(plan.others),
        },
        apart_alpha=sum(code.apart_M.size for code in alpha),
        apart_norms=sum(code.apart_M.size for code in norms),
    )


def decode_body(body: bytes, lengths: Mapping[str, int], plan: Plan) -> dict[str, torch.Tensor]:
    """The state of the network of `plan` from a body whose parts have these lengths.

    Raises:
        ValueError: the body's values are none that `encode_body` writes.
    """
    parts, start = {}, 0
    for name, length in lengths.items():
        parts[name] = body[start : start + length]
        start += length
    state = _unpack_weights(parts["weights"], plan)
    if plan.alpha:
        _apply_alpha(parts["alpha"], plan, state)
    state |= _unpack_norms(parts["batchnorm"], plan)
    state |= _unpack_halves(parts["end_layers"], plan.others)
    for name, tensor in state.items():
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"'{name}' has values that are not finite")
    return state
