"""Omniscient attackers on the engine: what they see, what they send, and what goes wrong around them."""

import io
import json

import numpy as np
import pytest
from flwr.app import ArrayRecord
from safetensors.numpy import load_file

from fl_app.assembly import Assembly, composed, make_client
from fl_app.cli.console import PlainConsole
from fl_app.compose import compose
from fl_app.engine import Adversary, AdversaryPool, EngineGrid, InProcessPool
from fl_app.run import run_engine
from strategies.attacks import LIE
from strategies.stages.clip import l2_norm
from strategies.update import CONTROL, DELTA
from strategies.wire import RECEIPT, UPDATE, pack, unpack
from tests.fl_app.engine.engine_helpers import INSTANT, CountingPool, echo, make_grid, request
from tests.support.attacks import Recording, Watching

SMALL = ["task=digits", "runtime.batch_clients=off"]
WATCHED = [
    "num_clients=6", "rounds=2", "runtime.workers=1", "attack._target_=tests.support.attacks.Recording",
    "attack.fraction=0.34", "combiner._target_=tests.support.attacks.Watching",
]  # fmt: skip


def run(folder, *overrides):
    console = PlainConsole(io.StringIO())
    result = run_engine(compose([*SMALL, f"output_dir={folder}", *overrides]), console)
    return result, json.loads(result.summary_path.read_text())


def model_of(result):
    return load_file(result.summary_path.parent / "model.safetensors")


def same_model(one, other) -> bool:
    first, second = model_of(one), model_of(other)
    return all(np.array_equal(first[name], second[name]) for name in first)


def rows(summary):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in summary["history"]]


@pytest.fixture(autouse=True)
def _forget():
    Recording.rounds.clear()
    Watching.rounds.clear()


def watched(folder, *overrides):
    """A watched run: its summary, then for each round what the adversary saw, said, and the server was sent."""
    _, summary = run(folder, *WATCHED, *overrides)
    shown = [
        (seen, lies, sent)
        for (seen, lies), sent in zip(Recording.rounds, Watching.rounds, strict=True)
    ]
    return summary, shown


def attackers_of(*overrides) -> frozenset[int]:
    config = compose([*SMALL, *WATCHED, *overrides])
    return Assembly(config).attack.attackers(config.num_clients, config.seed)


def assert_omniscient(seen, lies, sent, attackers):
    """The honest updates are those that the server took, and every attacker sent the lie."""
    assert [one.members[0] for one in seen.honest] == sorted(set(sent) - attackers)
    for one in seen.honest:
        (client,) = one.members
        assert one.weight == sent[client].weight
        for name, section in one.sections.items():
            np.testing.assert_array_equal(section.vector, sent[client].sections[name].vector)
    for client in set(sent) & attackers:
        for name, lie in lies.items():
            np.testing.assert_array_equal(lie, sent[client].sections[name].vector)


def test_attackers_see_exactly_the_honest_updates_of_the_round_and_all_send_the_lie(tmp_path):
    attackers = attackers_of()
    summary, shown = watched(tmp_path, "evaluate.federated_every=1")
    assert [seen.round for seen, _, _ in shown] == [1, 2]
    for seen, lies, sent in shown:
        assert len(sent) == 6
        assert seen.attackers == tuple(sorted(attackers))
        assert_omniscient(seen, lies, sent, attackers)
    assert all(row["federated"]["accuracy"] > 0 for row in summary["history"])


def test_scaffolds_control_variates_are_seen_and_lied_about_too(tmp_path):
    _, shown = watched(tmp_path, "client=scaffold", "server=scaffold", "combiner.weighting=uniform")
    for seen, lies, sent in shown:
        assert set(lies) == {DELTA, CONTROL}
        assert_omniscient(seen, lies, sent, attackers_of())


def test_a_clip_acts_on_the_lie_and_is_seen_through_by_the_adversary(tmp_path):
    _, shown = watched(tmp_path, "clip=fixed", "clip.norm=0.05", "attack.epsilon=40")
    for seen, lies, sent in shown:
        assert l2_norm(lies[DELTA]) > 0.5
        for client, update in sent.items():
            assert l2_norm(update.delta.vector) <= 0.05
            if client in attackers_of():
                cosine = update.delta.vector @ lies[DELTA] / 0.05 / l2_norm(lies[DELTA])
                assert cosine == pytest.approx(1, abs=1e-4)
        for one in seen.honest:
            np.testing.assert_array_equal(one.delta.vector, sent[one.members[0]].delta.vector)


def test_dropped_out_and_failing_clients_are_not_seen_and_break_nothing(tmp_path):
    fragile = ["client._target_=tests.support.attacks.Fragile", "runtime.dropout=0.2"]
    honest = sorted(set(range(6)) - attackers_of())
    summary, shown = watched(tmp_path, *fragile, f"client.failing=[{honest[0]}]", "rounds=6")
    assert len(shown) == 6
    assert sum(row["clients_failed"] for row in summary["history"]) > 6
    for seen, lies, sent in shown:
        assert honest[0] not in {one.members[0] for one in seen.honest}
        assert_omniscient(seen, lies, sent, attackers_of())


def test_with_no_honest_update_to_be_seen_attackers_send_their_own(tmp_path):
    honest = sorted(set(range(6)) - attackers_of())
    failing = [
        "client._target_=tests.support.attacks.Fragile",
        f"client.failing={honest}".replace(" ", ""),
    ]
    _, summary = run(tmp_path, *WATCHED, *failing)
    assert not Recording.rounds
    assert [set(sent) for sent in Watching.rounds] == [attackers_of()] * 2
    assert summary["final"]["accuracy"] > 0.3
    alone, _ = run(tmp_path / "all", "num_clients=4", "rounds=2", "attack=ipm", "attack.fraction=1")
    none, _ = run(tmp_path / "none", "num_clients=4", "rounds=2")
    assert same_model(alone, none)


@pytest.mark.parametrize(
    ("attack", "counts"),
    [("alie", (2,)), ("mimic", (3,)), pytest.param("min_max", (2, 3), marks=pytest.mark.slow)],
)
def test_the_number_of_workers_changes_nothing(tmp_path, attack, counts):
    chosen = [f"attack={attack}", "attack.fraction=0.4", "num_clients=10", "rounds=2"]
    chosen += ["sampler.fraction=0.8", "runtime.dropout=0.1"]
    one, summary = run(tmp_path / "1", *chosen, "runtime.workers=1")
    for workers in counts:
        other, theirs = run(tmp_path / str(workers), *chosen, f"runtime.workers={workers}")
        assert same_model(one, other)
        assert rows(summary) == rows(theirs)


def test_nor_does_it_where_clients_are_trained_together(tmp_path):
    chosen = [
        "attack=alie",
        "attack.fraction=0.4",
        "num_clients=10",
        "rounds=2",
        "runtime.batch_clients=3",
    ]
    one, _ = run(tmp_path / "1", *chosen, "runtime.workers=1")
    three, _ = run(tmp_path / "3", *chosen, "runtime.workers=3")
    apart, _ = run(tmp_path / "apart", *chosen, "runtime.workers=1", "runtime.batch_clients=off")
    assert same_model(one, three)
    together, singly = model_of(one), model_of(apart)
    for name in together:
        np.testing.assert_allclose(together[name], singly[name], atol=1e-5)


def test_a_resumed_run_remembers_what_the_adversary_had_learnt(tmp_path):
    chosen = ["attack=mimic", "attack.warmup=3", "attack.fraction=0.3", "num_clients=8"]
    chosen += ["sampler.fraction=0.7", "runtime.workers=1"]
    whole, summary = run(tmp_path / "whole", *chosen, "rounds=5")
    run(tmp_path / "parts", *chosen, "rounds=2")
    parts, resumed = run(tmp_path / "parts", *chosen, "rounds=5")
    assert same_model(whole, parts)
    assert rows(summary) == rows(resumed)


def test_a_grid_of_whole_rounds_gives_its_pool_all_requests_at_once() -> None:
    for whole, calls in ((False, [255, 45]), (True, [300])):
        pool = CountingPool(echo)
        grid = make_grid(pool, num_clients=300, devices=INSTANT, whole_rounds=whole)
        arrays = ArrayRecord([np.zeros(2**18, np.float32)])  # 256 of them are a little over 256 MiB
        grid.send_and_receive([request(grid, client, arrays=arrays) for client in range(300)])
        assert [sum(map(len, call)) for call in pool.calls] == calls


def test_requests_of_a_round_without_attackers_pass_as_they_are():
    inner = CountingPool(echo)
    pool = AdversaryPool(inner, Adversary(Recording(), (), 0), frozenset({1}))
    pool.start()
    grid = make_grid(pool, num_clients=4, devices=INSTANT, whole_rounds=True)
    # Client 1 attacks when it trains, not when it evaluates.
    replies = grid.send_and_receive([request(grid, client, kind="evaluate") for client in range(4)])
    assert len(replies) == 4
    assert inner.calls == [[[0], [1], [2], [3]]]
    pool.close()
    with pytest.raises(RuntimeError, match="closed"):
        list(inner.stream([[]]))


class Tampering(InProcessPool):
    """A pool that remembers what it was asked, and may spoil what honest clients answer."""

    spoil = staticmethod(lambda reply: reply)
    victim = -1

    def __init__(self, factory):
        super().__init__(factory)
        self.asked = []

    def stream(self, chunks):
        self.asked.extend(message for chunk in chunks for message in chunk)
        for chunk, replies in zip(chunks, super().stream(chunks), strict=True):
            clients = [message.content["config"]["client"] for message in chunk]
            yield [
                self.spoil(reply) if client == self.victim else reply
                for client, reply in zip(clients, replies, strict=True)
            ]


class Pushing(EngineGrid):
    """A grid that keeps what it was given to send."""

    def push_messages(self, messages):
        self.pushed = list(messages)
        return super().push_messages(self.pushed)


def one_round(pool=Tampering):
    """A round of six clients on a pool of one's own: the pool and the grid."""
    assembly = Assembly(compose([*SMALL, *WATCHED]))
    inner = pool(lambda: make_client(assembly, "engine").answer)
    grid = Pushing(
        AdversaryPool(inner, assembly.adversary, attackers_of()),
        num_clients=6, devices=INSTANT, seed=0, work=lambda client: 1.0, whole_rounds=True,
    )  # fmt: skip
    composed(assembly, 6).start(grid, assembly.network.arrays(), num_rounds=1)
    return inner, grid


def test_the_servers_requests_hold_no_lie_afterwards():
    """What was pushed stays as it is: the lie is in a request of the attacker's own, and shared among them."""
    pool, grid = one_round()
    told = [message.content for message in pool.asked if LIE in message.content]
    assert {content["config"]["client"] for content in told} == attackers_of()
    assert len({id(content[LIE]) for content in told}) == 1
    assert not any(LIE in message.content for message in grid.pushed)


def without_receipt(reply):
    del reply.content[RECEIPT]
    return reply


def with_nan(reply):
    vector = np.full(unpack(reply.content[UPDATE][DELTA]).shape, np.nan, np.float32)
    reply.content[UPDATE] = ArrayRecord({DELTA: pack(vector)})
    return reply


@pytest.mark.parametrize("how", [without_receipt, with_nan])
def test_what_the_server_will_refuse_is_not_seen(how):
    class Spoiling(Tampering):
        spoil = staticmethod(how)
        victim = min(set(range(6)) - attackers_of())

    one_round(Spoiling)
    ((seen, lies),), (sent,) = Recording.rounds, Watching.rounds
    assert Spoiling.victim not in sent
    assert len(sent) == 5
    assert_omniscient(seen, lies, sent, attackers_of())
