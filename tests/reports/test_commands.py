"""Every command: its flags, its first line, how it is stopped, and what it refuses before the work.

Users of kindred command lines met each of these: a stop that loses the run, two runs in one folder,
an output that is found to be a file after hours, help that exits with a status of failure.

Reported of kindred projects: huggingface/transformers 35033, Lightning-AI/pytorch-lightning 2095
(Ctrl-C), google-deepmind/alphafold3 656 ("Unable to initialize backend 'tpu'").
"""

import os
import re
import signal
import subprocess
import sys
import time
import typing
from pathlib import Path

import pytest

from experiments import command, files, settings
from experiments.attack.config import Config as AttackConfig
from experiments.finetune import config as finetune
from zoqo_jax.grids.projection import Rounding
from zoqo_jax.transforms.caq_zo import Query

_ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(_ROOT / "tests"))
import tiny_model  # noqa: E402

_HELP = {  # what each command's help lists first and must be given
    "experiments.finetune": ("model", ["model", "output"]),
    "experiments.attack": ("bits", []),
    "experiments.finetune.score": ("model", ["model"]),
    "experiments.finetune.replay": ("log", ["log", "model", "output"]),
}


def start(*words, **options):
    line = [sys.executable, "-m", *words]
    return subprocess.Popen(line, cwd=_ROOT, text=True, stderr=subprocess.PIPE, **options)


def run(*words):
    child = start(*words, stdout=subprocess.PIPE)
    out, err = child.communicate()
    return child.returncode, out, err


@pytest.mark.parametrize("name", _HELP)
def test_help_lists_all_in_order_and_ends_well(name):
    status, out, err = run(name, "--help")
    first, required = _HELP[name]
    listed = re.findall(r"^  --(?:\[no\])?(\w+)", out, re.MULTILINE)
    assert (status, err, listed[0]) == (0, "", first)
    assert re.findall(r"^  --(\w+)=\.\.\.  \(required\)", out, re.MULTILINE) == required


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["--learning-rate=-1"], "--learning-rate must be finite and not negative, got -1.0."),
        (["--learning_rate=x"], "--learning_rate must be a finite number, got 'x'."),
        (["--learning_rate=nan"], "--learning_rate must be a finite number, got 'nan'."),
        (["--budget"], "Missing value for flag --budget"),
        (["--budget="], "--budget must not be empty."),
        (["--dataset="], "--dataset must not be empty."),
        (["--seed=1.5"], "--seed must be a whole number, got '1.5'."),
        (["--targeted=maybe"], "--targeted must be true or false, got 'maybe'."),
        (["--loss=hinge"], "--loss must be one of ('margin', 'cross_entropy'), got 'hinge'."),
        (["--lerning_rate=1"], "unknown flag --lerning_rate: is it --learning_rate?"),
        (["more"], "unknown argument 'more'"),
        (["--seed=1", "more"], "unknown argument 'more'"),
        (["--weights", "--seed=1"], "--weights needs a value, got the flag '--seed=1'."),
    ],
)
def test_a_wrong_line_is_one_line_that_names_the_flag(line, message):
    line = settings.Line(line, [AttackConfig])
    with pytest.raises(ValueError) as error:
        line.settings()
    said = line.typed(str(error.value))
    assert said.startswith(message) and "\n" not in said


def test_flags_are_read_with_dashes_and_without():
    for one in (["--num-images=3", "--no-targeted"], ["--num_images", "3", "--notargeted"]):
        (config,) = settings.Line(one, [AttackConfig]).settings()
        assert (config.num_images, config.targeted) == (3, False)
    (config,) = settings.Line(settings.arguments(config), [AttackConfig]).settings()
    assert config.num_images == 3


def test_an_empty_list_is_refused_where_there_is_a_default():
    status, _, err = run("experiments.attack", "--bits=")
    assert (status, err) == (2, "error: --bits must not be empty.\n")
    line = settings.Line(["--model=a", "--output=b", "--targets="], [finetune.Config])
    (config,) = line.settings()
    assert config.targets == ()


def test_choices_are_those_of_the_library():
    assert set(typing.get_args(finetune.Rounding)) == set(typing.get_args(Rounding))
    assert set(typing.get_args(finetune.Query)) == set(typing.get_args(Query))


def test_settings_as_used_have_no_default_left():
    for method in typing.get_args(finetune.Method):
        train = {"qzo": "scales"}.get(method, "lora")
        for bits in (2, 8):
            config = finetune.Config(model="m", output="o", train=train, method=method, bits=bits)
            used = config.used
            assert used["learning_rate"] > 0 and used.get("radius", 1) > 0
            assert used.get("density", 1) > 0 and used.get("structure") != "auto"
    for method in typing.get_args(AttackConfig.__annotations__["method"]):
        used = AttackConfig(method=method).used()
        assert min(used.learning_rate, used.radius, used.num_queries) > 0


def test_a_claimed_folder_names_the_process_and_a_kill_frees_it(tmp_path):
    program = (
        "import sys, time; from pathlib import Path; from experiments.files import claimed\n"
        f"with claimed('output', Path({str(tmp_path / 'run')!r})): print('in', flush=True); "
        "time.sleep(60)"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", program], cwd=_ROOT, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout.readline() == "in\n"
    refused = pytest.raises(ValueError, match=f"output: process {child.pid} is at work")
    with refused, files.claimed("output", tmp_path / "run"):
        pytest.fail("two at once")
    child.kill()
    child.communicate()
    with files.claimed("output", tmp_path / "run"):
        assert (tmp_path / "run" / ".lock").read_text() == str(os.getpid())
    assert not (tmp_path / "run" / ".lock").exists()


def test_unfit_outputs_are_refused_and_nothing_is_left(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("")
    for place, message in (
        (tmp_path / "file", "must be a folder, but .*file is a file"),
        (tmp_path / "file" / "run", "must be a folder, but .*file is a file"),
        (tmp_path / "full", "holds other things, such as 'thesis.txt'"),
        (Path("/proc/run"), "cannot write in /proc/run"),
    ):
        with pytest.raises(ValueError, match=f"output.* {message}"), files.claimed("output", place):
            pytest.fail("claimed")
    with pytest.raises(RuntimeError), files.claimed("output", tmp_path / "new" / "run"):
        raise RuntimeError
    assert {x.name for x in tmp_path.iterdir()} == {"file", "full"}
    assert [x.name for x in (tmp_path / "full").iterdir()] == ["thesis.txt"]


def test_a_stop_waits_for_what_must_be_whole():
    done = []
    with pytest.raises(KeyboardInterrupt), command.whole("two things"):
        signal.raise_signal(signal.SIGINT)
        done.append(1)
    assert done == [1]
    with pytest.raises(KeyboardInterrupt), command.whole("two things"):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        done.append(2)
    assert done == [1]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_stopped_before_its_first_checkpoint_goes_on(tmp_path, number):
    model = tiny_model.write_model(tmp_path / "tiny.gguf")
    examples = tiny_model.write_examples(tmp_path / "examples.jsonl")
    line = [
        "experiments.finetune", f"--model={model}", f"--data={examples}", "--batch_size=8",
        f"--output={tmp_path / 'run'}", "--steps=1000000", "--checkpoint_every=1000000",
        "--eval_every=1000000",
    ]  # fmt: skip
    child, began = start(*line), time.perf_counter()
    assert "fine-tuning" in child.stderr.readline()
    assert time.perf_counter() - began < 2
    while ", loss " not in child.stderr.readline():  # of a step that was done
        pass
    child.send_signal(number)
    rest = child.communicate()[1]
    assert child.returncode == 128 + number, rest
    kept = int(re.search(r"goes on from step (\d+) of 1000000", rest)[1])
    assert kept > 0 and " ".join(line[1:]) in rest
    child = start(*line)
    while "goes on from" not in (said := child.stderr.readline()):
        assert said, "it began anew"
    assert f"goes on from step {kept} of" in said
    child.kill()
    child.communicate()
