"""Features for the Fréchet distance of pictures: the Inception network of the published figures.

Network, input size and resize are those of the package torch-fidelity, whose weights are those of the first
TensorFlow implementation: figures made with others cannot be compared.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from taming.archive import check_stored
from taming.data.picture import to_uint8
from taming.errors import UserError

FEATURES = 2048
EXTRACTOR = "Inception v3 of torch-fidelity (weights-inception-2015-12-05), 2048 features of its last pool"


class InceptionFeatures(nn.Module):
    """Pictures (B, 1 or 3, H, W) in [-1, 1] -> (B, 2048); they are rounded to 8 bits, as files would be.

    `weights` is a file of torch-fidelity's weights (null: its cache, or its download). Raises UserError where
    the package or the weights cannot be had.
    """

    def __init__(self, weights: str | Path | None = None) -> None:
        super().__init__()
        self.network = load_inception(weights, [str(FEATURES)])

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        pixels = to_uint8(images)
        if pixels.shape[1] == 1:
            pixels = pixels.expand(-1, 3, -1, -1)
        (features,) = self.network(pixels)
        assert isinstance(features, Tensor)
        return features


@contextmanager
def readable_weights(weights: str | Path | None) -> Iterator[Path]:
    """A file of Inception's weights that torch-fidelity may unpickle: of tensors that were read safely.

    `weights` as in `InceptionFeatures`. The file is gone afterwards. Raises UserError.
    """
    state = _state(weights, _package().URL_INCEPTION_V3)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "inception.pth"
        torch.save(state, path)
        yield path


def load_inception(weights: str | Path | None, layers: Sequence[str]) -> nn.Module:
    """torch-fidelity's network in eval mode, which gives the features `layers`. Raises UserError."""
    package = _package()
    with readable_weights(weights) as path:
        try:
            network: nn.Module = package.FeatureExtractorInceptionV3("inception", list(layers), str(path))
        except RuntimeError as error:
            first = str(error).splitlines()[0]
            raise UserError(
                f"inception weights {weights} are not those of torch-fidelity ({first}); leave "
                "--inception-weights out to download them"
            ) from None
    return network.eval()


def _package() -> Any:
    try:
        import torch_fidelity.feature_extractor_inceptionv3 as package
    except ImportError:
        raise UserError(
            "FID needs torch-fidelity, which is not installed: pip install 'taming-toolkit[metrics]'"
        ) from None
    return package


def _state(weights: str | Path | None, url: str) -> dict[str, Tensor]:
    out = f"give --inception-weights PATH to a copy of {url}, or leave --fid out"
    if weights is None:
        cached = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
        try:
            return dict(
                torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True, progress=False)
            )
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"FID needs Inception's weights, which are neither at {cached} nor to be downloaded "
                f"({error}); {out}"
            ) from None
    check_stored(weights)
    try:
        return dict(torch.load(weights, map_location="cpu", weights_only=True))
    except Exception as error:
        # torch.load raises many types for a file that is not its own; all mean the same to a user.
        raise UserError(
            f"inception weights {weights} cannot be read ({type(error).__name__}); {out}"
        ) from None
