"""The page of script/ui in a real browser."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from browser import PHONE, Browser, browser, headers, missing, page_server
from PIL import Image
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys

from clip_gen.files import ROOT
from clip_gen.images import read_metadata
from predict import INPUTS

pytestmark = pytest.mark.skipif(bool(missing()), reason=f"the tests of the page need {missing()}")


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("drawings")


@pytest.fixture(scope="module")
def address(tiny_model_folder: Path, history: Path) -> Iterator[str]:
    with page_server("--model", str(tiny_model_folder), "--history", str(history)) as found:
        yield found


@pytest.fixture(scope="module")
def window(address: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(address, downloads=tmp_path_factory.mktemp("downloads")) as found:
        yield found


@pytest.fixture
def page(window: Browser) -> Browser:
    """The page, just loaded."""
    window.load()
    return window


def drawn(page: Browser, prompt: str, history: Path) -> dict[str, object]:
    """The settings of a drawing that the page has just made."""
    before = set(history.iterdir())
    page.fill("#prompt textarea", prompt + Keys.ENTER)
    return drawn_since(before, page, history)


def drawn_since(before: set[Path], page: Browser, history: Path) -> dict[str, object]:
    """The settings of the drawing that is not among those `before`, once it is shown."""
    [folder] = page.wait(lambda: {path.parent for path in history.glob("*/settings.json")} - before)
    page.status("Drawn in")
    return json.loads((folder / "settings.json").read_text()) | {"folder": folder}


def test_a_prompt_and_enter_draw_pictures_best_first_with_score_and_seed(page: Browser, history: Path) -> None:
    page.fill("#seed input", "7")
    found = drawn(page, "a red circle", history)
    assert (found["prompt"], found["seed"], found["candidates"]) == ("a red circle", 7, 16)
    assert found["scores"] == sorted(found["scores"], reverse=True)
    captions = [element.text for element in page.all("#pictures .caption-label")]
    assert captions == [f"{score:.3f} · seed 7" for score in found["scores"]]
    for number, name in enumerate(found["files"]):
        metadata = read_metadata(found["folder"] / name)
        assert (metadata["prompt"], metadata["number"], metadata["seed"]) == ("a red circle", str(number), "7")


def test_nothing_is_asked_of_other_servers_and_the_console_is_empty(page: Browser, address: str, history: Path) -> None:
    drawn(page, "a blue star", history)
    asked = page.requests()
    assert len(asked) > 20
    assert {url for url in asked if not url.startswith((f"{address}/", "data:", "blob:"))} == set()
    assert page.driver.get_log("browser") == []
    assert "default-src 'self'" in headers(address)["content-security-policy"]


def test_every_input_of_the_predictor_has_a_control(page: Browser) -> None:
    for folded in ("from-picture", "redraw", "advanced"):
        page.click(f"#{folded} button")
    page.one("#top_k")
    for name in set(INPUTS) - {"replicate_weights", "mask"}:  # there is a choice of models; and the canvas, see below
        page.one(f"#{name}")


def test_earlier_drawings_survive_a_reload_and_bring_their_settings_back(page: Browser, history: Path) -> None:
    page.fill("#seed input", "11")
    page.fill("#negative_prompt textarea", "red")
    found = drawn(page, "a green cross", history)
    drawn(page, "a pink heart", history)
    page.load()
    page.wait(lambda: len(page.all("#past .thumbnail-item")) > 1)
    assert page.value("#prompt textarea") == ""

    def chosen() -> bool:  # a click gets lost while the page draws its list again
        page.click("#past .thumbnail-item", 1)
        page.status("An earlier drawing")
        return page.value("#prompt textarea") == "a green cross"

    page.wait(chosen)
    assert (page.value("#seed input"), page.value("#negative_prompt textarea")) == ("11", "red")
    page.click("#picture button", -1)
    assert page.value("#command textarea") == found["command"]


def test_a_removed_drawing_is_gone(page: Browser, history: Path) -> None:
    found = drawn(page, "an orange ring", history)
    page.click("#remove")
    page.status("Removed")
    assert not found["folder"].exists()


def test_a_click_on_a_picture_and_on_variations_draws_from_it(page: Browser, history: Path) -> None:
    found, before = drawn(page, "a star", history), set(history.iterdir())
    page.click("#pictures .thumbnail-item", 2)
    page.wait(lambda: page.text("#picture").startswith("Picture 3 of 4"))
    page.click("#vary")
    varied = drawn_since(before, page, history)
    folder = varied["folder"]
    assert Image.open(folder / "image.png").tobytes() == Image.open(found["folder"] / "2.png").tobytes()
    assert varied["image_sha256"] == hashlib.sha256((folder / "image.png").read_bytes()).hexdigest()
    assert "prompt" not in varied
    assert varied["seed"] != found["seed"]


def redraw(page: Browser, history: Path) -> None:
    """Draws, and puts the first picture on the canvas for masks."""
    drawn(page, "a star", history)
    page.click("#pictures .thumbnail-item")
    page.click("#paint")
    page.wait(lambda: page.all("#mask canvas"))


def test_the_half_of_a_picture_is_redrawn_and_comes_back_from_the_history(page: Browser, history: Path) -> None:
    redraw(page, history)
    page.fill("#seed input", "21")
    page.click("#mask-lower")
    found = drawn(page, "a heart", history)
    mask, kept = (Image.open(found["folder"] / f"{name}.png").convert("RGB") for name in ("mask", "init_image"))
    white = np.asarray(mask) > 127  # the browser blurs the edge
    assert not white[:8].any()
    assert white[8:].all()
    for name in found["files"]:
        assert Image.open(found["folder"] / name).crop((0, 0, 16, 8)).tobytes() == kept.crop((0, 0, 16, 8)).tobytes()
    page.load()
    page.click("#past .thumbnail-item")
    page.status("An earlier drawing")
    page.wait(lambda: page.all("#mask canvas"))
    again = drawn(page, "a heart", history)
    assert again["mask_sha256"] == found["mask_sha256"]
    for name in found["files"]:
        assert (again["folder"] / name).read_bytes() == (found["folder"] / name).read_bytes()


def test_a_mask_can_be_painted(page: Browser, history: Path) -> None:
    redraw(page, history)
    canvas = page.one("#mask canvas")
    page.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", canvas)
    stroke = ActionChains(page.driver).move_to_element_with_offset(canvas, -60, -60).click_and_hold()
    for x in range(-60, 61, 20):
        stroke.move_to_element_with_offset(canvas, x, x)
    stroke.release().perform()
    found = drawn(page, "a heart", history)
    share = np.asarray(Image.open(found["folder"] / "mask.png").convert("L")).mean() / 255
    assert 0.02 < share < 0.6


def test_picture_and_settings_can_be_downloaded(window: Browser, page: Browser, history: Path) -> None:
    found = drawn(page, "a square", history)
    page.click("#pictures .thumbnail-item", 1)
    page.wait(lambda: page.text("#picture").startswith("Picture 2 of 4"))
    for button, name in (("#save", "1.png"), ("#save-settings", "settings.json")):
        page.click(button)
        folder = Path(page.downloads)
        page.wait(lambda name=name, folder=folder: (folder / name).is_file())
        assert (folder / name).read_bytes() == (found["folder"] / name).read_bytes()
        (folder / name).unlink()


def test_an_uploaded_picture_is_drawn_from_and_its_exif_goes_nowhere(
    page: Browser, history: Path, tmp_path: Path
) -> None:
    exif = Image.Exif()
    exif[0x010F] = "SecretCam"
    Image.radial_gradient("L").convert("RGB").save(tmp_path / "alice.jpg", exif=exif)
    page.click("#from-picture button")
    page.one("#image")
    page.driver.find_element("css selector", "#image input[type=file]").send_keys(str(tmp_path / "alice.jpg"))
    page.wait(lambda: page.all("#image img"))
    found = drawn(page, "", history)
    assert found["image_sha256"] == hashlib.sha256((found["folder"] / "image.png").read_bytes()).hexdigest()
    written = b"".join(path.read_bytes() for path in found["folder"].iterdir())
    assert not [word for word in (b"Secret", b"alice") if word in written]


def test_a_request_that_cannot_be_drawn_says_why(page: Browser, history: Path) -> None:
    before = set(history.iterdir())
    page.click("#draw")
    page.status("there is neither a prompt nor an image")
    page.fill("#num_outputs input[type=number]", "20")
    page.fill("#prompt textarea", "a star\n")
    page.status("num_outputs is 20, more than the 16 candidates")
    assert set(history.iterdir()) == before


def test_progress_and_a_preview_are_shown_until_a_drawing_is_cancelled(page: Browser, history: Path) -> None:
    page.fill("#model input", str(ROOT / "checkpoints" / "shapes") + Keys.ENTER)
    page.wait(lambda: "a large red circle on a white background" in page.text("#examples"))
    page.fill("#candidates input[type=number]", "256")
    before = set(history.iterdir())
    page.fill("#prompt textarea", "a red circle\n")
    page.status("tokens per second")
    assert 0 < float(page.one("#status progress").get_attribute("value")) < 1
    page.wait(lambda: page.all("#preview img"))
    page.click("#cancel")
    page.status("Cancelled")
    page.wait(page.one("#draw").is_enabled)
    assert set(history.iterdir()) == before
    assert not page.all("#preview img")
    page.fill("#candidates input[type=number]", "4")
    assert drawn(page, "a red circle", history)["model"] == "shapes"


def test_models_can_be_chosen_and_their_examples_fill_the_prompt(page: Browser) -> None:
    page.click("#model input")
    page.wait(lambda: page.all("[role=listbox] [role=option]"))
    [shapes] = [one for one in page.all("[role=option]") if one.text.startswith("shapes (bundled)")]
    shapes.click()
    page.wait(lambda: "a large red circle on a white background" in page.text("#examples"))
    page.click("#examples button", 1)
    page.wait(lambda: page.value("#prompt textarea") == "a small blue star on a black background")
    page.click("#known button")
    assert "circle, square, triangle" in page.text("#known")
    page.fill("#model input", "nowhere" + Keys.ENTER)
    page.status("nowhere")


def test_the_page_works_by_keyboard(page: Browser, history: Path) -> None:
    """Tab and Enter alone: from the prompt to the button, and to a picture."""
    drawn(page, "a star", history)
    before, prompt = set(history.iterdir()), page.one("#prompt textarea")
    prompt.click()
    assert tabbed(page, lambda: page.driver.switch_to.active_element.get_attribute("id") == "draw")
    ActionChains(page.driver).send_keys(Keys.ENTER).perform()
    drawn_since(before, page, history)
    assert tabbed(page, lambda: page.driver.switch_to.active_element.get_attribute("aria-label") == "Thumbnail 2 of 4")
    ActionChains(page.driver).send_keys(Keys.ENTER).perform()
    page.wait(lambda: page.text("#picture").startswith("Picture 2 of 4"))
    assert tabbed(page, lambda: page.driver.switch_to.active_element.get_attribute("id") == "vary")


def tabbed(page: Browser, done: object) -> bool:
    """Whether something gets the focus after at most 40 times Tab."""
    for _ in range(40):
        ActionChains(page.driver).send_keys(Keys.TAB).perform()
        if done():
            return True
    return False


def test_a_phone_shows_the_pictures_before_the_settings_and_nothing_is_cut_off(address: str, history: Path) -> None:
    with browser(address, PHONE) as phone:
        drawn(phone, "a star", history)
        assert phone.driver.execute_script("return document.documentElement.scrollWidth") <= PHONE[0]
        heights = [phone.one(f"#{name}").rect["y"] for name in ("prompt", "draw", "pictures", "num_outputs")]
        assert heights == sorted(heights)
        for name in ("prompt", "draw", "pictures", "candidates", "history"):
            rect = phone.one(f"#{name}").rect
            assert rect["x"] >= 0
            assert rect["x"] + rect["width"] <= PHONE[0]
        phone.click("#pictures .thumbnail-item", 1)
        phone.wait(lambda: phone.text("#picture").startswith("Picture 2 of 4"))


def test_a_port_in_use_is_reported_in_one_sentence(address: str, tiny_model_folder: Path) -> None:
    words = ["--port", address.rpartition(":")[2], "--model", str(tiny_model_folder)]
    run = subprocess.run([ROOT / "script" / "ui", *words], capture_output=True, text=True, timeout=120)
    assert run.returncode == 1
    assert run.stderr == f"script/ui: port {words[1]} is in use; give another one, as in script/ui --port 7861\n"
