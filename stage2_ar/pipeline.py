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
from stage1_vq.tiling import TILED_ABOVE, decode, encode, in_tiles
from stage2_ar.animation import filling_frames
from stage2_ar.conditions.base import batch_size_of, take_rows
from stage2_ar.conditions.text import text_encoders
from stage2_ar.conditions.tokenizers import attach_tokenizers, parts_with_tokenizer
from stage2_ar.editing import Editing
from stage2_ar.model import ARModel
from stage2_ar.order import Grid, to_raster, to_sequence
from stage2_ar.sampling.best_of import Scorer, candidate_seed, check_best_of, scores_of
from stage2_ar.sampling.guidance import GuidanceSchedule
from stage2_ar.sampling.inference import Weights, check_weights, for_inference
from stage2_ar.sampling.likelihood import drawn_log_likelihood, drawn_log_likelihood_sliding
from stage2_ar.sampling.sample import Known, SamplingSettings, sample_codes, uniforms_of
from stage2_ar.sampling.sliding_window import Schedule, sample_sliding, window_size
from stage2_ar.sampling.windowed import sample_windowed
from stage2_ar.saying import Interpolation, Saying
from stage2_ar.transformer import Transformer, code_log_likelihood
from taming.artifact import push_artifact
from taming.errors import ArtifactError, UserError
from taming.types import Batch

SCORED_LOGITS = 2**26
"""Logits that are held at once to score pictures, unless a single one needs more."""


@dataclass(frozen=True)
class PipelineOutput:
    """Pictures, and what they were painted from."""

    images: Tensor
    """(N, C, H, W) in [-1, 1]; those of one condition side by side."""
    codes: Tensor
    """(N, h, w) int64."""
    ranks: Tensor
    """(N, h, w) int64: when each cell was written, from 1 on; 0 where it was given."""
    scores: Tensor | None = None
    """(N, best_of) of all that were tried; the one that was kept has the highest of its row."""

    def animation(self, picture: int, frames: int = 24) -> Tensor:
        """Frames (F, C, H, W) of one picture as it fills; see stage2_ar.animation."""
        return filling_frames(self.images[picture], self.ranks[picture], frames)


class ARPipeline(Editing):
    """A transformer, its condition and its tokenizer.

    pipe = ARPipeline.from_pretrained("runs/photos-seg")
    out = pipe({"segmentation": labels}, height=512, width=768, num_images=4, top_k=100, seed=0)
    out = pipe.inpaint(images, mask, {"segmentation": labels}, keep_pixels=True)
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
        self.weights: Weights = "full"
        self.eager = False
        self._prepared: tuple[int, Transformer] | None = None

    @property
    def device(self) -> torch.device:
        return self.model.transformer.token_embedding.weight.device

    def to(
        self,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        weights: Weights | None = None,
        eager: bool | None = None,
    ) -> ARPipeline:
        """Move everything to a device, and say how the transformer samples; None leaves what was.

        `dtype` (torch.bfloat16, say) is for the transformer alone. `weights` "int8" samples with matrices
        rounded to 8 bits, on a CPU: fastest, and other codes are drawn; "full" is the default.
        `eager` samples without capturing a CUDA graph on a GPU.
        Raises UserError for 8-bit weights on another device.
        """
        weights = weights or self.weights
        check_weights(weights, self.device if device is None else torch.device(device))
        self.weights = weights
        self.eager = self.eager if eager is None else eager
        self.model.to(device=device, dtype=dtype)
        self.tokenizer.to(device=device)
        for part in parts_with_tokenizer(self.model.condition).values():
            part.tokenizer.to(device=device)
        self._prepared = None
        return self

    @torch.no_grad()
    def __call__(
        self,
        conditions: Mapping[str, Any] | Interpolation | None = None,
        *,
        height: int | None = None,
        width: int | None = None,
        num_images: int = 1,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        guidance_scale: float = 1.0,
        guidance_schedule: GuidanceSchedule = "constant",
        guidance_start: float = 1.0,
        guidance_power: float = 1.0,
        seed: int = 0,
        greedy: bool = False,
        known: Known | None = None,
        known_first: bool | None = None,
        best_of: int = 1,
        scorer: Scorer | None = None,
        schedule: Schedule | None = None,
        window_stride: int = 1,
        tile: int | None = None,
        batch_size: int = 16,
        progress: Callable[[int, int], None] | None = None,
    ) -> PipelineOutput:
        """Sample pictures of `height` x `width` pixels (the size trained on by default).

        `conditions`: {} or {"class": (B,)} or {"segmentation": (B, H, W) int64}, as the model was trained, or
        an `Interpolation`. `num_images` pictures are made of each condition (without a condition: in all).
        A picture depends on (seed, its number) alone, not on `batch_size`, which bounds memory; those of an
        interpolation have the same number at every step.

        Guidance by `guidance_schedule` goes from `guidance_start` to `guidance_scale` as a picture fills (see
        stage2_ar.sampling.guidance). Of `best_of` pictures each time the one with the highest score is kept:
        by `scorer`, which gives (n,) for pictures (n, C, H, W) in [-1, 1], else by the log-likelihood of all
        their codes (stage2_ar.sampling.likelihood). The first of them is the picture that best_of=1 gives.

        `known` = (codes, mask), each (1 or N, h, w): cells whose mask is True are given and stay. A model
        that can write in any order takes in the cells known in all pictures before it writes the first of the
        others (`known_first`; None: where the model can). Others only look back: a cell does not see what is
        known after it, and best_of is what chooses pictures that suit it.

        Larger sizes than trained on are written with a sliding window; `window_stride` > 1 moves it in steps,
        faster and not quite the published procedure. `schedule` "wavefront" works on several rows at once.
        A model with an attention window writes every size in one way, knows no stride, and works on several
        rows at once unless told "serial"; others are serial unless told otherwise. The picture is the same.
        `tile`: see `decode`. `progress` is called with (cells done, cells in all).
        Raises UserError for sizes, conditions or settings that do not fit.
        """
        settings = SamplingSettings(
            temperature, top_k, top_p, greedy, guidance_scale, guidance_schedule, guidance_start,
            guidance_power,
        )  # fmt: skip
        settings.validate(self.model.config.vocabulary_size)
        grid = self._grid(height, width)
        if num_images < 1:
            raise UserError(f"num_images {num_images} is not at least 1")
        check_best_of(best_of, scorer is not None, greedy)
        in_tiles(1, 1, tile)  # refuses a negative one before any work
        saying, rows = self._saying(conditions)
        saying.check(self.model.condition, grid)  # all of them before any is painted
        # Conditions are repeated by row number, so that a chunk may begin amid one condition's pictures.
        source = torch.arange(rows, device=self.device).repeat_interleave(num_images)
        total = len(source)
        numbers = torch.arange(total)
        if isinstance(conditions, Interpolation):
            numbers = numbers % num_images
        known = self._check_known(known, total, grid)
        order = self._order(grid, known, known_first)
        chunks = torch.arange(total).split(batch_size)
        codes, scores = [], []
        for number, chunk in enumerate(chunks):
            part = saying.rows(source[chunk.to(source.device)])
            given = None if known is None else (known[0][chunk], known[1][chunk])
            tried = []
            for candidate in range(best_of):
                uniforms = uniforms_of(candidate_seed(seed, candidate), numbers[chunk], grid[0] * grid[1])
                report = _part_of(progress, number * best_of + candidate, len(chunks) * best_of)
                tried.append(
                    self._sample(
                        part, grid, uniforms, settings, given, order, schedule, window_stride, report
                    )
                )
            found = torch.stack(tried, dim=1)  # (n, best_of, h, w)
            if best_of > 1:
                score = [self._score(part, grid, one, settings, order, scorer, tile) for one in tried]
                scores.append(torch.stack(score, dim=1))
                best = scores[-1].argmax(dim=1).to(found.device)
                found = found[torch.arange(len(found), device=found.device), best][:, None]
            codes.append(found[:, 0])
        all_codes = torch.cat(codes)
        images = self.decode(all_codes, batch_size, tile=tile)
        ranks = self._ranks(grid, known, order).expand(total, -1, -1)
        return PipelineOutput(images, all_codes, ranks, torch.cat(scores) if scores else None)

    @torch.no_grad()
    def encode(self, images: Tensor, *, tile: int | None = None) -> Tensor:
        """Pictures (B, C, H, W) in [-1, 1] -> codes (B, h, w) int64; `tile` as in `decode`."""
        return encode(self.tokenizer, images.to(self.device), tile=tile)

    @torch.no_grad()
    def decode(self, codes: Tensor, batch_size: int = 16, *, tile: int | None = None) -> Tensor:
        """Codes (N, h, w) -> pictures (N, C, H, W) in [-1, 1].

        Pictures of more than 512 x 512 pixels are decoded in tiles, with the same result in bounded memory;
        `tile` is their side, or 0 for none at any size.
        """
        # No more pixels at once than one picture may have that is decoded as a whole.
        pixels = codes.shape[1] * codes.shape[2] * self.model.config.downsample_factor**2
        at_once = max(min(batch_size, TILED_ABOVE // pixels), 1)
        return torch.cat(
            [decode(self.tokenizer, part, tile=tile).clamp_(-1, 1) for part in codes.split(at_once)]
        )

    @torch.no_grad()
    def log_likelihood(self, images: Tensor, conditions: Mapping[str, Any] | None = None) -> Tensor:
        """(B,) nats over the codes of pictures (B, C, H, W) in [-1, 1], no larger than trained on."""
        codes = self.encode(images)
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

    def _saying(self, conditions: Mapping[str, Any] | Interpolation | None) -> tuple[Saying, int]:
        """What a user says, and how many rows of pictures that makes."""
        condition = self.model.condition
        if not isinstance(conditions, Interpolation):
            batch = condition.read(conditions or {}, self.device) or _nameless(1)
            return Saying(batch), batch_size_of(batch)
        if conditions.steps < 2:
            raise UserError(f"an interpolation has at least 2 steps, not {conditions.steps}")
        if not condition.keys:
            raise UserError("this model has no condition: there is nothing to interpolate between")
        ends = [condition.read(end, self.device) for end in (conditions.first, conditions.second)]
        if any(batch_size_of(end) != 1 for end in ends):
            raise UserError("an interpolation goes between two conditions: give one row of each")
        rows = torch.zeros(conditions.steps, dtype=torch.int64, device=self.device)
        first, second = (take_rows(end, rows) for end in ends)
        return Saying(first, second, torch.linspace(0, 1, conditions.steps)), conditions.steps

    def _order(self, grid: Grid, known: Known | None, known_first: bool | None) -> Tensor | None:
        """The order of writing where it is not the model's own: (h * w,) raster indices."""
        trained, config = self.model.config.grid, self.model.config
        can = config.any_order and grid[0] <= trained[0] and grid[1] <= trained[1]
        if known_first and not can:
            raise UserError(
                "known_first needs a model that was trained with random orders to the last step "
                "(random_order.end=null), and a picture no larger than trained on; leave it out"
            )
        if known is None or not (can if known_first is None else known_first):
            return None
        own = self.model.transformer.sequence_cells(grid, self.device)
        # Stable: those that are to be written keep the model's order among themselves.
        return own[(~known[1].all(dim=0).flatten()[own]).to(torch.uint8).argsort(stable=True)]

    def _ranks(self, grid: Grid, known: Known | None, order: Tensor | None) -> Tensor:
        """When each cell is written, (1 or N, h, w); 0 where it is given."""
        if order is None:
            larger = grid[0] > self.model.config.grid[0] or grid[1] > self.model.config.grid[1]
            order = torch.arange(grid[0] * grid[1], device=self.device)
            if not larger:
                order = self.model.transformer.sequence_cells(grid, self.device)
        written = torch.ones(1, *grid, dtype=torch.int64, device=self.device)
        if known is not None:
            written = (~known[1]).long()
        counted = to_sequence(written.flatten(1), order).cumsum(dim=1)
        return to_raster(counted, order).view_as(written) * written

    def _score(
        self,
        saying: Saying,
        grid: Grid,
        codes: Tensor,
        settings: SamplingSettings,
        order: Tensor | None,
        scorer: Scorer | None,
        tile: int | None,
    ) -> Tensor:
        """(n,) of codes (n, h, w), on the CPU."""
        if scorer is not None:
            return scores_of(scorer, self.decode(codes, len(codes), tile=tile))
        condition, transformer, window = self.model.condition, self.model.transformer, self.model.config.grid
        guide = settings.guides and condition.has_null
        at_once = max(SCORED_LOGITS // (codes[0].numel() * transformer.vocabulary_size), 1)
        if len(codes) > at_once:
            parts = torch.arange(len(codes), device=codes.device).split(at_once)
            scores = [
                self._score(saying.rows(part), grid, codes[part], settings, order, None, tile)
                for part in parts
            ]
            return torch.cat(scores)
        count = len(codes)
        if transformer.window is not None or (grid[0] <= window[0] and grid[1] <= window[1]):
            null = condition.null(count, grid, self.device) if guide else None
            prefix = saying.prefix(condition, grid)
            return drawn_log_likelihood(transformer, prefix, null, codes, settings, order).cpu()
        size = window_size(window, grid)
        windows = saying.windows(condition, grid, size)
        nulls = condition.null_windows(count, grid, size, self.device) if guide else None
        return drawn_log_likelihood_sliding(transformer, windows, nulls, codes, settings).cpu()

    def _sample(
        self,
        saying: Saying,
        grid: Grid,
        uniforms: Tensor,
        settings: SamplingSettings,
        known: Known | None,
        order: Tensor | None,
        schedule: Schedule | None,
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
            prefix = saying.prefix(condition, grid)
            null = condition.null(count, grid, self.device) if guide else None
            return sample_windowed(
                transformer, prefix, null, grid, uniforms, settings, known=known,
                schedule=schedule or "wavefront", progress=progress,
            )  # fmt: skip
        if grid[0] <= window[0] and grid[1] <= window[1]:
            prefix = saying.prefix(condition, grid)
            null = condition.null(count, grid, self.device) if guide else None
            return sample_codes(
                transformer, prefix, null, grid, uniforms, settings, known=known, order=order,
                progress=progress, step="eager" if self.eager else "auto",
            )  # fmt: skip
        size = window_size(window, grid)
        return sample_sliding(
            transformer,
            saying.windows(condition, grid, size),
            condition.null_windows(count, grid, size, self.device) if guide else None,
            grid,
            uniforms,
            settings,
            known=known,
            schedule=schedule or "serial",
            stride=stride,
            progress=progress,
        )

    def _for_sampling(self, rows: int) -> Transformer:
        """The transformer as it decodes fastest; the copy for one number of rows is kept."""
        if self._prepared is None or self._prepared[0] != rows:
            transformer = self.model.transformer
            dtype = transformer.token_embedding.weight.dtype
            self._prepared = rows, for_inference(transformer, dtype, rows, self.weights)
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
        self.tokenizer.check_painted_size(sizes[0] * factor, sizes[1] * factor)
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
