"""What users of `Model` may ask for, and what is refused."""

import pytest

from glm_jax.errors import UserError
from glm_jax.inference import Model
from tests.inference import tiny
from tests.inference.numbers_tokenizer import Numbers
from tests.inference.tiny import CONFIG


class Small(Numbers):
    """With special ids inside the tiny model's vocabulary."""

    size = 64
    smask, mask, gmask, sop, eop, eos = range(58, 64)


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(CONFIG, tiny.params(CONFIG), Small())


def test_the_score_of_a_target_is_that_of_its_tokens(model: Model) -> None:
    filled = model.fill(["1 2 [MASK] 3", "4 5"], max_tokens=5)
    targets = [one.fills[0] for one in filled]
    scores = model.score(["1 2 [MASK] 3", "4 5"], [one.text for one in targets])
    for one, score in zip(targets, scores, strict=True):
        assert score.tokens == len(one.tokens)
        assert score.log_probability == pytest.approx(sum(one.log_probabilities), abs=2e-3)
    alone = model.score("4 5", targets[1].text)
    assert alone.log_probability == pytest.approx(scores[1].log_probability, abs=2e-3)


@pytest.mark.parametrize(
    "contexts, targets, words",
    [
        (["1 [MASK]"], [""], "^target 1 is empty"),
        (["1 [MASK]", "2"], ["3"], "^there are 2 contexts and 1 targets"),
        (["1 [MASK]"], ["5 " * 127], "^context and target 1 have 129 tokens, the model's rows hold 128: shorten"),
        ([""], ["5"], "^the prompt is empty"),
    ],
)
def test_what_cannot_be_scored(model: Model, contexts: list[str], targets: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        model.score(contexts, targets)


def test_half_precision_is_computed_in_it(model: Model) -> None:
    half = Model(CONFIG, tiny.params(CONFIG), Small(), dtype="float16")
    assert {str(array.dtype) for array in half.decoder.weights.layers[0]["attention"]["qkv"].values()} == {"float16"}
    (one,), (other,) = model.score(["1 2 [MASK] 3"], ["7 8"]), half.score(["1 2 [MASK] 3"], ["7 8"])
    assert 0 < abs(one.log_probability - other.log_probability) < 0.1


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"mesh": {"tensors": 2}}, r"^'tensors' is no axis of a mesh: the axes are data, pipeline, tensor"),
        ({"mesh": {"tensor": 64}}, r"^.*mesh.tensor=64 needs 64 devices and there are 1: make the mesh smaller"),
        ({"dtype": "float8"}, r"^dtype is 'float8': it must be one of float32, float16, bfloat16"),
    ],
)
def test_meshes_and_dtypes_that_there_are_not(arguments: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Model(CONFIG, tiny.params(CONFIG), Small(), **arguments)  # pyright: ignore[reportArgumentType]


def test_a_model_without_a_tokenizer_says_so() -> None:
    nameless = Model(CONFIG, tiny.params(CONFIG))
    for ask in (lambda: nameless.fill("1"), lambda: nameless.score("1", "2")):
        with pytest.raises(UserError, match="^the model has no tokenizer: convert its weights again, with --tokenizer"):
            ask()
