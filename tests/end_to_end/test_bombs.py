"""Small files that would fill the memory, refused with little of it by everything that opens pictures."""

from __future__ import annotations

import gc
import gzip
import io
import re
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from taming.config import build_config
from taming.data.channels import read_pixels
from taming.data.checking.check import check_source
from taming.data.config import FolderDataConfig
from taming.data.dataset import open_dataset
from taming.data.picture import FileBytes, read_depth, read_labels, read_picture, read_size
from taming.errors import BadSample, DataError
from tests.conftest import vq_values
from tests.end_to_end.strangers import write
from tests.end_to_end.test_command_line import ENVIRONMENT, refused
from tests.taming.data.picture_files import COLOUR, GREY, bmp, gif, png, png_chunk, tiff

LIMIT = 100 * 2**20
SIDE = 2**15  # squared: a gigapixel


def squeezed_zeros(size: int, times: int) -> bytes:
    """zlib's form of size * times zeros, made of one piece that is repeated."""
    squeeze = zlib.compressobj(9, wbits=-15)
    piece = squeeze.compress(bytes(size)) + squeeze.flush(zlib.Z_FULL_FLUSH)
    checksum = (size * times % 65521) << 16 | 1  # Adler-32 of zeros
    return b"\x78\xda" + piece * times + b"\x03\x00" + struct.pack(">I", checksum)


def gigapixel_png() -> bytes:
    """A whole and right PNG of SIDE x SIDE black pixels of one bit."""
    header = struct.pack(">IIBBBBB", SIDE, SIDE, 1, GREY, 0, 0, 0)
    data = squeezed_zeros((1 + SIDE // 8) * 64, SIDE // 64)
    chunks = (png_chunk(b"IHDR", header), png_chunk(b"IDAT", data), png_chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def large_jpeg() -> bytes:
    """A JPEG whose header says 65500 x 65500."""
    out = io.BytesIO()
    Image.new("RGB", (8, 8)).save(out, "JPEG")
    data = out.getvalue()
    place = data.index(b"\xff\xc0") + 5
    return data[:place] + struct.pack(">HH", 65500, 65500) + data[place + 4 :]


def large_webp() -> bytes:
    """An animation of small frames on a canvas of SIDE x SIDE."""
    out = io.BytesIO()
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(out, "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    data, side = out.getvalue(), (SIDE - 1).to_bytes(3, "little")
    place = data.index(b"VP8X") + 12
    return data[:place] + side + side + data[place + 6 :]


def bombs() -> dict[str, bytes]:
    """Each says that it has more pixels than are allowed, most of them a billion."""
    dot = np.zeros((1, 1), np.int64)
    return {
        "whole.png": gigapixel_png(),
        "header.png": png(np.zeros((1, 1, 3), np.uint8), COLOUR, size=(SIDE, SIDE)),
        "deflated.tif": tiff(
            [zlib.compress(b"\0" * 99)], SIDE, SIDE, bits=[8], photometric=1, tags={259: ("H", [8])}
        ),
        "striped.tif": tiff([b"\0"], 2**31, 2**31, bits=[8], photometric=1),
        "canvas.gif": gif(65535, 65535, [(0, 0, 0)], [(0, 0, dot)]),
        "runs.bmp": bmp(SIDE, SIDE, 8, b"\0\1", compression=1, palette=[(0, 0, 0)]),
        "grey.pgm": f"P5 {SIDE} {SIDE} 255\n".encode() + b"\0" * 99,
        "bits.pbm": f"P4 {SIDE} {SIDE}\n".encode() + b"\0" * 99,
        "photo.jpg": large_jpeg(),
        "canvas.webp": large_webp(),
    }


def text_bombs() -> dict[str, bytes]:
    """Few pixels, and 200 MiB beside them."""
    dot = np.full((2, 2, 3), 7, np.uint8)
    squeezed = squeezed_zeros(2**20, 200)
    piece = zlib.compress(bytes(2**20 - 1))
    many = [(b"zTXt", b"k%d\0\0" % n + piece) for n in range(200)]
    return {
        "zTXt.png": png(dot, COLOUR, before=[(b"zTXt", b"k\0\0" + squeezed)]),
        "iTXt.png": png(dot, COLOUR, before=[(b"iTXt", b"k\0\1\0\0\0" + squeezed)]),
        "iCCP.png": png(dot, COLOUR, before=[(b"iCCP", b"k\0\0" + squeezed)]),
        "many.png": png(dot, COLOUR, before=many),
        "tags.tif": tiff([bytes(12)], 2, 2, tags={320: ("H", [0] * 9), 700: ("L", [1])}).replace(
            struct.pack("<HHL", 320, 3, 9), struct.pack("<HHL", 320, 3, 2**31 - 1)
        ),
        "tile.tif": tiff([bytes(12)], 2, 2, tile=(2**16, 2**15)),
    }


def status(name: str) -> int:
    """Bytes of a line in /proc/self/status."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def extra_memory(run: Callable[[], object]) -> int:
    """By how much the memory of this process grew at most while `run` ran, in bytes."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
    except OSError:
        pytest.skip("the peak of memory cannot be measured here")
    gc.collect()
    before = status("VmRSS")
    run()
    return status("VmHWM") - before


def test_memory_is_measured() -> None:
    assert extra_memory(lambda: b"x" * 2**27) > 2**26
    assert extra_memory(lambda: None) < 2**24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bombs")
    for name, data in {**bombs(), **text_bombs()}.items():
        write(root / name / name, data)
        assert len(data) < 600_000
    return root


def test_the_bombs_are_real(folder: Path) -> None:
    assert zlib.decompress(squeezed_zeros(2**10, 3)) == bytes(3 * 2**10)
    with pytest.raises(Image.DecompressionBombError):
        Image.open(folder / "whole.png" / "whole.png")


def readings(path: Path) -> Iterator[Callable[[], Any]]:
    """All ways in which a picture is opened."""
    yield lambda: read_picture(path)
    yield lambda: read_picture(path, at_least=(8, 8), mode="RGBA")
    yield lambda: read_picture(FileBytes(path.name, path.read_bytes()))
    yield lambda: read_pixels(path, 1)
    yield lambda: read_labels(path)
    yield lambda: read_depth(path)
    yield lambda: read_size(path)


@pytest.mark.parametrize("name", list(bombs()))
def test_too_many_pixels_are_refused_by_the_header(folder: Path, name: str) -> None:
    path = folder / name / name

    def read() -> None:
        for reading in readings(path):
            with pytest.raises(BadSample) as caught:
                reading()
            assert caught.value.reason == "too large"
        with pytest.raises(DataError, match="max_pixels"):
            open_dataset(build_config(FolderDataConfig, {"root": path.parent, "size": 16}), "train")
        assert [finding.reason for finding in check_source(str(path.parent))] == ["too large"]

    assert extra_memory(read) < LIMIT


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", list(text_bombs()))
def test_what_lies_beside_the_pixels_is_not_unpacked(folder: Path, name: str) -> None:
    path = folder / name / name

    def read() -> None:
        for reading in list(readings(path))[::3]:
            with suppress(BadSample):
                reading()
            gc.collect()  # what the error before still holds is not this reading's
        list(check_source(str(path.parent)))

    assert extra_memory(read) < LIMIT


def test_a_limit_that_a_user_raised_is_kept(folder: Path) -> None:
    path = folder / "header.png" / "header.png"
    assert read_size(path, max_pixels=2**31) == (SIDE, SIDE)
    config = build_config(FolderDataConfig, {"root": path.parent, "max_pixels": 99, "size": 1})
    with pytest.raises(DataError, match="max_pixels = 99"):
        open_dataset(config, "train")


def test_packed_tars_are_not_unpacked(tmp_path: Path) -> None:
    zeros = gzip.compress(bytes(2**20)) * 200
    for name in ("a.tar", "b.tar.gz"):
        write(tmp_path / name, zeros)

    def read() -> None:
        assert [finding.reason for finding in check_source(str(tmp_path))] == ["unreadable"]
        assert "no data at" in refused("data", "check", tmp_path / "b.tar.gz")
        assert "a.tar" in refused("data", "index", tmp_path)

    assert extra_memory(read) < LIMIT


def compressed(data: bytes) -> bytes:
    """The same archive with its parts deflated."""
    out = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(data)) as parts,
        zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive,
    ):
        for part in parts.infolist():
            archive.writestr(part.filename, parts.read(part))
    return out.getvalue()


def deflated(path: Path, size: int) -> Path:
    """Weights of `size` bytes in a thousandth of that."""
    zeros = io.BytesIO()
    torch.save({"decoder.conv_blocks.0.x": torch.zeros(size, dtype=torch.uint8)}, zeros)
    return write(path, compressed(zeros.getvalue()))


def test_weights_are_not_unpacked_or_repeated(tmp_path: Path) -> None:
    squeezed = deflated(tmp_path / "deflated.pt", 2**20)
    repeated = write(tmp_path / "repeated.pt", b"")
    torch.save({"decoder.conv_blocks.0.x": torch.zeros(1, dtype=torch.half).expand(2**20, 2**12)}, repeated)

    def read() -> None:
        for path, said in ((squeezed, "compressed archive"), (repeated, "fewer numbers")):
            assert said in refused("vq", "import", "llamagen", path, "--out", tmp_path / "out")

    refused("vq", "import", "llamagen", tmp_path, "--out", tmp_path / "out")  # commands import what they need
    assert extra_memory(read) < LIMIT


@pytest.mark.slow
def test_weights_of_metrics_are_not_unpacked(tmp_path: Path, models: Path) -> None:
    squeezed = deflated(tmp_path / "deflated.pt", 2 * LIMIT)
    none = write(tmp_path / "none.pt", b"nothing")

    def read(weights: Path, said: str) -> None:
        for options in (("--lpips", "--vgg-weights"), ("--fid", "--inception-weights")):
            assert said in refused("vq", "eval", models / "vq", "scenes", *options, weights)

    read(none, "cannot be read")
    assert extra_memory(lambda: read(squeezed, "compressed archive")) < LIMIT


def commands(bomb: Path, models: Path, work: Path) -> list[list[object]]:
    config = write(work / "c.yaml", vq_values(data={"kind": "folder", "root": str(bomb.parent), "size": 16}))
    out = ["--out", work / "out"]
    return [
        ["vq", "reconstruct", models / "vq", bomb.parent, *out],
        ["vq", "encode", models / "vq", bomb.parent, *out],
        ["vq", "eval", models / "vq", bomb.parent, *out],
        ["vq", "train", config, "-o", f"training.output={work / 'run'}"],
        ["ar", "sample", models / "depth", "--depth", bomb, *out],
        *(["ar", "sample", models / "ar", "--class", 1, way, bomb, *rest, *out] for way, *rest in EDITS),
    ]


EDITS = (["--complete"], ["--outpaint", "--size", "16x16"], ["--variations"])


def test_commands_refuse_bombs(folder: Path, models: Path, tmp_path: Path) -> None:
    none = write(tmp_path / "none" / "none.png", b"no picture")

    def run(picture: Path = folder / "whole.png" / "whole.png") -> None:
        for arguments in commands(picture, models, tmp_path):
            assert picture.name in refused(*arguments)

    run(none)  # commands import what they need
    assert extra_memory(run) < LIMIT


@pytest.mark.slow
def test_commands_refuse_bombs_in_processes_of_their_own(folder: Path, models: Path, tmp_path: Path) -> None:
    """Peak memory with a bomb and with a file that is no picture: what the bomb adds."""
    none = write(tmp_path / "none" / "none.png", b"no picture")
    script = (
        "import resource, sys\nfrom taming.cli import main\n"
        "try:\n    main()\nfinally:\n    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )

    def peak(arguments: list[object]) -> int:
        command = [sys.executable, "-c", script, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False)
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr
        return int(done.stdout.split()[-1]) * 1024

    bomb = folder / "whole.png" / "whole.png"
    for number in (0, 3, 5):  # reconstruct, train, sample
        with_bomb, without = (commands(path, models, tmp_path)[number] for path in (bomb, none))
        assert peak(with_bomb) - peak(without) < LIMIT, with_bomb
