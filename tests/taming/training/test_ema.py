"""The weight average against its formula."""

import torch
from torch import nn

from taming.training.ema import Ema


def test_average_follows_the_formula_with_buffers() -> None:
    model = nn.BatchNorm1d(2)
    ema = Ema(model, decay=0.5)
    expected_weight, expected_mean = model.weight.detach().clone(), model.running_mean.clone()
    for n in range(12):
        with torch.no_grad():
            model.weight.add_(1.0)
            model.running_mean.add_(2.0)
            model.num_batches_tracked.add_(1)
        ema.update(model)
        if n == 0:  # the first update takes the weights as they are
            expected_weight, expected_mean = model.weight.detach().clone(), model.running_mean.clone()
            continue
        decay = min(0.5, (1 + n) / (10 + n))
        expected_weight = decay * expected_weight + (1 - decay) * model.weight.detach()
        expected_mean = decay * expected_mean + (1 - decay) * model.running_mean
    torch.testing.assert_close(ema.module.weight, expected_weight)
    torch.testing.assert_close(ema.module.running_mean, expected_mean)
    assert ema.module.num_batches_tracked == 12
    assert not torch.equal(ema.module.weight, model.weight)


def test_average_stays_in_eval_mode_and_needs_no_gradient() -> None:
    ema = Ema(nn.Sequential(nn.Linear(2, 2), nn.Dropout()), decay=0.9).train()
    assert not any(module.training for module in ema.modules())
    assert not any(parameter.requires_grad for parameter in ema.parameters())


def test_state_round_trips() -> None:
    model = nn.Linear(2, 2)
    ema, other = Ema(model, 0.9), Ema(nn.Linear(2, 2), 0.9)
    ema.update(model)
    other.load_state_dict(ema.state_dict())
    assert other.n_averaged == 1
    assert torch.equal(other.module.weight, model.weight)
