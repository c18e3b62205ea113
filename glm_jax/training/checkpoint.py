"""Checkpoints by orbax: one layout on disk whatever the mesh that wrote it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from glm_jax.errors import UserError
from glm_jax.parallel import partition
from glm_jax.training.step import StepConfig, TrainState, init_state, pad_layers, state_specs, true_layers

CHUNK_BYTES = 32 * 2**20


class Restored(NamedTuple):
    """A state on the mesh and the numbers that were saved beside it."""

    state: TrainState
    run: dict[str, Any]


class Checkpoints:
    """The checkpoints of one workdir, in `checkpoints/<step>/`: the newest `keep` of them.

    Each holds `params`, `training` (the rest of the TrainState) and `run` (JSON: step, samples, that is the data
    position, and versions). Saving goes on in the background while the next steps run; a save that was cut off
    leaves nothing that could be mistaken for a checkpoint.
    """

    def __init__(self, workdir: Path, keep: int = 3) -> None:
        self.directory = (workdir / "checkpoints").resolve()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, cleanup_tmp_directories=True, enable_async_checkpointing=True
        )
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def latest_step(self) -> int | None:
        """Give the newest step that was saved whole, or None."""
        return self._manager.latest_step()

    def save(self, cfg: StepConfig, mesh: jax.sharding.Mesh, state: TrainState, run: dict[str, Any]) -> None:
        """Save the state under its step; returns when the arrays are copied, the writing goes on behind."""
        if _is_padded(cfg, mesh):
            state = jax.jit(lambda state: true_layers(cfg, state), out_shardings=_disk_shardings(cfg, mesh))(state)
        rest = {name: value for name, value in state._asdict().items() if name != "params"}
        self._manager.save(
            int(run["step"]),
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(state.params, save_args=_in_chunks(state.params)),
                training=ocp.args.StandardSave(rest, save_args=_in_chunks(rest)),
                run=ocp.args.JsonSave(run),
            ),
            force=True,
        )

    def restore(self, cfg: StepConfig, mesh: jax.sharding.Mesh) -> Restored:
        """Restore the newest step onto the mesh, each device reading its own part.

        Raises:
            UserError: the arrays on disk do not have the shapes of this config.
        """
        shardings = _disk_shardings(cfg, mesh)
        target = jax.tree.map(
            lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding),
            jax.eval_shape(lambda: init_state(cfg)),
            shardings,
        )
        rest = {name: value for name, value in target._asdict().items() if name != "params"}
        step = self._manager.latest_step()
        try:
            items = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardRestore(target.params),
                    training=ocp.args.StandardRestore(rest),
                    run=ocp.args.JsonRestore(),
                ),
            )
        except (KeyError, OSError) as error:
            raise UserError(f"{self.directory}/{step} is damaged: remove it, and the one before it is used") from error
        except ValueError as error:
            raise UserError(
                f"{self.directory}/{step} does not fit this config: {str(error).splitlines()[0]}"
            ) from error
        state = TrainState(params=items["params"], **items["training"])
        if _is_padded(cfg, mesh):
            placed = partition.shardings(mesh, state_specs(cfg, mesh))
            stages = mesh.shape["pipeline"]
            state = jax.jit(lambda state: pad_layers(cfg, state, stages), out_shardings=placed)(state)
        return Restored(state, items["run"])

    def close(self) -> None:
        """Wait until everything is written."""
        self._manager.wait_until_finished()
        self._manager.close()


def _is_padded(cfg: StepConfig, mesh: jax.sharding.Mesh) -> bool:
    return cfg.engine.model.num_layers % mesh.shape["pipeline"] != 0


def _disk_shardings(cfg: StepConfig, mesh: jax.sharding.Mesh) -> TrainState:
    """Give the shardings of a state with its true layers, which padded stages do not divide."""
    specs = state_specs(cfg, mesh)
    if _is_padded(cfg, mesh):
        specs = partition.without("pipeline", specs)
    return partition.shardings(mesh, specs)


def _in_chunks(tree: Any) -> Any:
    """Ask for small chunks on disk, so that a reader need not hold a whole array of a large model."""
    return jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), tree)


def load_params(workdir: Path) -> Any:
    """Load the newest params of a workdir onto one device, as generation needs them.

    Raises:
        UserError: the workdir holds no checkpoint.
    """
    directory = (workdir / "checkpoints").resolve()
    if not directory.is_dir():
        raise UserError(f"{workdir} holds no checkpoints: train there first, or name another --workdir")
    with ocp.CheckpointManager(directory, item_names=("params",)) as manager:
        step = manager.latest_step()
        if step is None:
            raise UserError(f"{workdir} holds no finished checkpoint yet")
        metadata = ocp.StandardCheckpointer().metadata(directory / str(step) / "params").item_metadata
        if metadata is None:
            raise UserError(f"{directory}/{step} is damaged: remove it, and the one before it is used")
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        target = jax.tree.map(
            lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding), metadata.tree
        )
        return manager.restore(step, args=ocp.args.Composite(params=ocp.args.StandardRestore(target)))["params"]
