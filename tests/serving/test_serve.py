"""Cog's real HTTP server with a toy model, as a client sees it.

Traps of Cog 0.23.1 in these tests: 1 and 2 (defaults arrive), 5 (null), 9 (409), 11 (names under --upload-url), 14 (2.0
for an int), 15 (no input is declared a file; replicate_weights is text that may name a path on the server), 16 (every
file is there), 18 (no schema). In test_openapi.py: 1 to 4, 8, 19, 20; in test_predict.py: 14, 18. Not tested: 6, 7 and
10 are about training, 12 and 13 about streaming and torch's switches, neither of which is used. 17 (a crashed worker):
test_watchdog.py.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import re
import shutil
import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cog_server import Server, decoded, running, wait_for
from model_files import other_folder, slow_folder, web_server
from PIL import Image

from clip_gen.files import ROOT
from clip_gen.serving.openapi import build_schema
from clip_gen.serving.request_weights import REFUSALS
from clip_gen.serving.slots import PREDICTIONS
from clip_gen.serving.watchdog import GRACE
from clip_gen.weights.tarball import pack
from predict import SLOTS

PROMPT = "a large red circle"
QUICK = {"prompt": PROMPT, "seed": 7, "candidates": 4, "num_outputs": 2}


def same(ours: list[Image.Image], theirs: list[Image.Image]) -> bool:
    return [picture.tobytes() for picture in ours] == [picture.tobytes() for picture in theirs]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model folders and tars."""
    files = tmp_path_factory.mktemp("files")
    pack(other_folder(files / "other"), files / "other.tar")
    slow_folder(files / "slow")
    (files / "cut.tar").write_bytes((files / "other.tar").read_bytes()[:100_000])
    return files


@pytest.fixture(scope="module")
def website(files: Path) -> Iterator[str]:
    with web_server(files) as address:
        yield address


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the server of script/serve keeps its temporary files."""
    return tmp_path_factory.mktemp("scratch")


@pytest.fixture(scope="module")
def server(tiny_model_folder: Path, scratch: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """script/serve with COG_WEIGHTS relative to the current folder."""
    command = [str(ROOT / "script" / "serve")]
    environment = {"COG_WEIGHTS": tiny_model_folder.name, "CLIP_GEN_ALLOW_WEIGHTS": "any"}
    with running(command, tiny_model_folder.parent, scratch, **environment) as server:
        yield server.wait_until_set_up()
        assert list(scratch.glob("clip-gen-*"))
        server.process.terminate()
        assert server.process.wait(timeout=20) == 0
        wait_for(lambda: not list(scratch.glob("clip-gen-*")))


@pytest.fixture(scope="module")
def bare_server(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with one slot, a weights tar and no schema, so that Cog checks no inputs. It removes the folders of a
    prediction after a second.
    """
    folder = tmp_path_factory.mktemp("bare")
    quick = "\nimport clip_gen.serving.slots\n\nclip_gen.serving.slots.FOLDER_SECONDS = 1\n"
    (folder / "predict.py").write_text((ROOT / "predict.py").read_text() + quick)
    pack(tiny_model_folder, tar := folder / "weights.tar")
    environment = {
        **{"COG_PREDICT_TYPE_STUB": "predict.py:Predictor", "PYTHONPATH": str(ROOT), "COG_WEIGHTS": str(tar)},
        "CLIP_GEN_ALLOW_WEIGHTS": "any",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # Cog starts its worker as `python`
    }
    command = [sys.executable, "-m", "cog.server.http", "--host", "127.0.0.1"]
    with running(command, folder, folder, **environment) as server:
        yield server.wait_until_set_up()


# Requests


def test_the_server_is_ready_and_says_which_model_it_runs(server: Server) -> None:
    assert server.health()["status"] == "READY"
    # Cog may say that it is ready a moment before it passes on what setup printed.
    wait_for(lambda: "model: tiny from" in server.log.read_text())


def test_the_server_publishes_the_schema(server: Server) -> None:
    assert server.request("GET", "/openapi.json") == (200, build_schema())


def test_a_prompt_alone_gives_four_pictures(server: Server) -> None:
    assert [picture.format for picture in server.pictures(prompt=PROMPT)] == ["PNG"] * 4


def test_a_prompt_alone_gives_four_pictures_without_a_schema_too(bare_server: Server) -> None:
    assert len(bare_server.pictures(prompt=PROMPT)) == 4


@pytest.mark.parametrize(
    ("asked", "got", "mime"), [("png", "PNG", "png"), ("webp", "WEBP", "webp"), ("jpg", "JPEG", "jpeg")]
)
def test_pictures_have_the_requested_format(server: Server, asked: str, got: str, mime: str) -> None:
    output = server.predict(**QUICK, output_format=asked, output_quality=50)["output"]
    assert all(url.startswith(f"data:image/{mime};base64,") for url in output)
    assert [(decoded(url).format, decoded(url).size) for url in output] == [(got, (16, 16))] * 2


def test_a_picture_contains_its_settings(server: Server) -> None:
    text = server.pictures(**QUICK)[0].text
    assert (text["prompt"], text["seed"], text["candidates"], text["model"]) == (PROMPT, "7", "4", "tiny")


def test_the_reply_contains_seed_counts_and_scores(server: Server) -> None:
    reply = server.predict(**QUICK)
    metrics = reply["metrics"]
    assert (metrics["image_output_count"], metrics["candidates"], metrics["seed"]) == (2, 4, 7)
    assert metrics["scores"] == sorted(metrics["scores"], reverse=True)
    assert metrics["best_score"] == metrics["scores"][0]
    assert "seed: 7\n" in reply["logs"]
    assert str(metrics["best_score"]) in reply["logs"]


def test_the_printed_seed_gives_the_same_pictures(server: Server) -> None:
    first = server.predict(prompt=PROMPT, candidates=4)
    again = server.predict(prompt=PROMPT, candidates=4, seed=first["metrics"]["seed"])
    assert first["output"] == again["output"]
    assert server.predict(prompt=PROMPT, candidates=4)["metrics"]["seed"] != first["metrics"]["seed"]


def test_the_first_n_candidates_are_those_of_a_request_for_n(server: Server) -> None:
    few = server.pictures(**QUICK | {"clip_rerank": False, "num_outputs": 3, "candidates": 3})
    many = server.pictures(**QUICK | {"clip_rerank": False, "num_outputs": 20, "candidates": 20})
    assert same(few, many[:3])
    assert not same(few, many[3:6])


def test_a_whole_float_is_accepted_as_an_int(server: Server) -> None:
    assert same(server.pictures(**QUICK | {"num_outputs": 2.0, "seed": 7.0}), server.pictures(**QUICK))


def test_an_image_is_a_prompt_and_may_be_mixed_with_one(server: Server) -> None:
    pixels = io.BytesIO()
    Image.radial_gradient("L").save(pixels, "png")
    image = {"image": "data:image/png;base64," + base64.b64encode(pixels.getvalue()).decode()}
    variations = server.pictures(**QUICK | image | {"prompt": ""})
    plain = server.pictures(**QUICK)
    assert not same(variations, plain)
    assert same(server.pictures(**QUICK | image | {"image_weight": 1}), variations)
    assert same(server.pictures(**QUICK | image | {"image_weight": 0}), plain)
    assert variations[0].text["image_sha256"] == hashlib.sha256(pixels.getvalue()).hexdigest()
    assert "image" not in variations[0].text


def test_a_negative_prompt_raises_guidance_and_the_logs_say_so(server: Server) -> None:
    reply = server.predict(**QUICK, negative_prompt="red:2 | blue")
    assert "guidance is 1, with which a negative prompt does little: it is 3 here" in reply["logs"]
    assert decoded(reply["output"][0]).text["guidance"] == "3.0"


# Invalid requests


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"prompt": 5}, '5 is not of type "string"'),
        ({"prompt": "x" * 1001}, "is longer than 1000 characters"),
        ({"image": None}, 'null is not of type "string"'),
        ({"image_weight": 2}, "2 is greater than the maximum of 1"),
        ({"num_outputs": 65}, "65 is greater than the maximum of 64"),
        ({"num_outputs": 2.5}, '2.5 is not of type "integer"'),
        ({"candidates": 257}, "257 is greater than the maximum of 256"),
        ({"top_k": -1}, "-1 is less than the minimum of 0"),
        ({"top_p": 1.5}, "1.5 is greater than the maximum of 1"),
        ({"temperature": -0.5}, "-0.5 is less than the minimum of 0"),
        ({"guidance": "3"}, '"3" is not of type "number"'),
        ({"seed": 2**31}, "2147483648 is greater than the maximum of 2147483647"),
        ({"seed": None}, 'null is not of type "integer"'),
        ({"clip_rerank": 1}, '1 is not of type "boolean"'),
        ({"output_format": "gif"}, '"gif" is not one of ["png","webp","jpg"]'),
        ({"output_quality": None}, 'null is not of type "integer"'),
    ],
)
def test_an_input_outside_its_limits_is_a_422_that_names_it(server: Server, inputs: dict, message: str) -> None:
    (name,) = inputs
    (detail,) = server.refused(**QUICK | inputs)
    assert detail["loc"] == ["body", "input", name]
    assert message in detail["msg"]


def test_all_wrong_inputs_are_listed(server: Server) -> None:
    details = server.refused(prompt=PROMPT, num_outputs=0, candidates=0, top_p=2)
    assert {one["loc"][-1] for one in details} == {"num_outputs", "candidates", "top_p"}


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        ({"num_outputs": 5}, "num_outputs is 5, more than the 4 candidates"),
        ({"prompt": " \n"}, "say what to draw"),
        (
            {"prompt": ""},
            "there is neither a prompt nor an image; say what to draw, for example: a cat on a blue background, or",
        ),
        ({"prompt": "a star:2 | a: red"}, "prompt has the part 'a: red', whose weight is 'red'; give a number, 0 to"),
        ({"image": "/etc/hostname"}, 'image is "/etc/hostname"; give a file'),
        ({"image": "data:image/png;base64,aGVsbG8="}, "image cannot be used: "),
        ({"replicate_weights": "/etc/hostname"}, REFUSALS["any"]),
        ({"replicate_weights": "absent.tar"}, REFUSALS["any"]),
    ],
)
def test_contradicting_values_fail_with_a_sentence(server: Server, inputs: dict, sentence: str) -> None:
    assert sentence in server.failed(**QUICK | inputs)


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        ({"num_outputs": 99}, "num_outputs is 99; give a whole number, 1 to 64"),
        ({"candidates": "many"}, 'candidates is "many"; give a whole number, 1 to 256'),
        ({"seed": 2**70}, "give a whole number, 0 to 2147483647"),
        ({"output_format": "gif"}, 'output_format is "gif"; give one of png, webp, jpg'),
        ({"output_quality": 101}, "output_quality is 101; give a whole number, 0 to 100"),
        ({"prompt": ""}, "there is neither a prompt nor an image"),
        ({"prompt": None}, "prompt is missing"),
    ],
)
def test_without_a_schema_predict_checks_its_inputs(bare_server: Server, inputs: dict, sentence: str) -> None:
    assert sentence in bare_server.failed(**QUICK | inputs)


def test_a_training_request_to_a_prediction_server_fails_with_a_sentence(server: Server, bare_server: Server) -> None:
    for asked in (server, bare_server):
        status, reply = asked.request("POST", "/trainings", {"input": {"images": "data:text/plain;base64,bm8="}})
        assert (status, reply["status"]) == (200, "failed"), reply
        assert "this server draws pictures; for trainings, start another with --x-mode train" in reply["error"]
        wait_for(lambda asked=asked: asked.health()["status"] == "READY")


def test_without_a_schema_an_unknown_input_is_refused(bare_server: Server) -> None:
    assert 'unknown input "promt"; did you mean "prompt"?' in bare_server.failed(**QUICK, promt="a star")


# Other weights


def test_a_weights_tar_named_in_the_request_draws_with_that_model(server: Server, files: Path, website: str) -> None:
    own = server.pictures(**QUICK)
    by_path = server.pictures(**QUICK, replicate_weights=str(files / "other.tar"))
    by_url = server.pictures(**QUICK, replicate_weights=f"{website}/other.tar")
    data = base64.b64encode((files / "other.tar").read_bytes()).decode()
    by_data = server.pictures(**QUICK, replicate_weights=f"data:application/x-tar;base64,{data}")
    assert same(by_path, by_url)
    assert same(by_path, by_data)
    assert not same(own, by_path)
    assert same(own, server.pictures(**QUICK, replicate_weights=""))


def test_unusable_weights_fail_with_a_sentence(server: Server, files: Path, website: str) -> None:
    assert "cut.tar" in server.failed(**QUICK, replicate_weights=str(files / "cut.tar"))
    assert "cut.tar" in server.failed(**QUICK, replicate_weights=f"{website}/cut.tar")
    for weights in (f"{website}/absent.tar", "http://127.0.0.1:9/weights.tar", f"{website}/"):
        assert server.failed(**QUICK, replicate_weights=weights).endswith(REFUSALS["any"])


def test_a_server_with_a_weights_tar_draws_the_same(server: Server, bare_server: Server) -> None:
    assert same(server.pictures(**QUICK), bare_server.pictures(**QUICK))


def test_a_server_started_from_a_url_uploads_files_and_takes_no_private_weights(
    server: Server, files: Path, website: str, tmp_path: Path
) -> None:
    (uploads := tmp_path / "uploads").mkdir()
    with web_server(uploads) as address:
        command = [str(ROOT / "script" / "serve"), "--upload-url", address]
        with running(command, ROOT, tmp_path, COG_WEIGHTS=f"{website}/other.tar") as other:
            reply = other.wait_until_set_up().predict(**QUICK | {"num_outputs": 4})
            for weights in (f"{website}/other.tar", "http://127.0.0.1:9/", str(files / "other.tar"), "/etc/shadow"):
                refused = other.predict(**QUICK, replicate_weights=weights)
                assert refused["error"].endswith(REFUSALS["https"])
                assert weights not in refused["logs"]
                wait_for(lambda weights=weights: f"weights of a request, '{weights}': " in other.log.read_text())
    assert sorted(reply["output"]) == [f"{address}/out-{i}.png" for i in range(4)]
    uploaded = [Image.open(uploads / f"out-{i}.png") for i in range(4)]
    assert not same(uploaded[:2], server.pictures(**QUICK))


def test_damaged_weights_fail_the_setup_with_a_sentence(files: Path, tmp_path: Path) -> None:
    shutil.copytree(files / "other", tmp_path / "model")
    (tmp_path / "model" / "gpt.safetensors").write_bytes(b"no tensors")
    with running([str(ROOT / "script" / "serve")], tmp_path, tmp_path, COG_WEIGHTS="model") as broken:
        broken.wait_until_set_up()
        time.sleep(GRACE + 2)  # the worker is gone, but no watchdog ends the server that says why
        health = broken.health()
    assert health["status"] == "SETUP_FAILED"
    assert "gpt.safetensors: damaged" in health["setup"]["logs"]


# Warnings, identical candidates and leftover files


def test_warnings_about_a_prediction_are_in_its_own_logs(server: Server) -> None:
    prompts = [f"{'red ' * 14}blue star", PROMPT]
    with ThreadPoolExecutor(2) as pool:
        long, short = pool.map(lambda prompt: server.predict(**QUICK | {"prompt": prompt})["logs"], prompts)
    assert "the prompt is longer than this model's CLIP reads; its end is left out: 'blue star'\n" in long
    assert re.fullmatch(r"100%\|#{10}\| 64/64 tokens \[.*\]\nseed: 7\nscores: .*\n", short)
    idle = server.predict(**QUICK | {"clip_rerank": False}, output_quality=50)["logs"]
    assert "warning: output_quality is 50, which does nothing: png is always lossless\n" in idle
    assert "warning: candidates is 4, which does nothing without clip_rerank: 2 are drawn\n" in idle


def test_simultaneous_predictions_log_their_own_progress(server: Server, files: Path) -> None:
    """In whole lines: percent, tokens of all tokens, time, time left and speed."""
    line = r" *(\d+)%\|[#\d ]{{10}}\| (\d+)/{tokens} tokens \[\d\d:\d\d<[\d:?]+, +[\d.?]+ tokens/s\]"
    inputs = {"replicate_weights": str(files / "slow"), "num_outputs": 1, "prompt": PROMPT}

    def logged(candidates: int) -> list[str]:
        return server.predict(**inputs, candidates=candidates)["logs"].splitlines()

    with ThreadPoolExecutor(3) as pool:
        for candidates, lines in zip((62, 63, 64), pool.map(logged, (62, 63, 64)), strict=True):
            found = [re.fullmatch(line.format(tokens=1024 * candidates), one) for one in lines if "%|" in one]
            assert len(found) > 1
            assert all(found), lines
            percents = [int(one[1]) for one in found]
            assert percents == [round(100 * int(one[2]) / (1024 * candidates)) for one in found]
            assert percents == sorted(set(percents))
            assert percents[-1] == 100


def test_identical_candidates_are_drawn_once_and_the_logs_say_so(server: Server) -> None:
    reply = server.predict(**QUICK, top_k=1)
    assert (len(reply["output"]), reply["metrics"]["image_output_count"], reply["metrics"]["candidates"]) == (1, 1, 1)
    assert "top_k is 1: all candidates would be the same picture, so one is drawn and returned\n" in reply["logs"]


def test_metadata_can_be_left_out(server: Server) -> None:
    assert [picture.text for picture in server.pictures(**QUICK, output_metadata=False)] == [{}] * 2


@pytest.mark.parametrize("name", ["mine-{port}", "mine-{port}/deeper", "../clip-gen-test-{port}"])
def test_the_empty_folders_of_a_prediction_are_removed(bare_server: Server, name: str) -> None:
    name = name.format(port=bare_server.port)  # no other server's
    folder = Path(os.path.normpath(PREDICTIONS / name))
    body = {"input": QUICK, "id": name}
    while bare_server.request("POST", "/predictions", body)[0] == 409:
        time.sleep(0.02)
    assert folder.is_dir()
    if PREDICTIONS in folder.parents:
        wait_for(lambda: not folder.exists())
        wait_for(lambda: folder.parent == PREDICTIONS or not folder.parent.exists())
        assert PREDICTIONS.is_dir()
    else:
        time.sleep(3)
        assert folder.is_dir()
        shutil.rmtree(folder)


# Simultaneous and cancelled requests


def test_eight_simultaneous_requests_succeed_with_the_right_pictures(server: Server) -> None:
    alone = [server.pictures(**QUICK | {"seed": seed}) for seed in range(8)]

    refused: list[dict] = []

    def ask(seed: int) -> list[list[Image.Image]]:
        answers = []
        while len(answers) < 4:  # again at once, when Cog may not have freed the last one's slot yet
            status, reply = server.request("POST", "/predictions", {"input": QUICK | {"seed": seed}})
            if status == 409:
                refused.append(reply)
                assert len(refused) <= 3  # with too few slots it is dozens
                continue
            assert status == 200, reply
            answers.append([decoded(url) for url in reply["output"]])
        return answers

    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(ask, range(8)))
    assert all(same(ours, theirs) for ours, answers in zip(alone, together, strict=True) for theirs in answers)


def test_clients_that_retry_succeed_with_a_single_slot(bare_server: Server) -> None:
    with ThreadPoolExecutor(4) as pool:
        replies = list(pool.map(lambda seed: bare_server.predict(**QUICK | {"seed": seed}), range(4)))
    assert [reply["status"] for reply in replies] == ["succeeded"] * 4


def test_a_sequential_client_never_gets_409(server: Server) -> None:
    asked = [server.request("POST", "/predictions", {"input": QUICK | {"candidates": 2}})[0] for _ in range(40)]
    assert set(asked) == {200}


def slow_inputs(files: Path) -> dict[str, object]:
    return {"prompt": PROMPT, "candidates": 256, "guidance": 2, "replicate_weights": str(files / "slow")}


def test_cancelling_frees_the_slots_at_once(server: Server, files: Path) -> None:
    server.pictures(**slow_inputs(files) | {"candidates": 4})  # loads the weights
    for i in range(SLOTS):
        body = {"input": slow_inputs(files)}
        status, _ = server.request("PUT", f"/predictions/slow-{i}", body, Prefer="respond-async")
        assert status == 202
    wait_for(lambda: server.health()["status"] == "BUSY")
    for i in range(SLOTS):
        assert server.request("POST", f"/predictions/slow-{i}/cancel")[0] == 200
    wait_for(lambda: server.health()["status"] == "READY")
    assert len(server.pictures(**QUICK)) == 2


def test_a_client_that_hangs_up_frees_its_slot(bare_server: Server, files: Path) -> None:
    bare_server.pictures(**slow_inputs(files) | {"candidates": 4})
    body = json.dumps({"input": slow_inputs(files)}).encode()
    with socket.create_connection(("127.0.0.1", bare_server.port)) as client:
        head = f"POST /predictions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        client.sendall(f"{head}\r\n\r\n".encode() + body)
        wait_for(lambda: bare_server.health()["status"] == "BUSY")
        time.sleep(0.7)  # Cog does not hear of one given up in its first instant, before run() has begun
    wait_for(lambda: bare_server.health()["status"] == "READY")


def test_a_cancelled_prediction_has_the_status_canceled(server: Server, files: Path) -> None:
    server.pictures(**slow_inputs(files) | {"candidates": 4})
    replies: list[dict] = []

    def ask() -> None:
        replies.append(server.request("PUT", "/predictions/given-up", {"input": slow_inputs(files)})[1])

    client = threading.Thread(target=ask)
    client.start()
    time.sleep(0.7)  # Cog reports one cancelled in its first instant, before run() has begun, as failed
    wait_for(lambda: server.request("POST", "/predictions/given-up/cancel")[0] == 200)
    client.join()
    assert replies[0]["status"] == "canceled"


def test_pictures_of_earlier_predictions_do_not_fill_the_disk(server: Server, scratch: Path) -> None:
    for seed in range(40):
        server.predict(prompt=PROMPT, candidates=1, num_outputs=1, seed=seed)
    (root,) = scratch.glob("clip-gen-*")
    assert 1 <= len(list(root.iterdir())) <= 32
