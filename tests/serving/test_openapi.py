"""The schema equals that of Cog's generator, and predict.py and train.py have no inputs that it would misread.

Traps of Cog 0.23.1 in these tests: 1 (decorators), 2 (defaults), 3 (bounds), 4 (descriptions), 8 (async train), 19
(choices names), 20 (32-bit numbers).
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.metadata
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import cog
import pytest
from conftest import FIXTURES
from omegaconf import OmegaConf

import predict
import train
from clip_gen.files import ROOT
from clip_gen.serving.openapi import TEMPLATE, build_schema
from clip_gen.training.plan import TrainSettings
from clip_gen.validation import MAX_CANDIDATES

INT32_MAX = 2**31 - 1  # `cog run -i` reads 32 bits


def test_the_schema_equals_what_cogs_own_generator_wrote() -> None:
    expected = json.loads((FIXTURES / "cog" / "schema.json").read_text())
    expected["info"]["version"] = importlib.metadata.version("cog")
    assert build_schema(FIXTURES / "cog") == expected


def test_a_file_input_may_be_optional_and_limit_its_types(tmp_path: Path) -> None:
    source = (FIXTURES / "cog" / "predict.py").read_text()
    image = 'image: Path | None = Input(description="Picture", default=None, accept="image/*"),\n        prompt'
    (tmp_path / "predict.py").write_text(source.replace("prompt", image, 1))
    (tmp_path / "train.py").write_text((FIXTURES / "cog" / "train.py").read_text())
    described = build_schema(tmp_path)["components"]["schemas"]["Input"]
    assert described["required"] == ["prompt"]
    assert described["properties"]["image"] == {
        **{"title": "Image", "type": "string", "format": "uri", "description": "Picture", "x-cog-accept": "image/*"},
        **{"default": None, "nullable": True, "x-order": 0},
    }


def test_all_references_of_the_document_exist() -> None:
    document = build_schema()
    text = json.dumps(document)
    wanted = {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert wanted <= set(document["components"]["schemas"])


# What Cog's generator reads. It reads the source without running it, and drops what it cannot read without a message.


def misread(source: str, name: str) -> list[str]:
    """What Cog's generator would misread in the inputs of a function, one sentence each."""
    function = next(node for node in ast.walk(ast.parse(source)) if getattr(node, "name", None) == name)
    names = [parameter.arg for parameter in function.args.args]
    # Not strict: the first parameters, such as self, may have no default.
    defaults = dict(zip(names[::-1], function.args.defaults[::-1], strict=False))
    problems = [
        f"{one.arg} has no Input()" for one in function.args.args if one.arg != "self" and one.arg not in defaults
    ]
    problems += [f"{one.arg} has no type" for one in function.args.args if one.arg in defaults and not one.annotation]
    if [ast.unparse(one).partition("(")[0] for one in function.decorator_list] not in ([], ["concurrent"]):
        problems.append("a decorator hides the defaults")
    for name, call in defaults.items():
        if not (isinstance(call, ast.Call) and ast.unparse(call.func) == "Input"):
            problems.append(f"{name} has no Input()")
            continue
        if call.args:
            problems.append(f"{name} has a default by position")
        if "description" not in [keyword.arg for keyword in call.keywords]:
            problems.append(f"{name} has no description")
        for keyword in call.keywords:
            if not is_plain(source, keyword.value) or in_brackets(source, keyword):
                problems.append(f"{name}: {keyword.arg} is not a plain literal")
    return problems


def is_plain(source: str, node: ast.expr) -> bool:
    if isinstance(node, ast.List):
        return all(is_plain(source, item) for item in node.elts)
    text = ast.get_source_segment(source, node)
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return text in (f'"{node.value}"', f"'{node.value}'")  # in one part, without escapes
    return text in ("True", "False", "None") or bool(re.fullmatch(r"-?[\d_.]+(e-?\d+)?", text))


def in_brackets(source: str, keyword: ast.keyword) -> bool:
    value = ast.get_source_segment(source, keyword.value)
    return re.sub(r"^\w+\s*=\s*", "", ast.get_source_segment(source, keyword)) != value


@pytest.mark.parametrize(("path", "name"), [("predict.py", "run"), ("train.py", "train")])
def test_cog_reads_all_inputs_correctly(path: str, name: str) -> None:
    assert misread((ROOT / path).read_text(), name) == []


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        pytest.param("n: int = Input(5, description='n')", "by position", id="trap 2: default by position"),
        pytest.param("n: int = Input(description='n', default=2**31-1)", "default is not", id="trap 2: expression"),
        pytest.param("n: int = Input(description='n', default=LIMIT)", "default is not", id="trap 2: constant"),
        pytest.param("n: int = Input(description='n', default=(5))", "default is not", id="trap 2: brackets"),
        pytest.param("n: int = Input(description='n', default=1, le=LIMIT)", "le is not", id="trap 3: le"),
        pytest.param("n: int = Input(description='n', default=1, ge=-(1))", "ge is not", id="trap 3: ge"),
        pytest.param("s: str = Input(description='s', regex=RULE)", "regex is not", id="trap 3: regex"),
        pytest.param("n: int = Input(description='one ' 'two')", "description is not", id="trap 4: parts"),
        pytest.param("n: int = Input(description=f'{1}')", "description is not", id="trap 4: f-string"),
        pytest.param(r"n: int = Input(description='a\nb')", "description is not", id="trap 4: escape"),
        pytest.param("n: int = Input(description=('n'))", "description is not", id="trap 4: brackets"),
        pytest.param("n: int = Input(default=1)", "no description", id="no description"),
        pytest.param("n: int = 5", "no Input()", id="no Input"),
        pytest.param("n: int", "no Input()", id="no default"),
        pytest.param("n=Input(description='n')", "no type", id="no type"),
        pytest.param("s: str = Input(description='s', choices=sorted('ba'))", "choices is not", id="computed choices"),
    ],
)
def test_an_input_that_cog_would_misread_is_detected(given: str, problem: str) -> None:
    assert problem in misread(f"async def run({given}) -> list[Path]: ...", "run")[0]


@pytest.mark.parametrize("decorator", ["torch.inference_mode()", "torch.no_grad()", "timed"])
def test_a_decorator_that_hides_the_defaults_is_detected(decorator: str) -> None:
    source = f"@{decorator}\nasync def run(s: str = Input(description='s')) -> list[Path]: ..."
    assert misread(source, "run") == ["a decorator hides the defaults"]


@pytest.mark.parametrize("fields", [predict.INPUTS, train.INPUTS], ids=["predict", "train"])
def test_defaults_and_limits_fit_their_inputs(fields: dict) -> None:
    for field in fields.values():
        info = field.info
        if not field.required:
            assert field.convert(info.default) == info.default
        # Cog takes `seed: int = Input(default=None)` for required.
        assert not field.required or field.name == "images"
        assert info.choices is None or all(isinstance(choice, field.kind) for choice in info.choices)
        assert info.ge is None or info.le is None or info.ge <= info.le
        assert field.kind is not int or (abs(info.ge) <= INT32_MAX and abs(info.le) <= INT32_MAX)


def test_inputs_with_choices_have_different_names_in_predict_and_train() -> None:
    """An input with choices becomes a component of its name, and all components share one space."""
    reserved = json.loads(TEMPLATE.read_text())["components"]["schemas"].keys()
    reserved |= {"Input", "Output", "TrainingInput", "TrainingOutput"}
    ours, theirs = (
        {name for name, field in fields.items() if field.info.choices} for fields in (predict.INPUTS, train.INPUTS)
    )
    assert not ours & theirs
    assert not (ours | theirs) & reserved


def test_train_is_async_because_both_share_the_number_of_slots() -> None:
    assert inspect.iscoroutinefunction(train.train)
    assert predict.SLOTS == 12


def test_train_has_the_descriptions_limits_and_defaults_of_train_settings() -> None:
    settings = {field.name: field for field in dataclasses.fields(TrainSettings)}
    assert ["images", *settings] == list(train.INPUTS)
    for name, field in settings.items():
        info = train.INPUTS[name].info
        given = {one.name: getattr(info, one.name) for one in dataclasses.fields(cog.FieldInfo)}
        limits = {key: value for key, value in given.items() if value is not None and key != "default"}
        metadata = dict(field.metadata)
        if "choices" in metadata:
            metadata["choices"] = list(metadata["choices"])
        assert limits == metadata, name
        assert (info.default or field.default) == field.default, name
        assert train.INPUTS[name].kind is type(field.default), name


def test_train_passes_every_input_on() -> None:
    calls = [node for node in ast.walk(ast.parse(inspect.getsource(train.train))) if isinstance(node, ast.Call)]
    (call,) = (node for node in calls if getattr(node.func, "id", "") == "checked")
    assert {keyword.arg for keyword in call.keywords} == {*train.INPUTS, None}


def test_inputs_of_predict_are_ordered_and_described() -> None:
    properties = build_schema()["components"]["schemas"]["Input"]["properties"]
    assert list(properties) == [
        *(
            "prompt",
            "image",
            "image_weight",
            "negative_prompt",
            "init_image",
            "mask",
            "num_outputs",
            "candidates",
            "clip_rerank",
            "top_k",
            "top_p",
            "temperature",
            "guidance",
        ),
        *(
            "seed",
            "output_format",
            "output_quality",
            "output_size",
            "output_grid",
            "output_metadata",
            "replicate_weights",
        ),
    ]
    assert all(one["description"] for one in properties.values())
    assert properties["candidates"]["maximum"] == MAX_CANDIDATES
    assert [one["x-order"] for one in properties.values()] == list(range(20))
    assert properties["seed"]["maximum"] == 2**31 - 1


def test_the_file_that_the_server_reads_is_written_without_loading_torch() -> None:
    code = "import sys; from clip_gen.serving import serve; serve.write_schema(); print('torch' in sys.modules)"
    printed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert printed == "False\n"
    assert json.loads((ROOT / ".cog/openapi_schema.json").read_text()) == build_schema()


def test_cog_yaml_agrees_with_the_code_and_the_requirements() -> None:
    config = OmegaConf.to_container(OmegaConf.load(ROOT / "cog.yaml"))
    build = config["build"]
    # Cog's command refuses both names together, and warns about `predict`.
    assert "predict" not in config
    assert (config["run"], config["train"]) == ("predict.py:Predictor", "train.py:train")
    assert build["sdk_version"] == importlib.metadata.version("cog")
    assert build["python_version"] == f"{sys.version_info.major}.{sys.version_info.minor}"
    # Cog looks its own table up by an exact pin.
    assert any(line.startswith("torch==") for line in (ROOT / build["python_requirements"]).read_text().splitlines())
    named = [pair.partition("=")[0] for pair in config["environment"]]
    assert all(name in (ROOT / "script" / "serve").read_text() for name in named)
