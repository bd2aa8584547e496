"""A language model is loaded whole, from these files, or not at all."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from language_models import write_llama, write_tokenizer
from safetensors.torch import load_file, save_file

from assayer import language_model
from assayer.errors import EvaluatorError

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model and its tokenizer; nobody writes into it."""
    folder = tmp_path_factory.mktemp("llama")
    write_llama(folder)
    write_tokenizer(folder)
    return folder


@pytest.fixture
def copy(llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "run" / "step-10"))


def rewrite(folder: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_model_is_loaded_as_it_was_saved(llama: Path) -> None:
    model = language_model.load(str(llama))
    saved = load_file(llama / "model.safetensors")
    assert not model.training
    assert {name: tensor.tolist() for name, tensor in model.state_dict().items()} == {name: t.tolist() for name, t in saved.items()}


@pytest.mark.parametrize(
    ("words", "change"),
    [
        ("1 missing (model.norm.weight)", lambda tensors: tensors.pop("model.norm.weight")),
        ("1 missing (lm_head.weight)", lambda tensors: tensors.pop("lm_head.weight")),
        ("1 unexpected (model.layers.0.mlp.gate.bias)", lambda tensors: tensors.update({"model.layers.0.mlp.gate.bias": torch.ones(3)})),
        (
            "1 of another shape (model.norm.weight: (31,) there, (32,) in the model)",
            lambda tensors: tensors.update({"model.norm.weight": torch.ones(31)}),
        ),
    ],
)
@pytest.mark.parametrize("way", ["load", "strict_loading"])
def test_a_tensor_that_does_not_fit_is_an_error(words: str, change: Callable[[Tensors], object], way: str, copy: Path) -> None:
    rewrite(copy, change)
    with pytest.raises(EvaluatorError) as raised:
        if way == "load":
            language_model.load(str(copy))
        else:
            from transformers import AutoModelForCausalLM

            with language_model.strict_loading():
                AutoModelForCausalLM.from_pretrained(copy)
    assert words in str(raised.value)
    assert str(copy) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_only_the_first_few_names_are_told(copy: Path) -> None:
    rewrite(copy, lambda tensors: [tensors.pop(name) for name in list(tensors) if "layers.1" in name])
    with pytest.raises(EvaluatorError, match=r"9 missing \(model\.layers\.1\.[^,]+, [^,]+, [^,]+, \.\.\.\)"):
        language_model.load(str(copy))


def test_tied_weights_are_not_missing(tmp_path: Path) -> None:
    # given: a model whose head is its embedding, so its file holds one of the two.
    write_llama(tmp_path, tied=True)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")

    model = language_model.load(str(tmp_path))

    state = model.state_dict()
    assert state["lm_head.weight"].data_ptr() == state["model.embed_tokens.weight"].data_ptr()


def test_a_file_with_both_of_two_tied_weights_is_taken(tmp_path: Path) -> None:
    write_llama(tmp_path, tied=True)
    rewrite(tmp_path, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    model = language_model.load(str(tmp_path))
    assert torch.equal(model.state_dict()["lm_head.weight"], load_file(tmp_path / "model.safetensors")["lm_head.weight"])


def test_what_old_checkpoints_keep_beside_the_weights_is_not_unexpected(copy: Path) -> None:
    rewrite(copy, lambda tensors: tensors.update({f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in (0, 1)}))
    before = language_model.fingerprint(language_model.load(str(copy)))
    rewrite(copy, lambda tensors: [tensors.pop(name) for name in list(tensors) if "inv_freq" in name])
    assert language_model.fingerprint(language_model.load(str(copy))) == before


def test_the_mask_that_old_checkpoints_of_gpt2_hold_is_not_unexpected(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=8, bos_token_id=0, eos_token_id=0)).save_pretrained(tmp_path)
    constants = {"transformer.h.0.attn.bias": torch.ones(1, 1, 4, 4), "transformer.h.0.attn.masked_bias": torch.tensor(-1e4)}
    rewrite(tmp_path, lambda tensors: tensors.update(constants))
    language_model.load(str(tmp_path))
    rewrite(tmp_path, lambda tensors: tensors.update({"transformer.h.0.attn.c_attn.scale": torch.ones(1)}))
    with pytest.raises(EvaluatorError, match=r"1 unexpected \(transformer\.h\.0\.attn\.c_attn\.scale\)"):
        language_model.load(str(tmp_path))


def test_strict_loading_ends_with_its_block(copy: Path) -> None:
    from transformers import AutoModelForCausalLM, PreTrainedModel

    before = PreTrainedModel.__dict__["from_pretrained"]
    with pytest.raises(KeyError), language_model.strict_loading():
        answer: Any = AutoModelForCausalLM.from_pretrained(copy, output_loading_info=True)
        assert not answer[1]["missing_keys"]
        raise KeyError
    assert PreTrainedModel.__dict__["from_pretrained"] is before


def test_no_hub_is_asked_for_a_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    # given: a machine on which each way out is noticed, and no cache of the hub's own.
    monkeypatch.setattr("huggingface_hub.constants.AGENT_HARNESSES_PATH", str(tmp_path / "absent"), raising=False)
    asked: list[object] = []

    def ask(*words: object, **more: object) -> None:
        asked.append(words)
        raise OSError("no way out")

    monkeypatch.setattr("socket.socket.connect", ask)
    monkeypatch.setattr("socket.getaddrinfo", ask)
    monkeypatch.chdir(tmp_path)

    with pytest.raises(EvaluatorError, match="gpt2-of-nobody is not a Hugging Face directory"):
        language_model.load("gpt2-of-nobody")
    with language_model.strict_loading(), pytest.raises(OSError, match="cached files"):
        LlamaForCausalLM.from_pretrained("gpt2-of-nobody")
    with pytest.raises(EvaluatorError, match="the tokenizer of gpt2-of-nobody does not load"):
        language_model.load_tokenizer("gpt2-of-nobody")
    assert asked == []


@pytest.mark.parametrize("given", ["file", "directory"])
def test_a_config_can_be_given_for_a_checkpoint_that_carries_none(given: str, copy: Path, tmp_path: Path) -> None:
    apart = tmp_path / "apart"
    apart.mkdir()
    shutil.move(copy / "config.json", apart / "config.json")
    with pytest.raises(EvaluatorError, match=r"has no config\.json; give one with -E config="):
        language_model.load(str(copy))
    before = sorted(os.listdir(copy))

    model: Any = language_model.load(str(copy), config=str(apart / "config.json" if given == "file" else apart))

    assert model.config.num_hidden_layers == 2
    assert sorted(os.listdir(copy)) == before


def test_a_config_that_is_given_wins(copy: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    other.write_text(json.dumps(json.loads((copy / "config.json").read_text()) | {"num_hidden_layers": 1}))
    with pytest.raises(EvaluatorError, match=r"9 unexpected \(model\.layers\.1\."):
        language_model.load(str(copy), config=str(other))
    with pytest.raises(EvaluatorError, match=r"absent\.json is no file, nor a directory that holds a config\.json"):
        language_model.load(str(copy), config=str(tmp_path / "absent.json"))


def test_the_files_around_a_given_config_stay_the_checkpoints_own(copy: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "modeling_own.py").write_text("")
    (tmp_path / "tokenizer.json").write_text("not this one")
    with language_model.with_config(str(copy), str(tmp_path)) as folder:
        assert Path(folder, "config.json").read_text() == "{}"
        assert Path(folder, "modeling_own.py").exists()
        assert Path(folder, "tokenizer.json").read_bytes() == (copy / "tokenizer.json").read_bytes()
        assert Path(folder, "model.safetensors").resolve() == (copy / "model.safetensors").resolve()
    assert not os.path.exists(folder)
    assert (copy / "model.safetensors").exists()


@pytest.mark.parametrize(("asked", "got"), [(None, torch.bfloat16), ("auto", torch.bfloat16), ("float32", torch.float32)])
def test_the_dtype_is_the_configs_own_unless_asked(asked: str | None, got: torch.dtype, tmp_path: Path) -> None:
    write_llama(tmp_path, dtype=torch.bfloat16)
    assert next(language_model.load(str(tmp_path), dtype=asked).parameters()).dtype == got


def test_without_a_dtype_in_the_config_the_files_own_is_taken(tmp_path: Path) -> None:
    write_llama(tmp_path, dtype=torch.bfloat16)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({key: config[key] for key in config if key not in ("dtype", "torch_dtype")}))
    assert next(language_model.load(str(tmp_path)).parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"dtype": "float17"}, "dtype float17 is not known; give one of auto, float32, bfloat16, float16"),
        ({"device": "gpu"}, "device gpu is not known"),
        ({"device": "cuda:99"}, "device cuda:99"),
    ],
)
def test_a_word_that_is_not_known_is_an_error(words: dict[str, str], said: str, llama: Path) -> None:
    with pytest.raises(EvaluatorError) as raised:
        language_model.load(str(llama), **words)  # type: ignore[arg-type]
    assert str(raised.value).startswith(said)
    assert "\n" not in str(raised.value)


def test_a_config_of_no_known_model_is_an_error(copy: Path) -> None:
    (copy / "config.json").write_text('{"model_type": "nobody_s"}')
    with pytest.raises(EvaluatorError, match=r"does not load as a causal language model: ValueError: .*nobody_s"):
        language_model.load(str(copy))


def test_a_directory_without_weights_is_an_error(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    with pytest.raises(EvaluatorError, match=r"does not load as a causal language model: OSError: .*model\.safetensors"):
        language_model.load(str(copy))


def test_code_of_the_checkpoint_is_not_run_unless_asked(copy: Path, tmp_path: Path) -> None:
    config = json.loads((copy / "config.json").read_text()) | {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(EvaluatorError, match="trust_remote_code"):
        language_model.load(str(copy))
    assert not (tmp_path / "ran").exists()


def test_the_fingerprint_tells_weights_apart_and_nothing_else(llama: Path, copy: Path, tmp_path: Path) -> None:
    same = language_model.fingerprint(language_model.load(str(llama)))
    assert language_model.fingerprint(language_model.load(str(copy))) == same
    rewrite(copy, lambda tensors: tensors["model.norm.weight"].mul_(1.001))
    other = language_model.fingerprint(language_model.load(str(copy)))
    write_llama(tmp_path / "other", seed=1)
    third = language_model.fingerprint(language_model.load(str(tmp_path / "other")))
    half = language_model.fingerprint(language_model.load(str(llama), dtype="bfloat16"))
    assert len({same, other, third, half}) == 4


def test_the_fingerprint_takes_tensors_of_every_kind() -> None:
    module = torch.nn.Module()
    for number, dtype in enumerate((torch.bool, torch.int64, torch.float8_e4m3fn, torch.complex64, torch.bfloat16)):
        module.register_buffer(f"b{number}", torch.zeros(700).to(dtype))
    module.register_buffer("none", torch.zeros(0))
    module.register_buffer("one", torch.tensor(1.0))
    module.register_buffer("turned", torch.arange(600.0).reshape(20, 30).T)
    before = language_model.fingerprint(module)
    module.register_buffer("computed", torch.ones(3), persistent=False)
    assert language_model.fingerprint(module) == before
    module.get_buffer("b4")[-1] = 1
    assert language_model.fingerprint(module) != before
    assert language_model.fingerprint(torch.nn.Module()) != before


def test_the_tokenizer_is_the_one_given_else_the_checkpoints_else_the_runs(llama: Path, tmp_path: Path) -> None:
    run, merged = tmp_path / "run", tmp_path / "scratch" / "merged"
    original = run / "step-10"
    original.mkdir(parents=True)
    merged.mkdir(parents=True)
    place = language_model.tokenizer_place

    with pytest.raises(EvaluatorError, match=rf"^{original} has no tokenizer, nor has its run's directory; give one with -E tokenizer="):
        place(str(merged), str(original))
    # What lies around a scratch folder is nobody's.
    write_tokenizer(merged.parent)
    with pytest.raises(EvaluatorError):
        place(str(merged), str(original))
    write_tokenizer(run)
    assert place(str(merged), str(original)) == str(run)
    write_tokenizer(original / "huggingface")
    assert place(str(merged), str(original)) == str(original / "huggingface")
    write_tokenizer(merged)
    assert place(str(merged), str(original)) == str(merged)
    assert place(str(merged), str(original), str(llama)) == str(llama)
    assert place(str(merged), str(original), "someone/name") == "someone/name"


@pytest.mark.parametrize("given", ["/not/there", "./there", "a/b/c", ""])
def test_a_given_tokenizer_must_be_there(given: str, llama: Path) -> None:
    with pytest.raises(EvaluatorError, match="is not there"):
        language_model.tokenizer_place(str(llama), None, given)


def test_a_given_directory_must_hold_a_tokenizer(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "special_tokens_map.json").write_text("{}")
    with pytest.raises(EvaluatorError, match="is no directory with a tokenizer's files"):
        language_model.tokenizer_place(str(llama), None, str(tmp_path))


def test_the_tokenizer_is_loaded_and_a_broken_one_is_an_error(copy: Path) -> None:
    tokenizer = language_model.load_tokenizer(str(copy))
    assert tokenizer.decode(tokenizer("naïve 🦊")["input_ids"]) == "naïve 🦊"
    (copy / "tokenizer.json").write_text("{")
    with pytest.raises(EvaluatorError, match=r"the tokenizer of .* does not load"):
        language_model.load_tokenizer(str(copy))
