"""A config is checked whole, before anything is compiled."""

import dataclasses
import pathlib
import runpy

import pytest
import tiny

from psvae_jax import config_parser
from psvae_jax.config import ConfigError

_ROOT = pathlib.Path(__file__).resolve().parents[1]


def parse(**changes):
  raw = tiny.config(pathlib.Path("encoder")).to_dict()
  for path, value in changes.items():
    *sections, name = path.split("__")
    target = raw
    for section in sections:
      target = target[section]
    target[name] = value
  return config_parser.parse(raw)


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"svae__train__step": 3}, r"svae\.train\.step: did you mean 'steps'"),
    ({"svae__train__steps": "3"}, r"svae\.train\.steps must be int"),
    ({"svae__train__steps": True}, r"svae\.train\.steps must be int"),
    ({"svae__train__steps": 0}, r"svae\.train\.steps must be at least 1"),
    ({"svae__train__ema": 1.0}, r"svae\.train\.ema"),
    ({"svae__optim__name": "adam"}, r"optim\.name='adam'.*'adamw'"),
    ({"model__pixel_decoder__kind": "cnn"}, r"pixel_decoder\.kind"),
    ({"model__pixel_decoder": 3}, r"model\.pixel_decoder must be a section"),
    ({"data__source": "scene"}, r"data\.source='scene'.*'scenes'"),
    ({"data__source": "folder"}, r"--config\.data\.root=FOLDER"),
    ({"data__root": "photos"}, "for config.data.source='folder'"),
    ({"data__augment": "mixup"}, "'mixup'"),
    ({"data__min_scale": 0.0}, "min_scale"),
    ({"data__num_eval": -1}, "at least 0"),
    ({"data__seed": -1}, "seed"),
    ({"stages": ()}, "stages is empty"),
    ({"stages": ("svea",)}, "did you mean 'svae'"),
    ({"stages": ("svae", "svae")}, "twice"),
    ({"stages": ("svae", "encoder")}, "share one model"),
    ({"sede": 1}, r"config\.sede: did you mean 'seed'"),
    ({"checkpoint__keep": 0}, r"checkpoint\.keep"),
  ],
)
def test_errors_name_the_field(changes, message):
  with pytest.raises(ConfigError, match=message):
    parse(**changes)


def test_int_widens_to_float_and_lists_to_tuples():
  parsed = parse(svae__loss__kl=1, model__pixel_decoder__channel_mult=[1, 2, 4])
  assert isinstance(parsed.sections["svae"].loss.kl, float)
  assert parsed.model.pixel_decoder.channel_mult == (1, 2, 4)


def test_a_stage_left_out_is_still_checked():
  with pytest.raises(ConfigError, match=r"psvae\.lose"):
    parse(stages=("svae",), psvae={"lose": {}})


VARIANTS = {
  "psvae.py": ("", "photos", "bundled"),
  "encoder.py": ("",),
}


@pytest.mark.parametrize(
  "name, variant",
  [(name, v) for name, variants in VARIANTS.items() for v in variants],
)
def test_shipped_configs_parse(name, variant):
  config = runpy.run_path(str(_ROOT / "configs" / name))["get_config"](variant)
  if config.data.source == "folder":
    config.data.root = "photos"
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
  config = runpy.run_path(str(_ROOT / "configs" / name))["get_config"](variant)
  if config.data.source == "folder":
    config.data.root = "photos"
  parsed = dataclasses.asdict(config_parser.parse(config))
  sections = parsed.pop("sections")
  assert config.to_dict() == {**parsed, **sections}
