"""What an HTML page is made of, and that it needs nothing but itself."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser

_EMPTY = ("meta", "img", "input")


class Tags(HTMLParser):
    """The elements of a page.

    Attributes:
        found: name and attributes of each.
        open: those that were never closed; a wrong order is an error at once.
        text: everything outside of them.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in _EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


def assert_self_contained(content: str) -> Tags:
    """Check that a page fetches nothing and runs its own script alone; return what it is made of."""
    tags = Tags(content)
    assert tags.open == []
    assert not re.search(r"url\((?!#)|@import|https?://|<link", content)
    for _, attributes in tags.found:
        assert not [name for name in attributes if name.startswith("on")]
        assert "src" not in attributes
        assert str(attributes.get("href", "#")).startswith(("#", "data:image/jpeg;base64,"))
    (policy,) = (meta["content"] for meta in tags.named("meta") if "http-equiv" in meta)
    scripts = re.findall(r"<script>(.*?)</script>", content, flags=re.DOTALL)
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    assert len(tags.named("script")) == len(scripts) == 1
    assert re.findall(r"script-src ([^;]+)", str(policy)) == [f"'sha256-{hashes[0]}'"]
    assert str(policy).startswith("default-src 'none';")
    return tags
