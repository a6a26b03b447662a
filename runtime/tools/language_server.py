"""The language server of `.attn` files: `attnc lsp`, over the standard streams.

What it answers comes from `dsl/analysis.py`, `dsl/assistance.py` and `diagnosis.py`; here it is put in the words of the
protocol. Places there are (line, column) in characters; the protocol counts as the editor asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

from lsprotocol import types
from pygls import uris
from pygls.lsp.server import LanguageServer
from pygls.workspace import TextDocument

import attnc
from attnc.dsl import assistance
from attnc.dsl.analysis import Analysis, Place
from attnc.dsl.diagnostics import AttnError, Diagnostic
from attnc.dsl.format import format_source
from attnc.dsl.source import Source, Span
from attnc.runtime.tools.diagnosis import mistakes, refusals
from attnc.runtime.tools.live_remark import live_remark

PRELUDE = "std.attn"
KINDS = {
    "pattern": types.CompletionItemKind.Class,
    "function": types.CompletionItemKind.Function,
    "builtin": types.CompletionItemKind.Function,
    "parameter": types.CompletionItemKind.Field,
    "input": types.CompletionItemKind.Field,
    "option": types.CompletionItemKind.Field,
    "attribute": types.CompletionItemKind.Property,
    "axis": types.CompletionItemKind.Variable,
    "index": types.CompletionItemKind.Variable,
    "size": types.CompletionItemKind.Constant,
    "keyword": types.CompletionItemKind.Keyword,
    "type": types.CompletionItemKind.TypeParameter,
}

server = LanguageServer("attnc", attnc.__version__)


def serve() -> None:
    """Answer an editor until it hangs up."""
    server.start_io()


def document_source(document: TextDocument) -> Source:
    """The text as the editor has it, under the path of its file."""
    return Source(document.path or document.uri, document.source)


def folder(document: TextDocument) -> Path | None:
    """The folder that `use` looks in; None for a text without a file."""
    path = Path(document.path) if document.path else None
    return path.parent if path is not None and path.parent.is_dir() else None


def place_of(document: TextDocument, position: types.Position) -> Place:
    """A place in characters."""
    found = document.position_codec.position_from_client_units(document.lines, position)
    return found.line, found.character


def range_of(span: Span, document: TextDocument) -> types.Range:
    """A span of a document in the editor's units."""
    ends = []
    for offset in (span.start, max(span.stop, span.start)):
        line, column = span.source.position(offset)
        ends.append(types.Position(line - 1, column - 1))
    return document.position_codec.range_to_client_units(document.lines, types.Range(*ends))


def location_of(span: Span, document: TextDocument) -> types.Location:
    """Where a span is: in the document, in a file that it uses, or in the prelude."""
    name = span.source.name
    if name == (document.path or document.uri):
        return types.Location(document.uri, range_of(span, document))
    path = Path(str(files("attnc.dsl").joinpath(PRELUDE))) if name == PRELUDE else Path(name)
    uri = uris.from_fs_path(str(path.resolve())) or document.uri
    return types.Location(uri, range_of(span, TextDocument(uri, span.source.text)))


# Diagnostics


def diagnostics(document: TextDocument, *, compiled: bool = False) -> list[types.Diagnostic]:
    """Every mistake of a document; `compiled`: also what the compiler has no kernel for."""
    source, root = document_source(document), folder(document)
    found = [_diagnostic(mistake, document, types.DiagnosticSeverity.Error) for mistake in mistakes(source, root)]
    if compiled and not found:
        severity = types.DiagnosticSeverity.Information
        found = [_diagnostic(refusal, document, severity) for refusal in refusals(source, root)]
    return found


def _diagnostic(diagnostic: Diagnostic, document: TextDocument, severity: types.DiagnosticSeverity) -> types.Diagnostic:
    """The message with its help; a mistake in a used file is shown at the first line, with a link."""
    labels = list(diagnostic.labels)
    message = diagnostic.message
    here = diagnostic.span.source.name == (document.path or document.uri)
    if not here:
        labels.insert(0, (diagnostic.span, diagnostic.message))
        message = f"{diagnostic.span}: {message}"
    if diagnostic.help is not None:
        message += f"\nhelp: {diagnostic.help}"
    return types.Diagnostic(
        range=range_of(diagnostic.span, document) if here else types.Range(types.Position(0, 0), types.Position(0, 1)),
        message=message,
        severity=severity,
        code=diagnostic.code,
        source="attnc",
        related_information=[
            types.DiagnosticRelatedInformation(location_of(span, document), text) for span, text in labels
        ],
    )


def _publish(ls: LanguageServer, uri: str, *, compiled: bool) -> None:
    document = ls.workspace.get_text_document(uri)
    found = diagnostics(document, compiled=compiled)
    ls.text_document_publish_diagnostics(types.PublishDiagnosticsParams(uri, found, version=document.version))


@server.feature(types.TEXT_DOCUMENT_DID_OPEN)
def opened(ls: LanguageServer, params: types.DidOpenTextDocumentParams) -> None:
    """Mistakes at once, and what has no kernel yet."""
    _publish(ls, params.text_document.uri, compiled=True)


@server.feature(types.TEXT_DOCUMENT_DID_SAVE)
def saved(ls: LanguageServer, params: types.DidSaveTextDocumentParams) -> None:
    """As when it is opened: compiling takes too long for every key."""
    _publish(ls, params.text_document.uri, compiled=True)


@server.feature(types.TEXT_DOCUMENT_DID_CHANGE)
def changed(ls: LanguageServer, params: types.DidChangeTextDocumentParams) -> None:
    """Mistakes as they are typed."""
    _publish(ls, params.text_document.uri, compiled=False)


@server.feature(types.TEXT_DOCUMENT_DID_CLOSE)
def closed(ls: LanguageServer, params: types.DidCloseTextDocumentParams) -> None:
    """Nothing is wrong with what is closed."""
    ls.text_document_publish_diagnostics(types.PublishDiagnosticsParams(params.text_document.uri, []))


# Answers


@server.feature(types.TEXT_DOCUMENT_HOVER)
@server.thread()
def hover(ls: LanguageServer, params: types.HoverParams) -> types.Hover | None:
    """The declaration and type of what is pointed at; of a pattern, also the share of live pairs."""
    document = ls.workspace.get_text_document(params.text_document.uri)
    source, place = document_source(document), place_of(document, params.position)
    analysis = Analysis(source, folder(document))
    text = assistance.remark(analysis, source, place)
    if text is None:
        return None
    word = assistance.word_at(source, place)
    definition = None if word is None else analysis.definition(word[0], place)
    if definition is not None and definition.kind == "pattern" and definition.span.source is analysis.source:
        share = live_remark(document.source, source.name, folder(document), definition.name)
        text += f"\n\n{share}" if share else ""
    return types.Hover(types.MarkupContent(types.MarkupKind.Markdown, text))


@server.feature(types.TEXT_DOCUMENT_COMPLETION, types.CompletionOptions(trigger_characters=["."]))
def completion(ls: LanguageServer, params: types.CompletionParams) -> list[types.CompletionItem]:
    """Names that may stand here, the nearest first."""
    document = ls.workspace.get_text_document(params.text_document.uri)
    found = assistance.proposals(document_source(document), folder(document), place_of(document, params.position))
    return [
        types.CompletionItem(
            label=proposal.name,
            kind=KINDS.get(proposal.kind, types.CompletionItemKind.Variable),
            detail=proposal.detail,
            documentation=proposal.remark or None,
            sort_text=f"{number:04}",
        )
        for number, proposal in enumerate(found)
    ]


@server.feature(types.TEXT_DOCUMENT_DEFINITION)
def definition(ls: LanguageServer, params: types.DefinitionParams) -> types.Location | None:
    """Where a name is defined; of a `use`, the file."""
    document = ls.workspace.get_text_document(params.text_document.uri)
    source = document_source(document)
    found = assistance.origin(Analysis(source, folder(document)), source, place_of(document, params.position))
    if found is None:
        return None
    if isinstance(found, Path):
        start = types.Position(0, 0)
        return types.Location(uris.from_fs_path(str(found.resolve())) or document.uri, types.Range(start, start))
    return location_of(found, document)


@server.feature(types.TEXT_DOCUMENT_FORMATTING)
def formatting(ls: LanguageServer, params: types.DocumentFormattingParams) -> list[types.TextEdit]:
    """The whole text anew, if it can be read and is not formatted yet."""
    document = ls.workspace.get_text_document(params.text_document.uri)
    return list(_edits(document))


def _edits(document: TextDocument) -> Iterator[types.TextEdit]:
    try:
        text = format_source(document_source(document))
    except AttnError:
        return
    if text != document.source:
        end = types.Position(len(document.lines), 0)
        yield types.TextEdit(types.Range(types.Position(0, 0), end), text)
