"""The HTML of a report: one file, no scripts, nothing fetched.

Every function takes text and returns HTML; `text` is the only door by which
text of a run enters the page, and it escapes. Arguments named `html` are HTML
already.
"""

import html as html_lib
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from psvae_jax.report.style import STYLE

_FEW_COLUMNS = 4  # of a table that a phone can show as it is


def text(value: object) -> str:
  """Escapes `value` for element content and quoted attributes.

  Bytes of a file name that are not UTF-8 (surrogates in Python), which no page
  could hold, are written out: "\\udce9".
  """
  words = str(value).encode("utf-8", "backslashreplace").decode()
  return html_lib.escape(words, quote=True)


def page(title: str, html: str) -> str:
  """Returns the whole document around the body `html`."""
  return (
    '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    f"<title>{text(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
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
  return f'<p class="note">{text(value)}</p>' if value else ""


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


def contents(html: str) -> str:
  """Returns links to the sections of `html`; "" if there are fewer than two."""
  found = re.findall(r'<section id="([^"]*)">\n<h2>(.*?)</h2>', html)
  links = "\n".join(f'<a href="#{name}">{title}</a>' for name, title in found)
  return f"<nav>{links}</nav>" if len(found) > 1 else ""


def tiles(items: Iterable[tuple[str, str, str]]) -> str:
  """Returns large figures, from (figure, caption, small print)."""

  def tile(value: str, label: str, small: str) -> str:
    below = f"<small>{text(small)}</small>" if small else ""
    return (
      f'<div class="tile"><b>{text(value)}</b><span>{text(label)}</span>'
      f"{below}</div>"
    )

  cells = "".join(tile(*item) for item in items)
  return f'<div class="tiles">{cells}</div>' if cells else ""


def table(
  head: Sequence[tuple[str, str]],
  rows: Iterable[tuple[tuple[str, str], Sequence[tuple[str, bool]]]],
  *,
  wrap: bool = False,
) -> str:
  """Returns a table that scrolls sideways on a narrow page.

  Args:
    head: (title, small print) a column, the first over the row names.
    rows: ((name, small print), cells); a cell is (value, whether in bold).
    wrap: let long cells go over several lines.
  """
  style = ' class="wrap"' if wrap else ""
  # Beside many columns a narrow page has no room for the rows' names.
  stack = ""
  if len(head) > _FEW_COLUMNS and not wrap:
    stack = f' class="stack" style="--columns: {len(head) - 1}"'

  def heading(cell: tuple[str, str], scope: str) -> str:
    small = f"<small>{text(cell[1])}</small>" if cell[1] else ""
    return f'<th scope="{scope}">{text(cell[0])}{small}</th>'

  top = "".join(heading(cell, "col") for cell in head)
  body = []
  for name, cells in rows:
    values = "".join(
      f"<td{style}><b>{text(value)}</b></td>"
      if bold
      else f"<td{style}>{text(value)}</td>"
      for value, bold in cells
    )
    body.append(f"<tr>{heading(name, 'row')}{values}</tr>")
  return (
    f'<div class="scroll"><table{stack}>\n<thead><tr>{top}</tr></thead>\n'
    "<tbody>\n" + "\n".join(body) + "\n</tbody></table></div>"
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


def panels(items: Sequence[str], *, four: bool = False) -> str:
  """Returns charts in rows; `four` makes them smaller, up to four a row."""
  style = "panels four" if four else "panels"
  return f'<div class="{style}">' + "\n".join(items) + "</div>" if items else ""


class Column(NamedTuple):
  """Images above each other, and what they are.

  Attributes:
    images: (`data:` address, alternative text) from the top.
    name: below the images.
    small: small print after the name.
    words: a text in place of a further image.
    bad: whether the images are marked as wrong; `small` must say so too.
  """

  images: Sequence[tuple[str, str]]
  name: str
  small: str = ""
  words: str = ""
  bad: bool = False


def strip(
  columns: Iterable[Column], *, caption: str = "", pixelated: bool = False
) -> str:
  """Returns columns of images side by side.

  Args:
    columns: from left to right.
    caption: above the images.
    pixelated: enlarge without smoothing.
  """

  def cell(column: Column) -> str:
    style = _classes(pixelated, column.bad)
    images = "".join(
      f'<img src="{text(source)}" alt="{text(words)}"{style}>'
      for source, words in column.images
    )
    small = f"<small{_classes(False, column.bad)}>{text(column.small)}</small>"
    below = small if column.small else ""
    words = f"<p>{text(column.words)}</p>" if column.words else ""
    return f"<div>{images}{text(column.name)}{below}{words}</div>"

  cells = "".join(map(cell, columns))
  above = f"<figcaption>{text(caption)}</figcaption>" if caption else ""
  return (
    f'<figure class="card">{above}<div class="strip">{cells}</div></figure>'
  )


def _classes(pixelated: bool, bad: bool) -> str:
  """The attribute that gives an image its looks."""
  kinds = ["pixelated"] * pixelated + ["bad"] * bad
  return f' class="{" ".join(kinds)}"' if kinds else ""


def sign(mark: bool | None) -> str:
  """What marks a picture as right or wrong in little room."""
  return {True: "✓", False: "✗", None: ""}[mark]


def shot(
  address: str,
  alt: str,
  caption: str,
  mark: bool | None = None,
  *,
  pixelated: bool = False,
) -> str:
  """Returns one picture of a gallery.

  Args:
    address: `data:` address.
    alt: alternative text.
    caption: below it.
    mark: whether it is right; None says nothing.
    pixelated: enlarge without smoothing.
  """
  style = _classes(pixelated, mark is False)
  words = {True: "✓ ", False: "✗ wrong · ", None: ""}[mark]
  kind = _classes(False, mark is False)
  above = f"<b{kind}>{text(words)}</b>" if words else ""
  return (
    f'<figure class="shot"><img src="{text(address)}" alt="{text(alt)}"{style}>'
    f"<figcaption>{above}{text(caption)}</figcaption></figure>"
  )


def gallery(items: Sequence[str]) -> str:
  """Returns `shot`s in rows."""
  return '<div class="gallery">' + "\n".join(items) + "</div>" if items else ""


def picture_table(
  caption: str,
  corner: str,
  head: Sequence[str],
  rows: Iterable[tuple[str, Sequence[tuple[str, str, bool | None]]]],
  *,
  pixelated: bool = False,
) -> str:
  """Returns a table of pictures under a caption.

  Args:
    caption: above it.
    corner: what rows and columns are.
    head: a column each.
    rows: (name, cells); a cell is (`data:` address, alternative text,
      whether it is right).
    pixelated: enlarge without smoothing.
  """

  def cell(address: str, alt: str, mark: bool | None) -> str:
    kind, style = (_classes(p, mark is False) for p in (False, pixelated))
    small = f"<small{kind}>{sign(mark)}</small>" if sign(mark) else ""
    image = f'<img src="{text(address)}" alt="{text(alt)}"{style}>'
    return f"<td>{image}{small}</td>"

  top = "".join(f'<th scope="col">{text(name)}</th>' for name in head)
  body = "\n".join(
    f'<tr><th scope="row">{text(name)}</th>'
    + "".join(cell(*item) for item in cells)
    + "</tr>"
    for name, cells in rows
  )
  return (
    f'<figure class="card"><figcaption>{text(caption)}</figcaption>'
    f'<div class="scroll"><table class="grid"><thead><tr>'
    f"<td>{text(corner)}</td>{top}</tr></thead>\n<tbody>{body}</tbody>"
    "</table></div></figure>"
  )


def cards(items: Sequence[str], *, wide: bool = False) -> str:
  """Returns strips in rows; `wide` leaves each more room."""
  style = "cards wide" if wide else "cards"
  return f'<div class="{style}">' + "\n".join(items) + "</div>" if items else ""


def details(title: str, html: str) -> str:
  """Returns content behind a line that opens it."""
  return f"<details><summary>{text(title)}</summary>{html}</details>"


def preformatted(value: str) -> str:
  """Returns a box that scrolls sideways; "" without content."""
  return f"<pre>{text(value)}</pre>" if value else ""
