"""Signatures made by minisign itself (0.11): taken as they are, and not when a byte of anything is another."""

import pytest

from panacea_jax.errors import InputError
from panacea_jax.signatures import signed_by

KEY = """untrusted comment: minisign public key 985889389638F2CF
RWTP8jiWOIlYmE7pYCduS/jD9S1LNzcdkBUjDKm5+VNTXiuY1qRNdoWi
"""
CONTENT = "the manifest of a stage\n"
SIGNATURE = """untrusted comment: signature from minisign secret key
RUTP8jiWOIlYmEV3c0qZWb9nPYdbpF6lmsbn+acYdmcSWNhAMa+VJzLkgURK+ZpjeIVuYRNICJROgvmmk1ITR+ATHfQN7MHYfgQ=
trusted comment: invented, of a test
65t4rO2Pobrix5fRenAjWi+Qziw8m/Ljz1W0Dz98I+DD9zZQ63LWfuHFDkRVYBoZws1kQ8o4hctoJMuqDC/CCQ==
"""


def comment_of(folder, content=CONTENT, signature=SIGNATURE, key=KEY):
    for name, text in (("manifest.json", content), ("manifest.json.minisig", signature), ("minisign.pub", key)):
        (folder / name).write_text(text)
    return signed_by(folder / "minisign.pub")(folder / "manifest.json")


def test_what_minisign_signed(tmp_path):
    assert comment_of(tmp_path) == "invented, of a test"


@pytest.mark.parametrize(
    "changes",
    [
        {"content": CONTENT[:-1]}, {"content": CONTENT.replace("stage", "Stage")}, {"signature": SIGNATURE.replace("a test", "A test")},
        {"signature": SIGNATURE.replace("V3c0q", "V3c0Q")}, {"signature": SIGNATURE[:90]}, {"signature": ""}, {"signature": "[" * 10**6},
        {"key": KEY.replace("TNdoWi", "TNdoWa").replace("qRNdoWi", "qRNdoWa")},
    ],
)  # fmt: skip
def test_what_was_changed(tmp_path, changes):
    with pytest.raises(InputError, match=r"minisig: no signature of .*minisign\.pub on manifest\.json as it is"):
        comment_of(tmp_path, **changes)
