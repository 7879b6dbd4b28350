"""The HTML reports, rendered from a run folder made up here."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from fedcunet.errors import UserError
from reports.charts import tick_bytes
from reports.report import write_comparison_report, write_run_report
from reports.run_folder import read_run_folder
from tests.made_runs import NASTY, Page, chart, read_page, write_run, write_three_runs


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    folder = tmp_path_factory.mktemp("compare")
    return folder, write_three_runs(folder)


@pytest.fixture(scope="module")
def run_page(three: tuple[Path, list[Path]]) -> Page:
    return read_page(write_run_report(three[1][1]))


@pytest.fixture(scope="module")
def comparison_page(three: tuple[Path, list[Path]], run_page: Page) -> Page:
    return read_page(write_comparison_report(three[0], three[1]))


def test_the_run_report_gives_the_headline_figures_in_human_units(run_page: Page) -> None:
    for figure in ("17.90 %", "61.9 kB", "2.19", "904 kB", "61.0 kB", "1 min 02 s"):
        assert figure in run_page.text
    assert "19 rounds committed, 1 abandoned" in run_page.text


def test_every_curve_of_a_run_is_drawn_with_its_baseline(run_page: Page) -> None:
    for begins in ("NME by round", "NME by bytes sent", "NME by device time"):
        description = chart(run_page, begins)
        assert "Dashed line: mean shape 17.9 %" in description
    # 20 rounds of 8 clients, up and down: the cost of the abandoned round counts.
    total = 20 * 8 * (61_867 + 904_000)
    assert f"at {tick_bytes(total)}" in chart(run_page, "NME by bytes sent")
    assert "from 0.0274" in chart(run_page, "Training loss")


def test_rejections_and_abandoned_rounds_are_listed_with_their_reasons(run_page: Page) -> None:
    assert "quorum is 6" in run_page.text
    assert "i8-w1-g8-eden2: 1 round not reproducible" in run_page.text
    assert "late" in run_page.words
    assert "checksum" in run_page.words


def test_nodes_that_were_left_out_are_listed_with_their_reasons(
    three: tuple[Path, list[Path]], run_page: Page, tmp_path: Path
) -> None:
    assert "Nodes left out" not in run_page.text
    run = shutil.copytree(three[1][1], tmp_path / "run")
    summary = json.loads((run / "summary.json").read_text())
    many = [f"node {number}: did not answer" for number in range(101)]
    (run / "summary.json").write_text(
        json.dumps(
            summary | {"left_out": ["client 1: <b>", *many], "workers_replaced": {"died": 3}}
        )
    )
    page = read_page(write_run_report(run))
    assert "Nodes left out of the run" in page.text
    assert "client 1: <b>" in page.text
    assert "node 98: did not answer" in page.text
    assert "3 workers replaced (died)" in page.text
    assert "2 more in summary.json" in page.text
    both = read_page(write_comparison_report(tmp_path, [run, three[1][0]]))
    assert "i8-w1-g8-eden2: client 1: <b>" in both.text


def test_bytes_of_a_run_that_has_not_ended_are_shared_by_those_that_were_sent_something(
    tmp_path: Path,
) -> None:
    line = {"round": 1, "replies": {"accepted": 2, "unavailable": 2}}
    line |= {"bytes_down": 200, "clients_down": 2}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    summary = read_run_folder(tmp_path).summary
    assert summary["bytes_down_per_client_round"] == 100
    assert summary["replies"] == line["replies"]


def test_what_privacy_has_spent_and_who_attacked_is_told(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", "i8-w1", num_rounds=2)
    file = folder / "summary.json"
    spent = {"epsilon": None, "epsilon_server": 3.5, "delta": 1e-5, "attackers": {"nan": 2}}
    file.write_text(json.dumps(json.loads(file.read_text()) | spent))
    text = read_page(write_run_report(folder)).text
    assert "ε ∞ (to the server 3.50) at δ 1e-05" in text
    assert "2 nan" in text


def test_a_buffered_run_has_reasons_of_its_own(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", "i8-w1", num_rounds=4)
    file = folder / "summary.json"
    assert "a round lasts as long as its slowest client" in read_page(write_run_report(folder)).text
    summary = json.loads(file.read_text())
    summary["setting"]["federation.mode"] = "buffered"
    file.write_text(json.dumps(summary))
    text = read_page(write_run_report(folder)).text
    assert "a step comes when the buffer is full" in text
    assert "slowest client" not in text
    assert "or the measured time of training, decided whose update counted" in text


def test_where_the_time_went_is_told(run_page: Page) -> None:
    text = " ".join(run_page.text.split())
    assert "1 min 31 s training; 7.0 s coding, all clients together" in text
    assert "53.0 s waiting for clients; 3.0 s aggregating, 11.0 s evaluating" in text


def test_clients_are_listed_with_device_and_split_device_time(run_page: Page) -> None:
    description = chart(run_page, "Device time by client")
    assert description.count("uplink") == 8
    assert {"phone-low", "phone-mid", "phone-high"} <= set(run_page.words)


def test_pictures_carry_predicted_and_true_points_and_their_error(run_page: Page) -> None:
    paths = [attrs for tag, attrs in run_page.tags if tag == "path"]
    for kind in ("true", "predicted"):
        drawn = [attrs["d"] or "" for attrs in paths if attrs.get("class") == kind]
        assert [path.count("h0") for path in drawn] == [68] * 8
    errors = re.findall(
        r"Test picture \d, error ([\d.]+) %", " ".join(run_page.values("aria-label"))
    )
    assert len(errors) == 8


def test_a_comparison_puts_the_same_pictures_side_by_side(comparison_page: Page) -> None:
    labels = [x for x in comparison_page.values("aria-label") if x.startswith("Test picture ")]
    assert len(labels) == 8 * 3
    rows = [label for label in labels if label.startswith("Test picture 1,")]
    assert ["float32" in rows[0], "eden2" in rows[1], "sign-ef" in rows[2]] == [True] * 3


def test_a_comparison_says_how_many_times_fewer_bytes_than_float32(comparison_page: Page) -> None:
    assert "1.00×" in comparison_page.words
    assert "14.6×" in comparison_page.words
    assert "25.2×" in comparison_page.words
    assert chart(comparison_page, "Final NME by bytes up").count("%") >= 3


def test_a_comparison_links_to_the_reports_below_it(comparison_page: Page) -> None:
    assert comparison_page.values("href")[0] == "b/report.html"


def test_a_comparison_tells_what_differs_from_what_is_the_same(comparison_page: Page) -> None:
    words = comparison_page.words
    assert words.index("update.codec") < words.index("The same in all") < words.index("model.unets")


def test_a_report_is_complete_in_itself(three: tuple[Path, list[Path]], run_page: Page) -> None:
    text = (three[1][1] / "report.html").read_text(encoding="utf-8")
    assert len(text) < 3_000_000
    assert not re.search(r"<(script|link|iframe)\b|@import|url\((?!#)", text)
    for tag, attrs in run_page.tags:
        for key in ("src", "href"):
            assert (attrs.get(key) or "#").startswith(("#", "data:image/")), (tag, key)


def test_ids_are_unique_and_every_reference_within_a_drawing_has_its_target(
    three: tuple[Path, list[Path]], comparison_page: Page
) -> None:
    ids = comparison_page.values("id")
    assert len(ids) == len(set(ids))
    text = (three[0] / "report.html").read_text(encoding="utf-8")
    assert set(re.findall(r"url\(#([^)]+)\)", text)) <= set(ids)
    assert set(re.findall(r'href="#([^"]+)"', text)) <= set(ids)


def test_every_picture_has_a_description(comparison_page: Page, run_page: Page) -> None:
    for page in (comparison_page, run_page):
        drawings = [attrs for tag, attrs in page.tags if tag == "svg"]
        assert drawings
        assert all(attrs.get("role") == "img" and attrs.get("aria-label") for attrs in drawings)


def test_the_same_folder_gives_the_same_report(
    three: tuple[Path, list[Path]], run_page: Page
) -> None:
    first = (three[1][1] / "report.html").read_bytes()
    assert write_run_report(three[1][1]).read_bytes() == first


def test_text_from_files_stays_text(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", NASTY, num_rounds=4, abandoned=(2,))
    for name in ("metrics.jsonl", "clients.jsonl", "summary.json"):
        text = (run / name).read_text()
        for plain in ("late", "phone-low", "quorum is 6", '"eden"'):
            nasty = json.dumps(NASTY)
            text = text.replace(plain, nasty if plain.startswith('"') else nasty[1:-1])
        (run / name).write_text(text)
    other = write_run(tmp_path / "other", "_b", num_rounds=4)
    for report in (write_run_report(run), write_comparison_report(tmp_path, [run, other])):
        text = report.read_text(encoding="utf-8")
        assert "<script" not in text
        assert "\x1b" not in text
        assert "alert(" in read_page(report).text


def test_a_run_that_has_not_ended_is_reported_from_its_lines(tmp_path: Path) -> None:
    run = write_run(tmp_path / "half", num_rounds=6, abandoned=(6,))
    for name in ("summary.json", "clients.jsonl", "config.toml", "examples.npz"):
        (run / name).unlink()
    text = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(text + '{"round": 7, "outco')
    page = read_page(write_run_report(run))
    assert "half" in page.text
    assert "unfinished: 5 rounds committed, 1 abandoned" in page.text
    assert "61.9 kB" in page.text
    for note in ("summary.json is missing", "1 line could not be read", "clients.jsonl is missing"):
        assert note in page.text


def test_a_run_of_which_every_round_was_abandoned_has_a_report(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", num_rounds=3, abandoned=(1, 2, 3))
    summary = json.loads((run / "summary.json").read_text())
    summary["nme_percent"] = summary["mean_shape_percent"] = None
    (run / "summary.json").write_text(json.dumps(summary))
    page = read_page(write_run_report(run))
    assert "0 rounds committed, 3 abandoned" in page.text
    read_page(write_comparison_report(tmp_path / "out", [run, run]))


@pytest.mark.parametrize(
    "lines",
    [
        '[]\n"x"\n1\n{}\n{"round": "x"}\n',
        '{"round": 1, "metric": NaN, "train_loss": Infinity, "bytes_up": "x", "replies": 3}\n',
        '{"round": 1, "metric": -1, "bytes_up": -5, "device_seconds": 1e400, "outcome": []}\n',
        '{"round": 1, "metric": true, "metric_name": 3, "reason": ["<b>"], "replies": {"": 1}}\n',
    ],
)
def test_lines_that_make_no_sense_do_not_break_the_report(tmp_path: Path, lines: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(lines)
    (tmp_path / "clients.jsonl").write_text(lines + '{"client": null, "device_seconds": [1]}\n')
    (tmp_path / "summary.json").write_text('{"replies": [], "setting": 3, "name": null}')
    read_page(write_run_report(tmp_path))


@pytest.mark.parametrize("kind", ["no archive", "wrong shape", "no key"])
def test_unusable_pictures_become_a_note(tmp_path: Path, kind: str) -> None:
    run = write_run(tmp_path / "run", num_rounds=2, abandoned=())
    path = run / "examples.npz"
    if kind == "no archive":
        path.write_bytes(b"PK\x03\x04 cut short")
    elif kind == "no key":
        np.savez(path, images_NHWC=np.zeros((1, 8, 8, 3), np.uint8))
    else:
        zeros = np.zeros((2, 68, 2))
        images = np.zeros((1, 8, 8, 3), np.uint8)
        np.savez(
            path, images_NHWC=images, predicted_NK2=zeros, target_NK2=zeros, error_N=np.zeros(2)
        )
    folder = read_run_folder(run)
    assert folder.examples is None
    assert [note for note in folder.notes if "examples.npz" in note]


def test_points_that_are_not_labelled_are_not_drawn(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", num_rounds=2, abandoned=())
    with np.load(run / "examples.npz") as data:
        arrays = dict(data)
    arrays["labelled_NK"] = np.arange(68)[None] < np.full((8, 1), 60)
    arrays["predicted_NK2"][:, 0] = np.nan
    np.savez(run / "examples.npz", **arrays)
    page = read_page(write_run_report(run))
    by_kind = {attrs.get("class"): attrs["d"] or "" for tag, attrs in page.tags if tag == "path"}
    assert by_kind["true"].count("h0") == 60
    assert by_kind["predicted"].count("h0") == 67
    assert by_kind["stick"].count("L") == 59


def test_a_thousand_clients_are_summed_up_by_profile_and_stay_small(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", num_clients=1000, num_rounds=2, abandoned=())
    path = write_run_report(run)
    assert path.stat().st_size < 3_000_000
    page = read_page(path)
    assert chart(page, "Device time by profile").count("uplink") == 3
    assert "500 more in clients.jsonl." in page.text


def test_large_pictures_are_left_out_until_the_page_is_small_enough(tmp_path: Path) -> None:
    run = tmp_path
    (run / "summary.json").write_text("{}")
    noise = np.random.default_rng(0).integers(0, 256, (48, 256, 256, 3), dtype=np.uint8)
    points = np.zeros((48, 68, 2))
    np.savez(
        run / "examples.npz",
        images_NHWC=noise,
        predicted_NK2=points,
        target_NK2=points,
        error_N=np.zeros(48),
    )
    path = write_run_report(run)
    assert path.stat().st_size < 3_000_000
    assert any(x.startswith("Test picture") for x in read_page(path).values("aria-label"))


def test_a_folder_that_holds_no_run_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        write_run_report(tmp_path / "absent")
    with pytest.raises(UserError, match="holds no run"):
        write_run_report(tmp_path)
    with pytest.raises(UserError, match="at least one run folder"):
        write_comparison_report(tmp_path, [])


def test_a_failed_write_leaves_the_former_report_and_no_other_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path
    (run / "summary.json").write_text('{"name": "only figures", "nme_percent": 6.4}')
    before = write_run_report(run).read_bytes()
    names = sorted(path.name for path in run.iterdir())

    def fail(self: Path, target: Path) -> Path:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_run_report(run)
    assert (run / "report.html").read_bytes() == before
    assert sorted(path.name for path in run.iterdir()) == names
