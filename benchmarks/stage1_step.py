"""One training step of stage one, both players: ours beside the published order of work.

    python benchmarks/stage1_step.py [--size 64|256] [--repeats N]

"published order" is made of our own modules but works as the published trainer does
(taming-transformers): the autoencoder and LPIPS run for each player, SiLU written as x * sigmoid(x),
attention with its matrix held, the adaptive weight by two backward passes through retained graphs, LPIPS in
train mode, fp32, NCHW, plain Adam.

Medians of interleaved repeats after a warm-up: the ratios are to be read, not the seconds. Memory is the
peak of what torch's allocator holds beyond the start of a step, from the profiler's allocation events, in a
step of its own. VGG weights are random: the same work. The C library's allocator is at its defaults unless
the environment says otherwise.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import lpips
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.peak_memory import peak_bytes
from stage1_vq.adversary import frozen
from stage1_vq.config import VQTrainConfig
from stage1_vq.loss import adaptive_weight
from stage1_vq.model import VQModel
from stage1_vq.task import VQTask
from taming.config import build_config
from taming.gan.discriminators.patchgan import PatchGAN
from taming.gan.losses import discriminator_loss, generator_loss
from taming.metrics.lpips import PerceptualDistance

SETTINGS = {
    64: {"channels": 32, "batch": 8, "resolution": 64, "attention_resolutions": [4]},
    256: {"channels": 128, "batch": 1, "resolution": 256, "attention_resolutions": [16]},
}


def train_config(size: int) -> VQTrainConfig:
    setting = SETTINGS[size]
    return build_config(
        VQTrainConfig,
        {
            "data": {"kind": "scenes"},
            "model": {
                "channels": setting["channels"],
                "resolution": setting["resolution"],
                "attention_resolutions": setting["attention_resolutions"],
                "quantizer": {"kind": "nearest", "codebook_size": 1024, "code_dim": 256},
            },
            "loss": {"perceptual_weight": 1.0},
            "optimizer": {"learning_rate": 1e-5},
            "training": {"steps": 100, "batch_size": setting["batch"], "ema_decay": None, "clip_norm": None},
        },
    )


class OurStep:
    """VQTask.train_step as the loop calls it."""

    def __init__(self, size: int, precision: str) -> None:
        torch.manual_seed(0)
        self.task = VQTask(train_config(size), perceptual=PerceptualDistance(random_weights=True))
        AcceleratorState._reset_state(True)
        self.task.prepare(Accelerator(cpu=True, mixed_precision="bf16" if precision == "bf16" else "no"), 100)

    def __call__(self, images: Tensor) -> None:
        self.task.train_step([{"image": images}], step=50)


class PublishedOrder:
    """The same step in the published order, fp32."""

    def __init__(self, size: int) -> None:
        torch.manual_seed(0)
        config = train_config(size)
        self.model = VQModel(config.model).to(memory_format=torch.contiguous_format)
        assert config.discriminator is not None
        self.weight = config.discriminator.weight
        self.discriminator = PatchGAN(config.discriminator.network)
        self.lpips = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False).requires_grad_(False).train()
        self.players = [
            torch.optim.Adam(module.parameters(), lr=1e-5, betas=(0.5, 0.9), foreach=False)
            for module in (self.model, self.discriminator)
        ]

    def __call__(self, images: Tensor) -> None:
        generator, critic = self.players
        with frozen(self.discriminator):
            reconstruction, quantizer_loss = published_forward(self.model, images)
            nll = self._nll(reconstruction, images)
            g_loss = generator_loss(self.discriminator(reconstruction))
            weight = adaptive_weight(nll, g_loss, self.model.last_layer) * self.weight
            generator.zero_grad()
            (nll + weight * g_loss + quantizer_loss).backward()
            generator.step()
        with frozen(self.model):
            reconstruction, _ = published_forward(self.model, images)
            self._nll(reconstruction, images)
            real, fake = self.discriminator(images), self.discriminator(reconstruction.detach())
            critic.zero_grad()
            discriminator_loss(real, fake, "hinge").backward()
            critic.step()

    def _nll(self, reconstruction: Tensor, images: Tensor) -> Tensor:
        rec = (images - reconstruction).abs() + self.lpips(images, reconstruction)
        return rec.mean()


def published_forward(model: VQModel, images: Tensor) -> tuple[Tensor, Tensor]:
    h = model.encoder.conv_in(images)
    for level in model.encoder.down:
        h = _level(level, h)
    h = model.encoder.conv_out(_swish(model.encoder.norm_out(_middle(model.encoder.mid, h))))
    z = model.quant_conv(h)
    flat = z.permute(0, 2, 3, 1).reshape(-1, z.shape[1])
    codes = model.quantize.embedding.weight
    distances = flat.square().sum(1, keepdim=True) + codes.square().sum(1) - 2 * flat @ codes.t()
    indices = distances.argmin(1)
    quantized = F.embedding(indices, codes).view(z.shape[0], *z.shape[2:], -1).permute(0, 3, 1, 2)
    loss = F.mse_loss(quantized.detach(), z) + 0.25 * F.mse_loss(quantized, z.detach())
    h = model.decoder.conv_in(model.post_quant_conv((z + (quantized - z).detach()).contiguous()))
    h = _middle(model.decoder.mid, h)
    for level in reversed(model.decoder.up):
        h = _level(level, h)
    return model.decoder.conv_out(_swish(model.decoder.norm_out(h))), loss


def _swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def _level(level: nn.Module, h: Tensor) -> Tensor:
    for index, block in enumerate(level.block):
        h = _block(block, h)
        if len(level.attn):
            h = _attention(level.attn[index], h)
    if level.downsample is not None:
        h = level.downsample.conv(F.pad(h, (0, 1, 0, 1)))
    if level.upsample is not None:
        h = level.upsample.conv(F.interpolate(h, scale_factor=2.0, mode="nearest"))
    return h


def _middle(mid: nn.Module, h: Tensor) -> Tensor:
    h = _attention(mid.attn_1, _block(mid.block_1, h))
    return _block(mid.block_2, h)


def _block(block: nn.Module, x: Tensor) -> Tensor:
    h = block.conv1(_swish(block.norm1(x)))
    h = block.conv2(_swish(block.norm2(h)))
    return (x if block.nin_shortcut is None else block.nin_shortcut(x)) + h


def _attention(attn: nn.Module, x: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    h = attn.norm(x)
    q, k, v = (layer(h).reshape(batch, channels, height * width) for layer in (attn.q, attn.k, attn.v))
    weights = torch.softmax(torch.bmm(q.transpose(1, 2), k) * channels**-0.5, dim=2)
    h = torch.bmm(v, weights.transpose(1, 2)).reshape(batch, channels, height, width)
    return x + attn.proj_out(h)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, choices=list(SETTINGS), action="append")
    parser.add_argument("--repeats", type=int, help="default 5 at 64 px, 2 at 256 px")
    parser.add_argument("--only", choices=["published", "fp32", "bf16"], action="append")
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"{'size':>5} {'step':<22} {'seconds':>8} {'ratio':>6} {'peak MiB':>9} {'ratio':>6}")
    for size in arguments.size or list(SETTINGS):
        builders: dict[str, Callable[[], Callable[[Tensor], None]]] = {
            "published": lambda size=size: PublishedOrder(size),
            "fp32": lambda size=size: OurStep(size, "fp32"),
            "bf16": lambda size=size: OurStep(size, "bf16"),
        }
        steps = {name: build() for name, build in builders.items() if name in (arguments.only or builders)}
        images = torch.rand(SETTINGS[size]["batch"], 3, size, size) * 2 - 1
        peaks = {}
        for name, step in steps.items():
            step(images)  # the first one also makes the optimisers' state
            peaks[name] = peak_bytes(partial(step, images))
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(arguments.repeats or (5 if size == 64 else 2)):
            for name, step in steps.items():
                start = time.perf_counter()
                step(images)
                seconds[name].append(time.perf_counter() - start)
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        for name in steps:
            faster = medians.get("published", float("nan")) / medians[name]
            leaner = peaks[name] / peaks.get("published", float("nan"))
            label = name if name == "published" else f"ours {name}"
            mebibytes = peaks[name] / 2**20
            print(f"{size:>5} {label:<22} {medians[name]:8.3f} {faster:6.2f} {mebibytes:9.0f} {leaner:6.2f}")


if __name__ == "__main__":
    main()
