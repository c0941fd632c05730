"""Optimizers: one chain a module, so that modules never rescale each other."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from psvae_jax.config import OptimConfig

# Muon's orthogonal update is meant for hidden matrices. A ViT decoder's `head`
# is left to it all the same: the miniature's stage 1 learns colours sooner. A
# DiT's modulation, six matrices in one, is Adam's: to Muon it would cost
# nearly half of what the rest of a block does.
_NOT_HIDDEN = (
  "patch_embed",
  "conv_out",
  "embedding",
  "relative_bias",
  "modulation",
)


def make_schedule(config: OptimConfig, peak: float, steps: int):
  """Learning rate by step: linear warm-up from 0, then `config.schedule`."""
  decay_steps = max(steps - config.warmup_steps, 1)
  end = peak * config.end_factor
  if config.schedule == "cosine":
    decay = optax.cosine_decay_schedule(peak, decay_steps, config.end_factor)
  elif config.schedule == "linear":
    decay = optax.linear_schedule(peak, end, decay_steps)
  else:
    decay = optax.constant_schedule(peak)
  if not config.warmup_steps:
    return decay
  warmup = optax.linear_schedule(0.0, peak, config.warmup_steps)
  return optax.join_schedules([warmup, decay], [config.warmup_steps])


def _is_matrix(path: Any, leaf: Any) -> bool:
  name = jax.tree_util.keystr(path, simple=True, separator="/")
  return name.endswith("kernel") and leaf.ndim >= 2


def _decay_mask(params: Any) -> Any:
  return jax.tree_util.tree_map_with_path(_is_matrix, params)


def _muon_dimensions(params: Any) -> Any:
  """Which axes of each kernel are matrix input and output; None for Adam.

  Scanned stacks lead with depth, which Muon treats as a batch of matrices.
  """

  def one(path, leaf):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    if not _is_matrix(path, leaf) or any(n in name for n in _NOT_HIDDEN):
      return None
    last = leaf.ndim - 1
    # A (window, window, in, out) convolution is one matrix over its window.
    reduction = (0, 1, 2) if leaf.ndim == 4 else last - 1
    return optax.contrib.MuonDimensionNumbers(reduction, last)

  return jax.tree_util.tree_map_with_path(one, params)


def _module_chain(
  config: OptimConfig, steps: int, multiplier: float
) -> optax.GradientTransformation:
  """Clip → optimizer → schedule, for one module."""

  def schedule(peak):
    return make_schedule(config, peak * multiplier, steps)

  parts = []
  if config.clip > 0:
    parts.append(optax.clip_by_global_norm(config.clip))
  if config.name == "muon":
    parts.append(
      optax.contrib.muon(
        schedule(config.learning_rate),
        adam_learning_rate=schedule(config.adam_learning_rate),
        adam_b1=config.b1,
        adam_b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        muon_weight_dimension_numbers=_muon_dimensions,
      )
    )
  else:
    parts.append(
      optax.adamw(
        schedule(config.learning_rate),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=_decay_mask,
      )
    )
  return optax.chain(*parts)


@dataclasses.dataclass(frozen=True)
class TrainedModule:
  """How one module of a task is trained.

  Attributes:
    optim: optimizer section of the config.
    multiplier: factor on its learning rates.
    start: step before which the module and its optimizer do not change; the
      schedule begins there.
    ema: whether a moving average of its parameters is kept.
  """

  optim: OptimConfig
  multiplier: float = 1.0
  start: int = 0
  ema: bool = True


def make_optimizer(
  modules: Mapping[str, TrainedModule], steps: int
) -> optax.GradientTransformationExtraArgs:
  """Optimizer over a dict of modules; its state is a dict of the same names.

  Args:
    modules: what trains, and how.
    steps: length of the stage; a module's schedule runs from its start to it.

  Returns:
    A transformation whose updates of one module depend on that module alone.
    `update` takes the number of steps done as the keyword `step`.
  """
  chains = {
    name: _module_chain(m.optim, max(steps - m.start, 1), m.multiplier)
    for name, m in modules.items()
  }

  def init(params):
    return {name: chains[name].init(params[name]) for name in params}

  def update_module(name, grads, state, params, step):
    def update(grads, state, params):
      return chains[name].update(grads, state, params)

    def hold(grads, state, params):
      del params
      return jax.tree.map(jnp.zeros_like, grads), state

    start = modules[name].start
    if not start:
      return update(grads, state, params)
    return jax.lax.cond(step >= start, update, hold, grads, state, params)

  def update(grads, state, params=None, *, step):
    updates, new_state = {}, {}
    for name in grads:
      updates[name], new_state[name] = update_module(
        name, grads[name], state[name], params[name], step
      )
    return updates, new_state

  return optax.GradientTransformationExtraArgs(init, update)
