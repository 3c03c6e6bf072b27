"""A whole run as one frozen, typed tree; reading.py makes it of YAML and overrides."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from mvrec_core.data import Data
from mvrec_core.node import Node
from mvrec_core.views import CategoryView, NumberView, TextView, VectorView, View


class TextEncoderConfig(Node):
    path: str | None = None  # a local directory that transformers can load; needed where there is a text view
    tune: Literal["frozen", "last_n", "lora", "adalora", "adapter", "full"] = "frozen"
    last_n: int = Field(1, ge=1)  # layers trained with tune=last_n
    rank: int = Field(8, ge=1)  # of the updates with tune=lora, adalora (at the end, on average); an adapter's width
    save: Literal["whole", "adapter"] = "whole"  # adapter: what was learnt alone; to load it takes what is at `path`
    lr: float = Field(2e-5, gt=0)  # the encoder's own learning rate
    max_tokens: int = Field(64, ge=4)
    ridge: float = Field(0.1, gt=0)  # of the mean variance, added to each direction's before whitening
    live: int = Field(128, ge=1)  # distinct texts of a step read with gradient, half of items it only scores against
    keep_mb: float = Field(2048.0, ge=0)  # of what layers frozen below last_n give for the texts; more is not kept
    refresh_epochs: int = Field(1, ge=1)  # the cache is computed anew after so many epochs
    compile: bool = False  # its layers, by torch.compile: pays on a GPU with a large encoder that is tuned

    @model_validator(mode="after")
    def _an_adapter_is_less_than_all(self) -> TextEncoderConfig:
        if self.save == "adapter" and self.tune == "full":
            raise ValueError("save: adapter leaves out what was not learnt, and with tune: full that is nothing")
        return self


class ModelConfig(Node):
    fusion: Literal["gated", "linear"] = "gated"
    dim: int = Field(64, ge=2)
    blocks: int = Field(2, ge=0)
    heads: int = Field(2, ge=1)
    max_len: int = Field(100, ge=1)  # events of a history that the encoder reads
    dropout: float = Field(0.2, ge=0, lt=1)
    view_dropout: float = Field(0.2, ge=0, lt=1)  # on the vectors that describe an item: of its text, its image, ...
    temperature: float = Field(0.1, gt=0)  # where tau starts
    text: TextEncoderConfig = TextEncoderConfig()

    @model_validator(mode="after")
    def _heads_divide_dim(self) -> ModelConfig:
        if self.dim % self.heads:
            raise ValueError(f"dim {self.dim} is not a multiple of heads {self.heads}")
        return self


class TargetWeights(Node):
    """What a target counts in the loss by its value in an event-level category view, such as its kind; of several
    values the largest. Others, and missing ones, count 1."""

    view: str
    values: dict[str, float]

    @field_validator("values")
    @classmethod
    def _positive(cls, values: dict[str, float]) -> dict[str, float]:
        bad = {value: weight for value, weight in values.items() if not 0 < weight < float("inf")}
        if bad:
            raise ValueError(f"expected weights above 0, found {bad}")
        return values


Tracker = Literal["tensorboard", "wandb", "mlflow"]


class TrainConfig(Node):
    epochs: int = Field(30, ge=1)
    batch_size: int = Field(128, ge=1)  # users a step, over all workers
    accumulate: int = Field(1, ge=1)  # parts that a worker's share of a batch is read in, one after the other
    events_at_once: int = Field(8_000_000, ge=1)  # that a worker holds; more are read a shard at a time
    save_steps: int = Field(1000, ge=1)  # steps between two states to go on from; one is kept after each epoch too
    keep: int = Field(2, ge=1)  # the newest so many states
    max_failures: int = Field(3, ge=0)  # of workers or nodes; then training goes on from the newest state
    lr: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    averaging: float = Field(0.99, ge=0, lt=1)  # decay of the moving average of the weights, which is what is kept
    loss: Literal["softmax", "sampled_softmax", "bce", "gbce"] = "softmax"
    negatives: int = Field(512, ge=1)  # of sampled_softmax and gbce, shared by the batch; bce draws one a target
    negatives_from: Literal["popularity", "uniform", "batch"] = (
        "popularity"  # of sampled_softmax: by the root of it, ...
    )
    calibration: float = Field(0.75, ge=0, le=1)  # t of gbce
    label_smoothing: float = Field(0.0, ge=0, lt=1)  # of the softmax losses
    weights: TargetWeights | None = None
    workers: int = Field(1, ge=1)
    device: Literal["auto", "cpu", "gpu"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    shard_text: bool = False  # each worker holds its part of the text encoder alone (FSDP): for large ones
    threads: int | None = Field(None, ge=1)  # of torch a worker; None: the node's cores shared out
    refit: bool = False  # then train anew on train and validation events, for as many epochs as validation chose
    init: Literal["scratch", "pretrained"] = "scratch"  # pretrained: from what `mvrec pretrain` left in the run
    patience: int = Field(10, ge=1)  # epochs without a better validation NDCG@10 before training stops
    validate_every: int = Field(1, ge=1)
    trackers: tuple[Tracker, ...] = ("tensorboard",)  # where the figures of each epoch go besides curves.jsonl


Baseline = Literal["popularity", "recent_popularity", "own_frequency", "item_knn", "als", "bpr", "content"]


class ItemKNNConfig(Node):
    weighting: Literal["cosine", "tfidf", "bm25"] = "cosine"
    neighbours: int = Field(20, ge=1)


class ALSConfig(Node):
    factors: int = Field(64, ge=1)
    alpha: float = Field(1.0, gt=0)
    regularization: float = Field(0.01, ge=0)
    iterations: int = Field(15, ge=1)


class BPRConfig(Node):
    factors: int = Field(100, ge=1)
    learning_rate: float = Field(0.01, gt=0)
    regularization: float = Field(0.01, ge=0)
    iterations: int = Field(100, ge=1)


class PretrainConfig(Node):
    """The rest, such as batch_size, lr, workers and device, is train's."""

    epochs: int = Field(5, ge=1)  # of hidden and aligned views
    text_epochs: int | None = Field(None, ge=0)  # of masked tokens; None: 3, or 0 where model.text.tune is frozen


class EvaluateConfig(Node):
    exclude_seen: bool = True
    batch_size: int = Field(256, ge=1)
    baselines: tuple[Baseline, ...] = ("popularity", "item_knn", "als")
    hybrid: tuple[Literal["item_knn", "als", "own_frequency"], ...] = ("item_knn", "als")  # tried beside the model
    recent_share: float = Field(0.1, gt=0, le=1)  # of the dated events, the newest: what recent_popularity counts
    item_knn: ItemKNNConfig = ItemKNNConfig()
    als: ALSConfig = ALSConfig()
    bpr: BPRConfig = BPRConfig()


class Rising(Node):
    """From low to high, both included."""

    low: float
    high: float

    @model_validator(mode="after")
    def _rises(self) -> Rising:
        if not self.low < self.high:
            raise ValueError(f"expected low < high, found {self.low:g} and {self.high:g}")
        return self


class UniformSpace(Rising):
    kind: Literal["uniform"]


class LogUniformSpace(Rising):
    """Each order of magnitude as often."""

    kind: Literal["loguniform"]
    low: float = Field(gt=0)


class WholeSpace(Rising):
    """Whole numbers."""

    kind: Literal["int"]
    low: int
    high: int


class ChoiceSpace(Node):
    kind: Literal["choice"]
    values: tuple[bool | int | float | str | None, ...] = Field(min_length=1)


Space = Annotated[UniformSpace | LogUniformSpace | WholeSpace | ChoiceSpace, Field(discriminator="kind")]


class TuneConfig(Node):
    """A search for the settings with the best validation NDCG@10."""

    trials: int = Field(20, ge=1)
    at_once: int = Field(1, ge=1)
    space: dict[str, Space] = Field(min_length=1)  # "section.key" of model or train -> its values


class ServeConfig(Node):
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=1, le=65535)
    max_batch_size: int = Field(32, ge=1)
    batch_wait_s: float = Field(0.0, ge=0)  # how long a free model waits for company to a first request
    deadline_s: float = Field(10.0, gt=0)  # of an answer; what cannot keep it is refused
    min_replicas: int = Field(1, ge=1)
    max_replicas: int = Field(2, ge=1)
    upscale_s: float = Field(10.0, ge=0)  # for which there are too many requests before a replica is added
    downscale_s: float = Field(300.0, ge=0)  # for which there are few before one is taken away
    threads: int = Field(1, ge=1)  # of torch a replica
    redis_url: str | None = Field(
        None, pattern="^(redis|rediss|unix)://"
    )  # None: live events and items are kept in files
    state_dir: str | None = None  # where they are, on a disk of this machine; None: "state" beside the checkpoint
    live_events: int = Field(200, ge=1)  # the newest that are kept of a user
    live_users: int = Field(100_000, ge=1)  # the users of which they are kept: those heard of last
    live_ttl_s: float = Field(30 * 86_400.0, ge=1)  # how long after a user's last one they are forgotten
    cache_mb: float = Field(64.0, ge=0)  # of answers a replica remembers; 0: none
    cache_ttl_s: float = Field(600.0, ge=1)
    rules: str | None = None  # a YAML file of what must not be recommended, read again when it changes
    audit: str | None = None  # where lines of JSON say what rules withheld; None: withheld.jsonl in state_dir
    request_log: str | None = None  # where a line of JSON tells each request, without ids and text; None: nowhere
    api_keys: str | None = None  # a file of keys, one a line; None: those of MVREC_API_KEYS, or everybody may ask


class Config(Node):
    name: str = Field(pattern=r"^[\w.\-]+$")  # the run lives in <runs>/<name>
    runs: str = "runs"
    seed: int = 0
    data: Data
    views: dict[str, View] = Field(min_length=1)
    model: ModelConfig = ModelConfig()
    pretrain: PretrainConfig = PretrainConfig()
    train: TrainConfig = TrainConfig()
    tune: TuneConfig | None = None
    evaluate: EvaluateConfig = EvaluateConfig()
    serve: ServeConfig = ServeConfig()

    @model_validator(mode="after")
    def _views_have_their_sources(self) -> Config:
        for name, view in self.views.items():
            if not name.isidentifier():
                raise ValueError(f"views.{name}: a view's name is a word of letters, digits and _")
            column_views = isinstance(view, (TextView, CategoryView, NumberView))
            if column_views and view.level == "item" and self.data.items is None:
                raise ValueError(f"views.{name} reads columns of items, but data.items is not set")
            if column_views and view.level == "user" and self.data.users is None:
                raise ValueError(f"views.{name} reads columns of users, but data.users is not set")
            if isinstance(view, VectorView) and view.path is None:
                if self.data.items is None:
                    raise ValueError(f"views.{name} reads a column of items: set data.items, or views.{name}.path")
                for other, its in self.views_at("item").items():
                    read = its.columns if isinstance(its, TextView) else (getattr(its, "column", None),)
                    if view.column in read and not isinstance(its, VectorView):
                        raise ValueError(
                            f"views.{other} reads '{view.column}', which holds the vectors of views.{name}"
                        )
        if not any(view.level == "item" for view in self.views.values()):
            raise ValueError("views has none at item level, so there is nothing to rank items by")
        if sum(view.kind == "text" for view in self.views.values()) > 1:
            raise ValueError("views has more than one text view: join their columns in one")
        weights = self.train.weights
        if weights is not None:
            weighed = self.views.get(weights.view)
            if weighed is None or weighed.kind != "category" or weighed.level != "event":
                raise ValueError(f"train.weights.view: expected a category view of events, found '{weights.view}'")
        if self.train.label_smoothing and self.train.loss not in ("softmax", "sampled_softmax"):
            raise ValueError(f"train.label_smoothing is of the softmax losses, but train.loss is {self.train.loss}")
        if self.train.shard_text and self.model.text.tune == "adalora":
            raise ValueError("train.shard_text: adalora weighs whole matrices, take lora, or leave the encoder whole")
        if self.text_view is not None and self.model.text.path is None:
            raise ValueError(f"views.{self.text_view} needs model.text.path, a local directory of a BERT-family model")
        return self

    @property
    def text_view(self) -> str | None:
        return next((name for name, view in self.views.items() if view.kind == "text"), None)

    @property
    def run_dir(self) -> Path:
        return Path(self.runs) / self.name

    def views_at(self, level: Literal["item", "event", "user"]) -> dict[str, View]:
        return {name: view for name, view in self.views.items() if view.level == level}
