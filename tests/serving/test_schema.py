"""The static schema: the document Cog would emit, and an error for each thing Cog would misread in silence.

Traps of Cog 0.23.1 held here: 1 (decorators), 2 (defaults), 3 (bounds), 4 (descriptions), 8 (async train), 19 (choices
names), 20 (32-bit numbers).
"""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from clip_gen.files import ROOT
from clip_gen.serving.schema import PREDICT, build_schema, project_signatures
from clip_gen.serving.signature import SignatureError
from clip_gen.validation import MAX_CANDIDATES

PREDICT_SOURCE = """
from cog import BaseRunner, Input, Path, concurrent

class Predictor(BaseRunner):
    @concurrent(max=4)
    async def run(self, {inputs}) -> list[Path]:
        ...
"""
TRAIN_SOURCE = """
from cog import BaseModel, Input, Path

class TrainingOutput(BaseModel):
    weights: Path

{define} train({inputs}) -> TrainingOutput:
    ...
"""
PROMPT = 'prompt: str = Input(description="Text prompt", min_length=1, max_length=1000)'


def project(folder: Path, *inputs: str, train: str | None = None, define: str = "async def") -> Path:
    """A project folder with these inputs in its predict.py and, if given, its train.py."""
    (folder / "predict.py").write_text(PREDICT_SOURCE.format(inputs=", ".join(inputs)))
    if train is not None:
        (folder / "train.py").write_text(TRAIN_SOURCE.format(inputs=train, define=define))
    return folder


def test_inputs_come_out_as_cogs_own_generator_writes_them(tmp_path: Path) -> None:
    inputs = [
        PROMPT,
        'style: str = Input(description="Style", default="")',
        'num_outputs: int = Input(description="How many", default=1, ge=1, le=4)',
        'guidance: float = Input(description="Push", default=3.0, ge=0, le=20)',
        'seed: int | None = Input(description="Seed", default=None, ge=0)',
        'tiles: list[str] = Input(description="Tiles", default=["a"])',
        'image: Path | None = Input(description="Picture", default=None)',
        'output_format: str = Input(description="Type", default="png", choices=["webp", "jpg", "png"])',
    ]
    schemas = build_schema(project(tmp_path, *inputs))["components"]["schemas"]
    properties = schemas["Input"]["properties"]
    assert schemas["Input"]["required"] == ["prompt"]
    assert properties["prompt"] == {
        **{"title": "Prompt", "type": "string", "description": "Text prompt"},
        **{"minLength": 1, "maxLength": 1000, "x-order": 0},
    }
    assert properties["num_outputs"] == {
        **{"title": "Num Outputs", "type": "integer", "description": "How many"},
        **{"default": 1, "minimum": 1, "maximum": 4, "x-order": 2},
    }
    assert json.dumps(properties["guidance"]["default"]) == "3"
    assert properties["seed"] == {
        **{"title": "Seed", "type": "integer", "description": "Seed"},
        **{"default": None, "nullable": True, "minimum": 0, "x-order": 4},
    }
    assert properties["image"] == {
        **{"title": "Image", "type": "string", "format": "uri", "description": "Picture"},
        **{"default": None, "nullable": True, "x-order": 6},
    }
    assert properties["output_format"] == {
        "allOf": [{"$ref": "#/components/schemas/output_format"}],
        **{"description": "Type", "default": "png", "x-order": 7},
    }
    assert schemas["output_format"] == {
        **{"title": "output_format", "description": "An enumeration.", "type": "string"},
        "enum": ["webp", "jpg", "png"],
    }
    assert schemas["Output"] == {
        **{"title": "Output", "type": "array"},
        "items": {"type": "string", "format": "uri"},
    }


def test_training_adds_its_half_of_the_document(tmp_path: Path) -> None:
    train = 'images: Path = Input(description="Zip", accept=".zip"), steps: int = Input(description="n", default=1)'
    document = build_schema(project(tmp_path, PROMPT, train=train))
    schemas = document["components"]["schemas"]
    assert schemas["TrainingOutput"] == {
        **{"title": "Output", "type": "object", "required": ["weights"]},
        "properties": {"weights": {"title": "Weights", "type": "string", "format": "uri"}},
    }
    assert schemas["TrainingInput"]["required"] == ["images"]
    assert schemas["TrainingInput"]["properties"]["images"]["x-cog-accept"] == ".zip"
    assert {"TrainingRequest", "TrainingResponse", "PredictionRequest", "PredictionResponse"} <= set(schemas)
    assert {"/", "/health-check", "/predictions", "/predictions/{prediction_id}/cancel"} < set(document["paths"])
    assert {"/trainings", "/trainings/{training_id}/cancel"} < set(document["paths"])


def test_every_reference_of_the_document_leads_somewhere() -> None:
    document = build_schema()
    text = json.dumps(document)
    wanted = {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert wanted <= set(document["components"]["schemas"])


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        pytest.param("n: int = Input(5, description='n')", "by position", id="trap 2: default by position"),
        pytest.param("n: int = Input(description='n', default=2**31-1)", "not a literal", id="trap 2: expression"),
        pytest.param("n: int = Input(description='n', default=LIMIT)", "not a literal", id="trap 2: constant"),
        pytest.param("n: int = Input(description='n', default=(5))", "in brackets", id="trap 2: brackets"),
        pytest.param("n: int = Input(description='n', default=2**63)", "not a literal", id="trap 2: too long"),
        pytest.param("n: int = Input(description='n', default_factory=f)", "takes no default_factory", id="factory"),
        pytest.param("n: int = Input(description='n', default=None)", "required after all", id="required by accident"),
        pytest.param("n: int = Input(description='n', default=1, le=LIMIT)", "le is not a literal", id="trap 3: le"),
        pytest.param("n: int = Input(description='n', default=1, ge=-(1))", "ge is not a literal", id="trap 3: ge"),
        pytest.param("s: str = Input(description='s', regex=RULE)", "regex is not a literal", id="trap 3: regex"),
        pytest.param("n: int = Input(description='one ' 'two')", "string of parts", id="trap 4: parts"),
        pytest.param("n: int = Input(description=f'{1}')", "not a literal", id="trap 4: f-string"),
        pytest.param(r"n: int = Input(description='a\nb')", "escapes", id="trap 4: escape"),
        pytest.param("n: int = Input(description=('n'))", "in brackets", id="trap 4: brackets"),
        pytest.param("n: int = Input(default=1)", "no description", id="no description"),
        pytest.param("n: int = 5", "no Input(description=...)", id="no Input"),
        pytest.param("n=Input(description='n')", "no type", id="no type"),
        pytest.param("*rest: int", "ignores it without a word", id="star arguments"),
        pytest.param("**rest: int", "ignores it without a word", id="double star arguments"),
        pytest.param("n: tuple[int] = Input(description='n')", "has type tuple[int]", id="type"),
        pytest.param("n: list[int | None] = Input(description='n')", "has type list", id="optional in a list"),
        pytest.param("n: int = Input(description='n', default=9, le=4)", "n is 9; give", id="default above le"),
        pytest.param("n: int = Input(description='n', default=0, ge=1)", "n is 0; give", id="default below ge"),
        pytest.param("n: int = Input(description='n', default=1.5)", "n is 1.5; give", id="default of another type"),
        pytest.param("n: int = Input(description='n', default=True)", "n is true; give", id="true for a number"),
        pytest.param("n: int = Input(description='n', ge=5, le=4)", "ge 5 is above le 4", id="bounds crossed"),
        pytest.param("s: str = Input(description='s', ge=1)", "means nothing for str", id="ge of a text"),
        pytest.param("s: str = Input(description='s', default='x', choices=['a'])", "one of a", id="not a choice"),
        pytest.param("s: str = Input(description='s', choices=['a', 1])", "choice 1 is no str", id="mixed choices"),
        pytest.param("s: str = Input(description='s', choices=[])", "something in it", id="no choices"),
        pytest.param("s: str = Input(description='s', choices=sorted('ba'))", "not a literal", id="computed choices"),
        pytest.param("n: int = Input(description='n', le=4294967295)", "32 bits", id="trap 20: beyond 32 bits"),
        pytest.param("n: int = Input(description='n', title='N')", "takes no title", id="unknown argument"),
    ],
)
def test_what_cog_would_misread_is_an_error(tmp_path: Path, given: str, complaint: str) -> None:
    with pytest.raises(SignatureError) as error:
        build_schema(project(tmp_path, PROMPT, given))
    assert complaint in str(error.value)
    assert str(error.value).startswith("predict.py:6: ")


def test_all_problems_are_listed_at_once(tmp_path: Path) -> None:
    with pytest.raises(SignatureError) as error:
        build_schema(project(tmp_path, "a: int = 5", "b: int = Input(default=1)", "c=3"))
    assert len(str(error.value).splitlines()) == 3


@pytest.mark.parametrize("decorator", ["torch.inference_mode()", "torch.no_grad()", "timed"])
def test_a_wrapping_decorator_is_an_error(tmp_path: Path, decorator: str) -> None:
    source = PREDICT_SOURCE.replace("@concurrent(max=4)", f"@{decorator}").format(inputs=PROMPT)
    (tmp_path / "predict.py").write_text(source)
    with pytest.raises(SignatureError, match="breaks every default"):
        build_schema(tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("async def", "def", "needs `async def run`"),
        ("max=4", "max=SLOTS", "written out"),
        ("max=4", "", "written out"),
        (" -> list[Path]", "", "no return type"),
        ("list[Path]", "Path | None", "may be None"),
        ("async def run", "async def predict", "no run method"),
        ("class Predictor", "class Other", "no class or function named Predictor"),
    ],
)
def test_a_run_that_cog_cannot_serve_is_an_error(tmp_path: Path, old: str, new: str, complaint: str) -> None:
    (tmp_path / "predict.py").write_text(PREDICT_SOURCE.format(inputs=PROMPT).replace(old, new))
    with pytest.raises(SignatureError, match=complaint):
        build_schema(tmp_path)


def test_a_train_that_is_not_async_cannot_share_an_image_with_several_slots(tmp_path: Path) -> None:
    train = 'steps: int = Input(description="n", default=1)'
    with pytest.raises(SignatureError, match="async def train"):
        build_schema(project(tmp_path, PROMPT, train=train, define="def"))


def test_choices_of_one_name_in_predict_and_train_must_be_the_same(tmp_path: Path) -> None:
    size = 'size: str = Input(description="s", choices=[{}])'
    with pytest.raises(SignatureError, match="size: predict and train"):
        build_schema(project(tmp_path, size.format("'a'"), train=size.format("'b'")))
    schemas = build_schema(project(tmp_path, size.format("'a'"), train=size.format("'a'")))["components"]["schemas"]
    assert schemas["size"]["enum"] == ["a"]


def test_an_input_with_choices_may_not_overwrite_a_component_of_cogs(tmp_path: Path) -> None:
    with pytest.raises(SignatureError, match="Status: an input with choices may not have the name"):
        build_schema(project(tmp_path, "Status: str = Input(description='s', choices=['a'])"))


def test_predicts_inputs_come_in_the_order_of_the_form_and_are_all_described() -> None:
    properties = build_schema()["components"]["schemas"]["Input"]["properties"]
    assert list(properties) == [
        *("prompt", "num_outputs", "candidates", "clip_rerank", "top_k", "top_p", "temperature", "guidance"),
        *("seed", "output_format", "output_quality", "output_metadata", "replicate_weights"),
    ]
    assert all(one["description"] for one in properties.values())
    assert properties["candidates"]["maximum"] == MAX_CANDIDATES
    assert [one["x-order"] for one in properties.values()] == list(range(13))
    assert properties["seed"]["maximum"] == 2**31 - 1


def test_the_command_writes_the_file_the_server_reads() -> None:
    command = [sys.executable, "-m", "clip_gen.serving.schema", "--print-slots"]
    printed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert int(printed) == project_signatures()[0].slots == 12
    assert json.loads((ROOT / ".cog/openapi_schema.json").read_text()) == build_schema()


def test_cog_yaml_says_what_the_code_and_the_requirements_say() -> None:
    config = OmegaConf.to_container(OmegaConf.load(ROOT / "cog.yaml"))
    build = config["build"]
    assert config["predict"] == ":".join(PREDICT)
    assert build["sdk_version"] == importlib.metadata.version("cog")
    assert build["python_version"] == f"{sys.version_info.major}.{sys.version_info.minor}"
    # Cog looks its own table up by an exact pin.
    assert any(line.startswith("torch==") for line in (ROOT / build["python_requirements"]).read_text().splitlines())
    assert ("train" in config) == (ROOT / "train.py").exists()
    named = [pair.partition("=")[0] for pair in config["environment"]]
    assert all(name in (ROOT / "script" / "serve").read_text() for name in named)


def test_the_image_holds_what_the_server_needs() -> None:
    patterns = {line.strip("/") for line in (ROOT / ".dockerignore").read_text().splitlines()}
    assert not {"checkpoints", "clip_gen", "predict.py", "train.py"} & patterns
