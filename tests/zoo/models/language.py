"""Language models of other packages, in tiny random configurations."""

import importlib.machinery
import sys
import types

import jax
import jax.numpy as jnp

from zoo.data import cross_entropy, tokens
from zoo.registry import model


def _of_state(module, text, call):
    from flax import nnx

    graph, state = nnx.split(module)

    def loss(state):
        return cross_entropy(call(nnx.merge(graph, state), text[:, :-1]), text[:, 1:])

    return state, loss


def _tunix(name):
    """A file of Tunix's models; the package itself imports trainers that few machines have."""
    if "tunix" not in sys.modules:
        package = types.ModuleType("tunix")
        found = importlib.machinery.PathFinder.find_spec("tunix")
        package.__path__ = found.submodule_search_locations
        sys.modules["tunix"] = package
    return importlib.import_module(f"tunix.models.{name}.model")


def _tunix_model(name, kind, **config):
    from flax import nnx

    file = _tunix(name)
    if config.pop("remat", False):
        config["remat_config"] = file.RematConfig.BLOCK
    sizes = {"num_layers": 1, "embed_dim": 16, "hidden_dim": 32, "num_heads": 2, "num_kv_heads": 1}
    module = getattr(file, kind)(
        file.ModelConfig(**sizes, head_dim=8, **config), rngs=nnx.Rngs(params=0)
    )

    def call(module, text):
        batch, length = text.shape
        positions = jnp.broadcast_to(jnp.arange(length), text.shape)
        mask = jnp.broadcast_to(jnp.tril(jnp.ones((length, length), bool)), (batch, length, length))
        return module(text, positions, None, mask)[0]

    return _of_state(module, tokens(2, 9), call)


_LLAMA = {"vocab_size": 40, "rope_theta": 10_000, "norm_eps": 1e-5}


@model("Tunix Qwen3", "google-tunix", heavy=True)
def qwen3():
    return _tunix_model("qwen3", "Qwen3", **_LLAMA, use_tied_embedding=True)


@model("Tunix Qwen3, rematerialized blocks", "google-tunix", heavy=True)
def qwen3_remat():
    return _tunix_model("qwen3", "Qwen3", **_LLAMA, remat=True)


@model("Tunix Llama 3", "google-tunix", heavy=True)
def llama3():
    return _tunix_model("llama3", "Llama3", **_LLAMA)


@model("Tunix Llama 3, rematerialized blocks", "google-tunix", heavy=True)
def llama3_remat():
    return _tunix_model("llama3", "Llama3", **_LLAMA, remat=True)


@model("Tunix Gemma", "google-tunix", heavy=True)
def gemma():
    return _tunix_model(
        "gemma", "Gemma", num_embed=40, final_logit_softcap=None, use_post_attn_norm=False,
        use_post_ffw_norm=False, attention_types=(_tunix("gemma").AttentionType.GLOBAL,),
    )  # fmt: skip


def _bert(**how):
    import transformers
    from transformers.models.bert.modeling_flax_bert import FlaxBertForSequenceClassification

    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=16, num_labels=4,
    )  # fmt: skip
    net = FlaxBertForSequenceClassification(config, input_shape=(1, 8), seed=0, **how)
    text, y = tokens(2, 8), jnp.array([1, 3])
    return net.params, lambda params: cross_entropy(net(text, params=params).logits, y)


@model("Transformers' Flax BERT", "transformers", heavy=True)
def bert():
    return _bert()


@model("Transformers' Flax BERT, gradient checkpointing", "transformers", heavy=True)
def bert_checkpointed():
    return _bert(gradient_checkpointing=True)


@model("Transformers' Flax GPT-2", "transformers", heavy=True)
def gpt2():
    import transformers
    from transformers.models.gpt2.modeling_flax_gpt2 import FlaxGPT2LMHeadModel

    config = transformers.GPT2Config(
        vocab_size=40, n_positions=16, n_embd=16, n_layer=1, n_head=2,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    net = FlaxGPT2LMHeadModel(config, input_shape=(1, 8), seed=0)
    text = tokens(2, 9)

    def loss(params):
        return cross_entropy(net(text[:, :-1], params=params).logits, text[:, 1:])

    return net.params, loss


@model("mamba2-jax language model", "mamba2-jax", heavy=True, tolerance=1e-3)
def mamba2():
    from flax import nnx
    from mamba2_jax import Mamba2Config, Mamba2ForCausalLM

    config = Mamba2Config(
        vocab_size=40, hidden_size=16, state_size=8, head_dim=8, chunk_size=8, num_hidden_layers=1
    )
    module = Mamba2ForCausalLM(config, rngs=nnx.Rngs(0))
    return _of_state(module, tokens(2, 9), lambda module, text: module(text)["logits"])


def _penzai(**config):
    from penzai import pz
    from penzai.models.transformer.variants import llamalike_common as llama

    config = llama.LlamalikeTransformerConfig(
        num_kv_heads=1, query_head_multiplier=2, embedding_dim=16, projection_dim=8,
        mlp_hidden_dim=32, vocab_size=40, mlp_variant="swiglu", tie_embedder_and_logits=False,
        **config,
    )  # fmt: skip
    net = llama.build_llamalike_transformer(config, init_base_rng=jax.random.key(0))
    net, variables = pz.unbind_params(net, freeze=True)
    text = tokens(2, 9)

    def loss(variables):
        bound = pz.bind_variables(net, variables)
        named = pz.nx.wrap(text[:, :-1]).tag("batch", "seq")
        logits = bound(named, token_positions=pz.nx.arange("seq", 8))
        return cross_entropy(logits.unwrap("batch", "seq", "vocabulary"), text[:, 1:])

    return variables, loss


@model("Penzai llama-like transformer", "penzai", heavy=True)
def penzai():
    return _penzai(num_decoder_blocks=1)


@model("Penzai llama-like transformer, LayerStack", "penzai", heavy=True)
def penzai_stack():
    return _penzai(num_decoder_blocks=2, use_layer_stack=True)
