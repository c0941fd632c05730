"""Headless Chromium over the DevTools protocol, without further packages.

The protocol's messages go through two pipes (`--remote-debugging-pipe`: JSON,
each ended by a null byte), so no port is opened.
"""

import base64
import contextlib
import json
import os
import selectors
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = (
  "chromium",
  "chromium-browser",
  "google-chrome",
  "google-chrome-stable",
)

# The browser reads commands from descriptor 3 and writes to descriptor 4; the
# pipes may have these numbers themselves, so they first move out of the way.
_LAUNCHER = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(end), fcntl.F_DUPFD, 10) for end in sys.argv[1:3]]
for end, target in zip(ends, (3, 4)):
  os.dup2(end, target)
os.execv(sys.argv[3], sys.argv[3:])
"""
_FLAGS = (
  "--headless=new",
  "--no-sandbox",  # inside containers there is none to be had
  "--disable-gpu",
  "--disable-dev-shm-usage",
  "--disable-background-networking",
  "--disable-component-update",
  "--no-first-run",
  "--remote-debugging-pipe",
)
_SECONDS = 60.0  # for one command; a cold start on a busy machine takes ten


def find() -> str | None:
  """Path of an installed Chromium or Chrome; None if there is none."""
  return next(filter(None, map(shutil.which, NAMES)), None)


@contextlib.contextmanager
def launch(program: str, folder: Path) -> Iterator["Tab"]:
  """Starts a browser with its profile in `folder` and gives an empty tab."""
  commands, replies = os.pipe(), os.pipe()
  process = subprocess.Popen(
    [
      *(sys.executable, "-c", _LAUNCHER),
      *(str(commands[0]), str(replies[1]), program),
      *_FLAGS,
      f"--user-data-dir={folder}",
      "about:blank",
    ],
    pass_fds=(commands[0], replies[1]),
    stdin=subprocess.DEVNULL,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
  )
  os.close(commands[0])
  os.close(replies[1])
  try:
    yield Tab(commands[1], replies[0])
  finally:
    os.close(commands[1])  # the browser exits when its pipe ends
    try:
      process.wait(10)
    except subprocess.TimeoutExpired:
      process.kill()
      process.wait()
    os.close(replies[0])


class Tab:
  """One tab.

  Attributes:
    requests: addresses asked for since the last `open`, `data:` ones left out.
    errors: what the console, scripts and the network complained about.
  """

  def __init__(self, commands: int, replies: int) -> None:
    self._commands, self._replies = commands, replies
    self._buffer, self._last, self._session = b"", 0, None
    self._loaded = False
    self.requests: list[str] = []
    self.errors: list[str] = []
    target = self.call("Target.createTarget", url="about:blank")["targetId"]
    attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
    self._session = attached["sessionId"]
    for domain in ("Page", "Network", "Runtime", "Log"):
      self.call(f"{domain}.enable")

  def open(
    self, address: str, width: int, height: int = 900, *, dark: bool = False
  ) -> None:
    """Shows `address` in a window of that many CSS pixels, until loaded."""
    self.call(
      "Emulation.setDeviceMetricsOverride",
      width=width,
      height=height,
      deviceScaleFactor=1,
      mobile=width < 600,
    )
    scheme = "dark" if dark else "light"
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    self.call("Emulation.setEmulatedMedia", features=features)
    self.requests, self.errors = [], []
    self._loaded = False
    self.call("Page.navigate", url=address)
    deadline = time.monotonic() + _SECONDS
    while not self._loaded:
      self._handle(self._read(deadline))

  def evaluate(self, expression: str) -> Any:
    """Value of a JavaScript expression, as JSON would carry it."""
    reply = self.call(
      "Runtime.evaluate", expression=expression, returnByValue=True
    )
    if "exceptionDetails" in reply:
      raise RuntimeError(reply["exceptionDetails"])
    return reply["result"].get("value")

  def screenshot(self, path: Path) -> None:
    """Saves the whole page, however long, as a PNG."""
    size = self.call("Page.getLayoutMetrics")["cssContentSize"]
    clip = {"x": 0, "y": 0, "scale": 1}
    clip |= {name: size[name] for name in ("width", "height")}
    reply = self.call(
      "Page.captureScreenshot", captureBeyondViewport=True, clip=clip
    )
    Path(path).write_bytes(base64.b64decode(reply["data"]))

  def call(self, method: str, **params: Any) -> dict[str, Any]:
    """Sends one command and returns its result."""
    self._last += 1
    message = {"id": self._last, "method": method, "params": params}
    if self._session:
      message["sessionId"] = self._session
    data = json.dumps(message).encode() + b"\0"
    while data:
      data = data[os.write(self._commands, data) :]
    deadline = time.monotonic() + _SECONDS
    while True:
      reply = self._read(deadline)
      if reply.get("id") == self._last:
        if "error" in reply:
          raise RuntimeError(f"{method}: {reply['error']}")
        return reply["result"]
      self._handle(reply)

  def _read(self, deadline: float) -> dict[str, Any]:
    """The next message."""
    with selectors.DefaultSelector() as selector:
      selector.register(self._replies, selectors.EVENT_READ)
      while b"\0" not in self._buffer:
        if not selector.select(max(0.0, deadline - time.monotonic())):
          raise TimeoutError("the browser has stopped answering")
        data = os.read(self._replies, 1 << 20)
        if not data:
          raise RuntimeError("the browser has ended")
        self._buffer += data
    message, self._buffer = self._buffer.split(b"\0", 1)
    return json.loads(message)

  def _handle(self, event: dict[str, Any]) -> None:
    method, params = event.get("method"), event.get("params", {})
    if method == "Page.loadEventFired":
      self._loaded = True
    elif method == "Network.requestWillBeSent":
      url = params["request"]["url"]
      if not url.startswith("data:"):
        self.requests.append(url)
    elif method == "Network.loadingFailed":
      self.errors.append(f"request failed: {params['errorText']}")
    elif method == "Runtime.exceptionThrown":
      self.errors.append(f"exception: {params['exceptionDetails']}")
    elif method == "Runtime.consoleAPICalled":
      if params["type"] in ("error", "warning", "assert"):
        self.errors.append(f"console: {params['args']}")
    elif method == "Log.entryAdded":
      if params["entry"]["level"] in ("error", "warning"):
        self.errors.append(f"log: {params['entry']['text']}")
