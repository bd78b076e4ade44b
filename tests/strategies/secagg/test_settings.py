"""A server that tells one client other settings than the rest gets no sum: not by the message, not by the terms."""

from dataclasses import replace

import numpy as np
import pytest
from flwr.app import ConfigRecord, RecordDict

from strategies.configuration import config_digest
from strategies.encoding import encode
from strategies.protocols import Job
from strategies.records import bundle, extended, record_in
from strategies.stages import Clip
from strategies.wire import CONFIG, TRAINS, Refused
from tests.support.masked import Cohort, altered, cohort

MODES = pytest.mark.parametrize("mode", ["semi-honest", "malicious"])
COMMON = {
    "clip.norm": 1.0, "proximal-mu": 0.1, "num-clients": 5, "attempt": 0, "sections": ["delta"], "buffers": [],
}  # fmt: skip
VICTIM = 2


class Obedient(Cohort):
    """Clients that clip as their configuration tells them."""

    def job(self) -> Job:
        return replace(super().job(), config=COMMON)

    def answer(self, client: int, content: RecordDict) -> RecordDict:
        config = content[CONFIG]
        if not config.get(TRAINS, True) or self.clients[client].prepare(content) is not None:
            return super().answer(client, content)
        update = encode(self.updated(client), [Clip(norm=1.0)], config, client)
        return self.clients[client].reply(update, content)


@pytest.fixture
def obedient(mode):
    with cohort(mode=mode) as plain:
        yield Obedient(plain.folder, plain.collector, plain.members)


def told(content: RecordDict, **settings: object) -> RecordDict:
    config = extended(content[CONFIG], settings)
    return bundle({**dict(content.items()), CONFIG: config})


@MODES
def test_the_same_settings_for_all_give_the_sum(obedient):
    outcome = obedient.run()
    assert outcome.update.members == tuple(range(5)), outcome.refusals


@MODES
def test_no_sum_of_one_client_comes_of_telling_the_others_to_clip_at_nothing(obedient):
    def hook(step, client, content):
        return content if client == VICTIM else told(content, **{"clip.norm": 1e-12})

    outcome = obedient.run(request=hook)
    assert outcome.update is None
    assert "after the phase upload" in outcome.void
    others = set(range(5)) - {VICTIM}
    assert set(outcome.refusals) == others
    assert all("the configuration is not the one" in str(outcome.refusals[one]) for one in others)


@MODES
def test_nor_of_telling_them_other_terms_as_well(obedient):
    """Each has then agreed to what it is told, but their keys are for different sessions."""
    lie = {"clip.norm": 1e-12}
    digest = config_digest({**COMMON, **lie, "server-round": 1, "version": 0})

    def hook(step, client, content):
        if client == VICTIM:
            return content
        content = told(content, **lie)
        return altered(content, settings=digest) if step == "keys" else content

    outcome = obedient.run(request=hook)
    assert outcome.update is None
    assert outcome.void


@MODES
@pytest.mark.parametrize(
    "change",
    [
        {"clip.norm": 0.5}, {"proximal-mu": 1e9}, {"num-clients": 6}, {"attempt": 1}, {"sections": []},
        {"buffers": ["w"]}, {"new": 1}, {"clip.norm": None}, {"server-round": 2}, {"version": 1},
    ],
    ids=lambda change: "-".join(f"{key}={value}" for key, value in change.items()),
)  # fmt: skip
def test_a_client_trains_and_sends_nothing_under_another_setting(obedient, change):
    outcome = obedient.run(until="upload")
    request = outcome.of("upload", VICTIM, "request")
    config = {**dict(request[CONFIG].items()), **change}
    kept = {key: value for key, value in config.items() if value is not None}
    other = bundle({**dict(request.items()), CONFIG: extended(ConfigRecord(), kept)})
    client = obedient.clients[VICTIM]
    with pytest.raises(Refused, match="terms"):
        client.prepare(other)
    assert client.prepare(request) is None
    with pytest.raises(Refused, match="terms"):  # nor if it is changed while it trains
        client.reply(obedient.updated(VICTIM), other)
    assert client.reply(obedient.updated(VICTIM), request)


@MODES
@pytest.mark.parametrize("key", ["server-round", "version"])
def test_each_step_is_of_the_round_and_version_of_the_terms(obedient, mode, key):
    for step in obedient.steps:
        outcome = obedient.run(until=step)
        request = outcome.of(step, VICTIM, "request")
        number = record_in(request, CONFIG, ConfigRecord)[key]
        with pytest.raises(Refused, match=f"the terms are of {key}"):
            obedient.answer(VICTIM, told(request, **{key: number + 1}))
        # Another model, or those who revealed would refuse the next session.
        obedient.model = {"w": np.full(6, float(len(step)), np.float32)}
