"""The arrays of a training run, and nothing else.

The optimizer and the model are closed over by the step, not stored here: a
state of arrays alone can be created sharded, donated, saved and compared.
"""

from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from psvae_jax.optim import TrainedModule

Params = dict[str, Any]


@flax.struct.dataclass
class TrainState:
  """State of one stage.

  Attributes:
    step: int32 scalar, steps done (a skipped one counts).
    params: module name → trained parameters.
    opt_state: module name → that module's optimizer state.
    ema_params: module name → moving average of `params`, of the modules that
      the product uses.
    model_state: module name → arrays that the forward pass updates and no
      optimizer does (the discriminator's spectral vectors); {} for most tasks.
  """

  step: jax.Array
  params: Params
  opt_state: dict[str, Any]
  ema_params: Params
  model_state: Params


def create(
  params: Params,
  model_state: Params,
  tx: optax.GradientTransformation,
  modules: Mapping[str, TrainedModule],
) -> TrainState:
  """State at step 0: the EMA starts at the parameters, in its own buffers.

  Args:
    params: module name → parameters.
    model_state: see `TrainState`.
    tx: `optim.make_optimizer(modules, …)`.
    modules: how each module is trained.
  """
  averaged = {k: v for k, v in params.items() if modules[k].ema}
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=tx.init(params),
    ema_params=jax.tree.map(jnp.copy, averaged),
    model_state=model_state,
  )


def ema_decay(step: jax.Array, ema: float) -> jax.Array:
  """Decay of update number `step` (0-based): min(ema, (1 + n) / (10 + n))."""
  n = step.astype(jnp.float32)
  return jnp.minimum(ema, (1.0 + n) / (10.0 + n))


def apply_gradients(
  state: TrainState,
  grads: Params,
  model_state: Params,
  tx: optax.GradientTransformationExtraArgs,
  ema: float,
) -> tuple[TrainState, Params]:
  """One step of every module's optimizer.

  Args:
    state: the state before the step.
    grads: gradients, a tree like `state.params`.
    model_state: what the forward pass made of `state.model_state`.
    tx: the optimizer `state.opt_state` belongs to.
    ema: EMA decay reached after warm-up.

  Returns:
    The new state and the updates that were added to the parameters.
  """
  updates, opt_state = tx.update(
    grads, state.opt_state, state.params, step=state.step
  )
  params = optax.apply_updates(state.params, updates)
  decay = ema_decay(state.step, ema)
  ema_params = jax.tree.map(
    lambda e, p: e + (1.0 - decay).astype(e.dtype) * (p - e),
    state.ema_params,
    {name: params[name] for name in state.ema_params},
  )
  new_state = TrainState(
    state.step + 1, params, opt_state, ema_params, model_state
  )
  return new_state, updates


def skip(state: TrainState, new_state: TrainState, keep: Any) -> TrainState:
  """`new_state` where the scalar `keep` is true, else `state` one step on.

  Everything but the step counter stays bit for bit what it was.
  """
  held = state.replace(step=new_state.step)
  return jax.tree.map(lambda n, o: jnp.where(keep, n, o), new_state, held)
