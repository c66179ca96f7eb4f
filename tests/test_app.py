"""The page to draw on, asked as a browser asks it, and as one who means no good."""

import asyncio
import base64
import gc
import io
import json
import os
import re
import socket
import struct
import subprocess
import sys
import time
import warnings
import zlib
from pathlib import Path
from subprocess import PIPE, STDOUT

import httpx
import numpy as np
import pytest

reason = "the page needs gradio: pip install -r requirements-app.txt"
pytestmark = pytest.mark.filterwarnings("default")  # what gradio is warned of is not ours
with pytest.MonkeyPatch.context() as patch:
    patch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    pytest.importorskip("gradio", reason=reason)

import clients
from gradio.components.image_editor import EditorDataBlobs
from PIL import Image
from test_pipeline import tiny, trained  # noqa: F401  (fixtures)

from images import PictureError
from params import Sampling
from pipeline import DiffusionPipeline, Edit
from sharing.page import build, draw, edit_of, launch, way

ROOT = Path(__file__).parent.parent
JSON = {"Content-Type": "application/json"}
USUAL = {
    "prompt": "red disc", "number": 1, "seed": 3, "c": 7, "steps": 10, "sampler": "dpmpp_2m", "negative": "",
    "transparent": True, "sketch": None, "strength": 0.6,
}  # fmt: skip


@pytest.fixture(scope="module")
def pipeline(trained):  # noqa: F811
    return DiffusionPipeline(trained)


@pytest.fixture(scope="module")
def address(pipeline, tmp_path_factory):
    """Where the page is served, from a process that reaches no other machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("uploads")))
        page = build(pipeline, "about")
        yield launch(page, "127.0.0.1", None).rstrip("/")
        page.close()
    del page
    asyncio.set_event_loop(None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # gradio leaves the event loop of its server open
        gc.collect()


def ask(address, name="draw", **changes):
    """The answers to one request: events with what they carry."""
    asked = list(({**USUAL, **changes} if name == "draw" else changes).values())
    body = json.dumps({"data": asked})  # which may hold NaN
    joined = httpx.post(f"{address}/gradio_api/call/{name}", content=body, headers=JSON)
    if joined.status_code != 200:
        return [("refused", joined.text)]
    stream = httpx.get(f"{address}/gradio_api/call/{name}/{joined.json()['event_id']}", timeout=100)
    return re.findall(r"event: (\w+)\ndata: (.*)", stream.text)


def saved(page):
    """Names and bytes of the files that a page offers."""
    links = re.findall(r'download="([^"]*)" href="data:image/\w+;base64,([^"]*)"', page)
    return {name: base64.b64decode(data) for name, data in links}


def test_a_saved_picture_is_the_file_that_generate_image_writes(address, pipeline, tmp_path):
    *_, (event, data) = ask(address, number=2, negative="blue <b>box</b>")
    assert event == "complete"
    files = saved(json.loads(data)[0])
    assert list(files) == ["red_disc_3.png", "red_disc_4.png"]
    for seed, data in zip((3, 4), files.values(), strict=True):
        path = tmp_path / f"{seed}.png"
        pipeline.generate_image("red disc", path, steps=10, seed=seed, negative_prompt="blue <b>box</b>")
        assert data == path.read_bytes()


def test_pictures_are_seen_while_they_are_drawn(pipeline):
    first, *previews, last = draw(pipeline, **USUAL)
    assert "Drawing" in first
    assert len(previews) == 5  # after every second of ten steps
    film = pipeline.denoising("red disc", Sampling(steps=10), seed=3)
    for number, page in enumerate(previews):
        shown = base64.b64decode(re.search(r'src="data:image/png;base64,([^"]*)"', page)[1])
        np.testing.assert_array_equal(Image.open(io.BytesIO(shown)), film[2 * number + 1])
        assert not saved(page)
    [data] = saved(last).values()
    np.testing.assert_array_equal(Image.open(io.BytesIO(data)), film[-1])


def test_what_people_write_stays_text(pipeline):
    *_, page = draw(pipeline, **USUAL | {"prompt": '"><script>alert(1)</script>\x00\u202e🐶'})
    assert "<script" not in page
    assert list(saved(page)) == ["script_alert_1_script_3.png"]
    *_, page = way(pipeline, "<b>", "disc", 2, 0, 7, 10, "ddim", "")
    assert "<b>" not in page


def test_a_way_is_a_film_and_a_strip_that_says_how_it_was_drawn(pipeline):
    *_, page = way(pipeline, "red disc", "blue box", 3, 5, 7, 10, "ddim", "")
    film, strip = (Image.open(io.BytesIO(data)) for data in saved(page).values())
    assert (film.format, film.n_frames) == ("GIF", 5)
    assert {"prompt": "red disc", "seed": "5", "to": "blue box", "frames": "3"}.items() <= strip.text.items()


def test_transparency_is_kept_or_laid_on_white(pipeline, monkeypatch):
    see_through = Image.new("RGBA", (12, 8), (10, 20, 30, 0))
    monkeypatch.setattr(pipeline, "watch", lambda *_, **__: iter([[see_through]]))
    for transparent, mode, pixel in ((True, "RGBA", (10, 20, 30, 0)), (False, "RGB", (255, 255, 255))):
        *_, page = draw(pipeline, **USUAL | {"transparent": transparent})
        [picture] = (Image.open(io.BytesIO(data)) for data in saved(page).values())
        assert (picture.mode, picture.getpixel((0, 0))) == (mode, pixel)


def png(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def test_only_what_was_painted_over_is_drawn_anew(pipeline):
    photo = Image.fromarray(np.random.default_rng(1).integers(0, 256, (8, 12, 3)).astype(np.uint8))
    paint = Image.new("RGBA", photo.size)
    sketch = EditorDataBlobs(background=png(photo), layers=[png(paint)], composite=None)
    assert edit_of(sketch, 0.4, pipeline.shape)._replace(image=None) == Edit(None, 0.4)
    paint.paste((255, 0, 0, 255), (0, 0, 6, 8))
    sketch.layers = [png(paint)]
    *_, page = draw(pipeline, **USUAL | {"sketch": sketch})
    [picture] = (Image.open(io.BytesIO(data)) for data in saved(page).values())
    same = (np.asarray(picture) == np.asarray(photo)).all(-1)
    assert same[:, 6:].all()
    assert not same[:, :6].all()
    assert edit_of(EditorDataBlobs(background=None, layers=[], composite=None), 1, pipeline.shape) is None


def bomb():
    """A PNG of a few bytes that says it has 60,000 x 60,000 pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(9999))) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("data", [bomb(), b"", b"GIF89a", b"<svg/>", png(Image.new("F", (3, 3)).convert("L"))[:40]])
def test_uploads_that_are_no_pictures_are_refused(pipeline, data):
    with pytest.raises(PictureError):
        edit_of(EditorDataBlobs(background=data, layers=[], composite=None), 1, pipeline.shape)


def malformed():
    """Requests that no browser sends."""
    odd = [
        None,
        True,
        [],
        {},
        "x",
        "9" * 400,
        -1,
        1e308,
        float("nan"),
        float("inf"),
        2**70,
        [[[[]]]],
        "\x00",
        "../../x",
    ]
    for field in ("number", "seed", "c", "steps", "sampler", "strength"):
        for value in odd:
            yield {field: value}
    for text in ("", " ", "x" * 301, "\ud83d", 7, None, ["red"], {"path": "/etc/passwd"}):
        yield {"prompt": text}
        yield {"negative": text if text != "" else "y" * 10_000}
    for path in (
        "/etc/passwd",
        "app.py",
        "../app.py",
        "~/.bashrc",
        "http://192.0.2.1/a.png",
        "file:///etc/passwd",
        "\x00",
    ):
        file = {"path": path, "url": path, "meta": {"_type": "gradio.FileData"}}
        yield {"sketch": {"background": file, "layers": [], "composite": None}}
        yield {"sketch": {"background": None, "layers": [file] * 3, "composite": file}}
        yield {"prompt": file}
    for sketch in ("x", 7, [], {"background": "x"}, {"id": 7}, {"id": "unknown"}, {"layers": {"a": 1}}):
        yield {"sketch": sketch}


def times():
    """When each file of this project was last written, but those of other programs, such as .git."""
    return {path: path.stat().st_mtime_ns for path in (*ROOT.glob("[!.]*"), *(ROOT / "sharing").glob("*.py*"))}


def test_malformed_requests_leave_it_serving_and_touch_no_file(address, monkeypatch):
    before = times()
    reached = []
    connect, requests = socket.socket.connect, list(malformed())
    monkeypatch.setattr(socket.socket, "connect", lambda s, to: reached.append(to) or connect(s, to))
    assert len(requests) > 100
    for request in requests:
        *_, (event, data) = ask(address, **request)
        [(field, value)] = request.items()
        harmless = field in ("prompt", "negative", "sketch") or value in (None, True)  # may be drawn after all
        assert event in ("error", "refused") or harmless, (request, event)
        assert "root:" not in data
    for body in (b"", b"{", b"[" * 10_000, b'{"data": 7}', b'{"data": []}', b"\xff" * 100):
        httpx.post(f"{address}/gradio_api/call/draw", content=body, headers=JSON)
    assert ask(address)[-1][0] == "complete"
    assert {to[0] for to in reached} <= {"127.0.0.1"}
    assert times() == before


def test_the_program_serves_until_it_is_ended_and_asks_no_other_machine(trained, tmp_path):  # noqa: F811
    command = [sys.executable, ROOT / "app.py", "--checkpoint", trained, "--port", "7899"]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, stdout=PIPE, stderr=STDOUT, text=True, env=environment) as process:
        line = next((line for line in process.stdout if " draws at " in line), "")
        try:
            address = re.search(r"http://127\.0\.0\.1:7899", line)[0]
            file = {"path": "http://example.org/a.png", "meta": {"_type": "gradio.FileData"}}
            began = time.perf_counter()
            assert ask(address, prompt=file)[-1][0] == "error"
            assert time.perf_counter() - began < 30  # of another machine it would wait for longer
            assert ask(address)[-1][0] == "complete"
        finally:
            process.terminate()
            said = process.stdout.read()
    assert "is another machine; this page asks none" in said
    assert not list(tmp_path.iterdir())  # uploads are gone


def test_other_machines_are_out_of_reach():
    code = """if True:
        import socket, app
        app.stay_here("127.0.0.1")
        with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()):
            print("here")
        for address in ("192.0.2.1", "gradio.app", "::2"):
            try:
                socket.create_connection((address, 80), timeout=5)
            except PermissionError as error:
                print(error)
    """
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    names = re.findall(r"(\S+) is another machine", said.stdout)
    assert (said.stdout[:4], names) == ("here", ["192.0.2.1", "gradio.app", "::2"]), said.stderr


@pytest.mark.slow
def test_clients_are_all_served(trained, tmp_path, monkeypatch):  # noqa: F811
    words = ["--checkpoint", trained, "--clients", 3, "--seconds", 3, "--output", tmp_path / "clients.json"]
    monkeypatch.setattr(sys, "argv", ["clients.py", *map(str, words)])
    clients.main()
    found = json.loads((tmp_path / "clients.json").read_text())
    assert found["failed"] == 0
    assert found["pictures"] >= 3
    assert 0 < found["median_seconds"] <= found["95th_percentile_seconds"] <= found["longest_seconds"]
