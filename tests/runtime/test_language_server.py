"""The language server: its answers in the protocol's words, and one conversation over the standard streams."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from lsprotocol import types
from pygls.lsp.client import LanguageClient
from pygls.workspace import PositionCodec, TextDocument, Workspace

from attnc.compiler import pipeline
from attnc.compiler.build import unlowered
from attnc.dsl.source import Source
from attnc.dsl.terms import Pattern
from attnc.runtime.tools.diagnosis import mistakes
from attnc.runtime.tools.language_server import diagnostics, hover, place_of, range_of, server
from attnc.runtime.tools.live_remark import live_remark

ROOT = Path(__file__).resolve().parents[2]
WRONG = "pattern near(window: int = 4):\n    x = 𝟙\n    out = softmax[j](q @ k where i - j < windo) @ v\n"
RIGHT = "pattern near(window: int = 4):\n    out = softmax[j](q @ k where 0 <= i - j < window) @ v\n"


def document(text: str, path: Path | None = None) -> TextDocument:
    uri = "untitled:1" if path is None else path.as_uri()
    return TextDocument(uri, text, position_codec=PositionCodec(types.PositionEncodingKind.Utf16))


def places(found: types.Diagnostic) -> tuple[int, int, int, int]:
    return found.range.start.line, found.range.start.character, found.range.end.line, found.range.end.character


def test_mistakes_have_codes_places_and_remedies() -> None:
    text = "pattern near(window: int = 4):\n    out = softmax[j](q @ k where i - j < windo) @ v\n"
    (found,) = diagnostics(document(text))
    assert (found.code, found.source, found.severity) == ("unknown-name", "attnc", types.DiagnosticSeverity.Error)
    assert found.message == "`windo` is not defined\nhelp: did you mean `window`?"
    assert places(found) == (1, 41, 1, 46)


def test_places_count_as_the_editor_counts() -> None:
    text = 'pattern p:\n    out = q @ "𝟙𝟙" @ windo\n'
    whole = document(text)
    mistake = mistakes(Source("untitled:1", text), None)[0]
    assert range_of(mistake.span, whole).start.line == 1
    line = text.split("\n")[1]
    units = len(line[: line.index("windo")].encode("utf-16-le")) // 2
    assert place_of(whole, types.Position(1, units)) == (1, line.index("windo"))


def test_related_places_come_along() -> None:
    (found,) = diagnostics(document("f(x) = x\nf(y) = y\n"))
    (related,) = found.related_information or ()
    assert (related.message, related.location.range.start.line) == ("defined here", 0)


def test_mistakes_of_a_used_file_lead_there(tmp_path: Path) -> None:
    (tmp_path / "other.attn").write_text("f(x) = (\n")
    (found,) = diagnostics(document('use "other.attn"\n', tmp_path / "a.attn"))
    assert "other.attn:1: `(` is never closed" in found.message
    assert found.related_information is not None
    assert found.related_information[0].location.uri == (tmp_path / "other.attn").as_uri()


def test_lines_for_the_commands_are_read_too() -> None:
    (found,) = diagnostics(document(f"# check: windo=3\n{RIGHT}"))
    assert (found.code, places(found)[:2]) == ("setting", (0, 9))


def test_what_has_no_kernel_is_said_but_is_no_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(pattern: Pattern) -> None:
        raise unlowered(pattern.out, "this")

    assert diagnostics(document(RIGHT), compiled=True) == []
    monkeypatch.setattr(pipeline, "compose", refuse)
    assert diagnostics(document(RIGHT)) == []
    (found,) = diagnostics(document(RIGHT), compiled=True)
    assert (found.code, found.severity) == ("not-lowered", types.DiagnosticSeverity.Information)
    (found,) = diagnostics(document(RIGHT.replace("q @", "q @ kk @")), compiled=True)
    assert (found.code, found.severity) == ("unknown-name", types.DiagnosticSeverity.Error)


def test_live_share_of_a_pattern() -> None:
    said = live_remark(RIGHT, "near.attn", None, "near")
    assert said == "0.0039 of the pairs are live, of 1024 queries and 1024 keys"
    assert live_remark("# run: window=64 N=128\n" + RIGHT, "near.attn", None, "near") == (
        "0.377 of the pairs are live, of 128 queries and 128 keys, window=64"
    )
    assert live_remark(RIGHT.replace("k where", "k wher"), "near.attn", None, "near") is None
    assert live_remark(RIGHT.replace(" = 4", ""), "near.attn", None, "near") is None


def test_features_are_registered() -> None:
    features = server.protocol.fm.features
    wanted = {"hover", "completion", "definition", "formatting", "didOpen", "didChange", "didSave", "didClose"}
    assert {f"textDocument/{name}" for name in wanted} <= set(features)


def test_a_pattern_is_hovered_over_with_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = document(RIGHT)
    monkeypatch.setattr(server.protocol, "_workspace", Workspace(None))
    server.workspace.put_text_document(types.TextDocumentItem(opened.uri, "attn", 1, RIGHT))
    params = types.HoverParams(types.TextDocumentIdentifier(opened.uri), types.Position(0, 9))
    found = hover(server, params)
    assert found is not None
    assert isinstance(found.contents, types.MarkupContent)
    assert "pattern near(window: int = 4)" in found.contents.value
    assert "0.0039 of the pairs are live" in found.contents.value


def test_the_server_starts_without_torch() -> None:
    code = "import sys, attnc.runtime.tools.language_server; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


class Conversation:
    """A client with one open document."""

    def __init__(self, client: LanguageClient, uri: str) -> None:
        self.client = client
        self.uri = uri
        self.published: asyncio.Queue[types.PublishDiagnosticsParams] = asyncio.Queue()

        @client.feature(types.TEXT_DOCUMENT_PUBLISH_DIAGNOSTICS)  # type: ignore[untyped-decorator]  # pygls says nothing
        def publish(params: types.PublishDiagnosticsParams) -> None:
            self.published.put_nowait(params)

    def at(self, line: int, character: int) -> dict[str, Any]:
        return {"text_document": types.TextDocumentIdentifier(self.uri), "position": types.Position(line, character)}

    async def change(self, version: int, text: str) -> list[types.Diagnostic]:
        whole = types.TextDocumentContentChangeWholeDocument(text)
        identifier = types.VersionedTextDocumentIdentifier(version, self.uri)
        self.client.text_document_did_change(types.DidChangeTextDocumentParams(identifier, [whole]))
        return list((await self.published.get()).diagnostics)


async def converse(path: Path) -> None:
    client = LanguageClient("test", "1")
    talk = Conversation(client, path.as_uri())
    await client.start_io(sys.executable, "-m", "attnc", "lsp", cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    answer = await client.initialize_async(types.InitializeParams(capabilities=types.ClientCapabilities()))
    assert answer.capabilities.definition_provider
    opened = types.DidOpenTextDocumentParams(types.TextDocumentItem(talk.uri, "attn", 1, WRONG.replace("𝟙", "3")))
    client.text_document_did_open(opened)
    assert [d.code for d in (await talk.published.get()).diagnostics] == ["unknown-name"]
    assert await talk.change(2, RIGHT.replace("< window", "<window")) == []

    said = await client.text_document_hover_async(types.HoverParams(**talk.at(1, 48)))
    assert said is not None
    assert isinstance(said.contents, types.MarkupContent)
    assert said.contents.value == "```attn\nwindow: int = 4\n```\n\n`window`: `int`"
    found = await client.text_document_definition_async(types.DefinitionParams(**talk.at(1, 48)))
    assert isinstance(found, types.Location)
    assert (found.uri, found.range.start) == (talk.uri, types.Position(0, 13))
    listed = await client.text_document_completion_async(types.CompletionParams(**talk.at(1, 48)))
    assert isinstance(listed, list)
    assert "window" in [item.label for item in listed]
    identifier, options = types.TextDocumentIdentifier(talk.uri), types.FormattingOptions(4, True)
    edits = await client.text_document_formatting_async(types.DocumentFormattingParams(identifier, options))
    assert edits is not None
    assert [edit.new_text for edit in edits] == [RIGHT]
    await client.shutdown_async(None)
    client.exit(None)
    await client.stop()


def test_a_conversation(tmp_path: Path) -> None:
    asyncio.run(asyncio.wait_for(converse(tmp_path / "near.attn"), 60))
