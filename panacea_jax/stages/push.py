"""The command ``push``: an exported adapter with its tokenizer and its card into a repository of the Hugging Face hub."""

import os
from pathlib import Path

from panacea_jax.data.tokenizer import TOKENIZER_FILES
from panacea_jax.errors import InputError, without_secrets
from panacea_jax.export import warn_if_bare
from panacea_jax.models.hub import is_hub_id
from panacea_jax.models.peft import WEIGHTS_FILE
from panacea_jax.models.peft_config import CONFIG_FILE
from panacea_jax.progress import say
from panacea_jax.stages.card import CARD, LICENCE
from panacea_jax.untrusted import read_object

TOKEN = "HF_TOKEN"
# Nothing else of the folder leaves this machine.
FILES = (CONFIG_FILE, WEIGHTS_FILE, CARD, *TOKENIZER_FILES)


def push_adapter(adapter: Path, to: str, *, public: bool = False) -> None:
    """Commit an adapter to a repository, which is made if there is none, and print the commit's address.

    The token is that of the environment, HF_TOKEN; no other is looked for. What such a repository holds already stays in its history.

    Args:
        adapter: PEFT folder.
        to: ``owner/name``.
        public: for everyone to see; without it a new repository is private, and one that is public already is refused.

    Raises:
        InputError: no PEFT folder, a name of another form, no token, or the hub's refusal.
    """
    if missing := [name for name in (CONFIG_FILE, WEIGHTS_FILE) if not (adapter / name).is_file()]:
        raise InputError(f"--adapter={adapter}: holds no {missing[0]}: not a PEFT folder with safetensors")
    if not is_hub_id(to):
        raise InputError(f"--to={to}: write owner/name")
    if not os.environ.get(TOKEN):
        raise InputError(f"{TOKEN} is not set in the environment: a token of the hub with the right to write")
    _look_at(adapter)
    import huggingface_hub
    from huggingface_hub.errors import RepositoryNotFoundError

    api = huggingface_hub.HfApi(token=os.environ[TOKEN])
    try:
        try:
            seen_by_all = not api.model_info(to).private
        except RepositoryNotFoundError:
            api.create_repo(to, private=not public)
        else:
            if seen_by_all and not public:
                raise InputError(f"--to={to}: is there and public; say --public if this is to be seen by everyone")
        done = api.upload_folder(repo_id=to, folder_path=adapter, allow_patterns=list(FILES), commit_message="Upload adapter")
    except InputError:
        raise
    except Exception as error:
        reason = f"{error}".strip().splitlines() or [type(error).__name__]
        raise InputError(f"--to={to}: not pushed: {without_secrets(reason[0])}") from error
    print(done.commit_url)


def _look_at(adapter: Path) -> None:
    """Say what others would stumble over."""
    warn_if_bare(adapter, "pushing")
    card = adapter / CARD
    said = card.read_text("utf-8").splitlines() if card.is_file() else []
    if not any(line.startswith(LICENCE) for line in said):
        say(f"{card}: says no licence; fill in its line `{LICENCE}`")
    base = str(read_object(adapter / CONFIG_FILE).get("base_model_name_or_path") or "")
    if not is_hub_id(base) or Path(base).is_dir():
        say(f"{adapter / CONFIG_FILE}: names the base by a folder of this machine ({base}); others have to name the base themselves")
