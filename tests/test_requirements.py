"""requirements*.txt and constraints.txt: every installed version is pinned."""

from __future__ import annotations

import importlib.metadata
import re
import tomllib

import pytest
from packaging.requirements import Requirement

from clip_gen.files import ROOT

CUDA = re.compile("nvidia-|cuda-|triton$")


def pins(name: str) -> dict[str, str]:
    """The exact versions in a file, by normalised package name."""
    lines = [line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    pairs = [line.split("==") for line in lines if line and not line.startswith("-r")]
    return {normalised(package): version for package, version in pairs}


def normalised(package: str) -> str:
    return re.sub(r"[-_.]+", "-", package).lower()


def with_dependencies(packages: list[str]) -> set[str]:
    """These packages and all that they install on this platform."""
    found, remaining = set(), [(package, frozenset()) for package in packages]
    while remaining:
        package, extras = remaining.pop()
        if (package, extras) in found:
            continue
        found.add((package, extras))
        for text in importlib.metadata.requires(package) or []:
            needed = Requirement(text)
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras | {""}):
                remaining.append((normalised(needed.name), frozenset(needed.extras)))
    return {package for package, _ in found}


def test_all_that_the_image_installs_is_pinned_but_the_cuda_packages() -> None:
    image = pins("requirements.txt")
    needed = with_dependencies([*image, "cog"]) - {"cog"}  # cog.yaml pins cog
    assert {package for package in needed if not CUDA.match(package)} == set(image)


def test_all_that_setup_installs_is_pinned_to_what_is_installed() -> None:
    files = ("requirements.txt", "requirements-dev.txt", "constraints.txt")
    pinned = {package: version for name in files for package, version in pins(name).items()}
    assert with_dependencies(list(pinned)) == set(pinned)
    assert {package: importlib.metadata.version(package) for package in pinned} == pinned


def test_the_packages_of_the_emoji_recipe_are_pinned_and_need_no_other_versions() -> None:
    own = pins("requirements-emoji.txt")
    others = pins("requirements.txt") | pins("requirements-dev.txt")
    assert {"sentence-transformers", "transformers", "tokenizers", "lemminflect"} <= set(own)
    assert {name: version for name, version in own.items() if name in others and version != others[name]} == {}
    assert not set(own) & set(pins("requirements.txt"))


def test_the_packages_of_the_page_are_pinned_with_their_dependencies_and_change_none() -> None:
    own, image, tests = pins("requirements-ui.txt"), pins("requirements.txt"), pins("requirements-dev.txt")
    assert not set(own) & set(image)
    assert {name: version for name, version in own.items() if tests.get(name, version) != version} == {}
    folder = str(ROOT / ".ui-packages")
    installed = {normalised(one.name): one for one in importlib.metadata.distributions(path=[folder])}
    if not installed:
        pytest.skip("Gradio is not installed: script/ui --help does it")
    assert {name: one.version for name, one in installed.items()} == own
    needed = [Requirement(text) for one in installed.values() for text in one.requires or []]
    needed = [one for one in needed if one.marker is None or one.marker.evaluate({"extra": ""})]
    everything = own | image | tests
    assert all(one.specifier.contains(everything[normalised(one.name)]) for one in needed)


def test_the_build_system_has_the_pinned_setuptools() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["build-system"]["requires"] == [f"setuptools=={pins('requirements.txt')['setuptools']}"]
