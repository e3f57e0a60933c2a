"""All fields of a run, their defaults and what they may hold. ``configs/*.py`` start from here."""

from __future__ import annotations

import ml_collections

from mlfsic_jax.backbones import BACKBONES
from mlfsic_jax.core.lcm import SCORE_SCALINGS, SELECTIONS
from mlfsic_jax.core.prototypes import ATTENTIONS
from mlfsic_jax.data import DATASETS
from mlfsic_jax.data.splits import POLICIES
from mlfsic_jax.data.words import EMBEDDINGS
from mlfsic_jax.system.errors import InputError


def default() -> ml_collections.ConfigDict:
    """The paper's setting where the paper says it, else our choice, chosen on validation labels."""
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.workdir = "runs/default"  # checkpoints, metrics.jsonl, results.json
    config.cache_dir = "cache"  # local features or resized photos, prepared datasets, compiled programs
    config.data_dir = "data"  # downloaded weights and word vectors
    config.shots = (1, 5)  # K; one model is trained for each

    config.data = ml_collections.ConfigDict()
    config.data.name = "voc"
    config.data.source = ""  # the dataset's official folder
    config.data.prepared_dir = ""  # the prepared copy; empty: in cache_dir
    config.data.policy = ""  # which images a split may use: "leakfree", "exclusive", COCO's "laso"; empty: the usual
    config.data.split = ""  # of the labels; empty: the published one; "auto": random; or a JSON file
    config.data.image_size = 0  # 0: the backbone's own
    config.data.images_per_split = (1200, 400, 600)  # generated data only
    config.data.seed = 0  # of generated data, and of an automatic split

    config.labels = ml_collections.ConfigDict()
    config.labels.embedding = "glove"  # see label_embeddings.EMBEDDINGS; "dataset": generated data bring theirs
    config.labels.vectors = ""  # empty: the embedding's usual file in data_dir

    config.backbone = "resnet50"  # see backbones.BACKBONES
    config.backbone_weights = "published"  # those in data_dir; or a file; empty: random, for one that is trained
    config.train_backbone = False  # False: frozen, local features cached; True: trained end to end from photos
    config.augment = True  # of the photos, when the backbone is trained
    config.compute_dtype = ""  # of the backbone: "float32", "bfloat16", or empty: bfloat16 on GPU and TPU

    config.model = ml_collections.ConfigDict()
    config.model.d_joint = 512  # d_j
    config.model.n_heads = 8  # n_a
    config.model.d_dynamic = 64  # d_d
    config.model.n_dynamic = 16  # n_d
    config.model.scale = 10.0  # lambda
    config.model.dropout = 0.1
    config.model.skip = True  # around the attention's MLP; the paper has none
    config.model.anchor = False  # start at the plain prototype classifier
    config.model.attention = "channelwise"  # the paper's; its ablations: see prototypes.ATTENTIONS
    config.model.dynamic = True  # the dynamic convolution
    config.model.cm_loss = True
    config.model.query_loss_on = "query"  # images of the query loss: "query", or "both" support and query
    config.model.query_top = 0  # k of the queries' local features that are compared; 0: the global feature

    config.lcm = ml_collections.ConfigDict()
    config.lcm.steps = 20
    config.lcm.step_size = 1.0
    config.lcm.momentum = 0.95
    config.lcm.score_scaling = "minmax"
    config.lcm.selection = "momentum"  # the paper's; its ablations: see lcm.SELECTIONS
    config.lcm.thresholds = (0.51, 0.52, 0.53, 0.54, 0.55, 0.57, 0.60, 0.65)  # theta is chosen among these
    config.lcm.during_training = False
    config.lcm.training_threshold = 0.53

    config.ridge = ml_collections.ConfigDict()  # word_ridge and region_word_ridge, chosen on validation labels
    config.ridge.beta = 0.5  # weight of the word prior
    config.ridge.regulariser = 1.0
    config.ridge.region_regulariser = 0.3
    config.ridge.classifier_regulariser = 300.0
    config.ridge.word_regulariser = 0.1
    config.ridge.n_components = 320  # directions in which regions are compared
    config.ridge.variants = False  # also evaluate ways of joining it with the trained model
    config.ridge.variants_threshold = 0.53  # theta of their LCM
    config.ridge.fit_on = ("train",)  # with "validation" too, for deployment: then nothing is left to choose on

    config.train = ml_collections.ConfigDict()
    config.train.epochs = 200
    config.train.warmup_epochs = 10
    config.train.episodes_per_epoch = 10  # rounded up to whole steps
    config.train.episodes_per_step = 1  # whose gradients are averaged; 0: one per device
    config.train.n_query = 4
    config.train.learning_rate = 1e-4
    config.train.schedule = "cosine"  # after warm-up: "cosine" to zero, or "constant"
    config.train.gamma = 1.0  # weight of the query loss
    config.train.validate_every = 1  # epochs between two validations, each of which writes a checkpoint
    config.train.validation_episodes = 50

    config.pretrain = ml_collections.ConfigDict()  # of the backbone, as a classifier of the train labels
    config.pretrain.epochs = 40
    config.pretrain.warmup_epochs = 1
    config.pretrain.batch_size = 64
    config.pretrain.learning_rate = 1e-4

    config.eval = ml_collections.ConfigDict()
    config.eval.episodes = 200
    config.eval.n_query = 4
    config.eval.sweep_episodes = 200  # validation episodes on which theta is chosen
    return config


def validate(config: ml_collections.ConfigDict) -> None:
    """Refuses what cannot work, naming the field.

    Raises:
      InputError: with all mistakes, one a line.
    """
    mistakes = []

    def need(ok: bool, field: str, rule: str) -> None:
        if not ok:
            value = config
            for part in field.split("."):
                value = value[part]
            mistakes.append(f"config.{field} = {value!r}: {rule}")

    shots = config.shots
    need(len(shots) > 0 and all(isinstance(k, int) and k > 0 for k in shots), "shots", "whole numbers above 0")
    need(len(set(shots)) == len(shots), "shots", "each number once")
    need(config.data.name in DATASETS, "data.name", f"must be one of {', '.join(DATASETS)}")
    policies = (*POLICIES, "laso") if config.data.name == "coco" else POLICIES
    need(config.data.policy in ("", *policies), "data.policy", f"must be empty or one of {', '.join(policies)}")
    need(not config.data.split or config.data.name != "scenes", "data.split", "generated data have their own split")
    need(config.data.image_size == 0 or config.data.image_size >= 32, "data.image_size", "must be 0 or at least 32")
    embeddings = (*EMBEDDINGS, "dataset")
    need(config.labels.embedding in embeddings, "labels.embedding", f"must be one of {', '.join(embeddings)}")
    need(config.backbone in BACKBONES, "backbone", f"must be one of {', '.join(BACKBONES)}")
    dtypes = ("", "float32", "bfloat16")
    need(config.compute_dtype in dtypes, "compute_dtype", "must be empty, float32 or bfloat16")
    need(config.model.d_joint % config.model.n_heads == 0, "model.d_joint", "must be a multiple of model.n_heads")
    need(config.model.skip or not config.model.anchor, "model.skip", "must be True where model.anchor is")
    need(config.model.attention in ATTENTIONS, "model.attention", f"must be one of {', '.join(ATTENTIONS)}")
    rule = "must be channelwise or global where model.anchor is True"
    need(config.model.attention in ("channelwise", "global") or not config.model.anchor, "model.attention", rule)
    rule = "must be True where model.attention is none: there is nothing else to make prototypes of"
    need(config.model.dynamic or config.model.attention != "none", "model.dynamic", rule)
    need(config.model.query_loss_on in ("query", "both"), "model.query_loss_on", "must be query or both")
    need(config.model.query_top >= 0, "model.query_top", "must be at least 0")
    rule = "must be above 0 where model.cm_loss is False: nothing would be trained"
    need(config.model.cm_loss or config.train.gamma > 0, "train.gamma", rule)
    for field in ("d_joint", "n_heads", "d_dynamic", "n_dynamic"):
        need(config.model[field] > 0, f"model.{field}", "must be positive")
    need(config.model.scale > 0, "model.scale", "must be positive")
    need(0 <= config.model.dropout < 1, "model.dropout", "must be in [0, 1)")
    need(config.lcm.steps >= 1, "lcm.steps", "must be at least 1")
    need(0 <= config.lcm.momentum <= 1, "lcm.momentum", "must be in [0, 1]")
    need(config.lcm.score_scaling in SCORE_SCALINGS, "lcm.score_scaling", f"must be one of {', '.join(SCORE_SCALINGS)}")
    need(config.lcm.selection in SELECTIONS, "lcm.selection", f"must be one of {', '.join(SELECTIONS)}")
    thresholds = config.lcm.thresholds
    need(len(thresholds) > 0 and all(0 < t < 1 for t in thresholds), "lcm.thresholds", "numbers between 0 and 1")
    for field in ("regulariser", "region_regulariser", "classifier_regulariser", "word_regulariser", "n_components"):
        need(config.ridge[field] > 0, f"ridge.{field}", "must be positive")
    fit_on = tuple(config.ridge.fit_on)
    need(fit_on in (("train",), ("train", "validation")), "ridge.fit_on", "('train',) or ('train', 'validation')")
    for field in ("epochs", "episodes_per_epoch", "n_query", "validate_every", "validation_episodes"):
        need(config.train[field] >= 1, f"train.{field}", "must be at least 1")
    need(config.train.episodes_per_step >= 0, "train.episodes_per_step", "must be at least 0")
    need(0 <= config.train.warmup_epochs < config.train.epochs, "train.warmup_epochs", "must be below train.epochs")
    need(config.train.learning_rate > 0, "train.learning_rate", "must be positive")
    need(config.train.schedule in ("cosine", "constant"), "train.schedule", "must be cosine or constant")
    for field in ("epochs", "batch_size"):
        need(config.pretrain[field] >= 1, f"pretrain.{field}", "must be at least 1")
    need(config.pretrain.learning_rate > 0, "pretrain.learning_rate", "must be positive")
    rule = "must be below pretrain.epochs"
    need(0 <= config.pretrain.warmup_epochs < config.pretrain.epochs, "pretrain.warmup_epochs", rule)
    for field in ("episodes", "sweep_episodes"):
        need(config.eval[field] >= 2, f"eval.{field}", "must be at least 2, for an interval")
    need(config.eval.n_query >= 1, "eval.n_query", "must be at least 1")
    rule = "a frozen backbone needs weights: give their file, or set config.train_backbone=True"
    need(bool(config.backbone_weights) or config.train_backbone, "backbone_weights", rule)
    if config.backbone in BACKBONES and not BACKBONES[config.backbone].files:
        rule = f"{config.backbone} has no published weights: give a file, or leave it empty and train it"
        need(config.backbone_weights != "published", "backbone_weights", rule)
    if mistakes:
        raise InputError("\n".join(mistakes))
