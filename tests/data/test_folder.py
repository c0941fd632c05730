"""Folder layouts, their order and captions, and what users get wrong."""

import json
import os
import pickle

import numpy as np
import pytest
from PIL import Image

from psvae_jax.data import folder, quarantine, sources


def write_image(path, value: int = 0, size: tuple[int, int] = (3, 2)) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.new("L", size, value).save(path)


def write_jsonl(path, rows) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def listing(source) -> list[tuple[str, str]]:
  source = getattr(source, "source", source)  # without its guard
  return [(source.path(i), source.caption(i)) for i in range(len(source))]


def test_plain_images_in_path_order_with_any_depth_and_extension(tmp_path):
  names = ["b.png", "a-1.JPG", "a/z.webp", "a/c/1.bmp", "a.tiff", "B.gif"]
  names += ["a/y.jpeg"]
  for value, name in enumerate(names):
    write_image(tmp_path / name, value)
  for name in ("notes.txt", ".hidden.png", "a/._z.png", ".git/x.png"):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"")
  source = folder.FolderSource(tmp_path)
  # The order of the whole paths' bytes: "-" < "." < "/".
  expected = sorted(names, key=os.fsencode)
  assert [path for path, _ in listing(source)] == expected
  assert all(caption == "" for _, caption in listing(source))
  element = source[expected.index("a/c/1.bmp")]
  assert element["image"].shape == (2, 3, 3)
  assert (element["image"] == names.index("a/c/1.bmp")).all()
  assert element["path"] == "a/c/1.bmp" and element["caption"] == ""
  assert isinstance(element["index"], np.int64)
  assert element["index"] == expected.index("a/c/1.bmp")


def test_class_folders_name_their_images(tmp_path):
  for name in ("tabby_cat/1.png", "dog/2.png", "dog/1.png"):
    write_image(tmp_path / name)
  source = folder.FolderSource(tmp_path)
  assert listing(source) == [
    ("dog/1.png", "dog"),
    ("dog/2.png", "dog"),
    ("tabby_cat/1.png", "tabby cat"),
  ]
  assert source[2]["caption"] == "tabby cat"
  silent = folder.FolderSource(tmp_path, captions="none")
  assert [caption for _, caption in listing(silent)] == ["", "", ""]


@pytest.mark.parametrize("extra", ["3.png", "dog/deeper/3.png"])
def test_other_layouts_are_no_classes_unless_asked(tmp_path, extra):
  for name in ("cat/1.png", "dog/2.png", extra):
    write_image(tmp_path / name)
  source = folder.FolderSource(tmp_path)
  assert {caption for _, caption in listing(source)} == {""}
  source = folder.FolderSource(tmp_path, captions="folder")
  assert {"cat", "dog"} <= {caption for _, caption in listing(source)}


@pytest.mark.parametrize("column", ["text", "caption"])
def test_jsonl_metadata(tmp_path, column):
  write_image(tmp_path / "1.png")
  write_image(tmp_path / "sub" / "2.png")
  rows = [
    {"file_name": "sub/2.png", column: "zwei – 二", "label": 3},
    {"file_name": "./1.png", column: "one"},
  ]
  lines = [json.dumps(row, ensure_ascii=False) for row in rows]
  path = tmp_path / "metadata.jsonl"
  path.write_bytes("\n\n".join(lines).encode("utf-8-sig"))
  source = folder.FolderSource(tmp_path)
  assert listing(source) == [("1.png", "one"), ("sub/2.png", "zwei – 二")]
  assert source[1]["caption"] == "zwei – 二"


def test_csv_metadata(tmp_path):
  write_image(tmp_path / "1.png")
  write_image(tmp_path / "2.png")
  (tmp_path / "metadata.csv").write_text(
    'file_name,text\n2.png,"two, quoted\nlines"\n1.png,\n'
  )
  source = folder.FolderSource(tmp_path)
  expected = [("1.png", ""), ("2.png", "two, quoted\nlines")]
  assert listing(source) == expected


def test_metadata_lists_the_examples(tmp_path, caplog):
  for name in ("1.png", "2.png", "unlisted.png"):
    write_image(tmp_path / name)
  rows = [
    {"file_name": "2.png", "text": "b"},
    {"file_name": "1.png", "text": "first caption"},
    {"file_name": "1.png", "text": "second caption"},
  ]
  write_jsonl(tmp_path / "metadata.jsonl", rows)
  source = folder.FolderSource(tmp_path)
  assert listing(source) == [
    ("1.png", "first caption"),
    ("1.png", "second caption"),
    ("2.png", "b"),
  ]
  assert "left out 1 images" in caplog.text


def test_each_folder_may_have_its_own_metadata(tmp_path):
  for split in ("train", "validation"):
    write_image(tmp_path / split / "1.png")
    rows = [{"file_name": "1.png", "text": split + " caption"}]
    write_jsonl(tmp_path / split / "metadata.jsonl", rows)
  assert listing(folder.FolderSource(tmp_path)) == [
    ("train/1.png", "train caption"),
    ("validation/1.png", "validation caption"),
  ]


def test_caption_column_by_name(tmp_path):
  write_image(tmp_path / "1.png")
  write_jsonl(
    tmp_path / "metadata.jsonl",
    [{"file_name": "1.png", "text": "a", "long_text": "a long one"}],
  )
  source = folder.FolderSource(tmp_path, captions="long_text")
  assert listing(source) == [("1.png", "a long one")]
  with pytest.raises(ValueError, match=r"metadata\.jsonl:1: no column 'alt'"):
    folder.FolderSource(tmp_path, captions="alt")
  (tmp_path / "metadata.jsonl").unlink()
  with pytest.raises(ValueError, match="'alt' is a metadata column, but"):
    folder.FolderSource(tmp_path, captions="alt")


BROKEN_ROWS = [
  # line, path it goes by, kind, cause
  ('{"file_name": "1.png", "text": "a"', None, "caption", "not valid JSON"),
  ("[" * 50_000, None, "caption", "not valid JSON"),
  ('["1.png", "a"]', None, "caption", "a JSON object is needed"),
  ('{"text": "a"}', None, "image", "no file name"),
  ('{"file_name": 3}', None, "image", "no file name"),
  ('{"file_name": "../1.png"}', None, "image", "outside the image folder"),
  ('{"file_name": ".."}', None, "image", "outside the image folder"),
  ('{"file_name": "/1.png"}', None, "image", "outside the image folder"),
  ('{"file_name": "2.png", "text": ["a"]}', "2.png", "caption", "not list"),
  (b'{"file_name": "2.png", "text": "\xff"}', "2.png", "caption", "UTF-8"),
  ('{"file_name": "2.png", "text": "\\ud800"}', "2.png", "caption", "UTF-8"),
  ('{"file_name": "0.png"}', "0.png", "image", "0.png' does not exist"),
  ('{"file_name": "z/0.png"}', "z/0.png", "image", "0.png' does not exist"),
  ('{"file_name": "notes.txt"}', "notes.txt", "image", "cannot be used"),
  (b'{"file_name": "\xff"}', "\udcff", "image", "does not exist"),
  ('{"file_name": "\\ud800"}', "\ud800", "image", "does not exist"),
  ('{"file_name": "a\\u0000"}', "a\0", "image", "does not exist"),
]


@pytest.mark.parametrize("line, path, kind, cause", BROKEN_ROWS)
def test_broken_jsonl_row_is_one_bad_example(tmp_path, line, path, kind, cause):
  write_image(tmp_path / "1.png")
  write_image(tmp_path / "2.png")
  (tmp_path / "notes.txt").write_text("")
  line = line if isinstance(line, bytes) else line.encode()
  good = b'{"file_name": "1.png", "text": "a"}\n'
  (tmp_path / "metadata.jsonl").write_bytes(good + b"\n" + line + b"\n")
  source = folder.FolderSource(tmp_path)
  path = path or "metadata.jsonl:3"
  paths = [source.path(i) for i in range(2)]
  assert sorted(paths) == sorted(["1.png", path])
  bad = paths.index(path)
  assert source[1 - bad]["caption"] == "a"
  assert list(source.faults) == [bad] and source.faults[bad].kind == kind
  error = ValueError if kind == "image" else quarantine.CaptionError
  with pytest.raises(error, match=rf"metadata\.jsonl:3: .*{cause}"):
    source[bad]
  part = source.select([bad, 1 - bad])
  assert list(part.faults) == [0] and part.path(0) == path


@pytest.mark.parametrize(
  "row, path, kind, cause",
  [
    ("1.png,a,b", "1.png", "caption", "more values than"),
    (",b", "metadata.csv:3", "image", "no file name"),
    ("gone.png,b", "gone.png", "image", "gone.png' does not exist"),
    ("2.png", "2.png", "caption", "'text' must be text, not null"),
    (b"2.png,\xff", "2.png", "caption", "'text' is not valid UTF-8"),
  ],
)
def test_broken_csv_row_is_one_bad_example(tmp_path, row, path, kind, cause):
  write_image(tmp_path / "1.png")
  write_image(tmp_path / "2.png")
  row = row if isinstance(row, bytes) else row.encode()
  (tmp_path / "metadata.csv").write_bytes(b"file_name,text\n1.png,a\n" + row)
  source = folder.FolderSource(tmp_path, captions="text")
  ((index, fault),) = source.faults.items()
  assert len(source) == 2 and source.path(index) == path and fault.kind == kind
  with pytest.raises(ValueError, match=rf"metadata\.csv:3: .*{cause}"):
    source[index]


def test_missing_files_keep_their_places(tmp_path):
  names = ["a.png", "b-1.png", "b/1.png", "b/2.png", "c/d/1.png", "e.png"]
  for name in names:
    write_image(tmp_path / name)
  rows = [{"file_name": name, "text": name} for name in names]
  rows.append({"file_name": "b/1.png", "text": "again"})
  write_jsonl(tmp_path / "metadata.jsonl", rows)
  whole = listing(folder.FolderSource(tmp_path))
  for name in ("b-1.png", "b/1.png", "c/d/1.png"):
    (tmp_path / name).unlink()
  (tmp_path / "c" / "d").rmdir()
  source = folder.FolderSource(tmp_path)
  assert [source.path(i) for i in range(7)] == [path for path, _ in whole]
  assert sorted(source.faults) == [1, 2, 3, 5]
  good = [0, 4, 6]
  assert [listing(source)[i] for i in good] == [whole[i] for i in good]


def test_files_that_are_gone_keep_their_places(tmp_path):
  for name in ("a.png", "b/1.png", "c.png"):
    write_image(tmp_path / name)
  gone = ["b/0.png", "a.png", "z.png", "metadata.jsonl:7", "b/0.png"]
  source = folder.FolderSource(tmp_path, gone=gone)
  paths = [path for path, _ in listing(source)]
  assert paths == ["a.png", "b/0.png", "b/1.png", "c.png", "z.png"]
  assert sorted(source.faults) == [1, 4]
  with pytest.raises(ValueError, match=r"z\.png' does not exist any more"):
    source[4]
  assert source[2]["path"] == "b/1.png"


@pytest.mark.parametrize(
  "name, content, message",
  [
    ("metadata.csv", "name,text\n1.png,a\n", "csv:1: .*no column 'file_name'"),
    ("metadata.csv", "", "csv:0: .*no column 'file_name'"),
    ("metadata.csv", "file_name\ngone.png\n", "csv:2: .*does not exist"),
    ("metadata.csv", "file_name\n" + "x" * 200_000, "csv:1: field larger"),
    ("metadata.jsonl", "file_name,text\n1.png,a\n", "jsonl:1: not valid JSON"),
    ("metadata.jsonl", "{}\n" * 2000, "jsonl:1000: .* 1000 rows before"),
  ],
)
def test_broken_metadata_file_is_an_error(tmp_path, name, content, message):
  write_image(tmp_path / "1.png")
  (tmp_path / name).write_text(content)
  with pytest.raises(ValueError, match=message):
    folder.FolderSource(tmp_path)


def test_two_metadata_files_in_one_folder(tmp_path):
  write_image(tmp_path / "1.png")
  (tmp_path / "metadata.csv").write_text("file_name\n1.png\n")
  write_jsonl(tmp_path / "metadata.jsonl", [{"file_name": "1.png"}])
  with pytest.raises(ValueError, match="both metadata.jsonl and metadata.csv"):
    folder.FolderSource(tmp_path)


def test_missing_root_and_no_images(tmp_path):
  with pytest.raises(FileNotFoundError, match="nowhere"):
    folder.FolderSource(tmp_path / "nowhere")
  (tmp_path / "movie.mp4").write_bytes(b"")
  with pytest.raises(ValueError, match=r"No images in .*\.jpg, \.jpeg, \.png"):
    folder.FolderSource(tmp_path)


def test_broken_image_is_named_when_read(tmp_path):
  write_image(tmp_path / "good.png")
  (tmp_path / "bad.png").write_bytes(b"")
  source = folder.FolderSource(tmp_path)
  with pytest.raises(ValueError, match=r"bad\.png: the file is empty"):
    source[0]
  assert source[1]["path"] == "good.png"
  with pytest.raises(ValueError, match=r"good\.png: 3 × 2 pixels"):
    folder.FolderSource(tmp_path, max_pixels=5)[1]


def test_symbolic_links_are_followed_but_not_in_circles(tmp_path):
  write_image(tmp_path / "store" / "1.png")
  root = tmp_path / "root"
  root.mkdir()
  (root / "linked").symlink_to(tmp_path / "store")
  (tmp_path / "store" / "back").symlink_to(root)
  assert listing(folder.FolderSource(root)) == [("linked/1.png", "")]


def test_link_to_itself_is_one_bad_image(tmp_path):
  write_image(tmp_path / "1.png")
  (tmp_path / "2.png").symlink_to(tmp_path / "2.png")
  (tmp_path / "3.png").symlink_to(tmp_path / "nowhere.png")
  source = folder.FolderSource(tmp_path)
  assert len(source) == 3
  for index in (1, 2):
    with pytest.raises(OSError):
      source[index]


def test_odd_file_names(tmp_path):
  name = os.fsdecode(b"\xff \xc3\xa9 'x\".png")
  write_image(tmp_path / "plain.png")
  os.rename(tmp_path / "plain.png", tmp_path / name)
  source = folder.FolderSource(tmp_path)
  assert source[0]["path"] == name


def test_source_protocol(tmp_path):
  for i in range(5):
    write_image(tmp_path / f"{i}.png", i)
  source = folder.FolderSource(tmp_path)
  assert repr(source) == repr(folder.FolderSource(tmp_path))
  assert repr(source) == (
    f"FolderSource(root={str(tmp_path)!r}, captions='auto', length=5)"
  )
  copy = pickle.loads(pickle.dumps(source))
  np.testing.assert_array_equal(copy[3]["image"], source[3]["image"])
  for index in (-1, 5):
    with pytest.raises(IndexError):
      source[index]
  part = source.select(np.array([4, 1]))
  assert [element["path"] for element in part] == ["4.png", "1.png"]
  assert [element["index"] for element in part] == [0, 1]


def test_packed_size(tmp_path):
  """Thirty bytes of text and 16 of offsets an example, no objects."""
  directory = tmp_path / "images"
  directory.mkdir()
  for i in range(300):
    (directory / f"{i:06d}.png").write_bytes(b"")
  source = folder.FolderSource(tmp_path)
  text = len("images/000000.png")
  assert len(pickle.dumps(source)) < 300 * (text + 16) + 1500


@pytest.fixture
def many_paths(tmp_path):
  root = tmp_path / "many"
  for i in range(400):
    path = root / f"class_{i % 4}" / f"{i}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
  return root


def paths_of(root, split, **options):
  config = sources.DataConfig(source="folder", root=str(root), **options)
  return [path for path, _ in listing(sources.make_source(config, split, 8))]


def test_hold_out_is_a_stable_twentieth(many_paths):
  train = paths_of(many_paths, "train")
  validation = paths_of(many_paths, "validation")
  assert sorted(train + validation) == [
    path for path, _ in listing(folder.FolderSource(many_paths))
  ]
  assert not set(train) & set(validation)
  assert 8 <= len(validation) <= 35  # 20 ± 3.4 standard deviations
  # BLAKE2b of the path decides, on every machine and in every version.
  assert [path for path in validation if path.startswith("class_0/")] == [
    "class_0/304.png",
    "class_0/316.png",
  ]
  for i in range(400, 500):
    (many_paths / "class_1" / f"{i}.png").write_bytes(b"")
  (many_paths / "class_3" / "3.png").unlink()
  assert set(train) - {"class_3/3.png"} <= set(paths_of(many_paths, "train"))
  after = set(paths_of(many_paths, "validation"))
  assert set(validation) - {"class_3/3.png"} <= after


def test_limits_take_a_sample_of_all_folders(many_paths):
  train = paths_of(many_paths, "train", num_train=40)
  assert len(train) == 40 and train == sorted(train, key=os.fsencode)
  assert set(train) <= set(paths_of(many_paths, "train"))
  assert {path.split("/")[0] for path in train} == {
    f"class_{i}" for i in range(4)
  }
  assert len(paths_of(many_paths, "validation", num_eval=3)) == 3
  assert len(paths_of(many_paths, "train", num_train=10**6)) > 300


def test_validation_folder_of_its_own(many_paths, tmp_path):
  write_image(tmp_path / "eval" / "x.png")
  options = {"eval_root": str(tmp_path / "eval")}
  assert len(paths_of(many_paths, "train", **options)) == 400
  assert paths_of(many_paths, "validation", **options) == ["x.png"]


def test_small_folders_keep_a_validation_image(tmp_path):
  write_image(tmp_path / "1.png")
  with pytest.raises(ValueError, match="too small.*data.eval_root"):
    paths_of(tmp_path, "train")
  write_image(tmp_path / "2.png")
  train, validation = (paths_of(tmp_path, s) for s in sources.SPLITS)
  assert sorted(train + validation) == ["1.png", "2.png"]
  assert len(train) == len(validation) == 1


def test_real_photographs(photos):
  source = folder.FolderSource(photos / "validation")
  assert len(source) == 100
  element = source[0]
  assert element["image"].ndim == 3 and element["image"].shape[2] == 3
  assert element["image"].std() > 10
  assert element["caption"].startswith("a photo of ")


# Classes.


def labels(source) -> list[int]:
  source = getattr(source, "source", source)
  return [source.label(i) for i in range(len(source))]


@pytest.mark.parametrize("last", ["tabby_cat", "95"])
def test_class_folders_number_their_images(tmp_path, last):
  for name in (f"{last}/1.png", "10/2.png", "9/1.png"):
    write_image(tmp_path / name)
  source = folder.FolderSource(tmp_path, captions="none")
  # By name, as Hugging Face does: "10" < "9".
  assert labels(source) == [0, 1, 2] and source.num_classes == 3
  element = source.select([2])[0]
  assert element["label"] == 2 and isinstance(element["label"], np.int64)
  (tmp_path / "plain").mkdir()
  write_image(tmp_path / "plain" / "1.png")
  plain = folder.FolderSource(tmp_path / "plain")
  assert plain.num_classes == 0 and "label" not in plain[0]


@pytest.mark.parametrize(
  "column, wanted",
  [
    (["dog", "cat", None, "dog"], [1, 0, -1, 1]),
    ([7, 2.0, None, "0"], [7, 2, -1, 0]),
    ([7, "cat", True, -3], [1, 2, -1, 0]),  # one name: all are names
    ([[1], {}, 0.5, None], None),
  ],
)
def test_label_column(tmp_path, column, wanted):
  rows = []
  for i, value in enumerate(column):
    write_image(tmp_path / f"{i}.png")
    rows.append({"file_name": f"{i}.png", "text": "x", "label": value})
  write_jsonl(tmp_path / "metadata.jsonl", rows)
  source = folder.FolderSource(tmp_path)
  if wanted is None:
    assert source.num_classes == 0 and "label" not in source[0]
    return
  assert labels(source) == wanted
  assert source.num_classes == max(wanted) + 1
  assert [source[i]["label"] for i in range(4)] == wanted
  assert [caption for _, caption in listing(source)] == ["x"] * 4


@pytest.mark.parametrize("held_out", [["cat"], ["cat", "horse"]])
def test_validation_has_the_classes_of_training(tmp_path, held_out):
  for name in ("bird", "cat", "dog"):
    write_image(tmp_path / "train" / name / "1.png")
  for name in held_out:
    write_image(tmp_path / "validation" / name / "1.png")
  config = sources.DataConfig(
    source="folder",
    root=str(tmp_path / "train"),
    eval_root=str(tmp_path / "validation"),
  )
  source = sources.make_source(config, "validation", 2)
  assert labels(source) == [1, -1][: len(held_out)]
  assert source.num_classes == 3 and source[0]["label"] == 1
