"""`glm-jax plan`: its tables and its JSON, from reports that are given; what it refuses; one real compilation."""

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from glm_jax.cli import main
from glm_jax.planning import worker
from glm_jax.planning.buffers import Buffer
from glm_jax.planning.compile import Memory, Report, Request
from glm_jax.planning.hlo import Collective
from tests.patience import HANG

TINY = (
    "--config=quickstart", "--config.model.num_layers=1", "--config.model.hidden_size=16", "--config.model.num_heads=2",
    "--config.model.ffn_size=16", "--config.model.vocab_size=8192", "--config.data.seq_length=32",
    "--config.train.global_batch=2", "--config.train.microbatches=1", "--config.mesh.data=2",
)  # fmt: skip


def given(request: Request) -> Report:
    """Return a report whose peak is 50 GB, or 30 GB with a smaller stash."""
    peak = 30 if request.experiment.pipeline.stash == "stage" else 50
    mesh = request.experiment.mesh.sizes()
    buffers = (Buffer("f16[8,8]", 8_250_000_000, 2, "all_gather", "parallel/zero.py:25", "gather > _gather"),)
    collectives = (
        Collective("all-gather", "tensor", (190, None), 4, 1_500_000),
        Collective("all-reduce", "", (), 1, 4),
    )
    memory = Memory(peak * 10**9, 2 * 10**9, 10**7, (peak - 2) * 10**9)
    return Report(request.target, request.program, mesh, memory, buffers, collectives, None, 2.0, 3.0, 10**9, "0.12")


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """Replace the compiler, and return the requests that it gets."""
    requests = list[Request]()

    def reports(asked: Iterable[Request], processes: int = 1) -> Iterator[Report]:
        for request in asked:
            requests.append(request)
            yield given(request)

    monkeypatch.setattr(worker, "reports", reports)
    return requests


@pytest.mark.usefixtures("compiled")
def test_a_table_that_people_read(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["plan", "--config=glm_130b", "--memory=60GB"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "estimate for 768 x cpu, data=24 x pipeline=8 x tensor=4, 1f1b, stash layer"
    assert lines[1].startswith("parameters 128,697,794,560: ") and lines[6].startswith("idle 3.8% ")
    assert lines[8:10] == [
        "run: 55,014 steps, 450,001,747,968 row tokens",
        "speed: name a device with --target, such as a100-40gb",
    ]
    assert lines[10:] == [
        "step on data=24 x pipeline=8 x tensor=4, compiled for cpu from shapes (jax 0.12); nothing ran",
        "peak 50.00 GB a device: arguments 2.00, outputs 0.01, temporaries 48.00",
        "memory 60.00 GB: fits, 10.000 GB to spare",
        "largest arrays, GB a device each (those that are not needed at the same time share memory):",
        "   2 x  8.250  f16[8,8]                  all_gather, gather > _gather, parallel/zero.py:25",
        "collectives of a device by the trips of their loops (n: known only as it runs); MB if each runs once:",
        "  190 x n      tensor                 all-gather           4         1.500",
        "  once         none                   all-reduce           1         0.000",
        "lowered in 2.0 s, compiled in 3.0 s, 1.00 GB resident",
    ]


def test_what_does_not_fit_comes_with_changes_that_do(
    compiled: list[Request], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(["plan", "--config=glm_130b", "--memory=40GB"]) == 0
    output, errors = capsys.readouterr()
    assert "memory 40.00 GB: does not fit, 10.000 GB too much" in output
    assert output.endswith("with each of these it fits:\n  --config.pipeline.stash=stage: peak 50.00 -> 30.00 GB\n")
    assert "1 of 3: --config.pipeline.stash=stage: 30.00 GB" in errors
    assert len(compiled) == 4 and all(request.memory == 40 * 10**9 for request in compiled)


def test_json_has_everything(compiled: list[Request], capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["plan", "--config=glm_130b", "--memory=40GB", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["compiled"][0]["verdict"] == {"fits": False, "memory": 40 * 10**9, "margin": -(10**10)}
    assert said["compiled"][0]["collectives"][0]["loops"] == [190, None]
    (remedy,) = said["remedies"]
    assert remedy["changes"] == {"pipeline.stash": "stage"} and remedy["report"]["memory"]["peak"] == 30 * 10**9
    assert len(compiled) == 4


def test_inference_is_prefill_and_decoding(compiled: list[Request], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--inference=int4", "--rows=2", "--group=0", "--memory=40GB"]
    assert main.main(["plan", "--config=glm_130b", *arguments]) == 0
    assert [request.program for request in compiled] == ["prefill", "decode"]
    assert compiled[0].inference == compiled[1].inference
    assert vars(compiled[0].inference) == {"weights": "int4", "room": 2048, "rows": 2, "group": 0}
    assert "with each" not in capsys.readouterr().out  # the changes are those of training


def test_inference_is_estimated_without_a_compiler(compiled: list[Request], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", *TINY, "--target=rtx3090", "--memory=24GB", "--inference=int8", "--rows=3", "--nocompile"]
    assert main.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        "estimate of generation on 2 x rtx3090, data=2 x pipeline=1 x tensor=1, weights int8, 6 rows of 32 tokens"
    )
    assert lines[1].startswith("memory 0.00 GB a device: weights 0.00, ") and lines[2].startswith("memory 24.00 GB: fi")
    assert lines[3].startswith("if nothing overlaps: contexts in ") and len(lines) == 5
    assert main.main([*arguments, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)["estimate"]
    assert said["rows"] == 6 and said["fastest"]["tokens_per_second"] > said["slowest"]["tokens_per_second"]
    assert compiled == []


def test_what_fits_is_compiled_until_it_does(compiled: list[Request], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", *TINY, "--inference=any"]
    assert main.main([*arguments, "--memory=60GB"]) == 0
    output = capsys.readouterr().out.splitlines()
    assert output[0].startswith("estimate of generation on cpu, 60.00 GB a device; rows of 32 tokens, 1 for each")
    kinds = ("float32", "float16", "int8", "int4")
    assert [line.split()[:5] for line in output[2:10]] == [
        [kind, count, "1", count, "0.00"] for kind in kinds for count in ("1", "2")
    ]
    flags = "--inference float32 --config.mesh.data=1 --config.mesh.pipeline=1 --config.mesh.tensor=1"
    assert output[11] == f"  float32 on 1 device: {flags}"
    assert [request.program for request in compiled] == ["prefill", "decode"]
    compiled.clear()
    assert main.main([*arguments, "--memory=40GB", "--json"]) == 0  # the compiler says 50
    output, errors = capsys.readouterr()
    said = json.loads(output)
    assert errors.count("it does not fit as compiled") == 4 and len(said["compiled"]) == len(compiled) == 8
    assert [row["best"] for row in said["choices"]] == [True, False] * 4


def test_a_slice_of_tpus_says_how_many_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", *TINY, "--target=v5e:1x2", "--inference=any", "--nocompile"]
    assert main.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:4] for line in lines[2:6]] == [
        [kind, "2", "1", "2"] for kind in ("float32", "bfloat16", "int8", "int4")
    ]
    assert main.main([*arguments, "--memory=0.01MB"]) == 0
    assert "nothing fits on 2 devices or fewer: " in capsys.readouterr().out


def test_an_estimate_alone_says_whether_it_fits(capsys: pytest.CaptureFixture[str]) -> None:
    for memory, word in (("60GB", "fits, "), ("1MB", "does not fit, ")):
        assert main.main(["plan", *TINY, f"--memory={memory}", "--nocompile"]) == 0
        assert f" GB: {word}" in capsys.readouterr().out.splitlines()[-1]


def test_a_search_says_that_no_mesh_divides_the_batch(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["plan", *TINY, "--search", "--devices=7", "--target=a100-40gb", "--nocompile"]) == 0
    says = "no mesh of 7 devices divides the model and the batch: try another number of --devices\n"
    assert capsys.readouterr().out == says


def test_an_estimate_alone_needs_no_compiler(compiled: list[Request], capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["plan", "--config=glm_130b", "--target=a100-40gb", "--nocompile", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert compiled == [] and said["parameters"] == 128_697_794_560
    slowest, fastest = (said["estimate"][name]["step_seconds"] for name in ("slowest", "fastest"))
    assert fastest < 88.5 < slowest < 2 * fastest  # the training log's seconds a step
    assert main.main(["plan", "--config=glm_130b", "--target=v5p", "--nocompile"]) == 0
    assert "if everything does:" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, says",
    [
        (
            ["--inference=any", "--nocompile"],
            "--inference any asks what fits: give --memory, such as 24GB, or a --target",
        ),
        (
            ["--inference=any", "--target=v5e:large", "--nocompile"],
            "--target v5e:large: TPUs are named with their slice, such as v5e:2x2 or v5e:2x2x1",
        ),
        (
            ["--search", "--devices=8", "--target=v5e:4x4", "--nocompile"],
            "--target v5e:4x4 has 16 devices, not 8: change --devices or the slice",
        ),
        (["--target=a100"], "no device is named 'a100': there are a100-40gb, "),
        (["--memory=40"], "--memory 40: write bytes a device with their unit, such as 40GB"),
        (["--rows=2"], "--rows is for --inference: add it, or leave --rows out"),
        (["--inference=float16", "--group=64"], "--group is for --inference int8, int4 or any, not float16"),
        (["--sheet=/nowhere.toml", "--target=mine"], "/nowhere.toml: cannot be read"),
        (["--search"], "--search needs to know how many devices there are: add --devices, such as --devices 768"),
        (["--top=2"], "--top is for --search: add it, or leave --top out"),
        (["--search", "--devices=8"], "--search ranks by the speed of a device, and that of this CPU is not known"),
        (["--config.mesh.data=-1"], "mesh.data is -1, the rest of the devices, but a plan has none: give a number"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["plan", "--config=glm_130b", *arguments]) == 2
    output, errors = capsys.readouterr()
    assert output == "" and errors.startswith(f"error: {says}") and errors.count("\n") == 1


@pytest.mark.slow
def test_a_small_step_is_compiled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["plan", *TINY, "--memory=1GB", f"--config.data.cache={tmp_path}", "--json"]) == 0
    (report,) = json.loads(capsys.readouterr().out)["compiled"]
    assert report["mesh"] == {"data": 2, "pipeline": 1, "tensor": 1} and report["verdict"]["fits"]
    params = 8192 * 16 + 4 * 16 * 16 + 3 * 16 * 16  # embedding and kernels; AdamW keeps two moments of each
    assert 3 * 4 * params / 2 < report["memory"]["arguments"] < 1.1 * 3 * 4 * params / 2


SEARCHED = (*TINY, "--config.model.num_layers=2", "--config.model.num_heads=1", "--search", "--devices=4")
SHEET = """[cpu]
kinds = ["cpu"]
peak = 1e12
memory = 8_000_000_000
bandwidth = 5e10
link = 1e10
source = "a test"
"""


@pytest.mark.slow
def test_a_search_compiles_what_it_ranks(tmp_path: Path) -> None:
    (tmp_path / "sheet.toml").write_text(SHEET)
    more = ["--top=1", f"--sheet={tmp_path / 'sheet.toml'}", f"--config.data.cache={tmp_path}"]
    command = [sys.executable, "-m", "glm_jax", "plan", *SEARCHED, "--config.train.global_batch=4", *more]
    own = ["--config.mesh.pipeline=2", "--config.train.microbatches=2"]  # beside mesh.data=2
    done = subprocess.run([*command, *own], capture_output=True, text=True, timeout=HANG, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert lines[0] == "24 ways to run it on 4 x cpu with 8.00 GB each; of these"
    assert "      16 are ranked" in lines and re.search(r"^the config's own ranks \d+ of 16: ", done.stdout, re.M)
    rows = [line for line in lines if line.endswith(("fits", "fits, the config's own"))]
    assert len(rows) == 2 and rows[0].split()[0] == "1" and rows[1].endswith("own")
    for row in rows:
        products, sent = (float(ratio) for ratio in re.findall(r"= (\d\.\d+)", row)[1:])
        assert products == pytest.approx(1, abs=0.01) and sent == pytest.approx(1, abs=0.1)
    assert lines[-1].startswith("the first that fits: --config.mesh.data=")


def test_a_search_without_compiling_is_json(
    compiled: list[Request], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 1)  # no other processes, which take seconds to start
    arguments = [*SEARCHED, "--target=a100-40gb", "--nocompile", "--json", "--config.mesh.data=4", "--devices=1"]
    arguments.append("--config.train.global_batch=1")
    assert main.main(["plan", *arguments]) == 0
    said = json.loads(capsys.readouterr().out)["search"]
    assert compiled == [] and said["compared"] == [] and said["own"] is said["place"] is None  # it has 4 devices
    assert said["considered"] == len(said["choices"]) + sum(said["left_out"].values())
    assert said["choices"][0]["changes"]["mesh.data"] == 1 and said["choices"][0]["estimate"]["devices"] == 1
