"""What a client may ask for: every word of a request is checked before it is a job."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from assayer.errors import ProtocolError
from assayer.evaluators import lm_eval
from assayer.formats import is_inside_checkpoint
from assayer.harness.settings import settings_of
from assayer.kept import Kept
from assayer.plan import Evaluator
from assayer.protocol import EvaluateRequest
from assayer.refs import Reference
from assayer.server.models import Model, Models, model_names
from assayer.server.order import Order, Rules, order
from assayer.server.paths import Roots
from assayer.worker.answer import with_path

OWN = Model("own", Evaluator("mine", Reference("/none/e.py", "mine", "/none")))
LMMS = Model("lmms_eval", Evaluator("qwen_vl", Reference("assayer.harness.lmms", "run", "/")))


def rules(tmp_path: Path, **fields: Any) -> Rules:
    return Rules(**{"roots": Roots(()), "results_dir": str(tmp_path / "results"), **fields})


def ask(rules: Rules, model: Model = OWN, **fields: Any) -> Order:
    request = EvaluateRequest.from_json({"model": model.evaluator.name, "tasks": ["t"], **fields})
    return order("00000000-0000-4000-8000-000000000000", request, model, rules)


def refusal(rules: Rules, model: Model = OWN, **fields: Any) -> tuple[int, Any]:
    with pytest.raises(ProtocolError) as caught:
        ask(rules, model, **fields)
    detail = caught.value.detail
    return caught.value.status, tuple(detail[0]["loc"]) if isinstance(detail, list) else detail


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    """A Hugging Face directory of one tensor."""
    from safetensors.torch import save_file

    path = tmp_path / "run" / "checkpoint-5"
    path.mkdir(parents=True)
    save_file({"w": torch.ones(2)}, path / "model.safetensors")
    (path / "config.json").write_text("{}")
    return path


def lm(name: str = "hf") -> Model:
    found = Models({}, Path("/")).find(name)
    assert found is not None
    return found


def test_models_are_known_without_importing_lm_eval() -> None:
    import subprocess
    import sys

    assert {"hf", "vllm"} <= set(model_names("lm_eval"))
    code = "import sys\nfrom assayer.server.models import model_names\nmodel_names('lm_eval')\nprint('lm_eval' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_a_request_for_lm_eval_becomes_the_evaluators_arguments(tmp_path: Path, hf: Path) -> None:
    given = {"pretrained": str(hf), "dtype": "float32", "num_gpus": 8, "batch_size": 16, "max_length": 64}
    made = ask(rules(tmp_path), lm(), model_args=given, num_fewshot=2, limit=10, gen_kwargs="temperature=0", log_samples=False)
    assert made.served.evaluator.arguments == {
        "tasks": ["t"],
        "model": "hf",
        "num_fewshot": 2,
        "batch_size": 16,
        "limit": 10,
        "gen_kwargs": "temperature=0",
        "log_samples": False,
        "dtype": "float32",
        "model_args": {"max_length": 64},
    }
    assert (made.served.checkpoint, made.served.step, made.served.merges) == (str(hf), 5, False)
    assert set(made.served.evaluator.arguments) <= set(lm_eval.evaluate.__kwdefaults__ or {})


def test_the_requests_own_batch_size_counts_before_the_models(tmp_path: Path, hf: Path) -> None:
    made = ask(rules(tmp_path), lm(), model_args={"model": str(hf), "batch_size": 256}, batch_size=1)
    assert made.served.evaluator.arguments["batch_size"] == 1


@pytest.mark.parametrize(
    ("fields", "loc"),
    [
        ({"tasks": ["/tmp/task.yaml"]}, ("body", "tasks", 0)),
        ({"tasks": ["x", "task.yaml"]}, ("body", "tasks", 1)),
        ({"tasks": ["--include_path=/tmp"]}, ("body", "tasks", 0)),
        ({"tasks": []}, ("body", "tasks")),
        ({"include_path": "/tmp"}, ("body", "model_args", "include_path")),
        ({"worker_cls": "os.system"}, ("body", "model_args", "worker_cls")),
        ({"x": {"y": [{"include_path": "/tmp"}]}}, ("body", "model_args", "x")),
        ({"trust_remote_code": True}, ("body", "model_args", "trust_remote_code")),
        ({"trust_remote_code": "True"}, ("body", "model_args", "trust_remote_code")),
        ({"gen_kwargs": "trust_remote_code=True"}, ("body", "gen_kwargs")),
    ],
)
@pytest.mark.parametrize("model", ["hf", "qwen_vl"])
def test_nothing_leads_to_code(tmp_path: Path, hf: Path, model: str, fields: dict[str, Any], loc: tuple[Any, ...]) -> None:
    kept = {name: value for name, value in fields.items() if name in ("tasks", "gen_kwargs")}
    given = {"pretrained": str(hf), **{name: value for name, value in fields.items() if name not in kept}}
    chosen = LMMS if model == "qwen_vl" else lm()
    assert refusal(rules(tmp_path), chosen, model_args=given, **kept) == (422, loc)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("weights_only", False),
        ("attn_implementation", "someone/kernel"),
        ("allow_all_kernels", True),
        ("scheduler_cls", "os.system"),
        ("distributed_executor_backend", "os.system"),
        ("compilation_config", {"backend": "os.system"}),
        ("max_length", {"a": 1}),
        ("chat_template_args", {"a": {"b": 1}}),
    ],
)
def test_of_lm_evals_models_a_client_may_give_what_is_on_a_list(tmp_path: Path, hf: Path, name: str, value: Any) -> None:
    given = {"pretrained": str(hf), "max_length": 64, name: value}
    assert refusal(rules(tmp_path), lm(), model_args=given) == (422, ("body", "model_args", name))
    made = ask(rules(tmp_path, model_args=frozenset({name})), lm(), model_args=given)
    assert made.served.evaluator.arguments["model_args"] == {"max_length": 64, name: value}, "its owner allows more"


@pytest.mark.parametrize(
    "text",
    [
        '{"custom_g\\u0065nerate": "/tmp/evil", "trust_remote_cod\\u0065": true}',
        '{"temperature": {"a": 1}}',
        '{"temperature": NaN}',
        "assistant_model=someone/model",
        "custom_generate=someone/model",
        "no pairs",
    ],
)
@pytest.mark.parametrize("model", ["hf", "qwen_vl"])
def test_of_generation_a_client_may_give_what_is_on_a_list(tmp_path: Path, hf: Path, model: str, text: str) -> None:
    chosen, given = LMMS if model == "qwen_vl" else lm(), {"pretrained": str(hf)}
    assert refusal(rules(tmp_path), chosen, model_args=given, gen_kwargs=text) == (422, ("body", "gen_kwargs"))
    for fine in ("temperature=0.5,do_sample=True,max_gen_toks=64", '{"until": ["a", "b"], "top_p": 0.9}'):
        assert ask(rules(tmp_path), chosen, model_args=given, gen_kwargs=fine).served.kind != "own"


def test_words_for_a_chat_template_and_an_attention_are_on_the_list(tmp_path: Path, hf: Path) -> None:
    given = {"attn_implementation": "sdpa", "chat_template_args": {"enable_thinking": False}, "think_end_token": "</think>"}
    assert ask(rules(tmp_path), lm(), model_args={"pretrained": str(hf), **given}).served.evaluator.arguments["model_args"] == given


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("magi_root", "evil"),
        ("repo", "/tmp/evil"),
        ("processor", "evil/repo"),
        ("scheduler", "os.system"),
        ("overrides", '{"backend":"x"}'),
        ("executor_backend", "x"),
        ("trust_remote_code", "no"),
    ],
)
def test_of_lmms_evals_models_nothing_may_lead_to_code(tmp_path: Path, hf: Path, name: str, value: Any) -> None:
    given = {"pretrained": str(hf), "min_pixels": 3136, "use_flash_attention_2": True, "dtype": "bfloat16", "fps": 1.5}
    assert ask(rules(tmp_path), LMMS, model_args=given).served.kind == "lmms_eval"
    assert refusal(rules(tmp_path), LMMS, model_args={**given, name: value}) == (422, ("body", "model_args", name))
    assert ask(rules(tmp_path, trust_remote_code=True), LMMS, model_args={**given, name: value.replace("/tmp/evil", "x")}).served.job


def test_lmms_evals_models_run_no_code_beside_weights_unless_the_owner_allows_it(tmp_path: Path, hf: Path) -> None:
    """Many of them trust what lies there, whatever they are told."""
    hub = {"pretrained": "someone/model"}
    assert refusal(rules(tmp_path), LMMS, model_args=hub) == (422, ("body", "model_args", "pretrained"))
    assert ask(rules(tmp_path, trust_remote_code=True), LMMS, model_args=hub).served.checkpoint == ""
    (hf / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": "t.T"}}')
    assert refusal(rules(tmp_path), LMMS, model_args={"pretrained": str(hf)}) == (422, ("body", "model_args"))
    assert ask(rules(tmp_path, trust_remote_code=True), LMMS, model_args={"pretrained": str(hf)}).served.checkpoint == str(hf)


def test_the_newest_of_a_folder_may_be_a_link_that_leads_out_of_the_roots(tmp_path: Path, hf: Path) -> None:
    inside = tmp_path / "root"
    inside.mkdir()
    (inside / "checkpoint-9").symlink_to(hf)
    rooted = rules(tmp_path, roots=Roots((str(inside),)))
    for path in (inside, inside / "checkpoint-9"):
        assert refusal(rooted, lmms_engine_kwargs={"model_path": str(path)})[0] == 403


def test_a_path_longer_than_any_is_none(tmp_path: Path, hf: Path) -> None:
    assert refusal(rules(tmp_path), model_args={"model": str(hf)}, output_dir="/q/" + "a/" * 5000)[0] == 422


def test_the_merged_path_goes_where_the_path_to_be_merged_stood() -> None:
    engine = {"model_path": "/run/checkpoint-5"}
    given = {"model_id_name": "/run/checkpoint-5/", "pretrained": "hub/base"}
    request = {"model_args": given, "lmms_engine_kwargs": engine}
    assert with_path(request, "/merged") == {"model_id_name": "/merged", "pretrained": "hub/base"}
    assert with_path({"model_args": {"model": "/a"}, "lmms_engine_kwargs": engine}, "/merged") == {"model": "/merged"}
    assert with_path({"model_args": None}, "/merged") == {"pretrained": "/merged"}
    assert with_path({"model_args": {"a": 1}}, None) == {"a": 1}


def test_what_a_training_keeps_is_the_checkpoint_of_its_first_name(tmp_path: Path, hf: Path) -> None:
    one = Kept.of(str(hf), "owner", "key")
    assert one.keep()
    whole = ask(rules(tmp_path), model_args={"model": str(hf)}).served
    served = ask(rules(tmp_path), model_args={"model": one.path}, lmms_engine_kwargs={"model_path": one.path}).served
    assert (served.checkpoint, served.identity, served.step, served.kept) == (str(hf), whole.identity, 5, one.path)
    shutil.rmtree(hf)
    assert ask(rules(tmp_path), model_args={"model": one.path}).served.checkpoint == str(hf)
    assert refusal(rules(tmp_path, roots=Roots((str(one.folder),))), model_args={"model": one.path})[0] == 403
    (Path(one.path) / "model.safetensors").unlink()
    (Path(one.path) / "model-00001-of-00002.safetensors").touch()
    assert refusal(rules(tmp_path), model_args={"model": one.path})[0] == 422, "what is missing never comes any more"


@pytest.mark.parametrize("name", ["global_step_20/actor/model_world_size_1_rank_0.pt", "step_20/model.pt"])
def test_what_is_kept_stands_where_its_first_name_says(tmp_path: Path, name: str) -> None:
    file = tmp_path / "run" / name
    file.parent.mkdir(parents=True)
    torch.save({"w": torch.ones(2)}, file)
    path = file.parent if "actor" in name else file
    if path.is_dir():
        (path / "huggingface").mkdir()
        (path / "huggingface" / "config.json").write_text("{}")
    one = Kept.of(str(path), str(tmp_path / "pending"), "key")
    assert one.keep()
    served = ask(rules(tmp_path), model_args={"pretrained": one.path}).served
    assert (served.checkpoint, served.step, served.kept) == (str(path), 20, one.path)


def test_numbers_as_upstreams_clients_write_them(tmp_path: Path, hf: Path) -> None:
    fields = {"batch_size": "8", "limit": -1, "gen_kwargs": '{"temperature": 0, "until": ["a"]}'}
    made = ask(rules(tmp_path), lm(), model_args={"pretrained": str(hf)}, **fields).served.evaluator.arguments
    settings = settings_of(made)
    assert (settings.batch_size, settings.limit, settings.gen_kwargs) == (8, None, {"temperature": 0, "until": ["a"]})


def test_code_beside_a_config_is_allowed_by_the_servers_owner_alone(tmp_path: Path, hf: Path) -> None:
    given = {"pretrained": str(hf), "trust_remote_code": True}
    made = ask(rules(tmp_path, trust_remote_code=True), lm(), model_args=given)
    assert made.served.evaluator.arguments["trust_remote_code"] is True
    assert "model_args" not in made.served.evaluator.arguments
    assert ask(rules(tmp_path), lm(), model_args={**given, "trust_remote_code": False}).served.kind == "lm_eval"


@pytest.mark.parametrize("value", ["a,trust_remote_code=True", "a\nb", ["x", "y"], {"a": 1, "b": 2}])
def test_a_value_for_lmms_eval_cannot_pass_for_another(tmp_path: Path, value: Any) -> None:
    assert refusal(rules(tmp_path), LMMS, model_args={"a": value}) == (422, ("body", "model_args", "a"))
    assert refusal(rules(tmp_path), LMMS, model_args={"a=b,c": 1})[0] == 422


def test_the_path_of_the_checkpoint_is_found_where_clients_put_it(tmp_path: Path, hf: Path) -> None:
    for name in ("pretrained", "model", "model_path"):
        assert ask(rules(tmp_path), model_args={name: str(hf)}).served.checkpoint == str(hf)
    assert ask(rules(tmp_path), lmms_engine_kwargs={"model_path": str(hf.parent)}).served.checkpoint == str(hf), "the newest in it"
    assert ask(rules(tmp_path)).served.checkpoint == ""
    assert ask(rules(tmp_path), model_args={"pretrained": "Qwen/Qwen2-VL-7B-Instruct"}).served.checkpoint == "", "a name on a hub"
    assert refusal(rules(tmp_path), model_args={"pretrained": str(tmp_path / "none")})[0] == 422
    assert refusal(rules(tmp_path), lm(), model_args={"pretrained": "gpt2"}) == (422, ("body", "model_args"))
    assert refusal(rules(tmp_path), model_args={"pretrained": "/a\0b"})[0] == 422
    assert refusal(rules(tmp_path), model_args={"pretrained": "/\ud800"})[0] == 422


def test_a_folder_that_no_format_knows_is_handed_over_as_it_lies(tmp_path: Path) -> None:
    made = ask(rules(tmp_path), model_args={"pretrained": str(tmp_path)})
    assert (made.served.checkpoint, made.served.format, made.served.merges, made.found) == (str(tmp_path), "", False, None)


def test_results_never_lie_inside_a_checkpoint(tmp_path: Path, hf: Path) -> None:
    other = hf.parent / "checkpoint-6"
    other.mkdir()
    for name in ("model.safetensors", "config.json"):
        (other / name).write_bytes((hf / name).read_bytes())
    for inside in (hf, hf / "eval", other / "a" / "b"):
        assert ask(rules(tmp_path), model_args={"model": str(hf)}, output_dir=str(inside)).served.output_dir is None
    assert ask(rules(tmp_path), model_args={"model": str(hf)}, output_dir=str(tmp_path / "out")).served.output_dir == str(tmp_path / "out")
    (tmp_path / "link").symlink_to(hf)
    assert is_inside_checkpoint(str(tmp_path / "link" / "eval"), "")
    assert not is_inside_checkpoint(str(hf.parent / "checkpoint-50"), str(hf))


def test_a_checkpoint_that_is_not_whole_is_asked_for_again_later(tmp_path: Path) -> None:
    path = tmp_path / "step_5"
    path.mkdir()
    (path / "__0_0.distcp").write_bytes(b"x")
    status, said = refusal(rules(tmp_path), model_args={"pretrained": str(path)})
    assert status == 503
    assert "is not whole yet" in said


def test_weights_that_are_not_there_are_refused(tmp_path: Path, hf: Path) -> None:
    engine = {"model_path": str(hf), "checkpoint_type": "ema"}
    assert refusal(rules(tmp_path), lmms_engine_kwargs=engine) == (422, ("body", "lmms_engine_kwargs", "checkpoint_type"))


def test_a_record_that_cannot_be_beside_its_checkpoint_goes_elsewhere(tmp_path: Path, hf: Path) -> None:
    made = ask(rules(tmp_path, roots=Roots((str(hf),))), model_args={"model": str(hf)})
    assert made.served.results_dir == str(tmp_path / "results"), "evals/ would lie outside of the root"
    assert ask(rules(tmp_path, roots=Roots((str(tmp_path),))), model_args={"model": str(hf)}).served.results_dir is None


def test_no_request_raises_anything_but_a_refusal(tmp_path: Path, hf: Path) -> None:
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies
    words = st.one_of(
        st.sampled_from(
            [str(hf), str(tmp_path), "/", "~", "..", "", "\0", "\ud800", "/proc/self/mem", "/dev/null", "a" * 5000, f"{hf}/config.json"]
        ),
        st.text(max_size=8),
    )
    plain = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), words)
    nested = st.recursive(
        plain, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(words, inner, max_size=3)), max_leaves=5
    )
    keys = st.one_of(st.sampled_from(["pretrained", "model", "model_path", "tokenizer", "config", "batch_size", "dtype"]), words)
    engine = st.fixed_dictionaries({"model_path": words, "output_path": st.one_of(st.none(), words)})
    bodies = st.fixed_dictionaries(
        {"tasks": st.lists(words, max_size=3)},
        optional={
            "model_args": st.dictionaries(keys, nested, max_size=4),
            "limit": plain,
            "num_fewshot": plain,
            "batch_size": plain,
            "gen_kwargs": words,
            "output_dir": words,
            "num_gpus": plain,
            "lmms_engine_kwargs": engine,
        },
    )
    chosen = rules(tmp_path)
    rooted = rules(tmp_path, roots=Roots((str(tmp_path),)))
    seen = set()

    def check(body: dict[str, Any], model: Model, which: Rules) -> None:
        try:
            ask(which, model, **body)
            seen.add(200)
        except ProtocolError as error:
            assert error.status in (403, 422, 503)
            seen.add(error.status)

    how = hypothesis.settings(
        max_examples=150, deadline=None, database=None, derandomize=True, suppress_health_check=list(hypothesis.HealthCheck)
    )
    given = hypothesis.given(body=bodies, model=st.sampled_from([OWN, LMMS, lm()]), which=st.sampled_from([chosen, rooted]))
    how(given(check))()
    assert {200, 422} <= seen
