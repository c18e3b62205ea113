"""What is to be filled and how, and prompts on their way from blanks to fills."""

from __future__ import annotations

import dataclasses

import numpy as np

from glm_jax.data.tokenizers.protocol import Tokenizer
from glm_jax.errors import UserError
from glm_jax.inference import prompts
from glm_jax.inference.batch import Job
from glm_jax.inference.prompts import Fill, Piece
from glm_jax.inference.strategies import Beam, Generated, Options, Request, row_key


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
        one_context: read the context once for all [MASK], or all [sMASK], of a prompt, as in training: each fill sees
            the earlier ones after the context. Otherwise, as in the released code, each fill is put into the text, and
            the context is read again for the next blank.
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
    one_context: bool = False
    out_seq_length: int | None = None

    def __post_init__(self) -> None:
        if self.one_context and (isinstance(self.options, Beam) or self.out_seq_length is not None):
            other = "beams" if isinstance(self.options, Beam) else "out_seq_length"
            raise UserError(f"one_context and {other} do not go together: leave one of them out")
        if self.max_tokens < 1:
            raise UserError(f"max_tokens is {self.max_tokens}: it must be at least 1")
        if not all(self.stop):
            raise UserError("a stop string is empty: leave it out")

    @property
    def beams(self) -> int:
        """The number of rows of a prompt."""
        return self.options.count if isinstance(self.options, Beam) else 1


class Pending:
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
        return Job(context, self.request(context, self._limit(len(context.tokens), longest)))

    def request(self, context: prompts.Context, limit: int) -> Request:
        """Return the request for a fill of up to `limit` tokens."""
        return Request(context.tokens, limit, self._settings.options, self._key())

    def _limit(self, size: int, longest: int) -> int:
        """Return how many tokens the next fill may have after `size` tokens of context and sop."""
        whole = self._settings.out_seq_length
        if whole is None:
            limit = min(self._settings.max_tokens, longest - size - self.reserved())
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

    def reserved(self) -> int:
        """Return the tokens that a fill leaves free, so that later blanks find room for a token each.

        A token takes the place of its blank. But once a fill ends the prompt, the next context has an eos after it.
        """
        if self._tokenizer.suffix or not self.pieces[-1].blank:
            return 0
        kinds = [self._kinds.index(piece.text) for piece in self.pieces if piece.blank]
        return int(kinds[-1] < max(kinds))  # there are blanks that are filled after the one at the end

    def _key(self) -> np.ndarray:
        """Return a key that follows from seed, text, its number among equal texts, and the blank: uint32 [2]."""
        return row_key(self._settings.seed, self._number, self._rounds, self._text)

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
        if (cut := prompts.find_stop(text, stops)) is None:
            reason = "end" if generated.ended else "length"
            return Fill(text, tokens, tuple(generated.log_probabilities[: len(tokens)]), reason)
        while any(stop in decode(tokens[:-1]) for stop in stops):
            tokens = tokens[:-1]
        return Fill(text[:cut], tokens, tuple(generated.log_probabilities[: len(tokens)]), "stop")

    def accept(self, found: list[Generated]) -> Fill:
        """Fill the next blank with the first sequence, remember the others, and return the fill."""
        if self._settings.beams > 1:
            texts = ("".join(piece.text for piece in self.shown(one)) for one in found)
            self._alternatives = tuple(Alternative(text, one.score) for text, one in zip(texts, found, strict=True))
        fill = self.fill(found[0])
        self.pieces = self.shown(found[0])
        self._rounds += 1
        return fill

    def result(self) -> Filled:
        """Return the prompt with its blanks filled."""
        return Filled(tuple(self.pieces), self._alternatives)


class SharedContext:
    """A prompt whose next kind of blank is filled in one context: the fills stand after it, one behind the other."""

    def __init__(self, prompt: Pending, tokenizer: Tokenizer, settings: Settings, longest: int) -> None:
        """Lay out the row, of at most `longest` tokens.

        Raises:
            UserError: there is no room for a token in each blank.
        """
        assert prompt.place is not None
        kind = prompt.pieces[prompt.place].text
        places = [place for place, piece in enumerate(prompt.pieces) if piece.blank and piece.text == kind]
        self.prompt, self._max_tokens, self._longest = prompt, settings.max_tokens, longest
        self._contexts = [prompts.context(tokenizer, prompt.pieces, place) for place in places]
        self._earlier: list[tuple[int, int]] = []
        self._reserved = prompt.reserved()
        self.last = self._contexts[0].tokens[-1]  # the newest token of the row
        if self._limit() < 1:
            raise UserError(
                f"the prompt has {len(self._contexts[0].tokens) - 1} tokens and leaves no room for {len(places)} fills "
                f"in the model's rows of {longest}: shorten the prompt"
            )

    def _left(self) -> int:
        return len(self._contexts) - len(self._earlier)

    def _limit(self) -> int:
        """Return how many tokens the next fill may have; each later blank needs room for sop and a token."""
        used = len(self._contexts[0].tokens) + sum(width for _, width in self._earlier)
        room = self._longest - used - 2 * (self._left() - 1) - self._reserved
        return min(self._max_tokens, room) if self._left() else 0

    def job(self) -> Job:
        """Return the next blank to fill, with a limit of 0 if none is left."""
        context = self._contexts[min(len(self._earlier), len(self._contexts) - 1)]
        context = context._replace(earlier=tuple(self._earlier))
        limit = self._limit()
        later = min((self._left() - 1) * (1 + self._max_tokens), self._longest - len(context.tokens) - limit)
        return Job(context, self.prompt.request(context, limit), max(later, 0))

    def accept(self, found: list[Generated]) -> None:
        """Fill the next blank."""
        fill = self.prompt.accept(found)
        self._earlier.append((self._contexts[len(self._earlier)].blank, 1 + len(fill.tokens)))
        self.last = fill.tokens[-1] if fill.tokens else self._contexts[0].tokens[-1]
