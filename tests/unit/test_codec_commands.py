"""fedcunet encode, decode and codecs, as a user and a program run them."""

import json
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from fedcunet.codecs import CODECS
from fedcunet.commands import codecs as commands
from fedcunet.errors import UserError

APP = typer.Typer()
for _command in (commands.encode, commands.decode, commands.codecs):
    APP.command()(_command)


def invoke(*arguments: object) -> str:
    """Standard output of a command that must end well."""
    result = CliRunner().invoke(APP, [str(argument) for argument in arguments])
    assert result.exception is None, result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def user_error_of(*arguments: object) -> str:
    """The one line of a command that must end with a UserError."""
    result = CliRunner().invoke(APP, [str(argument) for argument in arguments])
    assert isinstance(result.exception, UserError), (result.exception, result.output)
    line = str(result.exception)
    assert "\n" not in line
    return line


@pytest.fixture
def vector_file(tmp_path: Path) -> Path:
    path = tmp_path / "in.npy"
    np.save(path, np.random.default_rng(0).standard_normal(1000).astype(np.float32))
    return path


@pytest.mark.parametrize(
    ("codec", "bits"), [("eden", 2), ("linear", 8), ("float32", 32), ("trellis", 2.5)]
)
def test_encode_and_decode_bring_a_vector_back_from_the_payload_alone(
    vector_file: Path, tmp_path: Path, codec: str, bits: float
) -> None:
    blob, back = tmp_path / "out.bin", tmp_path / "back.npy"
    arguments = ("encode", "--codec", codec, "--bits", bits, "--seed", 5, vector_file, blob)
    assert invoke(*arguments) == ""
    first = blob.read_bytes()
    invoke(*arguments)
    assert blob.read_bytes() == first
    vector_file.rename(tmp_path / "gone.npy")
    invoke("decode", blob, back)
    vector, decoded = np.load(tmp_path / "gone.npy"), np.load(back)
    assert decoded.dtype == np.float32
    assert (
        commands.nmse(decoded, vector)
        < {"eden": 0.2, "trellis": 0.15, "linear": 1e-3, "float32": 1e-30}[codec]
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back.npy", "gone.npy", "out.bin"]


def test_a_codec_has_bits_of_its_own_by_default_and_no_file_is_read_and_written(
    vector_file: Path, tmp_path: Path
) -> None:
    before = vector_file.read_bytes()
    assert "expected another file than the vector" in user_error_of(
        "encode", vector_file, vector_file
    )
    assert vector_file.read_bytes() == before
    blob = tmp_path / "out.bin"
    for codec in CODECS:
        invoke("encode", "--codec", codec, vector_file, blob)
    assert "expected another file than the payload" in user_error_of("decode", blob, blob)


def test_vectors_of_any_float_type_and_byte_order_and_empty_ones_are_taken(tmp_path: Path) -> None:
    for index, vector in enumerate(
        (np.arange(3.0), np.arange(3, dtype=">f4"), np.arange(3, dtype="<f2"), np.empty(0))
    ):
        source, blob, back = (tmp_path / f"{index}.{kind}" for kind in ("npy", "bin", "back.npy"))
        np.save(source, vector)
        invoke("encode", "--codec", "float32", "--bits", 32, source, blob)
        invoke("decode", blob, back)
        np.testing.assert_array_equal(np.load(back), vector)


def test_codecs_prints_one_json_list_with_the_promised_keys(vector_file: Path) -> None:
    rows = json.loads(
        invoke("codecs", "--input", vector_file, "--codec", "eden", "--codec", "sign", "--json")
    )
    assert [(row["codec"], row["bits"]) for row in rows] == [
        *(("eden", bits) for bits in (1, 2, 3, 4, 6, 8)),
        ("sign", 1),
    ]
    for row in rows:
        assert list(row) == [
            "codec",
            "bits",
            "bits_per_parameter",
            "nmse",
            "encode_seconds",
            "decode_seconds",
        ]
        assert row["encode_seconds"] > 0
        assert row["decode_seconds"] > 0
    # 1000 values: 60 bytes around a body of 4 + 125 bytes.
    assert rows[-1]["bits_per_parameter"] == 8 * (60 + 4 + 125) / 1000


def test_codecs_without_json_prints_a_table_with_the_limit_beside_the_error(
    vector_file: Path,
) -> None:
    printed = invoke("codecs", "--input", vector_file, "--bits", "1", "--bits", "32")
    for word in ("codec", "NMSE", "2^(-2R)", "enc M/s", "float32", "sign", "eden"):
        assert word in printed
    assert "linear" not in printed


def test_codecs_codes_a_million_gaussian_values_by_default() -> None:
    rows = json.loads(invoke("codecs", "--codec", "sign", "--seed", 3, "--json"))
    assert rows[0]["nmse"] == pytest.approx(1 - 2 / np.pi, rel=0.01)
    assert rows[0]["bits_per_parameter"] == 8 * (60 + 4 + 2**17) / 2**20


def test_the_error_of_zeros_and_of_tiny_values_is_a_number(tmp_path: Path) -> None:
    for name, vector in (("zeros", np.zeros(9)), ("tiny", np.full(9, 1e-300))):
        np.save(tmp_path / name, vector)
        rows = json.loads(invoke("codecs", "--input", tmp_path / f"{name}.npy", "--json"))
        assert all(np.isfinite(row["nmse"]) for row in rows)


def test_inputs_that_are_no_vectors_are_one_clear_line(tmp_path: Path) -> None:
    def saved(array: np.ndarray) -> Path:
        np.save(tmp_path / "x.npy", array)
        return tmp_path / "x.npy"

    text = tmp_path / "text.npy"
    text.write_text("not an array\n")
    blob = tmp_path / "out.bin"
    cases = (
        (tmp_path / "missing.npy", "cannot be read: No such file"),
        (tmp_path, "cannot be read: Is a directory"),
        (text, "not a .npy file"),
        (lambda: saved(np.ones((2, 3))), "not shape (2, 3) float64"),
        (lambda: saved(np.ones(3, dtype=int)), "not shape (3,) int64"),
        (lambda: saved(np.array([{}], dtype=object)), "not a .npy file"),
        (lambda: saved(np.array([1.0, np.nan])), "1 of 2 values are NaN"),
        (lambda: saved(np.array([1e300])), "beyond 2^120"),
    )
    for source, message in cases:
        path = source() if callable(source) else source
        line = user_error_of("encode", path, blob)
        assert message in line
        assert str(path) in line
    assert not blob.exists()


def test_wrong_choices_are_one_clear_line_with_those_there_are(vector_file: Path) -> None:
    blob = vector_file.with_name("out.bin")
    for arguments, message in (
        (
            ("encode", "--codec", "edem", vector_file, blob),
            "unknown codec 'edem'; there are: float",
        ),
        (("encode", "--bits", 33, vector_file, blob), "from 1 to 8, not 33"),
        (("encode", "--bits", 0, vector_file, blob), "from 1 to 8, not 0"),
        (("encode", "--seed", -1, vector_file, blob), "seed must be in [0, 2^64), not -1"),
        (("codecs", "--codec", "edem"), "unknown codec 'edem'"),
        (("codecs", "--codec", "eden", "--bits", "9"), "no codec chosen allows 9 bits"),
        (("codecs", "--codec", "eden", "--codec", "sign", "--bits", "2"), "'sign' allows none"),
        (("codecs", "--bits", "33"), "from 0 to 32, not 33"),
        (("encode", vector_file, vector_file / "out.bin"), "cannot be written: "),
    ):
        assert message in user_error_of(*arguments)


def test_a_damaged_or_foreign_payload_is_refused_with_its_reason(
    vector_file: Path, tmp_path: Path
) -> None:
    blob, back = tmp_path / "out.bin", tmp_path / "back.npy"
    invoke("encode", vector_file, blob)
    content = blob.read_bytes()
    for damaged, reason in (
        (content[:-1], "wrong-length"),
        (content[:100] + b"\xff\xff" + content[102:], "bad-checksum"),
        (b"hello", "too-short"),
        (vector_file.read_bytes(), "bad-magic"),
    ):
        blob.write_bytes(damaged)
        assert f"refused, {reason}:" in user_error_of("decode", blob, back)
    assert not back.exists()
