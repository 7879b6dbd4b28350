"""Sizes and times of networks, counted and measured."""

import functools
import time

import torch
from torch import nn

from fedcunet.config import ModelConfig, RunConfig
from fedcunet.data import LandmarkScheme
from fedcunet.models.dunet import convolution_parameters
from fedcunet.training.checkpoint import float32_bytes
from fedcunet.training.network import make_network
from fedcunet.training.packed import pack_network


def parameter_counts(network: nn.Module) -> tuple[int, int, int]:
    """Convolution parameters, all parameters, and bytes of the state in float32."""
    return (
        convolution_parameters(network),
        sum(parameter.numel() for parameter in network.parameters()),
        float32_bytes(network),
    )


@functools.cache
def counts_of(model: ModelConfig, num_landmarks: int) -> tuple[int, int, int]:
    """`parameter_counts` of a network that takes no memory: no weights are drawn."""
    with torch.device("meta"):
        return parameter_counts(make_network(model, num_landmarks))


def exported_bytes(network: nn.Module, config: RunConfig, scheme: LandmarkScheme) -> int:
    """Length of the file of `fedcunet export`, everything counted.

    Weights that the setting does not quantise take float16 in it; `model_bytes`, which a run is
    judged by, has them in float32.
    """
    return len(pack_network(network, config, scheme).content)


@torch.no_grad()
def forward_seconds(
    network: nn.Module, size: int, *, batch_size: int = 8, repeats: int = 3
) -> float:
    """Seconds an image of a forward pass, the shortest of `repeats`."""
    was_training = network.training
    network.eval()
    generator = torch.Generator().manual_seed(0)
    images_B3SS = torch.rand(batch_size, 3, size, size, generator=generator)
    images_B3SS = images_B3SS.to(memory_format=torch.channels_last)
    network(images_B3SS)
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        network(images_B3SS)
        seconds.append(time.perf_counter() - begin)
    network.train(was_training)
    return min(seconds) / batch_size
