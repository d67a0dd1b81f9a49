"""What a page of HTML holds, for tests that read it."""

from __future__ import annotations

import html.parser
import json

HOSTILE = ["<script>alert(1)</script>", '"><img src=x onerror=alert(2)>', "a & b", "$x$", "</script>", "'quoted'"]


class Outline(html.parser.HTMLParser):
    """Tags, attributes and texts of a page, with the contents of scripts kept apart."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text, self.scripts = [], [], [], []
        self._script = None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self._script = dict(attrs).get("type", "code") if tag in ("script", "style") else None

    def handle_endtag(self, tag):
        self._script = None

    def handle_data(self, data):
        if self._script is None:
            self.text.append(data)
        else:
            self.scripts.append((self._script, data))

    @property
    def specs(self):
        return [json.loads(data) for kind, data in self.scripts if kind == "application/json"]
