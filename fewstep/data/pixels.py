"""Image bytes to square RGB pixels, and the cache that makes every image be decoded only once.

Knows nothing of captions; `folder.py` says which images there are.
"""

import errno
import io
import json
import os
import shutil
import struct
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL
from PIL import Image, ImageOps

from fewstep.data.rows import Row
from fewstep.errors import FULL, DataError, DiskError, refuse

Progress = Callable[[int, int | None], None]
"""Called with (done, in all); the latter is None while shards are read for the first time."""

CACHE_VERSION = 1
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
# What Pillow's decoders raise on broken files; test_folder.py fuzzes them.
UNREADABLE = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    struct.error,
    Image.DecompressionBombError,
)


class RawImage(NamedTuple):
    file: str
    where: str
    """The first row that uses it."""
    content: bytes


ImageSource = Callable[[list[Row], list[str]], Iterator[RawImage]]
"""Yields every image once; may append rows (shards carry them) and problems on the way."""


def read_rgb(content: bytes) -> tuple[Image.Image, str]:
    """The upright RGB image and, if that took a conversion, what was done in words.

    Transparent pixels are laid on white, 16-bit grey is divided by 257, an animation gives its
    first frame. Colour profiles are not applied.
    """
    image: Image.Image = Image.open(io.BytesIO(content), formats=IMAGE_FORMATS)
    image.load()
    image = ImageOps.exif_transpose(image)
    mode = image.mode
    if mode == "F":
        raise ValueError("floating-point pixels; save it with 8 or 16 bits")
    if mode.startswith("I"):
        grey = np.asarray(image).astype(np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            raise ValueError("32-bit pixels; save it with 8 or 16 bits")
        grey = ((grey * 255 + 32767) // 65535).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB"), "16-bit grey and reduced to 8 bits"
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image).convert("RGB")
        return image, "transparent and laid on white"
    if mode == "RGB":
        return image, ""
    return image.convert("RGB"), f"{mode} and converted to RGB"


def crop_and_resize(image: Image.Image, image_size: int) -> Image.Image:
    """The largest centred square, scaled with Lanczos."""
    return ImageOps.fit(image, (image_size, image_size), Image.Resampling.LANCZOS)


@dataclass(frozen=True, eq=False)
class PixelCache:
    """`pixels.u8` and `index.json` in a folder named by the hash of what they depend on."""

    pixels: np.ndarray
    index: dict[str, Any]
    rebuilt: str = ""

    @classmethod
    def get(
        cls,
        cache_dir: Path,
        path: Path,
        image_size: int,
        *,
        listing: list[list[Any]],
        images: ImageSource,
        count: int | None,
        progress: Progress | None,
    ) -> "PixelCache":
        """Reuse it if `listing` (name, size and times of each file) is as it was, else build it."""
        recipe = [CACHE_VERSION, PIL.__version__, image_size, str(path.resolve()), listing]
        key = blake2b(json.dumps(recipe).encode(), digest_size=16).hexdigest()
        folder = cache_dir / f"pixels-{image_size}-{key}"
        rebuilt = ""
        if folder.exists():
            loaded = cls._load(folder, image_size)
            if loaded is not None:
                return loaded
            rebuilt = f"the pixel cache {folder.name} was damaged and has been built again"
            shutil.rmtree(folder)
        with writing(cache_dir), _building(cache_dir) as building:
            index = _build(path, building, image_size, images, count, progress)
            with open(building / "index.json", "w") as out:
                json.dump(index, out)
                out.flush()
                os.fsync(out.fileno())
            if not folder.exists():  # another process may have been faster, with the same content
                building.rename(folder)
        loaded = cls._load(folder, image_size)
        assert loaded is not None, folder
        return cls(loaded.pixels, loaded.index, rebuilt)

    @classmethod
    def _load(cls, folder: Path, image_size: int) -> "PixelCache | None":
        try:
            index = json.loads((folder / "index.json").read_bytes())
            shape = (len(index["files"]), image_size, image_size, 3)
            if (folder / "pixels.u8").stat().st_size != np.prod(shape):
                return None
        except (OSError, ValueError):
            return None
        if shape[0] == 0:
            return cls(np.empty(shape, np.uint8), index)
        return cls(np.memmap(folder / "pixels.u8", np.uint8, "r", shape=shape), index)

    def notices(self, image_size: int) -> Iterator[str]:
        total = len(self.index["files"])
        if self.rebuilt:
            yield self.rebuilt
        if self.index["upscaled"]:
            yield (
                f"{self.index['upscaled']} of {total} images are smaller than "
                f"{image_size}x{image_size} and were enlarged"
            )
        for what, count in sorted(self.index["converted"].items()):
            yield f"{count} of {total} images were {what}"


@contextmanager
def _building(cache_dir: Path) -> Iterator[Path]:
    building = Path(tempfile.mkdtemp(dir=cache_dir, prefix=".building-"))
    try:
        yield building
    finally:
        if building.exists():
            shutil.rmtree(building)


def _build(
    path: Path,
    folder: Path,
    image_size: int,
    images: ImageSource,
    count: int | None,
    progress: Progress | None,
) -> dict[str, Any]:
    """Decode each image once, straight into `pixels.u8`; all that cannot be read is listed."""
    rows: list[Row] = []
    problems: list[str] = []
    files, file_digests, pixel_digests = [], [], []
    upscaled, converted = 0, Counter[str]()
    with open(folder / "pixels.u8", "wb") as out:
        for file, where, content in images(rows, problems):
            try:
                image, conversion = read_rgb(content)
            except UNREADABLE as error:
                problems.append(f"{where}: {file} cannot be read ({_reason(error)})")
                continue
            upscaled += min(image.size) < image_size
            converted.update([conversion] if conversion else [])
            pixels = np.asarray(crop_and_resize(image, image_size)).tobytes()
            out.write(pixels)
            files.append(file)
            file_digests.append(blake2b(content, digest_size=16).hexdigest())
            pixel_digests.append(blake2b(pixels, digest_size=16).hexdigest())
            if progress is not None:
                progress(len(files), count)
        out.flush()
        os.fsync(out.fileno())
    refuse(path, problems)
    return {
        "files": files,
        "file_digests": file_digests,
        "pixel_digests": pixel_digests,
        "upscaled": upscaled,
        "converted": dict(converted),
        "rows": rows,
    }


def _reason(error: Exception) -> str:
    if isinstance(error, PIL.UnidentifiedImageError):
        known = ", ".join(IMAGE_FORMATS)
        return f"no image, or damaged; {known} can be read. Replace the file or remove its rows"
    reason = str(error) or type(error).__name__
    return reason if ";" in reason else f"{reason}; replace the file or remove its rows"


@contextmanager
def writing(cache_dir: Path) -> Iterator[None]:
    """Make the folder, and turn a full disk or a forbidden place into a message."""
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        if error.errno in FULL:
            free = shutil.disk_usage(cache_dir).free / 1e6
            raise DiskError(
                f"no room for the cache in {cache_dir} ({error.strerror}; {free:.0f} MB free); "
                f"free some or choose another cache folder. No half-written file was kept"
            ) from None
        if error.errno in (errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EPERM):
            raise DataError(
                f"cannot write the cache in {cache_dir} ({error.strerror}); "
                f"choose another cache folder"
            ) from None
        raise


def write_atomically(file: Path, content: bytes) -> None:
    """The whole file or none of it, also after a crash."""
    with writing(file.parent):
        handle, name = tempfile.mkstemp(dir=file.parent, prefix=".writing-")
        try:
            with os.fdopen(handle, "wb") as out:
                out.write(content)
                out.flush()
                os.fsync(out.fileno())
            os.replace(name, file)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
