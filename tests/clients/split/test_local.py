"""The clients' half over turns: batches in a turn, processes that come and go, turns asked for twice, hostile peers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from torch.nn.functional import cross_entropy

from clients.split import SplitTrainer
from clients.split.coding import decode, encode, pack_rows, relative_error
from clients.trainers.sgd import seed_generators
from strategies.collectors import Split
from strategies.collectors.split_session import LAST, SPLIT, TURN
from strategies.protocols import Reply
from strategies.seeds import integer
from strategies.update import Update
from strategies.wire import CONFIG, RECEIPT, pack
from tests.support.split import Sentences, SplitRun, save_tiny

TRAINER = SplitTrainer(batch_size=7, local_epochs=1, lr=0.01)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"))


def run_of(path, tiny, **settings) -> SplitRun:
    """Runs of the same settings are the same, heads too."""
    given = {"task": Sentences(40), "trainer": TRAINER, **settings}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return SplitRun(path, tiny, **given)


def vector(became) -> np.ndarray:
    assert isinstance(became, Update), became
    return became.delta.vector


def same(one: Update, other: Update) -> None:
    np.testing.assert_array_equal(vector(one), vector(other))
    assert one.metrics == other.metrics


def reference(run: SplitRun, m: int) -> dict[str, np.ndarray]:
    """Exchanges of m batches as the settings' documentation has them, by torch's own optimisers: the changes."""
    model, examples = run.build(), run.data().train(0)
    before = {name: torch.from_numpy(array.copy()) for name, array in run.arrays.items()}
    model.load_state_dict(before)
    lower = [p for n, p in model.named_parameters() if n in model.clients_names()]
    upper = [p for n, p in model.named_parameters() if n not in model.clients_names()]
    client, server = (torch.optim.AdamW(half, lr=0.01, weight_decay=0.0) for half in (lower, upper))
    with torch.random.fork_rng(devices=[]):
        seed_generators(torch.device("cpu"), integer(5, "train", 1, 0))
        batches = list(run.trainer.batches(len(examples)))
    for at in range(0, len(batches), m):
        turn = batches[at : at + m]
        sent = [model.lower(examples.inputs[batch]) for batch in turn]
        made = [(a.detach().requires_grad_(), lengths) for a, lengths in sent]
        if model.u_shaped:  # all states are of the server's parameters before the turn, too
            states = [model.upper(a, lengths) for a, lengths in made]
            given = [s.detach().requires_grad_() for s in states]
            losses = [
                cross_entropy(model.lower.finish(s, lengths), examples.targets[batch])
                for s, (_, lengths), batch in zip(given, made, turn, strict=True)
            ]
            heads = [
                torch.autograd.grad(x, [s, *lower], allow_unused=True)
                for x, s in zip(losses, given, strict=True)
            ]
            ups = [
                torch.autograd.grad(s, [a, *upper], h[0], allow_unused=True)
                for s, (a, _), h in zip(states, made, heads, strict=True)
            ]
            steps = [(server, upper, u[1:]) for u in ups]
            backs = [u[0] for u in ups]
        else:
            heads, steps, backs = [], [], []
            for (a, lengths), batch in zip(made, turn, strict=True):
                loss = cross_entropy(model.upper(a, lengths), examples.targets[batch])
                back, *found = torch.autograd.grad(loss, [a, *upper])
                backs.append(back)
                stepped(server, upper, found)
        downs = [
            torch.autograd.grad(a, lower, back, allow_unused=True)
            for (a, _), back in zip(sent, backs, strict=True)
        ]
        for optimizer, parameters, found in steps:
            stepped(optimizer, parameters, found)
        for number, found in enumerate(downs):
            own = heads[number][1:] if heads else [None] * len(lower)
            stepped(
                client, lower, [summed(f, g, p) for f, g, p in zip(found, own, lower, strict=True)]
            )
    return {n: (p.detach() - before[n]).numpy() for n, p in model.named_parameters()}


def summed(first, second, like):
    found = [g for g in (first, second) if g is not None]
    return sum(found[1:], found[0]) if found else torch.zeros_like(like)


def stepped(optimizer, parameters, gradients) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = torch.zeros_like(parameter) if gradient is None else gradient
    optimizer.step()


class TestBatchesInATurn:
    @pytest.mark.parametrize("u_shaped", [False, True], ids=["", "u_shaped"])
    @pytest.mark.parametrize("m", [2, 3, 100])
    def test_all_are_of_the_parameters_before_the_turn_and_steps_follow_one_another(
        self, tmp_path, tiny, m, u_shaped
    ):
        run = run_of(
            tmp_path, tiny, collector=Split(batches_per_exchange=m), model={"u_shaped": u_shaped}
        )
        update = run.run()[0]
        found = update.delta.layout.views(vector(update))
        for name, change in reference(run, m).items():
            np.testing.assert_allclose(found[name], change, atol=2e-6, err_msg=name)
        batches = -(-len(run.data().train(0)) // 7)
        assert run.sent == -(-batches // m) * (1 + u_shaped) + 1

    def test_the_losses_that_are_told_are_of_all_batches(self, tmp_path, tiny):
        """With a step of nearly nothing, the mean is that of the model as it was sent."""
        run = run_of(
            tmp_path,
            tiny,
            trainer=replace(TRAINER, lr=1e-9),
            collector=Split(batches_per_exchange=2),
        )
        metrics = run.run()[0].metrics
        model, examples = run.build(), run.data().train(0)
        model.load_state_dict({n: torch.from_numpy(a) for n, a in run.arrays.items()})
        with torch.random.fork_rng(devices=[]):
            seed_generators(torch.device("cpu"), integer(5, "train", 1, 0))
            losses = [
                cross_entropy(model(examples.inputs[b]), examples.targets[b]).item()
                for b in run.trainer.batches(len(examples))
            ]
        assert metrics["train_loss"] == pytest.approx(np.mean(losses), abs=1e-5)


class TestProcessesThatComeAndGo:
    @pytest.mark.parametrize("u_shaped", [False, True], ids=["", "u_shaped"])
    def test_a_process_a_message_gives_the_same_bits(self, tmp_path, tiny, u_shaped):
        settings = {"model": {"u_shaped": u_shaped}, "collector": Split(batches_per_exchange=2)}
        one = run_of(tmp_path / "one", tiny, **settings).run()[0]
        many = run_of(tmp_path / "many", tiny, fresh_clients=True, **settings).run()[0]
        same(one, many)

    @pytest.mark.parametrize("u_shaped", [False, True], ids=["", "u_shaped"])
    @pytest.mark.parametrize("precision", ["fp32", "int8"])
    def test_a_turn_that_is_asked_for_twice_counts_once(self, tmp_path, tiny, u_shaped, precision):
        settings = {
            "model": {"u_shaped": u_shaped},
            "collector": Split(batches_per_exchange=2, precision=precision),
            "trainer": replace(TRAINER, nopeek=0.1),
        }
        once = run_of(tmp_path / "once", tiny, **settings).run()[0]
        run = run_of(tmp_path / "twice", tiny, **settings)
        twice = {}
        finished = driven(
            run, lambda client, ask: twice.setdefault(ask_number(ask), ask_twice(client, ask))
        )
        same(once, finished)
        assert len(twice) > 3
        for first, second in twice.values():
            assert_same_records(first, second)

    def test_another_session_s_work_is_left_alone(self, tmp_path, tiny):
        alone = run_of(tmp_path / "alone", tiny).run()[0]
        run = run_of(tmp_path / "shared", tiny)
        stopped = run.session([0])
        (request,) = stopped.start()
        (request,) = stopped.receive(Reply(request, asked(run.client(), request)))
        asked(run.client(), request)  # half-done work lies in the folder
        same(alone, run.run()[0])

    @pytest.mark.parametrize("loss", ["lost", "torn", "empty"])
    def test_half_done_work_that_is_lost_is_no_wrong_gradient(self, tmp_path, tiny, loss):
        run = run_of(tmp_path, tiny, fresh_clients=True)
        path = tmp_path / "client-0.turn.safetensors"

        def lose(request, content):
            if request.content[CONFIG][TURN] == 2:
                if loss == "lost":
                    path.unlink()
                else:
                    path.write_bytes(b"" if loss == "empty" else path.read_bytes()[:-40])
            return content

        run.spoil = lose
        became = run.run()[0]
        assert became.refused.reason == "client_error"
        assert "phase" in became.refused.detail

    def test_at_the_first_turn_there_is_nothing_to_lose(self, tmp_path, tiny):
        whole = run_of(tmp_path / "whole", tiny).run()[0]
        run = run_of(tmp_path / "torn", tiny)
        session = run.session([0])
        (request,) = session.start()
        first = asked(run.client(), request)
        (tmp_path / "torn" / "client-0.turn.safetensors").write_bytes(b"torn")
        again = asked(run.client(), request)
        assert_same_records(first, again)
        same(whole, to_the_end(run, session, session.receive(Reply(request, again))))


class TestOthersInTheSession:
    @pytest.mark.parametrize("turn", [0, 2])
    def test_in_v1_a_death_costs_the_others_no_bit(self, tmp_path, tiny, turn):
        settings = {"num_clients": 3, "trainer": replace(TRAINER, batch_size=4)}
        whole = run_of(tmp_path / "whole", tiny, **settings).run()
        run = run_of(tmp_path / "one dies", tiny, **settings, spoil=dies(1, turn))
        became = run.run()
        assert became[1].refused.reason == "client_error"
        for client in (0, 2):
            same(whole[client], became[client])

    def test_in_v2_the_others_share_a_sound_upper_half(self, tmp_path, tiny):
        run = run_of(
            tmp_path, tiny, collector=Split(variant="v2"), num_clients=3,
            trainer=replace(TRAINER, batch_size=4), spoil=dies(1, 2),
        )  # fmt: skip
        became = run.run()
        assert became[1].refused.reason == "client_error"
        first, last = (became[c].delta.layout.views(vector(became[c])) for c in (0, 2))
        for name, change in first.items():
            assert np.isfinite(change).all()
            assert change.any()
            assert np.array_equal(change, last[name]) == (name not in run.whole.clients_names())

    @pytest.mark.parametrize("u_shaped", [False, True], ids=["", "u_shaped"])
    @pytest.mark.parametrize("variant", ["v1", "v2"])
    def test_of_several_goals_each_update_has_its_own_heads(
        self, tmp_path, tiny, variant, u_shaped
    ):
        run = run_of(
            tmp_path, tiny, task=Sentences(40, {"a": 3, "b": 2}), collector=Split(variant=variant),
            num_clients=2, model={"u_shaped": u_shaped}, trainer=replace(TRAINER, batch_size=6),
        )  # fmt: skip
        sent = {}
        run.spoil = lambda request, content: sent.setdefault(request.client, request) and content
        became = run.run()
        shared = variant == "v2" and not u_shaped  # the server's heads are one upper part's
        for client, goal in enumerate("ab"):
            section = became[client].delta
            covered = set((section.part or section.layout).names)
            heads = {n.split(".")[1] for n in covered if n.startswith("heads.")}
            assert heads == ({"a", "b"} if shared else {goal})
            views = section.layout.views(section.vector)
            assert all(views[n].any() for n in covered)
            assert not any(views[n].any() for n in set(views) - covered)
            came = {
                n.split(".")[1] for n in sent[client].content["arrays"] if n.startswith("heads.")
            }
            assert came == ({goal} if u_shaped else set())


class TestWhatTravels:
    @pytest.mark.parametrize(
        ("precision", "most"), [("fp16", 2**-11), ("bf16", 2**-8), ("int8", 0.02)]
    )
    def test_rounded_the_error_is_told_and_the_loss_goes_down(
        self, tmp_path, tiny, precision, most
    ):
        trainer = replace(TRAINER, local_epochs=6)
        run = run_of(tmp_path, tiny, trainer=trainer, collector=Split(precision=precision))
        losses = []
        update = run.run()[0]
        assert 0 < update.metrics["activation_error"] < most
        assert 0 < update.metrics["gradient_error"] < most
        model, examples = run.build(), run.data().train(0)
        for change in (0, 1):
            views = update.delta.layout.views(vector(update))
            model.load_state_dict(
                {n: torch.from_numpy(a + change * views[n]) for n, a in run.arrays.items()}
            )
            losses.append(cross_entropy(model(examples.inputs), examples.targets).item())
        assert losses[1] < losses[0] - 0.05

    def test_in_whole_floats_there_is_no_error(self, tmp_path, tiny):
        metrics = run_of(tmp_path, tiny).run()[0].metrics
        assert (metrics["activation_error"], metrics["gradient_error"]) == (0, 0)

    @pytest.mark.parametrize("precision", ["fp16", "int8"])
    def test_the_error_is_that_of_what_travels(self, tmp_path, tiny, precision):
        """One batch, so that the mean is its own."""
        trainer = replace(TRAINER, batch_size=100)
        run = run_of(tmp_path, tiny, trainer=trainer, collector=Split(precision=precision))
        error = run.run()[0].metrics["activation_error"]
        run.whole.load_state_dict({n: torch.from_numpy(a) for n, a in run.arrays.items()})
        activation, lengths = run.whole.lower(run.data().train(0).inputs)
        rows = pack_rows(activation.detach(), lengths)
        expected = relative_error(rows, decode(encode(rows, precision), precision, rows.shape))
        assert error == pytest.approx(expected, rel=1e-4)

    def test_noise_is_on_what_goes_up_and_differs_each_time(self, tmp_path, tiny):
        def first(noise, name):
            run = run_of(tmp_path / name, tiny, trainer=replace(TRAINER, noise=noise))
            (request,) = run.session([0]).start()
            return asked(run.client(), request)[SPLIT]["0.activation.values"].numpy()

        plain, noisy, again = first(0.0, "a"), first(0.5, "b"), first(0.5, "c")
        assert not np.isclose(noisy, again).all()
        size = np.sqrt(np.mean((noisy - plain) ** 2)) / np.sqrt(np.mean(plain**2))
        assert 0.35 < size < 0.65

    def test_nopeek_brings_the_correlation_down_and_tells_it(self, tmp_path, tiny):
        trainer = replace(TRAINER, local_epochs=4, lr=0.02)
        kept = run_of(tmp_path / "kept", tiny, trainer=trainer).run()[0].metrics
        assert "distance_correlation" not in kept
        told = [
            run_of(tmp_path / str(weight), tiny, trainer=replace(trainer, nopeek=weight)).run()[0]
            for weight in (1e-6, 5.0)
        ]
        first, last = (update.metrics["distance_correlation"] for update in told)
        assert 0 < last < first < 1


HOSTILE_SETTINGS = {
    "a later turn": ({TURN: 5}, "phase"),
    "a turn past the end": ({TURN: 10**6}, "phase"),
    "an earlier turn": ({TURN: 0}, "phase"),
    "a negative turn": ({TURN: -1}, "malformed"),
    "no number": ({TURN: "1"}, "malformed"),
    "no batches": ({"split.batches": 0}, "malformed"),
    "true batches": ({"split.batches": True}, "malformed"),
    "another precision": ({"split.precision": "fp8"}, "malformed"),
    "a session it is not in": ({"split.session": "another"}, "phase"),
    "a session that is no text": ({"split.session": 7}, "malformed"),
    "no cut": ({"split.at": 0}, "terms"),
    "a cut that is no number": ({"split.at": "2"}, "terms"),
    "a cut past the end": ({"split.at": 10**6}, ""),
}

HOSTILE_ANSWERS = {
    "none": {},
    "another name": {"0.states.values": np.zeros((9, 16), np.float32)},
    "too few rows": {"0.gradient.values": np.zeros((3, 16), np.float32)},
    "wide": {"0.gradient.values": np.zeros((9, 17), np.float32)},
    "float64": {"0.gradient.values": np.zeros((9, 16))},
    "not finite": None,
}


class TestHostileServers:
    @pytest.fixture
    def second(self, tmp_path, tiny):
        """A client, its second request, which is honest, and the file of its half-done work."""
        run = run_of(tmp_path, tiny)
        session = run.session([0])
        (request,) = session.start()
        client = run.client()
        (request,) = session.receive(Reply(request, asked(client, request)))
        (third,) = session.receive(Reply(request, asked(client, request)))
        return client, third, tmp_path / "client-0.turn.safetensors"

    @pytest.mark.parametrize("kind", HOSTILE_SETTINGS)
    def test_settings_that_make_no_sense_change_nothing(self, second, kind):
        client, request, path = second
        changes, reason = HOSTILE_SETTINGS[kind]
        before = path.read_bytes()
        config = ConfigRecord({**request.content[CONFIG], **changes})
        content = RecordDict({**request.content, CONFIG: config})
        (reply,) = client.answer([Message(content, 1, "train")])
        assert reply.has_error()
        assert reason in reply.error.reason
        assert path.read_bytes() == before
        asked(client, request)

    @pytest.mark.parametrize("kind", HOSTILE_ANSWERS)
    def test_gradients_of_another_form_change_nothing(self, second, kind):
        client, request, path = second
        arrays = HOSTILE_ANSWERS[kind]
        if arrays is None:
            whole = request.content[SPLIT]["0.gradient.values"].numpy()
            arrays = {"0.gradient.values": np.full_like(whole, np.nan)}
        before = path.read_bytes()
        record = ArrayRecord({name: pack(array) for name, array in arrays.items()})
        content = RecordDict({**request.content, SPLIT: record})
        (reply,) = client.answer([Message(content, 1, "train")])
        assert reply.has_error()
        assert path.read_bytes() == before
        asked(client, request)


def dies(client: int, turn: int):
    return lambda request, content: (
        None if (request.client, request.content[CONFIG][TURN]) == (client, turn) else content
    )


def asked(client, request) -> RecordDict:
    (message,) = client.answer([Message(request.content, 1, request.kind)])
    assert not message.has_error(), message.error
    return message.content


def ask_number(request) -> int:
    return request.content[CONFIG][TURN]


def ask_twice(client, request):
    return asked(client, request), asked(client, request)


def driven(run: SplitRun, answered) -> Update:
    """A session of client 0 to its end; `answered` gives both replies to a request, of which the second is taken."""
    session = run.session([0])
    (request,) = session.start()
    while True:
        (event,) = session.receive(Reply(request, answered(run.client(), request)[1]))
        if isinstance(event, Update):
            return event
        request = event


def to_the_end(run: SplitRun, session, events) -> Update:
    while not isinstance(events[0], Update):
        events = session.receive(Reply(events[0], asked(run.client(), events[0])))
    return events[0]


def assert_same_records(first: RecordDict, second: RecordDict) -> None:
    assert first.keys() == second.keys()
    for name in first:
        if isinstance(first[name], ArrayRecord):
            assert {k: a.data for k, a in first[name].items()} == {
                k: a.data for k, a in second[name].items()
            }
        else:
            assert dict(first[name]) == dict(second[name])
    if SPLIT in first:
        assert first[RECEIPT][LAST] in (True, False)
