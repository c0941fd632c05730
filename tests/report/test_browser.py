"""The report as a browser shows it: from disk, wide and narrow."""

import browser
import numpy as np
import PIL.Image
import pytest
from generator_workdirs import add_generator
from workdirs import make_adversarial_run

from psvae_jax.report import write_report

# A picture in a folded part counts as well: the part is opened first.
_UNFOLD = "for (const d of document.querySelectorAll('details')) d.open = true"
_PICTURES = """[...document.images].map(image => ({
  alt: image.alt, width: image.naturalWidth, height: image.naturalHeight,
  shown: image.getBoundingClientRect().width}))"""
_DRAWINGS = """[...document.querySelectorAll('svg')].map(
  svg => svg.getBoundingClientRect().width)"""
# What reaches beyond the window, other than inside a box that scrolls.
_OUTSIDE = """[...document.body.querySelectorAll('*')].filter(element =>
  element.getBoundingClientRect().right >
    document.documentElement.clientWidth + 0.5 &&
  !element.closest('.scroll, .strip, pre, svg')).map(e => e.outerHTML)"""
_OVERLAPS = """[...document.querySelectorAll('.panel figcaption')].filter(
  caption => {
    const [label, value] = [...caption.children].map(
      child => child.getBoundingClientRect());
    return label.right > value.left + 0.5;
  }).map(caption => caption.textContent)"""
_COVERED_TICKS = """[...document.querySelectorAll('svg')].filter(svg => {
  const boxes = [...svg.querySelectorAll('text')].map(
    text => text.getBoundingClientRect());
  return boxes.some((a, i) => boxes.slice(i + 1).some(b =>
    a.left < b.right && b.left < a.right &&
    a.top < b.bottom && b.top < a.bottom));
}).map(svg => svg.textContent)"""


@pytest.fixture(scope="module")
def report(tmp_path_factory):
  folder = tmp_path_factory.mktemp("browser")
  return write_report(make_adversarial_run(folder / "run"))


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
  program = browser.find()
  if program is None:
    pytest.skip(f"none of {', '.join(browser.NAMES)} is installed")
  with browser.launch(program, tmp_path_factory.mktemp("profile")) as tab:
    yield tab


def open_page(tab, path, width, **settings):
  tab.open(path.as_uri(), width, **settings)
  tab.evaluate(_UNFOLD)


@pytest.fixture(scope="module")
def generator_report(tmp_path_factory):
  folder = tmp_path_factory.mktemp("generator")
  add_generator(make_adversarial_run(folder / "run"))
  return write_report(folder / "run")


@pytest.mark.parametrize("width", [1280, 390, 320])
@pytest.mark.parametrize("name", ["report", "generator_report"])
def test_everything_shows_and_nothing_overflows(tab, request, name, width):
  report = request.getfixturevalue(name)
  open_page(tab, report, width)
  assert tab.evaluate("innerWidth") == width
  pictures = tab.evaluate(_PICTURES)
  assert len(pictures) > 50
  assert [p["alt"] for p in pictures if not p["width"] or not p["height"]] == []
  assert [p["alt"] for p in pictures if p["shown"] < 20] == []
  drawings = tab.evaluate(_DRAWINGS)
  assert drawings and min(drawings) > 120
  assert tab.evaluate("document.documentElement.scrollWidth") <= width
  assert tab.evaluate(_OUTSIDE) == []
  assert tab.evaluate(_OVERLAPS) == []
  assert tab.evaluate(_COVERED_TICKS) == []
  assert tab.errors == []
  assert tab.requests == [report.as_uri()]


def test_tables_of_two_stages_fit_a_phone(tab, report):
  open_page(tab, report, 390)
  hidden = tab.evaluate(
    "[...document.querySelectorAll('#results .scroll, #latents .scroll')]"
    ".filter(box => box.scrollWidth > box.clientWidth)"
    ".map(box => box.textContent)"
  )
  assert hidden == []


def test_tables_of_a_generator_fit_a_phone(tab, generator_report):
  open_page(tab, generator_report, 390)
  assert tab.evaluate("document.querySelectorAll('.stack').length") > 2
  boxes = tab.evaluate(
    "[...document.querySelectorAll('#results .scroll, #generated .scroll')]"
    ".map(box => box.scrollWidth - box.clientWidth)"
  )
  assert boxes and max(boxes) <= 0
  # A row's name stands over its figures, and every title over its own.
  assert tab.evaluate(
    "[...document.querySelectorAll('.stack tbody tr')].every(row =>"
    " row.querySelector('th').getBoundingClientRect().bottom <="
    " row.querySelector('td').getBoundingClientRect().bottom)"
  )
  misplaced = tab.evaluate(
    "[...document.querySelectorAll('.stack')].flatMap(table =>"
    " [...table.querySelectorAll('tbody tr')].flatMap(row =>"
    " [...row.querySelectorAll('td')].filter((cell, i) => Math.abs("
    " cell.getBoundingClientRect().right - table.querySelectorAll("
    " 'thead th')[i + 1].getBoundingClientRect().right) > 1)"
    " .map(cell => row.textContent)))"
  )
  assert misplaced == []


def test_it_follows_the_dark_mode(tab, tmp_path):
  report, lightness = write_report(tmp_path), {}
  for dark in (False, True):
    tab.open(report.as_uri(), 1280, dark=dark)
    tab.screenshot(tmp_path / "page.png")
    with PIL.Image.open(tmp_path / "page.png") as image:
      lightness[dark] = np.median(np.asarray(image.convert("L")))
  assert lightness[False] > 200 and lightness[True] < 60


def test_the_measurements_see_a_bad_page(tab, tmp_path):
  path = tmp_path / "bad.html"
  path.write_text(
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
    '<img src="data:image/png;base64,AAAA" alt="broken">'
    '<img src="missing.png" alt="missing"><script>absent()</script>'
    '<div style="width: 500px">wide</div>',
    encoding="utf-8",
  )
  tab.open(path.as_uri(), 390)
  assert [p["width"] for p in tab.evaluate(_PICTURES)] == [0, 0]
  assert tab.evaluate("document.documentElement.scrollWidth") > 390
  assert len(tab.evaluate(_OUTSIDE)) == 1
  assert any("absent" in error for error in tab.errors)
  assert any("request failed" in error for error in tab.errors)
