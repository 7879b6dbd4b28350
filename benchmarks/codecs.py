"""Codecs against the information limit and against peers: error at equal bytes, speed, means.

    python benchmarks/codecs.py [--only TABLE] [--shrinkage] [--length N] [--seed S]
        [--peer-python PYTHON ...] [--out FILE.json] [--picture FILE.png]

Two tables, on one thread, everything counted (header, scales, side information, checksum):

rates    NMSE of Gaussian and Student-t(4) values, of this project's codecs and of peers. The gap is
         that of the rate to 1/2·log2(1 + 1/NMSE), the least of an unbiased codec for Gaussian
         values; for biased ones also to 1/2·log2(1/NMSE). This project's payloads are decoded from
         files by another process, as `fedcunet decode` does. Speeds are million values a second by
         the processor time of the process, so that other work on the machine counts little; the
         best of three.
means    n·||error of the mean||² / mean ||x||² of n clients, x_i = sqrt(r)·s + sqrt(1-r)·e_i. With
         --shrinkage also that of the shrunk mean (federation.shrinkage), at 0.5 bit too, of the
         codecs whose noise is known.

Peers (`benchmarks/peers.py`) are run with this interpreter and those of --peer-python, for peers
that need another numpy. bitsandbytes comes with the extra `peers`; NNCodec 2.1 and hivemind 1.1
want a virtual environment of their own with numpy below 2. Peers that no interpreter has are named
in the output.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

# Before numpy starts its threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import matplotlib
import numpy as np
from peers import PEERS, best_time

from fedcunet.codecs import CODECS, make_seed
from fedcunet.codecs.base import noise_known, sum_of_squares
from fedcunet.commands.codecs import nmse, vector_payload
from fedcunet.payload import bits_per_parameter, decode_own, pack
from fedcunet.shrinkage import shrinkage_factor

matplotlib.use("Agg")
from matplotlib import pyplot

BUDGETS = (0.5, 1, 2, 3, 4, 6, 8)
CODED = [("trellis", bits) for bits in BUDGETS]
CODED += [("trellis-wiener", bits) for bits in (0.5, 1, 2)]
CODED += [("dithered", bits) for bits in (0.5, 1, 2, 4)]
CODED += [("hadamard-trellis", bits) for bits in (1, 2, 3, 4)]
CODED += [("eden", bits) for bits in (1, 2, 3, 4, 6, 8)]
CODED += [("qsgd", 4), ("min-max", 2), ("min-max", 8), ("top-k", 0.5)]
# Decodes payload files, each beside itself, as `fedcunet decode` does.
DECODE = """
import sys
from pathlib import Path
from fedcunet.commands.codecs import decode
for name in sys.argv[1:]:
    decode(Path(name), Path(name).with_suffix(".npy"))
"""
CORRELATIONS = (0.0, 0.4, 0.9)


def rates(
    vectors: dict[str, np.ndarray], seed: int, pythons: list[str]
) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of the first table, and the peers that are missing, with the reasons."""
    rows, missing = [], []
    for kind, vector in vectors.items():
        found = own_rows(vector, seed)
        peers, missing = peer_rows(vector, pythons)
        rows += [{"values": kind} | row for row in found + peers]
    return rows, missing


def own_rows(vector: np.ndarray, seed: int) -> list[dict[str, Any]]:
    """This project's codecs; all payloads are decoded by one process of its own."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        sources = [Path(folder) / f"{number}.bin" for number in range(len(CODED))]
        for (codec, bits), source in zip(CODED, sources, strict=True):
            expected = vector_payload(vector.size, codec, bits, seed)
            encode, blob = best_time(lambda expected=expected: pack(vector, expected))
            decode, _ = best_time(lambda blob=blob, expected=expected: decode_own(blob, expected))
            source.write_bytes(blob)
            rows.append({
                "codec": codec,
                "setting": f"{bits:g} bits",
                "bits_per_parameter": bits_per_parameter(blob, expected.layout),
                "encode_millions_per_second": round(vector.size / encode / 1e6, 2),
                "decode_millions_per_second": round(vector.size / decode / 1e6, 2),
            })  # fmt: skip
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
        command = [sys.executable, "-c", DECODE, *map(str, sources)]
        subprocess.run(command, check=True, capture_output=True)
        for row, source in zip(rows, sources, strict=True):
            row["nmse"] = nmse(np.load(source.with_suffix(".npy")), vector)
            row |= gaps(row, CODECS[row["codec"]].unbiased)
    return rows


def gaps(row: dict[str, Any], unbiased: bool) -> dict[str, Any]:
    """Bits above the least rate of an unbiased codec, and of any, for Gaussian values."""
    rate, error = row["bits_per_parameter"], row["nmse"]
    return {
        "unbiased": unbiased,
        "gap_bits": rate - 0.5 * np.log2(1 + 1 / error),
        "gap_biased_bits": None if unbiased else rate - 0.5 * np.log2(1 / error),
    }


def peer_rows(vector: np.ndarray, pythons: list[str]) -> tuple[list[dict[str, Any]], list[str]]:
    """What peers make of the vector, each by the first interpreter that has it; those missing."""
    found: dict[str, list[dict[str, Any]]] = {}
    reasons: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vector.npy"
        np.save(path, vector)
        for python in pythons:
            left = [name for name in PEERS if name not in found]
            program = Path(__file__).resolve().with_name("peers.py")
            command = [str(Path(python).absolute()), str(program), str(path), *left]
            # NNCodec leaves a file in the current folder.
            done = subprocess.run(
                command, check=True, stdout=subprocess.PIPE, text=True, cwd=folder
            )
            lines = [json.loads(line) for line in done.stdout.splitlines()]
            broken = {line["peer"]: line["missing"] for line in lines if "missing" in line}
            reasons |= broken
            for name in left:
                if name not in broken:
                    found[name] = [line for line in lines if line["peer"] == name]
    rows = [row | gaps(row, False) for name in PEERS for row in found.get(name, [])]
    return rows, [f"{name}: {reasons[name]}" for name in PEERS if name not in found]


def means(length: int, seed: int, shrinkage: bool) -> list[dict[str, Any]]:
    """Rows of the second table."""
    rows = []
    settings = [(codec, bits) for codec in ("trellis", "eden", "min-max") for bits in (1, 2)]
    if shrinkage:
        settings = [("trellis", 0.5), *settings[:-2]]
    for codec, bits in settings:
        for correlation in CORRELATIONS:
            for count in (10, 100):
                plain, shrunk = errors_of_mean(codec, bits, count, correlation, length, seed)
                rows.append({"codec": codec, "bits": bits, "clients": count,
                             "correlation": correlation, "n_times_nmse": plain})  # fmt: skip
                if shrinkage:
                    rows[-1]["n_times_nmse_shrunk"] = shrunk
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def errors_of_mean(
    codec: str, bits: float, count: int, correlation: float, length: int, seed: int
) -> tuple[float, float | None]:
    """That of the mean and of the shrunk mean; None where the noise is not known."""
    generator = np.random.default_rng([seed, count])
    shared = np.sqrt(correlation) * generator.standard_normal(length)
    meant, decoded = np.zeros(length), np.zeros(length)
    energy, noise, known = 0.0, 0.0, noise_known(CODECS[codec])
    for client in range(count):
        own = np.sqrt(1 - correlation) * generator.standard_normal(length)
        vector = (shared + own).astype(np.float32)
        key = make_seed(seed, 0, client, "update")
        body = CODECS[codec].encode(vector, bits=bits, seed=key)
        values = CODECS[codec].decode(body, length=length, bits=bits, seed=key)
        meant += vector / np.float64(count)
        decoded += values / np.float64(count)
        energy += sum_of_squares(vector)
        if known is not None:
            noise += known.noise(body, values, bits=bits).item() / count**2
    unit = energy / count / count
    plain = sum_of_squares(decoded - meant) / unit
    if known is None:
        return plain, None
    factor = shrinkage_factor(noise, sum_of_squares(decoded), length)
    return plain, sum_of_squares(factor * decoded - meant) / unit


def print_table(rows: list[dict[str, Any]]) -> None:
    """The rows of the first table as text."""
    for kind in dict.fromkeys(row["values"] for row in rows):
        print(f"{kind} values")
        print(f"{'codec':<24} {'setting':<15} {'bits':>6} {'NMSE':>9} {'gap':>6} {'biased':>6} "
              f"{'enc M/s':>7} {'dec M/s':>7}")  # fmt: skip
        for row in (row for row in rows if row["values"] == kind):
            biased = row["gap_biased_bits"]
            print(f"{row['codec']:<24} {row['setting']:<15} {row['bits_per_parameter']:>6.3f} "
                  f"{row['nmse']:>9.3g} {row['gap_bits']:>6.3f} "
                  f"{'' if biased is None else f'{biased:.3f}':>6} "
                  f"{row['encode_millions_per_second']:>7.1f} "
                  f"{row['decode_millions_per_second']:>7.1f}")  # fmt: skip


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """NMSE against bits a value: the limits, this project's codecs (lines) and peers (marks)."""
    kinds = list(dict.fromkeys(row["values"] for row in rows))
    figure, axes = pyplot.subplots(1, len(kinds), figsize=(8 * len(kinds), 7), sharey=True)
    rate = np.linspace(0.2, 9, 200)
    for axis, kind in zip(np.atleast_1d(axes), kinds, strict=True):
        axis.plot(rate, 2.0 ** (-2 * rate), "k-", linewidth=0.8, label="limit, Gaussian: any codec")
        axis.plot(
            rate, 1 / (2.0 ** (2 * rate) - 1), "k--", linewidth=0.8, label="limit: unbiased codecs"
        )
        names = dict.fromkeys(row["codec"] for row in rows if row["values"] == kind)
        for number, name in enumerate(names):
            chosen = [row for row in rows if row["values"] == kind and row["codec"] == name]
            chosen.sort(key=lambda row: row["bits_per_parameter"])
            own = name in CODECS
            axis.plot(
                [row["bits_per_parameter"] for row in chosen],
                [row["nmse"] for row in chosen],
                marker="o" if own else "Xsd^vP*<>"[number % 9],
                linestyle="-" if own else ":",
                markersize=4 if own else 6,
                linewidth=1.6 if name == "trellis" else 0.8,
                color=pyplot.get_cmap("tab20")(number % 20),
                label=name,
            )
        axis.set(yscale="log", xlim=(0, 9), ylim=(5e-6, 5), xlabel="bits a value, all counted")
        axis.set(ylabel="NMSE", title=f"{kind} values")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=2**20, help="values of the rates")
    parser.add_argument("--clients-length", type=int, default=2**15, help="values of a client")
    parser.add_argument("--seed", type=int, default=0, help="of values and codecs")
    parser.add_argument("--only", choices=["rates", "means"], help="one table alone")
    parser.add_argument("--shrinkage", action="store_true", help="means with and without it")
    parser.add_argument(
        "--peer-python", action="append", default=[], help="an interpreter that has peers"
    )
    parser.add_argument("--picture", type=Path, help="draw the rates into this PNG")
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    arguments = parser.parse_args()
    generator = np.random.default_rng(arguments.seed)
    vectors = {
        "gaussian": generator.standard_normal(arguments.length, dtype=np.float32),
        "student-t4": generator.standard_t(4, arguments.length).astype(np.float32),
    }
    tables: dict[str, Any] = {"length": arguments.length, "threads": 1}
    if arguments.only in (None, "rates"):
        pythons = [sys.executable, *arguments.peer_python]
        tables["rates"], tables["missing_peers"] = rates(vectors, arguments.seed, pythons)
    if arguments.only in (None, "means"):
        tables["means"] = means(arguments.clients_length, arguments.seed, arguments.shrinkage)
    if arguments.out:
        arguments.out.write_text(json.dumps(tables, indent=1) + "\n")
    if "rates" in tables:
        print_table(tables["rates"])
        for line in tables["missing_peers"]:
            print(f"missing: {line}")
        if arguments.picture:
            draw(tables["rates"], arguments.picture)
    for row in tables.get("means", []):
        print(json.dumps(row))


if __name__ == "__main__":
    main()
