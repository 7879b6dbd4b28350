"""A run folder read back: its lines, its summary, its setting, its example pictures.

Everything here is read from files that a crash may have cut short or a person edited, so what is
missing or unreadable becomes a note, and only a folder that holds no run at all is an error.
"""

from __future__ import annotations

import json
import tomllib
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fedcunet.errors import UserError
from reports import units


@dataclass
class ClientTotals:
    """Sums over the replies of one client."""

    client: str
    device: str = units.MISSING
    num_examples: int = 0
    replies: int = 0
    timed: int = 0  # replies with device times
    accepted: int = 0
    unavailable: int = 0  # rounds in which its device did not answer
    bytes_up: float = 0.0
    bytes_down: float = 0.0
    compute_seconds: float = 0.0
    device_compute: float = 0.0
    device_uplink: float = 0.0
    device_downlink: float = 0.0

    def add(self, line: Mapping[str, Any]) -> None:
        """Add one line of `clients.jsonl`."""
        if line.get("device") is not None:
            self.device = units.printable(line["device"], 30)
        if line.get("outcome") == "unavailable":  # nothing was sent to it
            self.unavailable += 1
            return
        self.replies += 1
        self.accepted += line.get("outcome") == "accepted"
        self.num_examples = units.whole(line.get("num_examples")) or self.num_examples
        self.bytes_up += units.number(line.get("bytes_up")) or 0.0
        self.bytes_down += units.number(line.get("bytes_down")) or 0.0
        self.compute_seconds += units.number(line.get("compute_seconds")) or 0.0
        times = line.get("device_seconds")
        if isinstance(times, Mapping) and units.number(times.get("total")) is not None:
            self.timed += 1
            self.device_compute += units.number(times.get("compute")) or 0.0
            self.device_uplink += units.number(times.get("uplink")) or 0.0
            self.device_downlink += units.number(times.get("downlink")) or 0.0

    def device_parts(self) -> tuple[float, float, float]:
        """Mean seconds a reply on the device: downlink, compute, uplink."""
        count = max(self.timed, 1)
        parts = (self.device_downlink, self.device_compute, self.device_uplink)
        return parts[0] / count, parts[1] / count, parts[2] / count


@dataclass(frozen=True)
class Examples:
    """Test pictures with predicted and true landmarks.

    Attributes:
        images_NHWC: uint8 RGB crops.
        predicted_NK2: Predicted (x, y) in crop pixels; the first pixel's centre is (0, 0).
        target_NK2: True points likewise; NaN where a landmark is not labelled.
        error_N: Error of each example in percent, NaN if unknown.
        scheme: Name of the landmark scheme.
    """

    images_NHWC: np.ndarray
    predicted_NK2: np.ndarray
    target_NK2: np.ndarray
    error_N: np.ndarray
    scheme: str

    def __len__(self) -> int:
        return len(self.images_NHWC)


@dataclass
class RunFolder:
    """What a run folder says.

    Attributes:
        path: The folder.
        summary: `summary.json`, with what it lacks filled in from the lines where possible.
        rounds: The lines of `metrics.jsonl`.
        clients: Totals by client, in client order.
        setting: The flat setting.
        examples: None without a readable `examples.npz`.
        notes: A line for everything that was missing or unreadable.
    """

    path: Path
    summary: dict[str, Any] = field(default_factory=dict)
    rounds: list[dict[str, Any]] = field(default_factory=list)
    clients: list[ClientTotals] = field(default_factory=list)
    setting: dict[str, Any] = field(default_factory=dict)
    examples: Examples | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def is_buffered(self) -> bool:
        """Whether the server stepped without waiting for stragglers."""
        return bool(self.setting.get("federation.mode") == "buffered")


def read_run_folder(path: Path | str) -> RunFolder:
    """Read a run folder.

    Raises:
        UserError: The folder is absent, or has neither `metrics.jsonl` nor `summary.json`.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"run folder {path}: no such folder")
    if not any((path / name).is_file() for name in ("metrics.jsonl", "summary.json")):
        raise UserError(f"run folder {path}: holds no run (no metrics.jsonl, no summary.json)")
    run = RunFolder(path)
    run.rounds = [
        line
        for line in _json_lines(path / "metrics.jsonl", run.notes)
        if units.number(line.get("round")) is not None
    ]
    totals: dict[str, ClientTotals] = {}
    for line in _json_lines(path / "clients.jsonl", run.notes):
        client = units.printable(line.get("client"), 40)
        totals.setdefault(client, ClientTotals(client)).add(line)
    run.clients = sorted(
        totals.values(), key=lambda t: (not t.client.isdecimal(), _order(t.client))
    )
    run.summary = _summary(run)
    run.setting = _setting(run)
    run.examples = _examples(path / "examples.npz", run.notes)
    return run


def _order(client: str) -> tuple[int, str]:
    return (int(client) if client.isdecimal() else 0, client)


def _json_lines(path: Path, notes: list[str]) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file, a line each; what is no object is left out and counted."""
    if not path.is_file():
        notes.append(f"{path.name} is missing")
        return
    bad = 0
    with path.open(encoding="utf-8", errors="replace") as file:
        for text in file:
            if not text.strip():
                continue
            try:
                line = json.loads(text)
            except (ValueError, RecursionError):
                line = None
            if isinstance(line, dict):
                yield line
            else:
                bad += 1
    if bad:
        notes.append(f"{path.name}: {units.counted(bad, 'line')} could not be read")


def _summary(run: RunFolder) -> dict[str, Any]:
    """`summary.json`, completed from the lines."""
    path = run.path / "summary.json"
    summary: dict[str, Any] = {}
    if path.is_file():
        try:
            read = json.loads(path.read_text(encoding="utf-8"))
            summary = read if isinstance(read, dict) else {}
        except (ValueError, RecursionError):
            run.notes.append("summary.json could not be read")
    else:
        run.notes.append("summary.json is missing: the run has not ended; figures so far")
    # Without a value the lines' own counts; a privacy loss without one has no bound.
    known = {k: v for k, v in summary.items() if v is not None or k.startswith("epsilon")}
    return {**_figures_of_lines(run), **known}


def _figures_of_lines(run: RunFolder) -> dict[str, Any]:
    """The figures of a summary that follow from the lines."""
    figures: dict[str, Any] = {"name": run.path.resolve().name, "outcome": "unfinished"}
    replies: Counter[str] = Counter()
    for line in run.rounds:
        if isinstance(line.get("replies"), Mapping):
            replies.update({str(k): units.whole(v) for k, v in line["replies"].items()})
        name, score = line.get("metric_name"), units.number(line.get("metric"))
        if isinstance(name, str) and score is not None:
            figures["metric_name"], figures[name] = name, score
    outcomes = Counter(str(line.get("outcome")) for line in run.rounds if line.get("round"))
    figures["rounds_committed"] = outcomes["committed"]
    figures["rounds_abandoned"] = outcomes["abandoned"]
    num_replies = sum(replies.values())
    if num_replies:
        figures["replies"] = dict(replies)
        for key, clients in (("bytes_up", "clients_up"), ("bytes_down", "clients_down")):
            total, num_sent = (
                sum(units.number(line.get(name)) or 0.0 for line in run.rounds)
                for name in (key, clients)
            )
            figures[f"{key}_per_client_round"] = total / max(num_sent, 1)
    times = [units.number(line.get("seconds")) for line in run.rounds]
    if any(t is not None for t in times):
        figures["seconds"] = sum(t for t in times if t is not None)
    times = [units.number(line.get("device_seconds")) for line in run.rounds]
    virtual = [t for t in times if t is not None]
    if any(virtual):
        figures["device_seconds_per_round"] = sum(virtual) / len(virtual)
    return figures


def _setting(run: RunFolder) -> dict[str, Any]:
    """The flat setting: of the summary, else `config.toml` with its tables flattened."""
    if isinstance(run.summary.get("setting"), Mapping):
        return dict(run.summary["setting"])
    try:
        return _flat(tomllib.loads((run.path / "config.toml").read_text(encoding="utf-8")))
    except FileNotFoundError:
        run.notes.append("config.toml is missing")
    except ValueError:
        run.notes.append("config.toml could not be read")
    return {}


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _examples(path: Path, notes: list[str]) -> Examples | None:
    """The example pictures; None, with a note if the file is there, where they cannot be used."""
    if not path.is_file():
        return None
    try:
        # Opened here: np.load leaves a file open that turns out to be no archive.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as data:
            images = data["images_NHWC"]
            predicted = np.asarray(data["predicted_NK2"], dtype=np.float64)
            target = np.asarray(data["target_NK2"], dtype=np.float64)
            error = np.asarray(data["error_N"], dtype=np.float64)
            scheme = str(data["scheme"]) if "scheme" in data else ""
            if "labelled_NK" in data:
                target = np.where(data["labelled_NK"].astype(bool)[..., None], target, np.nan)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, IndexError) as error_:
        notes.append(f"examples.npz could not be read: {units.printable(error_, 120)}")
        return None
    num = len(images)
    fits = (
        images.dtype == np.uint8
        and images.ndim == 4
        and images.shape[-1] == 3
        and predicted.ndim == 3
        and predicted.shape == target.shape
        and predicted.shape[::2] == (num, 2)
        and error.shape == (num,)
    )
    if not fits or 0 in images.shape:
        notes.append(
            f"examples.npz does not fit together: images {images.dtype} {images.shape}, predicted "
            f"{predicted.shape}, target {target.shape}, error {error.shape}"
        )
        return None
    return Examples(images, predicted, target, error, scheme)
