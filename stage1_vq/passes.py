"""How the gradients of a step come about, over its micro-batches.

The graph is cut at the reconstruction: what the reconstruction loss and the discriminator want of it is found
as two gradients of the picture, and their weighted sum goes back through decoder and encoder once.

One micro-batch, or a weight that is known beforehand, needs one pass. The adaptive weight of several
micro-batches is only known once all of them were judged: then a first pass, which keeps no graph but the
last one's, judges, and a second one repeats the forward of the others and goes back. That takes less than
two backward passes for each would, and no second set of gradients.

Spectral norms of the decoder take one step of their power iteration a step, like the weights, and not one a
forward: all micro-batches meet the same. A repeated forward counts in no running statistic.

Axes: B pictures of a micro-batch, C channels, H W pixels, K codes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from stage1_vq.adversary import Adversary, Judgement
from stage1_vq.config import VQTrainConfig
from stage1_vq.loss import blind_error, reconstruction_loss
from stage1_vq.model import VQModel, VQOutput
from taming.gan.critic import Look
from taming.gan.forward_state import ForwardState
from taming.layers.spectral_norm import Directions
from taming.metrics.codebook import count_codes
from taming.training.distributed import reduced_if


@dataclass
class Seen:
    """What is known of a step once its gradients are there."""

    logs: dict[str, Tensor] = field(default_factory=dict)
    """Detached () each: means over this process's micro-batches."""
    counts: Tensor | None = None
    """(K,) int64: how often this process's pictures chose each code."""

    def add(self, logs: dict[str, Tensor], counts: Tensor, share: float) -> None:
        for name, value in logs.items():
            self.logs[name] = self.logs.get(name, 0) + share * value
        self.counts = counts if self.counts is None else self.counts + counts


@dataclass(frozen=True)
class _Verdict:
    """What all losses say of the reconstructions of a micro-batch."""

    wanted: Tensor
    """(B, C, H, W): the gradient there of all losses but the adversarial one."""
    judgement: Judgement | None
    look: Look | None
    logs: dict[str, Tensor]
    counts: Tensor

    def gradient(self, weight: Tensor | float) -> Tensor:
        return self.wanted if self.judgement is None else self.wanted + weight * self.judgement.gradient


class Passes:
    """Gradients of both players for the micro-batches of a step.

    `autoencoder` is the model as it was wrapped for several processes, which exchange its gradients once a
    step.
    """

    def __init__(
        self,
        config: VQTrainConfig,
        accelerator: Accelerator,
        model: VQModel,
        autoencoder: nn.Module,
        perceptual: nn.Module | None,
    ) -> None:
        self.config, self.accelerator = config, accelerator
        self.model, self.autoencoder, self.perceptual = model, autoencoder, perceptual

    def gradients(
        self, inputs: Sequence[Tensor], step: int, adversary: Adversary | None, *, blind: bool
    ) -> Seen:
        """Add the gradients of the micro-batches `inputs` (B, C, H, W), of one size, to both players'.

        `blind`: the log is to have the error of painting each picture in its mean colour.
        """
        self._directions = Directions(self.model.decoder)
        if adversary is not None and len(inputs) > 1 and adversary.balances(step):
            return self._in_two_passes(inputs, step, adversary, blind)
        return self._in_one_pass(inputs, step, adversary, blind)

    def _in_one_pass(
        self, inputs: Sequence[Tensor], step: int, adversary: Adversary | None, blind: bool
    ) -> Seen:
        seen = Seen()
        for number, images in enumerate(inputs):
            last = number == len(inputs) - 1
            with reduced_if(last, self.accelerator, self.autoencoder):
                output = self._forward(images)
                verdict = self.judge(output, images, step, adversary, number, len(inputs), blind=blind)
                factor: Tensor | float = 0.0
                if adversary is not None and verdict.judgement is not None:
                    weight = adversary.weigh([verdict.judgement])
                    factor = adversary.factor(step) * weight
                    verdict.logs["adaptive_weight"] = weight
                fake = self._go_back(output, verdict.gradient(factor), 1 / len(inputs))
            del output
            self._teach(adversary, images, fake, step, 1 / len(inputs), verdict, last)
            seen.add(verdict.logs, verdict.counts, 1 / len(inputs))
        return seen

    def _in_two_passes(self, inputs: Sequence[Tensor], step: int, adversary: Adversary, blind: bool) -> Seen:
        share, end = 1 / len(inputs), len(inputs) - 1
        verdicts: dict[int, _Verdict] = {}
        draws = []
        for number, images in enumerate(inputs):
            draws.append(_Draws(self.accelerator.device))
            with torch.set_grad_enabled(number == end), reduced_if(False, self.accelerator, self.autoencoder):
                output = self._forward(images)
            verdicts[number] = self.judge(output, images, step, adversary, number, len(inputs), blind=blind)
        weight = adversary.weigh([v.judgement for v in verdicts.values() if v.judgement is not None])
        factor = adversary.factor(step) * weight
        seen = Seen()
        for number in (end, *range(end)):  # the graph of the one at the end is there
            last, verdict = number == end - 1, verdicts.pop(number)
            verdict.logs["adaptive_weight"] = weight
            with reduced_if(last, self.accelerator, self.autoencoder):
                if number != end:
                    counted = ForwardState(self.model.decoder)
                    with draws[number].again(), self.model.quantize.unobserved():
                        output = self._forward(inputs[number])
                fake = self._go_back(output, verdict.gradient(factor), share)
            if number != end:
                counted.restore()
            del output
            self._teach(adversary, inputs[number], fake, step, share, verdict, last)
            seen.add(verdict.logs, verdict.counts, share)
        return seen

    def _forward(self, images: Tensor) -> VQOutput:
        self._directions.turn_back()
        with self.accelerator.autocast():
            output: VQOutput = self.autoencoder(images)
        return output

    def judge(
        self,
        output: VQOutput,
        images: Tensor,
        step: int,
        adversary: Adversary | None,
        number: int,
        micro_batches: int,
        *,
        blind: bool,
    ) -> _Verdict:
        """All losses of micro-batch `number`, differentiated down to its reconstruction."""
        picture = output.reconstruction.detach().float().requires_grad_()
        with self.accelerator.autocast():
            loss = reconstruction_loss(picture, images, self.config.loss, self.perceptual)
        (wanted,) = torch.autograd.grad(loss.total, picture)
        logs = {"nll": loss.total.detach(), **loss.terms, "codebook": output.quantizer.loss.detach()}
        if blind:
            logs["blind"] = blind_error(images, self.config.loss)
        judgement = look = None
        if adversary is not None:
            rank, processes = self.accelerator.process_index, self.accelerator.num_processes
            look = adversary.critic.look(
                images,
                self.config.training.seed,
                step,
                first=(rank * micro_batches + number) * len(images),
                in_all=processes * micro_batches * len(images),
            )
            judgement = adversary.judge(picture, wanted, output.features, self.model.decoder, step, look.view)
            if judgement is not None:
                logs["adversarial"] = judgement.loss
        logs |= {name: value for name, value in output.quantizer.terms.items() if name not in logs}
        counts = count_codes(output.quantizer.indices, self.model.quantize.codebook_size)
        return _Verdict(wanted, judgement, look, logs, counts)

    def _go_back(self, output: VQOutput, gradient: Tensor, share: float) -> Tensor:
        """Add gradients of the autoencoder, so that its picture follows `gradient`; the picture, detached."""
        # The surrogate's gradient at the picture is exactly `gradient`.
        surrogate = (output.reconstruction * gradient.to(output.reconstruction.dtype)).sum()
        self.accelerator.backward(share * (surrogate + output.quantizer.loss))
        return output.reconstruction.detach()

    def _teach(
        self,
        adversary: Adversary | None,
        images: Tensor,
        fake: Tensor,
        step: int,
        share: float,
        verdict: _Verdict,
        last: bool,
    ) -> None:
        if adversary is not None:
            assert verdict.look is not None
            taught = adversary.critic.teach(images, fake, step, share, verdict.look, last=last)
            verdict.logs.update(taught)


class _Draws:
    """The state of torch's generators, so that a forward can be repeated with the same draws."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.host = torch.get_rng_state()
        self.own = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    @contextmanager
    def again(self) -> Iterator[None]:
        with torch.random.fork_rng([] if self.own is None else [self.device]):
            torch.set_rng_state(self.host)
            if self.own is not None:
                torch.cuda.set_rng_state(self.own, self.device)
            yield
