"""Small networks: the setting of one; those in float64, a batch for them, and their gradients."""

import torch
from torch import Tensor, nn

from fedcunet.config import RunConfig
from fedcunet.models import DUNet
from fedcunet.quant import QuantSpec, quantise_network

SMALL = RunConfig().replace(
    model__unets=1,
    model__order=0,
    quant__bits="8,1,8",
    quant__alpha=True,
    training__batch_size=4,
    training__learning_rate=1e-3,
    training__epochs=2,
)
SOURCE_818 = QuantSpec(
    input_bits=8, weight_bits=1, gradient_bits=8, alpha=True, input_quantizer="source"
)


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


def batch(size: int, height: int = 64, width: int = 64, *, seed: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
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
