"""The ladder: how it is written, which rung a device takes, and what a client is told of it."""

import pytest

from clients.fitting import Fit, fit
from fedcunet import ladder, terms
from fedcunet.config import RunConfig
from fedcunet.errors import RunFailure, UserError
from fedcunet.ladder import TooSmall, climb
from fedcunet.measured import NotMeasured, StepNeed
from fedcunet.records import Description
from fedcunet.roster import fleet
from simulations import fleet as virtual

LADDER = "storage=packed; storage=frugal  bits=6,1,6 ; batch-size=half; batch-size=3"
CONFIG = RunConfig().replace(
    quant__bits="8,1,8", training__batch_size=8, federation__ladder=LADDER, federation__clients=4
)
# By storage and batch size.
PEAKS = {("float32", 8): 100, ("packed", 8): 60, ("frugal", 8): 40, ("frugal", 4): 30}
PEAKS["frugal", 3] = 35  # no rung need be thriftier than the one before


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[RunConfig]:
    """The settings whose need was asked for; it is that of `PEAKS`, in MB."""
    settings: list[RunConfig] = []

    def step_need(config: RunConfig, num_landmarks: int) -> StepNeed:
        settings.append(config)
        peak = PEAKS[config.quant.storage, config.training.batch_size] * 10**6
        return StepNeed(
            peak_bytes=peak, static_bytes=1, resident_bytes=peak + 10**9, growth_bytes=peak + 7
        )

    monkeypatch.setattr(ladder, "step_need", step_need)
    return settings


@pytest.fixture
def no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """No data set is read for its number of landmarks."""
    monkeypatch.setattr(virtual, "_num_landmarks", lambda config: 5)


def test_a_rung_keeps_what_the_rungs_before_it_have_changed() -> None:
    rungs = CONFIG.rungs()
    found = [(r.quant.storage, r.quant.bits, r.training.batch_size) for r in rungs]
    assert found == [
        ("float32", "8,1,8", 8),
        ("packed", "8,1,8", 8),
        ("frugal", "6,1,6", 8),
        ("frugal", "6,1,6", 4),
        ("frugal", "6,1,6", 3),
    ]
    assert rungs[0] == CONFIG
    # Nothing else differs: the network, its weights' bits and what is sent are those of all.
    same = {"quant__storage": "float32", "quant__bits": "8,1,8", "training__batch_size": 8}
    for rung in rungs[1:]:
        assert rung.rungs() == (rung,)
        assert rung.replace(**same, federation__ladder=LADDER) == CONFIG


def test_half_of_a_batch_of_one_is_one() -> None:
    config = RunConfig().replace(
        data__size=128,
        training__batch_size=3,
        federation__ladder="batch-size=half; batch-size=half",
    )
    assert [rung.training.batch_size for rung in config.rungs()] == [3, 1, 1]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (";", "rung 1: expected changes of storage, bits, batch-size such as"),
        ("storage=packed;;bits=6,1,6", "rung 2: expected changes"),
        ("latent=bfloat16", "found 'latent=bfloat16'"),
        ("storage", "found 'storage'"),
        ("storage=packed storage=frugal", "each key once"),
        ("storage=zip", "rung 1 'storage=zip': storage: expected one of float32, packed, frugal"),
        ("bits=6,2,6", "rung 1 'bits=6,2,6': bits: expected 1 for the weights as in quant.bits"),
        ("bits=6, 1, 6", "found 'bits=6, 1, 6'"),
        ("storage=packed; batch-size=0", "rung 2 'batch-size=0': training.batch-size: expected 1"),
        ("batch-size=-4", "batch-size: expected half or a whole number, found '-4'"),
        (
            "batch-size=half; batch-size=half; batch-size=half",
            "rung 3 'batch-size=half': training.batch-size: expected 2 or more with crops of 64",
        ),
        ("batch-size=half;" * 17, "expected at most 16 rungs, found 18"),
    ],
)
def test_what_is_no_ladder_is_refused_in_one_line(text: str, said: str) -> None:
    with pytest.raises(UserError) as refusal:
        CONFIG.replace(federation__ladder=text)
    assert said in str(refusal.value)
    assert "federation.ladder" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_the_first_rung_that_fits_is_taken_and_no_later_one_measured(
    asked: list[RunConfig],
) -> None:
    for allowed, rung, needed in ((100, 0, 100), (99, 1, 60), (40, 2, 40), (39, 3, 30)):
        asked.clear()
        place = climb(CONFIG, 5, allowed * 10**6, who="this client")
        assert (place.rung, place.needed_bytes) == (rung, needed * 10**6)
        assert asked == list(CONFIG.rungs()[: rung + 1])


def test_a_device_that_holds_no_rung_hears_what_the_thriftiest_needs(
    asked: list[RunConfig],
) -> None:
    with pytest.raises(TooSmall) as refusal:
        climb(CONFIG, 5, 29 * 10**6, who="phone-low")
    assert str(refusal.value) == (
        "training needs 30 MB of memory (measured) on the thriftiest rung of federation.ladder, "
        "phone-low has 29 MB for it"
    )


def test_a_rung_that_cannot_be_measured_here_is_passed_by(
    asked: list[RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    known = ladder.step_need

    def refuse(config: RunConfig, num_landmarks: int) -> StepNeed:
        if config.quant.storage == "float32":
            raise NotMeasured("a training step needs more than the 3.0 GB it may take")
        return known(config, num_landmarks)

    monkeypatch.setattr(ladder, "step_need", refuse)
    assert climb(CONFIG, 5, 10**12, who="this client", is_here=True).rung == 1
    alone = CONFIG.replace(federation__ladder="")
    with pytest.raises(TooSmall, match=r"needs more than the 3\.0 GB it may take"):
        climb(alone, 5, 10**12, who="this client", is_here=True)
    # What is free on the machine that simulates a laptop must not decide how it trains.
    with pytest.raises(NotMeasured, match=r"rung 0 for laptop: .* needs more than the 3\.0 GB"):
        climb(CONFIG, 5, 10**12, who="laptop")


def test_each_device_of_a_fleet_takes_its_own_rung(
    asked: list[RunConfig], no_data: None, capsys: pytest.CaptureFixture[str]
) -> None:
    mix = "phone-low@50MB:1,phone-mid@100MB:1,phone-mid@130MB:1,tablet:1"
    config = CONFIG.replace(federation__fleet=mix)
    devices = virtual.devices_of(config)
    nodes = dict(zip([one.name for one in devices], virtual.node_values(config), strict=True))
    reason = nodes["phone-low@50MB"].pop("stays-out")
    assert nodes == {
        "tablet": {"device": "tablet", "rung": 0, "needed-bytes": 100 * 10**6},
        "phone-mid@130MB": {"device": "phone-mid@130MB", "rung": 1, "needed-bytes": 60 * 10**6},
        "phone-mid@100MB": {"device": "phone-mid@100MB", "rung": 2, "needed-bytes": 40 * 10**6},
        "phone-low@50MB": {"device": "phone-low@50MB"},
    }
    assert "phone-low@50MB has 25 MB for it" in str(reason)
    # A worker must hold the largest of what is really trained.
    assert virtual.growth_bytes(config) == 100 * 10**6 + 7
    assert capsys.readouterr().err.splitlines() == [
        "ladder: 1 tablet on rung 0 (the setting itself): 100 MB",
        "ladder: 1 phone-mid@130MB on rung 1 (storage=packed): 60 MB",
        "ladder: 1 phone-mid@100MB on rung 2 (storage=frugal bits=6,1,6): 40 MB",
    ]


def test_bits_for_a_device_that_no_client_has_are_said_to_have_no_effect(
    asked: list[RunConfig], no_data: None, capsys: pytest.CaptureFixture[str]
) -> None:
    config = CONFIG.replace(
        federation__fleet="laptop@900GB", update__bits_by_device="laptop:1,tablet:1"
    )
    virtual.node_values(config)
    assert "update.bits-by-device: no client is on a tablet\n" in capsys.readouterr().err


def test_a_fleet_without_a_device_that_holds_a_rung_is_refused(
    asked: list[RunConfig], no_data: None
) -> None:
    with pytest.raises(RunFailure, match="no client can take part: training needs 30 MB"):
        virtual.node_values(CONFIG.replace(federation__fleet="phone-low@50MB"))


def test_a_real_node_walks_the_ladder_by_the_whole_of_its_process(
    asked: list[RunConfig],
) -> None:
    config = CONFIG.replace(data__cache_bytes=5 * 10**6)
    node = {"data.name": "faces", "memory-bytes": 10**9 + 65 * 10**6}
    assert fit(config, node, "laptop", 5) == Fit(
        memory_bytes=10**9 + 65 * 10**6, rung=1, needed_bytes=10**9 + 65 * 10**6
    )
    with pytest.raises(UserError, match=r"\(measured, images included\) on the thriftiest rung"):
        fit(config, node | {"memory-bytes": 10**9}, "laptop", 5)
    # Without a ladder it is in or out.
    with pytest.raises(UserError, match=r"1105 MB of memory \(measured, images included\), this"):
        fit(config.replace(federation__ladder=""), node, "laptop", 5)


def test_a_virtual_node_takes_what_its_simulation_found_or_its_device_holds(
    asked: list[RunConfig],
) -> None:
    assert fit(CONFIG, {"rung": 2, "needed-bytes": 7}, "laptop", 5) == Fit(rung=2, needed_bytes=7)
    with pytest.raises(UserError, match=r"^too small$"):
        fit(CONFIG, {"stays-out": "too small"}, "laptop", 5)
    assert fit(CONFIG.replace(federation__ladder=""), {}, "phone-low@1MB", 5) == Fit()
    assert asked == []
    # In Flower's own simulation nobody has looked before.
    found = fit(CONFIG, {}, "phone-low@130MB", 5)
    assert (found.rung, found.needed_bytes) == (1, 60 * 10**6)


def test_a_client_is_told_what_its_rung_and_its_device_change_and_nothing_else() -> None:
    config = CONFIG.replace(update__bits_by_device="phone-low:1")
    assert terms.own_values(config, "laptop", 0) == {}
    assert terms.own_values(config, "laptop", 1) == {
        "quant.storage": "packed",
        "federation.ladder": "",
    }
    assert terms.own_values(config, "phone-low@1GB", 4) == {
        "quant.storage": "frugal",
        "quant.bits": "6,1,6",
        "training.batch-size": 3,
        "update.bits": 1.0,
        "update.bits-by-device": "",
        "federation.ladder": "",
    }
    told = RunConfig.from_flat(config.flat() | terms.own_values(config, "phone-low", 3))
    assert told == terms.client_setting(config, "phone-low", 3)


def test_the_summary_counts_clients_by_device_and_rung() -> None:
    def client(number: int, device: str, rung: int, needed: int) -> Description:
        return Description(
            node_id=number + 1,
            client=number,
            num_examples=1,
            num_validation=0,
            num_test=0,
            device=device,
            memory_bytes=0,
            needed_bytes=needed,
            rung=rung,
        )

    clients = [
        client(0, "phone-low", 2, 7),
        client(1, "laptop", 0, 0),
        client(2, "phone-low", 2, 9),
        client(3, "phone-low", 0, 8),
    ]
    config = CONFIG.replace(update__bits_by_device="phone-low:1")
    rows = fleet({one.client: one for one in clients}, config)
    assert [(row["device"], row["rung"], row["clients"]) for row in rows] == [
        ("laptop", 0, 1),
        ("phone-low", 0, 1),
        ("phone-low", 2, 2),
    ]
    assert [row["needed_bytes"] for row in rows] == [None, 8, 9]
    assert [row["update_bits"] for row in rows] == [2.0, 1.0, 1.0]
    assert rows[2]["changes"] == "storage=packed; storage=frugal bits=6,1,6"
