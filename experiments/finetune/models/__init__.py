"""Decoder language models, and how they are read from the files that they come in."""

from experiments.finetune.models.architecture import Architecture as Architecture
from experiments.finetune.models.decoder import Decoder as Decoder
