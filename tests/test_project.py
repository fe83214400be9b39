"""The project as a stranger meets it: what the wheel holds, an import costs, and make offers."""

import ast
import configparser
import os
import re
import shutil
import subprocess
import sys
import textwrap
import zipfile
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
_GUIDES = sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs" / "howto").glob("*.md"))


def _run(*command: str | Path, **kwargs) -> str:
    """Returns what a command printed; fails with all of it when the command failed."""
    process = subprocess.run(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **kwargs,
    )
    assert process.returncode == 0, process.stdout
    return process.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel built from a copy, so that nothing left in build/ gets into it."""
    source = tmp_path_factory.mktemp("source") / "zoqo_jax"
    left_out = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "results", "*.egg-info")
    shutil.copytree(ROOT, source, ignore=left_out)
    output = tmp_path_factory.mktemp("wheel")
    _run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", output, source)
    (built,) = output.glob("*.whl")
    return built


def test_wheel_holds_the_package_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "zoqo_jax").rglob("*.py")}
    assert "zoqo_jax/py.typed" in names
    assert modules <= names, "a folder without __init__.py?"
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"zoqo_jax"}
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


@pytest.mark.slow
def test_wheel_alone_optimises(wheel, tmp_path):
    """The wheel and its own dependencies, without extras, bring a quantized matrix to a target."""
    program = """
        import jax, jax.numpy as jnp, optax, quax
        import zoqo_jax as zq

        target = jnp.linspace(-0.8, 0.8, 8).reshape(2, 4)

        def loss(params):
            return jnp.sum((params["w"] - target) ** 2)

        tx = zq.zoqo(learning_rate=0.02, radius=0.02, key=jax.random.key(0))
        params = zq.quantize({"w": jnp.zeros((2, 4))}, zq.Quantizer(bits=8, range=1.0))
        state = tx.init(params)

        @jax.jit
        def step(params, state):
            updates, state = tx.update(None, state, params, value_fn=loss)
            return optax.apply_updates(params, updates), state

        before = float(quax.quaxify(loss)(params))
        for _ in range(200):
            params, state = step(params, state)
        after = float(quax.quaxify(loss)(params))
        assert after < before / 10, (before, after)
        print(zq.__file__)
    """
    environment = tmp_path / "environment"
    python = environment / "bin" / "python"
    _run(sys.executable, "-m", "venv", environment)
    _run(python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", wheel)
    # -I: neither this folder nor PYTHONPATH may lend the program a module.
    output = _run(python, "-I", "-c", textwrap.dedent(program), cwd=tmp_path)
    assert str(environment) in output.splitlines()[-1]


def test_import_is_light():
    """Importing the package loads nothing of the extras."""
    # Not all of absl: optax itself logs through it. Its command line is for the experiments.
    heavy = {"absl.app", "flax", "matplotlib", "orbax", "tensorflow", "tensorflow_datasets"}
    program = f"import sys, zoqo_jax; print(sorted({heavy} & set(sys.modules)))"
    output = _run(sys.executable, "-c", program, cwd=ROOT)
    assert output.splitlines()[-1] == "[]"


def test_readme_names_the_first_two_commands():
    readme = ROOT / "README.md"
    if not readme.exists():
        pytest.skip("README.md is not written yet")
    text = readme.read_text(encoding="utf-8")
    assert "make demo" in text
    assert "make test" in text


def _imported(program: str) -> set[str]:
    """Top-level names of what a program imports."""
    found = set()
    for node in ast.walk(ast.parse(program)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


def _imports(path: Path, modules: dict[str, Path]) -> set[str]:
    """The project's modules that a file imports, those imported inside functions, too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names & modules.keys() or {node.module}
    return found & modules.keys()


def test_no_modules_import_each_other_in_a_circle():
    modules = {}
    for package in ("zoqo_jax", "experiments", "benchmarks"):
        for path in (ROOT / package).rglob("*.py"):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            modules[name.removesuffix(".__init__")] = path
    graph = {name: _imports(path, modules) for name, path in modules.items()}
    TopologicalSorter(graph).prepare()  # names the modules of a circle in its error


@pytest.mark.parametrize("page", ["README.md", "docs/index.md", *_GUIDES])
def test_programs_need_no_more_than_the_page_installs(page):
    """What a page's programs import comes with the core, or in a `pip install` of that page."""
    text = (ROOT / page).read_text(encoding="utf-8")
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    listed = config["options"]["install_requires"].split("\n")
    core = {canonicalize_name(Requirement(line).name) for line in listed if line}
    core |= {"zoqo-jax", *map(canonicalize_name, sys.stdlib_module_names)}
    installs = " ".join(re.findall(r"pip install ([^`\n]*)", text))
    programs = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert programs
    for program in programs:
        for name in _imported(program):
            found = canonicalize_name(name)
            assert found in core or re.search(rf"\b{name}\b", installs), f"{page}: {name}"


def test_every_requirement_is_pinned_within_its_bounds():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    groups = [config["options"]["install_requires"], *config["options.extras_require"].values()]
    for text in "\n".join(groups).split("\n"):
        if not text:
            continue
        requirement = Requirement(text)
        pin = pins[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(pin), f"{requirement} is pinned to {pin}"


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
class TestMakefile:
    @staticmethod
    def make(*arguments: str) -> subprocess.CompletedProcess[str]:
        clean = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
        clean.pop("MFLAGS", None)
        return subprocess.run(
            ["make", *arguments], cwd=ROOT, env=clean, capture_output=True, text=True
        )

    def test_help_lists_every_target(self):
        phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert phony is not None
        listed = {line.split()[0] for line in self.make().stdout.splitlines()}
        assert listed == set(phony[1].split()) - {"style"}

    @pytest.mark.parametrize("python", ["false", "no-such-python"])
    def test_unfit_interpreter_is_named(self, python, tmp_path):
        process = self.make(f"PYTHON={python}", f"VENV={tmp_path}/venv", "demo")
        assert process.returncode != 0
        assert "3.11" in process.stderr and python in process.stderr
        assert not (tmp_path / "venv").exists()


def test_readme_example_trains(capsys):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    example = re.search(r"```python\n(.*?)```", readme, re.DOTALL).group(1)
    exec(compile(example, "README.md", "exec"), {})
    assert float(capsys.readouterr().out) < 0.4
