"""Networks in safetensors files, with the setting that they belong to."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from fedcunet.config import RunConfig
from fedcunet.data import SCHEMES, LandmarkScheme
from fedcunet.errors import UserError
from fedcunet.files import write_atomically
from fedcunet.training.network import build_network, state_tensors
from fedcunet.training.packed import is_packed, read_packed, unpack_network

FORMAT = "fedcunet.checkpoint.v1"


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A network as loaded from a file."""

    model: nn.Module
    config: RunConfig
    scheme: LandmarkScheme
    facts: dict[str, str]  # whatever else was saved with it, such as the epoch


def save_checkpoint(
    path: Path,
    model: nn.Module,
    config: RunConfig,
    scheme: LandmarkScheme,
    facts: Mapping[str, str] | None = None,
) -> None:
    """Writes the network's state in float32 and its setting, atomically."""
    tensors = {name: tensor.detach().contiguous() for name, tensor in state_tensors(model).items()}
    metadata = {
        "format": FORMAT,
        "config": json.dumps(config.nested()),
        "scheme": scheme.name,
        "facts": json.dumps(dict(facts or {})),
    }
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata))


def load_checkpoint(path: Path) -> Checkpoint:
    """Reads a file of `save_checkpoint`, or a packed network; UserError if it is neither."""
    if is_packed(path):
        where = f"packed network {path}"
        unpacked = unpack_network(read_packed(path, where), where)
        return Checkpoint(
            model=unpacked.model,
            config=unpacked.config,
            scheme=unpacked.scheme,
            facts=unpacked.facts,
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise UserError(f"checkpoint {path}: not found") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"checkpoint {path}: not a safetensors file ({error})") from None
    if metadata.get("format") != FORMAT or metadata.get("scheme") not in SCHEMES:
        raise UserError(f"checkpoint {path}: expected format {FORMAT}, found other metadata")
    config = RunConfig.from_nested(json.loads(metadata["config"]), f"checkpoint {path}")
    scheme = SCHEMES[metadata["scheme"]]
    model = build_network(config, scheme.num_landmarks)
    expected = {name: tuple(tensor.shape) for name, tensor in state_tensors(model).items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if expected != found:
        wrong = sorted(set(expected.items()) ^ set(found.items()))[0]
        raise UserError(
            f"checkpoint {path}: its tensors are not those of its setting, first {wrong}"
        )
    model.load_state_dict(tensors, strict=False)
    return Checkpoint(
        model=model, config=config, scheme=scheme, facts=json.loads(metadata["facts"])
    )


def tensors_sha256(model: nn.Module) -> str:
    """SHA-256 of the state's names, shapes and little-endian bytes, in name order."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state_tensors(model).items()):
        values = np.ascontiguousarray(tensor.detach().cpu().numpy(), dtype="<f4")
        digest.update(f"{name} {list(values.shape)}\n".encode())
        digest.update(values.tobytes())
    return digest.hexdigest()


def model_bytes(model: nn.Module, weight_bits: int, alpha: bool) -> int:
    """Bytes of the network at its weight bits: what inference needs, counted from its tensors.

    Quantised weights take `weight_bits` (and alpha 16 bits a filter), the first and last
    convolutions and BatchNorm 32 bits. At 32 weight bits this is the float32 state.
    """
    ends = set(model.end_layers())  # type: ignore[operator]
    bits = 0
    for name, tensor in state_tensors(model).items():
        quantised = tensor.dim() == 4 and name.rpartition(".")[0] not in ends and weight_bits != 32
        bits += tensor.numel() * (weight_bits if quantised else 32)
        bits += tensor.shape[0] * 16 if quantised and alpha else 0
    return (bits + 7) // 8


def to_device(model: nn.Module, device: str) -> nn.Module:
    """Moves the model; raises UserError if the device is not there."""
    try:
        return model.to(torch.device(device))
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {device}: {error}") from None
