"""Backbones from runs, from files of others, and fresh ones."""

import pickle

import pytest
import safetensors.torch
import torch
import torchvision

from raydc import Folder, load_backbone
from raydc.benchmarks.options import Knn, Semisup
from raydc.benchmarks.setting import Candidate, claim, networks, open_backbone
from raydc.config import ModelConfig, UsageError
from raydc.recipes import RECIPES


@pytest.fixture(scope="module")
def theirs():
    torch.manual_seed(0)
    return torchvision.models.resnet18().eval()


@pytest.fixture(scope="module")
def pixels():
    return torch.randint(0, 256, (2, 3, 64, 64), generator=torch.Generator().manual_seed(1)).float()


def torchvision_features(model, pixels):
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    model.fc = torch.nn.Identity()
    with torch.no_grad():
        return model((pixels / 255 - mean[:, None, None]) / std[:, None, None])


@pytest.mark.parametrize("kind", ["pt", "pth", "safetensors"])
def test_a_file_of_torchvisions_gives_torchvisions_features(tmp_path, theirs, pixels, kind):
    file = tmp_path / f"resnet18.{kind}"
    (safetensors.torch.save_file if kind == "safetensors" else torch.save)(theirs.state_dict(), file)
    candidate = open_backbone(str(file), "resnet18")
    if "fc.weight" in theirs.state_dict():
        assert "fc.weight" in candidate.notes[0]
    with torch.no_grad():
        ours = candidate.build()(pixels)
    torch.testing.assert_close(ours, torchvision_features(theirs, pixels), rtol=1e-4, atol=1e-4)


def test_a_checkpoint_of_others_with_prefix_head_and_sobel_stem(tmp_path):
    model = torchvision.models.resnet18()
    model.conv1 = torch.nn.Conv2d(2, 64, 7, 2, 3, bias=False)
    tensors = {f"backbone.{key}": value for key, value in model.state_dict().items() if not key.startswith("fc")}
    tensors["head.fc_cls.weight"] = torch.zeros(10, 512)
    torch.save({"state_dict": tensors, "epoch": 200}, tmp_path / "model.pth")
    candidate = open_backbone(str(tmp_path / "model.pth"), "resnet18")
    assert candidate.model.sobel
    assert "head.fc_cls.weight" in candidate.notes[0]
    assert torch.equal(candidate.tensors["conv1.weight"], model.conv1.weight)


def test_a_run_is_measured_as_load_backbone_gives_it(run_dir):
    candidate, (backbone, metadata) = open_backbone(run_dir), load_backbone(Folder(run_dir))
    assert (candidate.size, candidate.resize) == (int(metadata["input_size"]), int(metadata["resize"]))
    pixels = torch.rand(3, 3, 16, 16) * 255
    with torch.no_grad():
        torch.testing.assert_close(candidate.build()(pixels), backbone(pixels))
    assert open_backbone(f"{run_dir}/backbone.safetensors").fingerprint == candidate.fingerprint


def test_fresh_weights_have_the_runs_network_and_the_seeds_numbers(run_dir):
    trained, fresh, other = (
        open_backbone(spec, seed=s) for spec, s in ((run_dir, 0), (f"random:{run_dir}", 0), (f"random:{run_dir}", 1))
    )
    assert fresh.model == trained.model and fresh.is_random and not trained.is_random
    assert len({trained.fingerprint, fresh.fingerprint, other.fingerprint}) == 3
    assert open_backbone(f"random:{run_dir}", seed=0).fingerprint == fresh.fingerprint
    assert open_backbone("random:cifar10_resnet18", known=networks(RECIPES)).size == 32


def test_what_is_missing_unexpected_or_of_another_shape_is_named(tmp_path, theirs):
    tensors = dict(theirs.state_dict())
    del tensors["layer1.0.conv1.weight"]
    tensors["layer9.weight"] = torch.zeros(1)
    tensors["bn1.bias"] = torch.zeros(65)
    torch.save(tensors, tmp_path / "odd.pt")
    with pytest.raises(UsageError, match=r"1 missing: layer1.0.conv1.weight.*1 unexpected: layer9.weight.*bn1.bias \(65,\)"):
        open_backbone(str(tmp_path / "odd.pt"), "resnet18")
    torch.save(theirs.state_dict(), tmp_path / "good.pt")
    with pytest.raises(UsageError, match="does not fit resnet50"):
        open_backbone(str(tmp_path / "good.pt"), "resnet50")
    with pytest.raises(UsageError, match="give --arch"):
        open_backbone(str(tmp_path / "good.pt"))
    with pytest.raises(UsageError, match="--arch vgg16 is not known"):
        open_backbone(str(tmp_path / "good.pt"), "vgg16")


class Evil:
    def __reduce__(self):
        return exec, ("raise SystemError('a pickle was run')",)


def test_files_that_are_no_weights(tmp_path, run_dir):
    (tmp_path / "evil.pt").write_bytes(pickle.dumps({"state_dict": Evil()}))
    torch.save({"numbers": [1, 2]}, tmp_path / "list.pt")
    (tmp_path / "short.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("evil.pt", "cannot be read as weights alone"),
        ("list.pt", "holds no state dict"),
        ("short.safetensors", "no safetensors file"),
        ("empty", "holds no backbone.safetensors"),
        ("nothing", "neither a run directory nor a file"),
    ):
        with pytest.raises(UsageError, match=message):
            open_backbone(str(tmp_path / name), "resnet18")
    with pytest.raises(UsageError, match="nor one of .*resnet50"):
        open_backbone("random:resnet51")


def test_a_run_directory_measures_one_thing(tmp_path):
    def options(**more):
        return Knn(**{"backbone": "b", "data": "d", "run_dir": str(tmp_path / "r")} | more)

    facts = {"backbone": "1", "data": "2"}
    claim(options(), facts)
    claim(options(num_workers=3, data="elsewhere", verbose=True), facts)
    with pytest.raises(UsageError, match="temperature is 0.07 there and 0.1 here"):
        claim(options(temperature=0.1), facts)
    with pytest.raises(UsageError, match="another measurement: other data"):
        claim(options(), facts | {"data": "3"})
    with pytest.raises(UsageError, match="it holds knn"):
        claim(Semisup(backbone="b", data="d", run_dir=str(tmp_path / "r")), facts)


@pytest.mark.parametrize(
    ("cls", "more", "message"),
    [
        (Knn, {"neighbours": ()}, "neighbours"),
        (Knn, {"temperature": 0.0}, "temperature is 0"),
        (Knn, {"num_workers": -1}, "num_workers is -1"),
        (Semisup, {"fraction": 0.0}, "fraction is 0"),
        (Semisup, {"fraction": 1.5}, "fraction is 1.5"),
        (Semisup, {"lr": -1.0}, "lr is -1"),
        (Semisup, {"batch_size": 255, "num_workers": 2}, "not a multiple of num_workers"),
    ],
)
def test_options_that_make_no_sense(cls, more, message):
    with pytest.raises(UsageError, match=message):
        cls(backbone="b", data="d", run_dir="r", **more)


def test_features_lie_beside_the_run_directory(tmp_path):
    options = Knn(backbone="b", data="d", run_dir=str(tmp_path / "runs" / "knn"))
    assert options.features_folder.uri == str(tmp_path / "runs" / "features")


ALEXNET = Candidate(label="alexnet_here", model=ModelConfig(architecture="alexnet", width=8), size=64, resize=64, tensors={})


@pytest.mark.parametrize("name", ["linear", "svm", "lowshot", "detection", "segmentation"])
def test_the_papers_networks_are_refused_where_a_protocol_needs_stages(name):
    candidate = open_backbone("random:alexnet_here", known={"alexnet_here": ALEXNET})
    with pytest.raises(
        UsageError, match=f"{name} needs a residual network and random:alexnet_here is alexnet; knn and semisup"
    ):
        candidate.check_residual(name)


def test_the_papers_networks_are_candidates():
    candidate = open_backbone("random:alexnet_here", known={"alexnet_here": ALEXNET})
    assert candidate.build().feature_dim == 4096 // 8
