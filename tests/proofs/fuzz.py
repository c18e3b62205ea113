"""Feed every parser mutated input and show that each is read or refused in one line, in time and in bounded memory.

    pip install atheris && python tests/proofs/fuzz.py --seconds 600

Each parser runs in a process of its own under atheris (libFuzzer, guided by coverage), from seeds that it reads. An
exception other than UserError, more than 5 s for one input, or 500 MB more than the process had at its start end the
proof; the input then lies in the folder that is named. A parser that is added to the project is added to TARGETS.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
GOLDEN = ROOT / "tests/goldens/glm130b/ckpt_tp1/1000/mp_rank_00_model_states.pt"
MEMORY = 500  # MB
TIMEOUT = 5  # seconds for one input

Read = Callable[[bytes], object]
Target = tuple[Read, list[bytes]]  # what reads an input, and seeds


def scratch() -> Path:
    """Make a folder in memory for the files of a target, which is emptied by whoever uses it."""
    return Path(tempfile.mkdtemp(prefix="glm_jax_fuzz_", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))


def archive() -> Target:
    """A torch file as a whole."""
    from glm_jax.interop.torch_archive import read_archive

    file = scratch() / "a.pt"

    def read(data: bytes) -> object:
        file.write_bytes(data)
        return read_archive(file)

    return read, [GOLDEN.read_bytes()[:4096], GOLDEN.read_bytes()[-4096:], small_archive(b"\x80\x02}.")]


def small_archive(index: bytes) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        file.writestr("a/data.pkl", index)
        file.writestr("a/data/0", bytes(64))
    return content.getvalue()


def pickles() -> Target:
    """The pickle in a torch file."""
    from glm_jax.interop.torch_archive import read_archive

    file = scratch() / "a.pt"
    with zipfile.ZipFile(GOLDEN) as golden:
        seed = golden.read(next(name for name in golden.namelist() if name.endswith("data.pkl")))

    def read(data: bytes) -> object:
        file.write_bytes(small_archive(data))
        return read_archive(file)

    return read, [seed, seed[:600] + b".", b"\x80\x02}q\x00X\x01\x00\x00\x00aq\x01]q\x02(K\x01\x88e\x85s."]


def json_arrays() -> Target:
    """A file of one JSON array."""
    return corpus_file("json", [b'[{"text": "a"}, {"text": ["b", {"c": 1}]}\n, {"text": "\\u4e2d"}]', b"[[[]]]"])


def jsonl() -> Target:
    """A file of JSON lines."""
    return corpus_file("jsonl", [b'{"text": "a"}\n\n{"text": "b\\n"}\r\n'])


def zstandard_files() -> Target:
    """A compressed file of JSON lines."""
    import zstandard

    line = b'{"text": "a"}\n'
    return corpus_file("jsonl.zst", [zstandard.compress(line * count) for count in (1, 3, 200)])


def compressed_texts() -> Target:
    """A file of text that may be compressed."""
    import bz2
    import gzip
    import lzma

    text = "one\n\u3000\ntwo\r\rthree\n".encode()
    return corpus_file("text", [text, gzip.compress(text), bz2.compress(text), lzma.compress(text)])


def parquet_files() -> Target:
    """A parquet file."""
    import pyarrow
    from pyarrow import parquet

    seeds = []
    for column in (["a", "b"], ["中文" * 20] * 40):
        content = io.BytesIO()
        parquet.write_table(pyarrow.table({"text": column}), content)
        seeds.append(content.getvalue())
    return corpus_file("parquet", seeds)


def corpus_file(form: str, seeds: list[bytes]) -> Target:
    from glm_jax.data.corpora.readers import read

    file = scratch() / f"a.{form}"

    def read_all(data: bytes) -> object:
        file.write_bytes(data)
        return sum(1 for _ in read(file, form, "text"))

    return read_all, seeds


def templates() -> Target:
    """A prompt template, rendered on one record.

    The sandbox's process answers first, within its limits. Only what it survives is rendered again in this process,
    where the coverage of our code and of Jinja's guides the fuzzing.
    """
    from glm_jax.data.instructions import render, sandbox

    render.SECONDS, render.MEMORY = 0.3, 256_000_000  # far below this process's own limits, where it is slower
    record = {"text": "a b c", "label": 1, "choices": ["x", "y"], "none": None}

    def read(data: bytes) -> object:
        template = data.decode("utf-8", "replace")
        ((_, answer),) = render.answers([(None, render.Render("t", template, "no ||| yes", record))])
        if isinstance(answer, render.Refused):
            assert "\n" not in answer.message, answer
            if answer.reason == render.OVER_BUDGET:
                return answer
        return sandbox.run((template, "no ||| yes", record, 0))

    return read, [
        b"{{text}} is it? ||| {{answer_choices[label]}}",
        b"{% for c in choices %}{{loop.index}}: {{c|upper}}{% endfor %} ||| {{choices | choice}}",
        b"{% if label > 0 %}{{ text.split() | join(', ') }}{% endif %} ||| {{ 'a' * 3 }}",
        b"{{ [1, 2] | most_frequent }}{% set x = zip(choices, choices) | list %}{{x}} ||| {{ range(3) | list }}",
    ]


def template_files() -> Target:
    """A PromptSource file."""
    from glm_jax.data.instructions.templates import read_templates

    file = scratch() / "templates.yaml"

    def read(data: bytes) -> object:
        file.write_bytes(data)
        return read_templates(file)

    return read, [
        b"dataset: a\ntemplates:\n  1: !Template\n    name: n\n    jinja: '{{a}} ||| b'\n    answer_choices: null\n",
        b"templates: &a\n  x: {name: n, jinja: t, answer_choices: y ||| z}\n  y: *a\n",
    ]


def overrides() -> Target:
    """The flags that set keys of the config, one a line."""
    from glm_jax.cli import common

    def read(data: bytes) -> object:
        # another experiment file would be run, as it is meant to be
        lines = [f"--config.{line}" for line in data.decode("utf-8", "replace").split("\n")]
        arguments = ["--config=quickstart", *lines]
        values = common.flag_values("train", "")
        common.define_config(values)
        with contextlib.redirect_stdout(io.StringIO()):
            return common.parse(values, arguments, []) and common.load(values)

    return read, [
        b"model.num_layers=3\noptimizer.peak_lr=1e-3",
        b"data.sources.mine.path=x\ndata.sources.mine.weight=2",
        b"model.norm=pre\ntrain.precision=float32\nmesh.data=2",
        b"data.blanks.short_mean=3.0\noptimizer.betas=(0.9, 0.95)",
    ]


def tokenizers() -> Target:
    """A SentencePiece model."""
    from glm_jax.data.tokenizers import load, sentencepiece

    file = scratch() / "tokenizer.model"

    def read(data: bytes) -> object:
        file.write_bytes(data)
        tokenizer = load.load(file)
        return tokenizer.decode(tokenizer.encode("a 中 b"))

    texts = ["the quick brown fox jumps over the lazy dog " * 3, "天下大势 分久必合 合久必分"]
    return read, [sentencepiece.train(texts, 300)]


def checkpoints() -> Target:
    """The metadata of a checkpoint: two files, the second after a line of dashes."""
    from glm_jax.workdir.checkpoint_format import open_params

    folder = scratch()
    metadata = {"tree_metadata": {"('a',)": {"key_metadata": [{"key": "a", "key_type": 2}], "value_metadata": {}}}}
    array = {"chunks": [2], "compressor": None, "dtype": "<f4", "fill_value": None, "filters": None, "order": "C",
             "shape": [2], "zarr_format": 2}  # fmt: skip

    def read(data: bytes) -> object:
        shutil.rmtree(folder)
        (folder / "7/params/a").mkdir(parents=True)
        first, _, second = data.partition(b"----\n")
        (folder / "7/params/_METADATA").write_bytes(first)
        (folder / "7/params/a/.zarray").write_bytes(second)
        return open_params(folder / "7")

    return read, [json.dumps(metadata).encode() + b"----\n" + json.dumps(array).encode()]


def safetensors_files() -> Target:
    """A file of safetensors."""
    from glm_jax.interop.safetensors_file import read_safetensors

    file = scratch() / "a.safetensors"

    def read(data: bytes) -> object:
        file.write_bytes(data)
        return read_safetensors(file)

    header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    return read, [len(header).to_bytes(8, "little") + header + bytes(8)]


def huggingface_folders() -> Target:
    """The JSON of a Hugging Face folder: config.json and the index, the second after a line of dashes."""
    from glm_jax.interop import huggingface

    golden = ROOT / "tests/goldens/hf_glm/sharded"
    folder = scratch() / "folder"
    shutil.copytree(golden, folder)
    files = ("config.json", "pytorch_model.bin.index.json")

    def read(data: bytes) -> object:
        for name, part in zip(files, data.partition(b"----\n")[::2], strict=True):
            (folder / name).write_bytes(part)
        return huggingface.open_parameters(folder, huggingface.config(folder))

    return read, [b"----\n".join((golden / name).read_bytes() for name in files)]


TARGETS: dict[str, Callable[[], Target]] = {
    make.__name__: make
    for make in (archive, pickles, json_arrays, jsonl, zstandard_files, compressed_texts, parquet_files, templates,
                 template_files, overrides, tokenizers, checkpoints, safetensors_files, huggingface_folders)
}  # fmt: skip


def fuzz(name: str, corpus: Path, seconds: int) -> None:
    """Fuzz one target in this process; libFuzzer ends it."""
    atheris = importlib.import_module("atheris")  # of no other use to the project

    with atheris.instrument_imports(include=["glm_jax", "jinja2"]):
        read, seeds = TARGETS[name]()
        from glm_jax.errors import UserError

    for number, seed in enumerate(seeds):
        (corpus / f"seed-{number}").write_bytes(seed)

    def one(data: bytes) -> None:
        try:
            read(data)
        except UserError as error:
            assert "\n" not in str(error), error

    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    options = [f"-max_total_time={seconds}", f"-timeout={TIMEOUT}", f"-rss_limit_mb={base + MEMORY}", "-max_len=8192"]
    atheris.Setup([sys.argv[0], *options, f"-artifact_prefix={corpus}/", str(corpus)], one)
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", help=f"of {', '.join(TARGETS)}; all by default")
    parser.add_argument("--seconds", type=int, default=600, help="for each")
    parser.add_argument("--inside", help=argparse.SUPPRESS)  # the folder of inputs, in the process of one target
    arguments = parser.parse_args()
    if arguments.inside:
        return fuzz(arguments.targets[0], Path(arguments.inside), arguments.seconds)
    for name in arguments.targets or TARGETS:
        corpus, started = Path(tempfile.mkdtemp(prefix=f"fuzz-{name}-")), time.monotonic()
        command = [sys.executable, "-W", "ignore", __file__, name, "--seconds", str(arguments.seconds)]
        done = subprocess.run([*command, "--inside", str(corpus)], capture_output=True, text=True, errors="replace")
        counts = re.findall(r"#(\d+)\s", done.stderr)
        print(f"{name}: {int(counts[-1]) if counts else 0:,} inputs in {time.monotonic() - started:.0f} s", flush=True)
        if done.returncode:
            print(done.stderr[-4000:], file=sys.stderr)
            sys.exit(f"{name} failed: the input is in {corpus}")
        shutil.rmtree(corpus)


if __name__ == "__main__":
    main()
