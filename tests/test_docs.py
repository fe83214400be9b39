"""The documentation: public names have a place and an example, pages run, links lead somewhere."""

import ast
import collections
import contextlib
import doctest
import importlib
import importlib.util
import inspect
import io
import itertools
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import zoqo_jax as zq
import zoqo_jax.interop
from zoqo_jax.implicit import interpreter

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
GUIDES = [
    *(DOCS / f"{name}.md" for name in ("index", "mathematics", "extending")),
    *sorted((DOCS / "howto").glob("*.md")),
]
PROGRAM = re.compile(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", re.DOTALL)
DECIMAL = re.compile(r"\d+\.\d+")
OF_EXTRA_ZOO = ("haiku", "keras")  # guides named like the package that they need
# Like nnx; what they read and write is tested by test_gguf.py; and 6 to 17 s each.
SLOW_GUIDES = (*OF_EXTRA_ZOO, "equinox", "flax", "gguf", "machines")


def is_defined(thing):
    """Whether a thing is a class or a function, which know their module and have a docstring."""
    return inspect.isclass(thing) or inspect.isfunction(thing)


def of_module(module):
    """A module's public names, each in the module that defines it, and what they are."""
    for name in module.__all__:
        thing = getattr(module, name)
        if is_defined(thing):
            yield f"{thing.__module__}.{thing.__name__}", thing
        elif inspect.ismodule(thing):
            yield from of_module(thing)
        else:
            yield f"{module.__name__}.{name}", thing


def public():
    """All public names: what `import zoqo_jax as zq` offers, and the readers of other files."""
    interop = zoqo_jax.interop
    found = pkgutil.iter_modules(interop.__path__, f"{interop.__name__}.")
    modules = [zq, *(importlib.import_module(module.name) for module in found)]
    return {path: thing for module in modules for path, thing in of_module(module)}


def resolved(path):
    """What a dotted path names; modules come first where a function is called like its module."""
    parent, _, name = path.rpartition(".")
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError:
        return getattr(importlib.import_module(parent), name)


def reference():
    """Where each path is documented."""
    places = collections.defaultdict(list)
    for page in sorted((DOCS / "reference").glob("*.md")):
        for path in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE):
            if not inspect.ismodule(resolved(path)):
                places[path].append(page.name)
    return places


def text_after(path):
    """The string below an assignment, which the reference shows as its docstring."""
    module, _, name = path.rpartition(".")
    body = ast.parse(inspect.getsource(importlib.import_module(module))).body
    for statement, after in itertools.pairwise(body):
        target = getattr(statement, "target", None) or getattr(statement, "targets", [None])[0]
        if isinstance(target, ast.Name) and target.id == name:
            return after.value.value if isinstance(after, ast.Expr) else None
    return None


def test_every_public_name_is_on_one_page():
    places = reference()
    assert {path: pages for path, pages in places.items() if len(pages) > 1} == {}
    assert set(public()) - set(places) == set()


DOCUMENTED = sorted({*public(), *reference()})


@pytest.mark.parametrize("path", DOCUMENTED)
def test_has_a_docstring_with_an_example(path):
    thing = resolved(path)
    if not is_defined(thing):
        assert text_after(path), "a string below its assignment must say what it is"
        return
    text = inspect.getdoc(thing) or ""
    assert text and not text.startswith(f"{thing.__name__}("), "it needs words of its own"
    assert "\nExamples:\n" in text
    assert doctest.DocTestParser().get_examples(text.split("\nExamples:\n")[1])


def agree(expected, printed):
    """Whether words and whole numbers are the same, and decimals within 15 %: other machines round
    other losses."""
    words = [DECIMAL.sub("#", text).split() for text in (expected, printed)]
    decimals = [[float(x) for x in DECIMAL.findall(text)] for text in (expected, printed)]
    return words[0] == words[1] and decimals[0] == pytest.approx(decimals[1], rel=0.15)


def test_outputs_are_compared():
    assert agree("loss 0.69 -> 0.17\n\n7 bits", "loss 0.70 -> 0.18\n7 bits\n")
    assert not agree("loss 0.69", "loss 0.92")
    assert not agree("7 bits", "8 bits")
    assert not agree("True 0.50", "False 0.50")


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=page.stem, marks=[pytest.mark.slow] * (page.stem in SLOW_GUIDES))
        for page in GUIDES
    ],
)
def test_programs_of_a_page_run_and_print_what_it_says(page, tmp_path, monkeypatch):
    if page.stem in OF_EXTRA_ZOO and importlib.util.find_spec(page.stem) is None:
        pytest.skip(f"needs {page.stem}, of the extra zoo")
    monkeypatch.chdir(tmp_path)
    # A rule that a page adds goes with it.
    monkeypatch.setattr(interpreter, "_rules", dict(interpreter._rules))
    names = {"__name__": "__main__"}
    programs = PROGRAM.findall(page.read_text(encoding="utf-8"))
    assert programs
    for program, expected in programs:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(program, page.name, "exec"), names)
        assert agree(expected, printed.getvalue()), f"{program}\nprinted\n{printed.getvalue()}"


def test_rooms_of_the_readme_name_the_files_that_questions_lead_to():
    """Each file in the last table of docs/extending.md is there and in its room's row of README."""
    page = (DOCS / "extending.md").read_text(encoding="utf-8")
    files = re.findall(r"^\| .*\? \| `(\w+)/(\w+)\.py` \|$", page, re.MULTILINE)
    assert len(files) == 12
    rows = dict(
        re.findall(r"^\| `(\w+)` \| (.*) \|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    )
    for room, name in files:
        assert (ROOT / "zoqo_jax" / room / f"{name}.py").is_file(), name
        assert f"`{name}`" in rows[room], name


def navigation(entries):
    """The pages that a `nav` of mkdocs.yml lists."""
    for entry in entries:
        value = next(iter(entry.values())) if isinstance(entry, dict) else entry
        yield from navigation(value) if isinstance(value, list) else [value]


def test_every_page_is_in_the_navigation_once():
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    listed = list(navigation(config["nav"]))
    assert sorted(listed) == sorted(str(page.relative_to(DOCS)) for page in PAGES)


def anchors(page):
    """The anchors of a page's headings, as GitHub and MkDocs make them."""
    for heading in re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE):
        yield re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *PAGES], ids=lambda page: str(page.relative_to(ROOT))
)
def test_links_and_pictures_exist(page):
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("mkdocs") is None, reason="needs mkdocs, of the extra docs"
)
def test_site_builds_without_warnings(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    mathematics = (tmp_path / "mathematics.html").read_text(encoding="utf-8")
    assert "<math" in mathematics and "arithmatex" not in mathematics
    caq_zo = (tmp_path / "reference" / "transformations.html").read_text(encoding="utf-8")
    assert 'display="block"' in caq_zo and ".. math::" not in caq_zo.split("<details")[0]
    for page in tmp_path.rglob("*.html"):
        fetched = re.findall(
            r"<(?:script|link|img)\b[^>]*(?:src|href)=\"(https?:[^\"]*)", page.read_text()
        )
        assert fetched == [], f"{page.name} asks another server"


@pytest.mark.skipif(
    importlib.util.find_spec("latex2mathml") is None, reason="needs what the extra docs brings"
)
@pytest.mark.parametrize(
    ("origin", "address"),
    [
        ("https://forge.example/team/zoqo.git", "https://forge.example/team/zoqo"),
        ("https://me:secret@forge.example/team/zoqo", "https://forge.example/team/zoqo"),
        ("git@forge.example:team/zoqo.git", "https://forge.example/team/zoqo"),
        ("ssh://git@forge.example:22/team/zoqo.git", "https://forge.example/team/zoqo"),
        ("/home/me/zoqo", ""),
        ("../zoqo.git", ""),
        ("", ""),
    ],
)
def test_pages_lead_to_where_the_repository_is(origin, address):
    spec = importlib.util.spec_from_file_location("site_hooks", DOCS / "site_hooks.py")
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    assert hooks.public(origin) == address
