"""CLIP's text encoder: parity with transformers, tokens, strict loading."""

import json

import clip_reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from psvae_jax.models import clip_text as models_clip_text
from psvae_jax.pretrained import clip_text

torch, transformers = clip_reference.torch, clip_reference.transformers

CAPTIONS = ["a cat", "", "12 Dogs", "longer than the model takes", "<x>"]


def save(folder, model):
  model.save_pretrained(folder)
  clip_reference.tokenizer().save_pretrained(folder)
  return folder


def text_model(kind, **changes):
  config = transformers.CLIPTextConfig(**clip_reference.text_config(**changes))
  return clip_reference.randomise(getattr(transformers, kind)(config))


def tokens_of(captions):
  return clip_reference.tokenizer()(
    captions,
    padding="max_length",
    truncation=True,
    max_length=clip_reference.LENGTH,
    return_tensors="pt",
  )


@pytest.mark.parametrize(
  "end, activation", [(clip_reference.END, "quick_gelu"), (2, "gelu")]
)
def test_same_embeddings_as_transformers(tmp_path, end, activation):
  model = text_model(
    "CLIPTextModelWithProjection", eos_token_id=end, hidden_act=activation
  )
  encoder = clip_text.load_clip_text(save(tmp_path, model))
  batch = tokens_of(CAPTIONS)
  with torch.no_grad():
    expected = model(**batch)
  tokens, mask = encoder.tokenize(CAPTIONS)
  np.testing.assert_array_equal(tokens, batch["input_ids"])
  np.testing.assert_array_equal(mask, batch["attention_mask"] == 1)
  embeds = encoder.embed(CAPTIONS)
  assert embeds.dtype == jnp.float32 and embeds.shape == (5, 10)
  np.testing.assert_allclose(embeds, expected.text_embeds, atol=1e-4, rtol=0)
  features, mask = encoder(CAPTIONS)
  hidden = expected.last_hidden_state.numpy()
  np.testing.assert_allclose(features[mask], hidden[mask], atol=1e-4, rtol=0)
  assert (encoder.max_length, encoder.width) == (clip_reference.LENGTH, 16)


def test_both_rules_find_the_end():
  """They differ where a token after the vocabulary's end was added."""
  tokens = jnp.array([[8, 3, 9, 9, 9], [8, 11, 3, 9, 9], [9, 1, 9, 2, 2]])

  def ends(eos_token_id):
    return models_clip_text.end_positions(tokens, eos_token_id).tolist()

  assert ends(9) == [2, 3, 0]
  assert ends(models_clip_text.LEGACY_END) == [2, 1, 0]


def test_text_model_without_projection_and_whole_clip(tmp_path):
  bare = text_model("CLIPTextModel")
  encoder = clip_text.load_clip_text(save(tmp_path / "bare", bare))
  batch = tokens_of(CAPTIONS)
  with torch.no_grad():
    expected = bare(**batch).pooler_output
  assert encoder.module.config.projection_dim is None
  embeds = encoder.embed(CAPTIONS)
  np.testing.assert_allclose(embeds, expected, atol=1e-4, rtol=0)

  whole = clip_reference.clip()
  encoder = clip_text.load_clip_text(save(tmp_path / "whole", whole))
  with torch.no_grad():
    expected = whole.get_text_features(**batch).pooler_output
  embeds = encoder.embed(CAPTIONS)
  np.testing.assert_allclose(embeds, expected, atol=1e-4, rtol=0)


def test_names_without_their_prefix(tmp_path):
  """As some versions of transformers write a bare text model."""
  folder = save(tmp_path, text_model("CLIPTextModel"))
  want = clip_text.load_clip_text(folder)

  def edit(tensors):
    for key in list(tensors):
      tensors[key.removeprefix("text_model.")] = tensors.pop(key)
    positions = np.arange(clip_reference.LENGTH)[None]
    tensors["embeddings.position_ids"] = positions

  edit_tensors(folder, edit)
  assert clip_text.load_clip_text(folder).fingerprint == want.fingerprint


@pytest.fixture(scope="module", name="network")
def _network(tmp_path_factory):
  folder = tmp_path_factory.mktemp("clip")
  model = text_model("CLIPTextModelWithProjection")
  encoder = clip_text.load_clip_text(save(folder, model))

  @jax.jit
  def run(tokens, mask=None):
    return encoder.module.apply({"params": encoder.params}, tokens, mask)

  return run


def test_is_causal(network):
  tokens = np.random.default_rng(0).integers(0, 500, (2, 9), np.int32)
  before, _ = network(tokens)
  other = tokens.copy()  # the first call may still be reading its tokens
  other[:, 5] += 1
  after, _ = network(other)
  np.testing.assert_array_equal(before[:, :5], after[:, :5])
  assert (np.abs(after - before).max(axis=2)[:, 5:] > 1e-4).all()


def test_a_mask_hides_what_it_says(network):
  tokens = np.random.default_rng(0).integers(0, 500, (2, 9), np.int32)
  mask = np.ones((2, 9), bool)
  mask[0, 2] = False
  before, _ = network(tokens, mask)
  other = tokens.copy()  # the first call may still be reading its tokens
  other[0, 2] += 1
  after, _ = network(other, mask)
  rest = mask[0]
  np.testing.assert_array_equal(before[0, rest], after[0, rest])
  np.testing.assert_array_equal(before[1], after[1])


def test_bad_tokens(network):
  for shape in ((9,), (2, 13), (2, 0)):
    with pytest.raises(ValueError, match="a length of 1 to 12"):
      network(np.zeros(shape, np.int32))
  with pytest.raises(ValueError, match=r"as the tokens, \(2, 9\)"):
    network(np.zeros((2, 9), np.int32), np.ones((2, 8), bool))


@pytest.fixture
def folder(tmp_path):
  return save(tmp_path, text_model("CLIPTextModelWithProjection"))


def edit_config(folder, **values):
  path = folder / "config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | values))


def edit_tensors(folder, edit):
  path = folder / "model.safetensors"
  tensors = safetensors.numpy.load_file(path)
  edit(tensors)
  safetensors.numpy.save_file(tensors, path)


def test_long_captions_are_cut_with_a_warning(folder, caplog):
  encoder = clip_text.load_clip_text(folder)
  letters = clip_reference.LENGTH - 2
  for caption, warned in (("x" * letters, False), ("x" * letters + "y", True)):
    caplog.clear()
    tokens, mask = encoder.tokenize(["short", caption])
    assert ("1 of 2 captions are longer than 12 tokens" in caplog.text) == (
      warned
    )
    assert tokens.shape == mask.shape == (2, clip_reference.LENGTH)
    assert tokens[1, -1] == clip_reference.END and mask[1].all()


def test_tokenizer_of_another_folder_and_of_another_kind(folder, tmp_path):
  want = clip_text.load_clip_text(folder)
  other = tmp_path / "tokenizer"
  clip_reference.tokenizer().save_pretrained(other)
  (folder / "tokenizer.json").unlink()
  with pytest.raises(FileNotFoundError, match="neither tokenizer.json nor"):
    clip_text.load_clip_text(folder)
  got = clip_text.load_clip_text(folder, tokenizer=other)
  assert got.fingerprint == want.fingerprint

  # Older folders: the vocabulary and its merges in files of their own.
  raw = json.loads((other / "tokenizer.json").read_text())
  (other / "tokenizer.json").unlink()
  (other / "vocab.json").write_text(json.dumps(raw["model"]["vocab"]))
  (other / "merges.txt").write_text("#version: 0.2\n")
  got = clip_text.load_clip_text(folder, tokenizer=other)
  for ours, theirs in zip(
    got.tokenize(CAPTIONS), want.tokenize(CAPTIONS), strict=True
  ):
    np.testing.assert_array_equal(ours, theirs)


def test_strict_tensors(folder):
  layer = "text_model.encoder.layers.1"

  def edit(tensors):
    del tensors[f"{layer}.self_attn.k_proj.bias"]
    tensors[f"{layer}.layer_norm3.bias"] = np.zeros(16, np.float32)
    tensors["text_projection.weight"] = np.zeros((11, 16), np.float32)

  edit_tensors(folder, edit)
  with pytest.raises(ValueError) as error:
    clip_text.load_clip_text(folder)
  message = str(error.value)
  assert f"missing: {layer}.self_attn.k_proj.bias" in message
  assert f"unexpected: {layer}.layer_norm3.bias" in message
  assert "text_projection.weight (file (11, 16), model (10, 16))" in message


@pytest.mark.parametrize(
  "values, message",
  [
    ({"model_type": "t5"}, "model_type is 't5'"),
    ({"hidden_size": 16.5}, "hidden_size is 16.5"),
    ({"hidden_size": 2**40}, "hidden_size 1099511627776 is not in"),
    ({"num_attention_heads": 3}, "not a multiple of num_attention_heads 3"),
    ({"hidden_act": "swash"}, "unknown hidden_act 'swash'"),
    ({"num_hidden_layers": 3}, r"missing: text_model\.encoder\.layers\.2"),
    ({"eos_token_id": [1, 2]}, r"eos_token_id is \[1, 2\]"),
    ({"eos_token_id": 77}, "does not end a caption.*eos_token_id 77"),
    ({"model_type": "clip", "text_config": 3}, "text_config must be"),
  ],
)
def test_config_errors(folder, values, message):
  edit_config(folder, **values)
  with pytest.raises(ValueError, match=message) as error:
    clip_text.load_clip_text(folder)
  assert str(folder) in str(error.value)


def test_vocabularies_must_fit(folder):
  edit_config(folder, vocab_size=500)

  def edit(tensors):
    name = "text_model.embeddings.token_embedding.weight"
    tensors[name] = tensors[name][:500].copy()

  edit_tensors(folder, edit)
  with pytest.raises(ValueError, match="514 token ids.*vocab_size is 500"):
    clip_text.load_clip_text(folder)


@pytest.mark.parametrize(
  "name, count",  # as transformers counts them, less what is no parameter
  [
    ("openai/clip-vit-base-patch32", 63_428_096),
    ("openai/clip-vit-large-patch14", 123_650_304),
  ],
)
def test_published_sizes(name, count):
  module = models_clip_text.ClipText(clip_text.PUBLISHED[name])
  leaves = jax.tree.leaves(clip_text.param_shapes(module))
  assert sum(leaf.size for leaf in leaves) == count


def test_an_untrained_encoder_wants_a_tokenizer_for_captions(monkeypatch):
  config = models_clip_text.ClipTextConfig(
    **{
      key: value
      for key, value in clip_reference.text_config().items()
      if key not in ("bos_token_id", "pad_token_id")
    }
  )
  monkeypatch.setattr(clip_text, "PUBLISHED", {"openai/clip-test": config})
  encoder = clip_text.load_clip_text("random:openai/clip-test")
  again = clip_text.load_clip_text("random:openai/clip-test")
  assert encoder.fingerprint == again.fingerprint
  with pytest.raises(ValueError, match="has no tokenizer.*tokenizer=FOLDER"):
    encoder.embed(["a"])
  with pytest.raises(ValueError, match="mean 'openai/clip-test'"):
    clip_text.load_clip_text("random:openai/clip-tset")
