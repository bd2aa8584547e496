"""The built-in evaluator lm_eval, with a real model, real tasks and real processes that are killed."""

import inspect
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from local_tasks import MULTIPLE_CHOICE, questions, write_lines, write_tasks

from assayer.errors import EvaluatorError
from assayer.evaluators import lm_eval
from assayer.harness import cache
from assayer.harness.answers import chunks_of
from assayer.harness.settings import settings_of

REPOSITORY = Path(__file__).resolve().parent.parent.parent


class Server:
    """Forks an evaluation for every order, as a worker does."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.model = str(root / "run" / "checkpoint-10")
        self.tasks = str(write_tasks(root / "tasks"))
        self.environment = {
            **{k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")},
            "XDG_CACHE_HOME": str(root / "cache"),
            "HF_HOME": str(root / "hf"),
            "HF_HUB_OFFLINE": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(REPOSITORY),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        self.log = (root / "log").open("w")
        command = [sys.executable, str(Path(__file__).parent / "evaluation_server.py")]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, env=self.environment, cwd=root
        )
        self.cold = self.answer()
        self.count = 0
        self.found: dict[str, Any] = {}
        self.save_model(Path(self.model))

    def answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, (self.root / "log").read_text()
        return json.loads(line)

    def tell(self, orders: Any) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(orders) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def arguments(self, **more: Any) -> dict[str, Any]:
        return {"tasks": "things,prose,answers", "include_path": self.tasks, "batch_size": 4, **more}

    def order(self, do: str = "evaluate", path: str | None = None, arguments: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
        self.count += 1
        arguments = self.arguments() if arguments is None else arguments
        return {"do": do, "path": path or self.model, "arguments": arguments, "out": str(self.root / f"out{self.count}"), **more}

    def run_all(self, orders: list[dict[str, Any]]) -> list[dict[str, Any] | int]:
        """Each order's answer, or the signal that ended it."""
        statuses = self.tell(orders)
        return [
            os.WTERMSIG(status) if os.WIFSIGNALED(status) else json.loads(Path(order["out"]).read_text())
            for status, order in zip(statuses, orders, strict=True)
        ]

    def run(self, *words: Any, **more: Any) -> Any:
        answer = self.run_all([self.order(*words, **more)])[0]
        assert isinstance(answer, int) or "bug" not in answer, answer
        return answer

    def save_model(self, folder: Path, **arguments: Any) -> str:
        self.run("save", path=str(folder), arguments=arguments)
        return str(folder)

    def warm(self) -> Any:
        """What the process is like after it has imported ahead all that an evaluation needs; done once."""
        if "warm" not in self.found:
            self.found["warm"] = self.tell("warm")
        return self.found["warm"]

    def undisturbed(self) -> Any:
        """One evaluation of the usual tasks from end to end, made once."""
        if "undisturbed" not in self.found:
            self.found["undisturbed"] = self.run()
        return self.found["undisturbed"]

    def copy_of_model(self, name: str) -> Path:
        return Path(shutil.copytree(self.model, self.root / name / "checkpoint-10"))

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(30)
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.log.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = Server(tmp_path_factory.mktemp("server"))
    yield made
    made.close()


def same(metrics: dict[str, float], others: dict[str, float], relative: float = 1e-6) -> bool:
    return metrics.keys() == others.keys() and all(
        math.isclose(v, others[k], rel_tol=relative, abs_tol=relative) for k, v in metrics.items()
    )


# --- the numbers ---


@pytest.mark.parametrize(
    "more",
    [{}, {"num_fewshot": 2, "limit": 7}, {"apply_chat_template": True, "num_fewshot": 1, "limit": 0.5}],
    ids=["as they are", "examples and a limit", "as a chat"],
)
def test_every_number_is_the_one_of_lm_evals_own_simple_evaluate(server: Server, more: dict[str, Any]) -> None:
    reference = server.run("reference", arguments=server.arguments(**more))["results"]

    ours = server.run(arguments=server.arguments(**more))["metrics"]

    named = {f"{task}/{key}": value for task, values in reference.items() for key, value in values.items()}
    assert same({name.replace(",none", ""): value for name, value in named.items()}, ours)
    assert 0 < ours["colours/acc_norm"] < 1
    assert ours["things/acc"] > 0
    assert ours["prose/word_perplexity"] > 1


def test_metrics_are_named_by_task_and_by_filter_only_where_there_are_several(server: Server) -> None:
    found = server.undisturbed()

    names = set(found["metrics"])

    assert {"colours/acc", "colours/acc_stderr", "things/acc", "things/acc_stderr", "prose/bits_per_byte"} <= names
    assert {"answers/exact_match,first-letter", "answers/exact_match_stderr,first-letter", "answers/exact_match,whole"} <= names
    assert "prose/bits_per_byte_stderr" not in names, "lm-eval has no number for it"
    facts = found["details"]
    assert facts["tasks"]["colours"] == {
        "version": 2.0,
        "samples": 24,
        "num_fewshot": 0,
        "higher_is_better": {"acc": True, "acc_norm": True},
    }
    assert set(facts["versions"]) == {"lm_eval", "transformers", "datasets"}
    assert len(facts["fingerprint"]) >= 16
    assert facts["parameters"] > 10_000


def test_samples_are_lines_with_their_tasks(server: Server, tmp_path: Path) -> None:
    samples = tmp_path / "checkpoint-10.samples.jsonl"

    found = server.run(arguments=server.arguments(log_samples=True), more={"samples_path": str(samples)})

    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    assert [line["task"] for line in lines].count("colours") == 24
    assert {line["filter"] for line in lines if line["task"] == "answers"} == {"first-letter", "whole"}
    assert found["details"]["samples"] == samples.name
    assert found["metrics"] == server.undisturbed()["metrics"]
    assert [p.name for p in tmp_path.iterdir()] == [samples.name]


# --- killed, and gone on with ---


def killed(server: Server, tmp_path: Path, arguments: dict[str, Any], kills: list[int]) -> Any:
    """The answer of the evaluation that ends at last, after one that was killed at each of these batches."""
    folder = str(tmp_path / "progress")
    for batch in kills:
        assert server.run(arguments=arguments, progress=folder, kill_at=batch) == signal.SIGKILL
    return server.run(arguments=arguments, progress=folder)


def test_an_evaluation_killed_three_times_ends_with_identical_numbers(server: Server, tmp_path: Path) -> None:
    arguments = server.arguments(batch_size=2)
    undisturbed = server.run(arguments=arguments, progress=str(tmp_path / "other"))

    resumed = killed(server, tmp_path, arguments, [30, 25, 24])

    assert resumed["metrics"] == undisturbed["metrics"]
    assert resumed["calls"] < undisturbed["calls"] - 45, "what was answered is not asked again"
    done, total = resumed["reports"][-1]
    assert done == total == 24 * 4 + 12 * 4 + 12 + 12
    assert resumed["reports"][0][0] > total // 2


def test_with_an_automatic_batch_size_the_numbers_are_those_of_an_undisturbed_run(server: Server, tmp_path: Path) -> None:
    arguments = server.arguments(batch_size="auto", model_args="max_batch_size=4")

    resumed = killed(server, tmp_path, arguments, [20, 20, 15])

    assert same(resumed["metrics"], server.undisturbed()["metrics"])


def test_what_is_drawn_at_random_is_drawn_again_after_a_kill(server: Server, tmp_path: Path) -> None:
    arguments = server.arguments(tasks="answers", gen_kwargs="do_sample=True,temperature=1.5", log_samples=True)
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    undisturbed = server.run(arguments=arguments, more={"samples_path": str(first)})
    folder = str(tmp_path / "progress")
    assert server.run(arguments=arguments, progress=folder, kill_at=3) == signal.SIGKILL

    resumed = server.run(arguments=arguments, progress=folder, more={"samples_path": str(second)})

    assert resumed["calls"] < undisturbed["calls"]
    assert first.read_text() == second.read_text()


LUCKY = """
task: lucky
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: ""
generation_kwargs: {{do_sample: true, temperature: 1.5, max_gen_toks: 4, until: ["\\n"]}}
process_results: !function lucky.process_results
metric_list: [{{metric: luck, aggregation: mean, higher_is_better: true}}]
"""


def test_what_a_task_draws_when_all_is_answered_is_drawn_again_after_a_kill(server: Server, tmp_path: Path) -> None:
    tasks = write_tasks(tmp_path / "tasks")
    data = write_lines(tasks / "lucky.jsonl", questions(6, seed=1))
    (tasks / "lucky.yaml").write_text(LUCKY.format(data=data))
    # As a task does that guesses where an answer cannot be read.
    (tasks / "lucky.py").write_text("import torch\n\ndef process_results(doc, results):\n    return {'luck': torch.rand(()).item()}\n")
    arguments = server.arguments(tasks="lucky,prose", include_path=str(tasks))
    folder = str(tmp_path / "progress")
    # What is generated takes two batches; the kill comes while prose is read.
    assert server.run(arguments=arguments, progress=folder, kill_at=4) == signal.SIGKILL

    assert server.run(arguments=arguments, progress=folder)["metrics"] == server.run(arguments=arguments)["metrics"]


def test_when_the_requests_are_others_nothing_old_is_taken(server: Server, tmp_path: Path) -> None:
    folder = str(tmp_path / "progress")
    assert server.run(arguments=server.arguments(tasks="colours"), progress=folder, kill_at=20) == signal.SIGKILL

    found = server.run(arguments=server.arguments(tasks="animals"), progress=folder)

    assert found["metrics"] == server.run(arguments=server.arguments(tasks="animals"))["metrics"]


def test_when_the_config_is_another_nothing_old_is_taken(server: Server, tmp_path: Path) -> None:
    folder, model = str(tmp_path / "progress"), server.copy_of_model("other config")
    right = (model / "config.json").read_text()
    (model / "config.json").write_text(json.dumps(json.loads(right) | {"rms_norm_eps": 1.0}))
    arguments = server.arguments(tasks="prose", batch_size=1)
    assert server.run(path=str(model), arguments=arguments, progress=folder, kill_at=9) == signal.SIGKILL
    (model / "config.json").write_text(right)

    found = server.run(path=str(model), arguments=arguments, progress=folder)

    assert found["metrics"] == server.run(arguments=arguments)["metrics"]


# --- several processes ---


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def group(server: Server, arguments: dict[str, Any], **more: Any) -> list[dict[str, Any]]:
    """The orders of two ranks."""
    port = free_port()
    places = [{"RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} for r in range(2)]
    return [server.order(arguments=arguments, environment=place, **more) for place in places]


def test_two_processes_give_the_numbers_of_one(server: Server, tmp_path: Path) -> None:
    # Data that no process has read before: both come to them at once.
    arguments = server.arguments(num_fewshot=2, batch_size=1, include_path=str(write_tasks(tmp_path / "tasks")))

    first, second = server.run_all(group(server, arguments))

    alone = server.run(arguments=arguments)
    assert isinstance(first, dict)
    assert isinstance(second, dict)
    assert first["metrics"] == alone["metrics"]
    assert second["metrics"] == {}
    assert abs(first["calls"] - second["calls"]) < alone["calls"] / 4, "both had their share"
    assert first["calls"] + second["calls"] == alone["calls"]


def test_two_processes_that_are_killed_go_on_from_a_point_that_both_have(server: Server, tmp_path: Path) -> None:
    arguments = server.arguments(batch_size=1)
    folder = tmp_path / "progress"
    orders = group(server, arguments, progress=str(folder))
    for order, batch in zip(orders, (30, 40), strict=True):
        order["kill_at"] = batch
    assert server.run_all(orders) == [signal.SIGKILL, signal.SIGKILL]
    saved = [{p.name.split("-")[0] for p in folder.glob(f"*-{rank}of2.*")} for rank in range(2)]
    point = max(map(int, saved[0] & saved[1]))

    first, second = server.run_all(group(server, arguments, progress=str(folder), point=point))

    alone = server.run(arguments=arguments)
    assert isinstance(first, dict)
    assert isinstance(second, dict)
    assert first["metrics"] == alone["metrics"]
    assert first["calls"] + second["calls"] < alone["calls"] - 40


@pytest.mark.slow
def test_under_torchrun_the_numbers_are_those_of_one_process(server: Server, tmp_path: Path) -> None:
    script = tmp_path / "rank.py"
    script.write_text(
        "import json, os, sys\nfrom assayer.evaluators import lm_eval\n"
        "found = lm_eval.evaluate(sys.argv[1], **json.loads(sys.argv[2]))\n"
        "open(f'{sys.argv[3]}.{os.environ[\"RANK\"]}', 'w').write(json.dumps(found))\n"
    )
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port(), str(script)]

    subprocess.run(
        [sys.executable, *command, server.model, json.dumps(server.arguments()), str(tmp_path / "out")],
        check=True,
        capture_output=True,
        env=server.environment,
    )

    assert json.loads((tmp_path / "out.0").read_text()) == server.undisturbed()["metrics"]
    assert json.loads((tmp_path / "out.1").read_text()) == {}


# --- built requests ---


def test_requests_are_built_once_and_shared_by_other_weights(server: Server, tmp_path: Path) -> None:
    other = server.save_model(tmp_path / "other", seed=1)
    place = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    samples = tmp_path / "samples.jsonl"

    first = server.run(environment=place, more={"samples_path": str(samples)})
    second = server.run(environment=place)
    third = server.run(path=other, environment=place)

    assert first["built"] == ["colours", "animals", "prose", "answers"]
    assert second["built"] == third["built"] == []
    assert first["metrics"] == second["metrics"] == server.undisturbed()["metrics"]
    assert third["metrics"] != first["metrics"]
    assert first["details"]["fingerprint"] == second["details"]["fingerprint"] != third["details"]["fingerprint"]
    assert not samples.exists(), "nobody asked for samples"
    folder = tmp_path / "cache" / "assayer" / "lm_eval"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert len(list(folder.iterdir())) == 4


def test_requests_are_built_anew_when_what_they_are_made_of_changes(server: Server, tmp_path: Path) -> None:
    tasks = write_tasks(tmp_path / "tasks")
    helper, description = tasks / "helper.py", tasks / "colours.yaml"
    helper.write_text("def text(doc):\n    return 'Please: ' + doc['question']\n")
    description.write_text(description.read_text().replace('"{{question}}"', "!function helper.text"))
    arguments = server.arguments(include_path=str(tasks), tasks="colours")
    assert server.run(arguments=arguments)["built"] == ["colours"]

    changes: list[Callable[[], object]] = [
        lambda: write_lines(tasks / "colours.jsonl", questions(24, seed=77)),
        lambda: helper.write_text(helper.read_text().replace("Please", "Now")),
        lambda: description.write_text(description.read_text().replace("!function helper.text", '"{{question}} so"')),
    ]
    for change in changes:
        change()
        found = server.run(arguments=arguments)
        assert found["built"] == ["colours"]
        reference = server.run("reference", arguments=arguments)["results"]["colours"]
        assert found["metrics"]["colours/acc_norm"] == reference["acc_norm,none"]

    assert server.run(arguments=arguments)["built"] == []


def test_a_torn_file_of_requests_is_built_anew(server: Server, tmp_path: Path) -> None:
    place = {"XDG_CACHE_HOME": str(tmp_path)}
    arguments = server.arguments(tasks="colours")
    whole = server.run(arguments=arguments, environment=place)
    (file,) = (tmp_path / "assayer" / "lm_eval").iterdir()

    for damaged in (b"", b"no requests", file.read_bytes()[:-9], zlib.compress(b'[["loglikelihood", 999, 0, 1, []]]')):
        file.write_bytes(damaged)
        again = server.run(arguments=arguments, environment=place)
        assert again["built"] == ["colours"]
        assert again["metrics"] == whole["metrics"]

    assert server.run(arguments=arguments, environment=place)["built"] == []


def test_two_evaluations_at_once_may_write_the_same_requests(server: Server, tmp_path: Path) -> None:
    place = {"XDG_CACHE_HOME": str(tmp_path)}
    orders = [server.order(environment=place) for _ in range(2)]

    found = server.run_all(orders)

    expected = server.undisturbed()["metrics"]
    assert all(isinstance(each, dict) and each["metrics"] == expected for each in found)
    assert len(list((tmp_path / "assayer" / "lm_eval").iterdir())) == 4


def test_what_was_longest_unused_makes_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for age, name in enumerate(("new", "used", "old", "oldest")):
        cache.keep(name, json.dumps(list(range(1000))))
        os.utime(cache.cache_folder() / name, (time.time() - age * 100, time.time() - age * 100))
    size = (cache.cache_folder() / "new").stat().st_size
    monkeypatch.setattr(cache, "KEPT_BYTES", 3 * size)

    assert cache.kept("oldest") == list(range(1000)), "to be read is to be used"
    cache.trim()

    assert {path.name for path in cache.cache_folder().iterdir()} == {"new", "used", "oldest"}


def test_what_was_not_used_for_a_month_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for days in (29, 31):
        cache.keep(str(days), "[]")
        os.utime(cache.cache_folder() / str(days), (0, time.time() - days * 86400))

    cache.trim()

    assert [path.name for path in cache.cache_folder().iterdir()] == ["29"]


# --- other models ---


def test_a_model_that_is_no_torch_module_is_asked_the_same_and_has_no_fingerprint(server: Server, tmp_path: Path) -> None:
    arguments = server.arguments(model="counting", model_args="tensor_parallel_size=2", batch_size=None)

    found = server.run(arguments=arguments, more={"samples_path": str(tmp_path / "s")}, progress=str(tmp_path / "progress"))

    assert "fingerprint" not in found["details"]
    assert found["details"]["model"] == "counting"
    assert found["metrics"]["colours/acc"] == server.run("reference", arguments=arguments)["results"]["colours"]["acc,none"]


# --- what is refused ---


def rewrite(folder: Path, change: Any) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_a_model_with_a_missing_tensor_is_refused(server: Server) -> None:
    folder = server.copy_of_model("missing")
    rewrite(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))

    assert "model.layers.1.mlp.up_proj.weight" in server.run(path=str(folder))["error"]


def test_a_model_with_a_tensor_too_many_is_refused(server: Server) -> None:
    folder = server.copy_of_model("unexpected")
    rewrite(folder, lambda tensors: tensors.update({"model.layers.9.mlp.up_proj.weight": tensors["lm_head.weight"].clone()}))

    assert "model.layers.9.mlp.up_proj.weight" in server.run(path=str(folder))["error"]


def test_a_path_that_does_not_exist_is_no_name_on_a_hub(server: Server) -> None:
    assert "nobody/model" in server.run(path="nobody/model")["error"]


def test_code_beside_the_config_runs_only_when_that_is_asked_for(server: Server) -> None:
    folder = server.copy_of_model("code")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "strange", "auto_map": {"AutoConfig": "strange.Strange"}}
    (folder / "config.json").write_text(json.dumps(config))
    ran = folder / "ran"
    (folder / "strange.py").write_text(f"open({str(ran)!r}, 'w').close()\nraise ValueError('it ran')\n")

    assert "error" in server.run(path=str(folder))
    assert not ran.exists()
    assert "it ran" in server.run(path=str(folder), arguments=server.arguments(trust_remote_code=True))["error"]
    assert ran.exists()


def without(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).unlink()
    return folder


def test_the_tokenizer_of_the_run_or_the_one_given_stands_in_for_a_missing_one(server: Server) -> None:
    files = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    bare = without(server.copy_of_model("bare"), *files)
    arguments = server.arguments(tasks="colours")

    assert "tokenizer" in server.run(path=str(bare), arguments=arguments)["error"]
    given = server.run(path=str(bare), arguments={**arguments, "tokenizer": server.model})
    for name in files:
        shutil.copy(Path(server.model, name), bare.parent / name)
    found = server.run(path=str(bare), arguments=arguments, more={"original_path": str(bare)})

    assert given["metrics"] == found["metrics"]
    assert given["built"] == found["built"] == []


def test_a_checkpoint_without_config_takes_the_one_given(server: Server) -> None:
    bare = without(server.copy_of_model("no_config"), "config.json")
    arguments = server.arguments(tasks="colours")

    assert "config" in server.run(path=str(bare), arguments=arguments)["error"]
    found = server.run(path=str(bare), arguments={**arguments, "config": str(Path(server.model, "config.json"))})

    assert found["metrics"] == server.run(arguments=arguments)["metrics"]


def test_before_weights_are_read_it_is_said_what_stands_around_them() -> None:
    lm_eval.check_files(["config.json", "tokenizer.json", "model.safetensors"], {})
    lm_eval.check_files(["model.safetensors"], {"tokenizer": "/somewhere", "config": "/somewhere"})

    with pytest.raises(EvaluatorError, match="tokenizer=DIRECTORY"):
        lm_eval.check_files(["config.json"], {})
    with pytest.raises(EvaluatorError, match="config=FILE"):
        lm_eval.check_files(["tokenizer.json"], {})


def test_a_name_that_lm_eval_does_not_know_is_told_with_the_nearest(server: Server) -> None:
    # It is read once, and not in each child.
    server.warm()

    error = server.run("check", arguments=server.arguments(tasks="hellaswagg,colour"))["error"]
    assert "hellaswagg" in error
    assert "hellaswag" in error.split("nearest to hellaswagg:")[1]
    assert "colours" in error.split("nearest to colour:")[1]
    assert "colours" in server.run("check", arguments=server.arguments(tasks="colour"))["error"].split("nearest:")[1]
    assert "vllm" in server.run("check", arguments=server.arguments(model="vlm"))["error"].split("nearest:")[1]
    assert server.run("check") == {}


def test_a_tokenizer_a_config_or_a_dtype_that_is_not_there_is_told_when_the_command_is_given(server: Server) -> None:
    for name, value in {"tokenizer": "/nowhere/at/all", "config": "/nowhere/at/all", "dtype": "float15"}.items():
        assert value in server.run("check", arguments=server.arguments(**{name: value}))["error"]


def test_a_service_is_no_model_of_a_checkpoint(server: Server) -> None:
    for model in ("local-completions", "dummy"):
        assert "does not load a checkpoint" in server.run("check", arguments=server.arguments(model=model))["error"]


def test_data_that_are_not_there_are_told_when_the_command_is_given(server: Server, tmp_path: Path) -> None:
    missing = MULTIPLE_CHOICE.format(name="lost", data=tmp_path / "lost.jsonl", train=tmp_path / "lost.jsonl")
    (tmp_path / "lost.yaml").write_text(missing)
    (tmp_path / "far.yaml").write_text("task: far\ndataset_path: nobody/nothing\ntest_split: test\ndoc_to_text: a\ndoc_to_target: b\n")
    (tmp_path / "torn.yaml").write_text("task: [torn\n")

    lost = server.run("check", arguments={"tasks": "lost", "include_path": str(tmp_path)})["error"]
    far = server.run(arguments={"tasks": "far", "include_path": str(tmp_path)})["error"]
    torn = server.run("check", arguments={"tasks": "torn", "include_path": str(tmp_path)})["error"]

    assert lost.startswith("task lost: its data set json cannot be loaded")
    assert far.startswith("task far: its data set nobody/nothing cannot be loaded and HF_HUB_OFFLINE is set")
    assert "torn.yaml cannot be read" in torn
    assert not any("\n" in text for text in (lost, far, torn))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"tasks": ""}, "at least one name"),
        ({"tasks": 3}, "names of tasks"),
        ({"num_fewshot": -1}, "a whole number"),
        ({"num_fewshot": True}, "a whole number"),
        ({"batch_size": 0}, "auto:N"),
        ({"batch_size": "automatic"}, "auto:N"),
        ({"limit": 0}, "share"),
        ({"limit": 2.5}, "share"),
        ({"include_path": "/nowhere/at/all"}, "no such folder"),
        ({"apply_chat_template": "perhaps"}, "true or false"),
        ({"model_args": "pretrained=gpt2"}, "the checkpoint's"),
        ({"model_args": {"peft": "x"}}, "the checkpoint's"),
        ({"model_args": "half"}, "name=value"),
        ({"gen_kwargs": 1}, "name=value"),
        ({"dtype": "float32", "model_args": "dtype=bfloat16"}, "given twice"),
        ({"tokenizer": ""}, "a word"),
    ],
)
def test_a_value_that_cannot_work_is_told_in_one_line(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(EvaluatorError, match=said) as raised:
        settings_of(arguments)
    assert "\n" not in str(raised.value)


def test_arguments_are_read_as_lm_evals_command_reads_them() -> None:
    settings = settings_of(
        {"tasks": "a, b,a", "gen_kwargs": "temperature=0.5,do_sample=True,until=x", "limit": 0.5, "batch_size": "auto:4"}
    )

    assert settings.tasks == ("a", "b")
    assert settings.gen_kwargs == {"temperature": 0.5, "do_sample": True, "until": "x"}
    assert (settings.limit, settings.batch_size, settings.trust_remote_code) == (0.5, "auto:4", False)


def test_the_readme_tells_of_every_argument_and_its_default() -> None:
    section = (REPOSITORY / "README.md").read_text().split("\n### Benchmarks: `lm_eval`\n")[1].split("\n### ")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \|.*\| ?([^|]*?) ?\|$", section, re.MULTILINE))

    parameters = inspect.signature(lm_eval.evaluate).parameters
    arguments = {name: p.default for name, p in parameters.items() if name not in lm_eval._NOT_ARGUMENTS}

    assert list(rows) == list(arguments)
    assert rows["model"] == f"`{arguments['model']}`"
    assert rows["tasks"].replace(" ", "") == arguments["tasks"]
    assert settings_of(arguments) == settings_of({}), "a default is written in one more place, and is the same there"


# --- chunks ---


class Request:
    def __init__(self, *args: Any) -> None:
        self.args = args


def test_chunks_hold_every_request_once_and_keep_a_context_together() -> None:
    requests = [Request("context " * (1 + number // 4 % 5) + str(number // 4), f" answer {number % 4}") for number in range(100)]

    chunks = chunks_of("loglikelihood", requests, 16)

    assert sorted(number for chunk in chunks for number in chunk) == list(range(100))
    assert all(len(chunk) <= 16 for chunk in chunks)
    assert all(len({number // 4 for number in chunk}) == len(chunk) / 4 for chunk in chunks)
    assert chunks == chunks_of("loglikelihood", requests, 16)


def test_a_context_with_more_continuations_than_a_chunk_holds_is_cut() -> None:
    chunks = chunks_of("loglikelihood", [Request("", f"answer {number}") for number in range(10)], 4)

    assert [len(chunk) for chunk in chunks] == [4, 4, 2]


def test_generations_with_other_arguments_share_no_chunk() -> None:
    requests = [Request("a" * number, {"temperature": number % 2}) for number in range(8)]

    chunks = chunks_of("generate_until", requests, 3)

    assert all(len({number % 2 for number in chunk}) == 1 for chunk in chunks)
    assert sorted(number for chunk in chunks for number in chunk) == list(range(8))


def test_a_long_text_weighs_as_many_windows_as_it_fills() -> None:
    chunks = chunks_of("loglikelihood_rolling", [Request("a" * 10_000), *(Request("a" * 10) for _ in range(6))], 4, length=100)

    assert [len(chunk) for chunk in chunks] == [1, 4, 2]


# --- the worker that forks ---


def test_what_is_imported_ahead_leaves_no_thread_of_python_and_no_cuda(server: Server) -> None:
    warm = server.warm()

    assert warm["threads"] == 1
    assert not warm["cuda"]
    assert server.run()["metrics"] == server.undisturbed()["metrics"]


@pytest.mark.slow
def test_the_kept_index_of_lm_evals_tasks_is_its_own(server: Server) -> None:
    server.warm()

    found = server.run("index")

    assert found["count"] > 1000
    assert found["other"] == found["more"] == []


def test_an_edited_task_is_taken_up_by_the_next_child(server: Server, tmp_path: Path) -> None:
    tasks = write_tasks(tmp_path / "tasks")
    arguments = server.arguments(include_path=str(tasks), tasks="colours")
    assert "colours/f1" not in server.run(arguments=arguments)["metrics"]
    path = tasks / "colours.yaml"

    path.write_text(path.read_text().replace("metric: acc_norm", "metric: acc_mutual_info"))

    assert "colours/acc_mutual_info" in server.run(arguments=arguments)["metrics"]
