"""What a model costs: parameters, FLOPs and memory, from the code itself.

    python -m psvae_jax.model_table --config=configs/psvae.py:base

Everything is counted from abstract shapes and from the traced program of the
real training step. Nothing is compiled or run, and of weights only those of a
DINO discriminator are loaded ("random:facebook/dino-vits8" will do).
"""

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from psvae_jax import cli, train, train_state
from psvae_jax.config import Config, ConfigError
from psvae_jax.config import parser as config_parser
from psvae_jax.flops import count_flops
from psvae_jax.models.autoencoder import MODULES
from psvae_jax.optim import make_optimizer
from psvae_jax.pretrained.encoder import abstract_encoder
from psvae_jax.tasks import autoencoder
from psvae_jax.tasks.autoencoder import AutoencoderTask
from psvae_jax.tasks.routes import ROUTES
from psvae_jax.train_state import TrainState

USAGE = """\
Usage: python -m psvae_jax.model_table --config=FILE[:VARIANT] [--json]

Prints what an autoencoder costs, counted from the code: parameters and forward
FLOPs of every module; FLOPs of a training step and memory of each stage. Only
the encoder's config.json is needed, and for published DINOv2 ids not even that;
with discriminator.kind=dino also its weights (random:facebook/dino-vits8 will
do). Nothing is compiled or run; it takes half a minute.

A step's FLOPs are those of its matrix products and convolutions, with the
adversary at work. "Kept for backward" is what the autoencoder's forward pass
saves for its backward pass, before the compiler rearranges anything.

  --config=FILE[:VARIANT]  the job, as for psvae_jax.main
  --config.FIELD=VALUE     any field of it
  --json                   print one JSON object (exact numbers), not tables
  --help                   this page

Examples:
  python -m psvae_jax.model_table --config=configs/psvae.py:base
  python -m psvae_jax.model_table --config=configs/psvae.py:base,decoder=vit
  python -m psvae_jax.model_table --config=configs/psvae.py:large \\
    --config.psvae.train.batch_size=64 --json > large.json
"""

DISCRIMINATOR = "discriminator"


def make_table(config: Config) -> dict[str, Any]:
  """Counts everything about a job's autoencoder.

  Args:
    config: the job; its stages must be autoencoder stages.

  Returns:
    Plain numbers: `modules` (name → `parameters`, `forward_flops` of an image)
    and `stages` (name → see `_stage`), beside what the model is.

  Raises:
    ConfigError: a stage of another kind, or sizes that do not fit.
    ValueError: the encoder's architecture is not known; see
      `pretrained.encoder.abstract_encoder`.
    FileNotFoundError: a file that describes it is missing.
  """
  for stage in config.stages:
    if stage not in ROUTES:
      raise ConfigError(
        f"the table is of autoencoders: config.stages has {stage!r}, which is "
        f"none of {', '.join(ROUTES)}"
      )
  tasks = {stage: _abstract_task(stage, config) for stage in config.stages}
  # The stage with the most modules: with a discriminator, where there is one.
  most = max(tasks.values(), key=lambda task: len(task.modules))
  grid = most.model.grid
  return {
    "encoder": config.model.encoder or "embedded miniature",
    "image_size": config.model.image_size,
    "output_size": config.model.output_size,
    "latent": [grid, grid, config.model.channels],
    "dtype": config.compute.dtype,
    "remat": config.compute.remat,
    "modules": _modules(most),
    "stages": {stage: _stage(stage, config) for stage in config.stages},
  }


def _abstract_task(
  stage: str, config: Config, remat: bool | None = None
) -> AutoencoderTask:
  """The task of a stage with an encoder of shapes alone."""
  if remat is not None:
    compute = dataclasses.replace(config.compute, remat=remat)
    config = dataclasses.replace(config, compute=compute)
  encoder = abstract_encoder(
    config.model.encoder or autoencoder.EMBEDDED_ENCODER,
    final_norm=config.model.final_norm,
    remat=config.compute.remat,
    unroll=config.compute.unroll,
    dtype=jnp.dtype(config.compute.dtype),
  )
  return AutoencoderTask(stage, config, Path(), encoder=encoder)


def _abstract_state(task: AutoencoderTask) -> tuple[TrainState, Callable]:
  """The shapes of a stage's state, and its real training step."""
  settings = task.section.train
  tx = make_optimizer(task.modules, settings.steps)

  def create(rng, frozen):
    return train_state.create(*task.init(rng, frozen), tx, task.modules)

  state = jax.eval_shape(create, jax.random.key(0), task.frozen)
  return state, train.make_train_step(task, tx, settings.ema)


def _modules(task: AutoencoderTask) -> dict[str, dict[str, int]]:
  """Parameters of every module, and its forward FLOPs of one image."""
  model = task.model
  state, _ = _abstract_state(task)
  fresh = jax.eval_shape(model.init, jax.random.key(0), task.frozen["teacher"])
  params = {"encoder": task.frozen["teacher"], **fresh}
  side, width = model.config.image_size, model.encoder.config.width
  tokens = _float(1, model.grid, model.grid, width)
  z = _float(1, model.grid, model.grid, model.config.channels)
  calls = dict(
    zip(
      MODULES,
      (
        (model.features, _float(1, side, side, 3)),
        (model.posterior, tokens),
        (model.decode_features, z),
        (model.decode_pixels, z),
      ),
      strict=True,
    )
  )
  table = {
    name: {
      "parameters": _count(params[name]),
      "forward_flops": count_flops(call, params[name], x),
    }
    for name, (call, x) in calls.items()
  }
  if task.discriminator is not None:
    image = _float(1, task.image_size, task.image_size, 3)
    table[DISCRIMINATOR] = {
      "parameters": _count(state.params[DISCRIMINATOR]),
      "forward_flops": count_flops(
        task.discriminator.logits,
        state.params[DISCRIMINATOR],
        state.model_state[DISCRIMINATOR],
        task.frozen.get(DISCRIMINATOR, {}),
        image,
      ),
    }
  return table


def _stage(stage: str, config: Config) -> dict[str, Any]:
  """What a training step of one stage takes.

  Returns:
    `trains`: the trained modules. `batch_size`. `flops`: of a step, an image,
    with the adversary at work: without rematerialisation (the figure for
    utilisation) and with it. `bytes`: of the arrays that stay. `saved_bytes`:
    what the autoencoder's forward pass keeps for the backward pass, an image,
    without and with rematerialisation.
  """
  flops, saved = {}, {}
  for remat in (False, True):
    task = _abstract_task(stage, config, remat)
    state, step = _abstract_state(task)
    batch_size = task.section.train.batch_size
    batch = {"image": _images(task, batch_size)}
    key = "remat" if remat else "plain"
    total = count_flops(step, state, task.frozen, batch, jax.random.key(0))
    flops[key] = total // batch_size
    saved[key] = _saved_bytes(task, state)
  parts = {
    "parameters": state.params,
    "gradients": state.params,
    "optimizer": state.opt_state,
    "ema": state.ema_params,
    "other_state": state.model_state,
    "frozen": task.frozen,
  }
  sizes = {name: _bytes(tree) for name, tree in parts.items()}
  return {
    "trains": list(task.modules),
    "batch_size": batch_size,
    "flops": flops,
    "bytes": {**sizes, "total": sum(sizes.values())},
    "saved_bytes": saved,
  }


def _saved_bytes(task: AutoencoderTask, state: TrainState) -> int:
  """Bytes an image adds to what waits for the autoencoder's backward pass.

  Before the compiler: it may keep less, by fusing, or hold more for a while.
  """
  params = {name: state.params[name] for name in task.route.trains}
  grid, channels = task.model.grid, task.config.model.channels

  def kept(params, frozen, images, noise):
    def outputs(params):
      out = autoencoder.forward(
        task.model, task.route, params, frozen, images, noise
      )
      terms, _ = task.latent_terms(out)
      return sum(terms.values()), out.reconstruction

    _, pull = jax.vjp(outputs, params)
    return jax.tree.leaves(pull)

  def size(count):
    noise = _float(count, grid, grid, channels)
    images = _images(task, count)
    return _bytes(jax.eval_shape(kept, params, task.frozen, images, noise))

  return size(2) - size(1)  # parameters are kept too, whatever the batch


def _float(*shape: int) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, jnp.float32)


def _images(task: AutoencoderTask, count: int) -> jax.ShapeDtypeStruct:
  side = task.image_size
  return jax.ShapeDtypeStruct((count, side, side, 3), jnp.uint8)


def _count(tree: Any) -> int:
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def _bytes(tree: Any) -> int:
  return sum(
    math.prod(leaf.shape) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
  )


def format_table(table: Mapping[str, Any]) -> str:
  """Three Markdown tables of what `make_table` returns."""
  grid, _, channels = table["latent"]
  head = (
    f"{table['encoder']}, {table['image_size']}² → {table['output_size']}², "
    f"latent {grid} × {grid} × {channels}, {table['dtype']}"
  )
  modules = {name: table["modules"][name] for name in MODULES}
  keys = ("parameters", "forward_flops")
  modules["autoencoder, their sum"] = {
    key: sum(module[key] for module in modules.values()) for key in keys
  }
  modules |= table["modules"]  # what else there is comes after the sum
  rows = [
    [name, _number(m["parameters"], 1e6), _number(m["forward_flops"], 1e9)]
    for name, m in modules.items()
  ]
  sections = [
    head,
    _markdown(
      ["module", "parameters, M", "forward, GFLOP an image"],
      rows,
    ),
    _markdown(
      [
        "training step, an image",
        "batch",
        "GFLOP",
        "GFLOP, remat",
        "kept for backward, MiB",
        "kept, remat, MiB",
      ],
      [_step_row(name, stage) for name, stage in table["stages"].items()],
    ),
    _markdown(
      ["memory, MiB", *table["stages"]],
      _memory_rows(table["stages"]),
    ),
  ]
  return "\n\n".join(sections)


def _step_row(name: str, stage: Mapping[str, Any]) -> list[str]:
  flops, saved = stage["flops"], stage["saved_bytes"]
  return [
    name,
    str(stage["batch_size"]),
    _number(flops["plain"], 1e9),
    _number(flops["remat"], 1e9),
    _number(saved["plain"], 2**20),
    _number(saved["remat"], 2**20),
  ]


def _memory_rows(stages: Mapping[str, Any]) -> list[list[str]]:
  """A row for each kind of array that any of the stages holds."""
  titles = {
    "parameters": "trained parameters",
    "gradients": "their gradients",
    "optimizer": "optimizer state",
    "ema": "moving averages",
    "other_state": "other state",
    "frozen": "frozen networks",
    "total": "sum",
  }
  return [
    [title, *(_number(stage["bytes"][key], 2**20) for stage in stages.values())]
    for key, title in titles.items()
    if any(stage["bytes"][key] for stage in stages.values())
  ]


def _number(value: float, unit: float) -> str:
  """Three digits or more, without an exponent: 0.0123, 86.6, 1,049."""
  value = value / unit
  if value >= 100 or not value:
    return f"{value:,.0f}"
  return f"{value:.{max(2 - math.floor(math.log10(value)), 0)}f}"


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """A Markdown table whose columns line up as plain text too."""
  lines = [head, *rows]
  widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
  rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]

  def format_line(line):
    first, *rest = line
    cells = [first.ljust(widths[0])]
    cells += [
      cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)
    ]
    return f"| {' | '.join(cells)} |"

  return "\n".join(map(format_line, [head, rule, *rows]))


class _Parser(argparse.ArgumentParser):
  """One line for a mistake, where argparse prints its own usage."""

  def error(self, message: str):
    cli.fail(f"{message}; --help shows the flags")


def main(argv: Sequence[str]) -> None:
  """Runs the command with the arguments after its name."""
  if cli.wants_help(argv):
    print(USAGE)
    return
  rest, overrides = cli.split_overrides(argv)
  parser = _Parser(allow_abbrev=False, add_help=False)
  parser.add_argument("--config")
  parser.add_argument("--json", action="store_true")
  flags = parser.parse_args(rest)
  # Shapes need no accelerator: leave it to whoever uses it.
  jax.config.update("jax_platforms", "cpu")
  try:
    if not flags.config:
      raise ConfigError("--config is missing, e.g. --config=configs/psvae.py")
    raw = config_parser.override(cli.load_config(flags.config), overrides)
    table = make_table(config_parser.parse(raw))
  except (ValueError, OSError) as error:
    cli.fail(cli.one_line(error))
  print(json.dumps(table, indent=2) if flags.json else format_table(table))


if __name__ == "__main__":
  cli.guard(lambda: main(sys.argv[1:]), interrupted="nothing was written")
