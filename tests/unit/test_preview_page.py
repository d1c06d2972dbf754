"""The page stands alone, says of each token what it is, and is harmless whatever users wrote."""

import base64
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from preview_runs import NASTY, Page, conversation, words, write_run

from tuner.cli import run
from tuner.model.tokenizer import build_tokenizer

ALLOWED = {
    *("html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "p", "span", "section", "article", "pre"),
    "img",
}
VOID = {"meta", "img"}
ATTRIBUTES = {"class", "title", "charset", "http-equiv", "content", "name", "lang", "src", "alt"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("page")


@pytest.fixture(scope="module")
def text(folder: Path) -> str:
    target = folder / "page.html"
    assert run(words(write_run(folder), "-n", "40", "--html", str(target))) == 0
    return target.read_text(encoding="utf-8")


class Nesting(HTMLParser):
    """Elements that are closed out of order, or never."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)


def test_it_holds_nothing_but_its_own_elements(text: str):
    page = Page(text)
    assert {tag for tag, _ in page.elements} == ALLOWED
    assert {name for _, attributes in page.elements for name in attributes} <= ATTRIBUTES
    nesting = Nesting(text)
    assert (nesting.open, nesting.wrong) == ([], [])


def test_it_needs_nothing_from_elsewhere(text: str):
    page = Page(text)
    assert [attributes["src"][:22] for tag, attributes in page.elements if tag == "img"] == [
        "data:image/png;base64,"
    ] * 3
    assert not re.search(r"url\(|@import|https?:|//[a-z]", re.sub(r"base64,[^\"]*", "", text))
    policy = next(a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy
    assert "script" not in policy
    assert [charset for _, attributes in page.elements if (charset := attributes.get("charset"))] == ["utf-8"]


def test_the_words_of_users_are_words(text: str):
    page = Page(text)
    assert "<script>" not in text
    [nasty] = [
        drawn
        for pack in page.packs
        for document in pack
        if "alert(1)" in (drawn := "".join(token.text for token in document))
    ]
    assert nasty.count(NASTY) == 2
    special = [token for pack in page.packs for document in pack for token in document if token.special]
    assert {token.text for token in special} == {"<s>", "<|im_start|>", "<|im_end|>"}


def test_a_file_and_a_config_with_an_evil_name_do_no_harm(tmp_path: Path):
    settings = write_run(tmp_path)
    evil = tmp_path / "<script>alert(3)<'\">.jsonl"
    evil = Path(str(evil).replace("/script", "script"))
    (tmp_path / "rows.jsonl").rename(evil)
    assert run(["copy-cfg", "internlm2_tiny-sft_full", str(tmp_path)]) == 0
    config = (tmp_path / "internlm2_tiny-sft_full.py").rename(tmp_path / "<img src=x onerror=alert(4)>.py")
    command = words({**settings, "data_path": str([str(evil)])}, "--html", str(tmp_path / "out.html"))
    command[1] = str(config)
    assert run(command) == 0
    page = Page((tmp_path / "out.html").read_text(encoding="utf-8"))
    assert {tag for tag, _ in page.elements} == ALLOWED
    assert {name for _, attributes in page.elements for name in attributes} <= ATTRIBUTES
    assert page.headings[0].split(" · ")[1].startswith(f"{evil}:")


def test_hovering_tells_id_position_and_mark_of_each_token(text: str, folder: Path):
    tokenizer = build_tokenizer(str(folder / "model"))
    for pack in Page(text).packs:
        for document in pack:
            position = 0
            for token in document:
                assert token.position == position
                position += len(token.ids)
                assert token.mark in ("trained", "masked")
                if token.text.isalnum() and token.text.isascii():
                    assert tokenizer.decode(token.ids).strip() == token.text
            assert document[0].ids == (tokenizer.bos_token_id,)


def test_the_page_has_the_histograms_as_pictures_with_their_figures_beside(text: str):
    images = [attributes for tag, attributes in Page(text).elements if tag == "img"]
    for image in images:
        assert base64.b64decode(image["src"].partition(",")[2]).startswith(b"\x89PNG\r\n\x1a\n")
    assert [image["alt"].split(":")[0] for image in images] == [
        "documents by their tokens",
        "documents by their trained tokens",
        "tokens by source",
    ]


def test_an_existing_page_is_left_alone_and_no_data_is_read(folder: Path, capsys: pytest.CaptureFixture):
    target = folder / "mine.html"
    target.write_text("mine")
    settings = {**write_run(folder), "cache_dir": folder / "unused"}
    assert run(words(settings, "--html", str(target))) == 2
    assert f"{target} exists already" in capsys.readouterr().err
    assert target.read_text() == "mine"
    assert not (folder / "unused").exists()
    assert run(words(settings, "--html", str(target / "page.html"))) == 2
    assert "is a file" in capsys.readouterr().err


def test_a_line_break_at_the_very_beginning_is_not_eaten(tmp_path: Path):
    """HTML drops the first line break of a <pre>."""
    settings = write_run(tmp_path, [conversation("\nba", "ne")])
    assert run(words(settings, "--html", str(tmp_path / "page.html"))) == 0
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<pre>\n<span" in text
