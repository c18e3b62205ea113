"""The report of a run: what it reads, what it draws and where, and the page itself."""

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.lines import Line2D

from glm_jax.config import default_config, resolve, source, to_json
from glm_jax.errors import UserError
from glm_jax.figures import curves, report, style
from glm_jax.storage.files import json_line
from glm_jax.workdir import history

LAYERS, STEPS = 3, 40

INTERVENTIONS = [
    {"event": "intervention", "step": 10, "samples": 40, "cause": "config",
     "changes": {"optimizer.peak_lr": [0.5, 0.25], "data.weights": [None, [[0, {"<en>": 1.0}]]]}},
    {"event": "intervention", "step": 20, "samples": 80, "cause": "spike",
     "changes": {"train.skip_steps": [[], [[21, 25]]]}, "skipped": [21, 25],
     "seen": {"step": 25, "loss": 9.25, "grad_norm": float("inf"), "reason": "the loss 9.25 is above its band"}},
]  # fmt: skip


def train_event(step: int) -> dict[str, Any]:
    return {
        "event": "train", "step": step, "samples": 4 * step, "tokens": 100, "loss": 4.0 - step / 40,
        "loss/mask": 4.5 - step / 40, "lr": 0.5 if step <= 10 else 0.25, "embedding_shrink": 1.0,
        "grad_norm": float("inf") if step == 5 else 2.0, "grad_norm/embedding": 0.1, "grad_norm/blocks_0_2": 1.5,
        "param_norm": 9.0, "update_norm": 0.01, "activation_rms": [1.0 + layer * step for layer in range(LAYERS)],
        "loss_scale": 1.0, "skipped": 0, "batch": 4, "tokens_per_second": 1000.0, "mfu": 0.3, "hfu": 0.4,
        "mfu_formula": 0.29, "hfu_formula": 0.39, "data_wait": 0.01, "memory": 2**30,
    }  # fmt: skip


def write_run(workdir: Path) -> Path:
    """Write a run of 40 steps that was restarted, lost a save, and met a spike."""
    events = [{"event": "start", "step": 0, "versions": {"jax": "0.10.0"}}]
    events += [train_event(step) for step in range(1, STEPS + 1)]
    events += [
        {"event": "evaluation", "step": STEPS, "loss": 3.25, "loss/en": 3.25, "bits_per_byte/en": 1.5},
        {"event": "checkpoint", "step": 15, "seconds": 2.5, "blocked_seconds": 0.5, "bytes": 9},
        {"event": "checkpoint", "step": 30, "error": "No space left on <device>"},
        {"event": "start", "step": 15, "versions": {"jax": "0.10.2"}, "platform": "gpu", "devices": 8},
        {"event": "fill", "step": STEPS, "source": "en", "text": "a <b> [MASK] d", "target": "c", "filled": "<x>"},
    ]
    workdir.mkdir(parents=True)
    (workdir / "metrics.jsonl").write_text("".join(map(json_line, events)) + '{"event": "tr')
    (workdir / "interventions.jsonl").write_text("".join(map(json_line, INTERVENTIONS)))
    config = default_config()
    config.data.sources.en = source(path="a & b/*.txt")
    config.train.steps = 60
    (workdir / "config.json").write_text(to_json(resolve(config)))
    return workdir


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
    return write_run(tmp_path / "<run>")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    workdir = write_run(tmp_path_factory.mktemp("page") / "<run>")
    path = report.write(workdir)
    assert path == workdir / "report.html"
    return path.read_text(encoding="utf-8")


@pytest.fixture
def short(tmp_path: Path) -> Path:
    """A run with few values, so that its report takes no time."""
    (tmp_path / "short").mkdir()
    events = [{"event": "train", "step": step, "loss": 2.0, "activation_rms": [1.0, step]} for step in (1, 2)]
    (tmp_path / "short" / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return tmp_path / "short"


class Page(HTMLParser):
    """The contents of a page: rows of its tables, captions, facts, texts of its figures. Checks that its tags match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.texts: dict[str, list[str]] = {
            "figcaption": [],
            "dd": [],
            "dt": [],
            "h1": [],
            "text": [],
            "span": [],
            "li": [],
            "mark": [],
            "summary": [],
            "footer": [],
        }
        self.open: list[str] = []
        self.figures = 0
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag not in ("meta", "br"):
            self.open.append(tag)
        self.figures += tag == "figure"
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        elif tag == "br" and "td" in self.open:
            self.rows[-1][-1] += " | "
        elif tag in self.texts:
            self.texts[tag].append("")

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        if tag == "br":
            self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data
        for tag in self.open:
            if tag in self.texts:
                self.texts[tag][-1] += data


def test_the_page_tells_what_happened(page: str) -> None:
    shown = Page(page)
    assert shown.rows[1:5] == [
        ["1", "10", "40", "intervention (config)",
         'optimizer.peak_lr: 0.5 → 0.25 | data.weights: absent → [[0, {"<en>": 1.0}]]'],
        ["2", "15", "", "restart", ""],
        ["3", "20", "80", "spike, gone back from",
         "seen at step 25: loss 9.25, grad_norm not finite, the loss 9.25 is above its band | "
         "train.skip_steps: [] → [[21, 25]]"],
        ["4", "30", "", "failed checkpoint", "No space left on <device>"],
    ]  # fmt: skip
    assert shown.rows[6:] == [
        ["data.sources.en.path", '"a & b/*.txt"', '""'],
        ["train.steps", "60", "1000"],
    ]
    facts = dict(zip(shown.texts["dt"], shown.texts["dd"], strict=True))
    assert shown.texts["h1"] == ["<run>"] and facts == {
        "step": "40 of 60", "samples": "160", "tokens, about": "4,000", "training loss": "3.0000",
        "held-out loss": "3.2500", "held-out loss en": "3.2500", "tokens a second": "1,000",
        "training time, about": "0:00:04", "devices": "8 (gpu)",
    }  # fmt: skip
    assert shown.texts["footer"] == ["jax 0.10.2"] and shown.texts["li"] == ["a <b> <x> den, was: c"]
    assert shown.texts["mark"] == ["<x>"] and page.index("&lt;x&gt;") < page.index("<figure")
    assert shown.texts["span"] == ["intervention", "spike, gone back from", "failed checkpoint", "restart"]


def test_the_page_has_a_curve_for_what_there_is_and_needs_nothing_else(page: str) -> None:
    shown = Page(page)
    titles = [title for title in shown.texts["text"] if title in {panel.title for panel in PANELS_AND_MAPS}]
    assert titles == [
        "Training loss", "Held-out loss", "Held-out bits per byte", "Learning rate", "Gradient norm",
        "Activation scale by layer", "Activation scale against depth", "Checkpoints",
        "Batch", "Gradient norm by layers", "Parameter norm", "Update norm", "Speed", "Utilisation",
        "Waiting for data", "Memory",
    ]  # fmt: skip
    assert shown.texts["summary"] == [f"Never changed: {', '.join(titles[8:])}"]
    assert page.index("<details>") > page.index("Checkpoints")
    assert shown.figures == len(titles)
    bare = re.sub(r"data:image/png;base64,[\w+/=\s]*", "", page)  # the heat map
    assert len(bare) < len(page) - 100
    assert not re.search(r"https?:|//[a-z]|<script|@import|url\((?!#)", bare, re.IGNORECASE)
    assert not re.search(r'(?:src|href)="[^#"]', bare)
    assert "layers 0–2" in shown.texts["text"] and style.INK not in page.split("</style>")[1]


PANELS_AND_MAPS = [
    *curves.PANELS,
    curves.Lines("Activation scale by layer", "", ()),
    curves.Lines("Activation scale against depth", "", ()),
]


@pytest.mark.slow
@pytest.mark.oldest
def test_the_same_run_gives_the_same_bytes(short: Path, tmp_path: Path) -> None:
    for suffix in (".html", ".png"):
        one, two = (report.write(short, tmp_path / f"{number}{suffix}").read_bytes() for number in (1, 2))
        assert one == two
    assert one.startswith(b"\x89PNG")


def test_names_in_any_script_are_shown_as_they_are(short: Path, tmp_path: Path) -> None:
    (short / "metrics.jsonl").write_text(json.dumps({"event": "train", "step": 1, "loss/三国 $a$ <b>": 1.0}))
    assert "三国 $a$ <b>" in Page(report.write(short).read_text(encoding="utf-8")).texts["text"]
    assert report.write(short, tmp_path / "x.PNG").read_bytes().startswith(b"\x89PNG")


def points(line: Line2D) -> tuple[np.ndarray, np.ndarray]:
    return np.asarray(line.get_xdata()), np.asarray(line.get_ydata())


def test_marks_are_at_their_steps_in_every_curve_over_steps(workdir: Path) -> None:
    read = history.read(workdir)
    for panel in curves.panels(read):
        _, (axis,) = style.figure(1, 1)
        panel.draw(axis)
        vertical = [points(line) for line in axis.lines if len(points(line)[0]) == 2]
        marks = {(int(x[0]), line.get_color()) for line in axis.lines if len(x := points(line)[0]) == 2}
        assert all(x[0] == x[1] and list(y) == [0, 1] for x, y in vertical)
        expected = {(mark.step, curves.MARK_STYLES[mark.kind][0]) for mark in read.marks}
        assert marks == (set() if panel.title == "Activation scale against depth" else expected), panel.title
        if marks:
            assert [text.get_text() for text in axis.texts] == ["1", "2", "3", "4"]


def test_curves_hold_the_logged_numbers_and_gaps_where_none_was_finite(workdir: Path) -> None:
    read = history.read(workdir)
    drawn = {}
    for panel in curves.panels(read):
        _, (axis,) = style.figure(1, 1)
        panel.draw(axis)
        drawn[panel.title] = {line.get_label(): line for line in axis.lines if len(points(line)[0]) != 2}
    loss = drawn["Training loss"]["all"]
    assert loss.get_color() == style.INK and list(points(loss)[0]) == list(range(1, STEPS + 1))
    np.testing.assert_allclose(points(loss)[1], [4.0 - step / 40 for step in range(1, STEPS + 1)])
    norm = points(drawn["Gradient norm"]["all"])[1]
    assert np.isnan(norm[4]) and np.nansum(norm) == 2.0 * (STEPS - 1)
    depth = drawn["Activation scale against depth"]
    assert list(depth) == ["step 1", "step 11", "step 21", "step 30", "step 40"]
    np.testing.assert_allclose(points(depth["step 11"])[1], [1, 12, 23])
    utilisation = {label: points(line)[1][0] for label, line in drawn["Utilisation"].items()}
    assert utilisation == pytest.approx({"mfu": 30.0, "hfu": 40.0, "mfu formula": 29.0, "hfu formula": 39.0})


def test_long_lines_are_thinned_to_their_ends_and_extremes_and_smoothed() -> None:
    values = np.sin(np.arange(50_000) / 3000)
    values[31_234], values[40_001], values[7] = 9.0, -9.0, np.nan
    places = curves.thin(values)
    assert len(places) <= curves.POINTS and {0, 49_999, 31_234, 40_001} <= set(places)
    assert (np.diff(places) > 0).all() and list(curves.thin(values[:10])) == list(range(10))
    smoothed = curves.smooth(np.array([2.0, np.nan, 4.0]), 2)
    assert smoothed[0] == 2.0 and np.isnan(smoothed[1]) and smoothed[2] == pytest.approx((0.5 * 2 + 4) / 1.5)
    assert curves.smoothing_span(50_000) == 500 and curves.smoothing_span(100) == 1


def test_a_long_run_says_that_it_is_smoothed_and_stays_small(tmp_path: Path) -> None:
    lines = [json.dumps({"event": "train", "step": step, "loss": 1.0 + 1 / step}) + "\n" for step in range(1, 5001)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    path = report.write(tmp_path)
    assert "moving average of about 50 logged steps" in Page(path.read_text()).texts["figcaption"][0]
    assert path.stat().st_size < 100_000


def test_activations_are_averaged_over_equal_stretches_of_steps() -> None:
    steps = np.array([0, 1, 9, 10])
    values = np.array([[1.0], [3.0], [np.nan], [5.0]])  # [n, L]
    averages, edges = curves.bin_steps(steps, values, most=4)
    assert list(edges) == [0, 2.5, 5, 7.5, 10] and averages[:, 0].tolist() == [2.0, 2.0, 2.0, 5.0]


def test_values_that_span_little_keep_a_linear_scale() -> None:
    for high, scale in ((3.0, "linear"), (30.0, "log")):
        _, (axis,) = style.figure(1, 1)
        axis.plot([0, 1], [1.0, high])
        style.scale_values(axis, log=True)
        assert axis.get_yscale() == scale


def test_an_old_run_without_config_has_a_report(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"event": "evaluation", "step": 0, "loss": 2.0}\n')
    shown = Page(report.write(tmp_path, tmp_path / "deep" / "page.htm").read_text())
    assert shown.figures == 1 and shown.rows == [] and shown.texts["dd"] == ["0", "2.0000"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metrics.jsonl", None, "has no metrics.jsonl: check --workdir"),
        ("metrics.jsonl", "", "has no events yet"),
        ("metrics.jsonl", '{"event": "train", "st', "has no events yet"),
        (
            "metrics.jsonl",
            '{"event": "train", "step": 1}\n3\n{"event": "train", "step": 2}\n',
            "line 2 of .* is damaged",
        ),
        ("metrics.jsonl", '{"event": "train"}\n{"event": "train", "step": 2}\n', "line 1 of .* is damaged"),
        ("interventions.jsonl", "x\n{}\n", "interventions.jsonl, line 1, is damaged"),
        ("config.json", "{", "config.json is damaged"),
        ("config.json", "[]", "config.json is damaged"),
    ],
)
def test_what_is_missing_or_damaged_is_one_line(workdir: Path, name: str, content: str | None, message: str) -> None:
    if content is None:
        (workdir / name).unlink()
    else:
        (workdir / name).write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        report.write(workdir)
    assert "\n" not in str(caught.value) and not (workdir / "report.html").exists()


def test_where_it_cannot_be_written_is_one_line(short: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"end its name in \.html or \.png"):
        report.write(short, tmp_path / "x.pdf")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        report.write(short, tmp_path / "file" / "x.html")


def test_without_matplotlib_it_says_what_to_install(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"pip install -e '.\[plots\]'"):
        report.write(workdir)


@pytest.mark.parametrize("low, high", [(1.0, 4.5), (1.2, 9.0), (0.5, 40.0), (3.0, 2e4), (7.0, 29.0), (1e-8, 1.0)])
def test_a_logarithmic_axis_has_three_ticks_or_more(low: float, high: float) -> None:
    _, (axis,) = style.figure(1, 1)
    axis.plot([0, 1], [low, high])
    style.scale_values(axis, log=True)
    axis.set_ylim(low, high)
    ticks = [tick for tick in axis.get_yticks() if low <= tick <= high]
    assert axis.get_yscale() == "log" and 3 <= len(ticks) <= 12


def test_layers_are_counted_in_whole_numbers_and_the_colour_bar_has_its_unit(workdir: Path) -> None:
    maps = [panel for panel in curves.panels(history.read(workdir)) if panel.title.startswith("Activation scale")]
    for panel, of in zip(maps, ("yaxis", "xaxis"), strict=True):
        drawn, (axis,) = style.figure(1, 1)
        panel.draw(axis)
        assert all(tick == round(tick) for tick in getattr(axis, of).get_major_locator()())
        if of == "yaxis":
            assert [bar.get_ylabel() for bar in drawn.axes if bar is not axis] == ["rms"]


def test_tasks_have_a_panel_for_each_measure() -> None:
    first = {"event": "tasks", "step": 0, "accuracy/blank_en": 10.0, "accuracy/blank_zh": 12.5, "ppl/WikiText": 900.0}
    second = {"event": "tasks", "step": 5, "accuracy/blank_en": 30.0, "nats_a_token/blank_en": 2.5}
    panels = {panel.title: panel for panel in curves.panels(history.Record([first, second], []))}
    assert [*panels] == ["Tasks: accuracy", "Tasks: ppl", "Tasks: nats a token"]
    drawn, (axis,) = style.figure(1, 1)
    panels["Tasks: accuracy"].draw(axis)
    lines = {str(line.get_label()): line for line in axis.get_lines()}
    assert {*lines} == {"blank_en", "blank_zh"} and axis.get_ylabel() == "%"
    np.testing.assert_array_equal(np.asarray(lines["blank_en"].get_xydata()), [[0, 10], [5, 30]])
