"""`--config.KEY=VALUE`: each type's texts, and odd ones in one line that names the key."""

from typing import get_args

import pytest

from glm_jax.cli import main, overrides
from glm_jax.config import keys
from glm_jax.errors import UserError


@pytest.mark.parametrize(
    "key, text, value",
    [
        ("model.num_layers", "12", 12),
        ("model.num_layers", "-3", -3),  # its range is checked later
        ("optimizer.peak_lr", "1e-3", 1e-3),
        ("optimizer.peak_lr", "2", 2.0),
        ("mesh.zero", "3", 3),
        ("model.norm", "pre", "pre"),
        ("model.score_scaling", "False", False),
        ("data.tokenizer.pinned", "1", True),
        ("train.wandb", "5", "5"),
        ("train.wandb", "", ""),
        ("data.sources.mine.weight", "2", 2.0),
        ("data.sources.a-b.path", "a=b", "a=b"),
        ("data.instructions.x.cap", "7", 7),
        ("train.batch_ramp", "(4, 4, 100)", (4, 4, 100)),
        ("train.batch_ramp", "[4,4,100]", [4, 4, 100]),
        ("interventions", "((9,{'train.global_batch':6}),)", ((9, {"train.global_batch": 6}),)),
    ],
)
def test_a_text_becomes_a_value_of_its_key(key: str, text: str, value: object) -> None:
    parsed = overrides.parse(key, text)
    assert parsed == value and type(parsed) is type(value)


ODD = [
    ("data.weights[0]=3", "unknown config key data.weights[0]"),
    ("=3", "unknown config key : "),
    (".=3", "unknown config key .: "),
    ("..=3", "unknown config key"),
    (" =3", "unknown config key"),
    ("model=3", "model is a section: set its keys, such as --config.model.num_layers=VALUE"),
    ("model={'num_layers': 3}", "model is a section"),
    ("data.sources=x", "data.sources is a section: set its keys, such as --config.data.sources.NAME.path=VALUE"),
    ("data.sources.en=x", "data.sources.en is a section: set its keys, such as --config.data.sources.en.path=VALUE"),
    ("data.sources..path=x", "unknown config key data.sources..path"),
    ("data.sources.\u202e.path=x", "has no usable name"),
    ("data.sources.en.path.x=3", "unknown config key data.sources.en.path.x"),
    ("data.sources.en.langage=3", "did you mean data.sources.en.language?"),
    ("data.blanks.mask.x=3", "unknown config key"),
    ("seed.x=3", "unknown config key seed.x"),
    ("lr=3", "did you mean optimizer.peak_lr?"),
    ("batch_size=3", "did you mean train.global_batch?"),
    ("train.num_layers=3", "did you mean model.num_layers?"),
    ("num_layer=3", "did you mean model.num_layers?"),
    ("model.num_layers=", "model.num_layers is '', it must be a whole number such as 4"),
    ("model.num_layers=3.0", "it must be a whole number"),
    ("model.num_layers=" + "9" * 5000, "it must be a whole number"),
    (f"model.hidden_size={2**70}", "it must be at most 2**31 - 1"),
    (f"model.num_layers={2**31}", "it must be at most 2**31 - 1"),
    (f"train.skip_steps=((1,{2**70}),)", "it must be at most 2**31 - 1"),
    (f"train.batch_ramp=(8,8,{2**70})", "it must be at most 2**31 - 1"),
    (f"interventions=(({2**70},{{}}),)", "it must be at most 2**31 - 1"),
    ("optimizer.peak_lr=1e-3x", "it must be a number such as 0.001"),
    ("data.tokenizer.pinned=maybe", "it must be true or false"),
    ("data.weights=((0,{'en':float('nan')}),)", "it must be a tuple of entries such as"),
    ("data.weights=((0,{'en':1e999}),)", "it must be a finite number"),
    ("data.weights=((0,{'en':-1}),)", "it must not be negative"),
    ("data.weights=((0,{'en':'x'}),)", "it must be of type float"),
    ("data.blanks.history=((0,{'mask':-1.0}),)", "it must not be negative"),
    ("train.embedding_shrink.history=((0,1e999),)", "it must be a finite number"),
    ("train.skip_steps=" + "(" * 3000 + ")" * 3000, "it must be a tuple of entries"),
    ("train.skip_steps=" + "-" * 100_000 + "1", "it must be a tuple of entries"),
    ("train.skip_steps={[]:1}", "it must be a tuple of entries"),
    ("train.skip_steps={1,2}", "train.skip_steps is {1, 2}"),
    ("train.skip_steps=5", "train.skip_steps is 5"),
    ("train.profile=(1,", "train.profile is '(1,', it must be"),
    ("train.wandb=\udcff", "it must be valid UTF-8"),
    ("data.cache=gs://bucket", "data.cache is 'gs://bucket', it must name a file or folder of this machine"),
    ("data.sources.en.path=s3://x", "data.sources.en.path is 's3://x', it must name"),
    ("data.tokenizer.path=http://x", "data.tokenizer.path is 'http://x', it must name"),
    ("data.instructions.x.templates=hf://x", "data.instructions.x.templates is 'hf://x', it must name"),
    ("interventions=((5,{'train.spike':None}),)", "train.spike is a section"),
    ("interventions=((5,{'optimizer':{}}),)", "optimizer is a section"),
    ("interventions=((5,{'data.blanks':None}),)", "data.blanks is a section"),
    ("interventions=((5,{'data.sources':None}),)", "data.sources is None"),
    ("interventions=((5,{'optimizer.peak_lr':None}),)", "optimizer.peak_lr is None"),
    ("interventions=((5,{'data':3}),)", "data is a section"),
    ("interventions=((5,{'data.sources':3}),)", "data.sources is 3"),
    ("interventions=((5,{'':3}),)", "unknown config key"),
    ("interventions=((5,{5:3}),)", "its entries are pairs such as"),
]


@pytest.mark.parametrize("override, said", ODD)
def test_odd_overrides_are_one_line(override: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["config", "show", "--config=quickstart", f"--config.{override}"]) == 2
    output, errors = capsys.readouterr()
    assert output == "" and errors.count("\n") == 1 and errors.startswith("error: ") and len(errors) < 600
    assert said in errors


def test_a_switch_needs_no_value(capsys: pytest.CaptureFixture[str]) -> None:
    show = ["config", "show", "--config=quickstart"]
    assert main.main([*show, "--config.data.blanks.replacement", "--noconfig.model.score_scaling"]) == 0
    rows = {line.split()[0]: line.split()[1] for line in capsys.readouterr().out.splitlines()}
    assert (rows["data.blanks.replacement"], rows["model.score_scaling"]) == ("True", "False")


def test_home_is_expanded_in_every_path(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    found = [one.name.replace("NAME", "x") for one, _ in keys() if one.key.path]
    assert len(found) == 6
    changes = [f"--config.{key}=~/y" for key in found]
    assert main.main(["config", "show", "--config=quickstart", *changes]) == 0
    rows = {line.split()[0]: line.split()[1] for line in capsys.readouterr().out.splitlines()}
    assert {rows[key] for key in found} == {"'/home/somebody/y'"}


@pytest.mark.parametrize("key", [one.name.replace("NAME", "en") for one, _ in keys() if one.type is float])
def test_every_float_is_accepted_or_refused_in_one_line(key: str, capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("nan", "inf", "-inf", "-1", "0", "1e308", "-1e308", "5e-324", "1e999"):
        code = main.main(["config", "show", "--config=quickstart", f"--config.{key}={text}"])
        output, errors = capsys.readouterr()
        assert (code, errors) == (0, "") or (code, output) == (2, "") and errors.count("\n") == 1
        assert code == 2 or text not in ("nan", "inf", "-inf", "1e999")


def test_what_other_programs_call_a_key_leads_to_a_key() -> None:
    known = {one.name for one, _ in keys()}
    for name in ("lr", "learning_rate", "warmup", "wd", "batch", "batch-size", "max_steps", "layers", "dtype"):
        assert overrides.known_key(name) in known
    assert overrides.known_key("model.hidden_size") == "model.hidden_size" and overrides.known_key("zzz") is None


def test_every_choice_is_parsed_as_what_it_is() -> None:
    for one, _ in keys():
        for choice in get_args(one.type):
            if isinstance(choice, str | int):
                assert overrides.parse(one.name.replace("NAME", "x"), str(choice)) == choice


def test_an_unknown_key_is_a_user_error() -> None:
    with pytest.raises(UserError, match="unknown config key nothing"):
        overrides.parse("nothing", "3")
