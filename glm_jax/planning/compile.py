"""Compiles a program for devices that are not there, and reports what it takes of each."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import jax

from glm_jax.config import Experiment, from_json, to_json
from glm_jax.errors import UserError
from glm_jax.parallel.devices import peak_memory
from glm_jax.parallel.mesh import AXES, REST
from glm_jax.parallel.pipeline import schedule
from glm_jax.planning import buffers, counted, hlo, programs, targets
from glm_jax.planning.buffers import Buffer
from glm_jax.planning.counted import Counted
from glm_jax.planning.hlo import Collective
from glm_jax.planning.programs import Inference
from glm_jax.planning.targets import Target
from glm_jax.types import Json

SHOWN = 12  # buffers of a report


@dataclass(frozen=True)
class Request:
    """What to compile.

    Attributes:
        experiment: with a mesh whose sizes are all given.
        target: name of what it is compiled for, see `targets.find`.
        sheets: files of devices beside our own.
        memory: bytes of a device; None for the target's own.
        program: its name.
        inference: for `decode` and `prefill`.
    """

    experiment: Experiment
    target: str = "cpu"
    sheets: tuple[Path, ...] = ()
    memory: int | None = None
    program: programs.Name = "step"
    inference: Inference | None = None

    def find(self) -> Target:
        """Return the target. Raises UserError, see `targets.find`."""
        return targets.find(self.target, *self.sheets)

    def devices(self) -> int:
        """Return the number of devices of the mesh.

        Raises:
            UserError: a size of the mesh is not given.
        """
        count = 1
        for axis, size in self.experiment.mesh.sizes().items():
            if size == REST:
                raise UserError(f"mesh.{axis} is {REST}, the rest of the devices, but a plan has none: give a number, "
                                f"such as --config.mesh.{axis}=8")  # fmt: skip
            count *= size
        return count

    def to_json(self) -> Json:
        """Return the request as `from_json` takes it."""
        return {
            "experiment": to_json(self.experiment),
            "target": self.target,
            "sheets": [str(path) for path in self.sheets],
            "memory": self.memory,
            "program": self.program,
            "inference": dataclasses.asdict(self.inference) if self.inference else None,
        }

    @staticmethod
    def from_json(values: Json) -> Request:
        """Undo `to_json`."""
        inference = Inference(**values["inference"]) if values["inference"] else None
        sheets = tuple(map(Path, values["sheets"]))
        return Request(**{**values, "experiment": from_json(values["experiment"]), "sheets": sheets,
                          "inference": inference})  # fmt: skip


@dataclass(frozen=True)
class Memory:
    """The memory of a device, in bytes.

    Attributes:
        peak: the most at any time, of arrays and temporaries. For the CPU, whose compiler does not say it, the sum of
            the others, which is more; of a program that a compiler refused, what it names as too much.
        arguments, outputs, temporaries: of the program; outputs without those that take the place of arguments. None
            if the compiler refused the program because it needs more than the device has.
    """

    peak: int
    arguments: int | None = None
    outputs: int | None = None
    temporaries: int | None = None


@dataclass(frozen=True)
class Report:
    """A compiled program; nothing of it ran.

    Attributes:
        target: what it was compiled for.
        program: its name.
        mesh: sizes by axis.
        memory: of each device.
        buffers: the largest arrays, see `buffers.largest`.
        collectives: those of a device, by kind, axes and loops.
        counted: what a device computes and sends in a step; None of other programs.
        lowering, compiling: seconds.
        resident: bytes of the process that compiled it, at most.
        jax: its version.
    """

    target: str
    program: str
    mesh: Mapping[str, int]
    memory: Memory
    buffers: tuple[Buffer, ...]
    collectives: tuple[Collective, ...]
    counted: Counted | None
    lowering: float
    compiling: float
    resident: int
    jax: str

    def to_json(self) -> Json:
        """Return the report as `from_json` takes it."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(values: Json) -> Report:
        """Undo `to_json`."""
        return Report(**{
            **values,
            "memory": Memory(**values["memory"]),
            "buffers": tuple(Buffer(**buffer) for buffer in values["buffers"]),
            "collectives": tuple(Collective(**{**one, "loops": tuple(one["loops"])}) for one in values["collectives"]),
            "counted": Counted(**values["counted"]) if values["counted"] else None,
        })  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """Whether a program fits.

    Attributes:
        fits: whether the peak is at most `memory`.
        memory: bytes of a device that arrays and temporaries may take.
        margin: bytes that are left; negative if it does not fit.
    """

    fits: bool
    memory: int
    margin: int


def verdict(report: Report, memory: int) -> Verdict:
    """Return whether a program fits devices of so many bytes; one that the compiler refused never does."""
    refused = report.memory.temporaries is None
    return Verdict(report.memory.peak <= memory and not refused, memory, memory - report.memory.peak)


def compile_here(request: Request) -> Report:
    """Compile a program in this process, which must have `targets.environment`, and report it.

    Raises:
        UserError: the model or the batch does not fit the mesh, or the mesh not the target.
    """
    target, count = request.find(), request.devices()
    devices = targets.devices(target, count)
    if target.chips and len(devices) != count:
        raise UserError(f"--target {target.name} has {len(devices)} devices and the mesh {count}: name a slice of "
                        f"{count}, or change the mesh")  # fmt: skip
    began = time.monotonic()
    memory = target.memory if request.memory is None else request.memory
    lowered, mesh = programs.lower(request.program, request.experiment, devices, memory, request.inference)
    lowered_at = time.monotonic()
    compiled, refused = _compile(lowered)
    seconds = lowered_at - began, time.monotonic() - lowered_at
    sizes = {axis: mesh.shape[axis] for axis in AXES}
    text = compiled.as_text() or "" if compiled else ""
    return Report(
        target=target.name,
        program=request.program,
        mesh=sizes,
        memory=_memory(compiled, target) if compiled else Memory(refused),
        buffers=buffers.largest(text, SHOWN) if text else (),
        collectives=hlo.collectives(text, tuple(sizes.values())) if text else (),
        counted=_counted(text, request, sizes) if text and request.program == "step" else None,
        lowering=round(seconds[0], 2),
        compiling=round(seconds[1], 2),
        resident=peak_memory(),
        jax=jax.__version__,
    )


def _compile(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled | None, int]:
    """Compile a program. If the compiler refuses it for its memory, as libtpu does, return None and the bytes."""
    try:
        return lowered.compile(), 0
    except jax.errors.JaxRuntimeError as error:
        needed = exhausted(str(error))
        if needed is None:
            raise
        return None, needed


def exhausted(message: str) -> int | None:
    """Return the bytes that a program needs, if that is why a compiler refuses it; it may need more."""
    needed = re.search(r"^RESOURCE_EXHAUSTED.*?(?:Used |\()([\d.]+)([KMGT])i?B?\)? (?:of|exceeds)", message, re.DOTALL)
    return int(float(needed[1]) * 1024 ** ("KMGT".index(needed[2]) + 1)) if needed else None


def _memory(compiled: jax.stages.Compiled, target: Target) -> Memory:
    found = compiled.memory_analysis()
    assert found is not None  # of all targets that we have
    arguments, temporaries = found.argument_size_in_bytes, found.temp_size_in_bytes
    outputs = found.output_size_in_bytes - found.alias_size_in_bytes
    peak = arguments + outputs + temporaries if target.device is None else found.peak_memory_in_bytes
    return Memory(peak, arguments, outputs, temporaries)


def _counted(text: str, request: Request, sizes: Mapping[str, int]) -> Counted:
    experiment = request.experiment
    table = schedule.build(experiment.pipeline.schedule, sizes["pipeline"], experiment.train.microbatches)
    return counted.count(text, tuple(sizes.values()), table, experiment.model.num_layers)
