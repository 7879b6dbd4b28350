"""Five thousand mutated payloads of every codec: refused in words, or decoded to sound values."""

from benchmarks.admit import run


def test_no_mutated_payload_raises_or_takes_much_memory() -> None:
    found = run(5000, seed=1)
    left, repaired = found["checksum_left"], found["checksum_made_right"]
    # A changed byte is always found out where the checksum stands as it was.
    assert "accepted" not in left
    assert sum(left.values()) + sum(repaired.values()) > 4800
    # Some get all the way through, and some fail only where their values are checked.
    assert repaired["accepted"] > 100
    assert repaired["undecodable"] > 100
    assert found["peak_memory_growth_bytes"] < 64 * 2**20
