"""From a setting to a network, and between a network and one vector of its state."""

import numpy as np
import torch
from torch import nn

from fedcunet.config import ModelConfig, RunConfig
from fedcunet.layout import Layout
from fedcunet.models import DUNet, IterativeRefinement, StackedHourglass
from fedcunet.quant.layers import quantise_network, quantised_weights
from fedcunet.quant.storage import store
from fedcunet.variances import VARIANCE_SUFFIX, to_logarithms, to_variances

COUNTER = "num_batches_tracked"  # BatchNorm's only state that is no measurement


def make_network(model: ModelConfig, num_landmarks: int) -> nn.Module:
    """The network in float, its weights drawn from torch's generator and on its default device."""
    network: DUNet | StackedHourglass
    if model.kind == "stacked":
        network = StackedHourglass(
            model.unets,
            num_landmarks,
            num_supervisions=model.supervisions or None,
            supervision=model.supervision,
        )
    else:
        network = DUNet(
            model.unets,
            model.order,
            num_landmarks,
            num_supervisions=model.supervisions or None,
            supervision=model.supervision,
        )
    if model.iterative:
        return IterativeRefinement(network, model.refined_supervision)
    return network


def build_network(config: RunConfig, num_landmarks: int) -> nn.Module:
    """The setting's network with weights that follow from its seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = make_network(config.model, num_landmarks)
    quantise_network(model, config.quant.spec())
    if config.quant.latent == "bfloat16":
        for weight in quantised_weights(model):
            weight.data = weight.data.bfloat16()
    # The layout in which oneDNN and cuDNN convolve fastest; values do not change.
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if config.quant.storage == "float32":
        return model
    return store(model, frugal=config.quant.storage == "frugal")


def state_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and BatchNorm statistics by name, in the model's order; no copies."""
    return {
        name: tensor for name, tensor in model.state_dict().items() if not name.endswith(COUNTER)
    }


def network_layout(model: nn.Module) -> Layout:
    """How the state of `model` lies in one vector.

    Fine are BatchNorm's tensors and the first and last convolutions, which are not quantised.
    """
    ends = set(model.end_layers())  # type: ignore[operator]
    names_shapes = {name: tuple(tensor.shape) for name, tensor in state_tensors(model).items()}
    fine = {
        name
        for name, shape in names_shapes.items()
        if len(shape) != 4 or name.rpartition(".")[0] in ends
    }
    return Layout.from_tensors(names_shapes, fine)


def get_vector(model: nn.Module) -> np.ndarray:
    """The whole state as float32, in the order of `network_layout`; variances as logarithms."""
    parts = []
    for name, tensor in state_tensors(model).items():
        # reshape(-1) reads in the logical order, whatever the memory format.
        flat = tensor.detach().reshape(-1).float().cpu().numpy()
        parts.append(to_logarithms(flat) if name.endswith(VARIANCE_SUFFIX) else flat)
    return np.concatenate(parts)


@torch.no_grad()
def set_vector(model: nn.Module, vector: np.ndarray) -> None:
    """Puts a vector of `get_vector` into `model`."""
    position = 0
    for name, tensor in state_tensors(model).items():
        part = vector[position : position + tensor.numel()]
        if name.endswith(VARIANCE_SUFFIX):
            part = to_variances(part)
        tensor.copy_(torch.from_numpy(part).view(tensor.shape))
        position += tensor.numel()
    if position != len(vector):
        raise ValueError(f"the network has {position} values, the vector {len(vector)}")
