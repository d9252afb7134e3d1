"""Chromium without a window, for tests of what a browser makes of an answer."""

import shutil
import struct
import subprocess
import zlib
from pathlib import Path

CHROMIUM = next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), None)
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


def pixels(file: Path) -> tuple[int, int, bytes]:
    """Return the width, the height and the RGB bytes of a PNG of 8 bits per channel, as Chromium writes them."""
    data = file.read_bytes()
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
    return width, height, bytes(result)


def _predicted(filter_type: int, left: int, up: int, corner: int) -> int:
    if filter_type == 1:
        return left
    if filter_type == 2:
        return up
    if filter_type == 3:
        return (left + up) // 2
    _, best = min((abs(left + up - corner - value), order) for order, value in enumerate((left, up, corner)))
    return (left, up, corner)[best]
