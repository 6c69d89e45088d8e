"""A step of decoding whose shapes never change, and its capture as one CUDA graph.

On a GPU a step of decoding is bound by launching its kernels, about a millisecond a layer in eager mode
whatever the width. A graph launches all of them at once, but replays the same shapes and the same addresses:
so the number of the cell is a tensor, keys and values are read to their end behind a mask, and guidance and
drawing happen on the device too. The host only says "again".

Axes: B pictures, R = B or 2 B rows of the transformer's batch (guidance doubles it), N cells, P prefix
positions, L positions of the cache, H heads, C channels of a head, D width.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from stage2_ar.attention import AttendOne, KVCache, Positions, one_rotation
from stage2_ar.sampling.guidance import guided
from stage2_ar.sampling.sample import SamplingSettings, draw
from stage2_ar.transformer import Transformer
from taming.errors import UserError

Known = tuple[Tensor, Tensor]
"""Codes (B, N) and whether they are given (B, N), in the order of writing."""

_KEPT_GRAPHS = 4
_WARM_UP_STEPS = 3

Key = tuple[object, ...]
_kept: weakref.WeakKeyDictionary[Transformer, dict[Key, StaticStep]] = weakref.WeakKeyDictionary()


def finish_statically(
    transformer: Transformer,
    cache: KVCache,
    codes: Tensor,
    start: int,
    uniforms: Tensor,
    settings: SamplingSettings,
    guide: bool,
    known: Known | None,
    after_cell: Callable[[int], None],
) -> Tensor:
    """Draw the cells from number `start` >= 1 on: codes (B, N), in the order of writing.

    The first `start` of `codes` are there, and all but the last of them are in `cache`. uniforms (B, N)
    float64. `after_cell` is called with the number of cells that were drawn, on a GPU as soon as they are
    asked for. On a GPU the step is captured as one graph, which is kept for the next call of these shapes
    and settings.
    Raises UserError where the step cannot be captured.
    """
    key = _key(transformer, cache, uniforms, settings, guide, known)
    steps = _kept.setdefault(transformer, {})
    step = steps.pop(key, None)
    if step is None:
        step = StaticStep(transformer, cache, uniforms, settings, guide, known)
        if uniforms.is_cuda:
            step.capture()
    if uniforms.is_cuda:
        steps[key] = step  # the latest last
        for old in list(steps)[:-_KEPT_GRAPHS]:
            del steps[old]
    step.load(cache, codes, start, uniforms, known)
    for cell in range(start, uniforms.shape[1]):
        step.advance()
        after_cell(cell + 1)
    return step.codes.clone()


class StaticStep:
    """Takes in the code that was drawn last and draws the next one, in buffers of its own."""

    def __init__(
        self,
        transformer: Transformer,
        cache: KVCache,
        uniforms: Tensor,
        settings: SamplingSettings,
        guide: bool,
        known: Known | None,
    ) -> None:
        # Weak, for the transformer's entry in _kept holds this object.
        self._transformer = weakref.ref(transformer)
        self.settings, self.guide = settings, guide
        count, device = uniforms.shape[1], uniforms.device
        rows, heads, positions, channels = cache.keys[0].shape
        # Kernels with a mask want rows of it that are multiples of eight.
        length = -(-positions // 8) * 8
        shape, like = (rows, heads, length, channels), cache.keys[0]
        learned, rotation = cache.positions.embedding, cache.positions.rotation
        self.cache = KVCache(
            # Zeros: what was never written is hidden by a mask, which cannot hide a NaN.
            keys=[like.new_zeros(shape) for _ in cache.keys],
            values=[like.new_zeros(shape) for _ in cache.values],
            positions=Positions(
                None if learned is None else learned.clone(),
                None if rotation is None else (rotation[0].clone(), rotation[1].clone()),
            ),
            prefix_length=cache.prefix_length,
            cells=None if cache.cells is None else cache.cells.to(like.dtype, copy=True),
            prefix_mask=None,
            visible=None if cache.visible is None else _to_length(cache.visible, length),
        )
        self.places = torch.arange(length, device=device)
        self.scales = torch.tensor([settings.scale_of(cell, count) for cell in range(count)], device=device)
        self.uniforms = uniforms.clone()
        self.known = None if known is None else (known[0].clone(), known[1].clone())
        self.codes = torch.zeros(uniforms.shape, dtype=torch.int64, device=device)
        self.cell = torch.ones(1, dtype=torch.int64, device=device)
        """The number of the cell that is drawn next."""
        self.graph: torch.cuda.CUDAGraph | None = None

    def load(self, cache: KVCache, codes: Tensor, start: int, uniforms: Tensor, known: Known | None) -> None:
        """Begin anew after `start` codes, with the keys and values of a cache that was just filled."""
        own, taken = self.cache, cache.length
        for mine, given in zip(own.keys + own.values, cache.keys + cache.values, strict=True):
            mine[:, :, :taken] = given[:, :, :taken]
        pairs = [(own.positions.embedding, cache.positions.embedding), (own.cells, cache.cells)]
        if cache.visible is not None:
            pairs.append((own.visible, _to_length(cache.visible, len(self.places))))
        if own.positions.rotation is not None and cache.positions.rotation is not None:
            pairs += zip(own.positions.rotation, cache.positions.rotation, strict=True)
        if self.known is not None and known is not None:
            pairs += zip(self.known, known, strict=True)
        for buffer, value in [*pairs, (self.uniforms, uniforms), (self.codes, codes)]:
            if buffer is not None and value is not None:
                buffer.copy_(value)
        self.cell.fill_(start)

    def advance(self) -> None:
        """Draw one more cell."""
        if self.graph is None:
            self.step()
        else:
            self.graph.replay()

    def step(self) -> None:
        """One step on the device alone: nothing here may wait for it or depend on a value of it."""
        transformer = self._transformer()
        assert transformer is not None
        cache, cell = self.cache, self.cell
        position = cell + (cache.prefix_length - 1)
        before = self.codes.index_select(1, cell - 1).squeeze(1)
        x = transformer.token_embedding(torch.cat((before, before)) if self.guide else before)
        if cache.positions.embedding is not None:
            x = x + cache.positions.embedding.index_select(0, position)
        if cache.cells is not None:
            x = x + cache.cells.index_select(1, cell).squeeze(1)
        rotation = None
        if cache.positions.rotation is not None:
            rotation = one_rotation(cache.positions.rotation, position)
        seen = (self.places <= position)[None, None, None]
        if cache.visible is not None:
            seen = seen & cache.visible
        # As what is added to the scores, once for all layers: kernels would make it of a bool each time.
        bias = torch.zeros_like(seen, dtype=x.dtype).masked_fill_(~seen, float("-inf"))
        logits = transformer.answer_one(x, AttendOne(cache, position, rotation, bias))
        if self.guide:
            logits = guided(logits, self.scales.index_select(0, cell))
        drawn = draw(logits, self.uniforms.index_select(1, cell).squeeze(1), self.settings)
        if self.known is not None:
            known_codes, is_known = (part.index_select(1, cell).squeeze(1) for part in self.known)
            drawn = torch.where(is_known, known_codes, drawn)
        self.codes.index_copy_(1, cell, drawn[:, None])
        cell.add_(1)

    def capture(self) -> None:
        """Capture `step` as one CUDA graph. What it does to the buffers meanwhile is undone by `load`.

        Raises UserError where torch cannot capture it.
        """
        # First some steps on a stream of their own, as torch asks for: kernels load and libraries allocate.
        stream = torch.cuda.Stream(self.codes.device)
        stream.wait_stream(torch.cuda.current_stream(self.codes.device))
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP_STEPS):
                self.cell.fill_(1)
                self.step()
        torch.cuda.current_stream(self.codes.device).wait_stream(stream)
        self.cell.fill_(1)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.step()
        except RuntimeError as error:
            raise UserError(
                f"this GPU could not capture a step of sampling as a CUDA graph ({error}); sample without "
                "one by pipe.to(eager=True), or on the CPU by --device cpu"
            ) from error
        self.graph = graph


def _key(
    transformer: Transformer,
    cache: KVCache,
    uniforms: Tensor,
    settings: SamplingSettings,
    guide: bool,
    known: Known | None,
) -> Key:
    """What a captured step depends on besides the values in its buffers: shapes, settings, and addresses."""
    return (
        settings,
        guide,
        known is not None,
        cache.prefix_length,
        cache.visible is not None,
        None if cache.cells is None else tuple(cache.cells.shape),
        tuple(cache.keys[0].shape),
        cache.keys[0].dtype,
        tuple(uniforms.shape),
        uniforms.device,
        tuple(parameter.data_ptr() for parameter in transformer.parameters()),
    )


def _to_length(visible: Tensor, length: int) -> Tensor:
    """(B, 1, 1, positions) bool, with places that are never reached added: (B, 1, 1, length)."""
    return functional.pad(visible, (0, length - visible.shape[-1]), value=True)
