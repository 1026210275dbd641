"""The judge's client against a server of this test: cache, retries, refusals, nonsense.

(design: evaluation.md 7)
"""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from internvlx_jax.evaluation.job_config import JudgeConfig
from internvlx_jax.evaluation.judge import (
    EndpointJudge,
    JudgeError,
    JudgeRequest,
    NoJudge,
    ask_until,
    fill,
)
from internvlx_jax.evaluation.rescore import rescore


@pytest.fixture
def server():
    """Starts an endpoint that answers from `replies` in turn, then "1".

    A reply is a text, a number as status, or raw bytes. `meeting` lets it answer only when so many
    requests are under way, and `most` is how many there were.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                server.asked.append((self.path, self.headers.get("Authorization"), body))
                reply = server.replies.pop(0) if server.replies else "1"
                server.running += 1
                server.most = max(server.most, server.running)
            if server.meeting is not None:
                server.meeting.wait(60)
            with lock:
                server.running -= 1
            status = reply if isinstance(reply, int) else 200
            content = None if reply == "refuse" else reply
            chat = {"choices": [{"message": {"content": content}}]}
            data = reply if isinstance(reply, bytes) else json.dumps(chat).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    lock = threading.Lock()
    server = ThreadingHTTPServer(("localhost", 0), Handler)
    server.asked, server.replies = [], []
    server.running, server.most, server.meeting = 0, 0, None
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def judge(server, tmp_path):
    def judge(model="m", **options) -> EndpointJudge:
        url = f"http://localhost:{server.server_port}/v1"
        return EndpointJudge(url, model, tmp_path / "cache", pause=0.001, **options)

    return judge


def test_replies_come_in_order_and_once(server, judge, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    requests = [JudgeRequest(f"q{i}") for i in range(20)]
    first = judge()
    server.replies = [f"r{i}" for i in range(20)]
    replies = first.ask(requests)
    asked = {body["messages"][0]["content"]: i for i, (_, _, body) in enumerate(server.asked)}
    assert replies == [f"r{asked[f'q{i}']}" for i in range(20)]
    assert judge().ask(requests) == replies and len(server.asked) == 20, (
        "the second time from the cache"
    )
    path, key, body = server.asked[0]
    assert (path, key) == ("/v1/chat/completions", "Bearer secret")
    assert body["temperature"] == 0 and "max_tokens" not in body
    assert "secret" not in "".join(file.read_text() for file in first.cache.iterdir())
    assert first.describe()["model"] == "m" and len(first.describe()["dates"]) == 1


def test_what_is_a_new_question_to_the_judge(server, judge):
    different = (
        JudgeRequest("q"),
        JudgeRequest("q", temperature=0.5),
        JudgeRequest("q", attempt=1),
        JudgeRequest("q", system="s"),
        JudgeRequest("q2"),
    )
    for model, request in (("n", JudgeRequest("q")), *(("m", request) for request in different)):
        judge(model).ask([request, request])
    assert len({json.dumps(body) for _, _, body in server.asked}) == 5, (
        "a try is not part of the body"
    )
    assert len(server.asked) == 6
    assert any(
        body["messages"][0] == {"role": "system", "content": "s"} for _, _, body in server.asked
    )


def test_busy_servers_and_nonsense_are_retried(server, judge):
    server.replies = [503, 429, b"<html>", b'{"choices": []}', "fine"]
    assert judge().ask([JudgeRequest("q")]) == ["fine"]
    assert len(server.asked) == 5


def test_a_refusal_is_an_empty_reply(server, judge):
    server.replies = ["refuse"]
    assert judge().ask([JudgeRequest("q")]) == [""]


def test_a_wrong_key_fails_at_once_with_the_reason(server, judge, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    server.replies = [401]
    with pytest.raises(JudgeError, match="status 401.*--judge_url") as error:
        judge().ask([JudgeRequest("q")])
    assert len(server.asked) == 1 and "secret" not in str(error.value)


def test_what_came_before_a_failure_stays(server, judge):
    server.replies = ["a", 400]
    with pytest.raises(JudgeError):
        judge(workers=1).ask([JudgeRequest("q1"), JudgeRequest("q2")])
    server.replies = ["b"]
    assert judge().ask([JudgeRequest("q1"), JudgeRequest("q2")]) == ["a", "b"]


@pytest.mark.parametrize("workers", [1, 3])
def test_requests_run_at_a_time(server, judge, workers):
    """`--judge_concurrency`: so many requests are under way at once, and never more."""
    server.meeting = threading.Barrier(workers)
    replies = judge(workers=workers).ask([JudgeRequest(f"q{i}") for i in range(2 * workers)])
    assert len(replies) == 2 * workers and server.most == workers


def test_no_server(tmp_path):
    with pytest.raises(JudgeError, match="gives no answer"):
        EndpointJudge("http://localhost:9", "m", tmp_path, retries=2, pause=0.001).ask(
            [JudgeRequest("q")]
        )


def test_asking_until_understood():
    asked = NoJudge()
    assert ask_until(asked, ["a", "b"], int, temperatures=(0, 1)) == [None, None]
    assert [request.attempt for request in asked.requests] == [0, 0], (
        "a missing judge is not asked again"
    )


def test_fields_are_filled_in_one_pass():
    text = fill("yes_no", question="{prediction}", prediction="{question}")
    assert text.endswith("Question: {prediction}?\nAnswer: {question}\nYour output: ")


def test_rescoring_adds_the_judge_later(server, judge, configure, run_on, data_root, tmp_path):
    settings = dict(
        tasks="mmvet", data_root=str(data_root), max_new_tokens=6, batch_size=8, dynamic=False
    )
    (pending,) = run_on(configure(tmp_path / "out", **settings))
    folder = tmp_path / "out" / "run" / "mmvet"
    assert (pending.score, pending.judge) == (None, "pending")
    assert "2 requests to a judge are in judge_requests.jsonl" in pending.notes[-1]
    config = JudgeConfig(url=f"http://localhost:{server.server_port}", model="m")
    server.replies = ["0.5", 401]
    with pytest.raises(JudgeError):
        rescore(str(folder / "predictions.jsonl"), data_root=str(data_root), judge=config)
    assert (folder / "judge_requests.jsonl").is_file(), "still pending"
    server.replies = ["0.5"] * 2
    summary = rescore(str(folder / "predictions.jsonl"), data_root=str(data_root), judge=config)
    assert (summary.score, summary.judge["model"]) == (50, "m")
    assert not (folder / "judge_requests.jsonl").exists()
    asked = len(server.asked)
    assert (
        rescore(str(folder / "predictions.jsonl"), data_root=str(data_root), judge=config)
        == summary
    )
    assert len(server.asked) == asked
