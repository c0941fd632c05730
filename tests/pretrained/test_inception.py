"""The FID network's folder: what is written, what is read, what is refused."""

import json

import jax
import numpy as np
import pytest

from psvae_jax.pretrained import files, inception, mapping


@pytest.fixture(scope="module")
def network():
  return inception.load_inception("random:inception")


@pytest.fixture(scope="module", name="folder")
def _folder(network, tmp_path_factory):
  folder = tmp_path_factory.mktemp("inception")
  inception.save_inception(folder, network.params, "pytorch-fid")
  return folder


def test_a_round_trip_is_exact(network, folder):
  loaded = inception.load_inception(folder)
  jax.tree.map(np.testing.assert_array_equal, loaded.params, network.params)
  assert loaded.fingerprint == network.fingerprint
  assert (loaded.name, loaded.port) == (str(folder), "pytorch-fid")
  assert (network.name, network.port) == ("random:inception", "random")


def test_random_weights_are_the_published_network(network):
  # torchvision's Inception v3 without auxiliary classifier has 21 785 568
  # parameters before its last layer; the FID network's blocks are as large.
  # BatchNorm's statistics are as many again as its scales and biases.
  flat = [
    (path[-1].key, leaf.size)
    for path, leaf in jax.tree_util.tree_leaves_with_path(network.params)
  ]
  learned = sum(n for key, n in flat if key not in ("mean", "variance"))
  assert learned == 21_785_568 + 2048 * 1008
  images = jax.ShapeDtypeStruct((3, 64, 48, 3), "uint8")
  out = jax.eval_shape(network.features, network.params, images)
  widths = {"64": 64, "192": 192, "768": 768, "2048": 2048}
  widths |= {"spatial": 2023, "logits": 1008}
  assert {k: v.shape for k, v in out.items()} == {
    k: (3, n) for k, n in widths.items()
  }


def test_what_the_published_files_have_besides_is_left_out(network):
  tensors = mapping.export_params(inception.rules(), network.params)
  tensors["fc.bias"] = np.zeros(1008, np.float32)
  tensors["Mixed_5b.branch1x1.bn.num_batches_tracked"] = np.array(7)
  params = inception.from_published(tensors, source="file")
  assert files.fingerprint_params(params) == network.fingerprint
  tensors["AuxLogits.fc.bias"] = np.zeros(1000, np.float32)
  del tensors["Conv2d_2a_3x3.bn.running_mean"]
  message = (
    "missing: Conv2d_2a_3x3.bn.running_mean; unexpected: AuxLogits.fc.bias"
  )
  with pytest.raises(ValueError, match=message):
    inception.from_published(tensors, source="file")


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"model_type": "lpips"}, "model_type 'lpips' is not the FID network's"),
    ({"graph": "inception-v3"}, "graph 'inception-v3' is not"),
    ({"port": 3}, "port 3 is not a name"),
  ],
)
def test_a_config_that_does_not_fit_is_named(folder, tmp_path, fields, message):
  config = json.loads((folder / "config.json").read_text())
  path = tmp_path / "config.json"
  path.write_text(json.dumps({**config, **fields}))
  with pytest.raises(ValueError, match=message) as error:
    inception.load_inception(tmp_path)
  assert str(path) in str(error.value)


def test_missing_weights_say_how_to_get_them(tmp_path):
  how = "python -m psvae_jax.convert inception --weights=FILE"
  with pytest.raises(ValueError, match=f"no folder is given; .*{how}"):
    inception.load_inception("")
  with pytest.raises(FileNotFoundError, match=f"does not exist; .*{how}"):
    inception.load_inception(tmp_path / "absent")
  with pytest.raises(FileNotFoundError, match=f"config.json is .*{how}"):
    inception.load_inception(tmp_path)
  with pytest.raises(ValueError, match="valid: random:inception"):
    inception.load_inception("random:inception3")
