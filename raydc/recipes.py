"""Named pretraining runs: each function returns a whole configuration."""

from __future__ import annotations

from collections.abc import Callable

from raydc.config import ClusteringConfig, Config, ImagesConfig, ModelConfig, ProbeConfig, TrainConfig


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
    from dataclasses import replace

    plain = in1k_resnet50()
    return replace(plain, recipe="in1k_resnet50_sobel", model=replace(plain.model, sobel=True))


RECIPES: dict[str, Callable[[], Config]] = {
    recipe.__name__: recipe for recipe in (digits, cifar10_resnet18, imagenette_resnet18, in1k_resnet50, in1k_resnet50_sobel)
}
