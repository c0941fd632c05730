"""A config is checked whole, before anything is compiled."""

import dataclasses
import pathlib
import runpy

import hypothesis
import hypothesis.strategies as st
import pytest
import tiny

from psvae_jax.config import ConfigError
from psvae_jax.config import checks as config_checks
from psvae_jax.config import parser as config_parser
from psvae_jax.models.autoencoder import check_sizes
from psvae_jax.models.lpips import MIN_SIDE

_ROOT = pathlib.Path(__file__).resolve().parents[1]


def parse(**changes):
  raw = config_parser.with_defaults(tiny.config(pathlib.Path("encoder")))
  for path, value in changes.items():
    *sections, name = path.split("__")
    target = raw
    for section in sections:
      target = target[section]
    target[name] = value
  return config_parser.parse(raw)


VALID_GAN = {
  "svae__loss__gan": 0.5,
  "svae__train__steps": 30,
  "psvae__train__steps": 30,
}


@pytest.mark.parametrize(
  "changes, message",
  [
    # Names.
    ({"svae__train__step": 3}, r"svae\.train\.step: did you mean 'steps'"),
    ({"sede": 1}, r"config\.sede: did you mean 'seed'"),
    ({"model__pixel_decoder": 3}, r"pixel_decoder must be a section.*channels"),
    ({"svae": 3}, r"config\.svae must be a section, got 3"),
    # Types.
    ({"svae__train__steps": "3"}, r"steps must be int, got '3'.*mean 3\?"),
    ({"svae__train__steps": "many"}, r"steps must be int.*e\.g\. 1000"),
    ({"svae__train__steps": 3.0}, r"steps must be int.*did you mean 3\?"),
    ({"svae__train__steps": True}, r"svae\.train\.steps must be int"),
    ({"svae__train__steps": 2**40}, r"steps must fit into 32 bits"),
    ({"svae__loss__kl": float("nan")}, r"kl must be a finite number, got nan"),
    ({"svae__loss__l1": float("inf")}, r"l1 must be a finite number, got inf"),
    ({"data__root": 3}, r"data\.root must be str.*did you mean '3'"),
    ({"data__root": "a\0b"}, r"data\.root must be printable"),
    ({"compute__remat": 1}, r"remat must be bool.*did you mean True"),
    (
      {"model__pixel_decoder__channel_mult": 4},
      r"channel_mult must be a tuple",
    ),
    ({"discriminator__augment": "color"}, r"augment must be a tuple"),
    # Stages.
    ({"stages": ()}, "stages is empty.*svae"),
    ({"stages": "svae"}, "stages must be a tuple"),
    ({"stages": ("svea",)}, "did you mean 'svae'"),
    ({"stages": ("svae", "svae")}, "twice"),
    ({"stages": ("svae", "encoder")}, "share one model"),
    # Choices.
    ({"svae__optim__name": "adam"}, r"optim\.name='adam'.*'adamw'"),
    ({"model__pixel_decoder__kind": "cnn"}, r"pixel_decoder\.kind"),
    ({"data__source": "scene"}, r"data\.source='scene'.*'scenes'"),
    ({"data__augment": "mixup"}, "'mixup'.*crop_flip"),
    ({"discriminator__augment": ("colour",)}, r"augment=.*'color'"),
    ({"svae__loss__kl_reduction": "summ"}, "did you mean 'sum'"),
    # Ranges.
    ({"svae__train__steps": 0}, r"svae\.train\.steps=0 must be at least 1"),
    ({"svae__train__ema": 1.0}, r"svae\.train\.ema=1\.0 .*\[0, 1\), e\.g\."),
    (
      {"svae__optim__learning_rate": 0.0},
      r"rate=0\.0 must be positive, e\.g\.",
    ),
    ({"svae__optim__b2": 1.0}, r"optim\.b2=1\.0 must be in \[0, 1\)"),
    ({"svae__optim__eps": 0.0}, r"optim\.eps=0\.0 must be positive"),
    ({"svae__optim__clip": -1.0}, r"optim\.clip=-1\.0 must be at least 0"),
    ({"svae__loss__kl": -1e-3}, r"loss\.kl=-0\.001 must be at least 0"),
    ({"data__min_scale": 0.0}, r"min_scale=0\.0 must be in \(0, 1\]"),
    ({"data__num_eval": -1}, "num_eval=-1 must be at least 0"),
    ({"data__num_threads": -1}, "num_threads=-1 must be at least 0"),
    ({"data__max_bad_share": 1.0}, r"max_bad_share=1\.0"),
    ({"data__seed": -1}, r"data\.seed=-1"),
    ({"seed": -1}, r"config\.seed=-1"),
    ({"checkpoint__keep": 0}, r"checkpoint\.keep=0"),
    ({"model__channels": 0}, r"model\.channels=0 must be at least 1"),
    (
      {"model__pixel_decoder__channel_mult": (1, 0)},
      r"channel_mult=\(1, 0\) must be at least 1",
    ),
    # Combinations.
    ({"data__source": "folder"}, r"--config\.data\.root=FOLDER"),
    ({"data__root": "photos"}, "for config.data.source='folder'"),
    ({"data__eval_root": "photos"}, "for config.data.source='folder'"),
    (
      {"data__source": "folder", "data__root": "a", "data__eval_root": "a/."},
      "eval_root='a/.' is the training folder",
    ),
    ({"data__source": "tfds"}, "--config.data.builder=imagenet2012"),
    (
      {
        "data__source": "tfds",
        "data__builder": "x",
        "data__eval_split": "train",
      },
      "eval_split='train'",
    ),
    ({"mesh__fsdp": 0}, "'fsdp': 0.*e.g. data=-1"),
    ({"mesh__fsdp": -1}, "at most one is -1"),
    ({"svae__train__accumulate": 3}, r"accumulate=3 micro.*batch_size 9 would"),
    ({"model__pixel_decoder__num_heads": 3}, "num_heads=3.*width=16; 2 would"),
    (
      {"model__pixel_decoder__width": 18, "model__pixel_decoder__num_heads": 1},
      r"width=18 must be a multiple of 4.*e\.g\. 20",
    ),
    (
      {
        "model__pixel_decoder__kind": "conv",
        "model__pixel_decoder__channel_mult": (),
      },
      r"channel_mult=\(\) is empty",
    ),
    (
      {"model__pixel_decoder__kind": "conv"},
      r"upsamples 16×.*output_size=40; 48",
    ),
    ({"model__output_size": 12}, r"output_size=12 .*scenes; 16 is the least"),
    (
      {"model__output_size": 42, "svae__loss__perceptual": 0.5},
      r"perceptual=0\.5 .*now 42.*e\.g\. 44",
    ),
    (
      {"perceptual__network": "vgg19"},
      r"perceptual\.network='vgg19' is unknown; did you mean 'vgg'",
    ),
    (
      {
        "model__output_size": 24,
        "svae__loss__lpips": 1.0,
        "perceptual__network": "alex",
      },
      r"lpips=1\.0 needs images of at least 31 pixels.*output_size is 24",
    ),
    # The adversary.
    (
      {**VALID_GAN, "svae__loss__gan_start": 25, "svae__loss__gan_warmup": 5},
      r"svae\.loss\.gan=0\.5 never acts.*steps=30; set gan_start=15",
    ),
    ({**VALID_GAN, "svae__loss__pixel": 0.0}, r"pixel is 0; set pixel=1\.0"),
    (
      {
        **VALID_GAN,
        "discriminator__norm": "batch",
        "svae__train__accumulate": 2,
      },
      r"norm='batch'.*accumulate=2; set norm='group'",
    ),
    ({**VALID_GAN, "discriminator__kind": "dino"}, "facebook/dino-vits8"),
    (
      {
        **VALID_GAN,
        "discriminator__kind": "dino",
        "discriminator__norm": "batch",
        "discriminator__weights": "random:facebook/dino-vits8",
        "svae__train__batch_size": 9,
      },
      r"svae\.train\.batch_size=9 does not divide into equal groups.*; 8 would",
    ),
    ({**VALID_GAN, "discriminator__num_layers": 4}, "num_layers=4.*3 is the"),
  ],
)
def test_errors_name_the_field(changes, message):
  with pytest.raises(ConfigError, match=message) as caught:
    parse(**changes)
  assert "\n" not in str(caught.value)


def test_the_adversary_may_be_set_up_and_not_used():
  """Its settings count only where its weight is not 0."""
  parse(discriminator__kind="dino", psvae__loss__gan_start=10**6)
  parse(**VALID_GAN, svae__loss__gan_start=29, discriminator__num_layers=3)


@pytest.mark.parametrize(
  "devices, changes, message",
  [
    (8, {}, None),
    (8, {"mesh__fsdp": 4}, None),
    (8, {"mesh__fsdp": 3}, "'fsdp': 3.*devices, 8; data=-1, fsdp=1, tensor=1"),
    (8, {"mesh__data": 4}, "'data': 4"),
    (6, {"mesh__data": 1, "mesh__fsdp": 4}, "fsdp=2, tensor=1 would"),
  ],
)
def test_the_mesh_must_fit_the_devices(devices, changes, message):
  config = parse(**changes)
  if message is None:
    config_checks.check_devices(config, devices)
    return
  with pytest.raises(ConfigError, match=message):
    config_checks.check_devices(config, devices)


def test_a_batch_must_divide_over_devices_and_micro_batches():
  config = parse(svae__train__batch_size=12, svae__train__accumulate=2)
  config_checks.check_shards(config, 2)
  message = (
    r"svae\.train\.batch_size=12 .*2 micro-batches.*8 shards.*; 16 would"
  )
  with pytest.raises(ConfigError, match=message):
    config_checks.check_shards(config, 8)
  with pytest.raises(ConfigError, match=r"config\.eval\.batch_size=12"):
    config_checks.check_shards(parse(eval__batch_size=12), 8)


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"model__image_size": 36}, "image_size=36 .*patch size 8; 40 would be"),
    ({"model__output_size": 42}, "output_size=42 .*4×4 token grid; 44 would"),
    ({"model__pixel_decoder__overlap": 6}, "overlap=6 .*10 pixels; 5 is"),
    ({"model__semantic_encoder__depth": 3}, r"semantic_encoder\.depth=3.*2;"),
    (
      {
        "model__pixel_decoder__kind": "conv",
        "model__pixel_decoder__channel_mult": (1, 1, 1),
      },
      r"upsamples 4×.*16 pixels.*output_size=40; output_size=16 would do",
    ),
  ],
)
def test_the_model_must_fit_the_encoder(changes, message):
  with pytest.raises(ConfigError, match=message):
    check_sizes(parse(**changes).model, tiny.VIT)
  check_sizes(parse().model, tiny.VIT)


def _leaves(section, path=()):
  for name, value in section.items():
    if isinstance(value, dict):
      yield from _leaves(value, (*path, name))
    else:
      yield (*path, name), value


_LEAVES = tuple(
  _leaves(
    config_parser.with_defaults(tiny.config(pathlib.Path("encoder")).to_dict())
  )
)
_ANYTHING = st.one_of(
  st.none(),
  st.booleans(),
  st.integers(),
  st.integers(-2, 100),
  st.floats(),
  st.text(max_size=8),
  st.sampled_from(("tfds", "dino", "conv", "batch", "encoder", "10", "muon")),
  st.lists(st.integers(-1, 9) | st.text(max_size=3), max_size=3),
  st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
  st.just(object()),
)


@hypothesis.settings(max_examples=400, deadline=None, derandomize=True)
@hypothesis.given(leaf=st.sampled_from(_LEAVES), value=_ANYTHING)
def test_one_corrupt_field_is_named_or_accepted(leaf, value):
  path, _ = leaf
  raw = config_parser.with_defaults(tiny.config(pathlib.Path("encoder")))
  *sections, name = path
  target = raw
  for section in sections:
    target = target[section]
  target[name] = value
  try:
    config_parser.parse(raw)
  except ConfigError as error:
    assert name in str(error)
    assert "\n" not in str(error)


@hypothesis.settings(max_examples=200, deadline=None, derandomize=True)
@hypothesis.given(
  path=st.sampled_from(_LEAVES).map(lambda leaf: ".".join(leaf[0]))
  | st.text(max_size=20),
  text=st.text(max_size=12)
  | st.sampled_from(("1", "0.5", "(1, 2)", "(", "true", "1e999", "9" * 5000)),
)
def test_any_flag_sets_a_field_or_is_an_error(path, text):
  try:
    raw = tiny.config(pathlib.Path("encoder"))
    config_parser.parse(config_parser.override(raw, {path: text}))
  except ConfigError as error:
    assert "\n" not in str(error)


@pytest.mark.parametrize(
  "flag, text, value",
  [
    ("svae.train.steps", "7", 7),
    ("svae.loss.kl", "1", 1.0),
    ("svae.loss.kl", "1e-3", 1e-3),
    ("compute.remat", "true", True),
    ("compute.remat", "False", False),
    ("stages", "('svae',)", ("svae",)),
    ("stages", "svae", ("svae",)),
    ("model.pixel_decoder.channel_mult", "1,2", (1, 2)),
    ("model.pixel_decoder.channel_mult", "(1, 2)", (1, 2)),
    ("discriminator.augment", "", ()),
    ("data.root", "3", "3"),
  ],
)
def test_flags_are_read_as_the_fields_type(flag, text, value):
  raw = config_parser.override(tiny.config(pathlib.Path("e")), {flag: text})
  for name in flag.split("."):
    raw = raw[name]
  assert raw == value
  assert type(raw) is type(value)


@pytest.mark.parametrize(
  "flag, message",
  [
    ("psvae.train.stepz", r"config\.psvae\.train\.stepz: did you mean 'steps'"),
    ("psvea.train.steps", "did you mean 'psvae'"),
    ("train.steps", r"config\.svae\.train\.steps or config\.psvae\.train"),
    ("svae.train", r"is a section.*--config\.svae\.train\.steps="),
    ("svae.train.steps.x", r"config\.svae\.train\.steps is a value"),
    ("", "unknown config field"),
  ],
)
def test_a_flag_that_names_no_field(flag, message):
  with pytest.raises(ConfigError, match=message):
    config_parser.override(tiny.config(pathlib.Path("e")), {flag: "3"})


def test_a_flag_may_add_a_stage():
  raw = tiny.config(pathlib.Path("e")).to_dict()
  del raw["psvae"]
  raw["stages"] = ("svae",)
  flags = {"psvae.train.steps": "9", "stages": "svae,psvae"}
  parsed = config_parser.parse(config_parser.override(raw, flags))
  assert parsed.sections["psvae"].train.steps == 9


def test_int_widens_to_float_and_lists_to_tuples():
  parsed = parse(svae__loss__kl=1, model__pixel_decoder__channel_mult=[1, 2, 4])
  assert isinstance(parsed.sections["svae"].loss.kl, float)
  assert parsed.model.pixel_decoder.channel_mult == (1, 2, 4)


def test_a_stage_left_out_is_still_checked():
  with pytest.raises(ConfigError, match=r"psvae\.lose"):
    parse(stages=("svae",), psvae={"lose": {}})


VARIANTS = {
  "psvae.py": ("", "gan", "photos", "bundled", "base", "large"),
  "encoder.py": ("", "text"),
  "t2i.py": ("", "photos", "0.65B", "1.7B", "class"),
  "edit.py": ("", "0.65B", "1.7B"),
}


def shipped(name, variant):
  """A config file's config, with the folders that its user would name."""
  config = runpy.run_path(str(_ROOT / "configs" / name))["get_config"](variant)
  if config.data.source == "folder":
    config.data.root = "photos"
    if "edit" in config.stages:
      config.data.edits = "edits"
  return config


@pytest.mark.parametrize(
  "name, variant",
  [(name, v) for name, variants in VARIANTS.items() for v in variants],
)
def test_shipped_configs_parse(name, variant):
  config = shipped(name, variant)
  parsed = config_parser.parse(config)
  assert parsed.stages
  assert set(parsed.sections) == set(parsed.stages)


def test_every_config_file_is_covered():
  found = {path.name for path in (_ROOT / "configs").glob("*.py")}
  assert found == set(VARIANTS)


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_unknown_variant_is_named(name):
  get_config = runpy.run_path(str(_ROOT / "configs" / name))["get_config"]
  with pytest.raises(ValueError, match="'nonsense'"):
    get_config("nonsense")


@pytest.mark.parametrize(
  "name, variant",
  [(name, v) for name, variants in VARIANTS.items() for v in variants],
)
def test_every_field_can_be_overridden(name, variant):
  """A flag can only change a field that the config file already has."""
  config = shipped(name, variant)
  parsed = dataclasses.asdict(config_parser.parse(config))
  sections = parsed.pop("sections")
  assert config.to_dict() == {**parsed, **sections}


def test_least_sizes_are_those_of_the_networks():
  # The checks import no model.
  assert config_checks._LEAST_LPIPS == MIN_SIDE
