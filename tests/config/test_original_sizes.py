"""The experiments of the original GLM against the numbers of its launch files, counted in its iterations."""

import runpy
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from glm_jax.config import resolve
from glm_jax.engine import build


class Recipe(NamedTuple):
    tokens: int
    steps: int
    batch: int
    rows: int  # of a GPU at a time
    peak: float
    floor: float  # a share of the peak
    warmup: int  # iterations
    end: int  # of the decay, iterations
    decay: str
    weight_decay: float
    beta2: float
    shares: tuple[float, float, float]  # [MASK], [sMASK], [gMASK]
    short: float
    least: float  # the least share of a text that a [gMASK] blank takes
    tokenizer: str


ONLY, HALF, FIRST, MIXED = (1.0, 0.0, 0.0), (0.5, 0.0, 0.5), (0.5, 0.3, 0.2), (0.4, 0.3, 0.3)
LARGE = Recipe(512, 200_000, 1024, 16, 2e-4, 0.05, 8000, 160_000, "cosine", 0.1, 0.98, ONLY, 0, 0.5, "vocab.txt")
RECIPES = {
    "glm_110m": Recipe(
        512, 150_000, 1024, 16, 4e-4, 0.05, 6000, 120_000, "cosine", 0.1, 0.98, ONLY, 0, 0.5, "vocab.txt"
    ),
    "glm_335m": LARGE,
    "glm_doc": LARGE._replace(shares=HALF),
    "glm_410m": LARGE._replace(shares=HALF),
    "glm_515m": LARGE._replace(shares=HALF),
    "glm_roberta_large": Recipe(
        512, 500_000, 8192, 16, 4e-4, 0.025, 30_000, 500_000, "linear", 0.01, 0.98, ONLY, 0, 0.5, "vocab.json"
    ),
    "glm_large_chinese": Recipe(
        512, 250_000, 8192, 32, 4e-4, 0.1, 8000, 200_000, "cosine", 0.01, 0.98, MIXED, 0.02, 0.25, "cog-pretrain.model"
    ),
    "glm_2b": Recipe(
        512, 250_000, 8192, 32, 1e-4, 0.1, 7000, 175_000, "cosine", 0.1, 0.95, MIXED, 0.02, 0.25, "vocab.json"
    ),
    "glm_10b": Recipe(
        512, 250_000, 5376, 21, 1e-4, 0.1, 7000, 175_000, "cosine", 0.1, 0.95, FIRST, 0.02, 0.25, "vocab.json"
    ),
    "glm_10b_second": Recipe(
        1024, 50_000, 2048, 8, 3e-5, 0.1, 250, 50_000, "linear", 0.1, 0.95, MIXED, 0.5, 0.25, "vocab.json"
    ),
    "glm_10b_chinese": Recipe(
        512, 150_000, 5376, 21, 1e-4, 0.1, 4800, 120_000, "cosine", 0.1, 0.95, FIRST, 0.02, 0.25, "cog-pretrain.model"
    ),
    "glm_10b_chinese_second": Recipe(
        1024, 20_000, 2048, 8, 3e-5, 0.1, 500, 20_000, "cosine", 0.1, 0.95, FIRST, 0.5, 0.25, "cog-pretrain.model"
    ),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_size_has_the_recipe_of_its_launch_files(name: str) -> None:
    found: dict[str, Any] = runpy.run_path(f"experiments/{name}.py")
    config = resolve(found["get_config"]())
    train, optimizer, blanks = config.train, config.optimizer, config.data.blanks
    batch = train.global_batch
    assert RECIPES[name] == Recipe(
        tokens=config.data.seq_length,
        steps=train.steps,
        batch=batch,
        rows=batch // train.microbatches,
        peak=optimizer.peak_lr,
        floor=pytest.approx(optimizer.min_lr / optimizer.peak_lr),  # pyright: ignore[reportArgumentType]
        warmup=optimizer.warmup_samples // batch,
        end=optimizer.decay_samples // batch,
        decay=optimizer.decay,
        weight_decay=optimizer.weight_decay,
        beta2=optimizer.beta2,
        shares=(blanks.mask, blanks.smask, blanks.gmask),
        short=blanks.short_seq_prob,
        least=blanks.gmask_min_ratio,
        tokenizer=found["__doc__"].split("--config.data.tokenizer.path=")[1].split()[0],
    )
    assert (train.precision, train.loss_scale.window, train.loss_scale.hysteresis) == ("float16", 1000, 2)
    assert (optimizer.beta1, optimizer.clip_norm, config.model.hidden_dropout) == (0.9, 1.0, 0.1)
    options = config.blank_options()
    assert options.two_streams and options.gmask_infill_prob == 0.5 and options.block_mask_prob == 0.0
    assert not options.gmask_eop  # at the end of a text; an infill ends in eop
    assert f"--config experiments/{name}.py --workdir runs/{name}" in found["__doc__"]
    build(config, abstract=True)  # fits one device's mesh
    several = runpy.run_path(f"experiments/{name}.py")["get_config"]()
    several.mesh.data, several.train.microbatches = 8, several.train.microbatches // 8
    build(resolve(several), abstract=True)


@pytest.mark.parametrize("name", ["glm_10b", "glm_10b_chinese"])
def test_a_second_stage_takes_the_weights_of_the_first(name: str) -> None:
    first, second = (resolve(runpy.run_path(f"experiments/{each}.py")["get_config"]()).model
                     for each in (name, f"{name}_second"))  # fmt: skip
    assert first == second and first.max_length == 1025


def test_every_experiment_of_the_original_glm_is_in_the_table() -> None:
    files = {path.stem for path in Path("experiments").glob("glm_*.py")}
    assert files == RECIPES.keys() | {"glm_130b", "glm_130b_log"}
