"""Fill the blanks of many prompts: round after round, until no blank is left."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence

import numpy as np

from glm_jax.data.tokenizers.protocol import Tokenizer
from glm_jax.errors import UserError
from glm_jax.inference import prompts
from glm_jax.inference.batch import Decoder, Generation, batch_limit, generate
from glm_jax.inference.constraints import Vocabulary
from glm_jax.inference.pending import Filled, Pending, Settings, SharedContext
from glm_jax.inference.prompts import Piece

TURNS = 16  # tokens between two looks at what was generated

Watch = Callable[[int, list[Piece]], None]


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
            fill_some = _fill_in_one_context if settings.one_context else _fill_next
            fill_some(decoder, tokenizer, left, settings, watch)
        for number, prompt in together:
            yield number, prompt.result()


def count_repeats(texts: Sequence[Hashable]) -> list[int]:
    """Return how many equal texts come before each."""
    seen = Counter[Hashable]()
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
) -> list[tuple[int, Pending]]:
    """Return the prompts with their numbers, the longest first."""
    entries: list[tuple[int, int, Pending]] = []
    longest = decoder.config.model.max_length
    for number, text in enumerate(texts):
        name = names[number] and f"{names[number]}: "
        try:
            prompt = Pending(tokenizer, settings, text, repeats[number])
            one_context = settings.one_context and SharedContext(prompt, tokenizer, settings, longest)
            job = one_context.job() if one_context else prompt.job(longest)
        except UserError as error:
            raise UserError(f"{name}{error}") from None
        entries.append((len(job.context.tokens), number, prompt))
        if say is not None and settings.out_seq_length is None and job.request.limit < settings.max_tokens:
            blank = prompt.pieces[prompt.place or 0].text
            say(f"{name}{blank} gets at most {job.request.limit} tokens: the prompt has {len(job.context.tokens) - 1}, "
                f"the model's rows hold {longest}")  # fmt: skip
    entries.sort(key=lambda entry: -entry[0])
    return [(number, prompt) for _, number, prompt in entries]


def specials(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the tokens that no fill has: blanks, sop and pad, but those that end it."""
    every = {*prompts.masks(tokenizer).values(), tokenizer.sop, tokenizer.pad}
    return tuple(sorted(every - {tokenizer.eop, tokenizer.eos}))  # a pad may be an eos


def vocabulary(decoder: Decoder, tokenizer: Tokenizer, settings: Settings) -> Vocabulary:
    """Return which tokens fills may have: no masks, except by the rules of the released code."""
    ends = (tokenizer.eop, tokenizer.eos)
    banned = () if settings.out_seq_length is not None else specials(tokenizer)
    width = decoder.config.model.vocab_size
    return Vocabulary(width, min(tokenizer.size, width), tuple(dict.fromkeys(ends)), banned)


def _fill_next(
    decoder: Decoder, tokenizer: Tokenizer, entries: list[tuple[int, Pending]], settings: Settings, watch: Watch | None
) -> None:
    """Fill one blank of each prompt."""
    jobs = [prompt.job(decoder.config.model.max_length) for _, prompt in entries]
    generation = Generation(decoder, jobs, vocabulary(decoder, tokenizer, settings))
    _run(generation, max(job.request.limit for job in jobs), dict(enumerate(entries)), settings, watch)
    for (_, prompt), found in zip(entries, generation.results(), strict=True):
        prompt.accept(found)


def _fill_in_one_context(
    decoder: Decoder, tokenizer: Tokenizer, entries: list[tuple[int, Pending]], settings: Settings, watch: Watch | None
) -> None:
    """Fill all blanks of one kind in each prompt, whose context is read once."""
    longest = decoder.config.model.max_length
    shared = [SharedContext(prompt, tokenizer, settings, longest) for _, prompt in entries]
    jobs = [one.job() for one in shared]
    generation = Generation(decoder, jobs, vocabulary(decoder, tokenizer, settings))
    while True:
        rows = {row: entries[row] for row, job in enumerate(jobs) if job.request.limit}
        _run(generation, max(job.request.limit for job in jobs), rows, settings, watch)
        found = generation.results()
        for row in rows:
            shared[row].accept(found[row])
        jobs = [one.job() for one in shared]
        if not any(job.request.limit for job in jobs):
            return
        generation.follow(jobs, [one.last for one in shared])


def _run(
    generation: Generation, left: int, rows: Mapping[int, tuple[int, Pending]], settings: Settings, watch: Watch | None
) -> None:
    """Generate until all rows are done, for up to `left` tokens.

    Args:
        generation: to run.
        left: the largest limit.
        rows: the numbers and prompts of rows that are not idle.
        settings: for all of them.
        watch: see `fill`.
    """
    looks = settings.beams == 1 and bool(watch or settings.stop)
    look = functools.partial(_look, generation, rows, watch) if looks else None
    generate(generation, left, 1 if watch else TURNS, look)


def _look(
    generation: Generation, rows: Mapping[int, tuple[int, Pending]], watch: Watch | None, ended: np.ndarray
) -> np.ndarray:
    """Show what was generated so far, and return which prompts have a stop string in their fill, bool [jobs]."""
    stopped, found = np.zeros_like(ended), generation.results()
    for row, (number, prompt) in rows.items():
        if watch:
            watch(number, prompt.shown(found[row][0]))
        stopped[row] = not ended[row] and prompt.fill(found[row][0]).finish_reason == "stop"
    return stopped
