"""The server, asked by the clients that people use (design: serving.md 2 and 3)."""

import contextlib
import io
import json
import logging
import random
import struct
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import openai
import pytest
from mutated_requests import bomb_png, data_url, image_message, mutated, png, text_message
from PIL import Image
from running_server import NAME, call, complete, metric, running, wait_until
from tiny_videos import gif, video

from internvlx_jax.inference.remote_images import ImageRules
from internvlx_jax.inference.server_requests import RequestError

SMALL = {"slots": 3, "capacity": 256, "max_tiles": 2, "waiting": 8}


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    root = tmp_path_factory.mktemp("media")
    (root / "page.png").write_bytes(png())
    outside = tmp_path_factory.mktemp("outside") / "secret.png"
    outside.write_bytes(png())
    (root / "link.png").symlink_to(outside)
    return root


@pytest.fixture(scope="module")
def engine(model):
    engine = model.engine(**SMALL)
    engine.start()
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def address(engine, media):
    engine.close, close = lambda: None, engine.close  # several servers share it
    images = ImageRules(media_root=media, max_bytes=2**20, max_video_bytes=2**19)
    with running(lambda: engine, images=images, max_body=2**21) as address:
        wait_until(lambda: call(address, "/health")[0] == 200)
        yield address
    engine.close = close


@pytest.fixture(scope="module")
def client(address):
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


def test_openai_plain_and_streamed(client, model):
    page = png()
    options = dict(model=NAME, messages=image_message("What?", data_url(page)), max_tokens=12)
    wanted = model.generate("What?", page, max_new_tokens=12)
    plain = client.chat.completions.create(**options)
    assert plain.choices[0].message.content == wanted and plain.model == NAME
    usage = plain.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens > model.config.tokens_per_tile

    chunks = list(client.chat.completions.create(**options, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == wanted
    assert chunks[-1].choices[0].finish_reason == plain.choices[0].finish_reason
    assert len({chunk.id for chunk in chunks}) == 1

    counted = list(
        client.chat.completions.create(
            **options, stream=True, stream_options={"include_usage": True}
        )
    )
    assert counted[-1].choices == [] and counted[-1].usage == usage


def test_openai_options(client, model):
    def answer(**options):
        reply = client.chat.completions.create(
            model=NAME, messages=text_message("Tell me."), **({"max_tokens": 20} | options)
        )
        return reply.choices[0]

    greedy = answer().message.content
    assert greedy == model.generate("Tell me.", max_new_tokens=20)
    stop = greedy[3:5]
    stopped = answer(stop=[stop, "never"])
    assert stopped.message.content == greedy[: greedy.index(stop)].strip()
    assert stopped.finish_reason == "stop"
    drawn = [answer(temperature=1.0, top_p=0.9, seed=seed).message.content for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[0] == model.generate(
        "Tell me.", temperature=1.0, top_p=0.9, seed=1, max_new_tokens=20
    )
    extra = {"top_k": 4, "repetition_penalty": 1.4}
    penalized = answer(extra_body=extra | {"metadata": {"chat": 1}}).message.content
    assert penalized == model.generate("Tell me.", repetition_penalty=1.4, max_new_tokens=20)
    assert answer(max_tokens=None, max_completion_tokens=2).finish_reason in ("length", "stop")


def test_openai_conversation(client, model):
    """The history of a client is that of `chat`."""
    page, chat = png(seed=3), model.chat(max_new_tokens=8, system="Be brief.")
    first, second = chat.send("What is it?", page), chat.send("And now?")
    messages = [
        {"role": "system", "content": "Be brief."},
        *image_message("What is it?", data_url(page)),
        {"role": "assistant", "content": first},
        *text_message("And now?"),
    ]
    reply = client.chat.completions.create(model=NAME, messages=messages, max_tokens=8)
    assert reply.choices[0].message.content == second


def test_openai_errors(client, address):
    create = client.chat.completions.create
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        create(model="other", messages=text_message("Hi"))
    with pytest.raises(openai.BadRequestError, match="n must be 1") as raised:
        create(model=NAME, messages=text_message("Hi"), n=2)
    assert raised.value.param == "n"
    with pytest.raises(openai.BadRequestError, match="cannot be read"):
        create(model=NAME, messages=image_message("Hi", data_url(b"no image")))
    with pytest.raises(openai.BadRequestError, match="a slot of this server holds 256"):
        create(model=NAME, messages=text_message("long " * 400), stream=True)
    with pytest.raises(openai.APIStatusError) as raised:
        create(model=NAME, messages=text_message("x" * 2**21))
    assert raised.value.status_code == 413


def test_a_stream_that_is_left_frees_its_slot(client, address):
    cancelled = metric(address, "cancelled_total")
    for _ in range(5):
        stream = client.chat.completions.create(
            model=NAME, messages=text_message("Go on."), max_tokens=220, stream=True
        )
        next(iter(stream))
        stream.close()
    impatient = client.with_options(timeout=0.05)
    with pytest.raises(openai.APITimeoutError):
        impatient.chat.completions.create(
            model=NAME, messages=text_message("Go on."), max_tokens=220
        )
    wait_until(lambda: metric(address, "busy") == 0)
    wait_until(lambda: metric(address, "cancelled_total") > cancelled)


def test_a_full_queue(address):
    body = {"messages": text_message("Go on."), "max_tokens": 200}
    with ThreadPoolExecutor(30) as pool:
        replies = list(pool.map(lambda _: call(address, "/v1/chat/completions", body), range(30)))
    statuses = [status for status, _, _ in replies]
    assert set(statuses) == {200, 429} and statuses.count(200) >= SMALL["slots"]
    refused = next(reply for reply in replies if reply[0] == 429)
    assert refused[1]["retry-after"] == "1"
    assert json.loads(refused[2])["error"]["code"] == "queue_full"


def test_vlmevalkit(address, model):
    """The body that its wrapper of the OpenAI API posts."""
    page = png(seed=5)
    file = io.BytesIO()
    Image.open(io.BytesIO(page)).save(file, "JPEG")
    body = {
        "model": NAME,
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "Read it."},
                    {
                        "type": "image_url",
                        "image_url": {
                            "url": data_url(file.getvalue(), "image/jpeg"),
                            "detail": "low",
                        },
                    },
                ],
            }
        ],
        "max_tokens": 16384,
        "n": 1,
        "temperature": 0,
    }
    headers = {"Content-Type": "application/json", "Authorization": "Bearer sk-123456"}
    status, reply = complete(address, body, **headers)
    room = SMALL["capacity"] - reply["usage"]["prompt_tokens"]
    assert status == 200 and reply["choices"][0]["message"]["content"] == model.generate(
        "Read it.\n<image>", file.getvalue(), max_new_tokens=room
    )


def test_open_webui(address):
    """It lists the models, sends keys of its own, and asks for a title without a stream."""
    status, _, text = call(address, "/v1/models")
    assert status == 200 and [model["id"] for model in json.loads(text)["data"]] == [NAME]
    part = {"type": "text", "text": "Title?", "cache_control": {"type": "ephemeral"}}
    body = {
        "model": NAME,
        "messages": [{"role": "user", "content": [part]}],
        "metadata": {"chat_id": "1"},
        "stream": False,
        "max_tokens": 5,
    }
    status, reply = complete(address, body)
    assert status == 200 and reply["object"] == "chat.completion"
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    status, headers, text = call(address, "/v1/chat/completions", body)
    assert headers["content-type"].startswith("text/event-stream")
    events = text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert json.loads(events[-3].removeprefix("data: "))["choices"] == []


def test_files_below_the_media_folder_only(address, media):
    def error(url):
        body = {"messages": image_message("What?", url), "max_tokens": 2}
        status, reply = complete(address, body)
        return None if status == 200 else (status, reply["error"]["message"])

    assert error((media / "page.png").as_uri()) is None
    outside = (400, "the file is not below the media folder")
    for path in ("../outside/secret.png", "link.png", "absent.png", "", "page.png/../../x"):
        assert error(f"file://{media}/{path}") == outside
    assert error(f"file://{media}/%2e%2e/secret.png") == outside
    assert error("file:///etc/passwd") == error(f"file://host{media}/page.png") == outside
    for url in ("http://localhost/a.png", "gs://bucket/a.png", "/etc/passwd", "ftp://x/y", ""):
        assert "reads images from data:, file:// below the media folder URLs only" in error(url)[1]


def video_message(text, url, **extra):
    parts = [{"type": "video_url", "video_url": {"url": url}}, {"type": "text", "text": text}]
    return {"messages": [{"role": "user", "content": parts}], "max_tokens": 6, **extra}


def test_videos(address, media, model):
    """As `data:` or below the media folder; the frames are those of `generate`."""
    clip = video()
    (media / "clip.mp4").write_bytes(clip)
    (media / "page.mp4").symlink_to(media / "page.png")
    wanted = model.generate("What happens?", video=clip, frames=2, max_new_tokens=6)
    for url in (data_url(clip, "video/mp4"), (media / "clip.mp4").as_uri()):
        status, reply = complete(address, video_message("What happens?", url))
        assert status == 200 and reply["choices"][0]["message"]["content"] == wanted
    for text, prompt in (("It?", "It?"), ("Is <image> it?", "<video>\nIs <image> it?")):
        one = video_message(text, data_url(clip), mm_processor_kwargs={"num_frames": 1})
        picture = {"type": "image_url", "image_url": {"url": data_url(png())}}
        one["messages"][0]["content"].insert(0, picture)
        wanted = model.generate(prompt, png(), video=clip, frames=1, max_new_tokens=6)
        status, reply = complete(address, one)
        assert status == 200 and reply["choices"][0]["message"]["content"] == wanted

    def error(url, **extra):
        status, reply = complete(address, video_message("What?", url, **extra))
        return status, reply["error"]["message"]

    only = "reads videos from data: and file:// below the media folder URLs only"
    for url in ("http://example.org/a.mp4", "https://example.org/a.mp4", "gs://b/a.mp4", "a.mp4"):
        assert error(url)[0] == 400 and only in error(url)[1]
    outside = (400, "the file is not below the media folder")
    assert error("file:///etc/passwd") == error(f"file://{media}/../x.mp4") == outside
    for bad in (b"junk", b"", clip[:400], png(), b"#EXTM3U\n#EXTINF:5,\n/etc/passwd\n"):
        status, message = error(data_url(bad))
        assert status == 400 and "the video cannot be decoded" in message
    assert "cannot be decoded" in error((media / "page.mp4").as_uri())[1]
    assert error(data_url(bytes(2**20)))[0] == 413, "more bytes than a video of this server has"
    bomb = b"GIF89a" + struct.pack("<HH", 10_000, 10_000) + gif(2)[10:]
    assert "10000 x 10000 pixels are more than" in error(data_url(bomb))[1]
    for odd in (0, 3, "x", 1e9):
        extra = {"mm_processor_kwargs": {"num_frames": odd}}
        assert error(data_url(clip), **extra)[0] == 400
    monkey = ImageRules(video_seconds=0.0)
    with pytest.raises(RequestError, match="decoding the video takes over 0 s"):
        monkey.read_video(data_url(clip), "url", 2, model.config.prompt.tiles)


class _Images(BaseHTTPRequestHandler):
    """Serves an image, redirects, and a body that never ends."""

    def do_GET(self):
        target = {"/away": "http://169.254.1.1/x.png", "/local": "file:///etc/passwd"}
        if self.path in target:
            self.send_response(302)
            self.send_header("Location", target[self.path])
            self.end_headers()
            return
        self.send_response(200 if self.path != "/gone" else 404)
        self.end_headers()
        with contextlib.suppress(OSError):
            for _ in range(1 if self.path != "/endless" else 10**6):
                self.wfile.write(png() if self.path != "/endless" else bytes(2**16))

    def log_message(self, *_):
        pass


def test_images_behind_urls(monkeypatch):
    """Public hosts only, checked after the name is resolved and after each redirect."""
    web = ThreadingHTTPServer(("127.0.0.1", 0), _Images)
    threading.Thread(target=web.serve_forever, daemon=True).start()
    base, rules = f"http://127.0.0.1:{web.server_port}", ImageRules(True, max_bytes=2**20)

    def problem(url):
        try:
            rules.read(url, "url")
        except Exception as error:
            return str(error)
        return None

    private = "the host of the image is not a public one"
    hosts = ("127.0.0.1", "localhost", "10.0.0.1", "192.168.1.1", "169.254.169.254", "[::1]")
    for host in (*hosts, "0.0.0.0", "[::ffff:127.0.0.1]", "[fd00::1]", "2130706433"):
        assert problem(f"http://{host}/a.png") in (private, "the host of the image is unknown")
    assert problem(base) == private
    monkeypatch.setattr(
        "internvlx_jax.inference.remote_images._is_public", lambda ip: ip == "127.0.0.1"
    )
    assert rules.read(base, "url").data == png()
    assert problem(f"{base}/away") == private
    assert "is not http(s)" in problem(f"{base}/local")
    assert "has more than 1048576 bytes" in problem(f"{base}/endless")
    assert "status 404" in problem(f"{base}/gone")
    web.shutdown()


def test_a_key(engine):
    engine.close, close = lambda: None, engine.close
    with running(lambda: engine, api_key="sesame") as address:
        body = {"messages": text_message("Hi"), "max_tokens": 2}
        wait_until(lambda: call(address, "/health")[0] == 200)
        for headers in ({}, {"Authorization": "Bearer"}, {"Authorization": "Bearer sésame"}):
            status, reply = complete(address, body, **headers)
            assert status == 401 and reply["error"]["type"] == "authentication_error"
        assert call(address, "/v1/models")[0] == 401
        assert complete(address, body, Authorization="Bearer sesame")[0] == 200
    engine.close = close


def test_while_it_loads_and_when_it_fails(model):
    go = threading.Event()

    def fail():
        go.wait()
        raise RuntimeError("no checkpoint")

    with running(fail) as address:
        assert json.loads(call(address, "/health")[2]) == {"status": "loading"}
        status, reply = complete(address, {"messages": text_message("Hi")})
        assert status == 503 and reply["error"]["message"] == "the model is loading"
        assert "internvlx_ready 0" in call(address, "/metrics")[2]
        go.set()
        wait_until(lambda: "failed" in call(address, "/health")[2])


def test_closing_finishes_what_runs(model):
    engine = model.engine(**SMALL)
    engine.start()
    body = {"messages": text_message("Go on."), "max_tokens": 150}
    with running(lambda: engine) as address, ThreadPoolExecutor(2) as pool:
        wait_until(lambda: call(address, "/health")[0] == 200)
        replies = [pool.submit(complete, address, body) for _ in range(2)]
        wait_until(lambda: metric(address, "busy") == 2)
    assert [reply.result()[0] for reply in replies] == [200, 200]


def test_a_line_in_the_log_for_each_call(address, caplog):
    logging.getLogger("internvlx_jax").propagate = True
    with caplog.at_level(logging.INFO, logger="internvlx_jax.inference.server"):
        complete(address, {"messages": text_message("Hi"), "max_tokens": 2})
        complete(address, {"messages": []})
    lines = [json.loads(record.getMessage()) for record in caplog.records]
    assert [line["status"] for line in lines] == [200, 400]
    assert lines[0]["new_tokens"] in (1, 2) and lines[0]["seconds"] > 0


def test_the_page_is_one_file(address):
    status, headers, text = call(address, "/")
    assert status == 200 and headers["content-type"].startswith("text/html")
    assert "http://" not in text and "https://" not in text


def test_hostile_requests(address):
    """Whatever is sent gets a reply with an error in JSON, and the next request an answer."""
    draw = random.Random(0)
    bomb = bomb_png()
    for number in range(400):
        status, _, text = call(address, "/v1/chat/completions", mutated(draw, NAME, bomb))
        assert status == 200 or 400 <= status < 500, (number, text)
        assert status == 200 or set(json.loads(text)["error"]) == {
            "message", "type", "param", "code",
        }  # fmt: skip
    status, reply = complete(address, {"messages": text_message("Still there?"), "max_tokens": 4})
    assert status == 200
    assert metric(address, "compiles_total") == 0 == metric(address, "busy")
