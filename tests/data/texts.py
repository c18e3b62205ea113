"""English and code-like documents that are the same on every Python."""

import random
from pathlib import Path

ENGLISH = tuple(Path(__file__).with_name("english.txt").read_text("utf-8").rstrip("\n").split("\n%\n"))
WORDS = [
    "return",
    "array",
    "shape",
    "type",
    "value",
    "index",
    "axis",
    "scalar",
    "matrix",
    "vector",
    "norm",
    "mean",
    "sum",
    "product",
    "input",
    "output",
]
CHARACTERS = "天下大势分久必合周末七国争并入于秦及灭之后楚汉又自高祖斩白蛇而起义一统"


def english(seed: int, words: int = 40) -> str:
    draw = random.Random(seed)
    return " ".join(draw.choice(WORDS) for _ in range(words)) + "."


def chinese(seed: int, characters: int = 120) -> str:
    draw = random.Random(seed)
    return "".join(draw.choice(CHARACTERS) for _ in range(characters)) + "。"
