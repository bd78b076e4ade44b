"""The smallest Flower app that behaves like ours towards whoever runs it, in a directory of its own."""

from __future__ import annotations

from pathlib import Path

_PYPROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "tiny"
version = "1.0.0"
description = "A tiny app."
license = "Apache-2.0"
dependencies = ["flwr"]

[tool.hatch.build.targets.wheel]
packages = ["tiny"]

[tool.flwr.app]
publisher = "tests"

[tool.flwr.app.components]
serverapp = "tiny.server_app:app"
clientapp = "tiny.client_app:app"

[tool.flwr.app.config]
overrides = ""
"""

_SERVER = """
import json, os, shlex, time
from pathlib import Path
from flwr.app import Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

app = ServerApp()

@app.main()
def main(grid: Grid, context: Context) -> None:
    words = shlex.split(str(context.run_config["overrides"]))
    print(json.dumps(words), flush=True)
    while not (nodes := list(grid.get_node_ids())):
        time.sleep(0.1)
    waiting = set(grid.push_messages([Message(RecordDict(), n, "query") for n in nodes]))
    while waiting:
        for reply in grid.pull_messages(waiting):
            waiting.discard(reply.metadata.reply_to_message_id)
            print("reply of", reply.content["node"]["says"], flush=True)
        time.sleep(0.1)
    if "fail" in words:
        raise RuntimeError("the server has had enough")
    if "exit" in words:
        raise SystemExit(0)
    if "wait" in words:
        print("waiting", flush=True)
        while not Path(os.environ["TRELLIS_STOP_FILE"]).exists():
            time.sleep(0.1)
    summary = Path(os.environ["TINY_OUTPUT"]) / "summary.json"
    reason = "interrupted" if "wait" in words else ""
    summary.write_text(json.dumps({"status": words[0], "reason": reason}))
    print(summary, flush=True)
"""

_CLIENT = """
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()

@app.query()
def query(message: Message, context: Context) -> Message:
    says = f"{MARK} {context.node_config['partition-id']}"
    return Message(RecordDict({"node": ConfigRecord({"says": says})}), reply_to=message)

MARK = "client"
"""


def write_tiny_app(directory: Path) -> Path:
    """Write the app's files; its ServerApp does what the words in `overrides` say.

    `completed`, `stopped` or `failed` first is the status in its summary, written to the directory
    in the environment variable TINY_OUTPUT; `fail` raises, `exit` raises SystemExit, `wait` waits
    until it is asked to stop. Before that it asks every client for a word.
    """
    package = directory / "tiny"
    package.mkdir(parents=True)
    (directory / "pyproject.toml").write_text(_PYPROJECT)
    (package / "__init__.py").touch()
    (package / "server_app.py").write_text(_SERVER)
    (package / "client_app.py").write_text(_CLIENT)
    return directory
