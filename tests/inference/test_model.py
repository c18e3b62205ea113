"""What users of `Model` may ask for, and what is refused."""

from pathlib import Path
from typing import Any

import pytest

from glm_jax.errors import UserError
from glm_jax.inference import Model
from glm_jax.interop import convert
from glm_jax.interop.weights import open_weights
from glm_jax.model import GLMConfig
from glm_jax.model.quantized import Quantized, Scheme
from tests.inference import tiny
from tests.inference.numbers_tokenizer import Numbers
from tests.inference.tiny import CONFIG

GOLDEN = Path(__file__).parent.parent / "goldens/glm130b/ckpt_tp1"
GLM = GLMConfig(3, 64, 4, 176, 256, max_length=64)


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


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden GLM-130B, converted."""
    out = tmp_path_factory.mktemp("converted") / "run"
    convert.to_workdir(open_weights(GOLDEN, {"num_heads": 4}), out, convert.experiment(GLM))
    return out


def opened(workdir: Path, **arguments: Any) -> Model:
    """Open the golden model with the tokenizer of its goldens, which no file holds."""
    model = Model.open(workdir, **arguments)
    model.tokenizer = Numbers()
    return model


def test_a_workdir_opens_in_fewer_bits_and_as_it_was_quantised(workdir: Path, tmp_path: Path) -> None:
    whole, by_int8, by_int4 = (opened(workdir, quantize=name) for name in (None, "int8", "int4"))
    assert (whole.step, by_int4.step, whole.config) == (1000, 1000, GLM)
    pair = "47 65 [MASK] 160 174", "92 141 230"
    scores = [model.score(*pair).log_probability for model in (whole, by_int8, by_int4)]
    assert 0 < abs(scores[1] - scores[0]) < abs(scores[2] - scores[0]) < 5
    convert.to_workdir(
        convert.quantize(open_weights(workdir), Scheme(4, 128)), tmp_path / "quantised", convert.experiment(GLM)
    )
    stored = opened(tmp_path / "quantised")
    kernel = stored.decoder.weights.layers[0]["attention"]["qkv"]["kernel"]
    assert isinstance(kernel, Quantized) and kernel.values.shape == (1, 32, 4, 3, 16)  # 64 inputs, two to a byte
    assert stored.score(*pair).log_probability == pytest.approx(scores[2], abs=1e-4)
    with pytest.raises(UserError, match="has 4 bits already: quantise the weights that it came from"):
        Model.open(tmp_path / "quantised", quantize="int8")


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"quantize": "int5"}, "^quantize is 'int5': it must be one of int8, int4"),
        ({"step": 7}, "has no checkpoint of step 7, but these: 1000"),
    ],
)
def test_what_cannot_be_opened(workdir: Path, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Model.open(workdir, **arguments)
