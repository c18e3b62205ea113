"""Fill the blanks of many prompts: round after round, until no blank is left."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from glm_jax.data.tokenizers.protocol import Tokenizer
from glm_jax.errors import UserError
from glm_jax.inference import prompts
from glm_jax.inference.batch import Decoder, Generation, Job, batch_limit
from glm_jax.inference.constraints import Vocabulary
from glm_jax.inference.prompts import Fill, Piece
from glm_jax.inference.strategies import Beam, Generated, Options, Request

TURNS = 16  # tokens between two looks at what was generated

Watch = Callable[[int, list[Piece]], None]


@dataclasses.dataclass(frozen=True)
class Alternative:
    """The text with one of the beams of its last blank."""

    text: str
    score: float


@dataclasses.dataclass(frozen=True)
class Filled:
    """A prompt with its blanks filled.

    Attributes:
        pieces: its text and its fills, in order.
        alternatives: with beam search, all beams of the blank that was filled last, best first.
    """

    pieces: tuple[Piece, ...]
    alternatives: tuple[Alternative, ...] = ()

    @property
    def text(self) -> str:
        """The whole text."""
        return "".join(piece.text for piece in self.pieces)

    @property
    def fills(self) -> tuple[Fill, ...]:
        """What the blanks were filled with, in the order of the text."""
        return tuple(piece.fill for piece in self.pieces if piece.fill is not None)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What holds for every blank of every prompt.

    Attributes:
        options: how tokens are chosen.
        max_tokens: the largest number of tokens in a fill; fewer if the model's longest row has no room for them.
        seed: of whatever is drawn.
        stop: strings that end a fill, which are left out of its text.
        out_seq_length: if given, do as the released generate.py does with its option of this name. Context, sop and
            fill together have so many tokens (a later round that finds no room gets one token), only the context must
            fit the model's rows, only one kind of blank is filled, and a mask that the model makes is one more blank.

    Raises:
        UserError: a value is out of range.
    """

    options: Options
    max_tokens: int = 64
    seed: int = 1234
    stop: tuple[str, ...] = ()
    out_seq_length: int | None = None

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise UserError(f"max_tokens is {self.max_tokens}: it must be at least 1")
        if not all(self.stop):
            raise UserError("a stop string is empty: leave it out")

    @property
    def beams(self) -> int:
        """The number of rows of a prompt."""
        return self.options.count if isinstance(self.options, Beam) else 1


class _Prompt:
    """A prompt on its way."""

    def __init__(self, tokenizer: Tokenizer, settings: Settings, text: str, number: int) -> None:
        """Split the text; `number` counts equal texts."""
        self._tokenizer, self._settings, self._text, self._number = tokenizer, settings, text, number
        self.pieces = prompts.parse(tokenizer, text)
        self._kinds = prompts.KINDS if settings.out_seq_length is None else prompts.first_kind(self.pieces)
        self._alternatives: tuple[Alternative, ...] = ()
        self._rounds = 0

    @property
    def place(self) -> int | None:
        """The index of the piece that is filled next, or None."""
        return prompts.next_blank(self.pieces, self._kinds)

    def job(self, longest: int) -> Job:
        """Return the next blank to fill.

        Args:
            longest: tokens of the model's rows.

        Raises:
            UserError: there is no room for a fill.
        """
        assert self.place is not None
        context = prompts.context(self._tokenizer, self.pieces, self.place)
        limit = self._limit(len(context.tokens), longest)
        return Job(context, Request(context.tokens, limit, self._settings.options, self._key()))

    def _limit(self, size: int, longest: int) -> int:
        """Return how many tokens the next fill may have after `size` tokens of context and sop."""
        whole = self._settings.out_seq_length
        if whole is None:
            limit = min(self._settings.max_tokens, longest - size - self._reserved())
            rows = f"the model's rows of {longest}"
        else:
            limit, rows = max(whole - size, 1 if self._rounds else 0), f"an out_seq_length of {whole}"
            if size - 1 > longest:
                limit, rows = 0, f"the model's rows of {longest}"
        if limit < 1:
            raise UserError(
                f"the prompt has {size - 1} tokens and leaves no room for a fill in {rows}: shorten the prompt"
            )
        return limit

    def _reserved(self) -> int:
        """Return the tokens that a fill leaves free, so that later blanks find room for a token each.

        A token takes the place of its blank. But once a fill ends the prompt, the next context has an eos after it.
        """
        if self._tokenizer.suffix or not self.pieces[-1].blank:
            return 0
        kinds = [self._kinds.index(piece.text) for piece in self.pieces if piece.blank]
        return int(kinds[-1] < max(kinds))  # there are blanks that are filled after the one at the end

    def _key(self) -> np.ndarray:
        """Return a key that follows from seed, text, its number among equal texts, and the blank: uint32 [2]."""
        what = f"{self._settings.seed} {self._number} {self._rounds} {self._text}"
        return np.frombuffer(hashlib.sha256(what.encode()).digest()[:8], "<u4")

    def shown(self, generated: Generated) -> list[Piece]:
        """Return the pieces with what was generated for the next blank so far."""
        assert self.place is not None
        fill = self.fill(generated)
        if self._settings.out_seq_length is None:
            new = [Piece(fill.text, fill.tokens, fill=fill)]
        else:
            new = prompts.refill(self._tokenizer, fill)
        return [*self.pieces[: self.place], *new, *self.pieces[self.place + 1 :]]

    def fill(self, generated: Generated) -> Fill:
        """Return what was generated as a fill, without its end token or stop string."""
        tokens, decode = tuple(generated.tokens[: len(generated.tokens) - generated.ended]), self._tokenizer.decode
        text, stops = decode(tokens), self._settings.stop
        cuts = [text.find(stop) for stop in stops if stop in text]
        if not cuts:
            reason = "end" if generated.ended else "length"
            return Fill(text, tokens, tuple(generated.log_probabilities[: len(tokens)]), reason)
        while any(stop in decode(tokens[:-1]) for stop in stops):
            tokens = tokens[:-1]
        return Fill(text[: min(cuts)], tokens, tuple(generated.log_probabilities[: len(tokens)]), "stop")

    def accept(self, found: list[Generated]) -> None:
        """Fill the next blank with the first sequence, and remember the others."""
        if self._settings.beams > 1:
            texts = ("".join(piece.text for piece in self.shown(one)) for one in found)
            self._alternatives = tuple(Alternative(text, one.score) for text, one in zip(texts, found, strict=True))
        self.pieces = self.shown(found[0])
        self._rounds += 1

    def result(self) -> Filled:
        """Return the prompt with its blanks filled."""
        return Filled(tuple(self.pieces), self._alternatives)


def fill(
    decoder: Decoder,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    settings: Settings,
    say: Callable[[str], None] | None = None,
    watch: Watch | None = None,
    *,
    repeats: Sequence[int] | None = None,
    names: Sequence[str] | None = None,
) -> Iterator[tuple[int, Filled]]:
    """Fill every blank of every text; each fill is context for the next.

    Args:
        decoder: the model.
        tokenizer: of the model.
        texts: prompts.
        settings: for all of them.
        say: called with one line if a fill may have fewer than `max_tokens` tokens.
        watch: called with a text's number and its pieces after each token; not with beams.
        repeats: of each text, how many equal ones come before it; None to count those in `texts`. For texts that are
            a part of a longer list, so that they draw what they would draw in the whole.
        names: what messages call the texts.

    Yields:
        The number of a text and its result, the longest first. All texts are checked before the first is filled.

    Raises:
        UserError: a text is empty or not valid UTF-8, or leaves no room in the model's longest row; or the logits are
            not finite (`NotFinite`).
    """
    if repeats is None:
        repeats = count_repeats(texts)
    if names is None:
        names = [f"text {number + 1}" for number in range(len(texts))] if len(texts) > 1 else [""] * len(texts)
    entries = _check(decoder, tokenizer, texts, settings, say, repeats, names)
    width = batch_limit(decoder, settings.beams)
    for first in range(0, len(entries), width):
        together = entries[first : first + width]
        while left := [entry for entry in together if entry[1].place is not None]:
            _fill_next(decoder, tokenizer, left, settings, watch)
        for number, prompt in together:
            yield number, prompt.result()


def count_repeats(texts: Sequence[str]) -> list[int]:
    """Return how many equal texts come before each."""
    seen: Counter[str] = Counter()
    repeats = list[int]()
    for text in texts:
        repeats.append(seen[text])
        seen[text] += 1
    return repeats


def _check(
    decoder: Decoder,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    settings: Settings,
    say: Callable[[str], None] | None,
    repeats: Sequence[int],
    names: Sequence[str],
) -> list[tuple[int, _Prompt]]:
    """Return the prompts with their numbers, the longest first."""
    entries: list[tuple[int, int, _Prompt]] = []
    longest = decoder.config.model.max_length
    for number, text in enumerate(texts):
        name = names[number] and f"{names[number]}: "
        try:
            prompt = _Prompt(tokenizer, settings, text, repeats[number])
            context, request = prompt.job(longest)
        except UserError as error:
            raise UserError(f"{name}{error}") from None
        entries.append((len(context.tokens), number, prompt))
        if say is not None and settings.out_seq_length is None and request.limit < settings.max_tokens:
            blank = prompt.pieces[prompt.place or 0].text
            say(f"{name}{blank} gets at most {request.limit} tokens: the prompt has {len(context.tokens) - 1}, "
                f"the model's rows hold {longest}")  # fmt: skip
    entries.sort(key=lambda entry: -entry[0])
    return [(number, prompt) for _, number, prompt in entries]


def vocabulary(decoder: Decoder, tokenizer: Tokenizer, settings: Settings) -> Vocabulary:
    """Return which tokens fills may have: no masks, except by the rules of the released code."""
    ends = (tokenizer.eop, tokenizer.eos)
    specials = {*prompts.masks(tokenizer).values(), tokenizer.sop, tokenizer.pad} - {*ends}  # a pad may be an eos
    banned = () if settings.out_seq_length is not None else tuple(sorted(specials))
    width = decoder.config.model.vocab_size
    return Vocabulary(width, min(tokenizer.size, width), tuple(dict.fromkeys(ends)), banned)


def _fill_next(
    decoder: Decoder, tokenizer: Tokenizer, entries: list[tuple[int, _Prompt]], settings: Settings, watch: Watch | None
) -> None:
    """Fill one blank of each prompt."""
    jobs = [prompt.job(decoder.config.model.max_length) for _, prompt in entries]
    generation = Generation(decoder, jobs, vocabulary(decoder, tokenizer, settings))
    left, done = max(job.request.limit for job in jobs), False
    while left > 0 and not done:
        turns = min(left, 1 if watch else TURNS)
        generation.advance(turns)
        left -= turns
        ended = generation.done()
        if settings.beams == 1 and (watch or settings.stop):
            ended = ended | _look(generation, entries, ended, watch)  # what comes from a device is read-only
        done = bool(ended.all())
    for (_, prompt), found in zip(entries, generation.results(), strict=True):
        prompt.accept(found)


def _look(
    generation: Generation, entries: list[tuple[int, _Prompt]], ended: np.ndarray, watch: Watch | None
) -> np.ndarray:
    """Show what was generated so far, and stop prompts with a stop string in their fill; return which, bool [jobs]."""
    stopped = np.zeros_like(ended)
    for row, (found, (number, prompt)) in enumerate(zip(generation.results(), entries, strict=True)):
        if watch:
            watch(number, prompt.shown(found[0]))
        stopped[row] = not ended[row] and prompt.fill(found[0]).finish_reason == "stop"
    if stopped.any():
        generation.stop(stopped)
    return stopped
