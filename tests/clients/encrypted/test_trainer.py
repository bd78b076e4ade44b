"""What an owner promises: the gradient of FedSGD, one encryption of its data, and to be misled by nobody."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord

from clients.encrypted.flooding import Flooding
from clients.encrypted.half_done import Acknowledged, HalfDone, OwnerFolder
from clients.encrypted.keys import OwnerKeys
from clients.encrypted.notes import note, read_note
from clients.encrypted.party import ComputeParty
from clients.encrypted.plan import plan_of
from clients.encrypted.spec import Spec
from clients.encrypted.trainer import EncryptedTrainer
from clients.encrypted.turn import spec_of
from clients.models import Mlp
from clients.resident import ResidentModel
from clients.tasks import Digits, Examples
from clients.trainers import FedSgd
from clients.trainers.sgd import Fit, FitJob
from strategies.collectors.encrypted import ENCRYPTED
from strategies.protocols import Refusal
from strategies.update import Update
from strategies.wire import pack, unpack_model
from tests.support.owners import TASK, OwnersRun, Serving, network, plan_for

TRAINERS = {
    mode: EncryptedTrainer(batch_size=512, mode=mode, flooding=None) for mode in ("ce", "strict")
}
MOST_ERROR = {"ce": 2e-4, "strict": 2e-3}
"""Of the largest gradient: what comes of ciphertexts beside what comes of plaintexts."""


@pytest.fixture(scope="module")
def parties(tmp_path_factory) -> Iterator[dict[tuple[object, ...], Serving]]:
    """One party a mode and model, for all tests that leave its folder alone."""
    made = {
        (mode, *hidden): ComputeParty(
            plan_for(trainer, *hidden), tmp_path_factory.mktemp(mode), workers=1
        )
        for mode, trainer in TRAINERS.items()
        for hidden in ((), (4,))
    }
    yield {key: Serving(party) for key, party in made.items()}
    for party in made.values():
        party.close()


@pytest.fixture
def owners(tmp_path, parties):
    def make(mode: str = "ce", **own) -> OwnersRun:
        trainer = replace(TRAINERS[mode], **own.pop("trainer", {}))
        serving = parties[mode, *own.get("hidden", ())]
        return OwnersRun(tmp_path / "owners", trainer, serving, **own)

    return make


def made(path: Path) -> Path:
    """A key's file, for owners of `ce`."""
    OwnerKeys.generate(plan_for(TRAINERS["ce"]).ring).save(path)
    return path


def plain(run: OwnersRun, client: int = 0, number: int = 1) -> Fit:
    """What FedSGD makes of the same round."""
    trainer = run.trainer
    assert isinstance(trainer, EncryptedTrainer)
    twin = FedSgd(batch_size=trainer.batch_size, loss=trainer.loss, seed=trainer.seed)
    examples = run.data().train(client)
    job = FitJob(client, run.arrays, {}, examples, 0, {}, {"server-round": number})
    return twin.fit_one(job, ResidentModel(network(*run.hidden), run.arrays), run.task)


def assert_the_gradient(update: Update | Refusal, expected: Fit, mode: str) -> None:
    assert isinstance(update, Update), update
    wanted = expected.sections["delta"].vector
    error = np.abs(update.delta.vector - wanted).max()
    assert error < MOST_ERROR[mode] * np.abs(wanted).max()
    assert update.delta.layout == expected.sections["delta"].layout
    assert update.weight == expected.num_examples
    loss = expected.metrics["train_loss"]
    assert update.metrics["train_loss"] == pytest.approx(loss, rel=1e-3)


def told(run: OwnersRun, turn: int) -> dict:
    """The note of an owner's turn."""
    return read_note(unpack_model(run.replies[turn][ENCRYPTED]))


def files(run: OwnersRun) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in run.folder.rglob("batch-*.safetensors")}


@pytest.mark.parametrize("hidden", [(), (4,)])
@pytest.mark.parametrize("mode", ["ce", "strict"])
def test_the_update_is_fedsgds(owners, mode, hidden):
    run = owners(mode, hidden=hidden, fresh_clients=True)
    for number in (1, 2):
        assert_the_gradient(run.run(number)[0], plain(run, number=number), mode)


def test_what_training_came_to_is_told(owners):
    update = owners("ce").run()[0]
    assert set(update.metrics) == {"train_loss", "train_accuracy", "largest_gradient"}
    assert update.metrics["largest_gradient"] == pytest.approx(np.abs(update.delta.vector).max())
    assert 0 <= update.metrics["train_accuracy"] <= 1
    assert set(owners("strict").run()[0].metrics) == {"train_loss", "largest_gradient"}


@pytest.mark.parametrize("mode", ["ce", "strict"])
def test_nothing_is_sent_twice_and_nothing_encrypted_twice(owners, mode):
    run = owners(mode, fresh_clients=True)
    run.run()
    sent, before = len(run.replies), files(run)
    again = run.run()
    assert isinstance(again[0], Update)
    assert len(run.replies) == sent - 1  # nothing is asked for
    assert set(run.replies[0][ENCRYPTED]) == {"note"}
    assert files(run) == before
    assert len(before) == 1


@pytest.mark.parametrize("mode", [pytest.param("ce", marks=pytest.mark.slow), "strict"])
def test_what_a_party_has_lost_is_sent_again_as_it_was(tmp_path, mode):
    trainer, folder = TRAINERS[mode], tmp_path / "party"

    def sent() -> list[bytes]:
        with ComputeParty(plan_for(trainer), folder, workers=1) as party:
            run = OwnersRun(tmp_path / "owners", trainer, Serving(party))
            became = run.run()[0]
            if isinstance(became, Refusal):  # it had been believed to have them
                assert (mode, became.refused.reason) == ("strict", "client_error")
                became = run.run()[0]
            assert isinstance(became, Update)
        arrays = [unpack_model(reply[ENCRYPTED]) for reply in run.replies if ENCRYPTED in reply]
        return [one["inputs.first"].tobytes() for one in arrays if "inputs.first" in one]

    first = sent()
    assert len(first) == 1
    shutil.rmtree(folder)
    assert sent() == first


def test_an_owner_that_has_forgotten_what_was_sent_asks_and_is_not_made_to_send_it(owners):
    run = owners("strict")
    run.run()
    (belief,) = (run.folder / "encrypted" / "client-0").glob("party-*.json")
    belief.unlink()
    assert_the_gradient(run.run()[0], plain(run), "strict")
    assert all("inputs.first" not in reply.get(ENCRYPTED, {}) for reply in run.replies)


@pytest.mark.parametrize("mode", ["ce", pytest.param("strict", marks=pytest.mark.slow)])
def test_owners_with_keys_of_their_own_take_turns(owners, mode):
    run = owners(mode, num_clients=2, hidden=(4,))
    for number in (1, 2):
        became = run.run(number)
        for client in (0, 1):
            assert_the_gradient(became[client], plain(run, client, number), mode)
    assert len({told(run, turn)["fingerprint"] for turn in (0, 1)}) == 2


def test_owners_may_share_a_key(owners, tmp_path):
    path = made(tmp_path / "shared.key")
    run = owners("ce", num_clients=2, trainer={"key": path})
    became = run.run()
    for client in (0, 1):
        assert_the_gradient(became[client], plain(run, client), "ce")
    first, second = told(run, 0), told(run, 1)
    assert first["fingerprint"] == second["fingerprint"]
    assert first["data"] != second["data"]
    assert not list(run.folder.rglob("owner-key-*"))


@pytest.mark.parametrize("fresh", [False, True])
def test_a_client_computes_in_the_servers_place(owners, parties, fresh):
    run = owners(
        "ce", num_clients=3, compute_client=1, fresh_clients=fresh,
        trainer={"party": parties["ce",], "computes": 1},
    )  # fmt: skip
    run.serving = None
    became = run.run()
    assert set(became) == {0, 2}
    for client in became:
        assert_the_gradient(became[client], plain(run, client), "ce")


def test_the_name_of_the_data_is_a_secret_of_the_keys_and_changes_with_them(owners, tmp_path):
    """Who guesses the data can't see by their name whether the guess is right."""
    run = owners("ce")
    run.run()
    name = told(run, 0)["data"]
    others = [
        owners("ce", trainer={"key": made(tmp_path / "other.key")}),
        owners("ce", trainer={"batch_size": 500}),
        owners("ce", trainer={"seed": 1}),
        owners("ce", task=Digits(fold=1)),
    ]
    names = {name}
    for other in others:
        other.run()
        names.add(told(other, 0)["data"])
    assert len(names) == 5


# ---- terms, and what comes from a party that is not honest ----


def test_another_spec_is_refused(tmp_path, parties):
    other = Spec((16, 5, 10)).digest
    run = OwnersRun(tmp_path, TRAINERS["ce"], Serving(parties["ce",].party, told=other))
    became = run.run()[0]
    assert isinstance(became, Refusal)
    assert "terms" in became.refused.detail


def test_another_mode_is_refused(owners):
    run = owners("strict")

    def spoil(turn, request):
        request.content["config"]["encrypted.mode"] = "ce"

    run.spoil = spoil
    became = run.run()[0]
    assert isinstance(became, Refusal)
    assert "terms" in became.refused.detail


def changed(**arrays):
    """Puts arrays in the place of what a turn brings; a function is given what was there."""

    def spoil(request):
        found = unpack_model(request.content[ENCRYPTED])
        for name, array in arrays.items():
            for key in [key for key in found if key == name or key.startswith(f"{name}/")]:
                found[key] = array(found[key]) if callable(array) else array
        request.content[ENCRYPTED] = ArrayRecord({n: pack(array) for n, array in found.items()})

    return spoil


def noted(**told):
    return changed(note=lambda array: note({**read_note({"note": array}), **told}))


def empty(request):
    request.content[ENCRYPTED] = ArrayRecord()


def another_session(request):
    config = dict(request.content["config"].items())
    request.content["config"] = ConfigRecord({**config, "encrypted.session": "ab" * 8})


WRONG = {
    "nothing": (1, empty, "shape"),
    "logits of another shape": (1, changed(logits=lambda a: a[:3]), "shape"),
    "logits of another type": (1, changed(logits=lambda a: a.astype(np.int64)), "shape"),
    "logits past the prime": (1, changed(logits=lambda a: a | np.uint64(1 << 63)), "malformed"),
    "no scale": (1, noted(scale=None), "malformed"),
    "a negative scale": (1, noted(scale=-2.0), "malformed"),
    "an endless scale": (1, noted(scale=1e300), "malformed"),
    "wants that there are not": (1, noted(want=["secret key"]), "malformed"),
    "no list of wants": (1, noted(want={"keys": 1}), "malformed"),
    "a note that is none": (1, changed(note=np.frombuffer(b"{[", np.uint8)), "malformed"),
    "a session out of nowhere": (1, another_session, "phase"),
    "no means": (2, noted(means=None), "malformed"),
    "means that don't come": (2, noted(means={"layers.0.weight": [[1.0, 4], [1.0, 4]]}), "malformed"),
    "leaves that there are not": (2, noted(means={"layers.0.weight": [[2.0**30, 0]]}), "malformed"),
    "an infinite scale of means": (2, noted(means={"layers.0.weight": [["inf", 4]]}), "malformed"),
    "means past the prime": (
        2, changed(**{"layers.0.weight": lambda a: a | np.uint64(1 << 63)}), "malformed"
    ),
    "means of another shape": (
        2, changed(**{"layers.0.weight": lambda a: a[:1]}), "malformed"
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def known(parties, tmp_path_factory):
    """An owner that has sent what is sent once."""
    run = OwnersRun(tmp_path_factory.mktemp("known"), TRAINERS["ce"], parties["ce",])
    assert_the_gradient(run.run()[0], plain(run), "ce")
    return run


@pytest.mark.parametrize("wrong", WRONG)
def test_a_party_that_is_not_honest_is_refused(known, wrong):
    at, spoil, reason = WRONG[wrong]
    known.spoil = lambda turn, request: spoil(request) if turn == at else None
    became = known.run()[0]
    assert isinstance(became, Refusal)
    assert f"{reason}: this client" in became.refused.detail


def test_the_next_round_is_sound(known):
    empty_first = {"spoil": lambda turn, request: empty(request)}
    assert isinstance(replace(known, **empty_first).run()[0], Refusal)
    known.spoil = lambda turn, request: None
    assert_the_gradient(known.run()[0], plain(known), "ce")


def test_an_owner_answers_no_more_turns_than_an_honest_party_needs(owners):
    run = owners("ce")
    run.spoil = lambda turn, request: wants(request) if turn else None

    def wants(request):
        found = note({"want": ["keys"], "party": "a"})
        request.content[ENCRYPTED] = ArrayRecord({"note": pack(found)})

    became = run.run()[0]
    assert isinstance(became, Refusal)
    assert len(run.replies) <= 8


def test_an_owner_in_the_strict_mode_answers_no_logits(owners):
    run, logits = owners("strict"), np.zeros((10, 2, 1, 4096), np.uint64)

    def spoil(turn, request):
        if turn == 1:
            told = {"logits": logits, "note": note({"scale": 2.0**30, "party": "a"})}
            request.content[ENCRYPTED] = ArrayRecord({n: pack(a) for n, a in told.items()})

    run.spoil = spoil
    run.run()
    sent = {name for reply in run.replies if ENCRYPTED in reply for name in reply[ENCRYPTED]}
    assert not any(name.startswith(("errors", "packed_errors")) for name in sent)


# ---- keys, data, and what is kept ----


@pytest.mark.parametrize("mode", ["ce", "strict"])
def test_all_that_is_told_is_noised_and_the_same_when_it_is_sent_again(owners, mode):
    exact, flooded = owners(mode), owners(mode, trainer={"flooding": Flooding(multiple=100)})
    flooded.folder = exact.folder
    update, noised = exact.run()[0], flooded.run()[0]
    noise = noised.delta.vector - update.delta.vector
    assert (noise != 0).all()
    assert 0 < noise.std() < 0.05
    assert noised.metrics["train_loss"] != update.metrics["train_loss"]
    assert noised.metrics.get("train_accuracy", 0) != update.metrics.get("train_accuracy", 1)
    largest = np.abs(noised.delta.vector).max()
    assert noised.metrics["largest_gradient"] == pytest.approx(largest)


def test_a_key_is_worn_after_so_many_steps_whoever_of_its_owners_took_them(
    owners, tmp_path, caplog
):
    own = {"flooding": Flooding(decryptions=3), "key": made(tmp_path / "shared.key")}
    run = owners("ce", num_clients=2, trainer=own)
    assert all(isinstance(one, Update) for one in run.run(1).values())
    became = [type(one) for one in run.run(2).values()]
    assert sorted(kind.__name__ for kind in became) == ["Refusal", "Update"]
    assert "worn" in caplog.text


def test_a_key_whose_file_is_gone_tells_nothing_more(owners, tmp_path, caplog):
    """Else a ledger that begins anew would let it tell as much again."""
    run = owners("ce", trainer={"key": made(tmp_path / "own.key")})
    assert all(isinstance(one, Update) for one in run.run(1).values())
    (tmp_path / "own.key").rename(tmp_path / "elsewhere")
    assert [type(one).__name__ for one in run.run(2).values()] == ["Refusal"]
    assert "is gone" in caplog.text


def test_a_key_that_others_can_read_is_not_used(owners, tmp_path, caplog):
    path = made(tmp_path / "open.key")
    path.chmod(0o644)
    became = owners("ce", trainer={"key": path}).run()[0]
    assert isinstance(became, Refusal)
    assert "key: this client" in became.refused.detail
    assert str(path) not in became.refused.detail
    assert "chmod 600" in caplog.text


def test_a_key_of_another_ring_is_refused_with_the_mend(owners, tmp_path, caplog):
    path = tmp_path / "other.key"
    OwnerKeys.generate(plan_of(Spec((4, 3, 2), batch=512)).ring).save(path)
    assert isinstance(owners("ce", trainer={"key": path}).run()[0], Refusal)
    assert "trellis keys encrypted FILE --degree 4096 --bits 54,55" in caplog.text


class Loud(Digits):
    """Pixels that nobody has standardised."""

    def train(self) -> Examples:
        examples = super().train()
        return Examples(examples.inputs * 100, examples.targets)


def test_features_that_ciphertexts_do_not_hold_are_refused_with_the_mend(owners, caplog):
    assert isinstance(owners("ce", task=Loud()).run()[0], Refusal)
    assert "standardise the data" in caplog.text


def test_a_torn_file_of_ciphertexts_is_made_again(tmp_path, caplog):
    folder = OwnerFolder(tmp_path, 3)
    arrays = {"inputs.first": np.arange(6, dtype=np.uint64), "inputs.seeds": np.ones(3, np.uint8)}
    assert folder.ciphertexts("ab", 0) is None
    folder.keep_ciphertexts("ab", 0, arrays)
    found = folder.ciphertexts("ab", 0)
    assert found is not None
    assert all((found[name] == array).all() for name, array in arrays.items())
    (path,) = tmp_path.rglob("*.safetensors")
    whole = path.read_bytes()
    for torn in (whole[:-1], whole[:40], b"", whole[:-1] + b"x"):
        path.write_bytes(torn)
        assert folder.ciphertexts("ab", 0) is None
    assert caplog.text.count("is made again") == 4


def test_data_that_were_not_used_of_late_are_let_go(tmp_path):
    folder = OwnerFolder(tmp_path, 0)
    for number in range(6):
        folder.keep_ciphertexts(f"{number}", 0, {"a": np.zeros(1, np.uint64)})
    assert sorted(path.name for path in folder.path.iterdir()) == ["2", "3", "4", "5"]


@pytest.mark.parametrize(
    "torn", ["", "{", "[1]", '{"session": "a"}', '{"session": "a", "turn": []}']
)
def test_a_torn_note_of_what_was_begun_counts_as_none(tmp_path, torn):
    folder = OwnerFolder(tmp_path, 0)
    state = HalfDone("a", 1, (0.1, -1e-17), 2.5, 0.5)
    folder.save_turn(state)
    assert folder.turn("a") == state
    assert folder.turn("b") is None
    (folder.path / "turn-a.json").write_text(torn)
    assert folder.turn("a") is None
    folder.acknowledge(Acknowledged("p", "d", (1,)))
    next(folder.path.glob("party-*.json")).write_text(torn)
    assert folder.acknowledged() == Acknowledged()


def test_two_runs_at_once_do_not_disturb_each_other(tmp_path):
    one, other = OwnerFolder(tmp_path, 0, "run a"), OwnerFolder(tmp_path, 0, "run b")
    one.save_turn(HalfDone("a", 1))
    other.save_turn(HalfDone("b", 2))
    one.acknowledge(Acknowledged("p", "d", (1,)))
    assert one.turn("a") == HalfDone("a", 1)
    assert other.acknowledged() == Acknowledged()
    for number in range(20):
        one.save_turn(HalfDone(f"{number}", 0))
    assert len(list(one.path.glob("turn-*.json"))) == 8


def test_another_party_or_other_data_begin_anew():
    known = Acknowledged().plus("p", "d", 3).plus("p", "d", 1)
    assert known == Acknowledged("p", "d", (1, 3))
    assert known.has("d", 3)
    assert not known.has("d", 2)
    assert not known.has("e", 3)
    assert known.plus("q", "d", 0).batches == (0,)
    assert known.plus("p", "e", 0).batches == (0,)


def test_only_a_polynomial_can_be_trained():
    with pytest.raises(ValueError, match="model=encrypted_mlp"):
        spec_of(Mlp(TASK.input_shape, 10), 512, "ce")
    assert spec_of(network(4), 400, "strict") == Spec((16, 4, 10), "square", "squared", 512)
