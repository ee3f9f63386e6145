"""Tiny image sets in every format that the sources read, created on the spot, and unusual or bad images.

Every set is built from a list of labels: sample i is `encoded(i, labels[i])`, so two formats of the same labels contain
the same images. Class c of a set is called `CLASSES[c]`.
"""

import io
import itertools
import json
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("ant", "bee", "cat", "dog", "elk", "fox", "gnu", "hen", "ibex", "jay")
HUES = ((220, 40, 40), (40, 200, 60), (50, 70, 220), (210, 200, 50), (200, 60, 200))


def picture(index, label, width=48, height=40):
    """A PIL image, RGB, that differs from sample to sample; its hue encodes the label, so that a model can learn it."""
    rng = np.random.default_rng([index, label])
    slope = np.linspace(0.6, 1.0, width)[None, :, None] * np.linspace(1.0, 0.7, height)[:, None, None]
    noise = rng.integers(-20, 21, (height, width, 1))
    pixels = np.array(HUES[label % len(HUES)]) * slope / (1 + label // len(HUES)) + noise
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def encode(image, format="JPEG", **options):
    """A PIL image as a file's bytes."""
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def encoded(index, label, format="JPEG"):
    """Sample `index` of a set as a file's bytes."""
    return encode(picture(index, label), format)


def write_image_folder(folder, labels, classes=CLASSES):
    """`folder`/<class>/<index>.jpg; returns the folder. Classes without a label get no sub-folder."""
    for index, label in enumerate(labels):
        path = Path(folder, classes[label], f"{index:05d}.jpg")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(index, label))
    return Path(folder)


def write_parquet(folder, labels, split="train", *, files=2, group=4, classes=CLASSES, names=("image", "label")):
    """`folder`/data/<split>-0000x-of-0000y.parquet as the Hub lays them out; returns the folder.

    The rows of the set lie in order, in `files` files of row groups of at most `group` rows. With classes=None the
    labels are plain integers and no feature tells their names.
    """
    from datasets import ClassLabel, Dataset, Features, Value
    from datasets import Image as ImageFeature

    label_type = Value("int64") if classes is None else ClassLabel(names=list(classes))
    features = Features({names[0]: ImageFeature(), names[1]: label_type})
    rows = [{"bytes": encoded(i, label), "path": f"{i:05d}.jpg"} for i, label in enumerate(labels)]
    folder = Path(folder)
    (folder / "data").mkdir(parents=True, exist_ok=True)
    bounds = [round(k * len(labels) / files) for k in range(files + 1)]
    for number, (low, high) in enumerate(itertools.pairwise(bounds)):
        part = Dataset.from_dict({names[0]: rows[low:high], names[1]: list(labels[low:high])}, features=features)
        write_arrow(part, folder / "data" / f"{split}-{number:05d}-of-{files:05d}.parquet", group)
    return folder


def write_arrow(dataset, path, group):
    """One parquet file of a `datasets.Dataset` in row groups of `group` rows, with its features in the metadata."""
    import pyarrow.parquet as pq

    pq.write_table(dataset.data.table.replace_schema_metadata(metadata(dataset)), path, row_group_size=group)


def metadata(dataset):
    """The schema metadata by which `datasets` recognises the features."""
    return {"huggingface": json.dumps({"info": {"features": dataset.features.to_dict()}})}


def write_shards(folder, labels, *, per_shard=5, label_key="cls", format="JPEG", prefix="train"):
    """`folder`/<prefix>-00000x.tar with members <index>.<ext> and <index>.cls; returns the paths.

    A label_key with a dot, such as "json.label", writes <index>.json with the label under that key.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for start in range(0, len(labels), per_shard):
        paths.append(folder / f"{prefix}-{len(paths):06d}.tar")
        with tarfile.open(paths[-1], "w") as tar:
            for index in range(start, min(start + per_shard, len(labels))):
                extension = {"JPEG": "jpg"}.get(format, format.lower())
                add_member(tar, f"{index:05d}.{extension}", encoded(index, labels[index], format))
                add_label(tar, f"{index:05d}", labels[index], label_key)
    return paths


def add_label(tar, stem, label, label_key):
    """Add the label's member to an open tar file."""
    extension, _, key = label_key.partition(".")
    add_member(tar, f"{stem}.{extension}", (json.dumps({key: label}) if key else str(label)).encode())


def add_member(tar, name, content):
    """Add a file of these bytes to an open tar file."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def odd_images():
    """Name to (bytes, the PIL image in RGB that it must decode to, the largest difference that the encoding allows)."""
    rgb = picture(3, 1)
    grey = rgb.convert("L")
    wide = Image.fromarray(np.asarray(grey).astype(np.uint16) * 256 + 77)
    alpha = rgb.copy()
    alpha.putalpha(grey)
    palette = rgb.quantize(200)
    frames = [picture(i, 2) for i in range(3)]
    return {
        "grey.jpg": (encode(grey, quality=95), grey.convert("RGB"), 12),
        "grey.png": (encode(grey, "PNG"), grey.convert("RGB"), 0),
        "bilevel.png": (encode(grey.convert("1"), "PNG"), grey.convert("1").convert("RGB"), 0),
        "grey_alpha.png": (encode(alpha.convert("LA"), "PNG"), grey.convert("RGB"), 1),
        "16_bit.png": (encode(wide, "PNG"), grey.convert("RGB"), 0),
        "16_bit.tiff": (encode(wide, "TIFF"), grey.convert("RGB"), 0),
        "palette.png": (encode(palette, "PNG"), palette.convert("RGB"), 0),
        "palette_transparent.png": (encode(palette, "PNG", transparency=bytes(range(200))), palette.convert("RGB"), 0),
        "palette_one_transparent.gif": (encode(palette, "GIF", transparency=3), palette.convert("RGB"), 0),
        "alpha.png": (encode(alpha, "PNG"), rgb, 0),
        "alpha.webp": (encode(alpha, "WEBP", lossless=True, exact=True), rgb, 0),
        "cmyk.jpg": (encode(rgb.convert("CMYK"), quality=95), rgb, 12),
        "cmyk.tiff": (encode(rgb.convert("CMYK"), "TIFF"), rgb, 0),
        "animated.gif": (encode(frames[0], "GIF", save_all=True, append_images=frames[1:]), frames[0], 60),
        "animated.webp": (
            encode(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True),
            frames[0],
            0,
        ),
        "animated.png": (encode(frames[0], "PNG", save_all=True, append_images=frames[1:]), frames[0], 0),
        "turned_by_exif.jpg": (encode(rgb, quality=95, exif=_turned()), rgb, 12),
        "two_pictures.mpo": (encode(rgb, "MPO", save_all=True, append_images=frames[:1], quality=95), rgb, 12),
        "with_a_profile.png": (encode(rgb, "PNG", icc_profile=b"any profile" * 20), rgb, 0),
        "plain.bmp": (encode(rgb, "BMP"), rgb, 0),
        "plain.ppm": (encode(rgb, "PPM"), rgb, 0),
        "one_pixel.png": (encode(Image.new("RGB", (1, 1), (9, 8, 7)), "PNG"), Image.new("RGB", (1, 1), (9, 8, 7)), 0),
    }


def bad_images():
    """Name to bytes that no loader may accept as an image."""
    jpeg, png = encode(picture(0, 0, 200, 160)), encoded(0, 0, "PNG")
    broken = bytearray(png)
    broken[len(png) // 2] ^= 0xFF
    return {
        "zero_bytes.jpg": b"",
        "truncated.jpg": jpeg[: len(jpeg) * 2 // 3],
        "truncated.png": png[: len(png) // 2],
        "truncated.gif": encoded(0, 0, "GIF")[:2000],
        "truncated.webp": encoded(0, 0, "WEBP")[:-100],
        "truncated.bmp": encoded(0, 0, "BMP")[:-100],
        "truncated.tiff": encoded(0, 0, "TIFF")[:-100],
        "header_only.jpg": jpeg[:20],
        "corrupt.png": bytes(broken),
        "text.jpg": b"<html>404 Not Found</html>",
        "bomb.png": _bomb(),
        "floats.tiff": encode(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"),
    }


def turned_image(orientation=6, format="JPEG"):
    """A file of 48 x 40 pixels with an EXIF tag: 6 makes it 40 x 48."""
    return encode(picture(3, 1), format, exif=_turned(orientation))


def _turned(orientation=6):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def _bomb():
    """A small PNG whose header claims 20,000 x 20,000 pixels."""
    png = encode(Image.new("1", (1, 1)), "PNG")
    header = b"IHDR" + struct.pack(">II", 20_000, 20_000) + png[24:29]
    return png[:12] + header + struct.pack(">I", zlib.crc32(header)) + png[33:]
