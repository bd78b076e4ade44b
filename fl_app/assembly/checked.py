"""The server's end of a configuration, held against the contract: what a run refuses before its first round.

The same for a run, a dry run, a sweep's jobs and a preflight, so that none of them takes what another would refuse.
Must not know what becomes of what it lets through.
"""

from __future__ import annotations

from fl_app.assembly.client import make_client_half
from fl_app.assembly.server import make_strategy
from fl_app.assembly.shared import Assembly
from fl_app.config.faults import ConfigError, Fault
from fl_app.config.schema import DEFAULT_NUM_CLIENTS, Config
from strategies.contract import ContractError, Visibility
from strategies.strategy import PipelineStrategy


def composed(assembly: Assembly, num_clients: int) -> PipelineStrategy:
    """The server half of a configuration, its contract checked.

    Raises:
        ConfigError: parts of the pipeline may not be composed, or clients lack what they must bring along.
    """
    try:
        strategy = make_strategy(assembly, num_clients)
        claim = strategy.claim
        if claim.visibility < Visibility.EACH or strategy.pipeline.privacy is not None:
            # The model's own sections, too: the run would find out only when it begins.
            strategy.pipeline.check(assembly.network.sections)
    except ContractError as error:
        raise ConfigError([Fault(error.second, str(error))]) from error
    if assembly.adversary is not None and claim.visibility < Visibility.EACH:
        said = "knows the updates of the honest, which nobody sees under masks: use an attack that knows only its own"
        raise ConfigError([Fault("attack", said, type(assembly.attack).__name__)])
    if assembly.config.backend == "engine":
        make_client_half(assembly, "engine")
    return strategy


def check(config: Config) -> None:
    """Refuses what a run would refuse before its first round.

    Raises:
        ConfigError: as the back end's own run.
    """
    clients = DEFAULT_NUM_CLIENTS if config.num_clients == "auto" else config.num_clients
    if config.backend == "flower":
        check_for_flower(config, clients)
    else:
        composed(Assembly(config), clients)


def check_for_flower(config: Config, num_clients: int) -> None:
    """Refuses here what a ServerApp would refuse, before Flower is started for it.

    Raises:
        ConfigError: an attack is configured, or parts may not be composed.
    """
    refuse_attack(config)
    composed(Assembly(config), num_clients)


def refuse_attack(config: Config) -> None:
    """Clients that lie are for the engine: no real device is told to.

    Raises:
        ConfigError: an attack is configured.
    """
    if config.attack is not None:
        told = "attacks run on the engine only: use backend=engine"
        raise ConfigError([Fault("attack", told, config.attack.name)])
