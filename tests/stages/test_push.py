"""`panacea push` with the real client of the hub against a server of our own that speaks its protocol."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import huggingface_hub
import pytest

from tests import runs
from tests.runs import panacea

TOKEN = "hf_of_the_environment"


class Hub(BaseHTTPRequestHandler):
    """The calls that a push makes; what was asked is kept in ``server.asked``, what was committed in ``server.files``."""

    def do_GET(self):
        self._seen()
        if self.server.visibility is None:
            self._answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        else:
            self._answer({"id": "me/healed", "private": self.server.visibility == "private", "siblings": [], "sha": "0" * 40})

    def do_POST(self):
        body = self._seen()
        if self.path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            self._answer({"url": f"{self.server.url}/me/healed", "id": "me/healed"})
        elif self.path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            self._answer({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self._answer({"commitUrl": f"{self.server.url}/me/healed/commit/1", "commitOid": "1", "success": True})
        else:
            self._answer({})

    def _seen(self):
        self.server.asked.append((self.path, self.headers.get("Authorization")))
        return self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()

    def _answer(self, content, status=200, headers=()):
        if self.server.refuse and self.command == "POST":
            content, status = {"error": "You are not allowed to do this"}, 403
        body = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **dict(headers)}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    server = HTTPServer(("127.0.0.1", 0), Hub)
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.asked, server.created, server.files, server.visibility, server.refuse = [], [], {}, None, False
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def adapter(tmp_path_factory, tmp_path):
    """A copy of an exported adapter, with a file in it that nobody asked to push."""
    source = runs.finished_run(tmp_path_factory)[1] / "finetune" / "adapter"
    folder = tmp_path / "adapter"
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "notes.txt").write_text("mine")
    return folder


def push(adapter, *more):
    return panacea("push", f"--adapter={adapter}", "--to=me/healed", *more)


def test_a_push_makes_a_private_repository_of_the_adapters_files(hub, adapter, capsys):
    before = {p.name: p.read_bytes() for p in adapter.iterdir()}
    assert push(adapter) == 0
    assert [c["private"] if "private" in c else c["visibility"] for c in hub.created] in ([True], ["private"])
    assert {c["name"] for c in hub.created} == {"healed"} and hub.created[0]["organization"] == "me"
    wanted = {name: content for name, content in before.items() if name != "notes.txt"}
    assert hub.files == wanted and {"adapter_model.safetensors", "tokenizer.json", "README.md"} < wanted.keys()
    assert {p.name: p.read_bytes() for p in adapter.iterdir()} == before
    out, error = capsys.readouterr()
    assert out == f"{hub.url}/me/healed/commit/1\n"
    assert "says no licence" in error and "names the base by a folder of this machine" in error


def test_the_token_is_the_environments_and_is_shown_nowhere(hub, adapter, capsys, caplog):
    assert push(adapter) == 0
    assert {token for _, token in hub.asked} == {f"Bearer {TOKEN}"}
    assert TOKEN not in "".join(capsys.readouterr()) + caplog.text + "".join(content.decode("latin1") for content in hub.files.values())


def test_a_repository_that_is_there_gets_a_further_commit(hub, adapter):
    hub.visibility = "private"
    assert push(adapter) == 0
    assert not hub.created and "adapter_config.json" in hub.files


def test_what_everyone_sees_takes_a_flag(hub, adapter, capsys):
    hub.visibility = "public"
    assert push(adapter) == 2
    assert "--to=me/healed: is there and public; say --public" in capsys.readouterr().err and not hub.files
    assert push(adapter, "--public") == 0 and hub.files
    hub.visibility = None
    assert push(adapter, "--public") == 0
    assert [c["private"] if "private" in c else c["visibility"] for c in hub.created] in ([False], ["public"])


def test_a_licence_that_is_filled_in_is_enough(hub, adapter, capsys):
    card = adapter / "README.md"
    card.write_text(card.read_text("utf-8").replace("# license: (", "license: mit # ("), encoding="utf-8")
    assert push(adapter) == 0
    assert "says no licence" not in capsys.readouterr().err


def test_the_hubs_refusal_is_one_line(hub, adapter, capsys):
    hub.refuse = True
    assert push(adapter) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("panacea: --to=me/healed: not pushed: ") and "403" in error and TOKEN not in error
    assert not hub.files


@pytest.mark.parametrize(
    ("flags", "token", "message"),
    [
        (("--adapter=.", "--to=me/healed"), TOKEN, "--adapter=.: holds no adapter_config.json"),
        (("--to=me/healed",), TOKEN, "--adapter is not set"),
        (("--adapter={}", "--to=healed"), TOKEN, "--to=healed: write owner/name"),
        (("--adapter={}", "--to=me/healed"), "", "HF_TOKEN is not set in the environment"),
    ],
)
def test_bad_input_reaches_no_hub(flags, token, message, hub, adapter, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", token)
    assert panacea("push", *(flag.format(adapter) for flag in flags)) == 2
    assert message in capsys.readouterr().err and not hub.asked
