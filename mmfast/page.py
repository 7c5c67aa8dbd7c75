"""The shell of a self-contained HTML page: nothing is fetched, and no script runs but the page's own.

>>> page = document("a & b", "<p>hello</p>")
>>> "<title>a &amp; b</title>" in page, "script-src" in page
(True, False)
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from html import escape

_STYLE = """
:root { color-scheme: light dark; --ink: #1b2130; --soft: #5b6474; --paper: #fcfcfb; --card: #fff; --line: #dde0e6;
  --bar: #c98500; --rest: #e6e8ed; --bad: #c22a52; --good: #0f7a4f; --link: #0b5f8a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8ebf1; --soft: #9da7b8; --paper: #13161c; --card: #1a1e26;
  --line: #2d343f; --bar: #ffc400; --rest: #2a303b; --bad: #ff6b8f; --good: #55d49a; --link: #7cc7ee; } }
* { box-sizing: border-box; } [hidden] { display: none !important; }
body { margin: 0 auto; max-width: 76rem; padding: 1.5rem 1rem 3rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .8rem; }
h2 { font: 600 1.05rem/1.4 ui-monospace, monospace; margin: 0 0 .3rem; }
p { margin: .35rem 0; } .soft, small { color: var(--soft); } small { font-size: .8em; white-space: nowrap; }
a { color: var(--link); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; margin: 0 0 1.2rem; font-size: .9rem; }
dt { color: var(--soft); } dd { margin: 0; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; margin: 0 0 1rem; }
th, td { padding: .45rem .5rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
th { color: var(--soft); font-weight: 500; font-size: .78rem; line-height: 1.25; vertical-align: bottom; }
td small { display: block; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 1rem; margin: 1.2rem 0; }
figure { margin: 0; } figcaption { color: var(--soft); font-size: .8rem; }
.key { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; font-size: .85rem; color: var(--soft); }
.bad { color: var(--bad); } .good { color: var(--good); }
input, select { font: inherit; color: inherit; background: var(--paper); border: 1px solid var(--line);
  border-radius: 6px; padding: .25rem .5rem; accent-color: var(--bar); }
@media screen and (max-width: 50rem) {
  thead { display: none; } table, tbody { display: block; }
  tr { display: block; border: 1px solid var(--line); border-radius: 8px; margin: .6rem 0; padding: .3rem .7rem; }
  td { display: flex; gap: .8rem; border: 0; padding: .1rem 0; }
  td::before { content: attr(data-label); color: var(--soft); flex: 1 0 6rem; text-align: left;
    font-family: system-ui; font-weight: 400; }
  td:first-child::before { content: none; } td:first-child { font-weight: 600; text-align: left; }
  td small { display: inline; margin-left: .4rem; white-space: normal; } td > span { text-align: right; }
  td:first-child > span { text-align: left; }
}
@media print {
  :root { color-scheme: light; --ink: #000; --soft: #444; --paper: #fff; --card: #fff; --line: #bbb; --bar: #c98500;
    --rest: #e6e8ed; --bad: #a3143b; --good: #0b5c3b; --link: #000; }
  html { font-size: 11px; } body { max-width: none; padding: 0; font-size: 1rem; } th, td { padding: .2rem .3rem; }
  section { border: 0; padding: 0; } figure, tr, svg { break-inside: avoid; } .screen { display: none !important; }
}
"""


def document(title: str, body: str, *, style: str = "", script: str = "") -> str:
    """Wrap a body into a page without any outside resource.

    Args:
        title: plain text.
        body: HTML, in which everything foreign is escaped already.
        style: more CSS.
        script: JavaScript of the page. It alone is let run, by its hash, whatever the body contains.

    Returns:
        The whole page.

    Raises:
        ValueError: if the script or the style contains a closing tag, which would end it.
    """
    if "</" in script or "</" in style:
        raise ValueError("script and style must not contain '</', which a browser may take for their end")
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    element = ""
    if script:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        policy += f"; script-src 'sha256-{digest}'"
        element = f"<script>{script}</script>"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{escape(title)}</title><style>{_STYLE}{style}</style></head><body>
{body}
{element}</body></html>
"""


def facts(found: Mapping[str, str]) -> str:
    """List facts by name; both are plain text.

    Example:
        >>> facts({"model": "<tiny>"})
        '<dl><dt>model</dt><dd>&lt;tiny&gt;</dd></dl>'
    """
    return f"<dl>{''.join(f'<dt>{escape(name)}</dt><dd>{escape(fact)}</dd>' for name, fact in found.items())}</dl>"


def table(head: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]], *, kind: str = "") -> str:
    """Write a table that turns into one card per row on a phone.

    Args:
        head: names of the columns, plain text.
        rows: for each row its class, or "", and its cells as HTML.
        kind: class of the table, or "".

    Example:
        >>> print(table(["a"], [("", ["<b>1</b>"])]).replace("<tbody>", chr(10)))
        <table><thead><tr><th>a</th></tr></thead>
        <tr><td data-label="a"><span><b>1</b></span></td></tr></tbody></table>
    """
    labels = [escape(name) for name in head]
    # The inner span keeps what a cell holds together where a phone shows cells as lines.
    body = "".join(
        f"<tr{_class(name)}>"
        + "".join(
            f'<td data-label="{label}"><span>{cell}</span></td>' for label, cell in zip(labels, cells, strict=True)
        )
        + "</tr>"
        for name, cells in rows
    )
    titles = "".join(f"<th>{label}</th>" for label in labels)
    return f"<table{_class(kind)}><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table>"


def _class(name: str) -> str:
    return f' class="{name}"' if name else ""
