"""What one device does in a pipeline: the jobs of a tick, for a model given as functions.

- A slot is a loop over the stage's blocks with one turn for each block that has work: none in an idle slot, fewer on a
  stage that holds fewer blocks (70 over 8). A conditional would copy the gradient sums.
- The backward slot is written by hand: from the last block to the first, it runs the block's vjp and adds the gradient
  of its weights to a float32 sum in place. Apart from the sums, it allocates nothing the size of a stage's weights.
- All stages run embedding and head together, in every tick that needs them, each for its rows of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from glm_jax.parallel.jax_internals import varying_axes, with_arguments, without_arguments
from glm_jax.parallel.mesh import vary
from glm_jax.types import Tree

Array = jax.Array

# What a forward slot keeps for the backward slot: each block's input, only the stage's input, or all residuals of a
# block's vjp; these are few with `products`, for which the caller chose them.
Keep = Literal["layer", "stage", "products", "all"]


class Functions(NamedTuple):
    """The model as four functions. x is the residual stream of one microbatch on one device.

    All devices call `embed` and `head` at once, so these may use collectives over `pipeline` and `tensor`. `prepare`
    and `block` may only use collectives over `tensor`, whose members always do the same.
    """

    prepare: Callable[[Tree], Tree]  # microbatch -> terms, which its blocks share
    embed: Callable[[Tree, Tree], Array]  # outer weights, microbatch -> x, the same on every stage
    block: Callable[[Tree, Array, Tree, Array], Array]  # a block's weights, x, terms, its index in the model -> x
    head: Callable[[Tree, Array, Tree], tuple[Array, Tree]]  # outer weights, x, microbatch -> loss, metrics
    look: Callable[[Tree, Array, Tree, Array], Array] | None = None  # arguments of `block` -> a number [] to watch


class Weights(NamedTuple):
    """Weights or gradients: of embedding and head, and of this stage's blocks (arrays [Q, ...])."""

    outer: Tree
    blocks: Tree


class Measures(NamedTuple):
    """What forward slots measure of each block, over all microbatches."""

    squares: Array  # [Q], mean square of its output, summed
    largest: Array | None  # [Q], the largest number of `Functions.look`; None without it


class Result(NamedTuple):
    """The result of a pass over all microbatches on one device, not yet reduced over `data`."""

    gradients: Weights  # sums, float32 or wider
    metrics: Tree  # sums of the head's metrics
    measures: Measures
    executed: Array  # int32 [2]: block runs in forward and in backward slots, counted as they run


def zeros(shapes: Tree, leading: tuple[int, ...] = ()) -> Tree:
    """Return zeros of the shapes of abstract arrays, with `leading` axes in front."""
    return jax.tree.map(lambda leaf: vary(jnp.zeros(leading + leaf.shape, leaf.dtype), varying_axes(leaf)), shapes)


def at(tree: Tree, index: Array | int) -> Tree:
    """Return entry `index` of every array."""
    return jax.tree.map(lambda array: lax.dynamic_index_in_dim(array, index, keepdims=False), tree)


def put(tree: Tree, entry: Tree, index: Array) -> Tree:
    """Replace entry `index` of every array. XLA does this in place in a loop's carry."""
    return jax.tree.map(lambda array, new: lax.dynamic_update_index_in_dim(array, new, index, 0), tree, entry)


def add(sums: Tree, terms: Tree) -> Tree:
    """Add terms to sums, in the dtype of the sums."""
    return jax.tree.map(lambda total, term: total + term.astype(total.dtype), sums, terms)


def when(microbatch: Array, job: Callable[[Tree], Tree], carry: Tree) -> Tree:
    """Run `job` unless `microbatch` is IDLE, as a loop of one turn or none."""
    return lax.fori_loop(0, (microbatch >= 0).astype(jnp.int32), lambda _, carry: job(carry), carry)


class Stage:
    """One device's jobs. Each takes the microbatch it works on, and does nothing if that is IDLE."""

    def __init__(self, functions: Functions, weights: Weights, batch: Tree, layers: int, keep: Keep) -> None:
        self.functions, self.batch, self.keep = functions, batch, keep
        self.weights = vary(weights)
        self.capacity = jax.tree.leaves(weights.blocks)[0].shape[0]  # Q, including inert layers
        index = lax.axis_index("pipeline")
        self.is_first, self.is_last = index == 0, index == lax.axis_size("pipeline") - 1
        self.first_layer = index * self.capacity
        self.layers = jnp.clip(layers - self.first_layer, 0, self.capacity)  # not inert
        self.x = jax.eval_shape(lambda: vary(functions.embed(self.weights.outer, at(batch, 0))))
        blank = zeros(self.x)
        self.record = jax.eval_shape(lambda: self._run(0, blank, functions.prepare(at(batch, 0)))[1])

    def empty_stash(self, ring: int) -> list[Array]:
        """Return a stash with room for `ring` microbatches."""
        return vary(zeros(jax.tree.leaves(self.record), (ring if self.keep == "stage" else ring * self.capacity,)))

    def empty_measures(self) -> Measures:
        """Return the measures before the first slot."""
        empty = jnp.zeros(self.capacity, jnp.promote_types(self.x.dtype, jnp.float32))
        return vary(Measures(empty, None if self.functions.look is None else empty - jnp.inf))

    def _measure(self, i: Array, x: Array, y: Array, terms: Tree, measures: Measures) -> Measures:
        """Add the measures of block i, with input x and output y."""
        squares, largest = measures
        squares = squares.at[i].add(jnp.square(y.astype(squares.dtype)).mean())
        if self.functions.look is not None and largest is not None:
            seen = self.functions.look(at(self.weights.blocks, i), x, terms, self.first_layer + i)
            largest = largest.at[i].max(seen.astype(largest.dtype))
        return Measures(squares, largest)

    def turns(self, microbatch: Array) -> Array:
        """Return how many blocks a slot runs."""
        return jnp.where(microbatch >= 0, self.layers, 0)

    def _block(self, i: Array | int) -> tuple[Callable[[Tree, Array, Tree], Array], Tree]:
        layer = self.first_layer + i
        return lambda weights, x, terms: self.functions.block(weights, x, terms, layer), at(self.weights.blocks, i)

    def _run(self, i: Array | int, x: Array, terms: Tree) -> tuple[Array, Tree]:
        """Run block i; also return what its backward needs, except weights and terms, which the stage has."""
        block, weights = self._block(i)
        if self.keep in ("layer", "stage"):
            return block(weights, x, terms), x
        y, pull = jax.vjp(block, weights, x, terms)
        return y, without_arguments(pull, (0, 2))

    def _pull(self, i: Array, record: list[Array], terms: Tree, gradient: Array) -> tuple[Tree, Array]:
        """Return the gradients of block i's weights and of its input."""
        block, weights = self._block(i)
        if self.keep in ("layer", "stage"):
            _, pull = jax.vjp(lambda weights, x: block(weights, x, terms), weights, record[0])
            return pull(gradient)
        pull = jax.tree.unflatten(jax.tree.structure(self.record), record)
        return with_arguments(pull, {0: weights, 2: terms})(gradient)[:2]

    def enter(self, microbatch: Array, x: Array) -> Array:
        """Embed for the first stage, all stages together; the other stages keep the x that has arrived."""

        def job(x: Array) -> Array:
            embedded = self.functions.embed(self.weights.outer, at(self.batch, microbatch))
            return jnp.where(self.is_first, embedded, x)

        return when(microbatch, job, x)

    def forward(
        self, microbatch: Array, x: Array, stash: list[Array], measures: Measures, ring: int
    ) -> tuple[Array, list[Array], Measures, Array]:
        """Run x through the stage's blocks.

        Returns:
            The output, the stash with what this slot keeps, the measures with those of this slot, and the number of
            block runs.
        """
        terms = self.functions.prepare(at(self.batch, microbatch))
        slot = microbatch % ring
        if self.keep == "stage":
            stash = when(microbatch, lambda stash: put(stash, [x], slot), stash)

        def block(
            i: Array, carry: tuple[Array, list[Array], Measures, Array]
        ) -> tuple[Array, list[Array], Measures, Array]:
            x, stash, measures, executed = carry
            y, record = self._run(i, x, terms)
            if self.keep != "stage":
                stash = put(stash, jax.tree.leaves(record), slot * self.capacity + i)
            return y, stash, self._measure(i, x, y, terms, measures), executed + 1

        return lax.fori_loop(0, self.turns(microbatch), block, (x, stash, measures, vary(jnp.int32(0))))

    def head(
        self, microbatch: Array, outputs: Array, gradient: Array, result: Result, seed: Array
    ) -> tuple[Array, Result]:
        """Run the head for the last stage, all stages together.

        Returns:
            The gradient that enters this stage's backward slot (the head's on the last stage, elsewhere the one that
            has arrived), and the result with the gradients of the outer weights and the metrics added.
        """

        def job(carry: tuple[Array, Result]) -> tuple[Array, Result]:
            gradient, result = carry
            y, data = at(outputs, microbatch % outputs.shape[0]), at(self.batch, microbatch)

            def loss_of(outer: Tree, y: Array) -> tuple[Array, Tree]:
                return self.loss(outer, y, data)

            loss, pull, metrics = jax.vjp(loss_of, self.weights.outer, y, has_aux=True)
            outer, of_y = pull(vary(seed.astype(loss.dtype), varying_axes(loss)))
            gradients = result.gradients._replace(outer=add(result.gradients.outer, outer))
            result = result._replace(gradients=gradients, metrics=add(result.metrics, metrics))
            return jnp.where(self.is_last, of_y, gradient), result

        return when(microbatch, job, (gradient, result))

    def loss(self, outer: Tree, y: Array, data: Tree) -> tuple[Array, Tree]:
        """Broadcast the last stage's output y to all stages, and return the head's loss and metrics."""
        return self.functions.head(outer, vary(lax.psum(jnp.where(self.is_last, y, 0), "pipeline")), data)

    def backward(
        self, microbatch: Array, gradient: Array, stash: list[Array], sums: Tree, ring: int
    ) -> tuple[Array, Tree, Array]:
        """Run the gradient of the stage's output back through its blocks.

        Returns:
            The gradient of the stage's input, the sums with the gradients of the weights added, and the number of
            block runs.
        """
        terms = self.functions.prepare(at(self.batch, microbatch))
        slot = microbatch % ring
        records, first = stash, slot * self.capacity
        if self.keep == "stage":
            records, first = self._inputs(microbatch, at(stash, slot), terms), 0

        def block(turn: Array, carry: tuple[Array, Tree, Array]) -> tuple[Array, Tree, Array]:
            gradient, sums, executed = carry
            i = self.layers - 1 - turn
            of_weights, of_x = self._pull(i, at(records, first + i), terms, gradient)
            return of_x, put(sums, add(at(sums, i), of_weights), i), executed + 1

        return lax.fori_loop(0, self.turns(microbatch), block, (gradient, sums, vary(jnp.int32(0))))

    def _inputs(self, microbatch: Array, record: list[Array], terms: Tree) -> list[Array]:
        """Run the stage again from its input, and return the input of every block [Q, ...]."""

        def block(i: Array, carry: tuple[Array, list[Array]]) -> tuple[Array, list[Array]]:
            x, inputs = carry
            return self._run(i, x, terms)[0], put(inputs, [x], i)

        inputs = zeros([self.x], (self.capacity,))
        return lax.fori_loop(0, self.turns(microbatch), block, (*record, inputs))[1]

    def embed_gradient(self, microbatch: Array, gradient: Array, sums: Tree) -> Tree:
        """Add the gradient of the embedding's weights, given the gradient of the first stage's input."""

        def job(sums: Tree) -> Tree:
            data = at(self.batch, microbatch)
            _, pull = jax.vjp(lambda outer: vary(self.functions.embed(outer, data)), self.weights.outer)
            return add(sums, pull(jnp.where(self.is_first, gradient, 0))[0])

        return when(microbatch, job, sums)

    def empty_result(self) -> Result:
        """Return the zero sums before the first tick."""
        wide = jax.tree.map(
            lambda weight: vary(jnp.zeros(weight.shape, jnp.promote_types(weight.dtype, jnp.float32))), self.weights
        )
        metrics = jax.eval_shape(lambda: self.loss(self.weights.outer, zeros(self.x), at(self.batch, 0))[1])
        return Result(wide, zeros(metrics), self.empty_measures(), vary(jnp.zeros(2, jnp.int32)))
