"""What a fine-tuning run is: one frozen dataclass, checked when it is made."""

import dataclasses
from typing import Any, Literal

from experiments import settings

__all__ = [
    "LENGTH",
    "MATRICES",
    "Config",
    "Method",
    "Normalise",
    "Query",
    "Rounding",
    "Train",
]

# Those of `zq.caq_zo` and of `data.encode`, which a test compares: importing them takes seconds,
# and --help none.
Query = Literal["aligned", "off_grid"]
Rounding = Literal["stochastic", "nearest", "error_feedback", "threshold", "significant"]

Normalise = Literal["none", "tokens", "letters"]
Method = Literal["zoqo", "caq_zo", "quzo", "qes", "qzo", "mezo", "zo_signsgd", "adam"]
Train = Literal["codes", "lora", "scales"]
_FLOAT = ("mezo", "zo_signsgd", "adam")
_SIZED = ("zoqo", "caq_zo", "quzo", "qes", "mezo")
_BY_HAND = ("learning_rate", "radius", "density", "decay", "query", "noise", "step_rule")
# Few layers learn most of few forward passes: of film reviews 1,260 of four layers came to 73 to
# 77 %, and 330 of all of them, in twice the time, to 65.2.
_LAST = 4
LENGTH = ("steps", "looks")  # settings of how long a run is, and how often it is looked at
_PLACES = ("model", "data", "dev", "test", "output", "cache")  # settings of where things lie
_NAMES = {
    "zoqo": "ZOQO", "caq_zo": "CAQ-ZO", "quzo": "QuZO", "qes": "QES", "qzo": "QZO", "mezo": "MeZO",
    "zo_signsgd": "ZO-SignSGD", "adam": "Adam",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of one run. Where 0 is said to be allowed, it takes the method's default.

    Attributes:
      model: a GGUF file, or a folder of safetensors in floats or as GPTQ, AWQ, compressed-tensors,
        MLX or bitsandbytes have it, of a Llama, Mistral, Qwen 2 or 3, Gemma 2 or 3, or (a folder)
        OPT; "hf:OWNER/NAME" or "hf:OWNER/NAME@REVISION", such a folder on Hugging Face's hub; or
        "smollm2" or "gemma3-270m", files that `make finetune` installs.
      data: "reviews" (bundled), "tfds:sst2", or a file, .jsonl, .csv or .tsv, or a folder with one
        for each of train, dev and test, see docs/finetune.md; of a single file, a tenth each is for
        dev and test.
      dev: a file (or another `data`, whose dev examples are taken) of dev examples of its own;
        empty: they are among those of `data`.
      test: the same for test examples; "dev" for those of dev once more, where no others are
        wanted.
      output: folder of all that the run writes; a run that was interrupted goes on there.
      train: "codes", the file's own quantized matrices in place; "lora", adapters beside them; or
        "scales", what the codes of a GGUF file are multiplied by.
      method: "zoqo", "caq_zo", "quzo" and "qes" move codes, "qzo" scales, "mezo", "zo_signsgd" and
        "adam" (by back-propagation) float adapters.
      steps: of the optimizer; with 0 the test examples are read, and nothing is trained.
      batch_size: examples a step.
      max_tokens: longer training examples are left out; at most the model's context.
      sized: whether steps size themselves, of zoqo, caq_zo, quzo, qes and mezo (whose gradients are
        steps then, with no rate): no number is needed, and none of learning_rate, radius, density,
        decay, query, noise and step_rule is taken. None, where neither --sized nor --nosized is
        given: of codes in place they do, unless one of those settings is given.
      num_queries: directions a step; 0: four where steps size themselves, else one.
      query_batch: of them evaluated at once.
      bits: of an adapter's codes, 2 to 8.
      rank: of adapters.
      targets: names of the matrices that train, of q, k, v, o, gate, up, down; empty: all of them
        for codes, q and v for adapters.
      layers: how many of the last layers train; 0: all; None: the last four (or all, of fewer)
        where steps size themselves, else all. What those below make of an example is computed once
        and kept on disk, so that a step costs as little as these layers.
      dtype: of decoded weights and of what multiplies them, "float32" or "bfloat16"; sums, logits
        and losses are float32. Not for adapters.
      eval_every: steps between looks at the dev examples.
      dev_examples: how many of them; 0: all.
      test_examples: how many test examples are read before and after; 0: all.
      patience: stop after so many looks without a better one; 0: never.
      checkpoint_every: steps between checkpoints.
      seed: of all randomness.

    Rarely needed:
      learning_rate: eta; value units (zoqo, zo_signsgd, mezo, adam), code units (caq_zo, quzo,
        qes; all layers in place bear about 0.05 / density) or scale units (qzo); 0: the method's
        default.
      radius: mu, in the same units, or 0; of caq_zo's off-grid queries a fraction of the range.
      density: of sparse directions at the start, or 0: 2^-10 for codes in place, and of adapters as
        many as make a step 0.01 long, root mean square, in value units. Of directions in columns,
        which share of the entries they have.
      decay: what is left of the learning rate, or of the density of sparse directions, at the end;
        it falls geometrically.
      structure: of directions in codes, "dense", "rank_one" or "sparse"; or "columns", in a few
        inputs of each matrix, which needs steps that size themselves. "auto" is sparse where these
        do, for codes in place, and for zoqo's adapters of at most 4 bits unless dithered, and dense
        for others.
      guide_every: steps between looks at what multiplies each matrix (`zq.observe`), which choose
        the inputs of directions in columns and their signs; 0: they are chosen at random.
      query: caq_zo's, "aligned" or "off_grid".
      rounding: caq_zo's, "stochastic", "nearest", "threshold", "error_feedback" or "significant".
      noise: law of zoqo's directions.
      step_rule: zoqo's, "floor" or "dithered".
      grid: of an adapter's codes, "uniform" or "nf4" (4 bits).
      range: what an adapter's codes reach, value units.
      core: adapters of so many numbers squared, between frozen principal directions of each matrix
        (see `zq.lora`), in place of those of a rank; 0: of a rank.
      alpha: adapters are multiplied by alpha / rank.
      parts: of a batch, of as many examples each; processes and devices share queries and parts,
        see `coordinator`. Their number, not that of processes, decides what is computed.
      normalise: what the log-probability of a choice of several tokens is divided by before choices
        are compared: "none", its "tokens", or its "letters".
      looks: how many forward passes are made before each look at the dev examples, in place of
        `eval_every`; after the last one the run ends.
      cache: folder for what the layers below those that train make of all examples, which runs may
        share; empty: in `output`, of the examples that the run reads.

    Raises:
      ValueError: a setting outside what is said above, naming it and its value.

    Example:
      >>> Config(model="model.gguf", output="run", train="lora", method="adam").learning_rate
      0.0
    """

    model: str
    output: str
    data: str = "reviews"
    dev: str = ""
    test: str = ""
    normalise: Normalise = "none"
    train: Train = "codes"
    method: Method = "zoqo"
    steps: int = 200
    batch_size: int = 32
    max_tokens: int = 48
    sized: bool | None = dataclasses.field(default=None, metadata={"was": False})
    learning_rate: float = 0.0
    radius: float = 0.0
    decay: float = 0.125
    structure: Literal["auto", "dense", "rank_one", "sparse", "columns"] = "auto"
    guide_every: int = 0
    query: Query = "aligned"
    rounding: Rounding = "stochastic"
    noise: str = "rademacher"
    step_rule: str = "floor"
    density: float = 0.0
    num_queries: int = 0
    query_batch: int = 1
    parts: int = 1
    bits: int = 8
    grid: Literal["uniform", "nf4"] = "uniform"
    range: float = 0.3
    rank: int = 8
    core: int = 0
    alpha: float = 16.0
    targets: tuple[str, ...] = ()
    layers: int | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    cache: str = ""
    eval_every: int = 25
    looks: tuple[int, ...] = ()
    dev_examples: int = 256
    test_examples: int = 512
    patience: int = 0
    checkpoint_every: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what nothing later would refuse, or would only after minutes."""
        for name in ("model", "output", "data"):
            if not getattr(self, name):
                raise ValueError(f"{name} must not be empty.")
        least = {
            "steps": 0, "batch_size": 1, "max_tokens": 1, "num_queries": 0, "query_batch": 1,
            "parts": 1, "rank": 1, "core": 0, "eval_every": 1, "looks": 1, "dev_examples": 0,
            "test_examples": 0, "patience": 0, "checkpoint_every": 1, "seed": 0, "guide_every": 0,
            **({} if self.layers is None else {"layers": 0}),
        }  # fmt: skip
        rates = ("learning_rate", "radius")
        positive = ("decay", "range", "alpha")
        within = {"bits": (2, 8), "density": (0, 1)}
        settings.check(self, least=least, within=within, positive=positive, not_negative=rates)
        if self.batch_size % self.parts:
            raise ValueError(f"parts must divide batch_size={self.batch_size}, got {self.parts}.")
        if self.method == "adam" and self.parts > 1:
            raise ValueError(f"parts must be 1 with method='adam', got {self.parts}.")
        moved = {"qzo": "scales", **dict.fromkeys(_FLOAT, "lora")}.get(self.method)
        if moved is None and self.train == "scales":
            raise ValueError(f"method={self.method!r} moves codes, not scales: use 'qzo'.")
        if moved is not None and self.train != moved:
            raise ValueError(f"method={self.method!r} needs train={moved!r}, got {self.train!r}.")
        in_columns = self.structure == "columns"
        usual = {field.name: field.default for field in dataclasses.fields(self)}
        by_hand = [name for name in _BY_HAND if getattr(self, name) != usual[name]]
        if in_columns and "density" in by_hand:
            by_hand.remove("density")
        if self.sized is None:
            sized = self.train == "codes" and self.method in _SIZED and not by_hand
            object.__setattr__(self, "sized", sized)
        if self.layers is None and not self.sized:
            object.__setattr__(self, "layers", 0)
        if self.num_queries == 0:
            object.__setattr__(self, "num_queries", 4 if self.sized else 1)
        if self.sized and self.method not in _SIZED:
            raise ValueError(f"sized is for methods of {_SIZED}, got method={self.method!r}.")
        if in_columns and not self.sized:
            raise ValueError("structure='columns' needs sized=True.")
        if self.sized and by_hand:
            name, value = by_hand[0], getattr(self, by_hand[0])
            raise ValueError(f"{name} is for steps of sized=False, got {value!r}.")
        if self.guide_every and (self.structure != "columns" or self.groups * self.parts > 1):
            raise ValueError(
                "guide_every needs structure='columns', and queries that are evaluated at once "
                f"(query_batch), got structure={self.structure!r}."
            )
        if self.dtype != "float32" and self.train == "lora":
            raise ValueError(f"dtype must be 'float32' with train='lora', got {self.dtype!r}.")
        if self.core and self.train != "lora":
            raise ValueError(f"core={self.core} needs train='lora', got {self.train!r}.")
        if self.grid == "nf4" and self.bits != 4:
            raise ValueError(f"bits must be 4 with grid='nf4', got {self.bits}.")
        bad = [name for name in self.targets if name not in MATRICES]
        if bad:
            raise ValueError(f"targets must be of {MATRICES}, got {bad[0]!r}.")

    @property
    def used(self) -> dict[str, Any]:
        """The settings that the method reads, with its defaults in place of 0 and "auto".

        Example:
          >>> Config(model="model.gguf", output="run", sized=False).used["density"]
          0.0009765625
        """
        found = dataclasses.asdict(self) | {"targets": self.matrices}
        adapters, floats = self.train == "lora", self.moves_floats
        moves_codes = not floats and self.train != "scales"
        in_columns = self.structure == "columns"
        rate, radius = self._defaults()
        found |= {"learning_rate": self.learning_rate or rate, "radius": self.radius or radius}
        found |= {"density": self.probed, "layers": self.layers_of(_LAST)}
        if self.structure == "auto":
            found["structure"] = "sparse" if self.is_sparse else "dense"
        drops = {
            "sized": not self.sized,
            "learning_rate": self.sized,
            "decay": self.sized,
            "radius": radius is None or self.sized,
            "density": not (self.is_sparse or in_columns) or (self.sized and not in_columns),
            "structure": not moves_codes,
            "guide_every": not in_columns,
            "query": self.method != "caq_zo",
            "rounding": self.method != "caq_zo",
            "noise": self.method != "zoqo" or self.sized,
            "step_rule": self.method != "zoqo" or self.sized,
            "num_queries": self.method == "adam",
            "query_batch": self.method == "adam",
            "parts": self.parts == 1,
            **dict.fromkeys(("bits", "grid", "range"), not adapters or floats),
            **dict.fromkeys(("rank", "alpha"), not adapters or bool(self.core)),
            "core": not self.core,
            "looks": not self.looks,
            "eval_every": bool(self.looks),
            **dict.fromkeys(("output", "cache"), True),
            "dev": not self.dev,
            "test": not self.test,
            "normalise": self.normalise == "none",
            "dtype": self.dtype == "float32",
        }
        return {name: x for name, x in found.items() if not drops.get(name)}

    def layers_of(self, depth: int) -> int:
        """How many of the last layers train, of a model of so many; 0: all."""
        if self.layers is not None:
            return self.layers
        return min(_LAST, depth)

    @property
    def probed(self) -> float:
        """Density of sparse directions at the start."""
        if self.density or self.train == "codes":
            return self.density or 2.0**-10
        code = 2 * self.range / (2**self.bits - 1)  # in value units
        return min(1.0, (0.01 / code) ** 2)

    def _defaults(self) -> tuple[float, float | None]:
        """Learning rate and radius of the method, which may have no radius."""
        if self.method == "zoqo":
            # In place, and of sparse directions, a step is one code.
            one_code = self.is_sparse or self.train == "codes"
            return (1e-9, 1e-9) if one_code else (1e-2, 5e-3)
        if self.method in ("caq_zo", "quzo", "qes"):
            # Codes a step for each nat that two losses differ by; what models bear goes as
            # 1 / density.
            borne = 0.05 if self.train == "codes" else 4.0
            codes = borne / self.probed if self.is_sparse else 10.0
            if self.method != "caq_zo":
                return codes, 1.0
            return codes, 0.1 if self.query == "off_grid" else None
        if self.method == "qzo":
            return 1e-6, 1e-4
        return (1e-3, None) if self.method == "adam" else (1e-2, 2e-3)

    @property
    def matrices(self) -> tuple[str, ...]:
        """Names of the matrices that train."""
        return self.targets or (("q", "v") if self.train == "lora" else MATRICES)

    @property
    def is_sparse(self) -> bool:
        """Whether directions are sparse, of methods that move codes."""
        if self.moves_floats or self.train == "scales":
            return False
        if self.structure != "auto" or self.sized:
            return self.structure in ("auto", "sparse")
        few = self.method == "zoqo" and self.bits <= 4 and self.step_rule == "floor"
        return self.train == "codes" or few

    @property
    def goes_on(self) -> bool:
        """Whether no step depends on how many there will be, so that a run may be made longer."""
        return self.sized or self.decay == 1.0

    @property
    def without_places(self) -> dict[str, Any]:
        """The settings by name, but those of where things lie, which may differ within a run."""
        return {name: x for name, x in vars(self).items() if name not in _PLACES}

    @property
    def groups(self) -> int:
        """Groups of queries that are evaluated at once, in a step."""
        return 1 if self.method == "adam" else -(-self.num_queries // self.query_batch)

    @property
    def moves_floats(self) -> bool:
        """Whether the method trains floats."""
        return self.method in _FLOAT

    @property
    def name(self) -> str:
        """How tables call the run, e.g. "ZOQO, 8-bit LoRA"."""
        grid = "NF4" if self.grid == "nf4" else f"{self.bits}-bit"
        adapters = "float LoRA" if self.moves_floats else f"{grid} LoRA"
        what = {"codes": "codes in place", "scales": "scales", "lora": adapters}[self.train]
        return f"{_NAMES[self.method]}, {what}"


MATRICES = ("q", "k", "v", "o", "gate", "up", "down")
