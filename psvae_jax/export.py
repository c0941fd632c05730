"""Writes a trained autoencoder or generator as plain files.

    python -m psvae_jax.export --workdir=runs/psvae --out=exported

What it writes is described in `psvae_jax/exported.py`; `PSVAE.from_pretrained`
and `TextToImage.from_pretrained` read it.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from psvae_jax import cli

USAGE_EXAMPLES = """\
examples:
  python -m psvae_jax.export --workdir=runs/psvae --out=exported
  python -m psvae_jax.export --workdir=runs/psvae --out=vae --stage=psvae
  python -m psvae_jax.export --workdir=runs/psvae --out=small --dtype=bfloat16
  python -m psvae_jax.export --workdir=runs/psvae --out=exported --encoder=tuned

A generator is written with its autoencoder inside, unless that is the embedded
one or --autoencoder=embedded says so. --encoder writes the tuned encoder in
the Hugging Face layout, for psvae_jax.load_encoder and transformers.AutoModel.
An earlier export in --out is replaced, any other folder is not.
"""

_EMBEDDED = "embedded"


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
  """The command line; --help shows it."""
  parser = argparse.ArgumentParser(
    prog="python -m psvae_jax.export",
    description="Writes a trained autoencoder or generator as safetensors.",
    epilog=USAGE_EXAMPLES,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  parser.add_argument(
    "--workdir",
    required=True,
    help="--workdir of the training job, or an exported folder",
  )
  parser.add_argument("--out", required=True, help="folder to write")
  parser.add_argument(
    "--stage",
    help="svae, psvae: the autoencoder alone; t2i, edit: the generator "
    "(default: the last that has a checkpoint)",
  )
  parser.add_argument(
    "--dtype",
    choices=("float32", "bfloat16"),
    default="float32",
    help="of the files (default: float32); the text encoder is copied as it is",
  )
  parser.add_argument(
    "--autoencoder",
    choices=("copy", _EMBEDDED),
    help="of a generator: write it too, or name the embedded one",
  )
  parser.add_argument(
    "--encoder", metavar="DIR", help="write the tuned encoder there too"
  )
  return parser.parse_args(argv)


def export(
  workdir: Path,
  out: Path,
  *,
  stage: str | None = None,
  dtype: str = "float32",
  autoencoder: str | None = None,
  encoder: Path | None = None,
) -> str:
  """Writes a workdir's generator, or its autoencoder if it has none.

  Args:
    workdir: of the job.
    out: the folder to write.
    stage: which; by default the last one that has a checkpoint.
    dtype: "float32" or "bfloat16".
    autoencoder: of a generator: "copy", "embedded", or None: the embedded one
      where it was trained with that.
    encoder: where to write the tuned encoder in the Hugging Face layout.

  Returns:
    What was written, for people.

  Raises:
    FileNotFoundError, ValueError, CheckpointError: see `PSVAE` and
      `saved_generator.load`.
    FileExistsError: `out` is another folder, which is not replaced.
  """
  # After the arguments' checks: these imports take seconds.
  from psvae_jax import exported, saved_generator
  from psvae_jax.psvae import PSVAE
  from psvae_jax.tasks.generator import PARTS

  is_generator = stage in PARTS
  if stage is None:
    if exported.is_exported(workdir):
      is_generator = exported.read_config(workdir)["kind"] == "generator"
    else:
      is_generator = bool(saved_generator.stages_with_checkpoints(workdir))
  if not is_generator:
    if autoencoder is not None:
      raise ValueError(
        f"{workdir} is exported as an autoencoder: --autoencoder is for "
        "generators"
      )
    vae = PSVAE.from_pretrained(workdir, stage=stage)
    with exported.new_folder(out) as folder:
      _write_autoencoder(folder, vae, workdir, dtype)
    said = repr(vae)
  else:
    saved = saved_generator.load(workdir, stage=stage)
    vae = saved.autoencoder
    where = _place_of(vae.latent_fingerprint, autoencoder)
    with exported.new_folder(out) as folder:
      if where != _EMBEDDED:
        (folder / where).mkdir()
        _write_autoencoder(folder / where, vae, workdir, dtype)
      provenance = _provenance(workdir, saved.stage)
      saved_generator.save(
        folder, saved, autoencoder=where, dtype=dtype, provenance=provenance
      )
    said = f"generator ({saved.stage}, {saved.fingerprint}) of {vae!r}"
  if encoder is not None:
    _write_encoder(encoder, vae)
  return said


def _place_of(latent_fingerprint: str, wanted: str | None) -> str:
  """Where a generator's autoencoder will be: inside, or "embedded".

  Raises:
    ValueError: "embedded" is wanted, and that is another autoencoder.
  """
  from psvae_jax import exported

  if wanted == "copy":
    return "autoencoder"
  try:
    folder = exported.resolve(_EMBEDDED, "autoencoder")
    embedded = exported.read_config(folder).get("latent_fingerprint")
  except FileNotFoundError:
    embedded = None
  if embedded == latent_fingerprint:
    return _EMBEDDED
  if wanted == _EMBEDDED:
    raise ValueError(
      f"the generator's autoencoder is {latent_fingerprint}, the embedded one "
      f"is {embedded}: leave out --autoencoder to export it with the generator"
    )
  return "autoencoder"


def _write_autoencoder(
  folder: Path, vae: Any, workdir: Path, dtype: str
) -> None:
  from psvae_jax import exported

  exported.save_autoencoder(
    folder,
    vae.model,
    vae.params,
    {
      "stage": vae.stage,
      "fingerprint": vae.fingerprint,
      "description": vae.description,
      "latent_fingerprint": vae.latent_fingerprint,
    },
    dtype=dtype,
    provenance=_provenance(workdir, vae.stage),
  )


def _write_encoder(folder: Path, vae: Any) -> None:
  """The stage's encoder, in the Hugging Face layout."""
  from psvae_jax.pretrained.encoder import save_encoder

  model = vae.model
  save_encoder(
    folder, model.encoder.config, vae.params["encoder"], model.mean, model.std
  )


def _provenance(workdir: Path, stage: str) -> Mapping[str, Any]:
  """A workdir's figures of the stage, and how all up to it were trained."""
  from psvae_jax import exported
  from psvae_jax.config import STAGES
  from psvae_jax.pretrained import files
  from psvae_jax.writers import read_summary

  if exported.is_exported(workdir):
    return exported.read_config(workdir).get("provenance", {})
  summary = read_summary(workdir)
  found = {
    "figures": summary.get(stage, {}),
    "versions": summary.get("versions", {}),
    "device": summary.get("device"),
    "stages": {},
  }
  for name in STAGES:
    path = workdir / name / "config.json"
    if path.is_file():
      config = files.read_json(path)
      kept = ("seed", "data", "cache", "model", "sample", name)
      found["stages"][name] = {k: config[k] for k in kept if k in config}
    if name == stage:
      break
  return found


def main(argv: Sequence[str] | None = None) -> None:
  """Runs the command; exits with 1 if anything could not be done."""
  arguments = parse_arguments(argv)
  from psvae_jax.checkpoint import CheckpointError

  out = Path(arguments.out).expanduser()
  encoder = arguments.encoder and Path(arguments.encoder).expanduser()
  try:
    said = export(
      Path(arguments.workdir).expanduser(),
      out,
      stage=arguments.stage,
      dtype=arguments.dtype,
      autoencoder=arguments.autoencoder,
      encoder=encoder or None,
    )
  except (ValueError, OSError, CheckpointError) as error:
    cli.fail(cli.one_line(error))
  size = sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
  print(f"{said} → {out} ({size / 2**20:.1f} MiB, {arguments.dtype})")
  if encoder:
    print(f"tuned encoder → {encoder}")


if __name__ == "__main__":
  cli.guard(main, interrupted="nothing was written")
