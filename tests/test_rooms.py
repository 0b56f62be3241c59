"""The rooms of the package: each imports rooms below it only, and no file is in a circle."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "panacea_jax"

# From the top. A room imports those below it; the ground is under all of them.
ROOMS = [
    "cli", "sweep", "comparison", "stages", "reporting", "planning", "config", "healing", "export", "train", "records", "defences",
    "generate", "evaluate", "worlds", "models", "analysis", "workdir", "sums", "disk", "memory", "progress", "watchdog", "parallel",
    "data", "perturbation", "signatures", "stores", "untrusted", "spreadsheet", "waiting", "terminal", "errors", "shipped",
]  # fmt: skip
# Files that read a configuration together with a work directory.
READERS = ("stages", "comparison", "sweep", "cli")


def modules():
    """Every module's file by its dotted name."""
    files = {}
    for file in PACKAGE.rglob("*.py"):
        parts = file.relative_to(ROOT).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return files


def imports():
    """By module, the modules of ours that it imports anywhere in its text."""
    files = modules()
    found = {name: set() for name in files}
    for name, file in files.items():
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                asked = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                # A name of a package is a module of it, or defined by it.
                whole = [f"{node.module}.{alias.name}" for alias in node.names]
                asked = [w if w in files else node.module for w in whole]
            else:
                continue
            found[name] |= {module for module in asked if module in files and module != name}
    return found


def room(module):
    return module.split(".")[1] if "." in module else ""


@pytest.fixture(scope="module")
def graph():
    return imports()


def test_every_room_is_in_the_list(graph):
    assert {room(name) for name in graph} - {""} == set(ROOMS)


def test_a_room_imports_rooms_below_it_only(graph):
    wrong = [
        f"{name} imports {other}"
        for name, others in graph.items()
        for other in others
        if room(name) and room(other) != room(name)
        and (not room(other) or ROOMS.index(room(other)) < ROOMS.index(room(name)))
    ]  # fmt: skip
    assert not wrong


def test_no_two_rooms_import_each_other(graph):
    pairs = {(room(a), room(b)) for a, others in graph.items() for b in others if room(a) != room(b)}
    assert not [pair for pair in pairs if pair[::-1] in pairs]


def test_no_file_is_in_a_circle(graph):
    """A package's own ``__init__``, which hands out what lies below it, counts as the file that it is."""
    left = {name: set(others) for name, others in graph.items() if room(name)}
    while free := [name for name, others in left.items() if not others & left.keys()]:
        for name in free:
            del left[name]
    assert not left, f"circles among {sorted(left)}"


def test_the_places_that_read_a_configuration_and_a_work_directory(graph):
    """Elsewhere a function takes the one or the other, so it can be called without either."""
    both = [
        file.relative_to(PACKAGE).as_posix()
        for name, file in modules().items()
        if room(name) not in READERS
        for node in ast.walk(ast.parse(file.read_text("utf-8")))
        if isinstance(node, ast.FunctionDef)
        and {"ConfigDict", "workdir"} <= {_kind(a) for a in (*node.args.args, *node.args.kwonlyargs)}
    ]
    assert not both


def _kind(argument):
    """``ConfigDict`` for one of those, else its name."""
    annotated = argument.annotation is not None and ast.unparse(argument.annotation) == "ConfigDict"
    return "ConfigDict" if annotated else argument.arg


def test_no_two_public_things_have_one_name():
    """Of functions and classes; a reader who searches for one finds one."""
    homes = {}
    for name, file in modules().items():
        for node in ast.parse(file.read_text("utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                homes.setdefault(node.name, []).append(name)
    assert not {name: where for name, where in homes.items() if len(where) > 1}


def test_no_state_of_a_module_decides_what_a_call_does():
    """No function rebinds a name of its module."""
    changed = [
        f"{name}: global {', '.join(node.names)}"
        for name, file in modules().items()
        for node in ast.walk(ast.parse(file.read_text("utf-8")))
        if isinstance(node, ast.Global)
    ]
    assert not changed


def test_the_command_line_answers_without_jax():
    """All that it imports to help is Python's own and the room itself: that is what makes it quick."""
    code = (
        "import sys; before = {*sys.modules}; from panacea_jax import cli; "
        "[cli.run(words.split()) for words in ('--help', '--version', 'run --help', 'plan --helpfull', 'frobnicate')]; "
        "print(*sys.modules.keys() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)  # fmt: skip
    new = done.stdout.splitlines()[-1].split()
    assert {name.partition(".")[0] for name in new} - sys.stdlib_module_names == {"panacea_jax"}
    assert {room(name) for name in new if name.startswith("panacea_jax.")} == {"cli", "errors", "shipped", "terminal"}
