"""What a run keeps on disk to go on from: tensors and facts of its parts, in one atomic file."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from fedcunet.errors import UserError
from fedcunet.files import write_atomically

FACTS = "facts"


@dataclass(frozen=True, slots=True)
class Saved:
    """One part: tensors by name, and facts that JSON can hold."""

    tensors: Mapping[str, np.ndarray] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)


def write_saved(path: Path, parts: Mapping[str, Saved]) -> None:
    """Replaces the file at `path`. Raises OSError if it cannot be written; the old one stays."""
    tensors = {
        f"{part}/{name}": np.ascontiguousarray(tensor)
        for part, saved in parts.items()
        for name, tensor in saved.tensors.items()
    }
    facts = {FACTS: json.dumps({part: saved.facts for part, saved in parts.items()})}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, facts))


def read_saved(path: Path) -> dict[str, Saved]:
    """The parts that were written. Raises UserError if the file is damaged or cannot be read."""
    try:
        with safe_open(path, framework="np") as file:
            facts = json.loads((file.metadata() or {})[FACTS])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"{path}: expected the state of a run, found {error}") from None
    return {
        part: Saved(
            {
                name.removeprefix(f"{part}/"): tensor
                for name, tensor in tensors.items()
                if name.startswith(f"{part}/")
            },
            values,
        )
        for part, values in facts.items()
    }
