"""What a run is: a frozen Recipe of typed sections."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from pipeline.recipe.bottleneck import Bottleneck
from pipeline.recipe.model import Model
from pipeline.recipe.progressive import Progressive
from pipeline.recipe.token_expansion import TokenExpansion

Origin = tuple[tuple[str, Mapping[str, object]], ...]


@dataclass(frozen=True)
class Data:
    path: str = "data/shards"
    """Directory of shards with their index, as tools/make_shards.py writes it, or its URL (s3://, gs://, hf://, https://)."""
    train: str = "train"
    """Split to train on."""
    val: str = "val"
    """Split to evaluate on."""
    global_batch: int = 4096
    """Samples of one optimizer step, over all ranks and micro-batches."""
    accumulation: int = 1
    """Micro-batches a rank runs forward and backward, one after the other, for one optimizer step."""
    workers: int = 8
    """Processes a rank that read, decode and augment."""
    shuffle: Literal["global", "window"] = "global"
    """A true permutation of the split, for storage with random access; or windows of shards, for network storage."""
    runs: int = 0
    """Window shuffle: how many places of the split a global batch is drawn from; 0 takes its largest divisor to 64."""
    window: int = 2048
    """Window shuffle: about how many samples of a run are shuffled together."""
    max_bad: str = "0.01%"
    """Samples of the training split that may be unreadable before the run stops: a count, or a share as in 0.01%."""
    remote: Literal["cache", "range"] = "cache"
    """Data at a URL: whole shards on a local disk, or a range read a sample."""
    cache: str = "~/.cache/vittm-pipeline"
    """Directory on a local disk for what is fetched from a URL; all processes of a machine share it."""
    cache_size: str = "100GB"
    """Most bytes of shards in the cache."""


@dataclass(frozen=True)
class Augment:
    image_size: int = 224
    """Side of the square image that enters the model, in pixels."""
    decode: Literal["exact", "fast"] = "exact"
    """Training images through Pillow and torchvision, or, about twice as quick, through crop decoding and uint8 arrays,
    whose resize is rounded otherwise."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Range of the crop's share of the image area."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Range of the crop's aspect ratio before it is resized to a square."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """Antialiased filter that resizes the crop."""
    hflip: float = 0.5
    """Probability of a horizontal flip."""
    randaugment: Literal["torchvision", "timm", "timm-increasing"] = "torchvision"
    """RandAugment as torchvision has it; or timm's, which skips each operation as often as not: rand-..., of whose
    operations some weaken as the magnitude grows, or rand-...-inc1, of which none does."""
    randaugment_ops: int = 0
    """RandAugment operations a sample; 0 switches RandAugment off."""
    randaugment_magnitude: int = 9
    """RandAugment magnitude, 0 to 30; timm's 0 to 10."""
    randaugment_std: float = 0.0
    """Standard deviation of timm's magnitude, which a normal distribution gives for each operation."""
    erasing: float = 0.0
    """Probability that a random box of a sample is erased."""
    erasing_fill: Literal["mean", "noise"] = "mean"
    """What is there then: the mean of all images, or normal noise a pixel."""
    erasing_scale: tuple[float, float] = (0.02, 0.33)
    """Range of the box's share of the image area."""
    mixup: bool = False
    """Mix pairs of samples by MixUp; with cutmix on too, one of both is drawn a step."""
    cutmix: bool = False
    """Mix pairs of samples by CutMix."""
    mixup_alpha: float = 0.5
    """Both parameters of the Beta distribution that MixUp's mixing weight is drawn from."""
    cutmix_alpha: float = 0.5
    """The same of CutMix."""


@dataclass(frozen=True)
class Shampoo:
    epsilon: float = 1e-12
    """Added to the eigenvalues of the factors."""
    max_preconditioner_dim: int = 8192
    """Largest side of a factor: dimensions are merged up to it, and split where they are larger."""
    precondition_frequency: int = 100
    """Steps between two computations of the inverse roots."""
    start_preconditioning_step: int = 300
    """Step, counted from 1, from which on updates are preconditioned; before it they are Adam's."""
    grafting_beta2: float = 0.999
    """Decay rate of the second moment of the Adam whose lengths of updates are taken over."""
    grafting_epsilon: float = 1e-8
    """Added to the root of that second moment."""


@dataclass(frozen=True)
class Optimizer:
    name: str = "adamw"
    """Optimizer: see the table above."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the first and second moment; of Shampoo's gradients and factors."""
    eps: float = 1e-8
    """Added to the root of the second moment; Shampoo has its own below."""
    weight_decay: float = 0.03
    """Decoupled weight decay."""
    decay: Literal["all", "matrices"] = "all"
    """What weight decay is on: every parameter, as the authors of ViTTM have it; or all but vectors (norms, biases) and
    what the model's no_weight_decay() names (class token, position tables), as timm has it."""
    clip_norm: float = 1.0
    """Largest global gradient norm; 0 switches clipping off."""
    layer_decay: float = 1.0
    """Learning rate of a layer over that of the next one, towards the input; 1 gives all the same."""
    shampoo: Shampoo = field(default_factory=Shampoo)


@dataclass(frozen=True)
class Schedule:
    length: str = "300 epochs"
    """How long to train: a number of epochs, steps or images."""
    warmup: str = "10000 steps"
    """Linear warm-up: a number of epochs, steps or images, or a percentage of the length."""
    lr: float = 1.5e-4
    """Learning rate after warm-up."""
    warmup_lr: float = 1e-6
    """Learning rate of the first step, where there is a warm-up."""
    min_lr: float = 1e-7
    """Learning rate at the end of the cosine, and after it."""
    cosine_per: Literal["step", "epoch"] = "step"
    """How often the cosine moves."""
    cooldown: str = "0 steps"
    """The last part of the length, after the cosine: a number of epochs, steps or images, or a percentage of it."""
    cooldown_lr: float = 0.0
    """Learning rate there."""


@dataclass(frozen=True)
class Evaluation:
    every: str = "1 epochs"
    """How often to evaluate: epochs, steps, images, or a percentage of the length. The end is always evaluated."""
    batch: int = 256
    """Samples of one forward pass of a rank."""
    crop_pct: float = 0.875
    """Side of the centre crop over the shorter side of the resized image; export and predictions keep to it, too."""


@dataclass(frozen=True)
class Checkpoint:
    every: str = "1 epochs"
    """How often to save: epochs, steps, images, or a percentage of the length. The end is always saved."""
    keep: int = 2
    """Newest checkpoints to keep."""
    asynchronous: bool = True
    """Write checkpoints behind the training, which stands still only while they are copied (DDP, FSDP2; ZeRO's are
    always written at once)."""
    upload: str = ""
    """URL to copy every committed checkpoint to, behind the training (s3://, gs://, file://, ...); what is there stays
    there. Empty copies none."""


@dataclass(frozen=True)
class Runtime:
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto takes CUDA where there is one."""
    precision: Literal["fp32", "bf16", "bf16-pure", "fp16"] = "fp32"
    """Arithmetic of the forward pass: bf16 by autocast; bf16-pure with bf16 weights beside their fp32 masters; fp16 by
    autocast with a scaled loss, under DDP alone. What the optimizer updates, and its states, are fp32 always."""
    compile: Literal["off", "aot_eager", "inductor"] = "off"
    """torch.compile's backend, for each layer alone."""
    activation_checkpointing: int = 0
    """Every how-manieth layer drops its activations, and computes them again in the backward pass; 0 keeps all."""
    max_skipped: int = 3
    """Steps of the run that may be skipped, because a loss or the gradient norm is not finite or spikes, before it
    stops."""
    spike: float = 0.0
    """A step whose loss is over so many times the median of the last 50 takes the run back to its newest checkpoint,
    and on from the batch after it; 0 never does."""
    fsdp_replicas: int = 1
    """FSDP2: groups of neighbouring ranks that hold a whole model each, in shards; 1 shards it over all ranks."""
    processes: int = 0
    """Refuse to start on another number of ranks than this; 0 takes what the launcher starts."""
    hang_timeout: float = 480.0
    """Seconds for which no rank may make progress before the run ends as hung, and names who did not arrive; 0 waits
    for ever. What is slow but sound has to take less: the first batch from a slow store, compilation, the check of a
    checkpoint. Below the 10 minutes after which NCCL gives up by itself."""
    log_every: str = "50 steps"
    """How often to log: epochs, steps, images, or a percentage of the length."""
    norms: bool = False
    """Show the gradient norm of every parameter in TensorBoard, at the cost of a pass over the gradients a step."""
    pictures: bool = True
    """Show augmented samples and attention maps in TensorBoard, at the start and with every evaluation."""
    peak_tflops: float = 0.0
    """Peak of one device in TFLOP/s at this precision, dense, for the MFU; 0: of devices that are known."""
    deterministic: bool = False
    """Bitwise resume on CUDA through torch.use_deterministic_algorithms, at some cost of speed. CPU runs always are."""


@dataclass(frozen=True)
class Recipe:
    run_dir: str = "runs/run"
    """Where checkpoints, metrics, logs and the outcome go. An interrupted run there is resumed."""
    seed: int = 0
    """Key of every random draw."""
    loss: Literal["ce", "bce"] = "ce"
    """Cross-entropy, or binary cross-entropy summed over classes; of the memory and the process head, added up."""
    label_smoothing: float = 0.0
    """Share of a training target that is spread evenly over all classes."""
    ema_decay: float = 0.999
    """Decay of the exponential moving average of the weights; 0 keeps none."""
    dry_run: bool = False
    """Check everything, measure, print what the run would be and cost, and stop before the first step."""
    profile: int = 0
    """Trace so many steps by torch.profiler, after a few others, into RUN/profile; 0 none."""
    wandb: str = ""
    """Project of Weights & Biases that is shown what TensorBoard is; empty: none."""
    data: Data = field(default_factory=Data)
    augment: Augment = field(default_factory=Augment)
    model: Model = field(default_factory=Model)
    token_expansion: TokenExpansion = field(default_factory=TokenExpansion)
    bottleneck: Bottleneck = field(default_factory=Bottleneck)
    progressive: Progressive = field(default_factory=Progressive)
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    evaluation: Evaluation = field(default_factory=Evaluation)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    runtime: Runtime = field(default_factory=Runtime)
    origin: Annotated[Origin, tyro.conf.Suppress] = field(default=(), compare=False)
    """No field of a recipe: what `pipeline.recipe.sources` makes out from where the others have their values."""
