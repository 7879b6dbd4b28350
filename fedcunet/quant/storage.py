"""Networks whose training step holds packed sources and little else between its two passes.

The whole forward pass is one node of autograd: `loss.backward()` on the heatmaps runs the stages
backwards (`tape.py`) and gives every parameter its gradient, so optimisers and hooks on
parameters work as ever. Evaluation goes through the plain layers.

Shapes: B batch, S input side, K landmarks, H W the sides of a heatmap.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fedcunet.errors import UserError
from fedcunet.models import DUNet, IterativeRefinement, StackedHourglass
from fedcunet.models.blocks import check_sides
from fedcunet.quant.collector import Update
from fedcunet.quant.layers import QuantConv2d, QuantSpec
from fedcunet.quant.programs import run
from fedcunet.quant.rounding import Rounding
from fedcunet.quant.tape import Tape

_MODULE_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_PARAMETER_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")


class Stored(nn.Module):
    """A network that stores only its sources from the forward to the backward pass.

    With sources quantised (`input_quantizer = "source"`) they are packed codes; otherwise they
    are floats, and only the recomputation saves memory. No gradient is given to the image.

    Attributes:
        packed: False stores the same codes as floats: the reference for tests.
        frugal: more is computed again, and quantised gradients wait in codes.
        update: takes each parameter's gradient as soon as it is whole; None: autograd has them.
        rounding: the random numbers of all stochastic rounding.
    """

    packed: bool
    frugal: bool
    update: Update | None
    rounding: Rounding
    spec: QuantSpec

    def forward(self, image_B3SS: Tensor) -> list[Tensor]:
        """As the plain network's."""
        if not (self.training and torch.is_grad_enabled()):
            heatmaps: list[Tensor] = super().forward(image_B3SS)
            return heatmaps
        check_sides(image_B3SS)
        if image_B3SS.requires_grad:
            raise UserError("packed storage: gradients of the image are not computed")
        self._check_layers()
        self._check_parameters()
        if self.update is not None and _is_one_of_many():
            raise UserError(
                "quant.storage: expected packed or float32 where several processes train together, "
                "for frugal steps each weight before gradients could be averaged"
            )
        return list(StoredPass.apply(self, image_B3SS, *self.parameters()))  # type: ignore[no-untyped-call]

    def _check_layers(self) -> None:
        """Refuses what plain layers would do in a training step and stages would leave out."""
        for name, module in self.named_modules():
            if module is not self and any(getattr(module, kind) for kind in _MODULE_HOOKS):
                raise UserError(
                    f"packed storage: expected no hooks on layers, which run as stages in "
                    f"training, found one on {name}"
                )

    def _check_parameters(self) -> None:
        """Refuses hooks on gradients that never get to the parameters."""
        if self.update is None:
            return
        for name, parameter in self.named_parameters():
            if any(getattr(parameter, kind) for kind in _PARAMETER_HOOKS):
                raise UserError(
                    "quant.storage: expected packed or float32 with hooks on parameters, for "
                    f"frugal steps each weight as its gradient appears, found one on {name}"
                )

    def record(self, image_B3SS: Tensor) -> Tape:
        """The forward pass of a training step, ready to run backwards."""
        tape = Tape(
            image_B3SS.detach(),
            like=next(self.buffers()),
            spec=self.spec,
            rounding=self.rounding,
            packed=self.packed,
            frugal=self.frugal,
            update=self.update,
        )
        run(tape, self)
        return tape


def _is_one_of_many() -> bool:
    distributed = torch.distributed
    return (
        distributed.is_available()
        and distributed.is_initialized()
        and distributed.get_world_size() > 1
    )


class StoredDUNet(Stored, DUNet):
    """A DU-Net."""


class StoredHourglass(Stored, StackedHourglass):
    """Stacked U-Nets."""


class StoredRefinement(Stored, IterativeRefinement):
    """Iterative refinement of either."""


_FORMS: dict[type[nn.Module], type[Stored]] = {
    DUNet: StoredDUNet,
    StackedHourglass: StoredHourglass,
    IterativeRefinement: StoredRefinement,
}


def store(model: nn.Module, *, packed: bool = True, frugal: bool = False) -> Stored:
    """A network that shares everything with `model`, quantised or not.

    Args:
        model: its layers and parameters are used as they are.
        packed: False stores the same codes as floats: the reference for tests.
        frugal: see `Stored`.
    """
    form = _FORMS[type(model)]
    stored = form.__new__(form)
    stored.__dict__.update(model.__dict__)
    stored.packed, stored.frugal, stored.update = packed, frugal, None
    convolutions = [module for module in model.modules() if isinstance(module, QuantConv2d)]
    stored.rounding = convolutions[0].rounding if convolutions else Rounding()
    stored.spec = convolutions[0].spec if convolutions else QuantSpec()
    return stored


class StoredPass(torch.autograd.Function):
    """All of a `Stored` network, from image and parameters to heatmaps."""

    @staticmethod
    def forward(
        ctx: Any, model: Stored, image_B3SS: Tensor, *parameters: nn.Parameter
    ) -> tuple[Tensor, ...]:
        ctx.tape = tape = model.record(image_B3SS)
        ctx.parameters = parameters
        heatmaps = tape.heatmaps()
        tape.keep_no_heatmaps()
        return heatmaps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *heatmap_gradients: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.tape is None:
            raise RuntimeError("packed storage: the backward pass of a step can run only once")
        tape, ctx.tape = ctx.tape, None
        gradients = tape.backward(list(heatmap_gradients))
        return None, None, *(gradients.pop(parameter, None) for parameter in ctx.parameters)
