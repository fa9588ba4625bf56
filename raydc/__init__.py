"""DeepCluster on Ray: from a folder of images to trained, measured visual features."""

from __future__ import annotations

import importlib
import os

__version__ = "0.1.0"

# Before Ray is imported by any part of the package: local workers are started with this very interpreter (not through `uv
# run`, which would build the environment again for each job), and compete with nobody at a lower priority.
for _name, _value in {
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_worker_niceness": "0",
    # A data process that waits for the network is not thrown away after a second: the next one would need seconds to start.
    "RAY_idle_worker_killing_time_threshold_ms": "300000",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_DEDUP_LOGS_SKIP_REGEX": "PYTHON worker processes have been started",  # as they should be
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
}.items():
    os.environ.setdefault(_name, _value)

# Resolved when they are asked for: importing a part of the package must not import Ray and torch.
_PUBLIC = {
    "Config": "raydc.config",
    "UsageError": "raydc.config",
    "RunError": "raydc.config",
    "RECIPES": "raydc.recipes",
    "make_shards": "raydc.data.ingest",
    "pretrain": "raydc.family",
    "load_backbone": "raydc.checkpoint",
    "Folder": "raydc.storage",
}
__all__ = ["RECIPES", "Config", "Folder", "RunError", "UsageError", "load_backbone", "make_shards", "pretrain"]


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'raydc' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
