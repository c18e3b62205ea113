"""Our model in lm-eval: values by hand, and tasks of all types against our own scorers."""

import configparser
import importlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from glm_jax.errors import UserError
from glm_jax.evaluation import lm_eval_requests, run
from glm_jax.evaluation.lm_eval_requests import Continuations, Likelihoods, Reader, Texts, generation
from glm_jax.inference import Model, scoring
from glm_jax.inference.prompts import Context
from glm_jax.inference.strategies import Beam, Greedy, Sample
from glm_jax.model import init
from tests.evaluation import lm_eval_data, official_form, toy
from tests.evaluation.lm_eval_data import Writer

CHARACTERS = {"a": 1 / 2, "b": 1 / 4, "c": 1 / 8}
OTHER = (1 / 8) / 253  # of each other byte


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(official_form.CONFIG, init(official_form.CONFIG, jax.random.key(0)), official_form.tokenizer())


def found(requests: Any) -> list[Any]:
    """Return all responses, in order."""
    responses = dict(one for batch in requests.run(range(len(requests.cut))) for one in batch)
    assert len(responses) == len(requests.cut)
    return [responses[number] for number in range(len(responses))]


@pytest.mark.parametrize("causal", [False, True])
def test_values_by_hand(causal: bool) -> None:
    reader = Reader.of(toy.model(CHARACTERS), causal=causal)
    asked = [("x", "aab"), ("x", "aa"), ("x", ""), ("", "a"), ("x ", "a"), ("y" * 100, "b"), ("y" * 100, "c" * 40)]
    right = [1 / 16, 1 / 4, 1, 1 / 2, OTHER / 2, 1 / 4, 8.0**-40]
    requests = Likelihoods(reader, asked)
    pairs = found(requests)
    np.testing.assert_allclose([pair[0] for pair in pairs], np.log(right), rtol=1e-5)
    assert [pair[1] for pair in pairs] == [False, True, True, True, False, False, False]
    assert requests.cut == [False] * 5 + [True] * 2
    with pytest.raises(UserError, match="^continuations of 63 tokens leave no room for a context"):
        Likelihoods(reader, [("x", "a" * 63)])

    texts = ["abc" * 50, "", "aa"]  # the first one has several windows
    np.testing.assert_allclose(found(Texts(reader, [(text,) for text in texts])),
                               [50 * math.log(1 / 64), 0, math.log(1 / 4)], rtol=1e-5)  # fmt: skip

    plain = Continuations(reader, [("x", {"max_gen_toks": 5}), ("x" * 99, {"max_gen_toks": 99, "until": "aaaa"}),
                                   ("x", {"max_gen_toks": 3, "num_beams": 2, "until": ["b"]})])  # fmt: skip
    assert found(plain) == ["aaaaa", "", "aaa"] and plain.cut == [False, True, False]
    assert plain.notes == ("answers have up to 32 tokens, not 99: that is half of the model's rows",)
    drawn = [("x", {"max_gen_toks": 30, "do_sample": True, "until": ["c"]})] * 2
    first, second = found(Continuations(reader, drawn))
    assert first != second and "c" not in first + second
    assert found(Continuations(reader, drawn)) == [first, second]
    (only,) = [text for batch in Continuations(reader, drawn).run([1]) for _, text in batch]
    assert only == second  # a resumed evaluation draws what it would have drawn
    assert found(Continuations(reader._replace(seed=2), drawn)) != [first, second]


def test_arguments_of_generation() -> None:
    assert generation({}) == (Greedy(min_tokens=0), 256, ())
    assert generation({"until": "x", "max_new_tokens": 7, "do_sample": False, "temperature": 1.0}) == (
        Greedy(min_tokens=0), 7, ("x",)
    )  # fmt: skip
    assert generation({"temperature": 0.5, "top_p": 0.9, "until": ["", "y"]}) == (
        Sample(min_tokens=0, temperature=0.5, top_p=0.9), 256, ("y",)
    )  # fmt: skip
    assert generation({"num_beams": 3, "temperature": 0.0}).options == Beam(min_tokens=0, count=3)
    for wrong, words in (
        ({"until": 3}, "^until is '3': it must be"),
        ({"max_gen_toks": 0}, "^max_gen_toks is '0': it must be"),
        ({"top_k": 1.5, "do_sample": True}, "^top_k"),
        ({"num_beams": 2, "do_sample": True}, "^num_beams and do_sample do not go together"),
        ({"penalty_alpha": 1}, "^penalty_alpha is no argument of generation here"),
    ):
        with pytest.raises(UserError, match=words):
            generation(wrong)


@pytest.mark.parametrize("causal", [False, True])
def test_continuations_of_one_context_are_scored_as_if_alone(model: Model, causal: bool) -> None:
    """One pass for all, with what each context and continuation is written down here by hand."""
    reader, writer = Reader.of(model, causal=causal), Writer(0)
    contexts = [writer.clause() for _ in range(3)]
    asked = [(context, f" {noun}") for context in contexts for noun in (*writer.nouns(3), "house by the river")]
    tokenizer, pairs = official_form.tokenizer(), list[tuple[Context, Sequence[int]]]()
    for context, target in asked:
        tokens, inside = tokenizer.encode(context).tolist(), tokenizer.encode(context + target).tolist()
        assert inside[: len(tokens)] == tokens
        both = (
            Context([tokenizer.gmask, tokenizer.sop, *tokens], 0, False, causal=True)
            if causal
            else Context([*tokens, tokenizer.gmask, tokenizer.sop], len(tokens), False)
        )
        pairs.append((both, inside[len(tokens) :]))
    requests = Likelihoods(reader, asked)
    assert len(requests._groups(range(12))) == 3  # pyright: ignore[reportPrivateUsage]
    alone = scoring.score(model.decoder, pairs)
    np.testing.assert_allclose([pair[0] for pair in found(requests)], [one.log_probability for one in alone], rtol=1e-5)


def evaluated(model: Model, folder: Path, names: Sequence[str], **options: Any) -> dict[str, Any]:
    """Return what lm-eval says of our model on the tasks of a folder."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    from glm_jax.evaluation.lm_eval_model import GlmJax

    manager = TaskManager(include_path=folder, include_defaults=False)
    found: Any = simple_evaluate(GlmJax(model, **options), tasks=[*names], task_manager=manager, bootstrap_iters=0)
    return found


def ours(model: Model, folder: Path, name: str) -> list[run.FileReport]:
    """Return what `glm-jax evaluate` says of a task file."""
    todo = run.plan(model.decoder, official_form.tokenizer(), [folder / f"{name}.yaml"])
    assert not todo.failures
    done = dict(one for batch in run.run(todo, {}) for one in batch.results)
    (report,) = run.report(todo, done, resamples=0)
    return report.files


def test_each_type_of_request_against_our_own_scorers(model: Model, tmp_path: Path) -> None:
    writer, theirs, own = Writer(1), tmp_path / "theirs", tmp_path / "own"
    sentences = [(writer.clause(), writer.noun()) for _ in range(20)]
    pairs = [{"context": context, "target": target} for context, target in sentences]
    likely = [{"metric": "perplexity"}, {"metric": "acc"}]
    lm_eval_data.task(theirs, "pairs", pairs, output_type="loglikelihood", doc_to_text="{{context}}",
                      doc_to_target="{{target}}", metric_list=likely)  # fmt: skip
    chosen = [{"context": context, "choices": writer.nouns(3), "label": number % 3}
              for number, (context, _) in enumerate(sentences)]  # fmt: skip
    lm_eval_data.task(theirs, "choices", chosen, output_type="multiple_choice", doc_to_text="{{context}}",
                      doc_to_target="label", doc_to_choice="choices", metric_list=[{"metric": "acc"}])  # fmt: skip
    official_form.jsonl(own / "choices/a.jsonl", [
        {"inputs_pretokenized": one["context"], "choices_pretokenized": [f" {choice}" for choice in one["choices"]],
         "label": one["label"]} for one in chosen  # a space belongs to the continuation
    ])  # fmt: skip
    official_form.task(own, "choices", "name: choices\ntype: mul\npath: choices\nuse_task_mask: true\n")
    texts = [" ".join(writer.clause() for _ in range(number)) for number in (1, 4, 9, 25)]
    lm_eval_data.task(theirs, "texts", [{"text": text} for text in texts], output_type="loglikelihood_rolling",
                      doc_to_text="", doc_to_target="{{text}}", metric_list=[{"metric": "bits_per_byte"}])  # fmt: skip
    official_form.task(own, "texts", "name: texts\ntype: lm\npath: texts\nuse_task_mask: true\nfile_pattern: '*.txt'\n")
    (own / "texts").mkdir()
    for number, text in enumerate(texts):
        (own / "texts" / f"{number}.txt").write_text(text)
    until = ["e", "o"]
    lm_eval_data.task(theirs, "answers", pairs, output_type="generate_until", doc_to_text="{{context}}",
                      doc_to_target="{{target}}", metric_list=[{"metric": "exact_match"}],
                      generation_kwargs={"until": until, "max_gen_toks": 12, "do_sample": False})  # fmt: skip

    result = evaluated(model, theirs, ["pairs", "choices", "texts"])
    values, samples = result["results"], result["samples"]
    contexts = [context for context, _ in sentences]
    scored = model.score(contexts, [target for _, target in sentences])
    mean = np.mean([one.log_probability for one in scored])
    assert values["pairs"]["perplexity,none"] == pytest.approx(math.exp(-mean), rel=1e-4)
    assert [sample["acc"] for sample in samples["pairs"]] == [one.greedy for one in scored]
    (file,) = ours(model, own, "choices")
    assert values["choices"]["acc,none"] == pytest.approx(file.estimates["Accuracy"].value / 100)
    np.testing.assert_array_equal([[sample["acc"]] for sample in samples["choices"]], file.columns["Accuracy"])
    for sample, file in zip(samples["texts"], ours(model, own, "texts"), strict=True):
        nats, size = sample["bits_per_byte"]
        np.testing.assert_allclose([-nats, size], file.columns["BPB"].sum(0), rtol=1e-5)
    other = evaluated(model, theirs, ["pairs"], unidirectional=True)["results"]["pairs"]["perplexity,none"]
    assert other != pytest.approx(values["pairs"]["perplexity,none"], rel=1e-3)

    fresh = init(official_form.CONFIG, jax.random.key(0))
    varied = jax.tree.map(lambda array: array * 4.5 if array.ndim > 2 else array, fresh["blocks"])
    writing = Model(official_form.CONFIG, {**fresh, "blocks": varied}, official_form.tokenizer())
    answers = evaluated(writing, theirs, ["answers"])["samples"]["answers"]
    filled = writing.fill(contexts, max_tokens=12, stop=until, min_tokens=0)
    assert [sample["resps"][0][0] for sample in answers] == [one.fills[0].text for one in filled]
    assert {"stop", "length"} <= {one.fills[0].finish_reason for one in filled}


def test_lm_eval_finds_the_model(tmp_path: Path) -> None:
    """By its name once the module is imported, and by our entry point in later versions."""
    from lm_eval.api.registry import get_model

    from glm_jax.evaluation.lm_eval_model import GlmJax

    official_form.workdir(tmp_path)
    opened: Any = get_model("glm-jax").create_from_arg_string(f"workdir={tmp_path / 'run'},data=1", {"batch_size": 1})
    assert type(opened) is GlmJax and opened.tokenizer_name == official_form.tokenizer().digest
    setup = configparser.ConfigParser()
    setup.read(Path(__file__).parents[2] / "setup.cfg")
    name, _, place = setup["options.entry_points"]["lm_eval.models"].strip().partition(" = ")
    module, _, attribute = place.partition(":")
    assert name == "glm-jax" and getattr(importlib.import_module(module), attribute) is GlmJax


def test_constants_are_those_of_lm_eval() -> None:
    from lm_eval import defaults
    from lm_eval.api.instance import OutputType
    from lm_eval.models.utils import normalize_gen_kwargs

    assert lm_eval_requests.SEED == defaults.DEFAULT_OTHER_SEED
    assert {*lm_eval_requests.TYPES, "multiple_choice"} == {*OutputType.__args__}  # choices are asked one by one
    assert normalize_gen_kwargs({}).get("max_gen_toks") == lm_eval_requests.LONGEST_ANSWER
