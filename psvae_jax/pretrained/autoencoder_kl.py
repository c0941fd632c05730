"""KL autoencoders on disk: diffusers' `AutoencoderKL` folders.

A folder has `config.json` (`"_class_name": "AutoencoderKL"`) and
`diffusion_pytorch_model.safetensors`, whole or sharded. Checkpoints of the
original LDM layout become such folders, see `pretrained.ldm`.
"""

import dataclasses
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from psvae_jax.models.kl_autoencoder import KLAutoencoder, KLConfig
from psvae_jax.pretrained import files, mapping
from psvae_jax.pretrained.fields import Fields, show

# No model is near it; every block is traced for itself.
_MAX_BLOCKS = 64
CLASS_NAME = "AutoencoderKL"
STEM = "diffusion_pytorch_model"

# Without and with attention after every res block.
_DOWN_BLOCKS = ("DownEncoderBlock2D", "AttnDownEncoderBlock2D")
_UP_BLOCKS = ("UpDecoderBlock2D", "AttnUpDecoderBlock2D")


def _f8(**options) -> KLConfig:
  """Stable Diffusion's: attention in the middles alone."""
  return KLConfig(
    block_out_channels=(128, 256, 512, 512),
    layers_per_block=2,
    down_attention=(False,) * 4,
    up_attention=(False,) * 4,
    **options,
  )


def _f16(decoder_attention: bool, **options) -> KLConfig:
  """LDM's of factor 16: attention also at 16×16, in the decoder or not."""
  return KLConfig(
    block_out_channels=(128, 128, 256, 256, 512),
    layers_per_block=2,
    down_attention=(False,) * 4 + (True,),
    up_attention=(decoder_attention,) + (False,) * 4,
    **options,
  )


_SD = _f8(latent_channels=4, scaling_factor=0.18215)
_SDXL = _f8(latent_channels=4, scaling_factor=0.13025, sample_size=1024)
_F8D16 = _f8(
  latent_channels=16,
  use_quant_conv=False,
  use_post_quant_conv=False,
  sample_size=1024,
)
_SD3 = dataclasses.replace(_F8D16, scaling_factor=1.5305, shift_factor=0.0609)
_FLUX = dataclasses.replace(_F8D16, scaling_factor=0.3611, shift_factor=0.1159)

# What "random:NAME" builds and what a converted checkpoint may be said to be:
# hub ids, and short names where a checkpoint has no diffusers folder.
PUBLISHED = {
  "stabilityai/sd-vae-ft-ema": _SD,
  "stabilityai/sd-vae-ft-mse": _SD,
  "stabilityai/sdxl-vae": _SDXL,
  "stabilityai/stable-diffusion-3-medium-diffusers": _SD3,
  "black-forest-labs/FLUX.1-dev": _FLUX,
  "black-forest-labs/FLUX.1-schnell": _FLUX,
  "sd": _SD,
  "sdxl": _SDXL,
  "sd3": _SD3,
  "flux": _FLUX,
  # LDM's kl-f16: attention at 16×16 on both sides. The factor is RDM's.
  "ldm-kl-f16": _f16(True, latent_channels=16, scaling_factor=0.22765929),
  # MAR's differs from it: no attention at 16×16 in the decoder.
  "mar-kl16": _f16(False, latent_channels=16, scaling_factor=0.2325),
  # Its generators standardise every channel; there is no one factor.
  "va-vae-f16d32": _f16(True, latent_channels=32),
}


@dataclasses.dataclass(frozen=True)
class Names:
  """How a layout names the parts of the two networks.

  Attributes:
    down, up: a level of the encoder, of the decoder.
    up_reversed: whether the decoder's levels count from the finest one.
    res, attention: the i-th block of a level.
    halve, double: a level's resampling convolution.
    middle: res block, attention, res block of the middle.
    norm_out: the last norm.
    shortcut: of a res block whose width changes.
    norm: of an attention block.
    projections: query, key, value, output of an attention block.
    projection: axis order of their weights.
  """

  down: str
  up: str
  up_reversed: bool
  res: str
  attention: str
  halve: str
  double: str
  middle: tuple[str, str, str]
  norm_out: str
  shortcut: str
  norm: str
  projections: tuple[str, str, str, str]
  projection: mapping.Layout


# A 1×1 convolution is a Dense.
_CONV_1X1 = mapping.Layout(
  lambda x: x.reshape(x.shape[:2]).transpose(1, 0),
  lambda x: x.transpose(1, 0).reshape(x.shape[1], x.shape[0], 1, 1),
)

DIFFUSERS = Names(
  down="encoder.down_blocks",
  up="decoder.up_blocks",
  up_reversed=False,
  res="resnets",
  attention="attentions",
  halve="downsamplers.0.conv",
  double="upsamplers.0.conv",
  middle=(
    "mid_block.resnets.0",
    "mid_block.attentions.0",
    "mid_block.resnets.1",
  ),
  norm_out="conv_norm_out",
  shortcut="conv_shortcut",
  norm="group_norm",
  projections=("to_q", "to_k", "to_v", "to_out.0"),
  projection=mapping.LINEAR,
)
LDM = Names(
  down="encoder.down",
  up="decoder.up",
  up_reversed=True,
  res="block",
  attention="attn",
  halve="downsample.conv",
  double="upsample.conv",
  middle=("mid.block_1", "mid.attn_1", "mid.block_2"),
  norm_out="norm_out",
  shortcut="nin_shortcut",
  norm="norm",
  projections=("q", "k", "v", "proj_out"),
  projection=_CONV_1X1,
)
# What diffusers called an attention block's projections before 2023.
_RENAMED = {
  "query": "to_q",
  "key": "to_k",
  "value": "to_v",
  "proj_attn": "to_out.0",
}


def rules(config: KLConfig, names: Names = DIFFUSERS) -> list[mapping.Rule]:
  """Published tensor of every parameter of `KLAutoencoder(config)`.

  Args:
    config: hyper-parameters.
    names: the layout, `DIFFUSERS` or `LDM`.
  """
  table = []
  for side in ("encoder", "decoder"):
    table += _pair(f"{side}/conv_in", f"{side}.conv_in", mapping.CONV)
    table += _pair(f"{side}/conv_out", f"{side}.conv_out", mapping.CONV)
    table += _norm(f"{side}/norm_out", f"{side}.{names.norm_out}")
    first, attention, second = (f"{side}.{part}" for part in names.middle)
    table += _res(f"{side}/mid_res0", first, names)
    table += _res(f"{side}/mid_res1", second, names)
    if config.mid_attention:
      table += _attention(f"{side}/mid_attention", attention, names)
  table += _levels(config, names, encoder=True)
  table += _levels(config, names, encoder=False)
  if config.use_quant_conv:
    table += _pair("quant_conv", "quant_conv", _CONV_1X1)
  if config.use_post_quant_conv:
    table += _pair("post_quant_conv", "post_quant_conv", _CONV_1X1)
  return table


def _levels(
  config: KLConfig, names: Names, encoder: bool
) -> Iterator[mapping.Rule]:
  """Rules of the levels of one side, in the order they are computed."""
  widths = config.block_out_channels
  if encoder:
    ours, theirs, resample = "encoder/down", names.down, names.halve
    attended, blocks, done = config.down_attention, 0, "downsample"
  else:
    ours, theirs, resample = "decoder/up", names.up, names.double
    attended, blocks, done = config.up_attention, 1, "upsample"
    widths = widths[::-1]
  last = len(widths) - 1
  for level, width in enumerate(widths):
    reverse = names.up_reversed and not encoder
    key = f"{theirs}.{last - level if reverse else level}"
    for i in range(config.layers_per_block + blocks):
      changes = i == 0 and width != widths[max(level - 1, 0)]
      path = f"{ours}{level}"
      yield from _res(
        f"{path}_res{i}", f"{key}.{names.res}.{i}", names, changes
      )
      if attended[level]:
        block = f"{key}.{names.attention}.{i}"
        yield from _attention(f"{path}_attention{i}", block, names)
    if level < last:
      path = f"{ours}{level}_{done}"
      yield from _pair(path, f"{key}.{resample}", mapping.CONV)


def _pair(
  path: str, key: str, layout: mapping.Layout, name: str = "kernel"
) -> Iterator[mapping.Rule]:
  yield mapping.Rule(f"{path}/{name}", f"{key}.weight", layout)
  yield mapping.Rule(f"{path}/bias", f"{key}.bias")


def _norm(path: str, key: str) -> Iterator[mapping.Rule]:
  return _pair(path, key, mapping.SAME, "scale")


def _res(
  path: str, key: str, names: Names, shortcut: bool = False
) -> Iterator[mapping.Rule]:
  for n in (1, 2):
    yield from _norm(f"{path}/norm{n}", f"{key}.norm{n}")
    yield from _pair(f"{path}/conv{n}", f"{key}.conv{n}", mapping.CONV)
  if shortcut:
    yield from _pair(f"{path}/shortcut", f"{key}.{names.shortcut}", _CONV_1X1)


def _attention(path: str, key: str, names: Names) -> Iterator[mapping.Rule]:
  yield from _norm(f"{path}/norm", f"{key}.{names.norm}")
  ours = ("query", "key", "value", "out")
  for name, theirs in zip(ours, names.projections, strict=True):
    yield from _pair(f"{path}/{name}", f"{key}.{theirs}", names.projection)


def parse_config(raw: Mapping[str, Any], path: pathlib.Path) -> KLConfig:
  """A published config.json → ours; errors name the file and the field."""
  fields = Fields(raw, path)
  fields.expect(
    _class_name=CLASS_NAME,
    in_channels=3,
    out_channels=3,
    latents_mean=None,
    latents_std=None,
  )
  if raw.get("act_fn") != "swish":  # another name of it
    fields.expect(act_fn="silu")
  widths = fields.get("block_out_channels", list)
  if not all(type(width) is int for width in widths):
    raise ValueError(
      f"{path}: block_out_channels is {show(widths)}, it must be whole numbers"
    )
  layers = fields.get("layers_per_block", int, 1)
  if len(widths) * layers > _MAX_BLOCKS:
    raise ValueError(
      f"{path}: layers_per_block {show(layers)} of {len(widths)} levels are "
      f"more than {_MAX_BLOCKS} blocks"
    )
  shift = "shift_factor"
  # Defaults are those of diffusers' class, which files may leave out.
  return fields.build(
    KLConfig,
    block_out_channels=tuple(widths),
    layers_per_block=layers,
    latent_channels=fields.get("latent_channels", int, 4),
    down_attention=_attended(fields, path, "down_block_types", _DOWN_BLOCKS),
    up_attention=_attended(fields, path, "up_block_types", _UP_BLOCKS),
    mid_attention=fields.get("mid_block_add_attention", bool, True),
    norm_num_groups=fields.get("norm_num_groups", int, 32),
    use_quant_conv=fields.get("use_quant_conv", bool, True),
    use_post_quant_conv=fields.get("use_post_quant_conv", bool, True),
    scaling_factor=fields.get("scaling_factor", float, 0.18215),
    shift_factor=fields.get(shift, float) if fields.has(shift) else 0.0,
    sample_size=fields.side("sample_size", 32),
  )


def _attended(
  fields: Fields, path: pathlib.Path, name: str, blocks: tuple[str, str]
) -> tuple[bool, ...]:
  """Which levels have attention, by the names of their blocks."""
  kinds = fields.get(name, list)
  unknown = [kind for kind in kinds if kind not in blocks]
  if unknown:
    raise ValueError(
      f"{path}: {name} has {show(unknown[0])}, which is not supported; "
      f"supported: {', '.join(blocks)}"
    )
  return tuple(kind == blocks[1] for kind in kinds)


def format_config(config: KLConfig) -> dict[str, Any]:
  """Ours → a published config.json."""
  same = dataclasses.asdict(config)
  for name in ("down_attention", "up_attention", "mid_attention"):
    del same[name]
  down = [_DOWN_BLOCKS[flag] for flag in config.down_attention]
  up = [_UP_BLOCKS[flag] for flag in config.up_attention]
  return {
    **same,
    "_class_name": CLASS_NAME,
    "act_fn": "silu",
    "block_out_channels": list(config.block_out_channels),
    "down_block_types": down,
    "in_channels": 3,
    "mid_block_add_attention": config.mid_attention,
    "out_channels": 3,
    "up_block_types": up,
  }


def read_folder(folder: pathlib.Path) -> tuple[KLConfig, dict[str, Any]]:
  """Reads a folder: hyper-parameters and float32 host parameters.

  Raises:
    FileNotFoundError: a file is missing.
    ValueError: an unsupported architecture, or a malformed or ill-fitting
      file; the message names it.
  """
  config = parse_config(files.read_config(folder), folder / "config.json")
  tensors = files.read_safetensors(folder, STEM)
  params = mapping.import_params(
    rules(config), _modern(tensors), param_shapes(config), source=str(folder)
  )
  return config, params


def write_folder(
  folder: str | os.PathLike,
  raw: Mapping[str, Any],
  tensors: Mapping[str, np.ndarray],
) -> None:
  """Writes a folder that `read_folder` and diffusers read.

  Args:
    folder: created if need be; files of the same names are replaced.
    raw: config.json, e.g. from `format_config` or `ldm.convert`.
    tensors: host arrays by published name.
  """
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  files.write_safetensors(folder / f"{STEM}.safetensors", tensors)
  files.write_json(folder / "config.json", raw)


def _modern(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Attention blocks of old files under the names of new ones."""
  out = {}
  for key, tensor in tensors.items():
    block, _, leaf = key.rpartition(".")
    parent, _, name = block.rpartition(".")
    if ".attentions." in key:
      name = _RENAMED.get(name, name)
      if leaf == "weight" and tensor.ndim == 4 and tensor.shape[2:] == (1, 1):
        tensor = tensor[:, :, 0, 0]
    key = ".".join(part for part in (parent, name, leaf) if part)
    out[key] = tensor
  return out


def param_shapes(config: KLConfig) -> Any:
  """The module's parameters as shapes; nothing is allocated."""
  side = config.factor
  images = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
  module = KLAutoencoder(config)
  return jax.eval_shape(module.init, jax.random.key(0), images)["params"]
