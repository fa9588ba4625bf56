"""Named pretraining runs: each function returns a whole configuration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from raydc.config import ClusteringConfig, Config, ImagesConfig, ModelConfig, ODCConfig, ProbeConfig, TrainConfig, V2Config

RAW = {"pca_dim": 0, "whiten": False}  # features as they are, at length one
SPHERICAL = RAW | {"method": "spherical", "features": "remembered", "iterations": 10}


def digits() -> Config:
    """scikit-learn's 1,797 scanned digits; needs no data and a minute on a laptop."""
    return Config(
        recipe="digits",
        data="digits",
        model=ModelConfig(architecture="resnet10", width=16, stem="small", stem_stride=1),
        images=ImagesConfig(
            size=16,
            resize=16,
            crop_scale=(1.0, 1.0),
            crop_ratio=(1.0, 1.0),
            flip=0.0,  # a mirrored 2 is no 2
            rotation=15.0,
            zoom=0.15,
            shear=10.0,
            shift=0.08,
            elastic=0.04,
            warp="bilinear",
            brightness=0.2,
            contrast=0.3,
            colour="linear",
        ),
        clustering=ClusteringConfig(num_clusters=100, pca_dim=64),
        # A fresh head needs more steps than one pass over 1,437 images gives (the original's --reassign).
        train=TrainConfig(
            epochs=5, schedule_epochs=7, batch_size=256, plan_length=8.0, lr=0.15, head_momentum=0.9, schedule="cosine"
        ),
        probe=ProbeConfig(every=2, images_per_class=10),
    )


def cifar10_resnet18() -> Config:
    """CIFAR-10 on a CPU: Sobel, half width, 3x3 stem of stride 2, k = 390."""
    return Config(
        recipe="cifar10_resnet18",
        model=ModelConfig(architecture="resnet18", width=32, stem="small", stem_stride=2, sobel=True),
        images=ImagesConfig(
            size=32,
            resize=32,
            crop_scale=(0.2, 1.0),
            brightness=0.4,
            contrast=0.4,
            saturation=0.4,
            hue=0.1,
            grayscale=0.2,
            colour="linear",
        ),
        clustering=ClusteringConfig(num_clusters=390, pca_dim=128),
        # A head without momentum learns ten times slower than the backbone: three epochs then end at a linear probe of .39
        # instead of .45. (The references' head has none; their epochs are 25 times longer.)
        train=TrainConfig(epochs=8, schedule_epochs=10, batch_size=256, lr=0.05, head_momentum=0.9, schedule="cosine"),
        probe=ProbeConfig(every=4, num_images=50_000),
    )


def cifar10_alexnet_sobel() -> Config:
    """CIFAR-10, the paper's AlexNet at half width behind Sobel, with a 3x3 first convolution."""
    plain = cifar10_resnet18()
    model = ModelConfig(architecture="alexnet", width=32, stem="small", stem_stride=2, sobel=True)
    return replace(plain, recipe="cifar10_alexnet_sobel", model=model)


def cifar10_resnet18_dcv2() -> Config:
    """CIFAR-10, DeepCluster-v2 on a CPU: two crops of 24 pixels, three heads of k = 390.

    Crops of 16 pixels beside them leave fewer epochs for the same work: linear probe .38, not .43, after 480 CPU seconds.
    """
    plain = cifar10_resnet18()
    return replace(
        plain,
        recipe="cifar10_resnet18_dcv2",
        algorithm="deepcluster_v2",
        clustering=ClusteringConfig(num_clusters=390, **SPHERICAL),
        train=replace(plain.train, head="centroids", temperature=0.1, balance="none"),
        v2=V2Config(
            num_crops=(2,),
            crop_sizes=(24,),
            min_scales=(0.2,),
            max_scales=(1.0,),
            hidden_dim=256,
        ),
    )


def cifar10_resnet18_odc() -> Config:
    """CIFAR-10, online deep clustering on a CPU: k = 390."""
    plain = cifar10_resnet18()
    return replace(
        plain,
        recipe="cifar10_resnet18_odc",
        algorithm="odc",
        clustering=ClusteringConfig(num_clusters=390, features="remembered", **RAW),
        train=replace(plain.train, head="matched", balance="reweight"),
        odc=ODCConfig(hidden_dim=256, projection_dim=128),
    )


def imagenette_resnet18() -> Config:
    """A few thousand real photos at 96 pixels, for a CPU or one small GPU."""
    return Config(
        recipe="imagenette_resnet18",
        model=ModelConfig(architecture="resnet18", width=32, stem="imagenet", sobel=True),
        images=ImagesConfig(
            size=96,
            resize=112,
            cache_size=112,
            crop_scale=(0.2, 1.0),
            brightness=0.4,
            contrast=0.4,
            saturation=0.4,
            hue=0.1,
            grayscale=0.2,
            colour="linear",
        ),
        clustering=ClusteringConfig(num_clusters=0, pca_dim=128),
        train=TrainConfig(epochs=30, batch_size=128, plan_length=2.0, lr=0.05, schedule="cosine"),
        probe=ProbeConfig(every=5),
    )


def in1k_alexnet_sobel() -> Config:
    """ImageNet, the paper's AlexNet with BatchNorm behind Sobel, 500 epochs (protocol 1a)."""
    return Config(
        recipe="in1k_alexnet_sobel",
        model=ModelConfig(architecture="alexnet", sobel=True),
        images=ImagesConfig(size=224, resize=256),
        clustering=ClusteringConfig(num_clusters=10_000, pca_dim=256),
        train=TrainConfig(epochs=500, batch_size=256, lr=0.05),
        probe=ProbeConfig(every=10, num_images=50_000),
    )


def in1k_vgg16_sobel() -> Config:
    """ImageNet, the paper's VGG-16 with BatchNorm behind Sobel, 200 epochs (protocol 1a)."""
    plain = in1k_alexnet_sobel()
    return replace(
        plain,
        recipe="in1k_vgg16_sobel",
        model=ModelConfig(architecture="vgg16", sobel=True),
        train=replace(plain.train, epochs=200),
    )


def in1k_resnet50() -> Config:
    """ImageNet, ResNet-50, as in OpenSelfSup's and mmselfsup's DeepCluster (protocol 1b)."""
    return Config(
        recipe="in1k_resnet50",
        model=ModelConfig(architecture="resnet50"),
        images=ImagesConfig(
            size=224,
            resize=256,
            rotation=2.0,
            brightness=0.4,
            contrast=0.4,
            saturation=1.0,
            hue=0.5,
            grayscale=0.2,
        ),
        clustering=ClusteringConfig(num_clusters=10_000, pca_dim=256),
        train=TrainConfig(epochs=200, batch_size=512, lr=0.1),
        probe=ProbeConfig(every=10, num_images=50_000),
    )


def in1k_resnet50_sobel() -> Config:
    """The same behind a Sobel filter: the model whose numbers were published."""
    plain = in1k_resnet50()
    return replace(plain, recipe="in1k_resnet50_sobel", model=replace(plain.model, sobel=True))


def in1k_resnet50_dcv2() -> Config:
    """ImageNet, DeepCluster-v2, ResNet-50, 400 epochs with crops 2x160 + 4x96 (protocol 1c)."""
    return Config(
        recipe="in1k_resnet50_dcv2",
        algorithm="deepcluster_v2",
        model=ModelConfig(architecture="resnet50", std=(0.228, 0.224, 0.225)),
        images=ImagesConfig(
            size=224,
            resize=256,
            jitter=0.8,
            brightness=0.8,
            contrast=0.8,
            saturation=0.8,
            hue=0.2,
            grayscale=0.2,
            blur=0.5,
        ),
        clustering=ClusteringConfig(num_clusters=3000, **SPHERICAL),
        train=TrainConfig(
            epochs=400,
            batch_size=4096,
            balance="none",
            head="centroids",
            temperature=0.1,
            lr=4.8,
            final_lr=0.0048,
            warmup_epochs=10,
            warmup_lr=0.3,
            schedule="cosine",
            head_momentum=0.9,  # of the projection: the centroids are not trained
            weight_decay=1e-6,
            larc=0.001,
        ),
        probe=ProbeConfig(every=25, num_images=50_000),
    )


def in1k_resnet50_dcv2_800() -> Config:
    """The same for 800 epochs with crops 2x224 + 6x96: the model with 75.2 top-1."""
    plain = in1k_resnet50_dcv2()
    crops = V2Config(num_crops=(2, 6), crop_sizes=(224, 96), min_scales=(0.14, 0.05), max_scales=(1.0, 0.14))
    return replace(plain, recipe="in1k_resnet50_dcv2_800", train=replace(plain.train, epochs=800), v2=crops)


def in1k_resnet50_odc() -> Config:
    """ImageNet, online deep clustering, ResNet-50, 440 epochs (protocol 1d)."""
    plain = in1k_resnet50()
    return replace(
        plain,
        recipe="in1k_resnet50_odc",
        algorithm="odc",
        clustering=ClusteringConfig(num_clusters=10_000, features="remembered", **RAW),
        train=TrainConfig(
            epochs=440,
            batch_size=512,
            balance="reweight",
            head="matched",
            lr=0.06,
            schedule="step",
            milestones=(400,),
            gamma=0.4,
        ),
    )


RECIPES: dict[str, Callable[[], Config]] = {
    recipe.__name__: recipe
    for recipe in (
        digits,
        cifar10_resnet18,
        cifar10_resnet18_dcv2,
        cifar10_resnet18_odc,
        cifar10_alexnet_sobel,
        imagenette_resnet18,
        in1k_resnet50,
        in1k_resnet50_sobel,
        in1k_resnet50_dcv2,
        in1k_resnet50_dcv2_800,
        in1k_resnet50_odc,
        in1k_alexnet_sobel,
        in1k_vgg16_sobel,
    )
}

# What each follows; README ("The family") lists where they depart from it.
SOURCES = {
    "digits": "ours",
    "cifar10_resnet18": "ours, after the paper",
    "cifar10_resnet18_dcv2": "ours, after SwAV's repository",
    "cifar10_resnet18_odc": "ours, after OpenSelfSup odc/r50_v1",
    "cifar10_alexnet_sobel": "ours, after the paper",
    "imagenette_resnet18": "ours, after the paper",
    "in1k_resnet50": "mmselfsup deepcluster_resnet50_8xb64-steplr-200e",
    "in1k_resnet50_sobel": "OpenSelfSup deepcluster/r50",
    "in1k_resnet50_dcv2": "SwAV's deepclusterv2_400ep_pretrain.sh",
    "in1k_resnet50_dcv2_800": "SwAV's deepclusterv2_800ep_pretrain.sh",
    "in1k_resnet50_odc": "OpenSelfSup odc/r50_v1",
    "in1k_alexnet_sobel": "the paper; its repository's main.sh",
    "in1k_vgg16_sobel": "the paper; its repository's main.sh",
}


def settings_table() -> str:
    """Every recipe's settings beside what it follows, as Markdown (README.md holds it; a test compares)."""
    columns = ("recipe", "follows", "network", "images", "clusters", "epochs", "batch", "rate", "balance", "head")
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for name, make in RECIPES.items():
        lines.append(f"| `{name}` | {SOURCES[name]} | " + " | ".join(_settings(make())) + " |")
    return "\n".join(lines)


def _settings(config: Config) -> tuple[str, ...]:
    model, images, clustering, train = config.model, config.images, config.clustering, config.train
    network = model.architecture + (f" / {64 / model.width:g}" if model.width != 64 else "") + ", Sobel" * model.sobel
    crops = f"{images.size} px"
    if config.algorithm == "deepcluster_v2":
        crops = " + ".join(f"{n}x{size}" for n, size in zip(config.v2.num_crops, config.v2.crop_sizes, strict=True)) + " px"
    reduced = f"PCA {clustering.pca_dim}{', whitened' * clustering.whiten}" if clustering.pca_dim else "raw"
    heads = f"{config.v2.num_heads} x " if config.algorithm == "deepcluster_v2" else ""
    k = f"{heads}{clustering.num_clusters or 'N / 128'} {clustering.method}, {reduced}, {clustering.features}"
    rate = f"{train.lr:g} {train.schedule}{', LARC' * bool(train.larc)}, wd {train.weight_decay:g}"
    momenta = f"{train.head}, momentum {train.head_momentum:g}"
    return network, crops, k, str(train.epochs), str(train.batch_size), rate, train.balance, momenta
