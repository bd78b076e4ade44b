"""What a device's client takes of memory: the peak of its process, from its start to the answer to a request.

    python benchmarks/client_memory.py

For each task a process of its own makes the client that a SuperNode's ClientApp makes, answers a training and an
evaluation request, and says what its resident set was at most, after its imports, and after the answers. The kernel
keeps the peak, so nothing between two looks is missed. A SuperNode's own two processes (flower-supernode and
flower-superexec) come beside it and are Flower's. A MB is 1,000,000 bytes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

TASKS = ("mnist", "digits")
MEGABYTE = 1_000_000


def measured(*overrides: str) -> dict[str, float]:
    """Figures of one client's process, in MB: `imported`, `peak` and `resident`.

    Raises:
        RuntimeError: the process failed; with the end of what it wrote.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(Path(__file__).resolve()), "--client", folder, *overrides]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the client failed: {done.stderr[-2000:]}")
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def client(folder: Path, overrides: list[str]) -> dict[str, float]:
    """The process: what `fl_app.client_app` does for one device, without the network."""
    from flwr.app import ConfigRecord, Message, RecordDict

    import fl_app.client_app  # noqa: F401 - what a ClientApp's process imports
    from clients.client import NUM_CLIENTS
    from fl_app.assembly import Assembly, make_client
    from fl_app.compose import compose
    from fl_app.engine.flwr_internals import claim_identity
    from strategies.wire import ARRAYS, CONFIG

    imported = resident()
    claim_identity(1)
    assembly = Assembly(compose([*overrides, f"output_dir={folder}", "backend=flower"]))
    settings = {"partition-id": 0, "client-folder": str(folder)}
    device = make_client(assembly, "device", settings)
    for kind in ("train", "evaluate"):
        told = {"client": 0, "server-round": 1, "version": 0, "included": 0, NUM_CLIENTS: 10}
        content = {ARRAYS: assembly.network.arrays(), CONFIG: ConfigRecord(told)}
        (reply,) = device.answer([Message(RecordDict(content), 1, kind)])
        if not reply.has_content():
            raise RuntimeError(f"{kind}: {reply.error.reason}")
    return {"imported": imported, "peak": peak(), "resident": resident()}


def peak() -> float:
    """Of this process so far, in MB."""
    status = Path("/proc/self/status")
    if status.exists():
        # Linux hands `getrusage`'s peak on through fork and exec: it may be that of whoever has started this process.
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024 / MEGABYTE
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most * (1 if sys.platform == "darwin" else 1024) / MEGABYTE


def resident() -> float:
    """Of this process now, in MB."""
    import psutil

    now: int = psutil.Process().memory_info().rss
    return now / MEGABYTE


def main(arguments: list[str]) -> int:
    """Prints a line a task."""
    parser = argparse.ArgumentParser(description="Peak memory of a device's client.")
    parser.add_argument("--client", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", help="of the configuration, such as model=cnn")
    chosen = parser.parse_args(arguments)
    if chosen.client is not None:
        print(json.dumps(client(chosen.client, chosen.overrides)))
        return 0
    for task in TASKS:
        figures = measured(f"task={task}", "model=cnn", *chosen.overrides)
        print(
            f"task={task} model=cnn: {figures['peak']:.0f} MB at the peak, {figures['resident']:.0f} MB after the"
            f" answers, {figures['imported']:.0f} MB after the imports",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
