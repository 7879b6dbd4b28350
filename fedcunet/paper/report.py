"""Our figures beside the paper's: as JSON, as text columns, as Markdown."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, stdev
from typing import Any

from fedcunet.metrics import balance_index
from fedcunet.paper.budget import Budget, Plan, row_config
from fedcunet.paper.measures import counts_of
from fedcunet.paper.ranks import agreement, ranks
from fedcunet.paper.running import RowResult
from fedcunet.paper.tables import Row, Table
from fedcunet.sweep import PAPER_FIGURE_5, DepthLine

METRICS = {
    "nme": "NME %",
    "pckh": "PCKh@0.5 %",
    "pck": "PCK@0.2 %",
}
LANDMARKS = {"nme": 68, "pckh": 16, "pck": 14}  # of the paper's data sets
WORDS = {"easy": "easy NME %", "hard": "hard NME %", "memory_ratio": "training memory"}
WORDS |= {"size_ratio": "model size", "balance_index": "balance index"}


@dataclass(frozen=True, kw_only=True, slots=True)
class RowReport:
    """What was measured for one row."""

    plan: Plan
    results: tuple[RowResult, ...]  # one a seed
    memory: dict[str, Any] | None  # as `compare_with_naive` gives it


@dataclass(frozen=True, kw_only=True, slots=True)
class TextTable:
    """Columns of text."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def full_size_parameters(table: Table, row: Row) -> int:
    """Convolution parameters of the row's network as large as the paper's."""
    model = row_config(row, row.unets, Budget()).model
    return counts_of(model, LANDMARKS[table.metric])[0]


def paper_name(row: Row) -> str:
    """The row's name with the paper's n and K."""
    return row.name.format(n=row.unets, k=row.unets - 1 if row.order is None else row.order)


def make_report(
    table: Table,
    budget: Budget,
    rows: Sequence[RowReport],
    *,
    left_out: Sequence[str],
    images: tuple[int, int],
    mean_shape_percent: float,
) -> dict[str, Any]:
    """What table.json holds: every row's figures, the paper's, and how their orders agree."""
    metric = rows[0].results[0].metric.removesuffix("_percent")
    ours = {row.plan.row.key: fmean(result.percent for result in row.results) for row in rows}
    papers = {row.plan.row.key: row.plan.row.percent for row in rows}
    compared = any(value is not None for value in papers.values())
    ranked = {
        key: None if compared and papers[key] is None else value for key, value in ours.items()
    }
    own_ranks = ranks(ranked, lower_is_better=metric == "nme")
    paper_ranks = ranks(papers, lower_is_better=table.metric == "nme")
    reference = table.reference if table.reference in ours else next(iter(ours))
    entries = []
    for row in rows:
        key = row.plan.row.key
        entry = _entry(table, row)
        entry |= {"ratio": _ratio(ours[key], ours[reference]), "rank": own_ranks[key]}
        entry["paper"] |= {
            "ratio": _ratio(papers[key], papers[reference]),
            "rank": paper_ranks[key],
        }
        entries.append(entry)
    found = agreement(ours, papers, ours_lower=metric == "nme", papers_lower=table.metric == "nme")
    return {
        "table": table.key,
        "source": table.source,
        "question": table.question,
        "metric": metric,
        "paper_metric": table.metric,
        "paper_data": f"{table.data}, 256x256, the paper's full training",
        "budget": asdict(budget) | {"train_images": images[0], "test_images": images[1]},
        "mean_shape_percent": mean_shape_percent,
        "reference": reference,
        "rows": entries,
        "left_out": list(left_out),
        "agreement": asdict(found),
        "train_seconds": sum(r.train_seconds for row in rows for r in row.results),
    }


def _entry(table: Table, row: RowReport) -> dict[str, Any]:
    first, config = row.results[0], row.plan.config
    percents = [result.percent for result in row.results]
    paper = row.plan.row
    entry: dict[str, Any] = {
        "key": paper.key,
        "name": row.plan.name,
        "unets": config.model.unets,
        "order": config.model.order if config.model.kind == "dunet" else None,
        "bits": config.quant.bits,
        "alpha": config.quant.alpha,
        "storage": config.quant.storage,
        "learning_rate": config.training.learning_rate,
        "percent": fmean(percents),
        "percent_by_seed": percents,
        "percent_stdev": stdev(percents) if len(percents) > 1 else None,
        "easy": _mean([result.easy for result in row.results]),
        "hard": _mean([result.hard for result in row.results]),
        "conv_parameters": first.conv_parameters,
        "bytes_float32": first.bytes_float32,
        "bytes_packed": first.bytes_packed,
        "train_seconds": sum(result.train_seconds for result in row.results),
        "train_images_per_second": fmean(r.train_images_per_second for r in row.results),
        "test_seconds_per_image": first.test_seconds_per_image,
        "validation_curve": first.validation_curve,
        "train_curve": first.train_curve,
        "full_size_conv_parameters": full_size_parameters(table, paper),
        "paper": {
            "name": paper_name(paper),
            "percent": paper.percent,
            "parameters_millions": paper.parameters_millions,
            **paper.further,
            "train_curve": dict(paper.train_curve),
            "validation_curve": dict(paper.validation_curve),
        },
    }
    if row.memory is not None:
        # The state in float32 is the original; float rows are not packed below it (Table 5).
        low_bit = config.quant.spec().weight_bits < 32
        entry["size_ratio"] = first.bytes_packed / first.bytes_float32 if low_bit else 1.0
        entry["memory_ratio"] = row.memory["peak_ratio"]
        entry["memory"] = row.memory
        entry["balance_index"] = balance_index(
            entry["percent"], entry["memory_ratio"], entry["size_ratio"]
        )
    return entry


def _ratio(value: float | None, reference: float | None) -> float | None:
    return None if value is None or not reference else value / reference


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def number(value: float | None, digits: int = 2) -> str:
    """The value as text, a dash for None."""
    return "-" if value is None else f"{value:.{digits}f}"


def text_tables(report: dict[str, Any]) -> list[TextTable]:
    """The report's columns, as text of at most 80 characters a line."""
    rows, own, paper = report["rows"], METRICS[report["metric"]], METRICS[report["paper_metric"]]
    main = TextTable(
        title=f"{report['source']}: {report['question']}",
        columns=(
            "network", f"ours\n{own.replace(' ', chr(10))}", "ours\n/ref", "ours\nrank",
            f"paper\n{paper.replace(' ', chr(10))}", "paper\n/ref", "paper\nrank",
            "M par.\nhere", "M par.\nfull n", "M par.\npaper",
        ),
        rows=tuple(
            (
                row["name"], _percent(row), number(row["ratio"]), str(row["rank"] or "-"),
                number(row["paper"]["percent"]), number(row["paper"]["ratio"]),
                str(row["paper"]["rank"] or "-"), number(row["conv_parameters"] / 1e6),
                number(row["full_size_conv_parameters"] / 1e6),
                number(row["paper"]["parameters_millions"], 1),
            )
            for row in rows
        ),
    )  # fmt: skip
    names = [name for name in WORDS if any(_both(row, name) for row in rows)]
    tables = [main]
    for few in (names[:2], names[2:]):
        if few:
            tables.append(_further(few, rows))
    if any(row["train_curve"] for row in rows):
        tables.append(_curves(rows))
    tables.append(_costs(rows))
    return tables


def _percent(row: dict[str, Any]) -> str:
    spread = row["percent_stdev"]
    return number(row["percent"]) + ("" if spread is None else f" ±{spread:.2f}")


def _both(row: dict[str, Any], name: str) -> bool:
    return row.get(name) is not None and name in row["paper"]


def _further(names: Sequence[str], rows: Sequence[dict[str, Any]]) -> TextTable:
    columns = [f"{who}\n{WORDS[name]}" for name in names for who in ("ours", "paper")]
    lines = []
    for row in rows:
        pairs = [(row.get(name), row["paper"].get(name)) for name in names]
        lines.append((row["name"], *(number(value, 3) for pair in pairs for value in pair)))
    return TextTable(title="", columns=("network", *columns), rows=tuple(lines))


def _curves(rows: Sequence[dict[str, Any]]) -> TextTable:
    lines = []
    for row in rows:
        for part in ("train", "validation"):
            epochs = list(row["train_curve"])
            ours = [row[f"{part}_curve"].get(epoch) for epoch in epochs]
            curve = row["paper"][f"{part}_curve"]
            lines.append(
                (
                    row["name"],
                    part,
                    ", ".join(f"{e}: {number(v)}" for e, v in zip(epochs, ours, strict=True)),
                    ", ".join(f"{epoch}: {value}" for epoch, value in curve.items()),
                )
            )
    return TextTable(
        title="percent by epoch", columns=("network", "images", "ours", "paper"), rows=tuple(lines)
    )


def _costs(rows: Sequence[dict[str, Any]]) -> TextTable:
    return TextTable(
        title="measured in these trainings",
        columns=("network", "first\nrate", "train\nseconds", "train\nimages/s", "test\nms/image",
                 "float32\nkB", "packed\nkB"),
        rows=tuple(
            (
                row["name"], f"{row['learning_rate']:.2g}", number(row["train_seconds"], 0),
                number(row["train_images_per_second"], 1),
                number(1000 * row["test_seconds_per_image"], 1),
                number(row["bytes_float32"] / 1e3, 0), number(row["bytes_packed"] / 1e3, 0),
            )
            for row in rows
        ),
    )  # fmt: skip


def remarks(report: dict[str, Any]) -> list[str]:
    """Lines under the table: the budget, what ratios and ranks are, which pairs agree."""
    budget, found = report["budget"], report["agreement"]
    names = {row["key"]: row["name"] for row in report["rows"]}
    own, paper = METRICS[report["metric"]], METRICS[report["paper_metric"]]
    lines = [
        f"ours: {budget['data']}, {budget['train_images']} training and "
        f"{budget['test_images']} test images, {budget['epochs']} epochs, {budget['size']}x"
        f"{budget['size']}, batch {budget['batch_size']}, {budget['optimizer']}, "
        f"{budget['schedule']}, seed {', '.join(map(str, budget['seeds']))}, "
        f"{report['train_seconds']:.0f} s of training, {budget['threads']} thread; "
        f"last checkpoint, {own}; mean training shape {report['mean_shape_percent']:.2f}",
        f"paper: {report['paper_data']}, {paper}",
        f"/ref: over {names[report['reference']]}; rank 1 is the best"
        + ("" if own == paper else f" (lower NME, higher PCK: {own} and {paper} differ in kind)"),
    ]
    if found["pairs"]:
        tau = found["kendall_tau"]
        line = f"order: {found['agree']} of {found['pairs']} pairs as in the paper"
        line += f", {found['tied']} tied" if found["tied"] else ""
        line += "" if tau is None else f"; Kendall tau {tau:.2f}"
        pairs = [f"{names[a]} before {names[b]}" for a, b in found["differ"]]
        lines.append(line + (f"; in the paper but not here: {'; '.join(pairs)}" if pairs else ""))
    else:
        lines.append("order: the paper prints no figures to compare with")
    if report["left_out"]:
        lines.append(f"left out by --max-unets: {', '.join(report['left_out'])}")
    return lines


def markdown(report: dict[str, Any]) -> str:
    """The same as a page in Markdown."""
    parts = [f"# {report['source']}", "", report["question"], ""]
    for table in text_tables(report):
        parts += markdown_lines(table)
    return "\n".join([*parts, *(f"- {line}" for line in remarks(report))]) + "\n"


def markdown_lines(table: TextTable) -> list[str]:
    """The table in Markdown, and an empty line."""
    heads = [column.replace("\n", " ") for column in table.columns]
    cells = [f"| {' | '.join(row)} |" for row in table.rows]
    return [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads), *cells, ""]


def sizes_table(rows: Sequence[dict[str, Any]]) -> TextTable:
    """Table 6 as text."""
    lines = []
    for row in rows:
        convolutions, state, packed = (
            row.get(name) for name in ("conv_parameters", "bytes_float32", "bytes_packed")
        )
        train, test = (row.get(f"{part}_seconds_per_image") for part in ("train", "test"))
        paper = row["paper"]
        lines.append(
            (
                row["name"],
                number(convolutions and convolutions / 1e6),
                number(paper["parameters_millions"], 1),
                number(state and state / 2**20),
                number(packed and packed / 2**20),
                number(paper["MB"], 1),
                number(train),
                number(test),
            )
        )
    columns = (
        *("network", "M par.\nours", "M par.\npaper", "float32\nMiB", "packed\nMiB"),
        *("paper\nMB", "train\ns/image", "test\ns/image"),
    )
    return TextTable(title="Table 6, section 4.5", columns=columns, rows=tuple(lines))


def depths_table(lines: Sequence[DepthLine], depths: Sequence[int]) -> TextTable:
    """Figure 5 as text; ~ is not measured."""
    rows = []
    for line in lines:
        peaks = [number(line.measured[n] / 1e6, 0) if n in line.measured else "–" for n in depths]
        fits = f"{'~' if line.deepest_is == 'extrapolated' else ''}{line.deepest}"
        each = number(line.bytes_per_unet / 1e6, 1)
        rows.append((line.name, *peaks, each, fits, number(PAPER_FIGURE_5.get(line.name), 0)))
    counts = [f"n={count}\nMB" for count in depths]
    columns = ("form", *counts, "MB a\nU-Net", "in\nnaive 9", "paper:\nin 12 GB")
    return TextTable(title="Figure 5, section 4.3", columns=columns, rows=tuple(rows))
