"""``param_groups``: by torch's module types, and no param lost."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import adamprox
from adamprox.bench.small_gpt import SmallGPT
from adamprox.hyperparameters import RULE_OPTIONS, RULES
from registry import OPTIMIZERS


def decaying(model, *args) -> set[str]:
    """The names of the params in the first group, after a check that all are in one of the two."""
    groups = adamprox.param_groups(model, 0.1, *args)
    listed = [param for group in groups for param in group["params"]]
    assert sorted(map(id, listed)) == sorted(map(id, model.parameters()))
    decays = {id(p) for group in groups if group["weight_decay"] == 0.1 for p in group["params"]}
    assert all(group["weight_decay"] in (0.0, 0.1) for group in groups)
    return {name for name, param in model.named_parameters() if id(param) in decays}


class OwnNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))


class OwnLayerNorm(nn.LayerNorm):
    pass


MODULES = {
    "Linear": (nn.Linear(3, 4), {"weight"}),
    "Linear without bias": (nn.Linear(3, 4, bias=False), {"weight"}),
    "Bilinear": (nn.Bilinear(2, 3, 4), {"weight"}),
    "Conv1d": (nn.Conv1d(2, 3, 1), {"weight"}),
    "ConvTranspose2d": (nn.ConvTranspose2d(2, 3, 1), {"weight"}),
    "PReLU": (nn.PReLU(), {"weight"}),
    "LSTM": (nn.LSTM(2, 3), {"weight_ih_l0", "weight_hh_l0"}),
    "LSTM with projection": (
        nn.LSTM(2, 3, proj_size=1),
        {"weight_ih_l0", "weight_hh_l0", "weight_hr_l0"},
    ),
    "GRUCell": (nn.GRUCell(2, 3), {"weight_ih", "weight_hh"}),
    "MultiheadAttention": (
        nn.MultiheadAttention(4, 2, add_bias_kv=True),
        {"in_proj_weight", "out_proj.weight"},
    ),
    "TransformerEncoderLayer": (
        nn.TransformerEncoderLayer(4, 2, 8),
        {"self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight"}
        | {"linear2.weight"},
    ),
    "Embedding": (nn.Embedding(3, 4), set()),
    "EmbeddingBag": (nn.EmbeddingBag(3, 4), set()),
    "LayerNorm": (nn.LayerNorm(3), set()),
    "GroupNorm": (nn.GroupNorm(1, 3), set()),
    "RMSNorm": (nn.RMSNorm(3), set()),
    "BatchNorm1d": (nn.BatchNorm1d(3), set()),
    "BatchNorm2d": (nn.BatchNorm2d(3), set()),
    "BatchNorm3d": (nn.BatchNorm3d(3), set()),
    "SyncBatchNorm": (nn.SyncBatchNorm(3), set()),
    "InstanceNorm2d": (nn.InstanceNorm2d(3, affine=True), set()),
    "a subclass": (OwnLayerNorm(3), set()),
    "a norm of one's own": (OwnNorm(), {"weight"}),
    "weight norm": (
        parametrizations.weight_norm(nn.Linear(3, 4)),
        {"parametrizations.weight.original0", "parametrizations.weight.original1"},
    ),
    "a parametrized norm": (parametrizations.weight_norm(nn.LayerNorm((3, 4))), set()),
    "a parametrized bias": (
        parametrizations.weight_norm(nn.Linear(3, 4), "bias", dim=None),
        {"weight"},
    ),
}


@pytest.mark.parametrize(("module", "expected"), MODULES.values(), ids=MODULES)
def test_by_torchs_module_types(module, expected):
    assert decaying(module) == expected
    assert decaying(nn.Sequential(nn.Identity(), module)) == {f"1.{name}" for name in expected}


def test_a_tied_param_is_exempt_if_one_of_its_modules_is():
    embedding, head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
    head.weight = embedding.weight
    assert decaying(nn.Sequential(head, embedding)) == set()
    assert decaying(nn.Sequential(embedding, head)) == set()


def test_frozen_params_are_included():
    model = nn.Linear(3, 4).requires_grad_(False)
    assert decaying(model) == {"weight"}


def test_order_is_the_models():
    model = SmallGPT(layers=2)
    names = {param: name for name, param in model.named_parameters()}
    order = list(names.values())
    for group in adamprox.param_groups(model, 0.1):
        places = [order.index(names[param]) for param in group["params"]]
        assert places == sorted(places)
    exempt = {"tokens", "positions", "norm"}
    assert all(name.split(".")[0] not in exempt for name in decaying(model))
    assert {name.split(".")[-2] for name in decaying(model)} == {"qkv", "out", "0", "2"}


def test_more_types_can_be_exempt():
    model = nn.Sequential(nn.Linear(3, 3), OwnNorm())
    assert decaying(model, (*adamprox.WITHOUT_DECAY, OwnNorm)) == {"0.weight"}


@pytest.mark.parametrize("module", [nn.Linear(2, 2, bias=False), nn.LayerNorm(2), nn.ReLU()])
def test_no_group_is_empty(module):
    groups = adamprox.param_groups(module, 0.1)
    assert len(groups) == bool(list(module.parameters()))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_optimizers_take_them(optimizer):
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    opt = OPTIMIZERS[optimizer].cls(adamprox.param_groups(model, 0.5), lr=0.1)
    model(torch.ones(2, 3)).square().sum().backward()
    for param in model.parameters():
        param.grad.zero_()
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    opt.step()
    changed = {name for name, param in model.named_parameters() if (param != before[name]).any()}
    assert changed == {"0.weight"}  # by decay alone
    with pytest.raises(ValueError, match="Invalid weight_decay value: -1"):
        OPTIMIZERS[optimizer].cls(adamprox.param_groups(model, -1.0))


# Rules by layer.


def by_name(groups: list[dict]) -> dict[str, dict]:
    """The values of each param, after a check of the names."""
    values = {}
    for group in groups:
        assert len(group["params"]) == len(group["param_names"])
        rest = {k: v for k, v in group.items() if k not in ("params", "param_names")}
        values.update(dict.fromkeys(group["param_names"], rest))
    return values


def test_names_are_kept_and_telemetry_has_them():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    groups = adamprox.param_groups(model, 0.1)
    named = {name: p for g in groups for name, p in zip(g["param_names"], g["params"], strict=True)}
    assert named == dict(model.named_parameters())
    opt = adamprox.AdamW(groups)
    opt.track_updates(per="tensor")
    model(torch.ones(2, 3)).sum().backward()
    opt.step()
    assert {stats.name for stats in opt.update_stats()} == named.keys()
    torch.optim.AdamW(adamprox.param_groups(model, 0.1))  # takes them, too


def test_rules_are_by_patterns_and_types_and_the_first_one_counts():
    model = nn.ModuleDict(
        {
            "features": nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 3)),
            "head": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)),
        }
    )
    rules = {
        "features.2.*": {"decay": "prox_l2", "weight_decay": 1.0},
        nn.Conv2d: {"decay": "prox_l1", "weight_decay": 0.2},
        "head.?.weight": {"lr": 1e-4},
    }
    groups = adamprox.param_groups(model, 0.1, rules=rules)
    assert by_name(groups) == {
        "features.0.weight": {"decay": "prox_l1", "weight_decay": 0.2},
        "features.0.bias": {"decay": "prox_l1", "weight_decay": 0.0},
        "features.1.weight": {"weight_decay": 0.0},
        "features.1.bias": {"weight_decay": 0.0},
        "features.2.weight": {"decay": "prox_l2", "weight_decay": 1.0},
        "features.2.bias": {"decay": "prox_l2", "weight_decay": 0.0},
        "head.0.weight": {"weight_decay": 0.1, "lr": 1e-4},
        "head.1.weight": {"weight_decay": 0.1, "lr": 1e-4},
        "head.0.bias": {"weight_decay": 0.0},
        "head.1.bias": {"weight_decay": 0.0},
    }
    assert len(adamprox.AdamW(groups).param_groups) == len(groups)


def test_a_shared_param_matches_by_each_of_its_names():
    embedding, head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
    head.weight = embedding.weight
    model = nn.ModuleDict({"tokens": embedding, "head": head})
    groups = adamprox.param_groups(model, 0.1, rules={"head.*": {"lr": 1e-4}})
    assert by_name(groups) == {"tokens.weight": {"weight_decay": 0.0, "lr": 1e-4}}


@pytest.mark.parametrize(
    ("key", "error", "match"),
    [
        ("heads.*", ValueError, r"no param of the model matches 'heads\.\*'"),
        (nn.Conv2d, ValueError, "no param of the model matches <class"),
        (3, TypeError, "Invalid rules: 3, expected a pattern or a type of modules"),
        (int, TypeError, "expected a pattern or a type of modules"),
    ],
)
def test_rules_that_match_nothing_are_refused(key, error, match):
    with pytest.raises(error, match=match):
        adamprox.param_groups(nn.Linear(2, 2), 0.1, rules={key: {"lr": 1.0}})


def test_wrong_model():
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, but is a list"):
        adamprox.param_groups([nn.Parameter(torch.ones(2))], 0.1)


@pytest.mark.parametrize(
    ("optimizer", "other", "options"),
    [
        ("AdamProx", "prox_l1", {"bounds": (0.0, None), "metric": "adam"}),
        ("AdamProxL1", "prox_sq_l2", {"bounds": (0.0, None), "metric": "adam", "l2": 0.5}),
        ("AdamProxL2", "prox_l1", {"block": "row", "block_scaling": "sqrt"}),
    ],
)
def test_a_group_of_another_rule_has_that_rules_options(optimizer, other, options):
    """Not the constructor's of the same name."""
    own, its = (nn.Parameter(-torch.ones(3)) for _ in range(2))
    group = {"params": [its], "decay": other, "weight_decay": 0.1}
    opt = getattr(adamprox, optimizer)([{"params": [own]}, group], **options)
    assert {key: opt.param_groups[0][key] for key in options} == options
    has = {key: value for key, value in opt.param_groups[1].items() if key in RULE_OPTIONS}
    assert has == {key: RULE_OPTIONS[key] for key in has}
    assert has.keys() >= RULES[other].keys()
    its.grad = torch.zeros(3)
    opt.step()
    assert (its < 0).all()


def test_a_rule_whose_params_all_have_another_one_is_refused():
    rules = {"*": {"lr": 1.0}, "0.*": {"lr": 2.0}}
    with pytest.raises(ValueError, match=r"all params that match '0\.\*' match a key before it"):
        adamprox.param_groups(nn.Sequential(nn.Linear(2, 2)), 0.1, rules=rules)


def test_decoupled_decay_of_adam_is_adamw():
    params = [nn.Parameter(torch.ones(2))]
    with pytest.raises(TypeError, match="'decoupled_weight_decay': AdamW has decoupled decay"):
        adamprox.Adam(params, decoupled_weight_decay=True)
