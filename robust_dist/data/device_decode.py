"""JPEGs decoded on the device: workers read files and inspect headers; the device decodes, crops and resizes.

The CPU handles everything else: other formats, JPEGs that are turned, truncated or neither grey nor YCbCr, and those
the device rejects. Order, cuts, keys and crop boxes are the same as on the CPU.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from io import BytesIO
from typing import Any, NamedTuple, cast

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from robust_dist.data.batches import Pack, Request
from robust_dist.data.decode import CentralCrop, RandomCrop, decode_rgb, header, is_turned, resized_size
from robust_dist.data.errors import BadImage, BadImageError
from robust_dist.data.reading import ImageReader, filled, room
from robust_dist.data.source import Upright

# Whole files, uint8 [bytes] on the CPU, to RGB images, uint8 [3, H, W] on the device; RuntimeError for a bad one.
Decode = Callable[[list[Tensor]], list[Tensor]]


def decoder(choice: str, device: torch.device) -> Decode | None:
    """The JPEG decoder on `device` for a recipe's `data.decode`; None if the CPU decodes.

    Raises:
        ValueError: "cuda" is set and the device cannot decode; says why.
    """
    if choice not in ("cuda", "auto"):
        return None
    why = why_not(device)
    if why is None:
        return _on(device)
    if choice == "cuda":
        raise ValueError(f"data.decode={choice!r} is not available: {why}; set data.decode to exact, fast or auto")
    return None


def _on(device: torch.device) -> Decode:
    from torchvision.io import ImageReadMode, decode_jpeg

    def decode(files: list[Tensor]) -> list[Tensor]:
        with warnings.catch_warnings():
            # torchvision 0.29 announces that TorchCodec will replace its decoders.
            warnings.simplefilter("ignore", DeprecationWarning)
            return cast(list[Tensor], decode_jpeg(files, mode=ImageReadMode.RGB, device=device))

    return decode


def why_not(device: torch.device) -> str | None:
    """Why JPEGs cannot be decoded on the device; None if a trial worked."""
    if device.type != "cuda":
        return f"the images' device is {device}"
    file = BytesIO()
    Image.new("RGB", (16, 16)).save(file, "JPEG")
    try:
        _on(device)([torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)])
    except ImportError:
        return "torchvision is not installed"
    except Exception as error:  # torchvision without nvJPEG raises various errors.
        return f"torchvision cannot decode JPEGs there ({error})"
    return None


class Encoded(NamedTuple):
    """One micro-batch whose JPEGs are still to be decoded.

    Attributes:
        images: uint8 [b, 3, size, size], zero in the JPEGs' slots.
        labels: int64 [b].
        bad: the slots and images that could not be read.
        slots: slots of the JPEGs.
        files: their bytes, concatenated, uint8.
        sizes: number of bytes of each.
    """

    images: Tensor
    labels: Tensor
    bad: tuple[tuple[int, BadImage], ...]
    slots: tuple[int, ...]
    files: Tensor
    sizes: tuple[int, ...]


class EncodedReader(Dataset[Encoded]):
    """Reads like `reader` in a worker, but leaves JPEGs encoded that a device will decode."""

    def __init__(self, reader: ImageReader) -> None:
        self.reader = reader

    def __getitem__(self, request: tuple[list[int], list[int]]) -> Encoded:
        """Read the images of the indices, and crop by key those that are decoded here."""
        reader, (indices, keys) = self.reader, request
        images = room(len(indices), reader.size)
        labels = torch.zeros(len(indices), dtype=torch.int64)
        bad: dict[int, BadImage] = {}
        files: dict[int, bytes] = {}
        for slot, (index, key) in enumerate(zip(indices, keys, strict=True)):
            try:
                data, label = reader.read(index)
                if is_for_devices(data):
                    files[slot] = data
                else:
                    images[slot] = reader.crop(decode_rgb(data), key)
                labels[slot] = label
            except BadImageError as error:
                bad[slot] = BadImage(reader.source.where(index), str(error))
        joined = torch.frombuffer(bytearray(b"".join(files.values())) or bytearray(1), dtype=torch.uint8)
        return Encoded(images, labels, tuple(bad.items()), tuple(files), joined, tuple(map(len, files.values())))


def is_for_devices(data: bytes) -> bool:
    """Whether a file is a complete, upright, grey or YCbCr JPEG, judging by its header and end."""
    if data[:2] != b"\xff\xd8" or b"\xff\xd9" not in data[-64:]:
        return False
    try:
        image = header(data)
    except BadImageError:
        return False
    plain = image.format == "JPEG" and image.mode in ("RGB", "L") and image.info.get("adobe_transform") != 0
    return plain and not (isinstance(data, Upright) and is_turned(data))


class DeviceReader:
    """Yields packs on the device, decoded there.

    Args:
        workers: reads `Encoded` micro-batches.
        reader: the workers' reader, for images left to the CPU.
        decode: the decoder.
        device: where the packs lie.
    """

    def __init__(self, workers: Any, reader: ImageReader, decode: Decode, device: torch.device) -> None:
        self.workers, self.reader, self.decode, self.device = workers, reader, decode, device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def read(self, requests: Iterator[Request]) -> Iterator[tuple[Request, Pack]]:
        """See `Reader.read`."""
        for request, encoded in self.workers.read(requests):
            yield request, self._pack(request, encoded)

    def close(self) -> None:
        """End the workers."""
        self.workers.close()

    def _pack(self, request: Request, encoded: Encoded) -> Pack:
        # A stream of its own: decoding then waits only for itself, not for the step that runs meanwhile.
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            pack = self._decoded(request, encoded)
        if self._stream is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self._stream)
            pack.images.record_stream(current)
        return pack

    def _decoded(self, request: Request, encoded: Encoded) -> Pack:
        images, bad = encoded.images.to(self.device, non_blocking=True), dict(encoded.bad)
        files = list(encoded.files.split(list(encoded.sizes))) if encoded.slots else []
        for slot, file, image in zip(encoded.slots, files, self._images(files), strict=True):
            index, key = int(request.indices[slot]), int(request.keys[slot])
            try:
                images[slot] = self._by_cpu(file, key) if image is None else cropped(image, self.reader.crop, key)
            except BadImageError as error:
                bad[slot] = BadImage(self.reader.source.where(index), str(error))
                encoded.labels[slot] = 0
        return filled(images, encoded.labels, bad, self.reader.block)

    def _images(self, files: list[Tensor]) -> list[Tensor | None]:
        """The decoded images; None for one that the device rejects. One bad file fails the call but not the others."""
        if not files:
            return []
        try:
            return list(self.decode(files))
        except RuntimeError:
            return [None] if len(files) == 1 else [image for file in files for image in self._images([file])]

    def _by_cpu(self, file: Tensor, key: int) -> Tensor:
        return self.reader.crop(decode_rgb(file.numpy().tobytes()), key)


def cropped(image: Tensor, crop: Any, key: int) -> Tensor:
    """`crop` applied to an image with torch operations on the image's device, with the same box.

    Pillow rounds between its horizontal and vertical passes, so levels differ by at most one, rarely two.

    Args:
        image: uint8 [3, H, W].
        crop: `RandomCrop` or `CentralCrop`.
        key: the sample's.
    """
    height, width = image.shape[1:]
    if isinstance(crop, RandomCrop):
        left, top, right, bottom = map(int, crop.window(width, height, key).box)
        return _resized(image[:, top:bottom, left:right], crop.size, crop.size)
    assert isinstance(crop, CentralCrop)
    wide, high = resized_size(width, height, crop.resize)
    left, top = round((wide - crop.size) / 2), round((high - crop.size) / 2)
    return _resized(image, high, wide)[:, top : top + crop.size, left : left + crop.size]


def _resized(image: Tensor, height: int, width: int) -> Tensor:
    """Resize by the bilinear filter, which averages when shrinking."""
    options: dict[str, Any] = {"mode": "bilinear", "align_corners": False, "antialias": True}
    scaled = torch.nn.functional.interpolate(image.unsqueeze(0).float(), (height, width), **options)
    return scaled.round_().clamp_(0, 255).to(torch.uint8).squeeze(0)
