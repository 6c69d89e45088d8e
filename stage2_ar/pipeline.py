"""Conditions in, pictures out: the public face of stage two.

Axes: B conditions, N pictures (B x num_images), H W pixels, h w cells, P prefix positions.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stage1_vq import VQModel
from stage2_ar.conditions.base import take_rows
from stage2_ar.conditions.text import text_encoders
from stage2_ar.conditions.tokenizers import attach_tokenizers, parts_with_tokenizer
from stage2_ar.inference import for_inference
from stage2_ar.model import ARModel
from stage2_ar.order import Grid
from stage2_ar.sampling import Known, SamplingSettings, picture_uniforms, sample_codes
from stage2_ar.sliding_window import Schedule, sample_sliding, window_size
from stage2_ar.transformer import Transformer, code_log_likelihood
from stage2_ar.windowed_sampling import sample_windowed
from taming.artifact import push_artifact
from taming.errors import ArtifactError, UserError
from taming.types import Batch


@dataclass(frozen=True)
class PipelineOutput:
    """Pictures, and the codes that they were painted from."""

    images: Tensor
    """(N, C, H, W) in [-1, 1]; those of one condition side by side."""
    codes: Tensor
    """(N, h, w) int64."""


class ARPipeline:
    """A transformer, its condition and its tokenizer.

    pipe = ARPipeline.from_pretrained("runs/photos-seg")
    out = pipe({"segmentation": labels}, height=512, width=768, num_images=4, top_k=100, seed=0)
    """

    def __init__(self, model: ARModel, tokenizer: VQModel) -> None:
        if not tokenizer.makes_codes_of(model.config.tokenizer_hash):
            raise ArtifactError(
                f"the transformer was trained on the tokenizer {model.config.tokenizer_hash[:12]}, this one "
                f"is {tokenizer.codes_hash()[:12]}: its codes mean something else; use the one it was "
                "saved with, or train the transformer on this one's codes"
            )
        for name, part in parts_with_tokenizer(model.condition).items():
            if not part.has_tokenizer:
                raise ArtifactError(
                    f"the tokenizer of the condition {part.name!r} is missing; give it to the model with "
                    f"attach_tokenizer, or load a saved pipeline that holds {name}/"
                )
        self.model, self.tokenizer = model.eval(), tokenizer.eval()
        self._prepared: tuple[int, Transformer] | None = None

    @property
    def device(self) -> torch.device:
        return self.model.transformer.token_embedding.weight.device

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> ARPipeline:
        """Move everything to a device; `dtype` (torch.bfloat16, say) is for the transformer alone."""
        self.model.to(device=device, dtype=dtype)
        self.tokenizer.to(device=device)
        for part in parts_with_tokenizer(self.model.condition).values():
            part.tokenizer.to(device=device)
        self._prepared = None
        return self

    @torch.no_grad()
    def __call__(
        self,
        conditions: Mapping[str, Any] | None = None,
        *,
        height: int | None = None,
        width: int | None = None,
        num_images: int = 1,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        guidance_scale: float = 1.0,
        seed: int = 0,
        greedy: bool = False,
        known: Known | None = None,
        schedule: Schedule = "serial",
        window_stride: int = 1,
        batch_size: int = 16,
        progress: Callable[[int, int], None] | None = None,
    ) -> PipelineOutput:
        """Sample pictures of `height` x `width` pixels (the size trained on by default).

        `conditions`: {} or {"class": (B,)} or {"segmentation": (B, H, W) int64}, as the model was trained.
        `num_images` pictures are made of each condition (without a condition: in all). Larger sizes than
        trained on are written with a sliding window; `window_stride` > 1 moves it in steps, faster and not
        quite the published procedure. `schedule` "wavefront" works on several rows at once.
        A model with an attention window writes every size in one way, and knows no stride.
        `known` = (codes, mask), each (1 or N, h, w): cells whose mask is True are given and stay.
        A picture depends on (seed, its number) alone, not on `batch_size`, which bounds memory.
        `progress` is called with (cells done, cells in all).
        Raises UserError for sizes, conditions or settings that do not fit.
        """
        settings = SamplingSettings(temperature, top_k, top_p, greedy, guidance_scale)
        settings.validate(self.model.config.vocabulary_size)
        grid = self._grid(height, width)
        if num_images < 1:
            raise UserError(f"num_images {num_images} is not at least 1")
        batch = self.model.condition.read(conditions or {}, self.device)
        if batch:
            self.model.condition.check(batch, grid)  # all of them before any is painted
        rows = len(next(iter(batch.values()))) if batch else 1
        total = rows * num_images
        known = self._check_known(known, total, grid)
        # Conditions are repeated by row number, so that a chunk may begin amid one condition's pictures.
        source = torch.arange(rows, device=self.device).repeat_interleave(num_images)
        codes = []
        for first in range(0, total, batch_size):
            chunk = slice(first, min(first + batch_size, total))
            count = chunk.stop - first
            part = take_rows(batch, source[chunk]) or _nameless(count)
            given = None if known is None else (known[0][chunk], known[1][chunk])
            uniforms = picture_uniforms(seed, first, count, grid[0] * grid[1])
            report = _part_of(progress, first // batch_size, -(-total // batch_size))
            codes.append(self._sample(part, grid, uniforms, settings, given, schedule, window_stride, report))
        all_codes = torch.cat(codes)
        return PipelineOutput(self.decode(all_codes, batch_size), all_codes)

    @torch.no_grad()
    def decode(self, codes: Tensor, batch_size: int = 16) -> Tensor:
        """Codes (N, h, w) -> pictures (N, C, H, W) in [-1, 1]."""
        return torch.cat([self.tokenizer.decode(part).clamp(-1, 1) for part in codes.split(batch_size)])

    @torch.no_grad()
    def log_likelihood(self, images: Tensor, conditions: Mapping[str, Any] | None = None) -> Tensor:
        """(B,) nats over the codes of pictures (B, C, H, W) in [-1, 1], no larger than trained on."""
        codes = self.tokenizer.encode(images.to(self.device))
        batch = self.model.condition.read(conditions or {}, self.device)
        for name, value in batch.items():
            if len(value) != len(images):
                raise UserError(f"{len(images)} pictures were given with {len(value)} conditions ({name})")
        return code_log_likelihood(self.model(codes, batch or _nameless(len(images))), codes.flatten(1))

    @classmethod
    def from_pretrained(cls, source: str | Path) -> ARPipeline:
        """Load a saved pipeline, the model of a run, or a hub id "owner/name"; on the CPU.

        Raises ArtifactError where parts are missing, or a tokenizer is not the one it was trained on.
        """
        model = ARModel.from_pretrained(source, subfolder="transformer")
        attach_tokenizers(model.condition, lambda name: VQModel.from_pretrained(source, subfolder=name))
        for encoder in text_encoders(model.condition):
            encoder.move_to_copy(source)
        return cls(model, VQModel.from_pretrained(source, subfolder="tokenizer"))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write transformer/, tokenizer/ and condition_tokenizer/ where the condition has one of its own,
        and text_encoder/, a copy of the frozen encoder of captions.

        Each is a folder with config.json and model.safetensors.
        """
        self.model.save_pretrained(Path(folder) / "transformer")
        self.tokenizer.save_pretrained(Path(folder) / "tokenizer")
        for name, part in parts_with_tokenizer(self.model.condition).items():
            part.tokenizer.save_pretrained(Path(folder) / name)
        for encoder in text_encoders(self.model.condition):
            encoder.save(Path(folder) / "text_encoder")

    def push_to_hub(self, repo_id: str, *, private: bool = False) -> str:
        """Upload to the hub as "owner/name"; returns the commit's address."""
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return push_artifact(folder, repo_id, private=private)

    def _sample(
        self,
        batch: Batch,
        grid: Grid,
        uniforms: Tensor,
        settings: SamplingSettings,
        known: Known | None,
        schedule: Schedule,
        stride: int,
        progress: Callable[[int, int], None] | None,
    ) -> Tensor:
        condition, window, count = self.model.condition, self.model.config.grid, len(uniforms)
        guide = settings.guides and condition.has_null
        transformer = self._for_sampling(2 * count if guide else count)
        if transformer.window is not None:
            if stride != 1:
                raise UserError(
                    f"window stride {stride} is of sliding windows; this model sees through its own "
                    "attention window and slides none: leave the stride out"
                )
            prefix = condition(batch, grid)
            null = condition.null(count, grid, self.device) if guide else None
            return sample_windowed(
                transformer, prefix, null, grid, uniforms, settings, known=known, schedule=schedule,
                progress=progress,
            )  # fmt: skip
        if grid[0] <= window[0] and grid[1] <= window[1]:
            prefix = condition(batch, grid)
            null = condition.null(count, grid, self.device) if guide else None
            return sample_codes(
                transformer, prefix, null, grid, uniforms, settings, known=known, progress=progress
            )
        size = window_size(window, grid)
        return sample_sliding(
            transformer,
            condition.windows(batch, grid, size),
            condition.null_windows(count, grid, size, self.device) if guide else None,
            grid,
            uniforms,
            settings,
            known=known,
            schedule=schedule,
            stride=stride,
            progress=progress,
        )

    def _for_sampling(self, rows: int) -> Transformer:
        """The transformer as it decodes fastest; the copy for one number of rows is kept."""
        if self._prepared is None or self._prepared[0] != rows:
            transformer = self.model.transformer
            self._prepared = rows, for_inference(transformer, transformer.token_embedding.weight.dtype, rows)
        return self._prepared[1]

    def _grid(self, height: int | None, width: int | None) -> Grid:
        factor, trained = self.model.config.downsample_factor, self.model.config.grid
        sizes = []
        for name, given, cells in (("height", height, trained[0]), ("width", width, trained[1])):
            pixels = cells * factor if given is None else given
            if pixels < factor or pixels % factor:
                near = max(round(pixels / factor), 1) * factor
                raise UserError(
                    f"{name} {pixels} is not a multiple of the downsample factor {factor}; use {near}"
                )
            sizes.append(pixels // factor)
        return sizes[0], sizes[1]

    def _check_known(self, known: Known | None, total: int, grid: Grid) -> Known | None:
        if known is None:
            return None
        codes, mask = (torch.as_tensor(part).to(self.device) for part in known)
        for name, part in (("codes", codes), ("mask", mask)):
            if part.ndim != 3 or part.shape[1:] != grid or part.shape[0] not in (1, total):
                raise UserError(
                    f"known {name} of shape {tuple(part.shape)} do not fit; {total} pictures of this size "
                    f"need (1 or {total}, {grid[0]}, {grid[1]})"
                )
        size = self.model.config.vocabulary_size
        if codes.dtype != torch.int64 or mask.dtype != torch.bool:
            raise UserError(f"known is {codes.dtype} codes and a {mask.dtype} mask; give int64 and bool")
        if not ((codes >= 0) & (codes < size))[mask.expand_as(codes)].all():
            raise UserError(f"known codes are outside [0, {size}) where the mask keeps them")
        return codes.expand(total, -1, -1), mask.expand(total, -1, -1)


def _nameless(count: int) -> Batch:
    """A batch that says only how many pictures are wanted."""
    return {"key": [str(number) for number in range(count)]}


def _part_of(
    progress: Callable[[int, int], None] | None, part: int, parts: int
) -> Callable[[int, int], None] | None:
    """Progress of one of several chunks, as progress of the whole."""
    if progress is None:
        return None
    return lambda done, total: progress(part * total + done, parts * total)
