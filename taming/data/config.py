"""Where pictures come from: a folder, shards, or the built-in scenes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import unquote

from pydantic import BeforeValidator, Field, field_validator, model_validator

from taming.config import Config
from taming.units import parse_bytes

Size = (
    Annotated[int, Field(gt=0)]
    | Annotated[list[Annotated[int, Field(gt=0)]], Field(min_length=2, max_length=2)]
)


class ScenesDataConfig(Config):
    """The built-in scenes, drawn from (seed, index): nothing to download (see taming.data.scenes)."""

    kind: Literal["scenes"] = "scenes"
    seed: int = Field(0, ge=0)
    num_train: int = Field(4000, ge=1)
    num_validation: int = Field(256, ge=0)
    size: Size = 64
    """Pixels: one number for a square, or [height, width]."""
    crop_from: Size | None = None
    """Scenes are drawn at this size, and samples are crops of `size`: random ones in training, centred ones
    else. Boxes are those of the crop; class and text stay the scene's. None: scenes are drawn at `size`."""
    cache: bool = True
    """Keep each scene in memory as uint8 once it is drawn."""
    flip: bool = False
    """Mirror half of the training samples."""

    @property
    def height_width(self) -> tuple[int, int]:
        return _height_width(self.size)

    @property
    def drawn_height_width(self) -> tuple[int, int]:
        """(H, W) of the whole scenes."""
        return _height_width(self.size if self.crop_from is None else self.crop_from)

    @property
    def gives(self) -> dict[str, int]:
        """Key of a batch -> channels, of pictures and maps; of segmentation the number of labels."""
        from taming.data.scenes import LABEL_NAMES

        return {"image": 3, "segmentation": len(LABEL_NAMES), "depth": 1}

    @model_validator(mode="after")
    def _check(self) -> ScenesDataConfig:
        (height, width), (whole_height, whole_width) = self.height_width, self.drawn_height_width
        if height > whole_height or width > whole_width:
            raise ValueError(
                f"crop_from {whole_height}x{whole_width} is smaller than the crop, size {height}x{width}; "
                "make it larger, or leave it out"
            )
        return self


class PicturesConfig(Config):
    """Pictures that lie in files, of any size, mode and aspect: how samples are made of them."""

    # Of the kinds below; here so that a saved config begins with them.
    kind: str
    root: Path | str
    channels: int = Field(3, ge=1)
    """Pictures are read as grey (1; 16 bits are kept), RGB (3) or RGBA (4); arrays have any number."""
    condition_channels: int = Field(3, ge=1)
    """As `channels`, of the second pictures."""
    num_labels: int | None = Field(None, ge=1)
    """How many labels there are: map values lie in [0, num_labels). Required with segmentation."""
    least_visible: float = Field(0.25, ge=0.0, le=1.0)
    """A crop keeps an object that has at least this share of its box inside; boxes are cut off at edges."""
    class_labels: bool = False
    """Pictures have classes: of a folder, the first-level sub-folders of the picture folder."""
    size: Size = 256
    """Pixels of the crop: one number for a square, or [height, width]."""
    resize: int | None = Field(None, gt=0)
    """The shorter side is brought to this before the crop; by default as small as covers the crop."""
    random_scale: tuple[float, float] = (1.0, 1.0)
    """In training, `resize` is multiplied by a random factor from here (the crop stays covered)."""
    crop: Literal["random", "center"] = "random"
    """Where training crops lie; validation crops lie in the centre."""
    flip: bool = True
    """Mirror half of the training samples."""
    validation_fraction: float = Field(0.1, ge=0.0, lt=1.0)
    """Share of the pictures that are held out, by a stable hash of their names."""
    upscale: bool = False
    """Enlarge pictures that are smaller than the crop, in place of refusing them."""
    max_pixels: int = Field(200_000_000, gt=0)
    """Refuse pictures of more pixels than this before they are decoded."""
    skip_budget: float = Field(0.001, ge=0.0, lt=1.0)
    """Share of the pictures that may be bad. Those that are found on opening, or in an evaluation, are left
    out; in training others take their places. They are counted by reason; beyond this it stops, with 0 at the
    first one."""

    @property
    def height_width(self) -> tuple[int, int]:
        return _height_width(self.size)

    @field_validator("random_scale")
    @classmethod
    def _check_random_scale(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 < value[0] <= value[1]:
            raise ValueError("must be two factors, 0 < lowest <= highest")
        return value

    @model_validator(mode="after")
    def _check_resize(self) -> Self:
        if self.resize is not None and self.resize < min(self.height_width):
            raise ValueError(
                f"resize {self.resize} is less than the crop {self.size}; make it at least"
                f" {min(self.height_width)} or leave it out"
            )
        return self

    def _given(self, *, segmentation: bool, depth: bool, condition_image: bool) -> dict[str, int]:
        given = {"image": self.channels}
        if segmentation and self.num_labels is not None:
            given["segmentation"] = self.num_labels
        if depth:
            given["depth"] = 1
        if condition_image:
            given["condition_image"] = self.condition_channels
        return given


class FolderDataConfig(PicturesConfig):
    """A folder of pictures of any size, mode and aspect, with maps in folders beside it.

    Maps belong to the picture of the same relative name, whatever their suffixes. A folder without pictures
    may hold .npy arrays (C, H, W) in their place: uint8, uint16, or float32 in [-1, 1].
    """

    kind: Literal["folder"] = "folder"
    root: Path
    images: str | None = None
    """Folder of the pictures under root; by default root/images if there is one, else root itself."""
    segmentation: str | None = None
    """Folder under root with one label map a picture: grey, 16-bit grey or palette, value = label."""
    depth: str | None = None
    """Folder under root with one inverse-depth map a picture: 8 or 16-bit grey, white is nearest."""
    condition_image: str | None = None
    """Folder under root with a second picture for each picture."""
    objects: str | None = None
    """File under root with the boxes of objects, a JSON in the layout of COCO's instances."""
    crowds: bool = False
    """Keep annotations that are marked as crowds: one box around many objects."""
    text: str | None = None
    """Captions under root: a folder with NAME.txt a picture, one caption a line, or a JSON in the layout of
    COCO's captions. Each epoch shows one of a picture's captions; validation shows the first."""

    @property
    def gives(self) -> dict[str, int]:
        """Key of a batch -> channels, of pictures and maps; of segmentation the number of labels."""
        return self._given(
            segmentation=self.segmentation is not None,
            depth=self.depth is not None,
            condition_image=self.condition_image is not None,
        )

    @model_validator(mode="after")
    def _check_labels(self) -> Self:
        if self.segmentation is not None and self.num_labels is None:
            raise ValueError("segmentation needs num_labels: maps hold labels in [0, num_labels)")
        return self


def _is_given(value: Any) -> Any:
    """A folder's config says the names of its maps' folders: those of a pack have no names, but are there."""
    if value is None:
        return False
    return True if isinstance(value, str) and value.lower() not in ("true", "false") else value


Given = Annotated[bool, BeforeValidator(_is_given)]


class ShardsDataConfig(PicturesConfig):
    """Shards with an index, as `taming data pack` and `taming data index` write them; local or remote.

    A config of the folder that was packed is read too: what it calls its maps is of no matter here.
    """

    kind: Literal["shards"] = "shards"
    root: Annotated[str, BeforeValidator(str)]
    """The folder of the index, or its http or https address."""
    segmentation: Given = False
    """Read the label maps of the shards; and so on."""
    depth: Given = False
    condition_image: Given = False
    objects: Given = False
    text: Given = False
    cache: Path | None = None
    """Folder for shards from elsewhere; by default ~/.cache/taming/shards."""
    cache_size: Annotated[int, BeforeValidator(parse_bytes)] = 2**36
    """Bytes that the cache may take (100G, say): shards that were not read for the longest time make room."""
    shuffle_shards: int = Field(16, ge=1)
    """An epoch takes the shards in a random order, and mixes the samples of so many at a time."""

    @property
    def gives(self) -> dict[str, int]:
        """Key of a batch -> channels, of pictures and maps; of segmentation the number of labels."""
        return self._given(
            segmentation=self.segmentation, depth=self.depth, condition_image=self.condition_image
        )

    @field_validator("root")
    @classmethod
    def _check_root(cls, value: str) -> str:
        scheme, colon, rest = value.partition(":")
        if not colon or len(scheme) < 2 or not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*", scheme):
            return value
        match scheme.lower():
            case "http" | "https" if rest.startswith("//") and rest.strip("/"):
                return value
            case "file" if rest.startswith("///"):
                return unquote(rest[2:])
        raise ValueError(
            "shards are read from a folder, file:///FOLDER, or an http or https address, and from nothing"
            " else (./NAME means a folder)"
        )

    @model_validator(mode="before")
    @classmethod
    def _leave_out_layout(cls, values: Any) -> Any:
        # Defaults that a run on a folder has saved, and that say nothing.
        if not isinstance(values, dict):
            return values
        told = {"images": None, "crowds": False}
        return {name: value for name, value in values.items() if name not in told or value != told[name]}

    @model_validator(mode="after")
    def _check_labels(self) -> Self:
        if self.segmentation and self.num_labels is None:
            raise ValueError("segmentation needs num_labels: maps hold labels in [0, num_labels)")
        return self


DataConfig = Annotated[FolderDataConfig | ShardsDataConfig | ScenesDataConfig, Field(discriminator="kind")]


def _height_width(size: int | list[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
