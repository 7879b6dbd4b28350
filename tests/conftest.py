"""Fixtures for all tests: one seed, real data where it exists, and made-up 300-W folders."""

import importlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest

_REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture
def seed() -> int:
    """The seed of every test that draws random numbers."""
    return 1808


@pytest.fixture
def generator(seed: int) -> np.random.Generator:
    """A fresh generator from the seed."""
    return np.random.default_rng(seed)


@pytest.fixture(scope="session")
def measured_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder of measured memory for all tests: each setting is measured once."""
    return tmp_path_factory.mktemp("measured")


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of real research data, which is no part of the repository."""
    named = os.environ.get("FEDCUNET_DATA")
    root = Path(named) if named else _REPOSITORY.parent / "shared" / "data"
    if not root.is_dir():
        pytest.skip(f"no real data: FEDCUNET_DATA is not set or not a folder ({root})")
    return root


@pytest.fixture(scope="session")
def golden_root(data_root: Path) -> Path:
    """Inputs and outputs of reference metric implementations, beside the real data."""
    root = data_root / "golden"
    if not root.is_dir():
        pytest.skip(f"no golden files of reference implementations in {data_root}")
    return root


def pts_text(points_K2: np.ndarray) -> str:
    """A `.pts` file of 0-based points, in the official form (1-based)."""
    lines = "\n".join(f"{x + 1:.6f} {y + 1:.6f}" for x, y in points_K2)
    return f"version: 1\nn_points:  {len(points_K2)}\n{{\n{lines}\n}}\n"


def made_face(generator: np.random.Generator, *, side: int = 48) -> tuple[np.ndarray, np.ndarray]:
    """A noisy picture (side, side, 3) uint8 and 68 0-based points inside it."""
    image_HW3 = generator.integers(0, 256, (side, side, 3), dtype=np.uint8)
    points_K2 = generator.uniform(0.2 * side, 0.8 * side, (68, 2)).round(3)
    return image_HW3, points_K2


MakeFaces = Callable[..., Path]


@pytest.fixture
def make_300w(tmp_path: Path, generator: np.random.Generator) -> MakeFaces:
    """Function that writes faces into 300-W folders: `make_300w({"afw": ["1_1.jpg"]}) -> root`."""

    def make(names_by_folder: dict[str, Sequence[str]], *, side: int = 48) -> Path:
        root = tmp_path / "300w"
        for folder, names in names_by_folder.items():
            (root / folder).mkdir(parents=True, exist_ok=True)
            for name in names:
                image_HW3, points_K2 = made_face(generator, side=side)
                path = root / folder / name
                # Encoded by the lower-case extension, so that odd spellings can be tested too.
                _, data = cv2.imencode(path.suffix.lower(), image_HW3)
                path.write_bytes(data.tobytes())
                path.with_suffix(".pts").write_text(pts_text(points_K2))
        return root

    return make


Command = Callable[..., tuple[int, str, str]]

_TINY_FACES = {
    "helen/trainset": [f"{n}_1.jpg" for n in range(4)],
    "helen/testset": [f"{n}_1.jpg" for n in range(10, 12)],
}
_TINY_SETTING = """
[model]
unets = 1
order = 0
[federation]
clients = 2
rounds = 1
"""


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Function that runs `fedcunet ...` or `simulations ...`: exit code, output, error output."""

    def run(program: str, *arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", [program, *map(str, arguments)])
        main = importlib.import_module(f"{program}.__main__").main
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run


@pytest.fixture
def tiny_root(make_300w: MakeFaces) -> Path:
    """A folder of 300-W with four faces to train on and two to test on."""
    return make_300w(_TINY_FACES)


@pytest.fixture
def tiny_setting(tmp_path: Path, tiny_root: Path, measured_dir: Path) -> Path:
    """A setting file of one round of two clients on these faces."""
    path = tmp_path / "tiny.toml"
    state = f'state-dir = "{tmp_path / "clients"}"\nmeasured-dir = "{measured_dir}"\n'
    data = f'[data]\nname = "300w"\nroot = "{tiny_root}"\n'
    path.write_text(_TINY_SETTING + state + data)
    return path


@pytest.fixture
def faces(make_300w: Callable[..., Path]) -> Path:
    """Six drawn faces to train on and three to test on, as 300-W."""
    return make_300w(
        {
            "helen/trainset": [f"{n}_1.jpg" for n in range(6)],
            "helen/testset": [f"{n}_1.jpg" for n in range(10, 13)],
        }
    )
