"""Progress of one stage: a bar on a terminal, plain lines in a log.

    with Progress("svae", 400, images_per_step=64, start=120) as progress:
      for step in range(120, 400):
        ...
        progress.advance(step + 1)
        progress.show({"train/loss": 0.412})
        with progress.paused("evaluating"):
          evaluate()

The rate counts active time only: pauses are left out, and so is everything
before the first `advance`, which is where compilation happens. Nothing here
touches a device; figures are Python floats that the caller already has.
"""

import collections
import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any

# The rate is that of the last updates, so that it follows a change of pace.
_WINDOW_SECONDS = 60.0
_WINDOW_UPDATES = 512


class Progress:
  """Shows how far a stage is, how fast it goes and when it will be done."""

  def __init__(
    self,
    name: str,
    total: int,
    images_per_step: int = 0,
    start: int = 0,
    *,
    every_seconds: float = 10.0,
    enabled: bool = True,
    stream: IO[str] | None = None,
    clock: Callable[[], float] = time.monotonic,
  ):
    """Prepares the display; `with` starts it.

    Args:
      name: the stage.
      total: last step of the stage.
      images_per_step: global batch size; 0 leaves images/s out.
      start: step the run continues from.
      every_seconds: least time between two plain lines.
      enabled: False on every process but the first: nothing is shown.
      stream: where to write; standard output by default. A bar is drawn if it
        is a terminal.
      clock: seconds, for tests.
    """
    self.name = name
    self.total = total
    self.step = start
    self.loss: float | None = None
    self._images_per_step = images_per_step
    self._every_seconds = every_seconds
    self._enabled = enabled
    self._stream = stream if stream is not None else sys.stdout
    self._clock = clock
    self._paused_seconds = 0.0
    self._paused_since: float | None = None
    self._marks: collections.deque[tuple[float, int]] = collections.deque(
      maxlen=_WINDOW_UPDATES
    )
    self._last_line_time = -math.inf
    self._last_line_step: int | None = None
    self._bar: Any = None
    self._task: Any = None

  def advance(self, step: int) -> None:
    """Records that `step` is done.

    Call it as often as wished: lines and redraws limit themselves.
    """
    now = self._active_time()
    self.step = step
    self._marks.append((now, step))
    while len(self._marks) > 2 and now - self._marks[1][0] > _WINDOW_SECONDS:
      self._marks.popleft()
    if not self._enabled:
      return
    if self._bar is not None:
      self._bar.update(self._task, completed=step, details=self._details())
    elif self._clock() - self._last_line_time >= self._every_seconds:
      self._print_line()

  def show(self, metrics: Mapping[str, float]) -> None:
    """Takes over the loss, "train/loss" of `metrics`, if it is there."""
    self.loss = metrics.get("train/loss", self.loss)

  @contextlib.contextmanager
  def paused(self, label: str = "") -> Iterator[None]:
    """Keeps the time inside the block out of the rate.

    Args:
      label: what is going on, e.g. "evaluating"; shown in the bar.
    """
    if self._paused_since is not None:  # inside another pause: that one counts
      yield
      return
    self._paused_since = self._clock()
    if self._bar is not None and label:
      self._bar.update(self._task, details=label)
    try:
      yield
    finally:
      self._paused_seconds += self._clock() - self._paused_since
      self._paused_since = None
      if self._bar is not None:
        self._bar.update(self._task, details=self._details())

  @property
  def steps_per_second(self) -> float:
    """Recent steps per second of active time; NaN before two steps."""
    if len(self._marks) < 2:
      return math.nan
    first_time, first_step = self._marks[0]
    last_time, last_step = self._marks[-1]
    if last_time <= first_time or last_step <= first_step:
      return math.nan
    return (last_step - first_step) / (last_time - first_time)

  @property
  def images_per_second(self) -> float:
    """Recent images per second over all devices; NaN if not known."""
    return self.steps_per_second * (self._images_per_step or math.nan)

  @property
  def eta_seconds(self) -> float:
    """Active seconds left at the recent rate; NaN if not known."""
    return max(self.total - self.step, 0) / self.steps_per_second

  def line(self) -> str:
    """The plain line of the present state."""
    return f"{self.name} {self.step}/{self.total}  {self._details()}".rstrip()

  def __enter__(self) -> "Progress":
    if self._enabled and self._stream.isatty():
      self._start_bar()
    return self

  def __exit__(self, *exc_info) -> None:
    if self._bar is not None:
      self._bar.stop()
      self._bar = None
    elif self._enabled and self._marks and self._last_line_step != self.step:
      self._print_line()

  def _active_time(self) -> float:
    now = self._clock() if self._paused_since is None else self._paused_since
    return now - self._paused_seconds

  def _details(self) -> str:
    """Rate, loss and time left, as far as they are known."""
    parts = []
    if not math.isnan(self.steps_per_second):
      parts.append(f"{_short(self.steps_per_second)} it/s")
    if not math.isnan(self.images_per_second):
      parts.append(f"{_short(self.images_per_second)} images/s")
    if self.loss is not None:
      parts.append(f"loss {self.loss:.4g}")
    if not math.isnan(self.eta_seconds) and self.step < self.total:
      parts.append(f"eta {format_seconds(self.eta_seconds)}")
    return "  ".join(parts)

  def _print_line(self) -> None:
    print(self.line(), file=self._stream, flush=True)
    self._last_line_time = self._clock()
    self._last_line_step = self.step

  def _start_bar(self) -> None:
    import rich.console  # late: only a terminal needs it
    import rich.progress

    self._bar = rich.progress.Progress(
      rich.progress.TextColumn("{task.description}", style="bold"),
      rich.progress.BarColumn(bar_width=24),
      rich.progress.MofNCompleteColumn(),
      rich.progress.TextColumn("{task.fields[details]}", markup=False),
      console=rich.console.Console(file=self._stream),
      refresh_per_second=4,
    )
    self._task = self._bar.add_task(
      self.name, total=self.total, completed=self.step, details="compiling"
    )
    self._bar.start()


def format_seconds(seconds: float) -> str:
  """Returns a short duration: "0.4s", "42s", "1m30s", "2h05m", "3d04h"."""
  if not math.isfinite(seconds):
    return "?"
  if seconds < 9.95:
    return f"{seconds:.1f}s"
  whole = round(seconds)
  minutes, hours, days = whole // 60, whole // 3600, whole // 86400
  if minutes < 1:
    return f"{whole}s"
  if hours < 1:
    return f"{minutes}m{whole % 60:02d}s"
  if days < 1:
    return f"{hours}h{minutes % 60:02d}m"
  return f"{days}d{hours % 24:02d}h"


def _short(rate: float) -> str:
  """Three significant digits, without an exponent for ordinary rates."""
  return f"{rate:.0f}" if rate >= 100 else f"{rate:.3g}"
