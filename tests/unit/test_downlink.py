"""The model on its way down: clients come to one visible model, whatever they missed or lost."""

import struct
from collections.abc import Callable

import numpy as np
import pytest

from fedcunet.config import RunConfig
from fedcunet.downlink import Downlink, NeedsSnapshot, Received, Visible, first_model, receive
from fedcunet.errors import UserError
from fedcunet.layout import Layout
from fedcunet.variances import kept

LAYOUT = Layout.from_tensors(
    {"a.weight": (4000,), "n.running_mean": (40,), "n.running_var": (40,)},
    fine={"n.running_mean", "n.running_var"},
)
LENGTH = LAYOUT.num_parameters
CONFIG = RunConfig().replace(
    quant__bits="8,1,8",
    update__codec="trellis",
    update__bits=1,
    downlink__codec="sign",
    downlink__bits=1,
)


def first_state() -> np.ndarray:
    return np.random.default_rng(0).normal(0, 0.3, LENGTH).astype(np.float32).clip(0, 1)


class Federation:
    """A downlink and what each of its clients keeps; the global model takes a random walk."""

    def __init__(self, config: RunConfig = CONFIG) -> None:
        self.config = config
        self.state_N = first_state()
        self.downlink = Downlink(config, LAYOUT, self.state_N)
        self.kept: dict[int, Visible] = {}
        self.round = 0
        self._generator = np.random.default_rng(1)

    def begin(self) -> None:
        if self.round:
            step_N = self._generator.normal(0, 0.02, LENGTH).astype(np.float32)
            self.state_N = (self.downlink.base(self.state_N) + step_N).clip(0, 1)
        self.round += 1
        self.downlink.begin_round(self.round, self.state_N)

    def fetch(self, client: int, parcel: bytes | None = None, *, answers: bool = True) -> Received:
        parcel = self.downlink.parcel(client) if parcel is None else parcel
        received = receive(
            parcel,
            self.config,
            LAYOUT,
            self.round,
            held=self.kept.get(client),
            first=lambda: first_model(first_state()),
        )
        self.kept[client] = received.visible
        if answers:
            self.downlink.delivered(client)
        return received

    def error(self, client: int) -> float:
        """Of a client's model, in the length of one step."""
        distance = np.linalg.norm(self.kept[client].state_N - self.state_N)
        return float(distance / (0.02 * LENGTH**0.5))


def test_the_first_model_is_not_sent_and_differences_are_a_bit_a_parameter() -> None:
    federation = Federation()
    federation.begin()
    assert len(federation.downlink.parcel(0)) == 24
    assert federation.fetch(0).visible.state_N.tolist() == first_state().tolist()
    federation.begin()
    # Signs, the fine values at 8 bits, headers.
    assert len(federation.downlink.parcel(0)) == pytest.approx(LENGTH / 8 + 80 + 100, rel=0.1)


@pytest.mark.parametrize(("codec", "rounds"), [("sign", 60), ("trellis", 14)])
def test_the_visible_model_follows_and_does_not_drift(codec: str, rounds: int) -> None:
    federation = Federation(CONFIG.replace(downlink__codec=codec))
    errors = []
    for _ in range(rounds):
        federation.begin()
        federation.fetch(0)
        errors.append(federation.error(0))
    # The trellis loses 0.39 of a step's energy, signs 0.36, and of what was lost before.
    assert max(errors[5:]) < 1
    assert max(errors[-5:]) < 1.2 * max(errors[5:10])


def test_an_unbiased_codes_error_is_forgotten_and_a_biased_ones_is_not() -> None:
    for codec, forgets in (("sign", False), ("trellis", True), ("eden", True)):
        federation = Federation(CONFIG.replace(downlink__codec=codec))
        for _ in range(2):
            federation.begin()
        federation.fetch(0)
        base_N = federation.downlink.base(federation.state_N)
        expected_N = federation.kept[0].state_N if forgets else federation.state_N
        assert base_N.tolist() == expected_N.tolist()
    whole = Federation(CONFIG.replace(downlink__codec="float32", downlink__bits=32.0))
    whole.begin()
    assert whole.downlink.base(whole.state_N) is whole.state_N


@pytest.mark.parametrize("missed", [1, 3, 5, 20])
def test_a_client_that_missed_rounds_gets_what_is_smaller(missed: int) -> None:
    federation = Federation()
    for _ in range(missed):
        federation.begin()
        federation.fetch(0)
    federation.begin()
    parcel = federation.downlink.parcel(1)
    federation.fetch(0)
    federation.fetch(1)
    if missed < 6:
        assert len(parcel) < missed * (LENGTH / 8 + 80 + 100) + 24
        assert federation.kept[1].state_N.tolist() == federation.kept[0].state_N.tolist()
    else:  # eight bits a parameter once
        assert len(parcel) == pytest.approx(LENGTH, rel=0.02)
        assert federation.error(1) == pytest.approx(federation.error(0), rel=0.2)


def test_a_parcel_that_comes_twice_gives_the_same_model_and_the_same_change() -> None:
    federation = Federation()
    for _ in range(3):
        federation.begin()
    parcel = federation.downlink.parcel(0)
    first, again = federation.fetch(0, parcel), federation.fetch(0, parcel)
    assert again.visible.model_id == first.visible.model_id
    assert again.visible.state_N.tolist() == first.visible.state_N.tolist()
    assert first.change_N is not None
    assert again.change_N is not None
    assert again.change_N.tolist() == first.change_N.tolist()


def test_after_a_snapshot_differences_apply_again_and_are_the_same_bytes_for_all() -> None:
    federation = Federation()
    for _ in range(12):
        federation.begin()
        federation.fetch(0)
    federation.begin()
    for client in (0, 1, 2):
        federation.fetch(client)
    federation.begin()
    parcels = [federation.downlink.parcel(client) for client in (0, 1, 2)]
    # After the head with the id of what each has.
    assert parcels[0][24:] == parcels[1][24:] == parcels[2][24:]
    assert len(parcels[0]) < 0.2 * LENGTH
    for client in (0, 1, 2):
        federation.fetch(client)
        assert federation.error(client) < 1.2 * federation.error(0)


def test_an_answer_that_was_lost_costs_nothing() -> None:
    federation = Federation()
    federation.begin()
    federation.fetch(0)
    federation.begin()
    federation.fetch(0, answers=False)  # the client has it, the server does not know
    federation.begin()
    received = federation.fetch(0)
    federation.fetch(1)
    assert received.visible.state_N.tolist() == federation.kept[1].state_N.tolist()


@pytest.mark.parametrize(
    "lose",
    [
        lambda kept: kept.clear(),
        lambda kept: kept.update({0: Visible(bytes(16), np.zeros(LENGTH, dtype=np.float32))}),
    ],
)
def test_a_client_that_lost_its_model_says_so_and_takes_a_snapshot(
    lose: Callable[[dict[int, Visible]], None],
) -> None:
    federation = Federation()
    for _ in range(2):
        federation.begin()
        federation.fetch(0)
    federation.begin()
    lose(federation.kept)
    with pytest.raises(NeedsSnapshot):
        federation.fetch(0)
    received = federation.fetch(0, federation.downlink.snapshot(0))
    assert received.change_N is None
    assert federation.error(0) < 1
    federation.begin()
    assert len(federation.downlink.parcel(0)) < 0.2 * LENGTH
    federation.fetch(0)


def test_both_sides_predict_an_update_from_the_same_change() -> None:
    federation = Federation(CONFIG.replace(update__prediction=True))
    federation.begin()
    assert federation.fetch(0).change_N is None
    assert federation.downlink.reference(0) is None
    before = federation.kept[0].state_N
    federation.begin()
    change_N = federation.fetch(0).change_N
    reference_N = federation.downlink.reference(0)
    assert change_N is not None
    assert reference_N is not None
    assert change_N.tolist() == reference_N.tolist()
    after = federation.kept[0].state_N
    assert (before + change_N)[:4000].tolist() == after[:4000].tolist()
    assert kept(before + change_N)[4040:].tolist() == after[4040:].tolist()  # variances
    federation.fetch(1, federation.downlink.snapshot(1))
    assert federation.downlink.reference(1) is None
    unasked = Federation()
    for _ in range(2):
        unasked.begin()
        unasked.fetch(0)
    assert unasked.downlink.reference(0) is None


def test_a_step_of_an_earlier_round_is_no_prediction() -> None:
    exact = {"downlink__codec": "float16", "downlink__bits": 16.0, "downlink__snapshot_bits": 32.0}
    federation = Federation(CONFIG.replace(update__prediction=True, **exact))
    for _ in range(2):
        federation.begin()
        federation.fetch(0)
    federation.round = 3
    federation.downlink.begin_round(3, federation.kept[0].state_N)  # brings nothing
    federation.fetch(0)
    assert federation.downlink.reference(1) is None
    assert federation.fetch(1).change_N is None  # though the second round's step was sent
    assert federation.kept[1].state_N.tolist() == federation.kept[0].state_N.tolist()


def test_float32_models_are_whole_and_exact() -> None:
    federation = Federation(CONFIG.replace(downlink__codec="float32", downlink__bits=32.0))
    for _ in range(3):
        federation.begin()
        parcel = federation.downlink.parcel(0)
        assert parcel == federation.downlink.parcel(1)
        assert federation.fetch(0).visible.state_N.tolist() == federation.state_N.tolist()


def test_exact_snapshots_are_exact() -> None:
    federation = Federation(CONFIG.replace(downlink__snapshot_bits=32.0))
    for _ in range(3):
        federation.begin()
        federation.fetch(0)
    federation.fetch(1, federation.downlink.snapshot(1))
    assert federation.kept[1].state_N.tolist() == federation.kept[0].state_N.tolist()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda parcel: b"", "expected a parcel of version 1"),
        (lambda parcel: b"JUNK" + parcel[4:], "expected a parcel of version 1"),
        (lambda parcel: parcel[:-1], "expected .* bytes, found"),
        (lambda parcel: parcel[:26], "expected 1 payloads, found 0"),
        (lambda parcel: parcel[:5] + b"\x07" + parcel[6:], "found kind 7"),
        (lambda parcel: parcel[:24] + struct.pack("<I", 2**32 - 1) + parcel[28:], "expected .*"),
        (lambda parcel: parcel[:-1] + bytes([parcel[-1] ^ 1]), "bad-checksum"),
    ],
)
def test_a_damaged_parcel_is_refused_in_one_line(
    damage: Callable[[bytes], bytes], said: str
) -> None:
    federation = Federation()
    for _ in range(2):
        federation.begin()
    with pytest.raises(UserError, match=said):
        federation.fetch(0, damage(federation.downlink.parcel(0)))
