"""The plan of benchmarks/accuracy.py: what comes first, what waits, what is left alone."""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from benchmarks import accuracy
from benchmarks.accuracy import planned
from benchmarks.accuracy_runs import (
    MAIN,
    RATES,
    SETTINGS,
    SHAPES,
    Run,
    Setting,
    Shape,
    check_data,
    shapes_of,
)
from fedcunet.config import RunConfig
from fedcunet.errors import UserError

SMALL = SHAPES[0]


def finish(run: Run, out: Path, percent: float, epoch: int | None = None) -> None:
    """Writes the last checkpoint of a run as a training would, without its tensors."""
    path = run.folder(out) / "last.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = {"epoch": str(run.shape.epochs if epoch is None else epoch), "percent": repr(percent)}
    save_file({"x": np.zeros(1, np.float32)}, path, {"facts": json.dumps(facts)})


def plan(out: Path) -> list[Run]:
    return list(planned(SHAPES, 3, out, set()))


def test_all_settings_come_at_both_rates_and_sizes_and_the_defaults_first(tmp_path: Path) -> None:
    runs = plan(tmp_path)
    assert {run.setting for run in runs[:24]} == set(MAIN)
    assert {run.shape for run in runs[:24]} == set(SHAPES)
    assert len(runs) == len(set(runs))
    assert len(runs) == 2 * len(RATES) * (len(SETTINGS) + len(MAIN)) == 104
    assert len({run.folder(tmp_path) for run in runs}) == 104
    assert {run.seed for run in runs} == {0}


def test_adam_is_for_the_defaults_alone(tmp_path: Path) -> None:
    runs = [run for run in plan(tmp_path) if run.shape.optimizer == "adam"]
    assert {run.setting for run in runs} == set(MAIN)
    for run in runs:
        words = run.command(tmp_path, "300w", "r")
        assert words[words.index("--optimizer") + 1] == "adam"


def test_numbers_name_every_shape_that_has_them() -> None:
    assert shapes_of(64, 15, 16) == [SHAPES[0], SHAPES[2]]
    assert shapes_of(64, 2, 8) == [Shape(64, 2, 8)]


def test_more_seeds_wait_for_the_better_rate(tmp_path: Path) -> None:
    for rate, percent in zip(RATES, (6.0, 7.0), strict=True):
        finish(Run(MAIN[0], SMALL, rate, 0), tmp_path, percent)
    more = [run for run in plan(tmp_path) if run.seed]
    assert more == [Run(MAIN[0], SMALL, RATES[0], seed) for seed in (1, 2)]


def test_the_rate_that_won_at_the_first_shape_comes_first_at_the_second(tmp_path: Path) -> None:
    large = SHAPES[1]
    assert large.rates != RATES

    def first_of_large() -> float:
        return next(run.rate for run in plan(tmp_path) if run.shape == large)

    assert first_of_large() == large.rates[0]
    for rate, percent in zip(RATES, (7.0, 6.0), strict=True):
        finish(Run(MAIN[0], SMALL, rate, 0), tmp_path, percent)
    assert first_of_large() == large.rates[1]
    run = Run(MAIN[0], large, large.rates[1], 0)
    words = run.command(tmp_path, "300w", "r")
    assert words[words.index("--freeze-norm") + 1] == str(large.freeze_norm)
    assert words[words.index("--learning-rate") + 1] == str(large.rates[1])
    assert f"-freeze-{large.freeze_norm}" in str(run.folder(tmp_path))
    assert "--freeze-norm" not in Run(MAIN[0], SMALL, RATES[0], 0).command(tmp_path, "300w", "r")


def test_a_run_is_done_with_its_last_epoch(tmp_path: Path) -> None:
    run = Run(MAIN[0], SMALL, RATES[0], 0)
    assert run.result(tmp_path)[0] == 0
    assert math.isnan(run.result(tmp_path)[1])
    assert "--resume" not in run.command(tmp_path, "300w", "r")
    finish(run, tmp_path, 9.5, epoch=14)
    assert not run.done(tmp_path)
    assert "--resume" in run.command(tmp_path, "300w", "r")
    finish(run, tmp_path, 9.25)
    assert run.done(tmp_path)
    assert run.result(tmp_path) == (15, 9.25)


def test_runs_that_were_done_elsewhere_are_not_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    done, half = Run(MAIN[0], SMALL, RATES[0], 0), Run(MAIN[1], SMALL, RATES[0], 0)
    finish(done, first, 9.25)
    finish(half, first, 9.5, epoch=14)
    file = tmp_path / "results.jsonl"

    def call(*words: object) -> str:
        monkeypatch.setattr("sys.argv", ["accuracy.py", *map(str, words)])
        accuracy.main()
        return capsys.readouterr().out

    assert call("--out", first, "--export", file) == f"{file}: 1 runs\n"
    assert "1 runs done" in call("--out", second, "--known", file, "--report")
    assert done.result(second) == (15, 9.25)
    other_shape = ("--shape", SHAPES[1].size, SHAPES[1].epochs, SHAPES[1].batch)
    call("--out", second, "--known", file, *other_shape, "--report")  # the other's results may stay
    assert not half.done(second)
    finish(done, second, 9.125)  # trained here: counts
    finish(half, second, 8.5)
    assert call("--out", second, "--export", file) == f"{file}: 2 runs\n"
    assert [json.loads(line)["percent"] for line in file.read_text().splitlines()] == [8.5, 9.125]


def test_results_that_are_no_text_are_refused_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "results.jsonl").write_bytes(b"\xff\x00")
    words = ["--known", str(tmp_path / "results.jsonl"), "--report"]
    monkeypatch.setattr("sys.argv", ["accuracy.py", *words])
    with pytest.raises(SystemExit, match="expected runs of this study, found no text"):
        accuracy.main()


def test_seeds_that_are_not_asked_for_are_taken_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, run = tmp_path / "results.jsonl", Run(MAIN[0], SMALL, RATES[0], 2)
    name = str(run.folder(Path()))
    file.write_text(json.dumps({"run": name, "epochs": 15, "percent": 5.0}) + "\n")
    words = ["--known", str(file), "--out", str(tmp_path / "out"), "--seeds", "1", "--report"]
    monkeypatch.setattr("sys.argv", ["accuracy.py", *words])
    accuracy.main()
    assert "0 runs done" in capsys.readouterr().out
    assert run.done(tmp_path / "out")


def test_a_study_is_of_one_data_set(tmp_path: Path) -> None:
    arguments = argparse.Namespace(out=tmp_path, data="300w", root="a")
    check_data(arguments)
    check_data(arguments)
    arguments.root = "b"
    with pytest.raises(UserError, match="found those of"):
        check_data(arguments)


@pytest.mark.parametrize("other", [0, 200])
def test_the_hours_left_are_at_each_shapes_pace_or_the_others(
    other: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(MAIN[0], Shape(64, 10, 8), RATES[0], 0)
    finish(run, tmp_path, 9.0)
    (run.folder(tmp_path) / "history.jsonl").write_text('{"seconds": 36}\n' * 10)
    if other:
        history = Run(MAIN[0], Shape(128, 10, 4), RATES[0], 0).folder(tmp_path) / "history.jsonl"
        history.parent.mkdir(parents=True)
        history.write_text(f'{{"seconds": {other}}}\n')
    words = ("--shape", "64", "10", "8", "--shape", "128", "10", "4", "--seeds", "1", "--report")
    monkeypatch.setattr("sys.argv", ["accuracy.py", "--out", str(tmp_path), *words])
    accuracy.main()
    runs = 2 * len(SETTINGS)  # of a shape; an epoch of the second takes four times as long
    hours = (36 * 10 * (runs - 1) + (other or 4 * 36) * 10 * runs) / 3600
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == (
        f"1 runs done, {2 * runs - 1} to do: about {hours:.1f} core-hours at the pace so far"
    )


@pytest.mark.parametrize(
    "line",
    [
        "x",
        "[1]",
        '{"run": "64px-15epochs-batch16/float32/rate-0.001/speed-0", "epochs": 15, "percent": 5.0}',
        '{"run": "../elsewhere", "epochs": 15, "percent": 5.0}',
        '{"run": "64px-15epochs-batch16/float32/rate-0.001/seed-0", "epochs": 3, "percent": 5.0}',
        '{"run": "64px-15epochs-batch16/float32/rate-0.001/seed-0", "epochs": 15, "percent": "5"}',
        '{"run": "64px-15epochs-batch16/float32/rate-0.001/seed-0", "epochs": 15, "percent": NaN}',
    ],
)
def test_odd_results_are_refused_in_a_line_and_none_is_taken(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = (
        '{"run": "64px-15epochs-batch16/float32/rate-0.003/seed-0", "epochs": 15, "percent": 5.0}'
    )
    file, out = tmp_path / "results.jsonl", tmp_path / "out"
    file.write_text(f"{good}\n{line}\n")
    words = ["accuracy.py", "--known", str(file), "--out", str(out), "--report"]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit, match="expected runs of this study") as refusal:
        accuracy.main()
    assert repr(line) in str(refusal.value)
    assert not out.exists()


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.key)
def test_every_setting_is_the_one_that_its_name_says(setting: Setting) -> None:
    values = {"quant__input_quantizer": setting.quantizer} if setting.quantizer else {}
    config = RunConfig().replace(quant__bits=setting.bits, quant__alpha=setting.alpha, **values)
    name = config.quant.spec().name.replace("α", "alpha").replace("(", "-").replace(")", "")
    assert name == setting.name.removesuffix("-at-once")


def test_weights_get_to_their_bits_by_and_by_unless_at_once(tmp_path: Path) -> None:
    ways = {}
    for setting in SETTINGS:
        run = Run(setting, SMALL, RATES[0], 0)
        words = run.command(tmp_path, "300w", "r")
        ways[setting.key] = ("--ramp" in words, "ramp" in str(run.folder(tmp_path)))
    assert ways.pop("float32") == (False, False)
    assert ways.pop("BW-alpha-QIG-818-at-once-source") == (False, False)
    assert set(ways.values()) == {(True, True)}
