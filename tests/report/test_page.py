"""The page: what stands in it, that nothing of it is live, and that it is whole or absent."""

from __future__ import annotations

import base64
import itertools
import re
import shutil
from html.parser import HTMLParser

import pytest

from act_peft import ActValueError
from act_peft.report import write_report

FILES = ("scores.safetensors", "again.safetensors", "mask.safetensors", "head.safetensors", "sweep.json")
EMPTY = {"img", "meta"}


class Page(HTMLParser):
    """A parser that checks that elements are nested, and remembers them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in EMPTY:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def page(shown, tmp_path_factory):
    output = tmp_path_factory.mktemp("page") / "report.html"
    write_report([shown / name for name in (*FILES, "patching.json")], output, title="Spanish")
    assert output.stat().st_size < 3_000_000
    return Page(output.read_text(encoding="utf-8"))


def test_it_is_a_page_for_everybody(page):
    assert page.all("html") == [{"lang": "en"}]
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all("meta")
    identifiers = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    links = [attributes["href"] for attributes in page.all("a")]
    assert links[0] == "#content"  # to skip what stands before it
    assert len(links) == 1 + 6 + 1
    assert {link.removeprefix("#") for link in links} <= identifiers
    for image in page.all("img"):
        assert len(image["alt"]) > 40
        assert image["width"]
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1
    assert all(next_ - level <= 1 for level, next_ in itertools.pairwise(levels))
    for region in page.all("div"):
        assert (region["tabindex"], region["role"]) == ("0", "region")
        assert region["aria-label"]
    assert all(header["scope"] in ("col", "row") for header in page.all("th"))
    assert len(page.all("caption")) == len(page.all("table"))


def test_nothing_is_loaded_and_nothing_runs(page):
    names = {tag for tag, _ in page.elements}
    assert not names & {"script", "link", "iframe", "object", "base", "form"}
    policy = {a.get("http-equiv"): a.get("content") for a in page.all("meta")}["Content-Security-Policy"]
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    for image in page.all("img"):
        start, _, data = image["src"].partition(",")
        assert start == "data:image/svg+xml;base64"
        assert b"<script" not in base64.b64decode(data)


def test_every_file_has_its_section(page):
    text = " ".join(page.texts)
    for name in FILES:
        assert name in text
    for words in (
        "Warning: 100% of the selected channels are lm_head",
        "What the files share",
        "Scores of one kind",
        "Pairs of masks, with permutations within modules",
        "recommended",
        "of the loss gap",
        "version of act_peft",
    ):
        assert words in text
    assert len(page.all("img")) == 2 * 3 + 2 + 1 + 1 + 2


def test_text_from_files_is_escaped(shown, tmp_path):
    hostile = "<img src=x onerror=alert(1)>&\"'"
    shutil.copy(shown / "mask.safetensors", tmp_path / f"{hostile.replace('/', '')}.safetensors")
    shutil.copytree(shown / "adapter", tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace('"donor": null', '"donor": "<script>alert(1)</script>"'))
    files = [tmp_path / f"{hostile}.safetensors", tmp_path / "adapter"]
    write_report(files, tmp_path / "report.html", title="<b>title</b>")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    found = Page(text)
    assert not found.all("script")
    assert not found.all("b")
    assert all("onerror" not in attributes for _, attributes in found.elements)
    assert "<script>alert(1)</script>" in found.texts
    assert any(hostile in part for part in found.texts)
    assert "fingerprints of the base's rows" in found.texts
    assert any(part.startswith("The masks are not compared: ") for part in found.texts)


def test_scores_of_different_kinds(shown, tmp_path):
    from act_peft import ChannelScores

    scores = dict(ChannelScores.load(shown / "scores.safetensors"))
    ChannelScores(scores, 0, kind="weight").save(tmp_path / "weight.safetensors")
    ChannelScores(scores, 1).save(tmp_path / "activation.safetensors")
    files = [tmp_path / "activation.safetensors", tmp_path / "weight.safetensors"]
    write_report(files, tmp_path / "report.html", density=0.1, scope="global")
    text = " ".join(Page((tmp_path / "report.html").read_text(encoding="utf-8")).texts)
    assert "Scores of different kinds" in text
    assert "rank correlation" in text


def test_mistakes(shown, tmp_path):
    with pytest.raises(ActValueError, match="files: got none, expected at least one"):
        write_report([], tmp_path / "report.html")
    with pytest.raises(ActValueError, match="does not exist, expected an existing one"):
        write_report([shown / "mask.safetensors"], tmp_path / "no" / "report.html")
    with pytest.raises(ActValueError, match="density: got 0, expected"):
        write_report([shown / "mask.safetensors"], tmp_path / "report.html", density=0)
    with pytest.raises(ActValueError, match="no such file"):
        write_report([shown / "mask.safetensors", tmp_path / "no"], tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []
