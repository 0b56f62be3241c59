"""Booster, Booster + Vaccine, RepNoise and TAR on fsdp 4 × tensor 2 train what one device does, Booster with LoRA dropout."""


from tests.on_devices import on_devices
from tests.tiny import write_model


def test_eight_devices_train_what_one_does(tmp_path):
    folder = write_model(tmp_path / "base")
    found = on_devices("tests.parallel.sharded_alignment", folder)
    assert found.pop("devices") == 8
    assert set(found) == {"booster", "booster_vaccine", "repnoise", "tar"}
    for name, of in found.items():
        assert of["error"] < 1e-5, (name, of)
        assert of["moved"] > 1e-3, (name, of)
