"""What an attacker does, for simulations that show what aggregation withstands.

A simulation writes the attack into the node config of the virtual clients it has chosen. Nothing
that comes over the network can make a client attack: messages are not asked, and a machine with
data of its own (`python -m clients join`) does not obey its node config either.

The attacks, on the whole update, BatchNorm statistics too:

- `sign-flip`: the update times -1, so that the model is led back;
- `scaled`: the update times `SCALE`, which outweighs honest ones (Bagdasaryan et al., "How To
  Backdoor Federated Learning", AISTATS 2020, section 4.2, with a factor chosen by us);
- `label-shift`: trains honestly on wrong targets: each landmark is shown where another one is;
- `nan`: honest training, and a payload of the right form, length and checksum whose bodies are all
  ones in binary. For float32 and float16 these are NaN in every value; codecs with scales read
  scales that are NaN or (`linear`) huge, those with an entropy coder bytes that no encoder writes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from fedcunet.data.augmentation import Augmentation
from fedcunet.data.crops import CropBatch, Crops, CropSubset
from fedcunet.expected import CHECKSUM_BYTES, HEADER_BYTES
from fedcunet.payload_header import checksum

ATTACK_KEY = "attack"  # of a virtual client's node config
SCALE = 10.0
FACTORS = {"sign-flip": -1.0, "scaled": SCALE}


def attack_of(node_config: Mapping[str, bool | int | float | str]) -> str:
    """The attack of a virtual client; `none` for honest ones and for every real client."""
    if "data.name" in node_config:  # a machine with data of its own
        return "none"
    return str(node_config.get(ATTACK_KEY, "none"))


def training_crops(attack: str, crops: Crops, members: Sequence[int]) -> CropSubset:
    """What the client trains on: its own crops, the attacker of labels with wrong ones."""
    return (ShiftedCrops if attack == "label-shift" else CropSubset)(crops, members)


def hostile_update(attack: str, update_N: np.ndarray) -> np.ndarray:
    """What the attacker codes in the place of its update."""
    return (FACTORS[attack] * update_N).astype(np.float32) if attack in FACTORS else update_N


def hostile_payload(attack: str, payload: bytes) -> bytes:
    """What the attacker sends in the place of its payload."""
    if attack != "nan":
        return payload
    content = payload[:HEADER_BYTES].ljust(len(payload) - CHECKSUM_BYTES, b"\xff")
    return content + checksum(content)


class ShiftedCrops(CropSubset):
    """Crops whose K landmarks have moved on by half of K: each is shown where another one is."""

    def batch(
        self,
        indices: Sequence[int],
        *,
        augmentation: Augmentation | None = None,
        generator: np.random.Generator | None = None,
    ) -> CropBatch:
        """As `CropSubset.batch`, with wrong labels."""
        batch = super().batch(indices, augmentation=augmentation, generator=generator)
        shift = max(1, batch.points_BK2.shape[1] // 2)
        return replace(
            batch,
            points_BK2=batch.points_BK2.roll(shift, dims=1),
            labelled_BK=batch.labelled_BK.roll(shift, dims=1),
        )
