"""Batches made ahead: the same values in the same order, errors where they are due."""

import threading
from collections.abc import Iterator

import numpy as np
import pytest

from fedcunet.data import prefetch
from fedcunet.data.prefetch import prefetched


@pytest.fixture(params=[1, 2], ids=["one core", "two cores"])
def cores(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(prefetch.os, "sched_getaffinity", lambda _: set(range(request.param)))
    return int(request.param)


def test_results_are_those_of_a_plain_loop_with_the_same_generator(cores: int, seed: int) -> None:
    def draws(loop: Iterator[np.ndarray]) -> list[list[float]]:
        return [values.tolist() for values in loop]

    plain, ahead = (np.random.default_rng(seed) for _ in range(2))
    found = draws(prefetched(ahead.random, range(1, 20)))
    assert found == draws(map(plain.random, range(1, 20)))
    assert list(prefetched(ahead.random, [])) == []


def test_the_next_item_is_made_while_one_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch.os, "sched_getaffinity", lambda _: {0, 1})
    made = [threading.Event() for _ in range(4)]

    def make(number: int) -> int:
        made[number].set()
        return number

    for number in prefetched(make, range(4)):
        if number + 1 < len(made):
            assert made[number + 1].wait(timeout=30)


def test_an_error_comes_with_its_item(cores: int) -> None:
    loop = prefetched(lambda number: 6 / (3 - number), range(5))
    assert [next(loop) for _ in range(3)] == [2.0, 3.0, 6.0]
    with pytest.raises(ZeroDivisionError):
        next(loop)


def test_a_loop_that_stops_early_leaves_no_thread_behind() -> None:
    before = threading.active_count()
    loop = prefetched(lambda number: number, range(1000))
    assert next(loop) == 0
    loop.close()
    assert threading.active_count() == before
