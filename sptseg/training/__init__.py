"""Weights from data, resumable to the bit."""

# fmt: off
from sptseg.training import ablation, losses
from sptseg.training.ablation import FIGURES, Plan, Study, ablate
from sptseg.training.config import EMBEDDED_TRAINING, TrainConfig, learning_rate, training_augmentation
from sptseg.training.loop import Trainee, fit, parameter_groups, pseudo_labels, step
from sptseg.training.losses import present_pairs, segmentation_loss
from sptseg.training.checks import preflight
from sptseg.training.presets import (
    CONFIGURATIONS, LADDER, PRESETS, PresetName, beside_published, in_setting, training_free,
)
from sptseg.training.pretraining import PretrainConfig, pretrain, retrieval
from sptseg.training.report import interval, study_record, write_report
from sptseg.training.state import STATE
from sptseg.training.stream import Example, Positions, Setting, TrainingStream, label_table
