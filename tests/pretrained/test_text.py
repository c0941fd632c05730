"""Text encoders on disk: strict loading, transformers, and the tokenizer."""

import dataclasses
import json
import pickle
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import vision_reference

from psvae_jax.models import text as models_text
from psvae_jax.pretrained import text
from psvae_jax.pretrained import tokenizer as tokenizer_lib

transformers = pytest.importorskip("transformers")

CORPUS = [
  f"make the {size} {colour} {shape} {change}"
  for size in ("small", "large")
  for colour in ("red", "green", "blue")
  for shape in ("circle", "square", "triangle")
  for change in ("bigger", "yellow", "vanish")
]
CONFIG = models_text.T5Config(
  vocab_size=320,
  d_model=16,
  d_kv=5,
  d_ff=24,
  num_layers=2,
  num_heads=3,
  relative_attention_num_buckets=8,
  relative_attention_max_distance=20,
  feed_forward_proj="gated-gelu",
  layer_norm_eps=1e-5,
)


def random_params(config):
  module = models_text.T5Encoder(config)
  tokens = jnp.zeros((1, 4), jnp.int32)
  shapes = jax.eval_shape(module.init, jax.random.key(0), tokens, tokens == 0)[
    "params"
  ]
  rng = np.random.default_rng(0)

  def randomise(path, leaf):
    noise = rng.standard_normal(leaf.shape).astype(np.float32)
    return 1 + 0.3 * noise if path[-1].key == "scale" else 0.4 * noise

  return jax.tree_util.tree_map_with_path(randomise, shapes)


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("tokenizer")
  tokenizer_lib.train_tokenizer(CORPUS, folder, 300)
  return folder


@pytest.fixture
def folder(tmp_path, tokenizer_folder):
  """A saved encoder of architecture CONFIG, random everywhere."""
  text.save_text_encoder(
    tmp_path / "encoder",
    CONFIG,
    random_params(CONFIG),
    tokenizer_lib.Tokenizer(str(tokenizer_folder), 12),
  )
  return tmp_path / "encoder"


def edit_config(folder, **values):
  path = folder / "config.json"
  raw = json.loads(path.read_text())
  path.write_text(json.dumps(raw | values))


def edit_tensors(folder, edit):
  path = folder / "model.safetensors"
  tensors = safetensors.numpy.load_file(path)
  edit(tensors)
  safetensors.numpy.save_file(tensors, path)


def assert_trees_equal(ours, theirs):
  assert jax.tree.structure(ours) == jax.tree.structure(theirs)
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.parametrize("projection", ["gated-gelu", "relu"])
def test_transformers_reads_what_is_saved(
  tmp_path, tokenizer_folder, projection
):
  torch = pytest.importorskip("torch")
  vision_reference.import_transformers()
  config = dataclasses.replace(CONFIG, feed_forward_proj=projection)
  params = random_params(config)
  tokenizer = tokenizer_lib.Tokenizer(str(tokenizer_folder), 12)
  text.save_text_encoder(tmp_path, config, params, tokenizer)

  model, info = transformers.T5EncoderModel.from_pretrained(
    tmp_path, output_loading_info=True
  )
  assert not any(info.values()), info
  captions = [CORPUS[0], "", "green " * 30]
  batch = transformers.AutoTokenizer.from_pretrained(tmp_path)(
    captions,
    padding="max_length",
    truncation=True,
    max_length=12,
    return_tensors="pt",
  )
  with torch.no_grad():
    expected = model.eval()(**batch).last_hidden_state.numpy()

  encoder = text.load_text_encoder(tmp_path, max_length=12)
  assert encoder.module.config == config
  assert_trees_equal(encoder.params, params)
  features, mask = encoder(captions)
  assert features.shape == (3, 12, 16) and encoder.width == 16
  assert encoder.max_length == 12
  np.testing.assert_array_equal(mask, batch["attention_mask"].numpy() == 1)
  np.testing.assert_allclose(features[mask], expected[mask], atol=1e-5, rtol=0)


@pytest.mark.parametrize("projection", ["gated-gelu", "relu"])
def test_reads_a_whole_t5(tmp_path, tokenizer_folder, projection):
  torch = pytest.importorskip("torch")
  vision_reference.import_transformers()
  model = transformers.T5ForConditionalGeneration(
    transformers.T5Config(
      vocab_size=320,
      d_model=16,
      d_kv=5,
      d_ff=24,
      num_layers=2,
      num_heads=3,
      feed_forward_proj=projection,
    )
  ).eval()
  for parameter in model.parameters():
    parameter.data.normal_(0, 0.5, generator=torch.manual_seed(0))
  model.save_pretrained(tmp_path, max_shard_size="20KB")
  assert len(list(tmp_path.glob("*.safetensors"))) > 1
  encoder = text.load_text_encoder(
    tmp_path, tokenizer=tokenizer_folder, max_length=9
  )
  tokens, mask = encoder.tokenize(["a red circle", "", "blue"])
  with torch.no_grad():
    expected = model.encoder(
      torch.from_numpy(tokens).long(), torch.from_numpy(mask).long()
    ).last_hidden_state.numpy()
  features, _ = encoder(["a red circle", "", "blue"])
  np.testing.assert_allclose(features[mask], expected[mask], atol=1e-5, rtol=0)


def test_low_precision(folder):
  exact, mask = text.load_text_encoder(folder, max_length=12)(CORPUS[:2])
  encoder = text.load_text_encoder(
    folder, max_length=12, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16
  )
  assert {leaf.dtype.name for leaf in jax.tree.leaves(encoder.params)} == {
    "bfloat16"
  }
  features, _ = encoder(CORPUS[:2])
  assert features.dtype == jnp.bfloat16
  error = np.asarray(features, np.float32)[mask] - exact[mask]
  assert np.std(error) < 0.08 * np.std(exact[mask])
  with pytest.raises(ValueError, match="dtype.*float16"):
    text.load_text_encoder(folder, dtype=jnp.float16)


def test_fingerprint_changes_with_what_changes_features(folder):
  def fingerprint(max_length=12, **options):
    encoder = text.load_text_encoder(folder, max_length=max_length, **options)
    return encoder.fingerprint

  first = fingerprint()
  assert fingerprint(unroll=2) == first
  seen = {first, fingerprint(max_length=13)}
  edit_config(folder, layer_norm_epsilon=1e-6)
  seen.add(fingerprint())

  def edit(tensors):
    tensors["encoder.final_layer_norm.weight"][3] += 1e-3

  edit_tensors(folder, edit)
  seen.add(fingerprint())
  tokenizer_lib.train_tokenizer(CORPUS, folder, 290)
  seen.add(fingerprint())
  assert len(seen) == 5


def test_strict_tensors(folder):
  prefix = "encoder.block.1.layer.0.SelfAttention"
  shared = "shared.weight"

  def edit(tensors):
    del tensors[f"{prefix}.k.weight"]
    tensors[f"{prefix}.relative_attention_bias.weight"] = np.zeros((8, 3))
    tensors["encoder.final_layer_norm.weight"] = np.zeros(17, np.float32)

  edit_tensors(folder, edit)
  with pytest.raises(ValueError) as error:
    text.load_text_encoder(folder)
  message = str(error.value)
  assert f"missing: {prefix}.k.weight" in message
  assert f"unexpected: {prefix}.relative_attention_bias.weight" in message
  assert "encoder.final_layer_norm.weight (file (17,), model (16,))" in message
  assert shared not in message


def test_embedding_under_either_name_or_both(folder):
  shared, tied = "shared.weight", "encoder.embed_tokens.weight"
  expected = text.load_text_encoder(folder)
  edit_tensors(folder, lambda t: t.update({tied: t[shared]}))
  assert text.load_text_encoder(folder).fingerprint == expected.fingerprint
  edit_tensors(folder, lambda t: t.pop(shared))
  assert text.load_text_encoder(folder).fingerprint == expected.fingerprint
  edit_tensors(folder, lambda t: t.update({shared: t[tied] + 1}))
  with pytest.raises(ValueError, match=f"{tied} differs from {shared}"):
    text.load_text_encoder(folder)


@pytest.mark.parametrize(
  "values,message",
  [
    ({"model_type": "umt5"}, "model_type is 'umt5'"),
    ({"d_model": "16"}, "d_model is '16'"),
    ({"num_layers": 0}, "num_layers is 0"),
    ({"num_layers": True}, "num_layers is True"),
    ({"num_layers": 3}, r"missing: encoder\.block\.2"),
    ({"num_layers": 1}, r"unexpected: encoder\.block\.1"),
    ({"feed_forward_proj": "gated-cosine"}, "gated-cosine"),
    ({"vocab_size": 299}, "300 token ids.*vocab_size 299"),
  ],
)
def test_config_errors(folder, values, message):
  edit_config(folder, **values)
  with pytest.raises(ValueError, match=message) as error:
    text.load_text_encoder(folder)
  assert str(folder) in str(error.value)


def test_missing_files(folder, tmp_path):
  with pytest.raises(FileNotFoundError, match="nowhere"):
    text.load_text_encoder(tmp_path / "nowhere")
  (folder / "tokenizer.json").unlink()
  with pytest.raises(FileNotFoundError, match="neither tokenizer.json nor"):
    text.load_text_encoder(folder)
  (folder / "config.json").unlink()
  with pytest.raises(FileNotFoundError, match="config.json is missing"):
    text.load_text_encoder(folder)


def test_saving_checks_parameters_first(tmp_path):
  config = dataclasses.replace(CONFIG, num_layers=3)
  with pytest.raises(ValueError, match="norm1/scale"):
    text.save_text_encoder(tmp_path / "new", config, random_params(CONFIG))
  assert not (tmp_path / "new").exists()


def test_saving_over_the_tokenizers_own_folder(folder):
  tokenizer = tokenizer_lib.Tokenizer(str(folder), 12)
  before = tokenizer.fingerprint
  text.save_text_encoder(folder, CONFIG, random_params(CONFIG), tokenizer)
  assert tokenizer.fingerprint == before


STRINGS = [
  "",
  " ",
  CORPUS[0],
  "MiXeD Case, and  two  spaces \r\n\t",
  "a literal </s> and <pad> and <unk>",
  "I 'm not cleaned up . ok ?",
  "Ünïcode e\u0301 日本語 עברית 🧑‍🚀 \U0010ffff \u0000 \ufeff",
  "x" * 100,
]


def test_tokenizer_round_trip(tokenizer_folder):
  tokenizer = tokenizer_lib.Tokenizer(str(tokenizer_folder), 128)
  tokens, mask = tokenizer(STRINGS)
  assert tokens.dtype == np.int32 and mask.dtype == np.bool_
  assert tokens.shape == mask.shape == (len(STRINGS), 128)
  assert tokenizer.decode(tokens) == STRINGS
  np.testing.assert_array_equal(mask, tokens != 0)
  for row, real in zip(tokens, mask, strict=True):
    assert row[real][-1] == 1 and (row[real][:-1] > 2).all()
    assert real[: real.sum()].all()
  assert tokens.max() < len(tokenizer) == 300


def test_tokenizer_learns_words(tokenizer_folder):
  tokens, mask = tokenizer_lib.Tokenizer(str(tokenizer_folder), 64)(CORPUS)
  assert mask.sum() < 0.5 * sum(len(caption) for caption in CORPUS)


def test_truncation_keeps_the_end(tokenizer_folder):
  long, _ = tokenizer_lib.Tokenizer(str(tokenizer_folder), 40)(["xyz" * 4])
  tokens, mask = tokenizer_lib.Tokenizer(str(tokenizer_folder), 5)(["xyz" * 4])
  assert mask.all()
  assert tokens[0].tolist() == [*long[0, :4], 1]


def test_tokenizer_is_picklable_and_small(tokenizer_folder):
  tokenizer = tokenizer_lib.Tokenizer(str(tokenizer_folder), 16)
  expected, _ = tokenizer(CORPUS)
  content = pickle.dumps(tokenizer)  # after use: the vocabulary stays behind
  assert len(content) < 500
  again = pickle.loads(content)
  assert again == tokenizer
  np.testing.assert_array_equal(again(CORPUS)[0], expected)


def test_no_captions(tokenizer_folder):
  tokens, mask = tokenizer_lib.Tokenizer(str(tokenizer_folder), 16)([])
  assert tokens.shape == mask.shape == (0, 16)


def test_autotokenizer_needs_no_sentencepiece(folder, monkeypatch):
  monkeypatch.setitem(sys.modules, "sentencepiece", None)
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  ids = tokenizer(STRINGS[2])["input_ids"]
  assert ids[-1] == tokenizer.eos_token_id == 1
  assert (tokenizer.pad_token_id, tokenizer.unk_token_id) == (0, 2)
  for string in STRINGS:
    ids = tokenizer(string)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == string


def test_training_is_deterministic(tmp_path, tokenizer_folder):
  size = tokenizer_lib.train_tokenizer(iter(CORPUS), tmp_path, 300)
  assert size == 300
  for path in tokenizer_folder.iterdir():
    assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_training_on_little_text(tmp_path):
  assert tokenizer_lib.train_tokenizer(["ab ab"], tmp_path, 5000) == 256 + 3 + 1
  with pytest.raises(ValueError, match="vocab_size 258"):
    tokenizer_lib.train_tokenizer(CORPUS, tmp_path, 258)


def test_caption_errors(tokenizer_folder):
  tokenizer = tokenizer_lib.Tokenizer(str(tokenizer_folder), 16)
  with pytest.raises(ValueError, match="not one string"):
    tokenizer("a red circle")
  with pytest.raises(ValueError, match="caption 1 is not a string: 3"):
    tokenizer(["a", 3])
  with pytest.raises(ValueError, match="caption 1 is not valid Unicode"):
    tokenizer(["a", "\ud800"])
  with pytest.raises(ValueError, match="max_length must be positive"):
    tokenizer_lib.Tokenizer(str(tokenizer_folder), 0)
  with pytest.raises(ValueError, match="not one string"):
    tokenizer_lib.train_tokenizer("abc", "unused")


def test_tokenizers_that_cannot_serve(tokenizer_folder, tmp_path):
  def copy(name, edit):
    folder = tmp_path / name
    folder.mkdir()
    for path in tokenizer_folder.iterdir():
      raw = json.loads(path.read_text())
      edit(path.name, raw)
      (folder / path.name).write_text(json.dumps(raw))
    return tokenizer_lib.Tokenizer(str(folder), 8)

  def no_end(name, raw):
    if name == "tokenizer.json":
      raw["post_processor"] = None

  def no_padding(name, raw):
    raw.pop("pad_token", None)

  with pytest.raises(ValueError, match="empty caption"):
    copy("a", no_end)(["x"])
  with pytest.raises(ValueError, match="no padding token"):
    copy("b", no_padding)(["x"])
  broken = copy("c", lambda name, raw: None)
  (tmp_path / "c" / "tokenizer.json").write_text("{")
  with pytest.raises(ValueError, match="cannot be read"):
    broken(["x"])
  # What transformers refuses in many lines.
  config = {"model_type": "t5", "layer_norm_epsilon": 7}
  broken = copy("d", lambda name, raw: None)
  (tmp_path / "d" / "config.json").write_text(json.dumps(config))
  with pytest.raises(ValueError, match="cannot be read") as error:
    broken(["x"])
  assert "\n" not in str(error.value)
