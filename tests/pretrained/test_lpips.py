"""LPIPS folders: what is written, what is read, what is refused."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from psvae_jax.pretrained import files, lpips


@pytest.fixture(scope="module")
def network():
  return lpips.load_lpips("random:alex")


@pytest.fixture(name="folder")
def _folder(network, tmp_path):
  lpips.save_lpips(tmp_path, "alex", network.params)
  return tmp_path


def test_a_round_trip_is_exact(network, folder):
  loaded = lpips.load_lpips(folder)
  jax.tree.map(np.testing.assert_array_equal, loaded.params, network.params)
  assert loaded.fingerprint == network.fingerprint
  assert loaded.fingerprint == files.fingerprint_params(loaded.params)
  assert loaded.network == "alex" and loaded.name == str(folder)
  assert lpips.load_lpips(folder, network="alex").network == "alex"


@pytest.mark.parametrize(
  ("name", "count"),
  # torchvision's features, and a head of every layer's width.
  [("vgg", 14_714_688 + 1472), ("alex", 2_469_696 + 1152)],
)
def test_random_weights_are_the_published_network(name, count):
  network = lpips.load_lpips(f"random:{name}")
  assert sum(x.size for x in jax.tree.leaves(network.params)) == count
  assert all((network.params[f"head{i}"] >= 0).all() for i in range(5))
  assert network.fingerprint == lpips.load_lpips(f"random:{name}").fingerprint
  images = jax.ShapeDtypeStruct((3, 64, 96, 3), "float32")
  out = jax.eval_shape(network.distance, network.params, images, images)
  assert out.shape == (3,)


def test_published_heads_are_what_the_package_has(network):
  import metric_networks

  for name in ("vgg", "alex"):
    heads = metric_networks.published_heads(name)
    assert len(heads) == 5
    assert all((tensor >= 0).all() for tensor in heads.values())
  params = metric_networks.lpips_params("alex")
  assert np.abs(params["head0"] - network.params["head0"]).max() > 0
  np.testing.assert_array_equal(
    params["stage2"]["conv0"]["kernel"],
    network.params["stage2"]["conv0"]["kernel"],
  )


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda t: t.pop("features.6.bias"), "missing: features.6.bias"),
    (lambda t: t.update(extra=np.zeros(1, "f4")), "unexpected: extra"),
    (
      lambda t: t.update({"lin2.model.1.weight": np.zeros((1, 4, 1, 1), "f4")}),
      r"wrong shape: lin2.model.1.weight \(file \(1, 4, 1, 1\), model",
    ),
  ],
)
def test_tensors_that_do_not_fit_are_named(folder, change, message):
  path = folder / "model.safetensors"
  tensors = safetensors.numpy.load_file(path)
  change(tensors)
  files.write_safetensors(path, tensors)
  with pytest.raises(ValueError, match=message):
    lpips.load_lpips(folder)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"model_type": "vit"}, "model_type 'vit' is not LPIPS's"),
    ({"version": "0.0"}, "version '0.0' of the heads is not supported"),
    ({"network": "vgg19"}, "network 'vgg19' is none of.*did you mean 'vgg'"),
    ({"network": ["vgg"]}, "is none of LPIPS's"),
    ({"network": "vgg"}, "does not fit its config.json"),
  ],
)
def test_a_config_that_does_not_fit_is_named(folder, fields, message):
  path = folder / "config.json"
  path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
  with pytest.raises(ValueError, match=message) as error:
    lpips.load_lpips(folder)
  assert str(folder) in str(error.value)


def test_missing_weights_say_how_to_get_them(folder, tmp_path):
  how = "python -m psvae_jax.convert vgg16 --weights=FILE --heads=FILE"
  with pytest.raises(ValueError, match=f"no folder is given; .*{how}"):
    lpips.load_lpips("")
  with pytest.raises(FileNotFoundError, match=f"does not exist; .*{how}"):
    lpips.load_lpips(tmp_path / "absent", network="vgg")
  (folder / "model.safetensors").unlink()
  with pytest.raises(FileNotFoundError, match="psvae_jax.convert alexnet"):
    lpips.load_lpips(folder)
  with pytest.raises(ValueError, match="is LPIPS with 'alex', not with 'vgg'"):
    lpips.load_lpips(folder, network="vgg")
  with pytest.raises(ValueError, match="not with 'alex'"):
    lpips.load_lpips("random:vgg", network="alex")
  with pytest.raises(ValueError, match="did you mean 'random:vgg'"):
    lpips.load_lpips("random:vgg16")
  with pytest.raises(ValueError, match="network 'vg' is none"):
    lpips.load_lpips(folder, network="vg")
