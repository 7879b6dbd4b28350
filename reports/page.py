"""Parts of an HTML page that opens from disk: skeleton, style, tables. No script, no network."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

_STYLE = """
:root{color-scheme:light dark;--bg:#f6f7f8;--card:#fff;--ink:#1a1f26;--muted:#59636e;--line:#e2e5e9;
--accent:#0067a6;--bad:#b3261e;
--series-0:#0072b2;--series-1:#c84e00;--series-2:#00805c;--series-3:#a8487f;--series-4:#8a6100;
--series-5:#3d8fc7}
@media (prefers-color-scheme:dark){:root{--bg:#101316;--card:#181c20;--ink:#e7eaee;--muted:#9aa5b1;
--line:#2c3238;--accent:#6bbcf0;--bad:#ff8a80;
--series-0:#56b4e9;--series-1:#ff9457;--series-2:#3ecf9f;--series-3:#e79ac6;--series-4:#e9b949;
--series-5:#a5d5f5}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:74rem;margin:0 auto;padding:1.5rem 1rem 4rem}
header h1{font-size:1.75rem;line-height:1.2;margin:.5rem 0 .25rem;overflow-wrap:anywhere}
header p{margin:.25rem 0;color:var(--muted);max-width:60rem}
h2{font-size:1.2rem;margin:2.5rem 0 .75rem}
h3{font-size:1rem;margin:1.5rem 0 .5rem}
a{color:var(--accent)}
.card{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:1rem}
.tiles{display:grid;gap:.75rem;margin:1.25rem 0 0;
grid-template-columns:repeat(auto-fill,minmax(min(46%,12.5rem),1fr))}
.tile{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:.75rem .9rem}
.tile dt{font-size:.82rem;color:var(--muted)}
.tile dd{margin:0;font-size:1.45rem;font-weight:650;font-variant-numeric:tabular-nums;
line-height:1.3;overflow-wrap:anywhere}
.tile dd small{display:block;font-size:.8rem;font-weight:400;color:var(--muted)}
.stack{display:grid;gap:1rem;align-content:start}
.charts{display:grid;gap:1rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,27rem),1fr))}
svg.chart text{paint-order:stroke;stroke:var(--card);stroke-width:3px}
figure{margin:0}
figure.plot{background:var(--card);border:1px solid var(--line);border-radius:10px;
padding:.9rem .9rem .5rem}
figure.plot>figcaption{font-weight:600;margin-bottom:.5rem}
figure.plot>figcaption small{display:block;font-weight:400;color:var(--muted)}
svg.chart{display:block;width:100%;max-width:42rem;margin:0 auto;
height:auto;stroke-linejoin:round;overflow:visible}
.scroll{overflow-x:auto;background:var(--card);border:1px solid var(--line);border-radius:10px}
.tall{max-height:32rem;overflow-y:auto}
table{border-collapse:collapse;width:100%;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:.5rem .75rem;text-align:left;border-bottom:1px solid var(--line);vertical-align:top}
tr:last-child>*{border-bottom:0}
thead th{font-weight:600;vertical-align:bottom;background:var(--card);position:sticky;top:0}
thead small{display:block;font-weight:400;color:var(--muted)}
tbody th{font-weight:600}
tbody th small{display:block;font-weight:400;color:var(--muted)}
.number{text-align:right;white-space:nowrap}
thead .number{white-space:normal}
.keep{white-space:nowrap}
.bad{color:var(--bad);font-weight:600}
.wrap{overflow-wrap:break-word;min-width:6rem;max-width:32rem}
.pictures{display:grid;gap:.75rem;grid-template-columns:repeat(auto-fill,minmax(min(46%,12rem),1fr))}
table.side{width:auto;min-width:100%}
table.side td,table.side th{border:0;padding:.4rem;text-align:center;min-width:6.25rem}
table.side thead th{overflow-wrap:anywhere}
.picture svg{display:block;width:100%;max-width:20rem;margin:0 auto;height:auto;border-radius:8px}
.picture figcaption{text-align:center;font-size:.85rem;color:var(--muted);margin-top:.25rem;
font-variant-numeric:tabular-nums}
.picture path{fill:none;stroke-linecap:round;stroke-linejoin:round}
path.halo{stroke:#000a}path.outline{stroke:#ff8a1f99}path.stick{stroke:#fff}
path.true{stroke:#38d6ff}path.predicted{stroke:#ff7a00}
.legend{display:flex;flex-wrap:wrap;gap:.3rem .5rem;align-items:center;font-size:.88rem;
color:var(--muted);margin:.25rem 0 .75rem}
.key{display:inline-block;width:.85rem;height:.85rem;border-radius:3px;margin-left:.6rem}
.key:first-child{margin-left:0}
.dot{border-radius:50%;border:1px solid #0008}.dot.true{background:#38d6ff}
.dot.predicted{background:#ff7a00}
.rule{height:.25rem;border:1px solid #0008;background:#fff}
.s0{background:var(--series-0)}.s1{background:var(--series-1)}.s2{background:var(--series-2)}
details{margin-top:1rem}summary{cursor:pointer;font-weight:600;padding:.25rem 0}
.facts{display:grid;grid-template-columns:max-content 1fr;gap:.4rem 1.25rem;margin:0;
font-size:.92rem}
.facts dt{font-weight:600}.facts dd{margin:0;color:var(--muted)}
@media (max-width:40rem){.facts{grid-template-columns:1fr;gap:.1rem}.facts dd{margin-bottom:.6rem}
table{font-size:.8rem}th,td{padding:.4rem .4rem}.wrap{min-width:5.5rem}.tile dd{font-size:1.2rem}
svg.chart text{font-size:10.5px!important}}
@media print{body{background:#fff}.tall{max-height:none}}
"""

# Nothing may be loaded from anywhere, and no script runs, whatever a file's text may hold.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def page(title: str, body: Iterable[str]) -> str:
    """A whole page; `title` is text, the parts of `body` are HTML."""
    return (
        '<!doctype html>\n<html lang="en-GB"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body><main>\n{chr(10).join(body)}\n</main></body></html>\n"
    )


def tiles(items: Sequence[tuple[str, str, str]]) -> str:
    """Headline figures: (label, value, note), all text."""
    cells = "".join(
        f'<div class="tile"><dt>{escape(label)}</dt><dd>{escape(value)}'
        f"<small>{escape(note)}</small></dd></div>"
        for label, value, note in items
    )
    return f'<dl class="tiles">{cells}</dl>'


def table(
    headings: Sequence[tuple[str, str]],
    rows: Sequence[Sequence[str]],
    *,
    caption: str,
    text_columns: int = 1,
    tall: bool = False,
    html_headings: bool = False,
) -> str:
    """A table in a box that scrolls sideways on a narrow screen.

    Args:
        headings: (title, note) of each column, text.
        rows: Cells, HTML; the first of a row is its heading.
        caption: Name of the table, for people who cannot see it.
        text_columns: How many of the first columns are text; the others are numbers.
        tall: Scroll within a fixed height.
        html_headings: The titles of the headings are HTML already.
    """

    def kind(column: int) -> str:
        return ' class="wrap"' if column < text_columns else ' class="number"'

    head = "".join(
        f'<th scope="col"{kind(i)}>{title if html_headings else escape(title)}'
        f"<small>{escape(note)}</small></th>"
        for i, (title, note) in enumerate(headings)
    )
    body = "".join(
        "<tr>"
        + "".join(
            f'<th scope="row"{kind(i)}>{cell}</th>' if i == 0 else f"<td{kind(i)}>{cell}</td>"
            for i, cell in enumerate(row)
        )
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll{" tall" if tall else ""}" role="region" tabindex="0" '
        f'aria-label="{escape(caption)}"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def plot(title: str, note: str, content: str) -> str:
    """A chart in a card: title and note are text, the content is HTML."""
    small = f"<small>{escape(note)}</small>" if note else ""
    return f'<figure class="plot"><figcaption>{escape(title)}{small}</figcaption>{content}</figure>'


def facts(items: Sequence[tuple[str, str]]) -> str:
    """Terms and what they mean, both text."""
    cells = "".join(f"<dt>{escape(term)}</dt><dd>{escape(text)}</dd>" for term, text in items)
    return f'<dl class="facts card">{cells}</dl>'
