import numpy as np
import pytest

from strategies.contract import Claim, ContractError, Visibility
from strategies.pipeline import Pipeline
from strategies.stages import Clip, PowerSgd, Quantize, Sign
from strategies.stages.clip import l2_norm
from strategies.update import DELTA, Layout, Update
from strategies.wire import Refused
from tests.support.compression import arrived, encoded, normal, one, received
from tests.support.updates import section

PACKING = [Quantize(bits=2), Quantize(bits=4), Quantize(bits=8), PowerSgd(rank=1), Sign()]
IDS = ["2 bits", "4 bits", "8 bits", "power_sgd", "sign"]
LAYOUT = Layout(("w",), ((20, 20),))
each = pytest.mark.parametrize("stage", PACKING, ids=IDS)


@pytest.mark.parametrize(("bits", "error"), [(8, 0.03), (4, 0.4), (2, 1.5)])
def test_the_error_is_that_of_so_many_bits(bits, error):
    """A vector's relative error, in buckets of 100 from a bell curve: √(E[h² f(1 − f)]) below h/2 by about a third."""
    found, proposed = arrived(one(normal()), [Quantize(bits=bits, bucket=100)])
    relative = np.linalg.norm(found - normal()) / np.linalg.norm(normal())
    assert error / 4 < relative < error
    assert proposed == {}


def test_a_round_repeats_and_clients_and_rounds_and_seeds_draw_apart():
    def packed(client=0, number=1, seed=0):
        return encoded(one(normal(), client=client), [Quantize(seed=seed)], number=number)[
            0
        ].delta.packed

    assert packed() == packed()
    assert len({packed(), packed(client=1), packed(number=2), packed(seed=1)}) == 4


def test_the_mean_over_clients_errs_less_than_a_client():
    found = [arrived(one(normal(), client=client), [Quantize(bits=2)])[0] for client in range(100)]
    alone = np.linalg.norm(found[0] - normal())
    together = np.linalg.norm(np.mean(found, axis=0) - normal())
    assert together == pytest.approx(alone / 10, rel=0.3)


@each
@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_a_diverged_update_is_refused_for_what_it_is(stage, wrong):
    values = normal()
    values[123] = wrong
    sent, _ = encoded(one(values, LAYOUT), [stage])
    with pytest.raises(Refused) as refused:
        Pipeline().admission.admit(received(sent, [stage], LAYOUT))
    assert refused.value.reason == "not_finite"


@each
def test_more_bytes_than_a_client_can_need_are_refused_unread(stage):
    sent, _ = encoded(one(normal(), LAYOUT), [stage])
    padded = sent.delta.packed + bytes(stage.most_bytes(LAYOUT))
    with pytest.raises(Refused) as refused:
        received(
            sent.with_section(DELTA, type(sent.delta)(normal(), LAYOUT, packed=padded)),
            [stage],
            LAYOUT,
        )
    assert refused.value.reason == "too_large"


@each
def test_the_servers_clip_holds_whatever_a_coding_does(stage):
    """What makes privacy=central sound: what is decoded may be longer than the bound, what is combined is not."""
    stages = [Clip(norm=1.0), stage]
    longer = 0
    for seed in range(20):
        memory = {f"{stage.name}.error": normal(seed=seed, scale=1.0)}
        sent, _ = encoded(one(normal(seed=seed, scale=10), LAYOUT), stages, memory)
        door = received(sent, stages, LAYOUT)
        longer += l2_norm(door.delta.vector) > 1
        assert l2_norm(Pipeline(stages=stages).decode(door).delta.vector) <= 1
    assert longer >= 5
    assert stage.check(Claim(bounds={DELTA: 1.0})).bounds == {DELTA: 1.0}


@each
def test_bytes_are_for_a_server_that_sees_each_update_and_for_one_coding(stage):
    claim = stage.check(Claim())
    assert claim.packed == stage.name
    with pytest.raises(ContractError, match="no stage behind it can change"):
        stage.check(claim)
    for visibility in (Visibility.SUM, Visibility.GROUP):
        with pytest.raises(ContractError, match="can't be summed under a mask"):
            stage.check(Claim(visibility=visibility))
    with pytest.raises(ContractError, match="client half"):
        stage.check(Claim(client_half=False))


@each
def test_sections_beside_the_parameters_travel_as_they_are(stage):
    both = one(normal(), LAYOUT).with_section("buffers", section([1.5, 2.5]))
    sent, _ = encoded(both, [stage])
    assert isinstance(sent, Update)
    assert sent.sections["buffers"] == both.sections["buffers"]
    assert sent.delta.packed is not None


@each
def test_a_model_of_nothing_is_no_trouble(stage):
    nothing = Layout(("w",), ((0,),))
    found, _ = arrived(one(np.empty(0), nothing), [stage])
    assert found.shape == (0,)


@pytest.mark.parametrize("bucket", [0, 7, 1 << 17])
def test_a_bucket_is_neither_tiny_nor_larger_than_a_block(bucket):
    with pytest.raises(ValueError, match="bucket"):
        Quantize(bucket=bucket)
