"""Flower's entry point on a client: composes the configuration, then calls the client."""

import logging
from collections.abc import Callable
from functools import lru_cache

from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode

from clients.client import Client
from clients.device import coarse, measure
from clients.leftovers import remove_leftovers
from fl_app.assembly import Assembly, Place, make_client
from fl_app.compose import compose, parse_overrides
from fl_app.config.faults import ConfigError
from fl_app.flower.bundle import enter_bundle, launch_directory, simulated
from fl_app.node import Node
from strategies.wire import Refused

log = logging.getLogger(__name__)

enter_bundle()

app = ClientApp()
"""Named by pyproject.toml."""


@lru_cache(maxsize=1)
def _assembly(overrides: str) -> Assembly:
    config = compose([*parse_overrides(overrides), "backend=flower"])
    return Assembly(config.within(launch_directory()))


@lru_cache(maxsize=1)
def _client(overrides: str, node: int) -> Client:
    """One client a process: its model stays resident from message to message."""
    place: Place = "simulation" if simulated() else "device"
    return make_client(_assembly(overrides), place, _settings[node])


_settings: dict[int, dict[str, bool | int | float | str]] = {}
"""Node config by node: a simulation's process plays several, and none needs its own there."""


def _ours(context: Context) -> Client:
    node = 0 if simulated() else context.node_id
    _settings[node] = dict(context.node_config)
    return _client(str(context.run_config["overrides"]), node)


def _reply(message: Message, context: Context, answer: Callable[[Client], Message]) -> Message:
    """What the client answers; on a device a run that its operator's settings rule out is refused in a word.

    Flower sends the text of an exception to the server, and this one names files of the device's.
    """
    try:
        client = _ours(context)
    except ConfigError as error:
        if simulated():
            raise
        log.error("this device takes no part in the run: %s", error)
        told = Refused("configuration", str(error)).told
        return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, told), reply_to=message)
    reply = answer(client)
    if not simulated():  # behind the answer: what this request goes on with has been taken up
        _tidy(Node(context.node_config))
    return reply


def _tidy(node: Node) -> None:
    """Removes what is half done and old; no reply is lost because that fails."""
    try:
        remove_leftovers(node.folder, node.half_done_days)
    except OSError as error:
        log.warning("%s is not looked through for what is left over: %s", node.folder, error)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Fits the node's own data."""
    return _reply(message, context, lambda client: client.answer([message])[0])


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Measures the model on the node's own test part."""
    return _reply(message, context, lambda client: client.answer([message])[0])


@app.query("hello")
def hello(message: Message, context: Context) -> Message:
    """Gives the node's logical id, and the classes of its device where its operator lets them be told."""
    return _reply(message, context, lambda client: _introduced(client, message, context))


def _introduced(client: Client, message: Message, context: Context) -> Message:
    node = Node(context.node_config)
    # Of a simulation it would be the machine's that plays all nodes.
    tells = node.tells_profile and not simulated()
    return client.hello(message, node.client, coarse(measure(node.power)) if tells else None)
