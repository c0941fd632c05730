"""Qwen2.5 on disk: parity with transformers, and strict loading."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torchvision_ops  # noqa: F401  before transformers imports torchvision

from psvae_jax.models import masked_attention
from psvae_jax.pretrained import qwen2

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

WIDTH, TEXT, IMAGE = 24, 6, 4


def reference(kind="Qwen2ForCausalLM", **changes):
  """A small model of transformers, every parameter random."""
  config = transformers.Qwen2Config(
    **dict(
      vocab_size=37,
      hidden_size=WIDTH,
      intermediate_size=40,
      num_hidden_layers=3,
      num_attention_heads=6,
      num_key_value_heads=2,
      rms_norm_eps=1e-5,
      rope_parameters={"rope_type": "default", "rope_theta": 5e4},
      attn_implementation="eager",
    )
    | changes
  )
  model = getattr(transformers, kind)(config).eval()
  generator = torch.manual_seed(0)
  for name, parameter in model.named_parameters():
    noise = torch.randn(parameter.shape, generator=generator)
    scale = "norm.weight" in name or "layernorm" in name
    parameter.data = 1 + 0.3 * noise if scale else 0.3 * noise
  return model


def batch():
  """Embeddings, segments and positions of padded text and an image."""
  rng = np.random.default_rng(0)
  length = TEXT + IMAGE
  embeddings = rng.standard_normal((3, length, WIDTH), np.float32)
  lengths = np.array([TEXT, 4, 1])
  text_mask = np.arange(TEXT) < lengths[:, None]
  segments = masked_attention.segment_ids(text_mask, IMAGE)
  positions = masked_attention.sequence_positions(segments)
  return embeddings, np.asarray(segments), np.asarray(positions)


def run_reference(model, embeddings, mask, positions):
  """Final-normed features under an additive 4-D mask, eager attention."""
  additive = np.where(mask, 0, np.finfo(np.float32).min).astype(np.float32)
  with torch.no_grad():
    return model(
      inputs_embeds=torch.tensor(embeddings),
      attention_mask=torch.tensor(additive),
      position_ids=torch.tensor(positions).long(),
    ).last_hidden_state.numpy()


@pytest.mark.parametrize("kind", ["untied, sharded", "tied", "bare"])
def test_same_features_as_transformers(tmp_path, kind):
  if kind == "bare":
    model = decoder = reference("Qwen2Model")
  else:
    model = reference(tie_word_embeddings=kind == "tied")
    decoder = model.model
  shard = "40KB" if "sharded" in kind else "1GB"
  model.save_pretrained(tmp_path, max_shard_size=shard)
  assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == ("shard" in kind)

  embeddings, segments, positions = batch()
  mask = masked_attention.transfusion_mask(segments)
  expected = run_reference(decoder, embeddings, mask, positions)
  backbone = qwen2.load_qwen2(tmp_path, token_embedding=kind != "tied")
  features = backbone(embeddings, mask, positions)
  assert features.dtype == jnp.float32 and backbone.width == WIDTH
  real = segments != masked_attention.PADDING
  np.testing.assert_allclose(features[real], expected[real], atol=1e-4, rtol=0)
  assert np.isfinite(features).all() and np.std(expected[real]) > 0.5


def test_text_alone_is_the_language_model(tmp_path):
  model = reference()
  model.save_pretrained(tmp_path)
  tokens = np.random.default_rng(0).integers(0, 37, (2, 7))
  with torch.no_grad():
    expected = model.model(torch.tensor(tokens)).last_hidden_state.numpy()
  backbone = qwen2.load_qwen2(tmp_path, token_embedding=True)
  features = backbone(backbone.embed(tokens))
  np.testing.assert_allclose(features, expected, atol=1e-4, rtol=0)


@pytest.fixture
def folder(tmp_path):
  reference().save_pretrained(tmp_path)
  return tmp_path


def edit_config(folder, remove=(), **values):
  path = folder / "config.json"
  raw = json.loads(path.read_text()) | values
  path.write_text(json.dumps({k: raw[k] for k in raw if k not in remove}))


def edit_tensors(folder, edit):
  path = folder / "model.safetensors"
  tensors = safetensors.numpy.load_file(path)
  edit(tensors)
  safetensors.numpy.save_file(tensors, path)


def test_older_configs_keep_theta_at_the_top(folder):
  want = qwen2.load_qwen2(folder)
  assert want.module.config.rope_theta == 5e4
  edit_config(folder, remove=["rope_parameters"], rope_theta=5e4)
  got = qwen2.load_qwen2(folder)
  assert got.fingerprint == want.fingerprint
  edit_config(folder, rope_theta=1e6)
  assert qwen2.load_qwen2(folder).fingerprint != want.fingerprint


def test_embedding_is_left_out_unless_wanted(folder):
  assert "embed" not in qwen2.load_qwen2(folder).params
  backbone = qwen2.load_qwen2(folder, token_embedding=True)
  assert backbone.params["embed"]["embedding"].shape == (37, WIDTH)


def test_low_precision(folder):
  embeddings, segments, positions = batch()
  mask = masked_attention.transfusion_mask(segments)
  exact = qwen2.load_qwen2(folder)(embeddings, mask, positions)
  backbone = qwen2.load_qwen2(
    folder, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16
  )
  assert {x.dtype.name for x in jax.tree.leaves(backbone.params)} == {
    "bfloat16"
  }
  rough = backbone(embeddings, mask, positions)
  assert np.std(rough - exact) < 0.05 * np.std(exact)
  with pytest.raises(ValueError, match="dtype.*float16"):
    qwen2.load_qwen2(folder, param_dtype=jnp.float16)


def test_strict_tensors(folder):
  def edit(tensors):
    del tensors["model.layers.1.self_attn.k_proj.bias"]
    tensors["model.layers.1.self_attn.o_proj.bias"] = np.zeros(WIDTH)
    tensors["model.norm.weight"] = np.zeros(WIDTH + 1, np.float32)
    tensors["lm_head.weight"] = np.zeros((3, WIDTH), np.float32)

  edit_tensors(folder, edit)
  with pytest.raises(ValueError) as error:
    qwen2.load_qwen2(folder)
  message = str(error.value)
  assert "missing: model.layers.1.self_attn.k_proj.bias" in message
  assert "unexpected: model.layers.1.self_attn.o_proj.bias" in message
  assert "model.norm.weight (file (25,), model (24,))" in message
  assert "lm_head.weight (file (3, 24), model (37, 24))" in message


@pytest.mark.parametrize(
  "values, message",
  [
    ({"model_type": "llama"}, "model_type is 'llama'"),
    ({"hidden_size": "24"}, "hidden_size is '24'"),
    ({"hidden_size": 2**40}, "hidden_size 1099511627776 is not in"),
    ({"num_hidden_layers": 2**24}, "16777216 layers, the file has"),
    ({"num_hidden_layers": 4}, r"missing: model\.layers\.3"),
    ({"num_key_value_heads": 4}, "not a multiple of num_key_value_heads 4"),
    ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not 'silu'"),
    ({"head_dim": 8}, "head_dim 8 is not hidden_size"),
    ({"use_sliding_window": True}, "use_sliding_window True is not False"),
    ({"layer_types": ["sliding_attention"] * 3}, "sliding window"),
    ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type 'yarn'"),
    ({"rope_parameters": {"rope_theta": "1"}}, "rope_theta is '1'"),
    ({"rope_parameters": [1]}, "rope_parameters must be an object"),
  ],
)
def test_config_errors(folder, values, message):
  edit_config(folder, **values)
  with pytest.raises(ValueError, match=message) as error:
    qwen2.load_qwen2(folder)
  assert str(folder) in str(error.value)


def test_missing_files(tmp_path):
  with pytest.raises(FileNotFoundError, match="nowhere"):
    qwen2.load_qwen2(tmp_path / "nowhere")
  with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
    qwen2.load_qwen2(tmp_path)


@pytest.mark.parametrize(
  "size, count",  # as the published models' cards and files have it
  [
    ("0.5B", 494_032_768),
    ("1.5B-Instruct", 1_543_714_304),
    ("3B", 3_085_938_688),
    ("7B", 7_615_616_512 - 152_064 * 3584),  # an output layer of its own
  ],
)
def test_published_sizes(size, count):
  backbone = qwen2.abstract_qwen2(
    f"random:Qwen/Qwen2.5-{size}", token_embedding=True
  )
  leaves = jax.tree.leaves(backbone.params)
  assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
  assert sum(leaf.size for leaf in leaves) == count


def test_abstract_backbone_of_a_folder_needs_no_tensors(folder):
  want = qwen2.load_qwen2(folder, remat=True)
  (folder / "model.safetensors").unlink()
  got = qwen2.abstract_qwen2(folder, remat=True)
  assert got.module == want.module
  shapes = [jax.tree.map(lambda x: x.shape, b.params) for b in (got, want)]
  assert shapes[0] == shapes[1]


def test_random_backbone_is_seeded(folder, monkeypatch):
  config = qwen2.load_qwen2(folder).module.config
  monkeypatch.setattr(qwen2, "PUBLISHED", {"Qwen/Qwen2.5-test": config})
  first, second = (
    qwen2.load_qwen2("random:Qwen/Qwen2.5-test") for _ in range(2)
  )
  assert first.fingerprint == second.fingerprint
  features = first(np.random.default_rng(0).normal(size=(2, 5, WIDTH)))
  assert np.std(features) == pytest.approx(1, rel=0.1)
  with pytest.raises(ValueError, match="mean 'Qwen/Qwen2.5-test'"):
    qwen2.load_qwen2("random:Qwen/Qwen2.5-tets")
