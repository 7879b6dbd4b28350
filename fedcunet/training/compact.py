"""Optimisers whose state takes 8 bits a value, and which step a parameter at a time.

A second moment spans many orders of magnitude, and changes by a hundredth or a thousandth of
itself in a step: it is kept on a logarithmic grid, with one scale for each block of values, and
rounded stochastically between its neighbours on the grid, so that it follows in the mean. Momentum
is kept in the same way with a sign. Dettmers et al., "8-bit Optimizers via Block-wise
Quantization", ICLR 2022 (arXiv 2110.02861), have blocks, 8 bits, and float32 for small tensors;
their grid has other steps, and they round to the nearest.

N values of a parameter, M of them in a block.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fedcunet.quant.rounding import Rounding
from fedcunet.quant.storage import Stored

BLOCK = 256  # values with one scale, M
SMALLEST_CODED = 4096  # parameters with fewer values keep their state in float32
UNSIGNED_STEPS, SIGNED_STEPS = 8, 6  # codes for a factor of two


class LogarithmicCodes:
    """Values as codes of 8 bits and a float32 scale a block; 0 is a code of its own.

    Args:
        signed: 127 sizes and a sign, over 21 powers of two; else 255 sizes over 31.
    """

    def __init__(self, *, signed: bool) -> None:
        self.signed = signed
        self.levels, self.steps = (127, SIGNED_STEPS) if signed else (255, UNSIGNED_STEPS)
        self.dtype = torch.int8 if signed else torch.uint8

    def encode(self, values_N: Tensor, rounding: Rounding) -> tuple[Tensor, Tensor]:
        """Codes and scales of the blocks; without bias, where there is a sign or no underflow.

        What is smaller than the smallest size is, without a sign, raised to it: a second moment
        must not vanish under a gradient that does not. One that overflowed stays the largest
        number: the gradients of very deep networks begin so.
        """
        if not self.signed:  # the square of a large gradient, which has no code as infinity
            values_N = values_N.clamp(max=torch.finfo(values_N.dtype).max)
        blocks, count = _blocks(values_N)
        scale_R1 = blocks.abs().amax(1, keepdim=True)
        safe_R1 = torch.where(scale_R1 > 0, scale_R1, torch.ones_like(scale_R1))
        share = blocks.abs() / safe_R1
        lower = share.log2().mul_(self.steps).add_(self.levels).floor_().clamp_(1, self.levels)
        ratio = share / ((lower - self.levels) / self.steps).exp2_()
        # Between two sizes; under the smallest, between 0 and it.
        fraction = (ratio - 1) / (2 ** (1 / self.steps) - 1)
        under = ratio < 1 - 1e-5
        fraction = torch.where(under, ratio if self.signed else torch.ones_like(ratio), fraction)
        code = lower - under.to(lower.dtype) + (_uniform(fraction, rounding) < fraction)
        code = torch.where(share == 0, torch.zeros_like(code), code.clamp_(max=self.levels))
        if self.signed:
            code = torch.copysign(code, blocks)
        return code.to(self.dtype).flatten()[:count], scale_R1.flatten()

    def decode(self, codes_N: Tensor, scales: Tensor) -> Tensor:
        """The values (N,), float32."""
        codes, count = _blocks(codes_N)
        size = codes.to(torch.float32).abs_()
        values = ((size - self.levels) / self.steps).exp2_().mul_(scales[:, None])
        values.mul_(size > 0)
        if self.signed:
            values = torch.copysign(values, codes.to(torch.float32))
        return values.flatten()[:count]


SIGNED, UNSIGNED = LogarithmicCodes(signed=True), LogarithmicCodes(signed=False)


def _blocks(values_N: Tensor) -> tuple[Tensor, int]:
    """(blocks, M), the last one filled up with zeros, and the number of values."""
    count = len(values_N)
    missing = -count % BLOCK
    if missing:
        values_N = torch.cat([values_N, values_N.new_zeros(missing)])
    return values_N.view(-1, BLOCK), count


def _uniform(like: Tensor, rounding: Rounding) -> Tensor:
    """Numbers (i + 0.5) / 256 with random bytes i."""
    words = torch.empty(-(-like.numel() // 4), dtype=torch.int32, device=like.device)
    rounding.fill(words)
    numbers = words.view(torch.uint8)[: like.numel()].view(like.shape)
    return numbers.to(like.dtype).add_(0.5).mul_(1 / 256)


class _State:
    """The state of one parameter in an optimiser's table, in codes or, if small, as it is."""

    def __init__(self, table: dict[str, Any], like: Tensor, rounding: Rounding) -> None:
        self.table, self.like, self.rounding = table, like, rounding
        self.is_coded = like.numel() >= SMALLEST_CODED

    def read(self, name: str, codes: LogarithmicCodes) -> Tensor:
        """The values (N,), zeros where there are none yet."""
        if name in self.table:
            values: Tensor = self.table[name]
            return values.float() if values.is_floating_point() else self._decoded(name, codes)
        return torch.zeros(self.like.numel(), device=self.like.device)

    def _decoded(self, name: str, codes: LogarithmicCodes) -> Tensor:
        return codes.decode(self.table[name], self.table[f"{name}_scales"])

    def write(self, name: str, codes: LogarithmicCodes, values_N: Tensor) -> None:
        """Keeps the values (N,)."""
        if self.is_coded:
            coded = codes.encode(values_N, self.rounding)
            self.table[name], self.table[f"{name}_scales"] = coded
        else:
            self.table[name] = values_N

    def count_step(self) -> int:
        """Steps made, this one included."""
        step = int(self.table.get("step", 0)) + 1
        self.table["step"] = torch.tensor(float(step))
        return step


Rule = Callable[[Tensor, Tensor, _State, float], None]


def _rmsprop(weight_N: Tensor, gradient_N: Tensor, state: _State, rate: float) -> None:
    """Decay 0.99, eps 1e-8, no momentum: as torch.optim.RMSprop."""
    square_N = state.read("square", UNSIGNED).mul_(0.99)
    square_N.addcmul_(gradient_N, gradient_N, value=0.01)
    state.count_step()
    weight_N.addcdiv_(gradient_N, square_N.sqrt().add_(1e-8), value=-rate)
    state.write("square", UNSIGNED, square_N)


def _sgd(weight_N: Tensor, gradient_N: Tensor, state: _State, rate: float) -> None:
    """Momentum 0.9: as torch.optim.SGD."""
    momentum_N = state.read("momentum", SIGNED).mul_(0.9).add_(gradient_N)
    weight_N.sub_(momentum_N, alpha=rate)
    state.write("momentum", SIGNED, momentum_N)


def _adam(weight_N: Tensor, gradient_N: Tensor, state: _State, rate: float) -> None:
    """Decays 0.9 and 0.99, eps 1e-8: else as torch.optim.Adam."""
    step = state.count_step()
    mean_N = state.read("mean", SIGNED).lerp_(gradient_N, 0.1)
    square_N = state.read("square", UNSIGNED).mul_(0.99)
    square_N.addcmul_(gradient_N, gradient_N, value=0.01)
    divisor_N = (square_N / (1 - 0.99**step)).sqrt_().add_(1e-8)
    weight_N.addcdiv_(mean_N, divisor_N, value=-rate / (1 - 0.9**step))
    state.write("mean", SIGNED, mean_N)
    state.write("square", UNSIGNED, square_N)


RULES: dict[str, Rule] = {"rmsprop": _rmsprop, "sgd": _sgd, "adam": _adam}


class CompactOptimizer(torch.optim.Optimizer):
    """Steps each parameter in the backward pass of its network, as soon as its gradient is whole.

    Args:
        model: of frugal storage; it is told to hand its gradients over.
        groups: its parameters, as torch's optimisers take them.
        name: of `RULES`, with the constants that `OPTIMIZERS` has.
    """

    def __init__(self, model: Stored, groups: list[dict[str, Any]], name: str) -> None:
        super().__init__(groups, {"lr": 1e-3})
        self._place = {one: i for i, group in enumerate(groups) for one in group["params"]}
        self._rule, self._rounding = RULES[name], model.rounding
        model.update = self.apply

    @torch.no_grad()
    def apply(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        """The step of one parameter."""
        # The state lies as the parameter does in memory.
        kept_N, gradient_N = _flat(parameter), _flat(_laid_out(gradient, parameter))
        weight_N = kept_N.float() if kept_N.dtype == torch.bfloat16 else kept_N
        state = _State(self.state[parameter], parameter, self._rounding)
        rate = self.param_groups[self._place[parameter]]["lr"]
        self._rule(weight_N, gradient_N, state, rate)
        if kept_N.dtype == torch.bfloat16:
            kept_N.copy_(_to_bfloat16(weight_N, self._rounding))

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Steps what has a gradient: after a frugal backward pass, nothing."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.apply(parameter, parameter.grad)


def _laid_out(gradient: Tensor, parameter: Tensor) -> Tensor:
    if gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter, dtype=gradient.dtype).copy_(gradient)


def _to_bfloat16(values_N: Tensor, rounding: Rounding) -> Tensor:
    """Values that bfloat16 holds, rounded stochastically: updates far under its steps count."""
    words_N = torch.empty(len(values_N), dtype=torch.int32, device=values_N.device)
    rounding.fill(words_N)
    # The lower half of a float32 is what bfloat16 lacks; a carry goes into the upper half.
    bits_N = values_N.view(torch.int32) + words_N.bitwise_and_(0xFFFF)
    return bits_N.bitwise_and_(-0x10000).view(torch.float32)


def _flat(dense: Tensor) -> Tensor:
    """All values in the order of memory; a view."""
    return dense.detach().as_strided((dense.numel(),), (1,))
