"""A data set as a fixed list of images: every example in a number of views.

Whatever is computed once and stored needs examples that never change. View 0 of
an example is the plain one (as validation sees it), views 1, 2, … are augmented
by randomness that depends on (seed, view, index) alone.

Edit examples have two images. Both get the same crop.
"""

import copy
import operator
from typing import Any

import numpy as np

from psvae_jax.data import transforms

# An element's images: what is generated, and for edits what it is made from.
IMAGES = ("image", "source")


class EditExamples:
  """Instruction edits in the names of other examples.

  Elements of `scenes.EditSource` → {"image": the target, "source": the image
  to be edited, "caption": the instruction, "index"}.

  Args:
    source: random access to {"source", "target", "instruction", "index"}.
  """

  def __init__(self, source: Any) -> None:
    self._source = source

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> dict[str, Any]:
    element = self._source[index]
    return {
      "image": element["target"],
      "source": element["source"],
      "caption": element["instruction"],
      "index": element["index"],
    }

  def __repr__(self) -> str:
    return f"EditExamples({self._source!r})"


class ViewedSource:
  """Random access to `views` versions of every example of a source.

  Element view · num_examples + i is example i, "image" (and "source") uint8
  (S, S, 3); "index" stays the example's.

  Args:
    source: elements with "image", "index" and perhaps "caption", "source" and
      numbers such as "label".
    image_size: side S of the images, pixels.
    augment: of views 1, 2, …: see `transforms.make_augment`. View 0 is a centre
      crop, and with "none" the images have the right size already.
    min_scale: see `transforms.random_crop`.
    seed: of the augmentation.
    views: versions of every example.
    num_examples: how many of the first examples; 0 takes all there are.

  Attributes:
    num_examples: examples, each in `views` versions.
    views: see above.
    image_size: see above.

  Raises:
    ValueError: no examples or views, or several views that would be equal.
  """

  def __init__(
    self,
    source: Any,
    *,
    image_size: int,
    augment: str = "none",
    min_scale: float = 0.5,
    seed: int = 0,
    views: int = 1,
    num_examples: int = 0,
  ) -> None:
    if views < 1:
      raise ValueError(f"The number of views must be at least 1, not {views}.")
    if views > 1 and augment in ("none", "center"):
      raise ValueError(
        f'{views} views with augment="{augment}" would be equal: choose "crop" '
        'or "crop_flip", or one view.'
      )
    if not 0 <= num_examples <= len(source) or not len(source):
      raise ValueError(
        f"Cannot take {num_examples or 'any'} examples of {source!r}, which "
        f"has {len(source)}."
      )
    plain = "none" if augment == "none" else "center"
    self._plain = paired(transforms.make_augment(plain, size=image_size))
    self._augment = paired(
      transforms.make_augment(augment, size=image_size, min_scale=min_scale)
    )
    self._source, self._seed = source, seed
    self.views, self.image_size = views, image_size
    self.num_examples = num_examples or len(source)
    self.description = {
      "source": repr(source),
      "num_examples": self.num_examples,
      "image_size": image_size,
      "views": views,
    }
    if augment != "none":
      self.description["augment"] = augment
    if views > 1:
      self.description |= {"min_scale": min_scale, "seed": seed}

  def __len__(self) -> int:
    return self.views * self.num_examples

  def __getitem__(self, index: int) -> dict[str, Any]:
    index = operator.index(index)
    if not 0 <= index < len(self):
      raise IndexError(f"index {index} is outside [0, {len(self)})")
    view, example = divmod(index, self.num_examples)
    element = self._source[example]
    if view == 0:
      return self._plain(element, None)
    rng = np.random.default_rng((self._seed, view, example))
    return self._augment(element, rng)

  def __repr__(self) -> str:
    settings = ", ".join(
      f"{name}={value!r}"
      for name, value in self.description.items()
      if name != "source"
    )
    return f"ViewedSource({self._source!r}, {settings})"


def paired(transform: transforms.Transform) -> transforms.Transform:
  """Gives "image" and, if there is one, "source" the same crop and flip.

  Raises:
    ValueError: at a call, the two images differ in size.
  """

  def both(element: dict[str, Any], rng: Any) -> dict[str, Any]:
    if "source" not in element:
      return transform(element, rng)
    sizes = [element[name].shape for name in IMAGES]
    if sizes[0] != sizes[1]:
      raise ValueError(
        f"Example {element.get('index')}: the image to be edited has the shape "
        f"{sizes[1]}, its target {sizes[0]}; they must be equal."
      )
    same = copy.deepcopy(rng)
    source = transform({**element, "image": element["source"]}, same)
    return {**transform(element, rng), "source": source["image"]}

  return both
