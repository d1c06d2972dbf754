"""Small runs to preview: rows with all that is hard to show, a tokenizer without its model, a page taken apart."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

from small_tokenizer import write_directory

PRESET = "internlm2_tiny-sft_full"
NASTY = """</span><script>alert(1)</script> & "><img src=x onerror='alert(2)'> <|im_end|> ]]> &lt;"""
HIDDEN = "a\tb\r\x00\x1b[31m\u200b\u202eabc\u00a0\u3000\ufeff"
TITLE = re.compile(r"id ([\d, ]+) · position (\d+) · (trained|masked|cut off)(?: with weight ([\d.]+))?( · special)?")


def conversation(question: str, *answers: str) -> dict:
    turns = [{"role": "user", "content": question}]
    for answer in answers:
        turns += [{"role": "assistant", "content": answer}, {"role": "user", "content": "more"}]
    return {"messages": turns[:-1]}


def rows() -> list[dict]:
    """Forty conversations of many lengths; the first ones are nasty."""
    first = [conversation(NASTY, NASTY), conversation(HIDDEN, HIDDEN), conversation("😀𠮷👨‍👩‍👧", "é😀", "𠮷" * 3)]
    return [*first, *(conversation(f"What is {n}?", "ba ne " * (1 + 7 * n % 29), f"的 {n}") for n in range(37))]


def write_run(folder: Path, content: list[dict] | None = None) -> dict[str, object]:
    """A tokenizer without weights and a data file; gives the settings that a preset needs to read them."""
    write_directory(folder / "model")
    data = folder / "rows.jsonl"
    data.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in content or rows()), encoding="utf-8")
    settings = {"model_path": folder / "model", "data_path": data, "cache_dir": folder / "cache", "max_length": 256}
    return {**settings, "weights": "pretrained", "num_accumulation_steps": 2, "num_epochs": 2}


def words(settings: dict[str, object], *arguments: str, **changes: object) -> list[str]:
    """The command line of a preview."""
    given = [f"{name}={value}" for name, value in {**settings, **changes}.items()]
    return ["preview", PRESET, *given, *arguments]


class PageToken(NamedTuple):
    """What hovering over a token of a page tells, and the text it is drawn as."""

    ids: tuple[int, ...]
    position: int
    mark: str
    special: bool
    text: str
    weight: float  # in the loss


class Page(HTMLParser):
    """A page as a browser would take it apart: every element, and the tokens of each document of each pack."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.packs: list[list[list[PageToken]]] = []
        self.cuts: list[tuple[int, int]] = []  # document of the page, tokens of it before the cut
        self.headings: list[str] = []
        self._open: list[str] = []
        self._title: str | None = None
        self._words = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.elements.append((tag, attributes))
        kind = attributes.get("class")
        if kind == "pack":
            self.packs.append([])
        elif kind == "document":
            self.packs[-1].append([])
        elif tag == "span" and kind == "r" and self.packs:
            place = sum(map(len, self.packs)) - 1
            self.cuts.append((place, sum(len(token.ids) for token in self.packs[-1][-1])))
        if tag == "span":
            self._title = attributes.get("title")
        self._words = ""

    def handle_data(self, data: str) -> None:
        self._words += data

    def handle_endtag(self, tag: str) -> None:
        if tag == "h3":
            self.headings.append(self._words)
        if tag == "span" and self._title is not None:
            ids, position, mark, weight, special = TITLE.fullmatch(self._title).groups()
            counts = float(weight or mark == "trained")
            found = PageToken(tuple(map(int, ids.split(", "))), int(position), mark, bool(special), self._words, counts)
            self.packs[-1][-1].append(found)
        self._title = None

    def flat(self, document: list[PageToken]) -> list[tuple[int, bool]]:
        """(id, trained) of each token of a document that training sees."""
        return [
            (index, token.mark == "trained") for token in document if token.mark != "cut off" for index in token.ids
        ]
