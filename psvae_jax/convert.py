"""Turns published files into folders that psvae_jax loads.

    python -m psvae_jax.convert vgg16 --weights=vgg16-397923af.pth \\
      --heads=vgg.pth --out=weights/lpips-vgg

Files of torch.save need torch to be read: `pip install psvae_jax[convert]`.
Nothing in them is executed (`psvae_jax/pretrained/torch_files.py`). A folder is
written whole or not at all, as safetensors and a config.json, which names each
source file and its SHA-256.
"""

import argparse
import dataclasses
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from psvae_jax import cli

if TYPE_CHECKING:
  import numpy as np

USAGE_EXAMPLES = """\
examples:
  python -m psvae_jax.convert vgg16 --weights=vgg16-397923af.pth \\
    --heads=vgg.pth --out=weights/lpips-vgg
  python -m psvae_jax.convert alexnet --weights=alexnet-owt-7be5be79.pth \\
    --heads=alex.pth --out=weights/lpips-alex
  python -m psvae_jax.convert inception \\
    --weights=pt_inception-2015-12-05-6726825d.pth --out=weights/inception
  python -m psvae_jax.convert huggingface \\
    --weights=vit-mae-base/pytorch_model.bin --out=weights/vit-mae-base
  python -m psvae_jax.convert autoencoder-kl --weights=kl16.ckpt \\
    --name=mar-kl16 --out=weights/mar-kl16

`python -m psvae_jax.convert KIND --help` says where each file is published.
An existing folder is never replaced.
"""

_HEADS = (
  "LPIPS's heads: https://github.com/richzhang/PerceptualSimilarity/raw/"
  "master/lpips/weights/v0.1/{0}, also lpips/weights/v0.1/{0} in the wheel of "
  "`pip download --no-deps lpips`"
)
# Preprocessors, tokenizers and their vocabularies.
_BESIDE = (".json", ".txt", ".model")
_CONTAINER = {
  "container": "key of the tensors in --weights, where it has several dicts"
}


@dataclasses.dataclass(frozen=True)
class Kind:
  """One thing that can be converted.

  Attributes:
    summary: what it is, in one line.
    files: option → what file it takes and where that is published.
    options: what else can be said: option → its help.
    write: (folder, option → file, option → value or None) → what was written,
      for people.
  """

  summary: str
  files: Mapping[str, str]
  options: Mapping[str, str]
  write: Callable[[Path, Mapping[str, Path], Mapping[str, str | None]], str]


def convert(
  kind: str,
  paths: Mapping[str, Path],
  out: Path,
  options: Mapping[str, str | None] | None = None,
) -> str:
  """Writes one folder.

  Args:
    kind: a key of `KINDS`.
    paths: the file of every option in the kind's `files`.
    out: the folder to write; may exist if it is empty.
    options: of the kind's `options`.

  Returns:
    What was written, for people.

  Raises:
    FileExistsError: `out` exists and is not an empty folder.
    FileNotFoundError: a file is missing.
    ValueError: a file is not what the kind takes.
    ImportError: torch is not installed.
  """
  from psvae_jax import exported

  if out.exists() and (not out.is_dir() or any(out.iterdir())):
    raise FileExistsError(
      f"{out} exists and is not replaced; remove it or give another --out"
    )
  with exported.new_folder(out) as folder:
    return KINDS[kind].write(folder, paths, options or {})


def _read(path: Path, container: str | None = None) -> "dict[str, np.ndarray]":
  """Tensors of a safetensors file, or of one of torch.save."""
  from psvae_jax.pretrained import files, torch_files

  if path.suffix == ".safetensors":
    return files.read_safetensors(path.parent, path.stem)
  return torch_files.read_torch_file(path, container)


def _write_lpips(network, folder, paths, options):
  from psvae_jax.pretrained import lpips

  params = lpips.from_published(
    network,
    _read(paths["weights"], options.get("container")),
    _read(paths["heads"]),
    source=" with ".join(str(path) for path in paths.values()),
  )
  lpips.save_lpips(folder, network, params, _sources(paths))
  return f"LPIPS with {network!r}"


def _write_vgg(folder, paths, options):
  return _write_lpips("vgg", folder, paths, options)


def _write_alex(folder, paths, options):
  return _write_lpips("alex", folder, paths, options)


def _write_inception(folder, paths, options):
  from psvae_jax.pretrained import inception

  path = paths["weights"]
  tensors = _read(path, options.get("container"))
  params = inception.from_published(tensors, source=str(path))
  port = inception.port_of(path.name)
  inception.save_inception(folder, params, port, _sources(paths))
  return f"the FID network ({port})"


def _write_autoencoder_kl(folder, paths, options):
  from psvae_jax.pretrained import autoencoder_kl, ldm

  path, name = paths["weights"], options.get("name")
  tensors = _read(path, options.get("container"))
  raw, tensors = ldm.convert(tensors, name, source=str(path))
  autoencoder_kl.write_folder(folder, {**raw, **_sources(paths)}, tensors)
  return f"AutoencoderKL ({name or path.name})"


def _write_huggingface(folder, paths, options):
  from psvae_jax.pretrained import files

  path = paths["weights"]
  tensors = _read(path, options.get("container"))
  raw = files.read_config(path.parent)
  # diffusers' files keep their name, transformers' is the other one.
  stem = "model" if path.stem == "pytorch_model" else path.stem
  files.write_safetensors(folder / f"{stem}.safetensors", tensors)
  config = json.dumps({**raw, **_sources(paths)}, indent=2) + "\n"
  (folder / "config.json").write_text(config)
  for other in sorted(path.parent.iterdir()):
    if other.suffix in _BESIDE and not (folder / other.name).exists():
      if other.is_file() and not other.name.endswith(".index.json"):
        shutil.copyfile(other, folder / other.name)
  return f"{raw.get('model_type') or raw.get('_class_name') or 'a network'}"


KINDS = {
  "vgg16": Kind(
    "LPIPS with VGG16: torchvision's classifier, the lpips package's heads",
    {
      "weights": "torchvision's VGG16: "
      "https://download.pytorch.org/models/vgg16-397923af.pth",
      "heads": _HEADS.format("vgg.pth"),
    },
    _CONTAINER,
    _write_vgg,
  ),
  "alexnet": Kind(
    "LPIPS with AlexNet: torchvision's classifier, the lpips package's heads",
    {
      "weights": "torchvision's AlexNet: "
      "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
      "heads": _HEADS.format("alex.pth"),
    },
    _CONTAINER,
    _write_alex,
  ),
  "inception": Kind(
    "the Inception network of FID, sFID, KID and inception score",
    {
      "weights": "pytorch-fid's port: https://github.com/mseitzer/pytorch-fid/"
      "releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth, or "
      "torch-fidelity's: https://github.com/toshas/torch-fidelity/releases/"
      "download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
    },
    _CONTAINER,
    _write_inception,
  ),
  "huggingface": Kind(
    "a folder of the Hugging Face hub whose tensors are in a .bin file",
    {
      "weights": "pytorch_model.bin, or diffusion_pytorch_model.bin, in one "
      "piece and with config.json beside it, e.g. of "
      "https://huggingface.co/facebook/vit-mae-base. Tokenizer and "
      "preprocessor files beside it are copied",
    },
    _CONTAINER,
    _write_huggingface,
  ),
  "autoencoder-kl": Kind(
    "an autoencoder in LDM's layout, as a diffusers AutoencoderKL folder",
    {
      "weights": ".ckpt, .pt or .safetensors, e.g. MAR's: "
      "https://www.dropbox.com/scl/fi/hhmuvaiacrarfg28qxhwz/kl16.ckpt"
      "?rlkey=l44xipsezc8atcffdp4q7mwmh&dl=1, VA-VAE's: https://huggingface.co/"
      "hustvl/vavae-imagenet256-f16d32-dinov2/resolve/main/"
      "vavae-imagenet256-f16d32-dinov2.pt, FLUX's ae.safetensors: "
      "https://huggingface.co/black-forest-labs/FLUX.1-schnell",
    },
    {
      **_CONTAINER,
      "name": "what it is: sd, sdxl, sd3, flux, ldm-kl-f16, mar-kl16 or "
      "va-vae-f16d32; gives the latents' scale and is checked against the "
      "shapes",
    },
    _write_autoencoder_kl,
  ),
}


def _sources(paths: Mapping[str, Path]) -> dict[str, list[dict[str, str]]]:
  """For config.json: name and SHA-256 of every file."""
  found = []
  for path in paths.values():
    with open(path, "rb") as file:
      digest = hashlib.file_digest(file, "sha256").hexdigest()
    found.append({"file": path.name, "sha256": digest})
  return {"sources": found}


def misnamed(folder: Path) -> list[str]:
  """What names of source files say against their content.

  Names of PyTorch's files end in the first digits of their SHA-256, as in
  vgg16-397923af.pth.

  Args:
    folder: what `convert` wrote.

  Returns:
    A line for every file whose name says something else.
  """
  from psvae_jax.pretrained import files

  lines = []
  for source in files.read_config(folder).get("sources", []):
    said = re.search(r"-([0-9a-f]{8,})\.\w+$", source["file"])
    if said and not source["sha256"].startswith(said[1]):
      lines.append(
        f"{source['file']}: its SHA-256 begins with {source['sha256'][:8]}, "
        f"not with {said[1]} as its name says"
      )
  return lines


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
  """The command line; --help shows it."""
  parser = argparse.ArgumentParser(
    prog="python -m psvae_jax.convert",
    description="Turns published files into folders of safetensors.",
    epilog=USAGE_EXAMPLES,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
  for name, kind in KINDS.items():
    sub = kinds.add_parser(
      name,
      help=kind.summary,
      description=kind.summary,
      epilog=_where(kind),
      formatter_class=argparse.RawDescriptionHelpFormatter,
      allow_abbrev=False,
    )
    for option in kind.files:
      sub.add_argument(
        f"--{option}", required=True, metavar="FILE", help="see below"
      )
    sub.add_argument("--out", required=True, help="folder to write")
    for option, text in kind.options.items():
      sub.add_argument(f"--{option}", help=text)
  return parser.parse_args(argv)


def _where(kind: Kind) -> str:
  """Where its files are published, every address whole on a line of its own."""
  lines = ["where the files are published:"]
  for option, published in kind.files.items():
    text = re.sub(r" ?(https://\S*[^\s,]),? ?", r"\n    \1\n  ", published)
    lines.append(f"  --{option}: {text.strip()}")
  return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
  """Runs the command; exits with 1 if anything could not be done."""
  arguments = vars(parse_arguments(argv))
  kind = KINDS[arguments["kind"]]
  out = Path(arguments["out"]).expanduser()
  paths = {name: Path(arguments[name]).expanduser() for name in kind.files}
  options = {name: arguments[name] for name in kind.options}
  try:
    said = convert(arguments["kind"], paths, out, options)
    notes = misnamed(out)
  except (ValueError, OSError, ImportError) as error:
    cli.fail(cli.one_line(error))
  size = sum(path.stat().st_size for path in out.iterdir())
  print(f"{said} → {out} ({size / 2**20:.1f} MiB)")
  for note in notes:
    print(f"note: {note}")


if __name__ == "__main__":
  cli.guard(main, interrupted="nothing was written")
