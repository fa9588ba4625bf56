"""A room imports only from rooms below it, and the lower rooms stay light."""

import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import raydc

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted(module.name for module in pkgutil.walk_packages(raydc.__path__, "raydc."))
# design.md 3: Ray is allowed from floor 2 up. Whatever is not named here stays below.
UPPER = {
    "remote",
    "launch",
    "training",
    "tracking",
    "prepare",
    "run",
    "measure",
    "deepcluster",
    "deepcluster_v2",
    "odc",
    "family",
    "recipes",
}
UPPER |= {"benchmarks", "report"}
UPPER_DATA = {"raydc.data.stream", "raydc.data.draws", "raydc.data.ingest"}
LOWER = [one for one in MODULES if one.split(".")[1] not in UPPER and one not in UPPER_DATA]

LOADED = """
import importlib, sys
for name in sys.argv[2:]:
    importlib.import_module(name)
    print(name, *(heavy for heavy in sys.argv[1].split(",") if heavy in sys.modules))
"""


def loaded(heavy: str, *modules: str) -> dict[str, list[str]]:
    """For each module, imported one after the other in a fresh process: which of ``heavy`` are loaded by then."""
    done = subprocess.run(
        [sys.executable, "-c", LOADED, heavy, *modules], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines()}


def test_the_contract_of_the_floors_holds():
    program = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 kept, 0 broken" in done.stdout


def test_floors_nought_and_one_load_neither_ray_nor_faiss():
    """faiss's wheel and torch's are built for different CUDA versions: only a process that clusters loads it."""
    assert {"raydc.config", "raydc.models.backbone", "raydc.clustering.bank", "raydc.data.transforms"} <= set(LOWER)
    assert loaded("ray,faiss", *LOWER) == {name: [] for name in LOWER}


def test_the_bank_loads_neither_engine():
    assert loaded("faiss,torch,ray", "raydc.clustering.bank") == {"raydc.clustering.bank": []}


def test_what_actors_and_data_processes_load_is_light():
    """Each of these processes would pay seconds for torch or Ray Train."""
    assert loaded("faiss,torch,ray.train", "raydc.data.draws") == {"raydc.data.draws": []}


def test_the_package_and_its_configuration_are_light():
    light = ("raydc", "raydc.config", "raydc.recipes")
    assert loaded("ray,torch,faiss,numpy,sklearn", *light) == {name: [] for name in light}


@pytest.mark.parametrize("first", ["raydc.benchmarks.everything", "raydc.data.stream", "raydc.launch"])
def test_rays_environment_is_set_whatever_is_imported_first(first):
    """Ray reads it when it is imported; workers would else start through `uv run`, each building the environment anew."""
    code = f"import {first}, ray._private.ray_constants as found; print(found.RAY_ENABLE_UV_RUN_RUNTIME_ENV)"
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=clean, check=True)
    assert done.stdout.strip() == "False"
