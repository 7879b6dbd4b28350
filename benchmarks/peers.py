"""What other people's codecs make of a vector: size, error and speed, one JSON line for each.

    python benchmarks/peers.py VECTOR.npy [PEER ...]

Needs numpy and whichever peers the interpreter has, not this project: `benchmarks/codecs.py` runs
it with each interpreter that it is given. Everything that a receiver needs is counted: codes,
scales, code books, and the peer's own headers. A peer that is not there is a line with "missing".

gzip, bz2   of 8-bit codes of a uniform quantiser, step a multiple of the deviation (4 bytes)
nncodec     ISO/IEC 15938-17 by Fraunhofer HHI: context-adaptive coding of uniformly and of
            dependently quantised values; NNCodec 2.1 asks for numpy below 2
bitsandbytes  blockwise 8 bits and the 4-bit floats nf4 and fp4, one float32 scale a block
hivemind    uniform and quantile 8 bits; hivemind 1.1.12 does not decode beside numpy 2.4
"""

import argparse
import bz2
import contextlib
import json
import os
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

# Before numpy and torch start their threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np

STEPS = (2.0, 1.0, 0.5, 0.25, 0.125, 0.0625)  # of the uniform quantiser, in deviations
QUALITIES = (8, 5, 2, -2, -6, -10, -18, -26)  # NNCodec's qp: 4 less halve the step
NUM_TIMED_RUNS = 3


class Method(NamedTuple):
    """One way to code a vector."""

    name: str
    setting: str
    encode: Callable[[np.ndarray], Any]
    num_bytes: Callable[[Any], int]
    decode: Callable[[Any], np.ndarray]


def general_purpose() -> Iterator[Method]:
    """gzip and bz2 of 8-bit codes."""
    for step in STEPS:
        for name, pack, unpack in (
            ("gzip of int8", lambda codes: zlib.compress(codes, 6), zlib.decompress),
            ("bz2 of int8", lambda codes: bz2.compress(codes, 9), bz2.decompress),
        ):

            def encode(
                vector: np.ndarray, step: float = step, pack: Callable[[bytes], bytes] = pack
            ) -> tuple[np.float32, bytes]:
                size = np.float32(step * vector.std())
                codes = np.clip(np.rint(vector / size), -127, 127).astype(np.int8)
                return size, pack(codes.tobytes())

            def decode(
                coded: tuple[np.float32, bytes], unpack: Callable[[bytes], bytes] = unpack
            ) -> np.ndarray:
                size, content = coded
                return np.frombuffer(unpack(content), dtype=np.int8).astype(np.float32) * size

            yield Method(name, f"step σ·{step:g}", encode, lambda coded: 4 + len(coded[1]), decode)


def nncodec() -> Iterator[Method]:
    from nncodec.tensor import decode, encode

    for kind, dependent in (("uniform", False), ("dependent", True)):
        for quality in QUALITIES:

            def pack(
                vector: np.ndarray, dependent: bool = dependent, quality: int = quality
            ) -> bytearray:
                # Vectors are taken for biases and coded finely; a matrix is what it is made for.
                matrix = vector.reshape(-1, 1024 if vector.size % 1024 == 0 else 1)
                found: bytearray = encode(matrix, {"qp": quality, "use_dq": dependent})
                return found

            yield Method(
                f"NNCodec {kind}", f"qp {quality}", pack, len, lambda blob: decode(blob).reshape(-1)
            )


def bitsandbytes() -> Iterator[Method]:
    import torch
    from bitsandbytes import functional

    def num_bytes(coded: Any) -> int:
        codes, state = coded
        return int(codes.nbytes + state.absmax.nbytes)  # the levels are known to both sides

    def eight(vector: np.ndarray) -> Any:
        return functional.quantize_blockwise(torch.from_numpy(vector))

    yield Method(
        "bitsandbytes blockwise8",
        "blocks of 4096",
        eight,
        num_bytes,
        lambda coded: functional.dequantize_blockwise(*coded).numpy(),
    )
    for kind in ("nf4", "fp4"):

        def four(vector: np.ndarray, kind: str = kind) -> Any:
            return functional.quantize_4bit(torch.from_numpy(vector), blocksize=64, quant_type=kind)

        yield Method(
            f"bitsandbytes {kind}",
            "blocks of 64",
            four,
            num_bytes,
            lambda coded: functional.dequantize_4bit(*coded).reshape(-1).numpy(),
        )


def hivemind() -> Iterator[Method]:
    import torch
    from hivemind.compression import deserialize_torch_tensor, serialize_torch_tensor
    from hivemind.proto import runtime_pb2

    for name in ("uniform", "quantile"):
        kind = getattr(runtime_pb2, f"{name}_8bit".upper())

        def pack(vector: np.ndarray, kind: Any = kind) -> bytes:
            found: bytes = serialize_torch_tensor(
                torch.from_numpy(vector), kind
            ).SerializeToString()
            return found

        yield Method(
            f"hivemind {name}8",
            "",
            pack,
            len,
            lambda blob: deserialize_torch_tensor(runtime_pb2.Tensor.FromString(blob)).numpy(),
        )


PEERS = {
    "general": general_purpose,
    "nncodec": nncodec,
    "bitsandbytes": bitsandbytes,
    "hivemind": hivemind,
}


def measure(vector: np.ndarray, method: Method) -> dict[str, Any]:
    """Bits of a value with everything counted, NMSE, million values a processor second."""
    encode_seconds, coded = best_time(lambda: method.encode(vector))
    decode_seconds, decoded = best_time(lambda: method.decode(coded))
    exact = vector.astype(np.float64)
    return {
        "codec": method.name,
        "setting": method.setting,
        "bits_per_parameter": 8 * method.num_bytes(coded) / vector.size,
        "nmse": float(np.square(decoded - exact).sum() / np.square(exact).sum()),
        "encode_millions_per_second": round(vector.size / encode_seconds / 1e6, 2),
        "decode_millions_per_second": round(vector.size / decode_seconds / 1e6, 2),
    }


def best_time(work: Callable[[], Any]) -> tuple[float, Any]:
    """The least processor time of the process, all its threads, of three runs; the last result."""
    best, result = float("inf"), None
    for _ in range(NUM_TIMED_RUNS):
        start = time.process_time()
        result = work()
        best = min(best, time.process_time() - start)
    return max(best, 1e-9), result


def rows(vector: np.ndarray, peer: str) -> Iterator[dict[str, Any]]:
    """What a peer makes of the vector; a peer that fails is missing, with the reason."""
    try:
        for method in PEERS[peer]():
            yield {"peer": peer} | measure(vector, method)
    except (Exception, SystemExit) as error:  # whatever other people's code raises
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        yield {"peer": peer, "missing": reason[:200]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("vector", help="float32 values saved by numpy")
    parser.add_argument("peers", nargs="*", metavar="PEER", help=f"of {', '.join(PEERS)}")
    arguments = parser.parse_args()
    for peer in arguments.peers:
        if peer not in PEERS:
            parser.error(f"unknown peer '{peer}', expected one of {', '.join(PEERS)}")
    vector = np.load(arguments.vector, allow_pickle=False)
    with contextlib.suppress(ImportError):
        import torch

        torch.set_num_threads(1)
    lines = sys.stdout
    for peer in arguments.peers or PEERS:
        with contextlib.redirect_stdout(sys.stderr):  # peers print what they like
            for row in rows(vector, peer):
                print(json.dumps(row), file=lines, flush=True)


if __name__ == "__main__":
    main()
