"""Batch normalisation whose batch is that of all processes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from taming.collective import stack_over_processes, world_size


class SharedBatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d with the statistics of all processes' pictures in train mode; all call it together then.

    So that a discriminator sees the same batch, however many processes share it. Names and values are those
    of nn.BatchNorm2d, which it is in a single process. Unlike nn.SyncBatchNorm it works on CPUs and can be
    differentiated twice, as a gradient penalty does. The statistics of a step that is cut into micro-batches
    are still those of each micro-batch: its result is not that of the whole batch.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) of the same shape on every process -> the same shape."""
        if not self.training or world_size() == 1:
            return super().forward(x)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        wide = x.float()
        own = torch.stack((wide.mean((0, 2, 3)), wide.var((0, 2, 3), correction=0)))
        means, variances = stack_over_processes(own).unbind(1)  # (processes, C) each
        mean = means.mean(0)
        # Of equal parts: the mean of their variances, and the variance of their means.
        variance = variances.mean(0) + (means - mean).square().mean(0)
        with torch.no_grad():
            count = x.numel() // x.shape[1] * world_size()
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        scale = (variance + self.eps).rsqrt()
        shift = -mean * scale
        if self.affine:
            scale, shift = self.weight * scale, self.weight * shift + self.bias
        return torch.addcmul(shift[:, None, None], wide, scale[:, None, None]).to(x.dtype)
