"""The HTML of a report: one file, no scripts, nothing fetched.

Every function takes text and returns HTML; `text` is the only door by which
text of a run enters the page, and it escapes. Arguments named `html` are HTML
already.
"""

import html as html_lib
from collections.abc import Iterable, Sequence

_STYLE = """
:root {
  color-scheme: light dark;
  --page: #fcfcfa; --card: #ffffff; --ink: #1d1d1b; --muted: #6d6d67;
  --rule: #e3e2dc; --warn: #a3431f; --warn-page: #fbf0ea;
  --s0: #3566a8; --s1: #c2572f; --s2: #2f8264;
  --s3: #8055a5; --s4: #9a7a1e; --s5: #5b6b78;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #161615; --card: #1f1f1d; --ink: #ecebe6; --muted: #a09f98;
    --rule: #34342f; --warn: #f0a583; --warn-page: #33221a;
    --s0: #7fabe3; --s1: #ec8f68; --s2: #6cc3a1;
    --s3: #bd99de; --s4: #d6b75c; --s5: #a9b7c2;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 70rem;
  background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue",
    Arial, sans-serif;
}
h1 { margin: 0; font-size: 2rem; line-height: 1.2; letter-spacing: -0.015em; }
h2 { margin: 3rem 0 0.75rem; font-size: 1.25rem; line-height: 1.3; }
h3 { margin: 1.75rem 0 0.5rem; font-size: 0.95rem; font-weight: 600; }
p { margin: 0.5rem 0; max-width: 42rem; }
.kicker, .note { color: var(--muted); font-size: 0.85rem; }
.kicker { margin: 0 0 0.25rem; }
code, pre { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas,
  "DejaVu Sans Mono", monospace; font-size: 0.8rem; }
.facts { display: grid; grid-template-columns: max-content 1fr;
  gap: 0.2rem 1.25rem; margin: 1.5rem 0 0; font-size: 0.9rem; }
.facts dt { color: var(--muted); }
.facts dd { margin: 0; overflow-wrap: anywhere; }
.tiles { display: flex; flex-wrap: wrap; gap: 1.25rem 2.75rem;
  margin: 1.75rem 0 0; }
.tile b { display: block; font-size: 1.75rem; font-weight: 600;
  line-height: 1.15; letter-spacing: -0.01em;
  font-variant-numeric: tabular-nums; }
.tile span { color: var(--muted); font-size: 0.85rem; }
.warning { margin: 1.5rem 0 0; padding: 0.6rem 0.9rem; border-radius: 6px;
  max-width: none; background: var(--warn-page); color: var(--warn);
  font-size: 0.9rem; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; min-width: 100%; font-size: 0.92rem; }
th, td { padding: 0.5rem 0 0.5rem 1.5rem; text-align: right;
  vertical-align: baseline; border-bottom: 1px solid var(--rule); }
th:first-child { padding-left: 0; text-align: left; font-weight: 400; }
td { white-space: nowrap; font-variant-numeric: tabular-nums; }
th { white-space: nowrap; }
thead th { font-weight: 600; vertical-align: bottom; }
thead th, tbody td b { font-weight: 600; }
th small { display: block; max-width: 24rem; color: var(--muted);
  font-size: 0.8rem; font-weight: 400; line-height: 1.35;
  white-space: normal; }
.legend { display: flex; flex-wrap: wrap; gap: 0.25rem 1.25rem; margin: 0;
  font-size: 0.85rem; }
.swatch { display: inline-block; width: 0.7em; height: 0.7em;
  margin-right: 0.4em; border-radius: 2px; }
.panels { display: grid; gap: 1.5rem 1.75rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 18rem), 1fr)); }
.panel { margin: 0; min-width: 0; }
.panel figcaption { display: flex; justify-content: space-between; gap: 1rem;
  font-size: 0.85rem; }
.panel figcaption b { font-weight: 600; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
.panel figcaption span { overflow-wrap: anywhere; }
.panel svg { display: block; width: 100%; height: auto; }
.cards { display: grid; gap: 1.5rem 2rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 27rem), 1fr)); }
.card { margin: 0; min-width: 0; }
.strip { display: grid; grid-auto-flow: column; gap: 0.4rem;
  grid-auto-columns: minmax(0, 1fr); }
.strip img { display: block; width: 100%; height: auto; border-radius: 3px; }
.strip div { min-width: 0; font-size: 0.75rem; line-height: 1.35; }
.strip small { color: var(--muted); font-size: inherit; white-space: nowrap; }
.card figcaption { margin-bottom: 0.35rem; font-size: 0.85rem; }
.pixelated { image-rendering: pixelated; }
details { margin: 1.25rem 0; }
summary { margin-bottom: 0.5rem; cursor: pointer; font-size: 0.95rem; }
pre { overflow-x: auto; margin: 0.75rem 0; padding: 0.9rem 1rem;
  line-height: 1.45; background: var(--card); border: 1px solid var(--rule);
  border-radius: 6px; }
@media (max-width: 32rem) {
  body { padding-top: 1.5rem; }
  h1 { font-size: 1.6rem; }
  th, td { padding-left: 1rem; }
  th small { min-width: 9rem; }
  .tile b { font-size: 1.45rem; }
  .strip { gap: 0.25rem; }
  .strip small { display: block; }
}
"""


def text(value: object) -> str:
  """Escapes `value` for element content and quoted attributes."""
  return html_lib.escape(str(value), quote=True)


def page(title: str, html: str) -> str:
  """Returns the whole document around the body `html`."""
  return (
    '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    f"<title>{text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
    f"<body>\n<main>\n{html}\n</main>\n</body>\n</html>\n"
  )


def section(name: str, title: str, html: str) -> str:
  """Returns a section with an anchor; "" if it would be empty."""
  if not html:
    return ""
  return (
    f'<section id="{text(name)}">\n<h2>{text(title)}</h2>\n{html}\n</section>'
  )


def note(value: str) -> str:
  return f'<p class="note">{text(value)}</p>'


def warning(value: str) -> str:
  return f'<p class="warning">{text(value)}</p>'


def facts(pairs: Iterable[tuple[str, str]]) -> str:
  """Returns names and values as a list; pairs without a value are left out."""
  rows = "".join(
    f"<dt>{text(name)}</dt><dd>{text(value)}</dd>"
    for name, value in pairs
    if value
  )
  return f'<dl class="facts">{rows}</dl>' if rows else ""


def tiles(pairs: Iterable[tuple[str, str]]) -> str:
  """Returns large figures with a caption each, from (figure, caption)."""
  cells = "".join(
    f'<div class="tile"><b>{text(value)}</b><span>{text(label)}</span></div>'
    for value, label in pairs
  )
  return f'<div class="tiles">{cells}</div>' if cells else ""


def table(
  head: Sequence[tuple[str, str]],
  rows: Iterable[tuple[tuple[str, str], Sequence[tuple[str, bool]]]],
) -> str:
  """Returns a table that scrolls sideways on a narrow page.

  Args:
    head: (title, small print) a column, the first over the row names.
    rows: ((name, small print), cells); a cell is (value, whether in bold).
  """

  def heading(cell: tuple[str, str], scope: str) -> str:
    small = f"<small>{text(cell[1])}</small>" if cell[1] else ""
    return f'<th scope="{scope}">{text(cell[0])}{small}</th>'

  top = "".join(heading(cell, "col") for cell in head)
  body = []
  for name, cells in rows:
    values = "".join(
      f"<td><b>{text(value)}</b></td>" if bold else f"<td>{text(value)}</td>"
      for value, bold in cells
    )
    body.append(f"<tr>{heading(name, 'row')}{values}</tr>")
  return (
    f'<div class="scroll"><table>\n<thead><tr>{top}</tr></thead>\n<tbody>\n'
    + "\n".join(body)
    + "\n</tbody></table></div>"
  )


def legend(entries: Iterable[tuple[int, str]]) -> str:
  """Returns the colours of curves, from (colour index, title)."""
  items = "".join(
    f'<span><i class="swatch" style="background:var(--s{color})"></i>'
    f"{text(title)}</span>"
    for color, title in entries
  )
  return f'<p class="legend">{items}</p>'


def panel(label: str, value: str, html: str, hint: str = "") -> str:
  """Returns a small chart with its name and a figure above it."""
  title = f' title="{text(hint)}"' if hint else ""
  return (
    f'<figure class="panel"><figcaption><span{title}>{text(label)}</span>'
    f"<b>{text(value)}</b></figcaption>{html}</figure>"
  )


def panels(items: Sequence[str]) -> str:
  return '<div class="panels">' + "\n".join(items) + "</div>" if items else ""


def strip(
  images: Iterable[tuple[str, str, str]],
  *,
  caption: str = "",
  pixelated: bool = False,
) -> str:
  """Returns images side by side.

  Args:
    images: (`data:` address, name, small print) from left to right.
    caption: above the images.
    pixelated: enlarge without smoothing.
  """
  style = ' class="pixelated"' if pixelated else ""
  cells = "".join(
    f'<div><img src="{text(source)}" alt="{text(name)}"{style}>{text(name)}'
    + (f" <small>{text(small)}</small>" if small else "")
    + "</div>"
    for source, name, small in images
  )
  above = f"<figcaption>{text(caption)}</figcaption>" if caption else ""
  return (
    f'<figure class="card">{above}<div class="strip">{cells}</div></figure>'
  )


def cards(items: Sequence[str]) -> str:
  return '<div class="cards">' + "\n".join(items) + "</div>" if items else ""


def details(title: str, html: str) -> str:
  """Returns content behind a line that opens it."""
  return f"<details><summary>{text(title)}</summary>{html}</details>"


def preformatted(value: str) -> str:
  return f"<pre>{text(value)}</pre>"
