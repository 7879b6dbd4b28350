"""`report.html` of a run, and of a comparison of runs, from their run folders alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fedcunet.errors import UserError
from fedcunet.files import write_atomically
from reports import comparison, curves, page, sections, units
from reports.run_folder import RunFolder, read_run_folder

_MAX_BYTES = 3_000_000

_HOW = (
    (
        "NME",
        "Mean distance between predicted and true points, divided by the distance of the outer "
        "corners of the eyes (points 37 and 46 of 68), averaged over the test images, in percent.",
    ),
    (
        "PCK, PCKh",
        "Share of the labelled points that lie within a fixed fraction of the torso (PCK) or of "
        "the head (PCKh) of their true place, in percent.",
    ),
    (
        "Mean shape",
        "The same metric on the same images when the mean shape of the training set is predicted "
        "for every crop: what a model must beat to have learned anything from the pixels.",
    ),
    (
        "Clients' own",
        "The same metric of the global model on the images that each client keeps back, evaluated "
        "there: mean weighted by images, worst client, and spread (standard deviation) over the "
        "clients. Their bytes are not among those of training.",
    ),
    (
        "Bytes",
        "Lengths of the blobs that were sent, everything counted: header, scales, BatchNorm, first "
        "and last layers, padding, checksum. kB and MB are 10³ and 10⁶ bytes.",
    ),
    ("Bits per parameter", "8 × length of the blob / number of parameters of the network."),
    (
        "Model size",
        "Length of the file that `fedcunet export` packs for inference: weights at 1 or 1.6 bits, "
        "alpha and BatchNorm at 8, first and last layers in float16. With float32 weights: the "
        "float32 state.",
    ),
    (
        "Training peak",
        "Measured on this machine's CPU in a fresh process: bytes of torch's allocator at the "
        "highest point of a training step at the setting's batch size; parameters, optimiser, "
        "images, activations and gradients counted. The ratio is to the same network and batch in "
        "plain float32, measured likewise.",
    ),
    (
        "Balance index",
        "NME² · training peak ratio · model size over float32 (Tang et al., ECCV 2018, Eq. 7); "
        "lower is better.",
    ),
    (
        "Device time",
        "Virtual. Compute measured on this machine (or the setting's seconds per example) divided "
        "by the relative speed of the client's device profile, and bytes divided by its uplink and "
        "downlink; latency is left out.",
    ),
    ("Time", "Wall-clock time of the run, waiting for the clients included."),
    (
        "Boxes",
        "Faces without a given box are cropped by the square box of their landmarks × 1.25.",
    ),
    (
        "Pictures",
        "Crops of the test set as the network saw them, enlarged; the run chose them, the report "
        "shows all that fit, in their order.",
    ),
)


def write_run_report(run_dir: Path | str) -> Path:
    """Write `report.html` into a run folder and return its path.

    Raises:
        UserError: The folder is absent or holds no run.
    """
    run = read_run_folder(run_dir)
    return _write(run.path / "report.html", lambda limit: _run_page(run, limit))


def write_comparison_report(out_dir: Path | str, run_dirs: Sequence[Path | str]) -> Path:
    """Write `report.html` into `out_dir` for several run folders and return its path.

    Raises:
        UserError: No run folder, or one that is absent or holds no run.
    """
    if not run_dirs:
        raise UserError("a comparison report needs at least one run folder, found none")
    runs = [read_run_folder(run_dir) for run_dir in run_dirs]
    out = Path(out_dir)
    return _write(out / "report.html", lambda limit: _comparison_page(runs, out, limit))


def _write(path: Path, render: Callable[[int], str]) -> Path:
    """Write the page with as many pictures as fit in 3 MB."""
    for num_pictures in (48, 24, 12, 4, 0):
        text = render(num_pictures)
        if len(text.encode("utf-8", errors="replace")) < _MAX_BYTES:
            break
    # Text from files may hold what UTF-8 cannot say.
    write_atomically(path, text.encode(errors="replace"))
    return path


def _run_page(run: RunFolder, max_pictures: int) -> str:
    summary = run.summary
    (name,) = curves.names_of([run])
    body = [
        _header(name, _outcome_words(summary)),
        page.tiles(_headline(summary)),
        _section("Curves", curves.curves([run], [name])),
        _section("Landmarks on test pictures", sections.own_pictures(run.examples, max_pictures)),
        _section(
            "Clients",
            curves.device_bars(run)
            + sections.fleet_table(run)
            + sections.client_table(run)
            + sections.left_out([run], [name]),
        ),
        _section("Replies and rounds", sections.replies([run], [name])),
        _section("Setting", sections.setting_tables([run], [name])),
        _section("How each number was obtained", page.facts(_HOW)),
        _section("Notes on the files", sections.notes([run], [name])),
    ]
    return page.page(f"{name}: federated run", body)


def _comparison_page(runs: Sequence[RunFolder], out: Path, max_pictures: int) -> str:
    names = curves.names_of(runs)
    table = _headline_table(runs, names, out)
    pictured = curves.trade_off(runs, names) + curves.setting_bars(runs, names)
    overview = f'<div class="charts"><div>{table}</div><div class="stack">{pictured}</div></div>'
    body = [
        _header(
            f"Comparison of {units.counted(len(runs), 'setting')}",
            f"Federated training of landmark networks: {', '.join(names)}.",
        ),
        _section("Result", overview if pictured else table),
        _section("Curves", curves.curves(runs, names)),
        _section("The same test pictures", sections.side_by_side(runs, names, max_pictures)),
        _section(
            "Clients",
            "".join(sections.clients_of(r, n) for r, n in zip(runs, names, strict=True))
            + sections.left_out(runs, names),
        ),
        _section("Replies and rounds", sections.replies(runs, names)),
        _section("Settings", sections.setting_tables(runs, names)),
        _section("How each number was obtained", page.facts(_HOW)),
        _section("Notes on the files", sections.notes(runs, names)),
    ]
    return page.page("Comparison of federated runs", body)


def _section(title: str, content: str) -> str:
    """A section, or nothing without content (HTML)."""
    return f"<section><h2>{escape(title)}</h2>{content}</section>" if content else ""


def _header(title: str, text: str) -> str:
    return f"<header><h1>{escape(title)}</h1><p>{escape(text)}</p></header>"


def _outcome_words(summary: Mapping[str, Any]) -> str:
    committed = units.counted(units.whole(summary.get("rounds_committed")), "round")
    abandoned = units.whole(summary.get("rounds_abandoned"))
    outcome = units.printable(summary.get("outcome"), 60)
    return f"Federated run, {outcome}: {committed} committed, {abandoned} abandoned."


def _headline(summary: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The headline figures of one run."""
    metric_name, value = units.metric_of(summary)
    baseline = units.number(summary.get("mean_shape_percent"))
    gain = units.improvement_text(metric_name, value, baseline)
    replies = summary.get("replies")
    accepted = units.whole(replies.get("accepted")) if isinstance(replies, Mapping) else 0
    num_rejected = sum(comparison.rejected(summary).values())
    down_bits = units.plain(summary.get("bits_per_parameter_down"))
    return [
        (units.metric_label(metric_name), units.percent(value), f"better by {gain}"),
        ("Mean shape", units.percent(baseline), "same metric, the baseline"),
        ("Bytes up", units.size(summary.get("bytes_up_per_client_round")), "a client, a round"),
        ("Bits up", units.plain(summary.get("bits_per_parameter_up")), "per parameter"),
        (
            "Bytes down",
            units.size(summary.get("bytes_down_per_client_round")),
            f"a client, a round; {down_bits} bits per parameter",
        ),
        ("Model", units.size(summary.get("model_bytes")), "at its weight bits"),
        *_memory_tiles(summary),
        ("Device time", units.seconds(summary.get("device_seconds_per_round")), "a mean round"),
        ("Time", units.seconds(summary.get("seconds")), "of the whole run"),
        *_time_tiles(summary),
        ("Replies", f"{accepted:,}", f"accepted; {num_rejected:,} rejected"),
        *_client_tiles(summary),
        *_trust_tiles(summary),
    ]


def _trust_tiles(summary: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """What privacy has spent, and who attacked, where a run has them."""
    found = (
        ("Privacy", units.privacy_figures(summary), "spent in the whole run"),
        ("Attackers", units.attackers(summary), "clients, by what they did"),
    )
    return [tile for tile in found if tile[1]]


def _client_tiles(summary: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """What the clients found on their own images, while training and of the final model."""
    label = units.metric_label(units.metric_of(summary)[0])
    tiles = []
    for prefix, counted, images in (
        ("client", "client_evaluations", "validation"),
        ("client_test", "client_tests", "test"),
    ):
        if units.number(summary.get(f"{prefix}_mean_percent")) is None:
            continue
        mean, worst, tenth, spread = (
            units.percent(summary.get(f"{prefix}_{name}_percent"))
            for name in ("mean", "worst", "tenth", "spread")
        )
        counts = summary.get(counted)
        asked = sum(map(units.whole, counts.values())) if isinstance(counts, Mapping) else 0
        answered = units.whole(counts.get("accepted")) if isinstance(counts, Mapping) else 0
        words = f"on the {images} images of {answered:,} of {asked:,} clients; spread {spread}"
        tiles += [
            (f"Clients' {label}, {images}", mean, words),
            (f"Worst client's {label}", worst, f"a tenth of the clients is beyond {tenth}"),
        ]
    if tiles:
        sent = units.size(summary.get("evaluation_bytes_down"))
        answers = units.size(summary.get("evaluation_bytes_up"))
        tiles.append(("Clients' evaluation", sent, f"down, {answers} up, beside training's bytes"))
    return tiles


def _time_tiles(summary: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Where the time went, the clients' sums first."""
    parts = summary.get("seconds_of")
    if not isinstance(parts, dict):
        return []
    clients = f"training; {units.seconds(parts.get('code'))} coding, all clients together"
    server = (
        f"waiting for clients; {units.seconds(parts.get('aggregate'))} aggregating, "
        f"{units.seconds(parts.get('evaluate'))} evaluating"
    )
    return [
        ("Clients' time", units.seconds(parts.get("train")), clients),
        ("Server's time", units.seconds(parts.get("wait")), server),
    ]


def _memory_tiles(summary: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Training memory and balance index, where the run has them."""
    tiles = []
    if units.number(summary.get("training_peak_bytes")) is not None:
        ratio = units.number(summary.get("training_peak_ratio"))
        note = units.printable(summary.get("training_peak_note") or "not known")
        words = f"{ratio:.3f} of naive float32" if ratio is not None else f"ratio: {note}"
        tiles.append(("Training peak", units.size(summary["training_peak_bytes"]), words))
    if units.number(summary.get("balance_index")) is not None:
        tiles.append(("Balance index", units.plain(summary["balance_index"]), "lower is better"))
    return tiles


def _headline_table(runs: Sequence[RunFolder], names: Sequence[str], out: Path) -> str:
    """The comparison table, with a link to each run's own report where there is one.

    As on the terminal: up to four runs side by side, more as a row each.
    """
    heading, *columns = comparison.columns([run.summary for run in runs])
    links = [_link(run, name, out) for run, name in zip(runs, names, strict=True)]
    caption = "Result of each setting"
    if len(runs) <= comparison.SIDE_BY_SIDE:
        rows = [
            [
                f"{escape(column.title)} <small>{escape(column.note)}</small>",
                *(escape(cell) for cell in column.cells),
            ]
            for column in columns
        ]
        headings = [(escape(heading.title), ""), *((link, "") for link in links)]
        return page.table(headings, rows, caption=caption, html_headings=True)
    rows = [
        [link, *(escape(column.cells[i]) for column in columns)] for i, link in enumerate(links)
    ]
    headings = [(heading.title, ""), *((column.title, column.note) for column in columns)]
    return page.table(headings, rows, caption=caption)


def _link(run: RunFolder, name: str, out: Path) -> str:
    """The name, as a link to the run's own report if it lies below the comparison."""
    target = run.path / "report.html"
    relative = Path(os.path.relpath(target, out))
    if not target.is_file() or relative.parts[0] == "..":
        return escape(name)
    return f'<a href="{escape(quote(relative.as_posix()))}">{escape(name)}</a>'
