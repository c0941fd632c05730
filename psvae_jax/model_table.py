"""What a model costs: parameters, FLOPs and memory, from the code itself.

    python -m psvae_jax.model_table --config=configs/psvae.py:base

Everything is counted from abstract shapes and from the traced program of the
real training step. Nothing is compiled or run, and of weights only those of a
DINO discriminator are loaded ("random:facebook/dino-vits8" will do).
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from psvae_jax import cli, cost_table, generator_table, train, train_state
from psvae_jax.config import (
  AutoencoderModel,
  Config,
  ConfigError,
  GeneratorModel,
)
from psvae_jax.config import parser as config_parser
from psvae_jax.flops import count_flops
from psvae_jax.models.autoencoder import MODULES
from psvae_jax.optim import make_optimizer
from psvae_jax.pretrained.encoder import abstract_encoder
from psvae_jax.tasks import autoencoder, perceptual
from psvae_jax.tasks.autoencoder import AutoencoderTask
from psvae_jax.tasks.perceptual import PERCEPTUAL
from psvae_jax.tasks.routes import ROUTES
from psvae_jax.train_state import TrainState

USAGE = """\
Usage: python -m psvae_jax.model_table --config=FILE[:VARIANT] [--json]

Prints what an autoencoder or a generator costs, counted from the code:
parameters and forward FLOPs of every module; FLOPs of a training step and
memory of each stage. Only the encoders' config.json are needed, and for
published DINOv2 and T5 ids not even those; with discriminator.kind=dino also
its weights (random:facebook/dino-vits8 will do). Nothing is compiled or run; it
takes half a minute.

A step's FLOPs are those of its matrix products and convolutions, with the
adversary at work. "Kept for backward" is what the forward pass of autoencoder
and LPIPS saves for the backward pass, before the compiler rearranges anything;
a generator's is the DiT's. A row "perceptual" is LPIPS on one pair of images;
its weights are not needed here.

  --config=FILE[:VARIANT]  the job, as for psvae_jax.main
  --config.FIELD=VALUE     any field of it
  --autoencoder=FILE[:VARIANT]
                           of a generator's job: that of the autoencoder whose
                           latents it learns (a workdir's config.json is one)
  --json                   print one JSON object (exact numbers), not tables
  --help                   this page

Examples:
  python -m psvae_jax.model_table --config=configs/psvae.py:base
  python -m psvae_jax.model_table --config=configs/psvae.py:base,decoder=vit
  python -m psvae_jax.model_table --config=configs/psvae.py:large \\
    --config.psvae.train.batch_size=64 --json > large.json
  python -m psvae_jax.model_table --config=configs/t2i.py:0.65B \\
    --autoencoder=configs/psvae.py:base
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
  # The stage with the most modules: with discriminator and LPIPS, where they
  # are.
  most = max(
    tasks.values(), key=lambda task: (len(task.modules), len(task.frozen))
  )
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
  """The task of a stage with frozen networks of shapes alone."""
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
  lpips = None
  if config.sections[stage].loss.lpips:
    lpips = perceptual.abstract(config)
  return AutoencoderTask(
    stage, config, Path(), encoder=encoder, perceptual=lpips
  )


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
  tokens = cost_table.float32(1, model.grid, model.grid, width)
  z = cost_table.float32(1, model.grid, model.grid, model.config.channels)
  calls = dict(
    zip(
      MODULES,
      (
        (model.features, cost_table.float32(1, side, side, 3)),
        (model.posterior, tokens),
        (model.decode_features, z),
        (model.decode_pixels, z),
      ),
      strict=True,
    )
  )
  table = {
    name: {
      "parameters": cost_table.count(params[name]),
      "forward_flops": count_flops(call, params[name], x),
    }
    for name, (call, x) in calls.items()
  }
  if task.discriminator is not None:
    image = cost_table.float32(1, task.image_size, task.image_size, 3)
    table[DISCRIMINATOR] = {
      "parameters": cost_table.count(state.params[DISCRIMINATOR]),
      "forward_flops": count_flops(
        task.discriminator.logits,
        state.params[DISCRIMINATOR],
        state.model_state[DISCRIMINATOR],
        task.frozen.get(DISCRIMINATOR, {}),
        image,
      ),
    }
  if task.perceptual is not None:
    image = cost_table.float32(1, task.image_size, task.image_size, 3)
    params = task.frozen[PERCEPTUAL]
    table[PERCEPTUAL] = {
      "parameters": cost_table.count(params),
      "forward_flops": count_flops(
        task.perceptual.distance, params, image, image
      ),
    }
  return table


def _stage(stage: str, config: Config) -> dict[str, Any]:
  """What a training step of one stage takes.

  Returns:
    `trains`: the trained modules. `batch_size`. `flops`: of a step, an image,
    with the adversary at work: without rematerialisation (the figure for
    utilisation) and with it. `bytes`: of the arrays that stay. `saved_bytes`:
    what the forward pass of autoencoder and LPIPS keeps for the backward pass,
    an image, without and with rematerialisation.
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
  sizes = {name: cost_table.nbytes(tree) for name, tree in parts.items()}
  return {
    "trains": list(task.modules),
    "batch_size": batch_size,
    "flops": flops,
    "bytes": {**sizes, "total": sum(sizes.values())},
    "saved_bytes": saved,
  }


def _saved_bytes(task: AutoencoderTask, state: TrainState) -> int:
  """Bytes an image adds to what waits for the backward pass.

  Of the autoencoder and LPIPS; the adversary's share is not in it. Before the
  compiler: it may keep less, by fusing, or hold more for a while.
  """
  params = {name: state.params[name] for name in task.route.trains}
  grid, channels = task.model.grid, task.config.model.channels

  def kept(params, frozen, images, noise):
    def outputs(params):
      out = autoencoder.forward(
        task.model, task.route, params, frozen, images, noise
      )
      terms, _ = task.latent_terms(out)
      return (sum(terms.values()), out.reconstruction), out.image

    (_, fake), pull, real = jax.vjp(outputs, params, has_aux=True)
    _, pull_pixel = jax.vjp(
      lambda fake: task.pixel_loss(frozen, fake, real)[0], fake
    )
    return jax.tree.leaves((pull, pull_pixel))

  def size(count):
    noise = cost_table.float32(count, grid, grid, channels)
    images = _images(task, count)
    return cost_table.nbytes(
      jax.eval_shape(kept, params, task.frozen, images, noise)
    )

  return size(2) - size(1)  # parameters are kept too, whatever the batch


def _images(task: AutoencoderTask, count: int) -> jax.ShapeDtypeStruct:
  side = task.image_size
  return jax.ShapeDtypeStruct((count, side, side, 3), jnp.uint8)


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
    [
      name,
      cost_table.number(m["parameters"], 1e6),
      cost_table.number(m["forward_flops"], 1e9),
    ]
    for name, m in modules.items()
  ]
  sections = [
    head,
    cost_table.markdown(
      ["module", "parameters, M", "forward, GFLOP an image"],
      rows,
    ),
    *cost_table.stage_tables(table["stages"]),
  ]
  return "\n\n".join(sections)


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
  parser.add_argument("--autoencoder")
  parser.add_argument("--json", action="store_true")
  flags = parser.parse_args(rest)
  # Shapes need no accelerator: leave it to whoever uses it.
  jax.config.update("jax_platforms", "cpu")
  try:
    if not flags.config:
      raise ConfigError("--config is missing, e.g. --config=configs/psvae.py")
    raw = config_parser.override(cli.load_config(flags.config), overrides)
    config = config_parser.parse(raw)
    if isinstance(config.model, GeneratorModel):
      table = generator_table.make_table(config, _autoencoder(flags))
      text = generator_table.format_table(table)
    else:
      table = make_table(config)
      text = format_table(table)
  except (ValueError, OSError) as error:
    cli.fail(cli.one_line(error))
  print(json.dumps(table, indent=2) if flags.json else text)


def _autoencoder(flags: argparse.Namespace) -> Config:
  """The job that --autoencoder names."""
  if not flags.autoencoder:
    raise ConfigError(
      "a generator's table needs the autoencoder whose latents it learns: "
      "--autoencoder=configs/psvae.py:VARIANT, or a workdir's config.json"
    )
  config = config_parser.parse(cli.load_config(flags.autoencoder))
  if not isinstance(config.model, AutoencoderModel):
    raise ConfigError(
      f"--autoencoder={flags.autoencoder} is no job of an autoencoder: its "
      f"stages are {', '.join(config.stages)}"
    )
  return config


if __name__ == "__main__":
  cli.guard(lambda: main(sys.argv[1:]), interrupted="nothing was written")
