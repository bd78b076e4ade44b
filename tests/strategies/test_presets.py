"""The named strategies: which parts each is made of."""

from functools import partial

import numpy as np
import pytest

import strategies
from strategies import ContractError, Pipeline, PipelineStrategy, Visibility
from strategies.collectors import Masked
from strategies.combiners import (
    Bulyan,
    CenteredClipping,
    FLTrust,
    GeometricMedian,
    Krum,
    Median,
    MultiKrum,
    NearestNeighborMixing,
    NormBounding,
    TrimmedMean,
)
from strategies.exchange import NoClientsError
from strategies.presets import PROXIMAL_MU
from strategies.privacy import Central, Ftrl
from strategies.protocols import ClientOwn
from strategies.secagg import MaskedClient
from strategies.server_models import SGD, Adagrad, Adam, Scaffold, Yogi
from strategies.stages import Clip
from strategies.update import CONTROL, DELTA, Section, Update
from strategies.wire import CONFIG, pack_model, unpack_model
from tests.support.grids import ScriptedGrid, trellis_node, vanilla_node
from tests.support.updates import parameters


def ROOT(job):  # noqa: N802 - a constant that is called
    """What a server with clean data would make of any model."""
    sections = {
        name: Section(np.ones(lay.size, np.float32), lay) for name, lay in job.layouts.items()
    }
    return Update(sections, 1.0, (), job.version)


VANILLA = {
    "fedavg": (strategies.fedavg, {}, SGD(lr=1.0, momentum=0.0)),
    "fedprox": (strategies.fedprox, {"mu": 0.1}, SGD(lr=1.0, momentum=0.0)),
    "fedavgm": (strategies.fedavgm, {"lr": 0.5}, SGD(lr=0.5, momentum=0.9)),
    "fedadagrad": (strategies.fedadagrad, {"lr": 0.2}, Adagrad(lr=0.2, beta1=0.0, tau=1e-3)),
    "fedadam": (strategies.fedadam, {"lr": 0.03}, Adam(lr=0.03, beta1=0.9, beta2=0.99, tau=1e-3)),
    "fedbuff": (strategies.fedbuff, {"buffer": 2}, SGD()),
    "fedasync": (strategies.fedasync, {"mixing": 0.5}, SGD()),
    "fedyogi": (strategies.fedyogi, {"tau": 0.1}, Yogi(lr=0.01, beta1=0.9, beta2=0.99, tau=0.1)),
}


@pytest.mark.parametrize("name", VANILLA)
def test_a_named_strategy_has_the_servers_optimiser_of_its_paper(name):
    make, keywords, optimizer = VANILLA[name]
    assert make(**keywords).pipeline.optimizer == optimizer


@pytest.mark.parametrize("name", VANILLA)
def test_a_named_strategy_runs_with_vanilla_clients(name):
    make, keywords, _ = VANILLA[name]

    def fit(arrays):
        return {"w": arrays["w"] + np.float32([1, -1])}

    grid = ScriptedGrid({1: vanilla_node(fit), 2: vanilla_node(fit)})
    result = make(**keywords).start(grid, pack_model(parameters(0, 0)), num_rounds=3)
    moved = unpack_model(result.arrays)["w"]
    assert moved[0] > 0 > moved[1]
    assert moved[0] == -moved[1]


@pytest.mark.parametrize("name", VANILLA)
def test_a_named_strategy_takes_updates_where_clients_have_their_half(name):
    make, keywords, _ = VANILLA[name]
    node = trellis_node(lambda client, number, arrays: {"delta": [1.0, -1.0]})
    result = make(**keywords, vanilla=False).start(
        ScriptedGrid({1: node, 2: node}), pack_model(parameters(0, 0)), num_rounds=1
    )
    assert unpack_model(result.arrays)["w"][0] > 0


def test_fedavg_with_one_local_result_takes_it():
    def fit(arrays):
        return {"w": np.float32([5, 7])}

    grid = ScriptedGrid({1: vanilla_node(fit), 2: vanilla_node(fit, examples=9)})
    result = strategies.fedavg().start(grid, pack_model(parameters(1, 2)), num_rounds=1)
    np.testing.assert_array_equal(unpack_model(result.arrays)["w"], [5, 7])


def test_fedprox_tells_clients_mu_by_flowers_name():
    grid = ScriptedGrid({1: vanilla_node(lambda arrays: arrays)})
    strategies.fedprox(mu=0.25, min_clients=1).start(
        grid, pack_model(parameters(0, 0)), num_rounds=1
    )
    assert PROXIMAL_MU == "proximal-mu"
    assert grid.sent[0].content[CONFIG]["proximal-mu"] == 0.25


def test_further_keywords_are_the_strategys():
    grid = ScriptedGrid({node: vanilla_node(lambda arrays: arrays) for node in range(10)})
    one = strategies.fedavg(fraction=0.3, min_clients=10, federated_every=0, seed=5)
    one.start(grid, pack_model(parameters(0, 0)), num_rounds=2)
    assert len(grid.sent) == 6
    with pytest.raises(TypeError, match="unexpected keyword argument 'fractoin'"):
        strategies.fedavg(fractoin=0.3)


def test_scaffold_sends_its_control_and_moves_it_by_the_share_of_the_population():
    seen = []

    def change(client, number, arrays):
        return {DELTA: [1.0, 1.0], CONTROL: [4.0, -4.0]}

    def node(message):
        if message.metadata.message_type == "train":
            seen.append(unpack_model(message.content.array_records[CONTROL])[CONTROL].copy())
        return trellis_node(change)(message)

    one = strategies.scaffold(population=8)
    one.start(ScriptedGrid({1: node, 2: node}), pack_model(parameters(0, 0)), num_rounds=2)
    assert one.pipeline.optimizer == Scaffold(lr=1.0, population=8)
    np.testing.assert_array_equal(seen[0], [0, 0])
    np.testing.assert_array_equal(seen[-1], [1, -1])  # 2 of 8 clients: 4 · 2/8


def test_scaffold_needs_to_know_how_many_clients_there_are():
    with pytest.raises(TypeError, match="population"):
        strategies.scaffold()


def test_every_name_that_the_package_offers_is_there():
    assert all(hasattr(strategies, name) for name in strategies.__all__)
    assert issubclass(ContractError, ValueError)


ROBUST = {
    "robust": (strategies.robust, {"f": 1}, NearestNeighborMixing(f=1, rule=TrimmedMean())),
    "krum": (strategies.krum, {"f": 1}, Krum(f=1)),
    "multi_krum": (strategies.multi_krum, {"f": 1, "keep": 2}, MultiKrum(f=1, keep=2)),
    "bulyan": (strategies.bulyan, {"f": 0}, Bulyan(f=0)),
    "median": (strategies.median, {"f": 1}, Median(f=1)),
    "trimmed_mean": (strategies.trimmed_mean, {"f": 1}, TrimmedMean(f=1)),
    "geometric_median": (strategies.geometric_median, {"f": 1}, GeometricMedian(f=1)),
    "centered_clipping": (
        strategies.centered_clipping,
        {"f": 1, "tau": 1.0},
        CenteredClipping(f=1, tau=1),
    ),
    "norm_bounding": (strategies.norm_bounding, {"f": 1, "bound": 3.0}, NormBounding(f=1, bound=3)),
    "fltrust": (strategies.fltrust, {"f": 1, "root": ROOT}, FLTrust(f=1)),
}


@pytest.mark.parametrize("name", ROBUST)
def test_a_robust_strategy_runs_with_vanilla_clients_one_of_which_lies(name):
    make, keywords, combiner = ROBUST[name]

    def fit(arrays):
        return {"w": arrays["w"] + np.float32([1, 2])}

    def lie(arrays):
        return {"w": arrays["w"] - np.float32([90, 90])}

    nodes = {number: vanilla_node(fit) for number in range(1, 6)}
    if name != "bulyan":  # which bears a liar among seven
        nodes[3] = vanilla_node(lie, examples=10**6)
    strategy = make(**keywords, seed=1)
    assert strategy.pipeline.combiner == combiner
    result = strategy.start(ScriptedGrid(nodes), pack_model(parameters(0, 0)), num_rounds=3)
    moved = unpack_model(result.arrays)["w"]
    assert (moved > 0.5).all()


def test_a_robust_strategy_waits_for_as_many_clients_as_its_rule_needs():
    def fit(arrays):
        return {"w": arrays["w"] + np.float32([1, 2])}

    nodes = {number: vanilla_node(fit) for number in range(1, 7)}
    with pytest.raises(NoClientsError, match="6 of 7 clients came"):
        strategies.krum(f=2).start(
            ScriptedGrid(nodes), pack_model(parameters(0, 0)), num_rounds=2, timeout=5.0
        )
    half = strategies.krum(f=2, fraction=0.5)
    with pytest.raises(NoClientsError, match="6 of 14 clients came"):
        half.start(ScriptedGrid(nodes), pack_model(parameters(0, 0)), timeout=5.0)


def test_f_must_be_given_where_nothing_fixes_the_cohort():
    with pytest.raises(ContractError, match=r"set f \(combiner.f=1\)"):
        strategies.robust(f=None)


def test_ckks_mean_adds_what_its_clients_encrypt(tmp_path):
    strategy = strategies.ckks_mean()
    half = strategy.pipeline.collector.client_half(ClientOwn(tmp_path, {}, simulated=True))

    def change(client, number, arrays):
        return {DELTA: np.float32([0.1 * client, -0.5])}

    node = trellis_node(change, examples=500, half=half)
    grid = ScriptedGrid(dict.fromkeys(range(1, 5), node))
    strategy.start(grid, pack_model(parameters(0, 0)), num_rounds=1)
    assert strategy.model.parameters[1] == pytest.approx(-0.5, abs=1e-6)
    assert strategy.pipeline.claim.visibility is strategies.Visibility.SUM


@pytest.mark.parametrize(
    "strategy",
    [
        strategies.secure(seed=1),
        strategies.secure(None, seed=1),
        strategies.secure_grouped(3, 1, seed=1),
    ],
    ids=["by examples", "uniform", "grouped"],
)
def test_a_secure_strategy_sees_sums_only(strategy, tmp_path):
    half = MaskedClient(tmp_path)
    nodes = {
        number: trellis_node(lambda *_: {DELTA: [0.5, -1.0]}, half=half) for number in range(9)
    }
    result = strategy.start(ScriptedGrid(nodes), pack_model(parameters(0, 0)), num_rounds=2)
    np.testing.assert_allclose(unpack_model(result.arrays)["w"], [1, -2], rtol=1e-5)
    assert strategy.claim.visibility < Visibility.EACH
    assert strategy.claim.clear == frozenset()


@pytest.mark.parametrize(
    "preset",
    [
        strategies.secure,
        partial(strategies.secure_grouped, 3, 1),
        strategies.ckks_mean,
        lambda **given: PipelineStrategy(
            Pipeline(collector=Masked(max_weight=9)), **{"federated_every": 1} | given
        ),
    ],
    ids=["secure", "secure_grouped", "ckks_mean", "by hand"],
)
def test_no_client_is_asked_for_its_own_figures_where_the_server_sees_sums(preset):
    with pytest.raises(ContractError, match=r"set evaluate\.federated_every=0") as told:
        preset(federated_every=3)
    assert told.value.second == "evaluate.federated_every"
    assert preset(federated_every=0)._federated_every == 0


def test_the_secure_presets_ask_for_none():
    for one in (strategies.secure(), strategies.secure_grouped(3, 1), strategies.ckks_mean()):
        assert not one._federated_every


@pytest.mark.parametrize("name", ["dp", "dp_ftrl"])
def test_the_private_ones_pay_for_each_round_of_a_foreign_app_and_end_at_the_budget(name, tmp_path):
    settings = {"participations": 2, "separation": 2} if name == "dp_ftrl" else {}
    file = tmp_path / "ledger.jsonl"
    kind = Ftrl if name == "dp_ftrl" else Central
    promise = kind(target_epsilon=2.0, population=4, rounds=3, ledger=file)
    strategy = getattr(strategies, name)(promise, norm=0.5, fraction=0.5, **settings)

    def change(client, number, arrays):
        return {"delta": np.float32([3.0, 4.0])}

    node = trellis_node(change, stages=[Clip(norm=0.5)], metrics={"loss": 7.0})
    grid = ScriptedGrid(dict.fromkeys(range(1, 5), node))
    result = strategy.start(grid, pack_model(parameters(0, 0)), num_rounds=50)
    assert strategy.stopped.reason in ("privacy budget", "participation limit")
    report = strategy.pipeline.privacy.report()
    assert 1.9 <= report["epsilon"] <= 2.0
    assert len(file.read_text().splitlines()) == 1 + report["releases"]
    assert not result.train_metrics_clientapp
    assert strategy.model.version >= 3
