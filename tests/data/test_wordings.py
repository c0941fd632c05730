"""Statements in other words, and statements that are nearly right."""

import numpy as np
import pytest

from psvae_jax.data import captions, scene_edits, wordings
from psvae_jax.data.scene_checker import check_caption
from psvae_jax.data.scenes import SceneSource

COUNT = 300


@pytest.fixture
def random():
  return np.random.default_rng(0)


def test_statements_are_captions_and_instructions():
  texts = [wordings.statement("train", i) for i in range(COUNT)]
  assert texts == [wordings.statement("train", i) for i in range(COUNT)]
  specs = [captions.parse_spec(text) for text in texts]
  share = np.mean([spec is None for spec in specs])
  assert 0.25 < share < 0.45
  openings = {t.split()[0] for t, s in zip(texts, specs, strict=True) if not s}
  assert openings == {"turn", "make", "remove", "add", "move"}
  assert any(s and s.objects[0].size is None for s in specs)


def test_rewording_a_caption_keeps_its_meaning(random):
  texts = [wordings.statement("train", i) for i in range(COUNT)]
  seen = set()
  for text in texts:
    if captions.parse_spec(text) is None:
      continue
    said = wordings.reword(text, random)
    canonical = captions.phrase(captions.parse_spec(said))
    assert wordings.meaning(canonical) == wordings.meaning(text)
    seen.add(said == text)
  assert seen == {True, False}


def test_rewording_an_instruction_keeps_its_words(random):
  for index in range(60):
    text = scene_edits.sample_edit("train", index).instruction
    said = {wordings.reword(text, random) for _ in range(20)}
    assert text in said and len(said) == 2, text
    (other,) = said - {text}
    words = set(wordings._WORD.findall(text))
    assert set(wordings._WORD.findall(other)) == words
  move = "move the red circle left of the blue ring"
  said = {wordings.reword(move, random) for _ in range(20)}
  assert said == {move, "left of the blue ring move the red circle"}


def test_foils_are_wrong_of_the_scene(random):
  source = SceneSource("train", 100)
  for i in range(100):
    text = captions.caption(source.scene(i))
    foil = wordings.foil(text, random)
    assert wordings.meaning(foil) != wordings.meaning(text)
    assert not check_caption(source[i]["image"], foil)["all"], (text, foil)
    assert " a orange" not in f" {foil}" and " an red" not in f" {foil}"


def test_foils_of_an_instruction_can_be_reworded(random):
  for i in range(COUNT):
    text = scene_edits.sample_edit("train", i).instruction
    foil = wordings.foil(text, random)
    assert foil != text
    wordings.reword(foil, random)


def test_some_foils_only_change_places(random):
  text = "a small red circle left of a large blue ring"
  foils = {wordings.foil(text, random) for _ in range(200)}
  assert "a small blue circle left of a large red ring" in foils
  assert "a small red circle right of a large blue ring" in foils
  assert text not in foils
  assert all(wordings.meaning(foil) != wordings.meaning(text) for foil in foils)


def test_many_foils_only_turn_the_relation(random):
  """Else too few ask who stands where."""
  for text, turned in (
    ("a red star above a blue ring", "a red star below a blue ring"),
    (
      "move the red star left of the ring",
      "move the red star right of the ring",
    ),
  ):
    foils = [wordings.foil(text, random) for _ in range(200)]
    assert 0.3 < np.mean([foil == turned for foil in foils]) < 0.6


@pytest.mark.parametrize(
  "text, first, second",
  [
    ("a red star left of a blue ring", "left of", "right of"),
    ("a blue ring over a red star", "above", "below"),
    ("move the red star to the right of the blue ring", "right of", "left of"),
    ("below the blue ring move the red star", "above", "below"),
    ("make the red star blue", "alone", "alone"),
  ],
)
def test_roles(text, first, second):
  """Of the first two words of the text, and of all others."""
  words = [
    (text[start:end], wordings.ROLES[role])
    for start, end, role in wordings.roles(text)
  ]
  assert {role for _, role in words[:2]} == {first}
  assert {role for _, role in words[2:]} == {second}
  assert {"red", "star", "blue"} <= {word for word, _ in words}


def test_wordings_agree_on_roles(random):
  for i in range(COUNT):
    text = wordings.statement("train", i)
    words = [
      sorted((said[a:b], role) for a, b, role in wordings.roles(said))
      for said in (text, wordings.reword(text, random))
    ]
    assert words[0] == words[1], text


def test_a_single_object_may_be_there(random):
  said = {wordings.reword("a red circle", random) for _ in range(60)}
  assert "there is a red circle" in said
  turned = "a blue ring left of a red circle"
  said = {wordings.reword(turned, random) for _ in range(60)}
  assert not any(text.startswith("there") for text in said)


def test_other_text_cannot_be_reworded(random):
  with pytest.raises(ValueError, match="neither a canonical caption nor"):
    wordings.reword("a photograph of a horse", random)
  with pytest.raises(ValueError, match="can be said wrong"):
    wordings.foil("a photograph of a horse", random)
