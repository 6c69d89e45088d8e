"""What it costs to weigh the adversarial term over a whole step that is cut into micro-batches.

    python benchmarks/accumulation.py [--size 64|256] [--micro-batches 2] [--micro-batches 4] [--repeats N]

"each its own" balances every micro-batch by itself in one pass, which is not the whole batch's step; "two
backwards" keeps the gradients of both terms apart until all micro-batches were seen; "judged first" is ours
(stage1_vq/passes.py). Medians of interleaved repeats after a warm-up; memory is the peak of what torch's
allocator holds beyond the start of a step. VGG weights are random: the same work.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.peak_memory import peak_bytes
from benchmarks.stage1_step import train_config
from stage1_vq.adversary import Adversary
from stage1_vq.passes import Passes, Seen
from stage1_vq.task import VQTask
from taming.metrics.lpips import PerceptualDistance


class EachItsOwn(Passes):
    """The weight of every micro-batch follows from that one alone."""

    def _in_two_passes(self, inputs: list[Tensor], step: int, adversary: Adversary, blind: bool) -> Seen:
        return self._in_one_pass(inputs, step, adversary, blind)


class TwoBackwards(Passes):
    """Both terms go back through the autoencoder, and are added once the weight is known."""

    def _in_two_passes(self, inputs: list[Tensor], step: int, adversary: Adversary, blind: bool) -> Seen:
        seen, share, judgements = Seen(), 1 / len(inputs), []
        weights = [p for p in self.model.parameters() if p.requires_grad]
        apart = [torch.zeros_like(p) for p in weights]
        for number, images in enumerate(inputs):
            output = self._forward(images)
            verdict = self.judge(output, images, step, adversary, number, len(inputs), blind=blind)
            assert verdict.judgement is not None
            picture, judgement = output.reconstruction, verdict.judgement
            judgements.append(judgement)
            wish = share * (picture * judgement.gradient.to(picture.dtype)).sum()
            found = torch.autograd.grad(wish, weights, retain_graph=True, allow_unused=True)
            torch._foreach_add_(
                apart, [torch.zeros_like(p) if g is None else g for p, g in zip(weights, found, strict=True)]
            )
            del found
            fake = self._go_back(output, verdict.wanted, share)
            del output
            self._teach(adversary, images, fake, step, share, verdict, number == len(inputs) - 1)
            seen.add(verdict.logs, verdict.counts, share)
        factor = float(adversary.factor(step) * adversary.weigh(judgements))
        for parameter, gradient in zip(weights, apart, strict=True):
            parameter.grad = (
                gradient * factor if parameter.grad is None else parameter.grad.add_(gradient, alpha=factor)
            )
        return seen


WAYS: dict[str, type[Passes]] = {
    "each its own": EachItsOwn,
    "two backwards": TwoBackwards,
    "judged first": Passes,
}


def make_task(size: int, way: type[Passes]) -> VQTask:
    torch.manual_seed(0)
    task = VQTask(train_config(size), perceptual=PerceptualDistance(random_weights=True))
    AcceleratorState._reset_state(True)
    task.prepare(Accelerator(cpu=True), 100)
    task.passes.__class__ = way
    return task


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, choices=[64, 256], default=64)
    parser.add_argument("--micro-batches", type=int, action="append")
    parser.add_argument("--pictures", type=int, default=4, help="of a micro-batch")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {arguments.size} px, fp32")
    print(f"{'micro-batches':>13}  {'way':<14} {'seconds':>8} {'ratio':>6} {'peak MiB':>9} {'ratio':>6}")
    for count in arguments.micro_batches or [1, 2, 4]:
        tasks = {name: make_task(arguments.size, way) for name, way in WAYS.items()}
        images = torch.rand(count, arguments.pictures, 3, arguments.size, arguments.size) * 2 - 1
        batches = [{"image": part} for part in images]
        peaks: dict[str, int] = {}
        for name, task in tasks.items():
            task.train_step(batches, 50)
            peaks[name] = peak_bytes(partial(task.train_step, batches, 51))
        seconds: dict[str, list[float]] = {name: [] for name in tasks}
        for step in range(arguments.repeats):
            for name, task in tasks.items():
                start = time.perf_counter()
                task.train_step(batches, 52 + step)
                seconds[name].append(time.perf_counter() - start)
        first = statistics.median(seconds["each its own"])
        for name in tasks:
            median = statistics.median(seconds[name])
            print(
                f"{count:>13}  {name:<14} {median:8.3f} {median / first:6.2f} {peaks[name] / 2**20:9.0f} "
                f"{peaks[name] / peaks['each its own']:6.2f}"
            )


if __name__ == "__main__":
    main()
