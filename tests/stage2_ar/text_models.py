"""Tiny text encoders with random weights, as transformers saves them; nothing is downloaded."""

from __future__ import annotations

import string
from pathlib import Path

import torch


def write_clip(folder: Path, *, seed: int = 0, hidden_size: int = 16, pickled: bool = False) -> Path:
    """A CLIP text model that spells words letter by letter, 20 positions, in a new folder."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    tokens = ["<|startoftext|>", "<|endoftext|>", *string.ascii_lowercase]
    tokens += [f"{letter}</w>" for letter in string.ascii_lowercase]
    tokenizer = CLIPTokenizer(
        vocab={token: number for number, token in enumerate(tokens)}, merges=[], unk_token="<|endoftext|>"
    )
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=hidden_size,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=20,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    model = CLIPTextModel(config)
    for parameter in model.parameters():  # as initialised, all words look alike
        torch.nn.init.normal_(parameter, std=0.5)
    folder.mkdir(parents=True)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    if pickled:
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    return folder


def write_t5(folder: Path, tokenizer_from: Path) -> Path:
    """A whole T5, decoder included, with the tokenizer of another folder."""
    from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=60,
        d_model=12,
        d_kv=6,
        d_ff=16,
        num_layers=1,
        num_decoder_layers=1,
        num_heads=2,
    )
    folder.mkdir(parents=True)
    T5ForConditionalGeneration(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer_from).save_pretrained(folder)
    return folder
