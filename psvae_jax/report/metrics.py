"""Names, order and number formats of metrics, for people.

A metric is known by the last part of its name, so `eval/psnr` and `test/psnr`
read alike. Unknown metrics are shown under their own name.
"""

import dataclasses
import math
import re
from typing import Any


@dataclasses.dataclass(frozen=True)
class Metric:
  """How a metric is shown.

  Attributes:
    label: name for a reader.
    note: one sentence on what it says; "" if the name says it.
    better: "higher", "lower" or "" where neither is.
    style: a format specification, or "%" for a share shown in percent.
    unit: written after the number.
  """

  label: str
  note: str = ""
  better: str = ""
  style: str = ".4g"
  unit: str = ""


# By the last part of the name, in the order of the result table.
METRICS: dict[str, Metric] = {
  "psnr": Metric(
    "PSNR",
    "Pixel fidelity of reconstructions, averaged over images.",
    "higher",
    ".2f",
    "dB",
  ),
  "ssim": Metric(
    "SSIM", "Structural similarity, 1 is identical.", "higher", ".3f"
  ),
  "sharpness": Metric(
    "Sharpness",
    "Gradient strength against the original's; below 1 is blurred.",
    "",
    ".3f",
  ),
  "lpips": Metric("LPIPS", "Perceptual distance.", "lower", ".3f"),
  "rfid": Metric(
    "rFID", "Fréchet distance of reconstructions to originals.", "lower"
  ),
  "fid": Metric("FID", "Fréchet distance of samples to data.", "lower"),
  "probe_accuracy": Metric(
    "Probe accuracy, f′",
    "Linear probe on the encoder's features: are the semantics kept?",
    "higher",
    "%",
  ),
  "probe_accuracy_latent": Metric(
    "Probe accuracy, z", "The same probe on the latent.", "higher", "%"
  ),
  "probe_accuracy_decoded": Metric(
    "Probe accuracy, f″",
    "The same probe on features decoded from the latent.",
    "higher",
    "%",
  ),
  "checker_accuracy": Metric(
    "Checker accuracy",
    "Scenes whose objects are read back right from the image.",
    "higher",
    "%",
  ),
  "foil_accuracy": Metric(
    "Caption told from its foil",
    "Nearer to the right wording than to one with a detail changed.",
    "higher",
    "%",
  ),
  "role_accuracy": Metric(
    "Roles read right",
    "Statements all of whose words say where their object stands.",
    "higher",
    "%",
  ),
  "joint_accuracy": Metric(
    "Joint accuracy",
    "Images in which all that the caption says is right.",
    "higher",
    "%",
  ),
  "joint_accuracy_one_object": Metric(
    "Joint accuracy, one object", "", "higher", "%"
  ),
  "joint_accuracy_two_object": Metric(
    "Joint accuracy, two objects", "", "higher", "%"
  ),
  "joint_accuracy_heldout": Metric(
    "Joint accuracy, held-out",
    "Combinations of objects that training never showed.",
    "higher",
    "%",
  ),
  "frechet_distance": Metric(
    "Fréchet distance",
    "To other real images, in the frozen encoder’s features.",
    "lower",
  ),
  "kernel_distance": Metric(
    "Kernel distance",
    "The same without taking features as normally distributed.",
    "lower",
  ),
  "kernel_distance_std": Metric(
    "Kernel distance, std", "Between subsets of the images."
  ),
  "caption_similarity": Metric(
    "Caption similarity",
    "Cosine of an image’s features to those its caption predicts.",
    "higher",
    ".3f",
  ),
  "caption_similarity_floor": Metric(
    "Caption similarity, shuffled", "To another image’s caption.", "", ".3f"
  ),
  "manifold_distance": Metric(
    "Distance to real latents",
    "Root mean square to the nearest; as real ones have is best.",
  ),
  "manifold_distance_tail": Metric(
    "Distance, farthest 5 %", "The same of the samples farthest off."
  ),
  "off_manifold_share": Metric(
    "Off the manifold",
    "Samples farther off than 95 % of real latents are.",
    "lower",
    "%",
  ),
  "edit_success": Metric(
    "Edit success",
    "The instruction is done, and every other object is in its place.",
    "higher",
    "%",
  ),
  "edit_instruction": Metric("Instruction done", "", "higher", "%"),
  "edit_kept": Metric(
    "Other object kept",
    "The one that the instruction does not name.",
    "higher",
    "%",
  ),
  "preservation_psnr": Metric(
    "PSNR outside the edit",
    "How well the rest is kept; 100 where nothing changed.",
    "higher",
    ".2f",
    "dB",
  ),
  "edit_loss": Metric("Held-out loss of edits", "", "lower"),
  "latent_mean": Metric(
    "Latent mean", "Magnitude of a channel's mean, averaged over channels."
  ),
  "latent_std": Metric(
    "Latent std", "Spread of μ over the data, averaged over channels."
  ),
  "latent_variance": Metric(
    "Posterior variance", "Noise added to μ, averaged over channels."
  ),
  "kl": Metric("KL", "Per latent dimension, against a standard normal."),
  "collapsed_channels": Metric(
    "Collapsed channels",
    "Share of latent channels that say nothing about the image.",
    "lower",
    "%",
  ),
  "loss": Metric("Loss"),
  "loss_semantic": Metric("Semantic loss"),
  "loss_semantic_tuned": Metric("Semantic loss, f′"),
  "loss_semantic_decoded": Metric("Semantic loss, f″"),
  "loss_pixel": Metric("Pixel loss"),
  "loss_l1": Metric("L1 loss"),
  "loss_mse": Metric("MSE loss"),
  "loss_perceptual": Metric("Perceptual loss"),
  "loss_lpips": Metric("LPIPS"),
  "loss_kl": Metric("KL loss"),
  "loss_t2i": Metric("Loss, text to image"),
  "loss_edit": Metric("Loss, edits"),
  "loss_contrastive": Metric("Contrastive loss"),
  "loss_words": Metric("Word loss"),
  "loss_paraphrase": Metric("Paraphrase loss"),
  "loss_roles": Metric("Role loss"),
  "loss_generator": Metric("Generator loss"),
  "loss_discriminator": Metric("Discriminator loss"),
  "logits_real": Metric("Discriminator’s logits, real"),
  "logits_fake": Metric("Discriminator’s logits, fake"),
  "gan_weight": Metric("Adversarial weight, × λ"),
  "skipped_steps": Metric("Skipped steps"),
  "images_per_second": Metric("Images per second", "", "higher", ".4g"),
  "steps_per_second": Metric("Steps per second", "", "higher", ".3g"),
}


LATENT_METRICS = (
  "kl",
  "latent_mean",
  "latent_std",
  "latent_variance",
  "collapsed_channels",
)

# Of these, what says something about edits alone.
_EDIT_METRICS = ("edit_", "preservation_")

# By the part before the last, which names a module.
_FAMILIES = {"grad_norm": "Gradient norm", "update_norm": "Update norm"}
# Figures that a known one is made of: prefix → (label, the known one).
_PARTS = {
  "probe_accuracy_": ("Probe", "probe_accuracy"),
  "probe_": ("Probe", "probe_accuracy"),
  "checker_": ("Checker", "checker_accuracy"),
  "edit_success_": ("Edit success", "edit_success"),
  "joint_": ("Right", "joint_accuracy_heldout"),
}
_SPREADS = ("kernel_distance_std",)
_AT_TIME = re.compile(r"(?:edit_)?loss_t(\d.*)")


def at_time(name: str) -> str:
  """The time t at which a metric is a loss; "" if it is no such metric."""
  last = name.rsplit("/", 1)[-1]
  found = None if last in METRICS else _AT_TIME.fullmatch(last)
  return found[1] if found else ""


def is_part(name: str) -> bool:
  """Whether a metric is a component of a known one."""
  last = name.rsplit("/", 1)[-1]
  parts = last not in METRICS and last.startswith(tuple(_PARTS))
  return parts or bool(at_time(name)) or last in _SPREADS


def is_of_edits(name: str) -> bool:
  """Whether a metric says something about edits alone."""
  return name.rsplit("/", 1)[-1].startswith(_EDIT_METRICS)


def describe(name: str) -> Metric:
  """Returns how to show the metric called `name`; unknown names show as is."""
  *groups, last = name.split("/")
  if groups and groups[-1] in _FAMILIES:
    return Metric(f"{_FAMILIES[groups[-1]]}, {_spaced(last)}")
  if name == "eval/loss":  # of a generator
    return Metric("Held-out loss", "Of the velocity, at fixed times.", "lower")
  if last in METRICS:
    return METRICS[last]
  if time := at_time(name):
    kind = "Edit loss" if is_of_edits(name) else "Loss"
    return Metric(f"{kind} at t = {time}", "", "lower")
  for prefix, (label, _) in _PARTS.items():
    if last.startswith(prefix):
      part = _spaced(last.removeprefix(prefix)).replace(
        " heldout", ", held-out"
      )
      return Metric(f"{label}, {part}", "", "higher", "%")
  return Metric(name)


def rank(name: str) -> tuple[int, bool, str]:
  """Sort key: known metrics in the order of `METRICS`, others by name.

  Parts of a known figure follow it.
  """
  last = name.rsplit("/", 1)[-1]
  known = last in METRICS
  if not known:
    parents = [
      p for prefix, (_, p) in _PARTS.items() if last.startswith(prefix)
    ]
    if at_time(name):
      parents.append("edit_loss" if is_of_edits(name) else "loss")
    last = parents[0] if parents else last
  order = list(METRICS)
  return (order.index(last) if last in METRICS else len(order), not known, name)


def _spaced(name: str) -> str:
  return name.replace("_", " ")


def format_value(name: str, value: Any) -> str:
  """Returns `value` of metric `name` as a reader wants to see it."""
  if isinstance(value, bool) or not isinstance(value, (int, float)):
    return str(value)
  if not math.isfinite(value):
    return "NaN" if math.isnan(value) else ("∞" if value > 0 else "−∞")
  metric = describe(name)
  if metric.style == "%":
    return f"{100 * value:.1f} %"
  if isinstance(value, int) or (metric.style == ".4g" and value == int(value)):
    text = f"{int(value)}" if abs(value) < 1e9 else f"{value:.4g}"
  else:
    text = format(value, metric.style)
  if text.startswith("-"):
    text = "−" + text[1:]
  return f"{text} {metric.unit}" if metric.unit else text


def is_number(value: Any) -> bool:
  return isinstance(value, (int, float)) and not isinstance(value, bool)
