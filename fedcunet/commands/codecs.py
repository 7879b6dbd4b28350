"""The commands encode, decode and codecs: what the update codecs do to a vector of your own."""

import io
import json as json_module
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import rich.box
import typer
from rich.console import Console
from rich.table import Table

from fedcunet.codecs import CODECS, Codec, check_codec_bits, get_codec
from fedcunet.codecs.base import check_vector
from fedcunet.errors import UserError
from fedcunet.expected import Expected
from fedcunet.files import write_atomically
from fedcunet.layout import Layout
from fedcunet.payload import Refused, bits_per_parameter, decode_own, open_vector, pack
from fedcunet.payload_header import Rejection

# The widths that the table shows where the user names none.
_USUAL_BITS = (0.5, 1, 2, 3, 4, 6, 8, 16, 32)
_DEFAULT_LENGTH = 2**20
# The best of so many runs is reported: the first also pays for tables that are made once.
_NUM_TIMED_RUNS = 3


def encode(
    source: Annotated[
        Path, typer.Argument(metavar="IN.npy", help="A vector of floating point, saved by numpy.")
    ],
    target: Annotated[Path, typer.Argument(metavar="OUT.bin", help="The payload to write.")],
    codec: Annotated[
        str, typer.Option("--codec", help=f"How to code it: {', '.join(CODECS)}.")
    ] = "eden",
    bits: Annotated[
        float | None,
        typer.Option(
            "--bits",
            help="Bits per value, in the codec's range; `fedcunet codecs` shows them.",
            show_default="2, or the nearest that the codec has",
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option("--seed", help="Of all randomness: the same seed gives the same bytes.")
    ] = 0,
) -> None:
    """Code a vector of floating point (IN.npy) as a client's update is coded.

    The payload (OUT.bin) holds all that decoding needs: header, scales, packed codes, checksum.
    """
    vector = load_vector(source)
    if target.exists() and target.samefile(source):
        raise UserError(f"{target}: expected another file than the vector")
    known = get_codec(codec)
    bits = min(max(2, known.min_bits), known.max_bits) if bits is None else bits
    blob = pack(vector, vector_payload(vector.size, codec, bits, seed))
    write_output(target, blob)
    shown = f"{bits_per_parameter(blob, Layout.vector(vector.size)):.4f}" if vector.size else "-"
    _say(f"{target}: {vector.size} values in {len(blob)} bytes, {shown} bits per value")


def decode(
    source: Annotated[
        Path, typer.Argument(metavar="OUT.bin", help="A payload written by `fedcunet encode`.")
    ],
    target: Annotated[Path, typer.Argument(metavar="BACK.npy", help="The vector to write.")],
) -> None:
    """Decode a payload written by `fedcunet encode` (OUT.bin) into a vector (BACK.npy).

    It is checked as the server checks an update; float32 values are written.
    """
    try:
        blob = source.read_bytes()
    except OSError as error:
        raise UserError(f"{source}: cannot be read: {error.strerror}") from error
    admitted = open_vector(blob)
    if isinstance(admitted, Rejection):
        raise UserError(f"{source}: refused, {admitted.reason}: {admitted.detail}")
    if target.exists() and target.samefile(source):
        raise UserError(f"{target}: expected another file than the payload")
    try:
        vector = admitted.decode()
    except Refused as error:
        raise UserError(f"{source}: refused, {error}") from error
    write_output(target, _npy_bytes(vector))
    _say(f"{target}: {vector.size} values from {admitted.expected.codec}")


def codecs(
    input: Annotated[
        Path | None,
        typer.Option(
            "--input", help="A vector saved by numpy; else 2^20 Gaussian values from the seed."
        ),
    ] = None,
    codec: Annotated[
        list[str] | None, typer.Option("--codec", help="Only this codec; may be given repeatedly.")
    ] = None,
    bits: Annotated[
        list[float] | None,
        typer.Option("--bits", help="Only these bits per value; may be given repeatedly."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the values and of the codecs.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON list instead.")] = False,
) -> None:
    """Compare the codecs: size with everything counted, error, and speed.

    NMSE is ||x - decoded||² / ||x||². Beside it stands 2^(-2R) at the measured R bits per
    parameter, the least NMSE that any codec can have for Gaussian values.
    """
    pairs = chosen_codecs(codec or [], bits or [])
    vector_payload(0, "float32", 32, seed)  # Refuses a seed out of range before any work.
    vector = gaussian_vector(seed) if input is None else load_vector(input)
    if vector.size == 0:
        raise UserError(f"{input}: an empty vector has no bits per parameter")
    rows = [measure(vector, one.name, width, seed) for one, width in pairs]
    if json:
        print(json_module.dumps(rows))
    else:
        print_table(rows, vector.size)


def gaussian_vector(seed: int) -> np.ndarray:
    """2^20 standard Gaussian float32 values."""
    return np.random.default_rng(seed).standard_normal(_DEFAULT_LENGTH, dtype=np.float32)


def vector_payload(length: int, codec: str, bits: float, seed: int) -> Expected:
    """What a payload of a plain vector is: round 0 of sender 0 in the run of that seed."""
    return Expected(
        layout=Layout.vector(length), run_seed=seed, round=0, sender=0, codec=codec, bits=bits
    )


def chosen_codecs(names: Sequence[str], bits: Sequence[float]) -> list[tuple[Codec, float]]:
    """Each codec named (all if none is) at each of the bits (the usual ones if none) it allows.

    Raises:
        UserError: A codec is unknown, or a codec or a number of bits that was named is left with
            nothing to show.
    """
    for width in bits:
        if not 0 < width <= 32:
            raise UserError(f"bits must be a number from 0 to 32, not {width:g}")
    chosen = [get_codec(name) for name in dict.fromkeys(names)] or list(CODECS.values())
    pairs = [
        (codec, int(width) if width == int(width) else width)
        for codec in chosen
        for width in dict.fromkeys(bits or _USUAL_BITS)
        if _allows(codec, width)
    ]
    ranges = ", ".join(f"{codec.name} {codec.min_bits:g}-{codec.max_bits:g}" for codec in chosen)
    for width in bits:
        if all(width != shown for _, shown in pairs):
            raise UserError(f"no codec chosen allows {width:g} bits; allowed: {ranges}")
    for name in names:
        if all(name != codec.name for codec, _ in pairs):
            raise UserError(f"codec '{name}' allows none of the bits given; allowed: {ranges}")
    return pairs


def _allows(codec: Codec, bits: float) -> bool:
    try:
        check_codec_bits(codec, bits)
    except UserError:
        return False
    return True


def measure(vector: np.ndarray, codec: str, bits: float, seed: int) -> dict[str, Any]:
    """One row of the table: the vector packed into a whole payload and decoded again."""
    expected = vector_payload(vector.size, codec, bits, seed)
    encode_seconds, blob = _best_time(lambda: pack(vector, expected))
    decode_seconds, decoded = _best_time(lambda: decode_own(blob, expected))
    return {
        "codec": codec,
        "bits": bits,
        "bits_per_parameter": bits_per_parameter(blob, expected.layout),
        "nmse": nmse(decoded, vector),
        "encode_seconds": encode_seconds,
        "decode_seconds": decode_seconds,
    }


def nmse(decoded: np.ndarray, vector: np.ndarray) -> float:
    """||vector - decoded||² / ||vector||²; 0 for zeros that came back as zeros."""
    exact = vector.astype(np.float64)
    # Largest magnitude 1: squares of tiny values would vanish.
    unit = float(np.abs(exact).max(initial=0)) or 1.0
    error = float(np.sum(np.square((decoded - exact) / unit)))
    energy = float(np.sum(np.square(exact / unit)))
    return error / energy if energy else error


def print_table(rows: Sequence[dict[str, Any]], length: int) -> None:
    """The rows as a table on standard output."""
    table = Table(
        title=f"{length} values: size with everything counted, error, millions of values a second",
        box=rich.box.SIMPLE,
    )
    table.add_column("codec", no_wrap=True)
    for heading in ("bits", "bits/param", "NMSE", "2^(-2R)", "enc M/s", "dec M/s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        rate = row["bits_per_parameter"]
        table.add_row(
            row["codec"],
            f"{row['bits']:g}",
            f"{rate:.3f}",
            f"{row['nmse']:.3g}",
            f"{2 ** (-2 * rate):.3g}",
            f"{length / row['encode_seconds'] / 1e6:.1f}",
            f"{length / row['decode_seconds'] / 1e6:.1f}",
        )
    Console().print(table)


def load_vector(path: Path) -> np.ndarray:
    """The float32 vector in a .npy file.

    Raises:
        UserError: It is not one, or has values that no codec takes.
    """
    try:
        with path.open("rb") as file:
            array = np.lib.format.read_array(file, allow_pickle=False)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except Exception as error:  # numpy raises many kinds for files that are not its own.
        raise UserError(f"{path}: not a .npy file that can be read: {_one_line(error)}") from error
    try:
        return check_vector(array)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error


def write_output(path: Path, content: bytes) -> None:
    """Writes a file that is there whole or not at all; its folder is made.

    Raises:
        UserError: It cannot be written.
    """
    try:
        write_atomically(path, content)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error


def _npy_bytes(vector: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, vector.astype("<f4", copy=False), allow_pickle=False)
    return buffer.getvalue()


def _best_time(work: Callable[[], Any]) -> tuple[float, Any]:
    """The least wall time of a few runs in seconds, and the last result."""
    best, result = float("inf"), None
    for _ in range(_NUM_TIMED_RUNS):
        start = time.perf_counter()
        result = work()
        best = min(best, time.perf_counter() - start)
    return best, result


def _one_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _say(line: str) -> None:
    print(line, file=sys.stderr)
