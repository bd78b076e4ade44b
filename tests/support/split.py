"""A split run without a scheduler: real clients, a real session, the messages handed over by the test."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from flwr.app import Message, RecordDict

from clients.client import NUM_CLIENTS, Client
from clients.resident import arrays_of
from clients.split import SplitLora, SplitTrainer
from clients.split.server import UpperServer
from clients.store import ClientStore
from clients.tasks import Examples, FederatedData, Task
from fl_app.engine.flwr_internals import claim_identity
from fl_app.halves import PartMaker
from strategies.collectors import Split
from strategies.collectors.split_session import SplitSession
from strategies.protocols import Event, Job, Refusal, Reply, Request
from strategies.server_models.model import sections_of
from strategies.update import Update
from strategies.wire import ARRAYS, pack_model

VOCABULARY, LONGEST = 40, 12


class Sentences(Task):
    """Random tokens of random length with labels that the first token gives away; one column a goal."""

    vocab_size, padding_id, input_shape = VOCABULARY, 0, (LONGEST,)

    def __init__(self, count: int = 60, goals: dict[str, int] | None = None) -> None:
        generator = torch.Generator().manual_seed(7)
        inputs = torch.randint(1, VOCABULARY, (count, LONGEST), generator=generator)
        lengths = torch.randint(2, LONGEST + 1, (count,), generator=generator)
        inputs[torch.arange(LONGEST) >= lengths.unsqueeze(1)] = 0
        self.goals = goals or {}
        classes = list(self.goals.values()) or [3]
        self.num_classes = sum(classes)
        columns = [inputs[:, 0] % c for c in classes]
        targets = torch.stack(columns, dim=1) if self.goals else columns[0]
        self._examples = Examples(inputs, targets)

    def train(self) -> Examples:
        return self._examples

    def test(self) -> Examples:
        return self._examples


def save_tiny(folder: Path, kind: str = "bert", blocks: int = 4) -> str:
    """A random model of a family, as `from_pretrained` reads it, with a tokenizer of as many words."""
    import transformers as hf
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder.mkdir(parents=True, exist_ok=True)
    words = {f"w{number}": number for number in range(1, VOCABULARY)} | {"[PAD]": 0}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="w1"
    ).save_pretrained(folder)
    common = {"vocab_size": VOCABULARY, "max_position_embeddings": 16}
    wide = {
        "hidden_size": 16,
        "num_hidden_layers": blocks,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    made: dict[str, Callable[[], Any]] = {
        "bert": lambda: hf.BertModel(hf.BertConfig(**common, **wide)),
        "gpt2": lambda: hf.GPT2LMHeadModel(
            hf.GPT2Config(
                vocab_size=VOCABULARY, n_positions=16, n_embd=16, n_layer=blocks, n_head=2
            )
        ),
        "llama": lambda: hf.LlamaForCausalLM(
            hf.LlamaConfig(**common, **wide, num_key_value_heads=1, tie_word_embeddings=True)
        ),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        made[kind]().save_pretrained(folder)
    return str(folder)


@dataclass
class SplitRun:
    """One cohort's session and its clients.

    Attributes:
        folder: where clients keep what they are in the middle of.
        pretrained: the model's folder.
        task: data and loss.
        trainer: of both halves.
        collector: the protocol's settings.
        model: further settings of the model.
        num_clients: that the data are cut among.
        spoil: changes a client's reply on its way; None loses it.
        fresh_clients: each message is answered by a process that has just been started.
        sent: requests so far.
    """

    folder: Path
    pretrained: str
    task: Task
    trainer: SplitTrainer
    collector: Split = field(default_factory=Split)
    model: dict[str, Any] = field(default_factory=dict)
    num_clients: int = 1
    spoil: Callable[[Request, RecordDict], RecordDict | None] = lambda request, reply: reply
    fresh_clients: bool = False
    sent: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        claim_identity(1)
        self.whole = self.build()
        torch.manual_seed(11)
        for name, parameter in self.whole.named_parameters():
            if name.startswith("adapters") and name.endswith("B.weight"):
                torch.nn.init.normal_(parameter, std=0.1)  # B = 0 would hide what A does
        self.arrays = arrays_of(self.whole)

    def build(self, **known: Any) -> SplitLora:
        task = self.task
        return SplitLora(
            task.input_shape,
            task.num_classes,
            task.vocab_size,
            task.padding_id,
            task.goals,
            pretrained=self.pretrained,
            **self.model,
            **known,
        )

    def data(self, count: int = 0) -> FederatedData:
        return FederatedData(self.task, count or self.num_clients, partition="iid", seed=3)

    def client(self) -> Client:
        """As a process that has just been started."""
        maker = PartMaker(lambda **known: self.build(**known), split=True)
        store = ClientStore(self.folder)
        return Client(
            self.task, maker, self.data, self.trainer, store=store, ledgers=self.folder, seed=5
        )

    def session(self, cohort: Sequence[int]) -> SplitSession:
        server = UpperServer(
            self.build(half="upper"),
            self.whole.clients_names(),
            self.task,
            self.trainer.with_lr(self.collector.lr),
            self.collector.precision,
        )
        kinds, layouts = sections_of(self.arrays, [])
        layouts = {name: layout for name, layout in layouts.items() if layout.names}
        job = Job(
            1, 0, {ARRAYS: pack_model(self.arrays)}, {NUM_CLIENTS: self.num_clients}, {},
            layouts, kinds,
        )  # fmt: skip
        settings = {item: getattr(self.collector, item) for item in SETTINGS}
        return Split(**settings, served=server).open(job, cohort)

    def run(self, cohort: Sequence[int] | None = None) -> dict[int, Update | Refusal]:
        """The session to its end, requests answered in their order; what became of each client."""
        session = self.session(range(self.num_clients) if cohort is None else cohort)
        waiting = list(session.start())
        became: dict[int, Update | Refusal] = {}
        client = self.client()
        while waiting:
            request = waiting.pop(0)
            self.sent += 1
            client = self.client() if self.fresh_clients else client
            for event in session.receive(self._answered(client, request)):
                if isinstance(event, Request):
                    waiting.append(event)
                else:
                    became |= dict.fromkeys(_clients(event), event)
        for event in session.expire():
            became |= dict.fromkeys(_clients(event), event)
        assert session.done
        return became

    def _answered(self, client: Client, request: Request) -> Reply:
        (message,) = client.answer([Message(request.content, 1, request.kind)])
        if message.has_error():
            return Reply(request, None, str(message.error.reason))
        content = self.spoil(request, message.content)
        return Reply(request, content, None if content is not None else "killed")


SETTINGS = ("variant", "batches_per_exchange", "precision", "lr", "most_turns")


def _clients(event: Event) -> Iterator[int]:
    if isinstance(event, Update):
        yield from event.members
    elif isinstance(event, Refusal):
        yield event.client
