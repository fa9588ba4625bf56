"""The backbone against torchvision's own networks, and the facts of protocols 1a, 1b and 12."""

import copy
import math

import numpy as np
import pytest
import torch
import torchvision
import torchvision.transforms.v2.functional as TF
from PIL import Image
from scipy import ndimage, stats
from torch import nn

from raydc.config import ModelConfig
from raydc.models.backbone import build_backbone
from raydc.models.head import Classifier, Head
from raydc.models.norm import PixelNorm, adapt_statistics, folded
from raydc.models.sobel import KERNELS, Sobel

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def photos(real_data) -> torch.Tensor:
    """Four real photographs, uint8 (4, 3, 224, 224)."""
    files = sorted((real_data / "imagenette224" / "val").rglob("*.JPEG"))
    files = files[:: len(files) // 4][:4]
    images = [TF.pil_to_tensor(Image.open(file).convert("RGB")) for file in files]
    return torch.stack([TF.center_crop(image, [224, 224]) for image in images])


def stir(model: nn.Module) -> nn.Module:
    """BatchNorms as a training leaves them: no weight is one, no mean is zero."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.weight.data, 0.5, 1.5),
                (module.bias.data, -0.5, 0.5),
                (module.running_mean, -0.5, 0.5),
                (module.running_var, 0.5, 2.0),
            ):
                tensor.uniform_(low, high, generator=generator)
    return model


@pytest.mark.parametrize("architecture", ["resnet18", "resnet34", "resnet50"])
def test_weights_load_into_torchvisions_model_and_mean_the_same(architecture, photos):
    ours = stir(build_backbone(ModelConfig(architecture=architecture), 3)).eval()
    theirs = torchvision.models.get_model(architecture, weights=None)
    theirs.fc = nn.Identity()
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    theirs.load_state_dict(ours.state_dict(), strict=True)
    with torch.inference_mode():
        pixels = photos[:, :, 50:178, 50:178]
        expected = theirs.eval()(TF.normalize(pixels / 255, MEAN, STD))
        features = ours(pixels)
    assert features.shape == (4, ours.feature_dim)
    assert (features - expected).abs().max() < 1e-4 * expected.abs().max()
    assert expected.std(0).mean() > 1e-2 * expected.mean(), "four images, four features"


@pytest.mark.parametrize(("architecture", "millions"), [("resnet18", 11.177), ("resnet34", 21.285), ("resnet50", 23.508)])
def test_parameter_counts_are_the_papers(architecture, millions):
    """torchvision's documented 11,689,512, 21,797,672 and 25,557,032, less their fc."""
    count = sum(p.numel() for p in build_backbone(ModelConfig(architecture=architecture), 0).parameters())
    assert round(count / 1e6, 3) == millions


def test_taps_of_resnet50_at_224(photos):
    backbone = build_backbone(ModelConfig(architecture="resnet50"), 0).eval()
    with torch.inference_mode():
        maps = backbone.taps(photos[:1])
    assert {name: tuple(one.shape[1:]) for name, one in maps.items()} == {
        "feature1": (64, 112, 112),
        "feature2": (256, 56, 56),
        "feature3": (512, 28, 28),
        "feature4": (1024, 14, 14),
        "feature5": (2048, 7, 7),
    }
    assert all((one >= 0).all() for one in maps.values()), "after their ReLU"


@pytest.mark.parametrize(("stride", "sides"), [(1, (32, 32, 16, 8, 4)), (2, (16, 16, 8, 4, 2)), (4, (8, 8, 4, 2, 1))])
def test_taps_of_the_small_stem_at_32(stride, sides, photos):
    config = ModelConfig(architecture="resnet18", width=16, stem="small", stem_stride=stride)
    backbone = build_backbone(config, 0).eval()
    with torch.inference_mode():
        maps = backbone.taps(photos[:2, :, :32, :32])
        features = backbone(photos[:2, :, :32, :32])
    assert [one.shape[1] for one in maps.values()] == [16, 16, 32, 64, 128]
    assert tuple(one.shape[2] for one in maps.values()) == sides
    assert torch.allclose(features, maps["feature5"].flatten(2).mean(2)), "the features are the average pool"


def test_taps_are_not_overwritten_by_later_stages(photos):
    backbone = build_backbone(ModelConfig(width=8, stem="small"), 0).eval()
    with torch.inference_mode():
        stem = backbone.bn1(backbone.conv1(backbone.norm(photos))).clamp(min=0)
        assert torch.equal(backbone.taps(photos)["feature1"], stem)


def test_gradients_reach_every_parameter(photos):
    model = Classifier(build_backbone(ModelConfig(width=8, stem="small", sobel=True), 0), 5)
    model(photos[:, :, :32, :32]).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.backbone.parameters())


# --- what is in front of the network ------------------------------------------------------------------------------------


def test_sobel_of_a_step_edge():
    """Dark left of column 2, bright from it on; zeros around. By hand, the kernels laid over as they are written."""
    image = torch.zeros(1, 3, 5, 5)
    image[..., 2:] = 1
    across, down = Sobel()(image)[0]
    full = torch.tensor([0.0, -4, -4, 0, 4])  # (1 + 2 + 1) times (left neighbour - right neighbour)
    assert torch.allclose(across[1:4], full.expand(3, 5), atol=1e-6)
    assert torch.allclose(across[[0, 4]], full.expand(2, 5) * 3 / 4, atol=1e-6), "one row of three is outside"
    assert torch.allclose(down[1:4], torch.zeros(3, 5), atol=1e-6)
    assert torch.allclose(down[0], -torch.tensor([0.0, 1, 3, 4, 3]), atol=1e-6)
    assert torch.allclose(down[4], torch.tensor([0.0, 1, 3, 4, 3]), atol=1e-6)


def test_sobel_is_scipys_on_the_mean_of_the_colours(photos):
    kernels = ([[1, 0, -1], [2, 0, -2], [1, 0, -1]], [[1, 2, 1], [0, 0, 0], [-1, -2, -1]])
    assert np.array_equal(KERNELS, kernels), "protocol 1a"
    photo = TF.normalize(photos[:1] / 255, MEAN, STD)
    for ours, kernel in zip(Sobel()(photo)[0], kernels, strict=True):
        expected = ndimage.correlate(photo[0].mean(0).numpy(), np.array(kernel, float), mode="constant")
        assert np.allclose(ours.numpy(), expected, atol=1e-4)


def test_sobel_sees_normalised_pixels_inside_the_model(photos):
    backbone = build_backbone(ModelConfig(width=8, sobel=True), 0).eval()
    assert backbone.conv1.in_channels == 2
    assert not any("sobel" in name for name in backbone.state_dict()), "the file has torchvision's names alone"
    seen = []
    backbone.conv1.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.inference_mode():
        backbone(photos)
    assert torch.allclose(seen[0], Sobel()(TF.normalize(photos / 255, MEAN, STD)), atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_pixelnorm_is_torchvisions_normalize(photos, dtype, layout):
    pixels = photos.to(dtype).contiguous(memory_format=layout)
    ours = PixelNorm(MEAN, STD)(pixels)
    assert ours.dtype == torch.float32
    assert torch.allclose(ours, TF.normalize(photos / 255, MEAN, STD), atol=1e-5)


# --- initial weights ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["resnet18", "resnet50"])
def test_initial_weights_are_the_published_models(architecture):
    """Protocols 1b.1 and 12: Kaiming-normal over fan_in, no biases, BatchNorm 1 and 0 also at the end of a block."""
    backbone = build_backbone(ModelConfig(architecture=architecture), 5)
    for name, module in backbone.named_modules():
        if isinstance(module, nn.Conv2d):
            assert module.bias is None, name
            fan_in = module.in_channels * module.kernel_size[0] * module.kernel_size[1]
            wanted, count = math.sqrt(2 / fan_in), module.weight.numel()
            assert abs(module.weight.std().item() / wanted - 1) < 4 / math.sqrt(2 * count), name
            assert abs(module.weight.mean().item()) < 4 * wanted / math.sqrt(count), name
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all() and (module.bias == 0).all(), name
            assert (module.momentum, module.eps) == (0.1, 1e-5), name
    weights = backbone.layer1[0].conv2.weight.detach().flatten().numpy()
    assert stats.kstest(weights / math.sqrt(2 / (64 * 9)), "norm").pvalue > 1e-3


def test_the_head_is_normal_with_standard_deviation_001():
    head = Head(512, 200)
    for seed in (None, 7):
        if seed is not None:
            head.refresh(seed)
        assert stats.kstest(head.weight.detach().flatten().numpy() / 0.01, "norm").pvalue > 1e-3
        assert (head.bias == 0).all()


def test_weights_hang_on_the_seed_alone():
    config = ModelConfig(architecture="resnet10", width=8)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = build_backbone(config, 11).state_dict()
    assert torch.equal(torch.get_rng_state(), before), "the global generator is left alone"
    torch.manual_seed(2)
    again, other = build_backbone(config, 11).state_dict(), build_backbone(config, 12).state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not any(torch.equal(first[key], other[key]) for key in first if "conv" in key)


def test_a_head_is_refreshed_in_place_and_reproducibly():
    head = Head(64, 10)
    place, weight = head.weight.data_ptr(), head.weight
    torch.nn.init.ones_(head.bias)
    head.refresh(3)
    first = head.weight.detach().clone()
    assert head.weight is weight and head.weight.data_ptr() == place
    assert (head.bias == 0).all()
    head.refresh(4)
    assert not torch.equal(head.weight, first)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    head.refresh(3)
    assert torch.equal(head.weight, first)
    assert torch.equal(torch.get_rng_state(), before)


# --- BatchNorm around a run ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sobel", [False, True])
@pytest.mark.parametrize("stem", ["imagenet", "small"])
@pytest.mark.parametrize("architecture", ["resnet10", "resnet18", "resnet34", "resnet50"])
def test_a_folded_network_is_the_same_function(architecture, stem, sobel, photos):
    config = ModelConfig(architecture=architecture, width=8, stem=stem, sobel=sobel)
    model = stir(build_backbone(config, 2))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    lean = folded(model)
    pixels = photos[:, :, 60:124, 60:124]
    with torch.inference_mode():
        ours, expected = lean(pixels), model.eval()(pixels)
    assert (ours - expected).abs().max() < 1e-4 * expected.abs().max()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in lean.modules())
    assert any(isinstance(module, nn.BatchNorm2d) for module in model.modules()), "the original keeps its own"
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_folding_follows_the_weights_of_the_moment(photos):
    model = build_backbone(ModelConfig(architecture="resnet10", width=8, stem="small"), 2)
    model.train()
    folded(model)
    assert model.training, "a copy was put in eval mode, not the model"
    with torch.inference_mode():
        first = folded(model)(photos[:, :, :32, :32])
        stir(model)
        assert not torch.allclose(folded(model)(photos[:, :, :32, :32]), first, rtol=1e-2)


def test_adapted_statistics_are_the_batches_mean_and_variance(photos):
    """By hand: the average over batches of each batch's mean and unbiased variance."""
    model = nn.Sequential(nn.BatchNorm2d(3))
    model[0].running_mean.fill_(7)
    batches = [photos[:1].double(), photos[1:].double()]
    adapt_statistics(model.double().eval(), batches)
    rows = [batch.transpose(0, 1).reshape(3, -1).numpy() for batch in batches]
    assert np.allclose(model[0].running_mean, np.mean([row.mean(1) for row in rows], 0))
    assert np.allclose(model[0].running_var, np.mean([row.var(1, ddof=1) for row in rows], 0))
    assert not model.training and model[0].momentum == 0.1
    assert (model[0].weight == 1).all() and (model[0].bias == 0).all()


def test_ranks_adapt_each_by_itself_also_where_batchnorm_is_synchronised(photos):
    """A rank that has fewer batches than another would leave it waiting in SyncBN."""
    plain = build_backbone(ModelConfig(architecture="resnet10", width=8), 2)
    synced = torch.nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(plain))
    kinds, seen = [type(module) for module in synced.modules()], []
    for module in synced.modules():
        module.register_forward_hook(lambda module, *_: seen.append(type(module)))
    for model in (plain, synced):
        adapt_statistics(model, [photos, photos.flip(3)])
    assert len(seen) > 20 and torch.nn.SyncBatchNorm not in seen
    assert [type(module) for module in synced.modules()] == kinds and torch.nn.SyncBatchNorm in kinds
    for one, other in zip(plain.buffers(), synced.buffers(), strict=True):
        assert torch.equal(one, other)


def test_adapting_makes_the_stem_standard_on_those_images(photos):
    backbone = build_backbone(ModelConfig(architecture="resnet10", width=8), 2)
    weights = [p.detach().clone() for p in backbone.parameters()]
    adapt_statistics(backbone, [photos])
    with torch.inference_mode():
        stem = backbone.eval().bn1(backbone.conv1(backbone.norm(photos)))
    assert stem.mean((0, 2, 3)).abs().max() < 1e-3
    assert (stem.std((0, 2, 3)) - 1).abs().max() < 1e-2
    assert all(torch.equal(a, b) for a, b in zip(weights, backbone.parameters(), strict=True))
