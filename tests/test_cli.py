"""The command line: bad input is answered with one clear message, and the main job does what the contract says."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import optuna
import pytest
import safetensors.torch
import torch
from torch.utils.flop_counter import FlopCounterMode

import amc
from amc.data import load_data
from amc.weights import load_weights
from search.cli import main
from search.settings import Settings, settings_from
from search.trust import allow

ROOT = Path(__file__).parent.parent
QUICK = ["--trials", "6", "--score-steps", "4", "--finetune-epochs", "2", "--quiet"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The main job on the embedded data, in a short form."""
    out = tmp_path_factory.mktemp("runs") / "main job"
    assert main(["--budget", "flops=0.5,params=0.6", "--out", str(out), *QUICK]) == 0
    return out


@pytest.fixture(scope="module")
def result(run) -> dict:
    return json.loads((run / "result.json").read_text())


def test_help_imports_no_torch_and_lists_every_name():
    code = "import sys; from search.cli import main\ntry: main(['--help'])\nfinally: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("False\n")
    for word in ("ddpg", "nsga2", "accuracy_latency", "bn_scale", "resnet56", "apply", "--budget"):
        assert word in done.stdout


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--budget", "flops=1.7"], "must be in (0, 1]"),
        (["--budget", "flops=0.00001"], "lowest reachable: flops=0.0"),
        (["--budget", "flop=0.5"], "did you mean 'flops'"),
        (["--budget", "energy=0.5"], "unknown"),
        ([], "--budget is required"),
        (["--budget", "flops=0.5", "--weights", "missing.pt"], "missing.pt"),
        (["--budget", "flops=0.5", "--strategy", "foo"], "ddpg, td3, nsga2"),
        (["--budget", "flops=0.5", "--strategy", "ddgp"], "did you mean 'ddpg'"),
        (["--budget", "flops=0.5", "--model", "resnet21"], "or 'resnet20'"),
        (["--budget", "flops=0.5", "--model", "missing.py:net"], "missing.py"),
        (["--budget", "flops=0.5", "--data", "imagefolder:/missing"], "/missing"),
        (["--budget", "flops=0.5", "--trials", "0"], "--trials '0'"),
        (["--budget", "flops=0.5", "--seed", "4294967296"], "write a whole number from 0 to 4294967295"),
        (["--budget", "flops=0.5", "--latency-threads", "3000000000"], "a whole number from 1 to 1024"),
        (["--budget", "flops=0.5", "--mean", "nan"], "--mean 'nan'"),
        (["--budget", "flops=0.5", "--std", "1e-300"], "--std '1e-300'"),
        (["--budget", "params=700"], "write params=0.7k, say"),
        (["--budget", "flops=0.5", "--time-limit", "soon"], "--time-limit 'soon'"),
        (["--budget", "flops=0.5", "--accelerator", "gpu9"], "--accelerator 'gpu9'"),
        (["--budget", "flops=0.5", "--augment", "warp"], "--augment 'warp'"),
        (["--budget", "flops=0.5", "--precision", "bf16"], "did you mean 'bfloat16'"),
        (["--budget", "flops=0.5", "--reward", "latency"], "--reward 'latency'"),
        (["--budget", "flops=0.5", "--resume"], "--resume needs --out"),
        (["--buget", "flops=0.5"], "did you mean '--budget'"),
        (["serach"], "did you mean 'search'"),
        (["apply", "missing.json", "--out", "x"], "missing.json"),
    ],
)
def test_bad_input_gives_status_2_one_message_and_leaves_nothing(words, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*words, *(["--quiet"] if words[:1] != ["serach"] else [])]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert printed.err.startswith("amc: ")
    assert says in printed.err
    assert list(tmp_path.iterdir()) == []


def test_an_error_as_json_is_one_object(capsys):
    assert main(["--budget", "flops=1.7", "--json"]) == 2
    assert "must be in" in json.loads(capsys.readouterr().out)["error"]


def test_settings_in_python_are_left_out_by_none_and_may_be_arrays():
    assert settings_from({"seed": None, "strategy": None, "budget": None}) == Settings()
    assert settings_from({"mean": np.array([0.5, 0.25]), "seed": np.int64(3)}) == Settings(mean=(0.5, 0.25), seed=3)


def test_the_result_has_the_contracts_shape(run, result):
    parts = {"schema_version", "settings", "budget", "dense", "best", "uniform", "proxy", "search", "layers"}
    assert set(result) == parts
    figures = {"source", "accuracy", "test_accuracy", "flops", "params", "size", "memory"}
    figures |= {"latency_ms", "latency_predicted_ms"}
    for name in ("best", "uniform"):
        assert set(result[name]) == figures | {"speedup", "speedup_ci95", "widths"}
    assert result["best"]["source"] in ("search", "uniform")
    assert result["best"]["accuracy"] >= result["uniform"]["accuracy"]
    assert 0 < result["best"]["memory"] <= result["dense"]["memory"]
    assert result["search"]["trials"] == 6
    for limit in result["budget"]:
        assert limit["met"]
        assert limit["achieved"] <= limit["limit"] <= limit["fraction"] * result["dense"][limit["cost"]] + 1
    files = {"settings.json", "dense.safetensors", "dense.onnx", "run.log", "study.db", "policy.json"}
    files |= {"model.safetensors", "model.onnx", "result.json", "report.html"}
    assert files <= {path.name for path in run.iterdir()}
    assert not {path.name for path in run.iterdir()} - files - {"study.db-wal", "study.db-shm"}
    log = (run / "run.log").read_text()
    assert "INFO the dense model's accuracy on the search split: " in log
    assert "INFO trial 6: " in log


def test_costs_equal_a_recount_of_the_slim_model(run, result):
    slim = amc.load(run)
    counted = FlopCounterMode(display=False)
    with counted, torch.no_grad():
        slim(torch.zeros(1, 1, 8, 8))
    assert counted.get_total_flops() / 2 == result["best"]["flops"] == hooked_macs(slim)
    assert sum(p.numel() for p in slim.parameters()) == result["best"]["params"]
    assert (run / "model.safetensors").stat().st_size == result["best"]["size"]
    assert (run / "dense.safetensors").stat().st_size == result["dense"]["size"]


def test_the_layers_add_up_to_the_model(result):
    for model in ("dense", "best"):
        assert sum(layer[f"{model}_flops"] or 0 for layer in result["layers"]) == result[model]["flops"]
    layers = {layer["name"]: layer for layer in result["layers"]}
    weights = [f"{group}.{part}" for group in ("layer1.0", "layer2.0") for part in ("conv1", "conv2")]
    assert {"conv1", *weights} <= set(layers)
    assert all(layers[name]["dense_ms"] > 0 and layers[name]["best_ms"] > 0 for name in weights)


def hooked_macs(model: torch.nn.Module) -> int:
    total = 0

    def count(module, _, output):
        nonlocal total
        total += module.weight.numel() * output[0, 0].numel() if output.dim() == 4 else module.weight.numel()

    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            module.register_forward_hook(count)
    model(torch.zeros(1, 1, 8, 8))
    return total


def test_no_trial_in_the_study_exceeds_the_budget(run, result):
    study = optuna.load_study(study_name=None, storage=f"sqlite:///{run / 'study.db'}")
    limits = {limit["cost"]: limit["limit"] for limit in result["budget"]}
    assert len(study.trials) >= 6
    assert result["search"]["widths"] in [trial.params for trial in study.trials]
    for trial in study.trials:
        assert trial.params == trial.user_attrs["widths"]
        assert all(trial.user_attrs[cost] <= limit for cost, limit in limits.items())
        assert {"accuracy", "reward", "seconds", "size"} <= set(trial.user_attrs)


def test_torch_and_onnxruntime_agree_on_the_slim_model(run):
    images, labels = load_data("digits").test.batch(range(100))
    session = onnxruntime.InferenceSession(str(run / "model.onnx"))
    assert session.get_inputs()[0].shape[0] == "batch"
    theirs = session.run(None, {session.get_inputs()[0].name: images.numpy()})[0]
    with torch.no_grad():
        ours = amc.load(run)(images).numpy()
    assert np.abs(ours - theirs).max() < 1e-4
    assert (theirs.argmax(1) == labels.numpy()).mean() > 0.5


def test_apply_reproduces_the_slimmed_weights_bit_for_bit(run, tmp_path):
    words = ["apply", str(run / "policy.json"), "--weights", str(run / "dense.safetensors"), "--quiet"]
    for name in ("a", "b"):
        assert main([*words, "--out", str(tmp_path / name)]) == 0
    first = (tmp_path / "a" / "model.safetensors").read_bytes()
    assert first == (tmp_path / "b" / "model.safetensors").read_bytes()
    dense = safetensors.torch.load_file(run / "dense.safetensors")
    slim = safetensors.torch.load(first)
    policy = amc.load_policy(run / "policy.json")
    inner = [group for group in policy.groups if len(group.members) == 3]  # a block's: conv1, bn1 and conv2 alone
    assert inner
    for group in inner:
        weight = f"{group.name}.weight"
        read = next((other.kept for other in policy.groups if f"{group.name}:in" in other.members), slice(None))
        assert torch.equal(slim[weight], dense[weight][group.kept][:, read])
    assert (tmp_path / "a" / "policy.json").read_bytes() == (run / "policy.json").read_bytes()
    assert session_outputs(tmp_path / "a" / "model.onnx").shape == (2, 10)


def session_outputs(path: Path) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path))
    return session.run(None, {session.get_inputs()[0].name: np.zeros((2, 1, 8, 8), np.float32)})[0]


def test_apply_ranks_again_on_other_weights_and_says_so(run, tmp_path, capsys):
    torch.manual_seed(0)
    from amc.architectures import digits_resnet
    from amc.weights import save_weights

    save_weights(digits_resnet(), tmp_path / "other.safetensors")
    words = ["apply", str(run / "policy.json"), "--weights", str(tmp_path / "other.safetensors"), "--json"]
    assert main([*words, "--out", str(tmp_path / "out")]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["reranked"]
    assert printed["widths"] == amc.load_policy(run / "policy.json").widths


def test_apply_refuses_what_does_not_fit_and_writes_nothing(run, tmp_path, capsys):
    content = json.loads((run / "policy.json").read_text())
    content["groups"][0]["name"] = "layer1.0.convX"
    (tmp_path / "unknown.json").write_text(json.dumps(content))
    (tmp_path / "cut.json").write_text((run / "policy.json").read_text()[:500])
    for name, says in (("unknown.json", "lacks; did you mean"), ("cut.json", "not whole, valid JSON")):
        assert main(["apply", str(tmp_path / name), "--out", str(tmp_path / "out"), "--quiet"]) == 2
        assert says in capsys.readouterr().err
    words = ["apply", str(run / "policy.json"), "--model", "resnet20", "--out", str(tmp_path / "out"), "--quiet"]
    assert main(words) == 2
    assert "another structure" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_policy_runs_code_only_if_its_user_named_it(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("platformdirs.user_state_dir", lambda name: str(tmp_path.parent / f"{tmp_path.name}-state"))
    content = json.loads((run / "policy.json").read_text())
    content["model"]["name"] = "evil.py:net"
    (tmp_path / "policy.json").write_text(json.dumps(content))
    (tmp_path / "evil.py").write_text("import pathlib; pathlib.Path('ran').touch()")
    assert main(["apply", "policy.json", "--out", "slim", "--force", "--quiet"]) == 2
    assert "if you know it, give it: --model evil.py:net" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evil.py", "policy.json"]
    allow(tmp_path, "evil.py:net")  # as a run that its user has started leaves it
    assert main(["apply", "policy.json", "--out", "slim", "--force", "--quiet"]) == 2
    assert (tmp_path / "ran").exists()


BRANCHING = """
from amc.architectures import digits_resnet

def net():
    print("a user's own words")
    model = digits_resnet()
    class Branching(type(model)):
        def forward(self, x):
            y = super().forward(x)
            return y if float(y.sum()) < 1e9 else -y
    model.__class__ = Branching
    return model
"""


def test_a_model_without_an_onnx_form_leaves_nothing_and_no_graph_on_the_screen(run, tmp_path, capsys):
    (tmp_path / "own.py").write_text(BRANCHING)
    words = ["apply", str(run / "policy.json"), f"--model={tmp_path / 'own.py'}:net", "--force", "--quiet"]
    assert main([*words, f"--out={tmp_path / 'out'}"]) == 2
    said = capsys.readouterr().err
    assert "can't be exported to ONNX" in said
    assert "graph():" not in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("words", [["apply", "POLICY", "--out"], ["sensitivity", "--out"]])
def test_a_place_that_cannot_be_written_is_told_before_any_work(run, words, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("search.compose.load_dense", lambda *a, **o: pytest.fail("work was done"))
    (tmp_path / "file").write_text("")
    words = [str(run / "policy.json") if word == "POLICY" else word for word in words]
    assert main([*words, str(tmp_path / "file" / "out"), "--quiet"]) == 2
    assert re.search(r"amc: --out .*file/out can't be written: Not a directory", capsys.readouterr().err)


def test_what_a_users_model_prints_is_not_on_standard_output_beside_json(tmp_path):
    (tmp_path / "own.py").write_text("import ctypes\nctypes.CDLL(None).printf(b'in C')\n" + BRANCHING)
    words = ["groups", f"--model={tmp_path / 'own.py'}:net", "--input-shape", "1", "1", "8", "8", "--json"]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    ran = subprocess.run([sys.executable, ROOT / "search.py", *words], capture_output=True, text=True, env=buffered)
    assert json.loads(ran.stdout)["groups"]
    assert "a user's own words" in ran.stderr
    assert "in C" in ran.stderr


def test_a_directory_in_use_is_refused_and_a_finished_run_says_so(run, capsys):
    before = {path: path.read_bytes() for path in run.iterdir() if path.suffix == ".json"}
    assert main(["--budget", "flops=0.5", "--out", str(run), *QUICK]) == 2
    assert "not empty" in capsys.readouterr().err
    assert main(["--out", str(run), "--resume"]) == 0
    assert "finished" in capsys.readouterr().err
    assert main(["--out", str(run), "--resume", "--seed", "5"]) == 2
    assert "--seed was 0" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in run.iterdir() if path.suffix == ".json"}


def test_equal_runs_give_equal_policy_files(tmp_path):
    for name in ("a", "b"):
        assert main(["--budget", "flops=0.4", "--strategy", "nsga2", "--out", str(tmp_path / name), *QUICK]) == 0
    assert (tmp_path / "a" / "policy.json").read_bytes() == (tmp_path / "b" / "policy.json").read_bytes()


def test_a_model_and_data_in_a_file_of_ones_own(tmp_path, capsys):
    (tmp_path / "own.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "def net():\n"
        "    conv = lambda a, b: nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU())\n"
        "    return nn.Sequential(conv(3, 8), conv(8, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))\n"
        "def data():\n"
        "    make = lambda n: [(torch.randn(3, 8, 8) + i % 2, i % 2) for i in range(n)]\n"
        "    return {'train': make(256), 'val': make(64), 'test': make(64)}\n"
    )
    spec = [f"--model={tmp_path / 'own.py'}:net", f"--data={tmp_path / 'own.py'}:data", "--budget=params=0.5"]
    assert main([*spec, "--out", str(tmp_path / "run"), *QUICK[:-1], "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert set(printed["best"]["widths"]) == {"0.0", "1.0"}
    assert printed["best"]["params"] <= 0.5 * printed["dense"]["params"]
    with pytest.raises(amc.AmcError, match="pass it as model"):
        amc.load(tmp_path / "run")
    slim = amc.load(tmp_path / "run", model=f"{tmp_path / 'own.py'}:net")
    load_weights(slim, tmp_path / "run" / "model.safetensors")


def test_a_users_own_packages_of_our_names_do_not_get_in_the_way(tmp_path):
    for name in ("amc", "envs", "latency", "search"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('the wrong package')")
    (tmp_path / "own.py").write_text(
        "from torch import nn\nimport helper_of_mine\n"
        "def net(): return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))\n"
    )
    (tmp_path / "helper_of_mine.py").write_text("")
    script = Path(sys.executable).with_name("amc")
    program = [str(script)] if script.exists() else [sys.executable, str(ROOT / "search.py")]
    words = ["--model", "own.py:net", "--budget", "flops=0.5", "--out", "run", "--strategy", "ddpg", *QUICK]
    done = subprocess.run([*program, *words], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_reader_that_has_seen_enough_ends_the_program_quietly():
    words = [
        sys.executable,
        str(ROOT / "search.py"),
        "groups",
        "--model",
        "resnet20",
        "--input-shape",
        "1",
        "3",
        "32",
        "32",
    ]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait() == 0


def test_the_settings_hold_the_normalization_that_was_used(run):
    used = json.loads((run / "settings.json").read_text())["resolved"]["normalization"]
    normalize = load_data("digits").val.normalize
    assert used == {"mean": list(normalize.mean), "std": list(normalize.std)}
