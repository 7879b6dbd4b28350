"""The next batch is made while the present one is used."""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def prefetched(make: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """`map(make, items)`, each result made in one background thread while its forerunner is used.

    The order of the calls is that of `items` and no two of them overlap, so whatever `make` draws
    from a random generator is the same as without the thread. Nothing else may draw from it
    meanwhile. A process that may use one core only makes each result when it is asked for: there
    is nothing to overlap with.

    Raises:
        Whatever `make` raises, when its result is due.
    """
    if len(os.sched_getaffinity(0)) < 2:
        yield from map(make, items)
        return
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch") as thread:
        rest = iter(items)
        ahead = [thread.submit(make, item) for item in _first(rest)]
        while ahead:
            due = ahead.pop()
            result = due.result()
            ahead = [thread.submit(make, item) for item in _first(rest)]
            yield result


def _first(items: Iterator[Item]) -> list[Item]:
    """The next item, or nothing at the end."""
    return [item for _, item in zip(range(1), items, strict=False)]
