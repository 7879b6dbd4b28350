"""What the Ray engine costs: time per client beside Flower's own simulation, memory, scaling.

    python benchmarks/scale.py [overhead] [memory] [scaling] [--clients 1000]
        [--per-round 100 1000] [--rounds 3] [--flower-rounds 2] [--memory-rounds 50] [--out FILE]

overhead: clients that train nothing and answer with as many bytes as the model has (500 kB), in
both engines: the same client app, the same loop at the server, two workers, a new model each
round. Flower's engine gets both loops, ours and its own `send_and_receive`; the faster one counts.
memory: what the driver holds over many rounds, when all replies of a round have come and when it
is done with them. scaling: clients that train a small network for a second or more, with one
worker and with two. Each measurement has a process of its own. The load of the machine stands
beside each figure, for what else runs takes its part of both engines' time.
"""

import argparse
import contextlib
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `simulations`

import fedcunet.environment  # isort: skip  # noqa: F401  (before Flower and Ray)

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedcunet.exchange import collect
from fedcunet.records import evaluation_content, model_content, read_model, update_content

WARM_UP_ROUNDS = 1
TIMEOUT = 3000.0
START_SECONDS = 300.0  # of Flower's engine

app = ClientApp()


@app.train()
def answer(message: Message, context: Context) -> Message:
    """As many bytes as came, and no training."""
    model, _ = read_model(message)
    return Message(update_content(model[::-1], {"num-examples": 1}), reply_to=message)


@app.evaluate()
def work(message: Message, context: Context) -> Message:
    """Train a small network for as many steps as the message says, and tell the time it took."""
    from fedcunet.config import ModelConfig, RunConfig
    from fedcunet.training.network import build_network

    _, config = read_model(message)
    begin = time.perf_counter()
    torch.manual_seed(0)
    network = build_network(RunConfig(model=ModelConfig(unets=1, order=0)), 16)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3)
    image_BCHW = torch.rand(2, 3, 64, 64)
    for _ in range(int(config["steps"])):
        optimizer.zero_grad()
        sum(out.square().mean() for out in network(image_BCHW)).backward()
        optimizer.step()
    metrics = {"seconds": time.perf_counter() - begin, "num-examples": 1}
    return Message(evaluation_content(metrics), reply_to=message)


def with_our_loop(grid: Grid, messages: list[Message]) -> list[Message]:
    found = collect(
        grid,
        messages,
        timeout=TIMEOUT,
        read=lambda _, reply: reply,
        on_reply=lambda done: None,
    )
    return list(found.replies.values())


def with_flowers_loop(grid: Grid, messages: list[Message]) -> list[Message]:
    return list(grid.send_and_receive(messages, timeout=TIMEOUT))


Loop = Callable[[Grid, list[Message]], list[Message]]


def run_round(grid: Grid, loop: Loop, number: int, count: int, size: int) -> dict[str, float]:
    """One round of `count` clients; its seconds, and the driver's memory in it and after it."""
    from simulations.ray_worker import own_memory_bytes

    model = os.urandom(size)
    begin = time.perf_counter()
    nodes = sorted(grid.get_node_ids())[:count]
    messages = [
        Message(
            model_content(model, {"round": number, "client": node}),
            node,
            "train",
            ttl=TIMEOUT,
            group_id=str(number),
        )
        for node in nodes
    ]
    replies = loop(grid, messages)
    seconds = time.perf_counter() - begin
    answered = sum(not reply.has_error() for reply in replies)
    if answered != count:
        raise SystemExit(f"round {number}: {answered} of {count} clients answered")
    held = own_memory_bytes()
    del replies, messages
    gc.collect()
    row = {
        "seconds": round(seconds, 3),
        "held_bytes": held,
        "after_bytes": own_memory_bytes(),
        "load": round(os.getloadavg()[0], 1),
    }
    print(f"  round {number} of {count}: {row}", file=sys.stderr, flush=True)
    return row


def our_rounds(arguments: argparse.Namespace, count: int, num_rounds: int) -> list[dict]:
    from simulations.ray_grid import RayGrid

    with RayGrid(app, [{}] * arguments.clients, {}, num_workers=2) as grid:
        rows = [
            run_round(grid, with_our_loop, number, count, arguments.payload)
            for number in range(WARM_UP_ROUNDS + num_rounds)
        ]
    return rows[WARM_UP_ROUNDS:]


def flowers_rounds(arguments: argparse.Namespace, count: int, num_rounds: int) -> list[dict]:
    from flwr.simulation import run_simulation

    server = ServerApp()
    rows = []

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        deadline = time.monotonic() + START_SECONDS
        while len(list(grid.get_node_ids())) < arguments.clients:
            if time.monotonic() > deadline:
                raise RuntimeError(f"Flower's engine did not start in {START_SECONDS:.0f} s")
            time.sleep(0.1)
        run_round(grid, with_our_loop, 0, min(count, 20), arguments.payload)
        for number in range(1, 1 + num_rounds):
            loop = with_our_loop if number % 2 else with_flowers_loop
            rows.append(run_round(grid, loop, number, count, arguments.payload))

    # What this function says of itself (it is deprecated) belongs to no figure.
    with contextlib.redirect_stdout(sys.stderr):
        run_simulation(server, app, arguments.clients)
    return rows


def worked(num_workers: int, count: int, steps: int) -> tuple[float, float]:
    """Sum of the clients' seconds, and wall time, of `count` clients on so many workers."""
    from simulations.ray_grid import RayGrid

    def ask(node: int, steps: int) -> Message:
        return Message(model_content(b"", {"steps": steps}), node, "evaluate", ttl=TIMEOUT)

    with RayGrid(app, [{}] * count, {}, num_workers=num_workers) as grid:
        nodes = list(grid.get_node_ids())
        with_our_loop(grid, [ask(node, 1) for node in nodes[: 2 * num_workers]])  # warm
        begin = time.perf_counter()
        replies = with_our_loop(grid, [ask(node, steps) for node in nodes])
        wall = time.perf_counter() - begin
    failed = [reply.error.reason for reply in replies if reply.has_error()]
    if failed:
        raise SystemExit(f"{len(failed)} clients failed: {failed[0]}")
    return sum(float(reply.content["metrics"]["seconds"]) for reply in replies), wall


def scaling(arguments: argparse.Namespace) -> dict[str, float]:
    """Useful work over workers × wall time, of clients of the same work."""
    count, steps = arguments.work_clients, arguments.work_steps
    one_sum, one_wall = worked(1, count, steps)
    load_one = os.getloadavg()[0]
    two_sum, two_wall = worked(2, count, steps)
    return {
        "clients": count,
        "steps": steps,
        "seconds_per_client": round(one_sum / count, 3),
        "wall_one_worker": round(one_wall, 2),
        "wall_two_workers": round(two_wall, 2),
        "useful": round(one_sum / (2 * two_wall), 3),
        # What the engine alone decides: the share of the workers' time in which a client ran.
        "busy_one_worker": round(one_sum / one_wall, 3),
        "busy_two_workers": round(two_sum / (2 * two_wall), 3),
        "load_one": round(load_one, 1),
        "load_two": round(os.getloadavg()[0], 1),
    }


def measure(arguments: argparse.Namespace) -> Any:
    """What this process was started for."""
    what, count, num_rounds = arguments.measure.split(":")
    if what == "scaling":
        return scaling(arguments)
    rounds = our_rounds if what == "ours" else flowers_rounds
    return rounds(arguments, int(count), int(num_rounds))


def fresh(what: str, count: int = 0, num_rounds: int = 0) -> Any:
    """What `measure` returns, in a process of its own with the same options."""
    command = [sys.executable, *sys.argv, "--measure", f"{what}:{count}:{num_rounds}"]
    print(f"{what}, {count} clients, {num_rounds} rounds", file=sys.stderr)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def overhead(arguments: argparse.Namespace, count: int) -> dict[str, Any]:
    """Milliseconds per client and round of both engines, and their ratio."""
    ours = fresh("ours", count, arguments.rounds)
    flowers = fresh("flower", count, arguments.flower_rounds)
    ours_ms = 1000 * statistics.median(row["seconds"] for row in ours) / count
    flower_ms = 1000 * min(row["seconds"] for row in flowers) / count
    row = {
        "clients": arguments.clients,
        "per_round": count,
        "payload_bytes": arguments.payload,
        "ours_ms": round(ours_ms, 2),
        "flower_ms": round(flower_ms, 2),
        "ratio": round(ours_ms / flower_ms, 3),
        "ours": ours,
        "flower": flowers,
    }
    print(
        f"{count} of {arguments.clients} clients a round: {ours_ms:.2f} ms a client, "
        f"Flower's engine {flower_ms:.2f} ms: {row['ratio']:.3f} of it "
        f"(load {ours[-1]['load']}, {flowers[-1]['load']})",
        flush=True,
    )
    return row


def memory(arguments: argparse.Namespace, count: int) -> dict[str, Any]:
    """What the driver holds over many rounds, and by how much it grows."""
    rows = fresh("ours", count, arguments.memory_rounds)
    part = max(1, len(rows) // 5)
    after = [row["after_bytes"] for row in rows]
    early, late = statistics.median(after[:part]), statistics.median(after[-part:])
    print(
        f"driver over {len(rows)} rounds of {count}: {early / 1e6:.0f} MB after the first "
        f"{part} rounds, {late / 1e6:.0f} MB after the last {part}; at most "
        f"{max(row['held_bytes'] for row in rows) / 1e6:.0f} MB with a round's replies "
        f"({count * arguments.payload / 1e6:.0f} MB of updates)",
        flush=True,
    )
    return {"per_round": count, "early_bytes": early, "late_bytes": late, "rounds": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    shows = ("overhead", "memory", "scaling")
    parser.add_argument("shows", nargs="*", help=f"which of {', '.join(shows)}; all by default")
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--per-round", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--rounds", type=int, default=5, help="of ours, measured")
    parser.add_argument("--flower-rounds", type=int, default=2, help="of Flower's, measured")
    parser.add_argument("--memory-rounds", type=int, default=50)
    parser.add_argument("--payload", type=int, default=500_000, help="bytes of model and update")
    parser.add_argument("--work-clients", type=int, default=20)
    parser.add_argument("--work-steps", type=int, default=30, help="of training, for each client")
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # what a fresh process does
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments)))
        return
    unknown = set(arguments.shows) - set(shows)
    if unknown:
        parser.error(f"expected {', '.join(shows)}, found {', '.join(sorted(unknown))}")
    if max(arguments.per_round) > arguments.clients:
        parser.error(f"--per-round: expected at most --clients {arguments.clients}")
    results: dict[str, list[Any]] = {}

    def note(show: str, row: Any) -> None:
        results.setdefault(show, []).append(row)
        if arguments.out:  # after each: the next one may take long
            arguments.out.write_text(json.dumps(results, indent=1) + "\n")

    chosen = arguments.shows or shows
    for count in arguments.per_round:
        if "overhead" in chosen:
            note("overhead", overhead(arguments, count))
        if "memory" in chosen:
            note("memory", memory(arguments, count))
    if "scaling" in chosen:
        row = fresh("scaling")
        print(json.dumps(row))
        note("scaling", row)


if __name__ == "__main__":
    main()
