"""Where the disk has no room for an owner's ciphertexts, a round goes on without that owner."""

import pytest

from tests.fl_app.test_encrypted_runs import ENCRYPTED, EXACT
from tests.fl_app.test_run import run


@pytest.mark.parametrize(("room", "refused"), [(0.1, {"party": 1}), (10.0, {})])
def test_a_run_takes_no_more_of_the_disk_than_it_may(tmp_path, room, refused):
    _, summary, _ = run(
        tmp_path, *ENCRYPTED, *EXACT, "rounds=1", "admission.on_shortfall=skip", f"compute.owner_disk_mb={room}"
    )  # fmt: skip
    assert summary["rejections"] == refused
    stored = sum(path.stat().st_size for path in tmp_path.rglob("compute/ciphertexts/*/*.npy"))
    assert (stored > 0) == (not refused)
    assert stored <= room * 2**20
