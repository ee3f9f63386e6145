"""WebDataset shards: an index that is correct, complete and rebuilt when needed, and faults that name the shard."""

import gzip
import json
import os
import shutil
import subprocess
import tarfile
import threading

import numpy as np
import pytest

from robust_dist.data.errors import BadImageError, DataError

pytest.importorskip("braceexpand")

from robust_dist.data.classes import Names
from robust_dist.data.shards import expand, open_webdataset
from tests.data.tiny_sets import add_label, add_member, encoded, turned_image, write_shards

LABELS = [3, 1, 0, 2, 2, 1, 0]


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            add_member(tar, name, content)
    return str(path)


def rows(source):
    return [source.read(index) for index in range(len(source))]


def right(labels):
    return [(encoded(index, label), label) for index, label in enumerate(labels)]


@pytest.mark.parametrize("label_key", ["cls", "json.label", "txt"])
def test_labels_are_read_from_text_or_from_a_key_of_json(tmp_path, label_key):
    write_shards(tmp_path, LABELS, label_key=label_key)
    source = open_webdataset(f"{tmp_path}/train-{{000000..000001}}.tar", label_key=label_key)
    assert rows(source) == right(LABELS)
    assert source.classes == ("0", "1", "2", "3")
    assert source.group_sizes == (5, 2)
    assert source.where(6) == f"{tmp_path}/train-000001.tar: 00006.jpg"


def test_a_nested_key_of_json_is_found(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("0.png", b"x"), ("0.json", b'{"a": {"b": 4}}')])
    assert rows(open_webdataset(path, label_key="json.a.b", num_classes=9)) == [(b"x", 4)]


def test_the_samples_are_those_of_the_webdataset_package(tmp_path):
    wds = pytest.importorskip("webdataset")
    path = write_tar(
        tmp_path / "odd.tar",
        [
            ("./deep/er/a.JPG", b"1"),
            ("./deep/er/a.cls", b" 2 \n"),
            ("__meta__/x.jpg", b"no"),
            ("readme", b"no"),
            ("b.seg.png", b"no"),
            ("b.png", b"2"),
            ("b.cls", b"0"),
            ("c.cls", b"1"),
            ("c.extra.txt", b"no"),
            ("c.jpeg", b"3"),
            ("x" * 150 + "/" + "ü" * 60 + ".jpg", b"4" * 1000),
            ("x" * 150 + "/" + "ü" * 60 + ".cls", b"0"),
        ],
    )
    theirs = wds.WebDataset(path, shardshuffle=False).to_tuple("jpg;jpeg;png", "cls")
    expected = [(image, int(label)) for image, label in theirs]
    assert len(expected) == 4
    assert rows(open_webdataset(path)) == expected


@pytest.mark.parametrize("writer", ["webdataset", "tar", "tar --format=pax", "tar --format=gnu", "tar --format=v7"])
def test_shards_that_others_write_are_whole(tmp_path, writer):
    contents = {f"{index:03d}.{ending}": encoded(index, 1) for index in range(3) for ending in ["jpg", "cls"]}
    contents = {name: b"1" if name.endswith("cls") else content for name, content in contents.items()}
    path = str(tmp_path / "a.tar")
    if writer == "webdataset":
        with pytest.importorskip("webdataset").TarWriter(path) as tar:
            for index in range(3):
                tar.write({"__key__": f"{index:03d}", "jpg": encoded(index, 1), "cls": 1})
    else:
        for name, content in contents.items():
            (tmp_path / name).write_bytes(content)
        subprocess.run([*writer.split(), "-cf", path, "-C", str(tmp_path), *contents], check=True)
    assert rows(open_webdataset(path, num_classes=2)) == [(encoded(index, 1), 1) for index in range(3)]


def relabel(shard, label):
    """Other labels in a shard of the same size and time: the old ones are returned unless it is read again."""
    before = os.stat(shard)
    with tarfile.open(shard) as tar:
        members = [(member.name, tar.extractfile(member).read()) for member in tar]
    write_tar(shard, [(name, label if name.endswith(".cls") else content) for name, content in members])
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert os.stat(shard).st_size == before.st_size


def test_the_index_is_made_once_and_again_for_a_changed_shard_only(tmp_path):
    def opened():
        return rows(open_webdataset(f"{tmp_path}/*.tar", num_classes=4))

    shards = write_shards(tmp_path, LABELS, per_shard=3)
    first = opened()
    assert first == right(LABELS)
    for shard in shards:
        relabel(shard, b"3")
    assert opened() == first
    write_tar(shards[1], [("new.jpg", b"y"), ("new.cls", b"2")])
    assert opened() == [*first[:3], (b"y", 2), *first[6:]]
    os.utime(shards[0], ns=(1, 1))
    again = [(image, 3) for image, _ in first[:3]]
    assert opened() == [*again, (b"y", 2), *first[6:]]
    assert len(list(tmp_path.glob(".index-*"))) == 1


@pytest.mark.parametrize("damage", [b"", b"PK\3\4 nonsense", None])
def test_a_torn_index_is_made_again(tmp_path, damage):
    write_shards(tmp_path, LABELS)
    expected = rows(open_webdataset(f"{tmp_path}/*.tar"))
    (file,) = tmp_path.glob(".index-*")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2] if damage is None else damage)
    assert rows(open_webdataset(f"{tmp_path}/*.tar")) == expected
    assert len(file.read_bytes()) == len(whole)


def test_other_keys_have_an_index_of_their_own(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("0.jpg", b"j"), ("0.png", b"p"), ("0.cls", b"0"), ("0.txt", b"1")])
    assert rows(open_webdataset(path, num_classes=2)) == [(b"j", 0)]
    assert rows(open_webdataset(path, image_keys=("png", "jpg"), label_key="txt", num_classes=2)) == [(b"p", 1)]
    assert rows(open_webdataset(path, num_classes=2)) == [(b"j", 0)]


def test_many_may_make_the_index_at_once(tmp_path):
    write_shards(tmp_path, LABELS, per_shard=1)
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(rows(open_webdataset(f"{tmp_path}/*.tar")))) for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [right(LABELS)] * 6
    assert len(list(tmp_path.glob("*index*"))) == len(list(tmp_path.glob(".index-*.npz"))) == 1


def test_the_index_goes_where_it_is_told_and_says_so_where_it_cannot(tmp_path):
    write_shards(tmp_path / "set", LABELS)
    open_webdataset(f"{tmp_path}/set/*.tar", index_dir=tmp_path / "a" / "b")
    assert len(list((tmp_path / "a" / "b").iterdir())) == 1
    assert sorted(path.suffix for path in (tmp_path / "set").iterdir()) == [".tar", ".tar"]
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match=r"index cannot be written to .*file.*set index_dir"):
        open_webdataset(f"{tmp_path}/set/*.tar", index_dir=tmp_path / "file")


@pytest.mark.parametrize("length", [0, 100, 511, 512, 600, 1500, 3000, 5000, -1024, -1500])
def test_a_torn_shard_is_an_error_and_allowed_it_gives_what_is_before_the_tear_and_counts_one(tmp_path, length):
    shards = write_shards(tmp_path, LABELS)
    whole = shards[0].read_bytes()
    end = next(offset for offset in range(0, len(whole), 512) if not any(whole[offset : offset + 1024]))
    cut = whole[: length if length >= 0 else end + 1024 + length]
    shards[0].write_bytes(cut)
    with pytest.raises(DataError, match=r"1 shards are torn: '.*train-000000.tar \(at byte .*allow_torn=True"):
        open_webdataset(f"{tmp_path}/*.tar")
    source = open_webdataset(f"{tmp_path}/*.tar", allow_torn=True, num_classes=4)
    count = source.group_sizes[0] - 1
    assert source.group_sizes == (count + 1, 2)
    before = [source.read(index) for index in range(count)]
    assert before == right(LABELS)[:count]
    with pytest.raises(BadImageError, match="torn at byte"):
        source.read(count)
    assert source.where(count) == f"{shards[0]}: (torn)"
    assert [source.read(count + 1 + index) for index in range(2)] == right(LABELS)[5:]
    lost = whole[len(cut) :]
    assert count == 5 or any(lost)
    assert count == sum(1 for end in _sample_ends(shards[0], whole) if end <= len(cut))


def test_an_image_that_is_torn_after_its_label_is_no_sample(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("0.cls", b"0"), ("0.jpg", b"x"), ("1.cls", b"0"), ("1.jpg", b"y" * 2_000)])
    with open(path, "r+b") as file:
        file.truncate(4_000)
    source = open_webdataset(path, allow_torn=True)
    assert source.group_sizes == (2,)
    assert source.read(0) == (b"x", 0)
    with pytest.raises(BadImageError, match=r"torn at byte 3,072"):
        source.read(1)


def _sample_ends(path, whole):
    copy = path.with_suffix(".whole")
    copy.write_bytes(whole)
    with tarfile.open(copy) as tar:
        return [member.offset_data + member.size for member in tar if member.name.endswith(".cls")]


def test_a_header_of_nonsense_in_the_middle_is_a_tear(tmp_path):
    (path,) = write_shards(tmp_path, LABELS, per_shard=9)
    with tarfile.open(path) as tar:
        third = tar.getmembers()[4].offset
    content = bytearray(path.read_bytes())
    content[third : third + 512] = b"\x55" * 512
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"torn: .*at byte {third:,}"):
        open_webdataset(str(path))
    assert len(open_webdataset(str(path), allow_torn=True, num_classes=4)) == 2 + 1


def test_a_shard_that_shrinks_or_goes_after_the_index_gives_bad_images_and_not_wrong_ones(tmp_path):
    shards = write_shards(tmp_path, LABELS)
    source = open_webdataset(f"{tmp_path}/*.tar")
    with open(shards[0], "r+b") as file:
        file.truncate(700)
    shards[1].unlink()
    with pytest.raises(BadImageError, match="bytes before the image does"):
        source.read(4)
    with pytest.raises(BadImageError, match="No such file"):
        source.read(6)


def test_a_sample_without_image_or_label_is_a_bad_one_and_none_with_them_is_an_error(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("0.jpg", b"x"), ("0.cls", b"0"), ("1.jpg", b"y"), ("2.cls", b"0")])
    source = open_webdataset(path)
    assert source.read(0) == (b"x", 0)
    with pytest.raises(BadImageError, match="no label"):
        source.read(1)
    with pytest.raises(BadImageError, match="no image"):
        source.read(2)
    assert source.where(2) == f"{path}: 2"
    with pytest.raises(DataError, match=r"no sample has an image: a member ending in .webp \(image_keys\)"):
        open_webdataset(path, image_keys=["webp"])
    with pytest.raises(DataError, match=r"no sample has a label at label_key='json.cls'"):
        open_webdataset(path, label_key="json.cls")
    with pytest.raises(DataError, match="no samples in its 1 shards"):
        open_webdataset(write_tar(tmp_path / "b.tar", []))


@pytest.mark.parametrize(
    ("texts", "settings", "labels", "classes"),
    [
        (["dog", "ant", "dog"], {}, [1, 0, 1], ("ant", "dog")),
        (["dog", "ant", "dog"], {"classes": ("dog", "ant", "bee")}, [0, 1, 0], ("dog", "ant", "bee")),
        (["2", "0", "1"], {}, [2, 0, 1], ("0", "1", "2")),
        (["2", "0", "2"], {"num_classes": 4}, [2, 0, 2], ("0", "1", "2", "3")),
        (["2", "0", "2"], {"classes": ("ant", "bee", "cat")}, [2, 0, 2], ("ant", "bee", "cat")),
        (["7", "3", "7"], {"classes": ("3", "7")}, [1, 0, 1], ("3", "7")),
    ],
)
def test_labels_are_numbers_or_names(tmp_path, texts, settings, labels, classes):
    members = [pair for i, text in enumerate(texts) for pair in ((f"{i}.jpg", b"x"), (f"{i}.cls", text.encode()))]
    source = open_webdataset(write_tar(tmp_path / "a.tar", members), **settings)
    assert [label for _, label in rows(source)] == labels
    assert source.classes == classes


@pytest.mark.parametrize(
    ("texts", "settings", "words"),
    [
        (["0", "2"], {}, "labels up to 2, but no sample has '1': labels must be 0 to n - 1"),
        (["0", "-1"], {}, "has the label -1, outside its 1 classes .* without labels"),
        (["0", "4"], {"num_classes": 3}, "has the label 4, outside its 3 classes"),
        (["0", "4"], {"classes": ("ant", "bee")}, "has the label 4, outside its 2 classes"),
        (["ant", "cat"], {"classes": ("ant", "bee")}, "also has 'cat'"),
        (["ant", "cat"], {"num_classes": 3}, "num_classes=3, but its labels have 2 classes"),
        (["0", "1"], {"classes": ("ant", "bee"), "num_classes": 3}, "num_classes=3, but its labels have 2 classes"),
    ],
)
def test_labels_outside_of_the_classes_are_an_error(tmp_path, texts, settings, words):
    members = [pair for i, text in enumerate(texts) for pair in ((f"{i}.jpg", b"x"), (f"{i}.cls", text.encode()))]
    with pytest.raises(DataError, match=words):
        open_webdataset(write_tar(tmp_path / "a.tar", members), **settings)


def test_a_member_twice_in_a_sample_is_an_error(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("0.jpg", b"x"), ("0.jpg", b"y"), ("0.cls", b"0")])
    with pytest.raises(DataError, match=r"1 samples have a member twice \('.*a.tar: 0'\)"):
        open_webdataset(path)


def test_braces_and_wildcards_give_the_shards_in_order(tmp_path):
    for name in ("a-0.tar", "a-1.tar", "a-2.tar", "b-0.tar"):
        write_tar(tmp_path / name, [])
    root = str(tmp_path)
    assert expand(f"{root}/{{b-0,a-{{2..1}}}}.tar", "set") == [f"{root}/{name}.tar" for name in ("b-0", "a-2", "a-1")]
    assert expand(f"file://{root}/a-*.tar", "set") == [f"{root}/a-{k}.tar" for k in range(3)]
    assert expand([f"{root}/b-*.tar", f"{root}/a-{{0..1}}.tar"], "set")[0] == f"{root}/b-0.tar"
    with pytest.raises(DataError, match=r"duplicate shards: '.*a-1.tar'"):
        expand([f"{root}/a-*.tar", f"{root}/a-1.tar"], "set")


@pytest.mark.parametrize(
    ("url", "words"),
    [
        (
            "https://example.org/a-{0..9}.tar",
            "is not a path; shards must be plain .tar files on a disk that all ranks see",
        ),
        ("pipe:cat a.tar", "is not a path"),
        ("a.tar::b.tar", "is not a path"),
        ("a.tar.gz", "does not end in .tar; .*unpack"),
        ("absent-{0..3}.tar", "there is no file .*absent-0.tar"),
        ("absent-*.tar", r"there is no file .*absent-\*.tar"),
        ([], "no shards are given"),
    ],
)
def test_what_is_no_plain_local_shard_says_what_would_be_right(url, words):
    with pytest.raises(DataError, match=words):
        open_webdataset(url, name="set")


def test_a_compressed_shard_with_a_plain_name_is_named(tmp_path):
    (path,) = write_shards(tmp_path, LABELS, per_shard=9)
    with open(path, "rb") as plain, gzip.open(tmp_path / "zipped.tar", "wb") as zipped:
        shutil.copyfileobj(plain, zipped)
    with pytest.raises(DataError, match=r"1 shards are compressed.*unpack them .*zipped.tar: gzip"):
        open_webdataset(str(tmp_path / "zipped.tar"))
    with pytest.raises(DataError, match="label_key='json' must name a key"):
        open_webdataset(str(path), label_key="json")


def test_an_index_keeps_no_object_a_sample(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for index in range(3_000):
            add_member(tar, f"{index}.jpg", b"x")
            add_label(tar, str(index), index % 10, "cls")
    source = open_webdataset(str(tmp_path / "a.tar"))
    assert len(source) == 3_000
    assert all(not isinstance(value, (list, dict)) for value in vars(source).values())
    assert isinstance(source._labels, np.ndarray)


def labelled(labels, ending="cls"):
    """Members of samples "000", "001", ...: an image and a label, given as bytes, text, or values for JSON."""
    content = [one if isinstance(one, bytes) else str(one).encode() for one in labels]
    return [pair for i, one in enumerate(content) for pair in ((f"{i:03}.jpg", b"%d" % i), (f"{i:03}.{ending}", one))]


def jsons(labels):
    return labelled([json.dumps({"label": label}) for label in labels], "json")


def kept(source):
    """The labels of a source, None for a bad sample."""
    found = []
    for index in range(len(source)):
        try:
            found.append(source.read(index)[1])
        except BadImageError:
            found.append(None)
    return found


@pytest.mark.parametrize("none", [None, float("nan"), float("inf"), True, False, "", "  "])
def test_null_nan_and_bool_in_json_are_no_labels(tmp_path, none):
    source = open_webdataset(write_tar(tmp_path / "a.tar", jsons(["cat", none, "dog"])), label_key="json.label")
    assert source.classes == ("cat", "dog")
    assert kept(source) == [0, None, 1]


def test_a_whole_number_of_json_is_the_same_label_however_it_is_written(tmp_path):
    source = open_webdataset(write_tar(tmp_path / "a.tar", jsons([0, 1.0, "2", 1])), label_key="json.label")
    assert kept(source) == [0, 1, 2, 1]
    assert source.classes == ("0", "1", "2")


def test_lists_objects_fractions_and_text_that_is_no_utf_8_are_refused_together_with_their_names(tmp_path):
    one = write_tar(tmp_path / "a.tar", jsons(["cat", [3], {"id": 3}, 0.5, "\ud800", "dog"]))
    two = write_tar(tmp_path / "b.tar", jsons(["cat", *[[3]] * 8]))
    with pytest.raises(DataError) as error:
        open_webdataset([one, two], label_key="json.label")
    words = str(error.value)
    assert "11 labels are a list, an object or a fraction" in words
    assert f"'{one}: 001.json', '{one}: 002.json', '{one}: 003.json', '{two}: 001.json'" in words
    assert "and 6 more" in words
    assert f"1 labels are not UTF-8 text ('{one}: 004.json')" in words
    assert not list(tmp_path.glob(".index-*"))
    with pytest.raises(DataError, match=r"2 labels are not UTF-8 text \('.*000.cls', '.*001.cls'\)"):
        open_webdataset(write_tar(tmp_path / "c.tar", labelled([b"caf\xe9", "cat".encode("utf-16"), "cat"])))


def test_a_byte_order_mark_is_no_part_of_a_label(tmp_path):
    source = open_webdataset(write_tar(tmp_path / "a.tar", labelled([b"\xef\xbb\xbf1\r\n", "0"])))
    assert kept(source) == [1, 0]


def test_numbers_are_places_only_where_the_training_labels_were_numbers(tmp_path):
    names = open_webdataset(write_tar(tmp_path / "a.tar", labelled(["cat", "dog"]))).classes
    numbers = open_webdataset(write_tar(tmp_path / "b.tar", labelled(["0", "1"]))).classes
    path = write_tar(tmp_path / "c.tar", labelled(["1", "0"]))
    assert kept(open_webdataset(path, classes=numbers)) == [1, 0]
    with pytest.raises(
        DataError, match=r"numbers as labels \('0', '1'\), .* training split's are names \('cat', 'dog'\)"
    ):
        open_webdataset(path, classes=names)
    assert kept(open_webdataset(path, classes=Names(("1", "0")))) == [0, 1]
    with pytest.raises(DataError, match="also has 'cat', 'dog'"):
        open_webdataset(str(tmp_path / "a.tar"), classes=numbers)


@pytest.mark.parametrize("highest", [10**9, 10**15, 10**30])
def test_labels_that_are_ids_are_an_error_at_once(tmp_path, highest):
    path = write_tar(tmp_path / "a.tar", labelled([0, highest, 2]))
    with pytest.raises(DataError, match=rf"labels up to {highest}, but no sample has '1', '3', .* more: .*num_classes"):
        open_webdataset(path)


def test_members_that_are_not_next_to_each_other_are_told_with_the_cause(tmp_path):
    members = [(f"{i}.jpg", b"x") for i in range(8)] + [(f"{i}.cls", b"0") for i in range(8)]
    with pytest.raises(
        DataError, match=r"8 samples have members that are not next to each other; .*--sort=name \('.*: 0'"
    ):
        open_webdataset(write_tar(tmp_path / "a.tar", members))
    twice = [("0.jpg", b"x"), ("0.cls", b"0"), ("1.jpg", b"y"), ("1.cls", b"1"), ("0.jpg", b"z"), ("0.cls", b"1")]
    assert kept(open_webdataset(write_tar(tmp_path / "b.tar", twice))) == [0, 1, 1]


def test_names_with_dots_are_samples_each_of_its_own(tmp_path):
    dotted = [pair for i in range(3) for pair in ((f"dsc.{i:04}.JPG", b"%d" % i), (f"dsc.{i:04}.cls", b"%d" % i))]
    source = open_webdataset(
        write_tar(tmp_path / "a.tar", [("a.jpg", b"x"), ("a.cls", b"2"), *dotted, ("dsc.9.jpg", b"")])
    )
    assert kept(source) == [2, 0, 1, 2, None]
    assert source.where(1).endswith("a.tar: dsc.0000.JPG")
    assert source.where(4).endswith("a.tar: dsc.9.jpg")
    turned = [*(pair for pair in dotted if pair[0].endswith("cls")), *(p for p in dotted if p[0].endswith("JPG"))]
    assert kept(open_webdataset(write_tar(tmp_path / "b.tar", turned))) == [0, 1, 2]


def test_several_images_of_a_sample_of_which_none_is_named_are_refused(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("0.left.jpg", b"l"), ("0.right.jpg", b"r"), ("0.cls", b"0")])
    with pytest.raises(
        DataError, match=r"1 samples have images, but none .* image_keys .*a.tar: 0 \('left.jpg', 'right"
    ):
        open_webdataset(path)
    assert rows(open_webdataset(path, image_keys=["right.jpg"])) == [(b"r", 0)]


def test_keys_are_found_in_any_case_and_with_dots(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("0.Input.JPG", b"x"), ("0.OUTPUT.Cls", b"0"), ("0.Meta.JSON", b'{"Y": 0}')])
    assert rows(open_webdataset(path, image_keys=["input.jpg"], label_key="Output.CLS")) == [(b"x", 0)]
    assert rows(open_webdataset(path, image_keys=[".Input.jpg"], label_key="meta.json.Y")) == [(b"x", 0)]
    with pytest.raises(DataError, match=r"both an image and a label. The first sample has .input.jpg, .output.cls"):
        open_webdataset(path)
    with pytest.raises(
        DataError, match=r"no sample has a label .*true and false are not labels\).*.meta.json \(with the keys 'Y'"
    ):
        open_webdataset(path, image_keys=["input.jpg"], label_key="meta.json.y")
    with pytest.raises(DataError, match=r"label_key='meta.json' must name a key"):
        open_webdataset(path, label_key="meta.json")


def test_a_member_whose_name_has_a_line_feed_or_is_no_utf_8_is_a_sample(tmp_path):
    name = "a\nb/" + os.fsdecode(b"caf\xe9")
    source = open_webdataset(write_tar(tmp_path / "a.tar", [(f"{name}.jpg", b"x"), (f"{name}.cls", b"0")]))
    assert rows(source) == [(b"x", 0)]
    assert source.where(0).endswith(f"a.tar: {name}.jpg")


@pytest.mark.parametrize("name", ["set[1]", "set{1,2}", "set*", "set?"])
def test_what_exists_by_the_very_name_is_taken_and_no_sibling(tmp_path, name):
    for folder in (name, "set1", "set2"):
        (tmp_path / folder).mkdir()
    mine = write_tar(tmp_path / name / "s-[0].tar", labelled(["0", "1"]))
    write_tar(tmp_path / name / "s-0.tar", labelled(["0"]))
    write_tar(tmp_path / "set1" / "s-0.tar", labelled(["0", "1", "2"]))
    assert expand(mine, "set") == [mine]
    for url in ("s-*.tar", "s-{[0],0}.tar"):
        wanted = sorted([mine, f"{tmp_path}/{name}/s-0.tar"], reverse="{" in url)
        assert expand(f"{tmp_path}/{name}/{url}", "set") == wanted
        assert expand(url, "set", tmp_path / name) == wanted
    with pytest.raises(DataError, match=r"there is no file .*no\[1\]/s-0.tar"):
        expand("s-0.tar", "set", tmp_path / "no[1]")
    with pytest.raises(DataError, match=r"there is no file .*set\[x1\]/s-\*.tar"):
        expand("s-*.tar", "set", tmp_path / "set[x1]")


def test_exif_of_shards_is_left_unless_it_is_asked_for(tmp_path):
    decode = pytest.importorskip("robust_dist.data.decode")
    path = write_tar(tmp_path / "a.tar", [("0.jpg", turned_image()), ("0.cls", b"0")])
    sizes = [decode.decode_rgb(open_webdataset(path, exif=exif).read(0)[0]).size for exif in ("auto", "off", "on")]
    assert sizes == [(48, 40), (48, 40), (40, 48)]
    with pytest.raises(ValueError, match="exif must be 'auto', 'on' or 'off', not 'yes'"):
        open_webdataset(path, exif="yes")
