"""The settings of a run: one schema for the TOML file, the command line and the Python call.

Parts are held as text (``"dirichlet(0.3)"``) and built on demand, so that reading settings does not import torch.
"""

from __future__ import annotations

import ast
import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from hanse.core.errors import ConfigError, unknown

if TYPE_CHECKING:
    from hanse.attacks import Attack
    from hanse.codecs import Codec
    from hanse.engines import Engine
    from hanse.federation import Federation
    from hanse.methods import Method
    from hanse.privacy import Privacy
    from hanse.schedules import Schedule


def _several(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else [value]


def _names(value: Any) -> Any:
    if isinstance(value, str):
        return value.replace(",", " ").split()
    return [name for some in _several(value) for name in (_names(some) if isinstance(some, str) else [some])]


def _calls(value: Any) -> Any:
    """Text may hold several parts with commas between them, or none."""
    if not isinstance(value, str):
        return [part for some in _several(value) for part in (_calls(some) if isinstance(some, str) else [some])]
    try:
        parts = ast.parse(f"[{value}]", mode="eval").body
    except SyntaxError:
        return [value]  # which the part itself explains
    return [ast.unparse(part) for part in parts.elts] if isinstance(parts, ast.List) else [value]


def _port(value: Any) -> Any:
    return str(value) if isinstance(value, int) else value


ENDPOINT = r"^((\[[0-9A-Fa-f:.]+\]|[\w.-]+):)?\d{1,5}$"
"""``[host:]port``; an IPv6 address is in brackets."""
Names = Annotated[tuple[str, ...], BeforeValidator(_names)]


class Settings(BaseModel):
    """Everything that decides what a run does."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True)

    task: str = "digits"
    """Data, model, loss and metrics."""
    clients: PositiveInt = 100
    """Number of registered clients."""
    partition: str = "iid"
    """How the data are split over the clients, e.g. dirichlet(0.3)."""
    fleet: str = "ideal"
    """Devices and links in virtual time, e.g. phones."""
    method: Annotated[tuple[str, ...], BeforeValidator(_several), Field(min_length=1)] = ("FedAvg",)
    """Learning rule, e.g. FedProx(mu=0.1); several are run one after another and compared."""
    schedule: Annotated[tuple[str, ...], BeforeValidator(_several), Field(min_length=1)] = ("synchronous",)
    """When who talks to whom, e.g. synchronous(cohort=10); with several, each rule is run under each."""
    cohort: PositiveInt | None = None
    """Clients per round; overrides the schedule's own."""
    codec: Annotated[tuple[str, ...], BeforeValidator(_several), Field(min_length=1)] = ("identity",)
    """How much travels from the clients, e.g. 'topk(0.1) | uniform(8)'; with several, each is compared."""
    down: str = "identity"
    """How much travels to the clients, e.g. cast."""
    privacy: Annotated[tuple[str, ...], BeforeValidator(_calls)] = ()
    """What keeps clients private, e.g. 'differential(clip=0.5, noise=1.0)', 'secure(threshold=0.7)', or both."""
    attack: Annotated[str | None, BeforeValidator(lambda value: None if value == "none" else value)] = None
    """What some of the clients do to the others, e.g. sign_flip(share=0.2); none: nothing."""
    engine: str = "local"
    """Where it runs: local, or e.g. processes(workers=4)."""
    rounds: PositiveInt = 100
    """Rounds to run: how often the model moves."""
    seconds: PositiveFloat | None = None
    """Virtual seconds after which a run ends, however many rounds it has had by then."""
    seed: Annotated[tuple[NonNegativeInt, ...], BeforeValidator(_names), Field(min_length=1)] = (0,)
    """Seed of everything random; with several, results are averaged."""
    split_seed: NonNegativeInt | None = None
    """Seed of data split, initial weights and fleet, if they are to stay the same for all seeds."""
    evaluate: NonNegativeInt = 1
    """Evaluate every so many rounds; 0: only after the last."""
    evaluate_seconds: PositiveFloat | None = None
    """Evaluate after every so many virtual seconds instead."""
    private: Names = ()
    """Parameters that stay on the client: name patterns (head.*) or module types (BatchNorm2d)."""
    frozen: Names = ()
    """Parameters that are not trained: name patterns or module types."""
    buffers: Literal["average", "domain", "private"] = "average"
    """Batch-norm statistics: averaged like the model, averaged within each domain, or private to each client."""
    dtype: Literal["float32", "float64"] = "float32"
    """Type of the weights."""
    device: str = "cpu"
    """Where the arithmetic happens: cpu, cuda, cuda:1, ..."""
    track: Annotated[tuple[Literal["tensorboard", "mlflow", "wandb"], ...], BeforeValidator(_names)] = ()
    """Also write every round to these trackers."""
    metrics_port: Annotated[Annotated[str, Field(pattern=ENDPOINT)] | None, BeforeValidator(_port)] = None
    """Serve metrics for Prometheus while a run goes on, on this port of 127.0.0.1, or on host:port."""

    @model_validator(mode="after")
    def _seeds(self) -> Settings:
        if len(set(self.seed)) < len(self.seed):
            raise ValueError(f"seed: {', '.join(map(str, self.seed))} is not allowed: a seed twice would count as two")
        return self

    @classmethod
    def read(cls, file: Path | None, given: Mapping[str, Any]) -> Settings:
        """Settings from a TOML file, overridden by what is ``given``; raises ``ConfigError`` that names the field."""
        values: dict[str, Any] = {}
        if file is not None:
            try:
                values = tomllib.loads(file.read_text(encoding="utf-8"))
            except OSError as error:
                raise ConfigError(f"{file}: cannot be read: {error.strerror}") from None
            except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
                raise ConfigError(f"{file}: not a TOML file: {error}") from None
        values |= given
        for name in values:
            if name not in cls.model_fields:
                raise unknown("setting", name, cls.model_fields)
        try:
            return cls(**values)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(p) for p in first["loc"])
            raise ConfigError(f"{where}: {first['input']!r} is not allowed: {first['msg']}") from None

    def toml(self) -> str:
        """The settings as a TOML file."""
        values = self.model_dump(exclude_none=True)  # JSON strings, numbers and lists are TOML values too
        text = "".join(f"{name} = {json.dumps(value, ensure_ascii=False)}\n" for name, value in values.items())
        return text.replace("\x7f", "\\u007f")  # the one character that JSON leaves as it is and TOML does not

    def federation(self, seed: int) -> Federation:
        """The federation of one seed."""
        import hanse.llm  # noqa: F401  its tasks are known by name
        from hanse.data import Partition, Task
        from hanse.federation import Federation
        from hanse.fleet import Fleet

        return Federation(
            Task.parse(self.task),
            self.clients,
            Partition.parse(self.partition),
            Fleet.parse(self.fleet),
            seed=seed if self.split_seed is None else self.split_seed,
            private=self.private,
            frozen=self.frozen,
            buffers=self.buffers,
            dtype=self.dtype,
            device=self.device,
        )

    def parts(self) -> Parts:
        """What the settings name; raises ``ConfigError`` on the first that is wrong."""
        from hanse.attacks import Attack
        from hanse.codecs import Codec
        from hanse.engines import Engine
        from hanse.methods import Method
        from hanse.privacy import Privacy
        from hanse.schedules import Schedule

        schedules = [Schedule.parse(s) for s in self.schedule]
        if self.cohort is not None:
            for schedule in schedules:
                if "cohort" not in type(schedule).model_fields:
                    raise ConfigError(f"cohort: {self.cohort} is not allowed: {schedule} has no cohort")
            schedules = [type(s)(**{**dict(s), "cohort": self.cohort}) for s in schedules]
        return Parts(
            methods=[Method.parse(m) for m in self.method],
            schedules=schedules,
            codecs=[Codec.parse(c) for c in self.codec],
            down=Codec.parse(self.down),
            engine=Engine.parse(self.engine),
            privacy=[Privacy.parse(p) for p in self.privacy],
            attack=None if self.attack is None else Attack.parse(self.attack),
        )


class Parts(NamedTuple):
    """The rules, schedules and codecs to be compared; of all runs the codec to the clients, the engine, what keeps clients private,
    and what liars do.
    """

    methods: list[Method]
    schedules: list[Schedule]
    codecs: list[Codec]
    down: Codec
    engine: Engine
    privacy: list[Privacy]
    attack: Attack | None
