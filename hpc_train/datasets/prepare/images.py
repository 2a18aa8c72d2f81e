"""Folders of pictures, one folder for each class, as uint8 of one size."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from pathlib import Path

import numpy as np

from hpc_train.core.errors import UserError
from hpc_train.datasets.prepare.origin import files_below, folders_in, is_folder, require_file
from hpc_train.datasets.prepare.sources import Array, Options, Source, in_memory, state_of
from hpc_train.train.comm.context import Context

_ENDINGS = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
# Not any format that Pillow finds in a file with such a name: it would run Ghostscript on PostScript.
_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
_SIZE = 224  # pixels: what ImageNet's networks take
_TEST_SHARE = 0.1
_MAX_LISTED = 5  # damaged pictures in one message
_LAYOUT = "Lay them out as DIR/CLASS/picture.jpg, or DIR/train/CLASS/... and DIR/test/CLASS/..."


@dataclass(frozen=True)
class Picture:
    """A file, the number of its class, and its name below the folder: the name's hash decides its order and part."""

    path: Path
    label: int
    name: str

    @property
    def hashed(self) -> int:
        """0 to 2**64 - 1, of the name alone: the same on any machine."""
        return int.from_bytes(blake2b(self.name.encode(errors="surrogateescape"), digest_size=8).digest(), "big")


def source(folder: Path, options: Options, context: Context) -> Source:
    """Collective. The pictures below `folder` as (n, size, size, 3) uint8, and their classes as int64.

    Each picture is scaled so that its shorter side is `size`, and cropped to its centre. The hashes of their names give
    the order, so that neighbours are of many classes. Raises `UserError`.
    """
    context.on_all(_require_pillow)
    size = _SIZE if options.size is None else options.size
    classes, parts = context.on_root(lambda: find(folder, options.test_fraction))
    arrays, fingerprint = {}, blake2b(digest_size=16)
    for part, pictures in parts.items():
        shape = (len(pictures), size, size, 3)
        arrays[f"{part}/inputs"] = Array(shape, np.dtype(np.uint8), partial(_read, pictures, size))
        arrays[f"{part}/targets"] = in_memory(np.array([each.label for each in pictures], np.int64))
        fingerprint.update("\0".join([part, *(each.name for each in pictures)]).encode(errors="surrogateescape"))
    state = context.on_root(lambda: state_of(each.path for pictures in parts.values() for each in pictures))
    facts = {"classes": classes, "num_classes": len(classes), "fingerprint": fingerprint.hexdigest()}
    title = f"Pictures of {len(classes)} classes, {size} by {size}"
    return Source(title, str(folder), "see its source", arrays, facts, "pictures", state)


def _require_pillow() -> None:
    try:
        import PIL  # noqa: F401
    except ImportError:
        raise UserError("prepare images needs Pillow, which cannot be found", "pip install pillow") from None


def find(folder: Path, test_fraction: float | None) -> tuple[list[str], dict[str, list[Picture]]]:
    """(class names in the order of their numbers, pictures of each part): by folders train and test, else by hash."""
    if not is_folder(folder):
        raise UserError(f"--from {folder} is no folder", _LAYOUT)
    has_parts = is_folder(folder / "train") and is_folder(folder / "test")
    if has_parts and test_fraction is not None:
        raise UserError(
            f"--test-fraction {test_fraction}: {folder} has folders train and test", "Leave it out: they are the parts."
        )
    roots = {part: folder / part for part in ("train", "test")} if has_parts else {"": folder}
    classes = sorted({each.name for root in roots.values() for each in folders_in(root)})
    if len(classes) < 2:
        raise UserError(f"--from {folder} has {len(classes)} folders of a class, and two are needed", _LAYOUT)
    found = {part: _below(root, classes) for part, root in roots.items()}
    if not has_parts:
        share = _TEST_SHARE if test_fraction is None else test_fraction
        pictures = found[""]
        num_test = min(max(1, round(share * len(pictures))), len(pictures) - 1) if share else 0
        found = {"train": pictures[num_test:], "test": pictures[:num_test]}
    if not found["train"]:
        raise UserError(f"--from {folder} holds no pictures ({' '.join(sorted(_ENDINGS))})", _LAYOUT)
    return classes, found


def _below(root: Path, classes: list[str]) -> list[Picture]:
    """In the order of their hashes."""
    pictures = []
    for label, name in enumerate(classes):
        for path in files_below(root / name, hidden=True) if is_folder(root / name) else ():
            if path.suffix.lower() in _ENDINGS and not path.name.startswith("."):
                require_file(path, "Repair or remove it, and try again.")
                pictures.append(Picture(path, label, path.relative_to(root).as_posix()))
    return sorted(pictures, key=lambda each: (each.hashed, each.name))


def _read(pictures: Sequence[Picture], size: int, start: int, stop: int) -> np.ndarray:
    rows = np.empty((stop - start, size, size, 3), np.uint8)
    damaged = []
    for row, picture in zip(rows, pictures[start:stop], strict=True):
        try:
            row[:] = decoded(picture.path, size)
        except Exception as error:  # noqa: BLE001  Pillow raises any error for a damaged picture
            damaged.append(f"{picture.path} ({getattr(error, 'strerror', None) or error or type(error).__name__})")
    if damaged:
        more = f" and {len(damaged) - _MAX_LISTED} more" if len(damaged) > _MAX_LISTED else ""
        listed = ", ".join(damaged[:_MAX_LISTED])
        raise UserError(f"damaged pictures: {listed}{more}", "Repair or remove them, and try again.")
    return rows


def decoded(path: Path, size: int) -> np.ndarray:
    """(size, size, 3) uint8: upright, in RGB, the shorter side scaled to `size`, cropped to the centre."""
    from PIL import Image, ImageOps

    with Image.open(path, formats=_FORMATS) as opened:
        opened.draft("RGB", (size, size))  # decodes a large JPEG at 1/2, 1/4 or 1/8, never below `size`
        upright = ImageOps.exif_transpose(opened)
        return np.asarray(
            ImageOps.fit(upright.convert("RGB"), (size, size), Image.Resampling.BILINEAR, centering=(0.5, 0.5))
        )
