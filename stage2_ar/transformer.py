"""A decoder-only transformer over codes: prefix and codes in, logits of each next code out.

The input sequence is [prefix | codes without the last]; input position P - 1 + n predicts the n-th cell of
the order in which the model writes (stage2_ar.order). Codes are in that order here; `ARModel` and the
samplers take and give them by raster index.

Axes: B sequences, P prefix positions, N codes, T input positions of a call, D width, V codes of the picture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, assert_never

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from stage2_ar.attention import Attend, AttendOne, KVCache, Positions, attention_mask, one_rotation
from stage2_ar.block import Block
from stage2_ar.conditions.base import segments_of
from stage2_ar.order import Grid, OrderConfig, cells_in_order, inverse, restricted, to_sequence
from stage2_ar.transformer_config import GPTConfig, LlamaConfig
from stage2_ar.windowed_attention import WindowAttend, WindowGrid
from taming.errors import ConfigError, UserError
from taming.layers.position import grid_cells, rotary_2d
from taming.layers.rms_norm import RMSNorm
from taming.types import Prefix, Segment

RASTER = OrderConfig()


def build_transformer(
    config: GPTConfig | LlamaConfig,
    *,
    vocabulary_size: int,
    grid: Grid,
    prefix_length: int,
    order: OrderConfig = RASTER,
) -> Transformer:
    """A transformer for pictures of `vocabulary_size` codes on grids up to `grid` (h, w).

    `prefix_length` is the prefix's length at that grid. Raises ConfigError where the config's table or
    block is too small for them.
    """
    return Transformer(
        config, vocabulary_size=vocabulary_size, grid=grid, prefix_length=prefix_length, order=order
    )


def next_code_loss(logits: Tensor, codes: Tensor, *, smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy in nats of codes (B, N) under logits (B, N, V), in fp32: ().

    With `smoothing` e (Szegedy et al. 2016, arXiv:1512.00567) the target is 1 - e for the code and e / V for
    every code.
    """
    flat = rearrange(logits.float(), "b n v -> (b n) v")
    return functional.cross_entropy(flat, codes.flatten(), label_smoothing=smoothing)


def code_log_likelihood(logits: Tensor, codes: Tensor) -> Tensor:
    """Log-likelihood in nats of each sequence of codes (B, N) under logits (B, N, V), in fp32: (B,)."""
    log_probabilities = functional.log_softmax(logits.float(), dim=-1)
    return log_probabilities.gather(-1, codes[..., None]).squeeze(-1).sum(dim=-1)


class Transformer(nn.Module):
    """Predicts the next code of a grid; see `forward` for training, `prefill` and `step` for sampling."""

    def __init__(
        self,
        config: GPTConfig | LlamaConfig,
        *,
        vocabulary_size: int,
        grid: Grid,
        prefix_length: int,
        order: OrderConfig = RASTER,
    ) -> None:
        super().__init__()
        if order.cells is not None and len(order.cells) != grid[0] * grid[1]:
            raise ConfigError(
                f"order.cells lists {len(order.cells)} cells, but the grid has {grid[0]}x{grid[1]}"
            )
        self.config = config
        self.order = order
        self.vocabulary_size = vocabulary_size
        self.grid = grid
        self.prefix_length = prefix_length
        self.window = config.attention_window if isinstance(config, LlamaConfig) else None
        table_size = vocabulary_size
        self.position_embedding: nn.Parameter | None = None
        match config:
            case GPTConfig():
                table_size = config.table_size or vocabulary_size
                if table_size < vocabulary_size:
                    raise ConfigError(
                        f"table_size {table_size} is smaller than the vocabulary of {vocabulary_size} codes"
                    )
                # The last code is never an input, but its place is kept: it makes grids and blocks agree.
                needed = prefix_length + grid[0] * grid[1]
                block_size = needed if config.block_size is None else config.block_size
                if block_size < needed - 1:
                    raise ConfigError(
                        f"block_size {block_size} is smaller than the sequence: a prefix of {prefix_length} "
                        f"and {grid[0]}x{grid[1]} cells without the last need {needed - 1}"
                    )
                self.position_embedding = nn.Parameter(torch.zeros(1, block_size, config.width))
                self.norm: nn.Module = nn.LayerNorm(config.width)
            case LlamaConfig():
                self.norm = RMSNorm(config.width)
            case _:
                assert_never(config)
        self.token_embedding = nn.Embedding(table_size, config.width)
        self.embedding_dropout = nn.Dropout(config.embedding_dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.recompute = False
        """Keep each block's input only for the backward pass, and compute the rest again."""
        self._compiled: list[Callable[..., Any]] | None = None
        self.head = nn.Linear(config.width, table_size, bias=False)
        self.target_embedding: nn.Parameter | None = None
        if config.target_positions:
            self.target_embedding = nn.Parameter(torch.zeros(grid[0] * grid[1], config.width))
        self._initialise()

    def forward(
        self, codes: Tensor, prefix: Prefix, grid: Grid | None = None, order: Tensor | None = None
    ) -> Tensor:
        """Teacher forcing: codes (B, N) int64 in the order of writing -> logits (B, N, V) of each of them.

        N may be smaller than the grid; `grid` is the model's own unless another, not larger one, is given.
        `order` (h * w,) or (B, h * w) int64 holds the cells' raster indices in the order of writing; None:
        the model's own. Raises UserError for a grid larger than the model's; with an attention window any
        grid will do.
        """
        grid = grid or self.grid
        if self.window is not None:
            return self._forward_windowed(codes, prefix, grid)
        order = self.sequence_cells(grid, codes.device) if order is None else order
        positions = self.positions(prefix, grid, order)
        prefix_length, num_codes = prefix.embeddings.shape[1], codes.shape[1]
        length = prefix_length + num_codes - 1
        cells = self._cell_inputs(prefix, grid, order)
        x = self._inputs(prefix.embeddings, codes[:, :-1], cells, positions, 0)
        mask = attention_mask(_mask_or_none(prefix), self._num_unmasked(prefix_length), 0, length, x.device)
        x = self._run(
            x, Attend(rotation=positions.rotation_of(0, length), mask=mask), keep_from=prefix_length - 1
        )
        return self._logits(x)

    def _forward_windowed(self, codes: Tensor, prefix: Prefix, grid: Grid) -> Tensor:
        """`forward` with an attention window: whole rows of inputs, each begun anew (see WindowGrid)."""
        assert self.window is not None
        assert isinstance(self.config, LlamaConfig)
        prefix_length, (num_codes, width) = prefix.embeddings.shape[1], (codes.shape[1], grid[1])
        num_rows = -(-num_codes // width)
        padded = functional.pad(codes, (0, num_rows * width - num_codes))
        embeddings = self.token_embedding(rearrange(padded, "b (row k) -> b row k", k=width))
        starts = self.row_starts(prefix)[:, None, None].expand(-1, num_rows, 1, -1)
        rows = torch.cat((starts, embeddings), dim=2)
        if prefix.cells is not None:
            # The last input of a row predicts nothing.
            rows = rows + functional.pad(prefix.cells[:, :num_rows], (0, 0, 0, 1)).to(rows.dtype)
        before = prefix.embeddings[:, :-1].to(rows.dtype)
        x = self.embedding_dropout(torch.cat((before, rearrange(rows, "b row k d -> b (row k) d")), dim=1))
        attend = WindowGrid(
            (num_rows, width), self.window, prefix_length, _mask_or_none(prefix), self.config.rotary_base,
            x.device,
        )  # fmt: skip
        x = self._run(x, attend, keep_from=prefix_length - 1)
        x = rearrange(x, "b (row k) d -> b row k d", k=width + 1)[:, :, :-1]
        return self._logits(rearrange(x, "b row k d -> b (row k) d")[:, :num_codes])

    def row_starts(self, prefix: Prefix) -> Tensor:
        """What each row begins with where there is an attention window: the prefix's last, (B, D).

        Raises UserError for a prefix whose positions lie on a grid: a cell would not see them near to it.
        """
        if any(not isinstance(segment, int) for segment in segments_of(prefix)):
            raise UserError(
                "a transformer with an attention window attends to its prefix from everywhere alike, but "
                "this condition's prefix is a grid of cells; use condition.placement=aligned"
            )
        return prefix.embeddings[:, -1].to(self.token_embedding.weight.dtype)

    def answer(self, x: Tensor, attend: Attend | WindowAttend) -> Tensor:
        """Inputs (B, T, D), with all that is added to them, -> logits (B, T, V)."""
        return self._logits(self._run(x, attend))

    @torch.no_grad()
    def prefill(
        self,
        prefix: Prefix,
        codes: Tensor,
        grid: Grid | None = None,
        *,
        order: Tensor | None = None,
        last: Tensor | None = None,
        keep: bool = True,
    ) -> tuple[Tensor, KVCache | None]:
        """Take in a prefix and codes (B, n), n >= 0: logits (B, V) of the next code, and the cache.

        `order` (h * w,) is as in `forward`; later steps keep to it. `last` (B,) int64 says how many of the
        codes each sequence really has, where they are padded on the right to one length: the logits are of
        the code after those. `keep=False` makes no cache, for windows that move on at once. The last block
        answers one position only.
        """
        assert self.window is None, "models with an attention window are sampled by sample_windowed"
        grid = grid or self.grid
        order = self.sequence_cells(grid, codes.device) if order is None else order
        cache = self.new_cache(prefix, grid, order) if keep else None
        if cache is not None:
            positions, cells = cache.positions, cache.cells
        else:
            positions, cells = self.positions(prefix, grid, order), self._cell_inputs(prefix, grid, order)
        batch, prefix_length = prefix.embeddings.shape[:2]
        x = self._inputs(prefix.embeddings, codes.expand(batch, -1), cells, positions, 0)
        length = x.shape[1]
        mask = attention_mask(_mask_or_none(prefix), self._num_unmasked(prefix_length), 0, length, x.device)
        attend = Attend(
            rotation=positions.rotation_of(0, length),
            mask=mask,
            cache=cache,
            last=None if last is None else last + prefix_length - 1,
        )
        x = self._run(x, attend, only_last=True)
        if cache is not None:
            cache.length = length
        return self._logits(x)[:, 0], cache

    @torch.no_grad()
    def step(self, codes: Tensor, cache: KVCache) -> Tensor:
        """Take in the next codes (B, m), m >= 1: logits (B, V) of the code after them."""
        start, length = cache.length, codes.shape[1]
        if length == 1 and not self.training:
            cache.length = start + 1
            return self._step_one(codes[:, 0], cache, start)
        embeddings = self.token_embedding(codes)
        cells = None if cache.cells is None else cache.cells[:, cache.num_codes + 1 :][:, :length]
        x = self._place(embeddings, cells, cache.positions, start)
        mask = attention_mask(
            cache.prefix_mask, self._num_unmasked(cache.prefix_length), start, length, x.device
        )
        rotation = cache.positions.rotation_of(start, start + length)
        x = self._run(x, Attend(start=start, rotation=rotation, mask=mask, cache=cache), only_last=True)
        cache.length = start + length
        return self._logits(x)[:, 0]

    def _step_one(self, codes: Tensor, cache: KVCache, position: int) -> Tensor:
        """`step` for one code a sequence, (B,) -> (B, V)."""
        positions = cache.positions
        x = self.token_embedding(codes)
        if positions.embedding is not None:
            x = x + positions.embedding[..., position, :]
        if cache.cells is not None:
            x = x + cache.cells[:, position + 1 - cache.prefix_length].to(x.dtype)
        rotation = None
        if positions.rotation is not None:
            rotation = one_rotation(positions.rotation, position)
        mask = None if cache.visible is None else cache.visible[..., : position + 1]
        return self.answer_one(x, AttendOne(cache, position, rotation, mask))

    def answer_one(self, x: Tensor, attend: AttendOne) -> Tensor:
        """One input of each sequence, (B, D) with all that is added to it, -> logits (B, V)."""
        for layer, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            x = block.step(x, attend, layer)
        return self._logits(x)

    def new_cache(self, prefix: Prefix, grid: Grid, order: Tensor | None = None) -> KVCache:
        """An empty cache for a prefix (B, P, D) and a grid of codes after it, in an order (h * w,)."""
        order = self.sequence_cells(grid, prefix.embeddings.device) if order is None else order
        batch, prefix_length = prefix.embeddings.shape[:2]
        shape = (batch, self.config.num_heads, prefix_length + grid[0] * grid[1], self.config.head_dim)
        table, mask = self.token_embedding.weight, _mask_or_none(prefix)
        return KVCache(
            keys=[table.new_empty(shape) for _ in self.blocks],
            values=[table.new_empty(shape) for _ in self.blocks],
            positions=self.positions(prefix, grid, order),
            prefix_length=prefix_length,
            cells=self._cell_inputs(prefix, grid, order),
            prefix_mask=mask,
            visible=None
            if mask is None
            else functional.pad(mask, (0, grid[0] * grid[1]), value=True)[:, None, None],
        )

    def sequence_cells(self, grid: Grid, device: torch.device | str = "cpu") -> Tensor:
        """The model's order of writing on a grid: (h * w,) int64 raster indices of its cells.

        A grid smaller than the model's is written in the order that its cells have there.
        """
        if self.order.kind == "raster":
            return torch.arange(grid[0] * grid[1], device=device)
        return restricted(cells_in_order(self.order, self.grid), self.grid, grid).to(device)

    def positions(self, prefix: Prefix, grid: Grid, order: Tensor | None = None) -> Positions:
        """Learned positions or rotations of the prefix and of each cell of `grid`, in the order of writing.

        Where cells lie decides about rotations, and when the model's own order comes to them about learned
        positions (as published), whatever the `order`, (h * w,) or (B, h * w), of this call. On a grid
        smaller than the model's a cell keeps the position that its row and column have there.
        """
        if grid[0] > self.grid[0] or grid[1] > self.grid[1]:
            raise UserError(
                f"a grid of {grid[0]}x{grid[1]} cells is larger than the {self.grid[0]}x{self.grid[1]} that "
                "the transformer was built for; sample it with a sliding window"
            )
        device = prefix.embeddings.device
        order = self.sequence_cells(grid, device) if order is None else order
        cells = grid_cells(*grid, device=device)[order]  # (h * w, 2) or (B, h * w, 2)
        segments = segments_of(prefix)
        if isinstance(self.config, LlamaConfig):
            before = torch.cat([_segment_cells(segment, cells) for segment in segments])
            places = torch.cat((before.expand(*cells.shape[:-2], -1, -1), cells), dim=-2)
            cos, sin = rotary_2d(places, self.config.head_dim, self.config.rotary_base)
            dtype = self.token_embedding.weight.dtype
            if order.ndim == 2:
                cos, sin = cos[:, None], sin[:, None]  # all heads alike
            return Positions(None, (cos.to(dtype), sin.to(dtype)))
        assert self.position_embedding is not None
        index, offset = [], 0
        for segment in segments:
            if isinstance(segment, int):
                index.append(offset + torch.arange(segment, device=device))
                offset += segment
            else:
                index.append(offset + self._raster_index(grid_cells(*segment, device=device)))
                offset += self.grid[0] * self.grid[1]
        before = torch.cat(index)
        ranks = self._raster_index(cells)
        if self.order.kind != "raster":
            ranks = inverse(self.sequence_cells(self.grid, device))[ranks]
        places = torch.cat((before.expand(*ranks.shape[:-1], -1), self.prefix_length + ranks), dim=-1)
        # The very last place of an imported block may be missing: that code is never an input.
        return Positions(
            self.position_embedding[0, places.clamp(max=self.position_embedding.shape[1] - 1)], None
        )

    def _cell_inputs(self, prefix: Prefix, grid: Grid, order: Tensor) -> Tensor | None:
        """What is added to the inputs that predict each cell, in the order of writing: (B or 1, h * w, D)."""
        cells = None
        if prefix.cells is not None:
            cells = to_sequence(rearrange(prefix.cells, "b h w d -> b (h w) d"), order)
        if self.target_embedding is not None:
            index = self._raster_index(grid_cells(*grid, device=order.device)[order])
            targets = self.target_embedding[index]
            targets = targets if order.ndim == 2 else targets[None]
            cells = targets if cells is None else cells + targets
        return cells

    def _inputs(
        self, prefix: Tensor, codes: Tensor, cells: Tensor | None, positions: Positions, start: int
    ) -> Tensor:
        """[prefix | codes] with everything that is added to them: (B, P + n, D).

        cells (B, >= n + 1, D) belong to the last prefix position and to the codes.
        """
        embeddings = torch.cat(
            (prefix.to(self.token_embedding.weight.dtype), self.token_embedding(codes)), dim=1
        )
        if cells is not None:
            cells = functional.pad(cells[:, : codes.shape[1] + 1], (0, 0, prefix.shape[1] - 1, 0))
        return self._place(embeddings, cells, positions, start)

    def _place(self, x: Tensor, cells: Tensor | None, positions: Positions, start: int) -> Tensor:
        if positions.embedding is not None:
            x = x + positions.embedding[..., start : start + x.shape[1], :]
        if cells is not None:
            x = x + cells.to(x.dtype)
        dropped: Tensor = self.embedding_dropout(x)
        return dropped

    def _run(
        self, x: Tensor, attend: Attend | WindowAttend, *, keep_from: int = 0, only_last: bool = False
    ) -> Tensor:
        final, learns = len(self.blocks) - 1, torch.is_grad_enabled()
        blocks: Iterable[Callable[..., Any]] = self.blocks
        if learns and self._compiled is not None:
            blocks = self._compiled
        for layer, block in enumerate(blocks):
            kept, alone = (keep_from, only_last) if layer == final else (0, False)
            if learns and self.recompute:
                x = checkpoint(block, x, attend, layer, use_reentrant=False, keep_from=kept, only_last=alone)
            else:
                x = block(x, attend, layer, keep_from=kept, only_last=alone)
        return x

    def compile_blocks(self) -> None:
        """Run the blocks through torch.compile wherever gradients are recorded; sampling stays as it is.

        A copy of the module that was made before is not affected. Compiled when first called.
        """
        self._compiled = [torch.compile(block) for block in self.blocks]

    def _logits(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(x))
        return logits[..., : self.vocabulary_size]

    def _raster_index(self, cells: Tensor) -> Tensor:
        """Raster indices (...) on the model's own grid of cells (..., 2)."""
        return cells[..., 0] * self.grid[1] + cells[..., 1]

    def _num_unmasked(self, prefix_length: int) -> int:
        return min(self.config.num_unmasked, prefix_length) if isinstance(self.config, GPTConfig) else 0

    def _initialise(self) -> None:
        """N(0, 0.02) for matrices and embeddings, zero biases, as published.

        For `llama` the projections back into the residual stream are scaled by 1 / sqrt(2 layers)
        (Radford et al. 2019).
        """
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for table in (self.position_embedding, self.target_embedding):
            if table is not None:
                nn.init.normal_(table, std=0.02)
        if isinstance(self.config, LlamaConfig):
            for name, parameter in self.named_parameters():
                if name.endswith(("proj.weight", "down.weight")):
                    nn.init.normal_(parameter, std=0.02 / (2 * self.config.num_layers) ** 0.5)
            if self.config.zero_init_head:
                nn.init.zeros_(self.head.weight)


def weight_decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two parameter groups: weights of linear and convolution layers decay; all others (embeddings,
    positions, norms, biases) do not, as published."""
    decayed = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d)
    }
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if id(p) in decayed], "weight_decay": weight_decay},
        {"params": [p for p in parameters if id(p) not in decayed], "weight_decay": 0.0},
    ]


def _mask_or_none(prefix: Prefix) -> Tensor | None:
    return None if bool(prefix.mask.all()) else prefix.mask


def _segment_cells(segment: Segment, like: Tensor) -> Tensor:
    """Where the positions of a part of a prefix lie; those about the whole picture at (0, 0)."""
    if isinstance(segment, int):
        return like.new_zeros(segment, 2)
    return grid_cells(*segment, device=like.device)
