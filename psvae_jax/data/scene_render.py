"""Draws a scene: signed-distance shapes, analytic anti-aliasing, numpy only.

An object touches only the pixels of its own box, so that two scenes which
share an object share its pixels exactly.
"""

import colorsys
import functools
import math

import numpy as np

from psvae_jax.data import scene_types, textures


def render(
  scene: scene_types.Scene, image_size: int = scene_types.IMAGE_SIZE
) -> np.ndarray:
  """Draws a scene.

  Args:
    scene: what to draw.
    image_size: side S in pixels, at least 16.

  Returns:
    uint8 (S, S, 3), RGB, rounded to the nearest level.

  Raises:
    ValueError: `image_size` is too small to show anything.
  """
  if image_size < 16:
    raise ValueError(f"image_size {image_size}: scenes need at least 16 pixels")
  image = _background(scene.background, image_size)
  for item in scene.objects:
    rows, columns, alpha, u, v = _object_pixels(item, image_size)
    if item.stripe_depth:
      across = u * math.cos(item.stripe_angle) + v * math.sin(item.stripe_angle)
      across *= 2 * math.pi * item.stripe_frequency
      across += item.stripe_phase
      shade = np.sin(across)
      shade *= 0.5 * item.stripe_depth
      shade += 1.0 - 0.5 * item.stripe_depth
      paint = shade[..., None] * _rgb(item)
    else:
      paint = _rgb(item)
    patch = image[rows, columns]
    patch += alpha[..., None] * (paint - patch)
  np.clip(image, 0.0, 255.0, out=image)
  np.rint(image, out=image)
  return image.astype(np.uint8)


def object_masks(
  scene: scene_types.Scene, image_size: int = scene_types.IMAGE_SIZE
) -> np.ndarray:
  """Share of each pixel that each object covers: float32 (objects, S, S)."""
  masks = np.zeros((len(scene.objects), image_size, image_size), np.float32)
  for mask, item in zip(masks, scene.objects, strict=True):
    rows, columns, alpha, _, _ = _object_pixels(item, image_size)
    mask[rows, columns] = alpha
  return masks


def signed_distance(shape: int, u: np.ndarray, v: np.ndarray) -> np.ndarray:
  """Signed distance to a shape of radius 1, negative inside.

  Exact near the outline except beyond corners, which is all anti-aliasing
  needs.

  Args:
    shape: index into `SHAPES`.
    u: to the right, in radii, any shape.
    v: downwards, as `u`.
  """
  name = scene_types.SHAPES[shape]
  if name == "circle":
    return np.sqrt(u * u + v * v) - 1.0
  if name == "ring":
    return np.abs(np.sqrt(u * u + v * v) - 0.77) - 0.25
  a = np.abs(u)
  if name == "triangle":
    return np.maximum(v, 0.8660254 * a - 0.5 * v) - 0.565
  b = np.abs(v)
  if name == "square":
    return np.maximum(a, b) - 0.8
  if name == "cross":
    return np.maximum(np.minimum(a, b) - 0.36, np.maximum(a, b) - 1.02)
  return _star(u, v)


_STAR_TIP, _STAR_NOTCH = 1.13, 0.5


def _star(u: np.ndarray, v: np.ndarray) -> np.ndarray:
  # Fold the plane into the wedge between the upper tip and the next notch,
  # where the outline is one straight line. Five-fold symmetry as mirrors.
  wedge = math.pi / 5
  cosine, sine = math.cos(wedge), math.sin(wedge)
  x, y = np.abs(u), -v
  for normal_x, normal_y in ((cosine, -sine), (-cosine, -sine)):
    beyond = np.maximum(x * normal_x + y * normal_y, 0.0)
    x = x - 2.0 * beyond * normal_x
    y = y - 2.0 * beyond * normal_y
  x = np.abs(x)
  along_x = _STAR_NOTCH * sine
  along_y = _STAR_NOTCH * cosine - _STAR_TIP
  length = math.hypot(along_x, along_y)
  return (-along_y * x + along_x * (y - _STAR_TIP)) / length


_EXTENT = 1.14  # no shape of radius 1 goes beyond, at any angle


def _object_pixels(item: scene_types.SceneObject, image_size: int):
  """Box, coverage, and object coordinates (in radii) of the box's pixels."""
  radius = item.radius * image_size
  centre_x, centre_y = item.x * image_size, item.y * image_size
  reach = _EXTENT * radius + 1.0
  left, right = max(int(centre_x - reach), 0), int(centre_x + reach) + 1
  top, bottom = max(int(centre_y - reach), 0), int(centre_y + reach) + 1
  right, bottom = min(right, image_size), min(bottom, image_size)
  axis = _pixel_centres(image_size)
  dx = (axis[left:right] - np.float32(centre_x)) * np.float32(1 / radius)
  dy = (axis[top:bottom] - np.float32(centre_y)) * np.float32(1 / radius)
  dy = dy[:, None]
  cosine, sine = math.cos(item.angle), math.sin(item.angle)
  u = dx * cosine + dy * sine
  v = dy * cosine - dx * sine
  alpha = signed_distance(item.shape, u, v)
  alpha *= -radius
  alpha += 0.5
  np.maximum(alpha, 0.0, out=alpha)
  np.minimum(alpha, 1.0, out=alpha)
  return slice(top, bottom), slice(left, right), alpha, u, v


def _rgb(item: scene_types.SceneObject) -> np.ndarray:
  hue = (scene_types.HUES[item.colour] + item.hue_offset) / 360.0
  red_green_blue = colorsys.hsv_to_rgb(hue % 1.0, item.saturation, item.value)
  return np.array(red_green_blue, np.float32) * np.float32(255.0)


def _background(
  background: scene_types.Background, image_size: int
) -> np.ndarray:
  """float32 (S, S, 3), not clipped."""
  tile = textures.texture_tile(background.bank, background.texture, image_size)
  # In steps of a pixel of the default size, so that sizes agree on the place.
  steps = scene_types.IMAGE_SIZE
  top = int(background.crop_y * (steps + 1)) * image_size // steps
  left = int(background.crop_x * (steps + 1)) * image_size // steps
  crop = tile[top : top + image_size, left : left + image_size]
  if background.flip & 1:
    crop = crop[::-1]
  if background.flip & 2:
    crop = crop[:, ::-1]
  if background.flip & 4:
    crop = crop.T
  grey = crop * np.float32(background.contrast / textures.STEPS_PER_STD)
  axis = _pixel_centres(image_size)
  grey += axis * np.float32(background.slope_x / image_size)
  down = axis * np.float32(background.slope_y / image_size)
  down += np.float32(
    background.level - 0.5 * (background.slope_x + background.slope_y)
  )
  grey += down[:, None]
  return grey[..., None] * np.array(background.tint, np.float32)


@functools.cache
def _pixel_centres(image_size: int) -> np.ndarray:
  return np.arange(image_size, dtype=np.float32) + np.float32(0.5)
