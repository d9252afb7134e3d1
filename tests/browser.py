"""Chromium and Firefox without a window, for tests of what a browser makes of an answer."""

import base64
import json
import os
import select
import shutil
import socket
import struct
import subprocess
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import pytest

from tests.servers import Server, free_port

CHROMIUM = next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), None)
FIREFOX = next(filter(None, map(shutil.which, ["firefox-esr", "firefox"])), None)
BROWSERS = [
    pytest.param(
        "chromium",
        marks=pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed: apt install chromium"),
    ),
    pytest.param(
        "firefox",
        marks=pytest.mark.skipif(FIREFOX is None, reason="firefox is not installed: apt install firefox-esr"),
    ),
]
"""The names of the browsers, as parameters of tests."""

_PATIENCE = 60.0  # seconds; only a browser that hangs takes as long
_SIZE = 500  # pixels of a picture's side: Python decodes more of them slowly
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--force-device-scale-factor=1",
    "--window-size=900,1100",
]


def browse(url: str, profile: Path, *flags: str) -> str:
    assert CHROMIUM is not None
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", *flags, url]
    run = subprocess.run(command, capture_output=True, text=True, timeout=90)
    assert run.returncode == 0, run.stderr
    return run.stdout + run.stderr


@dataclass(frozen=True, slots=True)
class Picture:
    """What a browser shows: `colours` has the RGB bytes of each pixel, line by line."""

    width: int
    height: int
    colours: bytes

    def colour(self, x: int, y: int) -> tuple[int, int, int]:
        start = 3 * (y * self.width + x)
        return self.colours[start], self.colours[start + 1], self.colours[start + 2]

    def share(self, colour: tuple[int, int, int]) -> float:
        """Return which part of all pixels has exactly this colour."""
        wanted = bytes(colour)
        pixels = range(0, len(self.colours), 3)
        return sum(self.colours[start : start + 3] == wanted for start in pixels) / len(pixels)


class Browser(Protocol):
    """A running browser with one page."""

    def open(self, url: str) -> None:
        """Go to a URL."""

    def picture(self) -> Picture:
        """Return what is shown now. Raises `RefusedError` while there is nothing to show."""

    def download(self, url: str, directory: Path) -> None:
        """Begin to download a URL into a directory: the only download of this browser."""

    def button(self) -> str:
        """Return what the button beside the download says: "pause", "resume" or "" for none."""

    def press(self) -> None:
        """Press this button."""


class RefusedError(Exception):
    """The browser answers a command by an error."""


class Chromium:
    """Chromium, which takes commands of its DevTools protocol through a pipe."""

    def __init__(self, reader: int, writer: int) -> None:
        self._reader, self._writer = reader, writer
        self._number, self._unread = 0, b""
        self._page = self._new_page()
        self._downloads = ""  # the page that lists them

    def open(self, url: str) -> None:
        """Go to a URL. A page that hangs, as one with the viewer of PDF now and then does, is replaced once."""
        try:
            self._call("Page.navigate", self._page, patience=_PATIENCE / 3, url=url)
        except TimeoutError:
            self._page = self._new_page()
            self._call("Page.navigate", self._page, url=url)

    def visit(self, url: str) -> None:
        """Go to a URL, and return when the page has loaded."""
        self.follow(f"location.href = {json.dumps(url)}")

    def follow(self, script: str) -> None:
        """Run a script that leads to another page, and return when that has loaded."""
        self._call("Page.enable", self._page)
        self._call("Runtime.evaluate", self._page, expression=script, userGesture=True)
        while self._read().get("method") != "Page.loadEventFired":
            pass

    def look(self, width: int, *, is_dark: bool = False, medium: str = "screen", height: int = 900) -> None:
        """Show the page in a window of this size, in a light or a dark theme, on the screen or in print."""
        self._call(
            "Emulation.setDeviceMetricsOverride",
            self._page,
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        theme = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
        self._call("Emulation.setEmulatedMedia", self._page, media=medium, features=[theme])

    def evaluate(self, script: str) -> Any:
        """Return the value of an expression in the page, or what its promise resolves to."""
        answer = self._call("Runtime.evaluate", self._page, expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def key(self, name: str, *, shift: bool = False) -> None:
        """Press and release a key: "Tab", " ", "ArrowUp" or "ArrowDown"."""
        code = {"Tab": 9, " ": 32, "ArrowUp": 38, "ArrowDown": 40}[name]
        key: dict[str, Any] = {
            "key": name,
            "modifiers": 8 * shift,
            "windowsVirtualKeyCode": code,
            "text": name if name == " " else "",
        }
        for kind in ("keyDown", "keyUp"):
            self._call("Input.dispatchKeyEvent", self._page, type=kind, **key)

    def screenshot(self, *, is_whole: bool = False) -> bytes:
        """Return a PNG of what is shown, or of the whole page."""
        answer = self._call("Page.captureScreenshot", self._page, captureBeyondViewport=is_whole)
        return base64.b64decode(answer["data"])

    def picture(self) -> Picture:
        """Return what is shown now. Raises `RefusedError` while there is nothing to show."""
        clip = {"x": 0, "y": 0, "width": _SIZE, "height": _SIZE, "scale": 1}
        return decoded(base64.b64decode(self._call("Page.captureScreenshot", self._page, clip=clip)["data"]))

    def download(self, url: str, directory: Path) -> None:
        """Begin to download a URL into a directory: the only download of this browser."""
        self._call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(directory))
        self._downloads = self._new_page()  # not before it is needed: it hides the other page
        self._call("Page.navigate", self._downloads, url="chrome://downloads/")
        self.open(url)

    def button(self) -> str:
        """Return what the button beside the download says: "pause", "resume" or "" for none."""
        return self._with_button("button && !button.hidden ? button.textContent.trim().toLowerCase() : ''")

    def press(self) -> None:
        """Press this button."""
        self._with_button("button?.click()")

    def _with_button(self, script: str) -> str:
        item = "document.querySelector('downloads-manager')?.shadowRoot.querySelector('downloads-item')"
        script = f"{{ const button = {item}?.shadowRoot.getElementById('pause-or-resume'); {script} }}"
        answer = self._call("Runtime.evaluate", self._downloads, expression=script)
        return str(answer["result"].get("value", ""))

    def _new_page(self) -> str:
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        return str(self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"])

    def _call(
        self, method: str, session: str | None = None, *, patience: float = _PATIENCE, **parameters: Any
    ) -> dict[str, Any]:
        self._number += 1
        command: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if session is not None:
            command["sessionId"] = session
        os.write(self._writer, json.dumps(command).encode() + b"\0")
        while (answer := self._read(patience)).get("id") != self._number:
            pass  # an event
        if "error" in answer:
            raise RefusedError(answer["error"]["message"])
        result: dict[str, Any] = answer["result"]
        return result

    def _read(self, patience: float = _PATIENCE) -> dict[str, Any]:
        while b"\0" not in self._unread:
            if not select.select([self._reader], [], [], patience)[0]:
                raise TimeoutError("Chromium does not answer")
            block = os.read(self._reader, 1 << 20)
            assert block, "Chromium has ended"
            self._unread += block
        message, self._unread = self._unread.split(b"\0", 1)
        answer: dict[str, Any] = json.loads(message)
        return answer


class Firefox:
    """Firefox, which takes commands of its Marionette protocol on a port."""

    def __init__(self, connection: socket.socket, answers: BinaryIO) -> None:
        self._connection, self._answers = connection, answers
        self._number = 0
        self._read()  # the greeting
        self._call("WebDriver:NewSession", capabilities={"alwaysMatch": {"pageLoadStrategy": "none"}})
        self._call("WebDriver:SetWindowRect", width=_SIZE, height=_SIZE + 100)

    def open(self, url: str) -> None:
        """Go to a URL."""
        self._call("WebDriver:Navigate", url=url)

    def picture(self) -> Picture:
        """Return what is shown now. Raises `RefusedError` while there is nothing to show."""
        return decoded(base64.b64decode(self._call("WebDriver:TakeScreenshot", full=False)["value"]))

    def download(self, url: str, directory: Path) -> None:
        """Begin to download a URL into a directory: the only download of this browser."""
        self._inside(f"""Services.prefs.setIntPref("browser.download.folderList", 2);
            Services.prefs.setStringPref("browser.download.dir", {json.dumps(str(directory))});""")
        # not `open`, which waits for a page
        self._call("WebDriver:ExecuteScript", script="location.href = arguments[0]", args=[url])

    def button(self) -> str:
        """Return what the button beside the download says: "pause", "resume" or "" for none."""
        return self._with_download("download && !download.succeeded ? (download.stopped ? 'resume' : 'pause') : ''")

    def press(self) -> None:
        """Press this button: its panel has no window here, so this calls what the button calls."""
        self._with_download("void (download.stopped ? download.start() : download.cancel())")

    def _with_download(self, script: str) -> str:
        return self._inside(f"""const {{Downloads}} = ChromeUtils.importESModule(
            "resource://gre/modules/Downloads.sys.mjs");
            const [download] = await (await Downloads.getList(Downloads.ALL)).getAll();
            return {script};""")

    def _inside(self, script: str) -> str:
        """Run a script with the rights of the browser, and return its result."""
        self._call("Marionette:SetContext", value="chrome")
        try:
            answer = self._call("WebDriver:ExecuteScript", script=f"return (async () => {{ {script} }})()", args=[])
            return str(answer["value"] or "")
        finally:
            self._call("Marionette:SetContext", value="content")

    def _call(self, command: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = json.dumps([0, self._number, command, parameters]).encode()
        self._connection.sendall(b"%d:%b" % (len(message), message))
        _, number, error, result = self._read()
        assert number == self._number
        if error:
            raise RefusedError(error["message"])
        answer: dict[str, Any] = result
        return answer

    def _read(self) -> Any:
        length = b""
        while (digit := self._answers.read(1)) != b":":
            assert digit, "Firefox has ended"
            length += digit
        return json.loads(self._answers.read(int(length)))


@contextmanager
def running(name: str, directory: Path) -> Iterator[Browser]:
    """Run a browser of `BROWSERS` with a new profile in a directory."""
    profile, log = directory / "profile", directory / "log"
    profile.mkdir()
    with _chromium(profile, log) if name == "chromium" else _firefox(profile, log) as browser:
        yield browser


@contextmanager
def running_chromium(directory: Path) -> Iterator[Chromium]:
    """Run Chromium with a new profile in a directory."""
    profile = directory / "profile"
    profile.mkdir(parents=True)
    with _chromium(profile, directory / "log") as browser:
        yield browser


@contextmanager
def _chromium(profile: Path, log: Path) -> Iterator[Chromium]:
    assert CHROMIUM is not None
    commands, writer = os.pipe()
    reader, answers = os.pipe()
    flags = [*FLAGS, "--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"]
    moved = ["bash", "-c", f'exec "$@" 3<&{commands} 4>&{answers}', "bash"]  # the descriptors that Chromium expects
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*moved, CHROMIUM, *flags], pass_fds=(commands, answers), stdout=output, stderr=output
        )
    os.close(commands)
    os.close(answers)
    try:
        yield Chromium(reader, writer)
    finally:
        os.close(writer)  # at the end of its commands Chromium ends
        os.close(reader)
        _end(process)


@contextmanager
def _firefox(profile: Path, log: Path) -> Iterator[Browser]:
    assert FIREFOX is not None
    port = free_port()
    preferences = {
        "marionette.port": port,
        "browser.shell.checkDefaultBrowser": False,
        "datareporting.policy.dataSubmissionEnabled": False,
        "app.normandy.enabled": False,
    }
    lines = (f"user_pref({json.dumps(name)}, {json.dumps(value)});\n" for name, value in preferences.items())
    (profile / "user.js").write_text("".join(lines))
    flags = ["--headless", "--no-remote", "--marionette", "--remote-allow-system-access", "--profile", str(profile)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [FIREFOX, *flags], stdout=output, stderr=output, env={**os.environ, "HOME": str(profile)}
        )
    try:
        Server(process, port, log).wait_until_it_answers()
        connection = socket.create_connection(("127.0.0.1", port), timeout=_PATIENCE)
        with connection, connection.makefile("rb") as answers:
            yield Firefox(connection, answers)
    finally:
        process.terminate()
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(_PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise


def pixels(file: Path) -> tuple[int, int, bytes]:
    """Return the width, the height and the RGB bytes of a PNG file of 8 bits per channel, as browsers write them."""
    picture = decoded(file.read_bytes())
    return picture.width, picture.height, picture.colours


def decoded(data: bytes) -> Picture:
    """Return the pixels of a PNG of 8 bits per channel, as browsers write them."""
    width, height, depth, kind = struct.unpack(">IIBB", data[16:26])
    assert depth == 8
    channels = {2: 3, 6: 4}[kind]
    packed, position = b"", 8
    while position < len(data):
        length, name = struct.unpack(">I4s", data[position : position + 8])
        if name == b"IDAT":
            packed += data[position + 8 : position + 8 + length]
        position += 12 + length
    rows = zlib.decompress(packed)
    stride = width * channels
    above = bytes(stride)
    result = bytearray()
    for y in range(height):
        filter_type, line = rows[y * (stride + 1)], bytearray(rows[y * (stride + 1) + 1 : (y + 1) * (stride + 1)])
        for x in range(stride if filter_type else 0):
            left = line[x - channels] if x >= channels else 0
            up = above[x]
            corner = above[x - channels] if x >= channels else 0
            line[x] = (line[x] + _predicted(filter_type, left, up, corner)) & 0xFF
        above = bytes(line)
        for x in range(width):
            result += line[x * channels : x * channels + 3]
    return Picture(width, height, bytes(result))


def _predicted(filter_type: int, left: int, up: int, corner: int) -> int:
    if filter_type == 1:
        return left
    if filter_type == 2:
        return up
    if filter_type == 3:
        return (left + up) // 2
    _, best = min((abs(left + up - corner - value), order) for order, value in enumerate((left, up, corner)))
    return (left, up, corner)[best]
