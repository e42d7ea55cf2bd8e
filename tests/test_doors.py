"""The doors between modules: who may import what, and that importing does nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

DOORS = {
    "omegaconf": ["clip_gen/config.py"],
    "clip": ["clip_gen/clip_encoder.py"],
    "taming": ["clip_gen/vqgan.py"],
    "vector_quantize_pytorch": ["clip_gen/vqgan.py"],
    "safetensors": ["clip_gen/checkpoint.py", "clip_gen/importers/reader.py"],
    "pytorch_lightning": ["clip_gen/training/"],
    "triton": ["clip_gen/cuda_kernels.py"],
    "tqdm": ["clip_gen/transfer.py", "clip_gen/training/run.py"],
    "_pi_heif": ["clip_gen/heic.py"],
    "inflate64": ["clip_gen/zips.py"],
    "cog": ["predict.py", "train.py"],
    "coglet": ["predict.py", "train.py"],
}

# Lower first; a module imports from its own row or rows above.
LAYERS = [
    [
        "asked",
        "config",
        "files",
        "images",
        "download",
        "tars",
        "kinds",
        "colours",
        "heic",
        "pictures",
        "limits",
        "transfer",
        "unfilled",
        "float16",
        "int8",
        "cache",
        "machine",
        "address",
        "slots",
        "watchdog",
        "cog_expressions",
        "cog_inputs",
        "cog_signature",
    ],
    ["zips", "entries", "findings", "archives"],
    ["gpt", "clip_encoder", "vqgan", "bridge", "cuda_kernels"],
    ["cuda_graphs", "sampling", "checkpoint", "weights_cache", "weights", "batching"],
    ["pipeline"],
    ["request_weights", "serving", "importers"],
    ["pull", "own_model"],
    ["shapes", "training", "evaluation"],
    ["generate", "__main__"],
    ["cog_openapi", "cog_schema", "cog_cli", "cog_delivery", "cog_training"],
]


def sources() -> list[Path]:
    return sorted([*ROOT.glob("clip_gen/**/*.py"), *ROOT.glob("*.py")])


def imported(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.append(node.module)
    return names


@pytest.mark.parametrize("package", DOORS)
def test_each_foreign_package_has_one_door(package: str) -> None:
    users = [
        str(path.relative_to(ROOT))
        for path in sources()
        if any(name.split(".")[0] == package for name in imported(path))
    ]
    assert users
    assert all(any(user.startswith(door) for door in DOORS[package]) for user in users), users


def layer(module: str) -> int:
    return next(i for i, row in enumerate(LAYERS) if module in row)


def test_imports_go_downward_only() -> None:
    for path in ROOT.glob("clip_gen/**/*.py"):
        parts = path.relative_to(ROOT / "clip_gen").with_suffix("").parts
        if parts[0] == "__init__":
            continue
        for name in imported(path):
            pieces = name.split(".")
            if pieces[0] == "clip_gen" and len(pieces) > 1:
                assert layer(pieces[1]) <= layer(parts[0]), f"{path.name} imports {name}"


def loaded_after(statement: str) -> set[str]:
    code = f"{statement}\nimport sys\nprint(*sorted(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert not loaded_after("import clip_gen") & {"torch", "numpy", "clip", "taming", "omegaconf", "PIL"}


def test_predicting_never_imports_lightning() -> None:
    assert not loaded_after("from clip_gen import ClipGen") & {"pytorch_lightning", "torchmetrics"}
    assert not loaded_after("import predict") & {"pytorch_lightning", "torchmetrics"}


def test_importing_changes_nothing_in_torch() -> None:
    code = (
        "import torch; before = (torch.is_grad_enabled(), torch.get_num_threads(), torch.get_default_dtype())\n"
        "import clip_gen.pipeline, clip_gen.training.shapes\n"
        "assert before == (torch.is_grad_enabled(), torch.get_num_threads(), torch.get_default_dtype())"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
