"""Stage one against the published modules' own results (../shared/reference)."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor
from torch.testing import assert_close

from stage1_vq.config import VQModelConfig, VQTrainConfig
from stage1_vq.model import VQModel
from stage1_vq.task import VQTask
from taming.config import build_config
from tests.reference_checkpoint import load_reference


def model_config(params: dict) -> VQModelConfig:
    """Our config for the published one's `params`."""
    net = params["ddconfig"]
    return VQModelConfig(
        in_channels=net["in_channels"],
        resolution=net["resolution"],
        channels=net["ch"],
        channel_multipliers=net["ch_mult"],
        num_res_blocks=net["num_res_blocks"],
        attention_resolutions=net["attn_resolutions"],
        z_channels=net["z_channels"],
        quantizer={
            "kind": "nearest",
            "codebook_size": params["n_embed"],
            "code_dim": params["embed_dim"],
            "beta_on": "codebook",
        },
    )


def test_first_stage_inside_a_published_transformer():
    published, state, io = load_reference("transformer_class")
    model = VQModel(model_config(published["model"]["params"]["first_stage_config"]["params"]))
    prefix = "first_stage_model."
    model.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    model.eval()
    assert torch.equal(model.encode(io["image"]).flatten(1), io["target_tokens"])
    painted = model.decode(io["greedy_tokens"].view(2, 8, 8))
    assert_close(painted, io["greedy_image"], rtol=0, atol=1e-4)


def test_published_model_gives_its_own_codes_and_pictures():
    published, state, io = load_reference("vqgan")
    model = VQModel(model_config(published["model"]["params"]))
    model.load_state_dict(state)
    model.eval()
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


@pytest.mark.parametrize("loss", ["hinge", "vanilla"])
def test_one_training_step_has_the_published_losses_and_gradients(loss: str):
    published, state, io = load_reference(f"adversarial_step_{loss}")
    params = published["model"]["params"]["lossconfig"]["params"]
    config = build_config(
        VQTrainConfig,
        {
            "data": {"kind": "scenes"},
            "model": model_config(published["model"]["params"]).model_dump(),
            "loss": {"perceptual_weight": 0.0},
            "discriminator": {
                "network": {
                    "kind": "patchgan",
                    "channels": params["disc_ndf"],
                    "num_layers": params["disc_num_layers"],
                },
                "loss": loss,
                "weight": params["disc_weight"],
            },
            "optimizer": {"learning_rate": 1e-12},
            "training": {"steps": 1, "batch_size": 2, "clip_norm": None, "ema_decay": None},
        },
    )
    task = VQTask(config)
    prefix = "loss.discriminator."
    task.model.load_state_dict({k: v for k, v in state.items() if not k.startswith("loss.")})
    task.adversary.discriminator.load_state_dict(
        {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    )
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
