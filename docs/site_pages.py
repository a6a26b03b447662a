"""What mkdocs shows differently from the files: links out of docs/ are their texts, kinds of blocks are languages."""

import re
from typing import Any

LEAVING = re.compile(r"\[([^\]]+)\]\(((?:\.\./)+)[^)]*\)")
KINDS = re.compile(r"^```(?:attn \w+|output|py)$", re.MULTILINE)
LANGUAGES = {"output": "text", "py": "python"}


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Called by mkdocs with the text of each page."""
    inside = page.file.src_uri.count("/")

    def link(match: re.Match[str]) -> str:
        return match[1] if match[2].count("../") > inside else match[0]

    def kind(match: re.Match[str]) -> str:
        name = match[0].removeprefix("```")
        return f"```{LANGUAGES.get(name, 'attn')}"

    return KINDS.sub(kind, LEAVING.sub(link, markdown))
