"""A client's own conditions: where they come from, and what they refuse."""

from pathlib import Path

import pytest

from strategies.collectors.masked import Masked
from strategies.protocols import ClientOwn
from strategies.secagg.keys import Identity
from strategies.secagg.policy import Policy, Roster, identity_file, node_policy, simulation_policy
from tests.support.masked import Cohort


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, dict[int, Identity]]:
    """A folder with a roster and private keys of five clients."""
    identities = {client: Identity.generate() for client in range(5)}
    for client, identity in identities.items():
        path = tmp_path / identity_file(client)
        path.write_bytes(identity.to_pem())
        path.chmod(0o600)
    Roster({client: one.public for client, one in identities.items()}).save(
        tmp_path / "roster.json"
    )
    return tmp_path, identities


def node(path: Path, client: object = 3, key: int = 3) -> dict[str, object]:
    return {
        "partition-id": client,
        "secagg-roster": str(path / "roster.json"),
        "secagg-identity": str(path / identity_file(key)),
    }


def test_a_roster_comes_back_from_its_file(keys):
    path, identities = keys
    roster = Roster.load(path / "roster.json")
    assert roster.keys == {client: one.public for client, one in identities.items()}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        '{"a": "00"}',
        '{"1": 5}',
        '{"1": "zz"}',
        '{"1": "00"}',
        '{"-1": "%s"}' % ("00" * 32),
    ],
)
def test_what_is_no_roster_is_named(tmp_path, text):
    path = tmp_path / "roster.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"roster\.json is no roster of identity keys"):
        Roster.load(path)
    with pytest.raises(ValueError, match="is no roster"):
        Roster.load(tmp_path / "missing")


@pytest.mark.parametrize(
    ("names", "words"),
    [(("3", "03"), "'03' is no client: write 3"), (("3", "3"), "a client is named twice")],
)
def test_a_client_has_one_name_in_a_roster(tmp_path, names, words):
    """Of two entries for one client the second would count, and hide the first."""
    path = tmp_path / "roster.json"
    entries = (f'"{name}": "{place:064x}"' for place, name in enumerate(names))
    path.write_text("{" + ", ".join(entries) + "}")
    with pytest.raises(ValueError, match=words):
        Roster.load(path)


def test_two_clients_with_one_key_are_no_roster():
    with pytest.raises(ValueError, match="the same identity key"):
        Roster({1: bytes(32), 2: bytes(32)})


def test_a_node_with_a_roster_trusts_no_server(keys):
    """Its policy is malicious, whatever the run asks for: a server cannot talk it out of that."""
    path, identities = keys
    for malicious in (False, True):
        settings = node(path) | {
            "secagg-least-cohort": 7,
            "secagg-dropouts": 0.2,
            "secagg-colluders": 0.0,
        }
        policy = node_policy(settings, malicious=malicious)
        assert (policy.malicious, policy.least_cohort) == (True, 7)
        assert (policy.dropouts, policy.colluders) == (0.2, 0.0)
        assert policy.identities == {3: identities[3]}


def test_a_node_without_a_roster_has_the_runs_mode_but_for_the_malicious_one():
    policy = node_policy({"secagg-least-cohort": 9}, malicious=False)
    assert (policy.malicious, policy.least_cohort) == (False, 9)
    with pytest.raises(ValueError, match="needs a roster"):
        node_policy({}, malicious=True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"secagg-identity": None}, "no secagg-identity"),
        ({"partition-id": "three"}, "a whole number is needed"),
        ({"partition-id": 4}, "not the key that the roster has for client 4"),
        ({"partition-id": 9}, "not the key that the roster has for client 9"),
        ({"secagg-identity": "/nowhere.pem"}, "holds no private identity key"),
        ({"secagg-roster": "/nowhere.json"}, "is no roster"),
        ({"secagg-least-cohort": 2}, "least_cohort = 2"),
        ({"secagg-least-cohort": 9.0}, "secagg-least-cohort is 9.0: a whole number is needed"),
        ({"secagg-dropouts": "0.2"}, "secagg-dropouts is '0.2': a number is needed"),
        ({"secagg-colluders": True}, "secagg-colluders is True: a number is needed"),
    ],
)
def test_a_node_config_that_cannot_be_right_is_refused(keys, change, words):
    settings = {k: v for k, v in (node(keys[0]) | change).items() if v is not None}
    with pytest.raises(ValueError, match=words):
        node_policy(settings, malicious=True)


def test_a_private_key_that_others_can_read_is_refused(keys):
    path, _ = keys
    (path / identity_file(3)).chmod(0o640)
    with pytest.raises(ValueError, match="others can read it: chmod 600"):
        node_policy(node(path), malicious=True)
    with pytest.raises(ValueError, match="others can read it"):
        simulation_policy(path / "roster.json", path, malicious=True, dropouts=0.3, colluders=0.1)


def test_a_simulations_clients_have_the_runs_keys(keys):
    path, identities = keys
    policy = simulation_policy(
        path / "roster.json", path, malicious=True, dropouts=0.3, colluders=0.1
    )
    assert policy.identities == identities
    plain = simulation_policy(None, None, malicious=False, dropouts=0.3, colluders=0.1)
    assert (plain.malicious, plain.roster) == (False, None)
    with pytest.raises(ValueError, match=r"collector\.identities is missing"):
        simulation_policy(path / "roster.json", None, malicious=True, dropouts=0.3, colluders=0.1)
    with pytest.raises(ValueError, match="needs a roster"):
        simulation_policy(None, None, malicious=True, dropouts=0.3, colluders=0.1)


def test_the_collectors_client_half_has_whose_policy_it_should(keys, tmp_path):
    path, _ = keys
    run = Masked(malicious=True, roster=path / "roster.json", identities=path, dropouts=0.2)
    simulated = run.client_half(ClientOwn(tmp_path / "own", {}, simulated=True))
    assert set(simulated._policy.identities) == set(range(5))
    # A node of its own takes nothing from the run: neither the roster nor the numbers.
    own = run.client_half(ClientOwn(tmp_path / "own", node(path), simulated=False))
    assert (set(own._policy.identities), own._policy.dropouts) == ({3}, 0.3)
    with pytest.raises(ValueError, match="needs a roster"):
        run.client_half(ClientOwn(tmp_path / "own", {"partition-id": 3}, simulated=False))


def test_conditions_other_than_the_runs_keep_a_client_out(keys, tmp_path):
    path, identities = keys
    roster = Roster.load(path / "roster.json")
    collector = Masked(malicious=True, dropouts=0.2, colluders=0.0)
    policies = {
        one: Policy(True, roster, {one: identities[one]}, colluders=0.2 if one == 0 else 0.0)
        for one in range(5)
    }
    outcome = Cohort(tmp_path / "own", collector, range(5), policies=policies).run()
    assert "this client's conditions" in str(outcome.refusals[0]) or "quorum" in str(
        outcome.refusals[0]
    )
    assert outcome.update.members == (1, 2, 3, 4)
