"""The proxy of deploy/ in front of Cog's real server: what passes, and what does not."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cog_server import Server, decoded, running, wait_for
from doors import NGINX, Door, open_door
from model_files import slow_folder, web_server
from webhooks import Receiver, receiver

from clip_gen.files import ROOT
from clip_gen.serving.openapi import build_schema

pytestmark = NGINX
QUICK = {"prompt": "a star", "candidates": 2, "num_outputs": 1, "seed": 7}
HASTY = {
    "rate=5r/s": "rate=1000r/s",
    "connections 20": "connections 100",
    "client_body_timeout 10s": "client_body_timeout 1s",
}


@pytest.fixture(scope="module")
def server(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    scratch = tmp_path_factory.mktemp("scratch")
    settings = {"COG_WEIGHTS": str(tiny_model_folder), "CLIP_GEN_ALLOW_WEIGHTS": "any"}
    with running([str(ROOT / "script" / "serve")], scratch, scratch, **settings) as server:
        yield server.wait_until_set_up()


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """A request that takes many seconds."""
    slow = str(slow_folder(tmp_path_factory.mktemp("models") / "slow"))
    return {"input": {"prompt": "a star", "candidates": 256, "guidance": 2, "replicate_weights": slow}}


@pytest.fixture(scope="module")
def hooks() -> Iterator[Receiver]:
    with receiver() as started:
        yield started


@pytest.fixture(scope="module")
def door(server: Server, hooks: Receiver, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    """Its rate is too high to matter."""
    folder = tmp_path_factory.mktemp("nginx") / "door"
    settings = {"DOOR_WEBHOOKS": f"https://hooks.example.com {hooks.address}"}
    with open_door(folder, server.port, changes=HASTY, **settings) as door:
        yield door


def test_a_prediction_passes_with_and_without_an_id(door: Door) -> None:
    for method, path in (("POST", "/predictions"), ("PUT", "/predictions/mine-1_A")):
        status, reply = door.ask(method, path, {"input": QUICK})
        assert (status, reply["status"]) == (200, "succeeded"), reply
        assert decoded(reply["output"][0]).size == (16, 16)


def test_health_check_tells_only_the_state_and_needs_no_token(door: Door) -> None:
    assert door.ask("GET", "/health-check", Authorization="") == (200, {"status": "READY"})


def test_health_check_answers_503_without_a_server(tmp_path: Path) -> None:
    with open_door(tmp_path / "door", predictions=9) as door:
        assert door.ask("GET", "/health-check") == (503, {"status": "UNREACHABLE"})
        status, reply = door.ask("POST", "/predictions", {"input": QUICK})
        assert (status, reply["detail"]) == (503, "the server is not ready; try again later")


def test_the_schema_passes(door: Door) -> None:
    assert door.ask("GET", "/openapi.json") == (200, build_schema())


@pytest.mark.parametrize("header", ["", "Bearer", "Bearer wrong", "Basic YTpi", "bearer a-token-for-tests"])
def test_without_the_token_nothing_passes(door: Door, header: str) -> None:
    asked = [("POST", "/predictions"), ("PUT", "/predictions/a"), ("POST", "/predictions/a/cancel")]
    for method, path in [*asked, ("GET", "/openapi.json")]:
        assert door.ask(method, path, {"input": QUICK}, Authorization=header)[0] == 401


def test_a_proxy_without_a_token_lets_nobody_in(server: Server, tmp_path: Path) -> None:
    with open_door(tmp_path / "door", server.port, DOOR_TOKEN="") as door:
        for header in ("Bearer ", "Bearer undefined", ""):
            assert door.ask("POST", "/predictions", {"input": QUICK}, Authorization=header)[0] == 401


@pytest.mark.parametrize(
    ("method", "path"),
    [
        *[("POST", "/shutdown"), ("GET", "/"), ("GET", "/docs"), ("POST", "/predictions/../shutdown")],
        *[("POST", "/predictions/%2e%2e/shutdown"), ("POST", "//shutdown"), ("POST", "/predictions/a/../../shutdown")],
        *[("PUT", "/predictions/a%2Fb"), ("PUT", "/predictions/..%2f..%2fx"), ("PUT", "/predictions/a.b")],
        *[("PUT", "/predictions/%00"), ("PUT", "/predictions/a%0A"), ("POST", "/trainings"), ("PUT", "/trainings/a")],
        *[("POST", "/predictions/a/b/cancel"), ("POST", "/predictions/"), ("GET", "/door/schema")],
    ],
)
def test_other_addresses_do_not_pass(server: Server, door: Door, method: str, path: str) -> None:
    status, _ = door.ask(method, path, {"input": QUICK})
    assert status in (400, 404), path
    assert server.process.poll() is None


def test_other_methods_do_not_pass(door: Door) -> None:
    for method, path in (("GET", "/predictions"), ("GET", "/predictions/a"), ("DELETE", "/predictions/a")):
        assert door.ask(method, path)[0] == 405


@pytest.mark.parametrize("name", ["../../x", "/etc/x", "", "a b", "a.b", "a\u0000", "a\n", "x" * 65, 7, None, ["a"]])
def test_an_id_has_letters_digits_dashes_and_underscores_only(door: Door, name: object) -> None:
    said = door.refused("POST", "/predictions", {"id": name, "input": QUICK})
    assert said == "an id has 1 to 64 letters, digits, - and _"


def test_a_long_id_in_the_address_is_refused_too(door: Door) -> None:
    assert "1 to 64 letters" in door.refused("PUT", f"/predictions/{'x' * 65}", {"input": QUICK})
    assert "not that of the address" in door.refused("PUT", "/predictions/a", {"id": "b", "input": QUICK})


def test_an_id_that_is_given_twice_reaches_the_server_once(door: Door, tmp_path: Path) -> None:
    """Two readers of such a body may each take another one."""
    bad = f'"id": "../../..{tmp_path}/x", '
    status, reply = door.ask("POST", "/predictions", "{" + bad + '"id": "good", "input": ' + json.dumps(QUICK) + "}")
    assert (status, reply["id"]) == (200, "good")
    assert "letters" in door.refused("POST", "/predictions", '{"id": "good", ' + bad + '"input": {"prompt": "a"}}')
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "webhook",
    [
        *["http://hooks.example.com/x", "https://hooks.example.com.evil.org/", "https://hooks.example.com@10.0.0.1/"],
        *["https://hooks.example.com:8443/", "https://hooks.example.com\\@10.0.0.1/", "http://169.254.169.254/", "", 7],
        *["https://hooks.example.com/\n", " https://hooks.example.com/", "file:///etc/passwd", None],
    ],
)
def test_a_webhook_that_is_not_listed_is_refused(door: Door, webhook: object) -> None:
    assert "this webhook is not allowed" in door.refused("POST", "/predictions", {"input": QUICK, "webhook": webhook})


def test_an_asynchronous_prediction_is_followed_by_webhook_and_by_asking_again(door: Door, hooks: Receiver) -> None:
    asked = {"input": QUICK, "webhook": f"{hooks.address}/done", "webhook_events_filter": ["completed"]}
    status, reply = door.ask("PUT", "/predictions/followed", asked, Prefer="respond-async")
    assert (status, reply["id"]) == (202, "followed")
    wait_for(lambda: bool(hooks.messages), seconds=60)
    [message] = hooks.messages
    assert (message["id"], message["status"], len(message["output"])) == ("followed", "succeeded", 1)


def wait_until_under_way(server: Server, name: str) -> None:
    wait_for(lambda: f'"Starting prediction","prediction_id":"{name}"' in server.log.read_text(), seconds=60)
    time.sleep(0.5)  # Cog 0.23.1 loses a cancel that comes earlier


def test_a_prediction_is_cancelled_by_its_id(server: Server, door: Door, long: dict) -> None:
    assert door.ask("PUT", "/predictions/long", long, Prefer="respond-async")[0] == 202
    assert door.ask("PUT", "/predictions/long", long, Prefer="respond-async")[1]["status"] in ("starting", "processing")
    wait_until_under_way(server, "long")
    assert door.ask("POST", "/predictions/long/cancel")[0] == 200
    wait_for(lambda: door.ask("POST", "/predictions/long/cancel")[0] == 404)


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        *[("", '"input"'), ("[]", '"input"'), ('{"input": []}', '"input"'), ("{", '"input"'), ("null", '"input"')],
        ({"input": QUICK | {"promt": "a"}}, 'there is no input "promt"; the inputs are candidates, clip_rerank,'),
        ({"input": QUICK, "output_file_prefix": "http://10.0.0.1/"}, "nothing else"),
        ({"input": QUICK | {"images": "http://10.0.0.1/a.zip"}}, 'there is no input "images"'),
    ],
)
def test_a_body_with_other_contents_is_refused(door: Door, body: object, sentence: str) -> None:
    assert sentence in door.refused("POST", "/predictions", body)


def test_replies_of_the_server_pass_unchanged(door: Door) -> None:
    status, reply = door.ask("POST", "/predictions", {"input": {"prompt": 5}})
    assert (status, reply["detail"][0]["loc"]) == (422, ["body", "input", "prompt"])
    status, reply = door.ask("POST", "/predictions", {"input": QUICK | {"replicate_weights": "/etc/passwd"}})
    assert (status, reply["status"]) == (200, "failed")


@pytest.mark.parametrize("url", ["http://169.254.169.254/a.png", "https://example.com/a.png", "/etc/passwd", 7])
def test_a_picture_comes_as_a_data_url_or_from_listed_addresses(door: Door, url: object) -> None:
    said = door.refused("POST", "/predictions", {"input": {"candidates": 2, "image": url}})
    assert said.startswith("image may not come from there")


def test_a_picture_as_a_data_url_passes(door: Door) -> None:
    url = door.ask("POST", "/predictions", {"input": QUICK})[1]["output"][0]
    status, reply = door.ask("POST", "/predictions", {"input": {"candidates": 2, "num_outputs": 1, "image": url}})
    assert (status, reply["status"]) == (200, "succeeded"), reply


def test_a_large_body_is_refused(door: Door) -> None:
    assert door.ask("POST", "/predictions", {"input": QUICK | {"prompt": "x" * 3_000_000}})[0] == 413


def test_a_client_that_sends_slowly_is_cut_off(door: Door) -> None:
    with socket.create_connection(("127.0.0.1", door.port), timeout=20) as client:
        client.sendall(b"POST /predictions HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n{")
        started = time.monotonic()
        client.recv(1000)
        assert time.monotonic() - started < 15


def test_a_client_that_hangs_up_cancels_its_prediction(server: Server, door: Door, long: dict) -> None:
    body = json.dumps(long | {"id": "hung-up"})
    head = "POST /predictions HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer a-token-for-tests\r\n"
    with socket.create_connection(("127.0.0.1", door.port)) as client:
        client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        wait_until_under_way(server, "hung-up")
    wait_for(lambda: server.request("POST", "/predictions/hung-up/cancel")[0] == 404)


def test_more_requests_than_the_rate_get_429(tmp_path: Path) -> None:
    with open_door(tmp_path / "door", predictions=9) as door:
        got = [door.ask("POST", "/predictions", {"input": QUICK}, Authorization="")[0] for _ in range(60)]
    assert got[:20] == [401] * 20
    assert 429 in got
    assert set(got) == {401, 429}


def test_trainings_pass_where_they_are_wanted_with_pictures_from_listed_addresses(
    server: Server, tmp_path: Path
) -> None:
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "photos.zip").write_bytes(b"no archive")
    command = [str(ROOT / "script" / "serve"), "--x-mode", "train"]
    with web_server(tmp_path / "files") as website, running(command, tmp_path, tmp_path) as trainer:
        settings = {"DOOR_TRAININGS": "1", "DOOR_IMAGES": website}
        with open_door(tmp_path / "door", server.port, trainer.wait_until_set_up().port, HASTY, **settings) as door:
            for elsewhere in ("http://127.0.0.1:9/a.zip", "/etc/passwd", f"{website}.evil.org/a", ["data:,"]):
                said = door.refused("POST", "/trainings", {"input": {"images": elsewhere}})
                assert said.startswith("images may not come from there")
            status, reply = door.ask("POST", "/trainings", {"input": {"images": f"{website}/photos.zip"}})
    assert (status, reply["status"]) == (200, "failed")
    assert "images (photos.zip)" in reply["error"]


def test_the_log_of_the_server_is_json_with_the_ids_of_predictions(server: Server, door: Door) -> None:
    """The format in docs/deploy.md."""
    assert door.ask("PUT", "/predictions/logged", {"input": QUICK})[0] == 200
    wait_for(lambda: '"Prediction worker completed","prediction_id":"logged"' in server.log.read_text())
    lines = [json.loads(line) for line in server.log.read_text().splitlines()]
    assert all({"timestamp", "level", "fields", "target"} == set(line) for line in lines)
    fields = [line["fields"] for line in lines if line["fields"].get("prediction_id") == "logged"]
    assert fields[0]["message"] == "Starting prediction"
    assert {"message": "seed: 7", "prediction_id": "logged", "source": "Stdout"} in fields
    assert fields[-1]["predict_time"] > 0


def test_the_log_of_the_proxy_has_a_line_of_json_for_each_request_without_the_token(tmp_path: Path) -> None:
    with open_door(tmp_path / "door", predictions=9) as other:
        other.ask("POST", '/predictions?"', {"input": QUICK})
    text = (tmp_path / "door" / "log").read_text()
    lines = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    assert [(line["method"], line["path"], line["status"]) for line in lines] == [("POST", "/predictions", 503)]
    assert "a-token-for-tests" not in text
