"""Thousands of damaged input files, and what became of them, as a table and JSON.

    python -m tests.fuzz [--count 2000] [--seed 0] [--json]

A quarter each of .pts, JSON, .mat and image files. Each is refused in one clear line, or read as an
independent reader reads it; anything else ends this program with an error, and so does a file that
takes long. The test suite runs the same functions on fewer files.
"""

import argparse
import faulthandler
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tests.properties.test_fuzzed_annotations import (
    cpm_file,
    fuzz_json,
    fuzz_mat,
    fuzz_pts,
    hrnet_file,
)
from tests.properties.test_fuzzed_images import fuzz_images, originals

_LONGEST_SECONDS = 600  # of all files of a kind

Fuzz = Callable[[Path, np.random.Generator, int], int]


def kinds() -> dict[str, tuple[float, Fuzz]]:
    """Each kind's share of the files, and the function that says how many were refused."""
    images = list(originals(np.random.default_rng(0)))
    found: dict[str, tuple[float, Fuzz]] = {"pts": (1 / 4, fuzz_pts)}
    for name, make in (("HRNet's", hrnet_file), ("CPM's", cpm_file)):
        for as_tree in (True, False):
            found[f"json, {name}, {'values' if as_tree else 'bytes'}"] = (
                1 / 16,
                lambda folder, generator, count, make=make, as_tree=as_tree: fuzz_json(
                    folder, generator, count, make, as_tree=as_tree
                ),
            )
    for compress in (True, False):
        found[f"mat, {'compressed' if compress else 'plain'}"] = (
            1 / 8,
            lambda folder, generator, count, compress=compress: fuzz_mat(
                folder, generator, count, compress=compress
            )[0],
        )
    for kind in images:
        found[kind] = (
            1 / 4 / len(images),
            lambda folder, generator, count, kind=kind: fuzz_images(folder, generator, kind, count)[
                "refused"
            ],
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=2000, help="files in all")
    parser.add_argument("--seed", type=int, default=0, help="of the damage")
    parser.add_argument("--json", action="store_true", help="print one JSON value")
    arguments = parser.parse_args()

    rows = []
    for kind, (share, fuzz) in kinds().items():
        count = -(-int(arguments.count * share * 1000) // 1000)
        faulthandler.dump_traceback_later(_LONGEST_SECONDS, exit=True)
        begin = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            refused = fuzz(Path(folder), np.random.default_rng(arguments.seed), count)
        seconds = round(time.perf_counter() - begin, 1)
        row = {
            "kind": kind,
            "files": count,
            "refused": refused,
            "read_right": count - refused,
            "seconds": seconds,
        }
        rows.append(row)
        outcome = f"{refused:5} refused, {count - refused:5} read right"
        print(f"{kind:24} {count:5} files: {outcome}, {seconds:6} s", file=sys.stderr, flush=True)
    faulthandler.cancel_dump_traceback_later()
    total = {key: sum(row[key] for row in rows) for key in ("files", "refused", "read_right")}
    print(
        "{files} files: {refused} refused, {read_right} read right".format(**total), file=sys.stderr
    )
    if arguments.json:
        print(json.dumps({"seed": arguments.seed, "kinds": rows, **total}))


if __name__ == "__main__":
    main()
