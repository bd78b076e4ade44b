"""Every combination of the parts: it composes and says what holds, or is refused with who, why and what instead."""

import importlib.util
import inspect
import sys
from pathlib import Path

import numpy as np
import pytest

import strategies.collectors
import strategies.combiners
import strategies.server_models
import strategies.stages
from strategies.contract import Claim, ContractError, Visibility
from strategies.protocols import ClientOwn
from strategies.server_models import ServerModel
from strategies.strategy import PipelineStrategy
from strategies.wire import pack_model
from tests.support.grids import ScriptedGrid, trellis_node, vanilla_node
from tests.support.updates import parameters

ROOT = Path(__file__).parents[2]


def load_script():
    spec = importlib.util.spec_from_file_location("contract_table", ROOT / "docs/contract_table.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


script = load_script()
ALL = list(script.combinations())
IDS = [f"{c.client} {c.stage}|{c.combiner}|{c.server}" for c in ALL]


def expected(combination) -> str | None:
    """The part that refuses, by rules of thumb written beside the contract, or None where all is well."""
    vanilla = "vanilla" in combination.client
    sends_control = "client=scaffold" in combination.client
    if vanilla and combination.stage:
        return "Clip"
    if refuses_sums(combination):
        combiner = script.COMBINERS[combination.combiner]
        return getattr(combiner, "label", type(combiner).__name__)
    if combination.combiner == "`fltrust`" and sends_control:
        return "FLTrust"
    if combination.server == "`scaffold`":
        sound = sends_control and combination.combiner != "mean, by examples"
        return None if sound else "SCAFFOLD's server"
    return f"server {script.SERVERS[combination.server].__name__}" if sends_control else None


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


@pytest.mark.parametrize(
    ("package", "table", "besides"),
    [
        (strategies.stages, [part for parts in script.STAGES.values() for part in parts], ()),
        (strategies.combiners, list(script.COMBINERS.values()), (strategies.combiners.Robust,)),
        (
            strategies.collectors,
            [clients.collector for clients in script.CLIENTS.values()],
            (strategies.collectors.PlainClient,),
        ),
        (
            strategies.server_models,
            [make() for make in script.SERVERS.values()],
            (ServerModel, strategies.server_models.ServerOptimizer),
        ),
    ],
    ids=["stages", "combiners", "collectors", "server optimisers"],
)
def test_no_part_is_left_out_of_the_table(package, table, besides):
    offered = {getattr(package, name) for name in package.__all__} - set(besides)
    assert {part for part in offered if inspect.isclass(part)} == {type(part) for part in table}


def test_a_row_of_the_table_stands_for_every_combination():
    table = script.table()
    rows = [line for line in table.splitlines() if line.startswith("| `")]
    assert sum(row.count("✓") + row.count("– (") for row in rows) >= len(script.CLIENTS) * 2
    for server in script.SERVERS:
        assert any(server in row.split("|")[1] for row in rows)
    widths = {line.count("|") for line in table.splitlines() if line.startswith("|")}
    assert widths == {1 + 2 + len(script.CLIENTS) * len(script.STAGES)}


def test_every_note_is_used_and_every_used_note_is_there():
    table = script.table()
    notes = [line.partition(".")[0] for line in table.splitlines() if line[:1].isdigit()]
    assert notes == [str(number) for number in range(1, len(notes) + 1)]
    assert all(f"– ({note})" in table for note in notes)
    assert f"– ({len(notes) + 1})" not in table


def test_the_readmes_table_is_current():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert script.insert(readme) == readme, "run: python docs/contract_table.py --write README.md"


def test_the_script_prints_the_table_and_writes_it_between_the_markers(tmp_path, capsys):
    assert script.main([]) == 0
    assert capsys.readouterr().out == script.table()
    page = tmp_path / "page.md"
    page.write_text(f"before\n{script.BEGIN}\nold\n{script.END}\nafter\n", encoding="utf-8")
    assert script.main(["--write", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    assert text == f"before\n{script.BEGIN}\n\n{script.table()}\n{script.END}\nafter\n"
    assert script.main(["--write", str(page)]) == 0
    assert page.read_text(encoding="utf-8") == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        script.BEGIN,
        f"{script.END}\n{script.BEGIN}",
        f"{script.BEGIN}{script.END}{script.END}",
        f"{script.BEGIN}{script.BEGIN}{script.END}",
    ],
    ids=["no markers", "no end", "the wrong way round", "two ends", "two beginnings"],
)
def test_a_page_without_its_markers_is_left_alone(text, tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text(text, encoding="utf-8")
    assert script.main(["--write", str(page)]) == 2
    assert page.read_text(encoding="utf-8") == text
    assert "needs one line <!-- contract:begin -->" in capsys.readouterr().err


def test_a_page_that_is_not_there_is_an_error(tmp_path, capsys):
    assert script.main(["--write", str(tmp_path / "none.md")]) == 2
    assert "No such file" in capsys.readouterr().err
