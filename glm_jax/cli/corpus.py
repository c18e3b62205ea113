"""`glm-jax corpus`: fetch sample texts, build shards, show rows, check the cache."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from absl import flags

from glm_jax.cli import common
from glm_jax.cli.common import say
from glm_jax.config import Experiment
from glm_jax.errors import UserError

if TYPE_CHECKING:
    from glm_jax.data.tokenizers.protocol import Tokenizer


def run(arguments: Sequence[str]) -> int:
    """Fetch sample texts (`corpus fetch`), make shards (`build`), show them (`inspect`), check the cache (`verify`)."""
    if not arguments or arguments[0] not in ("fetch", "build", "inspect", "verify"):
        usage = "glm-jax corpus fetch|build|inspect|verify --config FILE [flags]"
        if {"-h", "--help"} & set(arguments):
            print(f"usage: {usage}")
            return 0
        raise UserError(f"name what to do with the corpus: {usage}")
    action, *rest = arguments
    values = common.flag_values(f"corpus {action}", "--config quickstart")
    common.define_config(values)
    if action == "build":
        workers = os.cpu_count() or 1
        flags.DEFINE_integer("workers", workers, "processes that share the work", lower_bound=1, flag_values=values)
        flags.DEFINE_bool("strict", False, "stop at the first damaged record", flag_values=values)
    if action == "inspect":
        flags.DEFINE_integer("rows", 3, "training rows to show", lower_bound=0, flag_values=values)
    if not common.parse(values, rest, ["config"]):
        return 0
    resolved = common.load(values)

    from glm_jax.data import inspect
    from glm_jax.data.corpora import prepare

    if action == "fetch":
        prepare.fetch(resolved, say)
    elif action == "verify":
        prepare.verify(resolved, say)
    elif action == "build":
        tokenizer = _tokenizer(resolved)
        prepared = prepare.prepare(resolved, say, workers=values.workers, strict=values.strict, tokenizer=tokenizer)
        if values.strict:
            prepare.check_undamaged(prepared)
    else:
        from glm_jax.data.rows.experiment import training_batches

        prepared = prepare.prepare(resolved, say, tokenizer=_tokenizer(resolved))
        for line in inspect.counts(prepared):
            print(line)
        batches = training_batches(resolved, prepared)
        batch = batches.at(0, values.rows)
        for line in inspect.rows(batch, batches.sources, prepared.tokenizer, coloured=sys.stdout.isatty()):
            print(line)
    return 0


def _tokenizer(config: Experiment) -> Tokenizer | None:
    """Return the tokenizer of the weights that a run would begin with, if any."""
    if not config.train.init_from:
        return None
    from glm_jax.interop.initial import begin  # imports jax, which other corpora need not wait for

    return begin(config, None, say).tokenizer
