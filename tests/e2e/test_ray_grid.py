"""The Ray engine gives loopback's replies, and survives clients that die."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from fedcunet.errors import RunFailure
from fedcunet.records import BadReply, Reply, model_content, read_update
from simulations.loopback import LoopbackGrid

from flwr.app import Message  # isort: skip  (after fedcunet.environment)

pytestmark = pytest.mark.ray

TOY = "tests.toy_client_app:app"
ROOT = Path(__file__).resolve().parents[2]
# Longer than what travels in the message itself.
MODEL = bytes(range(256)) * 1024


def make_grid(num_workers: int = 2, num_nodes: int = 4, app: Any = TOY, **options: Any) -> Any:
    from simulations.ray_grid import RayGrid

    nodes = [{"device": f"phone-{number}"} for number in range(num_nodes)]
    return RayGrid(app, nodes, {"seed": 1}, num_workers=num_workers, **options)


@pytest.fixture(scope="module")
def grid(shared_ray: None) -> Iterator[Any]:
    with make_grid() as grid:
        yield grid


@pytest.fixture(scope="module")
def single(shared_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A grid of one worker beside the other grid's two, with two threads, in another folder.

    Two seconds are all that it gives a client.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("elsewhere"))
        with make_grid(
            num_workers=1, cpus_per_worker=0, threads_per_client=2, message_seconds=2.0
        ) as grid:
            yield grid


def ask(node_id: int, blob: bytes = MODEL, **config: Any) -> Message:
    return Message(
        model_content(blob, config), dst_node_id=node_id, message_type="train", group_id="1"
    )


def by_node(replies: list[Message]) -> dict[int, Reply | BadReply]:
    return {reply.metadata.src_node_id: read_update(reply) for reply in replies}


def round_of_all(grid: Any) -> dict[int, Reply | BadReply]:
    messages = [ask(1), ask(2, blob=b"small"), ask(3, learning_rate=0.1), ask(4, do="raise")]
    return by_node(grid.send_and_receive(messages, timeout=60))


def where(grid: Any, node_id: int = 1) -> list[str]:
    """Folder, process and threads of the worker that answers."""
    (reply,) = grid.send_and_receive([ask(node_id, do="where")], timeout=60)
    return read_update(reply).blob.decode().split("|")


def running(grid: Any) -> list[int]:
    """Process ids of the grid's workers, when all of them have started."""
    while not all(worker.process for worker in grid.pool.workers):
        grid.pull_messages([])
    return [worker.process for worker in grid.pool.workers]


def test_replies_are_those_of_loopback_with_one_worker_and_with_two(grid: Any) -> None:
    nodes = [{"device": f"phone-{number}"} for number in range(4)]
    expected = round_of_all(LoopbackGrid(TOY, nodes, {"seed": 1}))
    assert {node: type(reply) for node, reply in expected.items()} == {
        1: Reply,
        2: Reply,
        3: Reply,
        4: BadReply,
    }
    assert round_of_all(grid) == expected


def test_one_worker_answers_like_two_and_in_the_order_of_arrival(grid: Any, single: Any) -> None:
    assert round_of_all(single) == round_of_all(grid)
    replies = single.send_and_receive([ask(node_id) for node_id in (3, 1, 4)], timeout=60)
    assert [reply.metadata.src_node_id for reply in replies] == [3, 1, 4]


def test_replies_name_their_message_and_come_once(grid: Any) -> None:
    message_ids = grid.push_messages([ask(1), ask(2)])
    replies: list[Message] = []
    while len(replies) < 2:
        replies += grid.pull_messages(message_ids)
    assert {reply.metadata.reply_to_message_id for reply in replies} == set(message_ids)
    assert grid.pull_messages(message_ids) == []


def test_the_bytes_of_a_model_are_put_into_the_object_store_once(grid: Any) -> None:
    before = grid.num_puts
    model = os.urandom(100_000)
    copy = bytes(bytearray(model))
    assert copy is not model
    messages = [ask(1, model), ask(2, model), ask(3, copy), ask(4, b"small")]
    assert len(grid.send_and_receive(messages, timeout=60)) == 4
    assert grid.num_puts == before + 1
    # And again in the next push of the same round; the server's message still has its bytes.
    assert len(grid.send_and_receive(messages[:1], timeout=60)) == 1
    assert grid.num_puts == before + 1
    assert messages[0].content["arrays"]["model"].data == model
    # The next round's model takes its place.
    grid.send_and_receive([ask(1, os.urandom(100_000))], timeout=60)
    assert grid.num_puts == before + 2
    assert len(grid._blobs) == 1


def test_short_messages_share_calls_and_keep_their_order(single: Any) -> None:
    single.send_and_receive([ask(1)] * 8, timeout=60)
    before = single.pool.num_calls
    order = [1, 2, 3, 4] * 10
    replies = single.send_and_receive([ask(node) for node in order], timeout=60)
    assert [reply.metadata.src_node_id for reply in replies] == order
    assert single.pool.num_calls - before < 10


def test_messages_that_take_long_go_to_whoever_is_free(grid: Any) -> None:
    grid.send_and_receive([ask(1)] * 32, timeout=60)  # calls are long now
    messages = [ask(node, do="nap") for node in (1, 2, 3, 4)] * 2
    assert len(grid.send_and_receive(messages, timeout=60)) == 8
    assert grid.pool._call_messages == 1


def test_a_client_that_dies_costs_its_own_message_and_nothing_else(
    grid: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    grid.send_and_receive([ask(1)] * 16, timeout=60)  # so that it shares a call with others
    messages = [ask(1), ask(2, do="die"), ask(3), ask(4)]
    first = by_node(grid.send_and_receive(messages, timeout=100))
    assert first[2] == BadReply(reason="crashed", detail="the worker process died")
    assert all(isinstance(first[node], Reply) for node in (1, 3, 4))
    # Both places are filled again, and the client that was hit answers in the next round.
    assert len(grid.pool.workers) == 2
    assert grid.pool.faults["the worker process died"] >= 2  # it was given a second chance
    again = by_node(grid.send_and_receive([ask(node) for node in (1, 2, 3, 4)], timeout=100))
    assert all(isinstance(reply, Reply) for reply in again.values())
    # Standard output belongs to the results.
    assert capfd.readouterr().out == ""


def test_a_client_that_hangs_is_ended_with_the_timeout(grid: Any) -> None:
    replies = grid.send_and_receive([ask(1, do="sleep"), ask(2, do="sleep")], timeout=0.5)
    assert replies == []
    again = by_node(grid.send_and_receive([ask(1), ask(2)], timeout=100))
    assert all(isinstance(reply, Reply) for reply in again.values())


def test_a_worker_killed_from_outside_costs_no_reply(grid: Any) -> None:
    victim = running(grid)[0]
    before = grid.pool.faults.total()
    message_ids = grid.push_messages([ask(node, do="nap") for node in (1, 2, 3, 4)])
    psutil.Process(victim).kill()
    replies: list[Message] = []
    while len(replies) < 4:
        replies += grid.pull_messages(message_ids)
    assert all(isinstance(reply, Reply) for reply in by_node(replies).values())
    assert grid.pool.faults.total() == before + 1


def test_a_hung_client_is_ended_after_its_own_limit_and_the_round_goes_on(single: Any) -> None:
    messages = [ask(1), ask(2, do="sleep"), ask(3), ask(4)]
    replies = by_node(single.send_and_receive(messages, timeout=55))
    assert len(replies) == 4
    assert replies[2] == BadReply(reason="hung", detail="no reply within 2 s")
    assert all(isinstance(replies[node], Reply) for node in (1, 3, 4))


@pytest.mark.parametrize(
    ("do", "words"),
    [
        ("lambda", "the reply cannot be sent: "),
        ("unreadable", "the reply cannot be read: ValueError: invalid literal"),
        ("flood", "at most 17825792 are taken"),
        ("nothing", "the client app returned NoneType, no Message"),
    ],
)
def test_a_reply_of_garbage_costs_that_reply_and_no_worker(grid: Any, do: str, words: str) -> None:
    processes = running(grid)
    replies = by_node(grid.send_and_receive([ask(1), ask(2, do=do), ask(3)], timeout=60))
    assert isinstance(replies[2], BadReply)
    assert words in replies[2].detail
    assert isinstance(replies[1], Reply)
    assert isinstance(replies[3], Reply)
    assert running(grid) == processes


def test_large_replies_leave_the_object_store_when_they_are_pulled(grid: Any) -> None:
    import ray

    messages = [ask(node, do="large") for node in (1, 2, 3, 4)] * 5
    replies = grid.send_and_receive(messages, timeout=60)
    assert {len(read_update(reply).blob) for reply in replies} == {500_000}
    # Ray counts anew several times a second.
    for _ in range(100):
        held = (
            ray.cluster_resources()["object_store_memory"]
            - ray.available_resources()["object_store_memory"]
        )
        if held < 2_000_000:  # the model, of 10 MB that came
            break
        time.sleep(0.1)
    assert held < 2_000_000


def test_workers_share_the_drivers_folder_and_have_the_configured_threads(single: Any) -> None:
    folder, process, threads = where(single)
    assert Path(folder) == Path.cwd() != ROOT
    assert int(process) != os.getpid()
    assert threads == "2"


def test_closing_a_grid_on_a_shared_ray_ends_its_workers_only(grid: Any) -> None:
    with make_grid(num_workers=1, cpus_per_worker=0) as other:
        worker = psutil.Process(int(where(other)[1]))
    worker.wait(timeout=20)
    other.close()  # a second time does no harm
    assert len(round_of_all(grid)) == 4


def test_a_client_app_that_cannot_be_loaded_is_named_in_one_line(shared_ray: None) -> None:
    with pytest.raises(RunFailure) as failure:
        make_grid(num_workers=1, cpus_per_worker=0, app="no_such_module:app")
    text = str(failure.value)
    assert "client app 'no_such_module:app' cannot be loaded: ModuleNotFoundError" in text
    assert "\n" not in text


def test_more_workers_than_ray_has_room_for_are_refused(shared_ray: None) -> None:
    with pytest.raises(
        RunFailure, match=r"64 workers of 1 CPU, 0.0 GB each: Ray has room for 2 \(2 CPU, "
    ):
        make_grid(num_workers=64, bytes_per_worker=1)


SCRIPT = """
import json, psutil, signal, sys
# A shell that puts its commands into the background has them ignore interrupts, and so us.
signal.signal(signal.SIGINT, signal.default_int_handler)
from fedcunet.records import model_content
from flwr.app import Message
from simulations.ray_grid import RayGrid

def ask(node_id, **config):
    return Message(model_content(b"", config), dst_node_id=node_id, message_type="train")

try:
    with RayGrid("tests.toy_client_app:app", [{}, {}], {}, num_workers=1) as grid:
        replies = grid.send_and_receive([ask(1)], timeout=100)
        family = [child.pid for child in psutil.Process().children(recursive=True)]
        print(json.dumps([len(replies), family]), flush=True)
        grid.send_and_receive([ask(2, do="sleep")])
except KeyboardInterrupt:
    sys.exit(130)
"""


def is_running(pid: int) -> bool:
    """Whether there is such a process; one that nobody has collected yet does not run."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_an_interrupt_leaves_no_process_and_no_folder(tmp_path: Path) -> None:
    # From another folder, as a process group of its own: what Ctrl-C on a terminal reaches.
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as driver:
        assert driver.stdout is not None
        num_replies, family = json.loads(driver.stdout.readline())
        os.killpg(driver.pid, signal.SIGINT)
        rest, _ = driver.communicate(timeout=60)
    assert num_replies == 1
    assert len(family) > 2
    assert (driver.returncode, rest) == (130, "")
    assert [pid for pid in family if is_running(pid)] == []
    assert list(tmp_path.iterdir()) == []
    assert list(Path(tempfile.gettempdir(), "ray").glob(f"session_*_{driver.pid}")) == []
