"""The doctor's report: a page that needs nothing else, the same as JSON, and lists of images."""

from __future__ import annotations

import base64
import html
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipelines.common.errors import UserError
from pipelines.common.files import write_atomically
from pipelines.config import DataConfig
from pipelines.doctor.examine import Examined, Look
from pipelines.doctor.findings import Finding, counts_of, gini
from pipelines.pixels import BadImageError
from pipelines.prepare.pictures import COLORS
from pipelines.prepare.shots import GROUPS, shot_groups
from pipelines.prepare.splits import excluded_names
from pipelines.prepare.writer import line_of

PAGE, CONTENT = "doctor.html", "doctor.json"
EXCLUDE, SUSPECTS, BEFORE = "exclude.txt", "suspects.txt", "before"
_GROUPS, _IMAGES, _NAMED = 12, 4, 10_000  # of a finding: groups and images of a group on the page, images in the JSON file
_THUMBNAIL = 120  # pixels
_WORDS = {"fault": "Fault", "look": "Have a look", "note": "Note"}

_STYLE = """
:root{color-scheme:light dark;--line:#8884;--soft:#8888}
body{font:16px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:68rem;padding:0 1rem}
h1{font-size:1.5rem;margin:0}h2{font-size:1.1rem;margin:2rem 0 .3rem}p{margin:.3rem 0}
table{border-collapse:collapse;margin:.8rem 0}
td,th{padding:.25rem .8rem .25rem 0;text-align:left;border-bottom:1px solid var(--line)}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}
.tag{display:inline-block;border-radius:.3rem;padding:0 .5rem;margin-right:.5rem;font-size:.85rem;color:#fff}
.fault{background:#b3261e}.look{background:#9a6700}.note{background:#57606a}
.groups{display:flex;flex-wrap:wrap;gap:1rem;margin:.6rem 0}
.group{display:flex;gap:.4rem;border:1px solid var(--line);border-radius:.4rem;padding:.4rem}
figure{margin:0;width:120px}img{display:block;width:120px;height:120px;object-fit:contain;background:#8882}
figcaption{font-size:.72rem;line-height:1.25;overflow-wrap:anywhere;color:inherit;opacity:.85}
.bar{height:.7rem;border-radius:.2rem}.more{opacity:.75}
"""


def write_report(folder: Path, examined: Examined, findings: list[Finding], data: DataConfig) -> dict[str, Any]:
    """Write the page, the JSON file and the lists.

    Args:
        folder: Where; it is made.
        examined: What was seen of the images.
        findings: What follows.
        data: How images are read.

    Returns:
        The content of the JSON file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    content = _content(examined, findings)
    write_atomically(folder / CONTENT, json.dumps(content, indent=1))
    write_atomically(folder / PAGE, _page(content, examined, findings, data))
    # What is left out already was not looked at: the new list goes on from it.
    left = excluded_names(data.exclude) if data.exclude is not None else []
    _write_list(folder / EXCLUDE, examined, {number for finding in findings for number in finding.exclude}, left)
    suspects = {number for finding in findings for number in finding.suspects}
    if suspects or (folder / SUSPECTS).exists():
        _write_list(folder / SUSPECTS, examined, suspects, [])
    return content


def _write_list(path: Path, examined: Examined, numbers: set[int], before: list[str]) -> None:
    """The split and the name of each image. A list with other lines is kept: a person may have worked on it."""
    images = (f"{examined.split[number]}\t{line_of(examined.name[number])}" for number in sorted(numbers))
    lines = "".join(f"{line}\n" for line in (*before, *images)).encode("utf-8", "surrogateescape")
    if path.exists() and path.read_bytes() != lines:
        path.replace(path.with_name(f"{path.stem}.{BEFORE}{path.suffix}"))
    write_atomically(path, lines)


def _content(examined: Examined, findings: list[Finding]) -> dict[str, Any]:
    counts = counts_of(examined)
    train = counts["train"]
    groups = shot_groups(train)
    return {
        "format": 1,
        "images": {split: int(of_split.sum()) for split, of_split in counts.items()},
        "classes": [
            {"name": name, "group": groups[label], **{split: int(of_split[label]) for split, of_split in counts.items()}}
            for label, name in enumerate(examined.classes)
        ],
        "imbalance": {
            "largest": int(train.max()),
            "smallest": int(train.min()),
            "ratio": round(float(train.max() / max(1, train.min())), 2),
            "gini": round(gini(train), 4),
            **{group: groups.count(group) for group in GROUPS},
        },
        "findings": [
            {
                "kind": finding.kind,
                "severity": finding.severity,
                "title": finding.title,
                "advice": finding.advice,
                "images": [[_entry(examined, number) for number in group] for group in finding.groups[:_NAMED]],
                "exclude": len(finding.exclude),
            }
            for finding in findings
        ],
    }


def _entry(examined: Examined, number: int) -> dict[str, Any]:
    look = examined.look[number]
    entry = {
        "split": examined.split[number],
        "image": examined.name[number],
        "class": examined.classes[int(examined.label[number])],
    }
    return entry | ({"size": [look.width, look.height]} if isinstance(look, Look) else {"reason": str(look)})


def _page(content: dict[str, Any], examined: Examined, findings: list[Finding], data: DataConfig) -> str:
    imbalance, images = content["imbalance"], content["images"]
    total = sum(images.values())
    worst = [sum(finding.severity == severity for finding in findings) for severity in _WORDS]
    head = (
        f"<h1>{total:,} images of {len(examined.classes):,} classes</h1>"
        f"<p>{', '.join(f'{split}: {count:,}' for split, count in images.items())}. Training images of a class: "
        f"{imbalance['smallest']:,} to {imbalance['largest']:,} ({imbalance['ratio']:g} to 1), Gini {imbalance['gini']:.2f}. "
        f"Classes: {imbalance['many']} many, {imbalance['medium']} medium, {imbalance['few']} few.</p>"
        f"<p>{worst[0]} faults, {worst[1]} to look at, {worst[2]} notes. "
        f"<code>{EXCLUDE}</code> beside this page lists the images to leave out: <code>--data.exclude {EXCLUDE}</code>.</p>"
    )
    sections = [_section(finding, examined, data) for finding in findings]
    body = head + "".join(sections) + _classes(content)
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width,initial-scale=1'>"
        f"<title>Doctor: {total:,} images</title><style>{_STYLE}</style><body>{body}</body></html>"
    )


def _section(finding: Finding, examined: Examined, data: DataConfig) -> str:
    shown = finding.groups[:_GROUPS]
    figures = "".join(
        f"<div class=group>{''.join(_figure(examined, number, data) for number in group[:_IMAGES])}</div>" for group in shown
    )
    left = len(finding.groups) - len(shown)
    more = f"<p class=more>{left:,} more in {CONTENT}.</p>" if left > 0 else ""
    return (
        f"<h2><span class='tag {finding.severity}'>{_WORDS[finding.severity]}</span>{html.escape(finding.title)}</h2>"
        f"<p>{html.escape(finding.advice)}</p><div class=groups>{figures}</div>{more}"
    )


def _figure(examined: Examined, number: int, data: DataConfig) -> str:
    label = examined.classes[int(examined.label[number])]
    name = html.escape(_printable(examined.name[number])).replace("/", "/<wbr>")  # where a long name may be broken first
    place = f"{examined.split[number]} · {html.escape(label)}<br>{name}"
    look = examined.look[number]
    if isinstance(look, BadImageError):
        return f"<figure><figcaption>{place}<br>{html.escape(str(look))}</figcaption></figure>"
    try:
        picture = examined.image(number, data)
    except (BadImageError, UserError, OSError):  # it has gone meanwhile
        return f"<figure><figcaption>{place}</figcaption></figure>"
    picture.thumbnail((_THUMBNAIL, _THUMBNAIL), Image.Resampling.BILINEAR)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=80)
    source = base64.b64encode(buffer.getvalue()).decode()
    alt = html.escape(f"{label}, {_printable(examined.name[number])}", quote=True)
    return f'<figure><img alt="{alt}" src="data:image/jpeg;base64,{source}"><figcaption>{place}</figcaption></figure>'


def _classes(content: dict[str, Any]) -> str:
    splits = list(content["images"])
    most = content["imbalance"]["largest"]
    ordered = sorted(content["classes"], key=lambda each: -each["train"])
    shown = ordered if len(ordered) <= 200 else [ordered[i] for i in np.linspace(0, len(ordered) - 1, 200).round().astype(int)]
    rows = "".join(
        f"<tr><td>{html.escape(each['name'])}{''.join(f'<td class=n>{each[split]:,}' for split in splits)}"
        f"<td><div class=bar style='width:{max(2, round(240 * each['train'] / max(1, most)))}px;"
        f"background:{COLORS[each['group']]}'></div>"
        for each in shown
    )
    left = (
        f"<p class=more>{len(shown)} of {len(ordered):,} classes, at equal distances.</p>" if len(shown) < len(ordered) else ""
    )
    header = "".join(f"<th class=n>{split}" for split in splits)
    return f"<h2>Classes</h2>{left}<table><tr><th>class{header}<th>training images{rows}</table>"


def _printable(name: str) -> str:
    return name.encode("utf-8", "backslashreplace").decode() if name.isprintable() else ascii(name)
