"""Size, error and speed of every codec on Gaussian values, on one thread, as JSON.

    python benchmarks/codecs.py [--length N] [--seed S] [--out FILE]

Rates count the whole path of an update: packing with header and checksum, and on the way back the
checks and the decoding.
"""

import argparse
import json
import os
from pathlib import Path

# Before numpy starts its threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np

from fedcunet.commands.codecs import chosen_codecs, measure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=2**20, help="number of values")
    parser.add_argument("--seed", type=int, default=0, help="of values and codecs")
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    arguments = parser.parse_args()

    generator = np.random.default_rng(arguments.seed)
    vector = generator.standard_normal(arguments.length, dtype=np.float32)
    results = []
    for codec, bits in chosen_codecs([], []):
        row = measure(vector, codec.name, bits, arguments.seed)
        results.append(
            {
                "codec": row["codec"],
                "bits": bits,
                "bits_per_parameter": round(row["bits_per_parameter"], 4),
                "nmse": row["nmse"],
                "gaussian_limit": 2 ** (-2 * row["bits_per_parameter"]),
                "encode_mparams_per_second": round(vector.size / row["encode_seconds"] / 1e6, 1),
                "decode_mparams_per_second": round(vector.size / row["decode_seconds"] / 1e6, 1),
            }
        )
    text = json.dumps({"length": vector.size, "threads": 1, "results": results}, indent=1)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
