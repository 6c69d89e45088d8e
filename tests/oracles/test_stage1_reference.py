"""Stage one against the published modules' own results (../shared/reference)."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor
from torch.testing import assert_close

from stage1_vq.config import VQTrainConfig
from stage1_vq.task import VQTask
from taming.config import build_config
from tests.reference_checkpoint import import_reference


def test_published_model_gives_its_own_codes_and_pictures():
    result, io = import_reference("vqgan")
    model = result.model
    with torch.no_grad():
        assert_close(model.latents(io["image"]), io["latent"], rtol=0, atol=1e-4)
        output = model(io["image"])
    assert torch.equal(output.quantizer.indices, io["codes"])
    assert_close(output.reconstruction, io["reconstruction"], rtol=0, atol=1e-4)
    assert_close(output.quantizer.loss, io["codebook_loss_legacy"], rtol=1e-4, atol=0)
    for image, codes, picture in (
        ("image", "codes", "reconstruction"),
        ("wide_image", "wide_codes", "wide_reconstruction"),
    ):
        assert torch.equal(model.encode(io[image]), io[codes])
        assert_close(model.decode(io[codes]), io[picture], rtol=0, atol=1e-4)


def test_published_gumbel_model():
    result, io = import_reference("gumbel_vqgan")
    model = result.model
    assert model.config.quantizer.kind == "gumbel"
    with torch.no_grad():
        logits = model.quantize.proj(model.latents(io["image"]))
    assert_close(logits, io["logits"], rtol=0, atol=1e-4)
    assert torch.equal(model.encode(io["image"]), io["codes"])
    assert_close(model.decode(io["codes"]), io["reconstruction"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["class", "unconditional", "coordinates", "segmentation_unmasked"])
def test_first_stage_inside_a_published_transformer(name: str):
    result, io = import_reference(f"transformer_{name}", "first_stage_model")
    codes = result.model.encode(io["image"]).flatten(1)
    codes = codes[:, z_curve(8)] if name == "segmentation_unmasked" else codes
    assert torch.equal(codes, io["target_tokens"])
    greedy = io["greedy_tokens"]
    if name == "segmentation_unmasked":
        greedy = torch.empty_like(greedy).index_copy_(1, z_curve(8), greedy)
    assert_close(result.model.decode(greedy.view(2, 8, 8)), io["greedy_image"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["segmentation", "segmentation_unmasked"])
def test_condition_stage_inside_a_published_transformer(name: str):
    result, io = import_reference(f"transformer_{name}", "cond_stage_model")
    codes = result.model.encode(io["condition"]).flatten(1)
    assert torch.equal(codes, io["condition_tokens"])


def z_curve(size: int) -> Tensor:
    """Raster indices of a square grid's cells in the order of the Z curve."""
    cells = [(row, column) for row in range(size) for column in range(size)]

    def place(cell: tuple[int, int]) -> int:
        bits = range(size.bit_length())
        return sum(((cell[1] >> b) & 1) << 2 * b | ((cell[0] >> b) & 1) << (2 * b + 1) for b in bits)

    return torch.tensor([row * size + column for row, column in sorted(cells, key=place)])


@pytest.mark.parametrize("loss", ["hinge", "vanilla"])
def test_one_training_step_has_the_published_losses_and_gradients(loss: str):
    result, io = import_reference(f"adversarial_step_{loss}")
    params = result.origin["lossconfig"]["params"]
    second = result.discriminator
    assert second is not None
    assert (second.config.channels, second.config.num_layers) == (
        params["disc_ndf"],
        params["disc_num_layers"],
    )
    config = build_config(
        VQTrainConfig,
        {
            "data": {"kind": "scenes"},
            "model": result.model.config.model_dump(),
            "loss": {"perceptual_weight": 0.0},
            "discriminator": {
                "network": second.config.model_dump(),
                "loss": loss,
                "weight": params["disc_weight"],
            },
            "optimizer": {"learning_rate": 1e-12},
            "training": {"steps": 1, "batch_size": 2, "clip_norm": None, "ema_decay": None},
        },
    )
    task = VQTask(config)
    task.model.load_state_dict(result.model.state_dict())
    task.adversary.discriminator.load_state_dict(second.network.state_dict())
    AcceleratorState._reset_state(True)  # another test may have left another precision
    task.prepare(Accelerator(cpu=True), total_steps=1)
    logs = task.train_step([{"image": io["image"]}], step=0)

    def close(found: Tensor, wanted: Tensor) -> None:
        assert (found - wanted).norm() <= 1e-3 * wanted.norm()

    close(logs["rec"], io["rec_loss"])
    close(logs["codebook"], io["quant_loss_legacy"])
    close(logs["adversarial"], io["g_loss"])
    close(logs["adaptive_weight"], io["adaptive_weight"])
    close(logs["discriminator"], io["discriminator_loss"])
    close(logs["logits_real"], io["logits_real_mean"])
    close(logs["logits_fake"], io["logits_fake_mean"])
    close(
        logs["nll"] + logs["adaptive_weight"] * logs["adversarial"] + logs["codebook"], io["generator_loss"]
    )
    parameters = dict(task.model.named_parameters())
    gradients = [name for name in io if name.startswith("grad.")]
    assert len(gradients) == 4
    for name in gradients:
        close(parameters[name.removeprefix("grad.")].grad, io[name])
