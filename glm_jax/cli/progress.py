"""How far a long command is, and the wish to stop it."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

from glm_jax.cli import common
from glm_jax.parallel import processes

PAUSE = 30  # seconds between two lines of progress, without a terminal
BAR = "{n_fmt}/{total_fmt} {bar} {remaining}{postfix}"


class Request:
    """A request to stop, made by calling it."""

    made = False

    def __call__(self) -> None:
        self.made = True


class Progress:
    """How far a command is: a bar on a terminal, else a line now and then."""

    def __init__(self, total: int, done: int, *, shown: bool, what: str = "prompts") -> None:
        """Begin with `done` of `total` prompts, or whatever is counted."""
        self._what = what
        self._shown, self._total, self._first, self._done, self._tokens = shown, total, done, done, 0
        self._started = self._told = time.monotonic()
        self._bar = tqdm(
            total=total,
            initial=done,
            bar_format=BAR,
            dynamic_ncols=True,
            file=sys.stderr,
            disable=None if shown else True,  # None: a bar on a terminal alone
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def say(self, line: str) -> None:
        """Print a line, above the bar if there is one."""
        if processes.is_first():
            self._bar.clear()
            common.say(line)

    def add(self, prompts: int, tokens: int) -> None:
        """Count prompts that are filled, and the tokens of their fills."""
        now = time.monotonic()
        self._tokens += tokens
        self._done += prompts
        speed = f"{self._tokens / max(now - self._started, 1e-9):,.0f} tok/s"
        self._bar.set_postfix_str(speed, refresh=False)
        self._bar.update(prompts)
        if self._shown and self._bar.disable and now - self._told >= PAUSE:
            self._told = now
            left = (now - self._started) / (self._done - self._first) * (self._total - self._done)
            clock = time.strftime("%H:%M:%S")
            self.say(f"{clock} {self._done}/{self._total} {self._what}, {speed}, {tqdm.format_interval(left)} left")
