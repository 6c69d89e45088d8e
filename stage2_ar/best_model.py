"""The weights of the evaluation with the lowest held-out loss, kept beside those that train on."""

from __future__ import annotations

import copy
import math

import torch

from stage2_ar.model import ARModel
from taming.training.host_state import HostState


class BestModel(HostState):
    """A copy of a model in the main memory; a part of checkpoints, so that a resumed run has it too."""

    saved = ("loss", "step")

    def __init__(self, model: ARModel) -> None:
        super().__init__()
        self.model: ARModel = copy.deepcopy(model).to("cpu").requires_grad_(False).eval()
        self.loss = math.inf
        self.step = 0
        """After which step these weights were evaluated; 0: none were yet."""

    @torch.no_grad()
    def offer(self, model: ARModel, loss: float, step: int) -> None:
        """Take over the weights of `model`, evaluated after `step` steps, where `loss` is the lowest yet."""
        if loss >= self.loss:
            return
        self.loss, self.step = loss, step
        self.model.load_state_dict(model.state_dict())

    def train(self, mode: bool = True) -> BestModel:
        """Stay in eval mode."""
        return super().train(False)
