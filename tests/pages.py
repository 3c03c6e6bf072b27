"""A page of HTML, read for what it says and refers to."""

from __future__ import annotations

from html.parser import HTMLParser


class Page(HTMLParser):
    """The tags with their attributes, and the visible text of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data)

    def values(self, *names: str) -> list[str | None]:
        return [attrs[name] for _, attrs in self.tags for name in names if name in attrs]
