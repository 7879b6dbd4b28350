"""The run folder: everything that a run leaves behind, written as it goes.

`config.toml`, `metrics.jsonl` (a line a round), `clients.jsonl` (a line a reply), `checkpoint/`,
`tensorboard/`, `summary.json`, `examples.npz` (pictures with predicted points for the report); with
a validation fraction also `client_evaluations.jsonl` (a line for each client's own evaluation).
"""

import dataclasses
import json
import logging
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
import torch
from safetensors import SafetensorError
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from fedcunet.client_evaluation import ClientEvaluation
from fedcunet.config import RunConfig
from fedcunet.data.annotations import LandmarkScheme
from fedcunet.data.crops import Crops
from fedcunet.errors import RunFailure, UserError
from fedcunet.files import held, json_text, write_atomically
from fedcunet.replies import ClientLine, RoundLine
from fedcunet.saved import Saved, read_saved, write_saved
from fedcunet.terms import TEST
from fedcunet.training.checkpoint import save_checkpoint
from fedcunet.training.evaluation import Evaluation

logger = logging.getLogger(__name__)

NUM_EXAMPLES = 12  # pictures in examples.npz
STATE = Path("checkpoint") / "state.safetensors"
RECORDER = "recorder"  # the part of the saved state that is ours
LISTS = ("metrics.jsonl", "clients.jsonl", "client_evaluations.jsonl")


class RunRecorder:
    """Writes one run folder.

    Args:
        folder: made if it is not there; it must not hold a run, unless `resume`.
        config: the setting.
        resume: go on with the run that the folder holds, after the last round that was saved.

    Raises:
        UserError: if the folder holds something already or a run of another setting, or if another
            process writes there.
    """

    def __init__(self, folder: Path, config: RunConfig, *, resume: bool = False) -> None:
        if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not resume)):
            found = "files" if folder.is_dir() else "a file"
            raise UserError(f"run folder {folder}: expected an empty or new folder, found {found}")
        self.folder = folder
        with ExitStack() as stack:
            stack.enter_context(held(folder))
            self._open(config, resume)
            self._held = stack.pop_all()

    def _open(self, config: RunConfig, resume: bool) -> None:
        self.saved = self._read_saved(config) if resume else {}
        self.totals: Counter[str] = Counter()
        self.replies: Counter[str] = Counter()
        self.device_seconds = 0.0
        # Of the clients' own evaluations: the last one's figures, the bytes of all.
        self.client_figures: dict[str, Any] = {}
        self.privacy: dict[str, float | None] = {}  # spent so far, where it is on
        self.checkpoints_failed = 0
        # Workers that were replaced, by reason: by this process, and before it.
        self.faults: Callable[[], Mapping[str, int]] = dict
        self.faults_before: Counter[str] = Counter()
        # Where the time goes: all clients' training and coding, and the server's waiting for them,
        # aggregating and evaluating.
        self.seconds_of: defaultdict[str, float] = defaultdict(float)
        self.seconds_before = 0.0  # of a run that goes on, up to its last save
        self._begin = time.perf_counter()
        self._config = config
        with known_state(self.folder):
            self._restore()
        # Before all other files: a run that is killed from here on can be resumed.
        text = tomli_w.dumps(config.nested())
        write_atomically(self.folder / "config.toml", text)
        last_round = self.saved["server"].facts["round"] if self.saved else 0
        self._tensorboard = SummaryWriter(
            str(self.folder / "tensorboard"), purge_step=last_round + 1 if resume else None
        )

    def round(
        self,
        line: RoundLine,
        clients: Iterable[ClientLine],
        evaluation: Evaluation | None,
        client_evaluation: ClientEvaluation | None,
    ) -> dict[str, Any]:
        """Appends the lines of a round; returns the round's, as in `metrics.jsonl`."""
        metrics: dict[str, Any] = {
            "round": line.round,
            "outcome": line.outcome,
            "reason": line.reason,
            "accepted": line.replies.get("accepted", 0),
            "replies": line.replies,
            "train_loss": line.train_loss,
            "metric_name": evaluation.metric_name if evaluation else None,
            "metric": evaluation.percent if evaluation else None,
            "bytes_up": line.bytes_up,
            "bytes_down": line.bytes_down,
            "clients_up": line.clients_up,
            "clients_down": line.clients_down,
            "device_seconds": line.device_seconds,
            "seconds": line.seconds,
            "learning_rate": line.learning_rate,
            "reproducible": line.reproducible,
            **line.privacy,
        }
        if client_evaluation is not None and evaluation is not None:
            metrics |= self.client_evaluation(client_evaluation, evaluation.metric_name)
        self._append("metrics.jsonl", [metrics])
        clients = list(clients)
        self._append("clients.jsonl", [_client_object(client) for client in clients])
        self.totals[line.outcome] += 1
        for key in ("bytes_up", "bytes_down", "clients_up", "clients_down"):
            self.totals[key] += getattr(line, key)
        self.replies.update(line.replies)
        self.device_seconds += line.device_seconds
        for name, key in (("train", "compute-seconds"), ("code", "encode-seconds")):
            self.seconds_of[name] += sum(one.metrics.get(key, 0.0) for one in clients)
        self.seconds_of["aggregate"] += line.aggregate_seconds
        self.seconds_of["wait"] += line.seconds - line.aggregate_seconds
        self.privacy = line.privacy
        scalars = {
            "train/loss": line.train_loss,
            "train/learning_rate": line.learning_rate,
            "bytes/up": line.bytes_up,
            "bytes/down": line.bytes_down,
            "clients/accepted": line.replies.get("accepted", 0),
            "evaluation/percent": evaluation.percent if evaluation else None,
            "evaluation/client_mean_percent": metrics.get("client_mean_percent"),
            "evaluation/client_worst_percent": metrics.get("client_worst_percent"),
        }
        for name, value in scalars.items():
            if value is not None:
                self._tensorboard.add_scalar(name, value, line.round)
        return metrics

    def client_evaluation(
        self, client_evaluation: ClientEvaluation, metric_name: str
    ) -> dict[str, Any]:
        """Notes the clients' own evaluation; returns its figures."""
        part = {"part": client_evaluation.part}
        scores = [part | dataclasses.asdict(score) for score in client_evaluation.scores]
        self._append("client_evaluations.jsonl", scores)
        figures = client_evaluation.figures(lower_is_better=metric_name == "nme_percent")
        before = self.client_figures
        self.client_figures = (
            before
            | figures
            | {
                key: before.get(key, 0) + figures[key]
                for key in ("evaluation_bytes_up", "evaluation_bytes_down")
            }
        )
        return figures

    def checkpoint(self, model: nn.Module, scheme: LandmarkScheme, round_number: int) -> None:
        """Replaces the checkpoint by the global model after `round_number`."""
        path = self.folder / "checkpoint" / "model.safetensors"
        facts = {"round": str(round_number)}
        self._keep(path, lambda: save_checkpoint(path, model, self._config, scheme, facts))

    def save(self, parts: Mapping[str, Saved]) -> None:
        """Keeps what a resumed run goes on from, with the counts up to here.

        Raises:
            RunFailure: it cannot be written and privacy is on: a resumed run would not count the
                rounds after the last save, which it asks for again.
        """
        counts = {
            "totals": dict(self.totals),
            "replies": dict(self.replies),
            "device_seconds": self.device_seconds,
            "client_figures": self.client_figures,
            "privacy": self.privacy,
            "checkpoints_failed": self.checkpoints_failed,
            "workers_replaced": dict(self.workers_replaced()),
            "seconds_of": dict(self.seconds_of),
            "seconds": self.seconds_before + time.perf_counter() - self._begin,
        }
        path = self.folder / STATE
        self._keep(
            path,
            lambda: write_saved(path, {**parts, RECORDER: Saved(facts=counts)}),
            needed=self._config.privacy.enabled,
        )

    def workers_replaced(self) -> Counter[str]:
        """By reason, in the whole run."""
        return self.faults_before + Counter(self.faults())

    def _keep(self, path: Path, write: Callable[[], None], *, needed: bool = False) -> None:
        """A file that cannot be written, on a full disk, costs itself; the one before stays.

        Raises:
            RunFailure: it is needed, as what privacy has cost so far is.
        """
        try:
            write()
        except (OSError, SafetensorError) as error:
            if needed:
                raise RunFailure(
                    f"{path}: not written: {error}; with privacy on the run ends here, "
                    "--resume goes on from the state before"
                ) from error
            self.checkpoints_failed += 1
            logger.warning("%s: not written, the one before stays: %s", path, error)

    def _read_saved(self, config: RunConfig) -> dict[str, Saved]:
        """What an interrupted run left to go on from; nothing if it had not ended a round."""
        if not (self.folder / "config.toml").exists():
            if any(self.folder.iterdir()):
                raise UserError(f"run folder {self.folder}: expected a run to resume, found none")
            return {}
        check_setting(self.folder, config)
        path = self.folder / STATE
        return read_saved(path) if path.exists() else {}

    def _restore(self) -> None:
        """Takes up the counts, and cuts what was written after the last save off the lists."""
        for unfinished in (self.folder / STATE.parent).glob(".*"):  # of a process that was killed
            unfinished.unlink()
        if not self.saved:
            for name in LISTS:
                (self.folder / name).unlink(missing_ok=True)
            return
        counts = self.saved[RECORDER].facts
        self.totals, self.replies = Counter(counts["totals"]), Counter(counts["replies"])
        self.device_seconds = counts["device_seconds"]
        self.client_figures = counts["client_figures"]
        self.privacy = counts["privacy"]
        self.checkpoints_failed = counts["checkpoints_failed"]
        self.faults_before = Counter(counts["workers_replaced"])
        self.seconds_before = counts["seconds"]
        self.seconds_of.update(counts["seconds_of"])
        last_round = self.saved["server"].facts["round"]
        for path in (self.folder / name for name in LISTS):
            if path.exists():
                lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
                whole = [line for line in lines if line.endswith("\n")]
                try:
                    kept = [line for line in whole if _holds(line, last_round)]
                except (ValueError, KeyError, TypeError) as error:
                    raise UserError(
                        f"{path}: expected a JSON object in each line: {error}"
                    ) from None
                write_atomically(path, "".join(kept))

    def examples(
        self,
        crops: Crops,
        predicted_NK2: np.ndarray,
        error_N: np.ndarray,
        scheme: LandmarkScheme,
    ) -> None:
        """Keeps pictures from all over the test set, evenly spaced in the order of its files."""
        picked = np.linspace(0, len(crops) - 1, min(NUM_EXAMPLES, len(crops))).round().astype(int)
        batch = crops.batch(picked.tolist())
        images_NHWC = (batch.images_B3HW.permute(0, 2, 3, 1) * 255).round().to(torch.uint8).numpy()
        target_NK2 = batch.points_BK2.numpy().astype(np.float64)
        target_NK2[~batch.labelled_BK.numpy()] = np.nan

        def write(path: Path) -> None:
            with path.open("wb") as file:
                np.savez_compressed(
                    file,
                    images_NHWC=images_NHWC,
                    predicted_NK2=predicted_NK2[picked],
                    target_NK2=target_NK2,
                    error_N=error_N[picked],
                    scheme=np.array(scheme.name),
                )

        write_atomically(self.folder / "examples.npz", write)

    def summary(self, values: dict[str, Any]) -> None:
        """Writes `summary.json`, the last file of a run."""
        text = json_text(values, indent=2) + "\n"
        write_atomically(self.folder / "summary.json", text)

    def close(self) -> None:
        """Ends the TensorBoard file and leaves the folder to others."""
        self._tensorboard.close()
        self._held.close()

    def _append(self, name: str, lines: list[dict[str, Any]]) -> None:
        with (self.folder / name).open("a", encoding="utf-8") as file:
            file.writelines(json_text(line) + "\n" for line in lines)


@contextmanager
def known_state(folder: Path) -> Iterator[None]:
    """Says so in one line if what a run left to go on from lacks something."""
    try:
        yield
    except KeyError as error:
        raise UserError(
            f"{folder / STATE}: expected the state of a run of this version, found no {error}"
        ) from None


def finished(folder: Path, config: RunConfig) -> dict[str, Any] | None:
    """The summary of a run folder that is complete; None if there is something left to do."""
    path = folder / "summary.json"
    if not path.exists():
        return None
    check_setting(folder, config)
    try:
        summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        int(summary["rounds_committed"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: expected the summary of a run, found {type(error).__name__}: {error}"
        ) from None
    return summary


def check_setting(folder: Path, config: RunConfig) -> None:
    """Raises UserError if the folder's run was begun with another setting."""
    before = RunConfig.from_toml(folder / "config.toml").flat()
    for key, value in config.flat().items():
        if before[key] != value:
            raise UserError(
                f"run folder {folder}: expected {key} = {before[key]!r} as the run was begun with, "
                f"found {value!r}"
            )


def _holds(line: str, last_round: int) -> bool:
    """Whether a line of `LISTS` was written before the save: of its rounds, and no final test."""
    values = json.loads(line)
    return bool(values["round"] <= last_round and values.get("part") != TEST)


def _client_object(line: ClientLine) -> dict[str, Any]:
    """A line of `clients.jsonl`."""
    metrics = line.metrics
    return {
        "round": line.round,
        "client": line.client,
        "outcome": line.outcome,
        "detail": line.detail,
        "num_examples": line.num_examples,
        "steps": metrics.get("steps"),
        "loss": metrics.get("loss"),
        "bytes_up": line.bytes_up,
        "bytes_down": line.bytes_down,
        "bits_per_parameter": line.bits_per_parameter,
        "compute_seconds": metrics.get("compute-seconds"),
        "encode_seconds": metrics.get("encode-seconds"),
        "device": line.device,
        "rung": line.rung,
        "update_bits": line.update_bits,
        "device_seconds": {
            part: metrics.get(f"device-{part}-seconds")
            for part in ("compute", "downlink", "uplink")
        }
        | {"total": metrics.get("device-seconds")},
    }
