"""The command line: ``adamprox info`` and ``adamprox demo``, whose claims hold here."""

import json
import os
import resource
import subprocess
import sys

import pytest
import torch

from adamprox import _C, __version__, backends, demo, info
from adamprox.__main__ import COMMANDS, main
from adamprox.resnet import ResNet


def adamprox(*args):
    command = [sys.executable, "-m", "adamprox", *args]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("args", [[], *([name] for name in COMMANDS)], ids=" ".join)
def test_help(args, capsys):
    with pytest.raises(SystemExit) as end:
        main([*args, "--help"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: {' '.join(['adamprox', *args])}")
    assert args or all(name in out for name in COMMANDS)


def test_help_tells_the_defaults(capsys):
    with pytest.raises(SystemExit):
        main(["demo", "--help"])
    assert " ".join(capsys.readouterr().out.split()).count("(default: ") == 6


def test_version(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"adamprox {__version__}\n"


def test_commands_are_imported_only_when_asked_for():
    code = (
        "import sys; from adamprox.__main__ import main; code = main(['info']);"
        "assert 'adamprox.info' in sys.modules and 'adamprox.demo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "required: COMMAND"),
        (["no-such-command"], "invalid choice: 'no-such-command'"),
        (["info", "--no-such-option"], "unrecognized arguments: --no-such-option"),
        (["demo", "--epochs", "0"], "argument --epochs: '0' is not a positive int"),
        (["demo", "--epochs", "many"], "argument --epochs: 'many' is not a positive int"),
        (["demo", "--backend", "abacus"], "argument --backend: invalid choice: 'abacus'"),
        (["demo", "--device", "abacus"], "argument --device: 'abacus' cannot be used: "),
        (["demo", "--device", "meta"], "argument --device: 'meta' cannot be used: "),
        (["demo", "--json", "no/such/directory/rows.json"], "no such directory"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_arguments_are_named(args, message, capsys):
    with pytest.raises(SystemExit) as end:
        main(args)
    assert end.value.code != 0
    assert message in f"{capsys.readouterr().err}{end.value.code}"


def test_info_json():
    facts = json.loads(adamprox("info", "--json"))
    assert facts["adamprox"] == __version__
    assert facts["torch"] == torch.__version__
    assert facts["cpu"]["instruction_set"] in ("AVX-512", "AVX2", "baseline")
    assert facts["cpu"]["threads"] >= 1
    assert set(facts["backends"]) == {"cuda", "triton", *backends.BACKENDS}
    for backend in facts["backends"].values():
        assert backend["usable"] != bool(backend["reason"])
    assert facts["backends"]["cpu"]["usable"]


def test_info_tells_of_every_backend(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "10000")
    assert main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, backend in info.collect()["backends"].items():
        line = next(line for line in lines if f"backend {name}" in line)
        assert (backend["reason"] or "usable") in line


def test_info_tells_which_backend_is_asked_for(capsys, monkeypatch):
    monkeypatch.setenv("ADAMPROX_BACKEND", "triton")
    assert main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "triton" in next(line for line in lines if "ADAMPROX_BACKEND" in line)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("", "not set: the best that can run"),
        ("cpu", "cpu"),
        ("cuda", "ADAMPROX_BACKEND='cuda' cannot run: no GPU"),
        (
            "abacus",
            "Invalid ADAMPROX_BACKEND: 'abacus', expected one of cuda, triton, cpu, reference",
        ),
    ],
)
def test_info_tells_whether_the_backend_asked_for_can_run(name, text, capsys, monkeypatch):
    monkeypatch.setattr(backends.BACKENDS["cuda"], "why_not", lambda *_: "no GPU")
    monkeypatch.setenv("ADAMPROX_BACKEND", name)
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["info"]) == 0
    rows = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert rows["ADAMPROX_BACKEND"] == text


def test_info_tells_of_the_gpus(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a fine GPU")
    monkeypatch.setattr(info, "_driver_version", lambda: "580.1")
    monkeypatch.setattr(_C, "cuda_architectures", "90-real")
    monkeypatch.setattr(backends, "device_problem", lambda index: "no kernel image")
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert "no kernel image (built for 90-real)" in out
    assert "a fine GPU, compute capability 9.0, driver 580.1" in out


def test_instruction_set_is_what_this_cpu_has():
    if "ATEN_CPU_CAPABILITY" in os.environ:
        pytest.skip("torch tells what it was asked to use, not what there is")
    names = {"AVX512": "AVX-512", "AVX2": "AVX2"}
    capability = torch.backends.cpu.get_cpu_capability()
    assert _C.cpu_instruction_set() == names.get(capability, "baseline")


@pytest.mark.parametrize("package", ["sklearn", "tqdm"])
def test_demo_says_what_to_install(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit, match=rf"{package}.*please run: pip install .*{package[-5:]}"):
        main(["demo"])


# He et al. (2016), table 6; they count in millions.
@pytest.mark.parametrize(("layers", "params"), [(20, 0.27), (44, 0.66), (56, 0.85), (110, 1.7)])
def test_resnet_is_of_the_size_he_et_al_tell(layers, params):
    model = ResNet(layers)
    assert sum(p.dim() > 1 for p in model.parameters()) == layers
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(params, rel=0.02)


def test_resnet_keeps_its_shapes():
    assert ResNet(8, classes=7, channels_in=1)(torch.zeros(2, 1, 8, 8)).shape == (2, 7)


@pytest.mark.parametrize("layers", [2, 21])
def test_resnet_refuses_other_numbers_of_layers(layers):
    with pytest.raises(ValueError, match=f"Invalid number of layers: {layers}"):
        ResNet(layers)


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory):
    """One run of the whole demo: its rows by optimizer, its output, its CPU seconds."""

    def cpu_seconds():
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    path = tmp_path_factory.mktemp("demo") / "rows.json"
    before = cpu_seconds()
    out = adamprox("demo", "--json", str(path))
    seconds = cpu_seconds() - before
    rows = {row["optimizer"]: row for row in json.loads(path.read_text())}
    return rows, out, seconds


def test_demo_shows_every_optimizer(demo_run):
    rows, out, _ = demo_run
    optimizers = ["Adam", "AdamW", "AdamProx", "AdamProxL1", "AdamProxL2"]
    assert list(rows) == ["torch AdamW", "torch AdamW, fused", *optimizers, *demo.WISHES]
    for name, row in rows.items():
        assert name in out
        assert row["step_ms"] > 0
        assert row["speedup"] == rows["torch AdamW"]["step_ms"] / row["step_ms"]


def test_demo_takes_about_a_minute(demo_run):
    # Of CPU time, on its one thread. Cores that are shared are counted longer.
    assert demo_run[-1] < 240


@pytest.mark.parametrize("optimizer", ["torch AdamW", "AdamW", "AdamProx"])
def test_demo_reaches_95_percent(demo_run, optimizer):
    assert demo_run[0][optimizer]["accuracy"] >= 0.95


def test_demo_l1_zeroes_30_percent_for_two_points(demo_run):
    rows = demo_run[0]
    assert rows["AdamProxL1"]["zeros"] > 0.30
    assert rows["AdamW"]["zeros"] < 0.001
    assert rows["AdamProxL1"]["accuracy"] >= rows["AdamW"]["accuracy"] - 0.02


def test_demo_has_the_share_of_zeros_that_it_asks_for(demo_run):
    """Of weights; of rows, which here cost no more than three points."""
    rows = demo_run[0]
    weights, of_rows = (rows[name] for name in demo.WISHES)
    assert weights["zeros"] == pytest.approx(0.8, abs=0.01)
    assert of_rows["zero_rows"] == pytest.approx(0.3, abs=0.01)
    assert of_rows["accuracy"] >= rows["AdamW"]["accuracy"] - 0.03


def test_demo_gives_the_same_numbers_on_every_backend():
    def numbers(backend):
        out = adamprox("demo", "--epochs", "1", "--backend", backend, "--json")
        rows = json.loads(out)[2:]
        return [(row["accuracy"], row["training_loss"], row["zeros"]) for row in rows]

    of_cpu = numbers("cpu")
    assert len(of_cpu) == 5 + len(demo.WISHES)
    assert of_cpu == numbers("reference")


def test_demo_trains_on_the_same_split_whatever_the_seed():
    images = demo.load_images(torch.device("cpu"))
    assert len(images.test) == 450
    assert images.train.mean().item() == pytest.approx(0, abs=1e-6)
    assert images.train.std().item() == pytest.approx(1)
