"""Painting on pictures that are there: completion, in- and outpainting, variations; and between conditions.

What is kept is kept as codes, exactly. A decoder paints a cell by its neighbours too, so that the pixels of
kept cells change a little near what is new, and everywhere by what the tokenizer loses: `keep_pixels` puts
the original's pixels back outside of the mask.

A model of raster order only looks back: what is painted in a hole does not see what is known to the right of
and below it. `best_of` chooses among several pictures those in which what comes after the hole is the most
probable. A model that was trained with random orders to the last step takes all that is known in first.

Axes: B pictures or conditions, N pictures out (B x num_images), H W pixels, h w cells.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Unpack

import torch
from torch import Tensor

from stage2_ar.conditions.base import batch_size_of
from stage2_ar.masks import (
    Side,
    composite,
    half_known,
    pixels_of,
    soft_mask,
    touched_cells,
    variation_known,
)
from stage2_ar.sample_command.options import SampleOptions
from stage2_ar.sampling.sample import Known
from stage2_ar.saying import Interpolation
from taming.errors import UserError

if TYPE_CHECKING:
    from stage1_vq import VQModel
    from stage2_ar.model import ARModel
    from stage2_ar.pipeline import PipelineOutput

Conditions = Mapping[str, Any] | None


class Editing(ABC):
    """The ways of painting that `ARPipeline` has beside painting from nothing.

    Pictures are (B, C, H, W) in [-1, 1], H and W multiples of the downsample factor, and may be larger than
    the model was trained on. One picture serves all conditions; else there is one a condition, and without
    a condition `num_images` are made of each. All take the options of `ARPipeline.__call__`, and raise
    UserError for sizes, masks, conditions or settings that do not fit.
    """

    model: ARModel
    tokenizer: VQModel

    @abstractmethod
    def __call__(
        self,
        conditions: Mapping[str, Any] | Interpolation | None = None,
        *,
        height: int | None = None,
        width: int | None = None,
        known: Known | None = None,
        **options: Unpack[SampleOptions],
    ) -> PipelineOutput: ...

    @abstractmethod
    def encode(self, images: Tensor, *, tile: int | None = None) -> Tensor: ...

    def complete(
        self,
        images: Tensor,
        keep: Side = "upper",
        conditions: Conditions = None,
        *,
        keep_pixels: bool = False,
        soft_border: int = 0,
        **options: Unpack[SampleOptions],
    ) -> PipelineOutput:
        """Keep one half of pictures and paint the other anew.

        `keep_pixels` and `soft_border`: see `inpaint`.
        """
        grid = self._grid_of(images)
        known = half_known(keep, grid)
        mask = pixels_of(~known, self.model.config.downsample_factor)
        return self._edit(images, known, mask, conditions, keep_pixels, soft_border, options)

    def inpaint(
        self,
        images: Tensor,
        mask: Tensor,
        conditions: Conditions = None,
        *,
        keep_pixels: bool = False,
        soft_border: int = 0,
        **options: Unpack[SampleOptions],
    ) -> PipelineOutput:
        """Paint anew where `mask` (H, W) or (B, H, W) bool is True.

        A cell is painted anew if any pixel of it is. With `keep_pixels` the pixels outside of the mask are
        those of `images`, bit for bit; within it the new picture begins over `soft_border` pixels.
        """
        self._grid_of(images)
        mask = mask[None] if mask.ndim == 2 else mask
        if mask.dtype != torch.bool:
            raise UserError(f"the mask is {mask.dtype}; give bool, True where pixels are painted anew")
        if mask.ndim != 3 or mask.shape[1:] != images.shape[2:] or len(mask) not in (1, len(images)):
            raise UserError(
                f"the mask is {'x'.join(map(str, mask.shape[1:]))} pixels and the picture "
                f"{images.shape[2]}x{images.shape[3]}; give a mask of the picture's size"
            )
        if not mask.any():
            raise UserError("the mask is empty: nothing is to be painted; make it white where something is")
        known = ~touched_cells(mask, self.model.config.downsample_factor)
        return self._edit(images, known, mask, conditions, keep_pixels, soft_border, options)

    def outpaint(
        self,
        images: Tensor,
        height: int,
        width: int,
        conditions: Conditions = None,
        *,
        top: int | None = None,
        left: int | None = None,
        keep_pixels: bool = False,
        soft_border: int = 0,
        **options: Unpack[SampleOptions],
    ) -> PipelineOutput:
        """Paint around pictures, which lie at (top, left) of a frame of `height` x `width` pixels.

        The default is the middle, to the next whole cell. Conditions are of the frame.
        """
        factor = self.model.config.downsample_factor
        rows, columns = (side * factor for side in self._grid_of(images))
        if height < rows or width < columns or (height, width) == (rows, columns):
            raise UserError(
                f"a frame of {height}x{width} is not larger than the picture of {rows}x{columns} pixels"
            )
        self.tokenizer.check_painted_size(height, width)
        top = (height - rows) // 2 // factor * factor if top is None else top
        left = (width - columns) // 2 // factor * factor if left is None else left
        for name, start, size, whole in (("top", top, rows, height), ("left", left, columns, width)):
            if start % factor or not 0 <= start <= whole - size:
                raise UserError(
                    f"{name} {start} does not place the picture inside of the frame on whole cells; give a "
                    f"multiple of {factor} in 0 to {whole - size}"
                )
        frame = images.new_zeros(*images.shape[:2], height, width)
        frame[:, :, top : top + rows, left : left + columns] = images
        mask = torch.ones(1, height, width, dtype=torch.bool)
        mask[:, top : top + rows, left : left + columns] = False
        codes = self.encode(images, tile=options.get("tile"))
        placed = codes.new_zeros(len(codes), height // factor, width // factor)
        known = ~touched_cells(mask, factor)
        placed[known.expand_as(placed).to(placed.device)] = codes.flatten()
        return self._edit(frame, known, mask, conditions, keep_pixels, soft_border, options, codes=placed)

    def vary(
        self,
        images: Tensor,
        strength: float = 0.5,
        conditions: Conditions = None,
        *,
        from_row: int | None = None,
        **options: Unpack[SampleOptions],
    ) -> PipelineOutput:
        """Variations: a share `strength` in (0, 1] of the cells, chosen at random, is painted anew.

        With `from_row` it is instead all rows of cells from that one on. The seed chooses the cells.
        """
        known = variation_known(self._grid_of(images), strength, options.get("seed", 0), from_row)
        mask = pixels_of(~known, self.model.config.downsample_factor)
        return self._edit(images, known, mask, conditions, False, 0, options)

    def upscale(
        self, images: Tensor, conditions: Conditions = None, **options: Unpack[SampleOptions]
    ) -> PipelineOutput:
        """Pictures (B, C, h, w) in few pixels painted in many, by a model of the condition low_resolution.

        `conditions` are the others where the model has several.
        """
        # Here, since that module builds on the conditions of all kinds.
        from stage2_ar.sample_command.given import scale_of

        scale = scale_of(self.model.condition, "image")
        if scale is None:
            raise UserError(
                "this model was not trained to paint pictures of a low resolution in a higher one; train one "
                "with condition.kind=image condition.source=low_resolution condition.scale=4"
            )
        if images.ndim != 4:
            raise UserError(f"pictures have shape {tuple(images.shape)}; give (B, C, h, w)")
        height, width = images.shape[2] * scale, images.shape[3] * scale
        return self({**(conditions or {}), "image": images}, height=height, width=width, **options)

    def interpolate(
        self,
        first: Mapping[str, Any],
        second: Mapping[str, Any],
        steps: int = 5,
        *,
        height: int | None = None,
        width: int | None = None,
        **options: Unpack[SampleOptions],
    ) -> PipelineOutput:
        """Pictures of `steps` conditions from one to another, `num_images` of each: both ends among them.

        Embeddings and cells of the two prefixes are mixed. The random numbers are the same at every step, so
        that what changes follows from the condition.
        """
        return self(Interpolation(first, second, steps), height=height, width=width, **options)

    def _edit(
        self,
        images: Tensor,
        known: Tensor,
        mask: Tensor,
        conditions: Conditions,
        keep_pixels: bool,
        soft_border: int,
        options: SampleOptions,
        codes: Tensor | None = None,
    ) -> PipelineOutput:
        """Paint the cells of `images` that `known` (1 or B, h, w) does not keep."""
        soft_mask(mask[:, :1, :1], soft_border)  # refuses a negative border before any work
        codes = self.encode(images, tile=options.get("tile")) if codes is None else codes
        known = known.to(codes.device)
        rows, each = len(images), options.get("num_images", 1)
        if self.model.condition.keys:
            said = batch_size_of(self.model.condition.read(conditions or {}))
            if rows not in (1, said):
                raise UserError(
                    f"{rows} pictures were given with {said} conditions; give one picture, or one a condition"
                )
            rows = said
        elif conditions:
            self.model.condition.refuse_unknown(conditions)
        total = rows * each
        source = torch.arange(len(images)) if len(images) == rows else torch.zeros(rows, dtype=torch.int64)
        source = source.repeat_interleave(each)
        known = known.expand(len(images), -1, -1)[source.to(known.device)]
        asked: SampleOptions = {**options, "num_images": each if self.model.condition.keys else total}
        factor = self.model.config.downsample_factor
        out = self(
            conditions,
            height=codes.shape[1] * factor,
            width=codes.shape[2] * factor,
            known=(codes[source.to(codes.device)], known),
            **asked,
        )
        if not keep_pixels:
            return out
        original = images.to(out.images)[source]
        mask = mask.to(out.images.device).expand(len(images), -1, -1)[source]
        return replace(out, images=composite(original, out.images, mask, soft_border))

    def _grid_of(self, images: Tensor) -> tuple[int, int]:
        """Cells of pictures. Raises UserError for shapes that do not fit."""
        self.tokenizer.check_images(images)
        factor = self.model.config.downsample_factor
        return images.shape[2] // factor, images.shape[3] // factor
