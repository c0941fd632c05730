"""configs/edit.py beside configs/t2i.py, and the checks of both's data."""

import pathlib
import runpy

import pytest

from psvae_jax.config import ConfigError
from psvae_jax.config import parser as config_parser
from psvae_jax.config.generator_checks import edit_rows

_CONFIGS = pathlib.Path(__file__).resolve().parents[1] / "configs"


def load(job, argument=""):
  return runpy.run_path(str(_CONFIGS / f"{job}.py"))["get_config"](argument)


def parse(job, argument="", data=None, model=None):
  raw = load(job, argument)
  raw.data.update(data or {})
  raw.model.update(model or {})
  return config_parser.parse(raw)


@pytest.mark.parametrize("variant", ["", "0.65B", "1.7B"])
def test_an_edit_stage_continues_the_t2i_of_its_name(variant):
  t2i, edit = load("t2i", variant), load("edit", variant)
  assert edit.model == t2i.model and edit.compute == t2i.compute
  assert edit.cache == t2i.cache  # else the workdir's would be refused
  for name in ("steps", "shift", "guidance", "solver"):
    assert edit.sample[name] == t2i.sample[name]


@pytest.mark.parametrize("variant", ["0.65B", "1.7B"])
def test_the_papers_edit_stage(variant):
  data = dict(root="images", edits="edits")
  config = parse("edit", variant, data)
  section = config.sections["edit"]
  assert section.train.steps == 50_000
  assert edit_rows(section) == 576 and section.train.batch_size == 768


@pytest.mark.parametrize(
  "data, message",
  [
    (dict(source="bundled"), "'bundled' has no edits: .*--config.data.edits="),
    (dict(edits="a"), "edits='a' is not for .*'scenes', which have edits of"),
    (dict(eval_edits="a"), "eval_edits='a' needs edits to train on"),
    (
      dict(source="bundled", edits="a", eval_edits="b/../a"),
      "eval_edits='b/../a' is the training folder",
    ),
  ],
)
def test_folders_of_edits_that_cannot_be(data, message):
  with pytest.raises(ConfigError, match=message):
    parse("edit", data=data)


def test_classes_come_from_data_that_may_have_them():
  classes = dict(condition="class", num_classes=3)
  parse("t2i", data=dict(source="folder", root="a"), model=classes)
  parse("t2i", data=dict(source="tfds", builder="a"), model=classes)
  for source in ("scenes", "bundled"):
    with pytest.raises(ConfigError, match="'tfds' or 'folder', not"):
      parse("t2i", data=dict(source=source), model=classes)
