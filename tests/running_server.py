"""Runs the server in threads of the test's process, and asks it by plain HTTP."""

import contextlib
import http.client
import json
import threading
import time

import uvicorn

from internvlx_jax.inference.server import Server, ServerConfig

NAME = "tiny"


@contextlib.contextmanager
def running(make_engine, **settings):
    """Serves on a free port in threads of this process; yields its address when it is ready."""
    server = Server(make_engine, ServerConfig(NAME, **settings))
    config = uvicorn.Config(
        server.app(), port=0, log_config=None, access_log=False, lifespan="on", ws="none"
    )
    web = uvicorn.Server(config)
    thread = threading.Thread(target=web.run, daemon=True)
    thread.start()
    try:
        wait_until(lambda: web.started)
        host, port = web.servers[0].sockets[0].getsockname()[:2]
        yield f"http://{host}:{port}"
    finally:
        web.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def call(address, path, body=None, headers=None):
    """Returns status, headers and text of one exchange, by plain HTTP."""
    host, port = address.removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=30)
    try:
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection.request("GET" if data is None else "POST", path, data, headers or {})
        reply = connection.getresponse()
        return reply.status, dict(reply.getheaders()), reply.read().decode()
    finally:
        connection.close()


def complete(address, body, **headers):
    status, _, text = call(address, "/v1/chat/completions", body, headers)
    return status, json.loads(text)


def metric(address, name: str) -> float:
    lines = call(address, "/metrics")[2].splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(f"internvlx_{name} "))


def wait_until(true, seconds: float = 30):
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until
        time.sleep(0.02)
