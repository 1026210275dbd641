"""Writes the JSON of OpenAI's chat completions (design: serving.md 2)."""

from __future__ import annotations

import dataclasses
import json
import time
import uuid
from typing import Any

from internvlx_jax.inference.requests import Answer

DONE = b"data: [DONE]\n\n"


@dataclasses.dataclass(frozen=True)
class Reply:
    """The fixed parts of all objects of one reply.

    Attributes:
        model: name of the model.
        id: of the completion.
        created: Unix time in seconds.
    """

    model: str
    id: str = dataclasses.field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    def whole(self, answer: Answer) -> dict[str, Any]:
        """Returns a reply that is not streamed."""
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": answer.text},
            "logprobs": None,
            "finish_reason": answer.finish,
        }
        return self._object("chat.completion", [choice]) | {"usage": usage(answer)}

    def chunk(self, delta: dict[str, str], finish: str | None = None) -> dict[str, Any]:
        """Returns one part of a stream."""
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return self._object("chat.completion.chunk", [choice])

    def usage_chunk(self, answer: Answer) -> dict[str, Any]:
        """Returns the part of a stream that holds the token counts."""
        return self._object("chat.completion.chunk", []) | {"usage": usage(answer)}

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }


def usage(answer: Answer) -> dict[str, int]:
    """Returns the token counts of an answer; visual tokens count as those of the prompt."""
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.new_tokens,
        "total_tokens": answer.prompt_tokens + answer.new_tokens,
    }


def event(value: dict[str, Any]) -> bytes:
    """Returns an object as a server-sent event."""
    return b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"
