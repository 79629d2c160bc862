"""Every figure: it can be drawn, written in every format, and described in words."""

from __future__ import annotations

import importlib.util
import struct

import pytest

from act_peft import plots
from act_peft.errors import ActError, ActValueError
from act_peft.plots import alt_text, check_figure_file, check_matplotlib, save_figure
from act_peft.plots.files import picture
from tests.support.figures import FIGURES


def png_size(data):
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert data[-8:-4] == b"IEND"
    return struct.unpack(">II", data[16:24])


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_says_what_it_shows(name):
    figure = FIGURES[name]()
    figure.draw_without_rendering()
    title = figure._suptitle.get_text()
    assert any(character.isdigit() for character in title), "a finding has a number"
    assert figure._supxlabel.get_text()
    assert alt_text(figure).startswith(" ".join(title.split()))
    assert " against " in alt_text(figure)
    for axes in figure.axes:
        assert axes.get_xlabel() or axes.get_ylabel(), "an axis without a name"


def test_writes_a_png(tmp_path):
    save_figure(FIGURES["demo"](), tmp_path / "figure.png")
    width, height = png_size((tmp_path / "figure.png").read_bytes())
    assert width > 2 * height > 800
    assert [p.name for p in tmp_path.iterdir()] == ["figure.png"]


@pytest.mark.parametrize(("suffix", "start"), [(".svg", b"<?xml"), (".pdf", b"%PDF"), (".PNG", b"\x89PNG")])
def test_formats(tmp_path, suffix, start):
    save_figure(FIGURES["scales"](), tmp_path / f"figure{suffix}")
    assert (tmp_path / f"figure{suffix}").read_bytes().startswith(start)


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_equal_figures_give_equal_bytes(suffix):
    assert picture(FIGURES["overlaps"](), suffix) == picture(FIGURES["overlaps"](), suffix)


def test_wrong_files(tmp_path):
    with pytest.raises(ActValueError, match=r"got a name that ends in '.jpg', expected .png, .svg, .pdf"):
        check_figure_file(tmp_path / "figure.jpg")
    with pytest.raises(ActValueError, match="does not exist, expected an existing one"):
        save_figure(FIGURES["scales"](), tmp_path / "no" / "figure.png")


def test_interrupted_writing_leaves_the_old_file(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    def broken(self, file, **options):
        file.write(b"half")
        raise OSError("disk full")

    figure = FIGURES["scales"]()
    (tmp_path / "figure.png").write_bytes(b"old")
    monkeypatch.setattr(Figure, "savefig", broken)
    with pytest.raises(OSError, match="disk full"):
        save_figure(figure, tmp_path / "figure.png")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("figure.png", b"old")]


@pytest.mark.parametrize("call", [check_matplotlib, lambda: check_figure_file("x.png"), *FIGURES.values()])
def test_without_matplotlib(monkeypatch, call):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ActError, match=r'matplotlib is not installed, expected it \(pip install "act-peft\[plots\]"\)'
    ):
        call()


def test_names_are_imported_when_they_are_used():
    for name in plots.__all__:
        assert getattr(plots, name).__name__ == name
    with pytest.raises(AttributeError, match=r"module 'act_peft.plots' has no attribute 'nothing'"):
        _ = plots.nothing
