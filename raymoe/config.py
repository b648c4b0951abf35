"""One run as frozen dataclasses: presets are functions, overrides are strict `section.field=value`.

Nothing here imports torch or ray. A bad value raises ValueError with the field, the value and what
is allowed; an unknown key is an error that names the nearest known one.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import os
import re
import textwrap
import typing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

Experts = Literal["clustered", "flat", "dense"]
Precision = Literal["float32", "bfloat16"]


def _require(condition: bool, name: str, value: object, allowed: str) -> None:
    if not condition:
        raise ValueError(f"{name}={value!r} is not allowed: {allowed}")


def check_field(owner: object, name: str, allowed: str, within: bool) -> None:
    """Raises ValueError with the field, its value in `owner` and what is `allowed`, unless it is `within`."""
    _require(within, name, getattr(owner, name), allowed)


def hint(key: str, known: typing.Iterable[str]) -> str:
    """Which of the known keys was probably meant, for the end of an error."""
    near = difflib.get_close_matches(key, list(known), n=1, cutoff=0.4)
    return f": did you mean {near[0]!r}?" if near else ""


def _positive(section: object, prefix: str, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        _require(value > 0, f"{prefix}.{name}", value, "must be greater than 0")


def default_root() -> str:
    """`$RAYMOE_HOME`, else `~/raymoe`."""
    return os.environ.get("RAYMOE_HOME") or str(Path.home() / "raymoe")


@dataclass(frozen=True)
class RunSection:
    name: str = ""
    """Folder of the run under `run.root`; letters, digits and `._-`. Empty: preset and time."""
    root: str = field(default_factory=default_root)
    """Where runs and exports live: a folder that every node sees. Default `$RAYMOE_HOME`, else `~/raymoe`."""
    seed: int = 0
    """Seeds the weights, the order of the batches and the tokenizer's training sample."""

    def __post_init__(self) -> None:
        _require(
            not self.name or re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name) is not None,
            "run.name",
            self.name,
            "letters, digits, '.', '_' and '-', starting with a letter or digit",
        )
        _require(bool(self.root), "run.root", self.root, "must name a folder")
        _require(self.seed >= 0, "run.seed", self.seed, "must be 0 or more")


@dataclass(frozen=True)
class DataSection:
    path: str = "builtin"
    """`builtin`, a hub name (`wikitext-103`, any text data set), or a local file or folder (txt, jsonl, parquet, arrow)."""
    text_field: str = "text"
    """Column that holds the text in jsonl, parquet, arrow and hub data."""
    domain_field: str = ""
    """Column that holds a domain label. Empty: the file's name is the domain."""
    validation_share: float = 0.05
    """Share of each domain held out for validation (a hub set's own validation split is used instead)."""
    tokenizer: str = ""
    """A `tokenizer.json` to load. Empty: byte-level BPE trained on the corpus."""
    cache: str = ""
    """Where token shards are kept. Empty: `run.root`/cache."""

    def __post_init__(self) -> None:
        _require(bool(self.path), "data.path", self.path, "must name a data set, file, folder or builtin")
        _require(0 < self.validation_share < 0.5, "data.validation_share", self.validation_share, "between 0 and 0.5")


@dataclass(frozen=True)
class ModelSection:
    experts: Experts = "clustered"
    """`clustered`: bases + residuals, two-stage routing. `flat`: independent experts, softmax top-K. `dense`: one FFN of the same active width."""
    layers: int = 4
    d_model: int = 256
    d_expert: int = 512
    """Hidden width of one expert (F)."""
    n_experts: int = 32
    """Experts per layer (E)."""
    n_clusters: int = 4
    """Clusters per layer (C)."""
    experts_per_token: int = 2
    """Experts that a token uses inside its cluster (K)."""
    clusters_per_token: int = 1
    """Clusters that a token visits (stage 1's choice)."""
    residual_width: int = 16
    """Low rank of a residual (W). 0: the clusters' bases alone."""
    gate_scale: float = 1.0
    """Constant on the output of the MoE layer; clustered outputs are p(cluster)-weighted and start small."""
    heads: int = 4
    kv_heads: int = 2
    vocabulary: int = 8192
    context: int = 256
    """Tokens in a training window."""
    rope_theta: float = 10000.0
    tied_head: bool = True
    """Share the embedding matrix with the output head."""

    def __post_init__(self) -> None:
        _positive(
            self, "model", "layers", "d_model", "d_expert", "n_experts", "n_clusters", "experts_per_token",
            "clusters_per_token", "gate_scale", "heads", "kv_heads", "vocabulary", "context", "rope_theta",
        )  # fmt: skip
        _require(self.context <= 1 << 20, "model.context", self.context, "at most 2^20")
        _require(self.residual_width >= 0, "model.residual_width", self.residual_width, "must be 0 or more")
        _require(
            self.d_model % (2 * self.heads) == 0,
            "model.heads",
            self.heads,
            f"model.d_model={self.d_model} must be a multiple of 2 x heads (RoPE rotates pairs)",
        )
        _require(self.heads % self.kv_heads == 0, "model.kv_heads", self.kv_heads, f"must divide heads={self.heads}")
        if self.experts == "clustered":
            _require(
                self.n_clusters <= self.n_experts,
                "model.n_clusters",
                self.n_clusters,
                f"at most n_experts={self.n_experts}",
            )
            _require(
                self.clusters_per_token <= self.n_clusters,
                "model.clusters_per_token",
                self.clusters_per_token,
                f"at most n_clusters={self.n_clusters}",
            )
            if self.residual_width:
                _require(
                    self.experts_per_token <= self.n_experts // self.n_clusters,
                    "model.experts_per_token",
                    self.experts_per_token,
                    f"at most the {self.n_experts // self.n_clusters} experts of the smallest cluster",
                )
        else:
            _require(
                self.experts_per_token <= self.n_experts,
                "model.experts_per_token",
                self.experts_per_token,
                f"at most n_experts={self.n_experts}",
            )

    def default_assignment(self) -> tuple[tuple[int, ...], ...]:
        """Version 0 of the assignment: contiguous, as even as E and C allow. Shape [layers][E]."""
        row = tuple(e * self.n_clusters // self.n_experts for e in range(self.n_experts))
        return (row,) * self.layers


@dataclass(frozen=True)
class TrainSection:
    workers: int = 2
    """Ray Train workers. `MIN,MAX`: as many as the cluster has room for, changing as nodes come and go."""
    max_workers: int = 0
    """The MAX of `train.workers=MIN,MAX`. 0: the number is fixed."""
    resize_every_s: float = 10.0
    """How often an elastic run looks whether it should grow."""
    threads: int = 0
    """Compute threads of a worker. 0: the machine's cores divided by its workers."""
    gpu: Literal["auto", "yes", "no"] = "auto"
    """`auto`: a GPU (and NCCL) for each worker where the cluster has enough, else CPU (and gloo)."""
    resume: str = ""
    """NAME of a run to continue from its newest valid checkpoint, on any number of workers."""
    steps: int = 1000
    global_batch: int = 16
    """Sequences per optimizer step, whatever the number of workers."""
    grain: int = 8
    """Sequences per micro-batch. A worker with fewer grains than others joins with zero rows."""
    lr: float = 3e-3
    """Peak learning rate."""
    final_lr: float = 0.1
    """Share of the peak rate at the last step (cosine)."""
    warmup: int = 100
    """Steps of linear warm-up."""
    weight_decay: float = 0.1
    """AdamW's decay; never on norms, biases or residual factors."""
    beta2: float = 0.95
    clip: float = 1.0
    """Global gradient norm."""
    precision: Precision = "bfloat16"
    """Autocast type. Routing, norms' statistics and the loss stay in float32."""
    bias_rate: float = 0.05
    """Step of the routers' selection biases towards equal load, in logits; after warm-up it decays with the learning rate."""
    aux_loss: float = -1.0
    """Coefficient of Switch's auxiliary loss. Negative: 0 for clustered, 0.01 for flat."""
    log_every: int = 10
    validate_every: int = 200
    validate_windows: int = 128
    """Windows of a periodic validation (the last one of a run reads the whole validation set)."""
    max_failures: int = 3
    """Failures in a row, without a newer checkpoint between them, from which the run restarts; one more ends it."""
    metrics_host: str = "127.0.0.1"
    """Address on which each worker answers Prometheus. `0.0.0.0` for a server on another node."""
    collective_timeout_s: float = 300.0
    """A collective that takes longer fails the worker group."""
    tracker: Literal["", "tensorboard", "wandb", "mlflow"] = ""
    """Where the scalars of train and validation records also go. Each value but the empty one needs `pip install raymoe[VALUE]`."""

    def __post_init__(self) -> None:
        _positive(
            self, "train", "workers", "steps", "global_batch", "grain", "lr", "beta2", "clip", "log_every",
            "validate_every", "validate_windows", "collective_timeout_s", "resize_every_s",
        )  # fmt: skip
        _require(
            self.max_workers == 0 or self.max_workers >= self.workers,
            "train.workers",
            f"{self.workers},{self.max_workers}",
            "MIN,MAX with MIN at most MAX",
        )
        for name in ("threads", "warmup", "weight_decay", "bias_rate", "max_failures"):
            _require(getattr(self, name) >= 0, f"train.{name}", getattr(self, name), "must be 0 or more")
        _require(0 <= self.final_lr <= 1, "train.final_lr", self.final_lr, "between 0 and 1")
        _require(self.beta2 < 1, "train.beta2", self.beta2, "must be less than 1")
        _require(
            self.global_batch % self.grain == 0,
            "train.global_batch",
            self.global_batch,
            f"must be a multiple of train.grain={self.grain}",
        )

    @property
    def elastic(self) -> bool:
        """Whether the number of workers may change while the run goes on."""
        return self.max_workers > self.workers


@dataclass(frozen=True)
class RegroupSection:
    """When and how experts change clusters. Names of the paper's constants (arXiv 2510.02345, sections 3.1 and 4.1) in brackets."""

    mode: Literal["async", "lockstep", "replay", "off"] = "async"
    """`async`: plans arrive from the clusterer while training goes on. `lockstep`: training waits for the clusterer at each period, so that a run is a function of its seed. `replay`: the plans of `regroup.replay`. `off`: the first assignment stays. Models without clusters of residuals never regroup."""
    replay: str = ""
    """A `plans.jsonl` whose applied plans are applied again at the same steps."""
    start: Literal["factored", "dense"] = "factored"
    """`factored`: bases and residuals from the first step. `dense`: independent experts from one common initialisation, folded into clusters at the end of the burn-in by similarity (mean base, truncated SVD: the paper's way)."""
    similarity: Literal["counterfactual", "paper"] = "counterfactual"
    """`counterfactual`: of residuals, and of what they answer on a shared sample of tokens. `paper`: of whole weights and of mean routed inputs (its equation 1); on factored experts it confirms the present clusters."""
    alpha: float = 0.7
    """Share of the parameter term in the similarity [α]; the activation term has the rest."""
    beta: float = 0.05
    """Weight of a step in the decayed statistics [β]: each step keeps 1 − β of what was before."""
    burn_in: int = 200
    """Steps before the first plan [burn-in]."""
    period: int = 0
    """Steps between plans [T]. 0: 100, and 200 for more than 256 experts."""
    min_gain: float = 0.01
    """A layer keeps its clusters unless the objective rises by this much [δ]."""
    max_moves: int = 4
    """Experts that a plan moves in a layer at most."""
    load_weight: float = 0.01
    """Weight of the clusters' load (its squared CV) against their similarity in the objective. Small: the stage-1 biases balance clusters whatever their members, and a larger one follows what passes by itself."""
    plan_lag: int = 20
    """Steps from the statistics of a plan to its effect. A plan that comes later than that is refused."""
    stats_every: int = 10
    """Steps between messages of statistics. The routed inputs of these steps are summed, those of others are not."""
    sample: int = 256
    """Tokens a period on which every expert answers, whether routed to it or not."""
    overlap: int = 32
    """Steps for which a moving expert is a member of both clusters. 0: it changes at once, with a bump."""
    refit: Literal["keep", "svd", "weighted"] = "keep"
    """A moving expert's residual against its new base: as it is, or the best of its width for its old function (truncated SVD), weighted by the inputs of the new cluster."""
    force: int = 0
    """Step from which one plan is made whatever it gains, to exercise the path. 0: never."""

    def __post_init__(self) -> None:
        _positive(self, "regroup", "beta", "stats_every", "sample", "max_moves")
        for name in ("burn_in", "period", "plan_lag", "overlap", "force", "load_weight", "min_gain"):
            _require(getattr(self, name) >= 0, f"regroup.{name}", getattr(self, name), "must be 0 or more")
        _require(0 <= self.alpha <= 1, "regroup.alpha", self.alpha, "between 0 and 1")
        _require(self.beta < 1, "regroup.beta", self.beta, "must be less than 1")
        _require(
            (self.mode == "replay") == bool(self.replay), "regroup.replay", self.replay, "goes with regroup.mode=replay"
        )


@dataclass(frozen=True)
class CheckpointSection:
    every: int = 200
    """Steps between checkpoints; one more is written at the end and on a stop."""
    max_loss_s: float = 60.0
    """Seconds of training that a killed worker may cost: a checkpoint is also written whenever the newest complete one would become older than this. 0: only `checkpoint.every` counts."""
    keep: int = 2
    """Newest checkpoints kept, beside the best on validation."""
    final_wait_s: float = 900.0
    """Seconds to retry the last checkpoint of a run, for example while its disk is full. The run fails after that."""
    storage: str = ""
    """A URI (s3://bucket/folder, gs://…, file:///…) to which the checkpoints of `every`, the last one, and the run's records are copied in the background. A run that `run.root` does not have is resumed from there."""

    def __post_init__(self) -> None:
        _positive(self, "checkpoint", "every")
        for name in ("max_loss_s", "final_wait_s"):
            _require(getattr(self, name) >= 0, f"checkpoint.{name}", getattr(self, name), "must be 0 or more")
        _require(self.keep >= 2, "checkpoint.keep", self.keep, "at least 2, so that a corrupt one is survivable")


@dataclass(frozen=True)
class Config:
    """A whole run. `preset` says where the values came from."""

    preset: str = "small"
    run: RunSection = field(default_factory=RunSection)
    data: DataSection = field(default_factory=DataSection)
    model: ModelSection = field(default_factory=ModelSection)
    train: TrainSection = field(default_factory=TrainSection)
    checkpoint: CheckpointSection = field(default_factory=CheckpointSection)
    regroup: RegroupSection = field(default_factory=RegroupSection)

    def __post_init__(self) -> None:
        regroup, period = self.regroup, self.period
        if self.regroups:
            lag, overlap = regroup.plan_lag, regroup.overlap
            _require(
                0 < lag < period - overlap,
                "regroup.plan_lag",
                lag,
                f"at least 1, and with regroup.overlap={overlap} less than the period of {period} steps",
            )
            _require(
                regroup.stats_every <= period,
                "regroup.stats_every",
                regroup.stats_every,
                f"at most the period of {period} steps",
            )
        if regroup.start == "dense":
            _require(
                self.regroups, "regroup.start", "dense", "needs clustered experts with residuals, and a regroup.mode"
            )
            _require(
                0 < regroup.burn_in < self.train.steps,
                "regroup.burn_in",
                regroup.burn_in,
                f"a dense start is folded at its end, before train.steps={self.train.steps}",
            )

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @property
    def regroups(self) -> bool:
        """Whether experts may change clusters in this run."""
        model = self.model
        has_residuals = model.experts == "clustered" and model.residual_width > 0 and model.n_clusters > 1
        return has_residuals and self.regroup.mode != "off"

    @property
    def period(self) -> int:
        """Steps between plans (see `regroup.period`)."""
        return self.regroup.period or (100 if self.model.n_experts <= 256 else 200)

    @property
    def aux_loss(self) -> float:
        """The auxiliary loss in force (see `train.aux_loss`)."""
        if self.train.aux_loss >= 0:
            return self.train.aux_loss
        return 0.01 if self.model.experts == "flat" else 0.0


SECTIONS: dict[str, type] = {
    "run": RunSection,
    "data": DataSection,
    "model": ModelSection,
    "train": TrainSection,
    "checkpoint": CheckpointSection,
    "regroup": RegroupSection,
}


def tiny() -> Config:
    """2 layers, D=128: the demo and the tests."""
    return Config(
        preset="tiny",
        model=ModelSection(
            layers=2, d_model=128, d_expert=256, n_experts=16, n_clusters=4, experts_per_token=2,
            residual_width=8, heads=4, kv_heads=2, vocabulary=2048, context=128,
        ),
        train=TrainSection(steps=160, global_batch=16, grain=8, lr=4e-3, warmup=20, validate_every=80),
        checkpoint=CheckpointSection(every=80),
        regroup=RegroupSection(burn_in=30, period=30, plan_lag=6, stats_every=3, overlap=16),
    )  # fmt: skip


def small() -> Config:
    """4 layers, D=256: measurements on a small machine."""
    return Config(
        preset="small",
        model=ModelSection(
            layers=4, d_model=256, d_expert=512, n_experts=32, n_clusters=4, experts_per_token=2,
            residual_width=16, heads=4, kv_heads=2, vocabulary=8192, context=256,
        ),
        train=TrainSection(steps=1500, global_batch=16, grain=8, lr=3e-3, warmup=100, validate_every=250),
        checkpoint=CheckpointSection(every=250),
    )  # fmt: skip


def paper() -> Config:
    """12 layers, D=768: the paper's size, 0.95 billion parameters flat."""
    return Config(
        preset="paper",
        model=ModelSection(
            layers=12, d_model=768, d_expert=1024, n_experts=32, n_clusters=4, experts_per_token=2,
            residual_width=16, heads=12, kv_heads=4, vocabulary=32768, context=512,
        ),
        train=TrainSection(
            workers=8, steps=20000, global_batch=256, grain=8, lr=6e-4, warmup=500, validate_every=1000
        ),
        checkpoint=CheckpointSection(every=500),
    )  # fmt: skip


PRESETS = {"tiny": tiny, "small": small, "paper": paper}


def preset(name: str) -> Config:
    """The preset `name`. Raises ValueError when there is none."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}: one of {', '.join(PRESETS)}")
    return PRESETS[name]()


def _parse(name: str, kind: Any, text: str) -> Any:
    """`text` as a value of the annotated type `kind`; ValueError names the field."""
    if typing.get_origin(kind) is Literal:
        allowed = typing.get_args(kind)
        _require(text in allowed, name, text, f"one of {', '.join(allowed)}")
        return text
    if kind is bool:
        known = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        _require(text.lower() in known, name, text, "true or false")
        return known[text.lower()]
    if kind is str:
        return text
    try:
        value = kind(text)
    except ValueError:
        raise ValueError(f"{name}={text!r} is not allowed: expected {kind.__name__}") from None
    _check_number(name, value)
    return value


def _check_number(name: str, value: float) -> None:
    """Raises ValueError for a number that is not finite, or so large that float64 does not count it exactly."""
    _require(value == value and abs(value) != float("inf"), name, value, "must be finite")
    _require(abs(value) <= 1 << 53, name, value, "at most 2^53")


def _hints(section: str) -> dict[str, Any]:
    return typing.get_type_hints(SECTIONS[section])


def override(config: Config, assignments: typing.Iterable[str]) -> Config:
    """`config` with each `section.field=value` applied, checked once all are in.

    Raises ValueError for an unknown key, a value of the wrong type, or one out of range.
    """
    changes: dict[str, dict[str, Any]] = {}
    for item in assignments:
        key, equals, text = item.partition("=")
        section, dot, name = key.partition(".")
        if not equals or not dot:
            raise ValueError(f"{item!r} is not an override: write section.field=value, for example train.steps=100")
        known = [f"{s}.{f.name}" for s in SECTIONS for f in dataclasses.fields(SECTIONS[s])]
        if key not in known:
            raise ValueError(f"unknown key {key!r}" + hint(key, known))
        values = changes.setdefault(section, {})
        if key == "train.workers":
            text, both, most = text.partition(",")
            values["max_workers"] = _parse(key, int, most) if both else 0
        values[name] = _parse(key, _hints(section)[name], text)
    sections: dict[str, Any] = {s: replace(getattr(config, s), **values) for s, values in changes.items()}
    return replace(config, **sections)


def from_dict(data: Any) -> Config:
    """The inverse of `Config.to_dict`. Raises ValueError for anything unknown or of the wrong type."""
    if not isinstance(data, dict):
        raise ValueError("a config must be a JSON object")
    sections: dict[str, Any] = {}
    for section, values in data.items():
        if section == "preset":
            _require(type(values) is str, "preset", values, "expected str")
            sections["preset"] = values
            continue
        if section not in SECTIONS or not isinstance(values, dict):
            raise ValueError(f"unknown config section {section!r}")
        hints = _hints(section)
        for name, value in values.items():
            kind = hints.get(name)
            if kind is None:
                raise ValueError(f"unknown key {section + '.' + name!r}")
            if typing.get_origin(kind) is Literal:
                _require(value in typing.get_args(kind), f"{section}.{name}", value, f"one of {typing.get_args(kind)}")
            elif kind is float:
                _require(type(value) in (int, float), f"{section}.{name}", value, "expected float")
            else:
                _require(type(value) is kind, f"{section}.{name}", value, f"expected {kind.__name__}")
            if type(value) in (int, float):
                _check_number(f"{section}.{name}", value)
        sections[section] = SECTIONS[section](**values)
    return Config(**sections)


def _field_docs(section: type) -> dict[str, str]:
    """The docstrings under the fields of a section, read from its source."""
    body = ast.parse(textwrap.dedent(inspect.getsource(section))).body[0]
    assert isinstance(body, ast.ClassDef)
    docs: dict[str, str] = {}
    for statement, following in zip(body.body, body.body[1:], strict=False):
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(statement.target, ast.Name)
            and isinstance(following, ast.Expr)
            and isinstance(following.value, ast.Constant)
        ):
            docs[statement.target.id] = str(following.value.value)
    return docs


def describe(config: Config) -> str:
    """Every field with its value in `config` and its meaning: the body of `jobs/train.py --help`."""
    lines: list[str] = []
    for section in SECTIONS:
        docs = _field_docs(SECTIONS[section])
        for item in dataclasses.fields(SECTIONS[section]):
            value = getattr(getattr(config, section), item.name)
            lines.append(f"  {section}.{item.name}={value}")
            if item.name in docs:
                lines.extend(textwrap.wrap(docs[item.name], 96, initial_indent="      ", subsequent_indent="      "))
    return "\n".join(lines)
