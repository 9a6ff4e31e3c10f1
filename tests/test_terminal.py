"""What the commands print fits the terminal, and what they have finished is never lost."""

import dataclasses
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

import adamprox
from adamprox import demo, info
from adamprox.__main__ import main
from adamprox.bench import tables as bench_tables
from adamprox.bench.models import MODELS
from adamprox.bench.paper import store, training
from adamprox.bench.paper import tables as paper_tables
from adamprox.command_line import is_stream, write_whole
from adamprox.tables import table

DEMO = {
    **{"optimizer": "AdamProxL2 by rows", "weight_decay": 0.1234, "accuracy": 1.0},
    **{"training_loss": 12.345, "zeros": 1.0, "zero_rows": 1.0, "step_ms": 1234.567},
    **{"speedup": 12.3, "epochs": 100, "seed": 0, "device": "cuda:0", "backend": "reference"},
}
STEP = {
    **{"model": "GPT-2 small", "name": "AdamProxL2, tracked", "caches": "cold"},
    **{"p50_us": 1234567.8, "p20_us": 1134567.8, "p80_us": 2234567.8, "gb_per_s": 4123.4},
    **{"share_of_copy": 0.95, "times_as_fast_as_torch_fused": 12.34, "host_us": 12345.6},
    **{"within_host_budget": False, "host_us_per_tensor": 123.45, "host_in_step_us": 54321.0},
    "extra_bytes": 987654321,
}
PAPER = {
    **{"network": "DenseNet-BC-100", "optimizer": "AdamProxL1", "alpha": 0.0005, "seeds": 5},
    **{"test_error": 0.12345678, "test_error_min": 0.11111111, "test_error_max": 0.22222222},
    **{"zeros": 0.98765, "best": True},
}
TABLES = {
    "info": lambda: main(["info"]),
    "demo": lambda: demo._print([DEMO], as_json=False),
    "steps": lambda: bench_tables.print_steps([STEP, {**STEP, "model": "ResNet-218"}]),
    "sizes": lambda: bench_tables.print_sizes(
        [
            {"elements": 1 << 28, "name": name, "gb_per_s": 4123.4, "copy_gb_per_s": 4321.0}
            for name in ("torch default", "torch fused", "AdamW", "AdamProx", "AdamProxL2")
        ]
    ),
    "training": lambda: bench_tables.print_end_to_end(
        [
            {
                **{"network": "small GPT", "name": "torch default", "optimizer_ms": 12345.678},
                **{"forward_backward_ms": 123456.78, "share_of_step": 0.1234},
            }
        ]
    ),
    "memory": lambda: bench_tables.print_memory(
        [{"way": "adamprox.step_in_backward", "grad_bytes": 1 << 40, "peak_bytes": 1 << 41}]
    ),
    "names": lambda: bench_tables.print_names(
        [(name, len(model.shapes), model.numel) for name, model in MODELS.items()],
        {"bitsandbytes AdamW": "not installed: No module named 'bitsandbytes'"},
    ),
    "paper": lambda: paper_tables.print_table("Figure 3: test errors without BN", [PAPER]),
    "sparsity": lambda: print(
        adamprox.sparsity(
            torch.nn.ParameterDict({"a_layer_of_a_long_name": torch.eye(512).view(512, 16, 16, 2)})
        )
    ),
}
NUMBER = re.compile(r"\d+(?:[,.]\d+)*[%x]?")


@pytest.mark.parametrize("name", TABLES)
def test_a_table_fits_and_breaks_no_number(name, capsys, monkeypatch):
    numbers = None
    for width in (1000, 120, 80, 60):
        monkeypatch.setenv("COLUMNS", str(width))
        TABLES[name]()
        out = capsys.readouterr().out
        assert max(map(len, out.splitlines())) <= width
        assert all(line == line.rstrip() for line in out.splitlines())
        found = Counter(NUMBER.findall(out))
        numbers = numbers or found
        assert numbers - found == Counter(), out


def test_texts_are_folded_between_words_and_rows_become_paragraphs():
    rows = [("one", "a text of some words", "1,234"), ("three", "more", "5")]
    header = ("name", "what it is", "how many")
    wide, folded, paragraphs = (table(rows, header, width=width) for width in (80, 34, 25))
    assert wide.splitlines() == [
        "name   what it is            how many",
        "-------------------------------------",
        "one    a text of some words     1,234",
        "three  more                         5",
    ]
    assert folded.splitlines() == [
        "name   what it is              how",
        "                              many",
        "----------------------------------",
        "one    a text of some words  1,234",
        "three  more                      5",
    ]
    assert paragraphs.splitlines() == [
        *("one", "    what it is a text of", "    some words,", "    how many 1,234"),
        *("three", "    what it is more,", "    how many 5"),
    ]


@pytest.mark.parametrize("name", ["3", "fig3", "figure-3", "Figure 3", "fig. 3"])
def test_a_figure_may_be_called_so(name):
    from adamprox.bench.paper.command import _figure

    assert _figure(name) == "3"


def test_a_wrong_figure_is_answered_by_the_choices(capsys):
    with pytest.raises(SystemExit):
        main(["paper", "foo"])
    error = capsys.readouterr().err
    assert "invalid choice: 'foo' (choose from 1, 2, 3, " in error


def test_a_device_of_others_is_answered_by_what_works(capsys):
    with pytest.raises(SystemExit):
        main(["demo", "--device", "tpu"])
    assert "'tpu' cannot be used: it is neither cpu nor cuda" in capsys.readouterr().err


def test_a_reader_that_goes_away_is_no_error():
    command = f"{sys.executable} -c 'import adamprox.__main__ as m, sys; sys.exit(m.main())' info"
    shell = ["bash", "-c", f"{command} | true"]
    # Buffered, as it usually is: then the error comes at the end.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    result = subprocess.run(shell, capture_output=True, text=True, env=environment)
    assert result.stderr == ""


# What was finished is kept.

COMMANDS = {
    "demo": ["demo", "--epochs", "1", "--json", "{}/rows.json"],
    "bench": [
        *("bench", "--threads", "1", "--seconds", "0.2", "--parts", "steps", "--out", "{}"),
        *("--models", "400 x 16", "ViT-B/16", "--optimizers", "AdamW"),
    ],
    "paper": ["paper", "3", "--quick", "--epochs", "1", "--jobs", "1", "--out", "{}"],
}
FILES = {"demo": "rows.json", "bench": "cpu.csv", "paper": "cells.csv"}


def rows_of(file) -> int:
    """How many a file has; it is whole at any time."""
    text = file.read_text()
    return len(json.loads(text)) if file.suffix == ".json" else len(text.splitlines()) - 1


def command(name: str, folder) -> list[str]:
    arguments = [text.replace("{}", str(folder)) for text in COMMANDS[name]]
    return [sys.executable, "-m", "adamprox", *arguments]


def one_line(error: str, name: str) -> bool:
    lines = [line for line in error.splitlines() if line.strip()]
    return len(lines) == 1 and lines[0].startswith(f"adamprox {name}: error: ")


@pytest.mark.parametrize("name", COMMANDS)
def test_ctrl_c_keeps_what_was_finished(name, tmp_path):
    file = tmp_path / FILES[name]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(
        command(name, tmp_path), text=True, **pipes, preexec_fn=_not_ignoring
    ) as running:
        while not file.exists():
            assert running.poll() is None
            time.sleep(0.02)
        running.send_signal(signal.SIGINT)
        out, error = running.communicate()
    assert running.returncode == 1
    assert one_line(error, name), error
    assert "interrupted; " in error
    assert rows_of(file) >= 1
    assert "Traceback" not in out
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".new"] == []


def _not_ignoring() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def in_tmpfs(options: str, folder, script: str) -> subprocess.CompletedProcess:
    """Runs a shell script with a small file system at ``folder`` that it alone sees."""
    mount = f"mount -t tmpfs -o {options} tmpfs {folder} && {script}"
    isolated = ["unshare", "--mount", "--map-root-user", "sh", "-c", mount]
    return subprocess.run(isolated, capture_output=True, text=True)


def can_mount() -> bool:
    if not shutil.which("unshare"):
        return False
    return in_tmpfs("size=64k", "/mnt", "true").returncode == 0


mounts = pytest.mark.skipif(not can_mount(), reason="file systems cannot be mounted here")


@mounts
@pytest.mark.parametrize("name", COMMANDS)
def test_a_folder_that_cannot_be_written_to_is_found_out_first(name, tmp_path):
    start = time.monotonic()
    result = in_tmpfs("ro", tmp_path, " ".join(f"'{x}'" for x in command(name, tmp_path)))
    assert result.returncode == 1
    assert one_line(result.stderr, name), result.stderr
    assert "Read-only file system" in result.stderr
    assert result.stdout == ""
    assert time.monotonic() - start < 60


@mounts
@pytest.mark.parametrize("name", COMMANDS)
def test_a_full_disk_keeps_what_was_finished(name, tmp_path):
    """It fills once something is there."""
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    file, filler = disk / FILES[name], disk / "filler"
    run = " ".join(f"'{x}'" for x in command(name, disk))
    script = (
        f"({run}) & while [ ! -e {file} ] && kill -0 $!; do sleep 0.02; done; "
        f"cat /dev/zero > {filler} 2>/dev/null; wait $!; code=$?; cp {file} {kept}; exit $code"
    )
    result = in_tmpfs("size=64k", disk, script)
    assert result.returncode == 1, result.stdout
    assert one_line(result.stderr, name), result.stderr
    assert "No space left on device" in result.stderr
    kept = kept.rename(tmp_path / FILES[name])
    assert rows_of(kept) >= 1


def test_progress_without_a_terminal_is_lines(capsys):
    from adamprox.command_line import progress_bar

    with progress_bar(3, unit="step", desc="training") as bar:
        bar.delay = 0
        bar.mininterval = 0
        for _ in range(3):
            bar.update()
    lines = capsys.readouterr().err.split("\n")
    assert any("training" in line and "3/3" in line for line in lines)
    assert "\r" not in "".join(lines)


@pytest.mark.parametrize(
    ("seconds", "said"), [(5, ""), (1000, "figure: 10 trainings, about 3 h; what is finished")]
)
def test_trainings_of_over_a_minute_say_how_long(seconds, said, tmp_path, monkeypatch, capsys):
    result = training.Result(0.1, 0.1, 1.0, 0.0, 1.0, [], [], [], [])
    monkeypatch.setattr(store, "train", lambda *_: result)
    monkeypatch.setattr(store, "estimate", lambda *_: seconds)
    cell = training.Cell("digits", 8, "ResNet-8", 4, False, "AdamW", 0.1, 0.1, epochs=1)
    cells = store.Store(tmp_path)
    machine = store.Machine(torch.device("cpu"), 1)
    cells.fill([dataclasses.replace(cell, seed=seed) for seed in range(10)], machine, "figure")
    cells.close()
    error = capsys.readouterr().err
    assert said in error if said else "trainings" not in error
    assert len(cells) == 10


def test_an_estimate_is_of_all_steps(monkeypatch):
    """A step of 128 of 1,347 images takes a second here: its clock is read before and after it."""
    clock = iter((0.0, 50.0, 100.0, 101.0))
    monkeypatch.setattr(training.time, "perf_counter", lambda: next(clock))
    cell = training.Cell("digits", 8, "ResNet-8", 4, False, "AdamW", 0.1, 0.1, epochs=20)
    assert training.estimate(cell, torch.device("cpu")) == pytest.approx(20 * 1347 / 128)


def test_info_tells_what_was_built(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "10000")
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    facts = info.collect()
    assert facts["cpu"]["compiler"] in out
    if not facts["cuda_architectures"]:
        from adamprox import _C

        assert f"adamprox was built without CUDA: {_C.cuda_problem}" in out
        assert _C.cuda_problem
    assert os.environ.get("ADAMPROX_BACKEND") == facts["ADAMPROX_BACKEND"]


def test_a_missing_compiler_is_named(tmp_path):
    pytest.importorskip("setuptools")
    script = Path(__file__).parents[1] / "setup.py"
    environment = {**os.environ, "PATH": str(tmp_path), "CXX": "", "CMAKE_ARGS": ""}
    build = [sys.executable, script, "bdist_wheel"]
    result = subprocess.run(build, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.startswith("adamprox is compiled, and no C++ compiler was found.")
    assert len(result.stderr.splitlines()) == 1


def setup_of(monkeypatch, tmp_path, compilers, pythons="g++", **variables):
    """What setup.py makes of these compilers on the path, where Python was built by ``pythons``."""
    setuptools = pytest.importorskip("setuptools")
    for name in compilers:
        (tmp_path / name).touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CXX", "CMAKE_ARGS"):
        monkeypatch.setenv(name, "")  # so that what setup.py sets is taken back
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["setup.py", "bdist_wheel"])
    monkeypatch.setattr(sysconfig, "get_config_var", {"CXX": pythons}.get)
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    runpy.run_path(str(Path(__file__).parents[1] / "setup.py"))
    return os.environ.get("CXX")


@pytest.mark.parametrize(
    ("compilers", "expected"),
    [
        (["g++"], None),
        (["clang++"], "clang++"),
        (["c++", "clang++"], "c++"),
        (["g++", "c++"], None),
    ],
)
def test_the_build_takes_a_compiler_that_is_there(compilers, expected, monkeypatch, tmp_path):
    assert setup_of(monkeypatch, tmp_path, compilers, "g++ -pthread") == expected


def test_a_compiler_that_is_named_is_not_looked_for(monkeypatch, tmp_path):
    for named in ("-DCMAKE_CXX_COMPILER=/opt/g++-12", "-D CMAKE_CXX_COMPILER:PATH=/opt/g++-12"):
        assert setup_of(monkeypatch, tmp_path, [], CMAKE_ARGS=named) is None
    assert setup_of(monkeypatch, tmp_path, [], CXX="icpx") == "icpx"
    launcher = "-DCMAKE_CXX_COMPILER_LAUNCHER=ccache"
    assert setup_of(monkeypatch, tmp_path, ["clang++"], CMAKE_ARGS=launcher) == "clang++"


def test_a_file_is_replaced_and_a_stream_written_to(tmp_path):
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_text("old")
    link.symlink_to(file)
    write_whole(link, "new")
    assert link.is_symlink()
    assert file.read_text() == "new"
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_whole(pipe, "text")
        assert os.read(reader, 10) == b"text"
    finally:
        os.close(reader)
    assert pipe.is_fifo()
    assert is_stream(Path("/dev/stdout"))
    assert not is_stream(tmp_path / "new")
