"""What this machine has for a run, looked at before it joins anything."""

from dataclasses import dataclass
from pathlib import Path

from fedcunet.config import DataConfig
from fedcunet.data import DATASETS, load
from fedcunet.errors import UserError
from fedcunet.measured import free_memory_bytes

IMAGES_SHARE = 4  # one part in so many of the memory is for images


@dataclass(frozen=True, kw_only=True, slots=True)
class Offer:
    """What a node says of itself.

    Attributes:
        data: name of the data set.
        root: its folder.
        num_images: in its training subset, all parts together.
        device: name of the device profile.
        part: which part of shared images is this node's, of how many; None for images of its own.
        memory_bytes: what training may take, None for what is free when it is asked.
        folder: the node's own.
    """

    data: str
    root: Path
    num_images: int
    device: str
    part: tuple[int, int] | None
    memory_bytes: int | None
    folder: Path

    @classmethod
    def of_machine(
        cls,
        *,
        data: str,
        root: Path,
        device: str,
        part: int | None,
        parts: int | None,
        memory: int | None,
        folder: Path,
    ) -> "Offer":
        """Reads the data set as a run would.

        Args:
            data: name of the data set.
            root: its folder.
            device: name of the device profile.
            part: which part of shared images.
            parts: of how many.
            memory: megabytes for training.
            folder: the node's own.

        Raises:
            UserError: there are no images, or the part is none.
        """
        if (part is None) != (parts is None):
            raise UserError("--partition-id and --num-partitions: expected both or none")
        if part is not None and parts is not None and part >= parts:
            raise UserError(f"--partition-id {part}: expected 0 to {parts - 1}")
        if data not in DATASETS:
            raise UserError(f"--data: expected one of {', '.join(DATASETS)}, found '{data}'")
        subset = DataConfig().train_subset
        num_images = len(load(data, str(root), subset).annotations)
        if not num_images:
            raise UserError(f"--root {root}: subset '{subset}' has no images")
        return cls(
            data=data,
            root=root.resolve(),
            num_images=num_images,
            device=device,
            part=None if part is None or parts is None else (part, parts),
            memory_bytes=None if memory is None else memory * 10**6,
            folder=folder.resolve(),
        )

    @property
    def state_folder(self) -> Path:
        """What the client keeps between rounds."""
        return self.folder / "state"

    def words(self) -> str:
        """One line for people."""
        of = "" if self.part is None else f", part {self.part[0]} of {self.part[1]} of them"
        return (
            f"{self.num_images} images of {self.data}{of}, {self._memory() / 1e6:.0f} MB of "
            f"memory, device {self.device}"
        )

    def _memory(self) -> int:
        """Bytes that were given, or are free now."""
        return free_memory_bytes() if self.memory_bytes is None else self.memory_bytes

    def node_config(self) -> dict[str, str | int]:
        """What the client app finds in its node's config."""
        values: dict[str, str | int] = {
            "data.name": self.data,
            "data.root": str(self.root),
            "data.cache-dir": str(self.folder / "crops"),
            "federation.state-dir": str(self.state_folder),
            "federation.measured-dir": str(self.folder / "measured"),
            "device": self.device,
        }
        if self.part is not None:
            values |= {"partition-id": self.part[0], "num-partitions": self.part[1]}
        if self.memory_bytes is not None:
            values["memory-bytes"] = self.memory_bytes
        images = min(DataConfig().cache_bytes, self._memory() // IMAGES_SHARE)
        return values | {"data.cache-bytes": images}
