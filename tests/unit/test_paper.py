"""Tables asked anew: their definitions, ranks, resume and refusal, and the commands."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest

import fedcunet.__main__ as library
import fedcunet.sweep as sweep
from fedcunet.config import RunConfig
from fedcunet.data import load
from fedcunet.errors import UserError
from fedcunet.measured import NotMeasured, StepNeed
from fedcunet.memory import TrainingStep, step_bytes
from fedcunet.paper.anew import Listener, curve_epochs, make_table
from fedcunet.paper.budget import Budget, limited, make_plans
from fedcunet.paper.ranks import agreement, ranks
from fedcunet.paper.report import full_size_parameters, remarks, text_tables
from fedcunet.paper.running import SETTING, RowResult, check_setting, setting_of
from fedcunet.paper.tables import FIGURE4, TABLE1, TABLE2, TABLE3, TABLES

TWO_ROWS = dataclasses.replace(TABLE2, rows=TABLE2.rows[:2])
FACES = {
    "helen/trainset": [f"{n}_1.jpg" for n in range(6)],
    "helen/testset": ["10_1.jpg", "11_1.jpg"],
    "ibug": ["20_1.jpg"],
}


@pytest.fixture
def budget(make_300w: Callable[..., Path]) -> Budget:
    return Budget(
        data="300w", root=str(make_300w(FACES)), limit_train=4, epochs=1, batch_size=4, unets=1
    )


@pytest.mark.parametrize("table", TABLES.values(), ids=lambda table: table.key)
def test_full_size_networks_have_the_papers_parameters(table: object) -> None:
    for row in table.rows:  # type: ignore[attr-defined]
        if row.parameters_millions is not None:
            own = full_size_parameters(table, row) / 1e6  # type: ignore[arg-type]
            assert own == pytest.approx(row.parameters_millions, rel=0.015)


def test_parameters_by_order_are_those_worked_out_from_the_papers_text() -> None:
    found = [round(full_size_parameters(FIGURE4, row) / 1e6, 3) for row in FIGURE4.rows]
    assert found == [7.162, 7.908, 8.547, 9.079, 9.505, 9.825, 10.038, 10.144]


@pytest.mark.parametrize("table", TABLES.values(), ids=lambda table: table.key)
def test_every_default_plan_holds_its_reference_and_folders_of_their_own(table: object) -> None:
    plans, left_out = make_plans(table, Budget())  # type: ignore[arg-type]
    keys = [plan.row.key for plan in plans]
    assert table.reference in keys  # type: ignore[attr-defined]
    assert len(set(keys)) == len(keys)
    assert not left_out


def test_networks_shrink_in_proportion_and_large_ones_are_left_out_by_name() -> None:
    plans, left_out = make_plans(TABLE1, Budget(unets=2, max_unets=4))
    assert [plan.config.model.unets for plan in plans] == [4, 4, 2, 2]
    assert left_out == ["Stacked U-Nets(8)", "DU-Net(8)"]
    with pytest.raises(UserError, match="at least two networks that differ"):
        make_plans(TABLE3, Budget(unets=2))


def test_epochs_of_the_curve_are_the_papers_in_proportion() -> None:
    assert curve_epochs(TABLE3, 6) == (1, 2, 4, 6)
    assert curve_epochs(TABLE2, 6) == ()


def test_equal_merits_share_a_rank_and_none_has_none() -> None:
    values = {"a": 3.0, "b": 2.0, "c": None, "d": 3.0}
    assert ranks(values, lower_is_better=True) == {"a": 2, "b": 1, "c": None, "d": 2}
    assert ranks(values, lower_is_better=False) == {"a": 1, "b": 3, "c": None, "d": 1}


def test_agreement_counts_pairs_by_merit_in_each_metric() -> None:
    found = agreement(
        {"a": 1.0, "b": 2.0, "c": 3.0, "d": 9.0},
        {"a": 90.0, "b": 70.0, "c": 80.0, "d": None},
        ours_lower=True,
        papers_lower=False,
    )
    assert (found.pairs, found.agree, found.tied) == (3, 2, 0)
    assert found.differ == (("c", "b"),)
    assert found.kendall_tau == pytest.approx(1 / 3)


def test_the_training_images_are_spread_over_the_set(budget: Budget) -> None:
    found = load("300w", budget.root, "train")
    chosen = limited(found, 3).annotations
    assert [annotation.photo for annotation in chosen] == [
        found.annotations[place].photo for place in (0, 2, 4)
    ]
    with pytest.raises(UserError, match="7 images asked for, it has 6"):
        limited(found, 7)


def test_a_table_is_taken_up_where_it_stopped_and_another_setting_refused(
    budget: Budget, tmp_path: Path
) -> None:
    out, seen = tmp_path / "table", []

    def stop(name: str, epoch: int, loss: float, work: float) -> None:
        if name.startswith("Regression"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_table(TWO_ROWS, budget, out, listener=Listener(step=stop))
    assert not (out / "table.json").exists()

    def row(name: str, result: RowResult, found: bool) -> None:
        seen.append((name, found))

    report = make_table(TWO_ROWS, budget, out, listener=Listener(row=row))
    assert seen == [("Detection only, seed 0", True), ("Regression only, seed 0", False)]
    fresh = make_table(TWO_ROWS, budget, tmp_path / "other")
    assert [row["percent"] for row in report["rows"]] == [row["percent"] for row in fresh["rows"]]
    assert json.loads((out / "table.json").read_text()) == report
    first = report["rows"][0]
    assert first["percent"] == pytest.approx((2 * first["easy"] + first["hard"]) / 3)
    assert first["paper"]["percent"] == 4.01
    assert {row["rank"] for row in report["rows"]} == {1, 2}
    for changed in ({"epochs": 2}, {"limit_train": 5}, {"learning_rate": 2e-3}):
        with pytest.raises(UserError, match="name another --out"):
            make_table(TWO_ROWS, dataclasses.replace(budget, **changed), out)  # type: ignore[arg-type]
    assert all(len(cells) == len(t.columns) for t in text_tables(report) for cells in t.rows)
    assert any("of 1 pairs as in the paper" in line for line in remarks(report))


def test_the_training_curve_and_the_balance_index_are_measured(
    budget: Budget, tmp_path: Path
) -> None:
    first = dataclasses.replace(TABLE3.rows[0], bits="32,1,32")
    table = dataclasses.replace(TABLE3, rows=(TABLE3.rows[0], dataclasses.replace(first, key="b")))
    report = make_table(table, budget, tmp_path / "table", with_memory=True)
    float32, binary = report["rows"]
    assert list(float32["train_curve"]) == ["1"]
    assert float32["size_ratio"] == 1
    assert float32["memory_ratio"] == pytest.approx(1, abs=0.02)
    expected = binary["percent"] ** 2 * binary["memory_ratio"] * binary["size_ratio"]
    assert binary["balance_index"] == pytest.approx(expected)
    assert binary["size_ratio"] < 0.2


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Function that runs `fedcunet paper ...`: exit code, output, error output."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["fedcunet", "paper", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            library.main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run


def test_networks_are_counted_beside_the_papers(
    command: Callable[..., tuple[int, str, str]],
) -> None:
    code, out, _ = command("networks", "--json")
    found = {(row["table"], row["name"]): row for row in json.loads(out)}
    assert code == 0
    assert found["table1", "DU-Net(16)"]["conv_parameters"] == 15_919_488
    assert found["table1", "Stacked U-Nets(8)"]["paper_millions"] == 25.5


def test_the_command_prints_one_json_value_and_an_interrupt_ends_with_130(
    command: Callable[..., tuple[int, str, str]],
    budget: Budget,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "fig4"
    arguments = ["fig4", "--data", "300w", "--root", budget.root, "--limit-train", 4]
    arguments += ["--epochs", 1, "--unets", 2, "--batch-size", 4, "--out", out, "--json"]
    code, text, errors = command(*arguments)
    assert code == 0
    assert [row["order"] for row in json.loads(text)["rows"]] == [0, 1]
    assert (out / "fig4.png").read_bytes().startswith(b"\x89PNG")
    assert "Order-0 DU-Net(2), seed 0: nme_percent" in errors
    code, _, errors = command(*arguments, "--seeds", "x")
    assert (code, "--seeds" in errors) == (2, True)

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fedcunet.paper.running.train_network", interrupt)
    code, _, errors = command(*arguments[:-3], "--out", tmp_path / "again")
    assert code == 130
    assert "the same command goes on" in errors


def test_memory_by_depth_is_measured(
    command: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def need(config: RunConfig, num_landmarks: int, device: str) -> StepNeed:
        """As the fresh process, but in this one, which has loaded torch already."""
        step = TrainingStep(config, num_landmarks, device)
        step.warm_up()
        peak = step.static_bytes() + step_bytes(step)["peak"]
        return StepNeed(peak_bytes=peak, static_bytes=1, resident_bytes=1, growth_bytes=1)

    first_two = dict(list(sweep.lines().items())[:2])  # the others are slower, and as these
    monkeypatch.setattr(sweep, "lines", lambda: first_two)
    monkeypatch.setattr(sweep, "measure_need", need)
    code, text, _ = command(
        "fig5", "--max-unets", 3, "--size", 64, "--batch-size", 2, "--out", tmp_path, "--json"
    )
    report = json.loads(text)
    naive, lean = report["lines"]
    assert code == 0
    assert (naive["name"], lean["name"]) == ("float32", "float32 recomputed")
    assert (naive["deepest"], naive["deepest_is"]) == (9, "extrapolated")
    two, three = (naive["measured"][unets] for unets in ("2", "3"))
    assert report["room_bytes"] == three + 6 * (three - two)
    assert all(lean["measured"][unets] < naive["measured"][unets] for unets in ("2", "3"))
    assert lean["deepest"] > 9
    assert (tmp_path / "fig5.png").stat().st_size > 1000
    assert "| float32 recomputed |" in (tmp_path / "table.md").read_text()


def test_a_figure_without_naive_networks_is_refused(
    command: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def need(config: RunConfig, num_landmarks: int, device: str) -> StepNeed:
        if config.quant.storage == "float32":
            raise NotMeasured("too large")
        return StepNeed(
            peak_bytes=config.model.unets, static_bytes=1, resident_bytes=1, growth_bytes=1
        )

    monkeypatch.setattr(sweep, "measure_need", need)
    code, out, errors = command("fig5", "--max-unets", 3, "--out", tmp_path / "none")
    assert (code, out) == (1, "")
    assert "fewer than two naive networks fit" in errors.splitlines()[-1]
    assert not (tmp_path / "none").exists()


def test_a_row_trained_before_a_key_came_had_its_default(budget: Budget, tmp_path: Path) -> None:
    sets = load("300w", budget.root, "train"), load("300w", budget.root, "test")
    config = RunConfig()
    before = setting_of(config, sets)
    del before["config"]["training.ramp"]
    (tmp_path / SETTING).write_text(json.dumps(before))
    check_setting(tmp_path, config, sets)
    with pytest.raises(UserError, match=r"was trained with training\.ramp 0\.0, now 0\.5"):
        check_setting(tmp_path, config.replace(training__ramp=0.5), sets)
