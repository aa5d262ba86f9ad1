"""The OpenAPI document as a page: made here, without scripts and without anything from elsewhere."""

from __future__ import annotations

import json
from collections.abc import Iterator
from html import escape
from typing import Any, Final

__all__ = ["page"]

_Node = dict[str, Any]
_STYLE: Final = """
:root{color-scheme:light dark;--line:#8884;--soft:#8882}
body{font:16px/1.5 system-ui,sans-serif;max-width:62rem;margin:0 auto;padding:1rem}
code,pre{font-family:ui-monospace,monospace;font-size:.9em}
pre{background:var(--soft);padding:.6rem;overflow:auto;border-radius:.3rem}
details{border:1px solid var(--line);border-radius:.3rem;margin:.5rem 0;padding:.4rem .8rem}
summary{cursor:pointer}
.m{display:inline-block;min-width:4.5rem;font-weight:700}
table{border-collapse:collapse;width:100%}
th,td{text-align:left;vertical-align:top;padding:.25rem .6rem .25rem 0;border-top:1px solid var(--line)}
"""


def page(document: _Node) -> str:
    """The page."""
    info = document["info"]
    title = f"{escape(info['title'])} {escape(info['version'])}"
    body = "".join((*_operations(document), "<h2 id=schemas>Types</h2>", *_types(document)))
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title>"
        '<meta name=viewport content="width=device-width,initial-scale=1">'
        f"<style>{_STYLE}</style><main><h1>{title}</h1><p>{escape(info.get('description') or '')}</p>"
        '<p><a href="/schema/openapi.json">OpenAPI document</a> · <a href="#schemas">types</a></p>'
        f"{body}</main></html>"
    )


def _operations(document: _Node) -> Iterator[str]:
    groups: dict[str, list[str]] = {}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            tag = (operation.get("tags") or ["daemon"])[0]
            groups.setdefault(tag, []).append(_operation(path, method, operation))
    for tag, texts in groups.items():
        yield f"<h2>{escape(tag)}</h2>"
        yield from texts


def _operation(path: str, method: str, operation: _Node) -> str:
    parts = [f"<details id={escape(operation.get('operationId', ''))}><summary>"]
    parts.append(f"<span class=m>{escape(method.upper())}</span><code>{escape(path)}</code>")
    parts.append(f" {escape(operation.get('summary') or '')}</summary>")
    if operation.get("description"):
        parts.append(f"<p>{escape(operation['description'])}</p>")
    parameters = operation.get("parameters") or []
    if parameters:
        rows = (
            (f"<code>{escape(item['name'])}</code>", escape(item["in"]), _shape(item.get("schema", {})), _text(item))
            for item in parameters
        )
        parts.append(_table(("parameter", "in", "type", ""), rows))
    for kind, media in (operation.get("requestBody") or {}).get("content", {}).items():
        parts.append(f"<p>Body, <code>{escape(kind)}</code>: {_shape(media.get('schema', {}))}</p>")
    responses = operation["responses"].items()
    answers = ((f"<code>{status}</code>", _answer(item), _text(item)) for status, item in responses)
    parts.append(_table(("status", "body", ""), answers))
    return "".join((*parts, "</details>"))


def _answer(response: _Node) -> str:
    return "<br>".join(
        f"{_shape(media.get('schema', {}))} <small>{escape(kind)}</small>"
        for kind, media in (response.get("content") or {}).items()
    )


def _types(document: _Node) -> Iterator[str]:
    for name, schema in sorted(document["components"]["schemas"].items()):
        text = escape(json.dumps(schema, indent=2, ensure_ascii=False))
        yield (
            f"<details id=type-{escape(name)}><summary><code>{escape(name)}</code> {_text(schema)}</summary>"
            f"<pre>{text}</pre></details>"
        )


def _shape(schema: _Node) -> str:
    if "$ref" in schema:
        name = escape(schema["$ref"].rpartition("/")[2])
        return f'<a href="#type-{name}">{name}</a>'
    for word in ("oneOf", "anyOf"):
        if word in schema:
            return " or ".join(_shape(item) for item in schema[word])
    if "enum" in schema:
        return " | ".join(f"<code>{escape(str(item))}</code>" for item in schema["enum"])
    return escape(str(schema.get("type", "any")))


def _text(item: _Node) -> str:
    return escape(str(item.get("description") or ""))


def _table(heads: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> str:
    head = "".join(f"<th scope=col>{item}</th>" for item in heads)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
