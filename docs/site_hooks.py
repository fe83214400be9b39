"""What the site does to pages beyond MkDocs: formulas become MathML, links to sources are resolved.

Formulas are written as GitHub shows them, `$...$` and `$$...$$`, and in docstrings as Sphinx has
them, `.. math::`. Browsers draw MathML by themselves, so no page needs a script or the network.
"""

from __future__ import annotations

import configparser
import html
import posixpath
import re
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from markdown import Extension, Markdown
from markdown.preprocessors import Preprocessor
from mkdocs.structure.files import File

_DIRECTIVE = re.compile(r"^\.\. math::\n((?:(?: {4}.*)?(?:\n|\Z))+)", re.MULTILINE)
_FORMULA = re.compile(
    r'<(?:span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</(?:span|div)>', re.DOTALL
)
# The converter takes some operators for letters, signs for differences, and bars for relations.
_REFINEMENTS = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"<mi>(&#x000B1;)</mi>", r"<mo>\1</mo>"),
        (r"<mi>(&#x0230A;|&#x0230B;)</mi>", r'<mo stretchy="false">\1</mo>'),
        (
            r"<mo[^>]*>(&#x0007C;|&#x0002F;)</mo>",
            r'<mo stretchy="false" lspace="0" rspace="0">\1</mo>',
        ),
        (
            r"(<mo[^>]*>(?:&#x00028;|&#x0007B;|\[|&#x0002C;|&#x0003D;)</mo>)"
            r"<mo>(&#x02212;|&#x000B1;)</mo>",
            r'\1<mo form="prefix">\2</mo>',
        ),
        (r"<mo>(max|min)</mo>(?=<mo[^>]*>&#x00028;)", r"<mi>\1</mi>"),
    )
]
_OUTWARD = re.compile(r"(?<!!)\[([^\]]*)\]\((\.\./[^)\s]*)\)")


def on_config(config: Any) -> Any:
    """Let Markdown know the docstrings' directive for formulas, and pages the repository."""
    config.markdown_extensions.append(_Directives())
    address = config.repo_url or _repository()
    if address:
        config.repo_url, config.repo_name = address, "/".join(address.split("/")[-2:])
        config.theme["icon"]["repo"] = "material/source-repository"
    return config


def _repository() -> str:
    """The project's address: `url` in setup.cfg, or where this copy was cloned from."""
    root = Path(__file__).resolve().parent.parent
    metadata = configparser.ConfigParser()
    metadata.read(root / "setup.cfg", encoding="utf-8")
    if url := metadata.get("metadata", "url", fallback=""):
        return url
    command = ["git", "-C", str(root), "config", "remote.origin.url"]
    try:
        origin = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git
        return ""
    return public(origin)


def public(origin: str) -> str:
    """A clone's origin as a page's address, without anybody's name or password; "" for a folder."""
    found = re.fullmatch(
        r"(?:https://|ssh://|)(?:[^@/]+@)?([\w-]+(?:\.[\w-]+)+)[:/](?:\d+/)?(.+?)(?:\.git)?/?",
        origin,
    )
    return f"https://{found[1]}/{found[2]}" if found else ""


def on_files(files: Any, *, config: Any) -> Any:
    """Add a font for formulas."""
    font = Path(find_spec("ziamath").origin).parent / "fonts" / "STIXTwoMath-Regular.ttf"
    files.append(File.generated(config, f"assets/{font.name}", content=font.read_bytes()))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Point links to files outside docs/ at the repository; without an address they become text."""
    folder = posixpath.dirname(page.file.src_uri)

    def resolve(link: re.Match[str]) -> str:
        text, target = link.groups()
        path = posixpath.normpath(posixpath.join(folder, target))
        if not path.startswith("../"):
            return link[0]
        address = (config.repo_url or "").rstrip("/")
        return f"[{text}]({address}/blob/HEAD/{path[3:]})" if address else text

    return _OUTWARD.sub(resolve, markdown)


def on_page_content(content: str, *, page: Any, config: Any, files: Any) -> str:
    """Replace what arithmatex marks as TeX by MathML."""
    return _FORMULA.sub(lambda found: mathml(html.unescape(found[2]), found[1] == "["), content)


def mathml(tex: str, is_display: bool) -> str:
    """A formula as MathML."""
    tex = tex.strip().replace("{aligned}", "{split}")  # the converter knows but the latter
    formula = convert(tex, display="block" if is_display else "inline")
    for pattern, replacement in _REFINEMENTS:
        formula = pattern.sub(replacement, formula)
    return formula


class _Directive(Preprocessor):
    """`.. math::` as a formula between dollars."""

    def run(self, lines: list[str]) -> list[str]:
        return _DIRECTIVE.sub(self._formula, "\n".join(lines)).split("\n")

    @staticmethod
    def _formula(found: re.Match[str]) -> str:
        tex = "\n".join(line.strip() for line in found[1].strip().split("\n"))
        if "&" in tex:
            tex = f"\\begin{{aligned}}\n{tex}\n\\end{{aligned}}"
        return f"\n$$\n{tex}\n$$\n\n"


class _Directives(Extension):
    def extendMarkdown(self, md: Markdown) -> None:
        md.preprocessors.register(_Directive(md), "math_directive", 30)
