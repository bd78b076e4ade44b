"""What is tried again comes to the same; what may not be is not; and nobody else's training is disturbed."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from clients.client import Client
from clients.models import Mlp
from clients.resident import ResidentModel, arrays_of
from clients.retrying import MOST_WAIT, RETRIES, Retry, Retrying, kind_of
from clients.store import ClientStore
from clients.tasks import Digits, Examples
from clients.trainers import SGD, AdamW, FedSgd, FitJob, Scaffold, TrainingDivergedError
from clients.trainers.course import Course
from fl_app.engine.flwr_internals import claim_identity
from strategies.seeds import integer
from strategies.update import CONTROL, DELTA
from strategies.wire import METRICS, Refused
from tests.clients.test_client import TASK, data, module, request, update_in

PATIENT = Retry(attempts=3, backoff_seconds=0.0)


@pytest.fixture(autouse=True)
def _identity():
    claim_identity(1)


class Failing(Digits):
    """Digits whose loss raises at some of its calls; the model's weights are of no account to it."""

    def __init__(self, error: Exception, at: set[int]) -> None:
        super().__init__()
        self.error, self.at, self.calls = error, at, 0

    def losses(self, output, targets):
        self.calls += 1
        if self.calls in self.at:
            raise self.error
        return super().losses(output, targets)


class Greedy(Digits):
    """Digits for which memory runs out in the middle of a batch of more than so many examples."""

    def __init__(self, most: int, error: Exception) -> None:
        super().__init__()
        self.most, self.error, self.sizes = most, error, []

    def losses(self, output, targets):
        self.sizes.append(len(targets))
        if len(targets) > self.most:
            raise self.error
        return super().losses(output, targets)


class Fragile(Digits):
    """Digits whose loss is not a number at some of its calls."""

    def __init__(self, at) -> None:
        super().__init__()
        self.at, self.calls = set(at), 0

    def losses(self, output, targets):
        self.calls += 1
        found = super().losses(output, targets)
        return found * math.nan if self.calls in self.at else found


def client(tmp_path, task=TASK, trainer=None, network=None, **options) -> Client:
    trainer = trainer or SGD(lr=0.1, batch_size=16, local_epochs=2)
    options = {"retry": PATIENT, **options}
    store = ClientStore(tmp_path)
    return Client(task, network or module(), data, trainer, store=store, seed=11, **options)


def vector_of(reply, extra=()) -> np.ndarray:
    return update_in(reply, extra=extra).delta.vector


TRAINERS = [
    SGD(lr=0.1, batch_size=16, local_epochs=2, momentum=0.9, weight_decay=0.01),
    AdamW(lr=0.01, batch_size=16, local_epochs=2),
    FedSgd(batch_size=64),
]


class TestWhatPasses:
    @pytest.mark.parametrize("trainer", TRAINERS, ids=lambda one: type(one).__name__)
    @pytest.mark.parametrize("error", [OSError(5, "no disk"), RuntimeError("the device blinked")])
    def test_a_retry_gives_the_bits_of_an_undisturbed_run(self, tmp_path, trainer, error):
        at = {1} if isinstance(trainer, FedSgd) else {20, 50}
        (disturbed,) = client(tmp_path, Failing(error, at), trainer).answer([request()])
        (plain,) = client(tmp_path, trainer=trainer).answer([request()])
        np.testing.assert_array_equal(vector_of(disturbed), vector_of(plain))
        told = dict(disturbed.content[METRICS])
        assert told.pop(RETRIES) == len(at)
        assert told == dict(plain.content[METRICS])

    def test_the_error_stands_after_the_last_attempt(self, tmp_path):
        task = Failing(RuntimeError("for good"), set(range(10_000)))
        (reply,) = client(tmp_path, task).answer([request()])
        assert "for good" in reply.error.reason
        assert task.calls == PATIENT.attempts

    def test_a_secretive_client_does_not_tell_of_it(self, tmp_path):
        task = Failing(RuntimeError("once"), {2})
        (reply,) = client(tmp_path, task, secretive=True).answer([request()])
        assert not reply.has_error()
        assert task.calls > 2
        assert RETRIES not in reply.content[METRICS]

    @pytest.mark.parametrize(
        "error",
        [
            ValueError("a setting"),
            TypeError("a slip"),
            Refused("terms", "no"),
            NotImplementedError(),
        ],
        ids=lambda one: type(one).__name__,
    )
    def test_what_would_fail_alike_is_not_tried_again(self, tmp_path, error):
        task = Failing(error, set(range(10_000)))
        (reply,) = client(tmp_path, task).answer([request()])
        assert reply.has_error()
        assert task.calls == 1

    def test_reading_the_data_is_tried_again(self, tmp_path):
        tried = []

        def reading(count):
            tried.append(count)
            if len(tried) < 3:
                raise OSError(5, "no disk")
            return data(count)

        ours = Client(TASK, module(), reading, SGD(), store=ClientStore(tmp_path), retry=PATIENT)
        (reply,) = ours.answer([request()])
        assert not reply.has_error()
        assert len(tried) == 3

    def test_without_retries_the_first_error_stands(self, tmp_path):
        task = Failing(RuntimeError("once"), {1})
        (reply,) = client(tmp_path, task, retry=Retry(attempts=1)).answer([request()])
        assert "once" in reply.error.reason
        assert task.calls == 1


class TestWaiting:
    @given(
        attempts=st.integers(1, 10),
        first=st.floats(0, 60, allow_nan=False),
    )
    def test_waits_double_and_are_bounded_in_all(self, attempts, first):
        waits = Retry(attempts=attempts, backoff_seconds=first).waits()
        assert len(waits) == attempts - 1
        assert sum(waits) <= MOST_WAIT * (1 + 1e-12)
        for number, wait in enumerate(waits):
            assert wait == min(first * 2**number, MOST_WAIT - sum(waits[:number]))
            assert wait >= 0

    def test_settings_out_of_their_range_are_refused(self):
        with pytest.raises(ValueError, match="attempts"):
            Retry(attempts=0)
        with pytest.raises(ValueError, match="lr_factor"):
            Retry(lr_factor=1.0)
        with pytest.raises(ValueError, match="backoff_seconds"):
            Retry(backoff_seconds=61.0)

    def test_only_faults_that_pass_are_waited_for(self, tmp_path):
        slept = []
        retrying = Retrying(Retry(attempts=4, backoff_seconds=0.5), sleep=slept.append)
        faults = [OSError(5, "a"), RuntimeError("b"), MemoryError()]

        def work():
            if faults:
                raise faults.pop(0)
            return 7

        assert retrying.call(work) == 7
        assert slept == [0.5, 1.0, 2.0]


MEMORY = [
    MemoryError(),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 8 bytes"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    OSError(12, "Cannot allocate memory"),
]


class TestMemory:
    @pytest.mark.parametrize("error", MEMORY, ids=lambda one: type(one).__name__)
    def test_fewer_examples_at_a_time_give_the_gradients_of_the_whole_batch(self, tmp_path, error):
        assert kind_of(error) == "memory"
        trainer = SGD(lr=0.1, batch_size=16, local_epochs=2, momentum=0.9)
        task = Greedy(3, error)
        (reply,) = client(tmp_path, task, trainer).answer([request()])
        (plain,) = client(tmp_path, trainer=trainer).answer([request()])
        np.testing.assert_allclose(vector_of(reply), vector_of(plain), atol=1e-6)
        assert task.sizes[:4] == [16, 8, 4, 2]
        assert reply.content[METRICS]["train_loss"] == pytest.approx(
            plain.content[METRICS]["train_loss"], rel=1e-5
        )

    @pytest.mark.parametrize("micro_batch", [1, 3, 5, 16, 40])
    def test_a_step_in_pieces_is_the_step(self, micro_batch):
        model = ResidentModel(module(), arrays_of(module()))
        examples = data().train(1)
        for size in (1, 7, 33):
            batch = examples.inputs[:size], examples.targets[:size]
            loss, whole = SGD()._pulled(model, TASK, *batch, None)
            other, pieces = SGD()._pulled(model, TASK, *batch, micro_batch)
            assert float(other) == pytest.approx(float(loss), rel=1e-6)
            for one, two in zip(whole, pieces, strict=True):
                np.testing.assert_allclose(one, two, atol=1e-6)

    def test_batches_come_in_the_same_order_bit_for_bit(self):
        seen = {}
        for micro_batch in (None, 5):
            task, rows = Digits(), []
            losses = task.losses

            def watched(output, targets, rows=rows, losses=losses):
                rows.extend(targets.tolist())
                return losses(output, targets)

            task.losses = watched
            model = ResidentModel(module(), arrays_of(module()))
            course = Course(micro_batch=micro_batch)
            asked = FitJob(1, arrays_of(module()), {}, data().train(1), 5, {}, {}, course=course)
            SGD(lr=0.1, batch_size=16, local_epochs=2).fit_one(asked, model, task)
            seen[micro_batch] = rows
        assert seen[None] == seen[5]

    def test_one_example_at_a_time_is_the_end(self, tmp_path):
        task = Greedy(0, MemoryError())
        (reply,) = client(tmp_path, task).answer([request()])
        assert "MemoryError" in reply.error.reason
        assert task.sizes == [16, 8, 4, 2, 1]

    def test_a_loss_that_is_no_mean_is_not_taken_apart(self, tmp_path):
        class Largest(Greedy):
            def loss(self, output, targets):
                return self.losses(output, targets).max()

        task = Largest(8, MemoryError())
        (reply,) = client(tmp_path, task).answer([request()])
        assert "MemoryError" in reply.error.reason
        assert task.sizes == [16] * PATIENT.attempts

    def test_running_statistics_are_of_the_pieces(self):
        """What differs with BatchNorm: pieces are normalised by their own mean and variance."""
        torch.manual_seed(2)
        network = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 10))
        found = []
        for micro_batch in (None, 8, 15):  # 15 and 1 would leave a piece without a variance
            model = ResidentModel(network, arrays_of(network))
            model.load(arrays_of(network))
            network.train()
            batch = data().train(1).take(range(16))
            SGD()._pulled(model, TASK, batch.inputs, batch.targets, micro_batch)
            found.append(int(network[1].num_batches_tracked))
            network[1].reset_running_stats()
        assert found == [1, 2, 2]

    def test_an_evaluation_is_of_fewer_examples_at_a_time(self, tmp_path):
        task = Greedy(20, MemoryError())
        (reply,) = client(tmp_path, task).answer([request("evaluate")])
        (plain,) = client(tmp_path).answer([request("evaluate")])
        for name, value in plain.content[METRICS].items():
            assert reply.content[METRICS][name] == pytest.approx(value, rel=1e-5)
        assert max(task.sizes[-2:]) <= 20

    def test_an_evaluation_that_failed_is_tried_again(self, tmp_path):
        task = Failing(RuntimeError("once"), {1})
        (reply,) = client(tmp_path, task).answer([request("evaluate")])
        (plain,) = client(tmp_path).answer([request("evaluate")])
        assert dict(reply.content[METRICS]) == dict(plain.content[METRICS])

    def test_a_device_may_say_how_many_fit(self, tmp_path):
        task = Greedy(4, MemoryError())
        ours = client(tmp_path, task, micro_batch=lambda job, model, task: 4)
        (reply,) = ours.answer([request()])
        (plain,) = client(tmp_path).answer([request()])
        np.testing.assert_allclose(vector_of(reply), vector_of(plain), atol=1e-6)
        assert max(task.sizes) == 4
        assert RETRIES not in reply.content[METRICS]


def per_epoch(batch_size=16) -> int:
    return -(-len(data().train(1)) // batch_size)


class TestDivergence:
    def test_training_goes_on_from_the_last_good_epoch_at_a_lower_rate(self, tmp_path):
        """Against a loop that is written out: one epoch at η, and two at η/2 from where it ended."""
        each = per_epoch()
        task = Fragile({each + 3})
        trainer = SGD(lr=0.1, batch_size=16, local_epochs=3, momentum=0.9)
        (reply,) = client(tmp_path, task, trainer).answer([request()])
        plain, examples = module(), data().train(1)
        optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9, foreach=False)
        torch.manual_seed(integer(11, "train", 3, 1))
        for epoch in range(3):
            optimizer.param_groups[0]["lr"] = 0.1 if epoch == 0 else 0.05
            for batch in torch.randperm(len(examples)).split(16):
                optimizer.zero_grad()
                TASK.loss(plain(examples.inputs[batch]), examples.targets[batch]).backward()
                optimizer.step()
        update = update_in(reply)
        for name, view in update.delta.layout.views(update.delta.vector).items():
            expected = plain.state_dict()[name].numpy() - arrays_of(module())[name]
            np.testing.assert_array_equal(view, expected)
        # The first attempt ended with its second epoch.
        assert task.calls == 2 * each + 3 * each
        assert reply.content[METRICS][RETRIES] == 1

    def test_a_first_loss_blames_the_epoch_before(self, tmp_path):
        each = per_epoch()
        trainer = SGD(lr=0.1, batch_size=16, local_epochs=2)
        (reply,) = client(tmp_path, Fragile({each + 1}), trainer).answer([request()])
        slow = SGD(lr=0.05, batch_size=16, local_epochs=2)
        (plain,) = client(tmp_path, trainer=slow).answer([request()])
        np.testing.assert_array_equal(vector_of(reply), vector_of(plain))

    def test_what_stays_so_fails_as_ever(self, tmp_path):
        task = Fragile(range(10_000))
        (reply,) = client(tmp_path, task).answer([request()])
        assert "TrainingDivergedError" in reply.error.reason
        assert "lower client.lr (now 0.1)" in reply.error.reason
        assert task.calls == PATIENT.attempts * per_epoch()

    def test_a_rate_that_was_too_high_is_lowered_until_it_fits(self, tmp_path):
        """At a rate of 1e30 the second loss is no number; 0.1 is a rate that fits."""
        trainer = SGD(lr=1e30, batch_size=16, local_epochs=2)
        impatient = client(tmp_path, trainer=trainer).answer([request()])[0]
        assert "lower client.lr" in impatient.error.reason
        bold = Retry(attempts=2, backoff_seconds=0.0, lr_factor=1e-31)
        (reply,) = client(tmp_path, trainer=trainer, retry=bold).answer([request()])
        (plain,) = client(tmp_path, trainer=SGD(lr=0.1, batch_size=16, local_epochs=2)).answer(
            [request()]
        )
        np.testing.assert_allclose(vector_of(reply), vector_of(plain), rtol=1e-4, atol=1e-6)

    def test_a_control_variate_is_a_mean_gradient_at_mixed_rates_too(self, tmp_path):
        """Δc = −c − Δ/Σηₖ (SCAFFOLD, Algorithm 1, option II, with a rate of its own for each step)."""
        each = per_epoch()
        trainer = Scaffold(lr=0.1, batch_size=16, local_epochs=2)
        (reply,) = client(tmp_path, Fragile({each + 2}), trainer).answer([request()])
        update = update_in(reply, extra=[CONTROL])
        expected = -update.delta.vector / np.float32(each * 0.1 + each * 0.05)
        np.testing.assert_allclose(update.sections[CONTROL].vector, expected, rtol=1e-5)

    def test_one_gradient_has_no_rate_to_lower(self, tmp_path):
        task = Fragile(range(100))
        (reply,) = client(tmp_path, task, FedSgd(batch_size=64)).answer([request()])
        assert "lower server.lr" in reply.error.reason
        assert task.calls == 1


class TestTogether:
    def asked(self):
        return [request(who=who) for who in range(4)]

    def test_one_that_failed_is_trained_again_alone_and_the_others_keep_their_bits(self, tmp_path):
        """Client 2's labels are marked, and the loss of what is marked is no number while all are trained at once."""

        def marking(count):
            found = data(count)
            plain = found.train

            def train(who):
                examples = plain(who)
                return Examples(examples.inputs, examples.targets + (100 if who == 2 else 0))

            found.train = train
            return found

        class Marked(Digits):
            def __init__(self, until: int) -> None:
                super().__init__()
                self.left = until

            def losses(self, output, targets):
                self.left -= 1
                found = super().losses(output, targets % 100)
                return found.where(targets < 100, math.nan) if self.left >= 0 else found

        def answered(task, source):
            ours = Client(
                task, module(), source, SGD(lr=0.1, batch_size=16, local_epochs=2),
                store=ClientStore(tmp_path), seed=11, together=True, retry=PATIENT,
            )  # fmt: skip
            return ours.answer(self.asked())

        plain, found = answered(TASK, data), answered(Marked(2 * per_epoch()), marking)
        for who in (0, 1, 3):
            np.testing.assert_array_equal(
                update_in(found[who], who).delta.vector, update_in(plain[who], who).delta.vector
            )
            assert RETRIES not in found[who].content[METRICS]
        slow = SGD(lr=0.05, batch_size=16, local_epochs=2)
        (alone,) = client(tmp_path, trainer=slow).answer([request(who=2)])
        np.testing.assert_array_equal(
            update_in(found[2], 2).delta.vector, update_in(alone, 2).delta.vector
        )
        assert found[2].content[METRICS][RETRIES] == 1

    def test_a_fault_that_passes_is_met_together_again(self, tmp_path):
        plain = client(tmp_path, together=True).answer(self.asked())
        task = Failing(RuntimeError("once"), {5})
        found = client(tmp_path, task, together=True).answer(self.asked())
        for who, (one, other) in enumerate(zip(found, plain, strict=True)):
            np.testing.assert_array_equal(
                update_in(one, who).delta.vector, update_in(other, who).delta.vector
            )

    def test_where_memory_is_short_they_are_trained_one_by_one(self, tmp_path):
        task = Greedy(16, MemoryError())
        found = client(tmp_path, task, together=True).answer(self.asked())
        plain = client(tmp_path).answer(self.asked())
        for who, (one, other) in enumerate(zip(found, plain, strict=True)):
            np.testing.assert_array_equal(
                update_in(one, who).delta.vector, update_in(other, who).delta.vector
            )


def test_looking_at_losses_changes_no_bit():
    examples = data().train(1)
    for trainer in TRAINERS[:2]:
        found = []
        for course in (Course(), Course(careful=True, pause=lambda: None)):
            network = Mlp(TASK.input_shape, TASK.num_classes, hidden=(8,))
            network.load_state_dict(module().state_dict())
            model = ResidentModel(network, arrays_of(network))
            asked = FitJob(1, arrays_of(network), {}, examples, 5, {}, {}, course=course)
            found.append(trainer.fit_one(asked, model, TASK).sections[DELTA].vector)
        np.testing.assert_array_equal(*found)


def test_weights_that_left_the_finite_numbers_end_an_epoch():
    class Exploding(Digits):
        def losses(self, output, targets):
            return super().losses(output * 1e-30, targets) * 1e30

    network = module()
    model = ResidentModel(network, arrays_of(network))
    course = Course(careful=True)
    asked = FitJob(1, arrays_of(network), {}, data().train(1), 5, {}, {}, course=course)
    with pytest.raises(TrainingDivergedError) as caught:
        SGD(lr=1e38, batch_size=1024, local_epochs=3).fit_one(asked, model, Exploding())
    assert caught.value.epoch == 0
