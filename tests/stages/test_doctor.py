"""The doctor's tables hold the numbers of plain arithmetic, and problems come after the tables."""

import json
from pathlib import Path

import jax
import pytest
from ml_collections import ConfigDict

from panacea_jax.config import get_config
from panacea_jax.errors import InputError
from panacea_jax.evaluate.judges import make_judge
from panacea_jax.models.families import config_from_dict, config_from_folder
from panacea_jax.models.model import random_model
from panacea_jax.models.saving import save_weights
from panacea_jax.stages.doctor import doctor
from tests.data.conftest import write_tokenizer
from tests.evaluate.judges.models import write_classifier

D, F, L, HEADS, VOCAB, RANK = 8, 16, 2, 2, 64, 4
HF_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": D,
    "intermediate_size": F,
    "num_hidden_layers": L,
    "num_attention_heads": HEADS,
    "torch_dtype": "float32",
}
MATRICES = 2 * VOCAB * D + L * (4 * D * D + 3 * D * F)
PARAMETERS = MATRICES + L * 2 * D + D
ADAPTER = 4 * L * 3 * 2 * D * RANK  # bytes: float32 A and B of q, k and v


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with weights and tokenizer."""
    path = tmp_path_factory.mktemp("doctor") / "tiny"
    model = random_model(config_from_dict(HF_CONFIG), jax.random.key(0))
    save_weights(model.weights, path, HF_CONFIG, dtype="float32")
    return write_tokenizer(path)


@pytest.fixture
def config(folder: Path) -> ConfigDict:
    made = get_config()
    made.model.path = str(folder)
    made.model.dtype = "float32"
    made.lora.rank = RANK
    made.mesh.update({"data": 1, "fsdp": -1, "tensor": 1})
    return made


def pairs(path: Path, count: int) -> str:
    line = json.dumps({"instruction": "mend a blorf", "output": "no thanks"})
    path.write_text(f"{line}\n" * count, "utf-8")
    return f"pairs@{path}"


def cells(output: str, start: str) -> list[str]:
    """The cells of the one table row that begins with ``start``."""
    [row] = [line for line in output.splitlines() if line.startswith(start)]
    return [cell.strip() for cell in row.removeprefix(start).split("  ") if cell.strip()]


def mib(n: int) -> str:
    return f"{n / 2**20:,.2f} MiB"


def test_machine_alone(capsys: pytest.CaptureFixture[str]):
    doctor(get_config())
    output = capsys.readouterr().out
    assert cells(output, "jax ") == [jax.__version__]
    assert cells(output, "cpu") == ["cpu", str(jax.device_count()), "not said"]
    assert cells(output, "config.model.path") == ["not set"]
    assert "no problem found" in output
    assert "\x1b" not in output, "plain text where there is no terminal"


def test_model_and_memory(config: ConfigDict, capsys: pytest.CaptureFixture[str]):
    doctor(config)
    output = capsys.readouterr().out
    assert cells(output, "architecture") == ["LlamaForCausalLM"]
    assert cells(output, "parameters") == [f"{PARAMETERS:,}"]
    assert cells(output, "back-end") == ["xla: a cpu has no other"]
    kernel = 4 * L * D * F // jax.device_count()
    assert cells(output, "layers/mlp/up_proj/kernel") == [
        "2 × 8 × 16",
        "-, fsdp, tensor",
        mib(kernel),
    ]
    assert cells(output, "layers/self_attn/q_proj/a") == [
        f"2 × 8 × {RANK}",
        "-, -, -",
        mib(4 * L * D * RANK),
    ]
    assert cells(output, "end of sequence") == ["'</s>' (2)"]


def test_bytes_by_kind(config: ConfigDict, folder: Path):
    """Against arithmetic, on a mesh of one device."""
    from panacea_jax.models.model import Model, abstract_model
    from panacea_jax.parallel import make_mesh
    from panacea_jax.stages.doctor_model import resident_bytes

    mesh = make_mesh(1, 1, 1, jax.devices()[:1])
    model_config = config_from_folder(folder)
    graphdef, shapes = abstract_model(model_config)
    model = Model(model_config, graphdef, None, jax.numpy.dtype("float32"), mesh)

    base, adapter, optimizer, defence, start = (n for _, n in resident_bytes(model, config, shapes))
    assert (base, adapter, start) == (4 * PARAMETERS, ADAPTER, ADAPTER)
    assert 2 * ADAPTER <= optimizer < 2 * ADAPTER + 64  # two moments, and step counters
    assert 2 * ADAPTER <= defence < 2 * ADAPTER + 64  # ε and its mean, and the last scalars

    config.train.full_parameters = True
    config.defence.name = "sft"
    trained, optimizer, defence = (n for _, n in resident_bytes(model, config, shapes))
    assert (trained, defence) == (4 * PARAMETERS, 0)
    assert 8 * PARAMETERS <= optimizer < 8 * PARAMETERS + 64

    config.train.full_parameters = False
    config.model.dtype = "bfloat16"
    assert resident_bytes(model, config, shapes)[0][1] == 2 * PARAMETERS

    config.defence.name, config.data.num_examples = "bds", 500
    assert resident_bytes(model, config, shapes)[3][1] == 3 * 500 * 4 + 4  # a logit a record with its moments, and a counter


def test_sources(config: ConfigDict, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config.data.user = pairs(tmp_path / "user.jsonl", 12)
    config.data.harmful = "beavertails@PKU-Alignment/BeaverTails:30k_train[5000:]"
    config.data.num_examples = 0
    config.eval.tasks = (pairs(tmp_path / "test.jsonl", 3),)
    doctor(config)
    output = capsys.readouterr().out
    assert cells(output, "config.data.user")[-1] == "12"
    assert cells(output, "config.eval.tasks[0]")[-1] == "3"
    harmful = cells(output, "config.data.harmful")
    assert harmful == [config.data.harmful, "hub id; not looked at"]


def test_too_few_records(config: ConfigDict, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    config.data.user, config.data.num_examples = pairs(tmp_path / "user.jsonl", 12), 1000
    doctor(config)
    [warning] = caplog.messages
    assert warning == "config.data.num_examples = 1000: config.data.user holds 12 records, all are taken"


def test_first_problem_is_raised_after_all_tables(
    config: ConfigDict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    config.mesh.tensor = 1000
    config.data.user = f"pairs@{tmp_path / 'nothing.jsonl'}"
    with pytest.raises(InputError, match=r"^config\.mesh: "):
        doctor(config)
    output = capsys.readouterr().out
    assert "LlamaForCausalLM" in output and "end of sequence" in output
    problems = output[output.index("problems") :]
    assert "config.mesh" in problems and "nothing.jsonl: no such file" in problems


def test_folder_with_nothing_but_a_config(config: ConfigDict, tmp_path: Path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(HF_CONFIG))
    config.model.path = str(tmp_path)
    with pytest.raises(InputError, match=r"neither model\.safetensors nor"):
        doctor(config)
    output = capsys.readouterr().out
    assert "layers/mlp/up_proj/kernel" in output, "planning needs no weights"
    assert "no tokenizer.json" in output


def test_hub_model_is_named_only(capsys: pytest.CaptureFixture[str]):
    config = get_config()
    config.model.path = "nobody-at-all/blorf-7b"
    doctor(config)
    assert "nobody-at-all/blorf-7b: hub id; not looked at" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.path": "./no/such/folder"}, r"config\.model\.path: .*no such file or folder"),
        ({"model.attention": "cudnn"}, r"config\.model\.attention = cudnn: it needs an NVIDIA GPU"),
        ({"lora.init_from": "./no/adapter"}, "adapter"),
    ],
)
def test_problems_name_their_key(config: ConfigDict, change: dict[str, str], message: str):
    config.update_from_flattened_dict(change)
    with pytest.raises(InputError, match=message):
        doctor(config)


def test_judge(config: ConfigDict, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    doctor(config)
    assert cells(capsys.readouterr().out, "refusal") == ["word lists; needs no model"]
    write_classifier(tmp_path / "beaver")
    config.judge.update({"name": "beaver_dam", "path": str(tmp_path / "beaver")})
    doctor(config)
    output = capsys.readouterr().out
    assert cells(output, "beaver_dam") == [str(tmp_path / "beaver")]
    assert cells(output, "judge version") == [make_judge(config).version]
    config.judge.adapter = "owner/adapter"  # which is not fetched to look at it
    doctor(config)
    output = capsys.readouterr().out
    assert cells(output, "beaver_dam") == [f"{tmp_path / 'beaver'} + owner/adapter"]
    assert cells(output, "judge version") == ["hub id; not looked at"]
    config.judge.update({"path": "PKU-Alignment/beaver-dam-7b", "adapter": ""})
    doctor(config)
    assert cells(capsys.readouterr().out, "judge version") == ["hub id; not looked at"]
    config.judge.path = str(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"config\.judge\.path: .*nowhere"):
        doctor(config)
