"""Prompts with blanks: what is filled, in which order, with which key, what stays, and what is refused."""

import copy
from typing import Any

import jax
import numpy as np
import pytest

from glm_jax.data.tokenizers.sentencepiece import SentencePieceTokenizer, train
from glm_jax.engine.weights import DecodeConfig
from glm_jax.errors import UserError
from glm_jax.inference import Model, fill
from glm_jax.inference.batch import Decoder, Job
from glm_jax.inference.constraints import Vocabulary
from glm_jax.inference.examples import heldout
from glm_jax.inference.pending import Filled, Settings
from glm_jax.inference.prompts import Context
from glm_jax.inference.strategies import Beam, Generated, Greedy
from glm_jax.model import GLMConfig, init
from glm_jax.parallel import mesh as meshes

TEXTS = ["the small array returns a new shape of given type", "话说天下大势，分久必合，合久必分。"] * 20


class Letters:
    """A tokenizer of letters: a is 10, b is 11 and so on."""

    pad, unk, eos, mask, gmask, smask, sop, eop, size = 0, 1, 2, 3, 4, 5, 6, 7, 36
    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()
    strips_before_blanks = False

    def encode(self, text: str) -> np.ndarray:
        return np.array([ord(letter) - 87 for letter in text], np.int32)

    def decode(self, tokens: Any) -> str:
        return "".join(chr(token + 87) for token in tokens)


LETTERS: Any = Letters()
G, S, M = LETTERS.gmask, LETTERS.smask, LETTERS.mask


def ids(text: str) -> list[int]:
    return LETTERS.encode(text).tolist()


class Script:
    """Stands in for the generation of tokens: gives the n-th blank the n-th text, letter by letter."""

    def __init__(self, texts: list[str], ends: bool = True) -> None:
        self.texts, self.ends = texts, ends
        self.jobs: list[Job] = []
        self.vocabularies: list[Vocabulary] = []
        self.turns: list[int] = []
        self.lasts: list[list[int]] = []

    def __call__(self, decoder: Decoder, jobs: list[Job], vocabulary: Vocabulary) -> "Script":
        self.first, self.made = len(self.jobs), 0
        self.stopped = np.zeros(len(jobs), bool)
        self.lengths = [10**9] * len(jobs)
        self.jobs += jobs
        self.vocabularies.append(vocabulary)
        return self

    def follow(self, jobs: list[Job], last: list[int]) -> None:
        self.lasts.append(last)
        self(DECODER, jobs, self.vocabularies[-1])

    def advance(self, turns: int) -> None:
        self.turns.append(turns)
        self.made += turns

    def _texts(self) -> list[list[int]]:
        chosen = self.texts[self.first : len(self.jobs)]
        return [[*ids(text), *([LETTERS.eop] if self.ends else [])] for text in chosen]

    def done(self) -> np.ndarray:
        return np.array([self.made >= len(text) for text in self._texts()]) | self.stopped

    def stop(self, jobs: np.ndarray) -> None:
        self.stopped |= jobs
        self.lengths = [self.made if stop else length for stop, length in zip(jobs, self.lengths, strict=True)]

    def results(self) -> list[list[Generated]]:
        found = []
        for text, length in zip(self._texts(), self.lengths, strict=True):
            tokens = text[: min(self.made, length)]
            ended = tokens[-1:] == [LETTERS.eop]
            found.append([Generated(tokens, [-0.5] * len(tokens), -0.5 * len(tokens), ended)])
        return found


DECODER: Any = Decoder(
    DecodeConfig(GLMConfig(1, 16, 2, 24, 40, max_length=64), 36),
    meshes.build({"data": 1, "pipeline": 1, "tensor": 1}),
    None,  # pyright: ignore[reportArgumentType] (no weights: Script needs none)
)


def run(
    script: Script, monkeypatch: pytest.MonkeyPatch, texts: list[str], tokenizer: Any = LETTERS, **settings: Any
) -> list[Filled]:
    monkeypatch.setattr(fill, "Generation", script)
    monkeypatch.setattr(fill, "batch_limit", lambda decoder, beams: 32)
    said = settings.pop("say", None)
    watch = settings.pop("watch", None)
    asked = Settings(**{"options": Greedy(), **settings})
    found = dict(fill.fill(DECODER, tokenizer, texts, asked, said, watch))
    return [found[number] for number in range(len(texts))]


def test_blanks_are_filled_by_kind_each_with_a_key_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    script = Script(["x", "y", "z", ""])
    (filled,) = run(script, monkeypatch, ["a[gMASK]b[sMASK]c[MASK]d[MASK]"], max_tokens=7)
    assert filled.text == "abzcxdy"  # x first, y second, z third, then nothing
    assert [one.text for one in filled.fills] == ["", "z", "x", "y"]
    assert [one.finish_reason for one in filled.fills] == ["end"] * 4 and filled.fills[1].tokens == tuple(ids("z"))
    a, b, c, d, x, y, z = ids("abcdxyz")
    tail = [LETTERS.sop]
    assert [job.context.tokens for job in script.jobs] == [
        [a, G, b, S, c, M, d, M, *tail], [a, G, b, S, c, x, d, M, *tail],
        [a, G, b, S, c, x, d, y, LETTERS.eos, *tail], [a, G, b, z, c, x, d, y, LETTERS.eos, *tail],
    ]  # fmt: skip
    assert [job.context.blank for job in script.jobs] == [5, 7, 3, 1]
    assert [job.context.repeats for job in script.jobs] == [True, True, True, False]
    assert {job.request.limit for job in script.jobs} == {7}
    assert script.vocabularies[0] == Vocabulary(40, 36, (LETTERS.eop, LETTERS.eos), (0, M, G, S, LETTERS.sop))
    assert len({tuple(job.request.key) for job in script.jobs}) == 4


def test_a_key_follows_from_seed_text_and_number_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def keys(texts: list[str], seed: int = 1) -> dict[str, set[tuple[int, ...]]]:
        script = Script(["x"] * len(texts))
        run(script, monkeypatch, texts, seed=seed)
        found: dict[str, set[tuple[int, ...]]] = {}
        for job in script.jobs:
            found.setdefault(str(job.context.tokens), set()).add(tuple(int(part) for part in job.request.key))
        return found

    one = keys(["a[MASK]", "bb[MASK]", "a[MASK]"])
    assert one == keys(["a[MASK]", "a[MASK]", "bb[MASK]"])
    assert sorted(map(len, one.values())) == [1, 2]  # equal texts have different keys
    first = keys(["a[MASK]"])
    assert all(first[text] < one[text] for text in first)
    assert not any(first[text] & other for text, other in keys(["a[MASK]"], seed=2).items())


def test_prompts_in_a_batch_go_on_until_each_has_no_blank(monkeypatch: pytest.MonkeyPatch) -> None:
    script = Script(["u", "v", "w", "x"])  # the longest prompt comes first
    found = run(script, monkeypatch, ["[MASK]", "aaa[MASK]bbb[MASK]", "cc[MASK]"])
    assert [one.text for one in found] == ["w", "aaaubbbx", "ccv"]
    assert [len(job.context.tokens) for job in script.jobs] == [9, 4, 2, 9]


def test_a_budget_shrinks_to_what_fits_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    script = Script(["x"] * 4)
    run(script, monkeypatch, ["a[MASK]" + "b" * 49], max_tokens=12, say=said.append)
    run(script, monkeypatch, ["a[MASK]" + "b" * 50], max_tokens=12, say=said.append)
    assert [job.request.limit for job in script.jobs] == [11, 10]  # 51 or 52 tokens, eos, sop
    assert said[0] == "[MASK] gets at most 11 tokens: the prompt has 52, the model's rows hold 64" and len(said) == 2
    assert [run(Script(["x"]), monkeypatch, ["a[MASK]" + "b" * 59], max_tokens=1)[0].fills[0].text] == ["x"]


def test_a_fill_leaves_room_for_later_blanks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once a blank at the end is filled, an eos follows it, which takes one place of the row more."""
    script = Script(["x" * 9, "yy", "z"], ends=False)
    text = "[gMASK]" + "a" * 50 + "[MASK]b[MASK]"  # 55 tokens, with sop
    (filled,) = run(script, monkeypatch, [text], max_tokens=20)
    assert [job.request.limit for job in script.jobs] == [8, 1, 1]
    assert [len(one.tokens) for one in filled.fills] == [1, 8, 1]


def test_blanks_of_a_kind_may_share_one_context(monkeypatch: pytest.MonkeyPatch) -> None:
    script = Script(["xy", "u", "z", "", "v"])
    found = run(script, monkeypatch, ["a[MASK]b[MASK]c[gMASK]", "d[MASK]"], one_context=True, max_tokens=5)
    assert [one.text for one in found] == ["axybzcv", "du"]
    a, b, c, d, x, y, z = ids("abcdxyz")
    whole = [a, M, b, M, c, G, LETTERS.sop]
    assert [job.context for job in script.jobs] == [
        Context(whole, 1, True), Context([d, M, LETTERS.sop], 1, True),
        Context(whole, 3, True, ((1, 3),)), Context([d, M, LETTERS.sop], 1, True, ((1, 2),)),
        Context([a, x, y, b, z, c, G, LETTERS.sop], 6, False),
    ]  # fmt: skip
    assert [job.request.limit for job in script.jobs] == [5, 5, 5, 0, 5]
    assert [job.later for job in script.jobs] == [6, 0, 0, 0, 0]
    assert script.lasts == [[y, ids("u")[0]]]
    assert len({tuple(job.request.key) for job in script.jobs if job.request.limit}) == 4


def test_fills_in_one_context_fit_the_row_together(monkeypatch: pytest.MonkeyPatch) -> None:
    script = Script(["x" * 9, "y" * 9, "z" * 9], ends=False)
    (filled,) = run(script, monkeypatch, ["[MASK]" * 3 + "a" * 50], one_context=True, max_tokens=20)
    # 53 tokens, eos and sop leave 9; each later blank has sop and a token
    assert [job.request.limit for job in script.jobs] == [5, 1, 1]
    assert [len(one.tokens) for one in filled.fills] == [5, 1, 1]
    with pytest.raises(
        UserError, match="^the prompt has 59 tokens and leaves no room for 3 fills in the model's rows of 64"
    ):
        run(script, monkeypatch, ["[MASK]" * 3 + "a" * 55], one_context=True)


@pytest.mark.parametrize("change", [{"options": Beam(count=2)}, {"out_seq_length": 30}])
def test_one_context_is_for_rows_of_their_own(change: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="^one_context and (beams|out_seq_length) do not go together"):
        Settings(**{"options": Greedy(), "one_context": True, **change})


@pytest.mark.parametrize(
    "text, words",
    [
        ("  ", "^the prompt is empty: write some text with a "),
        ("a\ud800[MASK]", "^the prompt is not valid UTF-8: "),
        (
            "a" * 62 + "[MASK]",
            r"^the prompt has 63 tokens and leaves no room for a fill in the model's rows of 64: shor",
        ),
    ],
)
def test_prompts_that_cannot_be_filled(monkeypatch: pytest.MonkeyPatch, text: str, words: str) -> None:
    script = Script(["x"] * 3)
    with pytest.raises(UserError, match=words):
        run(script, monkeypatch, [text])
    with pytest.raises(UserError, match="^text 2: " + words[1:]):
        run(script, monkeypatch, ["a", text])
    assert not script.jobs  # nothing was begun


def test_settings_are_checked() -> None:
    with pytest.raises(UserError, match="^max_tokens is 0: it must be at least 1"):
        Settings(Greedy(), max_tokens=0)
    with pytest.raises(UserError, match="^a stop string is empty"):
        Settings(Greedy(), stop=("a", ""))


def test_a_stop_string_ends_a_fill_and_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fill, "TURNS", 4)
    script = Script(["abcdefghijkl", "uvwxyz"], ends=False)
    first, second = run(script, monkeypatch, ["zz[MASK]", "z[MASK]"], stop=("ef", "fg"), max_tokens=12)
    assert (first.fills[0].text, first.fills[0].finish_reason) == ("abcd", "stop")
    assert first.fills[0].tokens == tuple(ids("abcdef")) and len(first.fills[0].log_probabilities) == 6
    assert (second.fills[0].text, second.fills[0].finish_reason) == ("uvwxyz", "length")
    assert script.turns == [4, 4] and script.stopped.tolist() == [True, False]  # all done after eight tokens


def test_a_watcher_sees_a_fill_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    run(Script(["xyz"]), monkeypatch, ["a[MASK]b"], watch=lambda number, pieces: seen.append(
        "".join(piece.text for piece in pieces)))  # fmt: skip
    assert seen == ["axb", "axyb", "axyzb", "axyzb"]  # the last is the end token


def test_a_family_has_its_prefix_and_suffix_around_a_context(monkeypatch: pytest.MonkeyPatch) -> None:
    """The original GLM's [CLS] context eos; a blank takes the spaces before it; its pad, which is eos, ends a fill."""
    family = copy.copy(LETTERS)
    family.prefix, family.suffix, family.strips_before_blanks, family.pad = (8, 9), (2,), True, family.eos
    script = Script(["x", "y", "z"])
    (filled,) = run(script, monkeypatch, ["the  [MASK]of[gMASK]"], family)
    sop, the, of = [LETTERS.sop], ids("the"), ids("of")
    assert script.jobs[0].context.tokens == [8, 9, *the, M, *of, G, 2, *sop] and script.jobs[0].context.blank == 5
    assert script.jobs[1].context.tokens == [8, 9, *the, *ids("x"), *of, G, 2, *sop]
    assert (
        script.vocabularies[0].ends == (LETTERS.eop, LETTERS.eos) and LETTERS.eos not in script.vocabularies[0].banned
    )
    assert filled.text == "thexofy"
    run(script, monkeypatch, ["the[MASK]of"], family)
    assert script.jobs[2].context.tokens == [8, 9, *the, M, *of, 2, *sop]  # no eos before the suffix


def test_a_prompt_without_a_blank_is_continued(monkeypatch: pytest.MonkeyPatch) -> None:
    script = Script(["xy"])
    (filled,) = run(script, monkeypatch, ["abc"])
    assert filled.text == "abcxy" and script.jobs[0].context == Context([*ids("abc"), G, LETTERS.sop], 3, False)


def test_the_alternatives_are_the_beams_of_the_last_blank(monkeypatch: pytest.MonkeyPatch) -> None:
    class TwoBeams(Script):
        def results(self) -> list[list[Generated]]:
            return [[one, Generated(ids("q"), [-1.0], -2.0, False)] for (one,) in super().results()]

    (filled,) = run(TwoBeams(["x", "y"]), monkeypatch, ["a[MASK]b[MASK]"], options=Beam(count=2))
    assert filled.text == "axby"
    assert [(one.text, one.score) for one in filled.alternatives] == [("axby", -1.0), ("axbq", -2.0)]


# The model itself


@pytest.fixture(scope="module")
def model() -> Model:
    tokenizer = SentencePieceTokenizer(train(TEXTS, 420))
    cfg = GLMConfig(1, 16, 2, 24, -(-tokenizer.size // 16) * 16, max_length=64)
    return Model(cfg, jax.tree.map(lambda array: array * 3, init(cfg, jax.random.key(0))), tokenizer)


def test_one_text_or_many(model: Model) -> None:
    texts = ["the [MASK] array, 分久[MASK]\n  [gMASK]", "the small"]
    first, second = model.fill(texts, max_tokens=4)
    assert [piece.text for piece in first.pieces if piece.fill is None] == ["the ", " array, 分久", "\n  "]
    assert len(first.fills) == 3 and all(1 <= len(one.tokens) <= 4 for one in first.fills)
    assert "MASK" not in first.text and second.text.startswith("the small")
    assert model.fill(texts[0], max_tokens=4).text == first.text


def test_no_special_token_is_generated_and_a_seed_repeats(model: Model) -> None:
    assert model.tokenizer is not None
    specials = {getattr(model.tokenizer, name) for name in ("mask", "gmask", "smask", "sop", "pad", "eop", "eos")}
    texts = ["a [MASK]"] * 8
    found = model.fill(texts, "sample", temperature=5.0, max_tokens=20)
    assert found == model.fill(texts, "sample", temperature=5.0, max_tokens=20)
    assert len({one.text for one in found}) == 8
    assert not specials & {token for one in found for token in one.fills[0].tokens}
    assert model.fill(texts, "sample", temperature=5.0, max_tokens=20, seed=7) != found


def test_examples_show_the_truth_beside_the_fill(model: Model) -> None:
    assert model.tokenizer is not None
    text = "the small array returns a new shape of given type " * 3
    document = np.array([*model.tokenizer.encode(text), model.tokenizer.eos])
    short = np.array([*model.tokenizer.encode("too short"), model.tokenizer.eos])
    (example,) = heldout(model, {"en": [short, document, document]}, count=1)
    assert example.source == "en" and example.text.replace("[MASK]", example.target) in text
    first, second = example.lines("english").split("\n")
    assert first == f"en (english) ...{example.text}..."
    assert second == f"    filled {example.filled!r}, was {example.target!r}"
