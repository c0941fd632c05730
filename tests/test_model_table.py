"""What the table counts is what the real task has and computes."""

import dataclasses
import json
import pathlib
import re

import jax
import pytest
import tiny

from psvae_jax import cost_table, model_table
from psvae_jax.config import PerceptualConfig
from psvae_jax.config import parser as config_parser
from psvae_jax.flops import count_flops
from psvae_jax.optim import make_optimizer
from psvae_jax.tasks.autoencoder import AutoencoderTask
from psvae_jax.tasks.routes import ROUTES
from psvae_jax.train import make_train_step
from psvae_jax.train_state import create

_PSVAE = pathlib.Path(__file__).resolve().parents[1] / "configs" / "psvae.py"


@pytest.fixture(name="folder", scope="module")
def _folder(tmp_path_factory):
  return tiny.save_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(name="config", scope="module")
def _config(folder):
  return config_parser.parse(tiny.adversarial_config(folder, decoder="vit"))


@pytest.fixture(name="table", scope="module")
def _table(config):
  return model_table.make_table(config)


@pytest.fixture(name="states", scope="module")
def _states(config, folder):
  """Stage → (task with loaded weights, its state's shapes, step)."""
  found = {}
  for stage in config.stages:
    task = AutoencoderTask(stage, config, folder)
    tx = make_optimizer(task.modules, task.section.train.steps)

    def init(rng, frozen, task=task, tx=tx):
      return create(*task.init(rng, frozen), tx, task.modules)

    state = jax.eval_shape(init, jax.random.key(0), task.frozen)
    step = make_train_step(task, tx, task.section.train.ema)
    found[stage] = task, state, step
  return found


def nbytes(tree):
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def test_parameters_are_those_of_the_real_modules(table, states):
  _, state, _ = states["psvae"]
  assert set(table["modules"]) == set(state.params)
  for name, params in state.params.items():
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert table["modules"][name]["parameters"] == count


@pytest.mark.parametrize("stage", sorted(ROUTES))
def test_memory_and_flops_are_those_of_the_real_step(table, states, stage):
  task, state, step = states[stage]
  got = table["stages"][stage]
  assert sorted(got["trains"]) == sorted(state.params)
  assert got["bytes"]["parameters"] == nbytes(state.params)
  assert got["bytes"]["gradients"] == nbytes(state.params)
  assert got["bytes"]["optimizer"] == nbytes(state.opt_state)
  assert got["bytes"]["ema"] == nbytes(state.ema_params)
  assert got["bytes"]["frozen"] == nbytes(task.frozen)
  total = got["bytes"].pop("total")
  assert total == sum(got["bytes"].values())
  got["bytes"]["total"] = total
  batch = tiny.batch(side=task.image_size)
  flops = count_flops(step, state, task.frozen, batch, jax.random.key(0))
  assert got["flops"]["plain"] == flops // 8
  assert got["flops"]["plain"] < got["flops"]["remat"]
  assert got["saved_bytes"]["remat"] < got["saved_bytes"]["plain"]


def test_a_step_is_made_of_its_modules(table):
  """Stage 1: E forward, the others forward and backward, D as below."""
  forward = {k: m["forward_flops"] for k, m in table["modules"].items()}
  trained = sum(
    forward[name]
    for name in ("semantic_encoder", "semantic_decoder", "pixel_decoder")
  )
  # D: real and fake, forward; three backward passes of one or two products.
  adversary = forward["discriminator"]
  least = forward["encoder"] + 2 * trained + 5 * adversary
  most = forward["encoder"] + 3 * trained + 9 * adversary
  assert least < table["stages"]["svae"]["flops"]["plain"] < most


def test_lpips_is_counted_without_its_weights(config, table):
  """Three passes a pair: both forward, and back to the reconstruction."""
  raw = dataclasses.replace(config.sections["svae"].loss, lpips=1.0)
  section = dataclasses.replace(config.sections["svae"], loss=raw)
  changed = dataclasses.replace(
    config,
    stages=("svae",),
    sections={"svae": section},
    perceptual=PerceptualConfig(network="alex"),  # no weights are named
  )
  found = model_table.make_table(changed)
  pair = found["modules"]["perceptual"]
  before, after = table["stages"]["svae"], found["stages"]["svae"]
  more = after["flops"]["plain"] - before["flops"]["plain"]
  assert more == pytest.approx(1.5 * pair["forward_flops"], rel=0.02)
  assert after["bytes"]["frozen"] - before["bytes"]["frozen"] == (
    4 * pair["parameters"]
  )
  for key in ("trains", "batch_size"):
    assert after[key] == before[key]
  saved = {
    k: after["saved_bytes"][k] - before["saved_bytes"][k]
    for k in after["saved_bytes"]
  }
  assert 0 < saved["remat"] < saved["plain"]


def test_base_modules(monkeypatch):
  """The paper's model, from shapes alone; no step is traced."""
  monkeypatch.setattr(model_table, "_stage", lambda stage, config: {})
  raw = model_table.cli.load_config(f"{_PSVAE}:base")
  modules = model_table.make_table(config_parser.parse(raw))["modules"]
  millions = {name: m["parameters"] / 1e6 for name, m in modules.items()}
  assert millions["encoder"] == pytest.approx(86.6, abs=0.05)
  assert millions["pixel_decoder"] == pytest.approx(41.7, abs=0.05)
  assert millions["discriminator"] == pytest.approx(2.77, abs=0.01)
  # VGG16's convolutions, and a number a channel of the layers that are read.
  assert modules["perceptual"]["parameters"] == 14_714_688 + 1472
  # Two images through (side, channels in, out); a 3×3 window has (3n − 2)²
  # taps on n² positions without the border's. And a product a head.
  layers = (
    [(256, 3, 64), (256, 64, 64), (128, 64, 128), (128, 128, 128)]
    + [(64, 128, 256), *[(64, 256, 256)] * 2]
    + [(32, 256, 512), *[(32, 512, 512)] * 2, *[(16, 512, 512)] * 3]
  )
  adds = sum(2 * (3 * n - 2) ** 2 * x * y for n, x, y in layers)
  heads = ((256, 64), (128, 128), (64, 256), (32, 512), (16, 512))
  adds += sum(n * n * width for n, width in heads)
  assert modules["perceptual"]["forward_flops"] == 2 * adds
  # 2 · multiply-adds: 12 blocks on 1 + 4 + 256 tokens, and the patches.
  tokens, width = 261, 768
  blocks = 12 * (2 * 12 * tokens * width**2 + 4 * tokens**2 * width)
  patches = 2 * 256 * 14 * 14 * 3 * width
  want = blocks + patches
  assert modules["encoder"]["forward_flops"] == pytest.approx(want, rel=0.003)


def test_command(folder, tmp_path, capsys, monkeypatch):
  path = tmp_path / "config.json"
  raw = config_parser.with_defaults(tiny.config(folder))
  path.write_text(json.dumps(raw))
  arguments = [
    f"--config={path}",
    "--config.stages=svae",
    "--config.svae.train.batch_size=16",
  ]
  model_table.main([*arguments, "--json"])
  table = json.loads(capsys.readouterr().out)
  assert list(table["stages"]) == ["svae"]
  assert table["latent"] == [4, 4, 4]
  assert "discriminator" not in table["modules"]
  monkeypatch.setattr(model_table, "make_table", lambda config: table)
  model_table.main(arguments)
  text = capsys.readouterr().out
  assert re.search(r"\| svae +\| +16 \|", text)
  assert "| autoencoder, their sum |" in text
  for block in text.split("\n\n")[1:]:
    assert len({len(line) for line in block.strip().splitlines()}) == 1


def test_help_and_mistakes(folder, tmp_path, capsys):
  model_table.main(["--help"])
  assert "Examples:" in capsys.readouterr().out
  config = tmp_path / "config.json"
  raw = tiny.config(folder)
  raw.model.encoder = "facebook/dinov2-bass"
  config.write_text(json.dumps(config_parser.with_defaults(raw)))
  encoder = _PSVAE.with_name("encoder.py")
  for arguments, message in [
    ([], "--config is missing"),
    (["--confg=x"], "--confg"),
    ([f"--config={tmp_path}/no.py"], "does not exist"),
    ([f"--config={encoder}"], "'encoder', which is none of svae, psvae"),
    ([f"--config={config}"], "did you mean 'facebook/dinov2-base'"),
    ([f"--config={_PSVAE}:bass"], "did you mean 'base'"),
  ]:
    with pytest.raises(SystemExit, match=message) as error:
      model_table.main(arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  "value, text",
  [(0, "0"), (12.345, "12.3"), (0.01234, "0.0123"), (1049.4, "1,049")],
)
def test_numbers(value, text):
  assert cost_table.number(value, 1) == text
