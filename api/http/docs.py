"""The interface as a page of plain HTML, made from OpenAPI: no script, nothing fetched from elsewhere."""

import json
from html import escape
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import HTMLResponse

STYLE_PATH = "/docs/style.css"
STYLE_SHEET = """body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
code, pre { font: 14px/1.4 ui-monospace, monospace } pre { overflow: auto; background: #8882; padding: .7rem }
table { border-collapse: collapse } td, th { text-align: left; vertical-align: top; padding: .15rem 1rem .15rem 0 }
section { border-top: 1px solid #8886; margin-top: 1.5rem } h2 span { color: #1f77b4; margin-right: .6rem }
@media (prefers-color-scheme: dark) { body { background: #16181c; color: #ddd } a { color: #8bf } }
"""
router = APIRouter(include_in_schema=False)


@router.get("/docs")
async def show_docs(request: Request) -> HTMLResponse:
    """The interface, for people."""
    return HTMLResponse(page(request.app.openapi()))


@router.get(STYLE_PATH)
async def show_style() -> Response:
    """How that looks."""
    return Response(STYLE_SHEET, media_type="text/css")


def page(spec: dict[str, Any]) -> str:
    """HTML for an OpenAPI document."""
    calls = [
        _call(method, path, call, spec)
        for path, methods in spec["paths"].items()
        for method, call in methods.items()
        if method in ("get", "post", "patch", "delete")
    ]
    title = escape(spec["info"]["title"])
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><link rel="stylesheet" href="{STYLE_PATH}">'
        f"<h1>{title} {escape(spec['info']['version'])}</h1><p>{escape(spec['info'].get('summary', ''))}</p>"
        f'<p>The same for machines: <a href="/openapi.json">openapi.json</a>.</p>{"".join(calls)}</html>'
    )


def _call(method: str, path: str, call: dict[str, Any], spec: dict[str, Any]) -> str:
    rows = [
        _row(f"{item['name']} ({item['in']})", item.get("schema", {}), item.get("description", ""))
        for item in call.get("parameters", [])
    ]
    for kind, content in call.get("requestBody", {}).get("content", {}).items():
        schema = _resolve(content.get("schema", {}), spec)
        rows += [
            _row(f"{name} ({kind.split('/')[-1]})", item, item.get("description", ""))
            for name, item in schema.get("properties", {}).items()
        ]
    answers = "".join(
        f"<tr><td>{escape(status)}</td><td>{escape(_answer(answer))}</td></tr>"
        for status, answer in call.get("responses", {}).items()
    )
    return (
        f"<section><h2><span>{method.upper()}</span><code>{escape(path)}</code></h2>"
        f"<p>{escape(call.get('description', ''))}</p>"
        + (f"<table>{''.join(rows)}</table>" if rows else "")
        + f"<table><tr><th>status</th><th>answer</th></tr>{answers}</table></section>"
    )


def _row(name: str, schema: dict[str, Any], description: str) -> str:
    shape = {key: value for key, value in schema.items() if key not in ("title", "description")}
    text = f"{escape(description)} <code>{escape(json.dumps(shape))}</code>"
    return f"<tr><td><code>{escape(name)}</code></td><td>{text}</td></tr>"


def _answer(answer: dict[str, Any]) -> str:
    for content in answer.get("content", {}).values():
        reference = content.get("schema", {}).get("$ref", "")
        if reference and not reference.endswith("/Problem"):
            return str(reference.rsplit("/", 1)[-1])
    return str(answer.get("description", ""))


def _resolve(schema: dict[str, Any], spec: dict[str, Any]) -> dict[str, Any]:
    reference = schema.get("$ref", "")
    return dict(spec["components"]["schemas"][reference.rsplit("/", 1)[-1]]) if reference else schema
