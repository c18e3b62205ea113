"""The page of `glm-jax plan --html`: what it shows, from reports that are given, against the same plan's JSON."""

import json
import re
import sys
from collections.abc import Iterable, Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

from glm_jax.cli import main
from glm_jax.config.fields import flatten
from glm_jax.planning import worker
from glm_jax.planning.compile import Report, Request
from tests.cli.test_plan import given

FETCHED = {"src", "href", "xlink:href", "action", "data", "poster", "srcset"}  # attributes that name another resource
VOID = {"meta", "br", "input", "img", "link"}


class Page(HTMLParser):
    """Reads the text of a page by element, the rows of its tables, and whatever it would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open = list[str]()
        self.titles, self.rows, self.fetched = list[str](), list[list[str]](), list[str]()
        self.words, self.verdict, self.drawings = "", "", 0
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.fetched += [value for name, value in attrs if name in FETCHED and value and not value.startswith("#")]
        self.fetched += [tag] * (tag in ("link", "script", "img", "iframe"))
        self.drawings += tag == "svg"
        if tag in ("h1", "h2", "h3", "summary"):
            self.titles.append("")
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            assert "url(" not in data and "@import" not in data
            return
        self.words += data
        if {"h1", "h2", "h3", "summary"} & {*self.open}:
            self.titles[-1] += data
        if {"td", "th"} & {*self.open}:
            self.rows[-1][-1] += data

    def row(self, first: str) -> list[str]:
        """Return the cells after the only one of that name."""
        (found,) = (row[1:] for row in self.rows if row[0] == first)
        return found


@pytest.fixture(autouse=True)
def _compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    def reports(asked: Iterable[Request], processes: int = 1) -> Iterator[Report]:
        yield from map(given, asked)

    monkeypatch.setattr(worker, "reports", reports)


def drawn(path: Path, *arguments: str) -> Page:
    assert main.main(["plan", "--config=glm_130b", f"--html={path}", *arguments]) == 0
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"https?:|//[a-z]", text)
    page = Page(text)
    assert page.fetched == []
    return page


def test_a_step_that_does_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a <plan>.html"
    path.write_text("an older page")
    page = drawn(path, "--memory=40GB", "--json")
    output, errors = capsys.readouterr()
    said = json.loads(output)
    assert errors.endswith(f"written: {path}\n") and [*tmp_path.iterdir()] == [path]
    assert page.titles == [
        "glm_130b on 768 x cpu", "Memory of a device", "What would let it fit", "Mesh", "Pipeline",
        "Communication by axis", "Collectives of a device in the compiled step", "Largest arrays of the compiled step",
        "All numbers, in bytes, seconds, operations or as they are named",
        "The state on the mesh: 2,070,442,012 bytes a device",
    ]  # fmt: skip
    assert page.drawings == 4
    assert "Does not fit: it takes 50.00 of 40.00 GB a device, 10.000 GB too much (compiled step)" in page.words
    assert f"glm-jax plan --config=glm_130b '--html={path}' --memory=40GB --json" in page.words
    assert page.row("--config.pipeline.stash=stage") == ["fits", "50.00", "30.00", ""]
    assert ["tensor", "all-gather", "190 x n", "4", "1.500"] in page.rows
    assert ["none", "all-reduce", "once", "1", "0.000"] in page.rows
    assert ["8.250", "2", "f16[8,8]", "all_gather", "gather > _gather", "parallel/zero.py:25"] in page.rows
    # all numbers of the JSON, under their names there
    (report,) = said["compiled"]
    report = {name: value for name, value in report.items() if name not in ("buffers", "collectives")}
    expected = dict(flatten({"estimate": said["estimate"], "compiled.0": report}))
    assert len(expected) > 50
    for name, value in expected.items():
        (shown,) = page.row(name)
        assert (shown if isinstance(value, str) else json.loads(re.sub(r"(?<=\d),(?=\d)", "", shown))) == value


def test_the_drawings_name_devices_stages_and_microbatches(tmp_path: Path) -> None:
    page = drawn(tmp_path / "plan.html", "--nocompile", "--target=a100-40gb")
    words = page.words
    assert "Does not fit: it takes 32.56 of 31.75 GB a device, 0.816 GB too much (estimated, not compiled)" in words
    assert "all 24 replicas (data 0–23) and their devices; the first is drawn above" in words
    for name in ("stage 0", "layers 54–62", "layers 63–69", "2 empty", "tensor 3: heads 72–95", "736–767"):
        assert name in words
    assert "70 layers in 8 stages of 9, 2 places empty: stage 7 has 7" in words
    assert "idle: the bubble, 3.8% of a stage's time" in words
    # with 1F1B all stages work in ticks 14 to 175, of 3 forward slots each; 3 ticks are drawn at each end
    assert re.search(rf"…\s+{(162 - 2 * 3) * 3}\s+more\s+…", words)
    assert page.row("nothing overlaps")[:3] == ["123.8", "69,860", "23.1%"]
    assert "66.77 s: everything overlaps" in words and "tensor (in a node)" in words and "684.309" in words
    assert page.row("params/blocks/attention/qkv/kernel")[0] == "(70+2)x12288x96x3x128"
    for part in ("params 0.690 GB", "gradients 16.542 GB", "work 3.936 GB", "bound 31.75 GB", "32.56"):
        assert part in words


def test_inference_shows_what_there_is(tmp_path: Path) -> None:
    page = drawn(tmp_path / "plan.html", "--inference=int4", "--memory=60GB")
    assert page.titles[0] == "glm_130b on 768 x cpu" and "Pipeline" not in page.titles
    assert "Largest arrays of the compiled decode" in page.titles and page.drawings == 2
    assert "Fits: it takes 50.00 of 60.00 GB a device, 10.000 GB to spare (compiled prefill)" in page.words
    assert page.row("compiled.1.memory.peak") == ["50,000,000,000"]


def test_mistakes_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["plan", "--config=glm_130b", "--nocompile"]
    assert main.main([*arguments, "--html=plan.pdf"]) == 2
    assert capsys.readouterr() == ("", "error: --html plan.pdf is no page: end its name in .html\n")
    assert main.main([*arguments, "--html=plan.html", "--inference=int8"]) == 2
    assert capsys.readouterr().err.startswith("error: --html draws the compiled programs of --inference: leave --noc")
    (tmp_path / "file").write_text("")
    assert main.main([*arguments, "--html=plan.html", "--search", "--devices=8"]) == 2
    assert capsys.readouterr().err.startswith("error: --html draws one mesh: leave out --search, and give")
    assert main.main([*arguments, "--html=plan.html", "--inference=any"]) == 2
    assert capsys.readouterr().err.startswith("error: --html draws one mesh: give --inference one of the weights")
    assert main.main([*arguments, f"--html={tmp_path / 'file' / 'plan.html'}"]) == 2
    assert capsys.readouterr().err.startswith(f"error: --html {tmp_path / 'file' / 'plan.html'} cannot be written (")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main.main([*arguments, f"--html={tmp_path / 'plan.html'}"]) == 2
    assert capsys.readouterr() == ("", "error: --html needs matplotlib: pip install -e '.[plots]'\n")
    assert not (tmp_path / "plan.html").exists()
