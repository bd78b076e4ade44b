"""The model that a run trained, as what is served. Nothing in the run's folder is changed."""

from __future__ import annotations

from pathlib import Path

import torch

from clients.encrypted.model_file import TrainedModel
from clients.encrypted.network import PolynomialNet
from fl_app.audit.target import MODEL, load
from fl_app.config.faults import ConfigError, Fault


def of_run(folder: Path, bound: float) -> TrainedModel:
    """The model of a run's folder.

    Args:
        folder: of a run on the engine that has ended.
        bound: the largest magnitude of a feature that is to be served.

    Raises:
        ConfigError: it holds no such run, its model is no polynomial network, or no ring has room for it.
    """
    target = load(folder)
    network = target.assembly.module()
    if not isinstance(network, PolynomialNet):
        fault = f"{type(network).__name__} can't be evaluated on ciphertexts: model=encrypted_mlp"
        raise ConfigError([Fault("model", fault)])
    state = {name: torch.tensor(array) for name, array in target.model().items()}
    try:
        network.load_state_dict(state)
        run = f"{target.path.name} ({target.summary.get('config_hash')})"
        return TrainedModel.of(network, bound, run)
    except (ValueError, RuntimeError) as error:
        raise ConfigError([Fault(str(target.path / MODEL), str(error))]) from error
