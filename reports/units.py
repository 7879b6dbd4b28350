"""Numbers in words: human units, names of metrics, and how far a value is from the baseline.

The display, the printed table and the report share these, so that a figure reads the same
everywhere. Values come from files: anything that is not a finite number reads as missing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

MISSING = "–"

# Keys of a summary, by preference, and the metric's short name.
METRICS = {"nme_percent": "NME", "pckh_percent": "PCKh", "pck_percent": "PCK"}


def number(value: object) -> float | None:
    """`value` as a finite float, else None (strings and booleans are no numbers)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        result = float(value)
    except OverflowError:
        return None
    return result if math.isfinite(result) else None


def whole(value: object) -> int:
    """`value` as a count, 0 where it is none."""
    result = number(value)
    return int(result) if result is not None and result > 0 else 0


def printable(value: object, limit: int = 200) -> str:
    """Text of `value` on one line, without control characters, at most `limit` characters long.

    Names come from files; an escape sequence in one must not reach a terminal.
    """
    text = "".join(c if c.isprintable() else "�" for c in str(value))
    return text if len(text) <= limit else text[: limit - 1] + "…"


def metric_label(metric_name: object) -> str:
    """Short name of a metric: "NME" for `nme_percent`."""
    name = str(metric_name)
    return METRICS.get(name, printable(name.removesuffix("_percent"), 20))


def lower_is_better(metric_name: object) -> bool:
    """True for errors (NME), False for shares of correct points (PCK, PCKh)."""
    return not str(metric_name).startswith("pck")


def metric_of(summary: Mapping[str, Any]) -> tuple[str, float | None]:
    """Name of a summary's metric, and its final value in percent."""
    name = summary.get("metric_name")
    if not isinstance(name, str):
        name = next((key for key in METRICS if key in summary), "nme_percent")
    return name, number(summary.get(name))


def improvement(metric_name: object, value: float | None, baseline: float | None) -> float | None:
    """How much better `value` is than `baseline`, both in percent; negative if worse.

    For an error: the share of it that is gone, in percent. For a share of correct points, where a
    ratio to a baseline near 0 says nothing: the difference in points.
    """
    if value is None or baseline is None:
        return None
    if not lower_is_better(metric_name):
        return value - baseline
    return 100 * (baseline - value) / baseline if baseline > 0 else None


def improvement_text(metric_name: object, value: float | None, baseline: float | None) -> str:
    """`improvement` with its unit and sign: "64.2 %", "+31.0 points"."""
    gain = improvement(metric_name, value, baseline)
    if gain is None:
        return MISSING
    return f"{gain:.1f} %" if lower_is_better(metric_name) else f"{gain:+.1f} points"


def percent(value: object, digits: int = 2) -> str:
    """ "6.41 %" for 6.41 (values are in percent already)."""
    value = number(value)
    return MISSING if value is None else f"{value:.{digits}f} %"


def size(value: object) -> str:
    """Bytes in three significant digits: "512 B", "33.1 kB", "4.24 MB" (kB = 1000 bytes)."""
    amount = number(value)
    if amount is None:
        return MISSING
    for unit in ("B", "kB", "MB", "GB"):
        if abs(amount) < 999.5:
            return f"{_three_digits(amount) if unit != 'B' else f'{amount:.0f}'} {unit}"
        amount /= 1000
    return f"{_three_digits(amount)} TB"


def seconds(value: object) -> str:
    """A duration: "0.31 s", "12.4 s", "3 min 05 s", "2 h 07 min"."""
    amount = number(value)
    if amount is None:
        return MISSING
    if abs(amount) < 1:
        return f"{amount:.2f} s"
    if abs(amount) < 59.95:
        return f"{amount:.1f} s"
    minutes, rest = divmod(round(amount), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def clock(value: float) -> str:
    """A running time in whole seconds: "0:04", "12:30", "1:02:07"."""
    minutes, rest = divmod(round(max(value, 0.0)), 60)
    if minutes < 60:
        return f"{minutes}:{rest:02d}"
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def counted(count: int, noun: str) -> str:
    """ "1 round", "2 rounds"."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def ratio(value: float | None) -> str:
    """ "14.2×", in three digits."""
    return MISSING if value is None else f"{_three_digits(value)}×"


def plain(value: object, digits: int = 2) -> str:
    """A number with `digits` decimals, else the sign for missing."""
    value = number(value)
    return MISSING if value is None else f"{value:.{digits}f}"


def _three_digits(amount: float) -> str:
    if abs(amount) < 9.995:
        return f"{amount:.2f}"
    return f"{amount:.1f}" if abs(amount) < 99.95 else f"{amount:.0f}"


def client_figures(values: Mapping[str, Any], prefix: str = "client") -> str:
    """The clients' own evaluation in words, or their test; nothing where there was none."""
    mean = number(values.get(f"{prefix}_mean_percent"))
    if mean is None:
        return ""
    worst, tenth, spread = (
        percent(number(values.get(f"{prefix}_{name}_percent")))
        for name in ("worst", "tenth", "spread")
    )
    return f"{percent(mean)} (worst {worst}, worst tenth {tenth}, spread {spread})"


def privacy_figures(values: Mapping[str, Any]) -> str:
    """What a run with privacy has spent so far, in words; nothing where it has none."""
    if values.get("delta") is None or "epsilon" not in values:
        return ""
    models, server = (
        "∞" if (value := number(values.get(key))) is None else _three_digits(value)
        for key in ("epsilon", "epsilon_server")
    )
    return f"ε {models} (to the server {server}) at δ {values['delta']:g}"


def attackers(summary: Mapping[str, Any]) -> str:
    """How many clients of a simulation attacked, by kind; nothing where none did."""
    kinds = summary.get("attackers")
    if not isinstance(kinds, Mapping) or not kinds:
        return ""
    return ", ".join(f"{whole(n)} {printable(kind, 20)}" for kind, n in kinds.items())
