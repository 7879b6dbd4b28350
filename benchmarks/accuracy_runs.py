"""The runs of `benchmarks/accuracy.py`: settings, folders, results here and in exported files."""

import argparse
import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors import SafetensorError, safe_open

from fedcunet.errors import UserError
from fedcunet.files import write_atomically

# The paper trains far longer at 2.5e-4; after 15 epochs that is the worse rate for every setting.
RATES = (1e-3, 3e-3)
# Of all weights at 1 or 2 bits: what lets them learn in so few epochs.
LATENT_RATE, RAMP = 3.0, 0.5
QUANTIZERS = ("source", "paper", "ranged")


@dataclass(frozen=True)
class Setting:
    """One row of the table.

    Attributes:
        name: the paper's.
        bits: inputs, weights, gradients.
        alpha: a scale for each filter.
        paper: NME over float32's in the paper's Table 5; None where it has no such row.
        quantizer: of the inputs; "" where they are not quantised.
        aim: the ratio that is wanted.
        at_once: weights have their bits from the first step, as in the paper.
    """

    name: str
    bits: str
    alpha: bool
    paper: float | None
    quantizer: str = ""
    aim: float | None = None
    at_once: bool = False

    @property
    def key(self) -> str:
        """Name of its folder."""
        return f"{self.name}-{self.quantizer}" if self.quantizer else self.name

    @property
    def has_ramp(self) -> bool:
        """Whether its weights get to 1 or 2 bits by and by."""
        return not self.at_once and self.bits.split(",")[1] != "32"


# Names, bits, alpha, the paper's ratio; the first of 8 and 6 bits are the defaults.
PLAIN = (
    Setting("float32", "32,32,32", False, 1.0),
    Setting("BW-alpha", "32,1,32", True, 1.06),
    Setting("BW", "32,1,32", False, 1.11),
    Setting("TW", "32,2,32", False, 1.10),
)
QIG = (
    ("BW-alpha-QIG-818", "8,1,8", True, 1.32, 1.05),
    ("BW-alpha-QIG-616", "6,1,6", True, None, 1.10),
    ("BW-QIG-818", "8,1,8", False, 1.27, None),
    ("TW-QIG-828", "8,2,8", False, 1.22, None),
    ("BW-QIG-616", "6,1,6", False, 1.75, None),
    ("TW-QIG-626", "6,2,6", False, 1.26, None),
)
BY_QUANTIZER = {
    quantizer: tuple(
        Setting(name, bits, alpha, paper, quantizer, aim if quantizer == "source" else None)
        for name, bits, alpha, paper, aim in QIG
    )
    for quantizer in QUANTIZERS
}
MAIN = (PLAIN[0], *BY_QUANTIZER["source"][:2])  # more seeds, and first
AT_ONCE = replace(MAIN[1], name="BW-alpha-QIG-818-at-once", aim=None, at_once=True)
SETTINGS = (*PLAIN, *(setting for q in QUANTIZERS for setting in BY_QUANTIZER[q]), AT_ONCE)
# Trained last: what is only to be compared. Before them the paper's rows.
LATE = (AT_ONCE, *BY_QUANTIZER["ranged"])
EARLY = [one for one in SETTINGS if one not in (*MAIN, *LATE)]


@dataclass(frozen=True)
class Shape:
    """How the networks are trained that are compared with each other.

    Attributes:
        size: side of the crops.
        epochs: passes over the data.
        batch: examples of a step.
        rates: the two learning rates.
        freeze_norm: share of the training, its last, with running statistics.
        optimizer: its name.
        only_main: not for all settings, but for those of `MAIN`.
    """

    size: int
    epochs: int
    batch: int
    rates: tuple[float, float] = RATES
    freeze_norm: float = 0.0
    optimizer: str = "rmsprop"
    only_main: bool = False

    @property
    def key(self) -> str:
        """Name of its folder."""
        freeze = f"-freeze-{self.freeze_norm:g}" if self.freeze_norm else ""
        optimizer = "" if self.optimizer == "rmsprop" else f"-{self.optimizer}"
        return f"{self.size}px-{self.epochs}epochs-batch{self.batch}{freeze}{optimizer}"


# In six epochs of 16 examples a step float32 gets to 14.8 % at 128×128: too few steps to compare.
# With 4 examples 5e-4 is too low (float32 5.64 %, 8-1-8 5.88), and running statistics are not
# those of the batches. The last two are what 8-1-8 and 6-1-6 come to with momentum and longer.
LARGE_RATES = (1e-3, 2e-3)
SHAPES = (
    Shape(64, 15, 16),
    Shape(128, 6, 4, LARGE_RATES, 0.34),
    Shape(64, 15, 16, optimizer="adam", only_main=True),
    Shape(128, 12, 4, LARGE_RATES, 0.34, optimizer="adam", only_main=True),
)


def shapes_of(size: int, epochs: int, batch: int) -> list[Shape]:
    """The study's own shapes of these numbers; one with `RATES` where it has none."""
    found = [s for s in SHAPES if (s.size, s.epochs, s.batch) == (size, epochs, batch)]
    return found or [Shape(size, epochs, batch)]


@dataclass(frozen=True)
class Run:
    """One training."""

    setting: Setting
    shape: Shape
    rate: float
    seed: int

    def folder(self, out: Path) -> Path:
        """Where it is trained; whatever changes its result is in the name."""
        rate = f"rate-{self.rate:g}"
        if self.setting.has_ramp:
            rate += f"-latent-{LATENT_RATE:g}-ramp-{RAMP:g}"
        return out / self.shape.key / self.setting.key / rate / f"seed-{self.seed}"

    def result(self, out: Path) -> tuple[int, float]:
        """Epochs done and the NME after the last of them; (0, nan) before the first."""
        found = (0, float("nan"))
        try:
            with safe_open(self.folder(out) / "last.safetensors", framework="np") as file:
                facts = json.loads((file.metadata() or {})["facts"])
            found = int(facts["epoch"]), float(facts["percent"])
        except (OSError, SafetensorError, KeyError, ValueError):
            pass
        known = self.folder(out) / "known.json"  # done elsewhere
        if found[0] < self.shape.epochs and known.exists():
            facts = json.loads(known.read_text())
            return facts["epochs"], facts["percent"]
        return found

    def done(self, out: Path) -> bool:
        return self.result(out)[0] >= self.shape.epochs

    def command(self, out: Path, data: str, root: str) -> list[str]:
        """The command line that begins it, or goes on with it."""
        folder = self.folder(out)
        options = {
            "data": data, "root": root, "out": folder, "size": self.shape.size, "unets": 2,
            "epochs": self.shape.epochs, "batch-size": self.shape.batch,
            "bits": self.setting.bits, "learning-rate": self.rate,
            "schedule": "cosine", "seed": self.seed, "optimizer": self.shape.optimizer,
        }  # fmt: skip
        if self.shape.freeze_norm:
            options["freeze-norm"] = self.shape.freeze_norm
        if self.setting.quantizer:
            options["input-quantizer"] = self.setting.quantizer
        words = [str(word) for key, value in options.items() for word in (f"--{key}", value)]
        if self.setting.has_ramp:
            words += ["--latent-rate", str(LATENT_RATE), "--ramp", str(RAMP)]
        flags = ["--alpha"] if self.setting.alpha else []
        flags += ["--resume"] if (folder / "last.safetensors").exists() else []
        return [sys.executable, "-m", "fedcunet", "train", *words, *flags]


def all_runs(shapes: Sequence[Shape], seeds: int) -> Iterator[Run]:
    """Every run that may be asked for."""
    for shape in shapes:
        for setting in MAIN if shape.only_main else SETTINGS:
            for rate in shape.rates:
                for seed in range(seeds if setting in MAIN else 1):
                    yield Run(setting, shape, rate, seed)


def read_results(file: Path, arguments: argparse.Namespace) -> dict[str, str]:
    """The lines of an exported file by the names of their runs; exits if one is odd."""
    runs = all_runs([*SHAPES, *arguments.shapes], 1)
    epochs = {run.folder(Path()).parent: run.shape.epochs for run in runs}
    lines: dict[str, str] = {}
    try:
        for line in file.read_text().splitlines():
            found = json.loads(line)
            folder, seed = Path(found["run"]).parent, Path(found["run"]).name
            is_known = epochs[folder] == found["epochs"] and re.fullmatch(r"seed-\d+", seed)
            if not is_known or not 0 <= found["percent"] < 1e6:
                raise ValueError(line)
            lines[found["run"]] = line
    except OSError as error:
        sys.exit(f"{file}: {error.strerror}")
    except UnicodeDecodeError:
        sys.exit(f"{file}: expected runs of this study, found no text")
    except (ValueError, KeyError, TypeError):
        sys.exit(f"{file}: expected runs of this study with epochs and NME, found {line[:100]!r}")
    return lines


def take_known(arguments: argparse.Namespace) -> None:
    """Notes the results of `--known` in the folders of their runs; those trained here stay."""
    for name, line in read_results(arguments.known, arguments).items():
        write_atomically(arguments.out / name / "known.json", line + "\n")


def check_data(arguments: argparse.Namespace) -> None:
    """Keeps what is trained in an --out to one data set, which `data.json` in it names.

    Raises:
        UserError: runs of another one were trained there.
    """
    file = arguments.out / "data.json"
    wanted = {"data": arguments.data, "root": str(Path(arguments.root).resolve())}
    found = json.loads(file.read_text()) if file.exists() else wanted
    if found != wanted:
        raise UserError(f"{arguments.out}: expected runs of {wanted}, found those of {found}")
    write_atomically(file, json.dumps(wanted) + "\n")


def export(arguments: argparse.Namespace) -> None:
    """Writes the runs that are done, and those that the file has, a line each."""
    file, out = arguments.export, arguments.out
    results = read_results(file, arguments) if file.exists() else {}
    for run in all_runs(arguments.shapes, arguments.seeds):
        if run.done(out):
            epochs, percent = run.result(out)
            name = str(run.folder(out).relative_to(out))
            results[name] = json.dumps({"run": name, "epochs": epochs, "percent": percent})
    write_atomically(file, "".join(f"{results[name]}\n" for name in sorted(results)))
    print(f"{file}: {len(results)} runs")
