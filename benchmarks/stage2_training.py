"""One training step of stage two: tokens a second.

    python benchmarks/stage2_training.py [--size small large] [--steps 3] [--repeats 3]

Batch 4; small with one condition token and 256 codes, large with 256 and 256. "as published" computes the
logits of all positions, holds the attention matrix and steps with a plain AdamW, in fp32; GPT-2 is that of
transformers, with SDPA and the same AdamW. Ratios are to "as published". Ours: SDPA, logits
of the codes only, fused AdamW; bf16 is autocast with fp32 weights, as the training loop has it.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.as_published_gpt import SIZES, VOCABULARY, PublishedGPT, interleaved, our_gpt, print_table
from stage2_ar.transformer import next_code_loss, weight_decay_groups
from taming.types import Prefix

BATCH, CODES = 4, 256
PREFIX = {"small": 1, "large": 256}


def timed_steps(
    loss_of: Callable[[], Tensor], optimizer: torch.optim.Optimizer, tokens: int, steps: int
) -> float:
    start = time.perf_counter()
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        loss_of().backward()
        optimizer.step()
    return steps * tokens / (time.perf_counter() - start)


def bench(size: str, steps: int, repeats: int) -> list[str]:
    prefix_length = PREFIX[size]
    ours = our_gpt(size, prefix_length=prefix_length)
    published = PublishedGPT(ours)
    codes = torch.randint(VOCABULARY, (BATCH, CODES))
    condition = torch.randint(VOCABULARY, (BATCH, prefix_length))
    condition_table = nn.Embedding(VOCABULARY, ours.config.width)
    tokens = BATCH * (prefix_length + CODES - 1)

    def our_loss(bf16: bool) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext():
            prefix = Prefix(condition_table(condition), torch.ones_like(condition, dtype=torch.bool))
            logits = ours(codes, prefix)
        return next_code_loss(logits, codes)

    def published_loss() -> Tensor:
        logits = published(torch.cat((condition, codes), dim=1)[:, :-1])[:, prefix_length - 1 :]
        return functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), codes.reshape(-1))

    layers, width, heads = SIZES[size]
    gpt2 = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCABULARY, n_positions=512, n_embd=width, n_layer=layers, n_head=heads,
            activation_function="gelu", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )
    ).train()  # fmt: skip

    def gpt2_loss() -> Tensor:
        logits = gpt2(torch.cat((condition, codes), dim=1)[:, :-1], use_cache=False).logits
        logits = logits[:, prefix_length - 1 :]
        return functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), codes.reshape(-1))

    options = {"lr": 1e-5, "betas": (0.9, 0.95)}
    gpt2_adam = torch.optim.AdamW(gpt2.parameters(), weight_decay=0.01, **options)
    fused = torch.optim.AdamW(weight_decay_groups(ours, 0.01), fused=True, **options)
    plain = torch.optim.AdamW(published.parameters(), weight_decay=0.01, **options)
    contenders: dict[str, Callable[[], float]] = {
        "published": lambda: timed_steps(published_loss, plain, tokens, steps),
        "gpt2": lambda: timed_steps(gpt2_loss, gpt2_adam, tokens, steps),
        "ours": lambda: timed_steps(lambda: our_loss(False), fused, tokens, steps),
        "ours bf16": lambda: timed_steps(lambda: our_loss(True), fused, tokens, steps),
    }
    interleaved(contenders, 1)
    rates = interleaved(contenders, repeats)
    base = rates["published"]
    return [
        f"{size}, {tokens // BATCH} inputs",
        f"{base:.0f}",
        f"{rates['gpt2']:.0f}",
        f"{rates['ours']:.0f}",
        f"{rates['ours'] / base:.2f}",
        f"{rates['ours bf16']:.0f}",
        f"{rates['ours bf16'] / base:.2f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", nargs="+", choices=list(SIZES), default=["small"])
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    rows = [bench(size, arguments.steps, arguments.repeats) for size in arguments.size]
    columns = ["", "as published", "GPT-2", "ours fp32", "ratio", "ours bf16", "ratio"]
    print_table(f"Stage-two training, tokens/s, {torch.get_num_threads()} threads", columns, rows)


if __name__ == "__main__":
    main()
