"""Time a training step on the accelerators of this machine: fused attention on and off, MFU, and 1F1B's slots.

    python benchmarks/accelerator.py [--model 350m] [--mesh 1,1,1] [--compute bfloat16] [--rounds 7] [--profile FOLDER]

Each attention core that the device, the model and the length allow takes one step in turn, after a step that is not
timed. The lines are medians with the smallest and the largest round; MFU is the model's own arithmetic as a share of
the devices' peak, measured if the vendor's is not known. With a pipeline, the step is also timed with twice the
microbatches: what one more takes is a slot, and the rest of a step is idle, as the schedule predicts, or spent on
reductions and the optimizer. `--profile` writes a trace of one step, for a viewer.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Sequence

import shared
import train
from rounds import interval, ratios

MODELS = {
    "quickstart": {"layers": 4, "hidden": 128, "heads": 4, "ffn": 344, "vocabulary": 8064},
    "350m": {"layers": 24, "hidden": 1024, "heads": 16, "ffn": 2736, "vocabulary": 50_304},
}


def stepper(options: argparse.Namespace, attention: str) -> Callable[[], float]:
    """Return a function that takes one step and returns its seconds, compiled and warm."""
    step, (state, *rest) = train.build(options, attention=attention, compute=options.compute)

    def turn() -> float:
        nonlocal state
        start = time.perf_counter()
        state, metrics = step(state, *rest)
        float(metrics["sums"].loss.sum())  # waits
        return time.perf_counter() - start

    turn()
    return turn


def cores(options: argparse.Namespace) -> list[str]:
    """Return the core that is chosen for the device, and the dense one."""
    import jax

    from glm_jax.model import attention_cores

    platform = attention_cores.platform(jax.devices()[0])
    chosen = attention_cores.choose(shared.config(options), platform, options.length, options.compute)
    return list(dict.fromkeys([chosen, "reference"]))


def report_cores(options: argparse.Namespace) -> None:
    """Print a line for each core, and the ratio of the dense one."""
    from glm_jax.parallel import devices
    from glm_jax.parallel import mesh as meshes

    mesh = meshes.build(dict(zip(meshes.AXES, map(int, options.mesh.split(",")), strict=True)))
    peak = devices.peak_flops(mesh)
    print(f"{devices.describe()}; peak of the mesh {peak / 1e12:.3g} TFLOP/s")
    turns = {name: stepper(options, name) for name in cores(options)}
    taken = {name: list[float]() for name in turns}
    for _, (name, turn) in itertools.product(range(options.rounds), turns.items()):
        taken[name].append(turn())
    for name, seconds in taken.items():
        rates = [options.rows * options.length / second for second in seconds]
        mfu = [100 * train.flops(options) / second / peak for second in seconds]
        print(f"attention {name}: {interval([1e3 * second for second in seconds], 1)} ms a step, "
              f"{interval(rates, 0)} tokens/s, MFU {interval(mfu, 1)}%")  # fmt: skip
    first, *others = taken
    for name in others:
        print(f"{name} / {first}: {ratios(taken[name], taken[first])} of the seconds")
    if options.profile:
        import jax

        with jax.profiler.trace(options.profile):
            turns[first]()


def report_slots(options: argparse.Namespace) -> None:
    """Print what a slot takes and how much of a step is idle, beside the schedule's own share."""
    from glm_jax.parallel import schedule

    stages, count = int(options.mesh.split(",")[1]), options.microbatches
    twice = argparse.Namespace(**vars(options) | {"microbatches": 2 * count, "rows": 2 * options.rows})
    turns = [stepper(each, cores(options)[0]) for each in (options, twice)]
    taken = [[turn() for turn in turns] for _ in range(options.rounds)]
    slots = [(longer - shorter) / count for shorter, longer in taken]
    idle = [100 * (1 - count * slot / shorter) for slot, (shorter, _) in zip(slots, taken, strict=True)]
    predicted = 100 * float(schedule.build(options.schedule, stages, count).bubble)
    print(
        f"{stages} stages, {count} microbatches: {interval([1e3 * slot for slot in slots], 1)} ms a microbatch "
        f"forward and backward, the rest {interval(idle, 1)}% of a step; idle by the schedule {predicted:.1f}%"
    )


def main(words: Sequence[str]) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="350m")
    parser.add_argument("--mesh", default="1,1,1", help="devices on the axes data, pipeline and tensor")
    parser.add_argument("--compute", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    for flag, number in {"rounds": 7, "rows": 8, "length": 1024, "microbatches": 1}.items():
        parser.add_argument(f"--{flag}", type=int, default=number)
    parser.add_argument("--stash", default="layer")
    parser.add_argument("--schedule", default="1f1b")
    parser.add_argument("--profile", help="folder for a trace of one step")
    options = parser.parse_args(words, argparse.Namespace())
    for flag, number in MODELS[options.model].items():
        setattr(options, flag, number)
    report_cores(options)
    if int(options.mesh.split(",")[1]) > 1:
        report_slots(options)


if __name__ == "__main__":
    main(sys.argv[1:])
