"""What a client keeps between rounds: the residual of its error feedback, and its model.

The client cannot know whether its update was taken: the reply may be late, refused, or the round
abandoned. So it keeps two residuals, the one before its last update and the one after, and the
next message's acknowledgement (the last round in which an update of this client was accepted)
says which of them holds. The model is kept with its id, which says whether differences apply to
it. A file that is lost or damaged costs the residual or a snapshot, never correctness.
"""

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from fedcunet.downlink import Visible
from fedcunet.files import write_atomically


@dataclass(frozen=True, kw_only=True, slots=True)
class ClientState:
    """The files of one client in one run.

    Attributes:
        folder: where the clients of this machine keep their state.
        token: names the run; residuals of another run are never read.
        client: stable id.
    """

    folder: Path
    token: str
    client: int

    @property
    def path(self) -> Path:
        """Of the residual: `FOLDER/TOKEN/client-000003.safetensors`."""
        return self.folder / self.token / f"client-{self.client:06d}.safetensors"

    @property
    def model_path(self) -> Path:
        """Of the model: `FOLDER/TOKEN/model-000003.safetensors`."""
        return self.folder / self.token / f"model-{self.client:06d}.safetensors"

    def visible(self, length: int) -> Visible | None:
        """The model (length,), float32, that is kept, None where there is none."""
        try:
            with safe_open(self.model_path, framework="np") as file:
                model_id = bytes.fromhex((file.metadata() or {})["id"])
                state_N: np.ndarray = file.get_tensor("state")
        except (OSError, SafetensorError, KeyError, ValueError):
            return None
        fits = state_N.shape == (length,) and bool(np.isfinite(state_N).all())
        return Visible(model_id, state_N) if fits else None

    def keep_visible(self, visible: Visible) -> None:
        """Replaces the model, atomically."""
        tensors, metadata = {"state": visible.state_N}, {"id": visible.model_id.hex()}
        write_atomically(self.model_path, lambda temporary: save_file(tensors, temporary, metadata))

    def residual(self, length: int, acknowledged_round: int) -> np.ndarray:
        """The residual (length,) that holds, float32; zeros where there is none.

        Args:
            length: number of values of an update.
            acknowledged_round: the last round whose update of this client was accepted, 0 for
                none.
        """
        nothing = np.zeros(length, dtype=np.float32)
        try:
            with safe_open(self.path, framework="np") as file:
                last_round = int((file.metadata() or {})["round"])
                name = "after" if last_round == acknowledged_round else "before"
                residual: np.ndarray = file.get_tensor(name)
        except (OSError, SafetensorError, KeyError, ValueError):
            return nothing
        fits = residual.shape == (length,) and bool(np.isfinite(residual).all())
        return residual if fits else nothing

    def save(self, round_number: int, before: np.ndarray, after: np.ndarray) -> None:
        """Keeps the residuals before and after the update of `round_number`, atomically."""
        tensors = {"before": before, "after": after}
        metadata = {"round": str(round_number)}
        write_atomically(self.path, lambda temporary: save_file(tensors, temporary, metadata))


def forget_old_runs(folder: Path, days: float) -> None:
    """Removes what was kept for runs that nothing was written for in `days` days.

    A real node is not told when a run has ended.
    """
    oldest = time.time() - days * 86400
    for run in folder.glob("*/"):
        if max((path.stat().st_mtime for path in run.iterdir()), default=0.0) < oldest:
            shutil.rmtree(run, ignore_errors=True)
