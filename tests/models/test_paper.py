"""AlexNet and VGG16 against torchvision, the layer list of protocol 1a written out once more, and counts by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
import torchvision
import torchvision.transforms.v2.functional as TF
from PIL import Image
from scipy import stats
from torch import nn

from raydc.config import ModelConfig, UsageError
from raydc.models.backbone import Backbone, build_backbone, make_backbone
from raydc.models.detector import faster_rcnn_c4, mask_rcnn_fpn
from raydc.models.fcn import FCN
from raydc.models.norm import folded
from raydc.models.paper import VGG16, AlexNet
from raydc.models.sobel import Sobel

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BOTH = pytest.mark.parametrize("architecture", ["alexnet", "vgg16"])

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def photos(real_data) -> torch.Tensor:
    """Three real photographs, uint8 (3, 3, 224, 224)."""
    files = sorted((real_data / "imagenette224" / "val").rglob("*.JPEG"))
    images = [TF.pil_to_tensor(Image.open(file).convert("RGB")) for file in files[:: len(files) // 3][:3]]
    return torch.stack([TF.center_crop(image, [224, 224]) for image in images])


@pytest.fixture(scope="module")
def published() -> dict[str, nn.Module]:
    """Both in full, as they are drawn; left alone by the tests."""
    return {name: build_backbone(ModelConfig(architecture=name), 3).eval() for name in ("alexnet", "vgg16")}


def stir(model: nn.Module) -> nn.Module:
    """As a training leaves it: no BatchNorm's weight is one, no mean and no bias is zero, and fc7 depends on the image."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
            module.running_mean.uniform_(-0.5, 0.5, generator=generator)
            module.running_var.uniform_(0.5, 2.0, generator=generator)
        if isinstance(module, nn.Linear):
            module.weight.data.normal_(0, module.in_features**-0.5, generator=generator)
        if isinstance(module, nn.BatchNorm2d | nn.Conv2d | nn.Linear):
            module.bias.data.uniform_(-0.5, 0.5, generator=generator)
    return model


def narrow(architecture: str, **settings) -> nn.Module:
    return stir(build_backbone(ModelConfig(architecture=architecture, width=8, **settings), 2)).eval()


def sizes(maps: dict[str, torch.Tensor]) -> list[tuple[int, ...]]:
    assert list(maps) == ["feature1", "feature2", "feature3", "feature4", "feature5"]
    return [tuple(one.shape[1:]) for one in maps.values()]


# --- the published networks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sobel", "first"), [(False, 11 * 11 * 3 * 96 + 96), (True, 11 * 11 * 2 * 96 + 96)])
def test_alexnet_has_the_papers_parameters(sobel, first):
    others = (5 * 5 * 96 * 256 + 256) + (3 * 3 * 256 * 384 + 384) + (3 * 3 * 384 * 384 + 384) + (3 * 3 * 384 * 256 + 256)
    norms = 2 * (96 + 256 + 384 + 384 + 256)
    fc6, fc7 = 9216 * 4096 + 4096, 4096 * 4096 + 4096
    with torch.device("meta"):
        model = AlexNet(ModelConfig(architecture="alexnet", sobel=sobel))
    assert sum(p.numel() for p in model.parameters()) == first + others + norms + fc6 + fc7
    assert first + others + norms + fc6 + fc7 == {False: 58_284_096, True: 58_272_480}[sobel]


@pytest.mark.parametrize(("sobel", "channels"), [(False, 3), (True, 2)])
def test_vgg16_has_torchvisions_parameters(sobel, channels):
    """torchvision documents 138,365,992 for vgg16_bn; its fc8 has 4096 x 1000 + 1000 of them."""
    with torch.device("meta"):
        model, theirs = VGG16(ModelConfig(architecture="vgg16", sobel=sobel)), torchvision.models.vgg16_bn(weights=None)
    assert sum(p.numel() for p in theirs.parameters()) == 138_365_992
    expected = 138_365_992 - 4_097_000 - 3 * 3 * 64 * (3 - channels)
    assert sum(p.numel() for p in model.parameters()) == expected


def test_vgg16s_weights_load_into_torchvisions_model_and_mean_the_same(published, photos):
    ours = published["vgg16"]
    with torch.device("meta"):
        theirs = torchvision.models.vgg16_bn(weights=None)
    theirs.classifier = theirs.classifier[:4]
    theirs.load_state_dict(ours.state_dict(), strict=True, assign=True)
    with torch.inference_mode():
        expected, features = theirs.eval()(TF.normalize(photos / 255, MEAN, STD)), ours(photos)
    assert features.shape == (3, 4096) == (3, ours.feature_dim)
    assert (features - expected).abs().max() < 1e-4 * expected.abs().max()
    assert 0.2 < (features < 0).float().mean() < 0.8, "before its ReLU"
    assert expected.std(0).mean() > 1e-2 * expected.abs().mean(), "three images, three features"


def as_listed(model: nn.Module, pixels: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Protocol 1a's AlexNet in functions: maps after each ReLU, and fc7."""
    weights = iter([*model.features.parameters(), *model.classifier.parameters()])
    statistics = iter([buffer for buffer in model.features.buffers() if buffer.ndim])
    x, maps = pixels, []
    for stride, padding, pooled in ((4, 2, True), (1, 2, True), (1, 1, False), (1, 1, False), (1, 1, True)):
        x = F.conv2d(x, next(weights), next(weights), stride, padding)
        scale, shift = next(weights), next(weights)
        x = F.batch_norm(x, next(statistics), next(statistics), scale, shift).clamp(min=0)
        maps.append(x)
        x = F.max_pool2d(x, 3, 2) if pooled else x
    x = F.linear(x.reshape(len(x), -1), next(weights), next(weights)).clamp(min=0)
    return maps, F.linear(x, next(weights), next(weights))


@pytest.mark.parametrize("sobel", [False, True])
def test_alexnet_is_the_protocols_list_of_layers(sobel, photos):
    model = narrow("alexnet", sobel=sobel)
    seen = TF.normalize(photos / 255, MEAN, STD)
    with torch.inference_mode():
        maps, fc7 = as_listed(model, Sobel()(seen) if sobel else seen)
        features, taps = model(photos), list(model.taps(photos).values())
    assert (features - fc7).abs().max() < 1e-4 * fc7.abs().max() and (features < 0).any()
    assert all((one - other).abs().max() < 1e-4 * other.abs().max() for one, other in zip(taps, maps, strict=True))
    assert (features[0] - features[1]).abs().max() > 1e-2 * fc7.abs().max(), "two images, two features"


def test_taps_of_alexnet_at_224(published, photos):
    """(224 + 4 - 11) // 4 + 1 = 55, halved by pools of 3 to 27 and 13; none of a map is after its pool."""
    with torch.inference_mode():
        maps = published["alexnet"].taps(photos[:1])
        assert published["alexnet"](photos[:1]).shape == (1, 4096)
    assert sizes(maps) == [(96, 55, 55), (256, 27, 27), (384, 13, 13), (384, 13, 13), (256, 13, 13)]
    assert all((one >= 0).all() and (one == 0).any() for one in maps.values()), "after their ReLU"


def test_taps_of_vgg16_are_torchvisions_maps_before_the_max_pools(photos):
    ours = narrow("vgg16")
    with torch.inference_mode():
        maps, x, expected = ours.taps(photos[:1]), TF.normalize(photos[:1] / 255, MEAN, STD), []
        for layer, kind in zip(ours.features, torchvision_layers(), strict=True):
            if kind is nn.MaxPool2d:
                expected.append(x.clone())
            x = layer(x)
    assert sizes(maps) == [(8, 224, 224), (16, 112, 112), (32, 56, 56), (64, 28, 28), (64, 14, 14)]
    assert all(
        (one - other).abs().max() < 1e-4 * other.abs().max() for one, other in zip(maps.values(), expected, strict=True)
    )


def torchvision_layers() -> list[type[nn.Module]]:
    with torch.device("meta"):
        return [type(layer) for layer in torchvision.models.vgg16_bn(weights=None).features]


@BOTH
def test_the_images_colours_are_gradients_with_sobel(architecture, photos):
    model = narrow(architecture, sobel=True)
    assert model.features[0].in_channels == 2
    assert not any("sobel" in name or "norm" in name for name in model.state_dict())
    seen = []
    model.features[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.inference_mode():
        model(photos)
    assert torch.allclose(seen[0], Sobel()(TF.normalize(photos / 255, MEAN, STD)), atol=1e-4)


# --- fresh weights ------------------------------------------------------------------------------------------------------


@BOTH
def test_fresh_weights_are_the_papers(architecture, published):
    """Convolutions N(0, 2 / (kh kw outputs)), fully connected layers N(0, 0.01 squared); biases 0; BatchNorm 1 and 0."""
    drawn = 0
    for module in published[architecture].modules():
        if isinstance(module, nn.Conv2d):
            outputs, _, height, width = module.weight.shape
            std = math.sqrt(2 / (height * width * outputs))
        elif isinstance(module, nn.Linear):
            std = 0.01
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all() and (module.bias == 0).all()
            continue
        else:
            continue
        drawn += 1
        few = module.weight.detach().flatten()[:: max(1, module.weight.numel() // 50_000)]
        assert stats.kstest(few.numpy() / std, "norm").pvalue > 1e-4
        assert (module.bias == 0).all()
    assert drawn == {"alexnet": 7, "vgg16": 15}[architecture]


@BOTH
def test_the_first_deviation_by_hand(architecture, published):
    """sqrt(2 / (11 x 11 x 96)) and sqrt(2 / (3 x 3 x 64))."""
    std = published[architecture].features[0].weight.std().item()
    assert std == pytest.approx({"alexnet": 0.013122, "vgg16": 0.058926}[architecture], rel=0.05)


@BOTH
def test_weights_depend_on_the_seed_alone(architecture):
    config = ModelConfig(architecture=architecture, width=4, stem="small")
    torch.manual_seed(5)
    first, state = build_backbone(config, 1).state_dict(), torch.get_rng_state()
    torch.manual_seed(6)
    again, other = build_backbone(config, 1).state_dict(), build_backbone(config, 2).state_dict()
    torch.manual_seed(5)
    assert torch.equal(state, torch.get_rng_state()), "the global generator is left as it was"
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(
        first["classifier.1.weight" if architecture == "alexnet" else "classifier.0.weight"], other["features.0.weight"]
    )
    assert not torch.equal(first["features.0.weight"], other["features.0.weight"])


# --- in training --------------------------------------------------------------------------------------------------------


def fully_connected(model: nn.Module, pixels: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What went into fc6 and fc7, and what came out."""
    seen, hooks = [], []
    for module in model.modules():
        if isinstance(module, nn.Linear):
            hooks.append(module.register_forward_hook(lambda _, inputs, out: seen.append((inputs[0].clone(), out.clone()))))
    with torch.inference_mode():
        model(pixels)
    for hook in hooks:
        hook.remove()
    return seen


def half_dropped(dropped: torch.Tensor, whole: torch.Tensor) -> bool:
    """Of what was not 0 before, half is 0 and the rest doubled."""
    alive = whole != 0
    kept = dropped[alive] != 0
    return 0.4 < kept.float().mean() < 0.6 and torch.allclose(dropped, torch.where(dropped != 0, 2 * whole, 0), rtol=1e-4)


@BOTH
def test_dropout_is_before_fc7_and_alexnets_before_fc6_in_training_alone(architecture, photos):
    model = narrow(architecture)
    with torch.inference_mode():
        assert torch.equal(model(photos), model(photos))
    (into6, _), (into7, _) = fully_connected(model, photos)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()  # the same maps as before
    torch.manual_seed(0)
    (trained6, out6), (trained7, _) = fully_connected(model, photos)
    if architecture == "alexnet":
        assert half_dropped(trained6, into6)
    else:
        assert torch.equal(trained6, into6)
    assert half_dropped(trained7, out6.clamp(min=0))
    assert (into7 >= 0).all() and (into7 > 0).any(), "fc6 has a ReLU"


@BOTH
def test_gradients_reach_every_parameter(architecture, photos):
    model = narrow(architecture, sobel=True, stem="small").train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()  # with a batch's own statistics the bias before it has no gradient
    model(photos[:, :, 90:122, 90:122]).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@BOTH
def test_a_head_sees_features_past_their_relu(architecture, photos):
    model = narrow(architecture, stem="small")
    with torch.inference_mode():
        features = model(photos[:, :, :32, :32])
        before, activated = features.clone(), model.activate(features)
    assert torch.equal(features, before), "the features themselves keep what is negative"
    assert (features < 0).any() and torch.equal(activated, features.clamp(min=0))


def test_a_residual_networks_features_are_past_their_relu_already(photos):
    backbone = build_backbone(ModelConfig(architecture="resnet10", width=8, stem="small"), 0).eval()
    with torch.inference_mode():
        features = backbone(photos[:, :, :32, :32])
        assert (features >= 0).all() and backbone.activate(features) is features


# --- what a run does with them ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sobel", [False, True])
@pytest.mark.parametrize("stem", ["imagenet", "small"])
@BOTH
def test_a_folded_network_is_the_same_function(architecture, stem, sobel, photos):
    model, pixels = narrow(architecture, stem=stem, sobel=sobel), photos[:, :, 40:168, 40:168]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    lean = folded(model)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in lean.modules())
    with torch.inference_mode():
        pairs = [(lean(pixels), model(pixels))]
        taps, expected = lean.taps(pixels), model.taps(pixels)
    pairs += [(taps[name], expected[name]) for name in expected]
    assert len(pairs) == 6
    assert all((one - other).abs().max() < 1e-4 * other.abs().max() for one, other in pairs)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@BOTH
def test_pixels_may_lie_in_any_layout(architecture, photos):
    """channels_last is what runs take; the map is flattened into fc6 in one order."""
    model, pixels = narrow(architecture), photos[:2]
    with torch.inference_mode():
        expected = model(pixels)
        turned = model.to(memory_format=torch.channels_last)(pixels.to(memory_format=torch.channels_last))
    assert (turned - expected).abs().max() < 1e-4 * expected.abs().max()


@BOTH
def test_width_scales_every_channel_and_the_feature(architecture):
    def shapes(width):
        with torch.device("meta"):
            model = make_backbone(ModelConfig(architecture=architecture, width=width))
        return model.feature_dim, [p.shape[0] for p in model.parameters()]

    full, half, double = (shapes(width) for width in (64, 32, 128))
    assert (full[0], half[0], double[0]) == (4096, 2048, 8192)
    assert [2 * number for number in half[1]] == full[1] == [number // 2 for number in double[1]]


@pytest.mark.parametrize(
    ("stride", "sides", "fc6"), [(1, (32, 32, 15, 15, 15), 288), (2, (16, 16, 7, 7, 7), 288), (4, (8, 8, 3, 3, 3), 288)]
)
def test_alexnets_small_stem_at_32(stride, sides, fc6, photos):
    """No pool after the first convolution; the next makes 15 of 32, 7 of 16, 3 of 8. fc6 sees 3 x 3 of 256 / 8 channels."""
    model, pixels = narrow("alexnet", stem="small", stem_stride=stride), photos[:, :, 90:122, 90:122]
    assert (model.features[0].kernel_size, model.features[0].padding) == ((3, 3), (1, 1))
    with torch.inference_mode():
        maps, features = model.taps(pixels), model(pixels)
    assert sizes(maps) == [(channels, side, side) for channels, side in zip((12, 32, 48, 48, 32), sides, strict=True)]
    assert fully_connected(model, pixels)[0][0].shape == (3, fc6) and features.shape == (3, 512)
    assert features.std(0).mean() > 1e-2 * features.abs().mean()


def test_vgg16s_small_stem_at_32(photos):
    """Without the first max-pool: 32, 32, 16, 8, 4 and then 2 x 2 of 512 / 8 channels."""
    model, pixels = narrow("vgg16", stem="small"), photos[:, :, 90:122, 90:122]
    with torch.inference_mode():
        maps, features = model.taps(pixels), model(pixels)
    assert sizes(maps) == [(8, 32, 32), (16, 32, 32), (32, 16, 16), (64, 8, 8), (64, 4, 4)]
    assert fully_connected(model, pixels)[0][0].shape == (3, 256) and features.shape == (3, 512)
    assert features.std(0).mean() > 1e-2 * features.abs().mean()


def test_other_sizes_are_averaged_to_the_published_grid(photos):
    """At 192 VGG16's last map is 6 x 6 after its pool: adaptive pooling, as torchvision has it."""
    ours, pixels = narrow("vgg16"), photos[:, :, :192, :192]
    with torch.inference_mode():
        last = F.max_pool2d(ours.taps(pixels)["feature5"], 2)
        assert last.shape[-2:] == (6, 6)
        into6 = fully_connected(ours, pixels)[0][0]
    assert torch.allclose(into6, F.adaptive_avg_pool2d(last, 7).flatten(1))


@pytest.mark.parametrize(("stem", "side"), [("imagenet", 224), ("small", 32)])
@BOTH
def test_no_pooling_to_a_grid_at_the_published_size(architecture, stem, side, photos):
    """torch refuses its gradient on a GPU where a run asks for determinism."""
    model, seen = narrow(architecture, stem=stem), []
    model.avgpool.register_forward_hook(lambda module, inputs, out: seen.append(out is inputs[0]))
    with torch.inference_mode():
        model(photos[:1, :, :side, :side])
    assert seen == [True]


SMALLEST = [
    ("alexnet", {}, 63, "AlexNet with model.stem imagenet, which needs 63; raise images.size, or give --model.stem small$"),
    ("vgg16", {}, 32, "31 x 31 pixels are too small for VGG16"),
    ("alexnet", {"stem": "small", "stem_stride": 1}, 7, "which needs 7; raise images.size$"),
    ("alexnet", {"stem": "small", "stem_stride": 2}, 13, "which needs 13"),
    ("alexnet", {"stem": "small", "stem_stride": 4}, 25, "which needs 25"),
    ("vgg16", {"stem": "small"}, 16, "which needs 16"),
]


@pytest.mark.parametrize(("architecture", "settings", "least", "message"), SMALLEST)
def test_images_that_the_pools_leave_nothing_of_are_refused(architecture, settings, least, message, photos):
    model = narrow(architecture, **settings)
    with torch.inference_mode():
        assert model(photos[:, :, :least, :least]).isfinite().all()
        short = photos[:, :, : least - 1, : least - 1]
        for refused in (model, model.taps):
            with pytest.raises(UsageError, match=message):
                refused(short)
        with pytest.raises(UsageError, match=f"images of {least} x {least - 1} pixels"):
            model(photos[:, :, :least, : least - 1])
        with pytest.raises(RuntimeError, match="too small"):
            model.features(TF.normalize(short / 255, MEAN, STD))  # so the bound is no larger than it must be


@pytest.mark.parametrize(
    ("architecture", "kind"), [("alexnet", AlexNet), ("vgg16", VGG16), ("resnet10", Backbone), ("resnet50", Backbone)]
)
def test_the_architecture_names_the_network(architecture, kind):
    with torch.device("meta"):
        assert type(make_backbone(ModelConfig(architecture=architecture, width=4))) is kind


@pytest.mark.parametrize(("architecture", "name"), [("alexnet", "AlexNet"), ("vgg16", "VGG16")])
def test_detection_and_segmentation_refuse_them(architecture, name):
    backbone = narrow(architecture)
    remedy = f"needs a residual network, this one is {name}; give a backbone of model.architecture resnet10, .*resnet50"
    for detector in (faster_rcnn_c4, mask_rcnn_fpn):
        with pytest.raises(UsageError, match=f"^detection {remedy}"):
            detector(backbone, 20)
    with pytest.raises(UsageError, match=f"^segmentation {remedy}"):
        FCN(backbone, 21, align_corners=False)
