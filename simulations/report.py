"""`report.html` of a run, and of a comparison of runs, from their run folders alone."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fedcunet.errors import UserError
from simulations import comparison, curves, page, pictures, units
from simulations.run_folder import Examples, RunFolder, read_run_folder

_MAX_BYTES = 3_000_000
_MAX_CLIENT_ROWS = 500

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
        "Bytes",
        "Lengths of the blobs that were sent, everything counted: header, scales, BatchNorm, first "
        "and last layers, padding, checksum. kB and MB are 10³ and 10⁶ bytes.",
    ),
    ("Bits per parameter", "8 × length of the blob / number of parameters of the network."),
    ("Model size", "The network packed at its weight bits, with what stays in float."),
    (
        "Device time",
        "Virtual. Compute measured on this machine (or the setting's seconds per example) divided "
        "by the relative speed of the client's device profile, and bytes divided by its uplink and "
        "downlink; latency is left out.",
    ),
    ("Time", "Wall-clock time of the run on the machine that simulated it."),
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


def _write(path: Path, render: Any) -> Path:
    """Write the page with as many pictures as fit in 3 MB."""
    for num_pictures in (48, 24, 12, 4, 0):
        text = render(num_pictures)
        if len(text.encode("utf-8", errors="replace")) < _MAX_BYTES:
            break
    page.write_atomically(path, text)
    return path


def _run_page(run: RunFolder, max_pictures: int) -> str:
    summary = run.summary
    (name,) = curves.names_of([run])
    body = [
        _header(name, _outcome_words(summary)),
        page.tiles(_headline(summary)),
        _section("Curves", curves.curves([run], [name])),
        _section("Landmarks on test pictures", _own_pictures(run.examples, max_pictures)),
        _section("Clients", curves.device_bars(run) + _client_table(run)),
        _section("Replies and rounds", _replies([run], [name])),
        _section("Setting", _setting_tables([run], [name])),
        _section("How each number was obtained", page.facts(_HOW)),
        _section("Notes on the files", _notes([run], [name])),
    ]
    return page.page(f"{name}: federated run", body)


def _comparison_page(runs: Sequence[RunFolder], out: Path, max_pictures: int) -> str:
    names = curves.names_of(runs)
    bars = curves.setting_bars(runs, names)
    trade_off = curves.trade_off(runs, names)
    overview = f'<div class="charts">{trade_off}{bars}</div>' if trade_off or bars else ""
    body = [
        _header(
            f"Comparison of {units.counted(len(runs), 'setting')}",
            "Federated training of landmark networks; a row a setting.",
        ),
        _section("Result", _headline_table(runs, names, out) + overview),
        _section("Curves", curves.curves(runs, names)),
        _section("The same test pictures", _side_by_side(runs, names, max_pictures)),
        _section("Clients", "".join(_clients_of(r, n) for r, n in zip(runs, names, strict=True))),
        _section("Replies and rounds", _replies(runs, names)),
        _section("Settings", _setting_tables(runs, names)),
        _section("How each number was obtained", page.facts(_HOW)),
        _section("Notes on the files", _notes(runs, names)),
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
        ("Device time", units.seconds(summary.get("device_seconds_per_round")), "a mean round"),
        ("Time", units.seconds(summary.get("seconds")), "of this simulation"),
        ("Replies", f"{accepted:,}", f"accepted; {num_rejected:,} rejected"),
    ]


def _headline_table(runs: Sequence[RunFolder], names: Sequence[str], out: Path) -> str:
    """The comparison table, with a link to each run's own report where there is one."""
    columns = comparison.columns([run.summary for run in runs])
    rows = []
    for i, cells in enumerate(zip(*(column.cells for column in columns), strict=True)):
        row = [escape(cell) for cell in cells]
        row[0] = _link(runs[i], names[i], out)
        rows.append(row)
    headings = [(column.title, column.note) for column in columns]
    return page.table(headings, rows, caption="Result of each setting")


def _link(run: RunFolder, name: str, out: Path) -> str:
    """The name, as a link to the run's own report if it lies below the comparison."""
    target = run.path / "report.html"
    relative = Path(os.path.relpath(target, out))
    if not target.is_file() or relative.parts[0] == "..":
        return escape(name)
    return f'<a href="{escape(quote(relative.as_posix()))}">{escape(name)}</a>'


def _own_pictures(examples: Examples | None, max_pictures: int) -> str:
    if examples is None or not max_pictures:
        return ""
    shown = "".join(
        pictures.picture(examples, i, alt=f"Test picture {i + 1}")
        for i in range(min(len(examples), max_pictures))
    )
    return f'{pictures.LEGEND}<div class="pictures">{shown}</div>' if shown else ""


def _side_by_side(runs: Sequence[RunFolder], names: Sequence[str], max_pictures: int) -> str:
    """The same pictures as rows, settings as columns; pictures are known by their pixels."""
    found: list[dict[bytes, int]] = []
    rows: dict[bytes, tuple[Examples, int]] = {}
    for run in runs:
        examples = run.examples
        keys = [] if examples is None else [image.tobytes() for image in examples.images_NHWC]
        found.append({key: i for i, key in enumerate(keys)})
        if examples is not None:
            for i, key in enumerate(keys):
                rows.setdefault(key, (examples, i))
    num_rows = min(len(rows), max_pictures // max(len(runs), 1))
    if not num_rows:
        return ""
    body = []
    for number, (key, (owner, index)) in enumerate(list(rows.items())[:num_rows], start=1):
        link = pictures.jpeg_data_uri(owner.images_NHWC[index])
        cells = ""
        for run, name, known in zip(runs, names, found, strict=True):
            if run.examples is None or key not in known:
                cells += f"<td>{units.MISSING}</td>"
                continue
            alt = f"Test picture {number}, {name}"
            cells += f"<td>{pictures.picture(run.examples, known[key], alt=alt, link=link)}</td>"
        body.append(f"<tr>{cells}</tr>")
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
    return (
        f'{pictures.LEGEND}<div class="scroll" role="region" tabindex="0" '
        f'aria-label="Test pictures by setting"><table class="side"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _client_table(run: RunFolder) -> str:
    """What each client held, sent and took; means over its replies."""
    if not run.clients:
        return ""
    headings = [
        ("Client", ""),
        ("Device", ""),
        ("Examples", ""),
        ("Accepted", "replies"),
        ("Rejected", "replies"),
        ("Up", "a round"),
        ("Down", "a round"),
        ("Measured", "compute"),
        ("Downlink", "device"),
        ("Compute", "device"),
        ("Uplink", "device"),
        ("Total", "device"),
    ]
    rows = []
    for client in run.clients[:_MAX_CLIENT_ROWS]:
        parts = client.device_parts()
        num_rejected = client.replies - client.accepted
        rows.append(
            [
                escape(client.client),
                escape(client.device),
                f"{client.num_examples:,}",
                f"{client.accepted:,}",
                f'<span class="bad">{num_rejected:,}</span>' if num_rejected else "0",
                units.size(client.bytes_up / client.replies),
                units.size(client.bytes_down / client.replies),
                units.seconds(client.compute_seconds / client.replies),
                *(units.seconds(part) for part in parts),
                units.seconds(sum(parts)),
            ]
        )
    tall = len(rows) > 20
    text = page.table(headings, rows, caption="Clients", text_columns=2, tall=tall)
    left = len(run.clients) - len(rows)
    return f"<h3>{units.counted(len(run.clients), 'client')}</h3>{text}" + (
        f"<p>{left:,} more in clients.jsonl.</p>" if left else ""
    )


def _clients_of(run: RunFolder, name: str) -> str:
    content = _client_table(run)
    if not content:
        return ""
    return f"<details><summary>{escape(name)}</summary>{content}</details>"


def _replies(runs: Sequence[RunFolder], names: Sequence[str]) -> str:
    """Reasons of rejections by setting, and the abandoned rounds."""
    counts = [comparison.rejected(run.summary) for run in runs]
    reasons = list(dict.fromkeys(reason for count in counts for reason in count))
    if reasons:
        headings = [("Reason of rejection", ""), *((name, "replies") for name in names)]
        rows = [
            [escape(units.printable(reason)), *(f"{count.get(reason, 0):,}" for count in counts)]
            for reason in reasons
        ]
        text = page.table(headings, rows, caption="Reasons of rejections")
    else:
        text = "<p>No reply was rejected.</p>"
    rows = [
        [
            escape(name),
            escape(units.printable(line.get("round"), 20)),
            escape(units.printable(line.get("reason") or "no reason given")),
        ]
        for run, name in zip(runs, names, strict=True)
        for line in run.rounds
        if line.get("outcome") == "abandoned"
    ]
    if not rows:
        return text + "<p>No round was abandoned.</p>"
    headings = [("Setting", ""), ("Round", "abandoned"), ("Reason", "")]
    shown = page.table(
        headings, rows, caption="Abandoned rounds", text_columns=3, tall=len(rows) > 20
    )
    return f"{text}<h3>Abandoned rounds</h3>{shown}"


def _setting_tables(runs: Sequence[RunFolder], names: Sequence[str]) -> str:
    """The settings key by key; of several, first what differs."""
    keys = list(dict.fromkeys(key for run in runs for key in run.setting))
    if not keys:
        return ""
    rows = {key: [_value(run.setting.get(key)) for run in runs] for key in keys}
    differing = [key for key in keys if len(set(rows[key])) > 1]
    common = [key for key in keys if key not in differing]

    def shown(chosen: Sequence[str], headings: Sequence[str], caption: str) -> str:
        cells = [[escape(key), *rows[key][: len(headings)]] for key in chosen]
        titles = [("Key", ""), *((heading, "") for heading in headings)]
        return page.table(titles, cells, caption=caption, text_columns=1 + len(headings))

    if len(runs) == 1:
        return shown(keys, ["Value"], "Setting")
    text = shown(differing, names, "What differs") if differing else ""
    if common:
        same = shown(common, ["All settings"], "What is the same")
        text += f"<details><summary>The same in all</summary>{same}</details>"
    return text


def _value(value: object) -> str:
    """A value of a setting as escaped text; an empty one is shown as such."""
    if value is None or value == "":
        return units.MISSING
    return escape(units.printable(str(value).lower() if isinstance(value, bool) else value))


def _notes(runs: Sequence[RunFolder], names: Sequence[str]) -> str:
    """What was missing or unreadable in the run folders."""
    lines = [f"{name}: {note}" for run, name in zip(runs, names, strict=True) for note in run.notes]
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f"<ul>{items}</ul>" if items else ""
