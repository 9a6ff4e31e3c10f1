"""What the benchmarks say of models, costs and peers, and what they write; never how fast it is."""

import csv
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import adamprox
from adamprox.__main__ import main
from adamprox.bench import contenders, cost, records, suite, timing
from adamprox.bench import steps as bench_steps
from adamprox.bench.captured import capture_steps
from adamprox.bench.cold import ColdStart
from adamprox.bench.end_to_end import NETWORKS
from adamprox.bench.models import MODELS, SHORT, SIZES, Model
from adamprox.bench.providers import NAMES, OURS, PEERS, VALUES, providers
from adamprox.bench.providers import SHORT as SHORT_PROVIDERS
from adamprox.bench.small_gpt import SmallGPT
from adamprox.bench.steps import Settings, caches_of, rows_of
from adamprox.bench.timing import COLD, EITHER, WARM, Step, Timing
from adamprox.resnet import ResNet

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
COLUMNS = (
    *(
        "caches",
        "p50_us",
        "p20_us",
        "p80_us",
        "gb_per_s",
        "share_of_copy",
        "times_as_fast_as_torch_fused",
    ),
    *("host_us", "host_us_per_tensor", "host_budget_us", "within_host_budget"),
    *("host_in_step_us", "extra_bytes"),
)


# As their papers, or torchvision's, transformers' and Meta's published weights count them.
@pytest.mark.parametrize(
    ("model", "elements"),
    {
        "ResNet-50": 25_557_032,
        "DenseNet-BC-100": 800_032,
        "ViT-B/16": 86_567_656,
        "GPT-2 small": 124_439_808,
        "GPT-2 XL": 1_557_611_200,
        "Llama 1B": 1_235_814_400,
        "Llama 7B": 6_738_415_616,
        "400 x 16": 6_400,
        "465 groups": 29_760,
        "10000 x 64": 640_000,
        "1000 x 1024": 1_024_000,
        "10 x 16 M": 167_772_160,
        "one tensor of 16 M": 16_777_216,
    }.items(),
)
def test_models_are_of_the_published_size(model, elements):
    assert MODELS[model].numel == elements


def test_resnet_218_has_the_shapes_of_the_network():
    biases = [(shape[0],) for shape in MODELS["ResNet-218 without BN"].shapes if len(shape) == 4]
    network = [tuple(param.shape) for param in ResNet(218).parameters()]
    assert sorted(MODELS["ResNet-218 without BN"].shapes) == sorted(network + biases)


def test_a_model_deals_its_params_out_to_its_groups():
    model = MODELS["465 groups"]
    params = model.params(CPU, torch.float32)
    groups = model.param_groups(params, lr=1.0)
    assert [group["params"] for group in groups] == [[param] for param in params]
    assert len({group["lr"] for group in groups}) == 465
    params = MODELS["400 x 16"].params(CPU, torch.float32)
    assert MODELS["400 x 16"].param_groups(params, lr=1.0) == [{"params": params, "lr": 1.0}]


@pytest.mark.parametrize(
    ("param", "state", "once", "twice", "amsgrad"),
    [
        (torch.float32, torch.float32, 28, 36, 36),
        (torch.bfloat16, torch.bfloat16, 14, 18, 18),
        (torch.bfloat16, torch.float32, 22, 26, 30),
    ],
    ids=["float32", "bfloat16", "bfloat16_float32"],
)
def test_bytes_per_element(param, state, once, twice, amsgrad):
    assert cost.bytes_per_element(param, [state, state]) == once
    assert cost.bytes_per_element(param, [state, state], second_sweep=True) == twice
    assert cost.bytes_per_element(param, [state, state, state]) == amsgrad


@pytest.mark.parametrize("optimizer", OURS)
@pytest.mark.parametrize(
    ("options", "per_element"), [({}, 28), ({"amsgrad": True}, 36)], ids=["", "amsgrad"]
)
def test_cost_is_read_from_the_states(optimizer, options, per_element):
    sizes = (1, cost.CHUNK_SIZE, cost.CHUNK_SIZE + 1)
    params = [torch.nn.Parameter(torch.zeros(size)) for size in sizes]
    for param in params:
        param.grad = torch.ones_like(param)
    made = getattr(adamprox, optimizer)(params, **options)
    made.step()
    shrunk = 8 * sizes[-1] if optimizer == "AdamProxL2" else 0
    assert cost.cost_of(made) == (per_element * sum(sizes) + shrunk, torch.float32)


def test_cost_of_a_scalar_does_not_count_its_counter():
    param = torch.nn.Parameter(torch.tensor(1.0))
    param.grad = torch.tensor(1.0)
    optimizer = torch.optim.AdamW([param])
    optimizer.step()
    assert cost.cost_of(optimizer) == (28, torch.float32)


def test_cost_of_compressed_states_is_unknown():
    param = torch.nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.AdamW([param])
    optimizer.state[param] = {"codes": torch.zeros(4, dtype=torch.uint8)}
    assert cost.cost_of(optimizer) is None


@pytest.mark.parametrize(
    ("optimizer", "backend", "capturable", "count"),
    [
        ("AdamProxL2", "cpu", False, 1),
        ("AdamProxL2", "triton", False, 2),
        ("AdamProxL2", "triton", True, 3),
        ("AdamW", "cuda", True, 2),
        ("AdamW", "reference", False, None),
    ],
)
def test_launches(optimizer, backend, capturable, count):
    made = getattr(adamprox, optimizer)([torch.nn.Parameter(torch.ones(1))], capturable=capturable)
    assert cost.launches(made, backend) == count


def test_peers_are_skipped_with_a_reason(monkeypatch):
    for peer in PEERS.values():
        monkeypatch.setitem(sys.modules, peer.module.partition(".")[0], None)
    found, skipped = providers(PEERS, CPU)
    assert not found
    assert skipped.keys() == PEERS.keys()
    for name, reason in skipped.items():
        on_cpu = "cpu" in PEERS[name].devices
        assert reason.startswith("not installed: " if on_cpu else "it runs on cuda tensors only")


def test_an_installed_peer_is_made_with_the_values_of_all(monkeypatch):
    monkeypatch.setattr(torch, "AdamW", torch.optim.AdamW, raising=False)
    monkeypatch.setitem(sys.modules, "optimi", torch)
    monkeypatch.setattr("adamprox.bench.providers._version", lambda module: f"of {module}")
    [peer], skipped = providers(["optimi AdamW"], CPU)
    assert not skipped
    assert (peer.provider, peer.version, peer.optimizer) == ("optimi", "of optimi", "AdamW")
    defaults = peer.make([torch.nn.Parameter(torch.zeros(1))]).defaults
    assert {key: defaults[key] for key in VALUES} == VALUES


def test_backends_of_ours_are_named_and_skipped_with_a_reason():
    found, skipped = providers(["AdamW"], CPU, ["cpu", "reference", "cuda"])
    assert [(p.name, p.backend) for p in found] == [
        ("AdamW", "cpu"),
        ("AdamW, reference", "reference"),
    ]
    assert skipped["AdamW, cuda"]


def test_a_graph_is_refused_without_a_gpu():
    found, skipped = providers(["AdamW, captured", "torch fused, captured"], CPU)
    assert not found
    assert skipped == dict.fromkeys(skipped, "a CUDA graph takes a GPU")
    assert len(skipped) == 2


def test_contenders_share_their_grads():
    found, _ = providers(["torch fused", "AdamProxL1"], CPU)
    made, skipped = contenders.contenders(
        MODELS["400 x 16"], found, CPU, contenders.DTYPES["float32"]
    )
    assert not skipped
    first, second = (
        [param for group in each.optimizer.param_groups for param in group["params"]]
        for each in made
    )
    for one, other in zip(first, second, strict=True):
        assert one is not other
        assert one.grad is other.grad


def test_states_of_another_dtype():
    found, _ = providers(["torch fused", "AdamW"], CPU)
    dtypes = contenders.DTYPES["bfloat16_float32"]
    [ours], skipped = contenders.contenders(MODELS["400 x 16"], found, CPU, dtypes)
    assert skipped == {"torch fused": "its states are bfloat16"}
    assert ours.cost == (22 * 6400, torch.float32)


def test_a_model_that_does_not_fit_is_refused(monkeypatch):
    monkeypatch.setattr(contenders, "available_bytes", lambda device: 100e9)
    float32 = contenders.DTYPES["float32"]
    contenders.check_memory(MODELS["Llama 1B"], 5, CPU, float32)
    with pytest.raises(MemoryError, match=r"5 optimizers need 458.2 GB together, of 100.0 GB"):
        contenders.check_memory(MODELS["Llama 7B"], 5, CPU, float32)
    assert contenders.available_bytes(CPU) > 0


@pytest.mark.parametrize(
    ("model", "dtype", "caches"),
    [
        ("400 x 16", "float32", (COLD, WARM)),
        ("465 groups", "float32", (COLD, WARM)),
        ("ResNet-218 without BN", "float32", (COLD,)),
        ("one tensor of 16 M", "float32", (EITHER,)),
        ("GPT-2 small", "bfloat16_float32", (EITHER,)),
        ("one tensor of 2^20", "float32", (COLD, WARM)),
        ("one tensor of 2^22", "float32", (COLD,)),
        ("one tensor of 2^22", "bfloat16", (COLD,)),
    ],
)
def test_caches_that_matter_to_a_model(model, dtype, caches):
    assert caches_of((MODELS | SIZES)[model], dtype) == caches


def small_optimizer():
    params = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2, 2))]
    for param in params:
        param.grad = torch.randn_like(param)
    return torch.optim.SGD([{"params": [param]} for param in params], lr=0.0), params


def test_a_cold_start_makes_new_grads_of_the_same_values_and_flushes():
    optimizer, params = small_optimizer()
    values = [param.grad.clone() for param in params]
    olds = [param.grad for param in params]  # kept alive, so that no address is used again
    buffer = torch.ones(2)
    start = ColdStart(optimizer, buffer)
    for flushed in (-1, 1):
        start()
        assert buffer.tolist() == 2 * [flushed]
        for param, value, old in zip(params, values, olds, strict=True):
            assert torch.equal(param.grad, value)
            assert param.grad.is_contiguous()
            assert param.grad.data_ptr() != old.data_ptr()
        olds = [param.grad for param in params]


def test_a_cold_start_leaves_the_grads_of_a_captured_step_where_they_are():
    optimizer, params = small_optimizer()
    grads = [param.grad for param in params]
    buffer = torch.ones(2)
    ColdStart(optimizer, buffer, new_grads=False)()
    assert all(param.grad is grad for param, grad in zip(params, grads, strict=True))
    assert buffer.tolist() == [-1, -1]
    assert not timing.is_captured(optimizer)
    capture_steps(optimizer)
    assert timing.is_captured(optimizer)


@pytest.mark.parametrize(
    ("caches", "before", "steps"),
    [(COLD, ["cold"], 1), (WARM, [], 1 + timing.UNTIMED), (EITHER, [], 1)],
)
def test_what_happens_before_a_timed_step(caches, before, steps, monkeypatch):
    happened = []
    optimizer, _ = small_optimizer()
    monkeypatch.setattr(optimizer, "step", lambda: happened.append("step"))
    monkeypatch.setattr(timing, "ColdStart", lambda *_, **__: lambda: happened.append("cold"))
    monkeypatch.setitem(timing.COPY_NUMEL, "cpu", 1)
    measured = timing.measure([optimizer], timing.Copy(CPU), 1e-6, caches)
    turns = len(measured.steps[0]) + timing.WARM_UP
    assert happened == turns * (before + steps * ["step"])


def test_rows_compute_what_they_say(monkeypatch):
    """From times made up: 2 ms for torch; 1 ms for ours, of which the host takes 300 us.

    On tensors of one element, it takes 60 us, or 200. In cold caches, all takes twice as long.
    """

    def measure(optimizers, copy, seconds, caches, advance=None):
        numels = [[p.numel() for p in o.param_groups[0]["params"]] for o in optimizers]
        if len(optimizers) == 2:
            assert caches == WARM
            assert numels == 2 * [[1] * 400]
            return Timing([4 * [Step(1e-3, 60e-6)], 4 * [Step(1e-3, 200e-6)]], [])
        assert numels == 3 * [[16] * 400]
        k = 2 if caches == COLD else 1
        steps = [Step(k * 2e-3, None)], *2 * ([Step(k * 1e-3, k * 300e-6)],)
        return Timing([4 * step for step in steps], [1e9, 2e9, 9e9])

    monkeypatch.setattr("adamprox.bench.steps.measure", measure)
    found, _ = providers(["torch fused", "AdamW", "AdamProx"], CPU)
    settings = Settings(CPU, "float32", seconds=1, copy=None, advance=None)
    rows, skipped = rows_of("400 x 16", MODELS["400 x 16"], found, settings, (COLD, WARM))
    assert not skipped
    assert [row["caches"] for row in rows] == [*3 * [COLD], *3 * [WARM]]
    assert [row["p50_us"] for row in rows] == [4000, 2000, 2000, 2000, 1000, 1000]
    assert rows[1]["host_in_step_us"] == 600
    assert rows[1]["host_us"] == rows[4]["host_us"]
    torch_fused, adamw, adamprox_ = rows[3:]
    assert torch_fused["times_as_fast_as_torch_fused"] == 1
    assert torch_fused["host_us"] is torch_fused["within_host_budget"] is None
    assert torch_fused["host_in_step_us"] is None
    assert adamw["bytes"] == 28 * 6400
    assert adamw["gb_per_s"] == round(28 * 6400 / 1e-3 / 1e9, 2)
    assert adamw["copy_gb_per_s"] == 2
    assert adamw["share_of_copy"] == round(28 * 6400 / 1e-3 / 2e9, 3)
    assert adamw["times_as_fast_as_torch_fused"] == 2
    assert adamw["p20_us"] == adamw["p50_us"] == adamw["p80_us"] == 1000
    assert adamw["host_us"] == 60
    assert adamw["host_us_per_tensor"] == 0.15
    assert adamw["host_budget_us"] == 0.25 * 400 + 15
    assert adamw["host_in_step_us"] == 300
    assert adamw["within_host_budget"]
    assert not adamprox_["within_host_budget"]


def test_small_gpt_is_causal():
    torch.manual_seed(0)
    model = SmallGPT(layers=1)
    ids = torch.randint(2048, (1, 8))
    changed = ids.clone()
    changed[0, 5] += 1
    differs = (model(ids) != model(changed)).any(dim=-1)[0]
    assert differs.tolist() == [False] * 5 + [True] * 3


def bench(out, *args):
    return main(["bench", "--threads", "1", "--seconds", "0.05", "--out", str(out), *args])


def test_command_writes_rows_and_a_picture(tmp_path, capsys):
    args = ["--models", "400 x 16", "--parts", "steps", "picture", "--json"]
    assert bench(tmp_path, *args) == 0
    results = json.loads(capsys.readouterr().out)
    assert [(row["caches"], row["name"]) for row in results["steps"]] == [
        (caches, name) for caches in (COLD, WARM) for name in SHORT_PROVIDERS
    ]
    for row in results["steps"]:
        assert {*COLUMNS, *records.provenance(CPU)} <= row.keys()
        assert row["steps"] >= 2
        assert row["p20_us"] <= row["p50_us"] <= row["p80_us"]
    assert bench(tmp_path, *args) == 0
    lines = (tmp_path / "cpu.csv").read_text().splitlines()
    assert len(lines) == 1 + 2 * 2 * len(SHORT_PROVIDERS)
    assert lines[0].startswith("model,")
    assert (tmp_path / "cpu.png").read_bytes().startswith(b"\x89PNG")


def test_command_prints_tables(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("adamprox.bench.suite.SIZES", {"2^10": Model([(1024,)])})
    args = ["--models", "400 x 16", "--optimizers", "AdamProx", "optimi AdamW"]
    monkeypatch.setitem(sys.modules, "optimi", None)
    assert bench(tmp_path, *args, "--parts", "steps", "sizes", "memory", "picture") == 0
    out = capsys.readouterr().out
    for text in (
        "400 x 16",
        "AdamProx",
        "cold",
        "warm",
        "elements of one tensor",
        "1,024",
        "step_in_backward",
    ):
        assert text in out
    assert "skipped optimi AdamW: not installed: " in out
    assert (tmp_path / "cpu.png").exists()


def test_command_measures_the_memory_of_large_models(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("adamprox.bench.suite.LARGE", 0)
    args = ["--models", "400 x 16", "--optimizers", "AdamW", "--parts", "steps", "memory"]
    assert bench(tmp_path, *args, "--json") == 0
    results = json.loads(capsys.readouterr().out)
    for row in results["steps"]:
        assert abs(row["extra_bytes"]) < 1e6  # the system counts in batches
    plain, in_backward = results["memory"]
    assert in_backward["peak_bytes"] < 0.5 * plain["grad_bytes"] < plain["peak_bytes"]
    with (tmp_path / "cpu-memory.csv").open() as file:
        rows = [(row["way"], int(row["peak_bytes"])) for row in csv.DictReader(file)]
    assert rows == [(row["way"], row["peak_bytes"]) for row in (plain, in_backward)]


def test_command_tells_the_share_of_training(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("adamprox.bench.end_to_end.TURNS", 2)
    assert bench(tmp_path, "--parts", "end-to-end") == 0
    out = capsys.readouterr().out
    with (tmp_path / "cpu-end-to-end.csv").open() as file:
        rows = list(csv.DictReader(file))
    names = ["torch default", "torch fused", "AdamW"]
    assert [(row["network"], row["name"]) for row in rows] == [
        (network, name) for network in NETWORKS for name in names
    ]
    for row in rows:
        assert row["network"] in out
        step, rest = float(row["optimizer_ms"]), float(row["forward_backward_ms"])
        assert float(row["share_of_step"]) == pytest.approx(step / (step + rest), abs=1e-3)
    assert not (tmp_path / "cpu.csv").exists()


def test_command_lists_what_there_is(tmp_path, capsys):
    assert bench(tmp_path, "--list") == 0
    out = capsys.readouterr().out
    assert all(name in out for name in (*MODELS, *NAMES))
    assert not list(tmp_path.iterdir())


def test_the_backend_asked_for_runs_ours(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("ADAMPROX_BACKEND", "reference")
    assert [p.backend for p in providers(["AdamW"], CPU)[0]] == ["reference"]  # in training, too
    args = ["--parts", "steps", "--models", "400 x 16", "--optimizers", "AdamW", "--json"]
    for backends, backend in (([], "reference"), (["--backends", "cpu"], "cpu")):
        assert bench(tmp_path, *args, *backends) == 0
        rows = json.loads(capsys.readouterr().out)["steps"]
        assert [row["backend"] for row in rows] == [backend, backend]


def test_command_lists_what_the_backend_asked_for_can_run(tmp_path, capsys):
    assert bench(tmp_path, "--list", "--backends", "cuda") == 0
    lines = capsys.readouterr().out.splitlines()
    for name, runs in (("torch fused ", True), ("AdamW ", False), ("AdamW, tracked ", False)):
        [line] = [line for line in lines if line.strip().startswith(name)]
        assert line.rstrip().endswith("can run") == runs


@pytest.mark.parametrize("part", ["--list", "--json"])
def test_command_names_a_wrong_backend_of_the_environment(part, monkeypatch, tmp_path):
    monkeypatch.setenv("ADAMPROX_BACKEND", "abacus")
    with pytest.raises(SystemExit, match="bench: error: Invalid ADAMPROX_BACKEND: 'abacus'"):
        bench(tmp_path, part)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--models", "GPT-5"], "argument --models: invalid choice: 'GPT-5'"),
        (["--optimizers", "SGD"], "argument --optimizers: invalid choice: 'SGD'"),
        (["--backends", "abacus"], "argument --backends: invalid choice: 'abacus'"),
        (["--device", "abacus"], "argument --device: 'abacus' cannot be used: "),
        (["--device", "meta"], "argument --device: 'meta' cannot be used: "),
        (["--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["--threads", "0"], "argument --threads: '0' is not a positive int"),
        (["--seconds", "nan"], "argument --seconds: 'nan' is not a positive float"),
        (["--markdown"], "cpu.csv has no rows of the short selection"),
        (["--optimizers", "Apex FusedAdam"], "Apex FusedAdam: it runs on cuda tensors only"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_arguments_are_named(args, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        bench(tmp_path, *args)
    assert end.value.code != 0
    assert message in f"{capsys.readouterr().err}{end.value.code}"


def test_rows_with_other_columns_are_kept_apart(tmp_path):
    path = tmp_path / "rows.csv"
    records.append(path, [{"a": 1}])
    with pytest.raises(ValueError, match=r"rows.csv has other columns"):
        records.append(path, [{"b": 1}])
    assert path.read_text().split() == ["a", "1"]


def test_columns_that_a_file_lacks_are_added_to_it(tmp_path):
    path = tmp_path / "rows.csv"
    records.append(path, [{"a": 1}])
    records.append(path, [{"b": 2, "a": 3}])
    assert path.read_text().split() == ["b,a", ",1", "2,3"]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("package", ["tqdm", "matplotlib"])
def test_command_says_what_to_install(package, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit, match=rf"{package}.*please run: pip install .*{package[-5:]}"):
        bench(tmp_path)


@pytest.mark.parametrize(
    ("row", "caches"),
    [
        ({"caches": "cold", "elements": "6400"}, COLD),
        ({"caches": "", "elements": "6400"}, WARM),
        ({"elements": "6400"}, WARM),
        ({"elements": "3469514"}, EITHER),
    ],
)
def test_rows_from_before_the_column_have_a_state_of_the_caches(row, caches):
    assert records.caches_of(row) == caches


def test_newest_rows_are_of_one_run(tmp_path):
    def row(model, name, date, dtype="float32", caches=COLD):
        return {"model": model, "name": name, "date": date, "dtype": dtype, "caches": caches}

    path = tmp_path / "rows.csv"
    old = [row("a", "x", "1"), row("a", "y", "1"), row("b", "x", "1")]
    records.append(path, [*old, row("a", "x", "2"), row("a", "x", "3", "bfloat16")])
    records.append(path, [row("a", "x", "2", caches=WARM), row("b", "x", "4", caches=WARM)])
    newest = records.newest(path, "float32")
    dates = {(m, n): r["date"] for m, of_model in newest.items() for n, r in of_model.items()}
    assert dates == {("a", "x"): "2", ("b", "x"): "1"}


def test_readme_quotes_the_records(capsys):
    """Every figure of its table is that of the newest rows, and nothing else is in it."""
    text = (ROOT / "README.md").read_text()
    table = [line for line in text.splitlines() if line.startswith("| ") and "torch fused" in line]
    header = table[0]
    lines = text[text.index(header) :].split("\n\n")[0].splitlines()
    names = [cell.strip() for cell in header.strip("|").split("|")][1:]
    quoted = {
        (cells[0], name): cell
        for cells in ([c.strip() for c in line.strip("|").split("|")] for line in lines[2:])
        for name, cell in zip(names, cells[1:], strict=True)
    }
    assert {model for model, _ in quoted} == set(SHORT)
    newest = records.newest(ROOT / "bench/results/cpu.csv", "float32")
    for (model, name), cell in quoted.items():
        row = newest[model][name]
        assert records.caches_of(row) == caches_of(MODELS[model], "float32")[0], (model, name)
        median, _, ratio = cell.partition(" ")
        assert median == f"{float(row['p50_us']):,.0f}", (model, name)
        if name != "torch fused":
            assert ratio == f"({float(row['times_as_fast_as_torch_fused']):.2f})", (model, name)
    assert main(["bench", "--out", str(ROOT / "bench/results"), "--markdown"]) == 0
    assert capsys.readouterr().out == "\n".join(lines) + "\n"


def test_builds_are_compared_in_turns():
    site = Path(adamprox.__file__).parent.parent
    command = [sys.executable, ROOT / "bench/builds.py", *[site] * 3, "--rounds", "1", "--turns"]
    result = subprocess.run(
        [*command, "1", "--models", "400 x 16", "200000", "--threads", "1"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    heading, *lines = result.stdout.splitlines()
    assert heading.startswith("cold step")
    assert [line[:30].split() for line in lines] == [
        [*model.split(), build] for model in ("400 x 16", "200000") for build in "BC"
    ]
    for line in lines:
        a, b, ratio, _, _, _, *as_fast = line[30:].replace(",", "").split()
        assert float(a) > 0 < float(b)
        assert float(ratio) > 0
        assert len(as_fast) == 2


def test_a_site_without_a_build_is_named(tmp_path):
    command = [sys.executable, ROOT / "bench/builds.py", tmp_path, tmp_path, "--turns", "1"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode != 0
    assert f"{tmp_path} has no adamprox" in result.stderr


@pytest.mark.parametrize(
    ("limit", "used", "left"),
    [("1000\n", "300\n", 700), ("max\n", "300\n", math.inf), (None, "300\n", math.inf)],
)
def test_a_containers_limit_counts(limit, used, left, tmp_path):
    (tmp_path / "memory.current").write_text(used)
    if limit is not None:
        (tmp_path / "memory.max").write_text(limit)
    assert contenders._left_to_container(tmp_path) == left


def test_rows_stay_where_their_memory_cannot_be_measured(monkeypatch):
    def fails(*_):
        raise subprocess.CalledProcessError(-9, ["python"])

    monkeypatch.setattr(bench_steps, "peak_extra_bytes_of", fails)
    rows = [{"name": "AdamW", "model": "GPT-2 small", "backend": "cpu", "dtype": "float32"}]
    chosen, _ = providers(["AdamW"], torch.device("cpu"), ["cpu"])
    assert bench_steps.add_extra_bytes(rows, chosen) == "AdamW: its process ended with -9"
    assert "extra_bytes" not in rows[0]


@pytest.mark.parametrize(
    ("state", "expected"),
    [("tracked", True), ("grown records", True), ("changed", "dirty"), ("untracked", None)],
)
def test_a_rows_commit_is_of_what_runs(state, expected, tmp_path, monkeypatch):
    """Not of a checkout that an installed copy lies in, of this project or of another one."""
    monkeypatch.delenv("ADAMPROX_COMMIT", raising=False)
    (tmp_path / "bench/results").mkdir(parents=True)
    code, record = tmp_path / "bench/records.py", tmp_path / "bench/results/cpu.csv"
    code.touch()
    record.touch()

    def git(*arguments):
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        command = ["git", "-C", str(tmp_path), *who, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    git("add", "bench/results" if state == "untracked" else ".")
    git("commit", "-qm", "a")
    head = git("describe", "--always")
    if state == "grown records":
        record.write_text("more")
    elif state == "changed":
        code.write_text("more")
    monkeypatch.setattr(records, "__file__", str(code))
    assert records._commit() == {True: head, "dirty": f"{head}-dirty", None: None}[expected]


def test_a_bench_goes_on_where_memory_of_training_cannot_be_measured(monkeypatch):
    def fail(way):
        raise subprocess.CalledProcessError(-9, ["python"])

    monkeypatch.setattr(suite, "peak_training_bytes_of", fail)
    results = suite.Results([], [], [], [], {})
    suite.measure(["memory"], [], [], torch.device("cpu"), "float32", 0.1, results, lambda *_: None)
    assert results.memory == []
    assert "died with <Signals.SIGKILL: 9>" in results.skipped["memory of training"]
