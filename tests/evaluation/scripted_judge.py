"""A judge without an endpoint, for tests of what is made of its replies."""


class Scripted:
    """A judge that gives fixed replies in turn, and keeps what it was asked."""

    def __init__(self, *replies):
        self.replies, self.requests = list(replies), []

    def ask(self, requests):
        self.requests += requests
        return [self.replies.pop(0) for _ in requests]

    def describe(self):
        return {"model": "scripted"}
