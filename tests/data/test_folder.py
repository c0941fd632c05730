"""Folder layouts, their order and captions, and what users get wrong."""

import json
import os
import pickle

import numpy as np
import pytest
from PIL import Image

from psvae_jax.data import folder, sources


def write_image(path, value: int = 0, size: tuple[int, int] = (3, 2)) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.new("L", size, value).save(path)


def write_jsonl(path, rows) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def listing(source) -> list[tuple[str, str]]:
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


@pytest.mark.parametrize(
  "line, message",
  [
    ('{"file_name": "1.png", "text": "a"', "not valid JSON"),
    ('["1.png", "a"]', "a JSON object is needed"),
    ('{"text": "a"}', "no file name"),
    ('{"file_name": 3}', "no file name"),
    ('{"file_name": "1.png", "text": ["a"]}', "must be text, not list"),
    ('{"file_name": "../1.png"}', "outside the image folder"),
    ('{"file_name": "/1.png"}', "outside the image folder"),
    ('{"file_name": "gone.png"}', "gone.png' does not exist"),
    ('{"file_name": "notes.txt"}', "cannot be used"),
    (b'{"file_name": "\xff"}', "not valid JSON"),
  ],
)
def test_broken_jsonl_names_file_and_line(tmp_path, line, message):
  write_image(tmp_path / "1.png")
  (tmp_path / "notes.txt").write_text("")
  line = line if isinstance(line, bytes) else line.encode()
  good = b'{"file_name": "1.png", "text": "a"}\n'
  (tmp_path / "metadata.jsonl").write_bytes(good + b"\n" + line + b"\n")
  kind = FileNotFoundError if "exist" in message else ValueError
  with pytest.raises(kind, match=rf"metadata\.jsonl:3: .*{message}"):
    folder.FolderSource(tmp_path)


@pytest.mark.parametrize(
  "content, message",
  [
    ("name,text\n1.png,a\n", "1: its first line has no column 'file_name'"),
    ("", "0: its first line has no column 'file_name'"),
    ("file_name,text\n1.png,a,b\n", "2: more values than"),
    ("file_name,text\n1.png,a\n,b\n", "3: no file name"),
    ("file_name\ngone.png\n", "2: .*gone.png' does not exist"),
  ],
)
def test_broken_csv_names_file_and_line(tmp_path, content, message):
  write_image(tmp_path / "1.png")
  (tmp_path / "metadata.csv").write_text(content)
  kind = FileNotFoundError if "exist" in message else ValueError
  with pytest.raises(kind, match=rf"metadata\.csv:{message}"):
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
