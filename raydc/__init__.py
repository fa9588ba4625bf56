"""DeepCluster on Ray: from a folder of images to trained, measured visual features."""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

# Resolved when they are asked for: importing a part of the package must not import Ray and torch.
_PUBLIC = {
    "Config": "raydc.config",
    "UsageError": "raydc.config",
    "RunError": "raydc.config",
    "RECIPES": "raydc.recipes",
    "make_shards": "raydc.data.ingest",
    "pretrain": "raydc.deepcluster",
    "load_backbone": "raydc.checkpoint",
    "Folder": "raydc.storage",
}
__all__ = ["RECIPES", "Config", "Folder", "RunError", "UsageError", "load_backbone", "make_shards", "pretrain"]


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'raydc' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
