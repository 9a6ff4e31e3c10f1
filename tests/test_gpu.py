"""On an NVIDIA GPU: the kernels give there what the CPU gives here, and behave as torch's do.

Run with ``TRITON_INTERPRET=0 pytest -m gpu``; elsewhere the same code is proven without a GPU.
"""

from __future__ import annotations

import pytest
import torch

from adamprox import _C
from adamprox.reference import CHUNK_SIZE, TILE_SIZE
from registry import CELLS, DTYPES, OPTIMIZERS, OPTIONS, Option, assert_same_bits, build, params_of
from test_blocks import ROWS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype"),
    pytest.mark.filterwarnings("ignore:Warning. Profiler clears events"),
    pytest.mark.filterwarnings("ignore:The CUDA Graph is empty"),
]

SIZES = (0, 1, TILE_SIZE - 1, TILE_SIZE, TILE_SIZE + 1, CHUNK_SIZE + 1, 5 * CHUNK_SIZE + 7)
# A huge tensor, and thousands of tiny ones between some of a few chunks: AdamProxL2's blocks wait.
MIXED_SIZES = (300 * CHUNK_SIZE + 5, *((1, 7, 64, 3 * CHUNK_SIZE) * 20), *((2,) * 4000))
# A group for each rule.
RULES = Option(groups=tuple({"decay": decay} for decay in dict.fromkeys(d for _, d, _ in _C.rules)))
every_backend = pytest.mark.parametrize("backend", ["cuda", "triton"])
every_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS)


def values_of(sizes: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=generator).to(dtype) for size in sizes]


def on_cpu(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer with its params and states moved, for a comparison of bits."""
    for param in params_of(optimizer):
        param.data = param.data.cpu()
        state = optimizer.state[param]
        optimizer.state[param] = {key: value.cpu() for key, value in state.items()}
    return optimizer


def run(
    optimizer,
    backend,
    device,
    *,
    dtype="float32",
    option="plain",
    sizes=SIZES,
    steps=10,
    tracked=False,
):
    param_dtype, state = DTYPES[dtype]
    option = RULES if option == "rules" else OPTIONS[option]
    values = [value.to(device) for value in values_of(sizes, param_dtype)]
    opt = build(optimizer, values, option, backend, state)
    if tracked:
        opt.track_updates(per="tensor")
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        for index, param in enumerate(params_of(opt)):
            grad = torch.randn(param.shape, generator=generator).to(param_dtype).to(device)
            param.grad = option.grad_layout(step, index)(grad)
        opt.step()
    return on_cpu(opt)


@pytest.mark.parametrize("option", ["plain", "amsgrad", "maximize", "groups", "misaligned"])
@pytest.mark.parametrize("dtype", DTYPES)
@every_optimizer
@every_backend
def test_a_gpu_gives_the_bits_of_the_cpu(backend, optimizer, dtype, option):
    on_gpu = run(optimizer, backend, "cuda", dtype=dtype, option=option)
    assert_same_bits(on_gpu, run(optimizer, "cpu", "cpu", dtype=dtype, option=option))


@pytest.mark.parametrize("optimizer", ["AdamW", "AdamProxL2"])
@pytest.mark.parametrize("dtype", DTYPES)
@every_backend
def test_what_is_tracked_has_the_numbers_of_the_cpu(backend, dtype, optimizer):
    cell = {"dtype": dtype, "option": "groups", "tracked": True}
    runs = run(optimizer, backend, "cuda", **cell), run(optimizer, "cpu", "cpu", **cell)
    assert_same_bits(*runs)
    ours, theirs = ([stats.to_dict() for stats in opt.update_stats()] for opt in runs)
    assert ours == theirs


@every_backend
def test_a_tracked_step_is_captured_after_one_of_the_same_tensors(backend):
    values = [torch.ones(100, device="cuda")]
    opt = build("AdamW", values, Option({"capturable": True}), backend, None)
    params_of(opt)[0].grad = torch.ones(100, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        opt.step()
        opt.track_updates()
    with (
        pytest.raises(RuntimeError, match="tracked step in a CUDA graph needs one of the same"),
        torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream),
    ):
        opt.step()
    with torch.cuda.stream(stream):
        opt.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        opt.step()
    graph.replay()
    assert [stats.step for stats in opt.update_stats()] == [3]


PROXIMAL_OPTIONS = [
    cell
    for cell in CELLS
    if cell[1] in ("metric", "bounds", "elastic_net", "blocks", "cautious", "ema")
]


@pytest.mark.parametrize(("optimizer", "option"), PROXIMAL_OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@every_backend
def test_options_of_the_proximal_rules(backend, dtype, optimizer, option):
    sizes = ROWS if option == "blocks" else SIZES
    cell = {"dtype": dtype, "option": option, "sizes": sizes}
    on_gpu = run(optimizer, backend, "cuda", **cell)
    assert_same_bits(on_gpu, run(optimizer, "cpu", "cpu", **cell))


@pytest.mark.parametrize("dtype", DTYPES)
@every_backend
def test_rules_share_a_step(backend, dtype):
    sizes = SIZES * len(RULES.groups) + (5,) * 100
    on_gpu = run("AdamW", backend, "cuda", dtype=dtype, option="rules", sizes=sizes)
    assert_same_bits(on_gpu, run("AdamW", "cpu", "cpu", dtype=dtype, option="rules", sizes=sizes))


@every_optimizer
def test_the_reference_gives_the_same_bits_on_a_gpu(optimizer):
    assert_same_bits(run(optimizer, "reference", "cuda"), run(optimizer, "cpu", "cpu"))


@every_optimizer
@every_backend
def test_more_tensors_than_fit_into_a_kernels_parameters(backend, optimizer):
    sizes = tuple(index % 5 for index in range(6000))
    on_gpu = run(optimizer, backend, "cuda", sizes=sizes, steps=3)
    assert_same_bits(on_gpu, run(optimizer, "cpu", "cpu", sizes=sizes, steps=3))


@every_backend
def test_blocks_wait_for_one_another(backend):
    """Step after step: what they count is zero again after each."""
    on_gpu = run("AdamProxL2", backend, "cuda", sizes=MIXED_SIZES, option="groups", steps=5)
    on_cpu = run("AdamProxL2", "cpu", "cpu", sizes=MIXED_SIZES, option="groups", steps=5)
    assert_same_bits(on_gpu, on_cpu)


def l2_with_grads(sizes: tuple[int, ...], device: str, backend: str) -> torch.optim.Optimizer:
    values = [value.to(device) for value in values_of(sizes, torch.float32)]
    opt = build("AdamProxL2", values, OPTIONS["plain"], backend, None)
    for param in params_of(opt):
        param.grad = param.detach().clone()
    return opt


def l2_stepped_on_cpu(sizes: tuple[int, ...], steps: int) -> torch.optim.Optimizer:
    opt = l2_with_grads(sizes, "cpu", "cpu")
    for _ in range(steps):
        opt.step()
    return opt


def test_blocks_of_two_streams_wait_at_the_same_time():
    """More blocks than a GPU holds, of two launches, each of which waits for its own."""
    sizes = (2000 * CHUNK_SIZE,)
    streams = [torch.cuda.Stream() for _ in range(2)]
    optimizers = [l2_with_grads(sizes, "cuda", "cuda") for _ in streams]
    torch.cuda.synchronize()
    for _ in range(20):
        for stream, opt in zip(streams, optimizers, strict=True):
            with torch.cuda.stream(stream):
                opt.step()
    torch.cuda.synchronize()
    for opt in optimizers:
        assert_same_bits(on_cpu(opt), l2_stepped_on_cpu(sizes, 20))


def test_a_step_on_another_stream_works_in_memory_of_its_own():
    streams = [torch.cuda.Stream() for _ in range(2)]
    opt = l2_with_grads(MIXED_SIZES, "cuda", "cuda")
    torch.cuda.synchronize()
    for step in range(6):
        stream, other = streams[step % 2], streams[(step + 1) % 2]
        stream.wait_stream(other)
        with torch.cuda.stream(stream):
            opt.step()
    torch.cuda.synchronize()
    assert_same_bits(on_cpu(opt), l2_stepped_on_cpu(MIXED_SIZES, 6))


def kernels_of_a_step(optimizer: str, backend: str, option: Option) -> list[str]:
    """What a step over 400 tensors of two dtypes launches."""
    values = [
        torch.ones(1 + i % 5, dtype=(torch.float32, torch.bfloat16)[i % 2], device="cuda")
        for i in range(400)
    ]
    opt = build(optimizer, values, option, backend, None)
    for param in params_of(opt):
        param.grad = torch.ones_like(param)
    opt.step()  # which also makes the states
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        opt.step()
        torch.cuda.synchronize()
    on_gpu = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return [name for name in on_gpu if not name.startswith("Mem")]


@every_optimizer
@every_backend
def test_a_step_is_one_launch(backend, optimizer):
    twice = backend == "triton" and optimizer == "AdamProxL2"
    kernels = kernels_of_a_step(optimizer, backend, OPTIONS["groups"])
    assert len(kernels) == (2 if twice else 1), kernels


@every_backend
def test_all_rules_are_two_launches(backend):
    kernels = kernels_of_a_step("AdamW", backend, RULES)
    assert len(kernels) == 2, kernels


@every_backend
def test_the_step_runs_on_the_current_stream(backend):
    """A step on another stream, then one on the default one, without waiting in between."""
    stream = torch.cuda.Stream()
    param = torch.nn.Parameter(torch.zeros(1 << 24, device="cuda"))
    opt = OPTIMIZERS["AdamW"].cls([param], lr=1.0, weight_decay=0.0, backend=backend)
    param.grad = torch.ones_like(param)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        param.grad.mul_(-1.0)
        opt.step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.testing.assert_close(param.detach(), torch.ones_like(param))


# A payload that fits into a kernel's parameters, and one that does not.
@pytest.mark.parametrize("sizes", [(1000,), (2,) * 6000], ids=["inline", "uploaded"])
@every_backend
def test_a_step_does_not_wait_for_the_gpu(backend, sizes):
    opt = l2_with_grads(sizes, "cuda", backend)
    opt.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        opt.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_backend
def test_capture_without_capturable_is_refused_in_torchs_words(backend):
    param = torch.nn.Parameter(torch.zeros(8, device="cuda"))
    param.grad = torch.ones_like(param)
    opt = OPTIMIZERS["AdamW"].cls([param], backend=backend)
    opt.step()
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="capturable is False"), torch.cuda.graph(graph):
        opt.step()


@every_backend
def test_a_captured_step_may_skip_a_param(backend):
    params = [torch.nn.Parameter(torch.zeros(8, device="cuda")) for _ in range(2)]
    for param in params:
        param.grad = torch.ones_like(param)
    opt = OPTIMIZERS["AdamW"].cls(params, capturable=True, backend=backend)
    opt.step()
    params[0].grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        opt.step()
    graph.replay()
    graph.replay()
    assert [opt.state[param]["step"].item() for param in params] == [1, 3]


@every_backend
def test_steps_of_empty_tensors_are_counted(backend):
    """There is nothing to update, as on a rank of empty shards; the counts are on the GPU."""
    param = torch.nn.Parameter(torch.ones(0, 3, device="cuda"))
    param.grad = torch.ones_like(param)
    opt = OPTIMIZERS["AdamW"].cls([param], capturable=True, backend=backend)
    for _ in range(3):
        opt.step()
    assert opt.state[param]["step"].item() == 3


# A payload that fits into a kernel's parameters, and one that does not.
@pytest.mark.parametrize("sizes", [SIZES, tuple(index % 5 for index in range(6000))])
@every_optimizer
@every_backend
def test_graph_replays_equal_eager_steps_to_the_bit(backend, optimizer, sizes):
    """100 replays while lr and betas change in place: the bound of the difference is zero.

    Fewer of thousands of tensors, which take the CPU long.
    """
    values = values_of(sizes, torch.float32)
    number = {"dtype": torch.float64, "device": "cuda"}
    lr, beta1, beta2 = (torch.tensor(x, **number) for x in (0.5, 0.9, 0.99))
    ours = build(
        optimizer,
        [value.to("cuda") for value in values],
        Option({"capturable": True, "lr": lr, "betas": (beta1, beta2)}),
        backend,
        None,
    )
    theirs = build(optimizer, values, OPTIONS["plain"], "cpu", None)
    for param in params_of(ours):
        param.grad = torch.zeros_like(param)
    graph, generator = torch.cuda.CUDAGraph(), torch.Generator().manual_seed(1)
    for step in range(102 if len(sizes) < 100 else 12):
        for on_gpu, on_host in zip(params_of(ours), params_of(theirs), strict=True):
            on_host.grad = torch.randn(on_host.shape, generator=generator)
            on_gpu.grad.copy_(on_host.grad)
        group = theirs.param_groups[0]
        group["lr"], group["betas"] = 0.5 / (1 + step), (0.5 + 0.4 / (1 + step), 0.99)
        lr.fill_(group["lr"])
        beta1.fill_(group["betas"][0])
        if step == 0:  # as torch asks: on another stream
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                ours.step()
            torch.cuda.current_stream().wait_stream(stream)
        else:
            if step == 1:
                with torch.cuda.graph(graph):
                    ours.step()
            graph.replay()
        theirs.step()
    assert_same_bits(on_cpu(ours), theirs)


@pytest.mark.parametrize("capturable", [False, True])
@every_backend
def test_a_scaled_step_does_not_wait_for_the_gpu(backend, capturable):
    """And with found_inf it changes nothing; the reference on the CPU gives the same bits."""
    values = values_of(SIZES, torch.float32)
    option = Option({"capturable": capturable})
    ours = build("AdamProxL2", [v.to("cuda") for v in values], option, backend, None)
    theirs = build("AdamProxL2", values, OPTIONS["plain"], "cpu", None)
    for param in (*params_of(ours), *params_of(theirs)):
        param.grad = param.detach().clone()
    ours.grad_scale = torch.ones((), device="cuda")
    ours.found_inf = torch.zeros((), device="cuda")
    ours.step()
    theirs.step()
    for found_inf in (0.0, 1.0, 0.0):
        ours.found_inf.fill_(found_inf)
        torch.cuda.set_sync_debug_mode("error")
        try:
            ours.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        if found_inf == 0:
            theirs.step()
    del ours.grad_scale, ours.found_inf
    ours.step()  # the counts stay on the GPU
    theirs.step()
    assert_same_bits(on_cpu(ours), theirs)


@every_backend
def test_grad_scaler_on_a_gpu(backend):
    """A real one: an infinite grad in the third step halves the scale, and skips the step."""
    value = torch.linspace(-1, 1, 1000)
    ours = build("AdamProx", [value.to("cuda")], Option({"fused": True}), backend, None)
    theirs = build("AdamProx", [value], OPTIONS["plain"], "cpu", None)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10)
    for step in range(6):
        for opt in (ours, theirs):
            opt.zero_grad()
        factor = torch.inf if step == 2 else 1.0 + step
        scaler.scale((params_of(ours)[0] * factor).sum()).backward()
        scaler.step(ours)
        scaler.update()
        if step != 2:
            (params_of(theirs)[0] * factor).sum().backward()
            theirs.step()
    assert scaler.get_scale() == 2.0**9
    assert_same_bits(on_cpu(ours), theirs)


def test_more_than_two_to_the_31_elements():
    numel = 2**31 + CHUNK_SIZE + 3
    if torch.cuda.mem_get_info()[0] < 11 * numel:
        pytest.skip("not enough GPU memory for 2^31 elements")
    param = torch.nn.Parameter(torch.zeros(numel, dtype=torch.bfloat16, device="cuda"))
    param.grad = torch.zeros_like(param)
    param.grad[-1] = 1
    opt = OPTIMIZERS["AdamW"].cls([param], lr=1.0, weight_decay=0.0, backend="cuda")
    opt.step()
    assert param[-1].item() == -1
    assert param.count_nonzero().item() == 1


@pytest.mark.parametrize(
    ("optimizer", "option"),
    [*((name, "groups") for name in OPTIMIZERS), ("AdamW", "rules"), ("AdamProxL2", "blocks")],
)
def test_short_run(optimizer, option):
    """What compute-sanitizer looks at: every rule, full and partial tiles, all dtypes."""
    sizes = ROWS if option == "blocks" else (*SIZES, 40 * CHUNK_SIZE, 2 * CHUNK_SIZE)
    for dtype in DTYPES:
        run(optimizer, "cuda", "cuda", dtype=dtype, option=option, sizes=sizes, steps=2)
