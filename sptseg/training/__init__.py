"""Weights from data, resumable to the bit."""

# fmt: off
from sptseg.training import ablation, losses
from sptseg.training.ablation import CONFIGURATIONS, FIGURES, LADDER, ablate
from sptseg.training.loop import (
    EMBEDDED_TRAINING, TrainConfig, Trainee, fit, learning_rate, parameter_groups, pseudo_labels, step,
    training_augmentation,
)
from sptseg.training.losses import present_pairs, segmentation_loss
from sptseg.training.checks import preflight
from sptseg.training.presets import PRESETS, PresetName, VOC, in_setting
from sptseg.training.pretraining import PretrainConfig, pretrain
from sptseg.training.recipe import WORDS, beside_published, training_free
from sptseg.training.stream import Positions, Setting, TrainingStream, label_table, loading
