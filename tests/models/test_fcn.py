"""FCN R50-d8 against torchvision's dilated network, the numbers of protocols 7 and 12, and cases worked by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
import torchvision
import torchvision.transforms.v2.functional as TF
from PIL import Image
from torch import nn

from raydc.config import ModelConfig, UsageError
from raydc.models.backbone import Backbone, build_backbone
from raydc.models.fcn import FCN, FCNHead, _starts, dilate, predict, segmentation_loss

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SMALL = ModelConfig(architecture="resnet10", width=8, stem="small")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def photos(real_data) -> torch.Tensor:
    """Two real photographs, uint8 (2, 3, 128, 128)."""
    files = sorted((real_data / "imagenette224" / "val").rglob("*.JPEG"))
    images = [TF.pil_to_tensor(Image.open(file).convert("RGB")) for file in (files[0], files[-1])]
    return torch.stack([TF.center_crop(image, [128, 128]) for image in images])


def stirred(config: ModelConfig) -> Backbone:
    """BatchNorms as a training leaves them: no weight is one, no mean is zero."""
    backbone, generator = build_backbone(config, 3), torch.Generator().manual_seed(1)
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
            module.bias.data.uniform_(-0.5, 0.5, generator=generator)
            module.running_mean.uniform_(-0.5, 0.5, generator=generator)
            module.running_var.uniform_(0.5, 2.0, generator=generator)
    return backbone.eval()


def small_fcn(seed: int = 0, num_classes: int = 5, align_corners: bool = False, config: ModelConfig = SMALL) -> FCN:
    torch.manual_seed(seed)
    return FCN(stirred(config), num_classes, align_corners=align_corners)


# --- dilation -----------------------------------------------------------------------------------------------------------


def test_the_dilated_resnet50_is_torchvisions(photos):
    ours = stirred(ModelConfig(architecture="resnet50"))
    theirs = torchvision.models.resnet50(weights=None, replace_stride_with_dilation=[False, True, True])
    theirs.fc = nn.Identity()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    plain = ours.taps(photos)["feature5"]
    dilate(ours)
    trunk = nn.Sequential(*list(theirs.eval().children())[:-2])
    with torch.inference_mode():
        expected, maps = trunk(TF.normalize(photos / 255, MEAN, STD)), ours.taps(photos)
    assert plain.shape == (2, 2048, 4, 4), "stride 32 before"
    assert maps["feature4"].shape == (2, 1024, 16, 16) and maps["feature5"].shape == expected.shape == (2, 2048, 16, 16)
    assert (maps["feature5"] - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize(
    "config",
    [
        ModelConfig(architecture="resnet50", width=8),
        ModelConfig(architecture="resnet18", width=8),
        ModelConfig(architecture="resnet34", width=8, sobel=True),
        ModelConfig(architecture="resnet10", width=8, stem="small", stem_stride=1),
        ModelConfig(architecture="resnet18", width=8, stem="small", stem_stride=4),
    ],
    ids=lambda config: f"{config.architecture}-{config.stem}{config.stem_stride}",
)
def test_dilated_maps_at_every_second_and_fourth_pixel_are_the_plain_ones(config, photos):
    backbone = stirred(config)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    with torch.inference_mode():
        plain = backbone.taps(photos)
        dilate(backbone)
        dense = backbone.taps(photos)
        dilate(backbone)
        again = backbone.taps(photos)
    for name, step in (("feature3", 1), ("feature4", 2), ("feature5", 4)):
        assert dense[name].shape[-1] == step * plain[name].shape[-1]
        assert torch.allclose(dense[name][..., ::step, ::step], plain[name], atol=1e-4 * plain[name].abs().max())
        assert torch.equal(again[name], dense[name]), "twice is once"
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items()), "weights are untouched"


# --- heads --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fcn50() -> FCN:
    """VOC's: 21 classes."""
    torch.manual_seed(0)
    return FCN(build_backbone(ModelConfig(architecture="resnet50"), 0), 21, align_corners=False)


def test_layers_and_parameters_are_the_protocols(fcn50):
    """decode: two convolutions, a third on 2048 + 512 channels, 512 throughout; auxiliary: one, 256 (protocols 7, 12)."""
    norm = 2 * 512
    decode = 9 * 2048 * 512 + 9 * 512 * 512 + 9 * (2048 + 512) * 512 + 3 * norm + 512 * 21 + 21
    auxiliary = 9 * 1024 * 256 + 2 * 256 + 256 * 21 + 21
    counts = [sum(p.numel() for p in one.parameters()) for one in (fcn50.backbone, fcn50.decode, fcn50.auxiliary)]
    assert counts == [23_508_032, decode, auxiliary]
    dropouts = [module for module in fcn50.modules() if isinstance(module, nn.Dropout2d)]
    assert [one.p for one in dropouts] == [0.1, 0.1]
    convolutions = [module for module in fcn50.backbone.layer4.modules() if isinstance(module, nn.Conv2d)]
    assert all(one.stride == (1, 1) for one in convolutions)
    spatial = [one for stage in (3, 4) for one in getattr(fcn50.backbone, f"layer{stage}").modules()]
    spatial = [one.dilation[0] for one in spatial if isinstance(one, nn.Conv2d) and one.kernel_size == (3, 3)]
    assert spatial == [1, 2, 2, 2, 2, 2, 2, 4, 4], "contract_dilation"


def test_new_layers_start_as_the_protocol_says_and_the_backbone_stays(fcn50):
    for head, inner in ((fcn50.decode, 512), (fcn50.auxiliary, 256)):
        assert abs(head.classifier.weight.std().item() / 0.01 - 1) < 0.05 and not head.classifier.bias.any()
        for one in head.modules():
            if isinstance(one, nn.Conv2d) and one is not head.classifier:
                assert abs(one.weight.std().item() / math.sqrt(2 / (9 * inner)) - 1) < 0.01
                assert one.bias is None
    fresh = build_backbone(ModelConfig(architecture="resnet50"), 0).state_dict()
    assert all(torch.equal(value, fresh[name]) for name, value in fcn50.backbone.state_dict().items())


def test_new_layers_hang_on_torchs_generator_alone():
    first, same, other = (small_fcn(seed).decode.state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(value, same[name]) for name, value in first.items())
    assert not torch.equal(first["classifier.weight"], other["classifier.weight"])


def layer(sequence: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
    """3x3, normalised by its running statistics, cut at zero."""
    convolution, norm, _ = sequence
    x = F.conv2d(x, convolution.weight, padding=1)
    x = (x - norm.running_mean[:, None, None]) / (norm.running_var[:, None, None] + 1e-5).sqrt()
    return (x * norm.weight[:, None, None] + norm.bias[:, None, None]).clamp(min=0)


def test_a_head_written_out():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 16, 5, 7, generator=generator)
    with torch.no_grad():
        for concat in (True, False):
            head = FCNHead(16, 3, num_convolutions=2, concat=concat).eval()
            for module in head.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.running_mean.uniform_(-0.5, 0.5, generator=generator)
                    module.running_var.uniform_(0.5, 2, generator=generator)
            out = layer(head.convolutions[1], layer(head.convolutions[0], x))
            assert out.shape[1] == 4, "a quarter of the channels"
            out = layer(head.merge, torch.cat([x, out], 1)) if concat else out
            expected = torch.einsum("kc,nchw->nkhw", head.classifier.weight[:, :, 0, 0], out)
            assert torch.allclose(head(x), expected, atol=1e-6)


def test_the_output_is_the_decoded_last_map_enlarged(photos):
    for align_corners in (False, True):
        model = small_fcn(align_corners=align_corners).eval()
        with torch.inference_mode():
            last = model.backbone.taps(photos)["feature5"]
            logits = model(photos)
            expected = F.interpolate(model.decode(last), (128, 128), mode="bilinear", align_corners=align_corners)
        assert logits.shape == (2, 5, 128, 128) and torch.equal(logits, expected)


def test_training_gives_both_outputs_and_dropout_acts(photos):
    model, pixels = small_fcn().train(), photos.repeat(8, 1, 1, 1)  # enough channels that some are dropped
    first, second = model(pixels), model(pixels)
    assert set(first) == {"out", "aux"}
    for name, one in first.items():
        assert one.shape == (16, 5, 128, 128) and one.dtype == torch.float32
        assert not torch.equal(one, second[name])
    sum(one.square().sum() for one in first.values()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize("size", [(65, 97), (128, 33), (8, 8), (1, 1)])
def test_any_size_comes_out_as_it_went_in_and_float32_under_autocast(photos, size):
    model = small_fcn(config=ModelConfig(architecture="resnet10", width=8, sobel=True)).eval()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        logits = model(photos[:, :, : size[0], : size[1]])
    assert logits.shape == (2, 5, *size) and logits.dtype == torch.float32 and logits.isfinite().all()


@pytest.mark.parametrize(("align_corners", "expected"), [(False, (0, 0.25, 0.75, 1)), (True, (0, 1 / 3, 2 / 3, 1))])
def test_enlarging_by_hand(align_corners, expected):
    ramp = torch.tensor([0.0, 1.0]).expand(1, 1, 1, 2)
    assert torch.allclose(small_fcn(align_corners=align_corners).enlarge(ramp, (1, 4))[0, 0, 0], torch.tensor(expected))


# --- loss ---------------------------------------------------------------------------------------------------------------


def test_the_loss_by_hand():
    """Four pixels, two of them ignored. out: ln 2 and ln 4; aux: twice ln 2. All are divided by four, and aux counts 0.4."""
    out, aux = torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 2, 2)
    out[0, 0, 0, 1] = math.log(3)  # of class 1 there: one in four
    labels = torch.tensor([[[0, 1], [255, 255]]], dtype=torch.uint8)
    expected = (math.log(2) + math.log(4)) / 4 + 0.4 * 2 * math.log(2) / 4
    assert float(segmentation_loss({"out": out, "aux": aux}, labels)) == pytest.approx(expected)
    assert float(segmentation_loss({"out": out, "aux": aux}, torch.full_like(labels, 255))) == 0


def test_ignored_pixels_have_no_gradient():
    logits = torch.randn(1, 3, 2, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels = torch.tensor([[[0, 255], [2, 255]]])
    segmentation_loss({"out": logits, "aux": logits}, labels).backward()
    assert (logits.grad[..., 0].abs().sum(1) > 0).all() and not logits.grad[..., 1].any()


# --- prediction ---------------------------------------------------------------------------------------------------------


def test_windows_of_cityscapes():
    """1024 x 2048 tested at 1025 x 2049, in windows of 769 every 513: the last ones end at the edges."""
    assert _starts(1025, 769, 513) == [0, 256] and 256 + 769 == 1025
    assert _starts(2049, 769, 513) == [0, 513, 1026, 1280] and 1280 + 769 == 2049
    assert _starts(769, 769, 513) == _starts(300, 769, 513) == [0]
    assert _starts(769 + 513, 769, 513) == [0, 513]


def test_whole_images_are_predicted_at_the_size_asked_for(photos):
    model = small_fcn().eval()
    with torch.inference_mode():
        logits = model(photos[:1])
    classes = predict(model, photos[0], (128, 128))
    assert classes.dtype == torch.uint8 and torch.equal(classes, logits[0].argmax(0).to(torch.uint8))
    assert len(classes.unique()) > 1
    for align_corners in (False, True):
        model.align_corners = align_corners
        with torch.inference_mode():
            logits = F.interpolate(model(photos[:1]), (75, 200), mode="bilinear", align_corners=align_corners)
        assert torch.equal(predict(model, photos[0], (75, 200)), logits[0].argmax(0).to(torch.uint8))


def test_sliding_averages_the_logits_where_windows_overlap(photos):
    """64 x 90 in windows of 40 every 24: rows from 0 and 24, columns from 0, 24, 48 and 50, by hand."""
    model, pixels = small_fcn().eval(), photos[0, :, :64, :90]
    total, times = torch.zeros(5, 64, 90), torch.zeros(64, 90)
    with torch.inference_mode():
        for top in (0, 24):
            for left in (0, 24, 48, 50):
                logits = model(pixels[None, :, top : top + 40, left : left + 40])[0]
                total += F.pad(logits, (left, 90 - left - 40, top, 64 - top - 40))
                times[top : top + 40, left : left + 40] += 1
    assert times.min() == 1 and times.max() == 6
    slid = predict(model, pixels, (64, 90), window=40, stride=24)
    assert torch.equal(slid, (total / times).argmax(0).to(torch.uint8))
    assert not torch.equal(slid, predict(model, pixels, (64, 90))), "and that is not the whole image's"
    enlarged = F.interpolate((total / times)[None], (100, 120), mode="bilinear")[0].argmax(0)
    assert torch.equal(predict(model, pixels, (100, 120), window=40, stride=24), enlarged.to(torch.uint8))


def test_an_image_smaller_than_the_window_is_one_window(photos):
    model, pixels = small_fcn().eval(), photos[1, :, :50, :60]
    assert torch.equal(predict(model, pixels, (50, 60), window=769, stride=513), predict(model, pixels, (50, 60)))


@pytest.mark.parametrize("stride", [0, -1, 41])
def test_a_stride_that_leaves_pixels_out_is_refused(photos, stride):
    with pytest.raises(UsageError, match="give a stride of 1 to 40"):
        predict(small_fcn().eval(), photos[0], (128, 128), window=40, stride=stride)


def test_it_learns_what_is_drawn():
    """Bright squares on dark noise: found on images it has not seen."""
    generator = torch.Generator().manual_seed(0)

    def draw(number: int) -> tuple[torch.Tensor, torch.Tensor]:
        pixels = torch.randint(0, 100, (number, 3, 64, 64), generator=generator, dtype=torch.uint8)
        labels = torch.zeros(number, 64, 64, dtype=torch.uint8)
        for image, label in zip(pixels, labels, strict=True):
            top, left = (int(torch.randint(0, 32, (), generator=generator)) for _ in range(2))
            image[:, top : top + 32, left : left + 32] += 120
            label[top : top + 32, left : left + 32] = 1
        return pixels, labels

    torch.manual_seed(0)
    model = FCN(build_backbone(SMALL, 0), 2, align_corners=False).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(60):
        pixels, labels = draw(8)
        optimizer.zero_grad()
        segmentation_loss(model(pixels), labels).backward()
        optimizer.step()
    model.eval()
    pixels, labels = draw(8)
    found = torch.stack([predict(model, one, (64, 64), window=48, stride=16) for one in pixels])
    both, either = ((found == 1) & (labels == 1)).sum(), ((found == 1) | (labels == 1)).sum()
    assert both / either > 0.8
