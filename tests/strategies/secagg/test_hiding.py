"""What the server sees of a client says nothing: uploads look uniform and unrelated, t − 1 shares leave all open.

Each statistic says how often it would fail by chance.
"""

import numpy as np
import pytest
from scipy.stats import chi2

from strategies.secagg.keys import KEY_BYTES
from strategies.secagg.opening import CannotOpenError
from strategies.secagg.shamir import combine_many
from strategies.secagg.statements import POINT_BYTES
from strategies.secagg.vault import Vault
from strategies.wire import unpack
from tests.support.masked import Cohort, Outcome, cohort

SIZE = 50_000
MODES = pytest.mark.parametrize("mode", ["semi-honest", "malicious"])


def upload(outcome: Outcome, client: int) -> np.ndarray:
    array = outcome.of("upload", client)["upload"]["masked"]
    return np.array(unpack(array), np.uint32)


def constant(value: float) -> dict[int, list[float]]:
    return {one: [value] * SIZE for one in range(5)}


@MODES
@pytest.mark.parametrize("value", [0.0, 1.0, -0.125])
def test_every_byte_of_an_upload_is_uniform_whatever_the_update(mode, value):
    """χ² of 256 values over 200,000 bytes, 5 clients × 3 updates × 2 modes: false alarm 6 · 10⁻⁷ in all."""
    limits = chi2.ppf([1e-8, 1 - 1e-8], 255)
    with cohort(5, mode=mode, vectors=constant(value)) as clients:
        outcome = clients.run()
        for one in range(5):
            counts = np.bincount(upload(outcome, one).view(np.uint8), minlength=256)
            expected = counts.sum() / 256
            statistic = float(((counts - expected) ** 2 / expected).sum())
            assert limits[0] < statistic < limits[1]
            assert counts.sum() == 4 * (SIZE + 4)


def correlation(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.corrcoef(first.astype(np.float64), second.astype(np.float64))[0, 1])


@MODES
def test_uploads_of_the_same_update_have_nothing_in_common(mode):
    """Between two sessions, and between two clients of one: |r| beyond 6 / √n by chance is 2 · 10⁻⁹ each."""
    with cohort(5, mode=mode, vectors=constant(0.5)) as clients:
        first = clients.run(lost={"unmask": range(5)})  # void: the same model again
        second = clients.run()
        for one in range(5):
            same, other = upload(first, one), upload(second, one)
            assert abs(correlation(same, other)) < 6 / SIZE**0.5
            assert np.mean(same == other) < 0.001
            neighbour = upload(second, (one + 1) % 5)
            assert abs(correlation(other, neighbour)) < 6 / SIZE**0.5
            # Nor is the difference the update's: that of two one-time pads is a third.
            counts = np.bincount((same - other).view(np.uint8), minlength=256)
            statistic = float(((counts - counts.mean()) ** 2 / counts.mean()).sum())
            assert statistic < chi2.ppf(1 - 1e-8, 255)


def held(clients: Cohort, outcome: Outcome, holder: int, owner: int) -> bytes:
    """The share that a client holds of another's secrets, from its disk."""
    session = clients.terms(outcome).session
    share = Vault(clients.folder, holder).recall(session)["held"][str(owner)]
    assert isinstance(share, bytes)
    return share


@MODES
def test_a_share_less_than_the_threshold_leaves_the_seed_uniform(mode):
    """Exactly: with two shares of three, every value of the third gives another seed, and each seed comes once."""
    with cohort(5, mode=mode) as clients:
        outcome = clients.run(until=clients.steps[3])
        assert clients.terms(outcome).threshold == 3
        shares = [held(clients, outcome, colluder, 0) for colluder in (1, 2)]
        points = [int.from_bytes(share[:POINT_BYTES], "big") for share in shares]
        assert points == [2, 3]
        symbols = [share[POINT_BYTES : POINT_BYTES + 2] for share in shares]
        table = np.empty((1 << 16, 3, 2), np.uint8)
        table[:, 0], table[:, 1] = (np.frombuffer(symbol, np.uint8) for symbol in symbols)
        table[:, 2] = np.arange(1 << 16, dtype="<u2").view(np.uint8).reshape(-1, 2)
        seeds = combine_many([*points, 4], table).view("<u2").ravel()
        assert len(set(seeds.tolist())) == 1 << 16
        true = Vault(clients.folder, 0).recall(clients.terms(outcome).session)["seed"]
        share = held(clients, outcome, 3, 0)
        third = int.from_bytes(share[POINT_BYTES : POINT_BYTES + 2], "little")
        assert seeds[third] == int.from_bytes(true[:2], "little")


def test_a_server_with_too_few_shares_cannot_open():
    with cohort(5) as clients:
        outcome = clients.run(lost={"unmask": [0, 1, 2]})
        assert "2 shares came" in outcome.void
        assert issubclass(CannotOpenError, Exception)
        assert {len(given) for given in outcome.session._seeds.values()} == {2}


def test_seeds_and_keys_are_new_in_every_session():
    """32 bytes each: that two are alike by chance is below 2⁻²⁴⁰."""
    seen: set[bytes] = set()
    with cohort(5) as clients:
        for _ in range(3):
            outcome = clients.run(until="upload")
            session = clients.terms(outcome).session
            for one in range(5):
                state = Vault(clients.folder, one).recall(session)
                for name in ("seed", "masking"):
                    assert len(state[name]) == KEY_BYTES
                    assert state[name] not in seen
                    seen.add(state[name])
