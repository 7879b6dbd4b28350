"""What a node says to the person at its machine, and what it asks before it joins."""

import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from clients.__main__ import _check_connection
from clients.app import _local_config
from clients.listener import Listener
from clients.offer import Offer
from clients.reach import probe
from clients.supernode import Supernode, node_config_text
from fedcunet.config import RunConfig
from fedcunet.errors import RunFailure, UserError
from fedcunet.processes import Family, free_port
from server.certificates import Certificates, make_certificates


def heard(lines: str, *, reachable: bool = True) -> tuple[Listener, list[str]]:
    said: list[str] = []
    listener = Listener(server="lab:1", is_reachable=lambda: reachable, say=said.append)
    for line in lines.splitlines():
        listener.hear(line)
    return listener, said


ROUND = """\x1b[92mINFO \x1b[0m:      SuperNode ID: 3225719962361541240
\x1b[92mINFO \x1b[0m:      [RUN 1]
\x1b[92mINFO \x1b[0m:      Receiving: query message (ID: 7)
\x1b[92mINFO \x1b[0m:      Sent successfully
\x1b[92mINFO \x1b[0m:      [RUN 1, ROUND 2]
\x1b[92mINFO \x1b[0m:      Receiving: train message (ID: 8)
\x1b[92mINFO \x1b[0m:      Sent successfully
\x1b[92mINFO \x1b[0m:      Receiving: evaluate message (ID: 9)
"""


def test_a_round_is_said_in_plain_words() -> None:
    listener, said = heard(ROUND)
    assert said == [
        "joined lab:1, waiting for rounds",
        "asked what this node has",
        "answer sent",
        "round 2: training",
        "answer sent",
        "round 2: evaluating",
    ]
    assert not listener.refused


def test_a_key_that_is_not_admitted_and_one_that_is_revoked_are_told_apart() -> None:
    listener, _ = heard("[code: 2004] Failed to activate SuperNode.")
    assert (listener.joined, listener.refused) == (False, True)
    listener, _ = heard(ROUND + "INFO :      SuperNode terminated gracefully.")
    assert (listener.joined, listener.refused) == (True, True)


def test_a_server_that_goes_and_comes_back_is_said_once_each() -> None:
    retry = "WARNING :   Connection attempt failed, retrying in 0.60 seconds\n"
    back = "INFO :      Connection successful after 20.36 seconds and 7 tries.\n"
    _, said = heard(3 * retry + back, reachable=False)
    assert said == [
        "lab:1 cannot be reached; trying again until it is there",
        "lab:1 is there again, joined",
    ]
    # Flower's own child says the same while it starts: the port has the last word.
    assert heard(retry + back)[1] == []


def test_the_apps_reason_for_refusing_is_said() -> None:
    _, said = heard("refused: this client has data '300w', the run asks for 'faces'")
    assert said == [
        "this node's app says: refused: this client has data '300w', the run asks for 'faces'"
    ]


@contextmanager
def listening(context: ssl.SSLContext | None) -> Iterator[str]:
    """A port that makes TLS handshakes, or says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(10)

        def answer() -> None:
            try:
                connection, _ = server.accept()
                with connection:
                    connection.settimeout(10)
                    if context is None:
                        connection.recv(1)
                        connection.sendall(b"\x00\x00\x00\x04\x00\x00\x00\x00\x00")
                    else:
                        context.wrap_socket(connection, server_side=True).close()
            except OSError:
                pass

        thread = threading.Thread(target=answer)
        thread.start()
        try:
            yield f"127.0.0.1:{server.getsockname()[1]}"
        finally:
            thread.join()


@pytest.fixture
def certificates(tmp_path: Path) -> Certificates:
    return make_certificates(tmp_path / "certificates", [], 2)


@pytest.fixture
def context(certificates: Certificates) -> ssl.SSLContext:
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    made.set_alpn_protocols(["h2"])
    made.load_cert_chain(certificates.certificate, certificates.key)
    return made


def test_the_port_says_what_it_is(
    certificates: Certificates, context: ssl.SSLContext, tmp_path: Path
) -> None:
    other = make_certificates(tmp_path / "other", [], 2)
    with listening(context) as server:
        assert probe(server, certificates.authority) == ("ready", "")
    with listening(context) as server:
        assert probe(server, other.authority)[0] == "stranger"
    with listening(context) as server:
        assert probe(server, None)[0] == "wants TLS"
    with listening(None) as server:
        assert probe(server, certificates.authority)[0] == "has no TLS"
    assert probe(f"127.0.0.1:{free_port()}", certificates.authority)[0] == "away"


def test_a_node_gives_up_on_an_unreachable_server_when_its_patience_ends(tmp_path: Path) -> None:
    server, said = f"127.0.0.1:{free_port()}", []
    node = Supernode(
        server=server,
        authority=None,
        key=None,
        node_config={},
        folder=tmp_path,
        patience_seconds=0.1,
    )
    with pytest.raises(RunFailure, match=f"{server} could not be reached in 0.1 s"):
        node.mind(said.append)
    assert len(said) == 1
    assert list(tmp_path.iterdir()) == []  # nothing was started


def test_an_offer_is_what_a_run_would_find(make_300w: Callable[..., Path], tmp_path: Path) -> None:
    root = make_300w({"afw": ["1_1.jpg", "2_1.jpg"], "helen/trainset": ["3_1.jpg"]})
    usual = {"data": "300w", "root": root, "device": "laptop", "folder": tmp_path / "node"}
    offer = Offer.of_machine(**usual, part=None, parts=None, memory=700)
    assert offer.words() == "3 images of 300w, 700 MB of memory, device laptop"
    assert "partition-id" not in offer.node_config()
    assert offer.node_config()["memory-bytes"] == 700_000_000
    shared = Offer.of_machine(**usual, part=1, parts=2, memory=None)
    assert (shared.node_config()["partition-id"], shared.node_config()["num-partitions"]) == (1, 2)
    with pytest.raises(UserError, match="expected both or none"):
        Offer.of_machine(**usual, part=1, parts=None, memory=None)
    with pytest.raises(UserError, match="expected 0 to 1"):
        Offer.of_machine(**usual, part=2, parts=2, memory=None)


@pytest.mark.parametrize("given", [None, 900])
def test_images_take_a_quarter_of_a_nodes_memory_given_or_free(
    given: int | None, make_300w: Callable[..., Path], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr("clients.offer.free_memory_bytes", lambda: 900_000_000)
    root = make_300w({"afw": ["1_1.jpg"]})
    usual = {"data": "300w", "root": root, "device": "laptop", "folder": tmp_path}
    offer = Offer.of_machine(**usual, part=None, parts=None, memory=given)
    assert offer.node_config()["data.cache-bytes"] == 225_000_000
    assert ("memory-bytes" in offer.node_config()) == (given is not None)


def test_no_server_decides_where_a_node_keeps_its_data_and_how_much(
    make_300w: Callable[..., Path], tmp_path: Path
) -> None:
    root = make_300w({"afw": ["1_1.jpg"]})
    offer = Offer.of_machine(
        data="300w", root=root, device="laptop", folder=tmp_path, part=None, parts=None, memory=None
    )
    servers = RunConfig().replace(
        data__name="300w",
        data__root="/srv/data",
        data__cache_bytes=10**15,
        data__disk_cache_bytes=10**15,
        federation__scratch_dir="/srv/x",
        federation__rounds=77,
    )
    context: Any = SimpleNamespace(node_config=offer.node_config(), run_config=servers.flat())
    for message in (servers.flat(), {}):
        config = _local_config(message, context)
        assert config.data.root == str(root)
        assert config.data.cache_bytes == RunConfig().data.cache_bytes
        assert config.data.disk_cache_bytes == RunConfig().data.disk_cache_bytes
        assert config.federation.scratch_dir == RunConfig().federation.scratch_dir
        assert config.federation.state_dir == str(tmp_path / "state")
        assert config.federation.rounds == 77
    context.node_config = {"partition-id": 0}  # a virtual client, which has what the run has
    assert _local_config({}, context).data == servers.data


def test_a_node_makes_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Supernode, "command", lambda self: ["/bin/echo", "hello"])
    node = Supernode(
        server="lab:1",
        authority=None,
        key=None,
        node_config={},
        folder=tmp_path / "new" / "node",
        patience_seconds=None,
    )
    assert node._run_once(print) == 0
    assert (tmp_path / "new/node/supernode.log").read_text() == "hello\n"


def test_what_is_no_certificate_is_refused_before_anything_is_tried(tmp_path: Path) -> None:
    wrong = tmp_path / "ca.pem"
    for text in ("", "-----BEGIN CERTIFICATE-----\nhello\n-----END CERTIFICATE-----\n"):
        wrong.write_text(text)
        with pytest.raises(UserError, match=r"--ca .*ca.pem: expected a certificate in PEM"):
            _check_connection("lab:1", wrong, tmp_path / "key", insecure=False)


def test_node_config_is_written_as_flower_reads_it() -> None:
    from flwr.common.config import parse_config_args

    values: dict[str, str | int] = {"data.root": "/a folder/x", "partition-id": 3}
    assert parse_config_args([node_config_text(values)]) == values
    with pytest.raises(UserError, match="no double quote"):
        node_config_text({"data.root": 'a"b'})


PARENT = """
import subprocess, sys, time
child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
child += "print(1, flush=True); time.sleep(60)"
subprocess.Popen([sys.executable, "-c", child], start_new_session=True)
if sys.argv[1] == "stays":
    time.sleep(60)
"""


@pytest.mark.parametrize("ignored", [False, True])
def test_a_terminal_that_closes_ends_a_process_as_ctrl_c_does(ignored: bool) -> None:
    code = "import signal, os; from fedcunet.processes import end_as_by_ctrl_c\n"
    code += "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n" if ignored else ""
    code += "end_as_by_ctrl_c()\ntry:\n os.kill(os.getpid(), signal.SIGHUP)\n print('lives')\n"
    code += "except KeyboardInterrupt:\n print('interrupted')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == ("lives\n" if ignored else "interrupted\n")


@pytest.mark.parametrize("parent", ["stays", "goes first"])
def test_a_family_is_ended_to_the_last_child_even_where_the_parent_has_gone(
    parent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = Family.start([sys.executable, "-c", PARENT, parent], dict(os.environ), subprocess.PIPE)
    assert family.process.stdout is not None
    assert family.process.stdout.readline() == "1\n"  # the child is there, deaf to SIGTERM
    if parent == "goes first":
        family.process.wait(20)
    assert len(family.members()) == (2 if parent == "stays" else 1)
    known = psutil.wait_procs

    def impatient(*arguments: Any, **options: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)  # a second Ctrl-C leaves nothing behind
        return known(*arguments, **options)

    monkeypatch.setattr(psutil, "wait_procs", impatient)
    family.end(seconds=0.5)
    family.process.stdout.close()
    assert family.members() == []
    assert family.process.returncode in (0, -signal.SIGTERM)
