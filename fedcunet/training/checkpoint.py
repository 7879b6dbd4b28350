"""Networks in safetensors files, with the setting that they belong to."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from fedcunet.config import RunConfig
from fedcunet.data import SCHEMES, LandmarkScheme
from fedcunet.errors import UserError
from fedcunet.files import write_atomically
from fedcunet.quant.layers import FULL
from fedcunet.training.network import build_network, state_tensors
from fedcunet.training.packed import is_packed, pack_network, read_packed, unpack_network

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
    tensors = {
        name: tensor.detach().float().contiguous() for name, tensor in state_tensors(model).items()
    }
    metadata = {
        "format": FORMAT,
        "config": json.dumps(config.nested()),
        "scheme": scheme.name,
        "facts": json.dumps(dict(facts or {})),
    }
    write_atomically(path, _in_order(save(tensors, metadata)))


def _in_order(content: bytes) -> bytes:
    """A safetensors file whose metadata, which safetensors writes in any order, stand in theirs.

    So the same network is the same file. Format: https://huggingface.co/docs/safetensors.
    """
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[end:]


def load_checkpoint(path: Path) -> Checkpoint:
    """Reads a file of `save_checkpoint`, or a packed network; UserError if it is neither."""
    if path.is_dir():
        raise UserError(f"checkpoint {path}: expected a file, found a folder")
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
    setting, facts = (_table(metadata, key, path) for key in ("config", "facts"))
    config = RunConfig.from_nested(setting, f"checkpoint {path}")
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
    return Checkpoint(model=model, config=config, scheme=scheme, facts=facts)


def _table(metadata: Mapping[str, str], key: str, path: Path) -> dict[str, Any]:
    """The JSON object under `key` of a checkpoint's metadata."""
    try:
        value = json.loads(metadata[key])
    except (KeyError, ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        found = repr(metadata[key][:40]) if key in metadata else "nothing"
        raise UserError(f"checkpoint {path}: expected a JSON object as its {key}, found {found}")
    return value


def tensors_sha256(model: nn.Module) -> str:
    """SHA-256 of the state's names, shapes and little-endian bytes, in name order."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state_tensors(model).items()):
        values = np.ascontiguousarray(tensor.detach().float().cpu().numpy(), dtype="<f4")
        digest.update(f"{name} {list(values.shape)}\n".encode())
        digest.update(values.tobytes())
    return digest.hexdigest()


def float32_bytes(model: nn.Module) -> int:
    """Bytes of the network's state in float32."""
    return 4 * sum(tensor.numel() for tensor in state_tensors(model).values())


def model_bytes(model: nn.Module, config: RunConfig, scheme: LandmarkScheme) -> int:
    """Bytes of the network for inference: the length of the file that `fedcunet export` packs.

    Quantised weights at 1 or 1.6 bits, alpha and BatchNorm at 8, first and last convolutions in
    float16, header and setting counted. Where the setting does not quantise the weights, it is
    the float32 state: smaller floats would be a quantisation that the setting does not name.

    Raises:
        UserError: values of the network are not finite, or too large for float16.
    """
    if config.quant.spec().weight_bits == FULL:
        return float32_bytes(model)
    return len(pack_network(model, config, scheme).content)


def to_device(model: nn.Module, device: str) -> nn.Module:
    """Moves the model; raises UserError if the device is not there or holds no values."""
    try:
        if torch.device(device).type == "meta":
            raise RuntimeError("expected one that computes")
        return model.to(torch.device(device))
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {device}: {error}") from None
