"""`glm-jax train`: train an experiment to its end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from glm_jax.cli import common
from glm_jax.cli.common import say
from glm_jax.config import with_changes


def run(arguments: Sequence[str]) -> int:
    """Train an experiment; the same command resumes from the newest checkpoint."""
    values = common.flag_values("train", "--config quickstart --workdir runs/quickstart --config.train.steps=100")
    common.define_config(values)
    common.define_workdir(values)
    common.define_path(values, "replay", "an interventions.jsonl: make its changes at its steps")
    together = "for several processes without a scheduler:"
    flags.DEFINE_string("coordinator", None, f"{together} HOST:PORT of process 0", flag_values=values)
    flags.DEFINE_integer("processes", None, f"{together} how many there are", lower_bound=1, flag_values=values)
    flags.DEFINE_integer(
        "process", None, f"{together} the number of this one, from 0", lower_bound=0, flag_values=values
    )
    if not common.parse(values, arguments, ["config", "workdir"]):
        return 0
    resolved = common.load(values)

    from glm_jax.parallel import processes
    from glm_jax.workdir import interventions

    if values.replay:
        planned = interventions.plan(interventions.read(Path(values.replay)))
        resolved = with_changes(resolved, {"interventions": planned})
    processes.start(values.coordinator, values.processes, values.process, resolved.mesh.collective_timeout)

    from glm_jax.inference import Model, examples
    from glm_jax.training.run import DONE, Run

    workdir = Path(values.workdir)

    def train() -> int:
        run = Run(resolved, workdir, say)
        code = run.go()
        if code == DONE and processes.alone():  # the examples need the whole model on one device
            model = Model.open(workdir)
            documents = {source: splits["heldout"] for source, splits in run.prepared.shards.items()}
            languages = run.prepared.languages
            for line in examples.heldout(model.config, model.params, model.tokenizer, documents, languages):
                print(line, flush=True)
        return code

    return processes.together(train)
