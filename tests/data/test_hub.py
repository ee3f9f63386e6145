"""Hub sets and their formats on a disk: columns by type, labels of each kind, and row groups read on demand."""

import http.server
import multiprocessing
import re
import shutil
import threading

import pytest

pytest.importorskip("datasets")

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from robust_dist.data.classes import Names
from robust_dist.data.decode import decode_rgb
from robust_dist.data.errors import BadImageError, DataError
from robust_dist.data.hub import open_hub
from robust_dist.data.spool import Spool
from tests.data.tiny_sets import (
    CLASSES,
    encoded,
    metadata,
    turned_image,
    write_arrow,
    write_image_folder,
    write_parquet,
)

LABELS = [3, 1, 0, 2, 2, 1, 0]
BOTH = pytest.mark.parametrize("streaming", [False, True])
IMAGE = {"bytes": encoded(0, 0), "path": None}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = write_parquet(tmp_path_factory.mktemp("hub"), LABELS)
    return write_parquet(root, LABELS[:3], "validation", files=1)


@pytest.fixture
def load(tmp_path):
    """`open_hub` with its own cache and spool."""
    own = {"cache_dir": str(tmp_path / "cache"), "spool_dir": tmp_path / "spool"}
    return lambda path, split="train", **settings: open_hub(str(path), split, **own, **settings)


def write(root, columns, features):
    """One parquet file of these columns in row groups of two rows; returns its folder."""
    (root / "data").mkdir(parents=True)
    table = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    write_arrow(table, root / "data" / "train-00000-of-00001.parquet", 2)
    return root


def rows(source):
    return [source.read(index) for index in range(len(source))]


def right(labels):
    return [(encoded(index, label), label) for index, label in enumerate(labels)]


@BOTH
def test_splits_are_found_and_a_wrong_one_is_an_error_that_lists_them(folder, load, streaming):
    source = load(folder, "validation", streaming=streaming)
    assert rows(source) == right(LABELS[:3])
    assert source.classes == CLASSES
    assert source.name == f"{folder} (validation)"
    with pytest.raises(DataError, match=r"test.*train"):
        load(folder, "test", streaming=streaming)


def test_a_slice_of_a_split_is_taken(folder, load):
    assert rows(load(folder, "train[:3]")) == right(LABELS[:3])


def test_streaming_has_the_row_groups_as_its_groups(folder, load):
    source = load(folder, streaming=True)
    assert source.group_sizes == (4, 3)
    assert source.where(6) == f"{folder}/data/train-00001-of-00002.parquet, row group 0, row 2"


def spooled(folder):
    """Columns, number of rows and time of writing of each table in a spool."""
    found = {}
    for path in sorted(folder.rglob("*.arrow")):
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        found[path] = (table.column_names, table.num_rows, path.stat().st_mtime_ns)
    return found


def test_streaming_fetches_a_row_group_once_and_only_the_two_columns(tmp_path, load):
    root = write_parquet(tmp_path / "set", list(range(10)), files=2, group=2)
    source = load(root, streaming=True)
    assert spooled(tmp_path / "spool") == {}
    assert source.group_sizes == (2, 2, 1, 2, 2, 1)
    assert rows(source) == right(range(10))
    fetched = spooled(tmp_path / "spool")
    assert all(columns == ["image", "label"] for columns, _, _ in fetched.values())
    assert sorted(count for _, count, _ in fetched.values()) == [1, 1, 2, 2, 2, 2]
    assert rows(load(root, streaming=True)) == rows(source)
    assert spooled(tmp_path / "spool") == fetched
    first = min((root / "data").iterdir())
    pq.write_table(pq.read_table(first).take([1, 0, 2, 3, 4]), first, row_group_size=2)
    assert rows(load(root, streaming=True)) == [rows(source)[index] for index in (1, 0, *range(2, 10))]


@BOTH
@pytest.mark.parametrize(
    ("type_", "values", "labels", "classes"),
    [
        ("int64", [2, 0, 1], [2, 0, 1], ("0", "1", "2")),
        ("uint8", [1, 0, 1], [1, 0, 1], ("0", "1")),
        ("string", ["dog", "ant", "dog"], [1, 0, 1], ("ant", "dog")),
        ("large_string", ["b", "a", "c"], [1, 0, 2], ("a", "b", "c")),
    ],
)
def test_numbers_and_strings_are_labels_where_the_column_is_named(
    tmp_path, load, streaming, type_, values, labels, classes
):
    features = {"picture": datasets.Image(), "kind": datasets.Value(type_)}
    root = write(tmp_path / "set", {"picture": [IMAGE] * 3, "kind": values}, features)
    with pytest.raises(DataError, match=rf"none of .* set label_column. .*picture \(Image\), kind \({type_}\)"):
        load(root, streaming=streaming)
    source = load(root, label_column="kind", streaming=streaming)
    assert [label for _, label in rows(source)] == labels
    assert source.classes == classes


@BOTH
@pytest.mark.parametrize(
    ("type_", "values", "settings", "words"),
    [
        ("int64", [0, 2, 0], {}, "labels up to 2, but no sample has '1'"),
        ("int64", [0, -1, 0], {}, "has the label -1"),
        ("int64", [0, None, 1], {}, "1 samples have no label, the first is row 1"),
        ("string", ["a", "b", "  "], {}, "1 samples have no label, the first is row 2"),
        ("int64", [0, 5, 1], {"classes": ("a", "b")}, "has the label 5, outside its 2 classes"),
        (
            "int64",
            [0, 0, 1],
            {"classes": Names(("a", "b"))},
            r"numbers as labels \('0', '1'\), .* are names \('a', 'b'\)",
        ),
        ("int64", [0, 10**15, 1], {}, r"labels up to 1000000000000000, but no sample has '2', .* num_classes"),
        ("int64", [0, 3, 1], {"num_classes": 3}, "has the label 3, outside its 3 classes"),
        ("string", ["a", "b", "a"], {"num_classes": 3}, "num_classes=3, but its labels have 2 classes"),
        ("bool", [True, False, True], {}, r"has the wrong type: it must be a ClassLabel, int8, .*kind \(bool\)"),
        ("string", ["a", "c", "a"], {"classes": ("a", "b")}, "also has 'c'"),
        ("float32", [0.0, 1.0, 2.0], {}, "label_column='kind' has the wrong type"),
    ],
)
def test_labels_that_are_none_are_an_error(tmp_path, load, streaming, type_, values, settings, words):
    features = {"picture": datasets.Image(), "kind": datasets.Value(type_)}
    root = write(tmp_path / "set", {"picture": [IMAGE] * 3, "kind": values}, features)
    with pytest.raises(DataError, match=words):
        load(root, label_column="kind", streaming=streaming, **settings)


def write_tables(root, *tables):
    """One parquet file per table, below `root`/data; returns the folder."""
    (root / "data").mkdir(parents=True)
    for number, columns in enumerate(tables):
        pq.write_table(pa.table(columns), root / "data" / f"train-{number}.parquet")
    return root


@BOTH
def test_a_part_that_lacks_classes_is_opened_with_their_number(tmp_path, load, streaming):
    root = write_tables(tmp_path / "set", {"image": [b"x"] * 3, "label": [3, 0, 1]})
    words = {"image_column": "image", "label_column": "label", "streaming": streaming}
    with pytest.raises(DataError, match=r"up to 3, but no sample has '2': labels must be 0 to n - 1. Set num_classes"):
        load(root, **words)
    source = load(root, num_classes=5, **words)
    assert [label for _, label in rows(source)] == [3, 0, 1]
    assert source.classes == ("0", "1", "2", "3", "4")
    wide = {"image": [b"x"] * 2, "label": pa.array([0, 2**64 - 1], pa.uint64())}
    with pytest.raises(DataError, match=r"labels up to 18446744073709551615, but no sample has '1'"):
        load(write_tables(tmp_path / "wide", wide), **words)


@BOTH
@pytest.mark.parametrize(
    ("first", "second", "labels"),
    [
        (pa.int32(), pa.int64(), [0, 1]),
        (pa.uint64(), pa.int8(), [0, 1]),
        (pa.string(), pa.large_string(), ["a", "b"]),
        (pa.string_view(), pa.string_view(), ["a", "b"]),
        (pa.dictionary(pa.int8(), pa.string()), pa.string(), ["a", "b"]),
    ],
)
def test_files_whose_types_differ_in_width_alone_are_one_set(tmp_path, load, streaming, first, second, labels):
    if first == pa.string_view() and int(pa.__version__.split(".")[0]) < 17:
        pytest.skip("pyarrow 16 writes no views")
    images = {pa.string_view(): pa.binary_view()}.get(first, pa.large_binary())
    tables = [
        {"image": pa.array([b"x", b"y"], of), "label": pa.array(labels, pa.string()).cast(kind)}
        if isinstance(labels[0], str)
        else {"image": pa.array([b"x", b"y"], of), "label": pa.array(labels, kind)}
        for kind, of in ((first, images), (second, pa.binary()))
    ]
    source = load(
        write_tables(tmp_path / "set", *tables), streaming=streaming, image_column="image", label_column="label"
    )
    assert rows(source) == [(b"x", 0), (b"y", 1)] * 2


def test_files_of_other_types_are_all_named_with_theirs(tmp_path, load):
    tables = [{"image": [b"x"], "label": label} for label in ([0], ["a"], [0.5])]
    root = write_tables(tmp_path / "set", *tables, {"image": [b"x"]})
    with pytest.raises(DataError) as error:
        load(root, streaming=True, image_column="image", label_column="label")
    for number, words in {1: "int64: it has string", 2: "int64: it has double", 3: "int64: it has none"}.items():
        assert re.search(f"train-{number}.parquet has no column 'label' .*train-0.parquet, {words}", str(error.value))


@BOTH
def test_structs_of_bytes_and_paths_are_images(tmp_path, load, streaming):
    (tmp_path / "set" / "data" / "pictures").mkdir(parents=True)
    (tmp_path / "set" / "data" / "pictures" / "1.jpg").write_bytes(b"beside")
    structs = pa.array([{"bytes": b"inside"}, {"bytes": None}], pa.struct([("bytes", pa.binary())]))
    paths = pa.array(["pictures/1.jpg", "pictures/2.jpg"])
    both = pa.array([{"bytes": None, "path": path} for path in paths.to_pylist()])
    columns = {"one": structs, "y": [0, 0]}
    source = load(write_tables(tmp_path / "structs", columns), streaming=streaming, label_column="y")
    assert source.read(0) == (b"inside", 0)
    with pytest.raises(BadImageError, match="neither bytes nor a path"):
        source.read(1)
    for column in (paths, both):
        pq.write_table(pa.table({"file": column, "y": [0, 0]}), tmp_path / "set" / "data" / "train-0.parquet")
        source = load(tmp_path / "set", streaming=streaming, image_column="file", label_column="y")
        assert source.read(0) == (b"beside", 0)
        with pytest.raises(BadImageError, match=r"pictures/2.jpg: No such file"):
            source.read(1)


def test_a_relative_path_that_two_folders_have_is_a_bad_image_and_not_one_of_them(tmp_path, load):
    for part in "ab":
        write_tables(tmp_path / part, {"file": ["1.jpg"], "y": [0]})
        (tmp_path / part / "data" / "1.jpg").write_bytes(part.encode())
    files = {"train": [str(tmp_path / part / "data" / "train-0.parquet") for part in "ab"]}
    words = {"data_files": files, "image_column": "file", "label_column": "y"}
    with pytest.raises(BadImageError, match=r"1.jpg matches both .*a/data/1.jpg and .*b/data/1.jpg"):
        load("parquet", **words).read(0)
    assert rows(load("parquet", streaming=True, **words)) == [(b"a", 0), (b"b", 0)]


@BOTH
def test_exif_turns_images_as_datasets_does_unless_it_is_off(tmp_path, load, streaming):
    columns = {"image": [{"bytes": turned_image(), "path": None}], "label": [0]}
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a"])}
    root = write(tmp_path / "set", columns, features)
    (file,) = (root / "data").iterdir()
    theirs = datasets.Dataset.from_parquet(str(file), cache_dir=str(tmp_path / "cache"))[0]["image"].size
    sizes = [decode_rgb(load(root, streaming=streaming, exif=exif).read(0)[0]).size for exif in ("auto", "on", "off")]
    assert sizes == [theirs, theirs, (48, 40)]


@BOTH
def test_several_columns_of_a_type_are_an_error_and_named_ones_are_taken(tmp_path, load, streaming):
    features = {
        "left": datasets.Image(),
        "right": datasets.Image(),
        "fine": datasets.ClassLabel(names=["a", "b"]),
        "coarse": datasets.ClassLabel(names=["x", "y"]),
    }
    columns = {"left": [IMAGE] * 2, "right": [{"bytes": b"r", "path": None}] * 2, "fine": [0, 1], "coarse": [1, 0]}
    root = write(tmp_path / "set", columns, features)
    with pytest.raises(DataError, match=r"2 \(left, right\) of the columns can be the image_column"):
        load(root, streaming=streaming)
    with pytest.raises(DataError, match=r"2 \(fine, coarse\) of the columns can be the label_column"):
        load(root, streaming=streaming, image_column="right")
    source = load(root, streaming=streaming, image_column="right", label_column="coarse")
    assert rows(source) == [(b"r", 1), (b"r", 0)]
    assert source.classes == ("x", "y")
    with pytest.raises(DataError, match=r"no column image_column='middle'; it has: left \(Image\), right"):
        load(root, streaming=streaming, image_column="middle")


@BOTH
def test_plain_bytes_and_files_without_the_features_of_datasets_can_be_images(tmp_path, load, streaming):
    root = write(
        tmp_path / "set", {"raw": [b"one"], "y": [0]}, {"raw": datasets.Value("binary"), "y": datasets.Value("int8")}
    )
    assert rows(load(root, streaming=streaming, image_column="raw", label_column="y")) == [(b"one", 0)]
    bare = write_parquet(tmp_path / "bare", LABELS, files=1)
    (file,) = (bare / "data").iterdir()
    pq.write_table(pq.read_table(file).replace_schema_metadata(None), file)
    assert rows(load(bare, streaming=streaming, label_column="label")) == right(LABELS)


@BOTH
def test_the_training_splits_classes_give_the_labels(folder, load, streaming):
    turned = tuple(reversed(CLASSES))
    source = load(folder, streaming=streaming, classes=turned)
    assert source.classes == turned
    assert [label for _, label in rows(source)] == [9 - label for label in LABELS]
    with pytest.raises(DataError, match="lacks 'yak'"):
        load(folder, streaming=streaming, classes=(*CLASSES, "yak"))


@BOTH
def test_a_row_without_an_image_is_a_bad_one(tmp_path, load, streaming):
    columns = {"image": [None, IMAGE, {"bytes": None, "path": "/absent/a.jpg"}], "label": [0, 0, 0]}
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a"])}
    source = load(write(tmp_path / "set", columns, features), streaming=streaming)
    assert source.read(1) == (encoded(0, 0), 0)
    for index, words in {0: "neither bytes nor a path", 2: r"absent/a.jpg: No such file"}.items():
        with pytest.raises(BadImageError, match=words):
            source.read(index)


def test_an_unlabelled_split_is_an_error_or_bad_samples_when_streamed(tmp_path, load):
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}
    root = write(tmp_path / "set", {"image": [IMAGE] * 2, "label": [-1, 1]}, features)
    with pytest.raises(DataError, match=r"label -1, .* without labels"):
        load(root)
    source = load(root, streaming=True)
    with pytest.raises(BadImageError, match="label is -1, outside the 2 classes"):
        source.read(0)
    assert source.read(1)[1] == 1


def test_a_saved_set_is_read_where_it_lies(folder, load, tmp_path):
    both = datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "other"))
    both.save_to_disk(tmp_path / "both")
    both["validation"].save_to_disk(tmp_path / "one")
    assert rows(load(tmp_path / "both", "validation")) == right(LABELS[:3])
    assert rows(load(tmp_path / "one", "validation")) == right(LABELS[:3])
    assert not (tmp_path / "cache").exists()
    for name, split in {"both": "test", "one": "train"}.items():
        with pytest.raises(DataError, match=f"no split '{split}' in .*{name}; there are: .*validation"):
            load(tmp_path / name, split)
    with pytest.raises(DataError, match="save_to_disk folder, which needs no streaming: set streaming=False"):
        load(tmp_path / "one", "validation", streaming=True)


def test_an_image_folder_is_read_through_datasets_but_not_streamed(tmp_path, load):
    root = write_image_folder(tmp_path / "set" / "train", [0, 0, 1])
    source = load(root.parent)
    assert rows(source) == right([0, 0, 1])
    assert source.where(2).endswith(f"row 2 ({root}/bee/00002.jpg)")
    with pytest.raises(DataError, match=r"only parquet files can be streamed, .* revision='refs/convert/parquet'"):
        load(root.parent, streaming=True)


@BOTH
@pytest.mark.parametrize(
    ("path", "settings", "words"),
    [
        ("/absent/set", {}, r"/absent/set \(train\): Couldn't find"),
        ("nobody/nothing", {}, r"nobody/nothing \(train\): Couldn't reach .*OfflineModeIsEnabled"),
        (None, {"config_name": "odd"}, r"\(odd, train\): .*'odd' not found. Available: \['default'\]"),
    ],
)
def test_a_set_that_is_not_there_is_an_error(folder, load, streaming, path, settings, words, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=words):
        load(path or folder, streaming=streaming, **settings)


def test_a_torn_or_foreign_parquet_file_is_named(tmp_path, load):
    root = write_parquet(tmp_path / "set", LABELS)
    first, second = sorted((root / "data").iterdir())
    whole = second.read_bytes()
    second.write_bytes(whole[:-50])
    for streaming in (True, False):
        with pytest.raises(DataError, match=f"{re.escape(second.name)} is not a parquet file, or is truncated"):
            load(root, streaming=streaming)
    kept = first.read_bytes()
    first.write_bytes(b"no parquet")
    with pytest.raises(
        DataError, match=f"{re.escape(first.name)} is not a parquet.*{re.escape(second.name)} is not a parquet"
    ):
        load(root, streaming=True)
    first.write_bytes(kept)
    pq.write_table(pq.read_table(first).rename_columns(["image", "other"]), second)
    with pytest.raises(
        DataError, match=f"{re.escape(second.name)} has no column 'label' of the type in .*{first.name}"
    ):
        load(root, streaming=True)


def test_a_corrupt_row_group_makes_its_samples_bad_and_no_others(tmp_path, load):
    root = write_parquet(tmp_path / "set", LABELS, files=2, group=2)
    first, _ = sorted((root / "data").iterdir())
    assert rows(load(root, streaming=True)) == right(LABELS)
    content = bytearray(first.read_bytes())
    offset = pq.ParquetFile(first).metadata.row_group(1).column(0).data_page_offset
    content[offset : offset + 40] = b"\xff" * 40
    first.write_bytes(content)
    source = load(root, streaming=True)
    good = [index for index in range(7) if index not in (2, 3)]
    assert [source.read(index) for index in good] == [right(LABELS)[index] for index in good]
    for index in (2, 3):
        with pytest.raises(BadImageError, match=r"row group 1 of .* cannot be read"):
            source.read(index)


@pytest.fixture
def server(folder):
    """A web server for the parquet files that serves ranges; yields its address and the requested ranges."""
    ranges = []

    class Ranges(http.server.SimpleHTTPRequestHandler):
        def do_HEAD(self):
            self._answer(b"")

        def do_GET(self):
            self._answer(None)

        def _answer(self, body):
            content = (folder / self.path.lstrip("/")).read_bytes()
            asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            start, stop = (int(asked[1]), int(asked[2] or len(content) - 1) + 1) if asked else (0, len(content))
            part = content[start:stop]
            if body is None:
                ranges.append(len(part))
            self.send_response(206 if asked else 200)
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Range", f"bytes {start}-{start + len(part) - 1}/{len(content)}")
            self.send_header("Content-Length", str(len(part)))
            self.end_headers()
            self.wfile.write(part if body is None else body)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Ranges) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}", ranges
        httpd.shutdown()
        thread.join()


def test_parquet_files_are_streamed_from_a_web_server_also_by_a_forked_worker(folder, load, server, tmp_path):
    address, ranges = server
    urls = [f"{address}/data/train-0000{k}-of-00002.parquet" for k in range(2)]
    source = load("parquet", data_files={"train": urls}, streaming=True)
    assert rows(source) == right(LABELS)
    count = len(ranges)
    shutil.rmtree(tmp_path / "spool")
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    worker = context.Process(target=lambda: results.put(rows(source) == right(LABELS)))
    worker.start()
    worker.join(60)
    assert worker.exitcode == 0
    assert results.get()
    assert len(ranges) > count > 0


def test_without_download_only_what_is_in_the_cache_or_local_counts(folder, load, server, tmp_path):
    files = {"train": [f"{server[0]}/data/validation-00000-of-00001.parquet"]}

    def cached():
        return {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.arrow")}

    with pytest.raises(DataError, match=r"parquet is not in the cache of `datasets` \(.*\): set download=True"):
        load("parquet", data_files=files, download=False)
    assert cached() == {}
    assert rows(load("parquet", data_files=files)) == right(LABELS[:3])
    before = cached()
    assert len(before) == 1
    assert rows(load("parquet", data_files=files, download=False)) == right(LABELS[:3])
    assert cached() == before
    assert rows(load(folder, "validation", download=False)) == right(LABELS[:3])


def test_the_features_of_a_set_are_known_again_by_datasets(folder):
    (file,) = (folder / "data").glob("validation*")
    table = datasets.Dataset.from_parquet(str(file))
    assert pq.read_schema(file).metadata[b"huggingface"].decode() == metadata(table)["huggingface"]


def test_streaming_removes_none_of_the_user_s_files_beside_its_own(tmp_path, folder, monkeypatch):
    own = tmp_path / "spool" / "saved.arrow"
    own.parent.mkdir()
    own.write_bytes(b"mine" * 1_000)
    monkeypatch.setattr(Spool.__init__, "__defaults__", (None, 1))
    source = open_hub(str(folder), "train", streaming=True, cache_dir=str(tmp_path / "cache"), spool_dir=own.parent)
    assert rows(source) == right(LABELS)
    assert own.read_bytes() == b"mine" * 1_000
    assert [path.name for path in own.parent.iterdir() if path != own] == ["robust_dist-row-groups"]


def test_opening_a_saved_set_changes_nothing_of_its_folder(tmp_path, folder):
    table = datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))
    table.save_to_disk(tmp_path / "saved")
    before = {path: path.read_bytes() for path in (tmp_path / "saved").rglob("*") if path.is_file()}
    source = open_hub(str(tmp_path / "saved"), "train[1:]+validation[:2]")
    assert rows(source) == right(LABELS)[1:] + right(LABELS)[:2]
    assert source.fingerprint() != open_hub(str(tmp_path / "saved"), "train").fingerprint()
    assert {path: path.read_bytes() for path in (tmp_path / "saved").rglob("*") if path.is_file()} == before
