"""The HTML of a report: the page around its sections, and the few elements that they are made of."""

import html
import re
import string
from collections.abc import Iterable
from pathlib import Path
from typing import Any

PAGE = string.Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light">
<title>$title</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 68rem; margin: 2rem auto;
  padding: 0 1rem }
h1 { font-size: 1.6rem; margin-bottom: 0 } h2 { font-size: 1.2rem; margin-top: 2.5rem; border-top: 1px solid #ddd;
  padding-top: 1rem }
.sub, figcaption, .note { color: #555 }
dl.facts { display: flex; flex-wrap: wrap; gap: .5rem 2.5rem } dl.facts dt { color: #555; font-size: .85rem }
dl.facts dd { margin: 0; font-size: 1.5rem }
.wide { overflow: auto; max-width: 100% } .tall { max-height: 50rem }
.pair { display: flex; flex-wrap: wrap; gap: 1rem }
figure { margin: 1rem 0; max-width: 100% } svg { display: block; max-width: none; height: auto }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: .2rem .7rem .2rem 0; border-bottom: 1px solid #eee; vertical-align: top }
th { color: #555; font-weight: 600 } td.number, th.number { text-align: right }
td { max-width: 28rem; overflow-wrap: break-word } #receipt td:nth-child(-n+5) { white-space: nowrap }
tr.differs { background: #fff6df } summary { cursor: pointer; color: #555 }
@media print { .tall { max-height: none } }
</style>
</head>
<body>
<h1>$heading</h1>
<p class="sub">$subtitle</p>
$body
</body>
</html>
""")


def write(file: Path, title: str, subtitle: str, sections: list[str]) -> Path:
    """Write the page, and return its path. Titles are any text, sections are HTML."""
    heading = html.escape(title)
    page = PAGE.substitute(
        title=f"{heading}: {html.escape(subtitle)}",
        heading=heading,
        subtitle=html.escape(subtitle),
        body="\n".join(sections),
    )
    file.write_text(page, encoding="utf-8", errors="replace")
    return file


def facts(named: dict[str, str]) -> str:
    """What the reader wants to know first: name -> figure, any text."""
    items = (f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>" for name, value in named.items())
    return f'<dl class="facts">{"".join(items)}</dl>'


def section(name: str, title: str, parts: Iterable[str]) -> str:
    """A titled part of the page, to which `#name` leads; its parts are HTML."""
    content = "\n".join(parts)
    return f'<section id="{name}">\n<h2>{html.escape(title)}</h2>\n{content}\n</section>'


def figure(svg: str, caption: str) -> str:
    """An SVG with a caption, any text."""
    return f'<figure><div class="wide">{svg}</div><figcaption>{html.escape(caption)}</figcaption></figure>'


def pair(figures: list[str]) -> str:
    """Figures side by side where there is room, else one below the other."""
    return f'<div class="pair">{"".join(figures)}</div>'


def note(text: str) -> str:
    """A remark: any text."""
    return f'<p class="note">{html.escape(text)}</p>'


def details(title: str, content: str) -> str:
    """HTML that is folded away below its title, any text."""
    return f"<details><summary>{html.escape(title)}</summary>{content}</details>"


def table(header: list[str], rows: list[list[Any]], marked: list[bool] | None = None) -> str:
    """Cells are any text; integers get commas, a column of numbers stands to the right, `marked` rows stand out."""
    columns = list(zip(*rows, strict=True)) or [()] * len(header)
    align = [' class="number"' if rows and all(map(_is_number, column)) else "" for column in columns]
    head = "".join(f"<th{side}>{html.escape(name)}</th>" for name, side in zip(header, align, strict=True))
    classes = [' class="differs"' if mark else "" for mark in marked or [False] * len(rows)]
    lines = []
    for mark, row in zip(classes, rows, strict=True):
        texts = (f"{value:,}" if isinstance(value, int) else str(value) for value in row)
        cells = (f"<td{side}>{html.escape(text)}</td>" for text, side in zip(texts, align, strict=True))
        lines.append(f"<tr{mark}>{''.join(cells)}</tr>")
    return f'<div class="wide tall"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _is_number(value: Any) -> bool:
    return isinstance(value, int) or re.fullmatch(r"-|\d+(\.\d+)?", str(value)) is not None
