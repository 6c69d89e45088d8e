"""What every member of the quantizer union promises."""

from __future__ import annotations

import copy

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn
from torch.testing import assert_close

from stage1_vq.config import VQModelConfig
from stage1_vq.quantizers import (
    BSQConfig,
    EMAConfig,
    FSQConfig,
    GumbelConfig,
    IBQConfig,
    LFQConfig,
    NearestConfig,
    Quantizer,
    QuantizerConfig,
    ResidualConfig,
    SimVQConfig,
    build_quantizer,
)
from taming.config import build_config
from taming.errors import ConfigError

TABLE = {"codebook_size": 24, "code_dim": 6}
HEALTHY = TABLE | {"kmeans_init": True, "revive_after": 2}
CONFIGS: dict[str, QuantizerConfig] = {
    "nearest": NearestConfig(**TABLE),
    "nearest-published": NearestConfig(**TABLE, beta_on="codebook"),
    "nearest-l2": NearestConfig(**TABLE, l2_normalised=True),
    "nearest-rotation": NearestConfig(**TABLE, gradient="rotation"),
    "nearest-healthy": NearestConfig(**HEALTHY, l2_normalised=True),
    "ema": EMAConfig(**TABLE),
    "ema-l2": EMAConfig(**TABLE, l2_normalised=True, gradient="rotation"),
    "ema-healthy": EMAConfig(**HEALTHY),
    "gumbel": GumbelConfig(**TABLE, kl_weight=0.01),
    "gumbel-soft": GumbelConfig(**TABLE, hard=False),
    "fsq": FSQConfig(levels=(4, 3, 5)),
    "lfq": LFQConfig(num_bits=5),
    "lfq-groups": LFQConfig(num_bits=5, entropy_group_bits=2),
    "bsq": BSQConfig(num_bits=5),
    "simvq": SimVQConfig(**TABLE),
    "simvq-healthy": SimVQConfig(**HEALTHY, gradient="rotation"),
    "residual": ResidualConfig(num_stages=3, codes_per_stage=4, code_dim=6),
    "residual-healthy": ResidualConfig(
        num_stages=2, codes_per_stage=6, code_dim=6, kmeans_init=True, revive_after=2, gradient="rotation"
    ),
    "ibq": IBQConfig(**TABLE),
    "ibq-healthy": IBQConfig(**HEALTHY, l2_normalised=True),
}
HAVE_NO_PARAMETERS = ("ema", "fsq", "lfq", "bsq")


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS.keys())
def quantizer(request: pytest.FixtureRequest) -> Quantizer:
    torch.manual_seed(0)
    return build_quantizer(request.param)


def latents(quantizer: Quantizer, *, seed: int = 1, width: int = 5) -> Tensor:
    return torch.randn(2, quantizer.code_dim, 4, width, generator=torch.Generator().manual_seed(seed))


def train_a_little(quantizer: Quantizer, steps: int = 4) -> None:
    """Enough steps for k-means and revival to have happened."""
    for step in range(steps):
        quantizer.before_step(step, steps)
        quantizer.train()(latents(quantizer, seed=step, width=20))
        quantizer.after_step()


def test_every_kind_of_the_union_has_a_case():
    mapping = TypeAdapter(QuantizerConfig).json_schema()["discriminator"]["mapping"]
    assert set(mapping) == {config.kind for config in CONFIGS.values()}


def test_a_model_config_builds_and_keeps_each(quantizer: Quantizer):
    config = VQModelConfig(quantizer=quantizer.config.model_dump(mode="json"))
    assert config.quantizer == quantizer.config
    assert build_config(VQModelConfig, config.model_dump(mode="json")) == config


def test_shapes_types_and_ranges(quantizer: Quantizer):
    output = quantizer(latents(quantizer))
    assert output.quantized.shape == (2, quantizer.code_dim, 4, 5)
    assert output.indices.shape == (2, 4, 5)
    assert output.indices.dtype == torch.int64
    assert output.indices.min() >= 0
    assert output.indices.max() < quantizer.codebook_size
    assert output.loss.shape == ()
    assert all(term.shape == () and not term.requires_grad for term in output.terms.values())
    assert quantizer.codebook.shape == (quantizer.codebook_size, quantizer.code_dim)


def test_lookup_gives_what_forward_gave(quantizer: Quantizer):
    train_a_little(quantizer)
    quantizer.eval()
    output = quantizer(latents(quantizer))
    assert_close(quantizer.lookup(output.indices), output.quantized, rtol=0, atol=1e-6)


def test_rows_of_the_codebook_are_the_codes(quantizer: Quantizer):
    train_a_little(quantizer)
    every = torch.arange(quantizer.codebook_size).view(1, 1, -1)
    assert_close(quantizer.lookup(every)[0, :, 0].T, quantizer.codebook, rtol=0, atol=1e-6)
    assert len(quantizer.codebook.unique(dim=0)) == quantizer.codebook_size


def test_a_code_is_its_own_code(quantizer: Quantizer):
    if quantizer.config.kind not in ("nearest", "ema", "simvq", "lfq", "bsq"):
        pytest.skip("the latents of this method do not live among its codes")
    codes = torch.arange(quantizer.codebook_size).view(1, 4, -1)
    assert torch.equal(quantizer.encode(quantizer.lookup(codes)), codes)


def test_encode_is_forward_in_evaluation(quantizer: Quantizer):
    train_a_little(quantizer)
    z = latents(quantizer)
    before = copy.deepcopy(quantizer.state_dict())
    codes = quantizer.encode(z)
    assert torch.equal(codes, quantizer.encode(z))
    quantizer.after_step()
    assert all(torch.equal(before[key], value) for key, value in quantizer.state_dict().items())
    assert torch.equal(codes, quantizer.eval()(z).indices)


def test_every_parameter_and_the_latents_get_a_gradient(quantizer: Quantizer):
    z = latents(quantizer).requires_grad_()
    output = quantizer(z)
    (output.quantized.square().sum() + output.loss).backward()
    assert z.grad.abs().sum() > 0
    assert bool(list(quantizer.parameters())) == (quantizer.config.kind not in HAVE_NO_PARAMETERS)
    for parameter in quantizer.parameters():
        # Several processes stop at a parameter that is there but takes no part.
        assert parameter.requires_grad
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0


def test_the_picture_alone_moves_the_latents(quantizer: Quantizer):
    z = latents(quantizer).requires_grad_()
    wanted = torch.randn(z.shape, generator=torch.Generator().manual_seed(3))
    (quantizer(z).quantized * wanted).sum().backward()
    assert torch.isfinite(z.grad).all()
    assert z.grad.abs().sum() > 0


def test_state_round_trips(quantizer: Quantizer):
    train_a_little(quantizer)
    other = build_quantizer(quantizer.config)
    other.load_state_dict(copy.deepcopy(quantizer.state_dict()))
    z = latents(quantizer, seed=9)
    assert torch.equal(quantizer.encode(z), other.encode(z))
    assert torch.equal(quantizer.codebook, other.codebook)


def test_a_resumed_quantizer_goes_on_as_the_first_would_have(quantizer: Quantizer):
    train_a_little(quantizer)
    other = build_quantizer(quantizer.config)
    other.load_state_dict(copy.deepcopy(quantizer.state_dict()))
    for one in (quantizer, other):
        torch.manual_seed(5)
        train_a_little(one)
    for key, value in quantizer.state_dict().items():
        assert torch.equal(other.state_dict()[key], value), key


def test_evaluation_changes_nothing(quantizer: Quantizer):
    quantizer.eval()
    before = copy.deepcopy(quantizer.state_dict())
    quantizer(latents(quantizer))
    quantizer.after_step()
    assert all(torch.equal(before[key], value) for key, value in quantizer.state_dict().items())


def test_half_precision_latents_are_quantised_in_full_precision(quantizer: Quantizer):
    quantizer.eval()
    z = latents(quantizer).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = quantizer(z)
        codes = quantizer.encode(z)
        assert quantizer.lookup(codes).dtype == torch.float32
    assert output.quantized.dtype == output.loss.dtype == torch.float32
    assert torch.equal(codes, quantizer.encode(z.float()))
    assert torch.equal(output.indices, codes)


def test_half_precision_latents_get_their_gradient_back(quantizer: Quantizer):
    z = latents(quantizer).bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = quantizer(z)
        (output.quantized.sum() + output.loss).backward()
    assert z.grad.dtype == torch.bfloat16
    assert z.grad.abs().sum() > 0


def test_schedules_are_functions_of_the_step(quantizer: Quantizer):
    def settings() -> dict[str, object]:
        return {key: value for key, value in vars(quantizer).items() if isinstance(value, float)}

    quantizer.before_step(7, 10)
    late = settings()
    quantizer.before_step(2, 10)
    early = settings()
    quantizer.before_step(7, 10)
    assert settings() == late
    assert (early != late) == (quantizer.config.kind == "gumbel")


@pytest.mark.parametrize("name", [name for name in CONFIGS if name.endswith("healthy")])
def test_kmeans_and_revival_keep_codes_in_use(name: str):
    torch.manual_seed(0)
    config = CONFIGS[name]
    healthy = build_quantizer(config)
    plain = build_quantizer(config.model_copy(update={"kmeans_init": False, "revive_after": None}))
    used = []
    for quantizer in (healthy, plain):
        for seed in range(12):
            z = 4 + latents(quantizer, seed=seed, width=40)
            quantizer.train()(z)
            quantizer.after_step()
        codes = quantizer.encode(4 + latents(quantizer, seed=99, width=200))
        used.append(len(codes.unique()) / quantizer.codebook_size)
    assert used[0] >= 0.75
    assert used[0] > used[1]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "vq"}, "'vq' is not one of the kinds"),
        ({"kind": "nearest", "codebook_size": 1}, "codebook_size"),
        ({"kind": "nearest", "gradient": "rotated"}, "'straight_through' or 'rotation'"),
        ({"kind": "ema", "decay": 1.0}, "decay"),
        ({"kind": "ema", "beta_on": "codebook"}, "unknown key quantizer.beta_on"),
        ({"kind": "gumbel", "temperature_end": 2.0}, "temperature_end 2.0 is above temperature_start 0.9"),
        ({"kind": "gumbel", "temperature_steps": 5, "temperature_hold_steps": 5}, "does not lie after"),
        ({"kind": "fsq", "levels": [8, 2]}, "greater than or equal to 3"),
        ({"kind": "fsq", "levels": []}, "levels"),
        ({"kind": "fsq", "levels": [64, 64, 65]}, "make 266240 codes; at most 262144"),
        ({"kind": "lfq", "num_bits": 19}, "less than or equal to 18"),
        ({"kind": "lfq", "codebook_size": 1024}, "unknown key quantizer.codebook_size"),
        ({"kind": "bsq", "entropy_temperature": 0}, "greater than 0"),
        ({"kind": "residual", "num_stages": 4, "codes_per_stage": 1024}, "fold into 1099511627776 codes"),
        ({"kind": "simvq", "l2_normalised": True}, "unknown key quantizer.l2_normalised"),
        ({"kind": "ibq", "beta": -1}, "beta"),
    ],
)
def test_bad_configs_are_refused(values: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        build_config(VQModelConfig, {"quantizer": values})


def test_states_hold_nothing_that_no_option_needs():
    names = {
        "nearest": {"embedding.weight"},
        "nearest-healthy": {"embedding.weight", "initialised", "steps_unused"},
        "ema": {"embedding.weight", "embedding.cluster_size", "embedding.embed_avg"},
        "gumbel": {"proj.weight", "proj.bias", "embed.weight"},
        "ibq": {"embedding.weight"},
        "simvq": {"embedding.weight", "embedding_proj.weight"},
    }
    for name, expected in names.items():
        assert set(build_quantizer(CONFIGS[name]).state_dict()) == expected


def test_quantizers_can_be_copied_after_training(quantizer: Quantizer):
    train_a_little(quantizer)
    quantizer(latents(quantizer).requires_grad_())
    twin: nn.Module = copy.deepcopy(quantizer)
    assert torch.equal(twin.encode(latents(quantizer)), quantizer.encode(latents(quantizer)))
