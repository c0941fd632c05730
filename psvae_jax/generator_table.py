"""What a generator costs: parameters, FLOPs and memory, from the code itself.

The DiT's part of `model_table`: everything is counted from abstract shapes and
from the traced gradient of the training loss. Nothing is loaded or run.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from psvae_jax import cost_table, flow, train_state
from psvae_jax.config import Config, ConfigError
from psvae_jax.config.generator_checks import edit_rows
from psvae_jax.flops import count_flops
from psvae_jax.models import autoencoder as autoencoder_lib
from psvae_jax.models import dit as dit_lib
from psvae_jax.models import generator as generator_lib
from psvae_jax.models.dit import DDTHead, Trunk
from psvae_jax.models.generator import Generator
from psvae_jax.optim import TrainedModule, make_optimizer
from psvae_jax.pretrained.encoder import abstract_encoder
from psvae_jax.pretrained.text_shapes import abstract_text_encoder
from psvae_jax.tasks.autoencoder import EMBEDDED_ENCODER
from psvae_jax.tasks.generator import DIT, EMBEDDED_TEXT_ENCODER, PARTS


@dataclasses.dataclass(frozen=True)
class AbstractGenerator:
  """A generator, with shapes for its parameters and for what is frozen."""

  generator: Generator
  params: Any
  frozen: dict[str, Any]


def abstract_generator(
  config: Config, autoencoder: Config, remat: bool | None = None
) -> AbstractGenerator:
  """The generator of a job on an autoencoder of shapes alone.

  Args:
    config: the generator's job.
    autoencoder: the job of the autoencoder whose latents it learns.
    remat: replaces the config's.

  Raises:
    ConfigError: sizes that do not fit.
    ValueError: the architecture of an encoder is not known.
    FileNotFoundError: a file that describes it is missing.
  """
  compute = config.compute
  if remat is not None:
    compute = dataclasses.replace(compute, remat=remat)
  dtype = jnp.dtype(compute.dtype)
  encoder = abstract_encoder(
    autoencoder.model.encoder or EMBEDDED_ENCODER,
    final_norm=autoencoder.model.final_norm,
    dtype=dtype,
  )
  model = autoencoder_lib.build(
    autoencoder.model, compute, encoder.module, encoder.mean, encoder.std
  )
  fresh = jax.eval_shape(model.init, jax.random.key(0), encoder.params)
  fresh = {"encoder": encoder.params, **fresh}
  text_encoder, text_params = None, {}
  if config.model.condition == "text":
    text_encoder, text_params = abstract_text_encoder(
      config.model.text_encoder or EMBEDDED_TEXT_ENCODER, dtype
    )
  generator = generator_lib.build(config.model, compute, model, text_encoder)
  frozen = {
    "autoencoder": {name: fresh[name] for name in generator_lib.MODULES},
    "text_encoder": text_params,
    "original_encoder": encoder.params,
  }
  params = jax.eval_shape(generator.init, jax.random.key(0))
  return AbstractGenerator(generator, params, frozen)


def make_table(config: Config, autoencoder: Config) -> dict[str, Any]:
  """Counts everything about a job's generator.

  Args:
    config: the job; its stages are generator stages.
    autoencoder: the job of the autoencoder whose latents it learns.

  Returns:
    Plain numbers: `modules` (name → `parameters`, and `forward_flops` of an
    image made from text, `edit_flops` of an edit) and `stages` (name → as
    `cost_table.stage_tables` takes it), beside what the model is.

  Raises:
    ConfigError: a stage of another kind, or sizes that do not fit.
    ValueError: the architecture of an encoder is not known.
    FileNotFoundError: a file that describes it is missing.
  """
  for stage in config.stages:
    if stage not in PARTS:
      raise ConfigError(
        f"this table is of generators: config.stages has {stage!r}, which is "
        f"none of {', '.join(PARTS)}"
      )
  model = abstract_generator(config, autoencoder)
  text = model.generator.text_encoder
  return {
    "condition": config.model.condition,
    "text_encoder": config.model.text_encoder or "embedded miniature",
    "text": [config.model.text_length, text.config.d_model] if text else None,
    "num_classes": config.model.num_classes,
    "latent": list(model.generator.latent_shape),
    "dtype": config.compute.dtype,
    "remat": config.compute.remat,
    "modules": _modules(model),
    "stages": {
      stage: _stage(stage, config, autoencoder) for stage in config.stages
    },
  }


def _modules(model: AbstractGenerator) -> dict[str, dict[str, int]]:
  """Parameters and forward FLOPs of an image and of an edit, by part."""
  generator, params, frozen = model.generator, model.params, model.frozen
  flops = {
    key: _dit_flops(generator, params, edit)
    for key, edit in (("forward_flops", False), ("edit_flops", True))
  }
  parameters = {name: cost_table.count(part) for name, part in params.items()}
  head = "head" if "head" in parameters else "final"
  parts = {
    "trunk": parameters.pop("trunk"),
    "head": parameters.pop(head),
    "embeddings": sum(parameters.values()),
  }
  table = {
    name: {"parameters": size, **{key: flops[key][name] for key in flops}}
    for name, size in parts.items()
  }
  side = generator.autoencoder.config.output_size
  image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.uint8)
  z = cost_table.float32(1, *generator.latent_shape)
  encoded = count_flops(generator.posterior_mean, frozen, image)
  encoders = {k: frozen["autoencoder"][k] for k in generator_lib.MODULES[:2]}
  table["encoding an image"] = {
    "parameters": cost_table.count(encoders),
    "forward_flops": encoded,
    "edit_flops": 2 * encoded,
  }
  if generator.text_encoder is not None:
    words = jax.ShapeDtypeStruct((1, generator.config.text_length), jnp.int32)
    mask = jax.ShapeDtypeStruct(words.shape, jnp.bool_)
    read = count_flops(generator.encode_text, frozen, words, mask)
    table["encoding its text"] = {
      "parameters": cost_table.count(frozen["text_encoder"]),
      "forward_flops": read,
      "edit_flops": read,
    }
  decoder = frozen["autoencoder"]["pixel_decoder"]
  decoded = count_flops(generator.autoencoder.decode_pixels, decoder, z)
  table["decoding a latent"] = {
    "parameters": cost_table.count(decoder),
    "forward_flops": decoded,
    "edit_flops": decoded,
  }
  return table


def _examples(generator: Generator, count: int, edit: bool) -> dict[str, Any]:
  """Shapes of what `Generator.velocity` takes."""
  z = cost_table.float32(count, *generator.latent_shape)
  condition = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((count, *x.shape[1:]), x.dtype),
    generator.abstract_condition(),
  )
  examples = {
    "z_t": z,
    "t": cost_table.float32(count),
    "condition": condition,
  }
  if edit:
    mask = jax.ShapeDtypeStruct((count,), jnp.bool_)
    examples |= {"source": z, "source_mask": mask}
  return examples


def _dit_flops(generator: Generator, params: Any, edit: bool) -> dict[str, int]:
  """Forward FLOPs of one example in trunk, head and all the rest."""
  dit, config = generator.dit, generator.dit.config
  examples = _examples(generator, 1, edit)

  def velocity(params, examples):
    return generator.velocity(params, **examples)

  total = count_flops(velocity, params, examples)
  height, width, _ = generator.latent_shape
  noisy = height * width
  text = examples["condition"].get("text")
  clean = (1 if text is None else text.shape[1]) + edit * noisy
  shape = dit_lib.trunk_config(config)
  trunk = count_flops(
    lambda params, *rest: Trunk(shape, config.depth, clean).apply(
      {"params": params}, *rest
    ),
    params["trunk"],
    cost_table.float32(1, clean + noisy, config.width),
    cost_table.float32(1, 2, config.width),
    cost_table.float32(clean + noisy, shape.head_dim // 2),
    jax.ShapeDtypeStruct((1, clean + noisy), jnp.bool_),
  )
  head = 0
  if config.head_depth:
    module = DDTHead(
      dit_lib.head_config(config), config.head_depth, dit.channels
    )
    head = count_flops(
      lambda params, latents, tokens: module.apply(
        {"params": params}, latents, tokens, (height, width)
      ),
      params["head"],
      cost_table.float32(1, noisy, dit.channels),
      cost_table.float32(1, noisy, config.width),
    )
  else:
    head = 2 * noisy * config.width * dit.channels + 4 * config.width**2
  return {"trunk": trunk, "head": head, "embeddings": total - trunk - head}


def _stage(stage: str, config: Config, autoencoder: Config) -> dict[str, Any]:
  """What a training step of one stage takes, see `cost_table.stage_tables`.

  FLOPs are of the DiT, and of the frozen networks where nothing is cached.
  """
  section = config.sections[stage]
  batch_size = section.train.batch_size
  edits = edit_rows(section) if stage == "edit" else 0
  shares = {False: 1 - edits / batch_size, True: edits / batch_size}
  flops, saved = {}, {}
  for remat in (False, True):
    model = abstract_generator(config, autoencoder, remat)
    key = "remat" if remat else "plain"
    used = [edit for edit, share in shares.items() if share]
    flops[key] = round(
      sum(shares[edit] * _step_flops(config, model, edit) for edit in used)
    )
    saved[key] = round(
      sum(shares[edit] * _saved_bytes(model, edit) for edit in used)
    )
  modules = {DIT: TrainedModule(section.optim)}
  tx = make_optimizer(modules, section.train.steps)

  def create(rng):
    params = {DIT: model.generator.init(rng)}
    return train_state.create(params, {}, tx, modules)

  state = jax.eval_shape(create, jax.random.key(0))
  parts = {
    "parameters": state.params,
    "gradients": state.params,
    "optimizer": state.opt_state,
    "ema": state.ema_params,
    "other_state": state.model_state,
    "frozen": model.frozen,
  }
  sizes = {name: cost_table.nbytes(tree) for name, tree in parts.items()}
  return {
    "trains": [DIT],
    "batch_size": batch_size,
    "flops": flops,
    "bytes": {**sizes, "total": sum(sizes.values())},
    "saved_bytes": saved,
  }


def _loss(model: AbstractGenerator, params: Any, examples: Any) -> jax.Array:
  """The task's: mean squared error of the velocity."""
  v = model.generator.velocity(params, **examples)
  target = flow.velocity(examples["z_t"], jnp.zeros_like(v))
  return jnp.mean(jnp.square(v - target))


def _step_flops(config: Config, model: AbstractGenerator, edit: bool) -> int:
  """FLOPs of one example in a training step."""
  examples = _examples(model.generator, 1, edit)

  def gradient(params, examples):
    return jax.grad(lambda p: _loss(model, p, examples))(params)

  flops = count_flops(gradient, model.params, examples)
  table = _modules(model)
  key = "edit_flops" if edit else "forward_flops"
  if not config.cache.enabled:
    flops += table["encoding an image"][key]
  if not (config.cache.enabled and config.cache.text):
    flops += table.get("encoding its text", {key: 0})[key]
  return flops


def _saved_bytes(model: AbstractGenerator, edit: bool) -> int:
  """Bytes an example adds to what waits for the backward pass.

  Before the compiler: it may keep less, by fusing, or hold more for a while.
  """

  def kept(params, examples):
    _, pull = jax.vjp(lambda p: _loss(model, p, examples), params)
    return jax.tree.leaves(pull)

  def size(count):
    examples = _examples(model.generator, count, edit)
    return cost_table.nbytes(jax.eval_shape(kept, model.params, examples))

  return size(2) - size(1)  # parameters are kept too, whatever the batch


def format_table(table: Mapping[str, Any]) -> str:
  """Three Markdown tables of what `make_table` returns."""
  height, width, channels = table["latent"]
  if table["text"]:
    length, features = table["text"]
    given = f"{table['text_encoder']}, {length} tokens × {features}"
  else:
    given = f"{table['num_classes']} classes"
  head = f"{given}, latent {height} × {width} × {channels}, {table['dtype']}"
  keys = ("parameters", "forward_flops", "edit_flops")
  parts = ("trunk", "head", "embeddings")
  modules = {name: table["modules"][name] for name in parts}
  modules["generator, their sum"] = {
    key: sum(module[key] for module in modules.values()) for key in keys
  }
  modules |= table["modules"]
  rows = [
    [
      name,
      cost_table.number(m["parameters"], 1e6),
      cost_table.number(m["forward_flops"], 1e9),
      cost_table.number(m["edit_flops"], 1e9),
    ]
    for name, m in modules.items()
  ]
  columns = [
    "module",
    "parameters, M",
    "forward, GFLOP an image",
    "of an edit",
  ]
  stages = cost_table.stage_tables(table["stages"])
  return "\n\n".join([head, cost_table.markdown(columns, rows), *stages])
