"""Every combination of the parts: it composes and says what holds, or is refused with who, why and what instead."""

import importlib.util
import inspect
import sys
from pathlib import Path

import numpy as np
import pytest

import strategies.collectors
import strategies.combiners
import strategies.privacy
import strategies.samplers
import strategies.server_models
import strategies.stages
from strategies.contract import Claim, ContractError, Visibility
from strategies.protocols import ClientOwn
from strategies.server_models import ServerModel
from strategies.stages.integer_noise import IntegerNoise
from strategies.strategy import PipelineStrategy
from strategies.update import DELTA
from strategies.wire import pack_model
from tests.support.grids import ScriptedGrid, trellis_node, vanilla_node
from tests.support.updates import parameters

ROOT = Path(__file__).parents[2]


def load_script(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"docs/{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up, and the tables their parts
    spec.loader.exec_module(module)
    return module


choices = load_script("contract_parts")
script = load_script("contract_table")
ALL = list(choices.combinations())
PRIVATE = list(choices.private_combinations())
COMPRESSED = list(choices.compressed_combinations())
ADAPTED = list(choices.adapted_combinations())
ADAPTED_IDS = [f"{c.adapters}|{c.way}|{c.beside}|{c.combiner}".replace("`", "") for c in ADAPTED]
COMPRESSED_IDS = [f"{c.compression}|{c.use}|{c.collector}".replace("`", "") for c in COMPRESSED]
PRIVATE_IDS = [f"{c.privacy}|{c.collector}|{c.rule}".replace("`", "") for c in PRIVATE]
IDS = [f"{c.client} {c.stage}|{c.combiner}|{c.server}" for c in ALL]


def expected(combination) -> str | None:
    """The part that refuses, by rules of thumb written beside the contract, or None where all is well."""
    vanilla = "vanilla" in combination.client
    sends_control = "client=scaffold" in combination.client
    if vanilla and combination.stage:
        return "Clip"
    if "lora" in combination.combiner:  # the model of the table has no adapters
        return type(choices.COMBINERS[combination.combiner]).__name__
    if refuses_sums(combination):
        combiner = choices.COMBINERS[combination.combiner]
        return getattr(combiner, "label", type(combiner).__name__)
    if combination.combiner == "`fltrust`" and sends_control:
        return "FLTrust"
    if combination.combiner == "`majority_vote`" and sends_control:
        return "the majority vote"
    if combination.server == "`scaffold`":
        sound = sends_control and combination.combiner != "mean, by examples"
        return None if sound else "SCAFFOLD's server"
    return f"server {choices.SERVERS[combination.server].__name__}" if sends_control else None


def refuses_sums(combination) -> bool:
    """Whether the combiner can't work with sums: they are weighted otherwise, or one is too few to compare."""
    by_examples = combination.combiner == "mean, by examples"
    match combination.client:
        case "`collector=masked`" | "`collector=ckks`":
            return not by_examples
        case "`collector=masked_groups`":
            return by_examples
    return False


def seen(combination) -> Visibility:
    """What the server sees of the updates."""
    return {
        "`collector=masked`": Visibility.SUM,
        "`collector=ckks`": Visibility.SUM,
        "`collector=masked_groups`": Visibility.GROUP,
    }.get(combination.client, Visibility.EACH)


@pytest.mark.parametrize("combination", ALL, ids=IDS)
def test_a_combination_composes_or_is_refused_by_the_part_that_cannot_work(combination):
    answer, refuses = combination.answer(), expected(combination)
    if refuses is None:
        assert isinstance(answer, Claim)
        assert answer.visibility is seen(combination)
        return
    assert isinstance(answer, ContractError)
    assert answer.second == refuses
    assert all((answer.first, answer.why, answer.instead))


@pytest.mark.parametrize("combination", ALL, ids=IDS)
def test_what_composes_runs_and_moves_the_model(combination, tmp_path):
    answer = combination.answer()
    if isinstance(answer, ContractError):
        with pytest.raises(ContractError, match="cannot be composed with"):
            PipelineStrategy(combination.pipeline())
        return
    pipeline = combination.pipeline()
    if answer.client_half:

        def change(client, number, arrays):
            return dict.fromkeys(answer.sections, np.float32([3.0, 4.0]))

        half = pipeline.collector.client_half(ClientOwn(tmp_path, {}, simulated=True))
        node = trellis_node(change, stages=pipeline.stages, half=half)
    else:
        node = vanilla_node(lambda arrays: {"w": arrays["w"] + np.float32([3.0, 4.0])})
    one = PipelineStrategy(pipeline, federated_every=0)
    # Three groups of three take nine clients, and four messages to each: one round has to do.
    nodes, rounds = (9, 1) if answer.visibility is Visibility.GROUP else (3, 2)
    grid = ScriptedGrid(dict.fromkeys(range(1, nodes + 1), node))
    one.start(grid, pack_model(parameters(0, 0)), num_rounds=rounds)
    assert pipeline.admission.refusals == {}
    assert (one.model.parameters > 0).all()


def central(combination) -> bool:
    """Whether the server adds the noise."""
    return "central" in combination.privacy or "ftrl" in combination.privacy


def shared(combination) -> bool:
    """Whether members of a sum add it."""
    return "distributed" in combination.privacy


def refusing(combination) -> str | None:
    """As `expected`, of the parts that privacy has to do with."""
    parts = combination.pipeline()
    rule = getattr(parts.combiner, "label", type(parts.combiner).__name__)
    sees_each = combination.collector in {"`collector=plain`", "`collector=bare`"}
    groups = "groups" in combination.collector
    if shared(combination) and sees_each:
        return "privacy=distributed"
    if combination.rule == "`mean`" and combination.collector != "`collector=plain`":
        return rule
    if combination.rule == "a robust rule" and not sees_each and not groups:
        return rule
    if parts.privacy is not None and combination.collector == "`collector=plain`":
        return parts.privacy.label
    if central(combination) and combination.rule != "`cohort_mean`":
        return parts.privacy.label
    whole = "masked_whole" in combination.collector
    if shared(combination) and not whole:
        return parts.privacy.label
    return "a pipeline without privacy=distributed" if whole and not shared(combination) else None


@pytest.mark.parametrize("combination", PRIVATE, ids=PRIVATE_IDS)
def test_private_parts_compose_or_are_refused_by_the_one_that_cannot_work(combination):
    answer, refuses = combination.answer(), refusing(combination)
    if refuses is not None:
        assert isinstance(answer, ContractError)
        assert answer.second == refuses
        assert all((answer.first, answer.why, answer.instead))
        return
    assert isinstance(answer, Claim)
    promise = combination.pipeline().privacy
    assert answer.private == {
        "`none`": None,
        "`none` with `client=dp_sgd`": "dp-sgd",
    }.get(combination.privacy, getattr(promise, "mechanism", None))
    if central(combination):
        changed = 0.1**2 + 0.5**2 if "adaptive" in combination.privacy else 1.0
        assert answer.sensitivity == pytest.approx(changed**0.5 / choices.COHORT)


COVERING = [
    *(("`none`", collector, "`uniform_mean`") for collector in choices.COLLECTORS),
    *((privacy, "`collector=bare`", "`cohort_mean`") for privacy in choices.PROMISES),
    *(
        (privacy, "`collector=masked`", "`cohort_mean`")
        for privacy in ("`central`", "`central` with `clip=adaptive`", "`ftrl`", "`local`")
    ),
    ("`central`", "`collector=ckks`", "`cohort_mean`"),
    ("`none` with `client=dp_sgd`", "`collector=masked`", "`uniform_mean`"),
    ("`local`", "`collector=bare`", "a robust rule"),
    *(
        (privacy, collector, rule)
        for privacy in ("`distributed`", "`distributed` with `clip=adaptive`")
        for collector, rule in (
            ("`collector=masked_whole`", "`uniform_mean`"),
            ("`collector=masked_whole`", "`cohort_mean`"),
            ("`collector=masked_whole` in groups", "`cohort_mean`"),
            ("`collector=masked_whole` in groups", "a robust rule"),
        )
    ),
]
"""Each promise with each way in which its noise meets what it hides."""


@pytest.mark.parametrize("names", COVERING, ids=lambda names: "|".join(names).replace("`", ""))
def test_what_composes_under_privacy_runs_and_moves_the_model_as_far_as_its_clip(names, tmp_path):
    """Noise is a tenth of the bound: the mean of nine equal updates shows through it by 8 standard deviations."""
    combination = choices.PrivateCombination(*names)
    pipeline = combination.pipeline()
    if refusing(combination) is not None:
        with pytest.raises(ContractError, match="cannot be composed with"):
            PipelineStrategy(pipeline, federated_every=0)
        return
    sections = {DELTA: np.float32([3.0, 4.0])}
    half = pipeline.collector.client_half(ClientOwn(tmp_path, {}, simulated=True))
    node = trellis_node(lambda client, number, arrays: sections, stages=pipeline.stages, half=half)
    one = PipelineStrategy(pipeline, federated_every=0)
    population = 2 * choices.COHORT if "ftrl" in combination.privacy else choices.COHORT
    grid = ScriptedGrid(dict.fromkeys(range(1, population + 1), node))
    one.start(grid, pack_model(parameters(0, 0)), num_rounds=1)
    assert pipeline.admission.refusals == {}
    bound = 0.1 if "adaptive" in combination.privacy else 1.0
    found = one.model.parameters / bound
    assert found == pytest.approx([0.6, 0.8], abs=0.4)
    if pipeline.privacy is not None and combination.privacy != "`none` with `client=dp_sgd`":
        assert pipeline.privacy.report()["releases"] == 1
        assert pipeline.privacy.epsilon > 0


def packs(combination) -> bool:
    """Whether sections are bytes."""
    return combination.compression not in ("`none`", "`random_k`")


@pytest.mark.parametrize("combination", COMPRESSED, ids=COMPRESSED_IDS)
def test_compressed_parts_compose_or_are_refused_by_the_one_that_cannot_work(combination):
    """What travels as numbers composes as what is not compressed does; bytes only where the server sees each."""
    answer = combination.answer()
    label = f"compression={combination.compression.strip('`')}"
    sees_each = combination.collector in {"`collector=plain`", "`collector=bare`"}
    if packs(combination) and not sees_each:
        assert isinstance(answer, ContractError)
        assert answer.second == label
        return
    if combination.compression == "`top_k`" and combination.use == "`privacy=local`":
        assert answer.second == label
        return
    if combination.compression == "`top_k`" and combination.use == "one by coordinate":
        assert answer.second == "the median"
        return
    plain = choices.CompressedCombination("`none`", combination.use, combination.collector).answer()
    assert isinstance(answer, Claim) == isinstance(plain, Claim)
    if isinstance(plain, ContractError):
        assert answer.second == plain.second
        return
    assert (answer.packed is None) == (not packs(combination))
    assert answer.sensitivity == plain.sensitivity
    assert answer.support == ("per_client" if combination.compression == "`top_k`" else "shared")


@pytest.mark.parametrize("combination", COMPRESSED, ids=COMPRESSED_IDS)
def test_what_composes_compressed_runs_and_moves_the_model(combination, tmp_path):
    """Noise is a tenth of the bound, and all nine clients send the same: the largest element shows through it."""
    if isinstance(combination.answer(), ContractError):
        with pytest.raises(ContractError, match="cannot be composed with"):
            PipelineStrategy(combination.pipeline(), federated_every=0)
        return
    pipeline = combination.pipeline()
    sections = {DELTA: np.float32([3.0, 4.0])}
    half = pipeline.collector.client_half(ClientOwn(tmp_path, {}, simulated=True))
    node = trellis_node(lambda client, number, arrays: sections, stages=pipeline.stages, half=half)
    one = PipelineStrategy(pipeline, federated_every=0)
    grid = ScriptedGrid(dict.fromkeys(range(1, choices.COHORT + 1), node))
    one.start(grid, pack_model(parameters(0, 0)), num_rounds=1)
    assert pipeline.admission.refusals == {}
    assert one.model.parameters[1] == pytest.approx(0.8, abs=0.4)


def refuses_adapters(combination) -> str | None:
    """As `expected`, of the parts that adapters have to do with."""
    combiner, name = choices.ADAPTED[combination.combiner], combination.combiner
    masked, unequal = combination.way == "masked", "unequal" in combination.adapters
    shared, buffered = "share_a" in combination.adapters, "buffered" in combination.beside
    central, cohort = "central" in combination.beside, "cohort" in name
    alone = (
        masked and not buffered
    )  # a buffer holds sums of several sessions, which can be compared
    product = "lora" in name and "mean" not in name
    refused = {
        "`mean`": unequal,
        "`lora_mean`": masked and unequal,
        "`lora_mean` by task": masked,
        "`lora_mean` over the cohort": unequal and not shared,
        "`krum`": alone or unequal or not shared,
        "`median`": alone or unequal,
    }.get(name, shared or masked or buffered)
    if refused or (central and not masked and getattr(combiner, "weighting", "") == "examples"):
        return getattr(combiner, "label", type(combiner).__name__)
    if product:
        return {"`server=adam`": "server Adam", "`server.momentum=0.9`": "server SGD"}.get(
            combination.beside
        )
    return "privacy=central" if central and not cohort else None


@pytest.mark.parametrize("combination", ADAPTED, ids=ADAPTED_IDS)
def test_adapters_compose_or_are_refused_by_the_part_that_cannot_work(combination):
    answer, refuses = combination.answer(), refuses_adapters(combination)
    if refuses is not None:
        assert isinstance(answer, ContractError)
        assert answer.second == refuses
        assert all((answer.first, answer.why, answer.instead))
        return
    assert isinstance(answer, Claim)
    assert answer.replaced == (
        "lora" in combination.combiner and "mean" not in combination.combiner
    )


@pytest.mark.parametrize(
    ("package", "table", "besides"),
    [
        (
            strategies.stages,
            [part for parts in choices.STAGES.values() for part in parts]
            + [part for one in PRIVATE + COMPRESSED for part in one.pipeline().stages],
            (IntegerNoise,),
        ),
        (strategies.combiners, list(choices.COMBINERS.values()), (strategies.combiners.Robust,)),
        (
            strategies.collectors,
            [clients.collector for clients in choices.CLIENTS.values()],
            # Split training needs a model that is cut: test_split_contract.py, and the table of docs/split_training.md.
            # Encrypted training composes as vectors alone do, but for what test_encrypted_contract.py holds it to.
            (
                strategies.collectors.PlainClient,
                strategies.collectors.Split,
                strategies.collectors.Encrypted,
            ),
        ),
        (
            strategies.server_models,
            [make() for make in choices.SERVERS.values()],
            (ServerModel, strategies.server_models.ServerOptimizer),
        ),
        (
            strategies.samplers,
            [parts.sampler() for parts in choices.PROMISES.values()],
            # It composes as a fixed cohort does, but with no promise that rests on who is asked: test_fair.py.
            (strategies.samplers.Fair,),
        ),
        (
            strategies.privacy,
            [one for parts in choices.PROMISES.values() if (one := parts.promise()) is not None],
            (strategies.privacy.Guarantee,),
        ),
    ],
    ids=["stages", "combiners", "collectors", "server optimisers", "samplers", "promises"],
)
def test_no_part_is_left_out_of_the_tables(package, table, besides):
    offered = {getattr(package, name) for name in package.__all__} - set(besides)
    parts = {part for part in offered if inspect.isclass(part) and not issubclass(part, Exception)}
    assert parts == {type(part) for part in table} - set(besides)


def test_a_row_of_the_table_stands_for_every_combination():
    table = script.table()
    rows = [line for line in table.splitlines() if line.startswith("| `")]
    assert sum(row.count("✓") + row.count("– (") for row in rows) >= len(choices.CLIENTS) * 2
    for server in choices.SERVERS:
        assert any(server in row.split("|")[1] for row in rows)
    widths = {line.count("|") for line in table.splitlines() if line.startswith("|")}
    assert widths == {1 + 2 + len(choices.CLIENTS) * len(choices.STAGES)}


def test_a_row_of_the_table_of_privacy_stands_for_every_combination():
    lines = [line for line in script.private_table().splitlines() if line.startswith("|")]
    assert {line.count("|") for line in lines} == {1 + 2 + len(choices.COLLECTORS)}
    for privacy in choices.PROMISES:
        mine = [line for line in lines if privacy in line.split("|")[1].strip().split(", ")]
        for rule in choices.RULES:
            assert sum(rule in line.split("|")[2].strip().split("; ") for line in mine) == 1


def test_a_row_of_the_table_of_compression_stands_for_every_combination():
    lines = [line for line in script.compression_table().splitlines() if line.startswith("|")]
    assert {line.count("|") for line in lines} == {1 + 2 + len(choices.COLLECTORS)}
    for compression in choices.COMPRESSIONS:
        mine = [line for line in lines if compression in line.split("|")[1].strip().split(", ")]
        for use in choices.COMPRESSED:
            assert sum(use in line.split("|")[2].strip().split("; ") for line in mine) == 1


def test_a_row_of_the_table_of_adapters_stands_for_every_combination():
    lines = [line for line in script.adapted_table().splitlines() if line.startswith("|")]
    assert {line.count("|") for line in lines} == {
        1 + 2 + len(choices.ADAPTERS) * len(choices.WAYS)
    }
    for beside in choices.BESIDE:
        mine = [line for line in lines if beside in line.split("|")[1].strip().split(", ")]
        for combiner in choices.ADAPTED:
            assert sum(combiner in line.split("|")[2].strip().split("; ") for line in mine) == 1


@pytest.mark.parametrize("make", script.TABLES.values())
def test_every_note_is_used_and_every_used_note_is_there(make):
    table = make()
    notes = [line.partition(".")[0] for line in table.splitlines() if line[:1].isdigit()]
    assert notes == [str(number) for number in range(1, len(notes) + 1)]
    assert all(f"– ({note})" in table for note in notes)
    assert f"– ({len(notes) + 1})" not in table


@pytest.mark.parametrize(
    "page", ["README.md", "docs/privacy.md", "docs/compression.md", "docs/lora_aggregation.md"]
)
def test_the_pages_tables_are_current(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert script.insert(text) == text, f"run: python docs/contract_table.py --write {page}"


@pytest.mark.parametrize(
    ("markers", "make"),
    script.TABLES.items(),
    ids=["contract", "privacy", "compression", "adapters"],
)
def test_the_script_writes_a_table_between_its_markers(markers, make, tmp_path):
    page, (begin, end) = tmp_path / "page.md", markers
    page.write_text(f"before\n{begin}\nold\n{end}\nafter\n", encoding="utf-8")
    assert script.main(["--write", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    assert text == f"before\n{begin}\n\n{make()}\n{end}\nafter\n"
    assert script.main(["--write", str(page)]) == 0
    assert page.read_text(encoding="utf-8") == text


def test_the_script_prints_the_tables(capsys):
    assert script.main([]) == 0
    assert capsys.readouterr().out == "\n".join(one() for one in script.TABLES.values())


@pytest.mark.parametrize(
    "text",
    [
        "",
        script.BEGIN,
        f"{script.END}\n{script.BEGIN}",
        f"{script.BEGIN}{script.END}{script.END}",
        f"{script.BEGIN}{script.BEGIN}{script.END}",
        f"{script.BEGIN}{script.END}{script.PRIVACY_BEGIN}",
    ],
    ids=[
        "no markers",
        "no end",
        "the wrong way round",
        "two ends",
        "two beginnings",
        "one table whole and one without its end",
    ],
)
def test_a_page_without_its_markers_is_left_alone(text, tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text(text, encoding="utf-8")
    assert script.main(["--write", str(page)]) == 2
    assert page.read_text(encoding="utf-8") == text
    kind = "privacy" if script.PRIVACY_BEGIN in text else "contract"
    assert f"needs one line <!-- {kind}:begin -->" in capsys.readouterr().err


def test_a_page_that_is_not_there_is_an_error(tmp_path, capsys):
    assert script.main(["--write", str(tmp_path / "none.md")]) == 2
    assert "No such file" in capsys.readouterr().err
