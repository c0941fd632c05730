"""What a figure is to be compared with: columns beside the stages.

An evaluator writes such a figure under the name of the metric and an ending:
"eval/joint_accuracy_ceiling" stands in the row of "eval/joint_accuracy" and the
column "ceiling".
"""

# Column → its title. The first is a section of the summary by itself.
TITLES = {
  "encoder": "Frozen encoder",
  "random_encoder": "Random encoder",
  "chance": "Chance",
  "ceiling": "Ceiling",
  "real": "Real",
  "copy": "Source as it is",
  "regenerate": "Drawn anew",
}
# Column → what it is, where the title needs it.
NOTES = {
  "ceiling": "what should come out, encoded and decoded alone",
  "real": "real images in place of generated ones",
  "copy": "nothing is edited",
  "regenerate": "drawn from the target’s caption, without the source",
}
COLUMNS = tuple(name for name in TITLES if name != "encoder")
# The floor of a distance is what real images have among themselves, and the
# ceiling of this similarity is that of the captions' own images.
_OTHERWISE = {
  "frechet_distance_floor": "real",
  "kernel_distance_floor": "real",
  "caption_similarity_ceiling": "real",
}


def reference_of(name: str) -> tuple[str, str] | None:
  """(column, metric) of a figure that belongs to a reference, else None."""
  last = name.rsplit("/", 1)[-1]
  if last in _OTHERWISE:
    return _OTHERWISE[last], name.rsplit("_", 1)[0]
  # Figures of training have such endings as well, e.g. "train/logits_real".
  if not name.startswith("train/"):
    for column in COLUMNS:
      if name.endswith("_" + column):
        return column, name.removesuffix("_" + column)
  return None
