"""The family's heads: scores against formulas in numpy, and facts of protocols 1a, 1c and 1d."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from tiny import tiny
from torch import nn

from raydc import pretrain
from raydc.clustering.whitening import Whitening, fit_whitening, moments
from raydc.config import ClusteringConfig, Config, ImagesConfig, ModelConfig, ODCConfig, TrainConfig, V2Config
from raydc.deepcluster_v2 import Projection, Prototypes, swapped
from raydc.models.backbone import build_backbone
from raydc.models.head import Classifier, Head
from raydc.odc import Neck, NeckedClassifier
from raydc.optim import build_optimizer
from raydc.recipes import in1k_resnet50_dcv2, in1k_resnet50_odc

pytestmark = pytest.mark.usefixtures("one_thread")


def filled(inputs: int, clusters: int) -> Head:
    """Row j of the weights is full of j + 1, of the bias 100 + j."""
    head = Head(inputs, clusters)
    with torch.no_grad():
        head.weight.copy_(torch.arange(1.0, clusters + 1)[:, None].expand(clusters, inputs))
        head.bias.copy_(torch.arange(100.0, 100 + clusters))
    return head


# --- centroids as weights -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whitening() -> Whitening:
    """Of 1,797 real digits, 64 pixels to 16 directions."""
    return fit_whitening(moments(load_digits().data.astype(np.float32)), 16)


def centroids(num: int, dim: int) -> np.ndarray:
    """Means of unit rows: shorter than one, some by far."""
    rng = np.random.default_rng(1)
    rows = rng.normal(size=(num, dim))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True) * rng.uniform(0.1, 1, (num, 1))).astype(np.float32)


def scores(features_ND: np.ndarray, centroids_kd: np.ndarray, whitening: Whitening, temperature: float = 0.1) -> np.ndarray:
    head = Head(features_ND.shape[1], len(centroids_kd))
    head.copy_centroids(centroids_kd, whitening, temperature)
    with torch.no_grad():
        return head(torch.from_numpy(features_ND.astype(np.float32))).numpy()


def nearest(points_Nd: np.ndarray, centroids_kd: np.ndarray) -> np.ndarray:
    """Of points at length one, by a plain distance."""
    unit = points_Nd / np.linalg.norm(points_Nd, axis=1, keepdims=True)
    return ((unit[:, None] - centroids_kd[None]) ** 2).sum(2).argmin(1)


def test_whitened_digits_have_a_root_mean_square_length_of_four(whitening):
    """16 directions of variance one: what the scores are divided by."""
    pixels = load_digits().data.astype(np.float64)
    projected = (pixels - pixels.mean(0)) @ whitening.matrix_Dd
    assert np.sqrt((projected**2).sum(1).mean()) == pytest.approx(4, rel=1e-4)
    assert whitening.norm == pytest.approx(4, rel=1e-4)


def test_a_head_of_centroids_gives_the_pseudo_label_of_whitened_features(whitening):
    """Features whose whitened form has a length of four, and anything beside the 16 directions."""
    rng = np.random.default_rng(0)
    whitened = rng.normal(size=(2000, 16))
    whitened *= 4 / np.linalg.norm(whitened, axis=1, keepdims=True)
    matrix = whitening.matrix_Dd.astype(float)
    inverse = np.linalg.pinv(matrix)
    beside = rng.normal(size=(2000, 64)) @ (np.eye(64) - matrix @ inverse)
    features = whitening.mean_D + whitened @ inverse + beside
    found = centroids(40, 16)
    expected = nearest(whitened, found)
    assert len(np.unique(expected)) > 20, "the labels are no trivial ones"
    assert (whitened @ found.T).argmax(1).tolist() != expected.tolist(), "without the bias it would be another"
    assert (scores(features, found, whitening).argmax(1) == expected).mean() > 0.999  # float32 may fall on the other side


def test_a_head_of_centroids_gives_the_pseudo_label_of_raw_features():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(2000, 8)) + 0.5
    features *= 7 / np.linalg.norm(features, axis=1, keepdims=True)
    raw = fit_whitening(moments(features.astype(np.float32)), 0)
    assert raw.matrix_Dd is None and raw.norm == pytest.approx(7, rel=1e-5)
    found = centroids(20, 8)
    assert (scores(features, found, raw).argmax(1) == nearest(features, found)).mean() > 0.999


@pytest.mark.parametrize("temperature", [0.1, 1.0])
@pytest.mark.parametrize("raw", [False, True])
def test_scores_of_centroids_are_the_formula_in_numpy(whitening, raw, temperature):
    """x.c - |c|^2 / 2 over the temperature, x = (feature - mean) @ matrix over its root mean square length."""
    features = load_digits().data[:100].astype(np.float32)
    if raw:
        whitening = Whitening(np.zeros(64, np.float32), None, norm=30.0)
    found = centroids(12, 64 if raw else 16)
    x = features.astype(float) if raw else (features.astype(float) - whitening.mean_D) @ whitening.matrix_Dd
    x = x / whitening.norm
    expected = np.array([[(row @ c - c @ c / 2) / temperature for c in found.astype(float)] for row in x])
    np.testing.assert_allclose(scores(features, found, whitening, temperature), expected, rtol=1e-4, atol=1e-3)


def test_centroids_are_written_in_place():
    head = Head(4, 3)
    weight, bias, place = head.weight, head.bias, head.weight.data_ptr()
    head.copy_centroids(centroids(3, 4), Whitening(np.zeros(4, np.float32), None), 0.1)
    assert head.weight is weight and head.bias is bias and head.weight.data_ptr() == place
    assert head.weight.dtype == head.bias.dtype == torch.float32
    assert head.weight.requires_grad


# --- weights that are kept ----------------------------------------------------------------------------------------------


def test_take_over_keeps_rows_and_draws_the_others_fresh():
    head, fresh = filled(50, 5), Head(50, 5)
    weight = head.weight
    head.take_over(torch.tensor([3, -1, 0, -1, 1]), seed=9)
    fresh.refresh(9)
    assert head.weight is weight, "in place"
    for row, source in ((0, 3), (2, 0), (4, 1)):
        assert (head.weight[row] == source + 1).all() and head.bias[row] == 100 + source
    for row in (1, 3):
        assert torch.equal(head.weight[row], fresh.weight[row])
        assert head.bias[row] == 0
        assert 0.005 < head.weight[row].std() < 0.015, "N(0, .01), protocol 1a"


def test_take_over_of_all_rows_in_their_place_changes_nothing_and_of_none_is_fresh():
    head, before, fresh = filled(6, 4), filled(6, 4), Head(6, 4)
    head.take_over(torch.arange(4), seed=3)
    assert torch.equal(head.weight, before.weight) and torch.equal(head.bias, before.bias)
    head.take_over(torch.full((4,), -1), seed=3)
    fresh.refresh(3)
    assert torch.equal(head.weight, fresh.weight) and torch.equal(head.bias, fresh.bias)


@pytest.mark.parametrize("num_clusters", [2, 9])
def test_a_head_of_another_size_gives_as_many_scores(num_clusters):
    head = filled(6, 4).double()
    head.resize(num_clusters)
    head.refresh(0)
    assert head(torch.zeros(3, 6, dtype=torch.float64)).shape == (3, num_clusters)
    assert head.out_features == num_clusters
    assert head.weight.dtype == torch.float64, "its type stays"
    assert all(parameter.requires_grad for parameter in head.parameters())


# --- DeepCluster-v2 -----------------------------------------------------------------------------------------------------


def v2_config(**changes) -> Config:
    v2 = V2Config(**{"num_crops": (2, 3), "crop_sizes": (24, 16), "hidden_dim": 32, "projection_dim": 12} | changes)
    return Config(
        algorithm="deepcluster_v2",
        model=ModelConfig(architecture="resnet10", width=8, stem="small"),
        images=ImagesConfig(size=32, resize=32),
        clustering=ClusteringConfig(num_clusters=7, pca_dim=0, whiten=False, method="spherical", features="remembered"),
        train=TrainConfig(head="centroids", balance="none"),
        v2=v2,
    )


@pytest.fixture(scope="module")
def prototypes() -> Prototypes:
    """With centroids of length one, and BatchNorms whose statistics are not those of a fresh network."""
    torch.manual_seed(0)
    config = v2_config()
    model = Prototypes(config, build_backbone(config.model, 0))
    model.centroids.copy_(nn.functional.normalize(torch.randn_like(model.centroids), dim=2))
    model.train()(crops(6))
    return model


def crops(num: int, seed: int = 0) -> list[torch.Tensor]:
    """Two of 24 and three of 16 pixels of ``num`` images."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(num, 3, side, side, generator=generator) * 255 for side in (24, 24, 16, 16, 16)]


def test_each_crop_alone_gives_the_row_it_gives_among_the_others(prototypes):
    prototypes.eval()
    with torch.no_grad():
        together = prototypes(crops(4))
        assert together.shape == (5, 4, 12)
        for view, crop in enumerate(crops(4)):
            for image in range(4):
                alone = prototypes([crop[image : image + 1]])[0, 0]
                assert torch.allclose(together[view, image], alone, atol=1e-5), (view, image)
    rows = together.flatten(0, 1)
    assert (torch.cdist(rows, rows) + torch.eye(20)).min() > 1e-3, "no two are alike, so that none can stand for another"


def test_what_is_clustered_is_what_a_crop_alone_is_projected_to(prototypes):
    prototypes.eval()
    with torch.no_grad():
        assert torch.allclose(prototypes.embed(crops(4)[0]), prototypes(crops(4))[0], atol=1e-5)


def test_no_gradient_reaches_the_centroids_and_one_reaches_all_else(prototypes):
    labels = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 0], [1, 1, 2, 2]])
    prototypes.train()
    prototypes.zero_grad()
    swapped(prototypes(crops(4)), labels, prototypes.centroids, 0.1).backward()
    assert prototypes.centroids.grad is None and not prototypes.centroids.requires_grad
    for name, parameter in prototypes.named_parameters():
        assert parameter.grad is not None, name
        if name != "head.0.bias":  # BatchNorm takes the mean away
            assert parameter.grad.abs().max() > 0, name
    assert prototypes.centroids.shape == (3, 7, 12)
    assert "centroids" in prototypes.state_dict(), "but they are saved"


def test_projected_rows_are_of_length_one():
    torch.manual_seed(0)
    projection = Projection(10, 16, 4)
    out = projection(torch.randn(8, 10) * 50)
    assert out.shape == (8, 4)
    assert torch.allclose(out.norm(dim=1), torch.ones(8), atol=1e-6)


def test_the_projection_is_protocol_1cs():
    """2048 -> 2048 with BatchNorm and ReLU -> 128."""
    config = in1k_resnet50_dcv2().v2
    layers = list(Projection(2048, config.hidden_dim, config.projection_dim))
    assert [type(layer) for layer in layers] == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]
    assert (layers[0].in_features, layers[0].out_features) == (2048, 2048)
    assert (layers[3].in_features, layers[3].out_features) == (2048, 128)
    assert sum(p.numel() for p in Projection(2048, 2048, 128).parameters()) == 2048 * 2049 + 2 * 2048 + 128 * 2049


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_the_loss_is_the_plain_loops(temperature):
    """Protocol 1c: cross-entropy of z.c over the temperature, on all crops, the mean over heads."""
    rng = np.random.default_rng(0)
    z, c = rng.normal(size=(5, 4, 3)), rng.normal(size=(2, 6, 3))
    labels = rng.integers(0, 6, (2, 4))
    losses = []
    for head in range(2):
        for view in range(5):
            for image in range(4):
                s = [z[view, image] @ c[head, cluster] / temperature for cluster in range(6)]
                losses.append(np.log(np.sum(np.exp(s))) - s[labels[head, image]])
    found = swapped(torch.from_numpy(z), torch.from_numpy(labels), torch.from_numpy(c).float(), temperature)
    assert float(found) == pytest.approx(np.mean(losses), rel=1e-5)


# --- ODC ----------------------------------------------------------------------------------------------------------------


def test_the_neck_is_protocol_1ds():
    """FC 2048 -> 512, BatchNorm without weights and momentum .001, ReLU, dropout .5, FC 512 -> 256, ReLU."""
    config = in1k_resnet50_odc().odc
    layers = list(Neck(2048, config.hidden_dim, config.projection_dim, config.dropout))
    kinds = [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Dropout, nn.Linear, nn.ReLU]
    assert [type(layer) for layer in layers] == kinds
    first, norm, _, dropout, last, _ = layers
    assert (first.in_features, first.out_features, last.in_features, last.out_features) == (2048, 512, 512, 256)
    assert (norm.affine, norm.momentum, dropout.p) == (False, 0.001, 0.5)
    for layer in (first, last):  # Kaiming over fan_in, protocol 12
        assert layer.weight.std().item() == pytest.approx(np.sqrt(2 / layer.in_features), rel=0.02)
        assert not layer.bias.any()


def test_the_neck_in_numpy():
    torch.manual_seed(0)
    neck = Neck(6, 8, 5, 0.5).eval()
    neck[1].running_mean.uniform_(-1, 1)
    neck[1].running_var.uniform_(0.5, 2)
    x = torch.randn(7, 6)
    w1, b1, w2, b2 = (p.detach().numpy() for p in neck.parameters())
    mean, var = neck[1].running_mean.numpy(), neck[1].running_var.numpy()
    hidden = np.maximum((x.numpy() @ w1.T + b1 - mean) / np.sqrt(var + 1e-5), 0)
    expected = np.maximum(hidden @ w2.T + b2, 0)
    with torch.no_grad():
        np.testing.assert_allclose(neck(x).numpy(), expected, rtol=1e-5, atol=1e-6)


def test_dropout_works_in_training_alone():
    neck, x = Neck(6, 64, 5, 0.5), torch.randn(16, 6)
    with torch.no_grad():
        assert torch.equal(neck.eval()(x), neck(x))
        assert not torch.equal(neck.train()(x), neck(x))


@pytest.fixture(scope="module")
def necked() -> NeckedClassifier:
    config = Config(
        algorithm="odc",
        model=ModelConfig(architecture="resnet10", width=8, stem="small"),
        images=ImagesConfig(size=32, resize=32),
        clustering=ClusteringConfig(num_clusters=7, pca_dim=0, whiten=False, features="remembered"),
        train=TrainConfig(head="matched", balance="reweight"),
        odc=ODCConfig(hidden_dim=16, projection_dim=12),
    )
    return NeckedClassifier(config, build_backbone(config.model, 0))


def test_the_head_sees_what_is_remembered(necked):
    """Protocol 1d: FC from the neck's features, after their ReLU, N(0, .01) and bias 0."""
    necked.eval()
    with torch.no_grad():
        features, scores = necked(crops(4)[0])
        assert features.shape == (4, 12) and scores.shape == (4, 7)
        assert (features >= 0).all() and (features > 0).any()
        expected = features.numpy() @ necked.head.weight.numpy().T + necked.head.bias.numpy()
        np.testing.assert_allclose(scores.numpy(), expected, rtol=1e-5, atol=1e-6)
        assert torch.allclose(necked.embed(crops(4)[0]), features, atol=1e-6)
    assert isinstance(necked.head, Head)
    assert not necked.head.bias.any()


# --- all of them --------------------------------------------------------------------------------------------------------


def test_every_network_is_optimised_whole_and_nothing_twice(prototypes, necked):
    plain = Classifier(build_backbone(ModelConfig(architecture="resnet10", width=8), 0), 5)
    for model in (plain, prototypes, necked):
        groups = build_optimizer(model.trunk, model.head, TrainConfig(head_momentum=0.5)).param_groups
        listed = [parameter for group in groups for parameter in group["params"]]
        assert len(listed) == len(set(listed))
        assert set(listed) == {p for p in model.parameters() if p.requires_grad}
        assert set(groups[1]["params"]) == set(model.head.parameters()), "the group with a momentum of its own"


def test_with_features_gives_both():
    """Residual features are past their ReLU: what is clustered is what the head sees."""
    plain = Classifier(build_backbone(ModelConfig(architecture="resnet10", width=8, stem="small"), 0), 5).eval()
    with torch.no_grad():
        features, scores = plain(crops(3)[0], with_features=True)
        assert torch.equal(features, plain.backbone(crops(3)[0]))
        assert torch.equal(scores, plain.head(features))
        assert torch.equal(plain(crops(3)[0]), scores)


@pytest.mark.parametrize("architecture", ["alexnet", "vgg16"])
def test_the_papers_features_are_clustered_before_the_relu_that_the_head_sees_them_behind(architecture):
    """Protocol 1a: fc7 before its last ReLU, which training puts back."""
    config = replace(ModelConfig(), architecture=architecture, width=4, stem="small")
    plain = Classifier(build_backbone(config, 0), 5).eval()
    with torch.no_grad():
        features, scores = plain(crops(3)[0], with_features=True)
        assert (features < 0).any()
        expected = np.maximum(features.numpy(), 0) @ plain.head.weight.numpy().T
        np.testing.assert_allclose(scores.numpy(), expected, rtol=1e-4, atol=1e-6)


def test_a_matched_head_outlives_another_number_of_clusters(tmp_path):
    """PIC finds its own number of clusters, and another one in the next epoch."""
    clustering = {"method": "pic", "pca_dim": 16, "sigma": 0.5}
    probe = {"baselines": False, "num_images": 100}
    result = pretrain(tiny(tmp_path, epochs=2, clustering=clustering, train={"head": "matched"}, probe=probe))
    assert result["epochs"] == 2
