"""The arrays of a training run, and nothing else.

The optimizer and the model are closed over by the step, not stored here: a
state of arrays alone can be created sharded, donated, saved and compared.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

Params = dict[str, Any]


@flax.struct.dataclass
class TrainState:
  """State of one stage.

  Attributes:
    step: int32 scalar, optimizer steps done.
    params: module name → trained parameters.
    opt_state: module name → that module's optimizer state.
    ema_params: module name → moving average of `params`.
  """

  step: jax.Array
  params: Params
  opt_state: dict[str, Any]
  ema_params: Params


def create(params: Params, tx: optax.GradientTransformation) -> TrainState:
  """State at step 0: the EMA starts at the parameters, in its own buffers."""
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=tx.init(params),
    ema_params=jax.tree.map(jnp.copy, params),
  )


def ema_decay(step: jax.Array, ema: float) -> jax.Array:
  """Decay of update number `step` (0-based): min(ema, (1 + n) / (10 + n))."""
  n = step.astype(jnp.float32)
  return jnp.minimum(ema, (1.0 + n) / (10.0 + n))


def apply_gradients(
  state: TrainState,
  grads: Params,
  tx: optax.GradientTransformation,
  ema: float,
) -> tuple[TrainState, Params]:
  """One optimizer step.

  Args:
    state: the state before the step.
    grads: gradients, a tree like `state.params`.
    tx: the optimizer `state.opt_state` belongs to.
    ema: EMA decay reached after warm-up.

  Returns:
    The new state and the updates that were added to the parameters.
  """
  updates, opt_state = tx.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  decay = ema_decay(state.step, ema)
  ema_params = jax.tree.map(
    lambda e, p: e + (1.0 - decay).astype(e.dtype) * (p - e),
    state.ema_params,
    params,
  )
  new_state = TrainState(state.step + 1, params, opt_state, ema_params)
  return new_state, updates
