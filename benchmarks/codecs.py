"""Codecs against the information limit: error at equal bytes, means over clients, speed.

    PYTHONPATH=. python benchmarks/codecs.py [--only TABLE] [--length N] [--seed S] [--out FILE]

Three tables, on one thread, everything counted (header, scales, side information, checksum):

rates    NMSE of Gaussian and Student-t(4) values and the gap of the rate to 1/2·log2(1 + 1/NMSE),
         the least rate of an unbiased codec for Gaussian values. Payloads are decoded from files by
         another process (`fedcunet decode`).
means    n·||error of the mean||² / mean ||x||² of n clients, x_i = sqrt(r)·s + sqrt(1-r)·e_i.
speeds   Million values a second by the processor time of the thread, so that other work on the
         machine counts little; the best of three.

Peers in the same run: EDEN, QSGD and min-max as this project's codecs; gzip of 8-bit codes and
NVFlare's nf4 (blocks of 64, a float32 scale each: 4.5 bits) as arithmetic written here.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before numpy starts its threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
from scipy.special import ndtri

from fedcunet.codecs import CODECS, make_seed
from fedcunet.commands.codecs import nmse, vector_payload
from fedcunet.payload import bits_per_parameter, decode_own, pack

BUDGETS = (0.5, 1, 2, 3, 4, 6, 8)
CODED = [("trellis", bits) for bits in BUDGETS]
CODED += [("trellis-wiener", bits) for bits in (0.5, 1, 2)]
CODED += [("dithered", bits) for bits in (0.5, 1, 2, 4)]
CODED += [("hadamard-trellis", bits) for bits in (1, 2, 3, 4)]
CODED += [("eden", bits) for bits in (1, 2, 3, 4, 6, 8)]
CODED += [("qsgd", 4), ("min-max", 2), ("min-max", 8), ("top-k", 0.5)]
TIMED = [("trellis", bits) for bits in (0.5, 1, 2, 4)]
TIMED += [("dithered", 2), ("hadamard-trellis", 2), ("eden", 2), ("eden", 4)]
CORRELATIONS = (0.0, 0.4, 0.9)


def rates(vectors: dict[str, np.ndarray], seed: int) -> list[dict[str, Any]]:
    """Rows of the first table; every payload is decoded by a process of its own."""
    rows = []
    for kind, vector in vectors.items():
        for codec, bits in CODED:
            expected = vector_payload(vector.size, codec, bits, seed)
            blob = pack(vector, expected)
            row = {"values": kind, "codec": codec, "bits": bits}
            row |= figures(
                vector,
                decoded_elsewhere(blob),
                bits_per_parameter(blob, expected.layout),
                CODECS[codec].unbiased,
            )
            rows.append(row)
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
        for name, (decoded, rate) in peers(vector).items():
            row = {"values": kind, "codec": name, "bits": round(rate, 2)}
            rows.append(row | figures(vector, decoded, rate, False))
    return rows


def figures(vector: np.ndarray, decoded: np.ndarray, rate: float, unbiased: bool) -> dict[str, Any]:
    """Rate, error, and the gap to the limit of an unbiased or of any codec."""
    error = nmse(decoded, vector)
    limit = 0.5 * np.log2(1 + 1 / error) if unbiased else 0.5 * np.log2(1 / error)
    return {"bits_per_parameter": rate, "nmse": error, "gap_bits": rate - limit}


def decoded_elsewhere(blob: bytes) -> np.ndarray:
    """What `fedcunet decode`, in another process, makes of a payload."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "payload.bin", Path(folder) / "vector.npy"
        source.write_bytes(blob)
        command = [sys.executable, "-m", "fedcunet", "decode", str(source), str(target)]
        subprocess.run(command, check=True, capture_output=True)
        return np.load(target)


def peers(vector: np.ndarray) -> dict[str, tuple[np.ndarray, float]]:
    """Decoded vector and bits per value of arithmetic that others use."""
    found = {}
    for name, deviations in (("gzip of int8, step σ/2", 0.5), ("gzip of int8, step σ/8", 0.125)):
        step = deviations * vector.std()
        codes = np.clip(np.rint(vector / step), -127, 127).astype(np.int8)
        size = len(zlib.compress(codes.tobytes(), 6))
        found[name] = (codes.astype(np.float32) * np.float32(step), 8 * size / vector.size)
    blocks = np.pad(vector, (0, -vector.size % 64)).reshape(-1, 64)
    scale = np.abs(blocks).max(axis=1, keepdims=True)
    levels = normal_float_levels()
    codes = np.searchsorted((levels[1:] + levels[:-1]) / 2, blocks / scale)
    found["nf4"] = ((levels[codes] * scale).reshape(-1)[: vector.size].astype(np.float32), 4.5)
    return found


def normal_float_levels() -> np.ndarray:
    """The 16 levels of nf4 (Dettmers et al., "QLoRA", NeurIPS 2023, appendix E)."""
    offset = 0.5 * (1 / 32 + 1 / 30)
    positive = ndtri(np.linspace(0.5, 1 - offset, 9))[1:]
    negative = ndtri(np.linspace(0.5, 1 - offset, 8))[1:]
    levels = np.concatenate([-negative[::-1], [0], positive])
    return levels / levels.max()


def means(length: int, seed: int) -> list[dict[str, Any]]:
    """Rows of the second table."""
    rows = []
    for codec in ("trellis", "eden", "min-max"):
        for bits in (1, 2):
            for correlation in CORRELATIONS:
                for count in (10, 100):
                    value = error_of_mean(codec, bits, count, correlation, length, seed)
                    rows.append({"codec": codec, "bits": bits, "clients": count,
                                 "correlation": correlation, "n_times_nmse": value})  # fmt: skip
                    print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def error_of_mean(
    codec: str, bits: float, count: int, correlation: float, length: int, seed: int
) -> float:
    generator = np.random.default_rng([seed, count])
    shared = np.sqrt(correlation) * generator.standard_normal(length)
    error, energy = np.zeros(length), 0.0
    for client in range(count):
        own = np.sqrt(1 - correlation) * generator.standard_normal(length)
        vector = (shared + own).astype(np.float32)
        key = make_seed(seed, 0, client, "update")
        body = CODECS[codec].encode(vector, bits=bits, seed=key)
        error += CODECS[codec].decode(body, length=length, bits=bits, seed=key) - vector
        energy += float(np.square(vector.astype(np.float64)).sum())
    return float(np.square(error / count).sum()) * count / (energy / count)


def speeds(vector: np.ndarray, seed: int) -> list[dict[str, Any]]:
    """Rows of the third table."""
    rows = []
    for codec, bits in TIMED:
        expected = vector_payload(vector.size, codec, bits, seed)
        encode, blob = best_time(lambda expected=expected: pack(vector, expected))
        decode, _ = best_time(lambda blob=blob, expected=expected: decode_own(blob, expected))
        rows.append(speed_row(codec, bits, vector.size, encode, decode))
    codes = np.clip(np.rint(2 * vector), -127, 127).astype(np.int8).tobytes()
    encode, packed = best_time(lambda: zlib.compress(codes, 6))
    decode, _ = best_time(lambda: zlib.decompress(packed))
    rows.append(speed_row("gzip of int8", 2, vector.size, encode, decode))
    return rows


def speed_row(codec: str, bits: float, length: int, encode: float, decode: float) -> dict[str, Any]:
    return {
        "codec": codec,
        "bits": bits,
        "encode_millions_per_second": round(length / encode / 1e6, 2),
        "decode_millions_per_second": round(length / decode / 1e6, 2),
    }


def best_time(work: Callable[[], Any]) -> tuple[float, Any]:
    """The least processor time of three runs in seconds, and the last result."""
    best, result = float("inf"), None
    for _ in range(3):
        start = time.thread_time()
        result = work()
        best = min(best, time.thread_time() - start)
    return best, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=2**20, help="values of rates and speeds")
    parser.add_argument("--clients-length", type=int, default=2**15, help="values of a client")
    parser.add_argument("--seed", type=int, default=0, help="of values and codecs")
    parser.add_argument("--only", choices=["rates", "means", "speeds"], help="one table alone")
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    arguments = parser.parse_args()
    generator = np.random.default_rng(arguments.seed)
    vectors = {
        "gaussian": generator.standard_normal(arguments.length, dtype=np.float32),
        "student-t4": generator.standard_t(4, arguments.length).astype(np.float32),
    }
    tables: dict[str, Any] = {"length": arguments.length, "threads": 1}
    if arguments.only in (None, "speeds"):
        tables["speeds"] = speeds(vectors["gaussian"], arguments.seed)
    if arguments.only in (None, "rates"):
        tables["rates"] = rates(vectors, arguments.seed)
    if arguments.only in (None, "means"):
        tables["means"] = means(arguments.clients_length, arguments.seed)
    text = json.dumps(tables, indent=1)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
