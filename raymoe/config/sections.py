"""The sections of a config and their fields. Field docstrings are the text of `raymoe train --help`."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml

from raymoe.config.checks import check_positive, require
from raymoe.config.home import default_root
from raymoe.config.mixture import parse_mixture
from raymoe.config.model_section import ModelSection

Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class RunSection:
    """Identity of the run."""

    name: str = ""
    """Name of the run and of its folder under `run.root`: letters, digits, `.`, `_` and `-`. Empty: PRESET-DATE-TIME."""
    root: str = field(default_factory=default_root)
    """Folder of runs and exports. Every node must see it. Default: `$RAYMOE_HOME`, else `~/raymoe`."""
    seed: int = 0
    """Seed of the initial weights, the order of batches and the sample that trains the tokenizer; 0 or more."""

    def __post_init__(self) -> None:
        require(
            not self.name or re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name) is not None,
            "run.name",
            self.name,
            "letters, digits, '.', '_' and '-', starting with a letter or digit",
        )
        require(bool(self.root), "run.root", self.root, "must name a folder")
        require(self.seed >= 0, "run.seed", self.seed, "must be 0 or more")


@dataclass(frozen=True)
class DataSection:
    """Text and tokenizer."""

    path: str = "builtin"
    """Text to train on: `builtin`, the name of a data set on the Hugging Face hub (for example `wikitext-103`), or a local file or folder (txt, jsonl, parquet, arrow)."""
    text_field: str = "text"
    """Column of the text in jsonl, parquet, arrow and hub data. The default is `messages` with `data.format=chat`."""
    format: Literal["text", "chat"] = "text"
    """Content of a row. `text`: plain text. `chat`: a column `messages` of objects with `role` and `content` (OpenAI format), rendered by a chat template; only the assistant's answers are targets of the loss and of validation."""
    chat_template: str = ""
    """Path of a Jinja chat template (Hugging Face format). Empty: that of the weights of `train.init`, else `role: content` lines whose answers end with end-of-text. The run and its exports store it, and the server uses it."""
    domain_field: str = ""
    """Column of the domain label. Empty: the domain is the name of the file or folder."""
    validation_share: float = 0.05
    """Fraction of each domain held out for validation, between 0 and 0.5. Not used if the data set has a validation split."""
    tune_share: float = 0.0
    """Fraction of the end of each domain's training text that replaces the validation split, between 0 and 0.5: choose hyperparameters with it. The run never reads the validation split, and does not train on this text. 0: validate on the validation split."""
    tokenizer: str = ""
    """Path of a `tokenizer.json`. Empty: a byte-level BPE tokenizer is trained on the text."""
    cache: str = ""
    """Folder of tokenized text, shared by runs. Empty: `run.root`/cache."""

    def __post_init__(self) -> None:
        require(bool(self.path), "data.path", self.path, "must name a data set, file, folder or builtin")
        chat = self.format == "chat"
        require(not chat or self.path != "builtin", "data.format", "chat", "the builtin text has no conversations")
        require(
            chat or not self.chat_template, "data.chat_template", self.chat_template, "set it with data.format=chat"
        )
        require(0 < self.validation_share < 0.5, "data.validation_share", self.validation_share, "between 0 and 0.5")
        require(0 <= self.tune_share < 0.5, "data.tune_share", self.tune_share, "0, or between 0 and 0.5")


@dataclass(frozen=True)
class TrainSection:
    """Workers, optimization, validation and failures."""

    workers: int = 2
    """Worker processes of Ray Train. `MIN,MAX`: elastic; the number follows the capacity of the cluster."""
    max_workers: int = 0
    """Maximum number of workers, set by `train.workers=MIN,MAX`. 0: the number is fixed."""
    resize_every_s: float = 10.0
    """Seconds between two checks for more capacity in an elastic run."""
    threads: int = 0
    """Compute threads per worker. 0: cores of the node / workers on the node."""
    gpu: Literal["auto", "yes", "no"] = "auto"
    """Devices. `auto`: one GPU per worker (NCCL) if the Ray cluster has enough GPUs, else CPUs (gloo). `yes`, `no`: always GPUs, always CPUs."""
    resume: str = ""
    """Name of a run to resume from its newest valid checkpoint. The number of workers may differ. Empty: a new run."""
    init: str = ""
    """Run, export or folder of an artifact whose weights a new run starts from, with its model, tokenizer, clusters and selection biases. Step, optimizer and data are new. `model.context`, `gate_scale`, `rope_theta`, `experts_per_token` and `clusters_per_token` may change. Empty: random weights."""
    steps: int = 1000
    """Optimizer steps of the whole run, including those before a resume."""
    mixture: str = ""
    """Shares of the domains in the training tokens by weight, for example `wiki:2,legal:1`. Others are not drawn; a domain that runs out repeats. Empty: by their size, each window once per epoch."""
    global_batch: int = 16
    """Sequences per optimizer step over all workers. A multiple of `train.grain`."""
    grain: int = 8
    """Sequences per micro-batch (grain). Workers take turns at the grains of a step; a worker without one joins collectives with 0 rows."""
    lr: float = 3e-3
    """Peak learning rate of AdamW, reached after warm-up."""
    final_lr: float = 0.1
    """Learning rate at the last step, as a fraction of `train.lr` (cosine decay); 0 to 1."""
    warmup: int = 100
    """Steps of linear warm-up."""
    weight_decay: float = 0.1
    """Weight decay of AdamW. Norms, biases and the factors of residuals have none."""
    beta2: float = 0.95
    """Second moment's decay rate of AdamW (beta2); less than 1."""
    clip: float = 1.0
    """Maximum global norm of the gradient; larger gradients are scaled down."""
    precision: Precision = "bfloat16"
    """Autocast type of matrix products: `bfloat16` or `float32`. Routing, normalization and loss are in float32."""
    bias_rate: float = 0.05
    """Change per step, in logits, of the router biases that balance load. It decays with the learning rate after warm-up. 0: no balancing by biases."""
    aux_loss: float | None = None
    """Coefficient of the Switch Transformer's auxiliary load-balancing loss, 0 or more. `none`: 0.01 for flat experts, else 0."""
    log_every: int = 10
    """Steps between records in `metrics.jsonl` and lines of progress."""
    validate_every: int = 200
    """Steps between validations."""
    validate_windows: int = 128
    """Sequences per validation. The validation after the last step reads the whole validation set."""
    max_failures: int = 3
    """Consecutive failures, without a newer checkpoint in between, after which the run restarts. One more failure ends it."""
    metrics_host: str = "127.0.0.1"
    """Address of each worker's Prometheus endpoint. `0.0.0.0`: reachable from other nodes."""
    collective_timeout_s: float = 300.0
    """Seconds after which a collective operation fails, and the workers restart."""
    tracker: Literal["", "tensorboard", "wandb", "mlflow"] = ""
    """Service that also receives the scalars of train and validation records. A value needs `pip install raymoe[VALUE]`. Empty: none."""

    def __post_init__(self) -> None:
        check_positive(
            self, "train", "workers", "steps", "global_batch", "grain", "lr", "beta2", "clip", "log_every",
            "validate_every", "validate_windows", "collective_timeout_s", "resize_every_s",
        )  # fmt: skip
        require(
            self.max_workers == 0 or self.max_workers >= self.workers,
            "train.workers",
            f"{self.workers},{self.max_workers}",
            "MIN,MAX with MIN at most MAX",
        )
        parse_mixture(self.mixture)
        for name in ("threads", "warmup", "weight_decay", "bias_rate", "max_failures"):
            require(getattr(self, name) >= 0, f"train.{name}", getattr(self, name), "must be 0 or more")
        require(0 <= self.final_lr <= 1, "train.final_lr", self.final_lr, "between 0 and 1")
        require(self.beta2 < 1, "train.beta2", self.beta2, "must be less than 1")
        require(
            self.aux_loss is None or self.aux_loss >= 0, "train.aux_loss", self.aux_loss, "must be 0 or more, or none"
        )
        require(
            self.global_batch % self.grain == 0,
            "train.global_batch",
            self.global_batch,
            f"must be a multiple of train.grain={self.grain}",
        )

    @property
    def elastic(self) -> bool:
        """Whether the number of workers may change during the run."""
        return self.max_workers > self.workers


@dataclass(frozen=True)
class CheckpointSection:
    """Checkpoints and their copies."""

    every: int = 200
    """Steps between checkpoints. A checkpoint is also written at the end of the run and when it is stopped."""
    max_loss_s: float = 60.0
    """Maximum seconds of training that a failed worker loses: another checkpoint is written before the newest one is older. 0: checkpoints only each `checkpoint.every` steps."""
    keep: int = 2
    """Newest checkpoints to keep, at least 2, in addition to the one with the lowest validation loss."""
    final_wait_s: float = 900.0
    """Seconds during which the last checkpoint of a run is retried, for example while the disk is full. Then the run fails."""
    storage: str = ""
    """URI (s3://bucket/folder, gs://..., file:///...) for copies of the records and of regular checkpoints, written in the background. A run that `run.root` lacks is resumed from there. Empty: no copies."""

    def __post_init__(self) -> None:
        check_positive(self, "checkpoint", "every")
        for name in ("max_loss_s", "final_wait_s"):
            require(getattr(self, name) >= 0, f"checkpoint.{name}", getattr(self, name), "must be 0 or more")
        require(self.keep >= 2, "checkpoint.keep", self.keep, "at least 2, so that a corrupt one is survivable")


@dataclass(frozen=True)
class RegroupSection:
    """Changes of the experts' clusters. Brackets give the paper's constants (arXiv 2510.02345, sections 3.1 and 4.1)."""

    mode: Literal["async", "lockstep", "replay", "off"] = "async"
    """Source of plans. `async`: the clusterer, while training continues. `lockstep`: the clusterer, while training waits, so that a run is a function of its seed. `replay`: the file `regroup.replay`. `off`: the first assignment remains. Models without experts in several clusters have no regrouping."""
    replay: str = ""
    """Path of a `plans.jsonl` whose applied plans are applied again at the same steps. Required by `regroup.mode=replay`."""
    start: Literal["factored", "dense"] = "factored"
    """First weights. `factored`: experts in clusters from step 0. `dense`: independent experts from one common initialization; at the end of the burn-in they are clustered by similarity and factored (mean base, truncated SVD), as in the paper."""
    similarity: Literal["counterfactual", "paper", "coactivation"] = "counterfactual"
    """Similarity of two experts. `counterfactual`: of their residuals or private weights, and of their outputs on the same sampled tokens. `paper`: of whole weights and of mean routed inputs (equation 1); with factored experts it favors the current clusters. `coactivation`: how often a token would take both if it could choose among all experts of the layer, less the frequency by chance. The expected gain of its plans is larger than the gain measured later: a plan is the best of many on one sample."""
    alpha: float = 0.7
    """Weight of the parameter term in the similarity, 0 to 1 [alpha]. The activation term has the weight 1 - alpha. Not used by `coactivation`."""
    beta: float = 0.05
    """Weight of a step in the exponentially decayed statistics, less than 1 [beta]."""
    burn_in: int = 200
    """Steps before the first plan [burn-in]."""
    period: int = 0
    """Steps between plans [T]. 0: 100, or 200 with more than 256 experts."""
    min_gain: float = 0.01
    """Minimum gain of the objective for a layer to change its clusters [delta]."""
    max_moves: int = 4
    """Maximum number of experts per layer that one plan moves."""
    load_weight: float = 0.01
    """Weight of the clusters' load imbalance (squared coefficient of variation) against similarity in the objective. The stage-1 biases balance load with any clusters, so a small weight suffices; a large one follows noise."""
    plan_lag: int = 20
    """Steps from the statistics of a plan to its application. A plan that arrives later is refused."""
    stats_every: int = 10
    """Steps between messages of statistics. Routed inputs are summed at these steps only."""
    sample: int = 256
    """Tokens per period on which every expert is evaluated, regardless of routing."""
    overlap: int = 32
    """Steps during which a moving expert is in both clusters: in the old one as a ghost that fades. 0: it moves at once, and the loss jumps."""
    refit: Literal["keep", "svd", "weighted"] = "keep"
    """Residual of a moving expert. `keep`: unchanged. `svd`: the best approximation of the expert's old weights from the new base (truncated SVD). `weighted`: the same, weighted with the inputs of the new cluster. Private experts: `keep`."""
    force: int = 0
    """Step from which one plan is applied even without a gain, to test the mechanism. 0: never."""
    force_kind: Literal["mildest", "best", "random"] = "mildest"
    """Plan that `regroup.force` applies. `mildest`: in every layer `regroup.max_moves` experts that gain most, or cost least. `best`: the plan with the largest gain, even below `regroup.min_gain`; none while nothing gains. `random`: in every layer random swaps of up to `regroup.max_moves` experts, as a control."""

    def __post_init__(self) -> None:
        check_positive(self, "regroup", "beta", "stats_every", "sample", "max_moves")
        for name in ("burn_in", "period", "plan_lag", "overlap", "force", "load_weight", "min_gain"):
            require(getattr(self, name) >= 0, f"regroup.{name}", getattr(self, name), "must be 0 or more")
        require(0 <= self.alpha <= 1, "regroup.alpha", self.alpha, "between 0 and 1")
        require(self.beta < 1, "regroup.beta", self.beta, "must be less than 1")
        require(
            (self.mode == "replay") == bool(self.replay),
            "regroup.replay",
            self.replay,
            "set it together with regroup.mode=replay, and only then",
        )
        require(
            self.force > 0 or self.force_kind == "mildest",
            "regroup.force_kind",
            self.force_kind,
            "it has an effect with regroup.force only: set that to a step",
        )


@dataclass(frozen=True)
class Config:
    """The config of a run. `preset` names the preset that the overrides were applied to."""

    preset: str = "small"
    run: RunSection = field(default_factory=RunSection)
    data: DataSection = field(default_factory=DataSection)
    model: ModelSection = field(default_factory=ModelSection)
    train: TrainSection = field(default_factory=TrainSection)
    checkpoint: CheckpointSection = field(default_factory=CheckpointSection)
    regroup: RegroupSection = field(default_factory=RegroupSection)

    def __post_init__(self) -> None:
        regroup = self.regroup
        if self.regroups:
            require(
                self.model.expert_kind == "residual" or regroup.refit == "keep",
                "regroup.refit",
                regroup.refit,
                "private experts do not depend on a base: keep",
            )
            self._check_plan_timing(regroup.plan_lag, regroup.overlap, regroup.stats_every)
        if regroup.start == "dense":
            trained = "it clusters experts from one random initialization, and train.init gives trained weights"
            require(not self.train.init, "regroup.start", "dense", f"{trained}: leave one of them out")
            needs = "needs clustered experts with residuals, model.gate=softmax, and a regroup.mode"
            folds = self.regroups and self.model.expert_kind == "residual" and self.model.gate == "softmax"
            require(folds, "regroup.start", "dense", needs)
            require(
                0 < regroup.burn_in < self.train.steps,
                "regroup.burn_in",
                regroup.burn_in,
                f"regroup.start=dense needs a burn-in of 1 to {self.train.steps - 1} steps (train.steps - 1)",
            )

    def _check_plan_timing(self, lag: int, overlap: int, stats_every: int) -> None:
        period = self.period
        within = f"at least 1, and with regroup.overlap={overlap} less than the period of {period} steps"
        require(0 < lag < period - overlap, "regroup.plan_lag", lag, within)
        require(stats_every <= period, "regroup.stats_every", stats_every, f"at most the period of {period} steps")

    def to_dict(self) -> dict[str, Any]:
        """Return the config as JSON values, which `from_dict` reads."""
        return dataclasses.asdict(self)

    def to_yaml(self) -> str:
        """Return the config as YAML text, which `from_yaml` reads."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, width=1000)

    @property
    def regroups(self) -> bool:
        """Whether experts may change clusters in this run."""
        return self.model.has_members and self.model.n_clusters > 1 and self.regroup.mode != "off"

    @property
    def period(self) -> int:
        """Steps between plans (see `regroup.period`)."""
        return self.regroup.period or (100 if self.model.n_experts <= 256 else 200)

    @property
    def aux_loss(self) -> float:
        """Coefficient of the auxiliary loss (see `train.aux_loss`)."""
        if self.train.aux_loss is not None:
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
