"""The report's account of settings: a row a setting, a column a stage."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from psvae_jax.report import page
from psvae_jax.report.data import Run, Stage
from psvae_jax.report.metrics import is_number

_MISSING = "–"
# Loss weights, in the order of the data flow.
_WEIGHTS = {
  "semantic": "semantic",
  "kl": "KL",
  "pixel": "pixel",
}
_PIXEL_WEIGHTS = {
  "l1": "L1",
  "mse": "MSE",
  "perceptual": "perceptual",
  "lpips": "LPIPS",
}
_SOLVERS = {"euler": "Euler", "heun": "Heun"}


def autoencoder_settings(run: Run) -> str:
  """A table of the stages that do not train a generator."""
  return _table(run.part(generator=False).stages, _AUTOENCODER_ROWS)


def generator_settings(run: Run) -> str:
  """A table of those that do, and whose latents they work on."""
  table = _table(run.part(generator=True).stages, _GENERATOR_ROWS)
  stats = run.latent_stats
  found = [
    f"latent space {stats['fingerprint']}"
    if isinstance(stats.get("fingerprint"), str)
    else "",
    f"normalised by mean and standard deviation of {stats['count']:,} images"
    if is_number(stats.get("count"))
    else "",
  ]
  words = ", ".join(filter(None, found))
  return table + page.note(f"Latents: {words}." if table and words else "")


def autoencoder_phrase(model: Mapping[str, Any]) -> str:
  """Encoder, latent and decoder in a few words; "" if there is no such."""
  words = []
  if isinstance(model.get("encoder"), str):
    words.append(f"encoder {model['encoder'] or 'embedded miniature'}")
  if is_number(model.get("channels")):
    words.append(f"{model['channels']} latent channels")
  kind = mapping(model, "pixel_decoder").get("kind")
  if isinstance(kind, str):
    words.append(f"{kind} pixel decoder")
  return ", ".join(words)


def transformer_phrase(model: Mapping[str, Any]) -> str:
  """The shape of the generator's transformer; "" if there is none."""
  dit = mapping(model, "dit")
  if not (is_number(dit.get("width")) and is_number(dit.get("depth"))):
    return ""
  words = f"{dit['depth']} blocks of width {dit['width']:,}"
  if is_number(dit.get("num_heads")):
    words += f", {dit['num_heads']} heads"
  depth, width = dit.get("head_depth"), dit.get("head_width")
  if is_number(depth) and is_number(width):
    blocks = "block" if depth == 1 else "blocks"
    words += f"; velocity head of {depth} {blocks} of width {width:,}"
    words = words if depth else words.split(";")[0]
  return words


def condition_phrase(model: Mapping[str, Any]) -> str:
  """What the generator is conditioned on; "" if it does not say."""
  if model.get("condition") == "class":
    count = model.get("num_classes")
    return f"{count:,} classes" if is_number(count) else ""
  encoder = model.get("text_encoder")
  if model.get("condition") != "text" or not isinstance(encoder, str):
    return ""
  words = f"text by {encoder or 'the embedded miniature'}"
  length = model.get("text_length")
  return f"{words}, {length} tokens" if is_number(length) else words


def mapping(value: Mapping[str, Any], name: str) -> Mapping[str, Any]:
  """Entry `name` of a mapping if it is a mapping itself, else {}."""
  found = value.get(name)
  return found if isinstance(found, Mapping) else {}


_Rows = Sequence[tuple[str, Callable[[Stage], str]]]


def _table(stages: Sequence[Stage], rows: _Rows) -> str:
  stages = [stage for stage in stages if stage.config]
  if not stages:
    return ""
  cells = {name: [phrase(stage) for stage in stages] for name, phrase in rows}
  body = [
    ((name, ""), [(cell or _MISSING, False) for cell in found])
    for name, found in cells.items()
    if any(found)
  ]
  head = [("", ""), *((stage.title, "") for stage in stages)]
  return page.table(head, body, wrap=True) if body else ""


def _steps(stage: Stage) -> str:
  return f"{stage.planned_steps:,}" if stage.planned_steps else ""


def _batch(stage: Stage) -> str:
  if not stage.batch_size:
    return ""
  words = f"{stage.batch_size:,}"
  parts = mapping(stage.config, "train").get("accumulate")
  if is_number(parts) and parts > 1:
    words += f" in {parts:,} parts"
  share = mapping(stage.config, "loss").get("edit_share")
  if stage.name == "edit" and is_number(share):
    words += f", {100 * share:.0f} % of it edits"
  return words


def _optimizer(stage: Stage) -> str:
  optim = mapping(stage.config, "optim")
  if not isinstance(optim.get("name"), str):
    return ""
  rate = optim.get("learning_rate")
  return f"{optim['name']}, {rate:g}" if is_number(rate) else optim["name"]


def _average(stage: Stage) -> str:
  decay = mapping(stage.config, "train").get("ema")
  return f"{decay:g}" if is_number(decay) else ""


def _weights(stage: Stage, names: Mapping[str, str]) -> str:
  loss = mapping(stage.config, "loss")
  return ", ".join(
    f"{title} {loss[name]:g}"
    for name, title in names.items()
    if is_number(loss.get(name)) and loss[name]
  )


def _adversary(stage: Stage) -> str:
  if not stage.adversarial_marks:
    return ""
  loss = mapping(stage.config, "loss")
  adaptive = " × λ" if loss.get("gan_adaptive", True) else ""
  first, last = stage.adversarial_marks[0], stage.adversarial_marks[-1]
  words = f"{loss['gan']:g}{adaptive}, from step {first:,}"
  return words + (f" (decoder from {last:,})" if last > first else "")


def _latents(stage: Stage) -> str:
  """Whose latents, and whether they are computed beforehand."""
  autoencoder = mapping(stage.job, "autoencoder")
  path, name = autoencoder.get("path"), autoencoder.get("stage")
  if not isinstance(path, str):
    return ""
  words = {"": "of this workdir", "embedded": "of the embedded miniature"}.get(
    path, f"of {path}"
  )
  words += f", stage {name}" if name else ""
  cache = mapping(stage.job, "cache")
  if cache.get("enabled") is False:
    return f"{words}; encoded in every step"
  if isinstance(cache.get("dtype"), str):
    words += f"; cached as {cache['dtype']}"
  return words


def _time(stage: Stage) -> str:
  loss = mapping(stage.config, "loss")
  mean, std, shift = (
    loss.get(name) for name in ("time_mean", "time_std", "shift")
  )
  if not (is_number(mean) and is_number(std)):
    return ""
  words = f"logit-normal ({mean:g}, {std:g})"
  if is_number(shift):
    words += f", shift {shift:g}" if shift else ", shift by latent size"
  return words


def _dropout(stage: Stage) -> str:
  loss = mapping(stage.config, "loss")
  names = {"text_dropout": "condition"}
  if stage.name == "edit":
    names["source_dropout"] = "source"
  return ", ".join(
    f"{title} {100 * loss[name]:g} %"
    for name, title in names.items()
    if is_number(loss.get(name))
  )


def _sampling(stage: Stage) -> str:
  sample = mapping(stage.job, "sample")
  solver, steps = sample.get("solver"), sample.get("steps")
  if not isinstance(solver, str) or not is_number(steps):
    return ""
  words = f"{_SOLVERS.get(solver, solver)}, {steps} steps"
  if isinstance(sample.get("grid"), str):
    words += f", {sample['grid']} grid"
  if is_number(sample.get("shift")):
    words += f", shift {sample['shift']:g}"
  return words


def _guidance(stage: Stage) -> str:
  sample = mapping(stage.job, "sample")
  scale, image = sample.get("guidance"), sample.get("image_guidance")
  if not is_number(scale):
    return ""
  words = f"{scale:g}"
  if stage.name == "edit" and is_number(image):
    words += f", source image {image:g}"
  low, high = sample.get("guidance_low"), sample.get("guidance_high")
  if is_number(low) and is_number(high) and (low > 0 or high < 1):
    words += f", for t from {low:g} to {high:g}"
  return words


_AUTOENCODER_ROWS: _Rows = (
  ("Steps", _steps),
  ("Batch size", _batch),
  ("Optimizer", _optimizer),
  ("Loss weights", lambda stage: _weights(stage, _WEIGHTS)),
  ("Pixel loss", lambda stage: _weights(stage, _PIXEL_WEIGHTS)),
  ("Adversarial term", _adversary),
)
_GENERATOR_ROWS: _Rows = (
  ("Steps", _steps),
  ("Batch size", _batch),
  ("Optimizer", _optimizer),
  ("EMA", _average),
  ("Transformer", lambda s: transformer_phrase(mapping(s.job, "model"))),
  ("Condition", lambda s: condition_phrase(mapping(s.job, "model"))),
  ("Latents", _latents),
  ("Time in training", _time),
  ("Dropout", _dropout),
  ("Sampling", _sampling),
  ("Guidance", _guidance),
)
