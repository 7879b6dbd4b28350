"""Run folders made up for tests of the reports, and a reader of the pages."""

from __future__ import annotations

import json
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from fedcunet.devices import assign, device_time, parse_fleet

NASTY = '<script>alert("1")</script> & $x_1$ \x1b[31m "quoted" \u0645'
NUM_PARAMETERS = 226_000


def face_points() -> np.ndarray:
    """68 points (68, 2) of a plain face in a 64 x 64 crop, in the order of the scheme."""

    def arc(x: float, y: float, rx: float, ry: float, start: float, end: float, n: int) -> Any:
        angles = np.radians(np.linspace(start, end, n))
        return np.stack([x + rx * np.cos(angles), y + ry * np.sin(angles)], axis=1)

    return np.concatenate(
        [
            arc(32, 28, 21, 29, 180, 0, 17),
            arc(23, 23, 7, 4, 190, 350, 5),
            arc(41, 23, 7, 4, 190, 350, 5),
            np.stack([np.full(4, 32.0), np.linspace(25, 36, 4)], axis=1),
            arc(32, 37, 5, 2.5, 180, 0, 5),
            arc(23, 27, 4, 2, 180, 480, 6),
            arc(41, 27, 4, 2, 180, 480, 6),
            arc(32, 46, 8, 4, 180, 510, 12),
            arc(32, 46, 5, 1.5, 180, 495, 8),
        ]
    )


def face_image(points_K2: np.ndarray, tone: int) -> np.ndarray:
    """A drawing of the face, uint8 (64, 64, 3)."""
    image = np.full((64, 64, 3), (tone // 2, tone // 2 + 20, 90), np.uint8)
    outline = np.concatenate([points_K2[:17], points_K2[26:16:-1] - (0, 8)])
    cv2.fillPoly(image, [outline.astype(np.int32)], (tone, tone - 40, tone - 60))
    for part in (slice(36, 42), slice(42, 48), slice(48, 60)):
        cv2.fillPoly(image, [points_K2[part].astype(np.int32)], (70, 40, 40))
    return cv2.GaussianBlur(image, (3, 3), 0)


def write_examples(path: Path, spread: float, num: int = 8, seed: int = 0) -> None:
    """`examples.npz` of drawn faces; the pictures are the same whatever the spread."""
    generator = np.random.default_rng(7)
    targets = np.stack([face_points() + generator.normal(0, 1.5, (1, 2)) for _ in range(num)])
    images = np.stack([face_image(t, 150 + 10 * i) for i, t in enumerate(targets)])
    noise = np.random.default_rng(seed).normal(0, spread, targets.shape)
    noise += np.random.default_rng(seed + 1).normal(0, spread, (num, 1, 2))
    predicted = targets + noise
    scale = np.linalg.norm(targets[:, 36] - targets[:, 45], axis=1)
    error = 100 * np.linalg.norm(noise, axis=2).mean(axis=1) / scale
    np.savez(
        path,
        images_NHWC=images,
        predicted_NK2=predicted,
        target_NK2=targets,
        error_N=error,
        scheme="face68",
    )


def write_run(
    path: Path,
    name: str = "i8-w1-g8-eden2",
    *,
    codec: str = "eden",
    bits: float = 2.19,
    final: float = 8.1,
    num_rounds: int = 20,
    num_clients: int = 8,
    compute: float = 2.4,
    abandoned: tuple[int, ...] = (6,),
) -> Path:
    """A run folder as a run would leave it."""
    path.mkdir(parents=True)
    generator = np.random.default_rng(len(name))
    devices = assign(parse_fleet("phone-low:1,phone-mid:2,phone-high:1"), num_clients, seed=0)
    sizes = np.sort(generator.integers(30, 300, num_clients))[::-1]
    up, down = int(NUM_PARAMETERS * bits / 8), NUM_PARAMETERS * 4
    rounds, replies, totals = [], [], {"accepted": 0}
    for number in range(1, num_rounds + 1):
        lost = number in abandoned
        counts: dict[str, int] = {}
        slowest = 0.0
        for client, device in enumerate(devices):
            outcome = "accepted"
            if (lost and client % 2) or (number + client) % 23 == 0:
                outcome = "late" if client % 2 else "checksum"
            counts[outcome] = counts.get(outcome, 0) + 1
            seconds = compute * float(sizes[client]) / 200 * generator.uniform(0.9, 1.1)
            time = device_time(device, seconds, down, up)
            slowest = max(slowest, time.total)
            replies.append(
                {
                    "round": number,
                    "client": client,
                    "outcome": outcome,
                    "num_examples": int(sizes[client]),
                    "steps": 12,
                    "loss": 0.02,
                    "bytes_up": up,
                    "bytes_down": down,
                    "bits_per_parameter": bits,
                    "compute_seconds": seconds,
                    "encode_seconds": 0.01,
                    "device": device.name,
                    "device_seconds": {
                        "compute": time.compute,
                        "uplink": time.uplink,
                        "downlink": time.downlink,
                        "total": time.total,
                    },
                }
            )
        for reason, count in counts.items():
            totals[reason] = totals.get(reason, 0) + count
        share = math.exp(-5 * number / num_rounds)
        metric = final + 42 * share + generator.normal(0, 0.15) * (number < num_rounds)
        rounds.append(
            {
                "round": number,
                "outcome": "abandoned" if lost else "committed",
                "reason": "4 of 8 replies accepted, quorum is 6" if lost else "",
                "accepted": counts["accepted"],
                "replies": counts,
                "train_loss": None if lost else 0.004 + 0.03 * share,
                "metric_name": "nme_percent",
                "metric": None if lost or number % 2 else metric,
                "bytes_up": up * num_clients,
                "bytes_down": down * num_clients,
                "clients_up": num_clients,
                "clients_down": num_clients,
                "device_seconds": slowest,
                "seconds": 3.1,
                "learning_rate": 0.001,
                "reproducible": number != 3,
            }
        )
    setting = {
        "seed": 0,
        "model.unets": 2,
        "quant.bits": "8,1,8" if bits < 30 else "32,32,32",
        "update.codec": codec,
        "update.bits": round(bits),
        "federation.clients": num_clients,
        "federation.fleet": "phone-low:1,phone-mid:2,phone-high:1",
    }
    summary = {
        "name": name,
        "setting": setting,
        "outcome": "completed",
        "rounds_committed": num_rounds - len(abandoned),
        "rounds_abandoned": len(abandoned),
        "metric_name": "nme_percent",
        "nme_percent": rounds[-1]["metric"],
        "mean_shape_percent": 17.9,
        "model_bytes": 904_000 if bits > 30 else 61_000,
        "bytes_up_per_client_round": up,
        "bytes_down_per_client_round": down,
        "bits_per_parameter_up": bits,
        "bits_per_parameter_down": 32.0,
        "replies": totals,
        "seconds": 3.1 * num_rounds,
        "seconds_of": {"train": 91, "code": 7, "wait": 53, "aggregate": 3, "evaluate": 11},
        "checkpoint_sha256": "00" * 32,
    }
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rounds))
    (path / "clients.jsonl").write_text("".join(json.dumps(line) + "\n" for line in replies))
    (path / "summary.json").write_text(json.dumps(summary))
    (path / "config.toml").write_text('seed = 0\n[model]\nunets = 2\n[update]\ncodec = "eden"\n')
    write_examples(path / "examples.npz", spread=final / 14)
    return path


def write_three_runs(folder: Path) -> list[Path]:
    """The folders of the main job: float32, 2-bit EDEN, 1-bit sign."""
    return [
        write_run(folder / "a", "float32", codec="float32", bits=32.01, final=6.4, compute=2.0),
        write_run(folder / "b", "i8-w1-g8-eden2", bits=2.19, final=8.1),
        write_run(folder / "c", "i8-w2-g8-sign-ef", codec="sign", bits=1.27, final=8.6),
    ]


class Page(HTMLParser):
    """Tags, text and balance of a page."""

    void = frozenset(("meta", "br", "img", "link", "input"))

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)

    def values(self, attribute: str) -> list[str]:
        return [attrs[attribute] or "" for _, attrs in self.tags if attribute in attrs]


def read_page(path: Path) -> Page:
    page = Page(path.read_text(encoding="utf-8"))
    assert not page.open
    return page


def chart(page: Page, begins: str) -> str:
    """Description of the chart whose description begins so."""
    found = [label for label in page.values("aria-label") if label.startswith(begins)]
    assert len(found) == 1
    return found[0]
