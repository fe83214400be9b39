"""What to learn: prompts with a choice of answers, prompts to be completed, or conversations.

`load` reads a split of the bundled film reviews, SST-2, or files as people have them (`files.py`)
into `Texts`, and `load_all` all splits, of which `remarks` says what a reader of a score should
know. `encode` makes `Tokens` of them for a tokenizer, and `encode_for` for a model, with whose own
template (`templates.py`) it writes conversations. `batches` puts examples of like length together.
"""

from experiments.finetune.data.encoding import Normalise, encode, encode_for
from experiments.finetune.data.sources import load, load_all, load_whole, remarks
from experiments.finetune.data.texts import SENTIMENT, Chat, Split, Texts
from experiments.finetune.data.tokens import Tokens, batches, in_order, padded

__all__ = [
    "SENTIMENT",
    "Chat",
    "Normalise",
    "Split",
    "Texts",
    "Tokens",
    "batches",
    "encode",
    "encode_for",
    "in_order",
    "load",
    "load_all",
    "load_whole",
    "padded",
    "remarks",
]
