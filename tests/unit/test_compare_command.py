"""`python -m simulations compare`: table and reports, settings and tables that are no good."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import clients.app
from fedcunet.config import RunConfig
from fedcunet.errors import RunFailure, UserError
from fedcunet.files import held
from simulations.engine import Engine
from tests.conftest import Command
from tests.made_runs import write_run


def test_a_comparison_writes_table_and_reports(
    command: Command, tiny_setting: Path, tmp_path: Path
) -> None:
    other = tiny_setting.with_name("signs.toml")
    other.write_text(tiny_setting.read_text() + '[update]\ncodec = "sign"\nbits = 1\n')
    out = tmp_path / "comparison"
    code, text, progress = command(
        "simulations",
        "compare",
        tiny_setting,
        other,
        "--engine",
        "loopback",
        "--out",
        out,
        "--json",
    )
    table = json.loads(text)
    assert code == 0
    assert [row["name"] for row in table] == ["tiny", "signs"]
    assert table == json.loads((out / "table.json").read_text())
    assert table[1]["bytes_up_per_client_round"] < table[0]["bytes_up_per_client_round"]
    assert "round 1/1" in progress
    assert (out / "report.html").is_file()
    assert (out / "signs" / "summary.json").is_file()
    code, text, _ = command("simulations", "report", out)
    assert code == 0
    assert text.strip() == str(out / "report.html")


def test_a_setting_that_cannot_be_run_costs_a_comparison_itself_only(
    command: Command, tiny_setting: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[str] = []

    def serve(grid: Any, config: RunConfig, *, out: Path, name: str, **_: Any) -> dict[str, Any]:
        begun.append(name)
        if name == "tiny":
            raise UserError("cannot be used")
        text = (write_run(out, name, num_rounds=2) / "summary.json").read_text()
        return {**json.loads(text), "workers_replaced": {}}

    monkeypatch.setattr("simulations.__main__.serve", serve)
    last = tiny_setting.with_name("last.toml")
    last.write_text(tiny_setting.read_text())
    out = tmp_path / "comparison"
    arguments = ["--engine", "loopback", "--out", out, "--json"]
    code, text, err = command("simulations", "compare", tiny_setting, last, *arguments)
    assert (code, err) == (1, "simulations: tiny: cannot be used\n")
    assert [row["name"] for row in json.loads(text)] == begun[1:] == ["last"]
    assert [row["name"] for row in json.loads((out / "table.json").read_text())] == ["last"]
    assert (out / "report.html").is_file()
    # What can be seen beforehand is, before the first of them begins.
    last.write_text(tiny_setting.read_text() + 'test-subset = "none"\n')
    shutil.rmtree(out)
    code, _, err = command("simulations", "compare", tiny_setting, last, *arguments)
    assert (code, "none" in err, len(begun)) == (2, True, 2)
    # All of them wrong is wrong use, and the folder of another comparison is nobody else's.
    code, _, err = command("simulations", "compare", tiny_setting, *arguments)
    assert (code, err) == (2, "simulations: tiny: cannot be used\n")
    assert not out.exists()
    with held(out):
        code, _, err = command("simulations", "compare", tiny_setting, *arguments)
    assert (code, err) == (2, f"simulations: {out}: another process is at work there\n")
    assert len(begun) == 3


def test_a_setting_that_does_not_fit_into_memory_costs_itself_only(
    command: Command, tiny_setting: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(engine: Engine, config: RunConfig) -> None:
        if config.seed == 7:
            raise RunFailure("a step needs more than there is")

    monkeypatch.setattr(Engine, "check", check)
    other = tiny_setting.with_name("big.toml")
    other.write_text("seed = 7\n" + tiny_setting.read_text())
    out = tmp_path / "comparison"
    arguments = ["--engine", "loopback", "--out", out, "--json"]
    code, text, err = command("simulations", "compare", other, tiny_setting, *arguments)
    assert (code, [row["name"] for row in json.loads(text)]) == (1, ["tiny"])
    assert err.splitlines()[-1] == "simulations: big: a step needs more than there is"
    code, text, err = command("simulations", "compare", other, *arguments, "--resume")
    assert (code, err) == (1, "simulations: big: a step needs more than there is\n")


def test_a_run_without_a_committed_round_has_a_report_and_its_row(
    command: Command, tiny_setting: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = ["--engine", "loopback", "--set", "federation.max-update-norm=1e-6", "--json"]
    code, _, err = command("simulations", "run", tiny_setting, *arguments, "--out", out / "run")
    assert (code, "no round was committed" in err) == (1, True)
    assert "too-large" in (out / "run" / "report.html").read_text()
    code, text, _ = command("simulations", "compare", tiny_setting, *arguments, "--out", out / "c")
    (row,) = json.loads(text)
    assert (code, row["outcome"], row["replies"]["accepted"]) == (1, "failed", 0)
    assert (out / "c" / "report.html").is_file()
    # What a run of another setting left is no row of this one.
    arguments[-2] = "federation.max-update-norm=1e-5"
    arguments += ["--out", out / "c", "--resume"]
    code, text, err = command("simulations", "compare", tiny_setting, *arguments)
    assert (code, text, "max-update-norm" in err) == (2, "", True)


def test_bits_are_those_of_the_updates_that_were_sent(
    command: Command, tiny_setting: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails_for_one(update_N: Any, reference_N: Any, config: Any, *rest: Any, **more: Any) -> Any:
        if rest[1].client == 0:
            raise RuntimeError("no room on the disk")
        return encode(update_N, reference_N, config, *rest, **more)

    encode = clients.app._encode
    monkeypatch.setattr(clients.app, "_encode", fails_for_one)
    arguments = ["--engine", "loopback", "--json", "--out", tmp_path / "out"]
    float32 = ["update.codec=float32", "update.bits=32", "federation.quorum=0.1"]
    arguments += [word for value in float32 for word in ("--set", value)]
    code, text, _ = command("simulations", "run", tiny_setting, *arguments)
    summary = json.loads(text)
    assert (code, summary["replies"]) == (0, {"accepted": 1, "error-reply": 1})
    assert summary["bits_per_parameter_up"] == pytest.approx(32, rel=1e-3)
    assert summary["bits_per_parameter_down"] == pytest.approx(32, rel=1e-3)


def test_only_a_comparison_is_gone_on_with(
    command: Command, tiny_setting: Path, tmp_path: Path
) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "1.jpg").touch()
    run = write_run(tmp_path / "run", "i8-w1", num_rounds=2)
    for folder in (tmp_path / "photos", run):
        before = sorted(folder.iterdir())
        arguments = ["compare", tiny_setting, "--engine", "loopback", "--out", folder, "--resume"]
        code, _, err = command("simulations", *arguments)
        assert (code, "expected a comparison to resume, found" in err) == (2, True)
        assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize("text", ["{", "[{}]", '{"name": 1}', "7"])
def test_a_damaged_table_of_a_comparison_is_named(
    command: Command, tmp_path: Path, text: str
) -> None:
    (tmp_path / "table.json").write_text(text)
    code, out, err = command("simulations", "report", tmp_path)
    assert (code, out) == (2, "")
    assert f"{tmp_path / 'table.json'}: expected the rows of a comparison, found " in err
