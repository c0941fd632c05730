"""A small CLIP of transformers, every parameter random, and a tokenizer."""

import pytest
import torchvision_ops  # noqa: F401  before transformers imports torchvision

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

LENGTH = 12  # tokens a caption
END = 513


def tokenizer(length=LENGTH):
  """CLIP's tokenizer with bytes alone for a vocabulary."""
  from tokenizers import pre_tokenizers

  letters = sorted(pre_tokenizers.ByteLevel.alphabet())
  words = [*letters, *(f"{letter}</w>" for letter in letters)]
  words += ["<|startoftext|>", "<|endoftext|>"]
  assert words.index("<|endoftext|>") == END
  vocabulary = {word: index for index, word in enumerate(words)}
  return transformers.CLIPTokenizer(
    vocab=vocabulary, merges=[], model_max_length=length
  )


def text_config(**changes):
  return (
    dict(
      vocab_size=END + 1,
      hidden_size=16,
      intermediate_size=24,
      num_hidden_layers=2,
      num_attention_heads=2,
      max_position_embeddings=LENGTH,
      eos_token_id=END,
      bos_token_id=END - 1,
      pad_token_id=END,
      projection_dim=10,
    )
    | changes
  )


def vision_config(**changes):
  return (
    dict(
      hidden_size=24,
      intermediate_size=36,
      num_hidden_layers=2,
      num_attention_heads=2,
      image_size=24,
      patch_size=8,
    )
    | changes
  )


def randomise(model):
  """Noise on every parameter; scales of norms about 1."""
  generator = torch.manual_seed(0)
  for name, parameter in model.named_parameters():
    noise = torch.randn(parameter.shape, generator=generator)
    scale = "norm" in name and name.endswith("weight")
    parameter.data = 1 + 0.3 * noise if scale else 0.3 * noise
  return model.eval()


def clip(text=None, vision=None):
  config = transformers.CLIPConfig(
    text_config=text_config(**(text or {})),
    vision_config=vision_config(**(vision or {})),
    projection_dim=10,
  )
  return randomise(transformers.CLIPModel(config))


def processor(size=24):
  """Both halves' preprocessing, images by Pillow."""
  images = transformers.CLIPImageProcessorPil(
    size={"shortest_edge": size}, crop_size={"height": size, "width": size}
  )
  return transformers.CLIPProcessor(images, tokenizer())
