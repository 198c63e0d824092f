# SPDX-License-Identifier: Apache-2.0
"""What our JSON files hold. Import it where a file is read: pydantic costs 35 ms.

Strict: a string is no number, a bool no count. Unknown names are refused, so that a misspelt
optional one is not dropped in silence.
"""

from __future__ import annotations

import functools
import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
    with_config,
)

from mikernels.files import SEAL, check_seal

T = TypeVar("T")
# a step, a token count, a place: beyond 2^53 a reader in another language rounds it
Count = Annotated[int, Field(ge=0, le=2**53)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Hash = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Text = Annotated[str, Field(min_length=1)]
FLOAT = r"^(nan|-?inf|-?0x[01]\.[0-9a-f]+p[+-][0-9]+)$"


class Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class Sums(Strict):
    """What is averaged over the tokens since the last row of metrics; tokens by their weights."""

    sums: dict[str, Finite]
    tokens: Annotated[float, Field(ge=0, allow_inf_nan=False)]


class FirstSums(Strict):
    """Version 1 averaged over micro-batches."""

    sums: dict[str, Finite]
    count: Count


class Group(BaseModel):
    """A parameter group: what else it holds is the optimiser's."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)
    params: Annotated[list[Count], Field(min_length=1)]


class Optimizer(Strict):
    kind: Text = Field(alias="class")
    state: dict[str, Any]
    param_groups: Annotated[list[Group], Field(min_length=1)]


class State(Strict):
    """`state.json` of a checkpoint."""

    format: str
    version: int
    step: Count
    tokens: Count
    tensors: dict[str, str]
    sae: dict[str, Any]
    config: dict[str, Any]
    means: Sums
    parts: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]]
    optimizer: Optimizer
    source: dict[str, Any]
    scale: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    sha256: dict[str, Hash]


class FirstState(State):
    """Version 1 had no checksums, and activations were trained on as they were."""

    means: FirstSums  # type: ignore[assignment]
    scale: Annotated[float, Field(ge=1, le=1)] = 1.0
    sha256: dict[str, Hash] = Field(default={}, max_length=0)


class Position(Strict):
    """Where a source is."""

    epoch: Count
    block: Count
    offset: Count
    identity: dict[str, Any]


class ShardEntry(Strict):
    file: Annotated[str, Field(pattern=r"^[^/]+\.safetensors$")]
    rows: Annotated[int, Field(ge=1, le=2**53)]
    crc32: list[Annotated[int, Field(ge=0, lt=2**32)]] | None = None


class Index(Strict):
    """`index.json` of a shard folder."""

    shards: Annotated[list[ShardEntry], Field(min_length=1)]
    metadata: dict[str, Any]
    sha256: dict[str, Hash] | None = None


class Threshold(Strict):
    op: Text
    dtype: Text
    d: Count
    threshold: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    source: str = ""


class Table(Strict):
    """`tuned.json`."""

    schema_: int = Field(alias="schema")
    devices: dict[str, list[Threshold]]


class Row(BaseModel):
    """A line of `metrics.jsonl`: what else it holds are numbers, null where not finite."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)
    __pydantic_extra__: dict[str, float | None]
    step: Count


class Machine(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")
    cpu: str
    flags: Any
    cores: int


class Results(BaseModel):
    """A results file of `mikernels bench`."""

    model_config = ConfigDict(strict=True, extra="allow")
    machine: Machine
    peaks: dict[str, Any]
    cases: list[dict[str, Any]]


class Spec(Strict):
    """`run.json` of the demo's training process."""

    activations: Text
    seed: int
    out_dir: str | None
    architecture: Text
    sae: dict[str, Any]
    config: dict[str, Any]


class Result(Strict):
    """`run.result.json`, its answer."""

    rows: Annotated[list[dict[str, Any]], Field(min_length=1)]
    scale: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    parts: dict[str, Finite]
    steps: Count
    peak_extra_bytes: Count | None


class ReportFile(BaseModel):
    """`report.json` of a report's folder: which files are its own, and figures for programs."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)
    mikernels_report: Literal[1]
    files: list[Text]


class LayerForm(Strict):
    heads: Count
    groups: Count
    mlp: bool
    parallel: bool


class GraphForm(Strict):
    model: str
    d: Count
    layers: list[LayerForm]


class CircuitFile(Strict):
    """In the metadata of a circuit's file."""

    format: Literal["mikernels.circuit"]
    version: Literal[1]
    level: Literal["edge", "node"]
    method: str
    label: str
    rules: str | None
    graph: GraphForm
    sha256: dict[str, Hash]


class Passage(Strict):
    """A text by its tokens, and what a feature or a component does at each: 0 is nothing."""

    tokens: Annotated[list[str], Field(min_length=1)]
    scores: list[Finite]

    @model_validator(mode="after")
    def _lengths(self) -> Passage:
        if len(self.scores) != len(self.tokens):
            raise ValueError(f"{len(self.tokens)} tokens with {len(self.scores)} scores")
        return self


class Unit(Strict):
    name: Text
    texts: Annotated[list[Passage], Field(min_length=1)]


class Evidence(Strict):
    """What components do at the tokens of prompts: `mikernels.rate.save_evidence`."""

    format: Literal["mikernels-evidence"]
    version: Literal[1]
    label: Text
    units: Annotated[list[Unit], Field(min_length=1)]


class Question(Passage):
    """A passage that a person judges.

    right: in the detection game whether the feature is active in it, in the fuzzing game whether
    the scores are its own. quarter: of the activations that its strongest one is among, 0 the
    strongest; None where it is not active, or where there is no such order.
    """

    right: bool
    quarter: Annotated[int, Field(ge=0, le=3)] | None = None


class RatedItem(Strict):
    """A feature or a component as a person sees it: evidence, then questions.

    control: None for what is rated; "mismatched": the evidence is another one's; "random": the
    evidence is scores at random places. Both stay unknown to the person.
    """

    id: Text
    name: Text
    control: Literal["mismatched", "random"] | None
    evidence: Annotated[list[Passage], Field(min_length=1)]
    questions: Annotated[list[Question], Field(min_length=2)]

    @model_validator(mode="after")
    def _both(self) -> RatedItem:
        right = sum(question.right for question in self.questions)
        # so that the share of right answers is the balanced accuracy, and luck is a half
        if 2 * right != len(self.questions):
            raise ValueError(f"half of {len(self.questions)} questions right, got {right}")
        return self


class RatedItems(Strict):
    """`rate/items.json`: what every rater of a run sees. repeats: ids that are shown twice."""

    format: Literal["mikernels-rate-items"]
    version: Literal[1]
    kind: Literal["feature", "component"]
    game: Literal["detection", "fuzzing"]
    seed: int
    source: dict[str, Any]
    items: Annotated[list[RatedItem], Field(min_length=1)]
    repeats: list[str]

    @model_validator(mode="after")
    def _ids(self) -> RatedItems:
        ids = [item.id for item in self.items]
        twice = [name for name in (ids, self.repeats) if len(set(name)) < len(name)]
        if twice or not set(self.repeats) <= set(ids):
            raise ValueError(f"ids that differ, and repeats among them, got {ids}, {self.repeats}")
        return self


class SavedTensor(Strict):
    """How a tensor of a saved call lay in memory; at: its byte in a piece that several share."""

    held: Text
    at: Count | None
    shape: list[Count]
    strides: list[Count]
    dtype: Text
    aligned: Annotated[int, Field(ge=0, lt=64)]
    device: Literal["cpu", "cuda"]


class SavedValue(Strict):
    name: Text
    tensor: SavedTensor | None = None
    # as float.hex() writes it, NaN and infinity included
    float_: str | None = Field(None, alias="float", pattern=FLOAT)
    value: bool | int | str | None = None


class CallMachine(Strict):
    """What the bits of a result may hang on."""

    mikernels: Text
    torch: Text
    cpu: str
    level: str | None
    threads: Annotated[int, Field(ge=1, le=2**16)]
    matmul_precision: Literal["highest", "high", "medium"]
    deterministic: bool
    gpu: str | None


class SavedCall(Strict):
    """In the metadata of a call saved by `mikernels.log`."""

    format: Literal["mikernels-call"]
    version: Literal[1]
    operator: Text
    schema_: Text = Field(alias="schema")
    implementation: Text
    reason: str
    machine: CallMachine
    arguments: list[SavedValue]
    results: list[SavedValue] | None
    error: str | None
    sha256: dict[str, Hash]


Answers = list[bool | None]
Rating = Annotated[int, Field(ge=1, le=5)] | None
Description = Annotated[str, Field(max_length=2000)]


class Turn(Strict):
    """An item before a rater. order: of its questions on the page; answers: in that order."""

    item: Text
    repeat: bool
    order: list[Count]
    answers: Answers
    rating: Rating = None
    description: Description = ""
    finished: str | None = None

    @model_validator(mode="after")
    def _order(self) -> Turn:
        if sorted(self.order) != list(range(len(self.answers))):
            raise ValueError(f"an order of {len(self.answers)} questions, got {self.order}")
        if self.finished and (None in self.answers or self.rating is None):
            raise ValueError("all answers and a rating of what is finished")
        return self


class Ratings(Strict):
    """`rate/<rater>.json`. items: the checksum of the items that they are of."""

    format: Literal["mikernels-ratings"]
    version: Literal[1]
    rater: Text
    items: Hash
    turns: Annotated[list[Turn], Field(min_length=1)]


class Entry(Strict):
    """What the page sends whenever something changes: all of a turn."""

    turn: Count
    answers: Answers
    rating: Rating
    description: Description
    finish: bool


@functools.cache
def _adapter(form: Any) -> TypeAdapter[Any]:
    if hasattr(form, "__dataclass_fields__"):
        # a plain dataclass has no settings of its own for pydantic
        form = with_config(ConfigDict(strict=True, extra="forbid", allow_inf_nan=False))(form)
    return TypeAdapter(form)


def check(
    form: type[T], value: Any, where: str, path: object, fix: str, within: str | None = None
) -> T:
    """`value`, read from the file `path` (its field `within`), as a `form`.

    Raises:
        ValueError: `<where>: <path> must hold <field>: <expected>, got <value>; <fix>`.
    """
    try:
        # as JSON: there a list may become a tuple, and still no string a number
        adapter: TypeAdapter[T] = _adapter(form)  # type: ignore[arg-type]
        return adapter.validate_json(json.dumps(value))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, filter(None, (within, *map(str, first["loc"]))))) or "an object"
        told = first["msg"][0].lower() + first["msg"][1:]
        if first["type"] == "missing":
            told += ", got nothing"
        elif first["type"] != "value_error":
            told += f", got {repr(first['input'])[:80]}"
        raise ValueError(f"{where}: {path} must hold {field}: {told}; {fix}") from error


def check_sealed(value: dict[str, Any], where: str, path: object, fix: str) -> None:
    """What was sealed is unchanged, or a ValueError as that of `check`."""
    try:
        check_seal(value)
    except ValueError as error:
        raise ValueError(
            f"{where}: {path} must hold {SEAL}.self: the checksum of its contents, got {error}; "
            f"{fix}"
        ) from error
