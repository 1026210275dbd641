"""A judge: any OpenAI-compatible endpoint, every reply cached on disk (design: evaluation.md 7)."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
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
    """The endpoint does not answer usefully; replies that came before are in the cache."""


@dataclasses.dataclass(frozen=True)
class Request:
    """One question to a judge. `attempt` tells apart the tries of one prompt at one temperature."""

    prompt: str
    system: str = ""
    temperature: float = 0.0
    attempt: int = 0
    max_tokens: int | None = None

    @property
    def messages(self) -> list[dict[str, str]]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": self.prompt}]


class Judge(Protocol):
    """Whatever answers requests; None where it cannot."""

    def ask(self, requests: Sequence[Request]) -> list[str | None]: ...

    def describe(self) -> dict[str, Any] | None: ...


class NoJudge:
    """Keeps the requests, so that they can be shown and answered later."""

    def __init__(self):
        self.requests: list[Request] = []

    def ask(self, requests: Sequence[Request]) -> list[None]:
        self.requests += requests
        return [None] * len(requests)

    def describe(self) -> None:
        return None

    def write(self, path: Path) -> None:
        """One JSON object a request."""
        write_text(
            path,
            "".join(
                json.dumps(
                    {
                        "messages": request.messages,
                        "temperature": request.temperature,
                        "max_tokens": request.max_tokens,
                    },
                    ensure_ascii=False,
                )
                + "\n"
                for request in self.requests
            ),
        )


class EndpointJudge:
    """Asks `url`/chat/completions, several requests at a time. The key comes from OPENAI_API_KEY and is never shown.

    cache: folder of replies, named by the hash of model, messages, temperature and try; a run that was interrupted
    goes on from there.
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
    ):
        url = url.rstrip("/")
        self.url = url if url.endswith("/chat/completions") else f"{url}/chat/completions"
        self.model, self.cache = model, cache
        self.workers, self.timeout, self.retries, self.pause = workers, timeout, retries, pause
        self.asked = 0
        self._dates: set[str] = set()

    def ask(self, requests: Sequence[Request]) -> list[str]:
        """Replies in order, equal requests asked once; a refusal is an empty text. Raises JudgeError."""
        self.cache.mkdir(parents=True, exist_ok=True)
        different = list(dict.fromkeys(requests))
        with ThreadPoolExecutor(self.workers) as pool:
            replies = dict(zip(different, pool.map(self._reply, different)))
        return [replies[request] for request in requests]

    def describe(self) -> dict[str, Any] | None:
        """Model, and the dates of the replies that were used; None if it was not asked."""
        return {"model": self.model, "dates": sorted(self._dates)} if self._dates else None

    def _reply(self, request: Request) -> str:
        identity = [self.model, request.messages, request.temperature, request.attempt]
        key = hashlib.sha256(json.dumps(identity, ensure_ascii=False).encode()).hexdigest()
        path = self.cache / f"{key}.json"
        if not path.is_file():
            text = self._post(request)
            entry = {
                "model": self.model,
                "messages": request.messages,
                "temperature": request.temperature,
                "attempt": request.attempt,
                "date": time.strftime("%Y-%m-%d"),
                "reply": text,
            }
            write_json(path, entry)
        entry = json.loads(path.read_text(encoding="utf-8"))
        self._dates.add(entry["date"])
        return entry["reply"]

    def _post(self, request: Request) -> str:
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
        for attempt in range(self.retries):
            if attempt:
                time.sleep(self.pause * 2 ** (attempt - 1))
            self.asked += 1
            try:
                post = urllib.request.Request(self.url, json.dumps(body).encode(), headers)
                with urllib.request.urlopen(post, timeout=self.timeout) as response:
                    return json.loads(response.read())["choices"][0]["message"]["content"] or ""
            except urllib.error.HTTPError as error:
                problem = f"status {error.code}: {error.read(300).decode(errors='replace').strip()}"
                if error.code < 500 and error.code not in (408, 429):
                    break
            except (OSError, TimeoutError) as error:
                problem = str(error)
            except (ValueError, LookupError, TypeError) as error:
                problem = f"the reply is not a chat completion ({type(error).__name__}: {error})"
        raise JudgeError(
            f"{self.url} gives no answer: {problem}. Check --judge_url, --judge_model and {KEY_VARIABLE}; "
            "the predictions are written, and --rescore goes on from the replies in the cache"
        )


def fill(name: str, **values: str) -> str:
    """A judge text with its `{fields}` replaced, in one pass: braces inside the values stay."""
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
    """Ask each prompt until `read` understands the reply, once a temperature; None where it never does."""
    results: list[T | None] = [None] * len(prompts)
    for attempt, temperature in enumerate(temperatures):
        open_ = [i for i, result in enumerate(results) if result is None]
        replies = judge.ask(
            [Request(prompts[i], system, temperature, attempt, max_tokens) for i in open_]
        )
        if not open_ or all(reply is None for reply in replies):
            break
        for i, reply in zip(open_, replies):
            results[i] = None if reply is None else read(reply)
    return results
