"""The diffusion transformer once more: float64, numpy, one step a line.

Written from the papers that `models.dit` names, for a trunk of three blocks and
a head of one. Shares only the blocks' sizes.
"""

import functools

import jax
import numpy as np

from psvae_jax.models.dit import head_config, trunk_config


def _dense(name, x):
  return x @ name["kernel"] + name["bias"]


def _norm(x):
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)


def _silu(x):
  return x / (1 + np.exp(-x))


def block(p, config, x, vectors, angles, mask):
  """The block in float64, one token's modulation in each row of `vectors`."""
  modulation = _dense(p["modulation"]["dense"], vectors)
  a1, b1, g1, a2, b2, g2 = np.split(modulation, 6, axis=-1)
  attention, mlp = p["attention"], p["mlp"]
  h = _norm(x) * (1 + b1) + a1
  out = np.zeros_like(x)
  size = config.head_dim
  for head in range(config.num_heads):
    part = slice(head * size, (head + 1) * size)

    def turned(name, part=part, h=h):
      y = _norm(_dense(attention[name], h)[..., part])
      y = y * attention[f"{name}_norm"]
      z = y[..., : size // 2] + 1j * y[..., size // 2 :]
      z = z * np.exp(1j * angles)
      return np.concatenate([z.real, z.imag], axis=-1)

    logits = turned("query") @ turned("key").swapaxes(1, 2) / np.sqrt(size)
    weights = np.exp(logits - logits.max(-1, keepdims=True)) * mask[:, None]
    weights /= weights.sum(-1, keepdims=True)
    out[..., part] = weights @ _dense(attention["value"], h)[..., part]
  x = x + g1 * _dense(attention["out"], out)
  h = _norm(x) * (1 + b2) + a2
  hidden = _silu(_dense(mlp["gate"], h)) * _dense(mlp["fc1"], h)
  return x + g2 * _dense(mlp["fc2"], hidden)


def dit(config, p, noisy, t, text, text_mask, source, source_mask):
  """The whole model in float64, on a 2 × 3 grid."""
  latents, source = (x.reshape(2, 6, -1) for x in (noisy, source))
  prompt, types = p["text"], p["type_embedding"]
  embed = functools.partial(_dense, p["latent_embedding"])
  text = _norm(text)
  words = _dense(prompt["text_embedding"], text) + prompt["position_embedding"]
  width = words.shape[-1]
  speed = 10_000.0 ** (-np.arange(width // 4) / (width // 4))
  turns = [
    np.outer(axis, speed) for axis in (np.arange(6) // 3, np.arange(6) % 3)
  ]
  code = [wave(turn) for turn in turns for wave in (np.sin, np.cos)]
  code = np.concatenate(code, axis=1)
  before, now = embed(source) + code, embed(latents) + code
  x = [before + types[0], words + types[1], now + types[2]]
  x = np.concatenate(x, axis=1)
  kept = np.repeat(source_mask[:, None], 6, axis=1)
  mask = np.concatenate([kept, text_mask, np.ones((2, 6), bool)], axis=1)

  mean = (text * text_mask[..., None]).sum(1) / text_mask.sum(1)[:, None]
  pooled = _dense(prompt["pooled2"], _silu(_dense(prompt["pooled1"], mean)))

  def condition(t):
    waves = 1000 * t[:, None] * 10_000.0 ** (-np.arange(128) / 128)
    waves = np.concatenate([np.cos(waves), np.sin(waves)], axis=1)
    hidden = _silu(_dense(p["time"]["fc1"], waves))
    return (_dense(p["time"]["fc2"], hidden) + pooled)[:, None]

  def places(head_dim):
    """Angles of a 2 × 3 grid."""
    pairs = head_dim // 4
    speed = 10_000.0 ** (-np.arange(pairs) / pairs)
    rows, columns = np.arange(6) // 3, np.arange(6) % 3
    return np.concatenate([np.outer(rows, speed), np.outer(columns, speed)], 1)

  clean, now = condition(np.zeros(2)), condition(t)
  each = np.concatenate([np.repeat(clean, 10, 1), np.repeat(now, 6, 1)], axis=1)
  shape = trunk_config(config)
  turns = places(shape.head_dim)
  angles = np.concatenate(
    [turns, np.zeros((text.shape[1], turns.shape[1])), turns]
  )
  stack = p["trunk"]["block"]
  blocks = [jax.tree.map(lambda x, i=i: x[i], stack) for i in (0, 1)]
  for layer in [*blocks, p["trunk"]["last"]]:
    x = block(layer, shape, x, _silu(each), angles, mask)

  head, shape = p["head"], head_config(config)
  vectors = _silu(_dense(head["condition"], _silu(_norm(x[:, 10:]) + now)))
  x = _dense(head["latent_embedding"], latents)
  turns, mask = places(shape.head_dim), np.ones((2, 6), bool)
  x = block(head["block0"], shape, x, vectors, turns, mask)
  final = head["final"]
  modulation = _dense(final["modulation"]["dense"], vectors)
  shift, scale = np.split(modulation, 2, axis=-1)
  v = _dense(final["velocity"], _norm(x) * (1 + scale) + shift)
  return v.reshape(noisy.shape)
