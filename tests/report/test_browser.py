"""The page in a real browser: headless Chromium, without a network.

Install it with `apt-get install chromium`; without it these tests are skipped.
"""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import zlib

import pytest

from act_peft.report import write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (apt-get install chromium)")


def run(page, tmp_path, *options):
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *options]
    folder = tmp_path / "profile"
    environment = {**os.environ, "HOME": str(folder)}
    command += [f"--user-data-dir={folder}", "--host-resolver-rules=MAP * ~NOTFOUND", page.as_uri()]
    return subprocess.run(command, capture_output=True, timeout=120, env=environment, check=True)


def pixels(path):
    """The rows of an RGB or RGBA PNG, as bytes, and the bytes of a pixel."""
    data = path.read_bytes()
    width, height, depth, colour = struct.unpack(">IIBB", data[16:26])
    size = {2: 3, 6: 4}[colour]
    assert depth == 8
    packed, place = b"", 8
    while place < len(data):
        length, kind = struct.unpack(">I4s", data[place : place + 8])
        packed += data[place + 8 : place + 8 + length] if kind == b"IDAT" else b""
        place += 12 + length
    raw, rows, before = zlib.decompress(packed), [], bytes(width * size)
    for number in range(height):
        start = number * (width * size + 1)
        before = _unfiltered(raw[start], bytearray(raw[start + 1 : start + 1 + width * size]), before, size)
        rows.append(before)
    return rows, size


def _unfiltered(kind, row, above, size):
    for place in range(len(row)):
        left = row[place - size] if place >= size else 0
        up, corner = above[place], above[place - size] if place >= size else 0
        if kind == 1:
            row[place] = (row[place] + left) & 255
        elif kind == 2:
            row[place] = (row[place] + up) & 255
        elif kind == 3:
            row[place] = (row[place] + (left + up) // 2) & 255
        elif kind == 4:
            guess = left + up - corner
            nearest = min((abs(guess - value), order, value) for order, value in enumerate((left, up, corner)))[2]
            row[place] = (row[place] + nearest) & 255
    return bytes(row)


@pytest.fixture(scope="module")
def page(shown, tmp_path_factory):
    output = tmp_path_factory.mktemp("browser") / "report.html"
    write_report([shown / name for name in ("scores.safetensors", "head.safetensors", "sweep.json")], output)
    return output


def test_the_browser_shows_it_whole(page, tmp_path):
    found = run(page, tmp_path, "--dump-dom")
    text = found.stdout.decode()
    assert text.count("<img ") == 5
    assert "What the files share" not in text  # one file of scores, one mask: nothing to compare
    assert b"Refused" not in found.stderr  # the page's own policy refuses nothing of it


@pytest.mark.parametrize(("theme", "is_light"), [("light", True), ("dark", False)])
def test_light_and_dark(page, tmp_path, theme, is_light):
    options = ["--force-dark-mode", "--enable-features=WebContentsForceDark:none"] if theme == "dark" else []
    shot = tmp_path / "shot.png"
    setting = f"--blink-settings=preferredColorScheme={1 if is_light else 0}"
    run(page, tmp_path, setting, *options[:0], f"--screenshot={shot}", "--window-size=500,300")
    rows, size = pixels(shot)
    corner = rows[-1][:size][:3]
    assert (sum(corner) > 600) == is_light
    assert len({bytes(row) for row in rows}) > 20  # there is something on the page


def test_a_narrow_window_needs_no_scrolling_sideways(page, tmp_path):
    """A frame as wide as a phone, in a page that writes down how wide its content is."""
    probe = tmp_path / "probe.html"
    script = "onload=()=>{const f=document.querySelector('iframe');document.title=f.contentDocument.body.scrollWidth}"
    probe.write_text(
        f"<title>-</title><iframe src='{page.as_uri()}' width=400 height=800></iframe><script>{script}</script>"
    )
    found = run(probe, tmp_path, "--allow-file-access-from-files", "--dump-dom", "--virtual-time-budget=5000")
    title = found.stdout.decode().partition("<title>")[2].partition("<")[0]
    assert 0 < int(title) <= 400
