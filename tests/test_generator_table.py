"""What the generator's table counts, and the budgets that the sizes have."""

import functools
import json
import pathlib
import re

import jax
import pytest

from psvae_jax import cli, generator_table, model_table
from psvae_jax.config import parser as config_parser
from psvae_jax.config.dit_sizes import SIZES
from psvae_jax.models.dit_block import block_config

_CONFIGS = pathlib.Path(__file__).resolve().parents[1] / "configs"


@functools.cache
def job(name, **fields):
  raw = cli.load_config(f"{_CONFIGS}/{name}")
  return config_parser.parse(config_parser.override(raw, fields))


@pytest.fixture(name="table", scope="module")
def _table():
  return generator_table.make_table(job("t2i.py"), job("psvae.py"))


@pytest.fixture(name="model", scope="module")
def _model():
  return generator_table.abstract_generator(job("t2i.py"), job("psvae.py"))


def test_parts_are_the_whole_and_a_step_is_made_of_them(table, model):
  size = sum(leaf.size for leaf in jax.tree.leaves(model.params))
  parts = [table["modules"][k] for k in ("trunk", "head", "embeddings")]
  assert sum(part["parameters"] for part in parts) == size
  stage = table["stages"]["t2i"]
  assert stage["bytes"]["parameters"] == 4 * size
  forward = sum(part["forward_flops"] for part in parts)
  # Backward: a product for each operand, where its gradient is asked for.
  assert 2.8 * forward < stage["flops"]["plain"] <= 3 * forward
  assert stage["flops"]["plain"] < stage["flops"]["remat"] <= 4 * forward
  assert stage["saved_bytes"]["remat"] < stage["saved_bytes"]["plain"] / 5
  total = stage["bytes"].pop("total")
  assert total == sum(stage["bytes"].values())
  stage["bytes"]["total"] = total


def test_forward_flops_are_those_of_the_matrix_products(table):
  """By hand: 5 blocks on 16 words and 36 places, the last on those alone."""
  size = SIZES["tiny"]
  config = block_config(size["width"], size["num_heads"], size["mlp_ratio"])
  width, hidden = config.width, config.mlp_hidden
  noisy, words = 36, table["text"][0]

  def block(queries, keys):
    dense = 2 * (queries + keys) * width**2 + 3 * queries * width * hidden
    attention = 2 * queries * keys * width
    return 2 * (dense + attention + 2 * 6 * width**2)

  everything = noisy + words
  want = (size["depth"] - 1) * block(everything, everything)
  want += block(noisy, everything)
  modules = table["modules"]
  assert modules["trunk"]["forward_flops"] == want
  everything += noisy
  want = (size["depth"] - 1) * block(everything, everything)
  want += block(noisy, everything)
  assert modules["trunk"]["edit_flops"] == want
  assert modules["head"]["edit_flops"] == modules["head"]["forward_flops"]


def test_what_is_not_cached_is_computed_in_the_step(table, model):
  modules = table["modules"]

  def flops(edit=False, **fields):
    config = job("t2i.py", **fields)
    return generator_table._step_flops(config, model, edit)

  cached = flops()
  assert cached == table["stages"]["t2i"]["flops"]["plain"]
  text = modules["encoding its text"]["forward_flops"]
  image = modules["encoding an image"]["forward_flops"]
  assert flops(**{"cache.text": "false"}) == cached + text
  on_the_fly = {"cache.enabled": "false"}
  assert flops(**on_the_fly) == cached + text + image
  assert flops(True, **on_the_fly) == flops(True) + text + 2 * image


def test_an_edit_stage_is_a_mixture(monkeypatch):
  config = job("edit.py")
  flops = {False: 1000, True: 2000}
  monkeypatch.setattr(
    generator_table, "_step_flops", lambda config, model, edit: flops[edit]
  )
  stage = generator_table._stage("edit", config, job("psvae.py"))
  share = config.sections["edit"].loss.edit_share
  assert stage["flops"]["plain"] == pytest.approx(1000 + 1000 * share, abs=20)


@pytest.mark.parametrize(
  "size, millions",
  [("0.65B", 653), ("1.7B", 1708)],
)
def test_budgets(size, millions):
  """The paper's two, section 4.1 and figure 10, at its 96 channels."""
  config = job(f"t2i.py:{size}", **{"data.root": "images"})
  autoencoder = job("psvae.py:base")
  assert autoencoder.model.channels == 96
  model = generator_table.abstract_generator(config, autoencoder)
  count = sum(leaf.size for leaf in jax.tree.leaves(model.params))
  assert count / 1e6 == pytest.approx(millions, rel=0.02)


@pytest.mark.parametrize(
  "size, millions", [("B", 130), ("L", 458), ("XL", 675)]
)
def test_trunks_are_those_of_dit(size, millions):
  """DiT's table 1, whose plain MLP and ours cost the same."""
  config = job(f"t2i.py:class,size={size}")
  model = generator_table.abstract_generator(config, job("psvae.py:base"))
  trunk = sum(leaf.size for leaf in jax.tree.leaves(model.params["trunk"]))
  assert trunk / 1e6 == pytest.approx(millions, rel=0.03)


def test_command(table, capsys, monkeypatch):
  arguments = [
    f"--config={_CONFIGS}/t2i.py",
    f"--autoencoder={_CONFIGS}/psvae.py",
  ]
  calls = []

  def make_table(*configs):
    calls.append([config.stages for config in configs])
    return table

  monkeypatch.setattr(generator_table, "make_table", make_table)
  model_table.main([*arguments, "--json"])
  assert json.loads(capsys.readouterr().out) == table
  assert table["latent"] == [6, 6, 24] and list(table["stages"]) == ["t2i"]
  assert calls == [[("t2i",), ("svae", "psvae")]]
  model_table.main(arguments)
  text = capsys.readouterr().out
  assert re.search(r"\| generator, their sum +\| +\d\.\d+ \|", text)
  for block in text.split("\n\n")[1:]:
    assert len({len(line) for line in block.strip().splitlines()}) == 1


@pytest.mark.parametrize(
  "arguments, message",
  [
    ([], "needs the autoencoder"),
    ([f"--autoencoder={_CONFIGS}/t2i.py"], "is no job of an autoencoder"),
    ([f"--autoencoder={_CONFIGS}/psvae.py:bass"], "did you mean 'base'"),
    (
      [
        f"--autoencoder={_CONFIGS}/psvae.py",
        "--config.model.text_encoder=google/t5-v1_1-xs",
      ],
      "did you mean 'google/t5-v1_1-xl'|'google/t5-v1_1-xxl'",
    ),
  ],
)
def test_mistakes(arguments, message):
  with pytest.raises(SystemExit, match=message) as error:
    model_table.main([f"--config={_CONFIGS}/t2i.py", *arguments])
  assert "\n" not in str(error.value)
