"""Signatures of minisign, beside the file that they are of: by them whoever deploys a run knows who stands for it.

A manifest names the hash of every file of its stage, so one signature is of all of them. Making one is left to minisign itself.
"""

from collections.abc import Callable
from pathlib import Path

from panacea_jax.errors import InputError
from panacea_jax.untrusted import MIB, parsing, read_bounded

SUFFIX = ".minisig"


def signed_by(key: Path) -> Callable[[Path], str]:
    """What tells whether a file is signed by the owner of a public key.

    Args:
        key: file of the public key, as ``minisign -G`` writes it.

    Returns:
        A function of a file: what its signature, ``FILE.minisig``, says in its trusted comment. It raises ``InputError`` where there is
        none, or one of another key or of other content.

    Raises:
        InputError: no such key, or the extra "sign" is not installed.
    """
    try:
        import minisign
    except ImportError as error:
        raise InputError("--signed_by: needs py-minisign, the extra [sign]: pip install 'panacea_jax[sign]'") from error
    with parsing(f"--signed_by={key}", "not a public key of minisign"):
        public = minisign.PublicKey.from_bytes(read_bounded(key, MIB))

    def look(file: Path) -> str:
        beside = file.with_name(file.name + SUFFIX)
        if not beside.is_file():
            raise InputError(f"{file}: not signed (no {beside.name})")
        with parsing(beside, f"no signature of {key} on {file.name} as it is"):
            signature = minisign.Signature.from_bytes(read_bounded(beside, MIB))
            public.verify(read_bounded(file), signature)
        return str(signature.trusted_comment)

    return look
