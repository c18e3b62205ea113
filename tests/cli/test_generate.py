"""`glm-jax generate` of one prompt: what the flags ask for, what reaches standard output, and what is refused."""

import json
import re

import pytest

from glm_jax.cli import main
from glm_jax.cli.generate_flags import OPTIONS, TOP_P, define
from glm_jax.config.fields import definitions
from glm_jax.errors import UserError
from glm_jax.inference import Model
from glm_jax.inference.pending import Settings
from glm_jax.inference.strategies import KINDS, Beam, Greedy, Sample
from tests.cli import scripted
from tests.cli.scripted import Scripted


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Scripted:
    return scripted.install(monkeypatch)


def settings(model: Scripted, *arguments: str) -> Settings:
    """Return what the command asks of the model."""
    assert main.main(["generate", "--workdir=x", "--prompt=y", *arguments]) == 0
    return model.asked[-1][1]


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Check that a command is refused in one line, and return it."""
    assert main.main(["generate", *arguments]) == 2
    output, errors = capsys.readouterr()
    assert output == "" and errors.startswith("error: ") and errors.count("\n") == 1
    return errors


def test_fills_cannot_command_a_terminal(model: Scripted, capsys: pytest.CaptureFixture[str]) -> None:
    model.answer = lambda text, repeat: "\x1b[2J\x07 中\r\n"
    assert main.main(["generate", "--workdir=x", "--prompt", "a\x1b [MASK]"]) == 0
    assert main.main(["generate", "--workdir=x", "--prompt", "--flagfile=x"]) == 0
    assert main.main(["generate", "--workdir=x", "--prompt", "long"]) == 0
    output, errors = capsys.readouterr()
    assert output == "a\x1b " + r"\x1b[2J\x07 中\r" + "\n\n--flagfile=x\nlong\n"  # the prompt is the user's own
    assert errors == "fewer tokens\n"


def test_json_has_the_text_its_fills_and_beams(model: Scripted, capsys: pytest.CaptureFixture[str]) -> None:
    fill = {"text": "<中0>", "tokens": [7, 8], "log_probabilities": [-0.5, -1.5], "finish_reason": "end"}
    assert main.main(["generate", "--workdir=x", "--prompt=中 [MASK]", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"text": "中 <中0>", "fills": [fill]}
    assert main.main(["generate", "--workdir=x", "--prompt=中 [MASK]", "--json", "--strategy=beam"]) == 0
    beams = [{"text": "best", "score": -1.0}, {"text": "other", "score": None}]  # JSON has no infinity
    assert json.loads(capsys.readouterr().out) == {"text": "中 <中0>", "fills": [fill], "alternatives": beams}


def test_flags_become_settings(model: Scripted) -> None:
    assert settings(model) == Settings(Greedy(), 64, 1234)
    assert settings(model, "--strategy=sample") == Settings(Sample(top_p=0.7))
    given = ["--temperature=0.5", "--top_k=3", "--top_p=0.9", "--min_tokens=2", "--repetition_penalty=1.5"]
    tokens = ["--ban=17", "--ban", "3", "--bias=5=-2.5", "--bias", "6=1"]
    more = ["--max_tokens=9", "--seed=7", "--stop=。", "--stop", "--x"]
    options = Sample(min_tokens=2, repetition_penalty=1.5, bias=((5, -2.5), (6, 1.0)), banned=(17, 3),
                     temperature=0.5, top_k=3, top_p=0.9)  # fmt: skip
    assert settings(model, "--strategy=sample", *given, *tokens, *more) == Settings(options, 9, 7, ("。", "--x"))
    beams = ["--strategy=beam", "--beams=3", "--length_penalty=-0.5", "--no_repeat_ngram=2", "--sampled_beams"]
    expected = Beam(count=3, length_penalty=-0.5, no_repeat_ngram=2, deterministic=False)
    assert settings(model, *beams, "--out_seq_length=32") == Settings(expected, out_seq_length=32)


def test_small_temperatures_are_accepted(model: Scripted) -> None:
    found = [
        settings(model, "--strategy=sample", f"--temperature={text}") for text in ("0", "5e-324", "1e-400", "1e308")
    ]
    temperatures = [one.options.temperature for one in found if isinstance(one.options, Sample)]
    assert temperatures == [0.0, 5e-324, 0.0, 1e308]


def test_flags_open_the_model(model: Scripted) -> None:
    settings(model)
    settings(model, "--mesh=data=2,tensor=-1", "--dtype=bfloat16", "--step=3", "--quantize=int4")
    mesh = {"data": 2, "tensor": -1}
    assert model.opened == [("x", None, None, None, None), ("x", mesh, "bfloat16", "int4", 3)]


@pytest.mark.parametrize("flag", OPTIONS)
def test_help_and_bounds_are_those_of_the_strategies(flag: str) -> None:
    """The flags are defined without jax, which takes a second to import, and so apart from the strategies."""
    option = OPTIONS[flag]
    for name, kind in KINDS.items():
        key = {one.name: one for one in definitions(kind)}.get(option.name)
        assert (key is not None) == (name in option.strategies)
        if key is not None:
            bounds = {"lower_bound": key.key.at_least, "upper_bound": key.key.at_most}
            if option.bounds:
                assert option.bounds == {bound: value for bound, value in bounds.items() if value is not None}
            told = re.search(r"\(default: (.*)\)$", option.help)
            default = TOP_P if flag == "top_p" else key.default
            assert told[1] == str(default) if told else default in ((), True)
    assert define()[flag].default is None


@pytest.mark.parametrize(
    "arguments, said",
    [
        ("--beams=3", "--beams is no option of --strategy greedy: add --strategy beam"),
        ("--strategy=beam --top_p=0.7", "--top_p is no option of --strategy beam: add --strategy sample"),
        ("--temperature=1", "--temperature is no option of --strategy greedy"),
        ("--strategy=sample --sampled_beams", "--sampled_beams is no option of --strategy sample"),
        ("--strategy=beam --beams=257", "flag --beams=257"),
        ("--strategy=best", "flag --strategy=best"),
        ("--mesh=3", "flag --mesh=3: it must be sizes of axes, such as data=1"),
        ("--mesh=data=1,data=2", "an axis is named twice"),
        ("--bias=3", "flag --bias=3: it must be TOKEN=VALUE"),
        ("--bias=3=nan", "bias holds nan, it must be a finite number"),
        ("--ban=-1", "flag --ban=-1"),
        ("--ban=x", "flag --ban=x"),
        (f"--ban={2**40}", "banned holds 1099511627776, it must be at most"),
        ("--stop=", "a stop string is empty"),
        ("--max_tokens=3 --out_seq_length=9", "--max_tokens and --out_seq_length both limit a fill"),
        ("--input=x", "--prompt and --input are both given"),
        ("--output=", "--output is empty"),
        ("--coordinator=x:1", "--coordinator, --processes and --process go together"),
    ],
)
def test_wrong_flags_are_one_line(
    arguments: str, said: str, model: Scripted, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in refused(capsys, "--workdir=x", "--prompt=y", *arguments.split())
    assert not model.asked


def test_a_prompt_that_cannot_be_filled_is_one_line(model: Scripted, capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, "--workdir=x", "--prompt= ") == "error: the prompt is empty\n"
    model.tokenizer = None
    assert "x has no tokenizer: convert its weights again" in refused(capsys, "--workdir=x", "--prompt=y")


@pytest.mark.parametrize("workdir", ["gs://bucket/run", "a\0b"])
def test_a_workdir_elsewhere_is_refused_in_python_too(workdir: str) -> None:
    with pytest.raises(UserError, match="^the workdir is .*, it must "):
        Model.open(workdir)


def test_several_processes_read_no_standard_input(
    model: Scripted, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("glm_jax.parallel.schedulers.joins", lambda coordinator: True)
    monkeypatch.setattr("glm_jax.parallel.processes.alone", lambda: False)
    monkeypatch.setattr("glm_jax.parallel.processes.together", lambda run: run())
    for flags in ([], ["--input=-"]):
        assert "several processes cannot read one standard input" in refused(capsys, "--workdir=x", *flags)


def test_another_process_prints_nothing(
    model: Scripted, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("glm_jax.parallel.processes.is_first", lambda: False)
    for flags in ([], ["--json"]):
        settings(model, "--prompt=long", *flags)
    assert capsys.readouterr() == ("", "") and len(model.asked) == 2
