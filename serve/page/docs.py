"""The routes of the service as a page, in the style of the first one."""

from __future__ import annotations

import html
from typing import Any


def docs_page(document: dict[str, Any]) -> bytes:
    """Write an OpenAPI document as HTML.

    Args:
        document: From `serve.openapi.openapi`.

    Returns:
        The page. Its links are relative, so that it works under any prefix.
    """
    rows = []
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            rows.append(_row(method, path, operation))
    page = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>cibl-ray: routes</title>
<link rel="icon" href="page/icon.svg">
<link rel="stylesheet" href="page/page.css">
</head>
<body class="docs">
<header><h1><img src="page/icon.svg" alt="" width="28" height="28"> cibl-ray: routes</h1>
<nav aria-label="Pages"><a href="./">Try the model</a> <a href="openapi.json">OpenAPI document</a></nav></header>
<main><div>
<p>{html.escape(document["info"]["description"])} If the service asks for an API key, send it as <code>x-api-key</code>.</p>
<p><code>curl --data-binary @image.jpg http://HOST/v1/predict</code></p>
{"".join(rows)}
</div></main>
</body>
</html>
"""
    return page.encode()


def _row(method: str, path: str, operation: dict[str, Any]) -> str:
    parts = [
        f'<section class="panel"><h2><code>{method.upper()} {html.escape(path)}</code></h2>',
        f"<p>{html.escape(operation['summary'])}</p>",
    ]
    if parameters := operation.get("parameters", []):
        items = "".join(
            f"<li><code>{html.escape(part['name'])}</code> ({part['in']}): {html.escape(part['description'])}</li>"
            for part in parameters
        )
        parts.append(f"<ul>{items}</ul>")
    if content := operation.get("requestBody", {}).get("content", {}):
        parts.append(f"<p>Body: {', '.join(f'<code>{html.escape(kind)}</code>' for kind in content)}</p>")
    return "".join([*parts, "</section>\n"])
