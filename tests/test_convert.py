"""The converter: published files become folders that load."""

import dataclasses
import hashlib
import json

import numpy as np
import pytest
import tiny

from psvae_jax import convert as command
from psvae_jax.models.kl_autoencoder import KLConfig
from psvae_jax.pretrained import (
  autoencoder_kl,
  files,
  inception,
  lpips,
  mapping,
  untrained,
)
from psvae_jax.pretrained.encoder import load_encoder

torch = pytest.importorskip("torch")


def save(path, tensors):
  tensors = {k: torch.from_numpy(np.array(v)) for k, v in tensors.items()}
  torch.save(tensors, path)
  return path


@pytest.fixture(scope="module")
def network():
  return lpips.load_lpips("random:alex")


@pytest.fixture(name="published")
def _published(network, tmp_path):
  """torchvision's and the lpips package's two files, with random weights."""
  tensors = mapping.export_params(lpips.rules("alex"), network.params)
  backbone = {k: v for k, v in tensors.items() if k.startswith("features")}
  for layer in (1, 4, 6):  # of the real file, these are 58 million numbers
    for kind in ("weight", "bias"):
      backbone[f"classifier.{layer}.{kind}"] = np.zeros(2, np.float32)
  heads = {k: v for k, v in tensors.items() if k.startswith("lin")}
  return {
    "weights": save(tmp_path / "alexnet-owt-7be5be79.pth", backbone),
    "heads": save(tmp_path / "alex.pth", heads),
  }


def arguments(kind, paths, out):
  options = {**paths, "out": out}
  return [kind, *(f"--{name}={value}" for name, value in options.items())]


def test_lpips_is_converted_and_says_where_it_comes_from(
  network, published, tmp_path, capsys
):
  out = tmp_path / "weights" / "lpips"
  command.main(arguments("alexnet", published, out))
  loaded = lpips.load_lpips(out)
  assert loaded.fingerprint == network.fingerprint
  assert sorted(path.name for path in out.iterdir()) == [
    "config.json",
    "model.safetensors",
  ]
  config = json.loads((out / "config.json").read_text())
  assert config["sources"] == [
    {
      "file": path.name,
      "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    for path in published.values()
  ]
  said = capsys.readouterr().out
  assert f"LPIPS with 'alex' → {out} (9.4 MiB)" in said
  # These random weights are not the file whose name they have.
  assert "note: alexnet-owt-7be5be79.pth: its SHA-256 begins with" in said
  assert "alex.pth:" not in said


def test_an_existing_folder_is_never_replaced(published, tmp_path, capsys):
  out = tmp_path / "out"
  out.mkdir()
  (out / "mine").write_text("kept")
  with pytest.raises(SystemExit, match="is not replaced"):
    command.main(arguments("alexnet", published, out))
  assert [path.name for path in out.iterdir()] == ["mine"]
  (out / "mine").unlink()
  command.main(arguments("alexnet", published, out))
  with pytest.raises(SystemExit, match="is not replaced"):
    command.main(arguments("alexnet", published, out))
  with pytest.raises(SystemExit, match="is not replaced"):
    command.main(arguments("alexnet", published, published["heads"]))


def test_a_file_that_does_not_fit_writes_nothing(published, tmp_path):
  out = tmp_path / "out"
  with pytest.raises(SystemExit, match="missing: features.12.bias"):
    command.main(arguments("vgg16", published, out))
  published["heads"].write_bytes(b"no pickle")
  with pytest.raises(SystemExit, match="alex.pth is truncated or no file of"):
    command.main(arguments("alexnet", published, out))
  published["heads"].unlink()
  with pytest.raises(SystemExit, match="alex.pth does not exist"):
    command.main(arguments("alexnet", published, out))
  assert not list(tmp_path.glob("out*"))


def test_inception_is_converted(tmp_path):
  network = inception.load_inception("random:inception")
  tensors = mapping.export_params(inception.rules(), network.params)
  tensors["fc.bias"] = np.zeros(1008, np.float32)
  path = save(tmp_path / "pt_inception-2015-12-05-6726825d.pth", tensors)
  said = command.convert("inception", {"weights": path}, tmp_path / "out")
  assert said == "the FID network (pytorch-fid)"
  loaded = inception.load_inception(tmp_path / "out")
  assert loaded.port == "pytorch-fid"
  assert loaded.fingerprint == network.fingerprint


@pytest.mark.parametrize(
  ("name", "port"),
  [
    ("pt_inception-2015-12-05-6726825d.pth", "pytorch-fid"),
    ("weights-inception-2015-12-05-6726825d.pth", "torch-fidelity"),
    ("mine.pth", "mine.pth"),
  ],
)
def test_the_port_is_known_by_the_name_of_the_file(name, port):
  assert inception.port_of(name) == port


def test_an_autoencoder_of_ldm_is_converted(tmp_path):
  config = KLConfig(
    block_out_channels=(32, 64),
    layers_per_block=1,
    latent_channels=3,
    down_attention=(False, True),
    up_attention=(False, False),
  )
  params = untrained.random_params(autoencoder_kl.param_shapes(config))
  rules = autoencoder_kl.rules(config, autoencoder_kl.LDM)
  state = {
    key: torch.from_numpy(np.array(value))
    for key, value in mapping.export_params(rules, params).items()
  }
  state["loss.logvar"] = torch.zeros(())
  weights, out = tmp_path / "tiny.ckpt", tmp_path / "out"
  torch.save({"state_dict": state, "global_step": 3}, weights)
  command.main(arguments("autoencoder-kl", {"weights": weights}, out))
  found, loaded = autoencoder_kl.read_folder(out)
  assert found == dataclasses.replace(config, scaling_factor=1.0)
  assert files.fingerprint_params(loaded) == files.fingerprint_params(params)
  raw = json.loads((out / "config.json").read_text())
  assert raw["sources"][0]["file"] == "tiny.ckpt"
  with pytest.raises(SystemExit, match="is not mar-kl16: it has"):
    options = {"weights": weights, "name": "mar-kl16"}
    command.main(arguments("autoencoder-kl", options, tmp_path / "other"))
  assert not (tmp_path / "other").exists()


def test_a_folder_of_the_hub_is_converted(tmp_path):
  source = tiny.save_encoder(tmp_path / "hub")
  before = load_encoder(source)
  save(source / "pytorch_model.bin", files.read_safetensors(source))
  (source / "model.safetensors").unlink()
  with pytest.raises(FileNotFoundError, match="psvae_jax.convert huggingface"):
    load_encoder(source)
  out, paths = tmp_path / "out", {"weights": source / "pytorch_model.bin"}
  said = command.convert("huggingface", paths, out)
  after = load_encoder(out)
  assert said == "dinov2_with_registers"
  assert after.fingerprint == before.fingerprint
  names = {path.name for path in source.iterdir()} - {"pytorch_model.bin"}
  assert {path.name for path in out.iterdir()} == names | {"model.safetensors"}
  (source / "config.json").unlink()
  with pytest.raises(FileNotFoundError, match="config.json"):
    command.convert("huggingface", paths, tmp_path / "other")


@pytest.mark.parametrize("kind", [None, *command.KINDS])
def test_help_shows_where_files_are_published(kind, capsys):
  with pytest.raises(SystemExit, match="0"):
    command.parse_arguments(["--help"] if kind is None else [kind, "--help"])
  shown = capsys.readouterr().out
  if kind is None:
    assert "python -m psvae_jax.convert vgg16 --weights=vgg16-" in shown
    assert all(name in shown for name in command.KINDS)
  else:
    assert "--out" in shown
    addresses = [x.strip() for x in shown.splitlines() if "https://" in x]
    said = " ".join(command.KINDS[kind].files.values())
    assert addresses and all(
      x.startswith("https://") and x in said for x in addresses
    )
    assert len(addresses) == said.count("https://")
