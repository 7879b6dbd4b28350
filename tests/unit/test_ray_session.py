"""Before Ray starts, the memory is checked; nothing here starts Ray."""

import socket
from pathlib import Path

import pytest

from fedcunet.errors import RunFailure
from simulations import ray_session
from simulations.ray_session import RAY_BYTES, check_memory, start_ray
from tests.conftest import Command


def with_free(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(ray_session, "free_memory_bytes", lambda: free)


def test_workers_that_fit_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    with_free(monkeypatch, RAY_BYTES + 2 * 10**9)
    check_memory(2, 10**9)


def test_too_many_workers_are_told_how_many_would_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    with_free(monkeypatch, RAY_BYTES + 2 * 10**9 - 1)
    with pytest.raises(RunFailure) as failure:
        check_memory(2, 10**9)
    assert str(failure.value) == "2 workers need about 2.4 GB, 2.4 GB free: use --num-workers 1"


def test_where_no_worker_fits_loopback_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with_free(monkeypatch, 10**8)
    with pytest.raises(RunFailure) as failure:
        check_memory(1, 10**9)
    assert str(failure.value) == "1 worker needs about 1.4 GB, 0.1 GB free: use --engine loopback"


def test_an_address_where_nothing_listens_is_named_in_one_line() -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))  # bound, so nobody else's, and not listening
        address = f"127.0.0.1:{reserved.getsockname()[1]}"
        with (
            pytest.raises(RunFailure, match=f"no Ray at {address}: "),
            start_ray(1, ray_address=address),
        ):
            pass


def test_a_comparison_starts_ray_for_its_setting_with_most_clients(
    command: Command, tiny_setting: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_ray(num_workers: int, **_: object) -> None:
        raise RunFailure(f"asked for {num_workers}")

    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(8))
    monkeypatch.setattr("simulations.engine.worker_bytes", lambda _: 0)
    monkeypatch.setattr("simulations.engine.check_memory", lambda *_: None)
    monkeypatch.setattr("simulations.engine.start_ray", no_ray)
    settings = [tiny_setting.with_name(f"of-{clients}.toml") for clients in (1, 3, 2)]
    for path in settings:
        text = tiny_setting.read_text().replace("clients = 2", f"clients = {path.stem[-1]}")
        path.write_text(text)
    code, _, err = command("simulations", "compare", *settings)
    assert (code, err) == (1, "simulations: asked for 3\n")
