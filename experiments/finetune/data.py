"""What to learn: prompts with a choice of next words, or prompts to be completed.

`load` reads the bundled film reviews, SST-2, folders of TSV files and JSON lines into `Texts`, and
`load_all` all splits of them, of which `remarks` says what a reader of a score should know;
`encode` makes `Tokens` of them for a tokenizer, and `batches` puts sentences of like length
together.
"""

import gzip
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

__all__ = [
    "SENTIMENT",
    "Split",
    "Texts",
    "Tokens",
    "batches",
    "encode",
    "in_order",
    "load",
    "load_all",
    "padded",
    "remarks",
]

Split = Literal["train", "dev", "test"]

SENTIMENT = (" terrible", " great")
"""The words that follow "SENTENCE It was", as in MeZO (Malladi et al., 2023, arXiv 2305.17333)."""

_ASSETS = Path(__file__).resolve().parent / "assets"
_MULTIPLE = 8  # lengths are padded to multiples of it, so that few programs are compiled


class Texts(NamedTuple):
    """Examples as text.

    Attributes:
      prompts: what the model reads.
      choices: the words of which one is right, the same for all prompts; empty for completions.
      answers: the number of the right one, for each prompt; empty for completions.
      completions: what should follow each prompt; empty where there are choices.
    """

    prompts: list[str]
    choices: tuple[str, ...]
    answers: list[int]
    completions: list[str]

    def sample(self, count: int, seed: int = 0) -> "Texts":
        """So many examples at random, as files are often sorted by label; 0: all, in order."""
        if not count:
            return self
        order = np.random.default_rng(seed).permutation(len(self.prompts))
        return self.take(order[:count])

    def take(self, places: Sequence[int]) -> "Texts":
        """Some of the examples."""
        answers = [self.answers[i] for i in places] if self.choices else []
        completions = [] if self.choices else [self.completions[i] for i in places]
        return Texts([self.prompts[i] for i in places], self.choices, answers, completions)

    def compared(self, before: Sequence[int], after: Sequence[int]) -> dict[str, list[int]]:
        """The places where answers became right, became wrong, and stayed wrong.

        Args:
          before: the numbers of the words that a model chose.
          after: and later.
        """
        groups: dict[str, list[int]] = {"learned": [], "forgotten": [], "still wrong": []}
        for place, (was, now, right) in enumerate(zip(before, after, self.answers, strict=False)):
            if now == right != was:
                groups["learned"].append(place)
            elif now != right:
                groups["forgotten" if was == right else "still wrong"].append(place)
        return groups


class Tokens(NamedTuple):
    """Examples as tokens.

    Attributes:
      sequences: int32 tokens of each example: the prompt, and its completion.
      begins: where completions begin, int32 (n,); where there are choices, the length.
      answers: int32 (n,), numbers of the right words; zeros for completions.
      words: int32 (choices,), the tokens to choose from; none for completions.
      states: of each example, float32 (its length, width), what a decoder reads in place of
        tokens; None where it reads tokens.
    """

    sequences: list[np.ndarray]
    begins: np.ndarray
    answers: np.ndarray
    words: np.ndarray
    states: Any = None

    def __len__(self) -> int:
        return len(self.sequences)

    def take(self, places: Sequence[int] | np.ndarray) -> "Tokens":
        """Some of the examples."""
        states = None if self.states is None else [self.states[i] for i in places]
        sequences = [self.sequences[i] for i in places]
        return Tokens(sequences, self.begins[places], self.answers[places], self.words, states)

    def beside(self, states: Any) -> "Tokens":
        """The same examples, with states."""
        return Tokens(self.sequences, self.begins, self.answers, self.words, states)


def load(source: str, split: Split) -> Texts:
    """Examples of a split.

    Args:
      source: "reviews" (bundled: rated sentences of film reviews; a tenth each for dev and test),
        "tfds:sst2" (tensorflow-datasets' glue/sst2; its dev is our test, a tenth of train our dev),
        a folder with train.tsv, dev.tsv and test.tsv of lines "sentence TAB 0 or 1", or a folder or
        file of JSON lines, {"prompt", "completion"} or {"prompt", "choices", "answer"} each; of a
        single file a tenth each is dev and test.
      split: "train", "dev" or "test".

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: an empty file, a line that says something else, or a single file of fewer than ten
        examples; it is named.

    Example:
      >>> texts = load("reviews", "dev")
      >>> len(texts.prompts), texts.prompts[0], texts.choices[texts.answers[0]]
      (1056, "If you're looking for a smart, ... It was", ' great')
    """
    if split not in get_args(Split):
        raise ValueError(f"split must be one of {get_args(Split)}, got {split!r}.")
    if source == "reviews":
        content = gzip.decompress((_ASSETS / "film_reviews.tsv.gz").read_bytes()).decode()
        rows = [line.split("\t") for line in content.splitlines()]
        rated = [(text, int(float(rating) > 0)) for text, rating in rows if float(rating)]
        return _tenths(_sentiment(rated), split)
    if source == "tfds:sst2":
        return _from_tfds(split)
    path = Path(source)
    if path.is_dir():
        found = [path / f"{split}{ending}" for ending in (".tsv", ".jsonl")]
        found = [one for one in found if one.is_file()]
        if not found:
            raise FileNotFoundError(f"data: there is no {split}.tsv or {split}.jsonl in {path}.")
        if len(found) > 1:
            raise ValueError(f"data: {path} has both {found[0].name} and {found[1].name}.")
        return _read(found[0])
    if path.suffix in (".jsonl", ".json", ".tsv"):
        texts = _read(path)
        if len(texts.prompts) < 10:
            raise ValueError(
                f"{path}: {len(texts.prompts)} examples are too few, as a tenth each is for dev "
                "and test: give at least 10, or a folder with a file for each."
            )
        return _tenths(texts, split)
    raise FileNotFoundError(
        f"data must be reviews, tfds:sst2, a folder, or a .tsv or .jsonl file, got {source!r}."
    )


def load_all(source: str) -> dict[Split, Texts]:
    """The examples of all splits.

    Raises:
      ValueError: as `load`; or splits that ask for different things, or training examples that all
        have the same answer.
    """
    texts = {split: load(source, split) for split in get_args(Split)}
    train = texts["train"]
    for split, one in texts.items():
        if one.choices != train.choices:
            raise ValueError(
                f"data: {source}: {split} has {one.choices or 'completions'} to choose from, train "
                f"{train.choices or 'completions'}."
            )
    if train.choices and len(set(train.answers)) == 1:
        raise ValueError(
            f"data: {source}: all {len(train.answers)} training examples have the answer "
            f"{train.choices[train.answers[0]]!r}."
        )
    return texts


def remarks(texts: Mapping[Split, Texts]) -> list[str]:
    """What a reader of a score should know of the examples, a sentence each.

    Examples are the same if their prompts (and completions) are, but for white space.

    Example:
      >>> train, test = (Texts(x, ("no", "yes"), [0, 1], []) for x in (["a", "b"], ["c", "a "]))
      >>> remarks({"train": train, "test": test})
      ['1 of 2 test examples is in train, too.']
    """
    seen = {split: [" ".join(one.split()) for one in _whole(x)] for split, x in texts.items()}
    found = []
    for split, other in (("dev", "train"), ("test", "train"), ("test", "dev")):
        both = [one for one in seen.get(split, ()) if one in set(seen.get(other, ()))]
        if both:
            verb = "is" if len(both) == 1 else "are"
            found.append(
                f"{len(both)} of {len(seen[split])} {split} examples {verb} in {other}, too."
            )
    for split, one in texts.items():
        if split != "train" and one.choices and len(set(one.answers)) == 1:
            answer = one.choices[one.answers[0]]
            found.append(f"All {len(one.answers)} {split} examples have the answer {answer!r}.")
    return found


def _whole(texts: Texts) -> list[str]:
    return texts.prompts if texts.choices else list(map("".join, _pairs(texts)))


def _pairs(texts: Texts) -> Iterator[tuple[str, str]]:
    return zip(texts.prompts, texts.completions, strict=True)


def encode(texts: Texts, tokenizer: Any, window: int) -> Tokens:
    """Examples as tokens, those of prompt and completion, or choice, as one text.

    A tokenizer may put a space before all that it reads, as SentencePiece's do, or join the end of
    a prompt and what follows. Both are therefore read together, as llama.cpp reads them, and a
    completion begins with the first token that holds any of it.

    Args:
      texts: the examples.
      tokenizer: a `tokenizers.Tokenizer`.
      window: the most tokens that the model reads.

    Raises:
      ValueError: no tokenizer, a choice that is not one token, the same after each prompt, or an
        example longer than the window; named.
    """
    if tokenizer is None:
        raise ValueError("model: it comes without a tokenizer.")
    words: list[int] = []
    if texts.choices:
        sequences, words = _with_choices(texts, tokenizer)
        begins = [len(ids) for ids in sequences]
    else:
        sequences, begins = _joined(list(_pairs(texts)), tokenizer)
    for prompt, ids, begin in zip(texts.prompts, sequences, begins, strict=True):
        if not 0 < begin <= len(ids) <= window or (texts.completions and begin == len(ids)):
            raise ValueError(
                f"an example must have 1 to {window} tokens, prompt and completion at least one "
                f"each, got {len(ids)}: {prompt[:60]!r}."
            )
    answers = np.array(texts.answers or [0] * len(sequences), np.int32)
    arrays = [np.array(ids, np.int32) for ids in sequences]
    return Tokens(arrays, np.array(begins, np.int32), answers, np.array(words, np.int32))


def _with_choices(texts: Texts, tokenizer: Any) -> tuple[list[list[int]], list[int]]:
    """Prompts as tokens, and the token of each choice."""
    sequences: list[list[int]] = []
    words = []
    for choice in texts.choices:
        joined, begins = _joined(
            [(prompt, choice) for prompt in texts.prompts], tokenizer, ends=False
        )
        for prompt, ids, begin in zip(texts.prompts, joined, begins, strict=True):
            if len(ids) - begin != 1:
                raise ValueError(
                    f"choices must be one token each, but {choice!r} is {len(ids) - begin} to this "
                    f"tokenizer after {prompt[-40:]!r}: choose another word (most begin with a "
                    "space)."
                )
        found = [ids[begin] for ids, begin in zip(joined, begins, strict=True)]
        before = [ids[:begin] for ids, begin in zip(joined, begins, strict=True)]
        sequences = sequences or before
        for prompt, word, ids, other in zip(texts.prompts, found, before, sequences, strict=True):
            if word != found[0] or ids != other:
                raise ValueError(
                    f"choices must be the same tokens after every prompt, but {choice!r} is "
                    f"another after {prompt[-40:]!r}: let prompts end, and choices begin, alike."
                )
        words += found[:1]
    if len(set(words)) < len(words):
        raise ValueError(f"choices must be different tokens, got {texts.choices}.")
    return sequences, words


def _joined(
    pairs: Sequence[tuple[str, str]], tokenizer: Any, *, ends: bool = True
) -> tuple[list[list[int]], list[int]]:
    """Prompts with what follows them as tokens, and where that begins.

    Without `ends`, a token that the tokenizer puts after every text is left out.
    """
    sequences, begins = [], []
    encodings = tokenizer.encode_batch([prompt + rest for prompt, rest in pairs])
    for (prompt, _), encoding in zip(pairs, encodings, strict=True):
        stops = [stop for _, stop in encoding.offsets]
        ours = [i for i, added in enumerate(encoding.special_tokens_mask) if not added]
        last = ours[-1] + 1 if ours else 0
        of_rest = [i for i in ours if stops[i] > len(prompt)]
        sequences.append(encoding.ids if ends else encoding.ids[:last])
        begins.append(of_rest[0] if of_rest else last)
    return sequences, begins


def batches(lengths: np.ndarray, size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """The places of an epoch's batches: at random, but of like lengths; the rest is left out.

    Args:
      lengths: tokens of each example.
      size: examples in a batch.
      seed: of the run.
      epoch: its number.

    Raises:
      ValueError: fewer examples than a batch holds.

    Example:
      >>> lengths = np.array([9, 3, 8, 4])
      >>> sorted(sorted(batch.tolist()) for batch in batches(lengths, 2, seed=0, epoch=0))
      [[0, 2], [1, 3]]
    """
    if len(lengths) < size:
        raise ValueError(f"batch_size must be at most {len(lengths)} examples, got {size}.")
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))
    whole = len(order) // size * size
    heaps = np.array_split(order[:whole], -(-whole // (16 * size)))
    like = np.concatenate([heap[np.argsort(lengths[heap], kind="stable")] for heap in heaps])
    found = like.reshape(-1, size)
    return list(found[rng.permutation(len(found))])


def in_order(tokens: Tokens, size: int) -> Iterator[tuple[np.ndarray, int]]:
    """Batches of one size, short examples first: their places, and how many are not there twice.

    Example:
      >>> words = np.array([1, 2])
      >>> three = Tokens([np.zeros(n) for n in (3, 9, 1)], words, words, words)
      >>> [(places.tolist(), count) for places, count in in_order(three, 2)]
      [([2, 0], 2), ([1, 1], 1)]
    """
    order = np.argsort([len(ids) for ids in tokens.sequences], kind="stable")
    for begin in range(0, len(order), size):
        some = order[begin : begin + size]
        yield np.resize(some, size), len(some)


def padded(sequences: Sequence[np.ndarray]) -> np.ndarray:
    """Sequences (or states) side by side, zeros after their ends; a few lengths only.

    Example:
      >>> padded([np.array([1, 2, 3]), np.array([4])]).shape
      (2, 8)
    """
    longest, first = max(map(len, sequences)), sequences[0]
    shape = len(sequences), -(-longest // _MULTIPLE) * _MULTIPLE, *first.shape[1:]
    table = np.zeros(shape, first.dtype)
    for row, ids in zip(table, sequences, strict=True):
        row[: len(ids)] = ids
    return table


def _sentiment(rated: Sequence[tuple[str, int]]) -> Texts:
    prompts = [f"{text} It was" for text, _ in rated]
    return Texts(prompts, SENTIMENT, [label for _, label in rated], [])


def _tenths(texts: Texts, split: Split) -> Texts:
    """A tenth of the examples at random is dev's, another test's."""
    tenth = len(texts.prompts) // 10
    part = {"dev": slice(tenth), "test": slice(tenth, 2 * tenth), "train": slice(2 * tenth, None)}
    order = np.random.default_rng(0).permutation(len(texts.prompts))
    return texts.take(order[part[split]])


def _read(path: Path) -> Texts:
    return _read_tsv(path) if path.suffix == ".tsv" else _read_json_lines(path)


def _read_tsv(path: Path) -> Texts:
    rated = []
    for number, line in _lines(path):
        sentence, tab, label = line.rpartition("\t")
        if not tab or not sentence.strip() or label not in ("0", "1"):
            raise ValueError(f"{path}, line {number}: not 'sentence TAB 0 or 1': {line[:60]!r}.")
        rated.append((sentence, int(label)))
    return _sentiment(rated)


def _read_json_lines(path: Path) -> Texts:
    prompts, answers, completions = [], [], []
    choices: tuple[str, ...] | None = None
    for number, line in _lines(path):
        place = f"{path}, line {number}"
        try:
            one = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{place}: no JSON: {error}.") from error
        if not isinstance(one, dict) or not _is_text(one.get("prompt")):
            raise ValueError(f"{place}: wants a 'prompt', a string: {line[:60]!r}.")
        if not one["prompt"].strip():
            raise ValueError(f"{place}: the prompt is empty.")
        prompts.append(one["prompt"])
        of_line = _choices(one, place)
        if choices is not None and of_line != choices:
            raise ValueError(f"{place}: choices must be the same on all lines, got {of_line}.")
        choices = of_line
        if choices:
            if "completion" in one:
                raise ValueError(f"{place}: has 'choices' and a 'completion': give one of them.")
            answer = one.get("answer")
            if answer in choices:
                answer = choices.index(answer)
            if type(answer) is not int or not 0 <= answer < len(choices):
                raise ValueError(f"{place}: answer must be one of {choices}, got {answer!r}.")
            answers.append(answer)
        elif not _is_text(one.get("completion")):
            raise ValueError(f"{place}: wants 'choices' and an 'answer', or a 'completion'.")
        elif not one["completion"]:
            raise ValueError(f"{place}: the completion is empty.")
        else:
            completions.append(one["completion"])
    return Texts(prompts, choices or (), answers, completions)


def _choices(one: dict[str, Any], place: str) -> tuple[str, ...]:
    given = one.get("choices")
    if given is None or given == []:
        return ()
    if not isinstance(given, list) or not all(map(_is_text, given)):
        raise ValueError(f"{place}: choices must be a list of strings, got {given!r:.60}.")
    if len(set(given)) < len(given) or not all(given):
        raise ValueError(f"{place}: choices must be different words, got {given!r:.60}.")
    return tuple(given)


def _is_text(text: Any) -> bool:
    """Whether something is a string that UTF-8 holds: JSON may name half of a character."""
    return isinstance(text, str) and not any("\ud800" <= letter <= "\udfff" for letter in text)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The numbered lines of a text file, of which there must be some."""
    if not path.is_file():
        raise FileNotFoundError(f"data: there is no file {path}.")
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")  # Windows' editors mark UTF-8 in the first bytes
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {line}: no UTF-8 text.") from error
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    lines = [(i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise ValueError(f"{path}: the file is empty.")
    return iter(lines)


def _from_tfds(split: Split) -> Texts:
    import tensorflow_datasets as tfds

    source = tfds.data_source("glue/sst2", split="validation" if split == "test" else "train")
    rated = [(str(one["sentence"], "utf-8").strip(), int(one["label"])) for one in source]
    if split != "test":
        rated = [one for i, one in enumerate(rated) if (i % 10 == 0) == (split == "dev")]
    return _sentiment(rated)
