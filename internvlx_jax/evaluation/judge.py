"""A judge is any OpenAI-compatible endpoint; every reply is cached (design: evaluation.md 7)."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, TypeVar

from internvlx_jax.core.files import write_json, write_text

T = TypeVar("T")

PROMPTS: Mapping[str, str] = json.loads(
    Path(__file__).with_name("judge_prompts.json").read_text(encoding="utf-8")
)
KEY_VARIABLE = "OPENAI_API_KEY"
_FIELD = re.compile(r"\{(\w+)\}")


class JudgeError(RuntimeError):
    """The endpoint gives no useful answer; replies that came before are in the cache."""


@dataclasses.dataclass(frozen=True)
class JudgeRequest:
    """One question to a judge.

    Attributes:
        prompt: the user message.
        system: the system message; empty for none.
        temperature: sampling temperature.
        attempt: number of the try; it tells apart tries of one prompt at one temperature.
        max_tokens: longest reply; None leaves it to the endpoint.
    """

    prompt: str
    system: str = ""
    temperature: float = 0.0
    attempt: int = 0
    max_tokens: int | None = None

    @property
    def messages(self) -> list[dict[str, str]]:
        """The chat messages of the request, as the endpoint takes them."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": self.prompt}]


@dataclasses.dataclass(frozen=True)
class CachedReply:
    """A reply as the cache stores it, in the order of its fields.

    Attributes:
        model: the model that was asked.
        messages, temperature, attempt: the request.
        date: day of the reply, as YYYY-MM-DD.
        reply: text of the reply.
    """

    model: str
    messages: list[dict[str, str]]
    temperature: float
    attempt: int
    date: str
    reply: str

    @classmethod
    def read(cls, path: Path) -> CachedReply:
        """Reads a file of the cache."""
        stored = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{field.name: stored[field.name] for field in dataclasses.fields(cls)})


class Judge(Protocol):
    """Anything that answers requests."""

    def ask(self, requests: Sequence[JudgeRequest]) -> Sequence[str | None]:
        """Returns the replies in order; None where the judge cannot answer."""
        ...

    def describe(self) -> dict[str, Any] | None:
        """Returns what identifies the judge in a summary; None if it gave no reply."""
        ...


class NoJudge:
    """Stands for a missing judge: keeps the requests, so that they can be answered later.

    Attributes:
        requests: all requests so far, in order.
    """

    def __init__(self):
        self.requests: list[JudgeRequest] = []

    def ask(self, requests: Sequence[JudgeRequest]) -> Sequence[str | None]:
        """Keeps the requests and returns None for each."""
        self.requests += requests
        return [None] * len(requests)

    def describe(self) -> None:
        """Returns None, since nothing was judged."""

    def write(self, path: Path) -> None:
        """Writes the requests to `path`, one JSON object per request."""
        lines = [
            {
                "messages": request.messages,
                "temperature": request.temperature,
                "max_tokens": request.max_tokens,
            }
            for request in self.requests
        ]
        write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


class RequestBudget:
    """Counts the requests that a job may still send.

    Attributes:
        most: most requests; None for any number.
        sent: requests so far.
    """

    def __init__(self, most: int | None = None):
        self.most, self.sent = most, 0
        self._lock = threading.Lock()

    def take(self) -> None:
        """Counts one request.

        Raises:
            JudgeError: there is none left.
        """
        with self._lock:
            if self.most is not None and self.sent >= self.most:
                raise JudgeError(
                    f"all {self.most} requests of --judge_budget are sent; --rescore with a larger "
                    "one goes on from the replies in the cache"
                )
            self.sent += 1


class EndpointJudge:
    """Asks URL/chat/completions, several requests at a time.

    The key is read from OPENAI_API_KEY and never shown. An interrupted run goes on from its cache,
    whose files are named by the hash of model, messages, temperature and try.

    Attributes:
        asked: number of requests that were sent, retries included.
    """

    def __init__(
        self,
        url: str,
        model: str,
        cache: Path,
        *,
        workers: int = 8,
        timeout: float = 120.0,
        retries: int = 5,
        pause: float = 1.0,
        budget: RequestBudget | None = None,
    ):
        """Prepares an endpoint; nothing is sent yet.

        Args:
            url: the endpoint, with or without "/chat/completions".
            model: the model to ask there.
            cache: folder of replies.
            workers: requests at a time.
            timeout: seconds until a request counts as failed.
            retries: most tries per request.
            pause: seconds before the second try; each further pause is twice as long, and as long
                as the endpoint asks for in Retry-After, up to `timeout`.
            budget: requests that may still be sent; any number without it.
        """
        url = url.rstrip("/")
        self.url = url if url.endswith("/chat/completions") else f"{url}/chat/completions"
        self.model, self.cache = model, cache
        self.workers, self.timeout, self.retries, self.pause = workers, timeout, retries, pause
        self.budget = budget or RequestBudget()
        self.asked = 0
        self._dates: set[str] = set()

    def ask(self, requests: Sequence[JudgeRequest]) -> Sequence[str]:
        """Returns the replies in order; equal requests are asked once, a refusal is "".

        Raises:
            JudgeError: the endpoint gives no useful answer.
        """
        self.cache.mkdir(parents=True, exist_ok=True)
        different = list(dict.fromkeys(requests))
        pool = ThreadPoolExecutor(self.workers)
        try:
            replies = dict(zip(different, pool.map(self._reply, different), strict=True))
        finally:  # after a failure nothing more is asked; replies under way come into the cache
            pool.shutdown(cancel_futures=True)
        return [replies[request] for request in requests]

    def describe(self) -> dict[str, Any] | None:
        """Returns the model and the dates of the replies that were used; None without replies."""
        return {"model": self.model, "dates": sorted(self._dates)} if self._dates else None

    def _reply(self, request: JudgeRequest) -> str:
        identity = [self.model, request.messages, request.temperature, request.attempt]
        key = hashlib.sha256(json.dumps(identity, ensure_ascii=False).encode()).hexdigest()
        path = self.cache / f"{key}.json"
        if not path.is_file():
            text = self._post(request)
            date = time.strftime("%Y-%m-%d")
            entry = CachedReply(
                self.model, request.messages, request.temperature, request.attempt, date, text
            )
            write_json(path, dataclasses.asdict(entry))
        entry = CachedReply.read(path)
        self._dates.add(entry.date)
        return entry.reply

    def _post(self, request: JudgeRequest) -> str:
        body: dict[str, Any] = {
            "model": self.model,
            "messages": request.messages,
            "temperature": request.temperature,
        }
        if request.max_tokens is not None:
            body["max_tokens"] = request.max_tokens
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY_VARIABLE):
            headers["Authorization"] = f"Bearer {key}"
        problem = ""
        wait = 0.0
        for attempt in range(self.retries):
            if attempt:
                time.sleep(max(self.pause * 2 ** (attempt - 1), min(wait, self.timeout)))
            self.budget.take()
            self.asked += 1
            wait = 0.0
            try:
                post = urllib.request.Request(self.url, json.dumps(body).encode(), headers)
                with urllib.request.urlopen(post, timeout=self.timeout) as response:
                    return json.loads(response.read())["choices"][0]["message"]["content"] or ""
            except urllib.error.HTTPError as error:
                problem = f"status {error.code}: {error.read(300).decode(errors='replace').strip()}"
                if error.code < 500 and error.code not in (408, 429):
                    break
                wait = _seconds(error.headers.get("Retry-After"))
            except (OSError, TimeoutError) as error:
                problem = str(error)
            except (ValueError, LookupError, TypeError) as error:
                problem = f"the reply is not a chat completion ({type(error).__name__}: {error})"
        raise JudgeError(
            f"{self.url} gives no answer: {problem}. Check --judge_url, --judge_model and "
            f"{KEY_VARIABLE}; the predictions are written, and --rescore goes on from the replies "
            "in the cache"
        )


def _seconds(header: str | None) -> float:
    """Returns the seconds of a Retry-After header; 0 without one, and for a date."""
    return float(header) if header and header.strip().isdecimal() else 0.0


def fill(name: str, **values: str) -> str:
    """Fills in the `{fields}` of a judge prompt in one pass, so braces inside the values stay."""
    return _FIELD.sub(lambda field: values.get(field[1], field[0]), PROMPTS[name])


def ask_until(
    judge: Judge,
    prompts: Sequence[str],
    read: Callable[[str], T | None],
    *,
    temperatures: Sequence[float] = (0.0,),
    system: str = "",
    max_tokens: int | None = None,
) -> list[T | None]:
    """Asks each prompt once per temperature until `read` understands the reply.

    Returns:
        What `read` made of each reply, in order; None where it never understood one.
    """
    readers = [read] * len(prompts)
    return ask_each(
        judge, prompts, readers, temperatures=temperatures, system=system, max_tokens=max_tokens
    )


def ask_each(
    judge: Judge,
    prompts: Sequence[str],
    readers: Sequence[Callable[[str], T | None]],
    *,
    temperatures: Sequence[float] = (0.0,),
    system: str = "",
    max_tokens: int | None = None,
) -> list[T | None]:
    """Does what `ask_until` does, with a reader of its own for each prompt."""
    results: list[T | None] = [None] * len(prompts)
    for attempt, temperature in enumerate(temperatures):
        waiting = [i for i, result in enumerate(results) if result is None]
        replies = judge.ask(
            [JudgeRequest(prompts[i], system, temperature, attempt, max_tokens) for i in waiting]
        )
        if all(reply is None for reply in replies):  # also when none is waiting
            break
        for i, reply in zip(waiting, replies, strict=True):
            results[i] = None if reply is None else readers[i](reply)
    return results
