"""One Ray for all end-to-end tests that want one: it takes seconds to start."""

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def shared_ray() -> Iterator[None]:
    """Ray with room for two workers; grids that tests make find it running and leave it so."""
    # Imported only where it is used: other tests must not pay for Ray.
    from simulations.ray_session import start_ray

    with start_ray(2):
        yield
