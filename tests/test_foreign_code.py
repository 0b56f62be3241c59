"""Nothing that a stranger handed in runs: no pickle, no PyTorch, no remote code, no process and no connection of its own."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests import runs

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "panacea_jax"

# Modules that run what they read, and those that reach out, with the files that may.
NEVER = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "torch", "code", "codeop", "imp"}
WITHIN = {
    "subprocess": set(), "multiprocessing": set(), "ctypes": set(), "urllib": set(), "requests": set(), "http": set(), "ftplib": set(),
    "runpy": {"config/recipes.py"},  # a recipe in Python is the user's own code
    "socket": {"parallel/lifeline.py", "parallel/processes.py"},  # among the processes of a run
    "huggingface_hub": {"models/hub.py", "stages/push.py"},  # where the user names a hub id
}  # fmt: skip
CALLS = {"eval", "exec", "compile", "__import__"}
ALLOWED = {("cli/huge_pages.py", "os.execv")}  # starts itself, with the arguments that it was given
ENDS = ("np.load", "os.system", "os.execv", "os.popen", "yaml.unsafe_load", "yaml.full_load")


def parsed():
    for file in PACKAGE.rglob("*.py"):
        yield file.relative_to(PACKAGE).as_posix(), ast.parse(file.read_text("utf-8"))


def test_the_package_imports_nothing_that_runs_what_it_reads():
    found = set()
    for name, tree in parsed():
        for node in ast.walk(tree):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found |= {(name, module.partition(".")[0]) for module in modules}
    assert not {(name, module) for name, module in found if module in NEVER}
    assert not {(name, module) for name, module in found if module in WITHIN and name not in WITHIN[module]}


def test_the_package_calls_nothing_that_runs_text():
    wrong = []
    for name, tree in parsed():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func) if isinstance(node.func, ast.Name | ast.Attribute) else ""
                asked = [ast.unparse(k.value) for k in node.keywords if k.arg in ("trust_remote_code", "allow_pickle")]
                if called in CALLS or (called.endswith(ENDS) and (name, called) not in ALLOWED) or set(asked) - {"False"}:
                    wrong.append(f"{name}:{node.lineno}: {called}")
    assert not wrong


HOOKED = """
import importlib.util, json, sys
sys.modules["torch"] = None  # as where it is not installed
sys.modules["boto3"] = sys.modules["botocore"] = None  # of the tests' server; TensorBoard imports them where they are, and they try a port
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name.partition(".")[0] == "torch" else find(name, *a)
place, seen = sys.argv[1], []
WATCHED = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "pickle.find_class", "socket.connect",
           "socket.bind", "socket.getaddrinfo", "urllib.Request")
def hook(event, args):
    if event in WATCHED:
        seen.append([event, repr(args)[:200]])
    elif event == "exec" and args[0].co_filename.startswith(place):
        seen.append([event, args[0].co_filename])
    elif event == "open" and str(args[0]).endswith((".bin", ".pt", ".pkl")) and str(args[0]).startswith(place):
        seen.append([event, args[0]])
from panacea_jax import cli
sys.addaudithook(hook)
code = cli.run(sys.argv[2:])
print(json.dumps([code, seen]))
"""


@pytest.mark.parametrize("command", ["finetune", "generate"])
def test_nothing_of_a_stranger_runs(command, tmp_path):
    """A folder with code of its own, named in every way that transformers knows, and pickles; in a process that watches itself."""
    place = runs.make_place(tmp_path)
    base = place.base
    for name in ("config.json", "tokenizer_config.json"):
        content = json.loads((base / name).read_text())
        own = {"AutoConfig": "evil.Evil", "AutoTokenizer": ["evil.Evil", "evil.Evil"], "AutoModelForCausalLM": "evil.Evil"}
        (base / name).write_text(json.dumps(content | {"auto_map": own, "custom_pipelines": {"x": {"impl": "evil.Evil"}}}))
    for name in ("evil.py", "tokenization_evil.py", "conftest.py", "sitecustomize.py", "requirements.py"):
        (base / name).write_text("raise SystemExit('ran')")
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "model.pkl"):
        (base / name).write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    flags = place.flags("--config.train.steps=1", "--config.generate.adapter=none", "--config.data.template=alpaca")
    arguments = [command, *flags, f"--workdir={tmp_path / 'run'}"]
    done = subprocess.run([sys.executable, "-c", HOOKED, str(tmp_path), *arguments], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    code, seen = json.loads(done.stdout.splitlines()[-1])
    assert code == 0 and not seen
