"""Learning rate, batch size, embedding shrink and skipped steps against numbers worked out by hand."""

import runpy
from typing import Any

import pytest

from glm_jax.config import Config, default_config, recipe, resolve, source
from glm_jax.errors import UserError


def build(**changes: Any) -> Config:
    """Return a resolved config; `optimizer__peak_lr=1.0` sets optimizer.peak_lr."""
    config = default_config()
    config.data.sources.en = source(path="x.txt")
    for key, value in changes.items():
        *path, last = key.split("__")
        section = config
        for part in path:
            section = section[part]
        section[last] = value
    return resolve(config)


COSINE = {"optimizer__peak_lr": 1.0, "optimizer__min_lr": 0.1, "optimizer__warmup_samples": 100,
          "optimizer__decay_samples": 300}  # fmt: skip


@pytest.mark.parametrize(
    "decay, quarter",
    [("cosine", 0.1 + 0.9 * (1 + 0.5**0.5) / 2), ("linear", 0.775)],  # cos 45 degrees
)
def test_learning_rate_warms_up_then_falls_to_its_floor(decay: str, quarter: float) -> None:
    config = build(**COSINE, optimizer__decay=decay)
    rates = {0: 0, 50: 0.5, 100: 1, 150: quarter, 200: 0.55, 250: 1.1 - quarter, 300: 0.1, 9999: 0.1}
    assert {samples: recipe.learning_rate(config, 1, samples) for samples in rates} == pytest.approx(rates, abs=1e-12)


def test_the_linear_decay_of_the_original_glm_ends_where_its_iterations_do() -> None:
    """Its second stage: 3e-5, 0.5% of 50,000 iterations of warm-up, 10% at iteration 50,000, warm-up included."""
    config = runpy.run_path("experiments/glm_10b_second.py")["get_config"]()
    config.data.sources.en = source(path="x.txt")
    config, batch = resolve(config), 8 * 256
    at = [recipe.learning_rate(config, 1, step * batch) for step in (125, 250, 10_200, 50_000)]
    assert at == pytest.approx([1.5e-5, 3e-5, 2.46e-5, 3e-6])  # 10,200 is a fifth of the way


def test_no_warmup_starts_at_the_peak_and_the_decay_ends_with_the_last_step() -> None:
    config = build(**COSINE | {"optimizer__warmup_samples": 0, "optimizer__decay_samples": 0}, train__steps=10)
    assert recipe.learning_rate(config, 1, 0) == 1.0
    assert recipe.learning_rate(config, 10, 160) == pytest.approx(0.1)
    assert recipe.learning_rate(config, 5, 80) == pytest.approx(0.55)


def test_rewarming_multiplies_within_its_window() -> None:
    """The training log's lr-auto-warmup-steps a b: (step - a) / b from a to a + b."""
    config = build(**COSINE, optimizer__rewarm=((20, 4),))
    factors = [recipe.learning_rate(config, step, 100) for step in (19, 20, 21, 22, 24, 25)]
    assert factors == [1, 1, 0.25, 0.5, 1, 1]


def test_stairs_multiply_the_rate_again_and_again() -> None:
    config = build(**COSINE, optimizer__stairs=(20, 4, 3))
    factors = [recipe.learning_rate(config, step, 100) for step in (19, 20, 21, 24, 25, 28, 29)]
    assert factors == [1, 1, 3, 3, 9, 9, 27]


def test_the_batch_grows_as_glm_130bs_did() -> None:
    """192 to 4,224 by 24 over 5,493,164 samples: 168 increments of 32,697.4 samples, about 4,294 steps (facts 3.1)."""
    config = build(train__global_batch=4224, train__microbatches=176, train__batch_ramp=(192, 24, 5_493_164))
    at = {samples: recipe.batch_rows(config, samples) for samples in (0, 32_697, 32_698, 65_395, 5_493_163, 5_493_164)}
    assert list(at.values()) == [192, 192, 216, 240, 4200, 4224]
    samples = steps = 0
    while recipe.batch_rows(config, samples) < 4224:
        samples, steps = samples + recipe.batch_rows(config, samples), steps + 1
    assert steps == pytest.approx(4294, abs=2)
    released = samples + (49_300 - steps) * 4224
    assert released * 2048 / 1e9 == pytest.approx(400.6, abs=0.05)  # what the released model has seen, in tokens
    longer = build(train__global_batch=48, train__microbatches=2, train__batch_ramp=(24, 24, 60), train__steps=5)
    assert recipe.total_samples(longer) == 24 * 3 + 48 * 2  # 0, 24, 48 are below 60


def test_the_shrink_is_linear_between_its_knots_and_constant_beyond() -> None:
    config = build(train__embedding_shrink__history=((6000, 0.1), (6500, 1.0)))
    alphas = [recipe.embedding_shrink(config, step) for step in (1, 6000, 6250, 6500, 9000)]
    assert alphas == pytest.approx([0.1, 0.1, 0.55, 1.0, 1.0])
    assert recipe.shrinks(config) and not recipe.shrinks(build())
    assert recipe.embedding_shrink(build(train__embedding_shrink__alpha=0.3), 5) == 0.3


def test_skipped_steps_count_with_their_samples() -> None:
    config = build(train__steps=20, train__global_batch=4, train__skip_steps=((3, 5), (6, 6), (19, 40)))
    assert recipe.skip(config, 1, 4) == (1, 4)
    assert recipe.skip(config, 2, 8) == (6, 24)
    assert recipe.skip(config, 18, 72) == (20, 80)  # not beyond the run's end


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"train__batch_ramp": (10, 4, 100)}, "multiple of the 4 rows"),
        ({"train__batch_ramp": (8, 12, 100)}, "does not reach train.global_batch"),
        ({"train__batch_ramp": (8, 4)}, "3 whole numbers"),
        ({"train__embedding_shrink__alpha": 1.5}, "from 0 to 1"),
        ({"train__embedding_shrink__history": ((5, 0.1), (5, 0.2))}, "in order"),
        ({"train__embedding_shrink__history": ((5, "x"),)}, "pairs such as"),
        ({"train__skip_steps": ((9, 3),)}, "the first must not be after the last"),
        ({"optimizer__rewarm": ((3, 0),)}, "how many"),
        ({"optimizer__decay": "sqrt"}, "one of cosine, linear"),
        ({"train__spike__deviations": 0.0}, "above 0"),
        ({"train__loss_scale__minimum": 0.0}, "above 0"),
        ({"train__loss_scale__window": 0}, "at least 1"),
        ({"train__profile": (3,)}, "2 whole numbers"),
        ({"interventions": ((3, {"model.num_layers": 5}),)}, "cannot change during a run"),
        ({"interventions": ((3, {"optimizer.peek_lr": 5.0}),)}, "did you mean optimizer.peak_lr"),
        ({"interventions": ((3, {"optimizer.peak_lr": "high"}),)}, "must be of type float"),
        ({"interventions": ((3, {"train.steps.first": 5}),)}, "unknown config key train.steps.first"),
        ({"interventions": ((3, {4: 5}),)}, "pairs such as"),
        ({"interventions": ((-3, {"optimizer.peak_lr": 1.0}),)}, "0 is the start"),
        ({"interventions": (("3", {}),)}, "pairs such as"),
        ({"interventions": ((3, 5),)}, "pairs such as"),
        ({"data__weights": ((0, 5),)}, "pairs such as"),
    ],
)
def test_a_slip_in_the_recipe_is_one_line(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as raised:
        build(train__global_batch=16, train__microbatches=4, **changes)
    assert "\n" not in str(raised.value)
