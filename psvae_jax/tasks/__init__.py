"""What a job can optimise, by stage name."""

from pathlib import Path

from psvae_jax.config import STAGES, Config, GeneratorModel
from psvae_jax.tasks.autoencoder import AutoencoderTask
from psvae_jax.tasks.base import Task
from psvae_jax.tasks.encoder import EncoderTask
from psvae_jax.tasks.routes import ROUTES
from psvae_jax.tasks.text_encoder import TextEncoderTask


def make_task(stage: str, config: Config, workdir: Path) -> Task:
  """Builds the task of one stage of a job."""
  if STAGES[stage][0] is GeneratorModel:
    # Not above: it stands on `psvae_jax.psvae`, which stands on this package.
    from psvae_jax.tasks.generator import GeneratorTask

    return GeneratorTask(stage, config, workdir)
  if stage in ROUTES:
    return AutoencoderTask(stage, config, workdir)
  kind = TextEncoderTask if stage == "text_encoder" else EncoderTask
  return kind(stage, config, workdir)
