"""Memory and time of averaging many updates of DU-Net(4), and of Flower's FedAvg beside it.

    python benchmarks/aggregate.py [--updates N] [--decoded N] [--rule R] [--out FILE]

The packed updates, N copies of one, are all in memory; of these `--decoded` are admitted, decoded,
checked and added as in a round of the server, and the time of all follows from theirs (updates are
independent of each other; not so with another `--rule` than the mean, where only the decoded ones
are measured). Peak memory is that of the process above what it held before, packed updates not
counted. Flower's function averages a few float32 updates; its time for all is extrapolated, since
all of them would not fit in memory. Times are the thread's processor times.
"""

import fedcunet.environment  # isort: skip  # noqa: F401  (before Flower)

import argparse
import ctypes
import json
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords

from fedcunet.config import RunConfig
from fedcunet.expected import Expected
from fedcunet.payload import Admitted, admit, pack
from fedcunet.replies import RoundReplies
from fedcunet.training.network import build_network, network_layout

NUM_FLOWER = 8


class PeakMemory:
    """The greatest resident size of this process, looked at every 2 ms, while the block runs."""

    def __enter__(self) -> "PeakMemory":
        ctypes.CDLL(None).malloc_trim(0)
        self._process, self._done = psutil.Process(), threading.Event()
        self.before = self.peak = self._process.memory_info().rss
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            self.peak = max(self.peak, self._process.memory_info().rss)

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, default=1000)
    parser.add_argument("--decoded", type=int, default=20, help="updates that are really added")
    parser.add_argument("--bits", type=float, default=1)
    parser.add_argument("--rule", default="mean", help="federation.aggregation")
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    arguments = parser.parse_args()
    config = RunConfig().replace(
        model__unets=4,
        model__order=1,
        federation__aggregation=arguments.rule,
        federation__assumed_attackers=0 if arguments.rule == "mean" else 0.2,
    )
    layout = network_layout(build_network(config, 68))
    expected = Expected(
        layout=layout, run_seed=0, round=1, sender=1, codec="trellis", bits=arguments.bits
    )
    generator = np.random.default_rng(0)
    update = 1e-3 * generator.standard_normal(layout.num_parameters, dtype=np.float32)
    blob = pack(update, expected)
    packed = [bytes(bytearray(blob)) for _ in range(arguments.updates)]
    state = np.zeros(layout.num_parameters, dtype=np.float32)
    model_bytes = state.nbytes

    # Once before: tables and modules that are made at the first use.
    first = admit(packed[0], expected)
    assert isinstance(first, Admitted)
    first.decode()
    with PeakMemory() as memory:
        begin = time.thread_time()
        replies = RoundReplies(config=config, layout=layout, clients={}, number=1, bytes_down={})
        for client, one in enumerate(packed[: arguments.decoded]):
            admitted = admit(one, expected)
            assert isinstance(admitted, Admitted)
            replies.admitted[client] = (admitted, 1)
        mean = replies.mean(state, needed=arguments.decoded)
        seconds = time.thread_time() - begin
    assert isinstance(mean, np.ndarray)
    figures: dict[str, Any] = {
        "rule": arguments.rule,
        "parameters": layout.num_parameters,
        "updates": arguments.updates,
        "decoded": arguments.decoded,
        "packed_bytes": sum(map(len, packed)),
        "peak_bytes_above_packed": memory.peak - memory.before,
        "peak_in_float32_models": (memory.peak - memory.before) / model_bytes,
        "seconds_of_decoded": seconds,
    }
    if arguments.rule == "mean":
        figures["seconds_of_all"] = seconds / arguments.decoded * arguments.updates
    figures["flower_seconds_of_all"] = flower_seconds(update) / NUM_FLOWER * arguments.updates
    text = json.dumps(figures, indent=1)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


def flower_seconds(update: np.ndarray) -> float:
    """Processor time of Flower's average of `NUM_FLOWER` updates of one float32 array each."""
    records = [
        RecordDict(
            {
                "arrays": ArrayRecord({"update": Array(update + np.float32(number))}),
                "metrics": MetricRecord({"num-examples": 1}),
            }
        )
        for number in range(NUM_FLOWER)
    ]
    begin = time.thread_time()
    aggregate_arrayrecords(records, "num-examples")
    return time.thread_time() - begin


if __name__ == "__main__":
    main()
