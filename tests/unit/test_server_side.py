"""What the server keeps: certificates, its folder, admitted keys; and what it refuses to start."""

import dataclasses
import socket
import ssl
import stat
import subprocess
from collections.abc import Sequence
from pathlib import Path
from threading import Thread

import pytest

from clients.keys import check_key, fingerprint, make_key
from fedcunet.errors import RunFailure, UserError
from fedcunet.files import held
from fedcunet.processes import free_port, host_and_port
from server import admission
from server.certificates import Certificates, make_certificates, names_of_file
from server.folder import Address, Request, ServerFolder
from server.nodes import (
    AdmittedNode,
    client_ids,
    place_for,
    read_nodes,
    read_public_key,
    revoked,
    with_node,
    write_nodes,
)
from server.superlink import Superlink


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def certificates(tmp_path: Path) -> Certificates:
    return make_certificates(tmp_path / "certificates", ["server.lab", "10.0.0.3"], 30)


def test_certificates_are_for_the_given_names_and_loopback_and_keys_are_private(
    certificates: Certificates,
) -> None:
    certificates.check()
    names = names_of_file(certificates.certificate)
    assert sorted(names) == ["10.0.0.3", "127.0.0.1", "localhost", "server.lab"]
    assert mode(certificates.key) == mode(certificates.key.with_name("ca.key")) == 0o600
    context = ssl.create_default_context(cafile=str(certificates.authority))
    assert [found["subject"] for found in context.get_ca_certs()]
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(certificates.certificate, certificates.key)


def test_certificates_are_never_overwritten(certificates: Certificates) -> None:
    before = certificates.key.read_bytes()
    with pytest.raises(UserError, match="is there already"):
        make_certificates(certificates.key.parent, [], 30)
    assert certificates.key.read_bytes() == before


@pytest.mark.parametrize("name", ["two words", "", "-x", "a/b"])
def test_a_name_that_is_none_is_refused_before_anything_is_written(
    name: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="expected a DNS name or an IP address"):
        make_certificates(tmp_path / "certificates", [name], 30)
    assert list(tmp_path.iterdir()) == []


def test_a_key_that_others_may_read_is_refused(certificates: Certificates) -> None:
    certificates.key.chmod(0o640)
    with pytest.raises(UserError, match="chmod 600"):
        certificates.check()


def test_a_certificate_without_loopback_among_its_names_is_refused(
    certificates: Certificates, tmp_path: Path
) -> None:
    given = dataclasses.replace(certificates, certificate=certificates.authority)
    with pytest.raises(UserError, match=r"expected 127\.0\.0\.1 among its names.*found none"):
        given.check()


def superlink(tmp_path: Path, **changes: object) -> Superlink:
    usual = Superlink(
        folder=ServerFolder(tmp_path / "server"),
        listen=f"127.0.0.1:{free_port()}",
        control_port=free_port(),
        health_port=free_port(),
        certificates=None,
    )
    return dataclasses.replace(usual, **changes)


def test_listening_beyond_loopback_without_tls_needs_the_words(tmp_path: Path) -> None:
    listen = f"0.0.0.0:{free_port()}"
    with pytest.raises(UserError, match="--anyone-may-read-and-join"):
        superlink(tmp_path, listen=listen).check()
    superlink(tmp_path, listen=listen, exposed=True).check()
    superlink(tmp_path).check()


def test_without_certificates_the_server_says_how_to_make_some(tmp_path: Path) -> None:
    files = Certificates.in_folder(tmp_path)
    with pytest.raises(UserError, match="python -m server certs"):
        superlink(tmp_path, certificates=files).check()


def test_a_port_in_use_is_said_before_anything_starts(tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(UserError, match="cannot listen there: Address already in use"):
            superlink(tmp_path, control_port=port).check()


def test_control_and_health_listen_on_loopback_and_keys_are_asked_wherever_there_is_tls(
    certificates: Certificates, tmp_path: Path
) -> None:
    command = superlink(tmp_path, listen="0.0.0.0:9092", certificates=certificates).command()
    assert command[command.index("--host") + 1] == "127.0.0.1"
    assert command[command.index("--health-server-address") + 1].startswith("127.0.0.1:")
    assert "--enable-supernode-auth" in command
    assert "--insecure" not in command


def node(client: int, key: str, **changes: object) -> AdmittedNode:
    usual = AdmittedNode(
        client=client,
        node_id=100 + client,
        name=f"node-{client}",
        key=key,
        fingerprint=f"SHA256:{key}",
        admitted="2026-01-01T00:00:00+00:00",
    )
    return dataclasses.replace(usual, **changes)


def test_client_ids_are_given_in_order_and_a_new_key_can_have_a_revoked_ones_place(
    tmp_path: Path,
) -> None:
    table: list[AdmittedNode] = []
    for key in ("a", "b", "c"):
        table = with_node(table, node(place_for(table, key, None), key))
    assert [row.client for row in table] == [0, 1, 2]
    table = with_node(table, revoked(table, "node-1"))
    write_nodes(tmp_path, table)
    assert read_nodes(tmp_path) == table
    assert client_ids(tmp_path) == {100: 0, 102: 2}
    assert place_for(table, "d", None) == 3
    assert place_for(table, "d", 1) == 1
    with pytest.raises(UserError, match="never again"):
        place_for(table, "b", None)
    with pytest.raises(UserError, match="is the id of node-2"):
        place_for(table, "d", 2)
    with pytest.raises(UserError, match="admitted already, as client 2"):
        place_for(table, "c", None)
    with pytest.raises(UserError, match="0 admitted nodes fit"):
        revoked(table, "node-1")


def test_a_nodes_key_is_private_and_known_by_its_fingerprint_on_both_sides(tmp_path: Path) -> None:
    public = make_key(tmp_path / "node" / "key", "kitchen tablet")
    key, found, comment = read_public_key(public)
    assert mode(public.with_suffix("")) == 0o600
    assert found == check_key(public.with_suffix("")) == fingerprint(key)
    assert comment == "kitchen tablet"
    said = subprocess.run(
        ["ssh-keygen", "-lf", str(public)], capture_output=True, text=True, check=False
    ).stdout
    assert found in said
    odd = tmp_path / "odd.pub"
    odd.write_text(f"{key} red\x1b[31m\x07\n")
    assert read_public_key(odd)[2] == "red?[31m?"  # a client's word, on the server's terminal
    with pytest.raises(UserError, match="not overwritten"):
        make_key(public.with_suffix(""), "")
    with pytest.raises(UserError, match="is the private one"):
        read_public_key(public.with_suffix(""))
    public.with_suffix("").chmod(0o644)
    with pytest.raises(UserError, match="chmod 600"):
        check_key(public.with_suffix(""))


def test_another_kind_of_key_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.pub").write_text(
        "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIKB0PNsHQVCkXUS0ILK0WAJ5zN5QPmjvDIWi2tmGj0ed x\n"
    )
    with pytest.raises(UserError, match="expected ECDSA"):
        read_public_key(tmp_path / "x.pub")
    (tmp_path / "y.pub").write_text("no key at all")
    with pytest.raises(UserError, match="expected an OpenSSH public key"):
        read_public_key(tmp_path / "y.pub")


def test_the_folder_tells_flower_and_our_commands_where_the_server_is(tmp_path: Path) -> None:
    folder = ServerFolder(tmp_path / "server")
    make_certificates(folder.path / "certificates", [], 30)  # makes its parents as they come
    folder.make()
    assert mode(folder.path) == 0o700
    with pytest.raises(RunFailure, match="no server has been started"):
        folder.address()
    address = Address(
        fleet="0.0.0.0:1", control="127.0.0.1:2", health="127.0.0.1:3", authority="/ca", pid=4
    )
    folder.write_address(address)
    assert folder.address() == address
    assert 'root-certificates = "/ca"' in (folder.flower_home / "config.toml").read_text()
    request = Request(out=tmp_path / "run", name="x", wait_seconds=1.5)
    folder.write_request(7, request)
    assert folder.request(7) == request
    assert folder.request(8) is None


def test_two_who_admit_at_once_get_a_place_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = ServerFolder(tmp_path / "server")
    folder.make()
    folder.write_address(Address(fleet="a:1", control="a:2", health="a:3", authority="/ca", pid=1))
    first, second = (make_key(tmp_path / name, name) for name in ("first", "second"))
    other = Thread(target=admission.admit, args=(folder, second, None, None))

    def flwr(folder: ServerFolder, words: Sequence[str]) -> dict[str, int]:
        if words[-1] == str(first):
            other.start()
            other.join(0.5)  # as long as Flower takes
        return {"node-id": 11 if words[-1] == str(first) else 22}

    monkeypatch.setattr(admission, "flwr", flwr)
    with held(folder.path):  # a server is running
        admission.admit(folder, first, None, None)
        other.join()
    assert client_ids(folder.path) == {11: 0, 22: 1}


def test_a_second_server_of_a_folder_is_refused_and_the_first_ones_address_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.superlink.flower_command", lambda name: "/bin/false")
    second = superlink(tmp_path)
    second.folder.make()
    address = Address(fleet="a:1", control="a:2", health="a:3", authority=None, pid=1)
    second.folder.write_address(address)
    with (
        held(second.folder.path),
        pytest.raises(UserError, match="server: another process is at work there"),
        second.running(),
    ):
        pass
    assert second.folder.address() == address


@pytest.mark.parametrize("text", ["host", "host:", ":1", "host:x", "host:0", "host:65536"])
def test_an_address_without_host_and_port_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="--server: expected HOST:PORT"):
        host_and_port(text, "--server")
    assert host_and_port("[::1]:5", "--server") == ("::1", 5)
