"""A run of thousands of clients whose workers are killed all the time.

    python benchmarks/chaos.py [--clients 2000] [--rounds 20] [--fraction 0.1] [--kill-seconds 20]
                               [--workers 2] [--compare] [--out DIR]

Virtual clients with two drawn faces each train DU-Net(1) for real, through the same server and
client apps as any simulation, while every so many seconds one worker gets kill -9. Printed and
written to DIR/chaos.json: rounds committed, replies, workers killed, the driver's memory after each
round, and how many clients answer at the end; DIR/chaos.png is the chart. With --compare the same
setting runs once more undisturbed, and the final models are compared bit for bit.
"""

import argparse
import json
import os
import random
import signal
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `server`, `simulations`

import fedcunet.environment  # isort: skip  # noqa: F401  (before Flower and Ray)

import psutil

from fedcunet.config import RunConfig
from fedcunet.data.procedural import make_faces
from fedcunet.errors import UserError
from fedcunet.roster import describe_clients
from server.app import NoDisplay, serve
from simulations.engine import Engine
from simulations.ray_grid import RayGrid
from simulations.ray_worker import own_memory_bytes

IMAGES_PER_CLIENT = 2


class Monkey(threading.Thread):
    """Kills one worker of the grid every `seconds`, until it is told to stop."""

    def __init__(self, grid: RayGrid, seconds: float, seed: int) -> None:
        super().__init__(daemon=True)
        self.grid, self.seconds = grid, seconds
        self.random = random.Random(seed)
        self.started_at = time.monotonic()
        self.kills: list[float] = []  # seconds after the begin
        self.stopped = threading.Event()

    def run(self) -> None:
        """Kill and wait."""
        while not self.stopped.wait(self.seconds):
            # One that starts has no process id yet: there is nothing to lose in it.
            processes = [one.process for one in self.grid.pool.workers if one.process]
            if processes and self._kill(self.random.choice(processes)):
                self.kills.append(time.monotonic() - self.started_at)

    def _kill(self, process_id: int) -> bool:
        try:
            process = psutil.Process(process_id)
            if "ClientWorker" not in " ".join(process.cmdline()):
                return False  # it has ended, and its number is another's
            os.kill(process_id, signal.SIGKILL)
        except (psutil.Error, ProcessLookupError):
            return False
        return True


class Watch(NoDisplay):
    """Notes time and the driver's memory at every reply and round."""

    def __init__(self) -> None:
        self.started_at = time.monotonic()
        self.rows: list[dict[str, Any]] = []
        self.highest = 0

    def client_done(self, *_: Any) -> None:
        self.highest = max(self.highest, own_memory_bytes())

    def round_done(self, line: dict[str, Any]) -> None:
        row = {
            "round": line["round"],
            "outcome": line["outcome"],
            "replies": line["replies"],
            "round_seconds": round(line["seconds"], 2),
            "at_seconds": round(time.monotonic() - self.started_at, 1),
            "driver_bytes": own_memory_bytes(),
            "highest_bytes": self.highest,
            "load": round(os.getloadavg()[0], 1),
        }
        self.highest = 0
        self.rows.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)


def setting(arguments: argparse.Namespace, faces: Path) -> RunConfig:
    """Sign updates with error feedback, so that clients keep state, of the smallest network."""
    return RunConfig().replace(
        seed=arguments.seed,
        model__unets=1,
        model__order=0,
        data__root=str(faces),
        data__cache_bytes=64 * 2**20,
        training__batch_size=IMAGES_PER_CLIENT,
        update__codec="sign",
        update__bits=1,
        update__error_feedback="on",
        federation__clients=arguments.clients,
        federation__rounds=arguments.rounds,
        federation__fraction=arguments.fraction,
        federation__partition="iid",
        federation__partition_skew=0.0,
        federation__evaluate_every=arguments.rounds,
        federation__state_dir=str(arguments.out / "clients"),
        federation__measured_dir=str(arguments.out / "measured"),
    )


def run(
    arguments: argparse.Namespace, config: RunConfig, name: str, kill_seconds: float
) -> dict[str, Any]:
    """One federated run; with kills if `kill_seconds` is not 0."""
    engine = Engine(name="ray", num_workers=arguments.workers, num_gpus=0, ray_address=None)
    watch = Watch()
    with ExitStack() as stack:
        grid = engine.grid(config, stack)
        assert isinstance(grid, RayGrid)
        monkey = Monkey(grid, kill_seconds, arguments.seed)
        watch.started_at = monkey.started_at
        if kill_seconds:
            monkey.start()
        summary = serve(grid, config, out=arguments.out / name, name=name, display=watch)
        monkey.stopped.set()
        found, _ = describe_clients(grid, timeout=600.0)
        return {
            "summary": summary,
            "rounds": watch.rows,
            "kills_at": [round(second, 1) for second in monkey.kills],
            "workers_replaced": dict(grid.pool.faults),
            "worker_peak_bytes": grid.pool.peak_worker_bytes,
            "clients_at_the_end": len(found),
        }


def draw(result: dict[str, Any], path: Path) -> None:
    """The chart: replies, seconds and memory over the rounds, kills between them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = result["rounds"]
    times = [row["at_seconds"] / 60 for row in rows]
    figure, (replies, seconds, memory) = pyplot.subplots(3, 1, figsize=(9, 8), sharex=True)
    replies.plot(times, [row["replies"].get("accepted", 0) for row in rows], "o-", label="accepted")
    lost = [sum(row["replies"].values()) - row["replies"].get("accepted", 0) for row in rows]
    replies.plot(times, lost, "s-", label="not accepted")
    replies.set_ylabel("clients of the round")
    seconds.plot(times, [row["round_seconds"] for row in rows], "o-")
    seconds.set_ylabel("seconds of the round")
    memory.plot(times, [row["driver_bytes"] / 1e6 for row in rows], "o-", label="after the round")
    memory.plot(times, [row["highest_bytes"] / 1e6 for row in rows], "s-", label="highest in it")
    memory.set_ylabel("driver, MB")
    memory.set_xlabel("minutes; a line for each worker that was killed")
    for axes in (replies, seconds, memory):
        axes.set_ylim(bottom=0)
        for second in result["kills_at"]:
            axes.axvline(second / 60, color="tab:red", linewidth=0.6, alpha=0.5)
    replies.legend(loc="center right")
    memory.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--fraction", type=float, default=0.1, help="of the clients, in a round")
    parser.add_argument("--kill-seconds", type=float, default=20.0, help="between two kills")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compare", action="store_true", help="run undisturbed too")
    parser.add_argument("--out", type=Path, default=Path(".fedcunet/chaos"), help="new folder")
    arguments = parser.parse_args()
    arguments.out = arguments.out.resolve()
    if (arguments.out / "chaos").exists():
        parser.error(f"folder {arguments.out}: expected a new one")
    num_images = IMAGES_PER_CLIENT * arguments.clients
    faces = arguments.out / "faces"
    make_faces(faces, num_train=num_images, num_test=40, seed=arguments.seed)
    try:
        config = setting(arguments, faces)
    except UserError as error:
        parser.error(str(error))
    result = run(arguments, config, "chaos", arguments.kill_seconds)
    summary, rows = result["summary"], result["rounds"]
    if arguments.compare:
        undisturbed = run(arguments, config, "undisturbed", 0.0)["summary"]
        result["undisturbed"] = undisturbed
        result["same_model"] = summary["checkpoint_sha256"] == undisturbed["checkpoint_sha256"]
        print(f"same final model as undisturbed: {result['same_model']}")
    (arguments.out / "chaos.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(result, arguments.out / "chaos.png")
    first, last = rows[0]["driver_bytes"] / 1e6, rows[-1]["driver_bytes"] / 1e6
    print(
        f"{summary['rounds_committed']} of {arguments.rounds} rounds committed, "
        f"{len(result['kills_at'])} workers killed, replies {summary['replies']}; "
        f"{result['clients_at_the_end']} of {arguments.clients} clients answer at the end; "
        f"driver {first:.0f} MB after the first round, {last:.0f} MB after the last"
    )


if __name__ == "__main__":
    main()
