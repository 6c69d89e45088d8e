"""Pictures as the world has them, each with pixels that are known without our reader, or with its fault."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image, ImageCms

from tests.taming.data.picture_files import (
    COLOUR,
    COLOUR_ALPHA,
    GREY,
    GREY_ALPHA,
    PALETTE,
    bmp,
    gif,
    png,
    png_chunk,
    tiff,
    without_segment,
)

RANDOM = np.random.default_rng(0)
RGB = RANDOM.integers(0, 256, (5, 7, 3), dtype=np.uint8)
DEEP = RANDOM.integers(0, 65536, (5, 7, 3), dtype=np.uint16)
SHADES = RANDOM.integers(0, 256, (5, 7), dtype=np.uint8)
BLOCKS = np.repeat(np.repeat(RGB[:2, :3] // 2 + 64, 16, axis=0), 16, axis=1)
"""(32, 48, 3): blocks of one colour each, which a JPEG keeps."""
COLOURS = [(250, 10, 20), (0, 200, 100), (5, 6, 7), (255, 255, 0)]
INDICES = RANDOM.integers(0, 4, (5, 7))
WHITE = (255, 255, 255)


@dataclass(frozen=True)
class Good:
    name: str
    data: bytes
    pixels: np.ndarray
    """(H, W, 3) uint8."""
    tolerance: int = 0


@dataclass(frozen=True)
class Bad:
    name: str
    data: bytes
    reason: str


def saved(pixels: np.ndarray | Image.Image, format: str, **options: Any) -> bytes:
    """Through Pillow's writer, where a format is too much to write by hand."""
    out = BytesIO()
    (Image.fromarray(pixels) if isinstance(pixels, np.ndarray) else pixels).save(out, format, **options)
    return out.getvalue()


def as_grey(shades: np.ndarray) -> np.ndarray:
    return np.repeat(shades[..., None], 3, axis=2).astype(np.uint8)


def scaled(deep: np.ndarray) -> np.ndarray:
    """16 bits to 8."""
    return np.round(deep / 257).astype(np.uint8)


def over_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255
    return np.round(colour * share + 255 * (1 - share)).astype(np.uint8)


def flat(colour: tuple[int, int, int], height: int = 16, width: int = 16) -> np.ndarray:
    return np.full((height, width, 3), colour, np.uint8)


def of_pngs() -> list[Good]:
    alpha = RANDOM.integers(0, 256, (5, 7), dtype=np.uint8)
    deep_alpha = alpha.astype(np.uint16) * 257
    table = np.array(COLOURS, np.uint8)
    plte = (b"PLTE", table.tobytes())
    alphas = np.array([255, 0, 128, 255], np.uint8)
    rgba = np.concatenate([RGB, alpha[..., None]], axis=2)
    deep_rgba = np.concatenate([DEEP, deep_alpha[..., None]], axis=2)
    deep_la = np.stack([DEEP[..., 0], deep_alpha], axis=2)
    moving = [
        (b"acTL", struct.pack(">II", 1, 0)),  # IDAT is the first frame
        (b"fcTL", struct.pack(">IIIIIHHBB", 0, 7, 5, 0, 0, 1, 10, 0, 0)),
    ]
    return [
        Good("grey16.png", png(DEEP[..., 0], GREY, bits=16), as_grey(scaled(DEEP[..., 0]))),
        # Pillow keeps the upper 8 of 16 bits of colours: rounded down, not to the nearest.
        Good("rgb16.png", png(DEEP, COLOUR, bits=16), scaled(DEEP), 1),
        Good("rgba16.png", png(deep_rgba, COLOUR_ALPHA, bits=16), over_white(scaled(DEEP), alpha), 2),
        Good(
            "la16.png", png(deep_la, GREY_ALPHA, bits=16), over_white(as_grey(scaled(DEEP[..., 0])), alpha), 2
        ),
        Good("hidden.png", png(rgba, COLOUR_ALPHA), over_white(RGB, alpha), 1),
        Good("grey2.png", png(INDICES, GREY, bits=2), as_grey(INDICES * 85)),
        Good("bit.png", png(INDICES % 2, GREY, bits=1), as_grey(INDICES % 2 * 255)),
        Good("palette2.png", png(INDICES, PALETTE, bits=2, before=[plte]), table[INDICES]),
        Good(
            "clear palette.png",
            png(INDICES, PALETTE, bits=4, before=[plte, (b"tRNS", alphas.tobytes())]),
            over_white(table[INDICES], alphas[INDICES]),
            1,
        ),
        Good(
            "clear grey16.png",
            png(np.array([[1000, 30000]]), GREY, bits=16, before=[(b"tRNS", struct.pack(">H", 1000))]),
            as_grey(np.array([[255, 117]])),
        ),
        Good(
            "clear grey2.png",
            png(np.array([[0, 1, 2, 3]]), GREY, bits=2, before=[(b"tRNS", struct.pack(">H", 1))]),
            as_grey(np.array([[0, 255, 170, 255]])),
        ),
        Good("interlaced.png", png(RGB, COLOUR, interlaced=True), RGB),
        Good(
            "interlaced16.png",
            png(DEEP[..., 0], GREY, bits=16, interlaced=True),
            as_grey(scaled(DEEP[..., 0])),
        ),
        Good("gamma.png", png(RGB, COLOUR, before=[(b"gAMA", struct.pack(">I", 100_000))]), RGB),
        Good("apng.png", png(RGB, COLOUR, before=moving), RGB),
        Good("one.png", png(RGB[:1, :1], COLOUR), RGB[:1, :1]),
        Good("wide.png", png(np.resize(RGB, (1, 30_000, 3)), COLOUR), np.resize(RGB, (1, 30_000, 3))),
        Good("tall.png", png(np.resize(SHADES, (30_000, 1)), GREY), as_grey(np.resize(SHADES, (30_000, 1)))),
        Good("trailing.png", png(RGB, COLOUR) + b"\0" * 99, RGB),
    ]


def of_jpegs() -> list[Good]:
    wide = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    whole = saved(BLOCKS, "JPEG", quality=95, subsampling=0)
    ink = np.array([30, 200, 90, 40], np.uint8)
    inks = np.full((16, 16, 4), ink)
    # Without Adobe's marker 255 is full ink; with it 255 is none, and Pillow writes it so.
    plain = without_segment(saved(Image.fromarray(255 - inks, "CMYK"), "JPEG", quality=95), 0xEE)
    adobe = saved(Image.fromarray(inks, "CMYK"), "JPEG", quality=95)
    printed = flat(tuple(np.round((255.0 - ink[:3]) * (255 - ink[3]) / 255).astype(int)))
    turned = {2: np.fliplr, 3: lambda p: p[::-1, ::-1], 4: np.flipud, 5: lambda p: p.transpose(1, 0, 2)}
    turned |= {6: lambda p: np.rot90(p, -1), 7: lambda p: p[::-1, ::-1].transpose(1, 0, 2), 8: np.rot90}
    turned[1] = lambda p: p
    oriented = []
    for orientation, turn in sorted(turned.items()):
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = saved(BLOCKS, "JPEG", quality=95, subsampling=0, exif=exif)
        oriented.append(Good(f"orientation {orientation}.jpg", data, turn(BLOCKS), 6))
    exif = Image.Exif()
    exif[0x0112] = 99
    return [
        *oriented,
        Good("no orientation.jpg", saved(BLOCKS, "JPEG", quality=95, subsampling=0, exif=exif), BLOCKS, 6),
        Good("cmyk.jpg", plain, printed, 3),
        Good("adobe cmyk.jpg", adobe, printed, 3),
        Good(
            "progressive.jpg", saved(BLOCKS, "JPEG", quality=95, subsampling=0, progressive=True), BLOCKS, 6
        ),
        Good("grey.jpg", saved(BLOCKS[..., 0].copy(), "JPEG", quality=95), as_grey(BLOCKS[..., 0]), 6),
        Good("half colour.jpg", saved(flat((9, 99, 199)), "JPEG", subsampling=2), flat((9, 99, 199)), 3),
        Good("rgb.jpg", saved(BLOCKS, "JPEG", quality=95, keep_rgb=True), BLOCKS, 6),
        Good(
            "restarts.jpg", saved(BLOCKS, "JPEG", quality=95, subsampling=0, restart_marker_rows=1), BLOCKS, 6
        ),
        Good("garbage after.jpg", whole + b"<html>" * 99, BLOCKS, 6),
        Good("profile.jpg", saved(BLOCKS, "JPEG", quality=95, subsampling=0, icc_profile=wide), BLOCKS, 6),
        Good(
            "phone.jpg",
            saved(
                Image.fromarray(BLOCKS),
                "MPO",
                save_all=True,
                quality=95,
                subsampling=0,
                append_images=[Image.new("RGB", (8, 8))],
            ),
            BLOCKS,
            6,
        ),
        Good("one.jpg", saved(flat((70, 80, 90), 1, 1), "JPEG"), flat((70, 80, 90), 1, 1), 3),
    ]


def of_tiffs() -> list[Good]:
    height, width = SHADES.shape
    rows = [row.tobytes() for row in RGB]
    tiles = np.zeros((16, 32, 3), np.uint8)
    tiles[:height, :width], tiles[:height, 16 : 16 + width] = RGB, RGB[::-1]
    alpha = np.array([[0, 51, 255]], np.uint8)
    colour = np.array([[[0, 0, 0], [40, 20, 10], [1, 2, 3]]], np.uint8)
    associated = np.concatenate([colour, alpha[..., None]], axis=2).tobytes()  # colour is multiplied by alpha
    map16 = np.zeros((3, 256), np.uint16)
    map16[:, :4] = np.array(COLOURS, np.uint16).T * 257
    pages = [Image.fromarray(RGB), Image.fromarray(SHADES)]
    both = np.concatenate([RGB, np.zeros((5, 9, 3), np.uint8), RGB[::-1]], axis=1)
    big, deep = DEEP[..., 0].astype(">u2").tobytes(), DEEP.astype("<u2").tobytes()
    return [
        Good("rows.tif", tiff(rows, width, height), RGB),
        Good("big endian.TIF", tiff(rows, width, height, order=">"), RGB),
        Good(
            "grey16 big endian.tif",
            tiff([big], width, height, order=">", bits=[16], photometric=1),
            as_grey(scaled(DEEP[..., 0])),
        ),
        Good("rgb16.tiff", tiff([deep], width, height, bits=[16] * 3), scaled(DEEP), 1),
        Good(
            "white is zero.tif",
            tiff([SHADES.tobytes()], width, height, bits=[8], photometric=0),
            as_grey(255 - SHADES),
        ),
        Good(
            "bits white is zero.tif",
            tiff([b"\xa0"], 4, 1, bits=[1], photometric=0),
            as_grey(np.array([[0, 255, 0, 255]])),
        ),
        Good(
            "planes.tif",
            tiff(
                [RGB[..., c].tobytes() for c in range(3)],
                width,
                height,
                tags={284: ("H", [2]), 278: ("L", [height])},
            ),
            RGB,
        ),
        Good(
            "tiles.tif",
            tiff([tiles[:, :16].tobytes(), tiles[:, 16:].tobytes()], 16 + width, height, tile=(16, 16)),
            both,
        ),
        Good(
            "palette.tif",
            tiff(
                [INDICES.astype(np.uint8).tobytes()],
                width,
                height,
                bits=[8],
                photometric=3,
                tags={320: ("H", map16.reshape(-1).tolist())},
            ),
            np.array(COLOURS, np.uint8)[INDICES],
        ),
        Good(
            "associated alpha.tif",
            tiff([associated], 3, 1, bits=[8] * 4, tags={338: ("H", [1])}),
            np.array([[WHITE, (244, 224, 214), (1, 2, 3)]], np.uint8),
            1,
        ),
        Good(
            "white is zero 16.tif",
            tiff([np.array([0, 257, 65535], "<u2").tobytes()], 3, 1, bits=[16], photometric=0),
            as_grey(np.array([[255, 254, 0]])),
        ),
        Good(
            "grey12.tif",
            tiff([b"\xff\xf8\x00"], 2, 1, bits=[12], photometric=1),
            as_grey(np.array([[255, 128]])),
        ),
        Good("grey4.tif", tiff([b"\xf3"], 2, 1, bits=[4], photometric=1), as_grey(np.array([[255, 51]]))),
        Good(
            "fax.tif",
            saved(Image.fromarray(SHADES > 99), "TIFF", compression="group4"),
            as_grey((SHADES > 99) * 255),
        ),
        Good("jpeg.tif", saved(BLOCKS, "TIFF", compression="jpeg", quality=95), BLOCKS, 12),
        Good("pages.tif", saved(pages[0], "TIFF", save_all=True, append_images=pages[1:]), RGB),
        Good("lzw.tif", saved(RGB, "TIFF", compression="tiff_lzw", tiffinfo={317: 2}), RGB),
        Good("deflate.tif", saved(RGB, "TIFF", compression="tiff_adobe_deflate"), RGB),
        Good("turned.tif", tiff(rows, width, height, tags={274: ("H", [6])}), np.rot90(RGB, -1)),
    ]


def of_others() -> list[Good]:
    table = np.array(COLOURS, np.uint8)
    moving = np.array([[0, 1, 2, 3]] * 2)
    canvas = np.full((4, 6, 3), 255, np.uint8)
    canvas[1:3, 1:5] = table[moving]
    canvas[1:3, 2] = 255  # index 1 is transparent
    frames = [(1, 1, moving), (0, 0, np.full((4, 6), 3))]
    # RLE8: runs and literals, rows from the bottom, 0 0 ends a row and 0 1 the picture.
    runs = bytes([3, 1, 0, 3, 0, 2, 3, 0, 0, 0, 6, 2, 0, 1])
    from_runs = np.array([[2] * 6, [1, 1, 1, 0, 2, 3]])
    nibbles = bytes([5, 0x12, 0, 0, 5, 0x30, 0, 1])
    from_nibbles = np.array([[3, 0, 3, 0, 3], [1, 2, 1, 2, 1]])
    rgb565 = np.array([[0xF800, 0x07E0, 0x001F, 0xFFFF]], "<u2")
    bgra = np.array([[[3, 2, 1, 255], [200, 100, 50, 0]]], np.uint8)
    masks = (0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    down = np.pad(RGB[..., ::-1].reshape(5, 21), ((0, 0), (0, 3))).tobytes()
    film = [Image.new("RGB", (4, 4), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    exif = Image.Exif()
    exif[0x0112] = 6
    text = " ".join(map(str, SHADES.reshape(-1).tolist()))
    return [
        Good("moving.gif", gif(6, 4, COLOURS, frames, transparent=1), canvas),
        Good("still.gif", gif(7, 5, COLOURS, [(0, 0, INDICES)]), table[INDICES]),
        Good(
            "moving.webp",
            saved(film[0], "WEBP", save_all=True, append_images=film[1:], lossless=True),
            flat((255, 0, 0), 4, 4),
        ),
        Good("turned.webp", saved(RGB, "WEBP", lossless=True, exif=exif), np.rot90(RGB, -1)),
        Good("rle8.bmp", bmp(6, 2, 8, runs, compression=1, palette=COLOURS), table[from_runs]),
        Good("rle4.bmp", bmp(5, 2, 4, nibbles, compression=2, palette=COLOURS), table[from_nibbles]),
        Good(
            "565.bmp",
            bmp(4, 1, 16, rgb565.tobytes(), compression=3, masks=(0xF800, 0x7E0, 0x1F, 0)),
            np.array([[(255, 0, 0), (0, 255, 0), (0, 0, 255), WHITE]], np.uint8),
        ),
        Good(
            "alpha.bmp",
            bmp(2, 1, 32, bgra.tobytes(), compression=3, masks=masks),
            np.array([[(1, 2, 3), WHITE]], np.uint8),
        ),
        Good("32.bmp", bmp(2, 1, 32, bgra.tobytes()), np.array([[(1, 2, 3), (50, 100, 200)]], np.uint8)),
        Good("top down.bmp", bmp(7, -5, 24, down), RGB),
        Good(
            "grey16.pgm",
            b"P5 7 5 65535\n" + DEEP[..., 0].astype(">u2").tobytes(),
            as_grey(scaled(DEEP[..., 0])),
        ),
        Good("rgb16.ppm", b"P6 7 5 65535\n" + DEEP.astype(">u2").tobytes(), scaled(DEEP)),
        Good("upto 15.pgm", b"P5 2 1 15\n\x00\x0f", as_grey(np.array([[0, 255]]))),
        Good("text.pgm", f"P2\n# a comment\n7 5\n255\n{text}\n".encode(), as_grey(SHADES)),
        Good("bits.pbm", b"P4 4 1\n\xa0", as_grey(np.array([[0, 255, 0, 255]]))),  # 1 is black
    ]


def of_names() -> list[Good]:
    return [
        Good("png named.jpg", png(RGB, COLOUR), RGB),
        Good("webp named.PNG", saved(RGB, "WEBP", lossless=True), RGB),
        Good("UPPER.PNG", png(RGB[:4], COLOUR), RGB[:4]),
        Good("zwei\nZeilen [bold]\x1b[31m Größe 画像.png", png(RGB[:3], COLOUR), RGB[:3]),
        Good(" .. .png", png(RGB[:2], COLOUR), RGB[:2]),
    ]


GOOD = [*of_pngs(), *of_jpegs(), *of_tiffs(), *of_others(), *of_names()]


def bad_pictures() -> list[Bad]:
    noise = RANDOM.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    photo, drawing = saved(noise, "JPEG", quality=90), png(noise, COLOUR)
    middle = drawing.index(b"IDAT") + len(drawing) // 2
    flipped = drawing[:middle] + bytes([drawing[middle] ^ 4]) + drawing[middle + 1 :]
    samples = np.zeros(4, "<f4").tobytes()
    return [
        Bad("empty.png", b"", "truncated"),
        *(
            Bad(f"cut {share}.jpg", photo[: int(len(photo) * share)], "truncated")
            for share in (0.3, 0.9, 0.999)
        ),
        *(Bad(f"cut {share}.png", drawing[: int(len(drawing) * share)], "truncated") for share in (0.3, 0.9)),
        Bad("progressive cut.jpg", saved(noise, "JPEG", progressive=True)[:-200], "truncated"),
        Bad("flipped.png", flipped, "checksum"),
        Bad("wrong header sum.png", drawing[:29] + b"\0\0\0\0" + drawing[33:], "checksum"),
        Bad(
            "float.tif", tiff([samples], 2, 2, bits=[32], photometric=1, tags={339: ("H", [3])}), "mismatched"
        ),
        Bad("float.ppm", b"Pf\n2 2\n-1.0\n" + samples, "mismatched"),
        Bad("page.jpg", b"<!DOCTYPE html><html><body>404</body></html>", "unreadable"),
        Bad("drawing.png", b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>", "unreadable"),
        Bad("print.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", "unreadable"),
        Bad("other.png", saved(RGB, "JPEG2000"), "unreadable"),
        Bad("large.png", png(RGB, COLOUR, size=(40_000, 40_000)), "too large"),
        Bad("nothing.png", png(RGB, COLOUR, size=(0, 7)), "unreadable"),
    ]


def unharmed_but_damaged() -> list[Bad]:
    """Pixels whole, file not: training takes them, a check names them."""
    whole, end = png(RGB, COLOUR), png_chunk(b"IEND", b"")
    return [
        Bad("wrong sum.png", whole[: -len(end) - 4] + b"\0\0\0\0" + end, "checksum"),
        Bad("no end.png", whole[: -len(end)], "truncated"),
    ]
