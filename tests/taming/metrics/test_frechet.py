"""The Fréchet distance against closed forms, and the plumbing around Inception."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from taming.errors import UserError
from taming.metrics.frechet import FeatureMoments, frechet_distance
from taming.metrics.inception import InceptionFeatures


def moments(samples: Tensor) -> FeatureMoments:
    found = FeatureMoments(samples.shape[1])
    for part in samples.split(7):
        found.add(part)
    return found


def exact(mean: Tensor, covariance: Tensor) -> FeatureMoments:
    """2 D samples that have exactly these moments."""
    dim = len(mean)
    root = torch.linalg.cholesky(covariance.double()) * (dim - 0.5) ** 0.5
    return moments(torch.cat((mean + root.t(), mean - root.t())))


def test_moments_are_those_of_all_samples() -> None:
    samples = torch.randn(40, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 3
    found = moments(samples)
    assert found.count == 40
    torch.testing.assert_close(found.mean, samples.mean(0))
    torch.testing.assert_close(found.covariance, samples.t().cov())


def test_commuting_covariances_have_a_closed_form() -> None:
    # |m|^2 + sum (sqrt a - sqrt b)^2 for diagonal covariances.
    a, b = torch.tensor([1.0, 4.0, 9.0]).double(), torch.tensor([4.0, 4.0, 0.25]).double()
    mean = torch.tensor([1.0, 0.0, 2.0]).double()
    found = frechet_distance(exact(torch.zeros(3).double(), a.diag()), exact(mean, b.diag()))
    assert found == pytest.approx(5 + float((a.sqrt() - b.sqrt()).square().sum()), rel=1e-9)


def test_general_covariances_by_the_eigenvalues_of_their_product() -> None:
    generator = torch.Generator().manual_seed(1)
    a, b = (
        m @ m.t() + torch.eye(6) for m in (torch.randn(6, 6, generator=generator).double() for _ in range(2))
    )
    zero = torch.zeros(6).double()
    wanted = a.trace() + b.trace() - 2 * torch.linalg.eigvals(a @ b).real.sqrt().sum()
    found = frechet_distance(exact(zero, a), exact(zero, b))
    assert found == pytest.approx(float(wanted), rel=1e-8)
    assert found == pytest.approx(frechet_distance(exact(zero, b), exact(zero, a)), rel=1e-8)


def test_fewer_samples_than_features() -> None:
    samples = torch.rand(10, 64, generator=torch.Generator().manual_seed(2))
    assert frechet_distance(moments(samples), moments(samples)) == pytest.approx(0, abs=1e-6)
    shifted = frechet_distance(moments(samples), moments(samples + 0.5))
    assert shifted == pytest.approx(64 * 0.25, rel=1e-6)
    with pytest.raises(UserError, match="two pictures or more, not 1"):
        frechet_distance(moments(samples[:1]), moments(samples))


def test_a_missing_package_and_missing_weights_are_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"nowhere\.pth cannot be read .*--inception-weights PATH"):
        InceptionFeatures(tmp_path / "nowhere.pth")

    def offline(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    with pytest.raises(UserError, match=r"neither at .*weights-inception.* \(no network\).*--fid out"):
        InceptionFeatures()
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(UserError, match=r"pip install 'taming-toolkit\[metrics\]'"):
        InceptionFeatures()


class _Payload:
    def __reduce__(self) -> tuple:
        return (sys.exit, (1,))


def test_weights_of_something_else_and_pickles_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("torch_fidelity")
    torch.save({"conv.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="not those of torch-fidelity"):
        InceptionFeatures(tmp_path / "other.pth")
    torch.save({"conv.weight": _Payload()}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match=r"evil\.pth cannot be read"):
        InceptionFeatures(tmp_path / "evil.pth")


def test_features_are_those_of_torch_fidelity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With random weights: the same network, the same resize, 8-bit pictures, grey as three channels."""
    package = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    torch.manual_seed(0)
    extractor = package.FeatureExtractorInceptionV3
    # The package only builds a network from weights: they are made by one that loads none.
    with monkeypatch.context() as patched:
        patched.setattr(package, "load_state_dict_from_url", lambda *_, **__: {})
        patched.setattr(torch.nn.Module, "load_state_dict", lambda *_, **__: SimpleNamespace())
        fresh = extractor("inception", ["2048"])
    torch.save(fresh.state_dict(), tmp_path / "inception.pth")
    features = InceptionFeatures(tmp_path / "inception.pth")
    images = torch.rand(2, 3, 40, 56) * 2 - 1
    found = features(images)
    assert found.shape == (2, 2048)
    (wanted,) = fresh(((images + 1) * 127.5).round().to(torch.uint8))
    torch.testing.assert_close(found, wanted)
    grey = images[:, :1]
    torch.testing.assert_close(features(grey), features(grey.expand(-1, 3, -1, -1)))
