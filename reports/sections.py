"""Sections that the reports of one run and of several share, as HTML."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from reports import comparison, page, pictures, units
from reports.run_folder import Examples, RunFolder

_MAX_CLIENT_ROWS = 500
_MAX_LEFT_OUT = 100


def own_pictures(examples: Examples | None, max_pictures: int) -> str:
    """The first pictures of a run with their landmarks."""
    if examples is None or not max_pictures:
        return ""
    shown = "".join(
        pictures.picture(examples, i, alt=f"Test picture {i + 1}")
        for i in range(min(len(examples), max_pictures))
    )
    return f'{pictures.LEGEND}<div class="pictures">{shown}</div>' if shown else ""


def side_by_side(runs: Sequence[RunFolder], names: Sequence[str], max_pictures: int) -> str:
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


def client_table(run: RunFolder) -> str:
    """What each client held, sent and took; means over its replies."""
    if not run.clients:
        return ""
    headings = [
        ("Client", ""),
        ("Device", ""),
        ("Examples", ""),
        ("Accepted", "replies"),
        ("Rejected", "replies"),
        ("Unavailable", "rounds"),
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
        parts, count = client.device_parts(), max(client.replies, 1)
        num_rejected = client.replies - client.accepted
        rows.append(
            [
                escape(client.client),
                f'<span class="keep">{escape(client.device)}</span>',
                f"{client.num_examples:,}",
                f"{client.accepted:,}",
                f'<span class="bad">{num_rejected:,}</span>' if num_rejected else "0",
                f"{client.unavailable:,}",
                units.size(client.bytes_up / count),
                units.size(client.bytes_down / count),
                units.seconds(client.compute_seconds / count),
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


def fleet_table(run: RunFolder) -> str:
    """Which devices trained how, where they did not all train alike."""
    rows = run.summary.get("fleet")
    rows = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    if not any(run.setting.get(key) for key in ("federation.ladder", "update.bits-by-device")):
        return ""
    cells = [
        [
            f'<span class="keep">{escape(units.printable(row.get("device"), 30))}</span>',
            escape(units.printable(row.get("changes") or "the setting itself")),
            units.printable(units.whole(row.get("rung"))),
            f"{units.whole(row.get('clients')):,}",
            units.size(row.get("needed_bytes")),
            units.plain(row.get("update_bits")),
        ]
        for row in rows[:_MAX_LEFT_OUT]
    ]
    headings = [
        ("Device", ""),
        ("Trains with", ""),
        ("Rung", "of the ladder"),
        ("Clients", ""),
        ("Memory", "measured"),
        ("Update bits", "told"),
    ]
    text = page.table(headings, cells, caption="Devices", text_columns=2) if cells else ""
    return f"<h3>Devices</h3>{text}" if text else ""


def clients_of(run: RunFolder, name: str) -> str:
    """The clients of one of several runs, folded away under its name."""
    content = fleet_table(run) + client_table(run)
    if not content:
        return ""
    return f"<details><summary>{escape(name)}</summary>{content}</details>"


def left_out(runs: Sequence[RunFolder], names: Sequence[str]) -> str:
    """The nodes that took no part in a run, each with its reason."""
    lines = []
    for run, name in zip(runs, names, strict=True):
        found = run.summary.get("left_out")
        reasons = found if isinstance(found, list) else []
        title = f"{name}: " if len(runs) > 1 else ""
        lines += [f"{title}{units.printable(reason)}" for reason in reasons[:_MAX_LEFT_OUT]]
        if len(reasons) > _MAX_LEFT_OUT:
            lines.append(f"{title}{len(reasons) - _MAX_LEFT_OUT:,} more in summary.json")
    if not lines:
        return ""
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f"<h3>Nodes left out of the run</h3><ul>{items}</ul>"


def replies(runs: Sequence[RunFolder], names: Sequence[str]) -> str:
    """Reasons of rejections by setting, and the abandoned rounds."""
    titles = names if len(runs) > 1 else ["Number"]
    counts = [comparison.rejected(run.summary) for run in runs]
    reasons = list(dict.fromkeys(reason for count in counts for reason in count))
    if reasons:
        headings = [("Reason of rejection", ""), *((name, "replies") for name in titles)]
        rows = [
            [escape(units.printable(reason)), *(f"{count.get(reason, 0):,}" for count in counts)]
            for reason in reasons
        ]
        text = page.table(headings, rows, caption="Reasons of rejections")
    else:
        text = "<p>No reply was rejected.</p>"
    for run, name in zip(runs, names, strict=True):
        replaced = run.summary.get("workers_replaced")
        for reason, count in replaced.items() if isinstance(replaced, dict) else ():
            what = f"{name}: {count} workers replaced ({units.printable(reason)})"
            text += f"<p>{escape(what)}.</p>"
        guarded = sum(line.get("reproducible") is False for line in run.rounds)
        if guarded:
            what = "the wall-clock guard or a fault of a machine"
            if run.is_buffered:
                what += ", or the measured time of training,"
            text += (
                f"<p>{escape(name)}: {units.counted(guarded, 'round')} not reproducible ({what} "
                "decided whose update counted).</p>"
            )
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


def setting_tables(runs: Sequence[RunFolder], names: Sequence[str]) -> str:
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


def notes(runs: Sequence[RunFolder], names: Sequence[str]) -> str:
    """What was missing or unreadable in the run folders."""
    lines = [f"{name}: {note}" for run, name in zip(runs, names, strict=True) for note in run.notes]
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f"<ul>{items}</ul>" if items else ""
